import { h, visible, isolated, percent, short } from "../dom.js";
import { colour } from "../colours.js";
import { tablePicture } from "../export.js";

const SHOWN = 80; // rows of the table that go into a picture

/** The positions in the table: those of the text, or all. */
function positions(data, state) {
  const image = new Set(data.prompt.image_positions);
  return data.positions.map((reading, position) => ({ ...reading, position, image: image.has(position), token: data.prompt.tokens[position] }))
    .filter((row) => state.patches === "all" || !row.image);
}

const cells = ({ position, image, token, entropy, top }) => [
  String(position), (image ? "▦ " : "") + visible(token), short(entropy), ...top.map(({ text, prob }) => `${isolated(text)}  ${percent(prob)}`)];
const headings = (count) => ["position", "token", "entropy", "most probable next", ...Array.from({ length: count - 1 }, (_, k) => `${k + 2}.`)];
const line = (choice) => (choice?.prob > 0.01 ? `rgb(${colour(choice.prob, "amount")})` : null);

export const forward = {
  id: "forward",
  name: "Forward",
  about: "One pass over the prompt: at every position the tokens that the model thinks most probable to come next, and how unsure it is (entropy, in nats).",
  path: "/api/forward",
  counts: "positions",
  controls: [
    { id: "top_k", label: "Tokens at each position", kind: "number", value: 5, min: 1, max: 50, asks: true },
    { id: "patches", label: "Positions", kind: "choice", value: "text", options: [["text", "text"], ["all", "text and patches"]] },
  ],

  show(page, data) {
    page.stage.layout(data.prompt);
    page.stage.heat((position) => data.positions[position].entropy, { label: "entropy at each patch, nats" });
    const rows = new Map(), body = h("tbody");
    for (const row of positions(data, page.state)) {
      const element = h("tr", {}, ...cells(row).map((textContent, j) => {
        const cell = h("td", { textContent, className: j === 0 || j === 2 ? "n" : "" }), under = j > 2 ? line(row.top[j - 3]) : null;
        if (under) cell.style.boxShadow = `inset 0 -3px ${under}`;
        return cell;
      }));
      rows.set(row.position, element);
      body.append(element);
    }
    const head = h("tr", {}, ...headings(data.positions[0].top.length).map((textContent) => h("th", { scope: "col", textContent })));
    const box = h("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Next tokens by position" }, h("table", {}, h("thead", {}, head), body));
    page.result.replaceChildren(box);
    box.scrollTop = box.scrollHeight;
    page.stage.onPatch = (position) => {
      for (const [p, row] of rows) row.classList.toggle("at", p === position);
      const row = rows.get(position);
      if (row) box.scrollTop = row.offsetTop - box.clientHeight / 2;
    };
  },

  csv: (data) => [
    ["position", "token", "entropy", "rank", "next", "probability"],
    ...data.positions.flatMap((r, p) => r.top.map((c, k) => [p, data.prompt.tokens[p], r.entropy, k, c.text, c.prob])),
  ],
  figures(page, data) {
    const rows = positions(data, page.state).slice(-SHOWN);
    return [["The most probable next tokens", tablePicture([headings(data.positions[0].top.length), ...rows.map(cells)], (i, j) => (i && j > 2 ? line(rows[i - 1].top[j - 3]) : null))]];
  },
  python: (asked) => [
    `lens = model.logit_lens(inputs, layers=[-1], top_k=${asked.top_k})  # the last layer is the model's output`,
    "print(lens.tokens[0][0][-1], lens.probs[0, 0, -1], lens.entropy[0, 0, -1])",
  ],
};
