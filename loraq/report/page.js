"use strict";
document.body.classList.add("scripted");

// Tables: a click on a column's title sorts by what its cells are worth; empty cells stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const original = [...body.rows];
  const worth = (row, place) => row.cells[place].dataset.value;
  heads.forEach((head, place) => head.querySelector("button").addEventListener("click", () => {
    const before = head.getAttribute("aria-sort");
    const order = { null: "ascending", ascending: "descending", descending: null }[before];
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    if (order === null) return body.append(...original);
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const compare = (a, b) => {
      const [x, y] = [worth(a, place), worth(b, place)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const gap = Number(x) - Number(y);
      return sign * (Number.isNaN(gap) ? x.localeCompare(y) : gap);
    };
    body.append(...[...original].sort(compare));
  }));
}

// Images: one prompt at a time, by the buttons or the arrow keys.
const prompts = [...document.querySelectorAll(".prompt")];
let current = 0;
function show(number) {
  current = (number + prompts.length) % prompts.length;
  prompts.forEach((prompt, place) => prompt.classList.toggle("current", place === current));
  document.getElementById("position").textContent = `${current + 1} of ${prompts.length}`;
}
const large = document.getElementById("large");
function enlarge(button) {
  const image = [...button.querySelectorAll("img")].find((one) => !one.hidden);
  const target = document.getElementById("large-image");
  target.src = image.src;
  target.alt = image.alt;
  document.getElementById("large-caption").textContent = button.dataset.caption;
  if (!large.open) large.showModal();
}
for (const button of document.querySelectorAll(".enlarge")) {
  button.addEventListener("click", () => enlarge(button));
}
large.addEventListener("click", (event) => { if (event.target === large) large.close(); });
if (prompts.length) {
  const step = (by) => {
    const places = large.open ? [...prompts[current].querySelectorAll(".enlarge")] : [];
    const caption = document.getElementById("large-caption").textContent;
    const place = places.findIndex((button) => button.dataset.caption === caption);
    show(current + by);
    if (place >= 0) enlarge(prompts[current].querySelectorAll(".enlarge")[place]);
  };
  document.getElementById("previous").addEventListener("click", () => step(-1));
  document.getElementById("next").addEventListener("click", () => step(1));
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input, select, textarea, .scroll, pre")) return;
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  document.getElementById("differences").addEventListener("change", (event) => {
    for (const image of document.querySelectorAll("img.difference")) {
      image.hidden = !event.target.checked;
      image.previousElementSibling.hidden = event.target.checked;
    }
  });
  show(0);
}
