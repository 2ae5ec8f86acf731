"use strict";
const body = document.body;
const tip = document.getElementById("tip");

function press(button) {
  for (const other of button.parentElement.children) other.setAttribute("aria-pressed", String(other === button));
}
for (const button of document.querySelectorAll("[data-view]")) {
  button.addEventListener("click", () => {
    press(button);
    body.classList.toggle("gates", button.dataset.view === "gate");
  });
}
for (const button of document.querySelectorAll("[data-filter]")) {
  button.addEventListener("click", () => {
    press(button);
    const wanted = button.dataset.filter;
    for (const sample of document.querySelectorAll(".sample")) {
      sample.classList.toggle("hidden", wanted !== "all" && !sample.classList.contains(wanted));
    }
  });
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function shown(text) {
  return "\u201c" + text.replaceAll("\n", "\u21b5") + "\u201d";
}

function show(token) {
  const names = JSON.parse(token.closest(".sample").dataset.models);
  const author = Number(token.dataset.a || 0);
  tip.replaceChildren(element("div", "token", shown(token.dataset.p ?? token.textContent)));
  const logProb = token.dataset.l;
  let told = "written by " + names[author];
  if (logProb) told += ", probability " + percent(Math.exp(Number(logProb))) + " (log " + Number(logProb).toFixed(3) + ")";
  tip.append(element("div", "what", told));
  if (token.dataset.b !== undefined) tip.append(element("div", "what", names[0] + " would have written " + shown(token.dataset.b)));
  if (token.classList.contains("back")) tip.append(element("div", "what", "deferred, and handed back by the assistant"));
  if (!token.dataset.g) return;
  const rows = element("div", "rows", "");
  token.dataset.g.split(" ").forEach((gate, model) => {
    const row = element("div", "row" + (model ? " a" + ((model - 1) % 6 + 1) : ""), "");
    const bar = document.createElement("i");
    bar.style.width = 100 * Number(gate) + "%";
    row.append(element("span", "", names[model]), bar, element("b", "", percent(Number(gate))));
    rows.append(row);
  });
  tip.append(rows);
}

function percent(value) {
  return value > 0 && value < 0.001 ? "< 0.1 %" : value < 1 && value > 0.999 ? "> 99.9 %" : (100 * value).toFixed(1) + " %";
}

let marked = null;
function move(event) {
  const token = event.target.closest ? event.target.closest(".written .t") : null;
  if (token !== marked) {
    if (marked) marked.classList.remove("on");
    marked = token;
    if (token) {
      token.classList.add("on");
      show(token);
    }
    tip.style.display = token ? "block" : "none";
  }
  if (!token) return;
  const box = token.getClientRects()[0];
  if (!box) return;
  const left = Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8));
  const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
  tip.style.left = left + "px";
  tip.style.top = (below ? box.bottom + 8 : Math.max(8, box.top - tip.offsetHeight - 8)) + "px";
}
document.addEventListener("pointerover", move);
document.addEventListener("pointerdown", move);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") tip.style.display = "none";
});
