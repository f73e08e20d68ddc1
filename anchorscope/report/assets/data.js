// The data of the page: unpacked, and read at a theta.

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
