import { h, visible, short } from "../dom.js";
import { facts, matrix } from "../parts.js";
import { python } from "../python.js";

export const patching = {
  id: "patching",
  name: "Patching",
  about: "Two prompts of as many tokens that differ in one thing. Each cell is a run of the second prompt in which one activation has the value it has in the first: 1 brings the first prompt's answer back wholly, 0 not at all. Rows fill in as layers are done.",
  path: "/api/patching",
  controls: [
    { id: "hook", label: "Patch", kind: "hook", value: "hook_resid_post", asks: true },
    { id: "over", label: "At", kind: "choice", value: "positions", options: [["positions", "every position"], ["image", "each patch"], ["text", "each text token"], ["heads", "each head"]], asks: true },
    { id: "mode", label: "Direction", kind: "choice", value: "denoising", options: [["denoising", "first into second"], ["noising", "second into first"]], asks: true },
    { id: "target", label: "Target token", kind: "text", value: "", placeholder: "the first prompt's next", asks: true },
    { id: "second_image", kind: "image", label: "Second image", value: "", asks: true },
    { id: "second_task", kind: "text", label: "Second task", value: "", placeholder: "the same task", asks: true },
  ],
  body: (state) => ({
    second_image: undefined, second_task: undefined,
    corrupted: { filename: state.second_image || state.image, task: state.second_task || state.task, assistant_prefill: state.prefill },
  }),

  begin(page) { this.rows = []; page.result.replaceChildren(h("p", { className: "mute", textContent: "The first layer is on its way." })); },

  event(page, event) {
    if (event.type !== "row") return;
    this.rows.push(event.values);
    this.table(page, event, event.total, this.rows, event.columns, event.labels, event.axis);
  },

  table(page, about, total, rows, columns, labels, axis) {
    const values = [], count = columns.length;
    for (let i = 0; i < total; i++) for (let j = 0; j < count; j++) values.push(rows[i] ? rows[i][j] : null);
    const table = matrix({
      values, rows: [...Array(total).keys()], columns, down: "layer", across: axis === "heads" ? "head" : "position", scale: "signed", peak: 1, width: 680,
      label: "Share of the way back, layers by positions", legend: "orange: towards the answer of the patches' prompt, blue: away from it, full at 1",
      tell: (j) => axis === "heads" ? `head ${columns[j]}` : `position ${columns[j]} “${visible(labels[j])}”`,
      pick: (layer) => this.layer?.(layer),
    });
    page.result.replaceChildren(table.element);
    this.canvas = table.canvas;
    return table;
  },

  show(page, data) {
    page.stage.layout(data.prompt);
    const table = this.table(page, data, data.layers.length, data.values, data.columns, data.labels, data.axis);
    const strongest = data.values.flatMap((row, i) => row.map((value, j) => [value, i, j])).sort((a, b) => b[0] - a[0])[0];
    page.result.append(facts([
      ["target", data.target.map(visible).join(" ")], ["first prompt", short(data.clean_value)], ["second prompt", short(data.corrupted_value)],
      ["strongest", `layer ${data.layers[strongest[1]]}, ${data.axis === "heads" ? "head" : "position"} ${data.columns[strongest[2]]}: ${short(strongest[0])}`],
    ]));
    const where = new Map(data.columns.map((position, j) => [position, j]));
    const patches = data.prompt.images[0]?.patches || [];
    const seen = patches.map((patch) => where.get(patch.position)).filter((j) => j !== undefined);
    const most = data.values.map((row, i) => [Math.max(0, ...seen.map((j) => Math.abs(row[j]))), i]).sort((a, b) => b[0] - a[0])[0];
    const peak = Math.max(most[0], 1e-9);
    this.layer = (layer) => {
      if (data.axis === "heads" || !patches.some((patch) => where.has(patch.position))) { page.stage.clear(); return; }
      page.stage.heat((position) => (where.has(position) ? data.values[layer][where.get(position)] : 0),
        { label: `share of the way, layer ${data.layers[layer]} (click a row for another)`, signed: true, peak });
    };
    this.layer(most[1]);
    table.set([strongest[1], strongest[2]]);
  },

  csv: (data) => [["layer", data.axis.slice(0, -1), "label", "share"], ...data.values.flatMap((row, i) => row.map((v, j) => [data.layers[i], data.columns[j], data.labels[j], v]))],
  png() { return this.canvas; },
  python: (asked) => {
    const second = asked.corrupted, heads = asked.over === "heads", other = second.filename && second.filename !== asked.filename;
    const prefill = second.assistant_prefill ? `, assistant_prefill=${python(second.assistant_prefill)}` : "";
    const more = [heads ? 'heads="all"' : ["image", "text"].includes(asked.over) ? `positions=${python(asked.over)}` : "", asked.target ? `metric=${python(asked.target)}` : "", `mode=${python(asked.mode)}`];
    return [
      ...(other ? ['second = Image.open("second.png")  # the second image of the page'] : []),
      `corrupted = model.prepare_messages(${python(second.task)}, ${other ? "second" : second.filename ? "image" : "None"}${prefill})`,
      `sweep = model.patch_sweep(inputs, corrupted, "lm.blocks.*.${heads ? "attn.hook_z" : asked.hook}", ${more.filter(Boolean).join(", ")})`,
      'sweep.picture().save("patching.png")',
    ];
  },
};
