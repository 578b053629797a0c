// Elements without markup: what a text holds stays text.

export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function svg(tag, props = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(props)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export const $ = (id) => document.getElementById(id);

export function button(text, act, more = {}) {
  return h("button", { type: "button", onclick: act, ...more }, text);
}

// For screen readers: what happened, once.
export function say(text) {
  $("said").textContent = text;
}

export function trouble(error) {
  const text = error ? (error.message ?? String(error)) : "";
  $("trouble").textContent = text;
  $("trouble").hidden = !text;
}

// At most one call a frame, the last one with what there is then.
export function eased(act) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      act();
    });
  };
}

export async function copy(text, where) {
  try {
    await navigator.clipboard.writeText(text);
    say("copied");
    const before = where.textContent;
    where.textContent = "Copied";
    setTimeout(() => (where.textContent = before), 1200);
  } catch {
    trouble("the browser does not let this page copy: select the text and copy it");
  }
}

export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

const MOST = 8_000_000;

export async function textOf(file) {
  if (file.size > MOST) throw new Error(`${file.name} has ${size(file.size)}: give a text of at most ${size(MOST)}`);
  const text = await file.text();
  if (text.includes("\0")) throw new Error(`${file.name} is no text file`);
  return text;
}

export const size = (bytes) =>
  bytes < 1e3 ? `${bytes} B` : bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB`
  : bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(1)} GB`;

export const number = (value, digits = 0) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

// What a person chose, kept in this browser.
export function kept(name, usual) {
  try {
    return { ...usual, ...JSON.parse(localStorage.getItem(`redrafter.${name}`) ?? "{}") };
  } catch {
    return { ...usual };
  }
}

export function keep(name, value) {
  try {
    localStorage.setItem(`redrafter.${name}`, JSON.stringify(value));
  } catch {
    trouble("the browser's storage is full: export conversations and delete some");
  }
}
