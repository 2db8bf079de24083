import { h, short, visible } from "../dom.js";
import { bars, facts, matrix } from "../parts.js";
import { python } from "../python.js";

const METHODS = [
  ["direct_logit", "direct logit attribution"], ["gradient_x_input", "gradient × input"], ["integrated_gradients", "integrated gradients"],
  ["occlusion", "occlusion"], ["attention_rollout", "attention rollout"], ["relevancy", "relevancy"], ["grad_cam", "Grad-CAM"],
];

export const attribution = {
  id: "attribution",
  name: "Attribution",
  about: "Which patches, layers and heads made the model say a token: orange for it, blue against it. Without a target it is the model's own next token; with a second token, the difference between the two.",
  path: "/api/attribution",
  controls: [
    { id: "method", label: "Method", kind: "choice", value: "direct_logit", options: METHODS, asks: true },
    { id: "target", label: "Target token", kind: "text", value: "", placeholder: "the next token", asks: true },
    { id: "against", label: "Rather than", kind: "text", value: "", placeholder: "no second token", asks: true },
  ],

  show(page, data) {
    page.stage.layout(data.prompt);
    const scores = (data.prompt.images[0]?.patches || []).map((patch) => data.scores[patch.position] || 0), signed = scores.some((score) => score < 0);
    page.stage.heat((position) => data.scores[position], { label: `${data.method.replaceAll("_", " ")} of “${visible(data.target)}”`, signed });
    const whole = data.residual === null
      ? "this method promises no sum"
      : `all parts ${short(data.total)} of ${short(data.target_value)}: ${short(data.residual)} missing`;
    const image = scores.reduce((sum, score) => sum + score, 0);
    const shown = [
      h("p", { id: "completeness", textContent: whole }),
      facts([["target", visible(data.target)], ["its value", short(data.target_value)], ["from the image's patches", short(image)],
        ...(data.steps ? [["steps", String(data.steps)]] : []),
        ...(data.embed === null ? [] : [["from the position's own embedding", short(data.embed)]]), ...(data.bias === null ? [] : [["from biases", short(data.bias)]])]),
    ];
    if (data.heads) {
      const sums = data.heads.map((row) => row.reduce((sum, value) => sum + value, 0));
      const entries = data.heads.flatMap((_, layer) => [[`layer ${layer}, attention`, sums[layer]], [`layer ${layer}, MLP`, data.mlps[layer]]]).reverse();
      const values = data.heads.flat(), peak = Math.max(...values.map(Math.abs), 1e-9);
      const heads = matrix({
        values, rows: data.heads.map((_, i) => i), columns: data.heads[0].map((_, i) => i), down: "layer", across: "head", scale: "signed", peak,
        label: "What each head contributes, layers by heads", legend: `orange for, blue against, full at ${short(peak)}`, width: 330,
      });
      shown.push(h("div", { className: "figures" },
        h("div", {}, h("h3", { textContent: "By layer" }), bars(entries, Math.max(...entries.map(([, value]) => Math.abs(value)), 1e-9))),
        h("div", {}, h("h3", { textContent: "By head" }), heads.element)));
    }
    const texts = data.prompt.tokens.map((token, p) => [token, data.scores[p], p]).filter(([, , p]) => !data.prompt.image_positions.includes(p));
    const strongest = texts.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, 8);
    shown.push(h("h3", { textContent: "The prompt's strongest words" }), bars(strongest.map(([token, value, p]) => [`${visible(token)} (${p})`, value]), Math.max(...strongest.map(([, v]) => Math.abs(v)), 1e-9)));
    page.result.replaceChildren(...shown);
  },

  csv: (data) => [["position", "token", "score"], ...data.scores.map((score, p) => [p, data.prompt.tokens[p], score])],
  png: (page) => page.stage.picture(),
  python: (asked) => {
    const target = asked.against ? `(${python(asked.target)}, ${python(asked.against)})` : asked.target ? python(asked.target) : "None";
    return [
      `why = model.attribute(inputs, method=${python(asked.method)}, target=${target})`,
      "print(why.target_tokens, why.target_value, why.total, why.residual)",
      ...(asked.filename ? ['why.picture().save("attribution.png")'] : []),
    ];
  },
};
