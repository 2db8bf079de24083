// What is asked of the model: images, a task, and how the answer begins.

import { $, h } from "./dom.js";
import { get, upload } from "./api.js";

const MOST = 8, TOO_MANY = `A prompt has at most ${MOST} images.`;
const address = (name) => `/api/images/${encodeURIComponent(name)}`;

export class Prompt {
  constructor(page) {
    this.page = page;
    this.names = new Map(); // of the images that can be chosen, and what they are called
    this.uploads = 0;
    this.examples = [];
    const state = page.state;
    $("file").addEventListener("change", () => { this.take([...$("file").files]); $("file").value = ""; });
    for (const kind of ["dragover", "dragleave", "drop"])
      document.addEventListener(kind, (event) => {
        if (!event.dataTransfer.types.includes("Files")) return; // a text, for a field
        event.preventDefault();
        $("stage").classList.toggle("drop", kind === "dragover");
        if (kind === "drop") this.take([...event.dataTransfer.files]);
      });
    document.addEventListener("paste", (event) => {
      const files = [...event.clipboardData.files].filter((each) => each.type.startsWith("image/"));
      if (files.length) { event.preventDefault(); this.take(files); }
    });
    for (const id of ["task", "prefill"])
      $(id).addEventListener("input", () => { state[id] = $(id).value; page.stale(); });
    $("task").addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); page.run(); } });
    $("several").addEventListener("change", () => {
      if (!$("several").checked && state.images.length > 1) this.choose(state.images.slice(0, 1));
    });
    page.stage.onMissing = () => page.wrong("That image is not here, or no longer: choose it again.");
  }

  /** The fields show the state. */
  fresh() {
    const { images, task, prefill } = this.page.state;
    $("task").value = task;
    $("prefill").value = prefill;
    $("more").open ||= Boolean(prefill);
    $("several").checked ||= images.length > 1;
    images.forEach((name, i) => { if (!this.names.has(name)) this.offer(name, `image ${i + 1} of the link`); });
    this.draw();
  }

  async gallery() {
    this.examples = await get("/api/gallery");
    for (const { filename, title } of this.examples) this.offer(filename, title, false);
  }

  /** One more image that can be chosen; one's own come first. */
  offer(name, title, own = true) {
    this.names.set(name, title);
    const button = h("button", { type: "button", title, "aria-pressed": "false" }, h("img", { src: address(name), alt: title, loading: "lazy", height: 48 }));
    button.dataset.name = name;
    button.addEventListener("click", () => this.pick(name));
    $("gallery")[own ? "prepend" : "append"](h("li", {}, button));
  }

  pick(name) {
    const { state } = this.page, chosen = state.images.includes(name);
    if (!$("several").checked) {
      const example = this.examples.find(({ filename }) => filename === name);
      if (example) state.task = $("task").value = example.task;
      this.choose([name]);
    } else this.choose(chosen ? state.images.filter((each) => each !== name) : [...state.images, name]);
  }

  choose(images) {
    if (images.length > MOST) { this.page.wrong(TOO_MANY); return; }
    this.page.state.images = images;
    this.draw();
    this.page.stale();
  }

  async take(files) {
    const { page } = this, several = $("several").checked, kept = () => (several ? page.state.images : []);
    if (!files.length) return;
    if (kept().length + files.length > MOST) { page.wrong(TOO_MANY); return; }
    page.wrong("");
    page.say("uploading the image");
    const got = [];
    try {
      for (const file of files) {
        const { filename } = await upload(file);
        got.push(filename);
        if (!this.names.has(filename)) this.offer(filename, `uploaded ${++this.uploads}`);
      }
    } catch (error) {
      page.wrong(error.message);
    }
    page.say("");
    if (!got.length) return;
    const images = [...new Set([...kept(), ...got])];
    $("several").checked ||= images.length > 1;
    this.choose(images);
    page.controls.renew();
  }

  draw() {
    const { images } = this.page.state;
    this.page.stage.show(images.map((name) => ({ address: address(name), name: this.names.get(name) || "the image" })));
    for (const button of $("gallery").querySelectorAll("button")) button.setAttribute("aria-pressed", String(images.includes(button.dataset.name)));
  }
}

export { address };
