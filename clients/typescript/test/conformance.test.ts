/** The conformance corpus, played over HTTP/2 by a server and read by the client as it is. */
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { test } from "node:test";
import { create, fromBinary, toJson } from "@bufbuild/protobuf";
import { createClient } from "@connectrpc/connect";
import type { DtypeName } from "../src/dtypes.js";
import { RemoteVLM } from "../src/client.js";
import type { Connection } from "../src/connection.js";
import { BusyError, SpectraError, UnknownHookError } from "../src/errors.js";
import { ModelSchema } from "../src/gen/vlm_spectra/v1/model_service_pb.js";
import { RunWithCacheResponseSchema, SpectraService } from "../src/gen/vlm_spectra/v1/spectra_service_pb.js";
import { Dtype } from "../src/gen/vlm_spectra/v1/tensor_pb.js";
import { Inputs } from "../src/inputs.js";
import { openConnection } from "../src/node.js";
import { type Call, TensorStream, type Token } from "../src/stream.js";
import type { Tensor } from "../src/tensor.js";
import { type Case, cases, messages, Player } from "./corpus.js";

function valuesOf(tensor: Tensor): (number | string | boolean)[] {
  if (tensor.dtype === "float64") {
    return [...(tensor.data as Float64Array)].map(named);
  }
  if (tensor.data instanceof BigInt64Array) {
    return [...tensor.data].map((value) => (value > -(2n ** 53n) && value < 2n ** 53n ? Number(value) : String(value)));
  }
  const integers: DtypeName[] = ["uint8", "int8", "int16", "int32"];
  const numbers = integers.includes(tensor.dtype) ? Array.from(tensor.data, Number) : [...tensor.toFloat32()];
  return tensor.dtype === "bool" ? numbers.map((value) => value === 1) : numbers.map(named);
}

function named(value: number): number | string {
  return Number.isFinite(value) ? value : String(value);
}

async function run(played: Case, way: (connection: Connection) => Connection): Promise<void> {
  const player = new Player(played);
  const address = await player.listen();
  const connection = way(openConnection(address));
  const client = (call: Call) => createClient(SpectraService, connection.streaming(call.places));
  const tokens: Token[] = [];
  try {
    const stream = new TensorStream({
      connection,
      open: (call) => client(call).runWithCache({ start: { case: "run", value: {} } }, call),
      resume: (captureId, have, call) => {
        const offsets = [...have].map(([index, offset]) => ({ index, offset: BigInt(offset) }));
        return client(call).runWithCache({ start: { case: "resume", value: { captureId, offsets } } }, call);
      },
      onToken: (token) => tokens.push(token),
    });
    const error = await stream.done().then(
      () => null,
      (thrown: unknown) => thrown,
    );
    if (played.error === null) {
      assert.equal(error, null);
    } else {
      assert(error instanceof SpectraError);
      const { reason, field, message, metadata, requestId: request_id, retryAfter: retry_after } = error;
      const found = { reason, field, message, metadata, request_id, retry_after };
      const wanted = Object.keys(played.error) as (keyof typeof found)[];
      assert.deepEqual(Object.fromEntries(wanted.map((each) => [each, found[each]])), played.error);
    }
    assert.deepEqual(
      player.resumes,
      played.calls.slice(1).map(({ resume }) => ({ captureId: resume?.capture_id, offsets: resume?.offsets })),
    );
    assert.deepEqual(
      tokens.map(({ row, index, id, text }) => [row, index, id, text]),
      played.tokens,
    );
    const complete = stream.names.filter((name) => stream.arrived(name));
    assert.deepEqual(
      complete,
      played.tensors.map((tensor) => tensor.name),
    );
    for (const { name, dtype, shape, sha256, values } of played.tensors) {
      const tensor = await stream.get(name);
      assert(tensor !== undefined);
      assert.equal(tensor.dtype, dtype);
      assert.deepEqual(tensor.shape, shape);
      assert.equal(createHash("sha256").update(tensor.bytes).digest("hex"), sha256);
      if (values !== undefined) {
        // deepEqual of node's strict kind tells 0 from -0.
        assert.deepEqual(valuesOf(tensor), values.map((each) => (tensor.dtype === "float32" && typeof each === "number" ? Math.fround(each) : each)));
      }
    }
  } finally {
    connection.close();
    player.close();
  }
}

/** The two ways in which tensors come: straight to their places, and in messages. */
const ways: Record<string, (connection: Connection) => Connection> = {
  direct: (connection) => connection,
  messages: (connection) => ({ ...connection, streaming: () => connection.transport }),
};

for (const [name, way] of Object.entries(ways)) {
  for (const played of cases) {
    test(`stream ${played.name}, ${name}`, () => run(played, way));
  }
}

for (const { name, hex, json } of messages) {
  test(`message ${name}`, () => {
    const data = Buffer.from(hex, "hex");
    if (json === null) {
      assert.throws(() => fromBinary(RunWithCacheResponseSchema, data));
    } else {
      assert.deepEqual(toJson(RunWithCacheResponseSchema, fromBinary(RunWithCacheResponseSchema, data)), json);
    }
  });
}

async function captured(played: Case, retries: number): Promise<[string[], number]> {
  const player = new Player(played);
  const address = await player.listen();
  const model = create(ModelSchema, {
    name: "m",
    info: { dtype: Dtype.FLOAT32 },
    hooks: [{ name: "t", dtype: Dtype.FLOAT32 }],
  });
  const remote = new RemoteVLM(openConnection(address), model, { retries });
  try {
    const begun = performance.now();
    const cache = await (await remote.runWithCache(new Inputs([], [], []), "t")).done();
    return [cache.names, performance.now() - begun];
  } finally {
    remote.close();
    player.close();
  }
}

test("a call that was refused for now is made again when the server said", async () => {
  const named = (name: string): Case => {
    const found = cases.find((each) => each.name === name);
    assert(found !== undefined);
    return found;
  };
  const calls = [...named("busy").calls, ...named("dtype-float32").calls];
  const [names, took] = await captured({ ...named("busy"), calls }, 1);
  assert.deepEqual(names, ["t"]);
  assert(took > 1000);
  await assert.rejects(captured({ ...named("busy"), calls }, 0), BusyError);
  await assert.rejects(captured(named("refused"), 2), UnknownHookError);
});
