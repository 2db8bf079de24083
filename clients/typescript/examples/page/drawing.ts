/** Pictures and tables of what a model does. */
import type { Point, Tensor } from "@vlm-spectra/client/web";

/** A picture on a canvas of at most that width, and something painted over it; the canvas counts in the picture's pixels. */
export async function pictured(picture: Blob, paint: (canvas: CanvasRenderingContext2D) => void, width = 420): Promise<HTMLCanvasElement> {
  const bitmap = await createImageBitmap(picture);
  const canvas = document.createElement("canvas");
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  canvas.style.width = `${Math.min(width, bitmap.width)}px`;
  const context = canvas.getContext("2d");
  if (context === null) {
    throw new Error("this browser draws no pictures");
  }
  context.drawImage(bitmap, 0, 0);
  paint(context);
  return canvas;
}

/** A cross at a point, if there is one. */
export function cross(context: CanvasRenderingContext2D, point: Point | undefined): void {
  if (point === undefined) {
    return;
  }
  const size = Math.max(context.canvas.width, context.canvas.height) / 24;
  for (const [color, width] of [["white", size / 2.5], ["crimson", size / 5]] as const) {
    context.strokeStyle = color;
    context.lineWidth = width;
    context.lineCap = "round";
    context.beginPath();
    context.moveTo(point.x - size, point.y);
    context.lineTo(point.x + size, point.y);
    context.moveTo(point.x, point.y - size);
    context.lineTo(point.x, point.y + size);
    context.stroke();
  }
}

/** A grid [rows, columns] over the picture: darkened where it is low, as it is where it is highest. */
export function heat(context: CanvasRenderingContext2D, grid: Tensor): void {
  const [rows, columns] = grid.shape;
  const values = grid.toFloat32();
  const most = values.reduce((a, b) => Math.max(a, b), 0);
  const [across, down] = [context.canvas.width / columns, context.canvas.height / rows];
  const edge = (at: number, size: number): number => Math.round(at * size); // whole pixels: no seams
  values.forEach((value, at) => {
    const share = most > 0 ? value / most : 0;
    context.fillStyle = `rgb(${Math.round(20 + 235 * share)} ${Math.round(24 + 130 * share)} ${Math.round(70 - 50 * share)} / ${0.82 - 0.32 * share})`;
    const [row, column] = [Math.floor(at / columns), at % columns];
    const [x, y] = [edge(column, across), edge(row, down)];
    context.fillRect(x, y, edge(column + 1, across) - x, edge(row + 1, down) - y);
  });
}

/** A picture with a line under it. */
export function figure(picture: HTMLElement, caption: string): HTMLElement {
  const made = document.createElement("figure");
  const line = document.createElement("figcaption");
  line.textContent = caption;
  made.append(picture, line);
  return made;
}

/** What stands in a cell of a table, and how sure it is. */
export interface Entry {
  readonly text: string;
  readonly share: number;
}

/** Rows of entries, shaded by their shares. */
export function table(head: readonly string[], names: readonly (string | number)[], rows: readonly (readonly Entry[])[]): HTMLElement {
  const made = document.createElement("table");
  const cell = (row: HTMLTableRowElement, kind: "td" | "th", text: string): HTMLElement => {
    const each = document.createElement(kind);
    each.textContent = text;
    return row.appendChild(each);
  };
  const first = made.createTHead().insertRow();
  cell(first, "th", "layer");
  head.forEach((text) => cell(first, "th", visible(text)));
  const body = made.createTBody();
  rows.forEach((entries, at) => {
    const row = body.insertRow();
    cell(row, "th", String(names[at]));
    for (const { text, share } of entries) {
      const each = cell(row, "td", visible(text));
      each.title = share.toPrecision(6);
      each.style.background = `color-mix(in srgb, var(--accent) ${Math.round(60 * share)}%, transparent)`;
    }
  });
  const frame = document.createElement("div");
  frame.className = "scroll";
  frame.append(made);
  return frame;
}

/** A token's text with its white space to be seen. */
function visible(text: string): string {
  return text.replaceAll(" ", "\u00b7").replaceAll("\n", "\u23ce");
}
