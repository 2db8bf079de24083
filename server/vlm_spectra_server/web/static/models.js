// The server's models: which is used, what it is doing, and having another one loaded in the background.

import { $, h, isolated, visible } from "./dom.js";
import { get, post } from "./api.js";

const BAD = ["failed", "unavailable", "unknown"];
const SAID = { unavailable: "no server", unknown: "not there" };

export class Models {
  constructor(page) {
    this.page = page;
    this.status = this.options = null;
    this.first = ""; // the model that answers where none is chosen
    $("model").addEventListener("change", () => {
      const other = $("model").value === "\n";
      $("other").hidden = !other;
      if (other) $("other").focus(); else this.select($("model").value);
    });
    $("other").addEventListener("change", () => {
      const name = $("other").value.trim();
      $("other").hidden = true;
      $("other").value = "";
      if (name) this.select(name); else this.draw();
    });
  }

  /** The model that the page shows, and asks. */
  get name() { return this.page.state.model || this.first; }

  /** Whether several models are held, so that one has to be named. */
  get several() { return (this.options || []).filter((option) => option.state).length > 1; }

  /** Look what the model is doing, and again in a while. */
  async watch() {
    let wait = 4000;
    try {
      const { model } = this.page.state, status = await get(`/api/model/status?model=${encodeURIComponent(model)}`), { state, name } = status;
      if (model !== this.page.state.model) return this.watch();
      const other = state !== this.status?.state || name !== this.status.name;
      this.status = status;
      if (!model && name) this.follow(name);
      this.pill(SAID[state] || (state === "loading" && status.progress ? `loading ${Math.round(100 * status.progress)} %` : state), state === "ready" ? "ready" : BAD.includes(state) ? "bad" : "");
      this.lost(BAD.includes(state) ? status.error : "");
      if (state !== "ready") wait = 1000;
      if (other) { this.options = null; this.page.controls.renew(); }
      if (!this.options && state !== "unavailable") this.options = (await get("/api/model/options")).models;
      if (other) this.draw();
    } catch (error) {
      this.status = null;
      this.pill(error.details?.status ? "refused" : "no page server", "bad");
      this.lost(error.message);
      wait = 1000;
    }
    clearTimeout(this.next);
    this.next = setTimeout(() => this.watch(), wait);
  }

  /** Another model than before is the first: what is shown is not of it. */
  follow(name) {
    const { first } = this;
    if (first === name) return;
    this.first = name;
    this.draw();
    if (!first) return;
    this.page.stale();
    this.page.say(`the server's model is another now: ${visible(name)}`);
  }

  pill(text, kind) {
    if ($("state").textContent !== text) $("state").textContent = text;
    $("state").className = `pill ${kind}`;
  }

  lost(message) {
    $("lost").hidden = !message;
    if ($("lost").textContent !== message) $("lost").textContent = message;
  }

  draw() {
    const select = $("model"), held = new Map((this.options || []).map(({ name, state }) => [name, state])), names = [...held.keys()];
    const shown = this.name;
    if (shown && !names.includes(shown)) names.unshift(shown);
    const here = (name) => held.get(name) || name === shown;
    const option = (name) => h("option", { value: name, textContent: held.get(name) && held.get(name) !== "ready" ? `${isolated(name)} (${held.get(name)})` : visible(name) });
    select.replaceChildren(
      h("optgroup", { label: "on the server" }, ...names.filter(here).map(option)),
      h("optgroup", { label: "to be loaded" }, ...names.filter((name) => !here(name)).map(option), h("option", { value: "\n", textContent: "another …" })));
    select.value = shown;
  }

  async select(name) {
    const before = this.page.state.model;
    this.page.wrong("");
    try {
      await post("/api/model/select", { name });
      this.page.state.model = name;
      this.page.stale();
    } catch (error) {
      this.page.state.model = before;
      this.page.wrong(error.message);
    }
    this.options = null;
    await this.watch();
    this.draw();
  }
}
