/**
 * The bytes of tensors on the shortest way: from the pieces in which a response comes off the network straight into
 * their tensors, where whole messages would have to be put together first.
 *
 * What is no chunk in the usual form, or belongs nowhere yet, passes through untouched, for the generated code to read.
 * A frame is a byte of flags, four of length and a message; a message that holds a chunk has that as its only field,
 * number 15, and in it index (1, varint), offset (2, varint), crc32c (3, fixed32) and data (15, bytes), each absent where
 * it is zero (https://protobuf.dev/programming-guides/encoding).
 */
import { Code, ConnectError } from "@connectrpc/connect";

/** Where the bytes of chunks go. */
export interface Places {
  /** The room for a chunk's bytes; undefined where it has to come as a message. */
  room(index: number, offset: number, length: number): Uint8Array | undefined;
  /** All bytes of the chunk are in their room; `intact` where they are those that were sent. */
  filled(index: number, length: number, intact: boolean): void;
}

/** A chunk's fields, and where in the frame its data begins. */
interface Chunk {
  readonly index: number;
  readonly offset: number;
  readonly crc32c: number;
  readonly length: number;
  readonly start: number;
}

const FRAME = 5;
/** At most so many bytes of a frame stand before a chunk's data. */
const LONGEST_HEAD = FRAME + 6 + 6 + 11 + 5 + 6;
const [INDEX, OFFSET, CRC, LENGTH_15] = [0x08, 0x10, 0x1d, 0x7a];
const NOTHING: Uint8Array = new Uint8Array(0);

/** Fills places with the chunks of one response, and hands on the rest. */
export class Filler {
  /** A frame's beginning, too short to be judged. */
  private held = NOTHING;
  /** The chunk at hand, where its data goes to `room`. */
  private chunk: Chunk | undefined;
  private room = NOTHING;
  /** Bytes of the frame at hand that have not come. */
  private left = 0;
  private crc = 0;

  constructor(
    private readonly places: Places,
    private readonly crc32c: (data: Uint8Array, before: number) => number,
  ) {}

  /**
   * The next piece of the response, as far as others have to read it. What comes behind a part is looked at once the
   * next is asked for: when the part has been read.
   */
  *parts(piece: Uint8Array): Generator<Uint8Array, void, undefined> {
    let data = this.held.length === 0 ? piece : joined(this.held, piece);
    this.held = NOTHING;
    while (data.length > 0) {
      if (this.left === 0) {
        const size = data.length < FRAME ? LONGEST_HEAD : FRAME + lengthOf(data);
        if (data.length < Math.min(size, LONGEST_HEAD)) {
          this.held = data;
          return;
        }
        data = data.subarray(this.begin(data, size));
      }
      const part = this.left < data.length ? data.subarray(0, this.left) : data;
      data = data.subarray(part.length);
      if (this.chunk === undefined) {
        this.left -= part.length;
        yield part;
      } else {
        this.fill(this.chunk, part);
      }
    }
  }

  /** The response is at its end. */
  end(): void {
    if (this.held.length > 0 || this.left > 0) {
      throw new ConnectError("the response ended within a message", Code.DataLoss);
    }
  }

  /** Begins a frame of so many bytes; how many of them need not be looked at again. */
  private begin(frame: Uint8Array, size: number): number {
    const chunk = chunkIn(frame, size);
    const room = chunk && this.places.room(chunk.index, chunk.offset, chunk.length);
    if (chunk === undefined || room === undefined) {
      [this.chunk, this.left] = [undefined, size];
      return 0;
    }
    [this.chunk, this.room, this.left, this.crc] = [chunk, room, chunk.length, 0];
    return chunk.start;
  }

  private fill(chunk: Chunk, part: Uint8Array): void {
    this.room.set(part, chunk.length - this.left);
    this.crc = this.crc32c(part, this.crc);
    this.left -= part.length;
    if (this.left === 0) {
      this.places.filled(chunk.index, chunk.length, this.crc === chunk.crc32c);
    }
  }
}

function joined(first: Uint8Array, second: Uint8Array): Uint8Array {
  const both = new Uint8Array(first.length + second.length);
  both.set(first);
  both.set(second, first.length);
  return both;
}

function lengthOf(frame: Uint8Array): number {
  return new DataView(frame.buffer, frame.byteOffset).getUint32(1);
}

/** The chunk in a frame of so many bytes; undefined where it is anything but a chunk in the usual form. */
function chunkIn(frame: Uint8Array, size: number): Chunk | undefined {
  let at = FRAME;
  const varint = (): number => {
    let value = 0;
    for (let scale = 1; at < frame.length && scale < 2 ** 56; scale *= 128) {
      const byte = frame[at++];
      value += (byte & 0x7f) * scale;
      if (byte < 0x80) {
        return value;
      }
    }
    return NaN;
  };
  if (size === FRAME || frame[0] !== 0 || frame[at++] !== LENGTH_15 || varint() !== size - at) {
    return undefined;
  }
  let [index, offset, crc32c] = [0, 0, 0];
  for (let last = 0; at < frame.length; ) {
    const tag = frame[at++];
    if (tag <= last) {
      return undefined; // a field twice, or out of order: not how servers write
    }
    last = tag;
    if (tag === INDEX) {
      index = varint();
    } else if (tag === OFFSET) {
      offset = varint();
    } else if (tag === CRC && at + 4 <= frame.length) {
      crc32c = new DataView(frame.buffer, frame.byteOffset).getUint32(at, true);
      at += 4;
    } else if (tag === LENGTH_15) {
      const length = varint();
      const sound = length === size - at && length > 0 && index < 2 ** 32 && offset <= Number.MAX_SAFE_INTEGER;
      return sound ? { index, offset, crc32c, length, start: at } : undefined;
    } else {
      return undefined;
    }
  }
  return undefined;
}
