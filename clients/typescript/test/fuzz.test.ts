/** Arbitrary bytes at the reader of chunks that is written by hand: it takes what the generated code reads alike. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { fromBinary, toBinary, create } from "@bufbuild/protobuf";
import { crc32c } from "@node-rs/crc32";
import { Filler } from "../src/direct.js";
import { RunWithCacheResponseSchema, type RunWithCacheResponse } from "../src/gen/vlm_spectra/v1/spectra_service_pb.js";

const ROUNDS = Number(process.env.SPECTRA_FUZZ ?? 2_000);

/** Repeatable numbers below a bound (mulberry32). */
function dice(seed: number): (bound: number) => number {
  let state = seed;
  return (bound) => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return Math.floor((((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32) * bound);
  };
}

interface Taken {
  readonly index: number;
  readonly offset: number;
  readonly data: Uint8Array;
  intact: boolean;
}

/** What the reader takes of a response that comes in these pieces, and what it hands on. */
function read(pieces: readonly Uint8Array[]): { taken: Taken[]; rest: Uint8Array } {
  const taken: Taken[] = [];
  const places = {
    room(index: number, offset: number, length: number) {
      const data = new Uint8Array(length);
      taken.push({ index, offset, data, intact: false });
      return data;
    },
    filled(_: number, __: number, intact: boolean) {
      taken[taken.length - 1].intact = intact;
    },
  };
  const filler = new Filler(places, crc32c);
  const rest = pieces.flatMap((piece) => [...filler.parts(piece)]);
  filler.end();
  return { taken, rest: Buffer.concat(rest) };
}

/** A message as the frame that carries it. */
function framed(message: Uint8Array): Uint8Array {
  const frame = new Uint8Array(5 + message.length);
  new DataView(frame.buffer).setUint32(1, message.length);
  frame.set(message, 5);
  return frame;
}

function split(frame: Uint8Array, roll: (bound: number) => number): Uint8Array[] {
  const pieces: Uint8Array[] = [];
  for (let at = 0; at < frame.length; ) {
    const end = Math.min(frame.length, at + 1 + roll(roll(2) ? 9 : frame.length));
    pieces.push(frame.subarray(at, end));
    at = end;
  }
  return pieces;
}

test("what the reader of chunks takes, the generated code reads alike", () => {
  const roll = dice(7);
  let fields = 0;
  for (let round = 0; round < ROUNDS; round++) {
    const data = Uint8Array.from({ length: roll(40) }, () => roll(256));
    const chunk = { index: roll(4) ? roll(300) : roll(2 ** 32), offset: BigInt(roll(2 ** 32)) * BigInt(roll(2 ** 21)), crc32c: roll(4) ? crc32c(data) : roll(2 ** 32), data };
    const message = [...toBinary(RunWithCacheResponseSchema, create(RunWithCacheResponseSchema, { event: { case: "chunk", value: chunk } }))];
    for (let changes = roll(4); changes > 0; changes--) {
      message.splice(roll(message.length + 1), roll(3), ...Array.from({ length: roll(4) }, () => roll(256)));
    }
    const bytes = Uint8Array.from(message);
    const frame = framed(bytes);
    const { taken, rest } = read(split(frame, roll));
    if (taken.length === 0) {
      assert.deepEqual(rest, Buffer.from(frame), "what it does not take it hands on untouched");
      continue;
    }
    fields++;
    const found: RunWithCacheResponse = fromBinary(RunWithCacheResponseSchema, bytes);
    assert.equal(found.event.case, "chunk");
    const part = found.event.value as { index: number; offset: bigint; crc32c: number; data: Uint8Array };
    assert.equal(taken.length, 1);
    assert.equal(rest.length, 0);
    const [own] = taken as [Taken];
    assert.deepEqual([own.index, BigInt(own.offset)], [part.index, part.offset]);
    assert.deepEqual(Buffer.from(own.data), Buffer.from(part.data));
    assert.equal(own.intact, crc32c(part.data) === part.crc32c);
  }
  assert(fields > ROUNDS / 10);
});
