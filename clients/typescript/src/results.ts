/** What calls return. b rows, s positions, n new tokens, d hidden width, v vocabulary, L layers, H heads. */
import { InvalidInputError } from "./errors.js";
import { type Inputs, layoutNumber, onGrid } from "./inputs.js";
import type { Point } from "./clicks.js";
import type { Token } from "./stream.js";
import { Tensor } from "./tensor.js";

/** Tensors of a response by name. */
export class Tensors extends Map<string, Tensor> {
  /** A tensor that the response must have. */
  need(name: string): Tensor {
    const tensor = this.get(name);
    if (tensor === undefined) {
      throw new InvalidInputError(`this call returned no ${name}; it returned ${[...this.keys()].join(", ") || "nothing"}.`);
    }
    return tensor;
  }

  /** The tensors `name.0`, `name.1`, ... in order. */
  series(name: string): Tensor[] {
    return [...this].filter(([each]) => each.startsWith(`${name}.`)).map(([, tensor]) => tensor);
  }
}

/** An answer. */
export interface Generation {
  readonly inputs: Inputs;
  /** [b, s + n] int64, prompt and answer. */
  readonly sequences: Tensor;
  /** [b] the new text. */
  readonly text: readonly string[];
  /** [b, n] float32, of each chosen token under the model; NaN after a row's end. */
  readonly logprobs: Tensor;
  /** The tokens, row by row. */
  readonly tokens: readonly (readonly Token[])[];
  /** [b] the point that each answer names, in pixels of the row's last image as it was given. */
  readonly clicks: readonly (Point | undefined)[];
  /** Layers + 1 tensors [b, s + n, d] where asked for. */
  readonly hiddenStates: readonly Tensor[];
}

/** One of the most probable next tokens. */
export interface TopToken {
  readonly id: number;
  readonly text: string;
  readonly prob: number;
  readonly logit: number;
}

/** What a forward pass returns beside activations. */
export class ForwardOutput {
  constructor(
    readonly tensors: Tensors,
    private readonly texts: (ids: readonly number[]) => Promise<string[]>,
  ) {}

  /** [b, kept positions, v]. */
  get logits(): Tensor {
    return this.tensors.need("logits");
  }

  /** Layers + 1 tensors [b, s, d] where asked for. */
  get hiddenStates(): readonly Tensor[] {
    return this.tensors.series("hidden_states");
  }

  /** Each block's attention pattern [b, heads, query, key] where asked for. */
  get attentions(): readonly Tensor[] {
    return this.tensors.series("attentions");
  }

  /** The k most probable next tokens: [row][kept position][k], most probable first. */
  async topTokens(k = 5): Promise<TopToken[][][]> {
    const { logits } = this;
    const rows = Array.from({ length: logits.shape[0] }, (_, row) => logits.index(row));
    const places = rows.map((row) => Array.from({ length: row.shape[0] }, (_, at) => top(row.index(at).toFloat32(), k)));
    const ids = [...new Set(places.flat(2).map((each) => each.id))];
    const texts = new Map((await this.texts(ids)).map((text, i) => [ids[i], text]));
    return places.map((row) => row.map((place) => place.map((each) => ({ ...each, text: texts.get(each.id) ?? "" }))));
  }
}

function top(logits: Float32Array, k: number): Omit<TopToken, "text">[] {
  if (!Number.isInteger(k) || k < 1 || k > logits.length) {
    throw new InvalidInputError(`k is ${k}; possible are 1 to ${logits.length}.`, { field: "k" });
  }
  const most = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const sum = logits.reduce((total, logit) => total + Math.exp(logit - most), 0);
  const order = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a] || a - b);
  return order.slice(0, k).map((id) => ({ id, logit: logits[id], prob: Math.exp(logits[id] - most) / sum }));
}

/** What each layer would answer; [L, b, p, ...] over layers, rows and positions. */
export class LogitLens {
  readonly layers: Tensor;
  readonly positions: Tensor;
  readonly tokenIds: Tensor;
  readonly logits: Tensor;
  readonly probs: Tensor;
  readonly entropy: Tensor;
  readonly klToFinal: Tensor;

  constructor(
    readonly inputs: Inputs,
    readonly tensors: Tensors,
    private readonly texts: (ids: readonly number[]) => Promise<string[]>,
  ) {
    this.layers = tensors.need("layers");
    this.positions = tensors.need("positions");
    this.tokenIds = tensors.need("token_ids");
    this.logits = tensors.need("logits");
    this.probs = tensors.need("probs");
    this.entropy = tensors.need("entropy");
    this.klToFinal = tensors.need("kl_to_final");
  }

  /** The texts of the most probable tokens at a layer of the lens, a row and a position of it, most probable first. */
  tokens(layer: number, row: number, position: number): Promise<string[]> {
    return this.texts([...this.tokenIds.index(layer).index(row).index(position).toFloat32()]);
  }
}

/** Scores of one attribution method for one target; the tensors are those of the contract's `AttributeResponse`. */
export class Attribution {
  /** [b, s] what each position of the input contributed. */
  readonly scores: Tensor;
  /** [b] the explained tokens; [b, n] those of an answer. */
  readonly targetIds: Tensor;
  /** [b] the explained value. */
  readonly targetValue: Tensor;
  /** [b] what the method's parts add up to. */
  readonly total: Tensor;

  constructor(
    readonly method: string,
    readonly inputs: Inputs,
    readonly tensors: Tensors,
  ) {
    this.scores = tensors.need("scores");
    this.targetIds = tensors.need("target_ids");
    this.targetValue = tensors.need("target_value");
    this.total = tensors.need("total");
  }

  /** [b, L, H] for `direct_logit` and `attribution_patching`. */
  get heads(): Tensor {
    return this.tensors.need("heads");
  }

  /** [b, L] for `direct_logit` and `attribution_patching`. */
  get mlps(): Tensor {
    return this.tensors.need("mlps");
  }

  /** The scores of an image's tokens, [rows, columns]. */
  imageGrid(image = 0, tile?: number): Tensor {
    const layout = layoutNumber(this.inputs.images, image);
    return onGrid(this.scores.index(layout.row), layout, tile);
  }

  /** [b] what the parts do not explain of the value: a figure for `direct_logit`, `gradient_x_input`, `integrated_gradients` and `attribution_patching`. */
  get residual(): Tensor {
    const total = this.total.toFloat32();
    return Tensor.of(this.targetValue.toFloat32().map((value, row) => value - total[row]), this.total.shape);
  }

  /** The strongest patches of an image: row and column in its token grid, and score; strongest first. */
  topPatches(image = 0, k = 5): [row: number, column: number, score: number][] {
    const grid = this.imageGrid(image);
    const scores = grid.toFloat32();
    const order = Array.from(scores.keys()).sort((a, b) => scores[b] - scores[a] || a - b);
    return order.slice(0, k).map((at) => [Math.floor(at / grid.shape[1]), at % grid.shape[1], scores[at]]);
  }

  /** Every token of a row with its score, in order; padding is left out. */
  tokens(row = 0): [string, number][] {
    const labels = this.inputs.tokenLabels[row] ?? [];
    const pairs = labels.map((label, at): [string, number] => [label, this.scores.at(row, at)]);
    return pairs.filter((_, at) => this.inputs.attentionMask[row]?.[at] === 1);
  }
}

/** A sweep of activation patching: the metric in every cell. */
export class PatchSweep {
  /** [n] the patched hooks, by full name. */
  readonly hooks: readonly string[];
  /** [m] the patched positions or heads. */
  readonly columns: readonly number[];
  /** [n][m] the metric with that cell patched. */
  readonly values: readonly Float32Array[];
  readonly cleanValue: number;
  readonly corruptedValue: number;

  constructor(readonly tensors: Tensors) {
    const rows = [...tensors].filter(([name]) => name.startsWith("values."));
    this.hooks = rows.map(([name]) => name.slice("values.".length));
    this.values = rows.map(([, tensor]) => tensor.toFloat32());
    this.columns = [...tensors.need("columns").toFloat32()];
    this.cleanValue = tensors.need("clean").at(0);
    this.corruptedValue = tensors.need("corrupted").at(0);
  }
}
