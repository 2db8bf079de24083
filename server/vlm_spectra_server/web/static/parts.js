// Parts that several views share.

import { h, visible, short } from "./dom.js";
import { bitmap, pageInk } from "./colours.js";

/** The prompt's tokens as buttons, image tokens drawn together; `pick` gets a position. */
export function tokenStrip(prompt, chosen, pick, label) {
  const image = new Set(prompt.image_positions), parts = [];
  let run = 0;
  const rest = () => { if (run) parts.push(h("span", { className: "mute", textContent: `▦ ${run} patches ` })); run = 0; };
  prompt.tokens.forEach((token, position) => {
    if (image.has(position)) { run += 1; return; }
    rest();
    const button = h("button", { type: "button", className: "token", textContent: visible(token), title: `position ${position}`, "aria-pressed": String(position === chosen) });
    button.addEventListener("click", () => pick(position));
    parts.push(button);
  });
  rest();
  return h("div", { className: "tokens", role: "group", "aria-label": label }, ...parts);
}

/** A matrix as a picture with names; `pick(row, column)` on a click. Pointing tells the value. */
export function matrix({ values, rows, columns, down, across, scale, peak, label, pick, tell, width = 640, legend }) {
  const cell = Math.max(3, Math.min(26, Math.floor(width / columns.length))), high = Math.max(16, Math.min(cell, 22));
  const left = 44, wide = left + cell * columns.length + 12, tall = high * rows.length + 20, fine = devicePixelRatio || 1;
  const canvas = h("canvas", { width: wide * fine, height: tall * fine, tabIndex: 0, role: "img", "aria-label": label });
  canvas.style.width = `${wide}px`;
  const context = canvas.getContext("2d"), tip = h("div", { className: "tip", role: "status" });
  let at = null;
  const draw = () => {
    context.setTransform(fine, 0, 0, fine, 0, 0);
    context.clearRect(0, 0, wide, tall);
    context.imageSmoothingEnabled = false;
    context.drawImage(bitmap(values, columns.length, rows.length, scale, peak), left, 0, cell * columns.length, high * rows.length);
    context.strokeStyle = "#8886"; context.lineWidth = 1;
    context.strokeRect(left + 0.5, 0.5, cell * columns.length - 1, high * rows.length - 1);
    context.font = "11px system-ui, sans-serif";
    context.fillStyle = pageInk(); context.textAlign = "right"; context.textBaseline = "middle";
    rows.forEach((row, i) => context.fillText(String(row), left - 6, high * (i + 0.5)));
    context.textAlign = "center";
    const step = Math.ceil(26 / cell);
    columns.forEach((column, j) => { if (j % step === 0) context.fillText(String(column), left + cell * (j + 0.5), high * rows.length + 11); });
    if (!at) return;
    for (const [style, thick] of [["#fff", 4], ["#0a7d33", 2]]) {
      context.strokeStyle = style; context.lineWidth = thick;
      context.strokeRect(left + cell * at[1], high * at[0] + 1, cell, high - 2);
    }
  };
  const find = (event) => {
    const box = canvas.getBoundingClientRect();
    const j = Math.floor((event.clientX - box.left - left) / cell), i = Math.floor((event.clientY - box.top) / high);
    return i >= 0 && i < rows.length && j >= 0 && j < columns.length ? [i, j] : null;
  };
  const say = (place) => {
    tip.textContent = place ? `${down} ${rows[place[0]]}, ${tell ? tell(place[1]) : `${across} ${columns[place[1]]}`}: ${short(values[place[0] * columns.length + place[1]])}` : "";
  };
  canvas.addEventListener("mousemove", (event) => say(find(event)));
  canvas.addEventListener("mouseleave", () => say(null));
  canvas.addEventListener("click", (event) => { const place = find(event); if (place && pick) { set(place); pick(...place); } });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (step) {
      event.preventDefault();
      const next = at ? [at[0] + step[0], at[1] + step[1]] : [0, 0];
      if (next[0] >= 0 && next[0] < rows.length && next[1] >= 0 && next[1] < columns.length) { set(next); say(at); }
    } else if (event.key === "Enter" && at && pick) pick(...at);
  });
  const set = (place) => { at = place; draw(); };
  draw();
  const side = h("p", { className: "hint", textContent: `${down} by ${across}${legend ? `; ${legend}` : ""}` });
  return { element: h("div", {}, side, h("div", { className: "wide" }, canvas), tip), canvas, set };
}

/** Signed bars. */
export function bars(entries, peak, label) {
  const box = h("div", { className: "bars", role: "group", "aria-label": label, tabIndex: 0 }, ...entries.flatMap(([name, value]) => {
    const bar = h("i", { className: value < 0 ? "against" : "for" });
    bar.style.width = `${(50 * Math.abs(value || 0)) / (peak || 1)}%`;
    return [h("span", { textContent: name }), h("div", { className: "track" }, bar), h("span", { className: "n", textContent: short(value) })];
  }));
  return box;
}

/** Terms and what they are. */
export function facts(pairs) {
  return h("dl", {}, ...pairs.flatMap(([name, value]) => [h("dt", { textContent: name }), h("dd", { textContent: value })]));
}

export const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value || 0)), 0) || 1e-9;
