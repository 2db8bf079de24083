import { h, isolated, short, visible } from "../dom.js";
import { unpacked } from "../api.js";
import { COLD, WARM } from "../colours.js";
import { barsPicture } from "../export.js";
import { panesOf } from "../panes.js";
import { bars, facts, largest, matrix } from "../parts.js";
import { python, second } from "../python.js";

const METHODS = [
  ["direct_logit", "direct logit attribution"], ["gradient_x_input", "gradient × input"], ["integrated_gradients", "integrated gradients"],
  ["occlusion", "occlusion"], ["attribution_patching", "attribution patching"], ["attention_rollout", "attention rollout"],
  ["relevancy", "relevancy"], ["grad_cam", "Grad-CAM"],
];
const COVERS = [["mean", "the image's mean"], ["black", "black"], ["blurred", "the image blurred"]];
const of = (...methods) => ({ method }) => methods.includes(method);
const explains = (...kinds) => ({ explain }) => kinds.includes(explain);
const WIDTH = 360;

export const attribution = {
  id: "attribution",
  name: "Attribution",
  about: "Which patches, layers and heads made the model say something: orange for it, blue against it. What is explained is the model's own next token, a token you name, the difference between two, or a whole answer.",
  path: "/api/attribution",
  counts: "steps",
  controls: [
    { id: "method", label: "Method", kind: "choice", value: "direct_logit", options: METHODS, asks: true },
    { id: "explain", label: "Explain", kind: "choice", value: "next", options: [["next", "the next token"], ["token", "a token"], ["pair", "one token rather than another"], ["answer", "a whole answer"]], asks: true },
    { id: "target", label: "Target token", kind: "text", value: "", placeholder: "a token", asks: true, when: explains("token", "pair") },
    { id: "against", label: "Rather than", kind: "text", value: "", placeholder: "another token", asks: true, when: explains("pair") },
    { id: "answer", label: "Answer", kind: "text", value: "", placeholder: "Thought: …", long: true, asks: true, when: explains("answer") },
    { id: "steps", label: "Steps", kind: "number", value: "", min: 1, max: 4096, optional: true, placeholder: "enough", asks: true, when: of("integrated_gradients") },
    { id: "baseline", label: "Instead of the image", kind: "choice", value: "mean", options: COVERS, asks: true, when: of("integrated_gradients", "occlusion") },
    { id: "window", label: "Window, in patches", kind: "number", value: "", min: 1, max: 256, optional: true, placeholder: "1", asks: true, when: of("occlusion") },
    { id: "stride", label: "Stride, in patches", kind: "number", value: "", min: 1, max: 256, optional: true, placeholder: "the window", asks: true, when: of("occlusion") },
    { id: "second_image", label: "Second image", kind: "image", value: "", asks: true, when: of("attribution_patching") },
    { id: "second_task", label: "Second task", kind: "text", value: "", placeholder: "the same task", long: true, asks: true, when: of("attribution_patching") },
  ],

  /** What is asked: of the options those that belong to the method. */
  body(state, { filename, task, assistant_prefill }) {
    const asked = { method: state.method };
    for (const { id, when } of this.controls.slice(2, 9))
      if (when(state) && state[id] !== "") asked[id] = state[id];
    if (state.method === "attribution_patching") asked.corrupted = { filename: state.second_image || filename, task: state.second_task || task, assistant_prefill };
    return asked;
  },

  show(page, data) {
    page.stage.layout(data.prompt);
    const image = data.prompt.image_positions.map((position) => data.scores[position] || 0), what = `${data.method.replaceAll("_", " ")} of “${isolated(data.target)}”`;
    const heat = () => page.stage.heat((position) => data.scores[position], { label: what, signed: image.some((score) => score < 0) });
    heat();
    const whole = data.residual === null
      ? "This method promises no sum."
      : `All parts come to ${short(data.total)} of ${short(data.target_value)}: ${short(data.residual)} is missing.`;
    const some = (name, value) => (value === null || value === undefined ? [] : [[name, short(value)]]);
    const shown = [
      h("p", { id: "completeness", className: "lead", textContent: whole }),
      facts([["explained", visible(data.target)], ["its value", short(data.target_value)], ...some("at the baseline", data.baseline_value),
        ["from the image's patches", short(image.reduce((sum, score) => sum + score, 0))], ...some("from the position's own embedding", data.embed),
        ...some("from biases", data.bias), ...(data.steps ? [["steps", String(data.steps)]] : [])]),
    ];
    this.pictures = [];
    const chart = (title, entries, label) => {
      const peak = largest(entries.map(([, value]) => value));
      this.pictures.push([title, () => barsPicture(entries.map(([name, value]) => [name, value, short(value)]), peak, [WARM, COLD])]);
      return h("div", {}, h("h3", { textContent: title }), bars(entries, peak, label));
    };
    const map = (title, about) => {
      const made = matrix({ down: "layer", scale: "signed", width: WIDTH, ...about });
      this.pictures.push([title, () => made.canvas]);
      return h("div", {}, h("h3", { textContent: title }), made.element);
    };
    if (data.heads) {
      const layers = data.heads.map((row, layer) => [[`layer ${layer}, attention`, row.reduce((sum, value) => sum + value, 0)], [`layer ${layer}, MLP`, data.mlps[layer]]]);
      const values = data.heads.flat(), peak = largest(values), legend = `orange for, blue against, full at ${short(peak)}`;
      shown.push(h("div", { className: "figures" }, chart("By layer", layers.reverse().flat(), "What each layer contributes"),
        map("By head", { values, peak, legend, rows: [...data.heads.keys()], columns: [...data.heads[0].keys()], across: "head", label: "What each head contributes, layers by heads" })));
    }
    if (data.layer_scores) {
      const { shape: [layers, length], values } = unpacked(data.layer_scores), peak = largest(values);
      const row = (layer) => (position) => values[layer * length + position];
      shown.push(map("The residual stream after each layer", {
        values, peak, width: 680, rows: [...Array(layers).keys()], columns: [...Array(length).keys()], across: "position", label: "What the residual stream contributes, layers by positions",
        legend: `full at ${short(peak)}; click a row to see it over the image`, tell: (j) => `position ${j} “${isolated(data.prompt.tokens[j])}”`,
        pick: (layer) => page.stage.heat(row(layer), { label: `residual stream after layer ${layer}`, signed: true }),
      }));
    }
    const text = data.prompt.tokens.map((token, p) => [`${isolated(token)} (${p})`, data.scores[p], p]).filter(([, , p]) => !data.prompt.image_positions.includes(p));
    const strongest = text.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, 8);
    if (strongest.some(([, value]) => value)) shown.push(chart("The prompt's strongest words", strongest.map(([name, value]) => [name, value]), "The prompt's strongest words"));
    page.result.replaceChildren(...shown);
  },

  csv(data) {
    const where = new Map(panesOf(data.prompt).flatMap(({ image, name, cells }) => cells.flatMap((cell) => cell.positions.map((position) => [position, [name || image + 1, cell.row, cell.column]]))));
    return [["position", "token", "image", "row", "column", "score"], ...data.scores.map((score, p) => [p, data.prompt.tokens[p], ...(where.get(p) || [null, null, null]), score])];
  },
  figures() { return this.pictures.map(([title, make]) => [title, make()]); },
  python(asked, state, data) {
    const target = asked.answer ? `vs.Target(answer=${python(asked.answer)})` : asked.against ? `(${python(asked.target)}, ${python(asked.against)})` : asked.target ? python(asked.target) : "None";
    const options = ["steps", "baseline", "window", "stride"].filter((name) => asked[name] !== undefined).map((name) => `, ${name}=${python(asked[name])}`);
    return [
      ...(asked.corrupted ? second(asked, "against") : []),
      `why = model.attribute(inputs, method=${python(asked.method)}, target=${target}${options.join("")}${asked.corrupted ? ", against=against" : ""})`,
      "print(why.target_tokens, why.target_value, why.total, why.residual)",
      ...(data.prompt.images.length ? ['why.picture().save("attribution.png")'] : []),
    ];
  },
};
