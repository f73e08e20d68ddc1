// The heat map of the head chosen.

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
  return [{ type: "rect", x0: heat.columns[c], x1: heat.columns[c + 1], y0: heat.rows[r], y1: heat.rows[r + 1], line: { color: data.colors.cursor, width: 3 } }];
}

async function showCell(r, c) {
  const now = heat, pieces = await tokensOf(now.set);
  if (heat !== now) return;
  const [q0, q1, k0, k1] = [now.rows[r], now.rows[r + 1], now.columns[c], now.columns[c + 1]];
  const mass = now.mass[r][c], margin = now.margin[r][c];
  const words = margin === null ? "always kept, or not visible" : `smallest margin at most ${margin.toFixed(2)} nats: ${margin <= state.theta ? "has a stripe" : "no stripe"} at theta ${nats(state.theta)}`;
  const lines = [make("p", {}, `queries ${whole(q0)} to ${whole(q1 - 1)}, keys ${whole(k0)} to ${whole(k1 - 1)}: attention mass ${mass === null ? "none" : (10 ** mass).toExponential(1)}; ${words}`)];
  if (pieces) {
    const part = (a, b, most) => shown(passage(pieces.slice(a, Math.min(b, a + most)))) + (b - a > most ? " ..." : "");
    lines.push(make("p", { class: "tokens" }, "keys: ", wordsOf(part(k0, k1, 96))), make("p", { class: "tokens" }, "queries begin: ", wordsOf(part(q0, q1, 32))));
  }
  fill("cell", ...lines);
}

function zoom(factor) {
  if (!heat) return;
  const box = byId("heat"), xs = box.layout.xaxis.range, ys = box.layout.yaxis.range;
  const around = (range, center, most) => {
    const half = Math.min((Math.abs(range[1] - range[0]) * factor) / 2, most / 2);
    const middle = Math.min(Math.max(center, half), most - half);
    return [middle - half, middle + half];
  };
  const center = heat.cursor ? [(heat.columns[heat.cursor[1]] + heat.columns[heat.cursor[1] + 1]) / 2, (heat.rows[heat.cursor[0]] + heat.rows[heat.cursor[0] + 1]) / 2]
    : [(xs[0] + xs[1]) / 2, (ys[0] + ys[1]) / 2];
  const x = around(xs, center[0], heat.columns.at(-1)), y = around(ys, center[1], heat.rows.at(-1));
  Plotly.relayout(box, factor === Infinity ? { "xaxis.range": [0, heat.columns.at(-1)], "yaxis.range": [heat.rows.at(-1), 0] } : { "xaxis.range": x, "yaxis.range": [y[1], y[0]] });
}
