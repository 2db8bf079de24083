// Elements, from texts only: nothing that came from a prompt or a model is ever read as markup.

export const $ = (id) => document.getElementById(id);

/** An element with properties, attributes (names with a dash, or role) and children. */
export function h(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "for" || name === "list") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** A text in which the characters that turn what follows them around are marked by their codes. */
export const unturned = (text, mark) =>
  text.replace(/[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, (each) => mark(each.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")));

/** A token as one sees it. */
export function visible(text) {
  const shown = unturned(text, (code) => `⟨U+${code}⟩`).replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍");
  return shown.replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length)) || "∅";
}

/** The same within a sentence, whichever way it is written. */
export const isolated = (text) => `\u2068${visible(text)}\u2069`;

/** A number, short. */
export function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  return size >= 1e5 || size < 0.001 ? value.toExponential(2) : String(+value.toPrecision(3));
}

/** A place in an image, in its pixels. */
export const pixels = ({ x, y }) => [x, y].map((edge) => +edge.toFixed(1)).join(", ");

export const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 2 : 1)} %`;
