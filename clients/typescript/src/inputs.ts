/** Prompts, and what a model makes of them. */
import type { Connection } from "./connection.js";
import { InvalidImageError, InvalidInputError } from "./errors.js";
import type { ImageLayout as LayoutMessage, PreparedRow } from "./gen/vlm_spectra/v1/inputs_pb.js";
import { type Box, type Overlap, positionsIn, tokensIn } from "./spatial.js";
import { Tensor, type TensorLike } from "./tensor.js";

/** An image as a file (PNG, JPEG, WebP, ...): its bytes, a `Blob` or `File`, or its name: a path in Node, an address in a browser. */
export type ImageLike = Uint8Array | Blob | string;

/** An image's bytes with their hash. */
export interface Picture {
  readonly sha256: string;
  readonly data: Uint8Array;
}

/** What a batch row asks. */
export interface Prompt {
  readonly task: string;
  readonly images: readonly Picture[];
  readonly assistantPrefill: string;
  readonly system: string;
}

/** What a batch row asks, as a caller says it. */
export interface PromptLike {
  /** What the user asks. */
  task: string;
  /** One image or several, in order. */
  images?: ImageLike | readonly ImageLike[];
  /** Text that the answer begins with. */
  assistantPrefill?: string;
  /** A system message; the model's own default where absent. */
  system?: string;
}

/** Width and height in pixels. */
export type Size = readonly [width: number, height: number];

/** A part of an image that became a grid of tokens. */
export interface Tile {
  readonly grid: readonly [rows: number, columns: number];
  /** What it shows of the original; beyond it where it was padded. */
  readonly box: Box;
  readonly positions: readonly number[];
  /** Row and column of its first token in the image's grid. */
  readonly origin: readonly [row: number, column: number];
  /** It is a coarser look at the whole image, and no part of the image's grid. */
  readonly overview: boolean;
  /** Every token stands for the whole box. */
  readonly resampled: boolean;
}

/** How an image became tokens. */
export interface ImageLayout {
  /** The batch row. */
  readonly row: number;
  readonly originalSize: Size;
  readonly processedSize: Size;
  readonly grid: readonly [rows: number, columns: number];
  /** The sequence positions of its tokens, in order. */
  readonly positions: readonly number[];
  readonly tiles: readonly Tile[];
  /** Rows and columns of patches of each view that the vision tower has. */
  readonly patchGrids: readonly (readonly [rows: number, columns: number])[];
}

/** A prepared batch. Rows have the same length; shorter prompts are padded on the left. */
export class Inputs {
  readonly inputIds: readonly (readonly number[])[];
  readonly attentionMask: readonly (readonly number[])[];
  readonly tokenLabels: readonly (readonly string[])[];
  /** [batch] the formatted prompts. */
  readonly text: readonly string[];

  constructor(
    readonly prompts: readonly Prompt[],
    rows: readonly PreparedRow[],
    readonly images: readonly ImageLayout[],
  ) {
    this.inputIds = rows.map((row) => row.inputIds);
    this.attentionMask = rows.map((row) => row.attentionMask);
    this.tokenLabels = rows.map((row) => row.tokenLabels);
    this.text = rows.map((row) => row.text);
  }

  /** The images of one batch row. */
  imagesOf(row: number): ImageLayout[] {
    return this.images.filter((image) => image.row === row);
  }

  /** The tokens that look at a box in an image, in original pixels, with the share of each that it covers. */
  tokensIn(region: Box, image = 0): Overlap[] {
    return tokensIn(layoutNumber(this.images, image), region);
  }

  /** The sequence positions of the tokens that look at a box in an image, in original pixels. */
  positionsIn(region: Box, image = 0, atLeast = 0): number[] {
    return positionsIn(layoutNumber(this.images, image), region, atLeast);
  }
}

/** Prompts with their images read and hashed. */
export async function readPrompts(prompts: readonly PromptLike[], connection: Connection): Promise<Prompt[]> {
  return Promise.all(
    prompts.map(async ({ task, images = [], assistantPrefill = "", system = "" }) => {
      if (task.trim() === "") {
        throw new InvalidInputError("the task is empty: write what the model is to do.", { field: "task" });
      }
      const list = isImage(images) ? [images] : images;
      return { task, images: await Promise.all(list.map((image) => readImage(image, connection))), assistantPrefill, system };
    }),
  );
}

/** Whether a value is one image, and not several. */
export function isImage(images: ImageLike | readonly ImageLike[]): images is ImageLike {
  return typeof images === "string" || images instanceof Uint8Array || images instanceof Blob;
}

async function readImage(image: ImageLike, connection: Connection): Promise<Picture> {
  let data: Uint8Array;
  try {
    if (typeof image === "string") {
      data = await connection.readImage(image);
    } else {
      data = image instanceof Blob ? new Uint8Array(await image.arrayBuffer()) : image;
    }
  } catch (error) {
    const name = typeof image === "string" ? ` ${image}` : "";
    throw new InvalidImageError(`the image${name} cannot be read: ${String(error)}.`, { field: "image", cause: error });
  }
  return { sha256: connection.sha256(data), data };
}

/** A layout from its message. */
export function layoutFromWire(message: LayoutMessage): ImageLayout {
  const { row, original, processed, gridHeight, gridWidth, positions } = message;
  const originalSize: Size = [original?.width ?? 0, original?.height ?? 0];
  const grid = [gridHeight, gridWidth] as const;
  const tiles: Tile[] = message.tiles.map((tile) => ({
    grid: [tile.gridHeight, tile.gridWidth],
    box: [tile.box?.left ?? 0, tile.box?.top ?? 0, tile.box?.right ?? 0, tile.box?.bottom ?? 0],
    positions: tile.positions,
    origin: [tile.firstRow, tile.firstColumn],
    overview: tile.overview,
    resampled: tile.resampled,
  }));
  if (tiles.length === 0) {
    tiles.push({ grid, box: [0, 0, ...originalSize], positions, origin: [0, 0], overview: false, resampled: false });
  }
  return {
    row,
    originalSize,
    processedSize: [processed?.width ?? 0, processed?.height ?? 0],
    grid,
    positions,
    tiles,
    patchGrids: message.patchRows.map((rows, i) => [rows, message.patchColumns[i] ?? 0] as const),
  };
}

/** The sequence positions of an image's grid, in raster order. */
export function rasterOf(layout: ImageLayout): number[] {
  const [rows, columns] = layout.grid;
  const cells = new Array<number>(rows * columns).fill(-1);
  for (const tile of layout.tiles.filter((each) => !each.overview)) {
    tile.positions.forEach((position, i) => {
      const row = tile.origin[0] + Math.floor(i / tile.grid[1]);
      cells[row * columns + tile.origin[1] + (i % tile.grid[1])] = position;
    });
  }
  return cells;
}

/** An image's layout by its number over all rows. */
export function layoutNumber(images: readonly ImageLayout[], image: number): ImageLayout {
  if (!(image in images)) {
    throw new InvalidInputError(`there is no image ${image}: the inputs have ${images.length}.`, { field: "image" });
  }
  return images[image];
}

/** Values over sequence positions, [seq, ...], laid out as an image's token grid, [rows, columns, ...], or a tile's. */
export function onGrid(values: TensorLike, layout: ImageLayout, tile?: number): Tensor {
  const part = tile === undefined ? undefined : layout.tiles[tile];
  if (tile !== undefined && part === undefined) {
    throw new InvalidInputError(`there is no tile ${tile}: the image has ${layout.tiles.length}.`, { field: "tile" });
  }
  const tensor = Tensor.from(values);
  const positions = part?.positions ?? rasterOf(layout);
  const end = Math.max(...positions);
  if ((tensor.shape.at(0) ?? 0) <= end) {
    throw new InvalidInputError(
      `a grid is made of values for each position of the sequence, [seq, ...], and the image ends at ${end}; this tensor is [${tensor.shape.join(", ")}].`,
      { field: "values" },
    );
  }
  return tensor.gather(positions, part?.grid ?? layout.grid);
}
