"use strict";
// What every script of a page needs: the light or dark switch, making elements, and showing texts safely. Texts of models
// and problems are inserted as text nodes only.
const Page = (() => {
  const root = document.documentElement;
  for (const button of document.querySelectorAll("[data-theme-switch]"))
    button.addEventListener("click", () => {
      const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = dark ? "light" : "dark";
    });

  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const svg = (tag, attributes = {}, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  // Control characters and direction marks are shown as escapes. Whitespace is shown as symbols in quoted texts and in
  // tokens that contain nothing else.
  const escaped = (text) => text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g,
    (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
  const quoted = (text) => "\u201c" + escaped(text).replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5").replace(/ /g, "\u2423") + "\u201d";
  const signed = (x, digits = 2) => (x < 0 ? "\u2212" : "+") + Math.abs(x).toFixed(digits);
  const json = (id) => { const element = document.getElementById(id); return element ? JSON.parse(element.textContent) : null; };
  return { make, svg, escaped, quoted, signed, json };
})();
