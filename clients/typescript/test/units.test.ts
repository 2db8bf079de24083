/** What needs no server. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { create } from "@bufbuild/protobuf";
import { findClick, findPoint } from "../src/clicks.js";
import { Cost } from "../src/cost.js";
import { InvalidInputError } from "../src/errors.js";
import { PreparedRowSchema } from "../src/gen/vlm_spectra/v1/inputs_pb.js";
import { matches } from "../src/hooks.js";
import { type ImageLayout, Inputs, onGrid } from "../src/inputs.js";
import { openConnection } from "../src/node.js";
import { Attribution, PatchSweep, Tensors } from "../src/results.js";
import { stack, Tensor } from "../src/tensor.js";

test("wildcards stand for segments", () => {
  assert(matches("lm.blocks.*.hook_resid_post", "lm.blocks.12.hook_resid_post"));
  assert(matches("lm.blocks.1?.hook_*", "lm.blocks.12.hook_resid_post"));
  assert(!matches("lm.*.hook_resid_post", "lm.blocks.12.hook_resid_post"));
  assert(!matches("lm.blocks.1.hook_resid_post", "lmxblocks.1.hook_resid_post"));
});

test("a token goes in plain text to this machine alone", () => {
  const token = "t".repeat(30);
  for (const here of ["localhost:1", "127.0.0.1:1", "127.9.9.9:1", "[::1]:1"]) {
    openConnection(here, { token }).close();
  }
  for (const elsewhere of ["gpu-box:1", "127.0.0.1.example.org:1", "127.gpu-box:1", "127.0.0.1@gpu-box:1", "localhost.example.org:1"]) {
    assert.throws(() => openConnection(elsewhere, { token }), /in plain text/, elsewhere);
    openConnection(elsewhere, { token, tls: false }).close();
  }
});

test("tensors share memory, index, stack and decode", () => {
  const tensor = Tensor.from([[1, 2, 3], [4, 5, 6]]);
  assert.deepEqual(tensor.shape, [2, 3]);
  assert.equal(tensor.at(1, -1), 6);
  assert.deepEqual([...tensor.index(-1).toFloat32()], [4, 5, 6]);
  assert.deepEqual(tensor.toArray(), [[1, 2, 3], [4, 5, 6]]);
  tensor.index(0).bytes.set(Tensor.from([9]).bytes);
  assert.equal(tensor.at(0, 0), 9);
  assert.deepEqual(stack([tensor, tensor]).shape, [2, 2, 3]);
  assert.equal(Tensor.from(2.5).at(), 2.5);
  const half = new Tensor("bfloat16", [2], Uint8Array.of(0x80, 0x3f, 0x20, 0xc1));
  assert.deepEqual([...half.toFloat32()], [1, -10]);
  assert.deepEqual([...half.index(1).data], [0xc120]);
  assert.equal(half.at(1), -10);
  const big = new Tensor("int64", [1], new Uint8Array(BigInt64Array.of(-7n).buffer));
  assert.equal(big.at(0), -7);
});

test("tensors of wrong sizes are refused", () => {
  assert.throws(() => new Tensor("float32", [2], new Uint8Array(7)), InvalidInputError);
  assert.throws(() => Tensor.from([[1, 2], [3]]), InvalidInputError);
  assert.throws(() => Tensor.from([[1, 2], 3]), InvalidInputError);
  assert.throws(() => Tensor.from([1]).at(1), InvalidInputError);
  assert.throws(() => Tensor.from(1).index(0), InvalidInputError);
  assert.throws(() => Tensor.from(1).gather([0, 1], [2]), /a tensor without axes has no parts/);
  assert.throws(() => stack([Tensor.from([1]), Tensor.from([1, 2])]), InvalidInputError);
});

const layout: ImageLayout = {
  row: 0,
  originalSize: [200, 100],
  processedSize: [100, 50],
  grid: [2, 2],
  positions: [1, 2, 3, 4, 5, 6],
  tiles: [
    { grid: [1, 1], box: [0, 0, 200, 100], positions: [1], origin: [0, 0], overview: true, resampled: false },
    { grid: [2, 1], box: [0, 0, 100, 100], positions: [2, 3], origin: [0, 0], overview: false, resampled: false },
    { grid: [2, 1], box: [100, 0, 200, 100], positions: [5, 6], origin: [0, 1], overview: false, resampled: false },
  ],
  patchGrids: [],
};

test("a vector over positions becomes an image's grid, tile by tile", () => {
  const vector = Float32Array.of(0, 10, 20, 30, 40, 50, 60);
  assert.deepEqual(onGrid(vector, layout).toArray(), [[20, 50], [30, 60]]);
  assert.deepEqual(onGrid(vector, layout, 0).toArray(), [[10]]);
  assert.throws(() => onGrid(vector, layout, 3), InvalidInputError);
  assert.throws(() => onGrid(5, layout), /values for each position of the sequence, \[seq, \.\.\.\].* this tensor is \[\]\./);
  assert.throws(() => onGrid([1, 2], layout), /the image ends at 6; this tensor is \[2\]\./);
});

/** The tensors of an answer. */
function answered(values: Record<string, Tensor>): Tensors {
  const tensors = new Tensors({ names: Object.keys(values), cost: new Cost(undefined, undefined) });
  Object.entries(values).forEach(([name, tensor]) => tensors.set(name, tensor));
  return tensors;
}

const texts = () => Promise.resolve([]);
const prepared = create(PreparedRowSchema, { tokenLabels: ["a", "b", "c", "d", "e", "f", "g"], attentionMask: [0, 1, 1, 1, 1, 1, 1] });
const inputs = new Inputs([], [prepared, prepared], [layout]);
const one = Tensor.of([0, 0]);

test("an attribution's rows and patches are counted", () => {
  const scores = Tensor.of(Array.from({ length: 14 }, (_, at) => at), [2, 7]);
  const why = new Attribution("direct_logit", inputs, answered({ scores, target_ids: one, target_value: one, total: one }), texts, {});
  assert.deepEqual(why.tokens(1)[0], ["b", 8]);
  assert.deepEqual(why.tokens(-1), why.tokens(1));
  assert.throws(() => why.tokens(7), /there is no row 7: there are 2, from 0\./);
  assert.throws(() => why.tokens(0.5), InvalidInputError);
  assert.deepEqual(why.topPatches(0, 1), [[1, 1, 6]]);
  assert.equal(why.topPatches(0, 9).length, 4);
  for (const k of [-1, 0, 1.5]) {
    assert.throws(() => why.topPatches(0, k), InvalidInputError);
  }
});

test("a sweep's strongest cells are counted", () => {
  const values = { columns: Tensor.of([1, 2]), "values.hook": Tensor.of([1, 3]), clean: Tensor.of([4]), corrupted: Tensor.of([0]) };
  const sweep = new PatchSweep("denoising", "positions", inputs, inputs, answered(values), texts);
  assert.deepEqual(sweep.top(1), [["hook", 2, 0.75]]);
  for (const k of [-1, 0, 1.5]) {
    assert.throws(() => sweep.top(k), { name: "InvalidInputError", field: "k", message: `k is ${k}; possible: a whole number from 1.` });
  }
});

test("points in the forms that models write", () => {
  assert.deepEqual(findPoint("click(start_box='(10,20)')"), { x: 10, y: 20 });
  assert.deepEqual(findPoint("<|box_start|>(1.5, 2)<|box_end|>"), { x: 1.5, y: 2 });
  assert.deepEqual(findPoint("<point>3 4</point>"), { x: 3, y: 4 });
  assert.deepEqual(findPoint('{"bbox_2d": [0, 0, 10, 20]}'), { x: 5, y: 10 });
  assert.deepEqual(findPoint('see (1, 2), {"x": 7, "y": 8}'), { x: 7, y: 8 });
  assert.equal(findPoint("nothing here"), undefined);
  assert.deepEqual(findClick("(50, 25)", [layout], false), { x: 100, y: 50 });
  assert.deepEqual(findClick("(500, 500)", [layout], true), { x: 100, y: 50 });
  assert.equal(findClick("(500, 500)", [], true), undefined);
});
