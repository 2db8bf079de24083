// The colour scales of the Python pictures, and drawing with them.

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

const styled = (name) => getComputedStyle(document.querySelector(".card"))[name];
export const pageInk = () => styled("color");
export const pagePaper = () => styled("backgroundColor");

/** The colour of a place on a scale: 0 to 1, or -1 to 1 for "signed". */
export function colour(place, scale) {
  return table(scale)[step(scale === "signed" ? (place + 1) / 2 : place)];
}

const table = (scale) => tables[isDark() && tables[`${scale}-dark`] ? `${scale}-dark` : scale];
const step = (share) => Math.round(Math.min(Math.max(share || 0, 0), 1) * (STEPS - 1));
const word = (red, green, blue, opacity) => ((opacity << 24) | (blue << 16) | (green << 8) | red) >>> 0;
const MISSING = word(128, 128, 128, 40);

/** Values as pixels, on a canvas of their own: `cell` tells which value a pixel shows, none below 0. */
export function bitmap(values, width, height, scale, peak, cell = (pixel) => pixel) {
  const canvas = document.createElement("canvas");
  canvas.width = width; canvas.height = height;
  const data = new ImageData(width, height), pixels = new Uint32Array(data.data.buffer);
  const words = table(scale).map((mixed) => word(...mixed, 255)), signed = scale === "signed";
  for (let i = 0; i < pixels.length; i++) {
    const number = cell(i);
    if (number < 0) continue;
    const value = values[number];
    pixels[i] = value === null || value === undefined || Number.isNaN(value) ? MISSING : words[step(signed ? (value / peak + 1) / 2 : value / peak)];
  }
  canvas.getContext("2d").putImageData(data, 0, 0);
  return canvas;
}
