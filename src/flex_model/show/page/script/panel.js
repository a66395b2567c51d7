// What is known of one module.
const siteName = (value) => `${value.side} ${value.index ?? 0}`;

function showModule(i, run) {
  const module = moduleOf(i);
  const panel = byId("panel-module");
  panel.replaceChildren(heading(module, run), ...diagramOf(module), ...valuesOf(module), ...parametersOf(module),
    ...hooksIn(module), ...(module.silent || module.sameAs ? [] : [codeSection(module)]));
  panel.scrollTop = 0;
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
  return [h("section", {class: "block"}, h("h3", null, "Values"), module.values.map((value) => site(value, module.stages)))];
}

function site(value, stages) {
  const placements = value.placements ?? [];
  const title = h("h4", null, siteName(value));
  if (value.refusal) return h("article", {class: "site refused"}, title, h("p", null, h("b", null, "Refused: "), value.refusal));
  const local = value.local?.length && shape(value.local) !== shape(value.shape) ? value.local : null;
  const facts = [
    ["shape", value.shape ? shapeMarked(value.shape, placements) : "no rectangular whole"],
    local ? [`on rank ${data.rank}`, shape(local)] : null,
    value.dtype ? ["dtype", value.dtype] : null,
    ...inner.map((axis, i) => [axis.name, spoken(placements[i] ?? "R")]),
    value.evidence ? ["evidence", value.evidence] : null,
  ].filter(Boolean);
  return h("article", {class: "site"}, title, h("div", {class: "pair"}, factList(facts), meshOf(placements, stages)));
}

const factList = (facts) => h("dl", null, facts.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value))));

// Dims that ranks hold parts of are set off.
function shapeMarked(sizes, placements) {
  const dims = new Set(placements.map((word) => Number(splits(word)?.[1] ?? NaN)));
  const parts = sizes.map((size, dim) => [dim ? ", " : "", dims.has(dim) ? h("mark", null, String(size)) : String(size)]);
  return h("span", {class: "shape"}, "(", parts.flat(), sizes.length === 1 ? ",)" : ")");
}

function parametersOf(module) {
  if (!module.parameters.length) return [];
  const columns = ["name", "shape", data.axes.length ? `rank ${data.rank}` : "", "dtype", data.axes.length ? "layout" : "", ""].filter((c, i) => c || i === 5);
  const rows = module.parameters.map((p) => [
    h("td", {class: "mono"}, p.name),
    h("td", {class: "mono"}, shapeMarked(p.shape, p.placements ?? [])),
    data.axes.length ? h("td", {class: "mono"}, p.local ? shape(p.local) : "–") : null,
    h("td", null, p.dtype ?? ""),
    data.axes.length ? h("td", null, inner.map((axis, i) => (replicated((p.placements ?? [])[i] ?? "R") ? "" : `${axis.name} ${p.placements[i]}`)).filter(Boolean).join(", ") || "R") : null,
    h("td", {class: "muted"}, [p.trainable ? "" : "frozen", p.same_as ? `tied to ${p.same_as}` : ""].filter(Boolean).join(", ")),
  ]);
  return [h("section", {class: "block"}, h("h3", null, "Parameters"), table("Parameters", columns, rows))];
}

function table(label, columns, rows) {
  return h("div", {class: "scroll"}, h("table", {"aria-label": label},
    h("thead", null, h("tr", null, columns.map((c) => h("th", {scope: "col"}, c)))), h("tbody", null, rows.map((cells) => h("tr", null, cells)))));
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
  const text = data.diagrams[module.name];
  if (!text) return [];
  const parsed = new DOMParser().parseFromString(text, "image/svg+xml").documentElement;
  if (parsed.nodeName !== "svg") return [];
  const drawing = document.importNode(parsed, true);
  for (const element of [drawing, ...drawing.querySelectorAll("*")]) {
    if (!DRAWN.has(element.nodeName)) { element.remove(); continue; }
    for (const {name, value} of [...element.attributes]) {
      if (!SET.test(name) || (/url/i.test(value) && !/^url\(#[\w-]+\)$/.test(value))) element.removeAttribute(name);
    }
  }
  return [h("section", {class: "block"}, h("h3", null, "Flow"), h("figure", {class: "diagram"}, drawing))];
}
