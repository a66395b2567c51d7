"use strict";
// Asks for the run's state once a second, and draws it. Text from files is only ever put in as text.

const $ = (id) => document.getElementById(id);
const number = (n, digits = 3) => n.toLocaleString("en", { maximumSignificantDigits: digits });
const size = (bytes) => (bytes >= 1e9 ? number(bytes / 1e9) + " GB" : bytes >= 1e6 ? number(bytes / 1e6) + " MB" : number(bytes / 1e3) + " kB");

function seconds(s) {
  if (s < 90) return Math.round(s) + " s";
  return s < 5400 ? Math.round(s / 60) + " min" : number(s / 3600, 2) + " h";
}

function make(tag, text, kind) {
  const node = document.createElement(tag);
  node.textContent = text;
  if (kind) node.className = kind;
  return node;
}

function table(id, columns, rows) {
  const [head, body] = [$(id).tHead, $(id).tBodies[0]];
  const top = document.createElement("tr");
  columns.forEach((c) => { const cell = make("th", c); cell.scope = "col"; top.append(cell); });
  head.replaceChildren(top);
  body.replaceChildren(...rows.map((cells) => {
    const row = document.createElement("tr");
    cells.forEach(([text, kind]) => row.append(make("td", text, kind)));
    return row;
  }));
  $(id).hidden = !rows.length;
}

function chart(id, lines, x, y) {
  const names = Object.keys(lines);
  if (!names.some((n) => lines[n].length)) { $(id).replaceChildren(); return; }
  const ink = getComputedStyle(document.body).color;
  const data = names.map((n) => ({
    // plotly reads a few tags in names
    name: n.replaceAll("&", "&amp;").replaceAll("<", "&lt;"),
    x: lines[n].map((p) => p[0]), y: lines[n].map((p) => p[1]), mode: lines[n].length < 60 ? "lines+markers" : "lines",
  }));
  Plotly.react(id, data, {
    height: 300, margin: { l: 60, r: 10, t: 10, b: 40 }, showlegend: names.length > 1,
    xaxis: { title: { text: x }, color: ink, gridcolor: "#8885" }, yaxis: { title: { text: y }, color: ink, gridcolor: "#8885", rangemode: "tozero" },
    font: { color: ink }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
  }, { displaylogo: false, responsive: true });
}

function progress(state, ranks) {
  const found = [];
  const store = state.store;
  if (store && store.commits.length) {
    const [step, time, rows, bytes] = store.commits[store.commits.length - 1];
    found.push([number(rows, 9), "rows committed"], [size(bytes), "on disk"], [number(step + 1, 9) + (store.steps ? " of " + number(store.steps, 9) : ""), "steps committed"]);
    if (store.commits.length > 1) {
      const [, first, before, held] = store.commits[0];
      const took = Math.max(time - first, 1e-3);
      found.push([number((rows - before) / took), "rows a second"], [size((bytes - held) / took) + "/s", "written"]);
      const left = store.steps ? (took / (step - store.commits[0][0])) * (store.steps - step - 1) : 0;
      if (left > 0) found.push([seconds(left), "left"]);
    }
    found.push([seconds(Math.max(0, state.now - time)), "since the last commit"]);
  }
  if (ranks.length) {
    const calls = ranks.map((r) => r.calls);
    found.push([number(Math.min(...calls), 9), "forwards"], [number(Math.min(...ranks.map((r) => r.rate))), "forwards a second"]);
  }
  $("numbers").replaceChildren(...found.map(([value, what]) => {
    const box = document.createElement("div");
    box.append(make("b", value), make("span", what));
    return box;
  }));
  const rates = [];
  const commits = store ? store.commits : [];
  for (let i = 1; i < commits.length; i++) {
    const took = Math.max(commits[i][1] - commits[i - 1][1], 1e-3);
    rates.push([commits[i][0], (commits[i][2] - commits[i - 1][2]) / took]);
  }
  chart("rates", rates.length ? { "rows a second": rates } : {}, "step", "rows a second");
}

function sites(state, ranks) {
  const logged = Object.keys(state.lines).length > 0;
  const lines = logged ? state.lines : (state.store ? state.store.lines : {});
  chart("norms", lines, logged ? "forward" : "step", logged ? "root mean square" : "norm of a row");
  const refused = Object.assign({}, ...ranks.map((r) => r.refused));
  const words = Object.entries(refused).map(([name, why]) => name + ": " + why);
  $("about-norms").textContent = words.length ? "Not shown: " + words.join("; ") :
    (Object.keys(lines).length ? "" : "Nothing is logged of values; name some in fm.log(path, patterns).");
}

function hooks(ranks, names) {
  const rows = new Map();
  ranks.forEach((rank, i) => rank.hooks.forEach(([name, type, on, edits, fired]) => {
    const key = JSON.stringify([name, type, edits]);
    if (!rows.has(key)) rows.set(key, { name, type, edits, on, fired: Array(ranks.length).fill(null) });
    rows.get(key).fired[i] = (rows.get(key).fired[i] ?? 0) + fired;
  }));
  const shown = [...rows.values()];
  const never = shown.filter((r) => r.on && r.fired.every((f) => !f)).length;
  $("about-hooks").textContent = shown.length ? shown.length + " hooks, " + never + " of them on and never fired" :
    "No hooks, or none that are logged.";
  table("hooks", ["module", "type", "", ...names], shown.slice(0, 500).map((r) => [
    [r.name || "(model)"], [r.type + (r.edits ? ", edit" : "")], [r.on ? "on" : "off", r.on ? "" : "off"],
    ...r.fired.map((f) => [f === null ? "" : number(f, 9), r.on && f === 0 ? "never" : ""]),
  ]));
}

function draw(state) {
  const names = Object.keys(state.ranks).map((n) => String(Number(n.split("-")[1]))), ranks = Object.values(state.ranks);
  $("path").textContent = state.path;
  document.title = "FlexModel: " + state.path.split("/").pop();
  const still = ranks.filter((r) => !r.ended);
  const quiet = still.filter((r) => state.now - r.last > 60);
  $("status").className = quiet.length ? "alert" : "";
  $("status").textContent = quiet.length ? quiet.length + " of " + ranks.length + " ranks have written nothing for a minute" :
    ranks.length && !still.length ? "The run has ended." :
    ranks.length || state.store ? "Updated " + new Date(state.now * 1000).toLocaleTimeString() : "Waiting for the first lines.";
  progress(state, ranks);
  sites(state, ranks);
  hooks(ranks, names.map((n) => "fired on " + n));
  table("ranks", ["rank", "forwards", "forwards a second", "last line", ""], ranks.map((r, i) => [
    [names[i]], [number(r.calls, 9)], [number(r.rate)], [seconds(Math.max(0, state.now - r.last)) + " ago"],
    [r.ended ? "ended" : "running"],
  ]));
}

async function ask() {
  try {
    const answer = await fetch("/state");
    if (!answer.ok) throw new Error("the state cannot be read: " + answer.status);
    draw(await answer.json());
  } catch (error) {
    $("status").className = "alert";
    $("status").textContent = "No answer from flex-model watch: " + error.message;
  }
  setTimeout(ask, 1000);
}

ask();
