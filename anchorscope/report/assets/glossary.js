// Words explained where they stand, on hover and focus, and at the end.

const TERMS = Object.keys(data.glossary).sort((a, b) => b.length - a.length);
const termId = (term) => `term-${term.replace(/[^a-z0-9]+/g, "-")}`;
const TERM_PATTERN = new RegExp(`\\b(${TERMS.join("|")})(s|es)?\\b`, "gi");

/** A label with its terms marked, each once. */
function explained(text) {
  const nodes = [], seen = new Set();
  let last = 0;
  for (const found of text.matchAll(TERM_PATTERN)) {
    const term = found[1].toLowerCase();
    if (seen.has(term)) continue;
    seen.add(term);
    nodes.push(text.slice(last, found.index), make("span", { class: "term", tabindex: "0", "data-term": term, "aria-describedby": termId(term) }, found[0]));
    last = found.index + found[0].length;
  }
  return [...nodes, text.slice(last)].filter((x) => x !== "");
}

/** The headings of charts that stand in the template. */
function explainAll() {
  for (const caption of document.querySelectorAll("#analyses figcaption")) caption.replaceChildren(...explained(caption.textContent));
}

const glossarySection = () => make("section", { id: "glossary", "aria-labelledby": "glossary-title" }, make("h2", { id: "glossary-title" }, "Glossary"),
  make("dl", { class: "glossary" }, ...Object.entries(data.glossary).map(([term, words]) => make("div", {}, make("dt", {}, term), make("dd", { id: termId(term) }, words)))));

const tip = make("div", { id: "tip", "aria-hidden": "true", hidden: true });
document.body.append(tip);
function showTip(event) {
  const term = event.target.closest?.(".term");
  if (!term) return;
  tip.textContent = data.glossary[term.dataset.term];
  tip.hidden = false;
  const box = term.getBoundingClientRect(), width = tip.offsetWidth, room = document.documentElement.clientWidth;
  tip.style.left = `${Math.max(8, Math.min(box.left, room - width - 8))}px`;
  const below = box.bottom + 6, fits = below + tip.offsetHeight < innerHeight;
  tip.style.top = `${fits ? below : Math.max(4, box.top - tip.offsetHeight - 6)}px`;
}
const hideTip = () => { tip.hidden = true; };
for (const kind of ["mouseover", "focusin"]) document.addEventListener(kind, showTip);
for (const kind of ["mouseout", "focusout"]) document.addEventListener(kind, hideTip);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
document.addEventListener("scroll", hideTip, { passive: true, capture: true });
