/** What is the same in Node and in browsers: everything but the way to the server. */
export { ActivationCache } from "./cache.js";
export { type CommonConnectOptions, type Estimate, type ModelInfo, RemoteVLM } from "./client.js";
export type { Point } from "./clicks.js";
export { Cost } from "./cost.js";
export type { DtypeName, Elements } from "./dtypes.js";
export {
  BusyError,
  CancelledError,
  CaptureNotFoundError,
  CaptureTooLargeError,
  ClientBusyError,
  DeadlineError,
  type ErrorDetails,
  ImageNotFoundError,
  InternalError,
  InvalidImageError,
  InvalidInputError,
  ModelNotAllowedError,
  NotSupportedError,
  OutOfDeviceMemoryError,
  OverLimitError,
  PermissionDeniedError,
  PromptTooLongError,
  ShapeMismatchError,
  SpectraError,
  UnauthenticatedError,
  UnavailableError,
  UnknownHookError,
  UnknownModelError,
  UnsupportedInterventionError,
  WorkerDiedError,
} from "./errors.js";
export { Catalogue, type HookFilter, type HookSpec, matches } from "./hooks.js";
export { type ImageLayout, type ImageLike, Inputs, type PromptLike, type Size, type Tile } from "./inputs.js";
export * from "./interventions.js";
export type {
  AttributionOptions,
  CallOptions,
  CaptureOptions,
  ForwardOptions,
  GenerateOptions,
  LensOptions,
  Method,
  RunOptions,
  SamplingOptions,
  SelectionOptions,
  SweepOptions,
  TokenOptions,
} from "./options.js";
export { Attribution, ForwardOutput, type Generation, LogitLens, PatchSweep, Tensors, type TopToken } from "./results.js";
export { type Box, boxesOf, type ImageToken, imageTokens, type Overlap, positionsIn, tokensIn } from "./spatial.js";
export type { Progress, Token } from "./stream.js";
export { type Nested, stack, Tensor, type TensorLike } from "./tensor.js";
export type { Position, Positions, Slice, Target, TargetLike, TokenLike } from "./wire.js";
