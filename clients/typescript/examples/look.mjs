#!/usr/bin/env node
// What a model answers about a picture, and what its layers would have said:
//   node look.mjs gpu-box:50051 "Click on the red circle" screenshot.png
// A token for the server is taken from VLM_SPECTRA_TOKEN.
import { connect, SpectraError } from "@vlm-spectra/client";

const [address, task, ...images] = process.argv.slice(2);
if (address === undefined || task === undefined) {
  console.error("usage: look.mjs HOST:PORT TASK [IMAGE ...]");
  process.exit(2);
}
const leaving = new AbortController();
process.on("SIGINT", () => leaving.abort());
const { signal } = leaving;
const shade = (share) => " .:-=+*#%@"[Math.min(9, Math.floor(10 * share))];

try {
  const model = await connect(address, { signal });
  console.log(`${model.info.name}: ${model.info.layers} layers, ${model.info.heads} heads, ${model.hooks().length} hook points`);
  const inputs = await model.prepare(task, images, { signal });

  for await (const token of model.stream(inputs, { maxNewTokens: 32, signal })) {
    process.stdout.write(token.text);
  }
  console.log();

  const lens = await model.logitLens(inputs, { topK: 3, positions: "last", signal });
  for (const [at, layer] of [...lens.layers.toFloat32()].entries()) {
    const tokens = await lens.tokens(at, 0, 0);
    console.log(`layer ${layer}: ${tokens.map((token) => JSON.stringify(token)).join(" ")}`);
  }

  const cache = await model.runWithCache(inputs, "lm.blocks.*.attn.hook_pattern", { positions: "last", reduce: "mean_heads", signal });
  for await (const [name, pattern] of cache) {
    console.log(`${name} ${pattern.dtype} [${pattern.shape.join(", ")}]`);
  }
  if (inputs.images.length > 0) {
    const last = [...(await cache.match("lm.blocks.*.attn.hook_pattern")).values()].at(-1);
    const grid = cache.imageGrid(last.index(0).index(0));
    const most = Math.max(...grid.toFloat32());
    console.log("where the last layer looks in the first image:");
    for (let row = 0; row < grid.shape[0]; row++) {
      console.log([...grid.index(row).toFloat32()].map((share) => shade(share / most)).join(""));
    }
  }
  model.close();
} catch (error) {
  if (!(error instanceof SpectraError)) {
    throw error;
  }
  console.error(`${error.reason}: ${error.message}`);
  process.exit(1);
}
