// Plain and drafted decoding of one prompt. Both are asked for at once, and the server lets them have the
// machine in turns: each has a clock of its own that runs in its own turns only.

import { Answer } from "./api.js";
import { eased, h, keep, kept, number, say, trouble } from "./dom.js";
import { difference, lane, show, write } from "./lanes.js";
import { sampling } from "./settings.js";
import { legend } from "./tokens.js";

const WARM_UP = 16; // tokens: what runs first is compiled, which is on nobody's clock

export function race() {
  let stopping = null;
  const saved = kept("race", { question: "Write a Python function that sorts a list by bubble sort, then explain it.", longest: 120 });
  const question = h("textarea", { rows: 2, value: saved.question });
  const longest = h("input", { type: "number", min: 1, max: 4000, value: saved.longest });
  const start = h("button", { class: "main" }, "Race");
  const lanes = [lane("Plain decoding"), lane("With drafting")];
  const state = h("p", { class: "dim" }), verdict = h("div", { class: "verdict", hidden: true });
  const result = h("div", { hidden: true }, state, verdict, legend(), h("div", { class: "lanes" }, lanes.map(({ element }) => element)));
  const screen = h("section", { id: "race", "aria-label": "Race", class: "page", tabindex: "0" }, h("form", { class: "asking", onsubmit: (event) => {
    event.preventDefault();
    if (stopping) stopping();
    else run();
  } }, h("label", {}, "Question", question), h("div", { class: "row" }, h("label", {}, "Longest answer", longest), start),
  h("p", { class: "dim" }, "The same question, settings and seed twice. The two have the machine in turns, each on a clock of its own, so that neither slows the other; reading the prompt is on neither clock.")), result);

  async function run() {
    keep("race", { question: question.value, longest: longest.value });
    const control = new AbortController(), usual = sampling();
    const body = { ...usual, seed: usual.seed ?? Math.floor(2 ** 32 * Math.random()), messages: [{ role: "user", content: question.value }] };
    const asked = [{ draft: false, alone: true }, { ...(usual.x_redrafter?.tree && usual.x_redrafter), draft: true, alone: true }];
    const both = (most, answers, changed) => Promise.all(answers.map((answer, i) =>
      answer.run({ ...body, max_tokens: most, x_redrafter: asked[i] }, control.signal, changed)));
    stopping = () => control.abort();
    start.textContent = "Stop";
    result.hidden = false;
    verdict.hidden = true;
    trouble(null);
    const answers = [new Answer(), new Answer()];
    let judged = false; // a frame may come behind the verdict, whose marks it must not undo
    const draw = () => judged || answers.forEach((answer, i) => drawLane(lanes[i], answer));
    draw();
    try {
      state.textContent = "Warming up \u2026";
      await both(Math.min(WARM_UP, Number(longest.value)), [new Answer(), new Answer()], () => {});
      state.textContent = "Running \u2026";
      await both(Number(longest.value), answers, eased(draw));
      draw();
      judged = true;
      judge(answers);
      state.textContent = "";
    } catch (error) {
      control.abort();
      state.textContent = "Stopped.";
      if (error.name !== "AbortError") trouble(error);
    }
    stopping = null;
    start.textContent = "Race";
  }

  function judge([plain, drafted]) {
    const at = difference(plain, drafted), ratio = speed(drafted) / speed(plain);
    const count = plain.tokens.length;
    const same = at === null ? `Same text: yes, all ${count} tokens are identical.` : `Same text: no, they part at token ${at + 1}.`;
    const why = at === null ? "" : " In 16 and 4 bits a pass over several tokens may round differently from a pass over one; in float32 on a CPU this must not happen: run mlx-redrafter doctor.";
    const faster = `With drafting: ${number(ratio, 2)}x the speed of plain decoding${ratio < 1 ? ": here drafting does not pay" : ""}.`;
    verdict.replaceChildren(h("p", {}, same, why), h("p", {}, faster));
    verdict.hidden = false;
    if (at !== null) [plain, drafted].forEach((answer, i) => show(lanes[i], answer, at));
    say(`${same} ${faster}`);
  }

  return { screen, stop: () => stopping?.() };
}

const clock = (answer) => answer.steps.at(-1)?.seconds ?? 0;
const speed = (answer) => answer.tokens.length / (clock(answer) || 1e-9);

function drawLane(own, answer) {
  const count = answer.tokens.length, steps = answer.steps.length;
  write(own, [[number(count), "tokens"], [`${number(clock(answer), 1)} s`, "of its own"], [number(count ? speed(answer) : 0, 1), "tokens/s"], [number(steps ? count / steps : 0, 2), "per step"]]);
  show(own, answer);
}
