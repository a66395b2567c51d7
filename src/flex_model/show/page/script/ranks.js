// Who holds what: ranks on the mesh, with their part of the parameters.
const ROWS = 128;

function startRanks() {
  const panel = byId("panel-ranks");
  if (!data.axes.length) {
    panel.append(p("note", "One process holds the whole model."));
    return;
  }
  const spots = places(data.ranks, 0, []);
  const at = new Map(spots.map((spot, i) => [spot.rank, i]));
  const about = data.held.about ? "about " : "";
  const share = (rank) => held(at.get(rank)) / modules.size[0];
  const parts = many(new Set(data.held.alike).size, "different part");
  const label = `${many(spots.length, "rank")}; ${parts} of the parameters`;
  const number = (text) => h("td", {class: "number"}, text);
  const rows = spots.slice(0, ROWS).map(({rank, place}, i) => [
    number(String(rank)), ...place.map((c) => number(String(c))),
    stageAxis >= 0 ? h("td", null, stagesAt(place).join(", ")) : null,
    number(about + whole(held(i))), h("td", null, bar(share(rank))), number(about + percent(share(rank))),
  ]);
  const axes = data.axes.map((axis) => `#${axis.name}`);
  const columns = ["#rank", ...axes, ...(stageAxis >= 0 ? ["stages"] : []), "#parameters", "", "#share"];
  const drawn = mesh(label, (rank) => ({key: data.held.alike[at.get(rank)], text: percent(share(rank))}));
  const more = spots.length > ROWS ? p("muted", `and ${whole(spots.length - ROWS)} more`) : null;
  panel.append(
    block("Mesh", p("hint muted", "Ranks of one colour hold the same parameters."), drawn),
    block("Ranks", table("Ranks", columns, rows), more));
}

const held = (i) => data.held.counts[i];
const percent = (part) => `${Number((100 * part).toPrecision(3))}%`;
const stagesAt = (place) => Object.keys(data.places).filter((stage) => data.places[stage] === place[stageAxis]);

function places(ranks, depth, place) {
  if (depth === data.axes.length) return [{rank: ranks, place}];
  return ranks.flatMap((part, i) => places(part, depth + 1, [...place, i]));
}
