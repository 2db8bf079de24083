// The page: an image and a task on the left, six analyses of them on the right. Each view says what it asks, how it
// shows the answer and what can be taken from it; running, cancelling, links and exports are here, once.

import { $, h } from "./dom.js";
import { analyse, get, post, upload } from "./api.js";
import { isDark, loadScales } from "./colours.js";
import { csv, saveJson, savePng, saveText } from "./export.js";
import { opening } from "./python.js";
import { Stage } from "./stage.js";
import { predict } from "./views/predict.js";
import { forward } from "./views/forward.js";
import { attention } from "./views/attention.js";
import { attribution } from "./views/attribution.js";
import { lens } from "./views/lens.js";
import { patching } from "./views/patching.js";

const VIEWS = [predict, forward, attention, attribution, lens, patching];
const COMMON = ["image", "task", "prefill", "model"];

class Page {
  constructor() {
    this.stage = new Stage($("stage"));
    this.result = $("result");
    this.state = { image: "", task: $("task").value, prefill: "", model: "" };
    this.view = predict;
    this.data = {}; // the last result of each view
    this.status = null;
    this.images = new Map(); // by name, what the second image can be chosen from
    this.running = null;
  }

  async start() {
    this.tabs();
    this.inputs();
    this.theme();
    this.restore();
    this.choose(this.view);
    await Promise.all([loadScales(), this.gallery(), this.watch()]);
    this.fresh();
    addEventListener("pagehide", () => this.written());
    addEventListener("hashchange", () => { if (location.hash !== this.hash) { this.restore(); this.choose(this.view); this.fresh(); } });
    if (this.wanted) this.run();
  }

  // What stands in the link ------------------------------------------------------------------------------------

  restore() {
    const link = new URLSearchParams(location.hash.slice(1));
    this.view = VIEWS.find((view) => view.id === link.get("view")) || predict;
    for (const name of COMMON) if (link.has(name)) this.state[name] = link.get(name);
    for (const control of this.view.controls) {
      this.state[control.id] = control.value;
      if (!link.has(control.id)) continue;
      const given = link.get(control.id);
      if (typeof control.value !== "number") this.state[control.id] = given;
      else if (Number.isFinite(+given)) this.state[control.id] = +given;
    }
    this.wanted = link.get("run") === "1";
  }

  /** The fields show the state. */
  fresh() {
    $("task").value = this.state.task;
    $("prefill").value = this.state.prefill;
    $("more").open ||= Boolean(this.state.prefill);
    if (!this.state.image && this.examples?.length && !this.wanted) Object.assign(this.state, { image: this.examples[0].filename });
    this.picture();
    this.models();
  }

  /** The link follows the state, a moment later: browsers allow only so many changes. */
  link() {
    clearTimeout(this.linking);
    this.linking = setTimeout(() => this.written(), 150);
  }

  written() {
    clearTimeout(this.linking);
    const link = new URLSearchParams({ view: this.view.id });
    for (const name of [...COMMON, ...this.view.controls.map((control) => control.id)])
      if (this.state[name] !== "" && this.state[name] !== undefined) link.set(name, this.state[name]);
    if (this.data[this.view.id]) link.set("run", "1");
    this.hash = `#${link}`;
    if (location.hash !== this.hash) history.replaceState(null, "", this.hash);
  }

  // The model --------------------------------------------------------------------------------------------------

  async watch() {
    let wait = 4000;
    try {
      const status = await get(`/api/model/status?model=${encodeURIComponent(this.state.model)}`);
      const before = this.status?.state;
      this.status = status;
      const percent = status.state === "loading" && status.progress ? ` ${Math.round(100 * status.progress)} %` : "";
      $("state").textContent = { unavailable: "no server", unknown: "not there" }[status.state] || status.state + percent;
      $("state").className = `pill ${status.state === "ready" ? "ready" : ["failed", "unavailable", "unknown"].includes(status.state) ? "bad" : ""}`;
      this.lost(status.state === "ready" || status.state === "loading" || status.state === "restarting" ? "" : status.error);
      if (status.state !== "ready") wait = 1000;
      if (before !== status.state) { this.options = null; this.panel(true); }
      if (!this.options && status.state !== "unavailable") this.options = (await get("/api/model/options")).models;
      if (before !== status.state) this.models();
    } catch (error) {
      this.status = null;
      $("state").textContent = "no page server";
      $("state").className = "pill bad";
      this.lost(error.message);
      wait = 1000;
    }
    clearTimeout(this.next);
    this.next = setTimeout(() => this.watch(), wait);
  }

  lost(message) {
    $("lost").hidden = !message;
    if ($("lost").textContent !== message) $("lost").textContent = message;
  }

  models() {
    const select = $("model"), names = (this.options || []).map((option) => option.name);
    const shown = this.state.model || this.status?.name || "";
    if (shown && !names.includes(shown)) names.unshift(shown);
    const held = new Map((this.options || []).map((option) => [option.name, option.state]));
    const option = (name) => h("option", { value: name, textContent: held.get(name) && held.get(name) !== "ready" ? `${name} (${held.get(name)})` : name });
    select.replaceChildren(
      h("optgroup", { label: "on the server" }, ...names.filter((name) => held.get(name) || name === shown).map(option)),
      h("optgroup", { label: "to be loaded" }, ...names.filter((name) => !held.get(name) && name !== shown).map(option), h("option", { value: "\n", textContent: "another …" })));
    select.value = shown;
  }

  async selectModel(name) {
    this.state.model = name;
    this.data = {};
    this.wrong("");
    try { await post("/api/model/select", { name }); } catch (error) { this.wrong(error.message); }
    this.options = null;
    await this.watch();
    this.models();
    this.choose(this.view);
    this.link();
  }

  // The image and the task -------------------------------------------------------------------------------------

  inputs() {
    $("file").addEventListener("change", () => { this.take($("file").files[0]); $("file").value = ""; });
    const box = this.stage.box;
    for (const kind of ["dragover", "dragleave", "drop"])
      document.addEventListener(kind, (event) => {
        event.preventDefault();
        box.classList.toggle("drop", kind === "dragover");
        if (kind === "drop" && event.dataTransfer.files.length) this.take(event.dataTransfer.files[0]);
      });
    document.addEventListener("paste", (event) => {
      const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
      if (file) { event.preventDefault(); this.take(file); }
    });
    for (const [id, name] of [["task", "task"], ["prefill", "prefill"]])
      $(id).addEventListener("input", () => { this.state[name] = $(id).value; this.stale(); });
    $("task").addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); this.run(); } });
    $("run").addEventListener("click", () => this.run());
    $("cancel").addEventListener("click", () => this.cancel());
    $("copy").addEventListener("click", () => this.copy($("python").textContent, $("copy")));
    $("model").addEventListener("change", () => {
      const other = $("model").value === "\n";
      $("other").hidden = !other;
      if (other) $("other").focus(); else this.selectModel($("model").value);
    });
    $("other").addEventListener("change", () => { const name = $("other").value.trim(); $("other").hidden = true; if (name) this.selectModel(name); });
  }

  async take(file) {
    if (!file) return;
    this.wrong("");
    $("doing").textContent = "uploading the image";
    try {
      const { filename } = await upload(file);
      this.images.set(filename, `uploaded ${this.images.size + 1}`);
      this.state.image = filename;
      this.picture();
      this.stale();
      this.panel(true);
    } catch (error) {
      this.wrong(error.message);
    }
    $("doing").textContent = "";
  }

  async gallery() {
    this.examples = await get("/api/gallery");
    for (const { filename, title, task } of this.examples) {
      this.images.set(filename, title);
      const button = h("button", { type: "button", title, "aria-pressed": "false" }, h("img", { src: `/api/images/${filename}`, alt: title, loading: "lazy", height: 52 }));
      button.dataset.name = filename;
      button.addEventListener("click", () => {
        this.state.image = filename;
        this.state.task = $("task").value = task;
        this.picture();
        this.stale();
      });
      $("gallery").append(h("li", {}, button));
    }
    this.panel(true);
  }

  picture() {
    if (!this.state.image) return;
    this.stage.show(`/api/images/${encodeURIComponent(this.state.image)}`, this.images.get(this.state.image) || "the image");
    this.stage.image.onerror = () => this.wrong("That image is not here, or no longer: choose it again.");
    for (const button of $("gallery").querySelectorAll("button")) button.setAttribute("aria-pressed", String(button.dataset.name === this.state.image));
  }

  /** What is shown belongs to another question. */
  stale() {
    this.cancel();
    this.data = {};
    this.stage.clear();
    this.stage.patches = [];
    this.stage.onPatch = null;
    this.result.replaceChildren();
    this.done();
    if ("position" in this.state) this.state.position = -1;
    this.link();
  }

  // The views --------------------------------------------------------------------------------------------------

  tabs() {
    VIEWS.forEach((view, i) => {
      const tab = h("button", { type: "button", role: "tab", id: `tab-${view.id}`, textContent: view.name, "aria-controls": "panel" });
      tab.addEventListener("click", () => { this.choose(view); this.link(); });
      tab.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!step) return;
        const next = VIEWS[(i + step + VIEWS.length) % VIEWS.length];
        this.choose(next);
        this.link();
        $(`tab-${next.id}`).focus();
      });
      $("views").append(tab);
    });
  }

  choose(view) {
    if (view !== this.view) this.cancel();
    this.view = view;
    for (const control of view.controls) this.state[control.id] ??= control.value;
    for (const tab of $("views").children) {
      const on = tab.id === `tab-${view.id}`;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
    }
    $("panel").setAttribute("aria-labelledby", `tab-${view.id}`);
    $("about").textContent = view.about;
    $("doing").textContent = "";
    this.wrong("");
    this.result.replaceChildren();
    this.stage.clear();
    this.stage.onPatch = null;
    this.panel();
    const data = this.data[view.id];
    if (data) { this.asked = data.asked; view.show(this, data); }
    this.done();
  }

  /** The view's controls; `again` keeps what is there and renews the choices. */
  panel(again = false) {
    if (again && !this.view.controls.some((control) => ["hook", "image"].includes(control.kind))) return;
    $("controls").replaceChildren(...this.view.controls.filter((control) => control.kind !== "hidden").map((control) => this.control(control)));
  }

  control({ id, label, kind, min, max, options, placeholder, asks }) {
    const name = h("span", { textContent: label }), value = this.state[id];
    let field;
    if (kind === "choice") field = h("select", {}, ...options.map(([each, said]) => h("option", { value: each, textContent: said })));
    else if (kind === "hook") field = h("select", {}, ...[...new Set([value, ...(this.status?.hooks || [])])].map((each) => h("option", { value: each, textContent: each })));
    else if (kind === "image") field = h("select", {}, h("option", { value: "", textContent: "the same image" }), ...[...this.images].map(([each, said]) => h("option", { value: each, textContent: said })));
    else field = h("input", { type: kind, placeholder: placeholder || "", maxLength: kind === "text" ? 200 : undefined, spellcheck: false, autocomplete: "off" });
    if (kind === "text") field.maxLength = id === "second_task" ? 20000 : 200;
    if (min !== undefined) field.min = min;
    const data = this.data[this.view.id];
    if (kind === "range") field.max = data ? (data.limits || {})[id] ?? max : Math.max(max, +value);
    else if (max !== undefined) field.max = max;
    field.id = `control-${id}`;
    field.value = value;
    field.addEventListener(kind === "range" ? "input" : "change", () => {
      let given = field.value;
      if (kind === "number" || kind === "range") {
        given = Math.round(Math.min(Math.max(+given || min, min), kind === "range" ? +field.max : max));
        field.value = given;
      }
      const changes = { [id]: given };
      if (id === "head" && this.state.heads !== "one") changes.heads = "one";
      this.set(changes, asks);
    });
    const shown = h("label", { for: field.id }, name, field);
    if (kind === "range") name.append(" ", h("output", { id: `${field.id}-value`, textContent: value }));
    if (id === "second_image") {
      const image = h("img", { alt: "the second image" });
      const draw = () => { image.hidden = !field.value; if (field.value) image.src = `/api/images/${encodeURIComponent(field.value)}`; };
      field.addEventListener("change", draw);
      draw();
      return h("div", { className: "second" }, shown, image);
    }
    return shown;
  }

  /** The largest value of a slider, known once there is a result. */
  limit(id, max) {
    const data = this.data[this.view.id];
    if (data) (data.limits ||= {})[id] = max;
    this.state[id] = Math.min(this.state[id], max);
    const field = $(`control-${id}`);
    if (field) { field.max = max; field.value = this.state[id]; $(`control-${id}-value`).textContent = this.state[id]; }
  }

  /** Controls changed; what the server has to be asked for waits for Run. */
  set(changes, asks = false) {
    Object.assign(this.state, changes);
    for (const [id, value] of Object.entries(changes)) {
      const field = $(`control-${id}`);
      if (field && field.value !== String(value)) field.value = value;
      const shown = $(`control-${id}-value`);
      if (shown) shown.textContent = value;
    }
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
    const { image, task, prefill, model } = this.state, asked = { filename: image, task, assistant_prefill: prefill, model };
    for (const control of this.view.controls) if (control.asks) asked[control.id] = this.state[control.id];
    return { ...asked, ...(this.view.body ? this.view.body(this.state) : {}) };
  }

  async run() {
    this.cancel();
    const view = this.view, asked = this.question(), ending = new AbortController();
    this.wrong("");
    if (!asked.task.trim()) { this.wrong("Write what the model is to do."); $("task").focus(); return; }
    this.running = ending;
    this.busy(true);
    $("doing").textContent = "waiting for the model";
    delete this.data[view.id];
    $("exports").hidden = $("lines").hidden = true;
    if (view.begin) view.begin(this);
    let what = "waiting for the model";
    const began = performance.now();
    try {
      const data = await analyse(view.path, asked, (event) => {
        if (this.running !== ending) return;
        if (event.type === "step") what = event.what;
        if (event.total) { $("progress").max = event.total; $("progress").value = event.done; what = `${event.done} of ${event.total} layers`; }
        $("doing").textContent = `${what} · ${((performance.now() - began) / 1000).toFixed(1)} s`;
        if (view.event) view.event(this, event);
      }, ending.signal);
      if (this.running !== ending) return;
      data.asked = this.asked = asked;
      this.data[view.id] = data;
      view.show(this, data);
      $("doing").textContent = `done in ${((performance.now() - began) / 1000).toFixed(1)} s`;
    } catch (error) {
      if (this.running !== ending) return;
      if (error.name !== "AbortError") this.wrong(error.message);
      $("doing").textContent = "";
      if (!error.details) { if (error.name !== "AbortError") console.error(error); }
      if (error.details?.status === 503 || error.details?.status === 0) this.watch();
    }
    this.running = null;
    this.busy(false);
    this.done();
    this.link();
  }

  cancel() {
    if (!this.running) return;
    this.running.abort();
    this.running = null;
    this.busy(false);
    $("doing").textContent = "cancelled";
  }

  busy(on) {
    $("run").textContent = on ? "Run again" : "Run";
    $("cancel").disabled = !on;
    $("progress").hidden = !on;
    $("progress").removeAttribute("value");
    this.result.setAttribute("aria-busy", String(on));
  }

  wrong(message) {
    $("wrong").textContent = message;
    $("wrong").hidden = !message;
  }

  // What can be taken from a result ----------------------------------------------------------------------------

  done() {
    const data = this.data[this.view.id];
    $("exports").hidden = $("lines").hidden = !data;
    if (!data) return;
    const { view } = this, name = `vlm-spectra-${view.id}`;
    const made = view.exports ? view.exports(this, data) : [
      ...(view.png ? [["PNG", () => savePng(view.png(this, data), name)]] : []),
      ["CSV", () => saveText(csv(view.csv(data, this.state)), `${name}.csv`, "text/csv")],
      ["JSON", () => saveJson(view.json ? view.json(data) : data, name)],
    ];
    const button = (label, act) => { const each = h("button", { type: "button", textContent: label }); each.addEventListener("click", () => act(each)); return each; };
    $("exports").replaceChildren(h("span", { className: "mute", textContent: "Download" }), ...made.map(([label, act]) => button(label, act)),
      button("Copy the link", (each) => { this.written(); this.copy(location.href, each); }));
    this.python();
  }

  python() {
    const data = this.data[this.view.id], asked = data.asked;
    const several = (this.options || []).filter((option) => option.state).length > 1 ? this.status?.name : "";
    const lines = [...opening(asked, this.status?.server || "localhost:50051", asked.model || several), ...this.view.python(asked, this.state, data)];
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
    const redraw = () => { name(); const data = this.data[this.view.id]; if (data && this.view !== lens) this.view.show(this, data); };
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
