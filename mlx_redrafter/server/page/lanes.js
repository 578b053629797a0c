// Answers side by side, and where they part.

import { h } from "./dom.js";
import { coloured } from "./tokens.js";

export function lane(name) {
  const text = h("div", { class: "lane-text", tabindex: "0", role: "group", "aria-label": name }), figures = h("p", { class: "meter" });
  const bar = h("progress", { "aria-label": `${name}: prompt read`, hidden: true }), more = h("p", { class: "dim" });
  const element = h("div", { class: "lane" }, h("h3", {}, name), figures, bar, text, more);
  return { name, element, text, figures, bar, more };
}

// `parts`: [value, what it is].
export function write(own, parts) {
  own.figures.replaceChildren(...parts.map(([value, what]) => h("span", {}, h("b", {}, value), ` ${what}`)));
}

export function progress(own, answer) {
  own.bar.hidden = !answer.read || answer.steps.length > 0;
  if (own.bar.hidden) return;
  own.bar.max = answer.read.total;
  own.bar.value = answer.read.processed;
}

export function show(own, answer, from = null) {
  const down = own.text.scrollHeight - own.text.scrollTop - own.text.clientHeight < 40;
  own.text.replaceChildren(from === null ? coloured(answer.steps) : parted(answer, from));
  if (down && from === null) own.text.scrollTop = own.text.scrollHeight;
}

// The text, marked from a token on.
function parted(answer, from) {
  const text = (those) => those.map(([piece]) => piece).join("");
  return h("div", { class: "tokens" }, text(answer.tokens.slice(0, from)), h("mark", {}, text(answer.tokens.slice(from)) || " (nothing)"));
}

// The first token that is another one; null: all are the same.
export function difference(one, other) {
  const [a, b] = [one.tokens, other.tokens];
  for (let i = 0; i < Math.max(a.length, b.length); i++) if (a[i]?.[0] !== b[i]?.[0]) return i;
  return null;
}
