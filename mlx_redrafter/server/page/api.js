// The server: requests, streams, and one answer as it comes.

import { $ } from "./dom.js";

let key = localStorage.getItem("redrafter.key") ?? "";

async function asked(path, body, signal) {
  const headers = { ...(key && { authorization: `Bearer ${key}` }) };
  if (body) headers["content-type"] = "application/json";
  let found;
  try {
    found = await fetch(path, { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer: is it running?");
  }
  if (found.status === 401) {
    await askForKey();
    return asked(path, body, signal);
  }
  if (!found.ok) throw new Error(await problem(found));
  return found;
}

async function problem(found) {
  try {
    return (await found.json()).error.message;
  } catch {
    return `the server answers ${found.status}`;
  }
}

let asking = null;

function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = $("key");
    dialog.addEventListener("close", () => {
      key = $("key-value").value.trim();
      localStorage.setItem("redrafter.key", key);
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

export const json = async (path) => (await asked(path)).json();
export const plain = async (path) => (await asked(path)).text();
export const posted = async (path, body) => (await asked(path, body)).json();

// The events of a stream, as objects.
async function* events(path, body, signal) {
  const reader = (await asked(path, body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", done = false;
  for (;;) {
    const piece = await reader.read();
    if (piece.done) break;
    const parts = (rest + piece.value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      if (part === "data: [DONE]") done = true;
      else yield JSON.parse(part.slice(6));
    }
  }
  if (!done) throw new Error("the server ended the answer before its end");
}

// One answer: its text, and what every step of it brought.
export class Answer {
  text = "";
  reasoning = "";
  steps = []; // of tokens, [text, "d" drafted or "b" bonus]; seconds: on the answer's own clock
  trees = [];
  read = null; // of the prompt: {processed, total}
  usage = null;
  timings = null;
  extra = null;
  reason = null;

  // Asks for it, and calls `changed` for everything that comes. Throws what goes wrong.
  async run(body, signal, changed = () => {}) {
    const own = { tokens: true, ...body.x_redrafter };
    const all = { ...body, stream: true, stream_options: { include_usage: true }, return_progress: true, x_redrafter: own };
    this.asked = performance.now();
    for await (const event of events("v1/chat/completions", all, signal)) {
      this.take(event);
      changed();
    }
    return this;
  }

  take(event) {
    if (event.error) throw new Error(event.error.message);
    if (event.prompt_progress) this.read = event.prompt_progress;
    const { tokens, trees, seconds, ...extra } = event.x_redrafter ?? {};
    if (tokens) this.drawn(tokens, seconds);
    this.trees.push(...(trees ?? []));
    const choice = event.choices?.[0];
    this.text += choice?.delta?.content ?? "";
    this.reasoning += choice?.delta?.reasoning_content ?? "";
    this.reason = choice?.finish_reason ?? this.reason;
    if (event.usage) {
      this.usage = event.usage;
      this.timings = event.timings;
      this.extra = extra;
    }
  }

  // Tokens of one step or more: each ends with the bonus.
  drawn(tokens, seconds) {
    const now = performance.now();
    this.first ??= now;
    this.last = now;
    let step = [];
    for (const token of tokens) {
      step.push(token);
      if (token[1] === "b") {
        this.steps.push({ tokens: step, seconds });
        step = [];
      }
    }
    if (step.length) this.steps.push({ tokens: step, seconds });
  }

  get tokens() {
    return this.steps.flatMap((step) => step.tokens);
  }

  // What the page shows and keeps of it.
  figures() {
    const count = this.steps.reduce((sum, step) => sum + step.tokens.length, 0);
    const behind = count - (this.steps[0]?.tokens.length ?? 0);
    const live = behind > 0 ? behind / ((this.last - this.first) / 1000 || 1e-9) : 0;
    return {
      tokens: count,
      steps: this.steps.length,
      rate: this.timings?.predicted_per_second ?? live,
      wait: this.first ? (this.first - this.asked) / 1000 : null,
      depths: depths(this.steps),
      prompt: this.usage?.prompt_tokens ?? null,
      cached: this.usage?.prompt_tokens_details.cached_tokens ?? null,
      seed: this.extra?.seed ?? null,
    };
  }
}

// Share of the steps in which the draft at depth 1, 2, ... was kept.
function depths(steps) {
  const kept = steps.map((step) => step.tokens.filter(([, origin]) => origin === "d").length);
  const deepest = Math.max(0, ...kept);
  return Array.from({ length: deepest }, (_, i) => kept.filter((n) => n > i).length / kept.length);
}
