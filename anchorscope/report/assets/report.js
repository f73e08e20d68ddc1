// The page's behaviour. Text only ever enters the document as text nodes; nothing is fetched; nothing is stored.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  // Okabe and Ito's palette without yellow, which is faint on white, and black, which is not seen on dark.
  const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c6bb1", "#8a8a00"];
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const number = (x) => (x === "inf" ? Infinity : x === "-inf" ? -Infinity : x);
  for (const run of data.runs) {
    run.grid = run.grid.map(number);
    run.asked = run.asked.map(number);
  }

  // ---- document helpers -------------------------------------------------------------------------------------

  /** An element with attributes and children; strings become text nodes. */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === true) element.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children.filter((c) => c !== null && c !== undefined));
    return element;
  }
  const fill = (id, ...children) => byId(id).replaceChildren(...children);
  const nats = (x) => (x === Infinity ? "inf" : x === -Infinity ? "-inf" : String(Math.round(x * 1e4) / 1e4));
  const fixed = (x, digits = 4) =>
    x === null || x === undefined || Number.isNaN(x) ? "-" : Number.isFinite(x) ? decimals(x, digits).replace(/^-(0\.0+)$/, "$1") : nats(x);
  /** More digits where rounding would make a share 0 or 1 that is not: 0.99996 is not "1.0000". */
  const decimals = (x, digits) => {
    for (let more = digits; more <= 6; more++) {
      const text = x.toFixed(more);
      if ((Math.abs(x) >= 1 || Math.abs(+text) < 1) && (x === 0 || +text !== 0)) return text;
    }
    return x.toFixed(digits);
  };
  /** A theta to be typed again: two decimals, rounded up, so that it selects no less than what was measured. */
  const upward = (x) => (Number.isFinite(x) ? (Math.ceil(x * 100 - 0.005) / 100).toFixed(2) : fixed(x));
  const whole = (x) => x.toLocaleString("en-US");
  /** Plotly reads its texts as markup. */
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const mean = (values) => {
    const known = values.filter((x) => x !== null && Number.isFinite(x));
    return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
  };

  // ---- data -------------------------------------------------------------------------------------------------

  /** Bytes of a raw deflate stream in base64. */
  async function inflate(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  /** float32 values stored as four planes of bytes. */
  function floats(bytes) {
    const count = bytes.length / 4;
    const view = new DataView(new ArrayBuffer(bytes.length));
    for (let i = 0; i < count; i++)
      for (let plane = 0; plane < 4; plane++) view.setUint8(4 * i + plane, bytes[plane * count + i]);
    return Float32Array.from({ length: count }, (_, i) => view.getFloat32(4 * i, true));
  }

  /** Decode what every head needs at once; heat maps and tokens wait until they are looked at. */
  async function open(set) {
    if (set.index) return set;
    const all = floats(await inflate(set.curves));
    const stride = all.length / set.heads.length;
    set.records = set.heads.map((head, i) => {
      const record = { layer: head[0], head: head[1], kv: head[2] };
      let at = i * stride;
      for (const [name, rows, columns] of set.layout) {
        const part = Array.from({ length: rows }, (_, r) => all.subarray(at + r * columns, at + (r + 1) * columns));
        record[name] = rows === 1 ? part[0] : part;
        if (name === "extras") record[name] = part;
        if (name === "position") record[name] = part;
        at += rows * columns;
      }
      set.scalars.forEach((name, s) => (record[name] = record.scalars[s]));
      return record;
    });
    if (set.methods) {
      const points = floats(await inflate(set.methods.points));
      let at = 0;
      for (const [key, own] of Object.entries(set.methods.heads))
        set.methods.heads[key] = own.map(([method, count]) => {
          const part = points.subarray(at, at + 2 * count);
          at += 2 * count;
          return { method, density: part.filter((_, i) => i % 2 === 0), recall: part.filter((_, i) => i % 2 === 1) };
        });
    }
    set.index = new Map(set.records.map((r) => [`${r.layer}:${r.head}`, r]));
    return set;
  }

  /** Recall or density of a head at theta: linear between the thetas saved, exact at each of them. */
  function at(set, record, name, theta) {
    const grid = data.runs[set.run].grid;
    let low = 0, high = grid.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (grid[middle] <= theta) low = middle;
      else high = middle - 1;
    }
    const values = record[name];
    if (grid[low] === theta || low === grid.length - 1) return values[low];
    if (!Number.isFinite(grid[low])) return values[low];
    if (!Number.isFinite(grid[low + 1])) return values[low];
    const share = (theta - grid[low]) / (grid[low + 1] - grid[low]);
    return values[low] + share * (values[low + 1] - values[low]);
  }

  /** A column of heads.csv that exists only at the thetas asked for; null elsewhere. */
  function extra(set, record, name, theta) {
    const run = data.runs[set.run];
    const t = run.asked.slice(0, run.kept).indexOf(theta);
    const value = t < 0 ? NaN : record.extras[set.extras.indexOf(name)][t];
    return Number.isNaN(value) ? null : value;
  }

  /** Least density at which a measured curve reaches the recall; null where it does not. */
  function densityAt(curve, target) {
    for (let i = 0; i < curve.recall.length; i++) {
      if (curve.recall[i] < target) continue;
      if (i === 0) return curve.density[0];
      const share = (target - curve.recall[i - 1]) / (curve.recall[i] - curve.recall[i - 1]);
      return curve.density[i - 1] + share * (curve.density[i] - curve.density[i - 1]);
    }
    return null;
  }

  /** The method, oracles left out, that needs least density for the run's target recall. */
  function bestMethod(set, record) {
    let best = null, least = Infinity;
    for (const curve of set.methods.heads[`${record.layer}:${record.head}`] ?? []) {
      const need = set.methods.oracles[curve.method] ? null : densityAt(curve, data.runs[set.run].target);
      if (need !== null && need < least) [best, least] = [set.methods.labels[curve.method], need];
    }
    return best;
  }

  const diagnostic = (set, record, name) => {
    const row = set.diagnostics?.heads[`${record.layer}:${record.head}`];
    return row ? row[set.diagnostics.columns.indexOf(name)] : undefined;
  };

  // ---- state ------------------------------------------------------------------------------------------------

  const state = { set: 0, other: -1, theta: 0, thetaOther: null, quantity: "recall", view: "first", heat: "mass", key: "" };
  const current = () => data.sets[state.set];
  const second = () => (state.other < 0 ? null : data.sets[state.other]);
  const runOf = (set) => data.runs[set.run];
  const thetaOf = (set) => (set === second() && state.thetaOther !== null ? state.thetaOther : state.theta);
  const nameOf = (set) => (data.runs.length > 1 ? `${runOf(set).label}: ${set.prompt}` : set.prompt);

  // ---- quantities -------------------------------------------------------------------------------------------

  /** What a cell can show: value(set, record, theta), scale ends, colour map; `words` for categories. */
  function quantities() {
    const low = Math.min(...data.runs.map((r) => r.low)), high = Math.max(...data.runs.map((r) => r.high));
    const onlyAsked = "exists only at the thetas asked for";
    const q = {
      recall: { name: "recall", value: (s, r, t) => at(s, r, "recall", t), scale: [0.5, 1], map: "cividis" },
      sparsity: { name: "sparsity", value: (s, r, t) => 1 - at(s, r, "density", t), scale: [0, 1], map: "viridis" },
      density: { name: "density", value: (s, r, t) => at(s, r, "density", t), scale: [0, 1], map: "viridis" },
      theta_needed: { name: "theta needed", value: (s, r) => r.theta_needed, scale: [low, high], map: "viridis", digits: 2, write: upward },
      density_needed: { name: "density needed", value: (s, r) => r.density_needed, scale: [0, 1], map: "viridis" },
      oracle_needed: { name: "density the stripe oracle needs", value: (s, r) => r.oracle_needed, scale: [0, 1], map: "viridis" },
    };
    for (const [id, name, scale] of [
      ["recall_p05", "recall, 5th percentile", [0, 1]],
      ["recall_last", "recall, last rows", [0, 1]],
      ["output_error", "output error", [0, 0.5]],
    ])
      q[id] = { name, value: (s, r, t) => extra(s, r, id, t), scale, map: "cividis", only: onlyAsked };
    const withMethods = data.sets.find((s) => s.methods);
    if (withMethods) {
      q.best = { name: "best method", value: (s, r) => (s.methods ? bestMethod(s, r) : null), words: [] };
    }
    for (const set of data.sets)
      for (const [c, column] of (set.diagnostics?.columns ?? []).entries()) {
        const id = `diagnostic:${column}`;
        if (q[id]) continue;
        const texts = data.sets.flatMap((s) => {
          const where = s.diagnostics?.columns.indexOf(column) ?? -1;
          return where < 0 ? [] : Object.values(s.diagnostics.heads).map((row) => row[where]);
        }).filter((x) => x !== "");
        if (!texts.length) continue;
        const values = texts.map(Number);
        if (values.some(Number.isNaN)) {
          const words = [...new Set(texts)];
          if (words.length <= 12) q[id] = { name: column, value: (s, r) => diagnostic(s, r, column) || null, words };
        } else {
          const finite = values.filter(Number.isFinite);
          const ends = [Math.min(...finite), Math.max(...finite)];
          const value = (s, r) => {
            const text = diagnostic(s, r, column);
            return text === undefined || text === "" ? null : Number(text);
          };
          if (finite.length) q[id] = { name: column, value, scale: ends[0] < ends[1] ? ends : [ends[0] - 1, ends[1]], map: "viridis" };
        }
      }
    return q;
  }
  const QUANTITIES = quantities();

  function colour(map, share) {
    const stops = data.maps[map], x = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
    const i = Math.min(Math.floor(x), stops.length - 2), f = x - i;
    const channel = (hex, k) => parseInt(hex.slice(1 + 2 * k, 3 + 2 * k), 16);
    return [0, 1, 2].map((k) => Math.round(channel(stops[i], k) * (1 - f) + channel(stops[i + 1], k) * f));
  }
  const inkOn = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#111111" : "#ffffff");
  const gradient = (map) => `linear-gradient(to right, ${data.maps[map].join(",")})`;

  // ---- grid -------------------------------------------------------------------------------------------------

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
    byId("grid").style.setProperty("--cell", short ? "26px" : roomy ? "96px" : "46px");
    const target = runOf(shownSet()).target;
    for (const [key, cell] of cells) {
      const value = values.get(key), [layer, head] = key.split(":");
      let text, rgb;
      if (value === null) [text, rgb] = ["", null];
      else if (q.words) {
        text = String(value);
        rgb = difference ? (value === "same" ? [128, 128, 128] : [213, 94, 0]) : wordColour(q, value);
      } else {
        text = q.write && !difference ? q.write(value) : fixed(value, q.digits ?? (difference || short ? 2 : 3));
        rgb = colour(map, (value - low) / (high - low));
      }
      const chosen = key === state.key;
      cell.style.background = rgb ? `rgb(${rgb})` : "var(--empty)";
      cell.style.color = rgb ? inkOn(rgb) : "var(--muted)";
      cell.textContent = short ? "" : q.words ? text.slice(0, roomy ? 16 : 7) : text;
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
        swatch.style.background = `rgb(${wordColour(q, word)})`;
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

  function wordColour(q, word) {
    const hex = COLOURS[Math.max(q.words.indexOf(word), 0) % COLOURS.length];
    const fade = q.words.indexOf(word) >= COLOURS.length ? 0.45 : 0; // a ninth method is a paler first
    return [1, 3, 5].map((k) => Math.round(parseInt(hex.slice(k, k + 2), 16) * (1 - fade) + 255 * fade));
  }

  function worst(set, theta) {
    let found = null;
    for (const r of set.records) {
      const recall = at(set, r, "recall", theta);
      if (found === null || recall < found.recall) found = { key: `${r.layer}:${r.head}`, recall, record: r };
    }
    return found;
  }

  // ---- overview ---------------------------------------------------------------------------------------------

  const card = (name, value, small) => make("div", {}, make("dt", {}, name), make("dd", {}, value, small ? make("small", {}, small) : null));

  function paintOverview() {
    const set = current(), run = runOf(set), theta = state.theta;
    const recalls = set.records.map((r) => at(set, r, "recall", theta));
    const density = mean(set.records.map((r) => at(set, r, "density", theta)));
    const low = worst(set, theta);
    const unmet = recalls.filter((x) => x < run.target).length;
    const every = (name) => (set.records.some((r) => Number.isNaN(r[name])) ? null : mean(set.records.map((r) => r[name])));
    fill(
      "cards",
      card("recall, mean", fixed(mean(recalls)), `at theta ${nats(theta)}`),
      card("density, mean", fixed(density), "pairs kept of all"),
      card("sparsity, mean", fixed(1 - density)),
      card("worst head", fixed(low.recall), `layer ${low.record.layer}, head ${low.record.head}`),
      card(`below recall ${run.target}`, `${unmet} of ${set.records.length}`, "heads"),
      card("density needed", fixed(every("density_needed")), `recall ${run.target} in every head, each at its own theta`),
      card("stripe oracle", fixed(every("oracle_needed")), "the same, by the best choice of stripes"),
    );
    const head = make("tr", {}, ...["run and prompt", "tokens", "heads", "recall", "density", "sparsity"].map((x) => make("th", { scope: "col" }, x)));
    const lines = data.sets.filter((s) => s.index).map((s) => {
      const i = data.sets.indexOf(s), t = s === set ? theta : thetaOf(s);
      const choose = make("button", { type: "button", "aria-pressed": String(i === state.set) }, nameOf(s));
      choose.addEventListener("click", () => select({ set: i }));
      const d = mean(s.records.map((r) => at(s, r, "density", t)));
      return make("tr", { class: i === state.set ? "now" : null }, make("td", {}, choose), ...[whole(s.tokens), String(s.heads.length),
        fixed(mean(s.records.map((r) => at(s, r, "recall", t)))), fixed(d), fixed(1 - d)].map((x) => make("td", {}, x)));
    });
    fill("sets", make("thead", {}, head), make("tbody", {}, ...lines));
    drawPooled();
  }

  function paintFacts() {
    const run = runOf(current()), model = run.dump?.model ?? {}, rows = [];
    const add = (group, values) => {
      for (const [name, value] of Object.entries(values ?? {})) {
        if (value === null || value === undefined) continue;
        rows.push(make("tr", {}, make("th", { scope: "row", class: "text" }, `${group} ${name}`.trim()), make("td", { class: "text" }, Array.isArray(value) ? value.join(", ") : String(value))));
      }
    };
    add("model", model);
    add("", { ...run.settings, prompts: null });
    add("", { hardware: run.hardware, started: run.started, dump: run.dump?.identity });
    add("version of", run.versions);
    fill("facts", make("tbody", {}, ...rows));
    byId("model").textContent = model.name ? `on ${model.name}` : "";
    byId("subtitle").textContent = `${nameOf(current())}, ${whole(current().tokens)} tokens, groups of ${run.settings.block} x ${run.settings.step}, ` +
      `${current().heads.length} heads in ${new Set(current().heads.map((h) => h[0])).size} layers`;
    document.title = `AnchorScope report${model.name ? `: ${model.name}` : ""}`;
    fill("warnings", ...(run.warnings ?? []).map((w) => make("p", { class: "warning" }, String(w))));
    byId("footer").textContent = `Made with AnchorScope ${data.anchorscope}; charts by plotly.js (MIT). Recall: attention mass kept, mean over queries. ` +
      "Density: pairs kept of all causal pairs. Between the thetas saved, values are interpolated.";
  }

  // ---- charts -----------------------------------------------------------------------------------------------

  // Named one by one: plotly's own choice has a button that uploads the chart.
  const CONFIG = { displaylogo: false, responsive: true, displayModeBar: "hover", modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]] };
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  /** Paper does not tell its width: charts get that of their box while printing. */
  const widthOf = (box) => (document.body.classList.contains("paper") ? { width: box.clientWidth, autosize: false } : { autosize: true });

  function layout(more) {
    const axis = { gridcolor: style("--line"), zerolinecolor: style("--line"), linecolor: style("--line"), automargin: true };
    const { xaxis, yaxis, ...rest } = more;
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 55, r: 12, t: 28, b: 46 },
      font: { family: "system-ui, Segoe UI, Roboto, DejaVu Sans, sans-serif", size: 12, color: style("--ink") },
      hoverlabel: { bgcolor: style("--panel"), bordercolor: style("--line"), font: { color: style("--ink") } },
      legend: { orientation: "h", x: 0, xanchor: "left", y: 0, yref: "container", yanchor: "bottom", font: { size: 11 } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: style("--muted"), activecolor: style("--accent") },
      xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
    };
  }
  const DENSITY_TICKS = { tickvals: [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1], tickmode: "array" };
  DENSITY_TICKS.ticktext = DENSITY_TICKS.tickvals.map(String);
  /** A chart of recall against something, with room below for as many rows of legend as its lines need. */
  function drawRecall(id, traces, xaxis, height) {
    const box = byId(id), named = traces.filter((t) => t.showlegend !== false);
    const widest = Math.max(...named.map((t) => Math.min(t.name.length, 60))) * 6.2 + 50;
    const rows = Math.ceil(named.length / Math.max(1, Math.floor((box.clientWidth - 20) / widest)));
    const lowest = Math.min(1, ...traces.map((t) => Math.min(...t.y)));
    box.style.height = `${height + 19 * rows}px`;
    return Plotly.react(box, traces, layout({
      ...widthOf(box), xaxis, yaxis: { title: { text: "recall" }, range: [Math.max(0, lowest - 0.05), 1.01] }, margin: { l: 55, r: 12, t: 28, b: 54 + 19 * rows },
    }), CONFIG);
  }
  const densityAxis = (least) => least > 0 && least < 0.25
    ? { type: "log", title: { text: "density" }, range: [Math.log10(least * 0.85), 0.02], ...DENSITY_TICKS }
    : { title: { text: "density" }, range: [0, 1.02] };

  function drawPooled() {
    const traces = [], all = [current(), second()].filter(Boolean);
    all.forEach((set, i) => {
      const run = runOf(set), t = thetaOf(set);
      const pool = (name) => run.grid.map((_, g) => mean(set.records.map((r) => r[name][g])));
      const hue = i ? COLOURS[4] : COLOURS[0];
      set.pooled ??= { density: pool("density"), recall: pool("recall") };
      traces.push({ x: set.pooled.density, y: set.pooled.recall, mode: "lines", name: plain(`one theta: ${nameOf(set)}`), line: { color: hue, width: 2.5 },
        text: run.grid.map((x) => `theta ${nats(x)}`), hovertemplate: "%{text}<br>density %{x:.4f}<br>recall %{y:.4f}<extra></extra>" });
      traces.push({ x: [mean(set.records.map((r) => at(set, r, "density", t)))], y: [mean(set.records.map((r) => at(set, r, "recall", t)))],
        mode: "markers", showlegend: false, marker: { color: hue, size: 11, line: { color: style("--ink"), width: 1.5 } },
        hovertemplate: `theta ${nats(t)}<br>density %{x:.4f}<br>recall %{y:.4f}<extra></extra>` });
      for (const [name, symbol, label] of [["density_needed", "diamond", "a theta per head"], ["oracle_needed", "star", "stripe oracle"]]) {
        if (set.records.some((r) => Number.isNaN(r[name]))) continue;
        traces.push({ x: [mean(set.records.map((r) => r[name]))], y: [run.target], mode: "markers", name: i ? `${label} (second)` : label,
          marker: { color: i ? hue : name === "oracle_needed" ? COLOURS[1] : COLOURS[2], size: 11, symbol },
          hovertemplate: `${label}<br>density %{x:.4f} for recall ${run.target} in every head<extra></extra>` });
      }
    });
    const least = Math.min(...traces.map((t) => Math.min(...t.x)));
    drawRecall("pooled", traces, densityAxis(least), 270);
    byId("pooled").setAttribute("aria-label", `Mean recall against mean density of ${all.map(nameOf).join(" and ")}`);
  }

  function drawCurve(record) {
    const traces = [], sets = [current(), second()].filter((s) => s?.index.has(state.key));
    sets.forEach((set, i) => {
      const run = runOf(set), r = set.index.get(state.key), t = thetaOf(set), hue = i ? COLOURS[4] : COLOURS[0];
      const label = i || second() ? `anchor: ${nameOf(set)}` : "anchor";
      traces.push({ x: [...r.density], y: [...r.recall], mode: "lines", name: plain(label), line: { color: hue, width: 2.5 },
        text: run.grid.map((x) => `theta ${nats(x)}`), hovertemplate: "%{text}<br>density %{x:.4f}<br>recall %{y:.4f}<extra></extra>" });
      traces.push({ x: [...r.oracle_density], y: [...r.oracle_recall], mode: "lines", name: i ? "stripe oracle (second)" : "stripe oracle",
        line: { color: i ? COLOURS[5] : COLOURS[1], width: 2, dash: "dash" }, hovertemplate: "oracle<br>density %{x:.4f}<br>recall %{y:.4f}<extra></extra>" });
      traces.push({ x: [at(set, r, "density", t)], y: [at(set, r, "recall", t)], mode: "markers", showlegend: false,
        marker: { color: hue, size: 12, line: { color: style("--ink"), width: 1.5 } }, hovertemplate: `theta ${nats(t)}<br>density %{x:.4f}<br>recall %{y:.4f}<extra></extra>` });
    });
    const set = current();
    for (const curve of set.methods?.heads[state.key] ?? []) {
      const label = plain(set.methods.labels[curve.method]), hue = COLOURS[(curve.method + 2) % COLOURS.length];
      traces.push({ x: [...curve.density], y: [...curve.recall], mode: "lines+markers", name: label,
        line: { color: hue, width: 1.2, dash: DASHES[Math.floor(curve.method / COLOURS.length) % DASHES.length] }, marker: { size: 5, symbol: curve.method % 24 },
        hovertemplate: `${label}<br>density %{x:.4f}<br>recall %{y:.4f}<extra></extra>` });
    }
    drawRecall("curve", traces, densityAxis(Math.min(...traces.map((t) => Math.min(...t.x)))), 320);
    byId("curve").setAttribute("aria-label", record ? `Recall against density of layer ${record.layer}, head ${record.head}` : "no curve");
  }

  function drawPosition() {
    const traces = [], sets = [current(), second()].filter((s) => s?.index.has(state.key));
    sets.forEach((set, i) => {
      const run = runOf(set), edges = set.position_edges, middles = edges.slice(1).map((e, k) => (e + edges[k]) / 2);
      set.index.get(state.key).position.forEach((row, t) => {
        const here = run.asked[t] === thetaOf(set);
        const label = `theta ${nats(run.asked[t])}${sets.length > 1 ? `, ${plain(nameOf(set))}` : ""}`;
        traces.push({ x: middles, y: [...row], mode: "lines", name: label, line: { shape: "hvh", width: here ? 3 : 1.4, color: COLOURS[(t + 3 * i) % COLOURS.length], dash: i ? "dot" : "solid" },
          hovertemplate: `${label}<br>query %{x:,.0f}<br>recall %{y:.4f}<extra></extra>` });
      });
    });
    drawRecall("position", traces, { title: { text: "query position, tokens" }, rangemode: "tozero" }, 320);
    byId("position").setAttribute("aria-label", "Mean recall by position of the query, one line per theta asked for");
  }

  // ---- the head chosen --------------------------------------------------------------------------------------

  async function tokensOf(set) {
    if (!set.text) return null;
    if (!set.pieces) set.pieces = JSON.parse(new TextDecoder().decode(await inflate(data.words[set.text])));
    return set.pieces;
  }

  const COLUMNS = ["theta", "recall", "recall_p05", "recall_min", "recall_last", "density", "sparsity", "stripe_density", "output_error", "output_close_01", "output_close_005"];

  function paintNumbers(set, record) {
    const run = runOf(set), lines = [];
    const line = (theta, now) => {
      const cell = (column) => column === "theta" ? nats(theta) : column === "recall" ? fixed(at(set, record, "recall", theta))
        : column === "density" ? fixed(at(set, record, "density", theta)) : column === "sparsity" ? fixed(1 - at(set, record, "density", theta))
        : fixed(extra(set, record, column, theta));
      return make("tr", { class: now ? "now" : null, "data-theta": nats(theta) }, ...COLUMNS.map((c) => make("td", { "data-column": c }, cell(c))));
    };
    const thetas = [...run.asked.slice(0, run.kept)].sort((a, b) => a - b);
    if (!thetas.includes(state.theta)) lines.push(line(state.theta, true));
    for (const theta of thetas) lines.push(line(theta, theta === state.theta));
    fill("numbers", make("caption", { class: "hint" }, run.kept < run.asked.length ? `the first ${run.kept} of ${run.asked.length} thetas asked for; heads.csv has the others` : ""),
      make("thead", {}, make("tr", {}, ...COLUMNS.map((c) => make("th", { scope: "col" }, c.replace(/_/g, " "))))), make("tbody", {}, ...lines));
  }

  async function paintHead() {
    const set = current(), record = set.index.get(state.key), key = state.key;
    const [layer, head] = key.split(":");
    byId("head-title").textContent = `Layer ${layer}, head ${head}` + (record ? ` (kv head ${record.kv})` : ": only in the second");
    drawCurve(record);
    drawPosition();
    if (!record) {
      for (const id of ["needs", "numbers", "top", "diagnostics"]) fill(id);
      byId("heat-figure").hidden = true;
      return;
    }
    const run = runOf(set), other = second()?.index.get(key);
    const beside = (name, digits) => (other ? `second: ${fixed(other[name], digits)}` : null);
    const cards = [
      card("recall", fixed(at(set, record, "recall", state.theta)), `at theta ${nats(state.theta)}` + (other ? `; second: ${fixed(at(second(), other, "recall", thetaOf(second())))}` : "")),
      card("density", fixed(at(set, record, "density", state.theta)), other ? `second: ${fixed(at(second(), other, "density", thetaOf(second())))}` : `anchor region alone: ${fixed(record.anchor_density)}`),
      card("theta needed", upward(record.theta_needed), (other ? `second: ${upward(other.theta_needed)}` : null) ?? `for recall ${run.target}`),
      card("density needed", fixed(record.density_needed), beside("density_needed") ?? `for recall ${run.target}`),
      card("stripe oracle", fixed(record.oracle_needed), beside("oracle_needed") ?? `density for recall ${run.target}`),
    ];
    if (set.methods) cards.push(card("best method", bestMethod(set, record) ?? "none", `least density for recall ${run.target}, oracles left out`));
    fill("needs", ...cards);
    paintNumbers(set, record);
    const row = set.diagnostics?.heads[key];
    fill("diagnostics", ...(row ? [make("h3", {}, "Diagnostics"), make("div", { class: "scroll" }, make("table", {}, make("tbody", {},
      ...set.diagnostics.columns.map((name, i) => make("tr", {}, make("th", { scope: "row", class: "text" }, name.replace(/_/g, " ")), make("td", { class: "text" }, row[i]))))))] : []));
    const pieces = await tokensOf(set);
    if (state.key !== key || current() !== set) return;
    const lines = [...record.top_columns].map((column, i) => [column, record.top_mass[i]]).filter(([c]) => !Number.isNaN(c));
    fill("top", make("thead", {}, make("tr", {}, ...["key", "mass", ...(pieces ? ["token", "around it"] : [])].map((x, i) => make("th", { scope: "col", class: i > 1 ? "text" : null }, x)))),
      make("tbody", {}, ...lines.map(([c, m]) => make("tr", {}, make("td", {}, whole(c)), make("td", {}, fixed(m)),
        ...(pieces ? [pieces[c], pieces.slice(Math.max(0, c - 5), c + 4).join("")].map((t) => make("td", { class: "text" }, make("code", {}, t.replace(/\n/g, "\u21b5")))) : [])))));
    await drawHeat(set);
  }

  // ---- heat map ---------------------------------------------------------------------------------------------

  let heat = null; // {rows, columns, mass, margin, cursor}

  async function drawHeat(set) {
    const place = set.heads.findIndex((h) => `${h[0]}:${h[1]}` === state.key), packed = set.heat[place], key = state.key;
    byId("heat-figure").hidden = !packed;
    if (!packed) { heat = null; return; }
    packed.bytes ??= await inflate(packed.cells);
    if (state.key !== key || current() !== set) return;
    if (heat?.packed === packed) {
      if (state.heat === "missed" || heat.theme !== document.documentElement.dataset.theme) paintHeat(false);
      return;
    }
    const R = packed.rows.length - 1, C = packed.columns.length - 1, bytes = packed.bytes;
    const { steps, floor } = data.mass, decades = -Math.log10(floor), m = data.margin;
    const mass = [], margin = [];
    for (let r = 0; r < R; r++) {
      mass.push(Array.from({ length: C }, (_, c) => {
        const level = bytes[r * C + c];
        return level === 0 ? null : ((level - 1) / (steps - 1) - 1) * decades;
      }));
      margin.push(Array.from({ length: C }, (_, c) => {
        const step = bytes[R * C + r * C + c];
        return step === 0 ? null : m.low + ((step - 1) / (m.steps - 1)) * (m.high - m.low);
      }));
    }
    heat = { packed, rows: packed.rows, columns: packed.columns, mass, margin, set, cursor: null };
    paintHeat(true);
    fill("cell", make("p", { class: "hint" }, "Point at a cell, or move through the map with the arrow keys."));
  }

  function paintHeat(fresh) {
    if (!heat) return;
    heat.theme = document.documentElement.dataset.theme;
    const theta = state.theta, byMargin = state.heat === "margin";
    const z = byMargin ? heat.margin : state.heat === "mass" ? heat.mass
      : heat.mass.map((row, r) => row.map((x, c) => (heat.margin[r][c] !== null && heat.margin[r][c] > theta ? x : null)));
    const stops = data.maps[byMargin ? "viridis" : "magma"], scale = stops.map((hex, i) => [i / (stops.length - 1), hex]);
    const ends = byMargin ? [data.margin.low, data.margin.high] : [Math.log10(data.mass.floor), 0];
    const ticks = byMargin ? {} : { tickvals: [-6, -5, -4, -3, -2, -1, 0], ticktext: ["1e-6", "1e-5", "1e-4", "0.001", "0.01", "0.1", "1"] };
    const trace = { type: "heatmap", x: heat.columns, y: heat.rows, z, zmin: ends[0], zmax: ends[1], colorscale: scale, reversescale: byMargin, hoverinfo: "none",
      colorbar: { thickness: 12, title: { text: byMargin ? "nats" : "mass", side: "top" }, ...ticks } };
    const box = byId("heat"), last = heat.rows.at(-1), keys = heat.columns.at(-1);
    const old = !fresh && box.layout ? { x: box.layout.xaxis.range, y: box.layout.yaxis.range } : { x: [0, keys], y: [last, 0] };
    const more = layout({ ...widthOf(box), xaxis: { title: { text: "key position, tokens" }, range: old.x }, yaxis: { title: { text: "query position" }, range: old.y }, shapes: cursorShape() });
    more.plot_bgcolor = style("--empty");
    Plotly.react(box, [trace], more, { ...CONFIG, scrollZoom: false });
    if (!box.dataset.ready) {
      box.dataset.ready = "1";
      box.on("plotly_hover", (event) => {
        const [r, c] = event.points[0].pointIndex ?? event.points[0].pointNumber;
        showCell(r, c);
      });
    }
  }

  function cursorShape() {
    if (!heat?.cursor) return [];
    const [r, c] = heat.cursor;
    return [{ type: "rect", x0: heat.columns[c], x1: heat.columns[c + 1], y0: heat.rows[r], y1: heat.rows[r + 1], line: { color: "#56b4e9", width: 3 } }];
  }

  async function showCell(r, c) {
    const now = heat, pieces = await tokensOf(now.set);
    if (heat !== now) return;
    const [q0, q1, k0, k1] = [now.rows[r], now.rows[r + 1], now.columns[c], now.columns[c + 1]];
    const mass = now.mass[r][c], margin = now.margin[r][c];
    const words = margin === null ? "always kept, or not visible" : `smallest margin at most ${margin.toFixed(2)} nats: ${margin <= state.theta ? "has a stripe" : "no stripe"} at theta ${nats(state.theta)}`;
    const lines = [make("p", {}, `queries ${whole(q0)} to ${whole(q1 - 1)}, keys ${whole(k0)} to ${whole(k1 - 1)}: attention mass ${mass === null ? "none" : (10 ** mass).toExponential(1)}; ${words}`)];
    if (pieces) {
      const part = (a, b, most) => pieces.slice(a, Math.min(b, a + most)).join("") + (b - a > most ? " ..." : "");
      lines.push(make("p", { class: "tokens" }, "keys: ", make("code", {}, part(k0, k1, 96))), make("p", { class: "tokens" }, "queries begin: ", make("code", {}, part(q0, q1, 32))));
    }
    fill("cell", ...lines);
  }

  function zoom(factor) {
    if (!heat) return;
    const box = byId("heat"), xs = box.layout.xaxis.range, ys = box.layout.yaxis.range;
    const around = (range, centre, most) => {
      const half = Math.min((Math.abs(range[1] - range[0]) * factor) / 2, most / 2);
      const middle = Math.min(Math.max(centre, half), most - half);
      return [middle - half, middle + half];
    };
    const centre = heat.cursor ? [(heat.columns[heat.cursor[1]] + heat.columns[heat.cursor[1] + 1]) / 2, (heat.rows[heat.cursor[0]] + heat.rows[heat.cursor[0] + 1]) / 2]
      : [(xs[0] + xs[1]) / 2, (ys[0] + ys[1]) / 2];
    const x = around(xs, centre[0], heat.columns.at(-1)), y = around(ys, centre[1], heat.rows.at(-1));
    Plotly.relayout(box, factor === Infinity ? { "xaxis.range": [0, heat.columns.at(-1)], "yaxis.range": [heat.rows.at(-1), 0] } : { "xaxis.range": x, "yaxis.range": [y[1], y[0]] });
  }

  // ---- events -----------------------------------------------------------------------------------------------

  let waiting = false, gridStale = false;
  /** Redraw at most once per frame. */
  function refresh(rebuild = false) {
    gridStale ||= rebuild;
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      if (gridStale) {
        buildGrid();
        paintFacts();
        paintControls();
      }
      gridStale = false;
      paintTheta();
      paintGrid();
      paintOverview();
      paintHead().catch(fail);
    });
  }

  async function select(change) {
    Object.assign(state, change);
    try {
      await open(current());
      if (second()) await open(second());
      refresh(true);
    } catch (error) {
      fail(error);
    }
  }

  function paintControls() {
    const run = runOf(current());
    byId("set").value = String(state.set);
    byId("other").value = String(state.other);
    byId("quantity").value = state.quantity;
    const slider = byId("theta");
    [slider.min, slider.max, slider.step] = [String(run.low), String(run.high), "0.05"];
    const all = [...new Set([-Infinity, ...run.asked, Infinity])].sort((a, b) => a - b);
    const few = all.length > 12 ? all.filter((x, i) => i % Math.ceil(all.length / 12) === 0 || x === run.asked[0] || x === Infinity) : all;
    fill("asked", ...few.map((x) => {
      const button = make("button", { type: "button", "data-theta": nats(x), "aria-label": `theta ${nats(x)}` }, nats(x));
      button.addEventListener("click", () => { state.theta = x; refresh(); });
      return button;
    }));
    byId("theta-second").hidden = state.other < 0;
  }

  function paintTheta() {
    const run = runOf(current()), slider = byId("theta"), box = byId("theta-number");
    slider.value = String(Math.min(Math.max(state.theta, run.low), run.high));
    slider.setAttribute("aria-valuetext", `${nats(state.theta)} nats`);
    if (document.activeElement !== box) box.value = nats(state.theta);
    box.removeAttribute("aria-invalid");
    for (const button of byId("asked").children) button.setAttribute("aria-pressed", String(button.dataset.theta === nats(state.theta)));
    const exact = run.asked.includes(state.theta);
    byId("theta-hint").textContent = exact ? `theta ${nats(state.theta)} was asked for: exact values, as in heads.csv`
      : state.theta === Infinity ? "theta inf is dense attention" : state.theta === -Infinity ? "theta -inf is the anchor region alone"
      : `theta ${nats(state.theta)} was not asked for: recall and density interpolated, the rest unknown`;
  }

  function readTheta(box, use) {
    const text = box.value.trim().toLowerCase().replace(/^\+/, "");
    const value = /^-?inf(inity)?$/.test(text) ? (text.startsWith("-") ? -Infinity : Infinity) : text === "" ? NaN : Number(text);
    if (Number.isNaN(value)) box.setAttribute("aria-invalid", "true");
    else { box.removeAttribute("aria-invalid"); use(value); }
  }

  function moveTo(key) {
    state.key = key;
    cells.get(key).focus();
    refresh();
  }

  byId("grid").addEventListener("click", (event) => {
    const cell = event.target.closest("button[data-key]");
    if (cell) moveTo(cell.dataset.key);
  });
  byId("grid").addEventListener("keydown", (event) => {
    const [layer, head] = state.key.split(":").map(Number), keys = [...cells.keys()].map((k) => k.split(":").map(Number));
    const along = (list, [l, h]) => list.sort((a, b) => Math.abs(a[0] - l) - Math.abs(b[0] - l) || Math.abs(a[1] - h) - Math.abs(b[1] - h))[0];
    const there = {
      ArrowRight: () => along(keys.filter((k) => k[0] === layer && k[1] > head), [layer, head]),
      ArrowLeft: () => along(keys.filter((k) => k[0] === layer && k[1] < head), [layer, head]),
      ArrowDown: () => along(keys.filter((k) => k[0] > layer), [layer, head]),
      ArrowUp: () => along(keys.filter((k) => k[0] < layer), [layer, head]),
      Home: () => keys.find((k) => k[0] === layer),
      End: () => keys.filter((k) => k[0] === layer).at(-1),
    }[event.key];
    if (!there) return;
    event.preventDefault();
    const next = there();
    if (next) moveTo(next.join(":"));
  });
  byId("heat").addEventListener("keydown", (event) => {
    if (!heat) return;
    const R = heat.rows.length - 1, C = heat.columns.length - 1;
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (step) {
      const [r, c] = heat.cursor ?? [R - 1, 0];
      heat.cursor = heat.cursor ? [Math.min(Math.max(r + step[0], 0), R - 1), Math.min(Math.max(c + step[1], 0), C - 1)] : [r, c];
      Plotly.relayout("heat", { shapes: cursorShape() });
      showCell(...heat.cursor);
    } else if (event.key === "+" || event.key === "=") zoom(0.5);
    else if (event.key === "-") zoom(2);
    else if (event.key === "0") zoom(Infinity);
    else return;
    event.preventDefault();
  });
  byId("theta").addEventListener("input", (event) => { state.theta = Number(event.target.value); refresh(); });
  byId("theta-number").addEventListener("change", (event) => readTheta(event.target, (x) => { state.theta = x; refresh(); }));
  byId("theta-other").addEventListener("change", (event) => {
    if (event.target.value.trim() === "") { state.thetaOther = null; event.target.removeAttribute("aria-invalid"); refresh(); }
    else readTheta(event.target, (x) => { state.thetaOther = x; refresh(); });
  });
  byId("set").addEventListener("change", (event) => select({ set: Number(event.target.value) }));
  byId("other").addEventListener("change", (event) => {
    const other = Number(event.target.value);
    const view = other < 0 ? "first" : "difference";
    document.querySelector(`input[name="view"][value="${view}"]`).checked = true;
    select({ other, view });
  });
  byId("quantity").addEventListener("change", (event) => { state.quantity = event.target.value; refresh(); });
  byId("view").addEventListener("change", (event) => { state.view = event.target.value; refresh(); });
  byId("heat-view").addEventListener("change", (event) => { state.heat = event.target.value; paintHeat(false); });
  byId("zoom-in").addEventListener("click", () => zoom(0.5));
  byId("zoom-out").addEventListener("click", () => zoom(2));
  byId("zoom-reset").addEventListener("click", () => zoom(Infinity));

  // ---- light and dark ---------------------------------------------------------------------------------------

  const system = matchMedia("(prefers-color-scheme: dark)");
  let wish = "system";
  function dress(theme) {
    document.documentElement.dataset.theme = theme === "system" ? (system.matches ? "dark" : "light") : theme;
    if (current().index) refresh();
  }
  byId("theme").addEventListener("click", () => {
    wish = { system: "light", light: "dark", dark: "system" }[wish];
    byId("theme").textContent = `Theme: ${wish}`;
    dress(wish);
  });
  system.addEventListener("change", () => dress(wish));
  // Paper is white, and the charts carry their colours in themselves.
  function redraw() {
    paintGrid();
    drawPooled();
    drawCurve(current().index.get(state.key));
    drawPosition();
    paintHeat(false);
  }
  addEventListener("beforeprint", () => {
    document.documentElement.dataset.theme = "light";
    document.body.classList.add("paper");
    redraw();
  });
  addEventListener("afterprint", () => {
    document.body.classList.remove("paper");
    dress(wish);
    redraw();
  });

  // ---- start ------------------------------------------------------------------------------------------------

  function fail(error) {
    const box = byId("failure");
    box.hidden = false;
    box.textContent = `The page could not be drawn (${error?.message ?? error}).`;
    throw error;
  }

  async function start() {
    dress("system");
    if (typeof DecompressionStream === "undefined")
      throw new Error("this browser is too old: the data needs DecompressionStream, in all browsers since 2023");
    byId("set").append(...data.sets.map((s, i) => make("option", { value: String(i) }, nameOf(s))));
    byId("other").append(make("option", { value: "-1" }, "nothing"), ...data.sets.map((s, i) => make("option", { value: String(i) }, nameOf(s))));
    byId("quantity").append(...Object.entries(QUANTITIES).map(([id, q]) => make("option", { value: id }, q.name)));
    state.theta = data.runs[0].asked[0];
    for (const set of data.sets) await open(set);
    if (QUANTITIES.best) // only the methods that win somewhere need a colour
      QUANTITIES.best.words = [...new Set(data.sets.filter((s) => s.methods).flatMap((s) => s.records.map((r) => bestMethod(s, r))))].filter(Boolean).sort();
    await select({ set: 0 });
    document.documentElement.dataset.ready = "1";
  }
  start().catch(fail);
})();
