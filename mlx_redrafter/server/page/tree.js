// The tree, live: what a step drafted, what the model checked, and which branch became text.

import { Answer } from "./api.js";
import { button, eased, h, keep, kept, say, trouble } from "./dom.js";
import { FROM, picture, told, visible } from "./picture.js";
import { sampling } from "./settings.js";
import { coloured, legend, meter } from "./tokens.js";

const SHAPES = [["3x4/8", "beam 3x4, 8 nodes"], ["4x5/16", "beam 4x5, 16 nodes"], ["2x3/5", "beam 2x3, 5 nodes"], ["1x4", "a chain of 4"], ["", "what pays here"]];
const WHAT = [
  ["Drafting.", "A small network, the drafter, writes continuations of the last token: a tree of candidates, each with the probability that the drafter gives to its whole path. Words that stand in the text already are candidates too."],
  ["Checking.", "The likeliest candidates go through the model in one pass, which costs about what one token costs. At every one of them the model says its own next token."],
  ["Keeping.", "Where a candidate is the very token that the model says, it is kept, and so on along the branch. Where the branch ends the model's own token is the bonus: every step yields one at least, and the text is the one that the model writes alone."],
];

export function tree() {
  let answer = null, at = 0, follow = true, stopping = null, messages = null;
  const saved = kept("tree", { question: "Count from one to twenty in words.", shape: "3x4/8", lookup: 4 });
  const question = h("textarea", { rows: 2, id: "tree-question", value: saved.question });
  const shape = h("select", {}, SHAPES.map(([value, text]) => h("option", { value }, text)));
  const lookup = h("input", { type: "number", min: 0, max: 15, value: saved.lookup });
  const longest = h("input", { type: "number", min: 1, max: 2000, value: saved.longest ?? 60 });
  shape.value = saved.shape;
  const start = h("button", { class: "main" }, "Watch");
  const slider = h("input", { type: "range", min: 1, max: 1, value: 1, "aria-label": "Step", oninput: () => go(slider.value - 1) });
  const drawn = h("div", { class: "drawn", tabindex: "0", role: "group", "aria-label": "Draft tree" });
  const heading = h("h2", { id: "tree-step" }), line = h("p", { class: "dim" });
  const text = h("div", { class: "answered", onclick: (event) => {
    const step = event.target.closest("[data-step]");
    if (step) go(Number(step.dataset.step));
  } });
  const figures = h("div");
  const table = h("details", {}, h("summary", {}, "As a table"));
  const back = button("\u2039", () => go(at - 1), { "aria-label": "Step before" });
  const on = button("\u203a", () => go(at + 1), { "aria-label": "Next step" });
  const result = h("div", { hidden: true }, h("div", { class: "row steps" }, back, slider, on), heading, line, drawn, table,
    h("h3", {}, "The answer; choose a step in it"), legend(), text, figures);
  const form = h("form", { class: "asking", onsubmit: (event) => {
    event.preventDefault();
    if (stopping) return stopping();
    messages = [{ role: "user", content: question.value }];
    watch(null);
  } }, h("label", {}, "Question", question),
  h("div", { class: "row" }, h("label", {}, "Tree", shape), h("label", {}, "Drafts from the text", lookup), h("label", {}, "Longest answer", longest), start));
  const screen = h("section", { id: "tree", "aria-label": "Tree", class: "page", tabindex: "0" }, form,
    h("details", { class: "what", open: true }, h("summary", {}, "What is to be seen"), WHAT.map(([head, said]) => h("p", {}, h("b", {}, head), " ", said))), result);
  screen.addEventListener("keydown", (event) => {
    if (event.target.matches("input, textarea, select") || !answer) return;
    if (event.key === "ArrowLeft") go(at - 1);
    else if (event.key === "ArrowRight") go(at + 1);
  });

  async function watch(seed) {
    keep("tree", { question: question.value, shape: shape.value, lookup: lookup.value, longest: longest.value });
    const control = new AbortController();
    stopping = () => control.abort();
    start.textContent = "Stop";
    trouble(null);
    answer = new Answer();
    at = 0;
    follow = true;
    screen.querySelector(".what").open = false;
    const own = { trees: true, draft: true, ...(shape.value && { tree: shape.value, lookup: Number(lookup.value) }) };
    const usual = sampling();
    try {
      await answer.run({ ...usual, ...(seed !== null && seed !== undefined && { seed }), messages, max_tokens: Number(longest.value), x_redrafter: own }, control.signal, eased(draw));
    } catch (error) {
      if (error.name !== "AbortError") trouble(error);
    }
    stopping = null;
    start.textContent = "Watch";
    draw();
    say(`${answer.trees.length} steps`);
  }

  function go(number) {
    follow = false;
    at = Math.min(Math.max(number, 0), answer.trees.length - 1);
    draw();
  }

  function draw() {
    const count = answer.trees.length;
    result.hidden = !count;
    if (!count) return;
    if (follow) at = count - 1;
    slider.max = count;
    slider.value = at + 1;
    back.disabled = at === 0;
    on.disabled = at === count - 1;
    const one = answer.trees[at];
    heading.textContent = `Step ${at + 1} of ${count}`;
    line.textContent = told(one);
    drawn.replaceChildren(picture(one));
    table.replaceChildren(table.firstChild, tableOf(one));
    text.replaceChildren(coloured(answer.steps, at));
    figures.replaceChildren(meter(answer.figures()));
  }

  document.addEventListener("watch", ({ detail }) => {
    ({ messages } = detail);
    question.value = messages.at(-1).content;
    location.hash = "tree";
    stopping?.();
    watch(detail.seed);
  });
  return { screen, stop: () => stopping?.() };
}

function tableOf({ nodes }) {
  const head = ["Token", "after", "probability", "cost", "from", "checked", "kept", "the model says"];
  const rows = nodes.map((node, i) => [visible(node.text), visible(nodes[node.parent]?.text ?? ""), node.cost === null ? "" : Math.exp(-node.cost).toPrecision(2), node.cost?.toFixed(2) ?? "",
    i ? FROM[node.part] : "decided before", node.checked ? "yes" : "no", node.kept ? "yes" : "no", visible(node.choice ?? "")]);
  return h("div", { class: "wide", tabindex: "0" }, h("table", {}, h("thead", {}, h("tr", {}, head.map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, cell)))))));
}
