// Light and dark, paper, and the start.

const system = matchMedia("(prefers-color-scheme: dark)");
let wish = "system";
function dress(theme) {
  document.documentElement.dataset.theme = theme === "system" ? (system.matches ? "dark" : "light") : theme;
  if (current()?.index) refresh();
  drawCharts();
}
byId("theme").addEventListener("click", () => {
  wish = { system: "light", light: "dark", dark: "system" }[wish];
  byId("theme").textContent = `Theme: ${wish}`;
  dress(wish);
});
system.addEventListener("change", () => dress(wish));
// Paper is white, and the charts carry their colors in themselves.
function redraw() {
  drawCharts();
  if (!current()) return;
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

// ---- start ---------------------------------------------------------------------------------------------------------

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
  paintSections();
  if (!data.sets.length) { // nothing was analyzed: sections alone
    byId("analyses").remove();
    document.documentElement.dataset.ready = "1";
    return;
  }
  byId("set").append(...data.sets.map((s, i) => make("option", { value: String(i) }, nameOf(s))));
  byId("other").append(make("option", { value: "-1" }, "nothing"), ...data.sets.map((s, i) => make("option", { value: String(i) }, nameOf(s))));
  byId("quantity").append(...Object.entries(QUANTITIES).map(([id, q]) => make("option", { value: id }, q.name)));
  state.theta = data.runs[0].asked[0];
  for (const set of data.sets) await open(set);
  if (QUANTITIES.best) // only the methods that win somewhere need a color
    QUANTITIES.best.words = [...new Set(data.sets.filter((s) => s.methods).flatMap((s) => s.records.map((r) => bestMethod(s, r))))].filter(Boolean).sort();
  await select({ set: 0 });
  document.documentElement.dataset.ready = "1";
}
start().catch(fail);
