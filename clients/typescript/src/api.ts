/** What is the same in Node and in browsers: everything but the way to the server. */
export { ActivationCache } from "./cache.js";
export {
  type AttributionOptions,
  type CallOptions,
  type CaptureOptions,
  type Estimate,
  type ForwardOptions,
  type GenerateOptions,
  type LensOptions,
  type Method,
  type ModelInfo,
  RemoteVLM,
  type RunOptions,
  type SweepOptions,
} from "./client.js";
export type { Point } from "./clicks.js";
export type { DtypeName, Elements } from "./dtypes.js";
export * from "./errors.js";
export { Catalogue, type HookFilter, type HookSpec, matches } from "./hooks.js";
export { type ImageLayout, type ImageLike, Inputs, type PromptLike, type Size, type Tile } from "./inputs.js";
export * from "./interventions.js";
export { Attribution, ForwardOutput, type Generation, LogitLens, PatchSweep, Tensors, type TopToken } from "./results.js";
export { type Box, type ImageToken, imageTokens, positionsIn } from "./spatial.js";
export type { Progress, Token } from "./stream.js";
export { type Nested, stack, Tensor, type TensorLike } from "./tensor.js";
export type { Position, Positions, Slice, Target, TargetLike, TokenLike } from "./wire.js";
