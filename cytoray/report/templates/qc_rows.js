// A slide as a row of the table, and large in the viewer.
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
const whole = (value) => value.toLocaleString("en");
const COLUMNS = [
  ["id", "slide"],
  ["tiles", "tiles", whole],
  ["nuclei", "nuclei", whole],
  ["nuclei_per_tile", "nuclei per tile", short],
  ["mpp", "um per px", short, (slide) => category("mpp_source", slide)],
  ["foreground", "foreground", percent],
  ["focus", "focus", (value) => value.toFixed(2)],
  ["blurred", "out of focus", percent],
  ["regions", "regions left out", whole],
];
const KNOWN = new Set(["id"]);

// Columns no slide has a value for are left out.
function findColumns() {
  for (const [name] of COLUMNS) {
    if (name !== "id" && metrics[name].some((value) => value === value)) KNOWN.add(name);
  }
}

const columns = () => COLUMNS.filter(([name]) => KNOWN.has(name));

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function button(className, text, action) {
  const made = element("button", className, text);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}

function badge(slide) {
  const reason = category("reason", slide);
  if (reason) return element("span", "badge bad", reason.replaceAll("_", " "));
  const warned = metrics.warnings[slide] > 0;
  return element("span", warned ? "badge warn" : "badge", warned ? "worth a look" : "usable");
}

function picture(slide, kind, url, lazy) {
  const image = element("img");
  if (lazy) image.loading = "lazy";
  image.alt = `${meta.kinds[kind]} of ${ids[slide]}`;
  image.src = url;
  return image;
}

function strip(slide, shown, position) {
  const kinds = Object.entries(shown.images);
  if (!kinds.length) return "";
  const made = button("strip", undefined, () => view(position));
  made.setAttribute("aria-label", `Show ${ids[slide]} large`);
  for (const [kind, url] of kinds) made.append(picture(slide, kind, url, true));
  return made;
}

function notes(slide, shown) {
  const box = element("div", "notes");
  for (const [code, message, stage] of shown.problems) {
    const line = element("p", isUsable(slide) ? "warned" : "reason", message || code);
    if (stage && stage !== "index") line.append(element("span", "quiet", ` (in ${stage})`));
    line.title = code;
    box.append(line);
  }
  for (const text of shown.warnings) box.append(element("p", "warned", text));
  return box;
}

function facts(shown) {
  const list = element("dl", "small");
  for (const [name, value] of shown.facts) {
    const pair = element("div");
    pair.append(element("dt", "", name), element("dd", "", value));
    list.append(pair);
  }
  return list;
}

function regions(slide, shown) {
  if (!shown.regions.length) return null;
  const box = element("details", "regions");
  const number = metrics.regions[slide];
  box.append(element("summary", "", number === 1 ? "which region" : "which regions"));
  const list = element("ul");
  for (const [region, code, message] of shown.regions) {
    const line = element("li");
    line.append(element("code", "", region), ` ${message || code}`);
    list.append(line);
  }
  if (number > shown.regions.length) {
    list.append(element("li", "quiet", `and ${whole(number - shown.regions.length)} more, see quarantine.parquet`));
  }
  box.append(list);
  return box;
}

function rowOf(slide, shown, position) {
  const row = element("tr", isUsable(slide) ? "" : "bad");
  row.dataset.slide = ids[slide];
  const about = element("td", "about");
  const head = element("div", "head");
  head.append(button("name", ids[slide], () => view(position)), badge(slide));
  about.append(strip(slide, shown, position), head, notes(slide, shown), facts(shown));
  const left = regions(slide, shown);
  if (left) about.append(left);
  row.append(about);
  const numbers = columns().slice(1).filter(([name]) => name !== "regions");
  if (numbers.every(([name]) => metrics[name][slide] !== metrics[name][slide])) {
    about.colSpan = columns().length;
    return row;
  }
  for (const [name, title, format, source] of columns().slice(1)) {
    const value = metrics[name][slide];
    const cell = element("td", "number", value === value ? format(value) : "\u2013");
    cell.dataset.title = title;
    if (source && source(slide)) cell.append(element("span", "source", source(slide)));
    row.append(cell);
  }
  return row;
}

function heads(question) {
  return columns().map(([name, title]) => {
    const head = element("th", name === "id" ? "" : "number");
    head.scope = "col";
    const active = question.sort === name;
    if (active) head.setAttribute("aria-sort", question.ascending ? "ascending" : "descending");
    const made = button("sort", title, () => {
      const first = ASCENDING_FIRST.has(name) ? "asc" : "desc";
      const now = active ? (question.ascending ? "desc" : "asc") : first;
      ask({ sort: name, dir: now === first ? null : now });
    });
    made.dataset.sort = name;
    if (active) made.append(element("span", "arrow", question.ascending ? " \u25B2" : " \u25BC"));
    head.append(made);
    return head;
  });
}

function large(slide, shown) {
  const body = element("div", Object.keys(shown.images).length ? "large" : "large bare");
  const shots = element("div", "shots");
  for (const [kind, url] of Object.entries(shown.images)) {
    const figure = element("figure");
    const link = element("a");
    link.href = url;
    link.append(picture(slide, kind, url, false));
    const caption = element("figcaption", "", meta.kinds[kind]);
    if (kind === "focus") caption.append(element("span", "scale", "blurred"), element("span", "ramp"), element("span", "scale", "sharp"));
    figure.append(link, caption);
    shots.append(figure);
  }
  const side = element("div", "side");
  side.append(notes(slide, shown));
  const numbers = { facts: [] };
  for (const [name, title, format, source] of columns().slice(1)) {
    const value = metrics[name][slide];
    if (value === value) numbers.facts.push([title, format(value) + (source && source(slide) ? ` (${source(slide)})` : "")]);
  }
  side.append(facts(numbers), facts(shown));
  const left = regions(slide, shown);
  if (left) { left.open = true; side.append(left); }
  body.append(shots, side);
  return body;
}
