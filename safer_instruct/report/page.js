"use strict";
// Controls are hidden in the markup, so that a page without this script lacks only the controls.
for (const tool of document.querySelectorAll(".tool[hidden]")) tool.hidden = false;

// Open or close everything, except what is behind a content warning.
const openAll = document.getElementById("open-all");
if (openAll) openAll.addEventListener("click", () => {
  const open = openAll.getAttribute("aria-pressed") !== "true";
  for (const part of document.querySelectorAll("details:not(.gate)")) part.open = open;
  openAll.setAttribute("aria-pressed", String(open));
});

// Tables: a click on a column's header sorts by it, a second click reverses the order.
function sortKey(text) {
  const number = /^\s*<?\s*[-+\u2212]?[\d,]*\.?\d+/.exec(text);
  if (!number) return text.trim() === "-" ? -Infinity : text.toLowerCase();
  return parseFloat(number[0].replace(/[<,\s]/g, "").replace("\u2212", "-")) - (number[0].includes("<") ? 1e-9 : 0);
}
function compare(a, b) {
  if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
  return typeof a === "number" ? -1 : 1;
}
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  if (body.rows.length < 2) continue;
  heads.forEach((head, column) => {
    if (!head.textContent.trim()) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map(row => [sortKey(row.cells[column].textContent), row]);
      rows.sort(([a], [b]) => (down ? -1 : 1) * compare(a, b));
      body.append(...rows.map(([, row]) => row));
    });
  });
}
for (const input of document.querySelectorAll("input.filter")) {
  const box = input.closest(".table"), rows = [...box.querySelectorAll("tbody tr")];
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    box.querySelector(".found").textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length}`;
  });
}

// Samples: filter by set, label, source and verdict, search their text, compare two models with differences marked.
const samples = document.getElementById("sample-tools");
if (samples) {
  const field = name => samples.querySelector(`[name=${name}]`);
  const articles = [...document.querySelectorAll("article.sample")];
  const texts = new Map();
  const textOf = node => { if (!texts.has(node)) texts.set(node, node.textContent); return texts.get(node); };
  for (const name of ["set", "label", "source", "verdict"]) {
    const values = new Set(articles.flatMap(one => name === "verdict"
      ? [...one.querySelectorAll(".badge")].map(badge => badge.textContent) : [one.dataset[name]]));
    for (const value of [...values].filter(Boolean).sort()) field(name).append(new Option(value, value));
  }
  const shows = article => ["set", "label", "source"].every(name => !field(name).value || article.dataset[name] === field(name).value)
    && (!field("verdict").value || [...article.querySelectorAll(".answer:not([hidden]) .badge")].some(one => one.textContent === field("verdict").value))
    && (!field("words").value || [...article.querySelectorAll(".text")].some(one => textOf(one).toLowerCase().includes(field("words").value.toLowerCase())));

  // Return true for the words of `mine` outside the longest common subsequence of the two lists of words.
  function differing(mine, other) {
    const width = other.length + 1, lengths = new Uint16Array((mine.length + 1) * width);
    for (let i = mine.length - 1; i >= 0; i--) for (let j = other.length - 1; j >= 0; j--)
      lengths[i * width + j] = mine[i] === other[j] ? lengths[(i + 1) * width + j + 1] + 1
        : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
    const marks = mine.map(() => true);
    for (let i = 0, j = 0; i < mine.length && j < other.length;) {
      if (mine[i] === other[j]) { marks[i++] = false; j++; }
      else if (lengths[(i + 1) * width + j] >= lengths[i * width + j + 1]) i++; else j++;
    }
    return marks;
  }
  function mark(node, other) {
    if (!other) { node.textContent = textOf(node); return; }
    const mine = textOf(node).split(/(?<=\s)(?=\S)/), marks = differing(mine.map(word => word.trim()), textOf(other).split(/\s+/));
    node.replaceChildren();
    for (let i = 0; i < mine.length;) {
      let end = i;
      while (end < mine.length && marks[end] === marks[i]) end++;
      const run = mine.slice(i, end).join("");
      if (marks[i]) { const box = document.createElement("mark"); box.textContent = run; node.append(box); } else node.append(run);
      i = end;
    }
  }
  function update() {
    const pair = [field("left").value, field("right").value];
    const two = pair[0] && pair[1] && pair[0] !== pair[1];
    for (const article of articles) {
      const answers = [...article.querySelectorAll(".answer")];
      const [left, right] = pair.map(name => answers.find(one => one.dataset.model === name));
      for (const one of answers) {
        one.hidden = Boolean(two) && one !== left && one !== right;
        if (!two) mark(one.querySelector(".text"), null);
      }
      if (two && left && right) for (const [one, other] of [[left, right], [right, left]]) mark(one.querySelector(".text"), other.querySelector(".text"));
      article.hidden = !shows(article);
    }
    for (const heading of document.querySelectorAll("h3[data-set]"))
      heading.hidden = !articles.some(one => !one.hidden && one.dataset.set === heading.dataset.set);
    samples.querySelector(".found").textContent = `${articles.filter(one => !one.hidden).length} of ${articles.length} prompts`;
  }
  const gate = samples.closest("details");
  samples.addEventListener("input", update);
  gate.addEventListener("toggle", () => { if (gate.open && !samples.querySelector(".found").textContent) update(); });
}
