/** Tensors: bytes with a type and a shape, in C order. */
import { dtypeFromWire, dtypeToWire, itemSize, tableOf, viewOf, type DtypeName, type Elements } from "./dtypes.js";
import { InvalidInputError } from "./errors.js";
import { create } from "@bufbuild/protobuf";
import { TensorSchema, type Tensor as TensorMessage } from "./gen/vlm_spectra/v1/tensor_pb.js";

/** Numbers in any depth of nesting. */
export type Nested = number | readonly Nested[];

/** What stands for a small tensor in a call. */
export type TensorLike = Tensor | Float32Array | Nested;

/** An array as it crossed the network, bit for bit. */
export class Tensor {
  private elements: Elements | undefined;
  private floats: Float32Array | undefined;

  /**
   * @param dtype The element type.
   * @param shape The extents; empty for a scalar.
   * @param bytes The elements, little-endian, in C order.
   */
  constructor(
    readonly dtype: DtypeName,
    readonly shape: readonly number[],
    readonly bytes: Uint8Array,
  ) {
    if (sizeOf(shape) * itemSize(dtype) !== bytes.length) {
      throw new InvalidInputError(`a tensor of shape [${shape.join(", ")}] and type ${dtype} does not have ${bytes.length} bytes.`);
    }
  }

  /** float32 numbers as a tensor; their shape is [n] where none is given. */
  static of(values: Float32Array | readonly number[], shape?: readonly number[]): Tensor {
    const floats = Float32Array.from(values);
    return new Tensor("float32", shape ?? [floats.length], new Uint8Array(floats.buffer));
  }

  /** What a call takes for a tensor, as one. */
  static from(value: TensorLike): Tensor {
    if (value instanceof Tensor) {
      return value;
    }
    if (value instanceof Float32Array) {
      return Tensor.of(value);
    }
    const shape: number[] = [];
    for (let level: unknown = value; Array.isArray(level); level = level[0] ?? 0) {
      shape.push(level.length);
    }
    const flat: number[] = [];
    const walk = (level: unknown, depth: number): void => {
      if (typeof level === "number") {
        flat.push(level);
      } else if (!Array.isArray(level)) {
        throw new InvalidInputError("a tensor is given as a Tensor, a Float32Array, or numbers in lists of lists.");
      } else if (level.length !== shape[depth]) {
        throw new InvalidInputError("the lists of a tensor differ in length.");
      } else {
        level.forEach((each) => walk(each, depth + 1));
      }
    };
    walk(value, 0);
    if (flat.length !== sizeOf(shape)) {
      throw new InvalidInputError("the lists of a tensor differ in depth.");
    }
    return Tensor.of(flat, shape);
  }

  /** Elements in all. */
  get size(): number {
    return sizeOf(this.shape);
  }

  /** The elements over the same memory; 16-bit and 8-bit floats as the integers of their bits. */
  get data(): Elements {
    return (this.elements ??= viewOf(this.dtype, this.bytes));
  }

  /** The elements as float32: decoded once for float16, bfloat16 and float8, converted for integers and float64. */
  toFloat32(): Float32Array {
    if (this.floats === undefined) {
      const data = this.data;
      const table = tableOf(this.dtype);
      if (data instanceof Float32Array) {
        this.floats = data;
      } else if (data instanceof BigInt64Array) {
        this.floats = Float32Array.from(data, Number);
      } else {
        this.floats = new Float32Array(data.length);
        for (let i = 0; i < data.length; i++) {
          this.floats[i] = table === undefined ? data[i] : table[data[i]];
        }
      }
    }
    return this.floats;
  }

  /** The elements as numbers, exact up to 2**53. */
  toNumbers(): number[] {
    return this.dtype === "float64" || this.dtype.startsWith("int") ? Array.from(this.data, Number) : [...this.toFloat32()];
  }

  /** One element as a number; a negative index counts from the end. */
  at(...index: number[]): number {
    if (index.length !== this.shape.length) {
      throw new InvalidInputError(`an element of a tensor with ${this.shape.length} axes has as many indices, not ${index.length}.`);
    }
    const flat = index.reduce((before, i, axis) => before * this.shape[axis] + this.place(i, axis), 0);
    const element = this.data[flat];
    const table = tableOf(this.dtype);
    return table === undefined ? Number(element) : table[Number(element)];
  }

  /** The part at one index of the first axis, over the same memory. */
  index(i: number): Tensor {
    const rest = this.partShape();
    const step = sizeOf(rest) * itemSize(this.dtype);
    const start = this.place(i, 0) * step;
    return new Tensor(this.dtype, rest, this.bytes.subarray(start, start + step));
  }

  /** All numbers, nested as the axes are. */
  toArray(): Nested {
    if (this.shape.length === 0) {
      return this.at();
    }
    return Array.from({ length: this.shape[0] }, (_, i) => this.index(i).toArray());
  }

  /** Some entries of the first axis, in a new tensor of another shape. */
  gather(indices: readonly number[], shape: readonly number[]): Tensor {
    const rest = this.partShape();
    const step = sizeOf(rest) * itemSize(this.dtype);
    const out = new Uint8Array(indices.length * step);
    indices.forEach((index, at) => {
      const start = this.place(index, 0) * step;
      out.set(this.bytes.subarray(start, start + step), at * step);
    });
    return new Tensor(this.dtype, [...shape, ...rest], out);
  }

  toString(): string {
    return `Tensor(${this.dtype}, [${this.shape.join(", ")}])`;
  }

  /** The shape of the parts along the first axis. */
  private partShape(): number[] {
    if (this.shape.length === 0) {
      throw new InvalidInputError("a tensor without axes has no parts; possible is its one number, by at().");
    }
    return this.shape.slice(1);
  }

  private place(index: number, axis: number): number {
    const extent = this.shape[axis];
    const place = index < 0 ? index + extent : index;
    if (!Number.isInteger(place) || place < 0 || place >= extent) {
      throw new InvalidInputError(`${index} is out of range: axis ${axis} has ${extent} entries.`);
    }
    return place;
  }
}

/** The product of extents. */
export function sizeOf(shape: readonly number[]): number {
  return shape.reduce((product, extent) => product * extent, 1);
}

/** Tensors of one shape and type on a new first axis. */
export function stack(tensors: readonly Tensor[]): Tensor {
  const first = tensors.at(0);
  if (first === undefined) {
    throw new InvalidInputError("there is nothing to stack.");
  }
  const same = (each: Tensor) => each.dtype === first.dtype && each.shape.join() === first.shape.join();
  if (!tensors.every(same)) {
    throw new InvalidInputError("the tensors differ in shape or type and cannot be stacked.");
  }
  const out = new Uint8Array(first.bytes.length * tensors.length);
  tensors.forEach((each, i) => out.set(each.bytes, i * first.bytes.length));
  return new Tensor(first.dtype, [tensors.length, ...first.shape], out);
}

/** A small tensor, whole, as a message. */
export function tensorToWire(value: TensorLike): TensorMessage {
  const tensor = Tensor.from(value);
  return create(TensorSchema, {
    dtype: dtypeToWire(tensor.dtype),
    shape: tensor.shape.map(BigInt),
    data: tensor.bytes,
  });
}

/** A small tensor, whole. */
export function tensorFromWire(message: TensorMessage): Tensor {
  return new Tensor(dtypeFromWire(message.dtype), message.shape.map(Number), message.data);
}
