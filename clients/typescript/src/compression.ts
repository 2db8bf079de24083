/** Chunks made smaller for slow links: bytes regrouped by their place in the element, then Zstandard. */
import { decompress as unpack } from "fzstd";
import { InternalError } from "./errors.js";

/** Bytes a second: on a link slower than this, regrouping and Zstandard gain more time than they take. */
const SLOW_LINK = 40e6;

/** Whether chunks are to be compressed, by what the caller chose and by the link's speed as far as it is known. */
export function worthwhile(compression: "auto" | "none" | "zstd" = "auto", bytesPerSecond: number | undefined): boolean {
  return compression === "auto" ? bytesPerSecond !== undefined && bytesPerSecond < SLOW_LINK : compression === "zstd";
}

/**
 * The bytes of a compressed chunk.
 *
 * @param data The Zstandard frame.
 * @param item Bytes of an element; data of another multiple was not regrouped.
 * @param bound The most bytes there may be.
 */
export function decompress(data: Uint8Array, item: number, bound: number): Uint8Array {
  const size = contentSize(data);
  if (size === undefined || size > bound) {
    throw new InternalError(`a compressed chunk says that it holds ${size ?? "unknown"} bytes, where ${bound} remain.`);
  }
  let plain: Uint8Array;
  try {
    plain = unpack(data, new Uint8Array(size));
  } catch (error) {
    throw new InternalError(`a compressed chunk cannot be read: ${String(error)}.`, { cause: error });
  }
  if (item === 1 || size % item !== 0) {
    return plain;
  }
  const out = new Uint8Array(size);
  const count = size / item;
  for (let place = 0; place < item; place++) {
    for (let element = 0; element < count; element++) {
      out[element * item + place] = plain[place * count + element];
    }
  }
  return out;
}

/** The size that a frame's header states (RFC 8878, section 3.1.1.1); undefined where there is none. */
function contentSize(frame: Uint8Array): number | undefined {
  if (frame.length < 6 || frame[0] !== 0x28 || frame[1] !== 0xb5 || frame[2] !== 0x2f || frame[3] !== 0xfd) {
    throw new InternalError("a compressed chunk cannot be read: it is no Zstandard frame.");
  }
  const descriptor = frame[4];
  const single = (descriptor & 0x20) !== 0;
  const width = [single ? 1 : 0, 2, 4, 8][descriptor >> 6];
  const start = 5 + (single ? 0 : 1) + [0, 1, 2, 4][descriptor & 3];
  if (width === 0 || start + width > frame.length) {
    return undefined;
  }
  let size = 0;
  for (let at = width - 1; at >= 0; at--) {
    size = size * 256 + frame[start + at];
  }
  return width === 2 ? size + 256 : size;
}
