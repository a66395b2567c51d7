// Who holds what: ranks on the mesh, with their part of the parameters.
const ROWS = 128;

function startRanks() {
  const panel = byId("panel-ranks");
  if (!data.axes.length) {
    panel.append(h("p", {class: "note"}, "One process holds the whole model."));
    return;
  }
  const spots = places(data.ranks, 0, []);
  const at = new Map(spots.map((spot, i) => [spot.rank, i]));
  const about = data.held.about ? "about " : "";
  const share = (i) => `${about}${percent(held(i) / modules.size[0])}`;
  const label = `${many(spots.length, "rank")}; ${many(new Set(data.held.alike).size, "different part")} of the parameters`;
  const rows = spots.slice(0, ROWS).map(({rank, place}, i) => [
    h("td", {class: "number"}, String(rank)), place.map((c) => h("td", {class: "number"}, String(c))),
    stageAxis >= 0 ? h("td", null, stagesAt(place).join(", ")) : null,
    h("td", {class: "number"}, about + whole(held(i))), h("td", null, bar(held(i) / modules.size[0])), h("td", {class: "number"}, share(i)),
  ].flat());
  panel.append(
    h("section", {class: "block"}, h("h3", null, "Mesh"), h("p", {class: "muted"}, "Ranks of one colour hold the same parameters."),
      mesh(label, (rank) => ({key: data.held.alike[at.get(rank)], text: percent(held(at.get(rank)) / modules.size[0])}))),
    h("section", {class: "block"}, h("h3", null, "Ranks"),
      table("Ranks", ["#rank", ...data.axes.map((axis) => `#${axis.name}`), ...(stageAxis >= 0 ? ["stages"] : []), "#parameters", "", "#share"], rows),
      spots.length > ROWS ? h("p", {class: "muted"}, `and ${whole(spots.length - ROWS)} more`) : null));
}

const held = (i) => data.held.counts[i];
const percent = (part) => `${Number((100 * part).toPrecision(3))}%`;
const stagesAt = (place) => Object.entries(data.places).filter(([, at]) => at === place[stageAxis]).map(([stage]) => stage);

function places(ranks, depth, place) {
  if (depth === data.axes.length) return [{rank: ranks, place}];
  return ranks.flatMap((part, i) => places(part, depth + 1, [...place, i]));
}
