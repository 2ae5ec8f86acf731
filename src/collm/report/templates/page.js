"use strict";
function press(button) {
  for (const other of button.parentElement.children) other.setAttribute("aria-pressed", String(other === button));
}
for (const button of document.querySelectorAll("[data-view]")) {
  button.addEventListener("click", () => {
    press(button);
    document.body.classList.toggle("gates", button.dataset.view === "gate");
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
