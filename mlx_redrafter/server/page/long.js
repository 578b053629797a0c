// A long prompt, read densely and sparsely: what that costs, and what it changes.

import { Answer } from "./api.js";
import { button, eased, h, keep, kept, number, say, size, textOf, trouble } from "./dom.js";
import { difference, lane, progress, show, write } from "./lanes.js";
import { sampling } from "./settings.js";

const MODES = [["trianglemix", "TriangleMix", "static: the first keys and the nearest, in the upper half of the layers"],
  ["xattention", "XAttention", "blocks that antidiagonals find"], ["minference", "MInference", "a pattern for every head"]];

const WARM_UP = 8000; // letters

export function long() {
  let stopping = null;
  const saved = kept("long", { question: "What is this text about? Answer in one sentence.", modes: ["trianglemix"], least: 1024, longest: 60 });
  const text = h("textarea", { rows: 6, placeholder: "Paste a long text, or load a file" });
  const counted = h("span", { class: "dim", role: "status" });
  const count = () => (counted.textContent = text.value ? `${size(new Blob([text.value]).size)}, about ${number(text.value.length / 4)} tokens` : "");
  text.addEventListener("input", count);
  const file = h("input", { type: "file", class: "unseen", tabindex: -1, "aria-label": "Text file", onchange: async () => {
    try {
      text.value = await textOf(file.files[0]);
    } catch (error) {
      trouble(error);
    }
    file.value = "";
    count();
  } });
  const question = h("input", { value: saved.question });
  const modes = MODES.map(([name, label, what]) => h("label", { class: "inline", title: what }, h("input", { type: "checkbox", value: name, checked: saved.modes.includes(name) }), label));
  const least = h("input", { type: "number", min: 0, max: 1000000, value: saved.least });
  const longest = h("input", { type: "number", min: 1, max: 4000, value: saved.longest });
  const start = h("button", { class: "main" }, "Read it");
  const state = h("p", { class: "dim", role: "status" }), results = h("div", { class: "lanes" });
  const screen = h("section", { id: "long", "aria-label": "Long prompt", class: "page", tabindex: "0" }, h("form", { class: "asking", onsubmit: (event) => {
    event.preventDefault();
    if (stopping) stopping();
    else run();
  } }, h("label", {}, "Text", text), h("div", { class: "row" }, button("Load a file", () => file.click()), file, counted),
  h("label", {}, "Question about it", question),
  h("fieldset", { class: "row" }, h("legend", {}, "Beside dense reading"), modes),
  h("div", { class: "row" }, h("label", {}, "Sparse from token", least), h("label", {}, "Longest answer", longest), start),
  h("p", { class: "dim" }, "Sparse attention scores a part of the pairs of tokens while the prompt is read: sooner a first token, and perhaps another answer. Nothing is taken from the prefix cache, and a beginning is read in every way first, since what runs first is compiled.")), state, results);

  async function run() {
    const chosen = modes.map((label) => label.querySelector("input")).filter((box) => box.checked).map((box) => box.value);
    keep("long", { question: question.value, modes: chosen, least: least.value, longest: longest.value });
    const control = new AbortController(), usual = sampling();
    const body = { ...usual, seed: usual.seed ?? 0, max_tokens: Number(longest.value), cache_prompt: false,
      messages: [{ role: "user", content: `${text.value}\n\n${question.value}` }] };
    stopping = () => control.abort();
    start.textContent = "Stop";
    trouble(null);
    const runs = ["off", ...chosen].map((mode) => ({ mode, answer: new Answer(), own: lane(MODES.find(([name]) => name === mode)?.[1] ?? "Dense") }));
    results.replaceChildren(...runs.map(({ own }) => own.element));
    results.scrollIntoView({ block: "nearest" });
    const extra = (mode) => ({ ...usual.x_redrafter, sparse_prefill: mode, ...(mode !== "off" && { sparse_prefill_min_context: Number(least.value) }) });
    const beginning = [{ role: "user", content: body.messages[0].content.slice(0, WARM_UP) }];
    try {
      state.textContent = "Warming up \u2026";
      for (const { mode } of runs) {
        await new Answer().run({ ...body, messages: beginning, max_tokens: 4, x_redrafter: extra(mode) }, control.signal);
      }
      state.textContent = "Reading \u2026";
      for (const { mode, answer, own } of runs) {
        const draw = () => drawLane(own, answer, runs[0].answer);
        await answer.run({ ...body, x_redrafter: extra(mode) }, control.signal, eased(draw));
        draw();
      }
      state.textContent = "";
      say("all are read");
    } catch (error) {
      state.textContent = "Stopped.";
      if (error.name !== "AbortError") trouble(error);
    }
    stopping = null;
    start.textContent = "Read it";
  }

  return { screen, stop: () => stopping?.() };
}

function drawLane(own, answer, dense) {
  progress(own, answer);
  show(own, answer);
  const figures = answer.figures(), parts = [];
  if (figures.wait) parts.push([`${number(figures.wait, 2)} s`, "to the first token"]);
  const sparse = answer.extra?.sparse_prefill;
  if (answer.usage) {
    parts.push([`${number(100 * (sparse?.whole_density ?? 1))} %`, "of attention computed"], [number(figures.prompt), "prompt tokens"]);
    if (answer !== dense) own.more.replaceChildren(compared(own, answer, dense, sparse));
  }
  write(own, parts);
}

function compared(own, answer, dense, sparse) {
  const at = difference(dense, answer);
  if (at !== null) show(own, answer, at);
  const where = at === null ? "the same answer" : `the answers part at token ${at + 1}`;
  if (!sparse?.sparse_layers) return `Nothing was sparse (${Object.keys(sparse?.declined ?? {})[0] ?? "short context"}); ${where}.`;
  return `Read in ${number(answer.timings.prompt_ms / dense.timings.prompt_ms, 2)} of the time of dense reading; ${where}.`;
}
