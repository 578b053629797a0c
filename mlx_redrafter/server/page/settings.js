// How answers are drawn: what a person leaves open is the server's choice.

import { $, button, h, keep, kept } from "./dom.js";

const NUMBERS = [
  ["temperature", "Temperature", "0 takes the likeliest token; more varies.", 0, 5, 0.1],
  ["top_p", "Top p", "Keep the likeliest tokens up to this share.", 0, 1, 0.05],
  ["top_k", "Top k", "Keep this many of the likeliest; 0: off.", 0, 1000, 1],
  ["min_p", "Min p", "Drop tokens less likely than this share of the likeliest.", 0, 1, 0.01],
  ["repetition_penalty", "Repetition penalty", "Makes used tokens less likely; 1 is off.", 0.1, 5, 0.05],
  ["max_tokens", "Longest answer, in tokens", "Empty: to the end of the context.", 1, 1000000, 1],
  ["seed", "Seed", "The same seed gives the same text, drafted or not.", 0, 4294967295, 1],
];

const USUAL = { system: "", stop: "", drafting: "", thinking: "" };
let values = kept("settings", USUAL);

// The fields of a request.
export function sampling() {
  const body = {};
  for (const [name] of NUMBERS) {
    if (values[name] !== undefined && values[name] !== "") body[name] = Number(values[name]);
  }
  const stops = values.stop.split("\n").filter(Boolean);
  if (stops.length) body.stop = stops;
  if (values.thinking) body.reasoning_effort = values.thinking;
  if (values.drafting === "off") body.x_redrafter = { draft: false };
  else if (values.drafting) body.x_redrafter = { draft: true, tree: values.drafting };
  return body;
}

export const systemPrompt = () => values.system;

export function openSettings() {
  const field = (name, label, control, hint) => {
    control.name = name;
    control.value = values[name] ?? "";
    return h("label", {}, label, control, hint && h("small", { class: "dim" }, hint));
  };
  const choice = (options) => h("select", {}, options.map(([value, text]) => h("option", { value }, text)));
  const numbers = NUMBERS.map(([name, label, hint, min, max, step]) =>
    field(name, label, h("input", { type: "number", min, max, step: step < 1 ? "any" : step, placeholder: "the server's" }), hint));
  const form = h("form", { method: "dialog" },
    h("h2", { id: "settings-title" }, "Settings"),
    field("system", "System prompt of new conversations", h("textarea", { rows: 2 })),
    h("div", { class: "fields" }, numbers,
      field("stop", "Stop at these texts, one a line", h("textarea", { rows: 2 })),
      field("drafting", "Drafting", choice([["", "what pays here"], ["off", "off: plain decoding"], ["1x4", "a chain of 4"],
        ["3x4/8", "beam 3x4, 8 nodes"], ["4x5/16", "beam 4x5, 16 nodes"]]), "Never changes the text."),
      field("thinking", "Thinking", choice([["", "as the model has it"], ["none", "off"], ["low", "little"], ["high", "much"]]))),
    h("p", { class: "row" }, h("button", { class: "main" }, "Done"),
      button("All as the server has it", () => {
        values = { ...USUAL };
        for (const control of form.elements) if (control.name) control.value = "";
      })));
  form.addEventListener("input", (event) => {
    values[event.target.name] = event.target.value;
  });
  const dialog = h("dialog", { "aria-labelledby": "settings-title", class: "settings" }, form);
  dialog.addEventListener("close", () => {
    for (const control of form.elements) if (control.name && !control.checkValidity()) values[control.name] = "";
    keep("settings", values);
    dialog.remove();
  });
  $("main").append(dialog);
  dialog.showModal();
}
