// Hooks that are there now: a table that groups filter, and what they cost a call.
const chosen = new Set();
const typeOf = (hook) => `${hook.hook_type}${hook.edits ? ", edits" : ""}`;
const inGroups = (hook) => !chosen.size || hook.groups.some((group) => chosen.has(group));

function startHooks() {
  byId("tab-hooks").textContent = `Hooks (${whole(data.hooks.length)})`;
  const panel = byId("panel-hooks");
  if (!data.hooks.length) {
    panel.append(p("note", "No hook is on this model."));
    return;
  }
  const used = new Set(data.hooks.flatMap((hook) => hook.groups));
  const chips = data.groups.filter((group) => used.has(group)).map(chip);
  panel.append(h("div", {class: "chips", role: "group", "aria-label": "Groups"}, chips), h("div", {id: "hooks"}));
  drawHooks();
}

function chip(group) {
  const button = h("button", {type: "button", class: "chip", "aria-pressed": "false"}, group,
    span("muted", whole(data.hooks.filter((hook) => hook.groups.includes(group)).length)));
  button.addEventListener("click", () => {
    if (!chosen.delete(group)) chosen.add(group);
    button.setAttribute("aria-pressed", String(chosen.has(group)));
    drawHooks();
  });
  return button;
}

const LISTED = 300;

function drawHooks() {
  const found = data.hooks.filter(inGroups);
  const missing = found.some((hook) => hook.missed || hook.refusal);
  const columns = ["place", "type", "groups", "run", "on", "#fired", ...(missing ? ["why not"] : [])];
  const told = h("p", {class: "muted", role: "status"}, `${many(found.length, "hook")} of ${whole(data.hooks.length)}`);
  const rows = found.slice(0, LISTED).map((hook) => hookRow(hook, missing));
  const more = found.length > LISTED ? p("muted", `and ${whole(found.length - LISTED)} more`) : null;
  byId("hooks").replaceChildren(block("Hooks", told, table("Hooks", columns, rows), more), costs(found));
}

const hookRow = (hook, missing) => [
  h("td", null, goTo(hook)),
  h("td", null, typeOf(hook)),
  h("td", null, hook.groups.filter((group) => group !== "all").join(", ")),
  h("td", null, hook.run),
  h("td", {class: "state"}, hook.enabled ? "● on" : "○ off"),
  h("td", {class: "number"}, whole(hook.fired)),
  missing ? h("td", {class: "reason"}, hook.missed || hook.refusal || "") : null,
];

function goTo(hook) {
  return h("button", {type: "button", class: "link", onclick: () => reveal(hook.module)}, hook.name || "(model)");
}

function costs(found) {
  const on = found.filter((hook) => hook.enabled);
  const known = on.filter((hook) => hook.bytes !== null);
  const unknown = on.length - known.length;
  const total = known.reduce((sum, hook) => sum + hook.bytes, 0);
  const words = ` a call between ranks, for ${many(known.length, "hook")} that ${known.length === 1 ? "is" : "are"} on`;
  const also = unknown ? `, and ${whole(unknown)} of unknown size` : "";
  const top = Math.max(1, ...found.map((hook) => hook.bytes ?? 0));
  const lines = found.slice(0, LISTED).map((hook) => h("li", {class: hook.enabled ? "" : "off"},
    span("mono", hook.name || "(model)"), bar((hook.bytes ?? 0) / top), span("cost", cost(hook))));
  return block("Cost", h("p", {id: "total"}, h("b", null, bytes(total)), words, also), h("ul", {class: "bars"}, lines));
}

function cost(hook) {
  if (hook.refusal) return "refused";
  if (hook.elements === null) return "not yet known";
  if (!hook.elements) return "nothing moves";
  return `${hook.bytes === null ? `${whole(hook.elements)} elements` : bytes(hook.bytes)}, ${hook.collective}`;
}

function bar(part) {
  const fill = h("span", {class: "fill"});
  fill.style.width = `${(100 * part).toFixed(1)}%`;
  return h("span", {class: "track", "aria-hidden": "true"}, fill);
}
