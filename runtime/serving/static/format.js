// Numbers and tokens as they are shown.

/** A probability: whole per cents, and tenths where it is small. */
export function percent(probability) {
  const share = 100 * probability;
  if (share > 0 && share < 0.1) return "<0.1%";
  return `${share >= 9.95 ? Math.round(share) : Math.round(10 * share) / 10}%`;
}

export const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

export const seconds = (value) => `${value.toFixed(value < 10 ? 2 : 1)} s`;

const NAMES = { "\n": "⏎", "\r": "␍", "\t": "⇥", " ": "·" };

/** A token alone, with its white space made visible, and no longer than `most` characters. */
export function visible(text, most = 14) {
  if (text === "") return "∅";
  const shown = [...text].map((c) => NAMES[c] ?? (/\p{C}/u.test(c) ? "�" : c));
  return shown.length > most ? `${shown.slice(0, most - 1).join("")}…` : shown.join("");
}

/** Make an element with these properties, attributes (a null one is left out) and children, texts as text. */
export function element(name, { attributes = {}, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** The same for a part of a picture. */
export function drawn(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
