import { h } from "../dom.js";
import { saveFrom, saveText } from "../export.js";
import { python } from "../python.js";

export const lens = {
  id: "lens",
  name: "Logit lens",
  about: "What each layer would answer at every position, layers by tokens. Point at a cell for its most probable tokens, at a patch for its column.",
  path: "/api/logit-lens",
  controls: [
    { id: "hook", label: "Read", kind: "hook", value: "hook_resid_post", asks: true },
    { id: "top_k", label: "Tokens in each cell", kind: "number", value: 5, min: 1, max: 20, asks: true },
  ],
  body: () => ({ page: true }),

  show(page, data) {
    page.stage.layout(data.prompt);
    page.stage.clear();
    page.result.replaceChildren(h("iframe", { src: data.page, title: "The logit lens: layers by tokens" }));
  },

  exports: (page, data) => [
    ["HTML", () => saveFrom(data.page, "lens.html")],
    ["JSON", async () => {
      const answer = await fetch("/api/logit-lens", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ ...page.asked, page: false }) });
      saveText(await answer.text(), "lens.json", "application/json");
    }],
  ],
  python: (asked) => [
    `lens = model.logit_lens(inputs, hook=${python(asked.hook)}, top_k=${asked.top_k})`,
    'lens.to_html("lens.html")',
  ],
};
