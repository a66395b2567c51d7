// The tree of modules: a row is made when it is unfolded. A run of modules that are alike is one row, which unfolds to
// the single ones. Entries are {type, run, level, at, of, open}; `run`: numbers of modules.
const tree = byId("tree");
const PAGE = 200;
const FIRST = 8;  // rows to begin with, or more
let visible = [];
let current = null;

const entry = (type, run, level, at, of) => ({type, run, level, at, of, open: false});

function below(parent) {
  const level = parent.level + 1;
  if (parent.type === "run") return cut(parent.run.map((i, at) => entry("module", [i], level, at, parent.run.length)));
  const runs = modules.runs[parent.run[0]];
  return cut(runs.map((run, at) => entry(run.length > 1 ? "run" : "module", run, level, at, runs.length)));
}

// A page of many entries, with a row for those before and one for those after.
function cut(entries, from = 0) {
  return [...more(entries.slice(0, from)), ...entries.slice(from, from + PAGE), ...more(entries.slice(from + PAGE))];
}

const more = (rest) => (rest.length ? [{...rest[0], type: "more", rest}] : []);

const unfolds = (item) => item.type === "run" || (item.type === "module" && modules.runs[item.run[0]].length > 0);

function put(entries, after) {
  const rows = entries.map(row);
  visible.splice(after + 1, 0, ...entries);
  if (after < 0) tree.append(...rows);
  else visible[after].element.after(...rows);
}

function row(item) {
  item.element = h("div", {
    role: "treeitem", class: `item ${item.type}`, "aria-level": item.level, "aria-posinset": item.at + 1,
    "aria-setsize": item.of, "aria-selected": "false", "aria-expanded": unfolds(item) ? "false" : null, tabindex: "-1",
  }, item.type === "more" ? `${whole(item.rest.length)} more` : cells(item));
  item.element.style.setProperty("--level", item.level - 1);
  item.element.item = item;
  return item.element;
}

function cells(item) {
  const module = moduleOf(item.run[0]);
  const out = module.values.find((value) => value.side === "out");
  const times = item.run.length;
  const last = times > 1 ? `-${modules.label[item.run.at(-1)]}` : "";
  const inside = hooksBelow[item.run[0]];
  const on = module.hooks.filter((hook) => hook.enabled).length;
  return [
    span("name", h("span", {class: "twisty", "aria-hidden": "true"}), h("b", null, module.label + last),
      times > 1 ? span("times", `×${whole(times)}`) : null, span("muted", module.kind)),
    span("number", sizeWords(module, times)),
    span("shape", out ? (out.refusal ? "refused" : shape(out.shape ?? out.local)) : ""),
    span("tags", out ? tags(out.placements ?? []) : null,
      module.stages.length && stageAxis >= 0 ? span("tag", `stage ${module.stages.join(", ")}`) : null,
      module.hooks.length ? span("hook", `${on ? "●" : "○"} ${many(module.hooks.length, "hook")}`) : null,
      inside ? span("hook inside", `${whole(inside)} inside`) : null),
  ];
}

function sizeWords(module, times) {
  if (module.sameAs) return "shared";
  if (!module.size) return module.parameters.some((p) => p.same_as) ? "tied" : "";
  return amount(module.size) + (times > 1 ? " each" : "");
}

const tags = (placements) => placements.map((word, i) =>
  (replicated(word) || !inner[i] ? null : span("tag split", `${inner[i].name} ${word}`)));

function unfold(item) {
  if (!unfolds(item) || item.open) return;
  item.open = true;
  item.element.setAttribute("aria-expanded", "true");
  const children = below(item);
  put(children, visible.indexOf(item));
  if (children.length === 1 && children[0].type === "module") unfold(children[0]);
}

function foldUp(item) {
  if (!item.open) return;
  item.open = false;
  item.element.setAttribute("aria-expanded", "false");
  const from = visible.indexOf(item) + 1;
  let to = from;
  while (to < visible.length && visible[to].level > item.level) { visible[to].element.remove(); to += 1; }
  const gone = visible.splice(from, to - from);
  if (gone.includes(current)) choose(item);
}

function showMore(item, from = 0) {
  const at = visible.indexOf(item);
  const next = cut(item.rest, from);
  put(next, at);
  item.element.remove();
  visible.splice(at, 1);
  return next[0];
}

// Make it the row that the Tab key comes to.
function moveTo(item, focus) {
  if (current) { current.element.tabIndex = -1; current.element.setAttribute("aria-selected", "false"); }
  current = item;
  item.element.tabIndex = 0;
  item.element.setAttribute("aria-selected", "true");
  if (focus) item.element.focus();
}

// And show its module.
function choose(item, focus = true) {
  moveTo(item, focus);
  if (item.type !== "more") showModule(item.run[0], item.run);
}

const parentOf = (item) => visible.slice(0, visible.indexOf(item)).findLast((other) => other.level < item.level);

// Unfold down to a module and choose it.
function reveal(i, focus = false) {
  const path = [];
  for (let at = i; at >= 0; at = parents[at]) path.unshift(at);
  let item = visible[0];
  for (const step of path.slice(1)) {
    item = find(item, step);
    if (item.type === "run") item = find(item, step);
  }
  choose(item, focus);
  item.element.scrollIntoView({block: "nearest"});
}

// The row of a module, or of the run that it is in, right below a row.
function find(parent, i) {
  unfold(parent);
  for (let at = visible.indexOf(parent) + 1; ; at += 1) {
    const item = visible[at];
    if (item.level !== parent.level + 1) continue;
    if (item.type !== "more" && item.run.includes(i)) return item;
    const hidden = (item.rest ?? []).findIndex((other) => other.run.includes(i));
    if (hidden < 0) continue;
    showMore(item, hidden - (hidden % PAGE));
    at -= 1;  // look at what came in its place
  }
}

const KEYS = {
  ArrowDown: (item, at) => visible[at + 1],
  ArrowUp: (item, at) => visible[at - 1],
  Home: () => visible[0],
  End: () => visible.at(-1),
  ArrowRight: (item, at) => {
    if (item.open) return visible[at + 1];
    unfold(item);
    return null;
  },
  ArrowLeft: (item) => {
    if (!item.open) return parentOf(item);
    foldUp(item);
    return null;
  },
  Enter: (item) => { toggle(item); return null; },
  " ": (item) => { toggle(item); return null; },
};

function toggle(item) {
  if (item.type === "more") choose(showMore(item));
  else if (item.open) foldUp(item);
  else unfold(item);
}

function startTree() {
  put([entry("module", [0], 1, 0, 1)], -1);
  let next = visible[0];
  while (next && visible.length < FIRST) {
    unfold(next);
    next = visible.find((item) => item.type === "module" && unfolds(item) && !item.open);
  }
  choose(visible[0], false);
  tree.addEventListener("click", (event) => {
    const element = event.target.closest("[role=treeitem]");
    if (!element) return;
    const again = element.item === current || element.item.type === "more";
    if (event.target.classList.contains("twisty") || again) toggle(element.item);
    if (element.isConnected) choose(element.item);
  });
  tree.addEventListener("keydown", (event) => {
    const act = KEYS[event.key];
    const item = event.target.item;
    if (!act || !item || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const next = act(item, visible.indexOf(item));
    if (next) choose(next);
  });
}
