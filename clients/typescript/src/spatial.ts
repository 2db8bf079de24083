/** From places in a picture to tokens and back, in pixels of the original image. */
import { InvalidInputError } from "./errors.js";
import type { ImageLayout } from "./inputs.js";

/** Left, top, right, bottom in pixels of the original image. */
export type Box = readonly [left: number, top: number, right: number, bottom: number];

/** Where an image token stands, and what it looks at. */
export interface ImageToken {
  /** Its position in the sequence. */
  readonly position: number;
  /** The number of its tile. */
  readonly tile: number;
  /** Its row and column in the tile's grid. */
  readonly row: number;
  readonly column: number;
  /** What it looks at, within the image; without area where all of that is padding. */
  readonly box: Box;
}

/** All tokens that look at a part of an image, tile by tile. */
export function imageTokens(layout: ImageLayout): ImageToken[] {
  const [width, height] = layout.originalSize;
  return layout.tiles.flatMap((tile, number) => {
    const [left, top, right, bottom] = tile.box;
    const [down, across] = [(bottom - top) / tile.grid[0], (right - left) / tile.grid[1]];
    return tile.positions.map((position, at) => {
      const [row, column] = [Math.floor(at / tile.grid[1]), at % tile.grid[1]];
      const [x, y] = [left + column * across, top + row * down];
      const box: Box = tile.resampled ? tile.box : [x, y, left + (column + 1) * across, top + (row + 1) * down];
      return { position, tile: number, row, column, box: within(box, width, height) };
    });
  });
}

/** A token that looks at a part of a region. */
export interface Overlap extends ImageToken {
  /** How much of what it looks at lies in the region, above 0, at most 1. */
  readonly fraction: number;
}

/** The tokens that look at a box, of every tile, tile by tile. */
export function tokensIn(layout: ImageLayout, region: Box): Overlap[] {
  const edges: unknown = region;
  if (!Array.isArray(edges) || edges.length !== 4 || !edges.every(Number.isFinite)) {
    throw new InvalidInputError("a region is a box [left, top, right, bottom] in pixels of the original image.", { field: "region" });
  }
  const [left, top, right, bottom] = region;
  const [width, height] = layout.originalSize;
  if (!(left < right && top < bottom)) {
    throw new InvalidInputError(`the box (${region.join(", ")}) has no area: left is less than right and top less than bottom.`, { field: "region" });
  }
  if (left < 0 || top < 0 || right > width || bottom > height) {
    throw new InvalidInputError(`the box (${region.join(", ")}) reaches outside the image, which is ${width} x ${height} pixels.`, { field: "region" });
  }
  const share = ({ box }: ImageToken): number => {
    const area = (box[2] - box[0]) * (box[3] - box[1]);
    const across = Math.min(right, box[2]) - Math.max(left, box[0]);
    const down = Math.min(bottom, box[3]) - Math.max(top, box[1]);
    return area > 0 ? (Math.max(across, 0) * Math.max(down, 0)) / area : 0;
  };
  const tokens = imageTokens(layout).map((token) => ({ ...token, fraction: Math.min(share(token), 1) }));
  return tokens.filter((token) => token.fraction > 1e-9);
}

/** The sequence positions of the tokens of which a box covers more than nothing and at least this share. */
export function positionsIn(layout: ImageLayout, region: Box, atLeast = 0): number[] {
  return tokensIn(layout, region).flatMap((token) => (token.fraction >= atLeast ? [token.position] : []));
}

/** Where the tokens at sequence positions look, in original pixels. */
export function boxesOf(layout: ImageLayout, positions: readonly number[]): Box[] {
  const boxes = new Map(imageTokens(layout).map((token) => [token.position, token.box]));
  return positions.map((position) => {
    const box = boxes.get(position);
    if (box === undefined) {
      const [least, most] = [Math.min(...boxes.keys()), Math.max(...boxes.keys())];
      throw new InvalidInputError(`position ${position} does not look at this image; those from ${least} to ${most} do.`, { field: "positions" });
    }
    return box;
  });
}

function within(box: Box, width: number, height: number): Box {
  const between = (value: number, most: number): number => Math.min(Math.max(value, 0), most);
  return [between(box[0], width), between(box[1], height), between(box[2], width), between(box[3], height)];
}
