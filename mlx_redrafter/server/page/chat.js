// The chat: conversations, one of them, and what is written to it.

import { Answer } from "./api.js";
import { $, button, download, eased, h, say, size, textOf, trouble } from "./dom.js";
import { growing, view } from "./message.js";
import { openSettings, sampling, systemPrompt } from "./settings.js";
import * as store from "./store.js";

let talk, files = [], stopping = null, editing = null;
let list, messages, input, sending, attached, system, side;

export function chat() {
  talk = store.talks()[0] ?? store.fresh(systemPrompt());
  list = h("ul", { class: "talks" });
  const importing = h("input", { type: "file", accept: ".json,application/json", class: "unseen", tabindex: -1, "aria-label": "File of conversations", onchange: importFile });
  side = h("aside", { id: "talks", "aria-label": "Conversations" },
    h("div", { class: "row" }, button("New conversation", begin, { class: "main" }), button("Close", () => fold(false), { class: "quiet narrow" })),
    list,
    h("p", { class: "row" }, button("Export all", () => download("conversations.json", store.exported(store.talks())), { class: "quiet" }),
      button("Import", () => importing.click(), { class: "quiet" }), importing));
  messages = h("ol", { class: "messages", tabindex: "0", "aria-label": "Messages" });
  system = h("textarea", { rows: 2, oninput: () => { talk.system = system.value; if (talk.nodes.length) store.save(talk); } });
  const unfolding = button("Conversations", () => fold(true), { class: "quiet narrow", "aria-controls": "talks" });
  const head = h("div", { class: "row head" }, unfolding,
    h("details", { class: "system" }, h("summary", {}, "System prompt"), h("label", {}, h("span", { class: "unseen" }, "System prompt"), system)),
    button("Settings", openSettings, { class: "quiet" }));
  const screen = h("section", { id: "chat", "aria-label": "Chat", class: "chat" }, side, h("div", { class: "talk" }, head, messages, composer()));
  screen.addEventListener("click", ({ target }) => {
    if (!side.contains(target) && target !== unfolding) fold(false);
  });
  screen.addEventListener("dragover", (event) => event.preventDefault());
  screen.addEventListener("drop", (event) => {
    event.preventDefault();
    attach([...event.dataTransfer.files]);
  });
  addEventListener("pagehide", () => stopping?.keep());
  draw();
  return { screen, shown: () => input.focus(), stop: () => stopping?.(), begin };
}

function composer() {
  input = h("textarea", { id: "input", rows: 2, placeholder: "Ask something", "aria-label": "Message", onkeydown: typed });
  const picking = h("input", { type: "file", multiple: true, class: "unseen", tabindex: -1, "aria-label": "Text file", onchange: () => {
    attach([...picking.files]);
    picking.value = "";
  } });
  attached = h("ul", { class: "attached", "aria-label": "Attached files" });
  sending = h("button", { class: "main" }, "Send");
  return h("form", { class: "composer", onsubmit: (event) => {
    event.preventDefault();
    if (stopping) stopping();
    else send();
  } }, attached, h("div", { class: "row" }, button("Attach", () => picking.click(), { class: "quiet" }), picking, input, sending));
}

function typed(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!stopping) send();
  } else if (event.key === "ArrowUp" && !input.value && !stopping) {
    const last = store.path(talk).findLast((one) => one.role === "user");
    if (last) does.edit(last);
  }
}

async function attach(those) {
  for (const file of those) {
    try {
      files.push({ name: file.name, text: await textOf(file) });
    } catch (error) {
      trouble(error);
    }
  }
  drawFiles();
}

function drawFiles() {
  attached.replaceChildren(...files.map((file) => h("li", {}, `${file.name}, ${size(new Blob([file.text]).size)} `,
    button("\u00d7", () => {
      files = files.filter((other) => other !== file);
      drawFiles();
    }, { class: "quiet", "aria-label": `Remove ${file.name}` }))));
}

function begin() {
  stopping?.();
  open(store.fresh(systemPrompt()));
  input.focus();
}

function open(other) {
  talk = other;
  editing = null;
  trouble(null);
  fold(false);
  draw();
}

function fold(open) {
  side.classList.toggle("open", open);
  if (open) side.querySelector("button").focus();
}

// An attempt to edit takes the message back into the input.
const does = {
  edit(message) {
    if (stopping) return;
    editing = message;
    files = [...(message.files ?? [])];
    input.value = message.content;
    drawFiles();
    input.focus();
    say("editing the message; Enter sends it as another version");
  },
  unanswered: (message) => message.id === talk.leaf && !stopping,
  again(message) {
    answer(message.id);
  },
  retry(message) {
    if (!stopping) answer(message.parent);
  },
  pick(message) {
    if (stopping) return;
    store.show(talk, message);
    store.save(talk);
    draw();
  },
  watch(message) {
    const those = store.path(talk);
    const before = those.slice(0, those.indexOf(message));
    document.dispatchEvent(new CustomEvent("watch", { detail: { messages: store.messages(talk, before), seed: message.figures?.seed } }));
  },
};

function send() {
  const content = input.value.trim();
  if (!content && !files.length) return;
  const parent = editing ? editing.parent : talk.leaf;
  const asked = store.add(talk, "user", content, parent, files.length ? { files } : {});
  if (!talk.title) talk.title = files[0].name;
  editing = null;
  files = [];
  input.value = "";
  drawFiles();
  store.save(talk);
  answer(asked.id);
}

// Have a message answered; what there is of it stays, whatever ends it.
async function answer(parent) {
  const own = talk, made = new Answer(), control = new AbortController(), shown = growing();
  trouble(null);
  own.leaf = parent;
  const history = store.messages(own, store.path(own));
  let node = null;
  const keep = (ended) => {
    if (!made.text && !made.reasoning) return;
    const found = { content: made.text, reasoning: made.reasoning, steps: made.steps.map(({ tokens }) => ({ tokens })), figures: made.figures(), ended };
    if (node) Object.assign(node, found);
    else {
      const leaf = own.leaf;
      node = store.add(own, "assistant", made.text, parent, found);
      if (leaf !== parent) own.leaf = leaf; // another branch is shown by now
    }
    store.save(own);
  };
  stopping = () => control.abort();
  stopping.keep = () => keep("interrupted");
  draw();
  messages.append(shown.element);
  toEnd(true);
  sending.textContent = "Stop";
  const update = eased(() => {
    const near = atEnd();
    shown.update(made);
    if (near) toEnd(true);
  });
  let ended = null;
  try {
    await made.run({ messages: history, ...sampling() }, control.signal, update);
    ended = made.reason === "length" ? "the longest answer was reached" : null;
  } catch (error) {
    ended = error.name === "AbortError" ? "stopped" : "interrupted";
    if (error.name !== "AbortError") trouble(error);
  }
  keep(ended);
  stopping = null;
  sending.textContent = "Send";
  if (own === talk) draw();
  say(ended ? `answer ${ended}` : `answer complete, ${made.figures().tokens} tokens`);
}

const atEnd = () => messages.scrollHeight - messages.scrollTop - messages.clientHeight < 60;
const toEnd = (near) => near && (messages.scrollTop = messages.scrollHeight);

function draw() {
  const near = atEnd();
  system.value = talk.system;
  const those = store.path(talk);
  messages.replaceChildren(...those.map((one) => view(one, does, store.siblings(talk, one))));
  if (!those.length) messages.append(h("li", { class: "empty" }, h("p", {}, "Nothing leaves this machine."),
    h("p", { class: "dim" }, "The model writes several tokens a step: a drafter proposes, the model checks, and the text is its own. \u201cOrigin\u201d below an answer shows which tokens were drafted, \u201cSteps\u201d how.")));
  toEnd(near);
  drawTalks();
}

function drawTalks() {
  list.replaceChildren(...store.talks().map((one) => h("li", { class: one.id === talk.id ? "shown" : null },
    button(one.title || "Without a title", () => {
      stopping?.();
      open(one);
    }, { class: "title", "aria-current": one.id === talk.id ? "true" : null }),
    button("Export", () => download(`${one.title.replace(/[^\w-]+/g, "-").slice(0, 40) || "conversation"}.json`, store.exported([one])), { class: "quiet", "aria-label": `Export ${one.title}` }),
    button("Delete", (event) => forget(one, event.target), { class: "quiet", "aria-label": `Delete ${one.title}` }))));
}

// Asked twice, as nothing brings it back.
function forget(one, where) {
  if (where.textContent !== "Sure?") {
    where.textContent = "Sure?";
    where.setAttribute("aria-label", `Really delete ${one.title}?`);
    return;
  }
  store.remove(one);
  if (one.id === talk.id) begin();
  else drawTalks();
}

async function importFile(event) {
  const [file] = event.target.files;
  event.target.value = "";
  try {
    const those = store.imported(await textOf(file));
    for (const one of those) store.save(one);
    if (those.length) open(those[0]);
    say(`${those.length} conversations imported`);
  } catch (error) {
    trouble(error);
  }
}

export const focusInput = () => $("input").focus();
