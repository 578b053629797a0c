// A draft tree as a picture: the root at the left, a column for every depth.

import { svg } from "./dom.js";

const WIDE = 126, HIGH = 46, BOX = 100, TALL = 38;

export const FROM = { beams: "the drafter", text: "the text itself", grammar: "the grammar, which leaves no choice" };

// In words, for those who see no picture and those who do.
export function told({ nodes, bonus }) {
  const drafts = nodes.length - 1, checked = nodes.filter((node) => node.checked).length - 1;
  const kept = nodes.filter((node) => node.kept).slice(1).map((node) => quoted(node.text));
  const gone = kept.length ? `kept ${kept.length}: ${kept.join(" ")}` : "kept none";
  return drafts ? `${drafts} candidates, ${checked} checked, ${gone}; bonus: ${quoted(bonus)}.` : `Nothing was drafted; the model's own token: ${quoted(bonus)}.`;
}

export const quoted = (text) => `\u201c${text.replaceAll("\n", "\u21b5")}\u201d`;
export const visible = (text) => text.replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5").replaceAll(" ", "\u00b7");

export function picture({ nodes, bonus }) {
  const last = nodes.findLastIndex((node) => node.kept);
  const all = [...nodes, { text: bonus, parent: last, own: true }];
  const below = all.map((_, i) => all.flatMap((node, j) => (node.parent === i ? [j] : [])).sort((a, b) => rank(all[a]) - rank(all[b])));
  const depth = [], row = [];
  let leaf = 0;
  const place = (i, level) => {
    depth[i] = level;
    for (const child of below[i]) place(child, level + 1);
    row[i] = below[i].length ? row[below[i][0]] : leaf++; // beside its first child: what is kept is a straight line
  };
  place(0, 0);
  const across = Math.max(...depth) * WIDE + BOX + 4, down = leaf * HIGH;
  const at = (i) => [depth[i] * WIDE + 2, row[i] * HIGH + (HIGH - TALL) / 2];
  const lines = all.slice(1).map((node, i) => line(at(node.parent), at(i + 1), kindOf(node, i + 1)));
  const boxes = all.map((node, i) => box(at(i), node.text, kindOf(node, i), share(node, i), hint(node, i)));
  return svg("svg", { viewBox: `0 0 ${across} ${down}`, width: across, height: down, class: "draft", role: "img", "aria-label": told({ nodes, bonus }) }, ...lines, ...boxes);
}

const rank = (node) => (node.own ? -3e3 : node.kept ? -2e3 : node.checked ? -1e3 : 0) + (node.cost ?? 0);
const kindOf = (node, i) => (i === 0 ? "root" : node.own ? "own" : node.kept ? "kept" : node.checked ? "checked" : "left");

function share(node, i) {
  if (i === 0) return "last token";
  if (node.own) return "bonus";
  const from = node.part === "text" ? "text " : "";
  if (node.cost === null) return from;
  const percent = 100 * Math.exp(-node.cost);
  return `${from}${percent >= 9.5 ? Math.round(percent) : percent.toPrecision(1)} %`;
}

function hint(node, i) {
  if (i === 0) return "The last token of the text, decided in the step before";
  if (node.own) return "The model's own token behind the kept branch";
  const from = `From ${FROM[node.part]}`;
  const cost = node.cost === null ? "" : `, cost ${node.cost.toFixed(2)}`;
  const after = node.choice === null ? "not checked" : `the model goes on with ${quoted(node.choice)}`;
  return `${from}${cost}; ${after}`;
}

function line([x, y], [u, v], kind) {
  const from = x + BOX, middle = (from + u) / 2, half = TALL / 2;
  return svg("path", { d: `M${from} ${y + half}C${middle} ${y + half} ${middle} ${v + half} ${u} ${v + half}`, class: `edge ${kind}` });
}

function box([x, y], text, kind, beside, hinted) {
  const shown = visible(text) || "\u2205"; // a token that is no text, such as the end
  const name = svg("text", { x: x + 7, y: y + 16 });
  name.textContent = shown.length > 12 ? `${shown.slice(0, 11)}\u2026` : shown;
  const figure = svg("text", { x: x + BOX - 5, y: y + TALL - 6, class: "figure", "text-anchor": "end" });
  figure.textContent = beside;
  const title = svg("title");
  title.textContent = `${quoted(text)}. ${hinted}.`;
  return svg("g", { class: `node ${kind}` }, title, svg("rect", { x, y, width: BOX, height: TALL, rx: 6 }), name, figure);
}
