/** Servers that lie, callers without types, and those who leave: over a server in this process, without a network. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { Code, ConnectError, createRouterTransport, type HandlerContext, type ServiceImpl } from "@connectrpc/connect";
import { crc32c } from "@node-rs/crc32";
import * as vs from "../src/index.js";
import { unchanged } from "../src/checksum.js";
import { connectOver } from "../src/client.js";
import { ErrorInfoSchema, RetryInfoSchema } from "../src/gen/google/rpc/error_details_pb.js";
import { ModelSchema, ModelService, ModelState } from "../src/gen/vlm_spectra/v1/model_service_pb.js";
import { type RunWithCacheRequest, type RunWithCacheResponseSchema, SpectraService } from "../src/gen/vlm_spectra/v1/spectra_service_pb.js";
import { Compression, Dtype } from "../src/gen/vlm_spectra/v1/tensor_pb.js";

const HOOK = "lm.blocks.0.hook_resid_post";
const MODEL = create(ModelSchema, {
  name: "m",
  state: ModelState.READY,
  info: { dtype: Dtype.FLOAT32, vocab: 9, layers: 1, heads: 2, kvHeads: 1 },
  hooks: [
    { name: "lm.blocks.{layer}.hook_resid_post", layers: [0], shape: ["batch", "seq", "hidden"], dtype: Dtype.FLOAT32 },
    { name: "vision.blocks.{layer}.hook_resid_post", layers: [0], shape: ["views", "patches", "vision_hidden"], dtype: Dtype.FLOAT32 },
    { name: "vision.blocks.{layer}.attn.hook_pattern", layers: [0], shape: ["views", "vision_heads", "patches", "patches"], dtype: Dtype.FLOAT32 },
    { name: "vision.hook_out", shape: ["images", "tokens", "hidden"], dtype: Dtype.FLOAT32 },
  ],
});

type Event = NonNullable<MessageInitShape<typeof RunWithCacheResponseSchema>["event"]>;
type Methods = Partial<ServiceImpl<typeof SpectraService>>;

/** A model behind a server that answers in this way. */
function served(methods: Methods, options: { retries?: number; timeout?: number } = { retries: 0 }, getModel = () => ({ model: MODEL })): Promise<vs.RemoteVLM> {
  const transport = createRouterTransport((router) => {
    router.service(ModelService, { getModel });
    router.service(SpectraService, { prepare: () => ({ rows: [{ inputIds: [1, 2], attentionMask: [1, 1], tokenLabels: ["a", "b"] }] }), ...methods });
  }, { transport: { interceptors: [unchanged(crc32c)] } });
  return connectOver(
    { address: "here", transport, streaming: () => transport, crc32c, sha256: () => "0".repeat(64), readImage: () => Promise.reject(new Error("none")), close: () => undefined },
    options,
  );
}

/** What a server says that is busy, and for how long. */
function busy(seconds: number): ConnectError {
  const retryDelay = { seconds: 0n, nanos: 1e9 * seconds };
  return new ConnectError("busy.", Code.ResourceExhausted, undefined, [
    { desc: ErrorInfoSchema, value: { reason: "QUEUE_FULL", domain: "vlm-spectra" } },
    { desc: RetryInfoSchema, value: { retryDelay } },
  ]);
}

/** Waits until something holds, or for ten seconds. */
async function until(holds: () => boolean): Promise<void> {
  for (let waits = 0; waits < 1000 && !holds(); waits++) {
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

/** An answer of these events. */
function playing(...events: Event[]): Methods["runWithCache"] {
  return async function* () {
    for (const event of events) {
      yield { event };
      await Promise.resolve();
    }
  };
}

function header(shape: readonly bigint[], byteCount: bigint, more: { name?: string; dtype?: Dtype; compression?: Compression } = {}): Event {
  return { case: "header", value: { tensors: [{ index: 0, name: HOOK, dtype: Dtype.FLOAT32, shape: [...shape], byteCount, ...more }] } };
}

function chunk(offset: number, data: Uint8Array, index = 0): Event {
  return { case: "chunk", value: { index, offset: BigInt(offset), crc32c: crc32c(data), data } };
}

const SUMMARY: Event = { case: "summary", value: {} };
const BYTES = new Uint8Array(16);

/** How a capture of such an answer ends. */
async function captured(...events: Event[]): Promise<unknown> {
  const model = await served({ runWithCache: playing(...events) });
  const cache = await model.runWithCache(await model.prepare("x"), HOOK);
  return (await cache.done()).get(HOOK);
}

const LIES: Record<string, readonly Event[]> = {
  "a negative extent": [header([-2n, -2n], 16n), SUMMARY],
  "another size": [header([2n, 2n], 15n), SUMMARY],
  "more than there is memory": [header([2n ** 52n], 2n ** 54n), SUMMARY],
  "extents whose product no number holds": [header([2n ** 40n, 2n ** 40n], 4n), SUMMARY],
  "too many bytes": [header([2n, 2n], 16n), chunk(0, BYTES), chunk(16, BYTES), SUMMARY],
  "a chunk that is too long": [header([2n], 8n), chunk(0, BYTES), SUMMARY],
  "a chunk before its header": [chunk(0, BYTES), SUMMARY],
  "a chunk of nothing announced": [header([2n, 2n], 16n), chunk(0, BYTES, 7), SUMMARY],
  "a gap": [header([2n, 2n], 16n), chunk(4, BYTES.subarray(4)), SUMMARY],
  "an offset beyond all numbers": [header([2n, 2n], 16n), { case: "chunk", value: { offset: 2n ** 64n - 1n, data: BYTES } }, SUMMARY],
  "an end too early": [header([2n, 2n], 16n), chunk(0, BYTES.subarray(4)), SUMMARY],
  "an end without a summary": [header([2n, 2n], 16n), chunk(0, BYTES)],
  "a wrong checksum": [header([2n, 2n], 16n), { case: "chunk", value: { data: BYTES, crc32c: 1 } }, SUMMARY],
  "bytes that are no Zstandard": [header([2n, 2n], 16n, { compression: Compression.ZSTD }), chunk(0, BYTES), SUMMARY],
  "another hook": [header([2n, 2n], 16n, { name: "lm.blocks.9.hook_resid_post" }), chunk(0, BYTES), SUMMARY],
  // eslint-disable-next-line @typescript-eslint/no-unsafe-enum-assignment -- which this version does not know
  "a type of a later version": [header([2n, 2n], 16n, { dtype: 99 as Dtype }), chunk(0, BYTES), SUMMARY],
};

for (const [name, events] of Object.entries(LIES)) {
  test(`a server that sends ${name}`, async () => {
    await assert.rejects(captured(...events), vs.SpectraError);
  });
}

test("what fails on its way has the id of the request in the server's log", async () => {
  const named: Event = { case: "header", value: { ...header([2n, 2n], 16n).value, requestId: "q-7" } } as Event;
  for (const rest of [[chunk(0, BYTES)], [{ case: "chunk", value: { data: BYTES, crc32c: 1 } } as const, SUMMARY]]) {
    await assert.rejects(captured(named, ...rest), (error) => error instanceof vs.SpectraError && error.requestId === "q-7");
  }
});

test("a server that tells the truth", async () => {
  const tensor = await captured(header([2n, 2n], 16n), chunk(0, BYTES.subarray(4)), chunk(12, BYTES.subarray(12)), SUMMARY);
  assert.deepEqual((tensor as vs.Tensor).shape, [2, 2]);
});

/** What a vision hook with elements 0, 1, 2, ... is in an image of two rows and one column of patches. */
async function pictured(name: string, shape: readonly number[], reduce?: "mean_heads" | "norm"): Promise<vs.Tensor> {
  const numbers = Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, (_, at) => at);
  const model = await served({
    prepare: () => ({
      rows: [{ inputIds: [1, 2], attentionMask: [1, 1], tokenLabels: ["a", "b"] }],
      images: [{ gridHeight: 2, gridWidth: 1, positions: [0, 1], patchRows: [2], patchColumns: [1] }],
    }),
    runWithCache: playing(header(shape.map(BigInt), BigInt(numbers.byteLength), { name }), chunk(0, new Uint8Array(numbers.buffer)), SUMMARY),
  });
  return (await model.runWithCache(await model.prepare("x"), name, { reduce })).image(name);
}

test("a vision hook is laid out as the image, whole and reduced", async () => {
  const pattern = "vision.blocks.0.attn.hook_pattern";
  const whole = await pictured(pattern, [1, 2, 3, 3]); // two heads, a class token
  assert.deepEqual(whole.shape, [2, 2, 1, 2, 1]);
  assert.deepEqual(whole.toNumbers(), [0, 1, 3, 4, 9, 10, 12, 13]);
  const mean = await pictured(pattern, [1, 3, 3], "mean_heads");
  assert.deepEqual(mean.shape, [2, 1, 2, 1]);
  assert.deepEqual(mean.toNumbers(), [0, 1, 3, 4]);
  const norm = await pictured(pattern, [1, 2, 3], "norm");
  assert.deepEqual(norm.shape, [2, 2, 1]);
  assert.deepEqual(norm.toNumbers(), [0, 1, 3, 4]);
  assert.deepEqual((await pictured("vision.blocks.0.hook_resid_post", [1, 3], "norm")).toArray(), [[0], [1]]);
  assert.deepEqual((await pictured("vision.hook_out", [1, 2], "norm")).toArray(), [[0], [1]]);
  await assert.rejects(pictured(pattern, [1, 3]), /a tensor without axes has no parts/);
});

test("a server that always wants the image again", async () => {
  const model = await served({ prepare: () => ({ missingImages: ["0".repeat(64)] }) });
  await assert.rejects(model.prepare("x", new Uint8Array(3)), vs.BusyError);
  await assert.rejects((await served({ prepare: () => ({ missingImages: ["1"] }) })).prepare("x"), vs.InternalError);
});

test("an answer of one message that was changed on its way", async () => {
  const rows = [{ inputIds: [1], attentionMask: [1], tokenLabels: ["a"] }];
  await assert.rejects((await served({ prepare: () => ({ rows, crc32c: 1 }) })).prepare("x"), vs.InternalError);
});

test("an answer that lacks what it must have", async () => {
  const model = await served({
    generate: async function* () {
      yield await Promise.resolve({ event: { case: "summary", value: {} } } as const);
    },
  });
  await assert.rejects(model.generate(await model.prepare("x")), /the server's answer has no sequences/);
});

test("what a caller's function throws ends the call, and is thrown", async () => {
  const released: string[] = [];
  const model = await served({
    runWithCache: async function* (_, { signal }) {
      for (const event of [{ case: "header", value: { captureId: "c" } }, { case: "progress", value: {} }] as const satisfies readonly Event[]) {
        yield { event } as { event: Event };
      }
      await new Promise((resolve) => signal.addEventListener("abort", resolve));
    },
    releaseCapture: ({ captureId }) => {
      released.push(captureId);
      return {};
    },
  });
  const mine = new RangeError("mine");
  const onProgress = () => {
    throw mine;
  };
  await assert.rejects(model.runWithCache(await model.prepare("x"), HOOK, { onProgress }), mine);
  await until(() => released.length > 0);
  assert.deepEqual(released, ["c"], "the server need not wait whether the stream comes back");
});

/** A model whose captures have their header and then never end, and how many of them run. */
async function endless(): Promise<{ model: vs.RemoteVLM; running: () => number }> {
  let running = 0;
  const model = await served({
    runWithCache: async function* (_, { signal }) {
      if (!signal.aborted) {
        running++;
        signal.addEventListener("abort", () => running--);
      }
      yield { event: header([4n, 1n << 18n], 1n << 22n) };
      await new Promise((_resolve, reject) => signal.addEventListener("abort", () => reject(new ConnectError("left", Code.Canceled))));
    },
  });
  return { model, running: () => running };
}

test("leaving at any moment is a CancelledError and ends the call", async () => {
  const { model, running } = await endless();
  const inputs = await model.prepare("x");
  for (let ticks = 0; ticks < 40; ticks++) {
    const stop = new AbortController();
    const call = model.runWithCache(inputs, HOOK, { signal: stop.signal }).then((cache) => cache.get(HOOK));
    const refused = assert.rejects(call, vs.CancelledError);
    for (let i = 0; i < ticks; i++) {
      await Promise.resolve();
    }
    stop.abort();
    await refused;
  }
  await until(() => running() === 0);
  assert.equal(running(), 0);
});

test("captures that nobody reads any more leave no rejection and no memory behind", async () => {
  const unhandled: unknown[] = [];
  const note = (reason: unknown): number => unhandled.push(reason);
  process.on("unhandledRejection", note);
  const { model } = await endless();
  const inputs = await model.prepare("x");
  const stop = new AbortController(); // of one page: it outlives all calls
  const kept: WeakRef<object>[] = [];
  for (let i = 0; i < 30; i++) {
    const cache = await model.runWithCache(inputs, HOOK, { signal: stop.signal });
    kept.push(new WeakRef(Reflect.get(cache, "stream") as object));
    cache.cancel();
  }
  const { setFlagsFromString } = await import("node:v8");
  setFlagsFromString("--expose-gc");
  const { runInNewContext } = await import("node:vm");
  const collect = runInNewContext("gc") as () => void;
  const left = (): number => kept.filter((each) => each.deref() !== undefined).length;
  await until(() => {
    collect();
    return left() <= 1;
  });
  process.off("unhandledRejection", note);
  assert(left() <= 1, `${left()} of 30 captures of 4 MB each are still held`);
  assert.deepEqual(unhandled, []);
});

/** 6 MB in chunks of 1 MB with so many milliseconds between them; what the captures asked for. */
async function measured(milliseconds: number, ...compressions: ("auto" | "none" | "zstd" | undefined)[]): Promise<(Compression | undefined)[]> {
  const asked: (Compression | undefined)[] = [];
  const data = new Uint8Array(1 << 20);
  const model = await served({
    runWithCache: async function* ({ start }: RunWithCacheRequest) {
      asked.push(start.case === "run" ? start.value.selection?.compression : undefined);
      yield { event: header([6n, 1n << 18n], 6n << 20n) };
      for (let at = 0; at < 6; at++) {
        await new Promise((resolve) => (milliseconds > 0 ? setTimeout(resolve, milliseconds) : setImmediate(resolve)));
        yield { event: chunk(at << 20, data) };
      }
      yield { event: SUMMARY };
    },
  });
  for (const compression of compressions) {
    await (await model.runWithCache(await model.prepare("x"), HOOK, { compression })).done();
  }
  return asked;
}

test("what is sent is made smaller where the last capture showed a slow link", async () => {
  const { NONE, UNSPECIFIED, ZSTD } = { ...Compression };
  assert.deepEqual(await measured(40, undefined, undefined, "none", "auto"), [UNSPECIFIED, ZSTD, UNSPECIFIED, ZSTD]);
  assert.notEqual(NONE, ZSTD);
});

test("half of a character is refused before it is sent as another", async () => {
  const model = await served({});
  const inputs = await model.prepare("\u{1f600}");
  const calls: Record<string, () => Promise<unknown>> = {
    "task of a prompt": () => model.prepare("\u{1f600}\ud800"),
    "assistantPrefill of prepare": () => model.prepare("x", undefined, { assistantPrefill: "a\udc00" }),
    "system of a prompt": () => model.prepareBatch([{ task: "x", system: "a\ud800b" }]),
    "stop of generate": () => model.generate(inputs, { stop: ["x", "a\ud800"] }),
    "target of attribute": () => model.attribute(inputs, "direct_logit", { target: { answer: "a\ud800" } }),
    "tokens": () => model.unembed("a\ud800"),
  };
  for (const [name, call] of Object.entries(calls)) {
    await assert.rejects(call, (error) => error instanceof vs.InvalidInputError && error.message.startsWith(`${name} is no valid text: character 1 is half of one ('\\ud`), name);
  }
});

test("callers without types hear what is possible", async () => {
  const model = (await served({})) as unknown as Record<string, (...values: unknown[]) => Promise<unknown>>;
  const inputs = await model["prepare"]("x");
  const calls: Record<string, readonly unknown[]> = {
    "prepare task": [5],
    "prepare image": ["x", 5],
    "prepare options": ["x", undefined, "y"],
    "prepare assistantprefill": ["x", undefined, { assistantprefill: "" }],
    "prepareBatch a batch is a list": ["x"],
    "prepareBatch a prompt": [["x"]],
    "generate inputs": ["x"],
    "generate options": [inputs, null],
    "generate max_new_tokens": [inputs, { max_new_tokens: 3 }],
    "generate maxNewTokens": [inputs, { maxNewTokens: "3" }],
    "generate seed": [inputs, { seed: 0.5 }],
    "generate timeout": [inputs, { timeout: NaN }],
    "generate signal": [inputs, { signal: {} }],
    "generate onToken": [inputs, { onToken: "print" }],
    "forward logitsToKeep": [inputs, { logitsToKeep: -1 }],
    "forward interventions": [inputs, { interventions: [{ hook: HOOK }] }],
    "runWithCache hooks": [inputs, [5]],
    "runWithCache positions": [inputs, HOOK, { positions: "first" }],
    "runWithCache heads": [inputs, HOOK, { heads: [-1] }],
    "runWithCache dtype": [inputs, HOOK, { dtype: "half" }],
    "runWithCache backwardFrom": [inputs, HOOK, { backwardFrom: { tokn: 5 } }],
    "runWithCache the option generate": [inputs, HOOK, { generate: { maxTokens: 3 } }],
    "logitLens topK": [inputs, { topK: 0 }],
    "attribute method": [inputs, "magic"],
    "attribute steps": [inputs, "direct_logit", { steps: 4 }],
    "patchSweep heads": [inputs, inputs, HOOK, { heads: "some" }],
    "unembed tokens": [null],
    "texts ids": [[9]],
  };
  for (const [name, values] of Object.entries(calls)) {
    const [method, ...argument] = name.split(" ");
    await assert.rejects(model[method](...values), (error) => error instanceof vs.InvalidInputError && error.message.includes(argument.join(" ")), name);
  }
  const make = vs as unknown as Record<string, (...values: unknown[]) => unknown>;
  assert.throws(() => make["zeroAblation"](5), vs.InvalidInputError);
  assert.throws(() => make["zeroAblation"](HOOK, { position: 1 }), /has no option position/);
  assert.throws(() => make["addActivation"](HOOK, "value"), vs.InvalidInputError);
  assert.throws(() => make["scaleActivation"](HOOK, "2"), /factor is '2'/);
});

test("a later attempt has what is left of the call's time", async () => {
  const given: (number | undefined)[] = [];
  const refuse = (_: unknown, context: HandlerContext): never => {
    given.push(context.timeoutMs());
    throw busy(0.4);
  };
  const model = await served({ forward: refuse, estimate: refuse, runWithCache: refuse }, { retries: 1, timeout: 20 });
  const inputs = await model.prepare("x");
  for (const call of [() => model.forward(inputs), () => model.estimate(inputs, HOOK), () => model.runWithCache(inputs, HOOK)]) {
    given.length = 0;
    await assert.rejects(call(), vs.BusyError);
    assert.equal(given.length, 2);
    assert((given[1] ?? Infinity) <= (given[0] ?? 0) - 250, `${given.join(", ")}: the wait of 0.3 s at least is a part of it`);
  }
});

test("a server that is busy when somebody connects is asked again", async () => {
  let asked = 0;
  const getModel = () => {
    if (++asked === 1) {
      throw busy(0.01);
    }
    return { model: MODEL };
  };
  assert.equal((await served({}, { retries: 1 }, getModel)).info.name, "m");
  assert.equal(asked, 2);
  asked = 0;
  await assert.rejects(served({}, { retries: 0 }, getModel), vs.BusyError);
});
