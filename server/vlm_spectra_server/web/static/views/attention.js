import { h, visible, percent } from "../dom.js";
import { unpacked } from "../api.js";
import { bitmap } from "../colours.js";
import { matrix, tokenStrip } from "../parts.js";

export const attention = {
  id: "attention",
  name: "Attention",
  about: "What one token reads of the image, in every layer and head: choose the token in the prompt, or click a patch to see what that patch reads. All layers and heads come at once; the sliders ask the server nothing.",
  path: "/api/attention",
  controls: [
    { id: "position", kind: "hidden", value: -1, asks: true },
    { id: "layer", label: "Layer", kind: "range", value: 0, min: 0, max: 0 },
    { id: "heads", label: "Heads", kind: "choice", value: "mean", options: [["mean", "mean"], ["max", "maximum"], ["one", "one head"]] },
    { id: "head", label: "Head", kind: "range", value: 0, min: 0, max: 0 },
  ],

  /** The row of a layer: of one head, or the mean or maximum over heads. */
  row(data, layer, heads, head) {
    const { shape: [, count, length], values } = data.unpacked, begin = layer * count * length;
    if (heads === "one") return values.subarray(begin + head * length, begin + (head + 1) * length);
    const row = new Float32Array(length);
    for (let i = 0; i < count; i++)
      for (let s = 0; s < length; s++) {
        const value = values[begin + i * length + s];
        row[s] = heads === "mean" ? row[s] + value / count : Math.max(row[s], value);
      }
    return row;
  },

  show(page, data) {
    data.unpacked ||= unpacked(data.patterns);
    const { shape: [layers, count, length], values } = data.unpacked, prompt = data.prompt, patches = prompt.images[0]?.patches || [];
    page.stage.layout(prompt);
    const shares = new Float32Array(layers * count);
    for (let i = 0; i < layers * count; i++) for (const patch of patches) shares[i] += values[i * length + patch.position];
    const all = h("div", { className: "wide" }), said = h("p", { id: "said" });
    const strip = tokenStrip(prompt, data.position, (position) => page.ask({ position }), "The reading token");
    const overview = matrix({
      values: shares, rows: data.layers, columns: [...Array(count).keys()], down: "layer", across: "head", scale: "amount", peak: Math.max(...shares, 1e-9),
      label: "The image's share of each head's attention, layers by heads", legend: "the image's share of the attention",
      width: 330, pick: (layer, head) => page.set({ layer, heads: "one", head }),
    });
    const tiles = h("canvas", { tabIndex: 0, role: "img", "aria-label": "All heads of the layer over the image" });
    all.append(tiles);
    page.result.replaceChildren(said, h("h3", { textContent: "The reading token" }), strip,
      h("div", { className: "figures" }, h("div", {}, h("h3", { id: "heads-title" }), all), h("div", {}, h("h3", { textContent: "All layers and heads" }), overview.element)));
    page.stage.onPatch = (position) => page.ask({ position });
    page.limit("layer", layers - 1);
    page.limit("head", count - 1);

    data.draw = () => {
      const { layer, heads, head } = page.state;
      const row = this.row(data, layer, heads, head);
      let share = 0;
      for (const patch of patches) share += row[patch.position];
      const name = heads === "one" ? `head ${head}` : heads === "mean" ? `the mean of ${count} heads` : `the maximum over ${count} heads`;
      page.stage.heat((position) => row[position], { label: `share of the attention, layer ${data.layers[layer]}, ${name}`, chosen: data.position });
      const token = visible(prompt.tokens[data.position]);
      said.textContent = heads === "max"
        ? `What “${token}” (position ${data.position}) reads: layer ${data.layers[layer]}, ${name}.`
        : `What “${token}” (position ${data.position}) reads: layer ${data.layers[layer]}, ${name}, ${percent(share)} of it in the image.`;
      overview.set(heads === "one" ? [layer, head] : null);
      page.result.querySelector("#heads-title").textContent = `All heads of layer ${data.layers[layer]}`;
      this.tiles(page, tiles, data, layer);
    };
    data.draw();
  },

  tiles(page, canvas, data, layer) {
    const { shape: [, count, length], values } = data.unpacked, image = data.prompt.images[0];
    if (!image) { canvas.width = canvas.height = 0; return; }
    const [rows, columns] = image.grid, across = Math.ceil(Math.sqrt(count)), side = Math.max(40, Math.floor(330 / across) - 6);
    const high = Math.max(20, Math.min(Math.round((side * rows) / columns), 2 * side)), gap = 14;
    canvas.width = across * (side + 6); canvas.height = Math.ceil(count / across) * (high + gap);
    const context = canvas.getContext("2d"), ink = getComputedStyle(document.body).color;
    context.imageSmoothingEnabled = false;
    context.font = "11px system-ui, sans-serif"; context.fillStyle = ink;
    for (let head = 0; head < count; head++) {
      const begin = (layer * count + head) * length, cells = image.patches.map((patch) => values[begin + patch.position]);
      const peak = cells.reduce((most, value) => Math.max(most, value), 1e-9);
      const x = (head % across) * (side + 6), y = Math.floor(head / across) * (high + gap);
      context.fillText(`${head}`, x + 1, y + 10);
      context.drawImage(bitmap(cells, rows, columns, "amount", peak), x, y + 12, side, high);
      if (page.state.heads === "one" && page.state.head === head) { context.strokeStyle = "#0a7d33"; context.lineWidth = 2; context.strokeRect(x + 1, y + 13, side - 2, high - 2); }
    }
    canvas.onclick = (event) => {
      const box = canvas.getBoundingClientRect();
      const head = Math.floor((event.clientY - box.top) / (high + gap)) * across + Math.floor((event.clientX - box.left) / (side + 6));
      if (head < count) page.set({ heads: "one", head });
    };
    canvas.onkeydown = (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = page.state.heads === "one" ? page.state.head + step : 0;
      if (next >= 0 && next < count) page.set({ heads: "one", head: next });
    };
  },

  /** A control changed that asks nothing of the server. */
  redraw(page, data) { data.draw(); },

  csv(data, state) {
    const row = this.row(data, state.layer, state.heads, state.head), columns = data.prompt.images[0]?.grid[1] || 1;
    const cells = data.prompt.images[0]?.patches || [];
    return [["row", "column", "position", "share"], ...cells.map((p, i) => [Math.floor(i / columns), i % columns, p.position, row[p.position]])];
  },
  json: (data) => ({ ...data, unpacked: undefined, draw: undefined }),
  png: (page) => page.stage.picture(),
  python: (asked, state, data) => [
    ...(state.heads === "max" ? ["import numpy as np", ""] : []),
    `with model.run_with_cache("lm.blocks.*.attn.hook_pattern", positions=[${asked.position}]) as cache:`,
    "    model.forward(inputs, logits_to_keep=None)",
    "",
    `pattern = cache["lm.blocks.${data ? data.layers[state.layer] : state.layer}.attn.hook_pattern"][0, :, 0]  # [heads, seq]`,
    `row = ${state.heads === "one" ? `pattern[${state.head}]` : state.heads === "mean" ? "pattern.mean(0)" : "np.asarray(pattern).max(0)"}`,
    ...(asked.filename ? ["grid = cache.image_grid(row)  # [grid_h, grid_w]", 'vs.pictures.overlay(inputs, row, label="share of the attention").save("attention.png")'] : []),
  ],
};
