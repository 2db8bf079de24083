import { h, isolated, short } from "../dom.js";
import { facts, matrix } from "../parts.js";
import { python, second } from "../python.js";

export const patching = {
  id: "patching",
  name: "Patching",
  about: "Two prompts of as many tokens that differ in one thing. Each cell is a run of the second prompt in which one activation has the value it has in the first: 1 brings the first prompt's answer back wholly, 0 not at all. Rows fill in as layers are done.",
  path: "/api/patching",
  counts: "cells",
  controls: [
    { id: "second_image", kind: "image", label: "Second image", value: "", asks: true },
    { id: "second_task", kind: "text", label: "Second task", value: "", placeholder: "the same task", long: true, asks: true },
    { id: "over", label: "Patch at", kind: "choice", value: "positions", options: [["positions", "every position"], ["image", "each patch"], ["text", "each text token"], ["heads", "each head"]], asks: true },
    { id: "hook", label: "Activation", kind: "hook", value: "hook_resid_post", asks: true, when: ({ over }) => over !== "heads" },
    { id: "mode", label: "Direction", kind: "choice", value: "denoising", options: [["denoising", "first into second"], ["noising", "second into first"]], asks: true },
    { id: "target", label: "Target token", kind: "text", value: "", placeholder: "the first prompt's next", asks: true },
  ],
  body: ({ hook, over, mode, target, second_image, second_task }, { filename, task, assistant_prefill }) => ({
    hook, over, mode, target, corrupted: { filename: second_image || filename, task: second_task || task, assistant_prefill },
  }),

  begin(page) {
    this.rows = [];
    page.result.replaceChildren(h("p", { className: "mute", textContent: "The first layer is on its way." }));
  },

  event(page, event) {
    if (event.type !== "row") return;
    this.rows[event.layers ? event.layers.indexOf(event.layer) : event.done - 1] = event.values;
    this.table(page, event, event.total, this.rows);
  },

  table(page, { columns, labels, axis }, total, rows) {
    const values = [], across = axis.slice(0, -1);
    for (let i = 0; i < total; i++) for (let j = 0; j < columns.length; j++) values.push(rows[i] ? rows[i][j] : null);
    const table = matrix({
      values, rows: [...Array(total).keys()], columns, down: "layer", across, scale: "signed", peak: 1, width: 680,
      label: `Share of the way back, layers by ${axis}`, legend: "orange: towards the answer of the patches' prompt, blue: away from it, full at 1",
      tell: (j) => axis === "heads" ? `head ${columns[j]}` : `position ${columns[j]} “${isolated(labels[j])}”`,
      pick: (layer) => this.layer?.(layer),
    });
    page.result.replaceChildren(table.element);
    this.canvas = table.canvas;
    return table;
  },

  show(page, data) {
    page.stage.layout(data.prompt);
    this.layer = null;
    const table = this.table(page, data, data.layers.length, data.values), across = data.axis.slice(0, -1);
    const same = data.clean_value === data.corrupted_value;
    const [value, row, column] = data.values.flatMap((each, i) => each.map((share, j) => [share, i, j])).sort((a, b) => b[0] - a[0])[0];
    page.result.append(facts([
      ["target", data.target.map(isolated).join(" ")], ["first prompt", short(data.clean_value)], ["second prompt", short(data.corrupted_value)],
      ["strongest", same ? "none: both prompts give the same value, so there is no way back" : `layer ${data.layers[row]}, ${across} ${data.columns[column]}: ${short(value)}`],
    ]));
    if (same) return;
    table.set([row, column]);
    const where = new Map(data.columns.map((position, j) => [position, j])), seen = data.prompt.image_positions.filter((position) => where.has(position));
    if (data.axis === "heads" || !seen.length) return;
    const strength = data.values.map((each) => Math.max(...seen.map((position) => Math.abs(each[where.get(position)]))));
    const peak = Math.max(...strength, 1e-9);
    this.layer = (layer) => page.stage.heat((position) => data.values[layer][where.get(position)] || 0,
      { label: `share of the way, layer ${data.layers[layer]} (click a row for another)`, signed: true, peak });
    this.layer(strength.indexOf(Math.max(...strength)));
  },

  csv: (data) => [["layer", data.axis.slice(0, -1), "label", "share"], ...data.values.flatMap((row, i) => row.map((v, j) => [data.layers[i], data.columns[j], data.labels[j], v]))],
  figures(page, data) { return [[`Share of the way back, layers by ${data.axis}`, this.canvas]]; },
  python(asked) {
    const heads = asked.over === "heads", at = ["image", "text"].includes(asked.over) ? `positions=${python(asked.over)}` : "";
    const more = [heads ? 'heads="all"' : at, asked.target ? `metric=${python(asked.target)}` : "", `mode=${python(asked.mode)}`];
    return [
      ...second(asked, "corrupted"),
      `sweep = model.patch_sweep(inputs, corrupted, "lm.blocks.*.${heads ? "attn.hook_z" : asked.hook}", ${more.filter(Boolean).join(", ")})`,
      'sweep.picture().save("patching.png")',
    ];
  },
};
