"use strict";
// Shared by every part of the page: elements, embedded data, and the light or dark theme.

/** Make an element with a class and text. Text is never set as HTML. */
function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

function embeddedJson(id) {
  return JSON.parse(document.getElementById(id).textContent);
}

/** Decode the text of a block: base64, then gzip. */
async function inflate(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

const runColours = embeddedJson("colours");
for (const swatch of document.querySelectorAll("[data-run]")) swatch.style.backgroundColor = runColours[swatch.dataset.run];

const theme = (() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const listeners = [];
  let chosen = null; // null: follow the system
  try {
    chosen = localStorage.getItem("rpt-report-theme");
  } catch {
    // A browser may refuse storage to files. The choice then lasts as long as the page is open.
  }

  const isDark = () => (chosen === null ? system.matches : chosen === "dark");

  function apply() {
    root.dataset.theme = isDark() ? "dark" : "light";
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
    for (const listener of listeners) listener();
  }

  button.addEventListener("click", () => {
    chosen = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("rpt-report-theme", chosen);
    } catch {
      // See above.
    }
    apply();
  });
  system.addEventListener("change", apply);
  apply();
  return { onChange: (listener) => listeners.push(listener) };
})();
