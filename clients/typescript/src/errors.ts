/**
 * Everything that can go wrong: one class a kind, each with the stable reason that crosses the network in
 * `google.rpc.ErrorInfo`. The names and reasons are those of the Python client.
 */
import { Code, ConnectError } from "@connectrpc/connect";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.js";

const DOMAIN = "vlm-spectra";

/** What an error says beside its sentence. */
export interface ErrorDetails {
  field?: string;
  metadata?: Record<string, string>;
  retryAfter?: number;
  requestId?: string;
  cause?: unknown;
}

/** The root of all errors of this library. */
export class SpectraError extends Error {
  /** The stable name of this kind of error. */
  readonly reason: string = "UNKNOWN";
  /** The argument that was refused, where one was. */
  readonly field: string;
  /** Machine-readable details. */
  readonly metadata: Readonly<Record<string, string>>;
  /** Seconds after which trying again makes sense. */
  readonly retryAfter: number | undefined;
  /** The server's name for the request, where there was one. */
  requestId: string;

  constructor(message: string, details: ErrorDetails = {}) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause });
    this.name = new.target.name;
    this.field = details.field ?? "";
    this.metadata = details.metadata ?? {};
    this.retryAfter = details.retryAfter;
    this.requestId = details.requestId ?? "";
  }
}

/** What was asked is not possible as it stands. */
export class InvalidInputError extends SpectraError {
  override readonly reason: string = "INVALID_INPUT";
}
/** No such hook, or its layer is out of range; the message names the nearest valid ones. */
export class UnknownHookError extends InvalidInputError {
  override readonly reason = "UNKNOWN_HOOK";
}
/** Not an image, damaged, or too large. */
export class InvalidImageError extends InvalidInputError {
  override readonly reason = "INVALID_IMAGE";
}
/** More tokens than the model's context holds. */
export class PromptTooLongError extends InvalidInputError {
  override readonly reason = "PROMPT_TOO_LONG";
}
/** A tensor does not fit the activation it is meant for. */
export class ShapeMismatchError extends InvalidInputError {
  override readonly reason = "SHAPE_MISMATCH";
}
/** An intervention that cannot cross the network. */
export class UnsupportedInterventionError extends InvalidInputError {
  override readonly reason = "UNSUPPORTED_INTERVENTION";
}
/** More than this server takes in one request; `metadata` has the limit's name, its value and what was asked. */
export class OverLimitError extends InvalidInputError {
  override readonly reason = "OVER_LIMIT";
}
/** The server holds no such model. */
export class UnknownModelError extends SpectraError {
  override readonly reason = "UNKNOWN_MODEL";
}
/** The capture has expired, or never existed. */
export class CaptureNotFoundError extends SpectraError {
  override readonly reason = "CAPTURE_NOT_FOUND";
}
/** The server wants the bytes of images; the client sends them and tries again. */
export class ImageNotFoundError extends SpectraError {
  override readonly reason = "IMAGE_NOT_FOUND";
}
/** The capture is over the server's limit; the message names a narrower selection that fits. */
export class CaptureTooLargeError extends SpectraError {
  override readonly reason = "CAPTURE_TOO_LARGE";
}
/** The queue is full; trying again after `retryAfter` seconds makes sense. */
export class BusyError extends SpectraError {
  override readonly reason: string = "QUEUE_FULL";
}
/** This client has as many requests at work as one client may have; one of them has to end first. */
export class ClientBusyError extends BusyError {
  override readonly reason = "CLIENT_BUSY";
}
/** The device's memory did not suffice; the next request works. */
export class OutOfDeviceMemoryError extends SpectraError {
  override readonly reason = "OUT_OF_DEVICE_MEMORY";
}
/** The time given was not enough. */
export class DeadlineError extends SpectraError {
  override readonly reason = "DEADLINE_EXCEEDED";
}
/** The caller, or a server that stops, ended the call. */
export class CancelledError extends SpectraError {
  override readonly reason = "CANCELLED";
}
/** No server there, it went away in mid-stream or stops, or the model is not ready, leaves or comes back. */
export class UnavailableError extends SpectraError {
  override readonly reason: string = "UNAVAILABLE";
}
/** The model's worker died while it ran this request, perhaps because of it; the request may be tried again once. */
export class WorkerDiedError extends UnavailableError {
  override readonly reason = "WORKER_DIED";
}
/** This server, or this model's family, does not do that. */
export class NotSupportedError extends SpectraError {
  override readonly reason = "NOT_SUPPORTED";
}
/** The server wants a bearer token, and there was none or not one of its own. */
export class UnauthenticatedError extends SpectraError {
  override readonly reason = "UNAUTHENTICATED";
}
/** The token lacks a scope that the call needs; the message names it. */
export class PermissionDeniedError extends SpectraError {
  override readonly reason = "MISSING_SCOPE";
}
/** The server does not load this model for its clients; the message names what it loads. */
export class ModelNotAllowedError extends SpectraError {
  override readonly reason = "MODEL_NOT_ALLOWED";
}
/** A fault of the server's; its log has the details under `requestId`. */
export class InternalError extends SpectraError {
  override readonly reason = "INTERNAL";
}

/** What came is not what was sent. */
export class Damaged extends Error {}

type ErrorClass = new (message: string, details?: ErrorDetails) => SpectraError;

const BY_REASON = new Map<string, ErrorClass>(
  [
    InvalidInputError,
    UnknownHookError,
    InvalidImageError,
    PromptTooLongError,
    ShapeMismatchError,
    UnsupportedInterventionError,
    OverLimitError,
    UnknownModelError,
    CaptureNotFoundError,
    ImageNotFoundError,
    CaptureTooLargeError,
    BusyError,
    ClientBusyError,
    OutOfDeviceMemoryError,
    DeadlineError,
    CancelledError,
    UnavailableError,
    WorkerDiedError,
    NotSupportedError,
    UnauthenticatedError,
    PermissionDeniedError,
    ModelNotAllowedError,
    InternalError,
  ].map((kind) => [new kind("").reason, kind]),
);

const BY_CODE = new Map<Code, ErrorClass>([
  [Code.Canceled, CancelledError],
  [Code.DeadlineExceeded, DeadlineError],
  [Code.InvalidArgument, InvalidInputError],
  [Code.Unavailable, UnavailableError],
  [Code.Aborted, UnavailableError],
  [Code.Unimplemented, NotSupportedError],
  [Code.Unauthenticated, UnauthenticatedError],
  [Code.PermissionDenied, PermissionDeniedError],
  [Code.Internal, InternalError],
]);

/** What a call that fails throws, as an error of this library. */
export function toSpectraError(thrown: unknown, address: string): SpectraError {
  if (thrown instanceof SpectraError) {
    return thrown;
  }
  const damage = damageIn(thrown);
  if (damage !== undefined) {
    return new InternalError(damage.message, { cause: thrown });
  }
  const error = ConnectError.from(thrown);
  const info = error.findDetails(ErrorInfoSchema).at(0);
  const byCode = failedOnTheWay(error) ? UnavailableError : BY_CODE.get(error.code) ?? InternalError;
  if (info !== undefined) {
    const { request_id: requestId, ...metadata } = info.metadata;
    const violation = error.findDetails(BadRequestSchema).at(0)?.fieldViolations.at(0);
    const delay = error.findDetails(RetryInfoSchema).at(0)?.retryDelay;
    const retryAfter = delay === undefined ? undefined : Number(delay.seconds) + delay.nanos / 1e9;
    const kind = BY_REASON.get(info.reason) ?? byCode;
    return new kind(error.rawMessage, { field: violation?.field, metadata, retryAfter, requestId, cause: thrown });
  }
  if (byCode === UnavailableError) {
    const cure = address.startsWith("http")
      ? "is `vlm-spectra web` running there, and may a page of this origin call it (`--cors-origin`)?"
      : "is `vlm-spectra serve` running there, and is `tls` what the server wants?";
    const message = `the server at ${address} cannot be reached or went away (${error.rawMessage}); ${cure}`;
    return new UnavailableError(message, { cause: thrown });
  }
  return new byCode(`the call to ${address} failed with ${Code[error.code]}: ${error.rawMessage}`, { cause: thrown });
}

/** Whether the connection failed, and not the call: a stream was reset, `fetch` gave up, or Node's own error has a code in words. */
function failedOnTheWay(error: ConnectError): boolean {
  const { cause } = error;
  if (error.rawMessage.startsWith("http/2 stream closed") || (error.code === Code.Unknown && cause instanceof TypeError)) {
    return true;
  }
  return error.code === Code.Internal && cause instanceof Error && "code" in cause && typeof cause.code === "string";
}

const REFUSALS = new Set([
  Code.DeadlineExceeded,
  Code.Unimplemented,
  Code.Unauthenticated,
  Code.PermissionDenied,
  Code.ResourceExhausted,
  Code.NotFound,
]);

/** The damage that a call failed with. */
function damageIn(thrown: unknown): Damaged | undefined {
  const found = thrown instanceof ConnectError ? thrown.cause : thrown;
  return found instanceof Damaged ? found : undefined;
}

/** Whether a call failed on its way, and not by the server's will. */
export function wasLost(thrown: unknown): boolean {
  if (thrown instanceof SpectraError) {
    return false;
  }
  if (damageIn(thrown) !== undefined) {
    return true;
  }
  if (!(thrown instanceof ConnectError)) {
    return false;
  }
  const ours = thrown.findDetails(ErrorInfoSchema).some((info) => info.domain === DOMAIN);
  return !ours && !REFUSALS.has(thrown.code);
}
