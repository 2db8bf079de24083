/** What calls return. b rows, s positions, n new tokens, d hidden width, v vocabulary, L layers, H heads. */
import type { Cost } from "./cost.js";
import { InternalError, InvalidInputError } from "./errors.js";
import { type Inputs, layoutNumber, onGrid } from "./inputs.js";
import type { Point } from "./clicks.js";
import { checkValue, whole } from "./options.js";
import type { TensorStream, Token } from "./stream.js";
import { stack, Tensor } from "./tensor.js";
import type { TargetLike } from "./wire.js";

/** Token ids to their texts. */
type Texts = (ids: readonly number[]) => Promise<string[]>;

/** The methods whose parts add up to something. */
const COMPLETE = ["direct_logit", "gradient_x_input", "integrated_gradients", "attribution_patching"];

/** Tensors of a response by name, as they have come. */
export class Tensors extends Map<string, Tensor> {
  constructor(private readonly stream: Pick<TensorStream, "names" | "cost">) {
    super();
  }

  /** What the call took on the server. */
  get cost(): Cost {
    return this.stream.cost;
  }

  /** The tensors that the server has announced, come or still to come. */
  get announced(): string[] {
    return this.stream.names;
  }

  /** A tensor that the response must have. */
  need(name: string): Tensor {
    const tensor = this.get(name);
    if (tensor === undefined) {
      throw new InternalError(`the server's answer has no ${name}: it was damaged on its way, or is another version's.`);
    }
    return tensor;
  }

  /** The tensors `name.0`, `name.1`, ... in order. */
  series(name: string): Tensor[] {
    const count = [...this.keys()].filter((each) => each.startsWith(`${name}.`)).length;
    return Array.from({ length: count }, (_, i) => this.need(`${name}.${i}`));
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
  /** What the call took on the server. */
  readonly cost: Cost;
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
    private readonly texts: Texts,
  ) {}

  /** What the call took on the server. */
  get cost(): Cost {
    return this.tensors.cost;
  }

  /** [b, kept positions, v]. */
  get logits(): Tensor {
    const logits = this.tensors.get("logits");
    if (logits === undefined) {
      throw new InvalidInputError("this forward pass computed no logits; ask for some with logitsToKeep (0 for all positions).");
    }
    return logits;
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
  checkValue("k", k, whole(1, logits.length));
  const most = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const sum = logits.reduce((total, logit) => total + Math.exp(logit - most), 0);
  const order = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a] || a - b);
  return order.slice(0, k).map((id) => ({ id, logit: logits[id], prob: Math.exp(logits[id] - most) / sum }));
}

/** What each layer would answer; [L, b, p, ...] over layers, rows and positions, k most probable tokens, t targets. */
export class LogitLens {
  readonly layers: Tensor;
  readonly positions: Tensor;
  readonly tokenIds: Tensor;
  readonly logits: Tensor;
  readonly probs: Tensor;
  readonly entropy: Tensor;
  readonly klToFinal: Tensor;
  /** [b, p, t] int64; where no targets were given, the model's own answer at each position. */
  readonly targetIds: Tensor;
  readonly targetLogits: Tensor;
  readonly targetProbs: Tensor;
  /** [L, b, p, t] int64, how many tokens have a higher logit than the target; 0 is the most probable. */
  readonly ranks: Tensor;

  constructor(
    readonly inputs: Inputs,
    readonly tensors: Tensors,
    private readonly texts: Texts,
  ) {
    this.layers = tensors.need("layers");
    this.positions = tensors.need("positions");
    this.tokenIds = tensors.need("token_ids");
    this.logits = tensors.need("logits");
    this.probs = tensors.need("probs");
    this.entropy = tensors.need("entropy");
    this.klToFinal = tensors.need("kl_to_final");
    this.targetIds = tensors.need("target_ids");
    this.targetLogits = tensors.need("target_logits");
    this.targetProbs = tensors.need("target_probs");
    this.ranks = tensors.need("target_ranks");
  }

  /** What the call took on the server. */
  get cost(): Cost {
    return this.tensors.cost;
  }

  /** The texts of the most probable tokens at a layer of the lens, a row and a position of it, most probable first. */
  tokens(layer: number, row: number, position: number): Promise<string[]> {
    return this.texts(this.tokenIds.index(layer).index(row).index(position).toNumbers());
  }

  /** The texts of the targets at a row and a position of the lens. */
  targetTokens(row: number, position: number): Promise<string[]> {
    return this.texts(this.targetIds.index(row).index(position).toNumbers());
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
    private readonly texts: Texts,
    private readonly target: TargetLike,
  ) {
    this.scores = tensors.need("scores");
    this.targetIds = tensors.need("target_ids");
    this.targetValue = tensors.need("target_value");
    this.total = tensors.need("total");
  }

  /** What the call took on the server. */
  get cost(): Cost {
    return this.tensors.cost;
  }

  /** [b] the texts of the explained tokens; the answer where it is one. */
  async targetTokens(): Promise<string[]> {
    const { target } = this;
    const answer = typeof target === "object" && "answer" in target ? target.answer : undefined;
    return answer === undefined ? this.texts(this.targetIds.toNumbers()) : this.inputs.prompts.map(() => answer);
  }

  /** [b, L, H] for `direct_logit` and `attribution_patching`. */
  get heads(): Tensor {
    return this.part("heads", "direct_logit and attribution_patching have");
  }

  /** [b, L] for `direct_logit` and `attribution_patching`. */
  get mlps(): Tensor {
    return this.part("mlps", "direct_logit and attribution_patching have");
  }

  /** [b, L, s] for `attribution_patching`: the residual stream after each layer. */
  get layers(): Tensor {
    return this.part("layers", "attribution_patching has");
  }

  /** [b] for `direct_logit`: the target position's own embedding. */
  get embed(): Tensor {
    return this.part("embed", "direct_logit has");
  }

  /** [b] for `direct_logit`: biases of output projections, of norms and of the unembedding. */
  get bias(): Tensor {
    return this.part("bias", "direct_logit has");
  }

  /** [b, L, H, s] for `direct_logit`: each head split over what it read. */
  get sources(): Tensor {
    return this.part("sources", "direct_logit has");
  }

  /** [b] the target's value at the baseline of `integrated_gradients`, or in the second run of `attribution_patching`. */
  get baselineValue(): Tensor {
    return this.part("baseline_value", "integrated_gradients and attribution_patching have");
  }

  /** Steps of the integration; undefined where there was none. */
  get steps(): number | undefined {
    const steps = this.tensors.get("steps")?.toNumbers();
    return steps && Math.max(...steps);
  }

  private part(name: string, owners: string): Tensor {
    const tensor = this.tensors.get(name);
    if (tensor === undefined) {
      throw new InvalidInputError(`${this.method} has no ${name.replace("_", " ")}; ${owners}.`, { field: "method" });
    }
    return tensor;
  }

  /** The scores of an image's tokens, [rows, columns]. */
  imageGrid(image = 0, tile?: number): Tensor {
    const layout = layoutNumber(this.inputs.images, image);
    return onGrid(this.scores.index(layout.row), layout, tile);
  }

  /** [b] what the parts do not explain of the value; NaN for a method that promises no sum. */
  get residual(): Tensor {
    const total = this.total.toFloat32();
    const left = this.targetValue.toFloat32().map((value, row) => (COMPLETE.includes(this.method) ? value - total[row] : NaN));
    return Tensor.of(left, this.total.shape);
  }

  /** The strongest patches of an image: row and column in its token grid, and score; strongest first. */
  topPatches(image = 0, k = 5): [row: number, column: number, score: number][] {
    checkValue("k", k, whole(1));
    const grid = this.imageGrid(image);
    const scores = grid.toFloat32();
    const order = Array.from(scores.keys()).sort((a, b) => scores[b] - scores[a] || a - b);
    return order.slice(0, k).map((at) => [Math.floor(at / grid.shape[1]), at % grid.shape[1], scores[at]]);
  }

  /** Every token of a row, negative from the end, with its score, in order; padding is left out. */
  tokens(row = 0): [string, number][] {
    const { tokenLabels, attentionMask } = this.inputs;
    const labels = Number.isInteger(row) ? tokenLabels.at(row) : undefined;
    if (labels === undefined) {
      throw new InvalidInputError(`there is no row ${row}: there are ${tokenLabels.length}, from 0.`, { field: "row" });
    }
    const pairs = labels.map((label, at): [string, number] => [label, this.scores.at(row, at)]);
    return pairs.filter((_, at) => attentionMask.at(row)?.[at] === 1);
  }
}

/** A sweep of activation patching: the metric in every cell. */
export class PatchSweep {
  /** [n] the patched hooks, by full name. */
  readonly hooks: readonly string[];
  /** [m] the patched positions or heads. */
  readonly columns: readonly number[];
  /** [n, m] float32, the metric with that cell patched; NaN where it has not come yet. */
  readonly values: Tensor;
  readonly cleanValue: number;
  readonly corruptedValue: number;

  constructor(
    readonly mode: "denoising" | "noising",
    readonly axis: "positions" | "heads",
    readonly clean: Inputs,
    readonly corrupted: Inputs,
    readonly tensors: Tensors,
    private readonly texts: Texts,
  ) {
    const rows = tensors.announced.filter((name) => name.startsWith("values."));
    this.hooks = rows.map((name) => name.slice("values.".length));
    this.columns = tensors.need("columns").toNumbers();
    const missing = Tensor.of(this.columns.map(() => NaN));
    this.values = stack(rows.map((name) => tensors.get(name) ?? missing));
    this.cleanValue = tensors.need("clean").at(0);
    this.corruptedValue = tensors.need("corrupted").at(0);
  }

  /** What the call took on the server. */
  get cost(): Cost {
    return this.tensors.cost;
  }

  /** The metric of the prompt that runs, before anything is patched. */
  get start(): number {
    return this.mode === "denoising" ? this.corruptedValue : this.cleanValue;
  }

  /** The metric of the prompt that the patches come from. */
  get goal(): number {
    return this.mode === "denoising" ? this.cleanValue : this.corruptedValue;
  }

  /** [n, m] float32, how far each patch moves the metric: values - start. */
  get effect(): Tensor {
    return this.map((value) => value - Math.fround(this.start));
  }

  /** [n, m] float32, the effect as a share of the way from start to goal; 0 where these are the same. */
  get normalized(): Tensor {
    const way = this.goal - this.start;
    return this.map((value) => (way === 0 ? 0 : Math.fround(value - Math.fround(this.start)) / Math.fround(way)));
  }

  /** [m] what each column is: a token's label, or a head's number. */
  get labels(): string[] {
    const [labels] = this.clean.tokenLabels;
    return this.columns.map((column) => (this.axis === "heads" ? String(column) : labels[column]));
  }

  /** The tokens whose logit, or log-probability, the metric is. */
  targetTokens(): Promise<string[]> {
    return this.texts(this.tensors.need("target_ids").toNumbers());
  }

  /** The normalized effect at an image's tokens for one hook by its number, [rows, columns]; NaN where not patched. */
  imageGrid(row: number, image = 0, tile?: number): Tensor {
    if (this.axis === "heads") {
      throw new InvalidInputError("this sweep is over heads; one over positions has an image's grid.", { field: "axis" });
    }
    const effect = this.normalized.index(row).toFloat32();
    const over = new Float32Array(this.clean.tokenLabels[0].length).fill(NaN);
    this.columns.forEach((position, at) => (over[position] = effect[at]));
    return onGrid(over, layoutNumber(this.clean.images, image), tile);
  }

  /** The k strongest cells: hook, position or head, and normalized effect; strongest first. */
  top(k = 5): [hook: string, column: number, effect: number][] {
    checkValue("k", k, whole(1));
    const effect = this.normalized.toFloat32();
    const order = Array.from(effect.keys()).sort((a, b) => effect[b] - effect[a] || a - b);
    const width = this.columns.length;
    return order.slice(0, k).map((at) => [this.hooks[Math.floor(at / width)], this.columns[at % width], effect[at]]);
  }

  private map(each: (value: number) => number): Tensor {
    return Tensor.of(this.values.toFloat32().map(each), this.values.shape);
  }
}
