import { h } from "../dom.js";
import { take } from "../api.js";
import { isDark } from "../colours.js";
import { save } from "../export.js";
import { python } from "../python.js";

export const lens = {
  id: "lens",
  name: "Logit lens",
  about: "What each layer would answer at every position, layers by tokens. Point at a cell for its most probable tokens: its patch is marked in the image; point at a patch for its column.",
  path: "/api/logit-lens",
  counts: "positions",
  controls: [
    { id: "hook", label: "Read", kind: "hook", value: "hook_resid_post", asks: true },
    { id: "top_k", label: "Tokens in each cell", kind: "number", value: 5, min: 1, max: 20, asks: true },
  ],
  body: ({ hook, top_k }) => ({ hook, top_k, page: true }),

  show(page, data) {
    page.stage.layout(data.prompt);
    page.stage.clear();
    const theme = () => (isDark() ? "dark" : "light");
    const frame = h("iframe", { title: "The logit lens: layers by tokens" });
    const send = (message) => frame.contentWindow?.postMessage({ lens: message }, "*"); // the frame has no origin of its own
    this.listening?.abort();
    this.listening = new AbortController();
    const { signal } = this.listening;
    addEventListener("message", ({ source, data: told }) => {
      if (source === frame.contentWindow && told?.lens) page.stage.pointAt(told.lens.position);
    }, { signal });
    page.stage.onHover = (position) => send({ position });
    page.stage.onPatch = (position) => send({ position, pin: true });
    this.retheme = () => send({ theme: theme() });
    frame.style.height = `${Math.min(Math.max(120 + 22 * data.layers.length, 380), 760)}px`; // nothing below it moves later
    page.result.replaceChildren(frame);
    take(data.page, signal).then(({ body }) => {
      frame.src = `${data.page}#part,${theme()}`;
      return body.cancel(); // the frame reads it
    }).catch((error) => { if (!signal.aborted) page.lost(data, error); });
  },

  exports: (page, data) => ["html", "png", "csv", "json"].map((kind) => [kind.toUpperCase(), async () => {
    try { save(await (await take(`${data.page}/lens.${kind}`)).blob(), `vlm-spectra-lens.${kind}`); } catch (error) { page.lost(data, error); }
  }]),
  python: (asked) => [
    `lens = model.logit_lens(inputs, hook=${python(asked.hook)}, top_k=${asked.top_k})`,
    'lens.to_html("lens.html")',
  ],
};
