// Tokens by where they are from, and the figures of an answer.

import { h, number } from "./dom.js";

const WHERE = { d: "drafted and kept", b: "the model's own" };

export function coloured(steps, shown = null) {
  return h("div", { class: "tokens" }, steps.map((step, i) =>
    h("span", { class: i === shown ? "step shown" : "step", "data-step": i }, step.tokens.map(([text, origin]) =>
      h("span", { class: origin === "d" ? "drafted" : "bonus" }, text)))));
}

export const legend = () =>
  h("p", { class: "legend" }, h("span", { class: "drafted" }, WHERE.d), " ",
    h("span", { class: "bonus" }, `${WHERE.b}, one per step`));

const percent = (share) => `${Math.round(100 * share)} %`;

// One line of an answer's figures, and bars: how often the draft at each depth was kept.
export function meter(figures) {
  const parts = [];
  const say = (value, text, title) => parts.push(h("span", { title }, h("b", {}, value), ` ${text}`));
  if (figures.rate) say(number(figures.rate, 1), "tokens/s");
  say(number(figures.tokens), figures.tokens === 1 ? "token" : "tokens");
  if (figures.steps) say(number(figures.tokens / figures.steps, 2), "tokens per step", "A step is one pass over the model; plain decoding has 1.");
  if (figures.cached !== null && figures.cached !== undefined) {
    say(`${number(figures.cached)} of ${number(figures.prompt)}`, "prompt tokens cached");
  }
  if (figures.wait) say(`${number(figures.wait, 2)} s`, "to the first token");
  return h("div", { class: "meter" }, parts, figures.depths?.length ? bars(figures.depths) : null);
}

export function bars(depths) {
  const told = depths.map((share, i) => `${i + 1}: ${percent(share)}`).join(", ");
  const shown = depths.map((share) => {
    const bar = h("i");
    bar.style.setProperty("--share", share);
    return bar;
  });
  return h("span", { class: "depths", role: "img", "aria-label": `drafts kept by depth: ${told}`, title: `Drafts kept by depth: ${told}` }, shown, h("span", { "aria-hidden": "true" }, " kept by depth"));
}
