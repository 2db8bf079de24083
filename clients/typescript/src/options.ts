/** What calls can be asked for. It is looked at here, once, also for callers without types: nothing is ignored in silence. */
import type { DtypeName } from "./dtypes.js";
import { InvalidInputError } from "./errors.js";
import type { AttributionMethod } from "./gen/vlm_spectra/v1/spectra_service_pb.js";
import { type ImageLike, Inputs, isImage, type PromptLike } from "./inputs.js";
import type { Intervention } from "./interventions.js";
import type { PatchSweep } from "./results.js";
import type { Progress, Token } from "./stream.js";
import { isHeads, isPositions, isTarget, isText, isToken, type Positions, type TargetLike, type TokenLike } from "./wire.js";

/** The longest time limit, in seconds: what all protocols can say. */
const DAY = 86_400;

/** What every call takes. */
export interface CallOptions {
  /** Ends the call; the server ends the run. */
  signal?: AbortSignal;
  /** Seconds that the call may take; those of `connect` where absent. */
  timeout?: number;
}

/** What every call that runs the model takes. */
export interface RunOptions extends CallOptions {
  /** Changes inside the model, in order. */
  interventions?: readonly Intervention[];
  /** Told how far the call is. What it throws ends the call, on the server too, and is thrown by the call. */
  onProgress?: (progress: Progress) => void;
}

/** How to choose tokens. */
export interface SamplingOptions {
  /** At most so many new tokens; 512 where absent. */
  maxNewTokens?: number;
  /** Sample instead of taking the most probable token. */
  doSample?: boolean;
  temperature?: number;
  topP?: number;
  seed?: number | bigint;
  /** Texts that end the answer. */
  stop?: string | readonly string[];
}

/** How to generate. */
export interface GenerateOptions extends SamplingOptions {
  outputHiddenStates?: boolean;
}

/** Whom to tell tokens. */
export interface TokenOptions {
  /** Called with each token of a generation as it is chosen. What it throws ends the call. */
  onToken?: (token: Token) => void;
}

/** What a forward pass returns. */
export interface ForwardOptions {
  /** Logits of the last so many positions, 0 for all; or a list of positions; null for none. */
  logitsToKeep?: number | readonly number[] | null;
  outputHiddenStates?: boolean;
  outputAttentions?: boolean;
}

/** What of an activation is captured. */
export interface SelectionOptions {
  /** The positions to keep; of scores and patterns these are query positions. */
  positions?: Positions;
  heads?: number | readonly number[];
  /** The type to cast to, where the model runs. */
  dtype?: DtypeName;
  /** What to compute of each activation before it is sent. */
  reduce?: "mean_heads" | "norm";
}

/** What a run captures, and how it runs. */
export interface CaptureOptions extends SelectionOptions, RunOptions, TokenOptions {
  /** "zstd" to send fewer bytes, without loss; "auto", the default, where earlier captures showed that the link is slow. */
  compression?: "auto" | "none" | "zstd";
  /** The scalar whose gradient the hooks named with `_grad` hold. */
  backwardFrom?: TargetLike;
  /** Capture a forward pass; the default, without logits. */
  forward?: ForwardOptions;
  /** Capture a generation: prompt and answer, every hook in its usual shape over the whole sequence. */
  generate?: GenerateOptions;
}

/** Options of a logit lens. */
export interface LensOptions extends RunOptions {
  /** What to read in each layer, `hook_resid_post` where absent. */
  hook?: string;
  /** The layers, negative from the end; all where absent. */
  layers?: readonly number[];
  positions?: Positions;
  /** 5 where absent. */
  topK?: number;
  /** Tokens to follow through the layers; the model's own answer at each position where absent. */
  targets?: TokenLike | readonly TokenLike[];
}

/** The attribution methods of the contract. */
export type Method = Lowercase<Exclude<keyof typeof AttributionMethod, "UNSPECIFIED">>;

export const METHODS: readonly Method[] = [
  "direct_logit",
  "gradient_x_input",
  "integrated_gradients",
  "occlusion",
  "attention_rollout",
  "relevancy",
  "grad_cam",
  "attribution_patching",
];

/** Options of an attribution. */
export interface AttributionOptions extends RunOptions {
  /** The token, pair of tokens or answer to explain; the model's own next token where absent. */
  target?: TargetLike;
  /** Steps of an integration; doubled until the completeness error is below 0.5% where absent. */
  steps?: number;
  baseline?: "mean" | "black" | "blurred";
  /** Of occlusion: how many image tokens a window is wide and high; 1 where absent. */
  window?: number;
  /** Of occlusion: image tokens from one window to the next; the window's own size where absent. */
  stride?: number;
  /** The second prompt of attribution patching. */
  against?: Inputs;
}

/** Options of a sweep of activation patching. */
export interface SweepOptions extends RunOptions {
  /** The positions to patch, a column each; all where absent. With `heads` they are patched together. */
  positions?: Positions;
  /** The heads to patch, a column each, instead of positions. */
  heads?: number | readonly number[] | "all";
  metric?: TargetLike;
  mode?: "denoising" | "noising";
  /** Called each time that a hook's row is done, the rows to come being NaN. What it throws ends the sweep. */
  onRow?: (sweep: PatchSweep) => void;
}

/** What a value can be, in words and as a test. */
interface Kind {
  readonly possible: string;
  readonly holds: (value: unknown) => boolean;
}

/** A kind for each option. */
export type Kinds<T> = { readonly [K in keyof Required<T>]: Kind };

/** Yes or no. */
export const flag: Kind = { possible: "true and false", holds: (value) => typeof value === "boolean" };
/** A function. */
export const callable: Kind = { possible: "a function", holds: (value) => typeof value === "function" };
/** More options. */
export const object: Kind = { possible: "an object of options", holds: (value) => typeof value === "object" && value !== null };
/** Any text. */
export const text: Kind = { possible: "a text", holds: isText };

/** Any number. */
export const number: Kind = { possible: "a number", holds: (value) => typeof value === "number" };

/** Whole numbers in a range. */
export function whole(least: number, most = 2 ** 31 - 1): Kind {
  const possible = most === 2 ** 31 - 1 ? `a whole number from ${least}` : `a whole number from ${least} to ${most}`;
  return { possible, holds: (value) => Number.isInteger(value) && (value as number) >= least && (value as number) <= most };
}

/** Numbers above one and up to another. */
export function between(above: number, most: number): Kind {
  return { possible: `a number above ${above} and at most ${most}`, holds: (value) => typeof value === "number" && value > above && value <= most };
}

/** One of some names. */
export function oneOf(...names: readonly string[]): Kind {
  return { possible: names.join(", "), holds: (value) => typeof value === "string" && names.includes(value) };
}

const some = (holds: (value: unknown) => boolean) => (value: unknown) => Array.isArray(value) && value.every(holds);
const integer = (value: unknown) => whole(-(2 ** 31)).holds(value);
const stops = (value: unknown) => isText(value) && value !== "";
/** A time limit. */
export const seconds: Kind = { ...between(0, DAY), possible: `seconds above 0 and at most ${DAY}` };
const positions: Kind = { possible: `a position, a { start, stop, step }, "last", "image", "text", or a list of them that is not empty`, holds: isPositions };
const heads: Kind = { possible: "a head's number from 0, or a list of them that is not empty", holds: isHeads };
const target: Kind = {
  possible: "a token (its text or id), a pair of tokens for a difference, or { token, minus, position } or { answer }",
  holds: isTarget,
};

const CALL: Kinds<CallOptions> = {
  signal: { possible: "an AbortSignal", holds: (value) => value instanceof AbortSignal },
  timeout: seconds,
};
const RUN: Kinds<RunOptions> = {
  ...CALL,
  interventions: {
    possible: "a list of what zeroAblation, addActivation and their like give",
    holds: some((value) => (value as Partial<Intervention> | null)?.$typeName === "vlm_spectra.v1.Intervention"),
  },
  onProgress: callable,
};
const SAMPLING: Kinds<SamplingOptions> = {
  maxNewTokens: whole(1),
  doSample: flag,
  temperature: between(0, Infinity),
  topP: between(0, 1),
  seed: {
    possible: "a whole number from 0 to 2**63 - 1",
    holds: (value) => (typeof value === "bigint" || Number.isSafeInteger(value)) && (value as number) >= 0 && (value as number) < 2 ** 63,
  },
  stop: { possible: "a text, or a list of texts, that are not empty", holds: (value) => stops(value) || some(stops)(value) },
};
const GENERATE: Kinds<GenerateOptions> = { ...SAMPLING, outputHiddenStates: flag };
const TOKENS: Kinds<TokenOptions> = { onToken: callable };
const FORWARD: Kinds<ForwardOptions> = {
  logitsToKeep: {
    possible: "a number of last positions (0 for all), a list of positions, or null for no logits",
    holds: (value) => value === null || whole(0).holds(value) || (some(integer)(value) && (value as number[]).length > 0),
  },
  outputHiddenStates: flag,
  outputAttentions: flag,
};
const SELECTION: Kinds<SelectionOptions> = {
  positions,
  heads,
  dtype: oneOf("float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2"),
  reduce: oneOf("mean_heads", "norm"),
};

/** The options of every call, by its name. */
export const OPTIONS = {
  connect: {
    ...CALL,
    model: text,
    loadTimeout: { possible: "seconds from 0", holds: (value: unknown) => typeof value === "number" && value >= 0 },
    retries: whole(0),
  },
  prepare: { ...CALL, assistantPrefill: text, system: text },
  prepareBatch: CALL,
  "a prompt": {
    task: text,
    images: {
      possible: "the bytes of an image's file (Uint8Array), a Blob, its name, or a list of them",
      holds: (value) => isImage(value as ImageLike) || some((each) => isImage(each as ImageLike))(value),
    },
    assistantPrefill: text,
    system: text,
  } satisfies Kinds<PromptLike>,
  generate: { ...RUN, ...GENERATE, ...TOKENS } satisfies Kinds<RunOptions & GenerateOptions & TokenOptions>,
  stream: { ...RUN, ...SAMPLING } satisfies Kinds<RunOptions & SamplingOptions>,
  forward: { ...RUN, ...FORWARD } satisfies Kinds<RunOptions & ForwardOptions>,
  runWithCache: {
    ...RUN,
    ...SELECTION,
    ...TOKENS,
    compression: oneOf("auto", "none", "zstd"),
    backwardFrom: target,
    forward: object,
    generate: object,
  } satisfies Kinds<CaptureOptions>,
  "the option forward": FORWARD,
  "the option generate": GENERATE,
  logitLens: {
    ...RUN,
    hook: text,
    layers: { possible: "a list of layers, negative from the end", holds: some(integer) },
    positions,
    topK: whole(1),
    targets: { possible: "a token (its text or id), or a list of them", holds: (value) => isToken(value) || some(isToken)(value) },
  } satisfies Kinds<LensOptions>,
  attribute: {
    ...RUN,
    target,
    steps: whole(1, 4096),
    baseline: oneOf("mean", "black", "blurred"),
    window: whole(1, 256),
    stride: whole(1, 256),
    against: { possible: "the inputs that prepare gives", holds: (value) => value instanceof Inputs },
  } satisfies Kinds<AttributionOptions>,
  patchSweep: {
    ...RUN,
    positions,
    heads: { possible: `${heads.possible}, or "all"`, holds: (value) => value === "all" || isHeads(value) },
    metric: target,
    mode: oneOf("denoising", "noising"),
    onRow: callable,
  } satisfies Kinds<SweepOptions>,
  unembed: CALL,
  "an intervention": { positions, heads },
} as const;

/**
 * Refuses options that a call does not have, and values that cannot be theirs.
 *
 * @param call The call, for the message.
 * @param options What the caller gave.
 * @param kinds The options there are; those of the call where absent.
 */
export function check<T extends object>(call: string, options: T, kinds: Kinds<T>): void {
  if (!object.holds(options) || Array.isArray(options)) {
    throw new InvalidInputError(`the options of ${call} are an object, not ${shown(options)}.`, { field: "options" });
  }
  const known: Readonly<Record<string, Kind>> = kinds;
  for (const [name, value] of Object.entries(options as Record<string, unknown>)) {
    if (!Object.hasOwn(known, name)) {
      throw new InvalidInputError(`${call} has no option ${name}; it has ${Object.keys(known).join(", ")}.`, { field: snake(name) });
    }
    if (value !== undefined && !known[name].holds(value)) {
      refuse(name, value, known[name], ` of ${call}`);
    }
  }
}

/** Refuses a value that cannot be an argument's. */
export function checkValue(name: string, value: unknown, kind: Kind): void {
  if (!kind.holds(value)) {
    refuse(name, value, kind);
  }
}

/** Refuses what did not come from `prepare`. */
export function checkInputs(inputs: unknown): void {
  if (!(inputs instanceof Inputs)) {
    throw new InvalidInputError(`inputs come from prepare or prepareBatch, not ${shown(inputs)}.`, { field: "inputs" });
  }
}

function refuse(name: string, value: unknown, { possible }: Kind, of = ""): never {
  const wrong = half(value) ?? `${shown(value)}; possible: ${possible}`;
  throw new InvalidInputError(`${name}${of} is ${wrong}.`, { field: snake(name) });
}

/** Half a character in a text, or in one of several, in words. */
function half(value: unknown): string | undefined {
  const texts: unknown[] = typeof value === "object" && value !== null ? Object.values(value) : [value];
  const found = texts.filter((each) => typeof each === "string").find((each) => !isText(each)) ?? "";
  const characters = Array.from(found);
  const at = characters.findIndex((each) => !isText(each));
  return at < 0 ? undefined : `no valid text: character ${at} is half of one ('\\u${characters[at].charCodeAt(0).toString(16)}')`;
}

/** The name of an argument in the contract. */
function snake(name: string): string {
  return name.replaceAll(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
}

/** A value in a sentence. */
export function shown(value: unknown): string {
  if (typeof value === "string") {
    return `'${value.length > 60 ? `${value.slice(0, 60)}...` : value}'`;
  }
  if (Array.isArray(value)) {
    return value.length > 8 ? `a list of ${value.length}` : `[${value.map(shown).join(", ")}]`;
  }
  return typeof value === "object" && value !== null ? "an object" : typeof value === "function" ? "a function" : String(value);
}
