// Everything about the head chosen.

async function tokensOf(set) {
  if (!set.text) return null;
  if (!set.pieces) set.pieces = JSON.parse(new TextDecoder().decode(await inflate(data.words[set.text])));
  return set.pieces;
}

function paintNumbers(set, record) {
  const run = runOf(set), lines = [];
  const line = (theta, now) => {
    const cell = (column) => column === "theta" ? nats(theta) : column === "recall" ? fixed(at(set, record, "recall", theta))
      : column === "density" ? fixed(at(set, record, "density", theta)) : column === "sparsity" ? fixed(1 - at(set, record, "density", theta))
      : fixed(extra(set, record, column, theta));
    return make("tr", { class: now ? "now" : null, "data-theta": nats(theta) }, ...data.columns.map((c) => make("td", { "data-column": c }, cell(c))));
  };
  const thetas = [...run.asked.slice(0, run.kept)].sort((a, b) => a - b);
  if (!thetas.includes(state.theta)) lines.push(line(state.theta, true));
  for (const theta of thetas) lines.push(line(theta, theta === state.theta));
  fill("numbers", make("caption", { class: "hint" }, run.kept < run.asked.length ? `${run.kept} of ${run.asked.length} thetas asked for; heads.csv has the others` : ""),
    make("thead", {}, make("tr", {}, ...data.columns.map((c) => make("th", { scope: "col" }, c.replace(/_/g, " "))))), make("tbody", {}, ...lines));
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
  if (set.methods) {
    const best = bestMethod(set, record) ?? (set.methods.heads[key] ? "none" : "not compared");
    cards.push(card("best method", best, best === "not compared" ? "the comparison left this head out" : `least density for recall ${run.target}, oracles left out`));
  }
  fill("needs", ...cards);
  paintNumbers(set, record);
  const row = set.diagnostics?.heads[key];
  fill("diagnostics", ...(row ? [make("h3", {}, "Diagnostics"), make("div", { class: "scroll" }, make("table", {}, make("tbody", {},
    ...set.diagnostics.columns.map((name, i) => [name, row[i]]).filter(([, value]) => value !== "").map(([name, value]) =>
      make("tr", {}, make("th", { scope: "row", class: "text" }, name.replace(/_/g, " ")), make("td", { class: "text" }, measured(value)))))))] : []));
  const pieces = await tokensOf(set);
  if (state.key !== key || current() !== set) return;
  const lines = [...record.top_columns].map((column, i) => [column, record.top_mass[i]]).filter(([c]) => !Number.isNaN(c));
  fill("top", make("thead", {}, make("tr", {}, ...["key", "mass", ...(pieces ? ["token", "around it"] : [])].map((x, i) => make("th", { scope: "col", class: i > 1 ? "text" : null }, x)))),
    make("tbody", {}, ...lines.map(([c, m]) => make("tr", {}, make("td", {}, whole(c)), make("td", {}, fixed(m)),
      ...(pieces ? [["text token", quoted(pieces[c])], ["text", shown(passage(pieces.slice(Math.max(0, c - 5), c + 4)))]].map(([kind, t]) => make("td", { class: kind }, wordsOf(t))) : [])))));
  await drawHeat(set);
}
