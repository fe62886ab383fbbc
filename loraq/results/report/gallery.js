// Images: one prompt at a time, and a large view that switches between prompts and rows.
document.body.classList.add("scripted");
const get = (id) => document.getElementById(id);
const prompts = [...document.querySelectorAll(".prompt")];
const large = get("large");
let current = 0;
let opened = null; // in the large view: {row, difference}, or null for a diagram

const around = (number, count) => (number + count) % count;
const figuresOf = (prompt) => [...prompt.querySelectorAll("figure")];

function show(number) {
  current = around(number, prompts.length);
  prompts.forEach((prompt, place) => prompt.classList.toggle("current", place === current));
  get("position").textContent = `${current + 1} of ${prompts.length}`;
  [...get("thumbnails").children].forEach((button, place) => {
    button.setAttribute("aria-current", String(place === current));
    if (place !== current) return;
    const [box, own] = [button.parentElement, button.offsetLeft - button.parentElement.offsetLeft];
    if (own < box.scrollLeft || own + button.offsetWidth > box.scrollLeft + box.clientWidth) {
      box.scrollLeft = own - box.clientWidth / 2;
    }
  });
}

function put(image, caption) {
  const target = get("large-image");
  target.src = image.src;
  target.alt = image.alt;
  get("large-caption").textContent = caption;
  const drawn = image.src.startsWith("data:image/svg");
  large.classList.toggle("drawn", drawn);
  // enlarge by an integer factor, so that all pixels have the same size
  const room = Math.min(innerWidth * 0.9, innerHeight - 220);
  const longest = Math.max(image.naturalWidth, image.naturalHeight, 1);
  const factor = room * devicePixelRatio / longest;
  const whole = (factor >= 1 ? Math.floor(factor) : factor) / devicePixelRatio;
  target.style.width = drawn ? "" : `${Math.round(image.naturalWidth * whole)}px`;
  if (!large.open) large.showModal();
}

function enlarge() {
  const prompt = prompts[current];
  const figures = figuresOf(prompt);
  const figure = figures[opened.row];
  const apart = opened.difference && figure.querySelector("img.difference");
  put(apart || figure.querySelector("img.plain"), prompt.dataset.text);
  const note = figure.dataset.note && ` · ${figure.dataset.note}`;
  get("large-row").textContent = figure.dataset.label + note + (apart ? " · difference" : "");
  get("large-prompt").textContent = `${current + 1} of ${prompts.length}`;
  get("large-difference").setAttribute("aria-pressed", String(opened.difference));
}

function step(by) {
  show(current + by);
  if (large.open) enlarge();
}

function flip(by) {
  opened.row = around(opened.row + by, figuresOf(prompts[current]).length);
  enlarge();
}

function turn() {
  opened.difference = !opened.difference;
  enlarge();
}

for (const button of document.querySelectorAll(".enlarge")) {
  button.addEventListener("click", () => {
    const figure = button.closest(".prompt figure");
    get("large-steps").hidden = !figure;
    opened = null;
    if (!figure) return put(button.querySelector("img"), button.dataset.caption);
    const row = figuresOf(prompts[current]).indexOf(figure);
    opened = { row, difference: button.classList.contains("apart") };
    enlarge();
  });
}

get("large-close").addEventListener("click", () => large.close());
large.addEventListener("click", (event) => { if (event.target === large) large.close(); });

if (prompts.length) {
  prompts.forEach((prompt, place) => {
    const [button, image] = [document.createElement("button"), document.createElement("img")];
    button.type = "button";
    image.src = prompt.querySelector("img.plain").src;
    image.alt = prompt.dataset.text;
    button.append(image);
    button.addEventListener("click", () => show(place));
    get("thumbnails").append(button);
  });
  const clicks = {
    previous: () => step(-1), next: () => step(1),
    "large-previous": () => step(-1), "large-next": () => step(1),
    "large-up": () => flip(-1), "large-down": () => flip(1), "large-difference": turn,
  };
  for (const [id, act] of Object.entries(clicks)) get(id).addEventListener("click", act);
  const keys = { ArrowLeft: () => step(-1), ArrowRight: () => step(1) };
  const largeKeys = { ...keys, ArrowUp: () => flip(-1), ArrowDown: () => flip(1), d: turn, D: turn };
  const isVisible = () => {
    const box = get("images").getBoundingClientRect();
    return box.top < innerHeight && box.bottom > 0;
  };
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (large.open ? !opened : !isVisible() || event.target.closest(".scroll, pre, input")) return;
    const act = (large.open ? largeKeys : keys)[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });
  get("differences").addEventListener("change", (event) => {
    get("images").classList.toggle("plain-only", !event.target.checked);
  });
  show(0);
}
