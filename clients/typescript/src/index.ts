/** Look inside a vision-language model that runs behind a VLM Spectra server. */
export { ActivationCache } from "./cache.js";
export {
  type AttributionOptions,
  type CaptureOptions,
  connect,
  type ConnectOptions,
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
export type { Progress, Token } from "./stream.js";
export { type Nested, stack, Tensor, type TensorLike } from "./tensor.js";
export type { Tls } from "./transport.js";
export type { Position, Positions, Slice, Target, TargetLike, TokenLike } from "./wire.js";
