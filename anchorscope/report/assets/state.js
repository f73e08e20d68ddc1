// What is shown now, and the quantities that the grid can show.

const state = { set: 0, other: -1, theta: 0, thetaOther: null, quantity: "recall", view: "first", heat: "mass", key: "" };
const current = () => data.sets[state.set];
const second = () => (state.other < 0 ? null : data.sets[state.other]);
const runOf = (set) => data.runs[set.run];
const thetaOf = (set) => (set === second() && state.thetaOther !== null ? state.thetaOther : state.theta);
const nameOf = (set) => (data.runs.length > 1 ? `${runOf(set).label}: ${set.prompt}` : set.prompt);

// ---- quantities ----------------------------------------------------------------------------------------------------

/** What a cell can show: value(set, record, theta), scale ends, color map; `words` for categories. */
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
      if (q[id] || set.diagnostics.notes.includes(column)) continue;
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

function color(map, share) {
  const stops = data.maps[map], x = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const i = Math.min(Math.floor(x), stops.length - 2), f = x - i;
  const [from, to] = [channels(stops[i]), channels(stops[i + 1])];
  return from.map((c, k) => Math.round(c * (1 - f) + to[k] * f));
}
const inkOn = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#111111" : "#ffffff");
const gradient = (map) => `linear-gradient(to right, ${data.maps[map].join(",")})`;
