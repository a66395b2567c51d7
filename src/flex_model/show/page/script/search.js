// Search by name: with a wildcard by glob as `fm.capture` takes it, without by any part of the name.
const SHOWN = 100;
const search = byId("search");
const matches = byId("matches");
let active = -1;

function lookUp(query) {
  if (!isGlob(query)) {
    const word = query.toLowerCase();
    return numbersWhere((name) => name.toLowerCase().includes(word));
  }
  const regex = globToRegExp(query);
  return numbersWhere((name) => name !== "" && regex.test(name));
}

function numbersWhere(wanted) {
  const found = [];
  for (let i = 0; i < count; i += 1) if (wanted(modules.name[i])) found.push(i);
  return found;
}

// Of what a glob matches, how many modules `fm.capture` takes: those that fire, each once.
function hookable(found) {
  const firing = found.filter((i) => !some.silent[i]);
  return new Set((firing.length ? firing : found).map((i) => some.same_as[i] ?? modules.name[i])).size;
}

function onSearch() {
  const query = search.value.trim();
  let found = [];
  let told = "";
  try {
    found = query ? lookUp(query) : [];
    if (query) told = `${many(found.length, "module")} of ${whole(count)}`;
    if (query && isGlob(query)) told += `; fm.capture takes ${whole(hookable(found))}`;
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    told = "not a pattern yet";
  }
  const code = () => capturing(python(query), "", "list(acts)");
  const button = found.length && isGlob(query) ? copyButton(`capture of ${query}`, code, "Copy the capture") : "";
  byId("taken").replaceChildren(button);
  active = -1;
  search.removeAttribute("aria-activedescendant");
  search.setAttribute("aria-expanded", String(Boolean(query)));
  byId("found").textContent = told;
  matches.replaceChildren(...found.slice(0, SHOWN).map(option));
  const more = found.length - SHOWN;
  if (more > 0) matches.append(h("li", {role: "presentation", class: "muted"}, `and ${whole(more)} more`));
  matches.hidden = !query;
  for (const element of [tree, byId("columns")]) element.hidden = Boolean(query);
}

const option = (i, at) => h("li", {role: "option", id: `match${at}`, "aria-selected": "false", "data-module": i},
  h("b", null, modules.name[i] || "(model)"), span("muted", pools.kinds[modules.kind[i]]));

function activate(at) {
  const options = matches.querySelectorAll("[role=option]");
  if (!options.length) return;
  options[active]?.setAttribute("aria-selected", "false");
  active = (at + options.length) % options.length;
  const chosen = options[active];
  chosen.setAttribute("aria-selected", "true");
  chosen.scrollIntoView({block: "nearest"});
  search.setAttribute("aria-activedescendant", chosen.id);
  reveal(Number(chosen.dataset.module));
}

function endSearch(focus) {
  search.value = "";
  onSearch();
  current.element.scrollIntoView({block: "nearest"});
  if (focus) current.element.focus();
}

function startSearch() {
  search.addEventListener("input", onSearch);
  search.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") activate(active + 1);
    else if (event.key === "ArrowUp") activate(active - 1);
    else if (event.key === "Enter") { if (active < 0) activate(0); if (active >= 0) endSearch(true); }
    else if (event.key === "Escape") endSearch(false);
    else return;
    event.preventDefault();
  });
  matches.addEventListener("click", (event) => {
    const chosen = event.target.closest("[role=option]");
    if (chosen) activate([...matches.querySelectorAll("[role=option]")].indexOf(chosen));
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.closest("input, select, textarea")) return;
    event.preventDefault();
    search.focus();
  });
}
