// Hooks that are there now: a table that groups filter, and what they cost a call.
const chosen = new Set();
const inGroups = (hook) => !chosen.size || hook.groups.some((group) => chosen.has(group));

function startHooks() {
  byId("tab-hooks").textContent = `Hooks (${whole(data.hooks.length)})`;
  const panel = byId("panel-hooks");
  if (!data.hooks.length) {
    panel.append(h("p", {class: "note"}, "No hook is on this model."));
    return;
  }
  const used = [...new Set([...data.groups, ...data.hooks.flatMap((hook) => hook.groups)])].filter((group) => data.hooks.some((hook) => hook.groups.includes(group)));
  panel.append(h("div", {class: "chips", role: "group", "aria-label": "Groups"}, used.map(chip)), h("div", {id: "hooks"}));
  drawHooks();
}

function chip(group) {
  const button = h("button", {type: "button", class: "chip", "aria-pressed": "false"}, group,
    h("span", {class: "muted"}, whole(data.hooks.filter((hook) => hook.groups.includes(group)).length)));
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
  const more = found.length > LISTED ? h("p", {class: "muted"}, `and ${whole(found.length - LISTED)} more`) : "";
  byId("hooks").replaceChildren(
    h("section", {class: "block"}, h("h3", null, "Hooks"), h("p", {class: "muted", role: "status"}, `${many(found.length, "hook")} of ${whole(data.hooks.length)}`),
      table("Hooks", ["place", "type", "groups", "run", "on", "#fired", ...(missing ? ["why not"] : [])],
        found.slice(0, LISTED).map((hook) => hookRow(hook, missing))), more),
    costs(found));
}

const hookRow = (hook, missing) => [
  h("td", null, goTo(hook)),
  h("td", null, `${hook.hook_type}${hook.edits ? ", edits" : ""}`),
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
  const top = Math.max(1, ...found.map((hook) => hook.bytes ?? 0));
  const known = found.filter((hook) => hook.bytes !== null && hook.enabled);
  const unknown = found.filter((hook) => hook.bytes === null && hook.enabled).length;
  const total = known.reduce((sum, hook) => sum + hook.bytes, 0);
  const lines = found.slice(0, LISTED).map((hook) => h("li", {class: hook.enabled ? "" : "off"},
    h("span", {class: "mono"}, hook.name || "(model)"), bar((hook.bytes ?? 0) / top), h("span", {class: "cost"}, cost(hook))));
  return h("section", {class: "block"}, h("h3", null, "Cost"),
    h("p", {id: "total"}, h("b", null, bytes(total)), ` a call between ranks, for ${many(known.length, "hook")} that ${known.length === 1 ? "is" : "are"} on`,
      unknown ? `, and ${whole(unknown)} of unknown size` : ""),
    h("ul", {class: "bars"}, lines));
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
