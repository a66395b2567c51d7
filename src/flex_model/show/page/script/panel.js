// What is known of one module.
function showModule(i, run) {
  const module = moduleOf(i);
  const panel = byId("panel-module");
  const code = module.silent || module.sameAs ? [] : [codeOf(module)];
  panel.replaceChildren(heading(module, run), ...diagramOf(module), ...valuesOf(module), ...parametersOf(module),
    ...hooksIn(module), ...code);
  panel.scrollTop = 0;
  chooseTab(0);
}

function heading(module, run) {
  const here = data.axes.length ? `, ${whole(module.here)} on rank ${data.rank}` : "";
  const sizes = module.size ? `${whole(module.size)} parameters${here}` : "no parameters";
  return h("div", {class: "heading"}, h("h2", null, module.name || "(model)"), p("muted", `${module.kind}, ${sizes}`),
    notesOn(module, run).filter(Boolean).map((note) => p("note", note)));
}

function notesOn(module, run) {
  const ran = module.values.find((value) => value.times > 1)?.times;
  const [first, last] = [modules.name[run[0]], modules.name[run.at(-1)]];
  return [
    run.length > 1 ? `One of ${whole(run.length)} that are alike: ${first} to ${last}.` : "",
    module.sameAs ? `The same module as ${module.sameAs}; hook that one.` : "",
    module.stages.length && stageAxis >= 0 ? `On stage ${module.stages.join(", ")}.` : "",
    ran ? `Ran ${ran} times in the forward that was looked at.` : "",
    module.silent ? "A container that is never called, so that no hook on it would fire." : "",
    module.unfired ? `Did not run: ${module.unfired}` : "",
  ];
}

function parametersOf(module) {
  if (!module.parameters.length) return [];
  const spread = data.axes.length > 0;
  const columns = ["name", "shape", ...(spread ? [`rank ${data.rank}`, "dtype", "layout"] : ["dtype"]), ""];
  const rows = module.parameters.map((parameter) => [
    h("td", {class: "mono"}, parameter.name),
    h("td", {class: "mono"}, shapeMarked(parameter.shape, parameter.placements ?? [])),
    spread ? h("td", {class: "mono"}, parameter.local ? shape(parameter.local) : "–") : null,
    h("td", null, parameter.dtype ?? ""),
    spread ? h("td", null, placed(parameter.placements ?? [])) : null,
    h("td", {class: "muted"}, remarks(parameter)),
  ]);
  return [block("Parameters", table("Parameters", columns, rows))];
}

function remarks(parameter) {
  const tied = parameter.same_as ? `tied to ${parameter.same_as}` : "";
  return [parameter.trainable ? "" : "frozen", tied].filter(Boolean).join(", ");
}

function placed(placements) {
  const words = placements.map((word, i) => (replicated(word) || !inner[i] ? "" : `${inner[i].name} ${word}`));
  return words.filter(Boolean).join(", ") || "R";
}

function hooksIn(module) {
  if (!module.hooks.length) return [];
  const lines = module.hooks.map((hook) => h("li", null,
    `${hook.enabled ? "●" : "○"} ${typeOf(hook)}, ${hook.run}, fired ${many(hook.fired, "time")}`));
  return [block("Hooks", h("ul", {class: "plain"}, lines))];
}
