// Conversations in the browser's storage. The messages of one are a tree: an edited question and an
// answer that was made again stand beside the former ones, and `leaf` ends the branch that is shown.

import { trouble } from "./dom.js";

const PREFIX = "redrafter.talk.";
const FORMAT = "mlx-redrafter conversations";
const now = () => new Date().toISOString();
const freshId = () => [...crypto.getRandomValues(new Uint32Array(3))].map((n) => n.toString(36)).join("");

export const fresh = (system = "") => ({ id: freshId(), title: "", system, created: now(), changed: now(), nodes: [], leaf: null });

export function talks() {
  const found = [];
  for (let i = 0; i < localStorage.length; i++) {
    const name = localStorage.key(i);
    if (!name.startsWith(PREFIX)) continue;
    try {
      found.push(checked(JSON.parse(localStorage.getItem(name))));
    } catch {
      continue; // not ours to delete
    }
  }
  return found.sort((a, b) => b.changed.localeCompare(a.changed));
}

export function save(talk) {
  talk.changed = now();
  try {
    localStorage.setItem(PREFIX + talk.id, JSON.stringify(talk));
    return true;
  } catch {
    trouble("the browser's storage is full, this conversation is not kept: export conversations and delete some");
    return false;
  }
}

export const remove = (talk) => localStorage.removeItem(PREFIX + talk.id);

const node = (talk, id) => talk.nodes.find((one) => one.id === id);

// From the first message to the leaf.
export function path(talk) {
  const found = [];
  for (let at = node(talk, talk.leaf); at; at = node(talk, at.parent)) found.unshift(at);
  return found;
}

export function add(talk, role, content, parent = talk.leaf, more = {}) {
  const made = { id: freshId(), parent, role, content, ...more };
  talk.nodes.push(made);
  talk.leaf = made.id;
  if (!talk.title && role === "user") talk.title = content.trim().replace(/\s+/g, " ").slice(0, 60);
  return made;
}

export const siblings = (talk, one) => talk.nodes.filter((other) => other.parent === one.parent);

// Show the branch of a message, down to what was said last in it.
export function show(talk, one) {
  let at = one;
  for (;;) {
    const next = talk.nodes.filter((other) => other.parent === at.id).at(-1);
    if (!next) break;
    at = next;
  }
  talk.leaf = at.id;
}

export const exported = (those) => JSON.stringify({ format: FORMAT, version: 1, talks: those }, null, 1);

// Conversations of a file: ours, or a list of OpenAI's messages. Throws what is wrong with it.
export function imported(text) {
  let given;
  try {
    given = JSON.parse(text);
  } catch {
    throw new Error("the file is not JSON: choose one that this page exported");
  }
  const messages = Array.isArray(given) ? given : given?.messages;
  const those = given?.format === FORMAT ? given.talks : Array.isArray(messages) ? [ofMessages(messages)] : null;
  if (!Array.isArray(those)) throw new Error("the file holds no conversations: choose one that this page exported");
  return those.map((talk) => ({ ...checked(talk), id: freshId() }));
}

function ofMessages(messages) {
  const talk = fresh();
  for (const { role, content } of messages) {
    if (role === "system") talk.system = String(content);
    else add(talk, role, String(content));
  }
  return talk;
}

const text = (value, longest = Infinity) => (typeof value === "string" ? value.slice(0, longest) : "");

// A conversation with what we know of one and nothing else: the file may be anybody's.
function checked(given) {
  if (!given || typeof given !== "object" || !Array.isArray(given.nodes)) throw new Error("a conversation in the file has no messages");
  const ids = new Set();
  const nodes = given.nodes.filter((one) => ["user", "assistant"].includes(one?.role)).map((one) => {
    const parent = ids.has(one.parent) ? one.parent : null; // parents stand first, so that no circle is possible
    ids.add(text(one.id));
    return {
      id: text(one.id), parent, role: one.role, content: text(one.content),
      ...(one.reasoning && { reasoning: text(one.reasoning) }),
      ...(one.ended && { ended: text(one.ended, 200) }),
      ...(Array.isArray(one.files) && { files: one.files.map((file) => ({ name: text(file?.name, 200), text: text(file?.text) })) }),
      ...(Array.isArray(one.steps) && { steps: one.steps.map(({ tokens }) => ({ tokens: tokens.map(([t, o]) => [text(t), o === "d" ? "d" : "b"]) })) }),
      ...(one.figures && { figures: figures(one.figures) }),
    };
  });
  return {
    id: text(given.id), title: text(given.title, 60), system: text(given.system), created: text(given.created), changed: text(given.changed),
    nodes, leaf: ids.has(given.leaf) ? given.leaf : (nodes.at(-1)?.id ?? null),
  };
}

function figures(given) {
  const found = {};
  for (const name of ["tokens", "steps", "rate", "wait", "prompt", "cached", "seed"]) {
    found[name] = typeof given[name] === "number" ? given[name] : null;
  }
  found.depths = Array.isArray(given.depths) ? given.depths.filter((share) => typeof share === "number") : [];
  return found;
}

// What the server is sent: attached files stand before the question.
export function messages(talk, those) {
  const system = talk.system.trim() ? [{ role: "system", content: talk.system }] : [];
  return [...system, ...those.map(({ role, content, files }) => {
    const before = (files ?? []).map((file) => `File ${file.name}:\n\`\`\`\n${file.text}\n\`\`\`\n\n`).join("");
    return { role, content: before + content };
  })];
}
