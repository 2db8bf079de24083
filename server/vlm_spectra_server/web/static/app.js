// The page: images and a task on the left, six analyses of them on the right. Each view says what it asks, how it shows
// the answer and what can be taken from it; running, cancelling, links and exports are here, once.

import { $, h } from "./dom.js";
import { analyse } from "./api.js";
import { isDark, loadScales } from "./colours.js";
import { Controls, bounded } from "./controls.js";
import { saveCsv, saveJson, savePng, sheet } from "./export.js";
import { Models } from "./models.js";
import { Prompt } from "./prompt.js";
import { opening } from "./python.js";
import { signedIn } from "./session.js";
import { Stage } from "./stage.js";
import { predict } from "./views/predict.js";
import { forward } from "./views/forward.js";
import { attention } from "./views/attention.js";
import { attribution } from "./views/attribution.js";
import { lens } from "./views/lens.js";
import { patching } from "./views/patching.js";

const VIEWS = [predict, forward, attention, attribution, lens, patching];
const COMMON = { task: $("task").defaultValue, prefill: "", model: "" }; // what is asked where a link does not say
const SAID = ["step", "progress", "waiting"]; // what a run says of itself, before anything of its result
const PHASES = { forward: "layers", generating: "tokens" }; // what a run counts, where it is the same in every view

class Page {
  constructor() {
    this.stage = new Stage($("stage"));
    this.result = $("result");
    this.state = { images: [], ...COMMON };
    this.view = predict;
    this.data = {}; // the last result of each view
    this.running = null;
    this.models = new Models(this);
    this.prompt = new Prompt(this);
    this.controls = new Controls(this);
  }

  async start() {
    this.tabs();
    this.theme();
    $("run").addEventListener("click", () => this.run());
    $("cancel").addEventListener("click", () => this.cancel());
    $("copy").addEventListener("click", () => this.copy($("python").textContent, $("copy")));
    $("skip").addEventListener("click", (event) => { event.preventDefault(); $("panel").focus(); });
    this.restore();
    this.choose(this.view);
    const [signed] = await Promise.all([signedIn(), loadScales(), this.prompt.gallery()]);
    if (!signed) return;
    await this.models.watch();
    if (!location.hash) this.state.images = this.prompt.examples.slice(0, 1).map(({ filename }) => filename);
    this.shown();
    addEventListener("pagehide", () => this.written());
    addEventListener("hashchange", async () => {
      if (location.hash === this.hash) return;
      const { model } = this.state;
      this.cancel();
      this.restore();
      this.data = {};
      this.choose(this.view);
      if (model !== this.state.model) await this.models.watch();
      this.shown();
    });
    performance.mark("usable");
  }

  /** The fields show the state; a link that has a result is run. */
  shown() {
    this.prompt.fresh();
    this.models.draw();
    if (this.wanted) this.run();
  }

  // What stands in the link ------------------------------------------------------------------------------------

  restore() {
    const link = new URLSearchParams(location.hash.slice(1));
    this.view = VIEWS.find((view) => view.id === link.get("view")) || predict;
    if (link.size) {
      this.state.images = link.getAll("image").filter(Boolean);
      for (const [name, unsaid] of Object.entries(COMMON)) this.state[name] = link.get(name) ?? unsaid;
    }
    for (const control of this.view.controls) {
      const { id, value, optional } = control, given = link.get(id);
      this.state[id] = value;
      if (given === null) continue;
      if (typeof value !== "number" && !optional) this.state[id] = given;
      else if (Number.isFinite(+given) && given !== "") this.state[id] = bounded(control, +given);
    }
    this.wanted = link.get("run") === "1";
  }

  /** The link follows the state, a moment later: browsers allow only so many changes. */
  link() {
    clearTimeout(this.linking);
    this.linking = setTimeout(() => this.written(), 150);
  }

  written() {
    clearTimeout(this.linking);
    const link = new URLSearchParams({ view: this.view.id });
    for (const name of this.state.images) link.append("image", name);
    for (const name of [...Object.keys(COMMON), ...this.view.controls.map(({ id }) => id)])
      if (name === "task" || (this.state[name] !== "" && this.state[name] !== undefined)) link.set(name, this.state[name]);
    if (this.data[this.view.id]) link.set("run", "1");
    this.hash = `#${link}`;
    if (location.hash !== this.hash) history.replaceState(null, "", this.hash);
  }

  // The views --------------------------------------------------------------------------------------------------

  tabs() {
    const count = VIEWS.length;
    VIEWS.forEach((view, i) => {
      const tab = h("button", { type: "button", role: "tab", id: `tab-${view.id}`, textContent: view.name, "aria-controls": "panel" });
      const go = (to) => { this.choose(to); this.link(); $(`tab-${to.id}`).focus(); };
      tab.addEventListener("click", () => go(view));
      tab.addEventListener("keydown", (event) => {
        const next = { ArrowRight: (i + 1) % count, ArrowLeft: (i + count - 1) % count, Home: 0, End: count - 1 }[event.key];
        if (next === undefined) return;
        event.preventDefault();
        go(VIEWS[next]);
      });
      $("views").append(tab);
    });
  }

  choose(view) {
    if (view !== this.view) this.cancel();
    this.view = view;
    for (const control of view.controls) {
      const kept = this.state[control.id] ?? control.value;
      this.state[control.id] = typeof kept === "number" ? bounded(control, kept) : kept;
    }
    for (const tab of $("views").children) {
      const on = tab.id === `tab-${view.id}`;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
      if (on) $("views").scrollLeft = tab.offsetLeft - 40;
    }
    $("panel").setAttribute("aria-labelledby", `tab-${view.id}`);
    $("about").textContent = view.about;
    document.body.dataset.view = view.id;
    this.say("");
    this.wrong("");
    this.empty();
    this.controls.draw();
    const data = this.data[view.id];
    if (data) view.show(this, data);
    this.done();
  }

  /** Nothing is shown, over the images neither. */
  empty() {
    this.result.replaceChildren();
    this.stage.clear();
    this.stage.onPatch = this.stage.onHover = null;
  }

  /** What is shown belongs to another question. */
  stale() {
    this.cancel();
    this.data = {};
    this.empty();
    this.stage.show(this.stage.sources);
    this.done();
    if ("position" in this.state) this.state.position = -1;
    this.link();
  }

  limit(id, max) { this.controls.limit(id, max); }

  /** Controls changed; what the server has to be asked for waits for Run. */
  set(changes, asks = false) {
    const all = this.view.changed?.(changes) || changes;
    Object.assign(this.state, all);
    this.controls.show(all);
    const data = this.data[this.view.id];
    if (data && !asks) {
      if (this.view.redraw) this.view.redraw(this, data); else this.view.show(this, data);
      this.python();
    }
    this.link();
  }

  ask(changes) {
    this.set(changes, true);
    this.run();
  }

  // Running ----------------------------------------------------------------------------------------------------

  question() {
    const { images, task, prefill } = this.state;
    const asked = { filename: images.length > 1 ? images : images[0] || "", task, assistant_prefill: prefill, model: this.models.name };
    if (this.view.body) return { ...asked, ...this.view.body(this.state, asked) };
    for (const { id, asks } of this.view.controls) if (asks) asked[id] = this.state[id];
    return asked;
  }

  async run() {
    this.cancel();
    const { view } = this, asked = this.question(), ending = new AbortController(), began = performance.now();
    const about = () => [this.view, this.state.images, ...Object.keys(COMMON).map((name) => this.state[name])], then = about();
    const seconds = () => `${((performance.now() - began) / 1000).toFixed(1)} s`;
    this.wrong("");
    if (!asked.task.trim()) { this.wrong("Write what the model is to do."); $("task").focus(); return; }
    this.running = ending;
    this.busy(true);
    this.say("waiting for the model");
    delete this.data[view.id];
    this.told = false;
    $("exports").hidden = $("lines").hidden = true;
    view.begin?.(this);
    try {
      const data = await analyse(view.path, asked, (event) => {
        if (this.running !== ending) return;
        this.told ||= !SAID.includes(event.type);
        if (event.type === "step") this.say(event.what);
        if (event.type === "progress") this.progress(event);
        $("clock").textContent = seconds();
        view.event?.(this, event);
      }, ending.signal);
      if (this.running !== ending) return;
      if (about().some((each, i) => each !== then[i])) { this.cancel(); return; }
      data.asked = asked;
      this.data[view.id] = data;
      view.show(this, data);
      this.say(`done in ${seconds()}`);
    } catch (error) {
      if (this.running !== ending) return;
      this.say("");
      if (!this.told) this.empty();
      this.wrong(error.message);
      if (!error.details) console.error(error);
      if ([0, 503].includes(error.details?.status) || error.details?.reason === "UNKNOWN_MODEL") this.models.watch();
    }
    this.running = null;
    this.busy(false);
    this.done();
    this.link();
  }

  progress({ done, total, phase }) {
    if (phase === "queued") { this.say(total > 1 ? `waiting in the queue: ${done} of ${total}` : "next in the queue"); return; }
    $("progress").max = total;
    $("progress").value = done;
    this.say(`${done} of ${total} ${PHASES[phase] || this.view.counts}`);
  }

  cancel() {
    if (!this.running) return;
    this.running.abort();
    this.running = null;
    this.busy(false);
    if (!this.told) this.empty();
    this.say("cancelled");
  }

  busy(on) {
    $("run").textContent = on ? "Run again" : "Run";
    $("cancel").disabled = !on;
    $("progress").hidden = !on;
    $("progress").removeAttribute("value");
    this.result.setAttribute("aria-busy", String(on));
  }

  /** A result that the server does not have any longer. */
  lost(data, { message }) {
    if (this.data[this.view.id] !== data) return;
    delete this.data[this.view.id];
    this.say("");
    this.wrong(message);
    this.empty();
    this.done();
    this.link();
  }

  say(what) {
    $("clock").textContent = "";
    if ($("doing").textContent !== what) $("doing").textContent = what;
  }

  wrong(message) {
    $("wrong").hidden = !message;
    $("wrong").textContent = message;
  }

  // What can be taken home -------------------------------------------------------------------------------------

  done() {
    const { view } = this, data = this.data[view.id], name = `vlm-spectra-${view.id}`;
    $("exports").hidden = $("lines").hidden = !data;
    if (!data) return;
    const button = (label, act) => {
      const made = h("button", { type: "button", textContent: label });
      made.addEventListener("click", () => act(made));
      return made;
    };
    const headline = `${view.name}: ${data.asked.task.replace(/\s+/g, " ").slice(0, 90)}`;
    const files = view.exports?.(this, data) || [
      ["PNG", async () => {
        const saved = await savePng(sheet(headline, this.stage.picture(), view.figures(this, data)), name);
        if (!saved) this.wrong("This browser makes no picture of so much: the CSV has all of it.");
      }],
      ["CSV", () => saveCsv(view.csv(data, this.state), name)],
      ["JSON", () => saveJson(view.json?.(data) || data, name)],
    ];
    $("exports").replaceChildren(h("span", { className: "mute", textContent: "Download" }), ...files.map(([label, act]) => button(label, act)),
      button("Copy the link", (made) => { this.written(); this.copy(location.href, made); }));
    this.python();
  }

  python() {
    const { asked, ...data } = this.data[this.view.id], { status, several } = this.models;
    const lines = [...opening(asked, status || { server: "localhost:50051" }, several || this.state.model ? asked.model : ""), ...this.view.python(asked, this.state, data)];
    $("python").textContent = lines.join("\n") + "\n";
  }

  async copy(text, button) {
    const before = button.textContent;
    try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; } catch { button.textContent = "Not copied: the browser refuses"; }
    setTimeout(() => { button.textContent = before; }, 1500);
  }

  theme() {
    const root = document.documentElement;
    try { const kept = localStorage.getItem("theme"); if (kept) root.dataset.theme = kept; } catch { /* no storage */ }
    const name = () => { $("theme").textContent = isDark() ? "Light" : "Dark"; };
    const redraw = () => {
      name();
      const data = this.data[this.view.id];
      if (data) (this.view.retheme || this.view.show).call(this.view, this, data);
    };
    $("theme").addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      try { localStorage.setItem("theme", root.dataset.theme); } catch { /* no storage */ }
      redraw();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    name();
  }
}

new Page().start();
