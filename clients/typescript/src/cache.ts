/** The activations of one run, by hook name. */
import { UnknownHookError } from "./errors.js";
import { matches } from "./hooks.js";
import { type Inputs, layoutNumber, onGrid } from "./inputs.js";
import type { CaptureReference } from "./interventions.js";
import type { TensorStream } from "./stream.js";
import { stack, type Tensor, type TensorLike } from "./tensor.js";

/**
 * Activations that arrive while the model runs: `get` waits for one of them alone, a `for await` loop has each as it is
 * complete, and `done` waits for the rest.
 */
export class ActivationCache implements AsyncIterable<[string, Tensor]> {
  constructor(
    private readonly stream: TensorStream,
    private readonly isHook: (name: string) => boolean,
    readonly inputs: Inputs,
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
    return this.stream.header?.captureId ?? "";
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
