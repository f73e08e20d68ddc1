// What the controls and keys do.

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
