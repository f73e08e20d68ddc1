// The overview: cards, runs and prompts, facts.

const card = (name, value, small) => make("div", {}, make("dt", {}, ...explained(name)), make("dd", {}, value, small ? make("small", {}, small) : null));

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
