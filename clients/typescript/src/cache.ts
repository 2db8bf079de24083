/** The activations of one run, by hook name. */
import type { Cost } from "./cost.js";
import { InvalidInputError, UnknownHookError } from "./errors.js";
import { GRADIENT, matches } from "./hooks.js";
import { type Inputs, layoutNumber, onGrid, rasterOf } from "./inputs.js";
import type { CaptureReference } from "./interventions.js";
import { checkValue, type SelectionOptions, text } from "./options.js";
import type { TensorStream } from "./stream.js";
import { sizeOf, stack, type Tensor, type TensorLike } from "./tensor.js";

/** The axes of one view's scores or pattern, [heads, patches, patches], that count patches, by what was reduced. */
const SQUARE = { nothing: [1, 2], mean_heads: [0, 1], norm: [1] } as const;

/**
 * Activations that arrive while the model runs: `get` waits for one of them alone, a `for await` loop has each as it is
 * complete, and `done` waits for the rest.
 */
export class ActivationCache implements AsyncIterable<[string, Tensor]> {
  constructor(
    private readonly stream: TensorStream,
    private readonly isHook: (name: string) => boolean,
    readonly inputs: Inputs,
    private readonly reduce?: SelectionOptions["reduce"],
  ) {}

  /** The hooks of this cache, come or still to come, in execution order. */
  get names(): string[] {
    return this.stream.names.filter(this.isHook);
  }

  /** How many are there. */
  get size(): number {
    return this.names.filter((name) => this.stream.arrived(name)).length;
  }

  /** Bytes of all activations, come or still to come. */
  get byteCount(): number {
    return this.names.reduce((sum, name) => sum + this.stream.byteCount(name), 0);
  }

  /** The name under which the server holds this capture. */
  get captureId(): string {
    return this.stream.captureId;
  }

  /** What the call took on the server, once it has ended. */
  async cost(): Promise<Cost> {
    await this.stream.done();
    return this.stream.cost;
  }

  has(name: string): boolean {
    return this.names.includes(name);
  }

  /** An activation by its full name, as soon as it is complete. */
  async get(name: string): Promise<Tensor> {
    const tensor = this.has(name) ? await this.stream.get(name) : undefined;
    if (tensor === undefined) {
      throw this.unknown(name);
    }
    return tensor;
  }

  /** All activations that fit a wildcard, in execution order. */
  async match(pattern: string): Promise<Map<string, Tensor>> {
    checkValue("pattern", pattern, text);
    const found = this.names.filter((name) => matches(pattern, name));
    if (found.length === 0) {
      throw this.unknown(pattern);
    }
    return new Map(await Promise.all(found.map(async (name) => [name, await this.get(name)] as const)));
  }

  /** The activations that fit a wildcard, on a new first axis: [layers, ...]. */
  async stack(pattern: string): Promise<Tensor> {
    return stack([...(await this.match(pattern)).values()]);
  }

  /** The same run's outputs beside activations: `logits`, `sequences`, ... */
  async output(name: string): Promise<Tensor | undefined> {
    return this.isHook(name) ? undefined : this.stream.get(name);
  }

  /** Values over sequence positions, [seq, ...], laid out as an image's token grid, [rows, columns, ...]. */
  imageGrid(values: TensorLike, image = 0, tile?: number): Tensor {
    return onGrid(values, layoutNumber(this.inputs.images, image), tile);
  }

  /** The sequence positions of an image's tokens, in order. */
  imagePositions(image = 0): readonly number[] {
    return layoutNumber(this.inputs.images, image).positions;
  }

  /**
   * The part of a vision hook that belongs to one image, its patches as they lie in the picture: [rows, columns, ...],
   * with [views, ...] before where there are several; of scores and patterns [heads, rows, columns, rows, columns]. Class
   * tokens and padding are left out. Of `vision.hook_out` the image's grid of tokens, [rows, columns, hidden]. An axis that
   * `reduce` took is missing.
   *
   * @param view One of the image's views (tiles); all of them where absent.
   */
  async image(name: string, image = 0, view?: number): Promise<Tensor> {
    const layout = layoutNumber(this.inputs.images, image);
    const tensor = await this.get(name);
    if (!name.startsWith("vision.")) {
      throw new InvalidInputError(`${name} is no hook of the vision tower; possible are names that begin with vision.`);
    }
    if (name.startsWith("vision.hook_out")) {
      const order = rasterOf(layout).map((position) => layout.positions.indexOf(position));
      return tensor.index(image).gather(order, layout.grid);
    }
    const grids = layout.patchGrids;
    if (view === undefined && new Set(grids.map(String)).size > 1) {
      const shown = grids.map(([rows, columns]) => `${rows} x ${columns}`).join(", ");
      throw new InvalidInputError(`the views of image ${image} differ in size (${shown}); choose one by its number.`, { field: "view" });
    }
    if (!((view ?? 0) in grids)) {
      throw new InvalidInputError(`image ${image} has ${grids.length} views of known shape; there is no ${view ?? 0}.`, { field: "view" });
    }
    const first = this.inputs.images.slice(0, image).reduce((sum, each) => sum + each.patchGrids.length, 0);
    const square = /hook_(scores|pattern)$/.test(name.endsWith(GRADIENT) ? name.slice(0, -GRADIENT.length) : name);
    const axes = square ? SQUARE[this.reduce ?? "nothing"] : [0];
    const chosen = view === undefined ? grids.map((_, number) => number) : [view];
    const parts = chosen.map((number) => laidOut(tensor.index(first + number), grids[number], axes));
    return parts.length > 1 ? stack(parts) : parts[0];
  }

  /** An activation as the value of an intervention, by name: its bytes need not cross the network again. */
  reference(name: string): CaptureReference {
    if (!this.has(name)) {
      throw this.unknown(name);
    }
    return { captureId: this.captureId, hook: name };
  }

  /** Waits for all of them. */
  async done(): Promise<this> {
    await this.stream.done();
    return this;
  }

  /** Gives up what has not come yet; the server ends the run. */
  cancel(): void {
    this.stream.cancel();
  }

  /** Each activation as it is complete. */
  async *[Symbol.asyncIterator](): AsyncGenerator<[string, Tensor], void, undefined> {
    for await (const [name, tensor] of this.stream.completed()) {
      if (this.isHook(name)) {
        yield [name, tensor];
      }
    }
  }

  private unknown(name: string): UnknownHookError {
    const kinds = new Set(this.names.map((each) => each.replace(/\.blocks\.\d+\./, ".blocks.*.")));
    return new UnknownHookError(
      `nothing in this cache is named '${name}'; it holds ${[...kinds].sort().join(", ") || "nothing"}.`,
    );
  }
}

/** One view of a vision hook, with its patches as rows and columns on each of the axes that count them. */
function laidOut(view: Tensor, grid: readonly [number, number], axes: readonly number[]): Tensor {
  const shape = axes.includes(0) ? grid : view.shape.slice(0, 1);
  const order = Array.from({ length: sizeOf(shape) }, (_, at) => at);
  const inner = axes.filter((axis) => axis > 0).map((axis) => axis - 1);
  const parts = inner.length === 0 ? view : stack(order.map((at) => laidOut(view.index(at), grid, inner)));
  return parts.gather(order, shape);
}
