/** Element types by name, and their elements as numbers. */
import { InvalidInputError } from "./errors.js";
import { Dtype } from "./gen/vlm_spectra/v1/tensor_pb.js";

/** The name of an element type. */
export type DtypeName =
  | "bool"
  | "uint8"
  | "int8"
  | "int16"
  | "int32"
  | "int64"
  | "float16"
  | "bfloat16"
  | "float32"
  | "float64"
  | "float8_e4m3fn"
  | "float8_e5m2";

/** The elements of a tensor as they crossed the network: 16-bit and 8-bit floats as the integers of their bits. */
export type Elements =
  | Uint8Array
  | Int8Array
  | Int16Array
  | Uint16Array
  | Int32Array
  | BigInt64Array
  | Float32Array
  | Float64Array;

interface Kind {
  wire: Dtype;
  bytes: number;
  view: (buffer: ArrayBuffer, offset: number, length: number) => Elements;
  /** The value of some bits, where the elements are not numbers themselves. */
  decode?: (bits: number) => number;
}

const bytes = (buffer: ArrayBuffer, offset: number, length: number) => new Uint8Array(buffer, offset, length);
const halves = (buffer: ArrayBuffer, offset: number, length: number) => new Uint16Array(buffer, offset, length);

const KINDS: Record<DtypeName, Kind> = {
  bool: { wire: Dtype.BOOL, bytes: 1, view: bytes },
  uint8: { wire: Dtype.UINT8, bytes: 1, view: bytes },
  int8: { wire: Dtype.INT8, bytes: 1, view: (b, o, n) => new Int8Array(b, o, n) },
  int16: { wire: Dtype.INT16, bytes: 2, view: (b, o, n) => new Int16Array(b, o, n) },
  int32: { wire: Dtype.INT32, bytes: 4, view: (b, o, n) => new Int32Array(b, o, n) },
  int64: { wire: Dtype.INT64, bytes: 8, view: (b, o, n) => new BigInt64Array(b, o, n) },
  float16: { wire: Dtype.FLOAT16, bytes: 2, view: halves, decode: (bits) => small(bits, 5, 10, "ieee") },
  bfloat16: { wire: Dtype.BFLOAT16, bytes: 2, view: halves, decode: upperHalf },
  float32: { wire: Dtype.FLOAT32, bytes: 4, view: (b, o, n) => new Float32Array(b, o, n) },
  float64: { wire: Dtype.FLOAT64, bytes: 8, view: (b, o, n) => new Float64Array(b, o, n) },
  float8_e4m3fn: { wire: Dtype.FLOAT8_E4M3FN, bytes: 1, view: bytes, decode: (bits) => small(bits, 4, 3, "finite") },
  float8_e5m2: { wire: Dtype.FLOAT8_E5M2, bytes: 1, view: bytes, decode: (bits) => small(bits, 5, 2, "ieee") },
};

const NAMES = new Map<Dtype, DtypeName>(
  (Object.keys(KINDS) as DtypeName[]).map((name) => [KINDS[name].wire, name]),
);

/** The name of a type on the wire. */
export function dtypeFromWire(value: Dtype): DtypeName {
  const name = NAMES.get(value);
  if (name === undefined) {
    throw new InvalidInputError(`tensor element type ${value} is unknown to this version of @vlm-spectra/client.`);
  }
  return name;
}

/** A type on the wire. */
export function dtypeToWire(name: DtypeName): Dtype {
  return KINDS[name].wire;
}

/** Bytes of an element. */
export function itemSize(name: DtypeName): number {
  return KINDS[name].bytes;
}

/** Bytes as the elements of a type. */
export function viewOf(name: DtypeName, data: Uint8Array): Elements {
  const kind = KINDS[name];
  const aligned = data.byteOffset % kind.bytes === 0 && data.buffer instanceof ArrayBuffer;
  const own = aligned ? data : data.slice();
  return kind.view(own.buffer as ArrayBuffer, own.byteOffset, own.byteLength / kind.bytes);
}

const TABLES = new Map<DtypeName, Float32Array>();

/** The value of every pattern of bits of a type, or undefined where its elements are numbers themselves. */
export function tableOf(name: DtypeName): Float32Array | undefined {
  const { decode, bytes: size } = KINDS[name];
  if (decode === undefined) {
    return undefined;
  }
  let table = TABLES.get(name);
  if (table === undefined) {
    table = Float32Array.from({ length: 256 ** size }, (_, bits) => decode(bits));
    TABLES.set(name, table);
  }
  return table;
}

const WORD = new Uint32Array(1);
const WORD_AS_FLOAT = new Float32Array(WORD.buffer);

/** bfloat16: the upper half of a float32. */
function upperHalf(bits: number): number {
  WORD[0] = bits << 16;
  return WORD_AS_FLOAT[0];
}

/** A small float: IEEE's, or OCP's E4M3FN, which has no infinities and one NaN of either sign. */
function small(bits: number, exponentBits: number, mantissaBits: number, form: "ieee" | "finite"): number {
  const sign = bits >> (exponentBits + mantissaBits) ? -1 : 1;
  const exponent = (bits >> mantissaBits) & ((1 << exponentBits) - 1);
  const mantissa = bits & ((1 << mantissaBits) - 1);
  const most = (1 << exponentBits) - 1;
  const bias = (1 << (exponentBits - 1)) - 1;
  if (exponent === most && form === "ieee") {
    return mantissa ? NaN : sign * Infinity;
  }
  if (exponent === most && mantissa === (1 << mantissaBits) - 1) {
    return NaN;
  }
  const unit = 2 ** -mantissaBits;
  return exponent ? sign * (1 + mantissa * unit) * 2 ** (exponent - bias) : sign * mantissa * unit * 2 ** (1 - bias);
}
