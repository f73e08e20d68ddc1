// What every part uses: the document, numbers as text. Text only ever enters the document as text nodes.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const COLORS = data.colors.lines;
document.documentElement.style.setProperty("--short", data.colors.short);
const DASHES = ["solid", "dash", "dot", "dashdot"];
const channels = (hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16));
const number = (x) => (x === "inf" ? Infinity : x === "-inf" ? -Infinity : x);
for (const run of data.runs) {
  run.grid = run.grid.map(number);
  run.asked = run.asked.map(number);
}

// ---- document helpers ----------------------------------------------------------------------------------------------

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
/** A field of a table: numbers with a sensible number of digits, other texts as they are. */
const measured = (text) => {
  if (text === "" || !/^-?[0-9.]+(e[-+]?[0-9]+)?$/i.test(text)) return text;
  const x = Number(text);
  return Number.isInteger(x) ? whole(x) : Math.abs(x) < 1 ? fixed(x, 3) : x < 100 ? fixed(x, 1) : whole(Math.round(x));
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
