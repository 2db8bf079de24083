import { h, visible, percent, short } from "../dom.js";
import { colour } from "../colours.js";

export const forward = {
  id: "forward",
  name: "Forward",
  about: "One pass over the prompt: at every position the tokens that the model thinks most probable to come next, and how unsure it is (entropy, in nats).",
  path: "/api/forward",
  controls: [
    { id: "top_k", label: "Tokens at each position", kind: "number", value: 5, min: 1, max: 50, asks: true },
    { id: "patches", label: "Positions", kind: "choice", value: "text", options: [["text", "text"], ["all", "text and patches"]] },
  ],

  show(page, data) {
    page.stage.layout(data.prompt);
    const image = new Set(data.prompt.image_positions);
    page.stage.heat((position) => data.positions[position].entropy, { label: "entropy at each patch, nats" });
    const count = data.positions[0].top.length, rows = new Map();
    const head = h("tr", {}, ...["position", "token", "entropy"].map((name) => h("th", { scope: "col", textContent: name })));
    for (let k = 0; k < count; k++) head.append(h("th", { scope: "col", textContent: k ? `${k + 1}.` : "most probable next" }));
    const body = h("tbody");
    data.positions.forEach((reading, position) => {
      if (image.has(position) && page.state.patches !== "all") return;
      const row = h("tr", {},
        h("td", { className: "n", textContent: position }),
        h("td", { textContent: image.has(position) ? "▦ " + visible(data.prompt.tokens[position]) : visible(data.prompt.tokens[position]) }),
        h("td", { className: "n", textContent: short(reading.entropy) }));
      for (const choice of reading.top) {
        const cell = h("td", { textContent: `${visible(choice.text)}  ${percent(choice.prob)}` });
        if (choice.prob > 0.01) cell.style.boxShadow = `inset 0 -3px rgb(${colour(choice.prob, "amount")})`;
        row.append(cell);
      }
      rows.set(position, row);
      body.append(row);
    });
    const table = h("table", {}, h("thead", {}, head), body);
    const box = h("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Next tokens by position" }, table);
    page.result.replaceChildren(box);
    box.scrollTop = box.scrollHeight;
    page.stage.onPatch = (position) => {
      for (const [p, row] of rows) row.classList.toggle("at", p === position);
      rows.get(position)?.scrollIntoView({ block: "nearest" });
    };
  },

  csv: (data) => [
    ["position", "token", "entropy", "rank", "next", "probability"],
    ...data.positions.flatMap((r, p) => r.top.map((c, k) => [p, data.prompt.tokens[p], r.entropy, k, c.text, c.prob])),
  ],
  png: (page) => page.stage.picture(),
  python: (asked) => [
    `lens = model.logit_lens(inputs, layers=[-1], top_k=${asked.top_k})  # the last layer is the model's output`,
    "print(lens.tokens[0][0][-1], lens.probs[0, 0, -1], lens.entropy[0, 0, -1])",
  ],
};
