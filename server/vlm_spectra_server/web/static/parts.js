// Parts that several views share.

import { h, visible, short } from "./dom.js";
import { bitmap } from "./colours.js";

/** The prompt's tokens as buttons, image tokens drawn together; `pick` gets a position. */
export function tokenStrip(prompt, chosen, pick, label) {
  const image = new Set(prompt.image_positions), parts = [];
  let run = 0;
  prompt.tokens.forEach((token, position) => {
    if (image.has(position)) { run += 1; return; }
    if (run) { parts.push(h("span", { className: "mute", textContent: `▦ ${run} patches ` })); run = 0; }
    const button = h("button", { type: "button", className: "token", textContent: visible(token), title: `position ${position}`, "aria-pressed": String(position === chosen) });
    button.addEventListener("click", () => pick(position));
    parts.push(button);
  });
  if (run) parts.push(h("span", { className: "mute", textContent: `▦ ${run} patches ` }));
  return h("div", { className: "tokens", role: "group", "aria-label": label }, ...parts);
}

/** A matrix as a picture with names; `pick(row, column)` on a click. Pointing tells the value. */
export function matrix({ values, rows, columns, down, across, scale, peak, label, pick, tell, chosen, width = 640, legend }) {
  const cell = Math.max(3, Math.min(26, Math.floor(width / columns.length))), high = Math.max(16, Math.min(cell, 22));
  const left = 44, bottom = 18;
  const canvas = h("canvas", { width: left + cell * columns.length + 1, height: high * rows.length + bottom, tabIndex: 0, role: "img", "aria-label": label });
  const context = canvas.getContext("2d"), tip = h("div", { className: "tip", role: "status" });
  let at = chosen || null;
  const draw = () => {
    const ink = getComputedStyle(document.body).color;
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.imageSmoothingEnabled = false;
    context.drawImage(bitmap(values, rows.length, columns.length, scale, peak), left, 0, cell * columns.length, high * rows.length);
    context.font = "11px system-ui, sans-serif";
    context.fillStyle = ink; context.textAlign = "right"; context.textBaseline = "middle";
    rows.forEach((row, i) => context.fillText(String(row), left - 5, high * (i + 0.5)));
    context.textAlign = "center";
    const step = Math.ceil(22 / cell);
    columns.forEach((column, j) => { if (j % step === 0) context.fillText(String(column), left + cell * (j + 0.5), high * rows.length + 10); });
    if (at) { context.strokeStyle = "#0a7d33"; context.lineWidth = 2; context.strokeRect(left + cell * at[1] + 1, high * at[0] + 1, cell - 2, high - 2); }
  };
  const find = (event) => {
    const box = canvas.getBoundingClientRect();
    const j = Math.floor((event.clientX - box.left - left) / cell), i = Math.floor((event.clientY - box.top) / high);
    return i >= 0 && i < rows.length && j >= 0 && j < columns.length ? [i, j] : null;
  };
  const say = (place) => {
    tip.textContent = place ? `${down} ${rows[place[0]]}, ${tell ? tell(place[1]) : `${across} ${columns[place[1]]}`}: ${short(values[place[0] * columns.length + place[1]])}` : "";
  };
  canvas.addEventListener("mousemove", (e) => say(find(e)));
  canvas.addEventListener("mouseleave", () => say(null));
  canvas.addEventListener("click", (e) => { const place = find(e); if (place && pick) pick(...place); });
  canvas.addEventListener("keydown", (e) => {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[e.key];
    if (step) {
      e.preventDefault();
      const next = at ? [at[0] + step[0], at[1] + step[1]] : [0, 0];
      if (next[0] >= 0 && next[0] < rows.length && next[1] >= 0 && next[1] < columns.length) { at = next; draw(); say(at); }
    } else if (e.key === "Enter" && at && pick) pick(...at);
  });
  draw();
  const side = h("div", { className: "mute" }, `${down} by ${across}${legend ? `; ${legend}` : ""}`);
  const element = h("div", {}, side, h("div", { className: "wide" }, canvas), tip);
  return { element, canvas, draw, set: (place) => { at = place; draw(); } };
}

/** Signed bars. */
export function bars(entries, peak) {
  return h("div", { className: "bars" }, ...entries.flatMap(([name, value]) => {
    const bar = h("i", { className: value < 0 ? "against" : "for" });
    bar.style.width = `${(50 * Math.abs(value || 0)) / (peak || 1)}%`;
    return [h("span", { textContent: name }), h("div", { className: "track" }, bar), h("span", { className: "n", textContent: short(value) })];
  }));
}

/** Terms and what they are. */
export function facts(pairs) {
  return h("dl", {}, ...pairs.flatMap(([name, value]) => [h("dt", { textContent: name }), h("dd", { textContent: value })]));
}
