// Loading: the index of all slides once, the words of a slide when it is shown.
const meta = JSON.parse(document.getElementById("meta").textContent);
const at = (id) => document.getElementById(id);
const WORD_FILES_KEPT = 120;

const ids = new Array(meta.slides);
const metrics = {};
const categories = {};
for (const name of meta.metrics) metrics[name] = new Float64Array(meta.slides).fill(NaN);
for (const name of Object.keys(meta.categories)) categories[name] = new Uint32Array(meta.slides);
const words = new Map();

window.cytorayQc = function (kind, number, data) {
  if (kind === "rows") {
    words.set(number, data);
    return;
  }
  const first = number * meta.index_rows;
  data.id.forEach((id, i) => { ids[first + i] = id; });
  for (const name of meta.metrics) {
    data[name].forEach((value, i) => { if (value !== null) metrics[name][first + i] = value; });
  }
  for (const name of Object.keys(categories)) categories[name].set(data[name], first);
};

function load(kind, number) {
  const source = `${meta.prefix}-${kind}-${String(number).padStart(5, "0")}.js`;
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.onload = () => { script.remove(); resolve(); };
    script.onerror = () => reject(new Error(`${source} is missing; it belongs beside this page`));
    script.src = source;
    document.head.append(script);
  });
}

async function loadIndex() {
  for (let number = 0; number < meta.index_files; number++) {
    await load("index", number);
    if (meta.index_files > 1) at("where").textContent = `loading ${number + 1} of ${meta.index_files}`;
  }
}

const underway = new Map();

async function wordsOf(slide) {
  const file = Math.floor(slide / meta.rows);
  if (!words.has(file)) {
    if (!underway.has(file)) underway.set(file, load("rows", file).finally(() => underway.delete(file)));
    await underway.get(file);
  }
  const found = words.get(file);
  words.delete(file);
  words.set(file, found);  // the least recently used goes first
  while (words.size > WORD_FILES_KEPT) words.delete(words.keys().next().value);
  return found[slide % meta.rows];
}

const category = (name, slide) => meta.categories[name][categories[name][slide]];
const isUsable = (slide) => categories.reason[slide] === 0;
