// The layer x head grid.

let cells = new Map();
const shownSet = () => (state.view === "second" && second() ? second() : current());
const comparing = () => state.view === "difference" && second() !== null;

function buildGrid() {
  const sets = [current(), second()].filter(Boolean);
  const layers = [...new Set(sets.flatMap((s) => s.heads.map((h) => h[0])))].sort((a, b) => a - b);
  const heads = [...new Set(sets.flatMap((s) => s.heads.map((h) => h[1])))].sort((a, b) => a - b);
  const kv = new Map(current().heads.map((h) => [h[1], h[2]]));
  const apart = (i) => i > 0 && kv.get(heads[i]) !== kv.get(heads[i - 1]);
  state.columns = heads.length;
  cells = new Map();
  const top = make("div", { role: "row" }, make("div", { class: "top", role: "columnheader" }, "layer"));
  heads.forEach((h, i) => top.append(make("div", { class: apart(i) ? "name kv" : "name", role: "columnheader" }, String(h))));
  const rows = layers.map((layer) => {
    const row = make("div", { role: "row" }, make("div", { class: "side", role: "rowheader" }, String(layer)));
    heads.forEach((head, i) => {
      const key = `${layer}:${head}`;
      if (!sets.some((s) => s.index.has(key))) {
        row.append(make("div", { class: apart(i) ? "gap kv" : "gap", role: "gridcell", "aria-label": `layer ${layer}, head ${head}: not analyzed` }));
        return;
      }
      const button = make("button", { type: "button", role: "gridcell", tabindex: "-1", "data-key": key, class: apart(i) ? "kv" : null });
      cells.set(key, button);
      row.append(button);
    });
    return row;
  });
  fill("grid", top, ...rows);
  if (!cells.has(state.key)) state.key = worst(current(), state.theta)?.key ?? cells.keys().next().value;
}

function valueOf(key) {
  const q = QUANTITIES[state.quantity];
  const read = (set) => {
    const record = set?.index.get(key);
    const x = record ? q.value(set, record, thetaOf(set)) : null;
    return x === undefined || Number.isNaN(x) ? null : x;
  };
  if (!comparing()) return read(shownSet());
  const [a, b] = [read(current()), read(second())];
  if (a === null || b === null) return null;
  if (q.words) return a === b ? "same" : `${a} → ${b}`;
  return a === b ? 0 : b - a;
}

function paintGrid() {
  const q = QUANTITIES[state.quantity], difference = comparing();
  const values = new Map([...cells.keys()].map((key) => [key, valueOf(key)]));
  const numbers = [...values.values()].filter((x) => typeof x === "number" && Number.isFinite(x));
  const span = difference && !q.words ? Math.max(1e-4, ...numbers.map(Math.abs)) : 0;
  const [low, high] = difference ? [-span, span] : q.scale ?? [0, 1];
  const map = difference ? "PuOr" : q.map;
  const short = state.columns > 20, roomy = q.words && state.columns <= 12;
  byId("grid").style.setProperty("--cell", short ? "34px" : roomy ? "96px" : "46px");
  const target = runOf(shownSet()).target;
  for (const [key, cell] of cells) {
    const value = values.get(key), [layer, head] = key.split(":");
    let text, rgb;
    if (value === null) [text, rgb] = ["", null];
    else if (q.words) {
      text = String(value);
      rgb = difference ? (value === "same" ? [128, 128, 128] : channels(data.colors.short)) : wordColor(q, value);
    } else {
      text = q.write && !difference ? q.write(value) : fixed(value, q.digits ?? (difference || short ? 2 : 3));
      rgb = color(map, (value - low) / (high - low));
    }
    const chosen = key === state.key;
    cell.style.background = rgb ? `rgb(${rgb})` : "var(--empty)";
    cell.style.color = rgb ? inkOn(rgb) : "var(--muted)";
    const all = (state.quantity === "recall" || state.quantity === "density") && !difference && value === 1;
    cell.textContent = all ? "all" : q.words ? text.slice(0, roomy ? 16 : 7) : text;
    const words = value === null ? (q.only ?? "no value") : q.words || (q.write && !difference) ? text : fixed(value, q.digits ?? 4);
    cell.setAttribute("aria-label", `layer ${layer}, head ${head}: ${q.name} ${words}`);
    cell.title = `layer ${layer}, head ${head}: ${q.name} ${words}`;
    cell.setAttribute("aria-selected", String(chosen));
    cell.tabIndex = chosen ? 0 : -1;
    cell.classList.toggle("short", state.quantity === "recall" && !difference && value !== null && value < target);
  }
  const note = [];
  if (q.words && !difference)
    for (const word of q.words) {
      const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
      swatch.style.background = `rgb(${wordColor(q, word)})`;
      note.push(make("span", {}, swatch, word));
    }
  else if (!q.words) {
    const bar = make("span", { class: "bar", "aria-hidden": "true" });
    bar.style.background = gradient(map);
    note.push(make("span", {}, fixed(low, 2)), bar, make("span", {}, fixed(high, 2)));
  }
  const needs = ["theta_needed", "density_needed", "oracle_needed", "best"].includes(state.quantity);
  note.push(make("span", {}, difference ? `${q.name}, second minus first` : q.name + (needs ? ` for recall ${target}` : "")));
  if (state.quantity === "recall" && !difference) note.push(make("span", {}, `framed: below the target recall ${target}`));
  if (q.only && !numbers.length) note.push(make("span", { class: "warning" }, `${q.name} ${q.only}: choose one of them`));
  fill("legend", ...note);
}

function wordColor(q, word) {
  const hex = COLORS[Math.max(q.words.indexOf(word), 0) % COLORS.length];
  const fade = q.words.indexOf(word) >= COLORS.length ? 0.45 : 0; // a ninth method is a paler first
  return channels(hex).map((x) => Math.round(x * (1 - fade) + 255 * fade));
}

function worst(set, theta) {
  let found = null;
  for (const r of set.records) {
    const recall = at(set, r, "recall", theta);
    if (found === null || recall < found.recall) found = { key: `${r.layer}:${r.head}`, recall, record: r };
  }
  return found;
}
