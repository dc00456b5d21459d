// What is asked for stands in the page's address after #, e.g. #sort=focus&page=2&reason=no_nuclei
const SIZES = [25, 50, 100];
const NOT_ASKED = ["page", "size", "slide"];  // turn pages or show a slide, choose none
const ASCENDING_FIRST = new Set(["id", "focus"]);

function asked() {
  const params = new URLSearchParams(location.hash.slice(1));
  const sort = params.get("sort") || "worst";
  const size = Number(params.get("size"));
  return {
    params,
    sort: sort === "id" || sort === "worst" || meta.metrics.includes(sort) ? sort : "worst",
    ascending: (params.get("dir") || (ASCENDING_FIRST.has(sort) ? "asc" : "desc")) === "asc",
    page: Math.max(1, Math.floor(Number(params.get("page"))) || 1),
    size: SIZES.includes(size) ? size : SIZES[0],
  };
}

// Change parts of the address; null takes one out. A new question starts at its first page.
function ask(changes, { quiet = false } = {}) {
  const params = new URLSearchParams(location.hash.slice(1));
  if (!("page" in changes)) params.delete("page");
  for (const [name, value] of Object.entries(changes)) {
    if (value === null || value === "") params.delete(name);
    else params.set(name, value);
  }
  params.delete("slide");
  const hash = "#" + params.toString();
  if (quiet) {
    history.replaceState(null, "", hash);
    draw();
  } else if (hash !== location.hash) {
    location.hash = hash;
  }
}

function rangeOf(text) {
  const [low, high] = text.split("..").map((part) => (part === "" ? null : Number(part)));
  return { low: low ?? -Infinity, high: high ?? Infinity };
}

const STATUS_TESTS = {
  ok: isUsable,
  warned: (slide) => isUsable(slide) && metrics.warnings[slide] > 0,
  quarantined: (slide) => !isUsable(slide),
  regions: (slide) => metrics.regions[slide] > 0,
};

function textOf(slide) {
  const parts = [ids[slide]];
  for (const name of Object.keys(categories)) parts.push(category(name, slide));
  return parts.join(" ").toLowerCase();
}

function testsOf(params) {
  const tests = [];
  for (const [name, value] of params) {
    const column = name === "reason" ? "reason" : name.startsWith("is.") ? name.slice(3) : "";
    if (name === "status" && STATUS_TESTS[value]) tests.push(STATUS_TESTS[value]);
    else if (Object.hasOwn(categories, column)) {
      const code = meta.categories[column].indexOf(value);
      tests.push((slide) => categories[column][slide] === code);
    } else if (meta.metrics.includes(name)) {
      const { low, high } = rangeOf(value);
      tests.push((slide) => metrics[name][slide] >= low && metrics[name][slide] < high);
    } else if (name === "find") {
      const wanted = value.toLowerCase().split(/\s+/).filter(Boolean);
      tests.push((slide) => { const text = textOf(slide); return wanted.every((word) => text.includes(word)); });
    }
  }
  return tests;
}

const collator = new Intl.Collator(undefined, { numeric: true });

function comparerOf({ sort, ascending }) {
  const sign = ascending ? 1 : -1;
  if (sort === "id") return (a, b) => sign * collator.compare(ids[a], ids[b]) || a - b;
  const values = metrics[sort === "worst" ? "trouble" : sort];
  const reasons = categories.reason;
  return (a, b) => {
    const x = values[a], y = values[b];
    if (x !== x || y !== y) return (x !== x) - (y !== y) || a - b;  // unknown comes last
    return sign * (x - y) || (sort === "worst" ? reasons[a] - reasons[b] : 0) || a - b;
  };
}

let answered = { key: null, slides: [] };

// Numbers of the slides asked for, in order; kept while only the page is turned.
function select(question) {
  const params = new URLSearchParams(question.params);
  for (const name of NOT_ASKED) params.delete(name);
  const key = params.toString();
  if (answered.key === key) return answered.slides;
  const tests = testsOf(params);
  const slides = [];
  for (let slide = 0; slide < meta.slides; slide++) {
    if (tests.every((test) => test(slide))) slides.push(slide);
  }
  slides.sort(comparerOf(question));
  answered = { key, slides };
  return slides;
}
