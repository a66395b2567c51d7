// The head of the page, its tabs and its colours; then everything is begun.
const tabs = [...document.querySelectorAll("[role=tab]")];

function chooseTab(at, focus = false) {
  tabs.forEach((tab, i) => {
    tab.setAttribute("aria-selected", String(i === at));
    tab.tabIndex = i === at ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).hidden = i !== at;
  });
  if (focus) tabs[at].focus();
}

function startTabs() {
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => chooseTab(i));
    tab.addEventListener("keydown", (event) => {
      const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
      if (step) chooseTab((i + step + tabs.length) % tabs.length, true);
    });
  });
  chooseTab(0);
}

function startFacts() {
  const facts = [["parameters", amount(modules.size[0])], ["modules", whole(count)]];
  if (data.axes.length) {
    facts.push([`on rank ${data.rank}`, amount(modules.here[0])]);
    facts.push(["mesh", data.axes.map((axis) => `${axis.name} ${axis.size}`).join(" × ")]);
  } else facts.push(["mesh", "one process"]);
  if (data.engines.length) facts.push(["engine", data.engines.join(", ")]);
  if (!data.observed) facts.push(["shapes", "as far as hooks have met them"]);
  byId("facts").append(...facts.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value))));
}

function startTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const button = byId("theme");
  let picked = null;
  const draw = () => {
    const dark = picked ?? system.matches;
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    button.textContent = dark ? "Light" : "Dark";
    button.setAttribute("aria-label", dark ? "Use light colours" : "Use dark colours");
  };
  button.addEventListener("click", () => { picked = !(picked ?? system.matches); draw(); });
  system.addEventListener("change", draw);
  draw();
}

byId("app").hidden = false;
startTheme();
startFacts();
startTabs();
startTree();
startSearch();
startHooks();
startRanks();
