"use strict";
(function () {
  const PAGE = 20;
  const meta = JSON.parse(document.getElementById("meta").textContent);
  const total = meta.files.reduce((sum, file) => sum + file.count, 0);
  const loaded = new Map();
  const waiting = new Map();
  const at = (id) => document.getElementById(id);
  let page = 0;
  let turn = 0;

  window.cytorayRows = function (name, rows) {
    loaded.set(name, rows);
    if (waiting.has(name)) waiting.get(name).done();
  };

  function load(file) {
    if (loaded.has(file.name)) return Promise.resolve(loaded.get(file.name));
    if (waiting.has(file.name)) return waiting.get(file.name).promise;
    const entry = {};
    entry.promise = new Promise((resolve, reject) => {
      const script = document.createElement("script");
      entry.done = () => { waiting.delete(file.name); resolve(loaded.get(file.name)); };
      script.onerror = () => { waiting.delete(file.name); reject(new Error("cannot load " + file.src)); };
      script.src = file.src;
      document.head.append(script);
    });
    waiting.set(file.name, entry);
    return entry.promise;
  }

  async function loadAll(mine) {
    const all = [];
    for (const file of meta.files) {
      for (const row of await load(file)) all.push(row);
      if (mine !== turn) return all;
      at("where").textContent = "loading " + all.length.toLocaleString() + " of " + total.toLocaleString();
    }
    return all;
  }

  async function loadRange(start, end) {
    const rows = [];
    let first = 0;
    for (const file of meta.files) {
      const last = first + file.count;
      if (first < end && last > start) {
        const part = await load(file);
        rows.push(...part.slice(Math.max(start - first, 0), end - first));
      }
      first = last;
    }
    return rows;
  }

  function matches(row, words, status) {
    if (status === "regions" && !row.regions) return false;
    if (status === "ok" && row.status !== "ok") return false;
    if (status === "quarantined" && row.status === "ok") return false;
    const text = [row.id, row.reason, row.reader, row.mpp_source].join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  }

  function comparer(key, down) {
    const sign = down ? -1 : 1;
    return (a, b) => {
      const x = a[key], y = b[key];
      if (x == null || y == null) return (x == null) - (y == null);
      return sign * (typeof x === "number" ? x - y : String(x).localeCompare(String(y), undefined, { numeric: true }));
    };
  }

  function element(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function pictures(row) {
    const box = element("div", "shots");
    row.images.forEach((url, index) => {
      if (!url) return;
      const figure = element("figure");
      const link = element("a");
      link.href = url;
      const image = element("img");
      image.loading = "lazy";
      image.alt = meta.kinds[index] + " of " + row.id;
      image.src = url;
      link.append(image);
      figure.append(link, element("figcaption", "", meta.kinds[index]));
      box.append(figure);
    });
    return box;
  }

  function card(row) {
    const ok = row.status === "ok";
    const shown = row.images.some(Boolean);
    const box = element("article", ["slide", ok ? "" : "bad", shown ? "" : "bare"].join(" ").trim());
    const side = element("div");
    const head = element("div", "head");
    head.append(element("h3", "", row.id), element("span", ok ? "badge" : "badge warn", row.status));
    side.append(head);
    if (row.reason) side.append(element("p", "reason", row.reason));
    const list = element("dl");
    for (const [name, value] of row.facts) list.append(element("dt", "", name), element("dd", "", value));
    side.append(list);
    if (shown) box.append(pictures(row));
    box.append(side);
    return box;
  }

  async function draw() {
    const mine = ++turn;
    const words = at("find").value.toLowerCase().split(/\s+/).filter(Boolean);
    const status = at("status").value, key = at("sort").value;
    let number = total, rows;
    try {
      if (words.length || status || key || at("down").checked) {
        let all = (await loadAll(mine)).filter((row) => matches(row, words, status));
        if (key) all.sort(comparer(key, at("down").checked));
        else if (at("down").checked) all.reverse();
        number = all.length;
        page = Math.min(page, Math.max(Math.ceil(number / PAGE) - 1, 0));
        rows = all.slice(page * PAGE, (page + 1) * PAGE);
      } else {
        rows = await loadRange(page * PAGE, (page + 1) * PAGE);
      }
    } catch (error) {
      at("where").textContent = error.message;
      return;
    }
    if (mine !== turn) return;
    at("rows").replaceChildren(...rows.map(card));
    const first = page * PAGE + 1, last = page * PAGE + rows.length;
    at("where").textContent = number ? `${first.toLocaleString()} to ${last.toLocaleString()} of ${number.toLocaleString()}` : "no slide";
    at("back").disabled = page === 0;
    at("next").disabled = last >= number;
  }

  function turnTo(step) {
    page += step;
    draw().then(() => at("slides").scrollIntoView());
  }

  at("back").addEventListener("click", () => turnTo(-1));
  at("next").addEventListener("click", () => turnTo(1));
  for (const id of ["find", "status", "sort", "down"]) {
    at(id).addEventListener("input", () => { page = 0; draw(); });
  }
  draw();
})();
