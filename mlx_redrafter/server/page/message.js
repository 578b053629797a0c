// One message of a conversation on the screen.

import { button, copy, h, size } from "./dom.js";
import { markdown } from "./markdown.js";
import { coloured, legend, meter } from "./tokens.js";

// `does`: retry, edit, pick (another branch), watch (its steps); `versions`: the messages beside it.
export function view(message, does, versions) {
  const actions = [others(message, does, versions)];
  if (message.role === "user") {
    actions.push(button("Edit", () => does.edit(message), { class: "quiet" }));
    if (does.unanswered(message)) actions.push(button("Ask again", () => does.again(message), { class: "quiet" }));
    return h("li", { class: "message user", "data-id": message.id }, h("h3", {}, "You"),
      (message.files ?? []).map((file) =>
        h("details", { class: "file" }, h("summary", {}, `${file.name}, ${size(new Blob([file.text]).size)}`), h("pre", { tabindex: 0 }, file.text))),
      h("div", { class: "said" }, message.content), h("p", { class: "row actions" }, actions));
  }
  const body = h("div", { class: "body" });
  const write = (colours) => body.replaceChildren(...(colours ? [legend(), coloured(message.steps)] : [markdown(message.content)]));
  write(false);
  const copying = button("Copy", () => copy(message.content, copying), { class: "quiet" });
  actions.push(copying, button("Retry", () => does.retry(message), { class: "quiet" }));
  if (message.steps?.length) {
    const toggle = button("Origin", () => {
      const on = toggle.getAttribute("aria-pressed") !== "true";
      toggle.setAttribute("aria-pressed", String(on));
      write(on);
    }, { class: "quiet", "aria-pressed": "false", title: "Colour tokens by where they are from" });
    actions.push(toggle, button("Steps", () => does.watch(message), { class: "quiet", title: "The draft tree of every step" }));
  }
  return h("li", { class: "message", "data-id": message.id }, h("h3", {}, "Answer"),
    message.reasoning && h("details", { class: "thoughts" }, h("summary", {}, "Thoughts"), h("div", { class: "said" }, message.reasoning)),
    body, message.ended && h("p", { class: "ended" }, message.ended),
    message.figures && meter(message.figures), h("p", { class: "row actions" }, actions));
}

function others(message, does, versions) {
  if (versions.length < 2) return null;
  const at = versions.indexOf(message);
  const to = (step, text, label) =>
    button(text, () => does.pick(versions[at + step]), { class: "quiet", "aria-label": label, disabled: !versions[at + step] });
  return h("span", { class: "versions" }, to(-1, "\u2039", "Version before"), ` ${at + 1}/${versions.length} `, to(1, "\u203a", "Next version"));
}

// An answer that is being made: plain text, as Markdown may still change its mind.
export function growing() {
  const thoughts = h("div", { class: "said" });
  const folded = h("details", { class: "thoughts", hidden: true }, h("summary", {}, "Thinking \u2026"), thoughts);
  const text = h("div", { class: "said" });
  const bar = h("progress", { "aria-label": "Prompt read" });
  const reading = h("p", { class: "reading" }, h("span", {}, "Waiting \u2026"), bar);
  const figures = h("div");
  const element = h("li", { class: "message", "aria-busy": "true" }, h("h3", {}, "Answer"), folded, reading, text, figures);
  const update = (answer) => {
    const begun = answer.steps.length > 0;
    reading.hidden = begun;
    if (answer.read && !begun) {
      bar.max = answer.read.total;
      bar.value = answer.read.processed;
      reading.firstChild.textContent = `Reading: ${answer.read.processed} of ${answer.read.total} tokens`;
    }
    grow(text, answer.text);
    folded.hidden = !answer.reasoning;
    if (answer.reasoning) grow(thoughts, answer.reasoning);
    if (begun) figures.replaceChildren(meter(answer.figures()));
  };
  return { element, update };
}

// Only what is new: a long text written anew for every step would be slow.
function grow(element, text) {
  const shown = (element.firstChild ?? element.appendChild(document.createTextNode(""))).data.length;
  if (text.length > shown) element.firstChild.appendData(text.slice(shown));
}
