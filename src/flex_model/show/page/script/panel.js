// What is known of one module.
const siteName = (value) => `${value.side} ${value.index ?? 0}`;

function showModule(i, run) {
  const module = moduleOf(i);
  const panel = byId("panel-module");
  panel.replaceChildren(heading(module, run), ...diagramOf(module), ...valuesOf(module), ...parametersOf(module),
    ...hooksIn(module), ...(module.silent || module.sameAs ? [] : [codeSection(module)]));
  panel.scrollTop = 0;
  chooseTab(0);
}

function heading(module, run) {
  const sizes = module.size ? `${whole(module.size)} parameters${data.axes.length ? `, ${whole(module.here)} on rank ${data.rank}` : ""}` : "no parameters";
  const ran = module.values.find((value) => value.times > 1)?.times;
  const notes = [
    run.length > 1 ? `One of ${whole(run.length)} that are alike: ${modules.name[run[0]]} to ${modules.name[run.at(-1)]}.` : "",
    module.sameAs ? `The same module as ${module.sameAs}; hook that one.` : "",
    module.stages.length && stageAxis >= 0 ? `On stage ${module.stages.join(", ")}.` : "",
    ran ? `Ran ${ran} times in the forward that was looked at.` : "",
    module.silent ? "A container that is never called, so that no hook on it would fire." : "",
    module.unfired ? `Did not run: ${module.unfired}` : "",
  ].filter(Boolean);
  return h("div", {class: "heading"}, h("h2", null, module.name || "(model)"), h("p", {class: "muted"}, `${module.kind}, ${sizes}`),
    notes.map((note) => h("p", {class: "note"}, note)));
}

function valuesOf(module) {
  if (!module.values.length) return data.observed || module.silent ? [] : [h("p", {class: "note"}, "Shapes are known after fm.show(inputs).")];
  return [h("section", {class: "block"}, h("h3", null, "Values", data.axes.length ? h("span", {class: "hint"}, "ranks of one colour and letter have the same") : null), outFirst(module.values).map((value) => site(value, module.stages)))];
}

const outFirst = (values) => [...values.filter((v) => v.side === "out"), ...values.filter((v) => v.side !== "out")];

function site(value, stages) {
  const placements = value.placements ?? [];
  if (value.refusal) return h("article", {class: "site refused"}, h("h4", null, siteName(value)), h("p", null, h("b", null, "Refused: "), value.refusal));
  const local = value.local?.length && shape(value.local) !== shape(value.shape) ? shape(value.local) : "";
  const title = h("h4", null, siteName(value), value.shape ? shapeMarked(value.shape, placements) : h("span", {class: "shape"}, "no rectangular whole"),
    h("span", {class: "dtype"}, value.dtype ?? ""));
  const lines = [
    ...inner.map((axis, i) => h("p", null, h("span", {class: "muted"}, `${axis.name}: `), spoken(placements[i] ?? "R"))),
    local ? h("p", null, h("span", {class: "muted"}, `on rank ${data.rank}: `), h("span", {class: "mono"}, local)) : null,
    value.evidence ? h("p", null, h("span", {class: "muted"}, "evidence: "), value.evidence) : null,
  ];
  return h("article", {class: "site"}, h("div", {class: "words"}, title, lines), meshOf(placements, stages));
}

// Dims that ranks hold parts of are set off.
function shapeMarked(sizes, placements) {
  const dims = new Set(placements.map((word) => Number(splits(word)?.[1] ?? NaN)));
  const parts = sizes.map((size, dim) => [dim ? ", " : "", dims.has(dim) ? h("mark", null, String(size)) : String(size)]);
  return h("span", {class: "shape"}, "(", parts.flat(), sizes.length === 1 ? ",)" : ")");
}

function parametersOf(module) {
  if (!module.parameters.length) return [];
  const spread = data.axes.length > 0;
  const columns = ["name", "shape", ...(spread ? [`rank ${data.rank}`] : []), "dtype", ...(spread ? ["layout"] : []), ""];
  const rows = module.parameters.map((p) => [
    h("td", {class: "mono"}, p.name),
    h("td", {class: "mono"}, shapeMarked(p.shape, p.placements ?? [])),
    spread ? h("td", {class: "mono"}, p.local ? shape(p.local) : "–") : null,
    h("td", null, p.dtype ?? ""),
    spread ? h("td", null, placed(p.placements ?? [])) : null,
    h("td", {class: "muted"}, [p.trainable ? "" : "frozen", p.same_as ? `tied to ${p.same_as}` : ""].filter(Boolean).join(", ")),
  ]);
  return [h("section", {class: "block"}, h("h3", null, "Parameters"), table("Parameters", columns, rows))];
}

const placed = (placements) => placements
  .map((word, i) => (replicated(word) || !inner[i] ? "" : `${inner[i].name} ${word}`)).filter(Boolean).join(", ") || "R";

// Columns that begin with # are of numbers.
function table(label, columns, rows) {
  return h("div", {class: "scroll"}, h("table", {"aria-label": label},
    h("thead", null, h("tr", null, columns.map((c) => h("th", {scope: "col", class: c.startsWith("#") ? "number" : null}, c.replace("#", ""))))), h("tbody", null, rows.map((cells) => h("tr", null, cells)))));
}

function hooksIn(module) {
  if (!module.hooks.length) return [];
  const lines = module.hooks.map((hook) => h("li", null, `${hook.enabled ? "●" : "○"} ${hook.hook_type}${hook.edits ? ", edits" : ""}, ${hook.run}, fired ${many(hook.fired, "time")}`));
  return [h("section", {class: "block"}, h("h3", null, "Hooks"), h("ul", {class: "plain"}, lines))];
}

// A diagram comes as SVG text. Only shapes and words of it are taken, and nothing that could run or load.
const DRAWN = new Set(["svg", "g", "defs", "marker", "path", "rect", "circle", "ellipse", "line", "polyline", "polygon", "text", "tspan", "title", "desc"]);
const SET = /^(class|d|x|y|x1|x2|y1|y2|cx|cy|r|rx|ry|dx|dy|width|height|viewBox|points|transform|id|role|aria-label|marker-(start|mid|end)|orient|refX|refY|marker(Width|Height|Units)|fill(-opacity)?|stroke(-.*)?|text-anchor|dominant-baseline)$/;

function diagramOf(module) {
  const text = data.drawings[data.diagrams[module.name]];
  if (!text) return [];
  const parsed = new DOMParser().parseFromString(text, "image/svg+xml").documentElement;
  if (parsed.nodeName !== "svg" || parsed.querySelector("parsererror")) return [];
  return [h("section", {class: "block"}, h("h3", null, "Flow"), h("figure", {class: "diagram"}, redrawn(parsed)))];
}

// Made anew: what is imported would be loaded before it can be looked at.
function redrawn(element) {
  const copy = document.createElementNS("http://www.w3.org/2000/svg", element.nodeName);
  for (const {name, value} of element.attributes) {
    if (SET.test(name) && (!/url/i.test(value) || /^url\(#[\w-]+\)$/.test(value))) copy.setAttribute(name, value);
  }
  for (const child of element.childNodes) {
    if (child.nodeType === Node.TEXT_NODE) copy.append(child.data);
    else if (DRAWN.has(child.nodeName)) copy.append(redrawn(child));
  }
  return copy;
}
