/** A model behind a server: the calls of the contract in TypeScript's habits. */
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { type CallOptions as Bounds, type Client, ConnectError, createClient } from "@connectrpc/connect";
import { ActivationCache } from "./cache.js";
import { findClick } from "./clicks.js";
import { worthwhile } from "./compression.js";
import type { Connection } from "./connection.js";
import { dtypeFromWire, type DtypeName, dtypeToWire } from "./dtypes.js";
import {
  BusyError,
  CancelledError,
  Damaged,
  DeadlineError,
  ImageNotFoundError,
  InternalError,
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
  PatchMode,
  type PrepareResponse,
  Reduction,
  type RunWithCacheRequestSchema,
  SpectraService,
} from "./gen/vlm_spectra/v1/spectra_service_pb.js";
import { Compression } from "./gen/vlm_spectra/v1/tensor_pb.js";
import { Catalogue, type HookFilter, hookFromWire, type HookSpec } from "./hooks.js";
import { Inputs, layoutFromWire, type ImageLike, type Prompt, type PromptLike, readPrompts } from "./inputs.js";
import type { Intervention } from "./interventions.js";
import {
  type AttributionOptions,
  type CallOptions,
  type CaptureOptions,
  check,
  checkInputs,
  checkValue,
  type ForwardOptions,
  type GenerateOptions,
  type LensOptions,
  type Method,
  METHODS,
  oneOf,
  OPTIONS,
  type RunOptions,
  type SamplingOptions,
  type SweepOptions,
  text,
  type TokenOptions,
  whole,
} from "./options.js";
import { Attribution, ForwardOutput, type Generation, LogitLens, PatchSweep, Tensors } from "./results.js";
import { following, pause, Retries } from "./retries.js";
import { type Call, type Events, TensorStream, type Token } from "./stream.js";
import type { Tensor } from "./tensor.js";
import {
  forwardToWire,
  generateToWire,
  headsToWire,
  isToken,
  positionsToWire,
  promptsToWire,
  targetToWire,
  type TokenLike,
  tokenToWire,
} from "./wire.js";

/** How long `connect` waits for an address to answer. */
const CONNECT_SECONDS = 10;
/** How long the server goes on with a capture after the connection was lost, for the stream to come back to. */
const LINGER_SECONDS = 30;

/** How to use a server's model, over whatever connection; `timeout` is that of every call, and there is none where absent. */
export interface CommonConnectOptions extends CallOptions {
  /** The model's name; the only one where absent. */
  model?: string;
  /** Seconds to wait for a model that is still being loaded. */
  loadTimeout?: number;
  /** How often a call is tried again that the server refused for now (it is busy), and said when; 4 where absent. */
  retries?: number;
}

/** What a capture would take. */
export interface Estimate {
  readonly shapes: ReadonlyMap<string, readonly number[]>;
  readonly byteCount: number;
  /** By the pace of the last forward pass; undefined where there was none yet. */
  readonly computeSeconds: number | undefined;
  /** By the speed of the link as the last large capture showed it; undefined where there was none yet. */
  readonly transferSeconds: number | undefined;
}

/** A model's sizes and names. */
export interface ModelInfo extends Readonly<Omit<ModelInfoMessage, "$typeName" | "$unknown" | "dtype" | "coordinates" | "parameters">> {
  readonly name: string;
  readonly dtype: DtypeName;
  readonly parameters: number;
  readonly coordinates: "processed_pixels" | "thousandths";
}

/** A server's model, once it is loaded. */
export async function connectOver(connection: Connection, options: CommonConnectOptions): Promise<RemoteVLM> {
  try {
    return new RemoteVLM(connection, await describe(connection, options), options);
  } catch (error) {
    connection.close();
    throw toSpectraError(error, connection.address);
  }
}

async function describe(connection: Connection, options: CommonConnectOptions): Promise<Model> {
  const { model: name = "", loadTimeout = 600, retries = 4, signal } = options;
  const { address } = connection;
  const client = createClient(ModelService, connection.transport);
  const end = Date.now() + 1000 * loadTimeout;
  let attempts = new Retries(retries, CONNECT_SECONDS, signal);
  for (;;) {
    let model: Model | undefined;
    try {
      ({ model } = await client.getModel({ name }, bounds({ signal, left: attempts.left })));
    } catch (thrown) {
      const error = toSpectraError(thrown, address);
      if (error instanceof DeadlineError) {
        throw new UnavailableError(`no server answers at ${address} within ${CONNECT_SECONDS} s; is the address right?`);
      }
      if (await attempts.wait(error)) {
        continue;
      }
      throw error;
    }
    attempts = new Retries(retries, CONNECT_SECONDS, signal);
    if (model?.state === ModelState.READY) {
      return model;
    }
    if (model?.state === ModelState.FAILED) {
      throw new UnavailableError(`the model '${model.name}' could not be loaded: ${model.error}`);
    }
    if (Date.now() > end) {
      throw new UnavailableError(`the model '${model?.name ?? name}' is still being loaded after ${loadTimeout} s.`, { retryAfter: 10 });
    }
    await pause(0.2, signal);
  }
}

/** What ends a call, as the transport wants to know it. */
function bounds({ signal, left }: { signal?: AbortSignal; left?: number }): Bounds {
  return { ...(left === undefined ? {} : { timeoutMs: Math.ceil(1000 * left) }), ...(signal === undefined ? {} : { signal }) };
}

/** A model behind a server; `connect` makes one. */
export class RemoteVLM {
  /** The model's sizes and names. */
  readonly info: ModelInfo;
  readonly catalogue: Catalogue;
  private readonly spectra: Client<typeof SpectraService>;
  private readonly models: Client<typeof ModelService>;
  private readonly timeout: number | undefined;
  private readonly retries: number;
  private vocabulary: Promise<string[]> | undefined;
  /** Bytes a second, as the last large capture showed the link. */
  private speed: number | undefined;
  private closed = false;

  constructor(
    private readonly connection: Connection,
    model: Model,
    options: Pick<CommonConnectOptions, "timeout" | "retries"> = {},
  ) {
    const { info } = model;
    if (info === undefined) {
      throw new UnavailableError(`the server at ${connection.address} does not say what the model '${model.name}' is.`);
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
    this.timeout = options.timeout;
    this.retries = options.retries ?? 4;
  }

  /** The server's address. */
  get address(): string {
    return this.connection.address;
  }

  /** The catalogue of hook points. */
  hooks(): readonly HookSpec[] {
    return this.catalogue.specs;
  }

  /** Closes the connection; running calls end. */
  close(): void {
    this.closed = true;
    this.connection.close();
  }

  /** Formats a task and its images as the model expects, and turns them into tokens. */
  async prepare(
    task: string,
    images?: ImageLike | readonly ImageLike[],
    options: Omit<PromptLike, "task" | "images"> & CallOptions = {},
  ): Promise<Inputs> {
    check("prepare", options, OPTIONS.prepare);
    const { signal, timeout, ...rest } = options;
    return this.prepareBatch([{ task, images, ...rest }], { signal, timeout });
  }

  /** The same for several rows; shorter ones are padded on the left. */
  async prepareBatch(prompts: readonly PromptLike[], options: CallOptions = {}): Promise<Inputs> {
    check("prepareBatch", options, OPTIONS.prepareBatch);
    if (!Array.isArray(prompts) || prompts.length === 0) {
      throw new InvalidInputError("a batch is a list of prompts, and needs at least one task.", { field: "tasks" });
    }
    for (const prompt of prompts as readonly PromptLike[]) {
      check("a prompt", prompt, OPTIONS["a prompt"]);
      checkValue("task", prompt.task, text);
    }
    const read = await readPrompts(prompts, this.connection);
    const response = await this.attempted(read, (attempts) => this.send(read, options, attempts), options);
    return new Inputs(read, response.rows, response.images.map(layoutFromWire));
  }

  /** An answer. */
  async generate(inputs: Inputs, options: GenerateOptions & RunOptions & TokenOptions = {}): Promise<Generation> {
    checkInputs(inputs);
    check("generate", options, OPTIONS.generate);
    const tokens = inputs.prompts.map((): Token[] => []);
    const onToken = (token: Token): void => {
      tokens[token.row]?.push(token);
      options.onToken?.(token);
    };
    const request = { ...this.asked(inputs, options), options: generateToWire(options) };
    const open = (call: Call) => this.streaming(call).generate(request, bounds(call));
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
      cost: tensors.cost,
    };
  }

  /** The tokens of an answer as they are chosen. Leaving the loop early ends the generation. */
  async *stream(inputs: Inputs, options: SamplingOptions & RunOptions = {}): AsyncGenerator<Token, void, undefined> {
    checkInputs(inputs);
    check("stream", options, OPTIONS.stream);
    const queue: Token[] = [];
    let wake: () => void = () => undefined;
    const request = { ...this.asked(inputs, options), options: generateToWire(options) };
    const open = (call: Call) => this.streaming(call).generate(request, bounds(call));
    const onToken = (token: Token): void => {
      queue.push(token);
      wake();
    };
    const leaving = following(options.signal);
    let ended = false as boolean; // it changes while this function waits
    const end = this.all(open, inputs.prompts, { ...options, signal: leaving.signal, onToken }).finally(() => {
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
    checkInputs(inputs);
    check("forward", options, OPTIONS.forward);
    const request = { ...this.asked(inputs, options), options: forwardToWire(options, 0) };
    const open = (call: Call) => this.streaming(call).forward(request, bounds(call));
    return new ForwardOutput(await this.all(open, inputs.prompts, options), (ids) => this.texts(ids));
  }

  /**
   * Captures activations of a run. The cache is there as soon as the server has said what will come; it fills while the
   * model runs, and goes on after a lost connection.
   */
  async runWithCache(inputs: Inputs, hooks: HookFilter, options: CaptureOptions = {}): Promise<ActivationCache> {
    checkInputs(inputs);
    check("runWithCache", options, OPTIONS.runWithCache);
    const run = this.capture(inputs, hooks, options);
    run.lingerSeconds = LINGER_SECONDS;
    const { signal, onToken, onProgress } = options;
    const start = (call: Call, value: MessageInitShape<typeof RunWithCacheRequestSchema>["start"]): Events =>
      this.streaming(call).runWithCache({ start: value }, bounds(call));
    const stream = await this.opened(inputs.prompts, options, (attempts) =>
      new TensorStream({
        connection: this.connection,
        attempts,
        open: (call) => start(call, { case: "run", value: run }),
        resume: (captureId, have, call) => {
          const offsets = [...have].map(([index, offset]) => ({ index, offset: BigInt(offset) }));
          return start(call, { case: "resume", value: { captureId, offsets } });
        },
        release: (captureId) => {
          this.spectra.releaseCapture({ captureId }, { timeoutMs: 5000 }).catch(() => undefined);
        },
        onToken,
        onProgress,
        signal,
      }),
    );
    stream.done().then(
      () => (this.speed = stream.speed ?? this.speed),
      () => undefined,
    );
    return new ActivationCache(stream, (name) => this.catalogue.has(name), inputs, options.reduce);
  }

  /** What a capture would take, without running it. */
  async estimate(inputs: Inputs, hooks: HookFilter, options: CaptureOptions = {}): Promise<Estimate> {
    checkInputs(inputs);
    check("estimate", options, OPTIONS.runWithCache);
    const run = this.capture(inputs, hooks, options);
    const found = await this.attempted(
      inputs.prompts,
      ({ left }) => this.spectra.estimate({ run }, bounds({ signal: options.signal, left })),
      options,
    );
    const byteCount = Number(found.byteCount);
    return {
      shapes: new Map(found.tensors.map((each) => [each.name, each.shape.map(Number)])),
      byteCount,
      computeSeconds: found.computeSeconds,
      transferSeconds: this.speed === undefined ? undefined : byteCount / this.speed,
    };
  }

  /** What each layer would answer. */
  async logitLens(inputs: Inputs, options: LensOptions = {}): Promise<LogitLens> {
    checkInputs(inputs);
    check("logitLens", options, OPTIONS.logitLens);
    const { targets = [] } = options;
    const request = {
      ...this.asked(inputs, options),
      hook: (options.hook ?? "").replace(/^lm\.blocks\.\*\./, ""),
      layers: [...(options.layers ?? [])],
      positions: positionsToWire(options.positions),
      topK: options.topK ?? 5,
      targets: (typeof targets === "object" ? targets : [targets]).map(tokenToWire),
    };
    const open = (call: Call) => this.streaming(call).logitLens(request, bounds(call));
    return new LogitLens(inputs, await this.all(open, inputs.prompts, options), (ids) => this.texts(ids));
  }

  /** Which parts of the input or of the model made a target. */
  async attribute(inputs: Inputs, method: Method = "direct_logit", options: AttributionOptions = {}): Promise<Attribution> {
    checkInputs(inputs);
    checkValue("method", method, oneOf(...METHODS));
    check("attribute", options, OPTIONS.attribute);
    const { target = {}, steps = 0, baseline = "mean", window = 0, stride = 0, against } = options;
    for (const [name, value, owner] of [["steps", steps, "integrated_gradients"], ["window", window, "occlusion"], ["stride", stride, "occlusion"]] as const) {
      if (value > 0 && method !== owner) {
        throw new InvalidInputError(`${name} is an option of ${owner}, not of ${method}.`, { field: name });
      }
    }
    const request = {
      ...this.asked(inputs, options),
      method: AttributionMethod[method.toUpperCase() as Uppercase<Method>],
      target: targetToWire(target),
      steps,
      baseline: Baseline[baseline.toUpperCase() as "MEAN" | "BLACK" | "BLURRED"],
      window,
      stride,
      corrupted: against === undefined ? [] : promptsToWire(against.prompts),
    };
    const open = (call: Call) => this.streaming(call).attribute(request, bounds(call));
    const prompts = [...inputs.prompts, ...(against?.prompts ?? [])];
    return new Attribution(method, inputs, await this.all(open, prompts, options), (ids) => this.texts(ids), target);
  }

  /** Which activation, put from one run into another, moves the answer. */
  async patchSweep(clean: Inputs, corrupted: Inputs, hooks: HookFilter, options: SweepOptions = {}): Promise<PatchSweep> {
    checkInputs(clean);
    checkInputs(corrupted);
    check("patchSweep", options, OPTIONS.patchSweep);
    const { positions, heads, metric = {}, mode = "denoising", onRow } = options;
    const patterns = this.catalogue.patterns(hooks);
    const request = {
      ...this.asked(clean, options),
      corrupted: promptsToWire(corrupted.prompts),
      hooks: patterns,
      positions: positionsToWire(positions),
      heads: headsToWire(heads === "all" ? this.headsOf(patterns) : heads),
      metric: targetToWire(metric),
      mode: mode === "noising" ? PatchMode.NOISING : PatchMode.DENOISING,
    };
    const open = (call: Call) => this.streaming(call).patchSweep(request, bounds(call));
    const made = (tensors: Tensors) =>
      new PatchSweep(mode, heads === undefined ? "positions" : "heads", clean, corrupted, tensors, (ids) => this.texts(ids));
    const onTensor = (name: string, tensors: Tensors): void => {
      if (name.startsWith("values.")) {
        onRow?.(made(tensors));
      }
    };
    return made(await this.all(open, [...clean.prompts, ...corrupted.prompts], { ...options, onTensor }));
  }

  /** All heads of some hooks. */
  private headsOf(patterns: readonly string[]): number[] {
    const ofKeys = this.catalogue.matching(patterns).every((spec) => spec.shape.includes("kv_heads"));
    return Array.from({ length: ofKeys ? this.info.kvHeads : this.info.heads }, (_, head) => head);
  }

  /** The residual directions of tokens, [n, hidden] float32, the final norm's weight folded in. */
  async unembed(tokens: TokenLike | readonly TokenLike[], options: CallOptions = {}): Promise<Tensor> {
    check("unembed", options, OPTIONS.unembed);
    const list = Array.isArray(tokens) ? (tokens as readonly TokenLike[]) : [tokens as TokenLike];
    checkValue("tokens", list, { possible: "a token (its text or id), or a list of them that is not empty", holds: () => list.length > 0 && list.every(isToken) });
    const request = { model: this.info.name, tokens: list.map(tokenToWire) };
    const open = (call: Call) => this.streaming(call).getUnembedding(request, bounds(call));
    return (await this.all(open, [], options)).need("directions");
  }

  /** The texts of tokens, by id. */
  async texts(ids: readonly number[]): Promise<string[]> {
    const known = whole(0, this.info.vocab - 1);
    ids.forEach((id) => checkValue("ids", id, known));
    const request = { name: this.info.name, includeVocabulary: true };
    this.vocabulary ??= this.attempted([], ({ left }) => this.models.getModel(request, bounds({ left })), {}).then(
      (response) => response.vocabulary,
      (error: unknown) => {
        this.vocabulary = undefined;
        throw error;
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
    const { forward, generate } = options;
    if (forward !== undefined && generate !== undefined) {
      throw new InvalidInputError("a capture is of a forward pass or of a generation, not of both.", { field: "generate" });
    }
    check("the option forward", forward ?? {}, OPTIONS["the option forward"]);
    check("the option generate", generate ?? {}, OPTIONS["the option generate"]);
    const reductions = { mean_heads: Reduction.MEAN_HEADS, norm: Reduction.NORM } as const;
    return create(CaptureRunSchema, {
      ...this.asked(inputs, options),
      selection: {
        hooks: this.catalogue.patterns(hooks),
        positions: positionsToWire(options.positions),
        heads: headsToWire(options.heads),
        dtype: options.dtype === undefined ? undefined : dtypeToWire(options.dtype),
        reduction: options.reduce === undefined ? undefined : reductions[options.reduce],
        compression: worthwhile(options.compression, this.speed) ? Compression.ZSTD : undefined,
      },
      call:
        generate === undefined
          ? { case: "forward", value: forwardToWire(forward ?? {}, null) }
          : { case: "generate", value: generateToWire(generate) },
      backwardFrom: options.backwardFrom === undefined ? undefined : targetToWire(options.backwardFrom),
    });
  }

  /** The calls whose tensors go where a stream wants them. */
  private streaming(call: Call): Client<typeof SpectraService> {
    return createClient(SpectraService, this.connection.streaming(call.places));
  }

  /** A stream whose tensors are announced. */
  private opened(prompts: readonly Prompt[], options: CallOptions, make: (attempts: Retries) => TensorStream): Promise<TensorStream> {
    let stream: TensorStream | undefined;
    const call = async (attempts: Retries): Promise<TensorStream> => {
      stream = make(attempts);
      await stream.opened();
      return stream;
    };
    return this.attempted(prompts, call, options, () => stream?.begun ?? false);
  }

  /** All tensors of a call. */
  private all(
    open: (call: Call) => Events,
    prompts: readonly Prompt[],
    options: CallOptions & Pick<RunOptions, "onProgress"> & TokenOptions & { onTensor?: (name: string, tensors: Tensors) => void },
  ): Promise<Tensors> {
    const { signal, onToken, onProgress, onTensor } = options;
    let stream: TensorStream | undefined;
    const call = async (attempts: Retries): Promise<Tensors> => {
      stream = new TensorStream({ connection: this.connection, attempts, open, onToken, onProgress, signal });
      const found = new Tensors(stream);
      try {
        for await (const [name, tensor] of stream.completed()) {
          found.set(name, tensor);
          onTensor?.(name, found);
        }
      } catch (error) {
        stream.cancel();
        throw error;
      }
      return found;
    };
    return this.attempted(prompts, call, options, () => stream?.begun ?? false);
  }

  /**
   * A call, made again where the server lacks images of its prompts, and where it refused for now and said until when;
   * never once it has begun to answer.
   */
  private async attempted<T>(
    prompts: readonly Prompt[],
    call: (attempts: Retries) => Promise<T>,
    options: CallOptions,
    begun: () => boolean = () => false,
  ): Promise<T> {
    const { signal, timeout = this.timeout } = options;
    const retries = new Retries(this.retries, timeout, signal);
    let sent = false;
    for (;;) {
      if (signal?.aborted) {
        throw new CancelledError("the call was cancelled before it began.");
      }
      if (this.closed) {
        throw new UnavailableError(`the connection to ${this.address} is closed.`);
      }
      try {
        return await call(retries);
      } catch (thrown) {
        if (![SpectraError, ConnectError, Damaged].some((kind) => thrown instanceof kind)) {
          throw thrown; // the caller's own
        }
        const error = toSpectraError(thrown, this.address);
        if (begun()) {
          throw error;
        }
        if (error instanceof ImageNotFoundError && !sent) {
          sent = true;
          await this.send(prompts, options, retries);
        } else if (!(await retries.wait(error))) {
          throw error;
        }
      }
    }
  }

  /** Prepares prompts on the server; each image crosses the wire only if the server asks for it. */
  private async send(prompts: readonly Prompt[], { signal }: CallOptions, { left }: Retries): Promise<PrepareResponse> {
    const pictures = new Map(prompts.flatMap((prompt) => prompt.images).map((each) => [each.sha256, each.data]));
    const asked = { model: this.info.name, prompts: promptsToWire(prompts) };
    let images: Pick<Image, "sha256" | "data">[] = [];
    const most = 3 * pictures.size; // other clients' images may push one out again before the last is there
    try {
      for (let sends = 0; ; sends++) {
        const response = await this.spectra.prepare({ ...asked, images }, bounds({ signal, left }));
        const sha256 = response.missingImages.at(0);
        if (sha256 === undefined) {
          return response;
        }
        const data = pictures.get(sha256);
        if (data === undefined) {
          throw new InternalError(`the server asks for an image that the prompt does not have (${sha256}).`);
        }
        if (sends >= most) {
          throw new BusyError("the server's room for images is contended (kept_images_mb); try again.", { retryAfter: 1 });
        }
        images = [{ sha256, data }];
      }
    } catch (thrown) {
      throw toSpectraError(thrown, this.address);
    }
  }
}
