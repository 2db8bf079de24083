/** A model behind a server: the calls of the contract in TypeScript's habits. */
import { setTimeout as sleep } from "node:timers/promises";
import { create } from "@bufbuild/protobuf";
import { type CallOptions, type Client, createClient } from "@connectrpc/connect";
import { ActivationCache } from "./cache.js";
import { findClick } from "./clicks.js";
import { dtypeFromWire, type DtypeName, dtypeToWire } from "./dtypes.js";
import {
  BusyError,
  CancelledError,
  DeadlineError,
  ImageNotFoundError,
  InvalidInputError,
  SpectraError,
  toSpectraError,
  UnavailableError,
} from "./errors.js";
import type { Image } from "./gen/vlm_spectra/v1/inputs_pb.js";
import {
  CoordinateSystem,
  type Model,
  type ModelInfo as ModelInfoMessage,
  ModelService,
  ModelState,
} from "./gen/vlm_spectra/v1/model_service_pb.js";
import {
  AttributionMethod,
  Baseline,
  type CaptureRun,
  CaptureRunSchema,
  type ForwardOptions as ForwardMessage,
  ForwardOptionsSchema,
  type GenerateOptions as GenerateMessage,
  GenerateOptionsSchema,
  PatchMode,
  type PrepareResponse,
  Reduction,
  SpectraService,
} from "./gen/vlm_spectra/v1/spectra_service_pb.js";
import { Compression } from "./gen/vlm_spectra/v1/tensor_pb.js";
import { Catalogue, type HookFilter, hookFromWire, type HookSpec } from "./hooks.js";
import { Inputs, layoutFromWire, type ImageLike, type Prompt, type PromptLike, readPrompts } from "./inputs.js";
import type { Intervention } from "./interventions.js";
import { Attribution, ForwardOutput, type Generation, LogitLens, PatchSweep, Tensors } from "./results.js";
import { type Events, type Progress, TensorStream, type Token } from "./stream.js";
import type { Tensor } from "./tensor.js";
import { type Connection, openConnection, type Tls } from "./transport.js";
import {
  headsToWire,
  type Positions,
  positionsToWire,
  promptsToWire,
  type TargetLike,
  targetToWire,
  type TokenLike,
  tokenToWire,
} from "./wire.js";

/** How long `connect` waits for an address to answer. */
const CONNECT_SECONDS = 10;
/** How long the server goes on with a capture after the connection was lost, for the stream to come back to. */
const LINGER_SECONDS = 30;

/** How to reach a server. */
export interface ConnectOptions {
  /** The model's name; the only one where absent. */
  model?: string;
  /** The bearer token that the server asks for; the environment's `VLM_SPECTRA_TOKEN` where absent. */
  token?: string;
  /** Whether to speak TLS, or with which certificates. A token goes in plain text to other machines only with `false`. */
  tls?: boolean | Tls;
  /** Seconds that any one call may take; no limit where absent. */
  timeout?: number;
  /** Seconds to wait for a model that is still being loaded. */
  loadTimeout?: number;
  /** How often a call is tried again that the server refused for now (it is busy), and said when; 4 where absent. */
  retries?: number;
  signal?: AbortSignal;
}

/** What every call takes. */
export interface RunOptions {
  /** Changes inside the model, in order. */
  interventions?: readonly Intervention[];
  /** Ends the call; the server ends the run. */
  signal?: AbortSignal;
  onProgress?: (progress: Progress) => void;
}

/** How to choose tokens. */
export interface GenerateOptions {
  /** At most so many new tokens; 512 where absent. */
  maxNewTokens?: number;
  /** Sample instead of taking the most probable token. */
  doSample?: boolean;
  temperature?: number;
  topP?: number;
  seed?: number | bigint;
  /** Texts that end the answer. */
  stop?: string | readonly string[];
  outputHiddenStates?: boolean;
}

/** What a forward pass returns. */
export interface ForwardOptions {
  /** Logits of the last so many positions, 0 for all; or a list of positions; null for none. */
  logitsToKeep?: number | readonly number[] | null;
  outputHiddenStates?: boolean;
  outputAttentions?: boolean;
}

/** What a run captures, and how it runs. */
export interface CaptureOptions extends RunOptions {
  /** The positions to keep; of scores and patterns these are query positions. */
  positions?: Positions;
  heads?: number | readonly number[];
  /** The type to cast to, where the model runs. */
  dtype?: DtypeName;
  /** What to compute of each activation before it is sent. */
  reduce?: "mean_heads" | "norm";
  /** "zstd" to send fewer bytes over a slow link, without loss. */
  compression?: "none" | "zstd";
  /** The scalar whose gradient the hooks named with `_grad` hold. */
  backwardFrom?: TargetLike;
  /** Capture a forward pass; the default, without logits. */
  forward?: ForwardOptions;
  /** Capture a generation: prompt and answer, every hook in its usual shape over the whole sequence. */
  generate?: GenerateOptions;
  /** Called with each token of a generation. */
  onToken?: (token: Token) => void;
}

/** Options of a logit lens. */
export interface LensOptions extends RunOptions {
  hook?: string;
  layers?: readonly number[];
  positions?: Positions;
  /** 5 where absent. */
  topK?: number;
  targets?: readonly TokenLike[];
}

/** The attribution methods of the contract. */
export type Method = Lowercase<Exclude<keyof typeof AttributionMethod, "UNSPECIFIED">>;

/** Options of an attribution. */
export interface AttributionOptions extends RunOptions {
  /** The token, pair of tokens or answer to explain; the model's own next token where absent. */
  target?: TargetLike;
  steps?: number;
  baseline?: "mean" | "black" | "blurred";
  window?: number;
  stride?: number;
  /** The second prompt of attribution patching. */
  against?: Inputs;
}

/** Options of a sweep of activation patching. */
export interface SweepOptions extends RunOptions {
  positions?: Positions;
  heads?: number | readonly number[];
  metric?: TargetLike;
  mode?: "denoising" | "noising";
}

/** What a capture would take. */
export interface Estimate {
  readonly shapes: ReadonlyMap<string, readonly number[]>;
  readonly byteCount: number;
  /** By the pace of the last forward pass; undefined where there was none yet. */
  readonly computeSeconds: number | undefined;
}

/** A model's sizes and names. */
export interface ModelInfo extends Readonly<Omit<ModelInfoMessage, "$typeName" | "$unknown" | "dtype" | "coordinates" | "parameters">> {
  readonly name: string;
  readonly dtype: DtypeName;
  readonly parameters: number;
  readonly coordinates: "processed_pixels" | "thousandths";
}

/** Connects to a server's model. */
export async function connect(address: string, options: ConnectOptions = {}): Promise<RemoteVLM> {
  if (!/^.+:\d+$/.test(address)) {
    throw new InvalidInputError(`an address is host:port, not '${address}'.`, { field: "address" });
  }
  const connection = openConnection(address, options.token ?? process.env["VLM_SPECTRA_TOKEN"], options.tls);
  try {
    const model = await describe(address, connection, options);
    return new RemoteVLM(address, connection, model, options);
  } catch (error) {
    connection.close();
    throw toSpectraError(error, address);
  }
}

async function describe(address: string, connection: Connection, options: ConnectOptions): Promise<Model> {
  const { model: name = "", loadTimeout = 600, signal } = options;
  const client = createClient(ModelService, connection.transport);
  const end = Date.now() + 1000 * loadTimeout;
  for (;;) {
    let model: Model | undefined;
    try {
      ({ model } = await client.getModel({ name }, { signal, timeoutMs: 1000 * CONNECT_SECONDS }));
    } catch (thrown) {
      const error = toSpectraError(thrown, address);
      if (error instanceof DeadlineError) {
        throw new UnavailableError(`no server answers at ${address} within ${CONNECT_SECONDS} s; is the address right?`);
      }
      throw error;
    }
    if (model?.state === ModelState.READY) {
      return model;
    }
    if (model?.state === ModelState.FAILED) {
      throw new UnavailableError(`the model '${model.name}' could not be loaded: ${model.error}`);
    }
    if (Date.now() > end) {
      throw new UnavailableError(`the model '${model?.name ?? name}' is still being loaded after ${loadTimeout} s.`, { retryAfter: 10 });
    }
    await sleep(200, undefined, { signal });
  }
}

/** A model behind a server; `connect` makes one. */
export class RemoteVLM {
  /** The model's sizes and names. */
  readonly info: ModelInfo;
  readonly catalogue: Catalogue;
  private readonly spectra: Client<typeof SpectraService>;
  private readonly models: Client<typeof ModelService>;
  private readonly calls: CallOptions;
  private readonly retries: number;
  private vocabulary: Promise<string[]> | undefined;

  constructor(
    readonly address: string,
    private readonly connection: Connection,
    model: Model,
    options: Pick<ConnectOptions, "timeout" | "retries"> = {},
  ) {
    const { info } = model;
    if (info === undefined) {
      throw new UnavailableError(`the server at ${address} does not say what the model '${model.name}' is.`);
    }
    const { $typeName: _, $unknown: __, ...sizes } = info;
    this.info = {
      ...sizes,
      name: model.name,
      dtype: dtypeFromWire(info.dtype),
      parameters: Number(info.parameters),
      coordinates: info.coordinates === CoordinateSystem.THOUSANDTHS ? "thousandths" : "processed_pixels",
    };
    this.catalogue = new Catalogue(model.hooks.map(hookFromWire));
    this.spectra = createClient(SpectraService, connection.transport);
    this.models = createClient(ModelService, connection.transport);
    this.calls = options.timeout === undefined ? {} : { timeoutMs: 1000 * options.timeout };
    this.retries = options.retries ?? 4;
  }

  /** The catalogue of hook points. */
  hooks(): readonly HookSpec[] {
    return this.catalogue.specs;
  }

  /** Closes the connection; running calls end. */
  close(): void {
    this.connection.close();
  }

  /** Formats a task and its images as the model expects, and turns them into tokens. */
  async prepare(
    task: string,
    images?: ImageLike | readonly ImageLike[],
    options: Omit<PromptLike, "task" | "images"> & { signal?: AbortSignal } = {},
  ): Promise<Inputs> {
    const { signal, ...rest } = options;
    return this.prepareBatch([{ task, images, ...rest }], { signal });
  }

  /** The same for several rows; shorter ones are padded on the left. */
  async prepareBatch(prompts: readonly PromptLike[], options: { signal?: AbortSignal } = {}): Promise<Inputs> {
    const read = await readPrompts(prompts);
    const response = await this.attempted(read, () => this.send(read, options.signal), options.signal);
    return new Inputs(read, response.rows, response.images.map(layoutFromWire));
  }

  /** An answer. */
  async generate(
    inputs: Inputs,
    options: GenerateOptions & RunOptions & { onToken?: (token: Token) => void } = {},
  ): Promise<Generation> {
    const tokens = inputs.prompts.map((): Token[] => []);
    const onToken = (token: Token): void => {
      tokens[token.row]?.push(token);
      options.onToken?.(token);
    };
    const request = { ...this.asked(inputs, options), options: generateToWire(options) };
    const open = (signal: AbortSignal) => this.spectra.generate(request, { ...this.calls, signal });
    const tensors = await this.all(open, inputs.prompts, { ...options, onToken });
    const text = tokens.map((row) => row.map((token) => token.text).join(""));
    const thousandths = this.info.coordinates === "thousandths";
    return {
      inputs,
      sequences: tensors.need("sequences"),
      logprobs: tensors.need("logprobs"),
      text,
      tokens,
      clicks: text.map((each, row) => findClick((inputs.prompts[row]?.assistantPrefill ?? "") + each, inputs.imagesOf(row), thousandths)),
      hiddenStates: tensors.series("hidden_states"),
    };
  }

  /** The tokens of an answer as they are chosen. Leaving the loop early ends the generation. */
  async *stream(inputs: Inputs, options: GenerateOptions & RunOptions = {}): AsyncGenerator<Token, void, undefined> {
    const queue: Token[] = [];
    let wake: () => void = () => undefined;
    const request = { ...this.asked(inputs, options), options: generateToWire(options) };
    const open = (signal: AbortSignal) => this.spectra.generate(request, { ...this.calls, signal });
    const onToken = (token: Token): void => {
      queue.push(token);
      wake();
    };
    const leaving = new AbortController();
    const signals = options.signal === undefined ? [leaving.signal] : [leaving.signal, options.signal];
    let ended = false;
    const end = this.all(open, inputs.prompts, { ...options, signal: AbortSignal.any(signals), onToken }).finally(() => {
      ended = true;
      wake();
    });
    end.catch(() => undefined); // it is thrown below, where somebody still listens
    try {
      for (;;) {
        const token = queue.shift();
        if (token !== undefined) {
          yield token;
        } else if (ended) {
          await end;
          return;
        } else {
          await new Promise<void>((resolve) => (wake = resolve));
        }
      }
    } finally {
      leaving.abort();
    }
  }

  /** One forward pass. */
  async forward(inputs: Inputs, options: ForwardOptions & RunOptions = {}): Promise<ForwardOutput> {
    const request = { ...this.asked(inputs, options), options: forwardToWire(options, 0) };
    const open = (signal: AbortSignal) => this.spectra.forward(request, { ...this.calls, signal });
    return new ForwardOutput(await this.all(open, inputs.prompts, options), (ids) => this.texts(ids));
  }

  /**
   * Captures activations of a run. The cache is there as soon as the server has said what will come; it fills while the
   * model runs, and goes on after a lost connection.
   */
  async runWithCache(inputs: Inputs, hooks: HookFilter, options: CaptureOptions = {}): Promise<ActivationCache> {
    const run = this.capture(inputs, hooks, options);
    run.lingerSeconds = LINGER_SECONDS;
    const { signal, onToken, onProgress } = options;
    const stream = await this.opened(inputs.prompts, signal, () =>
      new TensorStream({
        address: this.address,
        open: (ending) => this.spectra.runWithCache({ start: { case: "run", value: run } }, { ...this.calls, signal: ending }),
        resume: (captureId, have, ending) => this.resume(captureId, have, ending),
        release: (captureId) => {
          this.spectra.releaseCapture({ captureId }, { timeoutMs: 5000 }).catch(() => undefined);
        },
        onToken,
        onProgress,
        signal,
      }),
    );
    return new ActivationCache(stream, (name) => this.catalogue.has(name), inputs);
  }

  /** What a capture would take, without running it. */
  async estimate(inputs: Inputs, hooks: HookFilter, options: CaptureOptions = {}): Promise<Estimate> {
    const run = this.capture(inputs, hooks, options);
    const found = await this.attempted(
      inputs.prompts,
      () => this.spectra.estimate({ run }, { ...this.calls, signal: options.signal }),
      options.signal,
    );
    return {
      shapes: new Map(found.tensors.map((each) => [each.name, each.shape.map(Number)])),
      byteCount: Number(found.byteCount),
      computeSeconds: found.computeSeconds,
    };
  }

  /** What each layer would answer. */
  async logitLens(inputs: Inputs, options: LensOptions = {}): Promise<LogitLens> {
    const request = {
      ...this.asked(inputs, options),
      hook: (options.hook ?? "").replace(/^lm\.blocks\.\*\./, ""),
      layers: [...(options.layers ?? [])],
      positions: positionsToWire(options.positions),
      topK: options.topK ?? 5,
      targets: (options.targets ?? []).map(tokenToWire),
    };
    const open = (signal: AbortSignal) => this.spectra.logitLens(request, { ...this.calls, signal });
    return new LogitLens(inputs, await this.all(open, inputs.prompts, options), (ids) => this.texts(ids));
  }

  /** Which parts of the input or of the model made a target. */
  async attribute(inputs: Inputs, method: Method = "direct_logit", options: AttributionOptions = {}): Promise<Attribution> {
    const occluding = method === "occlusion";
    const { against } = options;
    const request = {
      ...this.asked(inputs, options),
      method: AttributionMethod[method.toUpperCase() as Uppercase<Method>],
      target: targetToWire(options.target ?? {}),
      steps: options.steps ?? 0,
      baseline: Baseline[(options.baseline ?? "mean").toUpperCase() as "MEAN" | "BLACK" | "BLURRED"],
      window: occluding ? options.window ?? 0 : 0,
      stride: occluding ? options.stride ?? 0 : 0,
      corrupted: against === undefined ? [] : promptsToWire(against.prompts),
    };
    const open = (signal: AbortSignal) => this.spectra.attribute(request, { ...this.calls, signal });
    const prompts = [...inputs.prompts, ...(against?.prompts ?? [])];
    return new Attribution(method, inputs, await this.all(open, prompts, options));
  }

  /** Which activation, put from one run into another, moves the answer. */
  async patchSweep(clean: Inputs, corrupted: Inputs, hooks: HookFilter, options: SweepOptions = {}): Promise<PatchSweep> {
    const request = {
      ...this.asked(clean, options),
      corrupted: promptsToWire(corrupted.prompts),
      hooks: this.catalogue.patterns(hooks),
      positions: positionsToWire(options.positions),
      heads: headsToWire(options.heads),
      metric: targetToWire(options.metric ?? {}),
      mode: options.mode === "noising" ? PatchMode.NOISING : PatchMode.DENOISING,
    };
    const open = (signal: AbortSignal) => this.spectra.patchSweep(request, { ...this.calls, signal });
    return new PatchSweep(await this.all(open, [...clean.prompts, ...corrupted.prompts], options));
  }

  /** The residual directions of tokens, [n, hidden] float32, the final norm's weight folded in. */
  async unembed(tokens: TokenLike | readonly TokenLike[], options: { signal?: AbortSignal } = {}): Promise<Tensor> {
    const list = typeof tokens === "object" ? tokens : [tokens];
    const request = { model: this.info.name, tokens: list.map(tokenToWire) };
    const open = (signal: AbortSignal) => this.spectra.getUnembedding(request, { ...this.calls, signal });
    return (await this.all(open, [], options)).need("directions");
  }

  /** The texts of tokens, by id. */
  async texts(ids: readonly number[]): Promise<string[]> {
    this.vocabulary ??= this.models.getModel({ name: this.info.name, includeVocabulary: true }, this.calls).then(
      (response) => response.vocabulary,
      (error: unknown) => {
        this.vocabulary = undefined;
        throw toSpectraError(error, this.address);
      },
    );
    const vocabulary = await this.vocabulary;
    return ids.map((id) => vocabulary[id] ?? "");
  }

  private asked(inputs: Inputs, options: RunOptions): { model: string; prompts: ReturnType<typeof promptsToWire>; interventions: Intervention[] } {
    return {
      model: this.info.name,
      prompts: promptsToWire(inputs.prompts),
      interventions: [...(options.interventions ?? [])],
    };
  }

  private capture(inputs: Inputs, hooks: HookFilter, options: CaptureOptions): CaptureRun {
    if (options.forward !== undefined && options.generate !== undefined) {
      throw new InvalidInputError("a capture is of a forward pass or of a generation, not of both.", { field: "generate" });
    }
    const reductions = { mean_heads: Reduction.MEAN_HEADS, norm: Reduction.NORM } as const;
    return create(CaptureRunSchema, {
      ...this.asked(inputs, options),
      selection: {
        hooks: this.catalogue.patterns(hooks),
        positions: positionsToWire(options.positions),
        heads: headsToWire(options.heads),
        dtype: options.dtype === undefined ? undefined : dtypeToWire(options.dtype),
        reduction: options.reduce === undefined ? undefined : reductions[options.reduce],
        compression: options.compression === "zstd" ? Compression.ZSTD : undefined,
      },
      call:
        options.generate === undefined
          ? { case: "forward", value: forwardToWire(options.forward ?? {}, null) }
          : { case: "generate", value: generateToWire(options.generate) },
      backwardFrom: options.backwardFrom === undefined ? undefined : targetToWire(options.backwardFrom),
    });
  }

  private resume(captureId: string, have: ReadonlyMap<number, number>, signal: AbortSignal): Events {
    const offsets = [...have].map(([index, offset]) => ({ index, offset: BigInt(offset) }));
    return this.spectra.runWithCache({ start: { case: "resume", value: { captureId, offsets } } }, { ...this.calls, signal });
  }

  /** A stream whose tensors are announced. */
  private opened(prompts: readonly Prompt[], signal: AbortSignal | undefined, make: () => TensorStream): Promise<TensorStream> {
    let stream: TensorStream | undefined;
    const call = async (): Promise<TensorStream> => {
      stream = make();
      await stream.opened();
      return stream;
    };
    return this.attempted(prompts, call, signal, () => stream?.begun ?? false);
  }

  /** All tensors of a call. */
  private all(
    open: (signal: AbortSignal) => Events,
    prompts: readonly Prompt[],
    options: Pick<CaptureOptions, "signal" | "onToken" | "onProgress">,
  ): Promise<Tensors> {
    const { signal, onToken, onProgress } = options;
    let stream: TensorStream | undefined;
    const call = async (): Promise<Tensors> => {
      stream = new TensorStream({ address: this.address, open, onToken, onProgress, signal });
      await stream.done();
      const found = new Tensors();
      for (const name of stream.names) {
        found.set(name, (await stream.get(name))!);
      }
      return found;
    };
    return this.attempted(prompts, call, signal, () => stream?.begun ?? false);
  }

  /**
   * A call, made again where the server lacks images of its prompts, and where it refused for now and said until when;
   * never once it has begun to answer.
   */
  private async attempted<T>(
    prompts: readonly Prompt[],
    call: () => Promise<T>,
    signal?: AbortSignal,
    begun: () => boolean = () => false,
  ): Promise<T> {
    let sent = false;
    for (let tried = 0; ; ) {
      if (signal?.aborted) {
        throw new CancelledError("the call was cancelled before it began.");
      }
      try {
        return await call();
      } catch (thrown) {
        const error = toSpectraError(thrown, this.address);
        if (begun()) {
          throw error;
        }
        if (error instanceof ImageNotFoundError && !sent) {
          sent = true;
          await this.send(prompts, signal);
          continue;
        }
        const passing = error instanceof BusyError || error instanceof UnavailableError;
        if (!passing || error.retryAfter === undefined || tried >= this.retries) {
          throw error;
        }
        const seconds = Math.min(error.retryAfter * 1.5 ** tried, 30) * (0.75 + Math.random() / 2);
        await sleep(1000 * seconds, undefined, { signal }).catch(() => undefined);
        tried++;
      }
    }
  }

  /** Prepares prompts on the server; each image crosses the wire only if the server asks for it. */
  private async send(prompts: readonly Prompt[], signal?: AbortSignal): Promise<PrepareResponse> {
    const pictures = new Map(prompts.flatMap((prompt) => prompt.images).map((each) => [each.sha256, each.data]));
    const asked = { model: this.info.name, prompts: promptsToWire(prompts) };
    let images: Pick<Image, "sha256" | "data">[] = [];
    try {
      for (;;) {
        const response = await this.spectra.prepare({ ...asked, images }, { ...this.calls, signal });
        const [sha256] = response.missingImages;
        if (sha256 === undefined) {
          return response;
        }
        const data = pictures.get(sha256);
        if (data === undefined) {
          throw new SpectraError(`the server asks for an image that the prompt does not have (${sha256}).`);
        }
        images = [{ sha256, data }];
      }
    } catch (thrown) {
      throw toSpectraError(thrown, this.address);
    }
  }
}

function generateToWire(options: GenerateOptions): GenerateMessage {
  const { maxNewTokens = 512, doSample = false, temperature, topP, seed, stop = [] } = options;
  if (!Number.isInteger(maxNewTokens) || maxNewTokens < 1) {
    throw new InvalidInputError(`maxNewTokens is ${maxNewTokens}; at least 1 token is possible.`, { field: "max_new_tokens" });
  }
  return create(GenerateOptionsSchema, {
    maxNewTokens,
    doSample,
    temperature,
    topP,
    seed: seed === undefined ? undefined : BigInt(seed),
    stop: typeof stop === "string" ? [stop] : [...stop],
    outputHiddenStates: options.outputHiddenStates ?? false,
  });
}

function forwardToWire(options: ForwardOptions, keep: number | null): ForwardMessage {
  const logits = options.logitsToKeep === undefined ? keep : options.logitsToKeep;
  return create(ForwardOptionsSchema, {
    logitsToKeep: logits === null ? undefined : typeof logits === "number" ? { last: logits } : { positions: [...logits] },
    outputHiddenStates: options.outputHiddenStates ?? false,
    outputAttentions: options.outputAttentions ?? false,
  });
}
