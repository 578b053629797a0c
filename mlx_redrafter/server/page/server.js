// What the server does now.

import { json, plain } from "./api.js";
import { h, number, size, trouble } from "./dom.js";
import { bars } from "./tokens.js";

const EVERY = 1000; // milliseconds

export function server() {
  let timer = null, before = null;
  const cards = h("div", { class: "cards" }), rows = h("tbody"), depths = h("p");
  const heads = ["Request", "State", "Prompt", "Cached", "Written", "Tokens/s", "Per step", "Drafting"];
  const empty = h("p", { class: "dim" }, "Nothing runs.");
  const table = h("div", { class: "wide", tabindex: "0" }, h("table", {}, h("thead", {}, h("tr", {}, heads.map((name) => h("th", { scope: "col" }, name)))), rows));
  const screen = h("section", { id: "server", "aria-label": "Server", class: "page", tabindex: "0" }, h("h2", {}, "Server"), cards, depths, h("h2", {}, "Answers"), empty, table);

  async function look() {
    try {
      const [slots, text] = await Promise.all([json("slots"), plain("metrics")]);
      const now = { ...values(text), at: performance.now() };
      cards.replaceChildren(...figures(slots, now, before).map(([value, what]) => h("div", { class: "card" }, h("b", {}, value), h("span", {}, what))));
      const kept = byDepth(now);
      depths.replaceChildren(...(kept.length ? [h("span", { class: "meter" }, "All answers so far: ", bars(kept))] : []));
      rows.replaceChildren(...slots.slots.map(row));
      empty.hidden = slots.slots.length > 0;
      table.hidden = !empty.hidden;
      before = now;
      trouble(null);
    } catch (error) {
      trouble(error);
    }
    if (timer !== null) timer = setTimeout(look, EVERY);
  }

  return {
    screen,
    shown() {
      timer ??= 0;
      look();
    },
    hidden() {
      clearTimeout(timer);
      timer = null;
    },
  };
}

function row(slot) {
  const read = slot.state === "reading" ? `${number(slot.prompt_tokens_read)} of ${number(slot.prompt_tokens)}` : number(slot.prompt_tokens);
  const cells = [slot.id, slot.state, read, slot.cached_tokens ?? "", slot.generated_tokens ?? "", slot.tokens_per_second ?? "", slot.tokens_per_step ?? "", slot.drafting ?? ""];
  return h("tr", {}, cells.map((cell) => h("td", { class: typeof cell === "number" ? "n" : null }, String(cell))));
}

// Prometheus' text: {name or name{labels}: number}.
function values(text) {
  const found = {};
  for (const line of text.split("\n")) {
    const [, name, value] = line.match(/^redrafter:(\S+) (\S+)$/) ?? [];
    if (name) found[name] = Number(value);
  }
  return found;
}

function figures(slots, now, before) {
  const rate = before ? (now.generation_tokens_total - before.generation_tokens_total) / ((now.at - before.at) / 1000) : 0;
  const hits = now.prefix_cache_queries_total ? now.prefix_cache_hits_total / now.prefix_cache_queries_total : 0;
  const drafts = now.spec_decode_num_drafts_total;
  return [
    [`${slots.running} of ${slots.parallel}`, "requests in work"],
    [number(slots.waiting), "in the queue"],
    [number(rate, 1), "tokens/s now"],
    [number(now.generation_tokens_total), "tokens written"],
    [drafts ? number(1 + now.spec_decode_num_accepted_tokens_total / drafts, 2) : "\u2013", "tokens per drafted step"],
    [`${number(100 * hits)} %`, "of prompt tokens from the cache"],
    [`${size(now.prefix_cache_bytes)} of ${size(now.prefix_cache_limit_bytes)}`, `prefix cache, ${number(now.prefix_cache_sessions)} sessions`],
    [size(now.memory_active_bytes), "memory of the model and its caches"],
    [number(now.queue_full_total + now.engine_errors_total), "refused or failed"],
  ];
}

function byDepth(now) {
  const found = [];
  for (let place = 0; ; place++) {
    const count = now[`spec_decode_num_accepted_tokens_per_pos_total{position="${place}"}`];
    if (count === undefined) return found.map((kept) => kept / now.spec_decode_num_drafts_total);
    found.push(count);
  }
}
