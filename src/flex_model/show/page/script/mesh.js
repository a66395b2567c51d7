// The mesh as cells, a rank each: cells of one colour and letter hold the same. The last two axes are a grid, those
// before them a grid of grids. Big meshes are cut, with a word.
const CELLS = 10;
const GRIDS = 4;

// cellOf(rank, place) gives {key, text, away, partial}; label is what a screen reader says of it all.
function mesh(label, cellOf) {
  if (!data.axes.length) return null;
  return h("div", {class: "mesh", role: "img", "aria-label": label}, level(data.ranks, 0, [], cellOf));
}

function level(ranks, depth, place, cellOf) {
  const left = data.axes.length - depth;
  if (left > 2) return grids(ranks, depth, place, cellOf);
  return left === 2 ? grid(ranks, depth, place, cellOf) : grid([ranks], depth, place, cellOf);
}

function grids(ranks, depth, place, cellOf) {
  const axis = data.axes[depth];
  const drawn = ranks.slice(0, GRIDS).map((part, i) => h("div", {class: "part"},
    span("axis", `${axis.name} ${i}`), level(part, depth + 1, [...place, i], cellOf)));
  return h("div", {class: "grids"}, drawn, rest(axis, GRIDS));
}

// rows: one for each place along the axis before the last, or the only one
function grid(rows, depth, place, cellOf) {
  const twoAxes = data.axes.length - depth === 2;
  const column = data.axes.at(-1);
  const drawn = rows.slice(0, CELLS).map((ranks, i) => h("div", {class: "row"},
    twoAxes ? span("axis", `${data.axes[depth].name} ${i}`) : null,
    ranks.slice(0, CELLS).map((rank, j) => cell(rank, cellOf(rank, [...place, ...(twoAxes ? [i] : []), j])))));
  return h("div", {class: "grid"}, span("axis", `${column.name} →`), drawn,
    twoAxes ? rest(data.axes[depth], CELLS) : null, rest(column, CELLS));
}

const rest = (axis, shown) =>
  axis.size > shown ? span("axis", `and ${whole(axis.size - shown)} more along ${axis.name}`) : null;

function cell(rank, {key, text, away, partial}) {
  const element = h("span", {class: `cell${away ? " away" : ""}${partial ? " partial" : ""}`},
    h("b", null, String(rank)), away ? "–" : text);
  if (!away) element.style.setProperty("--hue", String((250 + key * 137.5) % 360));
  if (rank === data.rank) element.classList.add("mine");
  return element;
}

// What a value is on each rank, by the places along the axes that it is not the same on.
function meshOf(placements, stages) {
  const differs = inner.filter((axis, i) => !replicated(placements[i] ?? "R"));
  const partial = placements.some((word) => word.startsWith("P"));
  const pieces = differs.reduce((product, axis) => product * axis.size, 1);
  const key = (place) => differs.reduce((number, axis) => number * axis.size + place[axis.at], 0);
  const label = `${many(pieces, "piece")} on the ranks. ${layoutWords(placements)}`;
  return mesh(label, (rank, place) =>
    ({key: key(place), text: pieces > 1 ? letter(key(place)) : "", away: isAway(stages, place), partial}));
}

const layoutWords = (placements) =>
  inner.map((axis, i) => `${axis.name}: ${spoken(placements[i] ?? "R")}`).join("; ");

// a, b, ..., z, aa, ab, ...
function letter(number) {
  const last = String.fromCharCode(97 + (number % 26));
  return number < 26 ? last : letter(Math.floor(number / 26) - 1) + last;
}
