import { h, isolated, percent, short } from "../dom.js";
import { unpacked } from "../api.js";
import { COLD, WARM, bitmap, pageInk } from "../colours.js";
import { barsPicture } from "../export.js";
import { cellMap, panesOf, sum } from "../panes.js";
import { bars, matrix, largest, tokenStrip } from "../parts.js";

const WIDTH = 360; // of all heads together
const NAME = 16; // the line above each head

const MOST = "What it reads most";

/** The tokens of a prompt without an image that have most of a row. */
const strongest = (prompt, row) => prompt.tokens.map((token, p) => [`${isolated(token)} (${p})`, row[p]]).sort((a, b) => b[1] - a[1]).slice(0, 12);

export const attention = {
  id: "attention",
  name: "Attention",
  about: "What one token reads of the image, in every layer and head: choose the token in the prompt, or click a patch to see what that patch reads. All layers and heads come at once; the sliders ask the server nothing.",
  path: "/api/attention",
  counts: "positions",
  controls: [
    { id: "position", kind: "hidden", value: -1, asks: true },
    { id: "layer", label: "Layer", kind: "range", value: 0, min: 0, max: 0 },
    { id: "heads", label: "Heads", kind: "choice", value: "mean", options: [["mean", "mean"], ["max", "maximum"], ["one", "one head"]] },
    { id: "head", label: "Head", kind: "range", value: 0, min: 0, max: 0 },
    { id: "pane", kind: "hidden", value: 0, min: 0 },
  ],
  changed: (changes) => ("head" in changes ? { heads: "one", ...changes } : changes),

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
    const { shape: [layers, count, length], values } = data.unpacked, { prompt } = data, panes = panesOf(prompt);
    page.stage.layout(prompt);
    const shares = new Float32Array(layers * count);
    for (let i = 0; i < layers * count; i++) for (const position of prompt.image_positions) shares[i] += values[i * length + position];
    const said = h("p", { id: "said", className: "lead" }), title = h("h3");
    const strip = tokenStrip(prompt, data.position, (position) => page.ask({ position }), "The reading token");
    const overview = matrix({
      values: shares, rows: data.layers, columns: [...Array(count).keys()], down: "layer", across: "head", scale: "amount", peak: largest(shares),
      label: "The image's share of each head's attention, layers by heads", legend: "the image's share of the attention",
      width: WIDTH, pick: (layer, head) => page.set({ layer, head }),
    });
    const words = h("div", { hidden: panes.length > 0 }), figures = h("div", { className: "figures", hidden: panes.length === 0 });
    const tiles = h("canvas", { tabIndex: 0, role: "img", "aria-label": "All heads of the layer over the image" });
    const which = panes.length > 1 ? h("select", { "aria-label": "Pane of the heads" }, ...panes.map(({ name }, i) => h("option", { value: i, textContent: name || "tiles" }))) : null;
    which?.addEventListener("change", () => page.set({ pane: +which.value }));
    page.result.replaceChildren(said, h("h3", { textContent: "The reading token" }), strip, words, figures);
    figures.append(h("div", {}, title, which, h("div", { className: "wide" }, tiles)), h("div", {}, h("h3", { textContent: "All layers and heads" }), overview.element));
    page.stage.onPatch = (position) => page.ask({ position });
    page.limit("layer", layers - 1);
    page.limit("head", count - 1);
    this.tiles = tiles;
    this.overview = overview.canvas;

    this.redraw = () => {
      const { layer, heads, head, pane } = page.state, row = this.row(data, layer, heads, head);
      const share = prompt.image_positions.reduce((whole, position) => whole + row[position], 0);
      const name = heads === "one" ? `head ${head}` : heads === "mean" ? `the mean of ${count} heads` : `the maximum over ${count} heads`;
      page.stage.heat((position) => row[position], { label: `share of the attention, layer ${data.layers[layer]}, ${name}`, chosen: data.position });
      const end = heads === "max" || !panes.length ? "." : `, ${percent(share)} of it in the image.`;
      said.textContent = `What “${isolated(prompt.tokens[data.position])}” (position ${data.position}) reads: layer ${data.layers[layer]}, ${name}${end}`;
      if (!panes.length) {
        const most = strongest(prompt, row);
        words.replaceChildren(h("h3", { textContent: MOST }), bars(most, most[0][1], MOST));
      }
      overview.set(heads === "one" ? [layer, head] : null);
      title.textContent = `All heads of layer ${data.layers[layer]}`;
      if (which) which.value = Math.min(pane, panes.length - 1);
      this.draw(page, data, panes[Math.min(pane, panes.length - 1)]);
    };
    this.redraw();
  },

  /** All heads of a layer over a pane, each on a scale of its own. */
  draw(page, data, pane) {
    const { tiles } = this, { layer, heads, head: chosen } = page.state, { shape: [, count, length], values } = data.unpacked;
    if (!pane) return;
    const across = Math.ceil(Math.sqrt(count)), room = Math.min(WIDTH, page.result.clientWidth || WIDTH);
    const side = Math.max(44, Math.floor(room / across) - 8), step = side + 8;
    const high = Math.max(20, Math.min(Math.round((side * pane.size[1]) / pane.size[0]), 2 * side)), fine = devicePixelRatio || 1;
    const [wide, tall] = [across * step, Math.ceil(count / across) * (high + NAME)], map = cellMap(pane, side, high);
    tiles.width = wide * fine; tiles.height = tall * fine;
    tiles.style.width = `${wide}px`;
    const context = tiles.getContext("2d");
    context.scale(fine, fine);
    context.imageSmoothingEnabled = false;
    context.font = "11px system-ui, sans-serif"; context.fillStyle = pageInk();
    for (let head = 0; head < count; head++) {
      const begin = (layer * count + head) * length, cells = pane.cells.map((cell) => sum(cell, (position) => values[begin + position]));
      const x = (head % across) * step, y = Math.floor(head / across) * (high + NAME);
      context.fillText(`${head}`, x, y + 10);
      context.drawImage(bitmap(cells, side, high, "amount", largest(cells), (pixel) => map[pixel]), x, y + 13);
      const mine = heads === "one" && chosen === head;
      context.strokeStyle = mine ? "#0a7d33" : "#8886"; context.lineWidth = mine ? 3 : 1;
      context.strokeRect(x + 0.5, y + 13.5, side - 1, high - 1);
    }
    tiles.onclick = (event) => {
      const box = tiles.getBoundingClientRect();
      const head = Math.floor((event.clientY - box.top) / (high + NAME)) * across + Math.floor((event.clientX - box.left) / step);
      if (head < count) page.set({ head });
    };
    tiles.onkeydown = (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across }[event.key];
      if (!by) return;
      event.preventDefault();
      const next = heads === "one" ? chosen + by : 0;
      if (next >= 0 && next < count) page.set({ head: next });
    };
  },

  csv(data, state) {
    const row = this.row(data, state.layer, state.heads, state.head), { tokens, images } = data.prompt;
    if (!images.length) return [["position", "token", "share"], ...tokens.map((token, p) => [p, token, row[p]])];
    return [["image", "row", "column", "position", "share"], ...panesOf(data.prompt).flatMap(({ image, name, cells }) =>
      cells.flatMap((cell) => cell.positions.map((position) => [name || image + 1, cell.row, cell.column, position, row[position]])))];
  },
  json: (data) => ({ ...data, unpacked: undefined }),
  figures(page, data) {
    const layer = data.layers[page.state.layer];
    if (!data.prompt.images.length) {
      const { layer: i, heads, head } = page.state, most = strongest(data.prompt, this.row(data, i, heads, head));
      return [[MOST, barsPicture(most.map(([name, value]) => [name, value, short(value)]), most[0][1], [WARM, COLD])]];
    }
    return [[`All heads of layer ${layer}`, this.tiles], ["The image's share, layers by heads", this.overview]];
  },
  python: (asked, state, data) => [
    ...(state.heads === "max" ? ["import numpy as np", ""] : []),
    `with model.run_with_cache("lm.blocks.*.attn.hook_pattern", positions=[${asked.position}]) as cache:`,
    "    model.forward(inputs, logits_to_keep=None)",
    "",
    `pattern = cache["lm.blocks.${data.layers[state.layer]}.attn.hook_pattern"][0, :, 0]  # [heads, seq]`,
    `row = ${state.heads === "one" ? `pattern[${state.head}]` : state.heads === "mean" ? "pattern.mean(0)" : "np.asarray(pattern).max(0)"}`,
    ...(data.prompt.images.length ? ["grid = cache.image_grid(row)  # [grid_h, grid_w]", 'vs.pictures.overlay(inputs, row, label="share of the attention").save("attention.png")'] : []),
  ],
};
