// A view's controls. Each has an id, under which its value stands in the state and in the link; `asks` says that the server
// has to be asked again when it changes, `when` for which state it is there.

import { $, h } from "./dom.js";
import { address } from "./prompt.js";

export class Controls {
  constructor(page) { this.page = page; }

  /** The present view's controls. */
  draw() {
    const { view } = this.page;
    this.shown = view.controls.filter(({ kind }) => kind !== "hidden").map((control) => [control, this.control(control)]);
    $("controls").replaceChildren(...this.shown.map(([, element]) => element));
    this.relevant();
  }

  /** What can be chosen has changed. */
  renew() {
    if (this.page.view.controls.some(({ kind }) => kind === "hook" || kind === "image")) this.draw();
  }

  relevant() {
    for (const [{ when }, element] of this.shown) if (when) element.hidden = !when(this.page.state);
  }

  control(control) {
    const { id, label, kind, asks } = control, field = this.field(control);
    field.id = `control-${id}`;
    field.value = this.page.state[id];
    field.addEventListener(kind === "range" ? "input" : "change", () => {
      field.value = read(control, field);
      this.page.set({ [id]: read(control, field) }, asks);
    });
    const name = h("span", { textContent: label }), shown = h("label", { for: field.id }, name, field);
    if (kind === "range") name.append(" ", h("output", { id: `${field.id}-value`, textContent: field.value }));
    if (kind !== "image") return shown;
    const image = h("img", { alt: "the second image" });
    const draw = () => { image.hidden = !field.value; if (field.value) image.src = address(field.value); };
    field.addEventListener("change", draw);
    draw();
    return h("div", { className: "with-image" }, shown, image);
  }

  field({ id, kind, min, max, options, placeholder, long, optional }) {
    const choices = (pairs) => h("select", {}, ...pairs.map(([value, said]) => h("option", { value, textContent: said })));
    const value = this.page.state[id];
    if (kind === "choice") return choices(options);
    if (kind === "hook") return choices([...new Set([value, ...(this.page.models.status?.hooks || [])])].map((name) => [name, name]));
    if (kind === "image") return choices([["", "the same"], ...this.page.prompt.names]);
    const field = h("input", { type: kind, spellcheck: false, autocomplete: "off" });
    if (kind === "text") Object.assign(field, { maxLength: long ? 20_000 : 200, className: long ? "wide-field" : "" });
    else Object.assign(field, { min, max: kind === "range" ? this.page.data[this.page.view.id]?.limits?.[id] ?? Math.max(max, +value) : max });
    if (kind === "text" || optional) field.placeholder = placeholder || "";
    return field;
  }

  /** The largest value of a slider, known once there is a result. */
  limit(id, max) {
    const { page } = this, data = page.data[page.view.id];
    (data.limits ||= {})[id] = max;
    page.state[id] = bounded({ min: 0, max }, page.state[id]);
    $(`control-${id}`).max = max;
    this.show({ [id]: page.state[id] });
  }

  /** Fields show what the state has become. */
  show(changes) {
    for (const [id, value] of Object.entries(changes)) {
      const field = $(`control-${id}`), shown = $(`control-${id}-value`);
      if (field && field.value !== String(value)) field.value = value;
      if (shown) shown.textContent = value;
    }
    this.relevant();
  }
}

/** A number as its control takes it; how far a slider goes is known once there is a result. */
export const bounded = ({ kind, min = -Infinity, max = Infinity }, value) => Math.round(Math.min(Math.max(value, min), kind === "range" ? Infinity : max));

function read({ kind, min, max, optional }, field) {
  if (kind !== "number" && kind !== "range") return field.value;
  if (optional && !field.value) return "";
  return bounded({ min, max: kind === "range" ? +field.max : max }, +field.value || min);
}
