/**
 * Calls to a real server, for `tests/test_typescript.py`: `node build/test/live.js COMMAND ADDRESS ...` prints what came
 * as JSON, arrays by type, shape and SHA-256.
 */
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import * as vs from "../src/index.js";

const [command = "", address = "", ...files] = process.argv.slice(2);
const POST = "lm.blocks.*.hook_resid_post";

type Summary = [dtype: string, shape: readonly number[], sha256: string];

function summaryOf(tensor: vs.Tensor): Summary {
  return [tensor.dtype, tensor.shape, createHash("sha256").update(tensor.bytes).digest("hex")];
}

async function summaries(cache: vs.ActivationCache): Promise<Record<string, Summary>> {
  const found: Record<string, Summary> = {};
  for await (const [name, tensor] of cache) {
    found[name] = summaryOf(tensor);
  }
  return found;
}

/** All calls. */
async function collect(model: vs.RemoteVLM): Promise<unknown> {
  const [first, second] = files.map((file) => readFileSync(file));
  const arrays: Record<string, Summary> = {};
  const plain: Record<string, unknown> = {};
  const add = (prefix: string, tensors: Iterable<readonly [string, vs.Tensor]>): void => {
    for (const [name, tensor] of tensors) {
      arrays[`${prefix}/${name}`] = summaryOf(tensor);
    }
  };
  const inputs = await model.prepare("Click on the red circle", files[0]);
  const batch = await model.prepareBatch([
    { task: "Click on the red circle", images: first },
    { task: "How many widgets are there?", images: [second!] },
    { task: "Say hello" },
  ]);
  plain["info"] = [model.info.name, model.info.layers, model.info.vocab, model.info.dtype, model.info.parameters];
  plain["hooks"] = model.catalogue.names;
  plain["ids"] = [inputs.inputIds, batch.inputIds, batch.attentionMask];
  plain["labels"] = [inputs.tokenLabels, batch.tokenLabels, batch.text];
  plain["layouts"] = batch.images.map((image) => [image.row, image.originalSize, image.processedSize, image.grid, image.positions, image.patchGrids]);

  for (const [name, each] of [["one", inputs], ["batch", batch]] as const) {
    const cache = await model.runWithCache(each, () => true, { forward: { logitsToKeep: 0 } });
    Object.assign(arrays, Object.fromEntries(Object.entries(await summaries(cache)).map(([hook, value]) => [`${name}/${hook}`, value])));
    add(name, [["logits", (await cache.output("logits"))!], ["stack", await cache.stack(POST)]]);
    plain[`names ${name}`] = cache.names;
    plain[`bytes ${name}`] = cache.byteCount;
    const pattern = (await cache.get("lm.blocks.1.attn.hook_pattern")).index(0).index(0).index(-1);
    add(name, [["grid", cache.imageGrid(pattern)]]);
    const answer = await model.generate(each, { maxNewTokens: 6 });
    add(`generate ${name}`, [["sequences", answer.sequences], ["logprobs", answer.logprobs]]);
    plain[`text ${name}`] = answer.text;
    const lens = await model.logitLens(each, { topK: 3, positions: "last" });
    add(`lens ${name}`, lens.tensors);
    plain[`lens ${name}`] = await lens.tokens(0, 0, 0);
    const why = await model.attribute(each);
    add(`direct ${name}`, [["scores", why.scores], ["total", why.total], ["value", why.targetValue], ["heads", why.heads], ["grid", why.imageGrid(0)]]);
  }
  const gradient = await model.runWithCache(inputs, `${POST}_grad`, { backwardFrom: [5, 6] });
  add("gradient", (await gradient.match(`${POST}_grad`)).entries());

  const selected = await model.runWithCache(inputs, ["lm.blocks.*.attn.hook_pattern", POST], {
    positions: "last",
    heads: [1],
    dtype: "bfloat16",
    compression: "zstd",
    generate: { maxNewTokens: 4, doSample: true, temperature: 0.8, topP: 0.9, seed: 7 },
  });
  await selected.done();
  add("selected", (await selected.match("lm.blocks.*.hook_resid_post")).entries());
  add("selected", (await selected.match("lm.blocks.*.attn.hook_pattern")).entries());
  add("selected", [["sequences", (await selected.output("sequences"))!]]);

  const vector = new Float32Array(model.info.hidden).map((_, i) => Math.sin(i));
  const held = await (await model.runWithCache(inputs, "lm.blocks.1.hook_resid_post")).done();
  const changes: Record<string, vs.Intervention[]> = {
    add: [vs.addActivation("lm.blocks.2.hook_resid_post", vector, { scale: 2, positions: "last" })],
    zero: [vs.zeroAblation("lm.blocks.*.hook_mlp_out", { positions: [-1, { start: 0, stop: 3 }] })],
    scale: [vs.scaleActivation("lm.blocks.1.attn.hook_pattern", 0.5, { heads: 0 })],
    project: [vs.projectOut("lm.blocks.*.hook_resid_pre", vector), vs.meanAblation("lm.blocks.1.hook_attn_out")],
    block: [vs.blockAttention("lm.blocks.*.attn.hook_mask", { positions: "last", keys: [0, 1] })],
    patch: [vs.patchActivation("lm.blocks.2.hook_resid_post", held.reference("lm.blocks.1.hook_resid_post"))],
  };
  for (const [name, interventions] of Object.entries(changes)) {
    const output = await model.forward(inputs, { logitsToKeep: 2, outputHiddenStates: true, interventions });
    add(`change ${name}`, [["logits", output.logits], ["last", output.hiddenStates.at(-1)!]]);
  }
  const sweep = await model.patchSweep(inputs, await model.prepare("Click on the red square", files[0]), POST, { positions: [-2, -1] });
  add("sweep", sweep.tensors);
  plain["sweep"] = [sweep.hooks, sweep.columns];
  add("unembed", [["directions", await model.unembed(["click", 5])]]);
  const streamed: [string, number][] = [];
  for await (const token of model.stream(inputs, { maxNewTokens: 6 })) {
    streamed.push([token.text, token.id]);
  }
  plain["stream"] = streamed;
  const [row] = await (await model.forward(inputs, { logitsToKeep: 2 })).topTokens(3);
  plain["top"] = row?.map((place) => place.map((token) => token.text));
  const estimate = await model.estimate(inputs, POST);
  plain["estimate"] = [estimate.byteCount, [...estimate.shapes]];
  return { arrays, plain };
}

/** What is refused, and how. */
async function reasons(model: vs.RemoteVLM): Promise<unknown> {
  const inputs = await model.prepare("Say hello");
  const calls: Record<string, () => Promise<unknown>> = {
    hook: () => model.runWithCache(inputs, "lm.blocks.*.hook_resid_pst"),
    layer: () => model.runWithCache(inputs, "lm.blocks.99.hook_resid_post"),
    position: () => model.runWithCache(inputs, POST, { positions: 9999 }),
    heads: () => model.runWithCache(inputs, POST, { heads: [] }),
    gradient: () => model.runWithCache(inputs, `${POST}_grad`),
    shape: () => model.forward(inputs, { interventions: [vs.addActivation("lm.blocks.0.hook_resid_post", [1, 2, 3])] }),
    reference: () =>
      model.forward(inputs, { interventions: [vs.patchActivation("lm.blocks.0.hook_resid_post", { captureId: "0".repeat(32), hook: "lm.blocks.0.hook_resid_post" })] }),
    token: () => model.attribute(inputs, "direct_logit", { target: "surely not one token" }),
    temperature: () => model.generate(inputs, { temperature: 1 }),
    image: () => model.prepare("What is this?", new TextEncoder().encode("no image")),
    long: () => model.prepare("word ".repeat(100_000)),
    model: () => vs.connect(address, { model: "another" }),
    empty: () => model.prepare(" "),
    tokens: () => model.generate(inputs, { maxNewTokens: 0 }),
    aborted: () => model.forward(inputs, { signal: AbortSignal.abort() }),
    nobody: () => vs.connect("127.0.0.1:1"),
    address: () => vs.connect("nowhere"),
    plaintext: () => vs.connect("gpu-box:50051", { token: "secret" }),
  };
  const found: Record<string, unknown> = {};
  for (const [name, call] of Object.entries(calls)) {
    const error = await call().then(
      () => "nothing was thrown",
      (thrown: unknown) => thrown,
    );
    found[name] = error instanceof vs.SpectraError ? [error.name, error.reason, error.field, error.message] : String(error);
  }
  return found;
}

const LONG = "one two three four five six seven eight nine ten ".repeat(60);

/** A capture, tensor by tensor. */
async function capture(model: vs.RemoteVLM): Promise<unknown> {
  const inputs = await model.prepare(LONG);
  process.stderr.write("prepared\n");
  await new Promise((resolve) => process.stdin.once("data", resolve));
  return summaries(await model.runWithCache(inputs, POST));
}

/** Minutes of work, left after the first sign of it in each of three ways. */
async function leave(model: vs.RemoteVLM): Promise<unknown> {
  const inputs = await model.prepare("Say hello");
  const endless = { maxNewTokens: 1500, doSample: true, temperature: 3, seed: 3 };
  for await (const token of model.stream(inputs, endless)) {
    process.stderr.write(`left ${token.index}\n`);
    break;
  }
  const first = await model.generate(inputs, { maxNewTokens: 1 });

  const signal = new AbortController();
  const aborted = await model.generate(inputs, { ...endless, signal: signal.signal, onToken: () => signal.abort() }).catch((thrown: unknown) => thrown);
  const second = await model.generate(inputs, { maxNewTokens: 1 });

  const stopping = new AbortController();
  const captured = await model
    .runWithCache(inputs, POST, { generate: endless, signal: stopping.signal, onToken: () => stopping.abort() })
    .catch((thrown: unknown) => thrown);
  const third = await model.generate(inputs, { maxNewTokens: 1 });
  return [aborted, captured].map((each) => (each instanceof vs.SpectraError ? each.reason : String(each))).concat([first, second, third].map((each) => String(each.sequences.shape[0])));
}

/** A server with TLS and tokens; the files are its authority's certificate and the tokens of two callers. */
async function secure(): Promise<unknown> {
  const [ca, all, infer] = files.map((file) => readFileSync(file, "utf8").trim());
  const tls = { ca, serverName: "localhost" };
  const model = await vs.connect(address, { tls, token: all });
  const inputs = await model.prepare("Say hello");
  const shape = (await model.forward(inputs, { logitsToKeep: 1 })).logits.shape;
  model.close();
  const less = await vs.connect(address, { tls, token: infer });
  const calls = [
    () => less.runWithCache(inputs, POST),
    () => vs.connect(address, { tls }),
    () => vs.connect(address, { tls, token: "wrong-".repeat(6) }),
    () => vs.connect(address, { tls: true, token: all }),
    () => vs.connect(address, { tls: false }),
  ];
  const found: unknown[] = [shape[1]];
  for (const call of calls) {
    const error = await call().catch((thrown: unknown) => thrown);
    found.push(error instanceof vs.SpectraError ? error.reason : String(error));
  }
  less.close();
  return found;
}

if (command === "secure") {
  process.stdout.write(JSON.stringify(await secure()));
  process.exit();
}
const commands = { collect, reasons, capture, leave };
const model = await vs.connect(address);
try {
  process.stdout.write(JSON.stringify(await commands[command as keyof typeof commands](model)));
} finally {
  model.close();
  process.stdin.destroy();
}
