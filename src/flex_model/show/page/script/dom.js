// Elements and words. All text becomes text nodes, so that markup in names stays text.
const byId = (id) => document.getElementById(id);

// h("button", {type: "button", onclick: f}, "text", child, ...); attributes that are null or false are left out
function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

const span = (kind, ...children) => h("span", {class: kind}, ...children);
const p = (kind, ...children) => h("p", {class: kind}, ...children);
const block = (title, ...children) => h("section", {class: "block"}, h("h3", null, title), ...children);

// Columns that begin with # are of numbers.
function table(label, columns, rows) {
  const kind = (column) => (column.startsWith("#") ? "number" : null);
  const head = columns.map((column) => h("th", {scope: "col", class: kind(column)}, column.replace("#", "")));
  const body = rows.map((cells) => h("tr", null, cells));
  const made = h("table", {"aria-label": label}, h("thead", null, h("tr", null, head)), h("tbody", null, body));
  return h("div", {class: "scroll"}, made);
}

// A count in few characters, as in the printed tree: 1.23k, 135M.
function amount(number) {
  const units = ["", "k", "M", "B", "T"];
  let unit = 0;
  while (Math.abs(number) >= 999.5 && unit < units.length - 1) { number /= 1000; unit += 1; }
  return String(Number(number.toPrecision(3))) + units[unit];
}

function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (number >= 1000 && unit < units.length - 1) { number /= 1024; unit += 1; }
  return `${Number(number.toPrecision(3))} ${units[unit]}`;
}

const whole = (number) => number.toLocaleString("en");
const many = (number, one, more = `${one}s`) => `${whole(number)} ${number === 1 ? one : more}`;

// Told to screen readers, and shown for a moment.
function say(text) {
  const said = byId("said");
  said.textContent = text;
  said.classList.add("shown");
  clearTimeout(say.timer);
  say.timer = setTimeout(() => said.classList.remove("shown"), 2500);
}
