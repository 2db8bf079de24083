/** Points that a model writes, in the pixels of the image it was shown; the forms are those of the Python client. */
import type { ImageLayout } from "./inputs.js";

/** A point in pixels of the original image. */
export interface Point {
  readonly x: number;
  readonly y: number;
}

const NUMBER = String.raw`(-?\d+(?:\.\d+)?)`;
const GAP = String.raw`(?:\s*,\s*|\s+)`;
/** Two numbers, or the four of a box. */
const NUMBERS = `${NUMBER}${GAP}${NUMBER}(?:${GAP}${NUMBER}${GAP}${NUMBER})?`;
const BRACKETED = String.raw`[(\[]\s*${NUMBERS}\s*[)\]]`;
const KEY = `["'](?:point_2d|point|bbox_2d|bbox|box|coordinates?|click)["']`;

/** The forms, surest first. */
const FORMS = [
  String.raw`(?:start_box|point)\s*=\s*['"]?\s*(?:<\|box_start\|>|<point>)?\s*[(\[]?\s*${NUMBERS}`,
  String.raw`<\|box_start\|>\s*${BRACKETED}`,
  String.raw`<point>\s*${NUMBERS}\s*</point>`,
  String.raw`${KEY}\s*:\s*${BRACKETED}`,
  String.raw`["']x["']\s*:\s*${NUMBER}\s*,\s*["']y["']\s*:\s*${NUMBER}`,
  BRACKETED,
].map((form) => new RegExp(form, "i"));

/** The first point in a text, in the coordinates the text uses. */
export function findPoint(text: string): Point | undefined {
  for (const form of FORMS) {
    const found = form.exec(text);
    if (found !== null) {
      const numbers = found.slice(1).flatMap((each: string | undefined) => (each === undefined ? [] : [Number(each)]));
      const [a, b, c, d] = numbers;
      return numbers.length < 4 ? { x: a, y: b } : { x: (a + c) / 2, y: (b + d) / 2 };
    }
  }
  return undefined;
}

/** The first point in an answer, in pixels of the last image of its prompt; undefined where there is none. */
export function findClick(text: string, images: readonly ImageLayout[], thousandths: boolean): Point | undefined {
  const point = findPoint(text);
  const screen = images.at(-1);
  if (point === undefined || screen === undefined) {
    return undefined;
  }
  const [width, height] = screen.originalSize;
  const [across, down] = thousandths ? [1000, 1000] : screen.processedSize;
  return { x: (point.x * width) / across, y: (point.y * height) / down };
}
