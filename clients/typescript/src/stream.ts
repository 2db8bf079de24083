/**
 * Reading a streaming response: chunks go straight into their tensors while the caller goes on.
 *
 * A capture outlives its connection: where that is lost, the stream asks the server for the rest from the offsets it
 * has, by itself and without running the model again.
 */
import { ConnectError } from "@connectrpc/connect";
import { decompress } from "./compression.js";
import type { Connection } from "./connection.js";
import type { Places } from "./direct.js";
import { dtypeFromWire, itemSize } from "./dtypes.js";
import { CancelledError, InternalError, SpectraError, toSpectraError, UnavailableError, wasLost } from "./errors.js";
import type { RunWithCacheResponse } from "./gen/vlm_spectra/v1/spectra_service_pb.js";
import { type Header, Phase, type Summary } from "./gen/vlm_spectra/v1/stream_pb.js";
import { Compression, type TensorChunk, type TensorHeader } from "./gen/vlm_spectra/v1/tensor_pb.js";
import { pause } from "./retries.js";
import { sizeOf, Tensor } from "./tensor.js";

/** How often in a row a stream asks for the rest without getting any, before it gives up. */
const ATTEMPTS = 8;

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
  readonly done: number;
  /** 0 where unknown. */
  readonly total: number;
}

/** A call that a stream reads: what ends it, and where its tensors go. */
export interface Call {
  readonly signal: AbortSignal;
  readonly places: Places;
}

/** How a stream is opened, and followed. */
export interface StreamOptions {
  connection: Connection;
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

/** What came is not what was sent. */
class Damaged extends Error {}

/** A streaming response, being read from the moment it is made. */
export class TensorStream {
  /** The first header; undefined until it has come. */
  header: Header | undefined;
  /** The end; undefined until it has come. */
  summary: Summary | undefined;
  private readonly byIndex = new Map<number, Incoming>();
  private readonly byName = new Map<string, Incoming>();
  private readonly order: Incoming[] = [];
  private readonly seen = new Set<string>();
  private readonly abort = new AbortController();
  private waiting: (() => void)[] = [];
  private error: SpectraError | undefined;
  private finished = false;
  private announced = false;
  private received = 0;
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
      if (this.error !== undefined) {
        throw this.error;
      }
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
    if (this.error !== undefined) {
      throw this.error;
    }
  }

  /** Waits for the end. */
  async done(): Promise<void> {
    while (!this.finished) {
      await this.change();
    }
    if (this.error !== undefined) {
      throw this.error;
    }
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
    const captureId = this.header?.captureId;
    this.abort.abort();
    if (captureId && !this.finished) {
      this.options.release?.(captureId);
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
    let error: SpectraError | undefined;
    try {
      error = await this.readToTheEnd();
    } catch (thrown) {
      error = thrown instanceof SpectraError ? thrown : new InternalError(`reading the stream failed: ${String(thrown)}`, { cause: thrown });
    }
    const missing = this.names.find((name) => !this.arrived(name));
    if (error === undefined && missing !== undefined) {
      error = new UnavailableError(`the stream ended before ${missing} was complete.`);
    }
    this.error = error;
    this.finished = true;
    this.abort.abort();
    this.changed();
  }

  /** Reads, and reads on after a cut; the error that ends it, if one does. */
  private async readToTheEnd(): Promise<SpectraError | undefined> {
    const { connection, resume } = this.options;
    const { address } = connection;
    let failures = 0;
    let events = this.options.open;
    for (;;) {
      const before = this.received;
      const call = new AbortController();
      let error: SpectraError;
      try {
        const signal = AbortSignal.any([call.signal, this.abort.signal]);
        for await (const { event } of events({ signal, places: this.places })) {
          if (this.take(event)) {
            return undefined;
          }
        }
        error = new UnavailableError(`the server at ${address} ended the stream before its end.`);
      } catch (thrown) {
        if (this.abort.signal.aborted) {
          return new CancelledError("the call was cancelled.", { cause: thrown });
        }
        const damage = thrown instanceof ConnectError ? thrown.cause : thrown;
        error = damage instanceof Damaged ? new InternalError(damage.message) : toSpectraError(thrown, address);
        if (!(damage instanceof Damaged) && !wasLost(thrown)) {
          return error;
        }
      } finally {
        call.abort();
      }
      const captureId = this.header?.captureId;
      if (resume === undefined || !captureId || this.isLeft()) {
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
          this.options.onToken?.({ row, index, id, text, logprob });
        }
        break;
      }
      case "progress": {
        const { phase, done, total } = event.value;
        this.options.onProgress?.({ phase: PHASES.get(phase) ?? "unspecified", done: Number(done), total: Number(total) });
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
  const dtype = dtypeFromWire(header.dtype);
  const shape = header.shape.map(Number);
  const size = sizeOf(shape) * itemSize(dtype);
  if (BigInt(size) !== header.byteCount) {
    throw new InternalError(`the server announced ${header.name} with ${header.byteCount} bytes, not ${size}.`);
  }
  const tensor = new Tensor(dtype, shape, new Uint8Array(size));
  return { name: header.name, tensor, zstd: header.compression === Compression.ZSTD, got: 0 };
}
