/** What callers say, as the contract's messages. */
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import type { Prompt } from "./inputs.js";
import type { ForwardOptions, GenerateOptions } from "./options.js";
import {
  NamedPositions,
  type PositionSchema,
  type Positions as PositionsMessage,
  PositionsSchema,
  type Prompt as PromptMessage,
  PromptSchema,
} from "./gen/vlm_spectra/v1/inputs_pb.js";
import {
  type ForwardOptions as ForwardMessage,
  ForwardOptionsSchema,
  type GenerateOptions as GenerateMessage,
  GenerateOptionsSchema,
  type Target as TargetMessage,
  TargetSchema,
  type TokenReference,
  TokenReferenceSchema,
} from "./gen/vlm_spectra/v1/spectra_service_pb.js";

/** A range of positions, as Python's slices. */
export interface Slice {
  start?: number;
  stop?: number;
  step?: number;
}

/** A position: a column (negative counts from the end), a range, or a set known by name. */
export type Position = number | Slice | "last" | "image" | "text";

/** Positions in the order in which a result has them. */
export type Positions = Position | readonly Position[];

/** A token by its id, or by its text, which must be exactly one token. */
export type TokenLike = number | string;

/** A scalar of the output: a token's logit, the difference of two, or an answer's log-probability. */
export interface Target {
  /** The token; the model's own next token where absent. */
  token?: TokenLike;
  /** The token whose logit is subtracted. */
  minus?: TokenLike;
  /** The position that predicts the token; the last of each row where absent. */
  position?: number;
  /** Text behind the prompt; goes with no other field. */
  answer?: string;
}

/** A target: a token, two tokens for the difference of their logits, or all fields. */
export type TargetLike = TokenLike | readonly [TokenLike, TokenLike] | Target;

const NAMED = { last: NamedPositions.LAST, image: NamedPositions.IMAGE, text: NamedPositions.TEXT } as const;

export function promptsToWire(prompts: readonly Prompt[]): PromptMessage[] {
  return prompts.map(({ task, images, assistantPrefill, system }) =>
    create(PromptSchema, { task, images: images.map((image) => image.sha256), assistantPrefill, system }),
  );
}

/** Whether a value is a number that the contract takes for a position, a layer or a token. */
function isIndex(value: unknown): value is number {
  return Number.isInteger(value) && Math.abs(value as number) < 2 ** 31;
}

function isPosition(value: unknown): value is Position {
  if (typeof value !== "object" || value === null) {
    return isIndex(value) || (typeof value === "string" && Object.hasOwn(NAMED, value));
  }
  return Object.entries(value).every(([name, at]) => at === undefined || (["start", "stop", "step"].includes(name) && isIndex(at) && (name !== "step" || at !== 0)));
}

export function isPositions(value: unknown): value is Positions {
  return Array.isArray(value) ? value.length > 0 && value.every(isPosition) : isPosition(value);
}

export function isHeads(value: unknown): value is number | readonly number[] {
  const list: unknown[] = Array.isArray(value) ? value : [value];
  return list.length > 0 && list.every((head) => isIndex(head) && head >= 0);
}

/** Whether a value is a text without half a character (a lone surrogate), which would be sent as another one. */
export function isText(value: unknown): boolean {
  return typeof value === "string" && !/\p{Surrogate}/u.test(value);
}

export function isToken(value: unknown): value is TokenLike {
  return isText(value) || isIndex(value);
}

export function isTarget(value: unknown): value is TargetLike {
  if (typeof value !== "object" || value === null) {
    return isToken(value);
  }
  if (Array.isArray(value)) {
    return value.length === 2 && value.every(isToken);
  }
  const { token, minus, position, answer, ...rest } = value as Record<string, unknown>;
  const tokens = [token, minus].every((each) => each === undefined || isToken(each));
  return tokens && (position === undefined || isIndex(position)) && (answer === undefined || isText(answer)) && Object.keys(rest).length === 0;
}

export function positionsToWire(positions: Positions | undefined): PositionsMessage | undefined {
  if (positions === undefined) {
    return undefined;
  }
  const items = Array.isArray(positions) ? (positions as readonly Position[]) : [positions as Position];
  return create(PositionsSchema, { items: items.map(positionToWire) });
}

function positionToWire(position: Position): MessageInitShape<typeof PositionSchema> {
  if (typeof position === "number") {
    return { kind: { case: "index", value: position } };
  }
  if (typeof position === "string") {
    return { kind: { case: "named", value: NAMED[position] } };
  }
  const { start, stop, step } = position;
  return { kind: { case: "slice", value: { start, stop, step } } };
}

export function headsToWire(heads: number | readonly number[] | undefined): { indices: number[] } | undefined {
  return heads === undefined ? undefined : { indices: typeof heads === "number" ? [heads] : [...heads] };
}

export function tokenToWire(token: TokenLike): TokenReference {
  return create(TokenReferenceSchema, {
    kind: typeof token === "string" ? { case: "text", value: token } : { case: "id", value: token },
  });
}

export function targetToWire(target: TargetLike): TargetMessage {
  if (typeof target === "string" || typeof target === "number") {
    return create(TargetSchema, { token: tokenToWire(target) });
  }
  if (Array.isArray(target)) {
    const [token, minus] = target as readonly [TokenLike, TokenLike];
    return create(TargetSchema, { token: tokenToWire(token), minus: tokenToWire(minus) });
  }
  const { token, minus, position, answer } = target as Target;
  return create(TargetSchema, {
    token: token === undefined ? undefined : tokenToWire(token),
    minus: minus === undefined ? undefined : tokenToWire(minus),
    position,
    answer,
  });
}

export function generateToWire(options: GenerateOptions): GenerateMessage {
  const { maxNewTokens = 512, doSample = false, temperature, topP, seed, stop = [], outputHiddenStates = false } = options;
  return create(GenerateOptionsSchema, {
    maxNewTokens,
    doSample,
    temperature,
    topP,
    seed: seed === undefined ? undefined : BigInt(seed),
    stop: typeof stop === "string" ? [stop] : [...stop],
    outputHiddenStates,
  });
}

/** What a forward pass is asked for; `keep` is what it means to say nothing of logits. */
export function forwardToWire(options: ForwardOptions, keep: 0 | null): ForwardMessage {
  const { logitsToKeep: logits = keep, outputHiddenStates = false, outputAttentions = false } = options;
  return create(ForwardOptionsSchema, {
    logitsToKeep: logits === null ? undefined : typeof logits === "number" ? { last: logits } : { positions: [...logits] },
    outputHiddenStates,
    outputAttentions,
  });
}
