/**
 * Reading a streaming response: chunks go straight into their tensors while the caller goes on.
 *
 * A capture outlives its connection: where that is lost, the stream asks the server for the rest from the offsets it
 * has, by itself and without running the model again.
 */
import { decompress } from "./compression.js";
import type { Connection } from "./connection.js";
import { Cost } from "./cost.js";
import type { Places } from "./direct.js";
import { dtypeFromWire, itemSize } from "./dtypes.js";
import { CancelledError, Damaged, InternalError, SpectraError, toSpectraError, UnavailableError, wasLost } from "./errors.js";
import type { RunWithCacheResponse } from "./gen/vlm_spectra/v1/spectra_service_pb.js";
import { type Header, Phase, type Summary } from "./gen/vlm_spectra/v1/stream_pb.js";
import { Compression, type TensorChunk, type TensorHeader } from "./gen/vlm_spectra/v1/tensor_pb.js";
import { following, pause, type Retries } from "./retries.js";
import { Tensor } from "./tensor.js";

/** How often in a row a stream asks for the rest without getting any, before it gives up. */
const ATTEMPTS = 8;
/** So many bytes tell how fast the link is. */
const TELLING = 4 << 20;

/** Responses of any streaming method: their events have the same numbers and meanings. */
export type Events = AsyncIterable<{ readonly event: RunWithCacheResponse["event"] }>;

/** A token as it is chosen. */
export interface Token {
  /** The batch row. */
  readonly row: number;
  /** Its number in the answer, from 0. */
  readonly index: number;
  readonly id: number;
  /** The text that is complete with it; empty in the middle of a character. */
  readonly text: string;
  /** The natural logarithm of its probability under the model. */
  readonly logprob: number;
}

const PHASES = new Map<Phase, Progress["phase"]>([
  [Phase.QUEUED, "queued"],
  [Phase.PREPARING, "preparing"],
  [Phase.FORWARD, "forward"],
  [Phase.GENERATING, "generating"],
  [Phase.ANALYSING, "analysing"],
]);

/** How far a request is. */
export interface Progress {
  readonly phase: "unspecified" | "queued" | "preparing" | "forward" | "generating" | "analysing";
  /** Units done; in the queue the call's place, 1 being next. */
  readonly done: number;
  /** Units in all, 0 where unknown; in the queue how many wait. */
  readonly total: number;
}

/** A call that a stream reads: what ends it, and where its tensors go. */
export interface Call {
  readonly signal: AbortSignal;
  readonly places: Places;
  /** Seconds that it may take; no limit where absent. */
  readonly left: number | undefined;
}

/** How a stream is opened, and followed. */
export interface StreamOptions {
  connection: Connection;
  /** Of a call with a time limit: how much of it is left, for however many connections. */
  attempts?: Retries;
  open: (call: Call) => Events;
  /** For captures: a call for the rest, from the bytes there are of each tensor, by index. */
  resume?: (captureId: string, offsets: ReadonlyMap<number, number>, call: Call) => Events;
  /** For captures: tells the server that no more is wanted. */
  release?: (captureId: string) => void;
  onToken?: (token: Token) => void;
  onProgress?: (progress: Progress) => void;
  signal?: AbortSignal;
}

/** A tensor on its way. */
interface Incoming {
  readonly name: string;
  readonly tensor: Tensor;
  readonly zstd: boolean;
  got: number;
}

/** The caller's own function threw, and what. */
class Raised extends Error {
  constructor(readonly what: unknown) {
    super(String(what));
  }
}

/** A streaming response, being read from the moment it is made. */
export class TensorStream {
  /** The first header; undefined until it has come. */
  header: Header | undefined;
  /** The name under which the server holds a capture; empty until it has said so. */
  captureId = "";
  /** The end; undefined until it has come. */
  summary: Summary | undefined;
  private readonly byIndex = new Map<number, Incoming>();
  private readonly byName = new Map<string, Incoming>();
  private readonly order: Incoming[] = [];
  private readonly seen = new Set<string>();
  private readonly abort = new AbortController();
  private waiting: (() => void)[] = [];
  private failure: { readonly error: unknown } | undefined;
  private finished = false;
  private announced = false;
  private received = 0;
  private clock = { index: -1, time: 0 };
  private timed = { bytes: 0, seconds: 0 };
  private readonly places: Places = {
    room: (index, offset, length) => {
      const incoming = this.byIndex.get(index);
      const fits = incoming?.got === offset && !incoming.zstd && offset + length <= incoming.tensor.bytes.length;
      return fits ? incoming.tensor.bytes.subarray(offset, offset + length) : undefined;
    },
    filled: (index, length, intact) => {
      const incoming = this.byIndex.get(index);
      if (incoming !== undefined) {
        this.grow(incoming, length, intact);
        this.time(index, length);
      }
    },
  };

  constructor(private readonly options: StreamOptions) {
    options.signal?.addEventListener("abort", () => this.cancel(), { once: true, signal: this.abort.signal });
    if (options.signal?.aborted) {
      this.abort.abort();
    }
    void this.read();
  }

  /** The tensors announced so far. */
  get names(): string[] {
    return [...this.byName.keys()];
  }

  /** Bytes a second that the connection carried; undefined where too few came to tell. */
  get speed(): number | undefined {
    return this.timed.bytes >= TELLING ? this.timed.bytes / this.timed.seconds : undefined;
  }

  /** What the call took; complete once it has ended. */
  get cost(): Cost {
    return new Cost(this.header, this.summary);
  }

  /** Whether anything of the answer has come. */
  get begun(): boolean {
    return this.seen.size > 0 || this.announced;
  }

  /** Whether a tensor is complete. */
  arrived(name: string): boolean {
    const incoming = this.byName.get(name);
    return incoming !== undefined && incoming.got === incoming.tensor.bytes.length;
  }

  /** Bytes of an announced tensor; 0 of any other. */
  byteCount(name: string): number {
    return this.byName.get(name)?.tensor.bytes.length ?? 0;
  }

  /** A tensor as soon as it is complete; undefined where the server sends none of that name. */
  async get(name: string): Promise<Tensor | undefined> {
    for (;;) {
      const incoming = this.byName.get(name);
      if (incoming !== undefined && incoming.got === incoming.tensor.bytes.length) {
        return incoming.tensor;
      }
      this.rethrow();
      if (this.finished || (this.announced && !this.byName.has(name))) {
        return undefined;
      }
      await this.change();
    }
  }

  /** Waits until the server has said what will come, or has refused. */
  async opened(): Promise<void> {
    while (!this.announced && !this.finished) {
      await this.change();
    }
    this.rethrow();
  }

  /** Waits for the end. */
  async done(): Promise<void> {
    while (!this.finished) {
      await this.change();
    }
    this.rethrow();
  }

  /** Tensors as they are completed. Leaving the loop early leaves the stream as it is. */
  async *completed(): AsyncGenerator<[string, Tensor], void, undefined> {
    for (let next = 0; ; next++) {
      while (next >= this.order.length && !this.finished) {
        await this.change();
      }
      if (next >= this.order.length) {
        return this.done();
      }
      yield [this.order[next].name, this.order[next].tensor];
    }
  }

  /** Gives up what has not come yet; the server ends the run. */
  cancel(): void {
    this.abort.abort();
    if (this.captureId !== "" && !this.finished) {
      this.options.release?.(this.captureId);
    }
  }

  private rethrow(): void {
    if (this.failure !== undefined) {
      throw this.failure.error;
    }
  }

  private isLeft(): boolean {
    return this.abort.signal.aborted;
  }

  private change(): Promise<void> {
    return new Promise((resolve) => this.waiting.push(resolve));
  }

  private changed(): void {
    const waiting = this.waiting;
    this.waiting = [];
    waiting.forEach((resolve) => resolve());
  }

  private async read(): Promise<void> {
    try {
      const error = await this.readToTheEnd();
      const missing = this.names.find((name) => !this.arrived(name));
      if (error !== undefined) {
        this.failure = { error };
      } else if (missing !== undefined) {
        this.failure = { error: new UnavailableError(`the stream ended before ${missing} was complete.`) };
      }
    } catch (thrown) {
      if (thrown instanceof Raised) {
        this.failure = { error: thrown.what };
        this.cancel();
      } else {
        const error = thrown instanceof SpectraError ? thrown : new InternalError(`reading the stream failed: ${String(thrown)}`, { cause: thrown });
        this.failure = { error };
      }
    }
    const error = this.failure?.error;
    if (error instanceof SpectraError) {
      error.requestId ||= this.header?.requestId ?? ""; // it failed here, or on the way
    }
    this.finished = true;
    this.abort.abort();
    this.changed();
  }

  /** Reads, and reads on after a cut; the error that ends it, if one does. */
  private async readToTheEnd(): Promise<SpectraError | undefined> {
    const { attempts, connection, resume } = this.options;
    const { address } = connection;
    let failures = 0;
    let events = this.options.open;
    for (;;) {
      const before = this.received;
      const call = following(this.abort.signal);
      let error: SpectraError;
      try {
        for await (const { event } of events({ signal: call.signal, places: this.places, left: attempts?.left })) {
          if (this.take(event)) {
            return undefined;
          }
        }
        error = new UnavailableError(`the server at ${address} ended the stream before its end.`);
      } catch (thrown) {
        if (this.isLeft()) {
          return new CancelledError("the call was cancelled.", { cause: thrown });
        }
        if (thrown instanceof Raised) {
          throw thrown;
        }
        error = toSpectraError(thrown, address);
        if (!wasLost(thrown)) {
          return error;
        }
      } finally {
        call.abort();
      }
      const { captureId } = this;
      if (resume === undefined || captureId === "" || this.isLeft()) {
        return error;
      }
      failures = this.received > before ? 1 : failures + 1;
      if (failures > ATTEMPTS) {
        return error;
      }
      const seconds = Math.min(0.05 * 2 ** failures, 2) * (0.5 + Math.random() / 2);
      await pause(seconds, this.abort.signal);
      if (this.isLeft()) {
        return new CancelledError("the call was cancelled.");
      }
      const have = new Map([...this.byIndex].map(([index, incoming]) => [index, incoming.got]));
      events = (next) => resume(captureId, have, next);
    }
  }

  /** One event; whether it was the last. */
  private take(event: RunWithCacheResponse["event"]): boolean {
    switch (event.case) {
      case "chunk":
        this.put(event.value);
        break;
      case "header":
        this.announce(event.value);
        break;
      case "token": {
        const { row, index, id, text, logprob } = event.value;
        if (!this.seen.has(`${row},${index}`)) {
          this.seen.add(`${row},${index}`);
          this.tell(this.options.onToken, { row, index, id, text, logprob });
        }
        break;
      }
      case "progress": {
        const { phase, done, total } = event.value;
        this.tell(this.options.onProgress, { phase: PHASES.get(phase) ?? "unspecified", done: Number(done), total: Number(total) });
        break;
      }
      case "summary":
        this.summary = event.value;
        return true;
      case "ready":
      case undefined:
        break;
    }
    return false;
  }

  private tell<T>(whom: ((what: T) => void) | undefined, what: T): void {
    try {
      whom?.(what);
    } catch (raised) {
      throw new Raised(raised);
    }
  }

  private announce(header: Header): void {
    const fresh = header.tensors.filter((each) => !this.byIndex.has(each.index));
    for (const each of fresh) {
      const incoming = incomingOf(each);
      this.byIndex.set(each.index, incoming);
      this.byName.set(each.name, incoming);
      if (incoming.tensor.bytes.length === 0) {
        this.order.push(incoming);
      }
    }
    this.header ??= header;
    this.captureId ||= header.captureId;
    this.announced ||= header.tensors.length > 0;
    this.changed();
  }

  private put(chunk: TensorChunk): void {
    const incoming = this.byIndex.get(chunk.index);
    if (incoming === undefined || BigInt(incoming.got) !== chunk.offset) {
      throw new Damaged(`a chunk of tensor ${chunk.index} at ${chunk.offset} does not go on where the last ended.`);
    }
    const intact = this.options.connection.crc32c(chunk.data) === chunk.crc32c;
    const { tensor, got } = incoming;
    const room = tensor.bytes.length - got;
    const data = incoming.zstd && intact ? decompress(chunk.data, itemSize(tensor.dtype), room) : chunk.data;
    if (intact && data.length > room) {
      throw new InternalError(`a chunk of tensor ${chunk.index} at ${chunk.offset} goes beyond the tensor's end.`);
    }
    if (intact) {
      tensor.bytes.set(data, got);
    }
    this.grow(incoming, data.length, intact);
    this.time(chunk.index, chunk.data.length);
  }

  /** The link's speed shows between chunks of one tensor: those leave the server one after the other. */
  private time(index: number, size: number): void {
    const time = performance.now();
    if (this.clock.index === index) {
      this.timed.bytes += size;
      this.timed.seconds += (time - this.clock.time) / 1000;
    }
    this.clock = { index, time };
  }

  /** More bytes of a tensor are in their place. */
  private grow(incoming: Incoming, length: number, intact: boolean): void {
    if (!intact) {
      throw new Damaged(`a chunk of ${incoming.name} at ${incoming.got} was damaged on its way.`);
    }
    incoming.got += length;
    this.received += length;
    if (length > 0 && incoming.got === incoming.tensor.bytes.length) {
      this.order.push(incoming);
      this.changed();
    }
  }
}

function incomingOf(header: TensorHeader): Incoming {
  const { name, byteCount } = header;
  const dtype = dtypeFromWire(header.dtype);
  const size = header.shape.reduce((product, extent) => product * extent, BigInt(itemSize(dtype)));
  if (size !== byteCount || header.shape.some((extent) => extent < 0n)) {
    throw new InternalError(`the server announced ${name} with ${byteCount} bytes and the shape [${header.shape.join(", ")}] of ${dtype}.`);
  }
  let bytes: Uint8Array;
  try {
    bytes = new Uint8Array(Number(size));
  } catch (error) {
    throw new InternalError(`the ${size} bytes of ${name} do not fit into this environment's memory.`, { cause: error });
  }
  const tensor = new Tensor(dtype, header.shape.map(Number), bytes);
  return { name, tensor, zstd: header.compression === Compression.ZSTD, got: 0 };
}
