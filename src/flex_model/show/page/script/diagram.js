// The flow inside a module, which comes as SVG. Only shapes and words of it are taken, nothing that could run or load.
const DRAWN = new Set(["svg", "g", "defs", "marker", "path", "rect", "circle", "ellipse", "line", "polyline", "polygon",
  "text", "tspan", "title", "desc"]);
const SET = new RegExp(`^(${[
  "class", "id", "role", "aria-label", "d", "[xy][12]?", "c[xy]", "r[xy]?", "d[xy]", "width", "height", "viewBox",
  "points", "transform", "marker-(start|mid|end)", "marker(Width|Height|Units)", "orient", "ref[XY]",
  "fill(-opacity)?", "stroke(-.*)?", "text-anchor", "dominant-baseline",
].join("|")})$`);

function diagramOf(module) {
  const text = data.drawings[data.diagrams[module.name]];
  if (!text) return [];
  const parsed = new DOMParser().parseFromString(text, "image/svg+xml").documentElement;
  if (parsed.nodeName !== "svg" || parsed.querySelector("parsererror")) return [];
  return [block("Flow", h("figure", {class: "diagram"}, redrawn(parsed)))];
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
