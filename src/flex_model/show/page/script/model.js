// The data of the page, and the modules in it by number.
const data = JSON.parse(byId("data").textContent);
const {modules, some, pools} = data;
const count = modules.name.length;
const parents = new Int32Array(count).fill(-1);
modules.runs.forEach((runs, i) => runs.flat().forEach((child) => { parents[child] = i; }));
const hooksOf = new Map();
for (const hook of data.hooks) hooksOf.set(hook.module, [...(hooksOf.get(hook.module) ?? []), hook]);

// How many hooks are on modules below one.
const hooksBelow = new Int32Array(count);
for (const hook of data.hooks) for (let at = parents[hook.module]; at >= 0; at = parents[at]) hooksBelow[at] += 1;

function moduleOf(i) {
  return {
    name: modules.name[i], label: modules.label[i] || "(model)", kind: pools.kinds[modules.kind[i]],
    size: modules.size[i], here: modules.here[i], runs: modules.runs[i], hooks: hooksOf.get(i) ?? [],
    values: pools.values[modules.values[i]], parameters: pools.parameters[modules.parameters[i]],
    silent: Boolean(some.silent[i]), sameAs: some.same_as[i] ?? "", stages: some.stages[i] ?? [],
    unfired: some.unfired[i] ?? "",
  };
}

const shape = (sizes) => (sizes === undefined ? "" : `(${sizes.join(", ")}${sizes.length === 1 ? "," : ""})`);
const splits = (word) => /^_?S\((-?\d+)/.exec(word);
const replicated = (word) => word === "R" || word === "whole" || word === "";

// A placement in words.
function spoken(word) {
  const split = splits(word);
  if (split) return `split along dim ${split[1]}`;
  if (word.startsWith("P")) return `partial: ${/\((\w+)/.exec(word)?.[1] ?? "sum"} of all`;
  if (word === "parts" || word === "a part each") return "each rank its own rows";
  if (word === "flat") return "a piece of a flat parameter";
  return replicated(word) ? "the same on all" : word;
}

// Axes that layouts are over: all but that of pipeline stages.
const inner = data.axes.map((axis, at) => ({...axis, at})).filter((axis) => axis.kind !== "stage");
const stageAxis = data.axes.findIndex((axis) => axis.kind === "stage");
const isAway = (stages, place) =>
  stageAxis >= 0 && stages.length > 0 && !stages.some((stage) => (data.places[stage] ?? stage) === place[stageAxis]);
