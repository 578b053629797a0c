// Screens, theme, keys.

import { json } from "./api.js";
import { chat, focusInput } from "./chat.js";
import { $, keep, kept, trouble } from "./dom.js";
import { long } from "./long.js";
import { race } from "./race.js";
import { server } from "./server.js";
import { tree } from "./tree.js";

const talking = chat();
const SCREENS = { chat: talking, tree: tree(), race: race(), long: long(), server: server() };

function go() {
  const asked = location.hash.slice(1), name = Object.hasOwn(SCREENS, asked) ? asked : "chat";
  for (const [other, { screen, hidden }] of Object.entries(SCREENS)) {
    if (!screen.hidden && other !== name) hidden?.();
    screen.hidden = other !== name;
  }
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${document.querySelector("nav a[aria-current]")?.textContent} \u00b7 mlx-redrafter`;
  SCREENS[name].shown?.();
}

const THEMES = { auto: "System", light: "Light", dark: "Dark" };
let { theme } = kept("look", { theme: "auto" });

function look() {
  if (theme === "auto") document.documentElement.removeAttribute("data-theme");
  else document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Colours: ${THEMES[theme].toLowerCase()}`;
}

$("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  theme = names[(names.indexOf(theme) + 1) % names.length];
  keep("look", { theme });
  look();
});
$("help").addEventListener("click", () => $("keys").showModal());

addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, textarea, select");
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") Object.values(SCREENS).find(({ screen }) => !screen.hidden)?.stop?.();
  else if (event.key === "/" && !typing) {
    event.preventDefault();
    location.hash = "chat";
    focusInput();
  } else if (event.key === "?" && !typing) $("keys").showModal();
  else if (event.altKey && event.code === "KeyN") {
    event.preventDefault();
    location.hash = "chat";
    talking.begin();
  } else if (event.altKey && /^Digit[1-5]$/.test(event.code)) {
    event.preventDefault();
    document.querySelectorAll("nav a")[event.code.at(-1) - 1].click();
  }
});

look();
$("main").append(...Object.values(SCREENS).map(({ screen }) => screen));
addEventListener("hashchange", go);
go();
try {
  const { data: [model] } = await json("v1/models");
  $("model").textContent = model.id;
} catch (error) {
  trouble(error);
}
