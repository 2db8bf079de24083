// The colour scales of the Python pictures, and drawing matrices with them.

export const WARM = [213, 94, 0], COLD = [0, 114, 178];
const STEPS = 256, tables = {};

export async function loadScales() {
  for (const [name, anchors] of Object.entries(await (await fetch("/scales.json")).json())) {
    const parts = anchors.map((c) => [1, 3, 5].map((k) => parseInt(c.slice(k, k + 2), 16)));
    tables[name] = Array.from({ length: STEPS }, (_, s) => {
      const place = (s / (STEPS - 1)) * (parts.length - 1), low = Math.min(Math.floor(place), parts.length - 2);
      return parts[low].map((c, k) => Math.round(c + (parts[low + 1][k] - c) * (place - low)));
    });
  }
}

export const isDark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};

/** The colour of a place on a scale: 0 to 1, or -1 to 1 for "signed". */
export function colour(place, scale) {
  return table(scale)[step(scale === "signed" ? (place + 1) / 2 : place)];
}

const table = (scale) => tables[scale === "amount" && isDark() ? "amount-dark" : scale];
const step = (share) => Math.round(Math.min(Math.max(share || 0, 0), 1) * (STEPS - 1));
const word = (red, green, blue, opacity) => ((opacity << 24) | (blue << 16) | (green << 8) | red) >>> 0;

/** A matrix as pixels: values [rows * columns], null for what is not there yet. */
export function bitmap(values, rows, columns, scale, peak) {
  const canvas = document.createElement("canvas");
  canvas.width = columns; canvas.height = rows;
  const data = new ImageData(columns, rows), pixels = new Uint32Array(data.data.buffer);
  const words = table(scale).map((mixed) => word(...mixed, 255)), missing = word(128, 128, 128, 40), signed = scale === "signed";
  for (let i = 0; i < pixels.length; i++) {
    const value = values[i];
    pixels[i] = value === null || value === undefined || Number.isNaN(value) ? missing : words[step(signed ? (value / peak + 1) / 2 : value / peak)];
  }
  canvas.getContext("2d").putImageData(data, 0, 0);
  return canvas;
}
