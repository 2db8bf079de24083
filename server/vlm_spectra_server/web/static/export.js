// What can be taken home: PNG, CSV, JSON.

import { h } from "./dom.js";

/** Download what an address of this server has. */
export function saveFrom(address, name) {
  const link = h("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}

function save(blob, name) {
  const address = URL.createObjectURL(blob);
  saveFrom(address, name);
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

export const savePng = (canvas, name) => canvas.toBlob((blob) => save(blob, `${name}.png`));
export const saveJson = (data, name) => save(new Blob([JSON.stringify(data)], { type: "application/json" }), `${name}.json`);
export const saveText = (content, name, type) => save(new Blob([content], { type }), name);

/** Rows as CSV; a text that a spreadsheet would take for a formula gets a quote before it. */
export function csv(rows) {
  const cell = (value) => {
    if (typeof value === "number" || value === null || value === undefined) return value ?? "";
    const safe = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
    return /[",\n\r]/.test(safe) ? `"${safe.replace(/"/g, '""')}"` : safe;
  };
  return rows.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}
