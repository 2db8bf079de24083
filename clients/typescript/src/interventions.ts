/**
 * What to change inside a forward pass: `[zeroAblation("lm.blocks.*.hook_mlp_out", { positions: "last" })]` goes into any
 * call as its option `interventions`, and applies in that order.
 */
import { create } from "@bufbuild/protobuf";
import { type Intervention, InterventionSchema } from "./gen/vlm_spectra/v1/intervention_pb.js";
import { type TensorValue, TensorValueSchema } from "./gen/vlm_spectra/v1/tensor_pb.js";
import { check, checkValue, type Kinds, number, OPTIONS, text } from "./options.js";
import { type TensorLike, tensorToWire } from "./tensor.js";
import { headsToWire, type Positions, positionsToWire } from "./wire.js";

export type { Intervention };

/** Where an intervention applies. */
export interface Where {
  /** The positions to change; all where absent. */
  positions?: Positions;
  /** The heads to change, where the hook has heads; all where absent. */
  heads?: number | readonly number[];
}

/** An activation of an earlier capture that the server still holds; see `ActivationCache.reference`. */
export interface CaptureReference {
  readonly captureId: string;
  readonly hook: string;
}

/** The values of an intervention. */
export type Value = TensorLike | CaptureReference;

/** Replaces the selected part by a tensor that broadcasts to its shape. */
export function patchActivation(hook: string, value: Value, where: Where = {}): Intervention {
  return at(hook, where, { case: "patchActivation", value: { value: valueToWire(value) } });
}

/** Sets the selected part to zero. */
export function zeroAblation(hook: string, where: Where = {}): Intervention {
  return at(hook, where, { case: "zeroAblation", value: {} });
}

/** Replaces the selected part by a mean over positions, of this run's own activation or of a given tensor. */
export function meanAblation(hook: string, where: Where & { value?: Value } = {}): Intervention {
  const value = where.value === undefined ? undefined : valueToWire(where.value);
  return at(hook, where, { case: "meanAblation", value: { value } }, { value: anything });
}

/** Adds `scale * value`. */
export function addActivation(hook: string, value: Value, where: Where & { scale?: number } = {}): Intervention {
  return at(hook, where, { case: "addActivation", value: { value: valueToWire(value), scale: where.scale ?? 1 } }, { scale: number });
}

/** Multiplies the selected part. */
export function scaleActivation(hook: string, factor: number, where: Where = {}): Intervention {
  checkValue("factor", factor, number);
  return at(hook, where, { case: "scaleActivation", value: { factor } });
}

/** Removes the component along a direction. */
export function projectOut(hook: string, direction: Value, where: Where = {}): Intervention {
  return at(hook, where, { case: "projectOut", value: { direction: valueToWire(direction) } });
}

/** Replaces the output (`attn.hook_z`) of whole heads. */
export function patchHead(hook: string, value: Value, where: Where = {}): Intervention {
  return at(hook, where, { case: "patchHead", value: { value: valueToWire(value) } });
}

/** Masks attention from the selected query positions to key positions. */
export function blockAttention(hook: string, where: Where & { keys?: Positions } = {}): Intervention {
  return at(hook, where, { case: "blockAttention", value: { keys: positionsToWire(where.keys) } }, { keys: WHERE.positions });
}

/** Replaces the attention mask of the selected query positions; a boolean tensor, or one that is added to the scores. */
export function setAttentionMask(hook: string, mask: Value, where: Where = {}): Intervention {
  return at(hook, where, { case: "setAttentionMask", value: { mask: valueToWire(mask) } });
}

type KindInit = NonNullable<Parameters<typeof create<typeof InterventionSchema>>[1]>["kind"];

const WHERE: Kinds<Where> = OPTIONS["an intervention"];
/** Values are looked at where they are made into messages. */
const anything = { possible: "a tensor", holds: () => true };

function at<T extends Where>(hook: string, where: T, kind: KindInit, more?: Kinds<Omit<T, keyof Where>>): Intervention {
  checkValue("hook", hook, text);
  check("an intervention", where, { ...WHERE, ...more } as unknown as Kinds<T>);
  return create(InterventionSchema, {
    hook,
    positions: positionsToWire(where.positions),
    heads: headsToWire(where.heads),
    kind,
  });
}

function valueToWire(value: Value): TensorValue {
  const source = isReference(value) ? ({ case: "reference", value } as const) : ({ case: "inline", value: tensorToWire(value) } as const);
  return create(TensorValueSchema, { source });
}

function isReference(value: Value): value is CaptureReference {
  const { captureId, hook } = (value as Partial<CaptureReference> | null) ?? {};
  return typeof captureId === "string" && typeof hook === "string";
}
