// What can be taken home: a PNG of what is seen, a table as CSV, all of it as JSON.

import { h } from "./dom.js";
import { pageInk, pagePaper } from "./colours.js";

export function save(blob, name) {
  const address = URL.createObjectURL(blob), link = h("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

/** Save a picture; whether there is one, for browsers make none that is too large. */
export const savePng = (canvas, name) => new Promise((made) => canvas.toBlob((blob) => {
  if (blob) save(blob, `${name}.png`);
  made(Boolean(blob));
}));
export const saveJson = (data, name) => save(new Blob([JSON.stringify(data)], { type: "application/json" }), `${name}.json`);
export const saveCsv = (rows, name) => save(new Blob([csv(rows)], { type: "text/csv" }), `${name}.csv`);

/** Rows as CSV; a text that a spreadsheet would take for a formula gets a quote before it. */
function csv(rows) {
  const cell = (value) => {
    if (typeof value === "number" || value === null || value === undefined) return value ?? "";
    const safe = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
    return /[",\n\r]/.test(safe) ? `"${safe.replace(/"/g, '""')}"` : safe;
  };
  return rows.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

const ROWS = 400; // of a table that go into a picture
const SIDE = 16_384; // pixels: what every browser takes
const GAP = 24, LINE = 20, FONT = "14px system-ui, sans-serif", BOLD = `600 ${FONT}`;

/** One picture of a view: its headline, the image on the left, its figures below each other on the right. */
export function sheet(headline, image, figures) {
  const right = figures.filter(([, canvas]) => canvas?.width), measure = h("canvas").getContext("2d");
  measure.font = BOLD;
  const left = image ? image.width + GAP : 0;
  const across = Math.max(0, ...right.map(([caption, canvas]) => Math.max(canvas.width, measure.measureText(caption).width)));
  const down = right.reduce((whole, [caption, canvas]) => whole + canvas.height + GAP + (caption ? LINE + 6 : 0), 0);
  const top = LINE + 2 * GAP;
  const wide = Math.max(left + across, measure.measureText(headline).width) + 2 * GAP, high = top + Math.max(image?.height || 0, down) + GAP;
  const fit = Math.min(1, SIDE / wide, SIDE / high);
  const canvas = h("canvas", { width: wide * fit, height: high * fit }), context = canvas.getContext("2d");
  context.scale(fit, fit);
  context.fillStyle = pagePaper();
  context.fillRect(0, 0, wide, high);
  context.fillStyle = pageInk(); context.font = BOLD; context.textBaseline = "middle";
  context.fillText(headline, GAP, GAP + LINE / 2);
  if (image) context.drawImage(image, GAP, top);
  let y = top;
  for (const [caption, figure] of right) {
    if (caption) { context.fillText(caption, GAP + left, y + LINE / 2); y += LINE + 6; }
    context.drawImage(figure, GAP + left, y);
    y += figure.height + GAP;
  }
  return canvas;
}

function drawn(width, height, draw) {
  const canvas = h("canvas", { width: Math.ceil(width), height: Math.ceil(height) }), context = canvas.getContext("2d");
  context.font = FONT; context.textBaseline = "middle"; context.fillStyle = pageInk();
  draw(context);
  return canvas;
}

/** Rows of texts as a picture, the first of many; `under(row, column)` may give the colour of a line below a cell. */
export function tablePicture(all, under = () => null) {
  const rows = all.slice(0, ROWS), more = all.length > ROWS ? `… and ${all.length - ROWS} more rows: the CSV has all` : "";
  const measure = h("canvas").getContext("2d");
  measure.font = FONT;
  const widths = rows[0].map((_, j) => Math.min(360, Math.max(...rows.map((row) => measure.measureText(row[j] ?? "").width)) + 20));
  const lefts = widths.map((_, j) => widths.slice(0, j).reduce((whole, width) => whole + width, 0));
  const wide = Math.max(measure.measureText(more).width, widths.reduce((whole, width) => whole + width, 0));
  return drawn(wide, (rows.length + Boolean(more)) * (LINE + 4), (context) => {
    context.fillText(more, 0, rows.length * (LINE + 4) + LINE / 2);
    rows.forEach((row, i) => row.forEach((text, j) => {
      const y = i * (LINE + 4), colour = under(i, j);
      context.fillText(text ?? "", lefts[j], y + LINE / 2, widths[j] - 12);
      if (!colour) return;
      context.save();
      context.fillStyle = colour;
      context.fillRect(lefts[j], y + LINE - 1, widths[j] - 12, 3);
      context.restore();
    }));
  });
}

/** Signed bars as a picture. */
export function barsPicture(entries, peak, colours) {
  const measure = h("canvas").getContext("2d");
  measure.font = FONT;
  const names = Math.max(...entries.map(([name]) => measure.measureText(name).width)) + 12, half = 110;
  return drawn(names + 2 * half + 90, entries.length * LINE, (context) => entries.forEach(([name, value, said], i) => {
    const y = i * LINE, length = (half * Math.abs(value || 0)) / (peak || 1);
    context.fillStyle = pageInk();
    context.fillText(name, 0, y + LINE / 2);
    context.fillText(said, names + 2 * half + 8, y + LINE / 2);
    context.fillStyle = `rgb(${colours[value < 0 ? 1 : 0]})`;
    context.fillRect(names + half - (value < 0 ? length : 0), y + 3, length, LINE - 6);
  }));
}
