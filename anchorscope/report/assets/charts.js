// Charts of recall, by density and by position.

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
    const hue = i ? COLORS[4] : COLORS[0];
    set.pooled ??= { density: pool("density"), recall: pool("recall") };
    traces.push({ x: set.pooled.density, y: set.pooled.recall, mode: "lines", name: plain(`one theta: ${nameOf(set)}`), line: { color: hue, width: 2.5 },
      text: run.grid.map((x) => `theta ${nats(x)}`), hovertemplate: "%{text}<br>density %{x:.4f}<br>recall %{y:.4f}<extra></extra>" });
    traces.push({ x: [mean(set.records.map((r) => at(set, r, "density", t)))], y: [mean(set.records.map((r) => at(set, r, "recall", t)))],
      mode: "markers", showlegend: false, marker: { color: hue, size: 11, line: { color: style("--ink"), width: 1.5 } },
      hovertemplate: `theta ${nats(t)}<br>density %{x:.4f}<br>recall %{y:.4f}<extra></extra>` });
    for (const [name, symbol, label] of [["density_needed", "diamond", "a theta per head"], ["oracle_needed", "star", "stripe oracle"]]) {
      if (set.records.some((r) => Number.isNaN(r[name]))) continue;
      traces.push({ x: [mean(set.records.map((r) => r[name]))], y: [run.target], mode: "markers", name: i ? `${label} (second)` : label,
        marker: { color: i ? hue : name === "oracle_needed" ? COLORS[1] : COLORS[2], size: 11, symbol },
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
    const run = runOf(set), r = set.index.get(state.key), t = thetaOf(set), hue = i ? COLORS[4] : COLORS[0];
    const label = i || second() ? `anchor: ${nameOf(set)}` : "anchor";
    traces.push({ x: [...r.density], y: [...r.recall], mode: "lines", name: plain(label), line: { color: hue, width: 2.5 },
      text: run.grid.map((x) => `theta ${nats(x)}`), hovertemplate: "%{text}<br>density %{x:.4f}<br>recall %{y:.4f}<extra></extra>" });
    traces.push({ x: [...r.oracle_density], y: [...r.oracle_recall], mode: "lines", name: i ? "stripe oracle (second)" : "stripe oracle",
      line: { color: i ? COLORS[5] : COLORS[1], width: 2, dash: "dash" }, hovertemplate: "oracle<br>density %{x:.4f}<br>recall %{y:.4f}<extra></extra>" });
    traces.push({ x: [at(set, r, "density", t)], y: [at(set, r, "recall", t)], mode: "markers", showlegend: false,
      marker: { color: hue, size: 12, line: { color: style("--ink"), width: 1.5 } }, hovertemplate: `theta ${nats(t)}<br>density %{x:.4f}<br>recall %{y:.4f}<extra></extra>` });
  });
  const set = current();
  for (const curve of set.methods?.heads[state.key] ?? []) {
    const label = plain(set.methods.labels[curve.method]), hue = COLORS[(curve.method + 2) % COLORS.length];
    traces.push({ x: [...curve.density], y: [...curve.recall], mode: "lines+markers", name: label,
      line: { color: hue, width: 1.2, dash: DASHES[Math.floor(curve.method / COLORS.length) % DASHES.length] }, marker: { size: 5, symbol: curve.method % 24 },
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
      traces.push({ x: middles, y: [...row], mode: "lines", name: label, line: { shape: "hvh", width: here ? 3 : 1.4, color: COLORS[(t + 3 * i) % COLORS.length], dash: i ? "dot" : "solid" },
        hovertemplate: `${label}<br>query %{x:,.0f}<br>recall %{y:.4f}<extra></extra>` });
    });
  });
  drawRecall("position", traces, { title: { text: "query position, tokens" }, rangemode: "tozero" }, 320);
  byId("position").setAttribute("aria-label", "Mean recall by position of the query, one line per theta asked for");
}
