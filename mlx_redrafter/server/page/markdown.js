// Markdown of a finished text. HTML in it stays text; what is left goes through DOMPurify, the only
// one that may make markup here.

import { Marked } from "./vendor/marked.js";
import { button, copy, h } from "./dom.js";

const SIGNS = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escaped = (text) => text.replace(/[&<>"']/g, (sign) => SIGNS[sign]);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text, block }) => (block ? `<p>${escaped(text)}</p>` : escaped(text)),
    image: ({ raw }) => escaped(raw), // it would be fetched
    code: ({ text, lang }) => `<pre data-language="${escaped((lang ?? "").slice(0, 20))}">${escaped(text)}</pre>`,
    checkbox: ({ checked }) => (checked ? "\u2611 " : "\u2610 "),
  },
});

const ALLOWED = {
  ALLOWED_TAGS: ["p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "em", "del", "code", "pre", "ul",
    "ol", "li", "blockquote", "table", "thead", "tbody", "tr", "th", "td", "a"],
  ALLOWED_ATTR: ["href", "start", "align", "data-language"],
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

export function markdown(text) {
  const found = h("div", { class: "markdown" }, window.DOMPurify.sanitize(marked.parse(text), ALLOWED));
  for (const link of found.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  for (const code of found.querySelectorAll("pre")) withCopy(code);
  for (const table of found.querySelectorAll("table")) {
    const scrolled = h("div", { class: "wide", tabindex: "0" });
    table.replaceWith(scrolled);
    scrolled.append(table);
  }
  return found;
}

function withCopy(code) {
  const language = code.dataset.language;
  const copying = button("Copy", () => copy(code.textContent, copying), { class: "quiet", "aria-label": "Copy code" });
  const box = h("div", { class: "code" }, h("p", {}, h("span", { class: "dim" }, language), copying));
  code.tabIndex = 0;
  code.replaceWith(box);
  box.append(code);
}
