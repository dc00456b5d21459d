// Histograms of all slides, with those shown below drawn over them. A bar is a filter.
const CHARTS = [
  ["tiles", "tiles per slide"],
  ["nuclei_per_tile", "nuclei per tile"],
  ["mpp", "um per px"],
  ["focus", "focus, median of a slide"],
];
const BARS = 24, FEW = 12, WIDTH = 252, HEIGHT = 84;
const SVG = "http://www.w3.org/2000/svg";
const charts = [];

function short(value) {
  if (!Number.isFinite(value)) return "";
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}

// A round step of 1, 2, 2.5 or 5 times a power of ten.
function roundStep(step) {
  const power = 10 ** Math.floor(Math.log10(step));
  return power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= step * 0.999);
}

// Bars [{low, high, label}]: one a value where there are few, else equal steps; the longest
// hundredth at the top shares one bar.
function binsOf(values) {
  const sorted = values.filter((value) => value === value).sort();
  if (!sorted.length) return [];
  const distinct = [];
  for (const value of sorted) {
    if (value !== distinct[distinct.length - 1]) distinct.push(value);
    if (distinct.length > FEW) break;
  }
  if (distinct.length <= FEW) {
    return distinct.map((value) => ({ low: value, high: value * (1 + 1e-9) + 1e-12, label: short(value) }));
  }
  const lowest = sorted[0], top = sorted[sorted.length - 1];
  const most = sorted[Math.floor(0.99 * (sorted.length - 1))];
  const step = roundStep((most - lowest) / BARS || 1);
  const first = Math.floor(lowest / step) * step;
  const number = Math.max(1, Math.ceil((most - first) / step + 1e-9));
  return Array.from({ length: number }, (_, i) => {
    const low = Number((first + i * step).toPrecision(12));
    const high = Number((first + (i + 1) * step).toPrecision(12));
    const open = i === number - 1 && top >= high;
    return { low, high: open ? Infinity : high, label: open ? `${short(low)} and more` : `${short(low)} to ${short(high)}` };
  });
}

function countIn(bins, values, slides) {
  const counts = new Array(bins.length).fill(0);
  const lows = bins.map((bin) => bin.low);
  for (const slide of slides) {
    const value = values[slide];
    let low = 0, high = lows.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (lows[middle] <= value) low = middle + 1; else high = middle;
    }
    if (low > 0 && value < bins[low - 1].high) counts[low - 1]++;
  }
  return counts;
}

function shape(name, attributes, parent) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent.append(made);
  return made;
}

function makeChart(name, title) {
  const values = metrics[name], bins = binsOf(values);
  if (!bins.length) return;
  const all = countIn(bins, values, values.keys());
  const peak = Math.max(...all), wide = Math.min(WIDTH / bins.length, 40);
  const box = element("figure", "chart");
  const caption = element("figcaption", "", title);
  const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": title }, box);
  const scaled = (count) => (count ? Math.max(2, (HEIGHT - 6) * count / peak) : 0);
  const place = (i, height) => ({ x: (i * wide + 0.5).toFixed(2), width: (wide - 1).toFixed(2), y: (HEIGHT - height).toFixed(2), height: height.toFixed(2) });
  const readout = element("div", "readout");
  const usual = `${short(bins[0].low)} to ${short(Math.max(...values.filter((v) => v === v)))}`;
  readout.textContent = usual;
  const chart = { name, bins, values, svg, over: [], bars: [], scaled, place, focus: 0 };
  bins.forEach((bin, i) => {
    const says = `${bin.label}: ${all[i].toLocaleString("en")} slide${all[i] === 1 ? "" : "s"}`;
    const bar = shape("g", { class: "bar", role: "button", tabindex: i ? -1 : 0, "aria-label": `${title} ${says}` }, svg);
    shape("rect", { class: "hit", ...place(i, HEIGHT) }, bar);
    shape("rect", { class: "all", ...place(i, scaled(all[i])) }, bar);
    chart.over.push(shape("rect", { class: "shown", ...place(i, 0) }, bar));
    const tell = () => { readout.textContent = says; };
    const choose = () => {
      const range = `${bin.low}..${Number.isFinite(bin.high) ? bin.high : ""}`;
      ask({ [name]: asked().params.get(name) === range ? null : range });
    };
    bar.addEventListener("mouseenter", tell);
    bar.addEventListener("focus", tell);
    bar.addEventListener("mouseleave", () => { readout.textContent = usual; });
    bar.addEventListener("click", choose);
    bar.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(); }
      else if (step && chart.bars[i + step]) {
        event.preventDefault();
        bar.setAttribute("tabindex", -1);
        chart.bars[i + step].setAttribute("tabindex", 0);
        chart.bars[i + step].focus();
      }
    });
    chart.bars.push(bar);
  });
  box.prepend(caption);
  box.append(readout);
  document.querySelector(".charts").append(box);
  charts.push(chart);
}

function makeCharts() {
  for (const [name, title] of CHARTS) makeChart(name, title);
  at("charts").hidden = charts.length === 0;
}

function drawCharts(slides, params) {
  for (const { name, bins, values, over, bars, scaled, place } of charts) {
    const counts = countIn(bins, values, slides);
    const range = params.has(name) ? rangeOf(params.get(name)) : null;
    bins.forEach((bin, i) => {
      for (const [key, value] of Object.entries(place(i, scaled(counts[i])))) over[i].setAttribute(key, value);
      const chosen = range !== null && bin.low >= range.low && bin.low < range.high;
      bars[i].setAttribute("aria-pressed", chosen);
    });
  }
}
