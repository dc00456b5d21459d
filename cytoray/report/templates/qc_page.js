// Drawing what is asked for, and what the reader does.
let turn = 0;
let shownNow = { slides: [], question: null };

function chips(question) {
  const made = [];
  for (const [name, value] of question.params) {
    if (["sort", "dir", ...NOT_ASKED].includes(name)) continue;
    const column = COLUMNS.find(([metric]) => metric === name);
    let words = `${name.replace(/^is\./, "").replaceAll("_", " ")}: ${value.replaceAll("_", " ")}`;
    if (name === "status") words = [...at("status").options].find((option) => option.value === value)?.text ?? words;
    if (meta.metrics.includes(name)) {
      const { low, high } = rangeOf(value);
      const span = high === Infinity ? `${short(low)} and more` : short(low) === short(high) ? short(low) : `${short(low)} to ${short(high)}`;
      words = `${column ? column[1] : name}: ${span}`;
    }
    const chip = button("chip", words + " \u00D7", () => ask({ [name]: null }));
    chip.setAttribute("aria-label", `Remove filter ${words}`);
    made.push(chip);
  }
  if (made.length > 1) made.push(button("chip clear", "clear all", () => { location.hash = ""; }));
  return made;
}

function fillControls(question, pages) {
  const { params, page, size, sort } = question;
  if (document.activeElement !== at("find")) at("find").value = params.get("find") || "";
  at("status").value = params.get("status") || "";
  at("size").value = String(size);
  at("worst").setAttribute("aria-pressed", sort === "worst" && !question.ascending);
  for (const menu of document.querySelectorAll("select[data-category]")) {
    menu.value = params.get(`is.${menu.dataset.category}`) || "";
  }
  at("page").value = page;
  at("page").max = pages;
  at("pages").textContent = `of ${whole(pages)}`;
  at("back").disabled = page <= 1;
  at("next").disabled = page >= pages;
}

async function draw() {
  const mine = ++turn;
  const question = asked();
  const slides = select(question);
  const pages = Math.max(1, Math.ceil(slides.length / question.size));
  question.page = Math.min(question.page, pages);
  const first = (question.page - 1) * question.size;
  const part = slides.slice(first, first + question.size);
  let shown;
  try {
    shown = await Promise.all(part.map(wordsOf));
  } catch (error) {
    at("where").textContent = error.message;
    return;
  }
  if (mine !== turn) return;
  shownNow = { slides, question };
  const headFocus = document.activeElement?.dataset?.sort;
  at("heads").replaceChildren(...heads(question));
  if (headFocus) document.querySelector(`button[data-sort="${headFocus}"]`)?.focus();
  at("rows").replaceChildren(...part.map((slide, i) => rowOf(slide, shown[i], first + i)));
  at("chips").replaceChildren(...chips(question));
  at("where").textContent = part.length
    ? `${whole(first + 1)} to ${whole(first + part.length)} of ${whole(slides.length)} slides`
    : "no such slide";
  fillControls(question, pages);
  drawCharts(slides, question.params);
  const wanted = question.params.get("slide");
  if (wanted !== null) await view(slides.findIndex((slide) => ids[slide] === wanted));
  document.body.dataset.ready = location.hash || "#";
}

let viewed = 0;
let viewTurn = 0;

// Put the slide in view into the address, or take it out, without asking anew.
function noteViewed(id) {
  const params = new URLSearchParams(location.hash.slice(1));
  if (id === null) params.delete("slide");
  else params.set("slide", id);
  history.replaceState(null, "", "#" + params.toString());
}

async function view(position) {
  const { slides } = shownNow;
  if (position < 0 || position >= slides.length) return;
  const mine = ++viewTurn, slide = slides[position];
  const shown = await wordsOf(slide);
  if (mine !== viewTurn) return;
  viewed = position;
  at("viewer-title").textContent = ids[slide];
  at("viewer-badges").replaceChildren(badge(slide));
  at("viewer-where").textContent = `${whole(position + 1)} of ${whole(slides.length)}`;
  at("viewer-body").replaceChildren(large(slide, shown));
  at("viewer-back").disabled = position === 0;
  at("viewer-next").disabled = position === slides.length - 1;
  noteViewed(ids[slide]);
  if (!at("viewer").open) at("viewer").showModal();
}

function turnPage(step) {
  ask({ page: shownNow.question.page + step });
  at("slides").scrollIntoView();
}

function listen() {
  window.addEventListener("hashchange", draw);
  at("back").addEventListener("click", () => turnPage(-1));
  at("next").addEventListener("click", () => turnPage(1));
  at("page").addEventListener("change", () => ask({ page: at("page").value }));
  at("find").addEventListener("input", () => ask({ find: at("find").value.trim() }, { quiet: true }));
  at("status").addEventListener("change", () => ask({ status: at("status").value }));
  at("size").addEventListener("change", () => ask({ size: at("size").value === "25" ? null : at("size").value }));
  at("worst").addEventListener("click", () => ask({ sort: null, dir: null }));
  for (const menu of document.querySelectorAll("select[data-category]")) {
    menu.addEventListener("change", () => ask({ [`is.${menu.dataset.category}`]: menu.value }));
  }
  for (const link of document.querySelectorAll(".reasons a, .jumps a")) {
    link.addEventListener("click", () => setTimeout(() => at("slides").scrollIntoView()));
  }
  at("viewer-back").addEventListener("click", () => view(viewed - 1));
  at("viewer-next").addEventListener("click", () => view(viewed + 1));
  at("viewer-close").addEventListener("click", () => at("viewer").close());
  at("viewer").addEventListener("close", () => noteViewed(null));
  at("viewer").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) { event.preventDefault(); view(viewed + step); }
  });
}

async function start() {
  try {
    await loadIndex();
  } catch (error) {
    at("where").textContent = error.message;
    return;
  }
  findColumns();
  makeCharts();
  listen();
  await draw();
}

start();
