import { h, visible, isolated, percent, pixels } from "../dom.js";
import { colour } from "../colours.js";
import { tablePicture } from "../export.js";

/** The colour of a line under a token that was in doubt, or nothing. */
const doubt = ({ prob }) => (prob < 0.98 ? `rgb(${colour(0.25 + 0.75 * (1 - prob), "doubt")})` : null);

export const predict = {
  id: "predict",
  name: "Predict",
  about: "The model's answer, as it is written. Point at a token for its probability; a click that the answer names is marked on the image, in the image's own pixels.",
  path: "/api/predict",
  counts: "tokens",
  controls: [{ id: "max_new_tokens", label: "Tokens at most", kind: "number", value: 128, min: 1, max: 4096, asks: true }],

  begin(page) {
    this.answer = h("div", { className: "answer", role: "group", "aria-label": "The answer's tokens" });
    this.tip = h("div", { className: "tip", role: "status" });
    page.result.replaceChildren(this.answer, this.tip);
  },

  event(page, event) {
    if (event.type === "token") this.add(event);
  },

  add(token) {
    const element = h("span", { className: "token", role: "button", textContent: token.text, tabIndex: 0 }), line = doubt(token);
    if (!token.text) element.append(h("span", { className: "mute", textContent: "∎" }));
    if (line) element.style.boxShadow = `inset 0 -4px ${line}`;
    const tell = () => { this.tip.textContent = `“${isolated(token.text)}” (token ${token.id}): ${percent(token.prob)}`; };
    for (const kind of ["mouseenter", "focus", "click"]) element.addEventListener(kind, tell);
    this.answer.append(element);
  },

  show(page, data) {
    this.begin(page);
    data.tokens.forEach((token) => this.add(token));
    page.stage.layout(data.prompt);
    page.stage.clear();
    page.stage.mark(data.click);
    const where = data.click ? `A click at ${pixels(data.click)}, in pixels of the image.` : "No click in this answer.";
    page.result.append(h("p", { id: "click", textContent: where }));
  },

  csv: (data) => [["index", "token", "id", "probability"], ...data.tokens.map((t, i) => [i, t.text, t.id, t.prob])],
  figures: (page, data) => [["The answer, and the probability of each token",
    tablePicture(data.tokens.map((token) => [visible(token.text), percent(token.prob)]), (i, j) => (j ? null : doubt(data.tokens[i])))]],
  python: (asked) => [
    `answer = model.generate(inputs, max_new_tokens=${asked.max_new_tokens})`,
    "print(answer.text[0])",
    "print(answer.clicks[0])  # in pixels of the image",
  ],
};
