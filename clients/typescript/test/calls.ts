/** Every call, over whatever connection: what came, arrays by type, shape and SHA-256, for comparison with Python's. */
import * as vs from "../src/api.js";

const POST = "lm.blocks.*.hook_resid_post";
const PATTERN = "lm.blocks.*.attn.hook_pattern";

type Summary = [dtype: string, shape: readonly number[], sha256: string];

/** What `collect` found. */
export interface Found {
  arrays: Record<string, Summary>;
  plain: Record<string, unknown>;
}

async function summaryOf(tensor: vs.Tensor): Promise<Summary> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", tensor.bytes.slice()));
  return [tensor.dtype, tensor.shape, Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("")];
}

/** A cache's activations, as they come. */
export async function summaries(cache: vs.ActivationCache): Promise<Record<string, Summary>> {
  const found: Record<string, Summary> = {};
  for await (const [name, tensor] of cache) {
    found[name] = await summaryOf(tensor);
  }
  return found;
}

/** The name of what a call throws, with its reason, field and sentence. */
export async function refusal(call: () => Promise<unknown>): Promise<string[]> {
  const error = await call().then(
    () => "nothing was thrown",
    (thrown: unknown) => thrown,
  );
  return error instanceof vs.SpectraError ? [error.name, error.reason, error.field, error.message] : [String(error)];
}

/** Two prompts of as many tokens, and what is found about them. */
class Collector {
  readonly found: Found = { arrays: {}, plain: {} };
  private readonly costs: vs.Cost[] = [];

  constructor(
    private readonly model: vs.RemoteVLM,
    private readonly inputs: vs.Inputs,
    private readonly corrupted: vs.Inputs,
    private readonly batch: vs.Inputs,
  ) {}

  async add(prefix: string, tensors: Iterable<readonly [string, vs.Tensor]>): Promise<void> {
    for (const [name, tensor] of tensors) {
      this.found.arrays[`${prefix}/${name}`] = await summaryOf(tensor);
    }
  }

  async described(): Promise<void> {
    const { model, inputs, batch } = this;
    const { plain } = this.found;
    plain["info"] = [model.info.name, model.info.layers, model.info.vocab, model.info.dtype, model.info.parameters];
    plain["hooks"] = model.catalogue.names.toSorted();
    plain["ids"] = [inputs.inputIds, batch.inputIds, batch.attentionMask];
    plain["labels"] = [inputs.tokenLabels, batch.tokenLabels, batch.text];
    plain["layouts"] = batch.images.map((image) => [image.row, image.originalSize, image.processedSize, image.grid, image.positions, image.patchGrids]);
    plain["texts"] = await model.texts([5, 6]);
    const [width, height] = inputs.images[0].originalSize;
    plain["boxes"] = vs.imageTokens(inputs.images[0]).map(({ position, box }) => [position, ...box]);
    plain["overlaps"] = inputs.tokensIn([10, 20, 40, 30]).map(({ position, tile, row, column, fraction }) => [position, tile, row, column, fraction]);
    plain["looked at"] = vs.boxesOf(inputs.images[0], inputs.images[0].positions.slice(3, 5));
    plain["positions"] = [inputs.positionsIn([10, 20, width / 2, height - 7]), batch.positionsIn([0, 0, 30, 30], 1, 0.5)];
  }

  /** Every hook of one prompt and of a padded batch, and each analysis of them. */
  async captured(): Promise<void> {
    const { model } = this;
    const { arrays, plain } = this.found;
    for (const [name, each] of [["one", this.inputs], ["batch", this.batch]] as const) {
      const cache = await model.runWithCache(each, () => true, { forward: { logitsToKeep: 0 } });
      Object.assign(arrays, Object.fromEntries(Object.entries(await summaries(cache)).map(([hook, value]) => [`${name}/${hook}`, value])));
      const pattern = (await cache.get("lm.blocks.1.attn.hook_pattern")).index(0).index(0).index(-1);
      const logits = (await cache.output("logits")) ?? vs.Tensor.of([]);
      await this.add(name, Object.entries({ logits, stack: await cache.stack(POST), grid: cache.imageGrid(pattern) }));
      for (const hook of ["vision.blocks.1.hook_resid_post", "vision.blocks.0.attn.hook_pattern", "vision.hook_out"]) {
        await this.add(`${name} image`, [[hook, await cache.image(hook, each.images.length - 1)]]);
      }
      plain[`image positions ${name}`] = cache.imagePositions();
      plain[`names ${name}`] = cache.names;
      plain[`bytes ${name}`] = cache.byteCount;
      const answer = await model.generate(each, { maxNewTokens: 6 });
      await this.add(`generate ${name}`, Object.entries({ sequences: answer.sequences, logprobs: answer.logprobs }));
      plain[`text ${name}`] = answer.text;
      const lens = await model.logitLens(each, { topK: 3, positions: "last" });
      await this.add(`lens ${name}`, lens.tensors);
      plain[`lens ${name}`] = [await lens.tokens(0, 0, 0), await lens.targetTokens(0, 0)];
      await this.add(`lens ${name}`, Object.entries({ targetIds: lens.targetIds, targetLogits: lens.targetLogits, targetProbs: lens.targetProbs, ranks: lens.ranks }));
      const why = await model.attribute(each);
      plain[`patches ${name}`] = [why.topPatches(0, 3), why.tokens().length, await why.targetTokens()];
      this.costs.push(await cache.cost(), answer.cost, lens.cost, why.cost);
      await this.add(`direct ${name}`, Object.entries({ residual: why.residual, scores: why.scores, total: why.total, value: why.targetValue, heads: why.heads, mlps: why.mlps, embed: why.embed, bias: why.bias, sources: why.sources, grid: why.imageGrid(0) }));
    }
  }

  /** What a capture can be asked for beside hooks. */
  async selected(): Promise<void> {
    const { model, inputs } = this;
    const { plain } = this.found;
    const gradient = await model.runWithCache(inputs, `${POST}_grad`, { backwardFrom: [5, 6] });
    await this.add("gradient", await gradient.match(`${POST}_grad`));
    const target = await model.runWithCache(inputs, `${POST}_grad`, { backwardFrom: { token: 7, position: -2 }, positions: { start: -2 } });
    await this.add("gradient of a target", await target.match(`${POST}_grad`));
    const sampled = await model.runWithCache(inputs, [PATTERN, POST], {
      positions: "last",
      heads: [1],
      dtype: "bfloat16",
      compression: "zstd",
      generate: { maxNewTokens: 4, doSample: true, temperature: 0.8, topP: 0.9, seed: 7 },
    });
    await this.add("selected", await sampled.match(POST));
    await this.add("selected", await sampled.match(PATTERN));
    await this.add("selected", [["sequences", (await sampled.output("sequences")) ?? vs.Tensor.of([])]]);
    for (const [name, options] of Object.entries<vs.CaptureOptions>({
      heads: { reduce: "mean_heads", positions: "image" },
      norm: { reduce: "norm", dtype: "float16" },
      packed: { compression: "zstd" },
      text: { positions: ["text", -1, { start: 0, stop: 4, step: 2 }], compression: "zstd", dtype: "float16" },
    })) {
      const hooks = name === "heads" ? PATTERN : POST;
      await this.add(`reduced ${name}`, await (await model.runWithCache(inputs, hooks, options)).match(hooks));
      const estimate = await model.estimate(inputs, hooks, options);
      plain[`estimate ${name}`] = [estimate.byteCount, [...estimate.shapes]];
    }
    const hidden = await model.forward(this.batch, { logitsToKeep: [-1, -3], outputHiddenStates: true, outputAttentions: true });
    await this.add("forward", hidden.tensors);
    const top = await (await model.forward(inputs, { logitsToKeep: 2 })).topTokens(3);
    plain["top"] = top[0].map((place) => place.map((token) => token.text));
    await this.add("unembed", [["directions", await model.unembed(["click", 5])]]);
  }

  async attributed(): Promise<void> {
    const { model, inputs, corrupted } = this;
    for (const [name, method, options] of [
      ["pair", "direct_logit", { target: [5, 6] }],
      ["gradient", "gradient_x_input", { target: { token: 7, position: -2 } }],
      ["answer", "gradient_x_input", { target: { answer: " red" } }],
      ["integrated", "integrated_gradients", { steps: 4, baseline: "black" }],
      ["occlusion", "occlusion", { window: 4, stride: 4, baseline: "blurred" }],
      ["rollout", "attention_rollout", {}],
      ["relevancy", "relevancy", {}],
      ["cam", "grad_cam", {}],
      ["patching", "attribution_patching", { against: corrupted }],
      ["changed", "direct_logit", { interventions: [vs.zeroAblation("lm.blocks.1.hook_mlp_out")] }],
    ] as const satisfies readonly [string, vs.Method, vs.AttributionOptions][]) {
      const why = await model.attribute(inputs, method, options);
      await this.add(`attribute ${name}`, why.tensors);
      this.found.plain[`attribute ${name}`] = [await why.targetTokens(), why.steps ?? null, Number.isNaN(why.residual.at(0))];
    }
    const lens = await model.logitLens(inputs, { layers: [0, -1], hook: "hook_mlp_out", positions: [-1, 0], topK: 2, targets: ["click", 5] });
    await this.add("lens of targets", lens.tensors);
  }

  async changed(): Promise<void> {
    const { model, inputs } = this;
    const held = await (await model.runWithCache(inputs, "lm.blocks.1.hook_resid_post")).done();
    const head = await (await model.runWithCache(inputs, "lm.blocks.1.attn.hook_z", { positions: "last", heads: 1 })).done();
    const stream = await held.get("lm.blocks.1.hook_resid_post");
    const vector = new Float32Array(model.info.hidden).map((_, i) => Math.round(1000 * Math.sin(i)) / 1000);
    const length = inputs.inputIds[0].length;
    const mask = Array.from({ length }, (_, key) => (key === 3 ? -1e9 : 0));
    const changes: Record<string, vs.Intervention[]> = {
      add: [vs.addActivation("lm.blocks.2.hook_resid_post", vector, { scale: 2, positions: "last" })],
      zero: [vs.zeroAblation("lm.blocks.*.hook_mlp_out", { positions: [-1, { start: 0, stop: 3 }] })],
      scale: [vs.scaleActivation("lm.blocks.1.attn.hook_pattern", 0.5, { heads: 0 })],
      project: [vs.projectOut("lm.blocks.*.hook_resid_pre", vector), vs.meanAblation("lm.blocks.1.hook_attn_out")],
      mean: [vs.meanAblation("lm.blocks.2.hook_resid_post", { value: stream, positions: "last" })],
      block: [vs.blockAttention("lm.blocks.*.attn.hook_mask", { positions: "last", keys: [0, 1] })],
      mask: [vs.setAttentionMask("lm.blocks.1.attn.hook_mask", mask, { positions: "last" })],
      patch: [vs.patchActivation("lm.blocks.2.hook_resid_post", held.reference("lm.blocks.1.hook_resid_post"))],
      sent: [vs.patchActivation("lm.blocks.2.hook_resid_post", stream)],
      head: [vs.patchHead("lm.blocks.2.attn.hook_z", head.reference("lm.blocks.1.attn.hook_z"), { heads: [1], positions: "last" })],
    };
    for (const [name, interventions] of Object.entries(changes)) {
      const output = await model.forward(inputs, { logitsToKeep: 2, outputHiddenStates: true, interventions });
      await this.add(`change ${name}`, [["logits", output.logits], ["last", output.hiddenStates[model.info.layers]]]);
    }
    const steered = await model.generate(inputs, { maxNewTokens: 4, interventions: changes["add"] });
    await this.add("steered", [["sequences", steered.sequences]]);
  }

  async swept(): Promise<void> {
    const { model, inputs, corrupted } = this;
    const { plain } = this.found;
    const sweep = await model.patchSweep(inputs, corrupted, POST, { positions: [-2, -1] });
    await this.add("sweep", sweep.tensors);
    await this.add("sweep as a whole", Object.entries({ values: sweep.values, effect: sweep.effect, normalized: sweep.normalized }));
    plain["sweep"] = [sweep.hooks, sweep.columns, sweep.cleanValue, sweep.corruptedValue, sweep.labels, await sweep.targetTokens(), sweep.top(2)];
    const image = await model.patchSweep(inputs, corrupted, "lm.blocks.1.hook_resid_pre", { positions: "image" });
    await this.add("sweep of an image", [["grid", image.imageGrid(0)]]);
    const heads = await model.patchSweep(inputs, corrupted, "lm.blocks.1.attn.hook_z", { heads: [0, 2], metric: [5, 6], mode: "noising" });
    await this.add("sweep of heads", heads.tensors);
    plain["sweep of heads"] = [heads.hooks, heads.columns, heads.start, heads.goal, heads.labels];
    const missing: number[] = [];
    const onRow = ({ values }: vs.PatchSweep) => missing.push(values.toNumbers().filter(Number.isNaN).length);
    const all = await model.patchSweep(inputs, corrupted, "lm.blocks.*.attn.hook_k", { heads: "all", onRow });
    await this.add("sweep of all heads", [["values", all.values]]);
    plain["sweep of all heads"] = [all.columns, missing];
    this.costs.push(sweep.cost, heads.cost);
  }

  async streamed(): Promise<void> {
    const { model, inputs, batch } = this;
    const { plain } = this.found;
    const tokens: [string, number][] = [];
    for await (const token of model.stream(inputs, { maxNewTokens: 6 })) {
      tokens.push([token.text, token.id]);
    }
    plain["stream"] = tokens;
    const rows: [number, number, number][] = [];
    const phases = new Set<string>();
    const answer = await model.generate(batch, {
      maxNewTokens: 5,
      doSample: true,
      temperature: 1.5,
      seed: 11n,
      stop: [")"],
      outputHiddenStates: true,
      onToken: ({ row, index, id }) => rows.push([row, index, id]),
      onProgress: ({ phase }) => phases.add(phase),
    });
    plain["rows"] = rows.toSorted((a, b) => a[0] - b[0] || a[1] - b[1]);
    plain["clicks"] = answer.clicks.map((click) => (click === undefined ? null : [click.x, click.y]));
    await this.add("sampled", [["sequences", answer.sequences], ["last", answer.hiddenStates[model.info.layers]]]);
    plain["phases"] = phases.has("generating");
    this.costs.push(answer.cost);
    plain["costs"] = this.costs.every(({ requestId, bytes, total, compute }) => requestId !== "" && bytes > 0 && total > 0 && compute > 0);
    const ways: (() => Promise<unknown>)[] = [
      () => model.generate(batch, { onToken: raise }),
      () => model.runWithCache(inputs, POST, { generate: {}, onProgress: raise }),
      () => model.patchSweep(inputs, this.corrupted, POST, { onRow: raise }),
    ];
    plain["raised"] = await Promise.all(ways.map((way) => refusal(way)));
  }
}

function raise(): never {
  throw new RangeError("the caller's own");
}

/** What all calls give; the images are two files. */
export async function collect(model: vs.RemoteVLM, first: vs.ImageLike, second: vs.ImageLike): Promise<Found> {
  const inputs = await model.prepare("Click on the red circle", first);
  const corrupted = await model.prepare("Click on the red square", first);
  const batch = await model.prepareBatch([
    { task: "Click on the red circle", images: first, system: "Be brief." },
    { task: "How many widgets are there?", images: [second], system: "Be brief." },
    { task: "Say hello", assistantPrefill: "He", system: "Be brief." },
  ]);
  const collector = new Collector(model, inputs, corrupted, batch);
  await collector.described();
  await collector.captured();
  await collector.selected();
  await collector.attributed();
  await collector.changed();
  await collector.swept();
  await collector.streamed();
  return collector.found;
}
