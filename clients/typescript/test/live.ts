/**
 * Calls to a real server, for `tests/test_typescript.py`: `node build/test/live.js COMMAND ADDRESS ...` prints what came
 * as JSON.
 */
import { readFileSync } from "node:fs";
import * as vs from "../src/index.js";
import { collect, refusal, summaries } from "./calls.js";

const [command = "", address = "", ...files] = process.argv.slice(2);
const POST = "lm.blocks.*.hook_resid_post";

/** What is refused, and how. */
async function reasons(): Promise<unknown> {
  const model = await vs.connect(address);
  const inputs = await model.prepare("Say hello");
  const change = (...interventions: vs.Intervention[]) => model.forward(inputs, { interventions });
  const hook = "lm.blocks.0.hook_resid_post";
  const calls: Record<string, () => Promise<unknown>> = {
    hook: () => model.runWithCache(inputs, "lm.blocks.*.hook_resid_pst"),
    layer: () => model.runWithCache(inputs, "lm.blocks.99.hook_resid_post"),
    predicate: () => model.runWithCache(inputs, () => false),
    position: () => model.runWithCache(inputs, POST, { positions: 9999 }),
    positions: () => model.runWithCache(inputs, POST, { positions: [] }),
    heads: () => model.runWithCache(inputs, POST, { heads: [] }),
    both: () => model.runWithCache(inputs, POST, { forward: {}, generate: {} }),
    gradient: () => model.runWithCache(inputs, `${POST}_grad`),
    reduce: () => model.runWithCache(inputs, POST, { reduce: "mean_heads" }),
    shape: () => change(vs.addActivation(hook, [1, 2, 3])),
    ragged: () => Promise.resolve().then(() => change(vs.addActivation(hook, [[1, 2], [3]]))),
    reference: () => change(vs.patchActivation(hook, { captureId: "0".repeat(32), hook })),
    intervention: () => change(vs.zeroAblation("lm.blocks.0.nothing")),
    token: () => model.attribute(inputs, "direct_logit", { target: "surely not one token" }),
    window: () => model.attribute(inputs, "occlusion", { window: 2 }),
    sweep: async () => model.patchSweep(inputs, await model.prepare("Say hello to them all"), POST),
    temperature: () => model.generate(inputs, { temperature: 1 }),
    topP: () => model.generate(inputs, { doSample: true, topP: 2 }),
    image: () => model.prepare("What is this?", new TextEncoder().encode("no image")),
    file: () => model.prepare("What is this?", "/nowhere/at/all.png"),
    long: () => model.prepare("word ".repeat(100_000)),
    model: () => vs.connect(address, { model: "another" }),
    empty: () => model.prepare(" "),
    batch: () => model.prepareBatch([]),
    tokens: () => model.generate(inputs, { maxNewTokens: 0 }),
    aborted: () => model.forward(inputs, { signal: AbortSignal.abort() }),
    deadline: () => model.generate(inputs, { maxNewTokens: 4000, doSample: true, temperature: 20, seed: 1, timeout: 0.05 }),
    nobody: () => vs.connect("127.0.0.1:1"),
    address: () => vs.connect("nowhere"),
    plaintext: () => vs.connect("gpu-box:50051", { token: "secret" }),
    secret: () => vs.connect(address, { token: "two words" }),
    key: () => vs.connect(address, { tls: { cert: "no key" } }),
    keepAlive: () => vs.connect(address, { keepAlive: { timeout: 0 } }),
    closed: () => {
      model.close();
      return model.forward(inputs);
    },
  };
  const found: Record<string, unknown> = {};
  for (const [name, call] of Object.entries(calls)) {
    found[name] = await refusal(call);
  }
  return found;
}

const LONG = "one two three four five six seven eight nine ten ".repeat(60);

/** A capture, tensor by tensor, over a connection with a keep-alive that is asked for often. */
async function capture(): Promise<unknown> {
  const model = await vs.connect(address, { keepAlive: { interval: 30, timeout: 30, idle: true } });
  const inputs = await model.prepare(LONG);
  process.stderr.write("prepared\n");
  await new Promise((resolve) => process.stdin.once("data", resolve));
  return summaries(await model.runWithCache(inputs, POST));
}

/** Minutes of work, left after the first sign of it in each of three ways. */
async function leave(): Promise<unknown> {
  const model = await vs.connect(address);
  const inputs = await model.prepare("Say hello");
  const endless = { maxNewTokens: 1500, doSample: true, temperature: 3, seed: 3 };
  const worker = async () => String((await model.generate(inputs, { maxNewTokens: 1 })).sequences.shape[0]);
  for await (const token of model.stream(inputs, endless)) {
    process.stderr.write(`left ${token.index}\n`);
    break;
  }
  const found = [await worker()];
  const ways: ((stop: AbortController) => Promise<unknown>)[] = [
    (stop) => model.generate(inputs, { ...endless, signal: stop.signal, onToken: () => stop.abort() }),
    (stop) => model.runWithCache(inputs, POST, { generate: endless, signal: stop.signal, onToken: () => stop.abort() }),
  ];
  for (const way of ways) {
    const [, reason = "nothing was thrown"] = await refusal(() => way(new AbortController()));
    found.push(reason, await worker());
  }
  model.close();
  return found;
}

/** A server with TLS and tokens; the files are its authority's certificate and the tokens of two callers. */
async function secure(): Promise<unknown> {
  const [ca, all, infer] = files.map((file) => readFileSync(file, "utf8").trim());
  const tls = { ca, serverName: "localhost" };
  const model = await vs.connect(address, { tls, token: all });
  const inputs = await model.prepare("Say hello");
  const { shape } = (await model.forward(inputs, { logitsToKeep: 1 })).logits;
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
    found.push((await refusal(call))[1]);
  }
  less.close();
  return found;
}

/** A server that knows its clients by their certificates; the files are the authority's, and a client's own with its key. */
async function mutual(): Promise<unknown> {
  const [ca, cert, key] = files.map((file) => readFileSync(file));
  const model = await vs.connect(address, { tls: { ca, cert, key, serverName: "localhost" } });
  const { names } = await (await model.runWithCache(await model.prepare("Say hello"), POST)).done();
  model.close();
  return [names.length, (await refusal(() => vs.connect(address, { tls: { ca, serverName: "localhost" } })))[1]];
}

/** Calls to a server that is busy now and then. */
async function retries(): Promise<unknown> {
  const patient = await vs.connect(address);
  const inputs = await patient.prepare("Say hello");
  const answer = await patient.generate(inputs, { maxNewTokens: 1 });
  const hasty = await vs.connect(address, { retries: 0 });
  return [
    String(answer.sequences.shape[0]),
    (await refusal(() => hasty.generate(inputs, { maxNewTokens: 1 })))[1],
    (await refusal(() => patient.generate(inputs, { maxNewTokens: 1, timeout: 15 })))[1],
    (await refusal(() => patient.generate(inputs, { maxNewTokens: 1 })))[1],
  ];
}

/** All calls, with images as the paths of their files. */
async function everything(): Promise<unknown> {
  const model = await vs.connect(address, { timeout: 300 });
  try {
    return await collect(model, files[0], new Blob([readFileSync(files[1])]));
  } finally {
    model.close();
  }
}

const commands: Record<string, () => Promise<unknown>> = { collect: everything, reasons, capture, leave, secure, mutual, retries };
process.stdout.write(JSON.stringify(await commands[command]()), () => process.exit());
