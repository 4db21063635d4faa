"use strict";
const { sample, items } = JSON.parse(document.getElementById("sample").textContent);
const byId = id => document.getElementById(id);
const buttons = [...document.querySelectorAll("[data-decision]")];
const store = `safer-instruct-review:${sample}`;
let reviewer = "", decided = []; // {id, decision} objects, in the order of the decisions

function load(key) {
  try { return localStorage.getItem(key); } catch { return null; }
}
function save(key, value) {
  try { localStorage.setItem(key, value); } catch { byId("not-kept").hidden = false; }
}

function current() {
  const done = new Set(decided.map(one => one.id));
  return items.find(item => !done.has(item.id));
}

function element(name, text, style = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = style;
  return made;
}

function showBefore(messages) {
  const [summary, list] = byId("before").children;
  byId("before").hidden = !messages.length;
  byId("before").open = false;
  summary.textContent = `Conversation before it: ${messages.length} ${messages.length === 1 ? "message" : "messages"}`;
  list.replaceChildren(...messages.flatMap(([role, said]) => [element("h3", role), element("p", said, "text")]));
}

function show() {
  const item = current();
  byId("work").hidden = !item;
  byId("progress").value = decided.length;
  const count = decision => decided.filter(one => one.decision === decision).length;
  byId("counts").textContent = `${decided.length} of ${items.length}: kept ${count("keep")}, `
    + `wrong instruction ${count("wrong_instruction")}, unsafe answer ${count("unsafe_answer")}, skipped ${count("skip")}.`
    + (item ? "" : " All pairs are decided: export them.");
  byId("undo").disabled = !decided.length;
  if (!item) { byId("export").focus(); return; }
  byId("place").textContent = `Pair ${decided.length + 1} of ${items.length}`;
  for (const part of ["instruction", "rejected", "chosen"]) byId(part).textContent = item[part] ?? "";
  showBefore(item.before);
  byId("chosen-box").hidden = !item.whole;
  document.querySelector("[data-decision=unsafe_answer]").disabled = !item.whole;
  scrollTo(0, 0);
}

function decide(decision) {
  const item = current();
  if (!item || (decision === "unsafe_answer" && !item.whole)) return;
  change([...decided, { id: item.id, decision }]);
}
function change(decisions) {
  decided = decisions;
  save(`${store}:${reviewer}`, JSON.stringify(decided));
  show();
}
const undo = () => change(decided.slice(0, -1));

byId("begin").elements.reviewer.value = load(store) ?? "";
byId("begin").addEventListener("submit", event => {
  event.preventDefault();
  reviewer = byId("begin").elements.reviewer.value.trim();
  save(store, reviewer);
  const known = new Set(items.map(item => item.id));
  decided = JSON.parse(load(`${store}:${reviewer}`) ?? "[]").filter(one => known.has(one.id));
  byId("gate").hidden = true;
  byId("tail").hidden = false;
  show();
  if (current()) byId("place").focus();
});
for (const button of buttons) button.addEventListener("click", () => decide(button.dataset.decision));
byId("undo").addEventListener("click", undo);

document.addEventListener("keydown", event => {
  if (byId("tail").hidden || !byId("use-keys").checked || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  if (key === "u" && decided.length) undo();
  const button = buttons.find(one => one.dataset.key === key);
  if (button) decide(button.dataset.decision);
});

byId("export").addEventListener("click", () => {
  const item = new Map(items.map(one => [one.id, one]));
  const decisions = decided.map(({ id, decision }) => {
    const { pair, label, whole } = item.get(id);
    return { id, pair, label, whole, decision };
  });
  const text = JSON.stringify({ format: "safer-instruct review", version: 1, sample, reviewer, decisions }, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text + "\n"], { type: "application/json" }));
  link.download = `review-${reviewer.replace(/[^\w.-]+/g, "_") || "unnamed"}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
});
