// Sections of other folders: cards, remarks, tables, grids and charts, whatever they are about.

const drawn = []; // charts, to be drawn again when the theme or the paper changes

const BLOCKS = {
  cards: (b) => make("dl", {}, ...b.items.map(([name, value, small]) => card(name, value, small))),
  remarks: (b) => make("div", {}, ...b.texts.map((t) => make("p", { class: b.warning ? "warning" : "hint lead" }, t))),
  table: (b) => make("figure", {}, make("figcaption", {}, ...explained(b.caption)), make("div", { class: "scroll" }, tableOf(b.columns, b.rows, b.words))),
  facts: (b) => make("details", {}, make("summary", {}, b.caption), make("div", { class: "scroll" },
    make("table", {}, make("tbody", {}, ...b.items.map(([name, value]) => make("tr", {}, make("th", { scope: "row", class: "text" }, name), make("td", { class: "text" }, value))))))),
  grids: gridsOf,
  chart: chartOf,
};

function tableOf(columns, rows, words) {
  const side = (i) => (words.includes(i) ? "text" : null);
  return make("table", {}, make("thead", {}, make("tr", {}, ...columns.map((c, i) => make("th", { scope: "col", class: side(i) }, ...explained(c))))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((x, i) => make("td", { class: side(i) }, x))))));
}

/** A choice of grids, one of which is shown. */
function gridsOf(b) {
  const box = make("div"), figure = make("figure", {}, make("figcaption", {}, ...explained(b.caption)));
  const show = (i) => box.replaceChildren(...gridOf(b.choices[i]));
  if (b.choices.length > 1) {
    const select = make("select", {}, ...b.choices.map((g, i) => make("option", { value: String(i) }, g.name)));
    select.addEventListener("change", () => show(Number(select.value)));
    figure.append(make("div", { class: "buttons" }, make("label", {}, "Show ", select)));
  }
  show(0);
  figure.append(box);
  return figure;
}

function gridOf(g) {
  const at = new Map(g.cells.map((c) => [`${c[0]}:${c[1]}`, c]));
  const head = make("tr", {}, make("th", { scope: "col", class: "axis" }, `${g.axes[0]} \\ ${g.axes[1]}`), ...g.columns.map((c) => make("th", { scope: "col" }, c)));
  const rows = g.rows.map((name, r) => make("tr", {}, make("th", { scope: "row" }, name), ...g.columns.map((_, c) => {
    const found = at.get(`${r}:${c}`);
    if (!found) return make("td", { class: "none" });
    const [, , shade, text, about, marked] = found;
    const cell = make("td", { title: about, class: marked ? "short" : null }, text);
    if (shade !== null) {
      const rgb = color(g.colors, shade);
      [cell.style.background, cell.style.color] = [`rgb(${rgb})`, inkOn(rgb)];
    }
    return cell;
  })));
  const table = make("table", { class: "cells" }, make("thead", {}, head), make("tbody", {}, ...rows));
  table.style.minWidth = `${100 + 32 * g.columns.length}px`; // as wide as there is room, and never too narrow to read
  const bar = make("span", { class: "bar", "aria-hidden": "true" });
  bar.style.background = gradient(g.colors);
  return [
    make("div", { class: "key" }, make("span", {}, g.ends[0]), bar, make("span", {}, g.ends[1]), make("span", {}, g.name), g.framed ? make("span", {}, g.framed) : null),
    make("div", { class: "scroll" }, table),
  ];
}

function chartOf(b) {
  const box = make("div", { class: "chart tall", role: "img", "aria-label": b.caption });
  drawn.push([box, b]);
  return make("figure", {}, make("figcaption", {}, ...explained(b.caption)), box);
}

function drawCharts() {
  for (const [box, b] of drawn) {
    if (!box.isConnected) continue;
    const layers = (i) => (b.axes[i] === "layer" ? { dtick: Math.ceil(Math.max(1, ...b.lines.flatMap((l) => l.x)) / 20), tickformat: "d" } : {});
    const lengths = [...new Set(b.lines.flatMap((l) => l.x))];
    const counted = (i) => (b.axes[i] === "tokens" && lengths.length <= 12 ? { tickvals: lengths, ticktext: lengths.map(whole) } : {});
    const values = b.lines.flatMap((l) => l.y);  // shares alike but for rounding: no axis beyond 1
    const alike = (i) => (i === 1 && !b.log[1] && ["density", "recall"].includes(b.axes[1]) && Math.max(...values) - Math.min(...values) < 1e-6 ? { range: [0, 1.05] } : {});
    const axis = (i) => ({ ...layers(i), ...counted(i), ...alike(i), title: { text: plain(b.axes[i]) }, type: b.log[i] ? "log" : "linear", ...(b.axes[i] === "density" && b.log[i] ? DENSITY_TICKS : {}) });
    const traces = b.lines.map((line, i) => ({ x: line.x, y: line.y, name: plain(line.name), mode: "lines+markers", line: { color: COLORS[i % COLORS.length], width: 2 },
      marker: { size: 5, symbol: i % 24 }, hovertemplate: `${plain(line.name)}<br>${plain(b.axes[0])} %{x:.4~g}<br>${plain(b.axes[1])} %{y:.4~g}<extra></extra>` }));
    Plotly.react(box, traces, layout({ ...widthOf(box), showlegend: true, xaxis: axis(0), yaxis: axis(1), margin: { l: 60, r: 12, t: 28, b: 92 } }), CONFIG);
  }
}

const sectionOf = (s) => make("section", { id: s.id, "aria-labelledby": `${s.id}-title` },
  make("h2", { id: `${s.id}-title` }, s.title), ...s.blocks.map((b) => BLOCKS[b.kind](b)));

function paintSections() {
  byId("before").append(sectionOf({ id: "summary", title: "Summary", blocks: data.summary }));
  byId("after").append(...data.sections.map(sectionOf), glossarySection());
  explainAll();
  const parts = [["summary", "Summary"], ...(data.sets.length ? [["analyses", "Analysis"]] : []), ...data.sections.map((s) => [s.id, s.title]), ["glossary", "Glossary"]];
  byId("contents").hidden = false;
  fill("contents", ...parts.map(([id, title]) => make("a", { href: `#${id}` }, title)));
  drawCharts();
  if (data.sets.length) return;
  byId("model").textContent = data.model ? `on ${data.model}` : "";
  document.title = `AnchorScope report${data.model ? `: ${data.model}` : ""}`;
  byId("footer").textContent = `Made with AnchorScope ${data.anchorscope}; charts by plotly.js (MIT).`;
}
