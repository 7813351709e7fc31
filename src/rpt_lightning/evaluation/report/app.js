"use strict";
// What every part of the page uses: elements, embedded data, and light or dark.

/** An element with a class and text. Text is only ever set as text, never as HTML. */
function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

function embeddedJson(id) {
  return JSON.parse(document.getElementById(id).textContent);
}

/** The text of a block that is base64 of gzip. */
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
  let chosen = null; // null: as the system says
  try {
    chosen = localStorage.getItem("rpt-report-theme");
  } catch {
    // A browser may refuse storage to files; the choice then lasts as long as the page.
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
