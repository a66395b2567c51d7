// What passes a module: shapes, dtypes, and where on the mesh each value lies.
const siteName = (value) => `${value.side} ${value.index ?? 0}`;
const outFirst = (values) => [...values.filter((v) => v.side === "out"), ...values.filter((v) => v.side !== "out")];

function valuesOf(module) {
  if (!module.values.length) {
    return data.observed || module.silent ? [] : [p("note", "Shapes are known after fm.show(inputs).")];
  }
  const hint = data.axes.length ? [p("hint muted", "Ranks of one colour and letter have the same.")] : [];
  return [block("Values", ...hint, outFirst(module.values).map((value) => site(value, module.stages)))];
}

function site(value, stages) {
  if (value.refusal) return refused(value);
  const placements = value.placements ?? [];
  const drawn = value.shape ? shapeMarked(value.shape, placements) : span("shape", "no rectangular whole");
  const local = value.local?.length && shape(value.local) !== shape(value.shape) ? shape(value.local) : "";
  const lines = [
    ...inner.map((axis, i) => line(axis.name, spoken(placements[i] ?? "R"))),
    local ? line(`on rank ${data.rank}`, span("mono", local)) : null,
    value.evidence ? line("evidence", value.evidence) : null,
  ];
  const title = h("h4", null, siteName(value), drawn, span("dtype", value.dtype ?? ""));
  return h("article", {class: "site"}, h("div", {class: "words"}, title, lines), meshOf(placements, stages));
}

const refused = (value) => h("article", {class: "site refused"}, h("h4", null, siteName(value)),
  h("p", null, h("b", null, "Refused: "), value.refusal));

const line = (name, text) => h("p", null, span("muted", `${name}: `), text);

// Dims that ranks hold parts of are set off.
function shapeMarked(sizes, placements) {
  const dims = new Set(placements.map((word) => Number(splits(word)?.[1] ?? NaN)));
  const size = (number, dim) => (dims.has(dim) ? h("mark", null, String(number)) : String(number));
  const parts = sizes.flatMap((number, dim) => [dim ? ", " : "", size(number, dim)]);
  return span("shape", "(", parts, sizes.length === 1 ? ",)" : ")");
}
