// The image, and what an analysis lays over it: heat on patches, a click. Patches can be pointed at, clicked, and
// walked over with the arrow keys.

import { h, short } from "./dom.js";
import { WARM, COLD } from "./colours.js";

const OPAQUE = 0.82;

export class Stage {
  constructor(parent) {
    this.image = h("img", { alt: "", hidden: true });
    this.canvas = h("canvas", { tabIndex: 0, role: "img", "aria-label": "The image's patches: arrow keys walk over them, Enter chooses one" });
    this.empty = h("div", { className: "empty", textContent: "Drop an image here, paste one, or choose an example." });
    this.box = h("div", { className: "shot" }, this.image, this.canvas, this.empty);
    this.tip = h("div", { className: "tip", role: "status" });
    this.ramp = h("canvas", { width: 110, height: 1, "aria-hidden": "true" });
    this.low = h("span"); this.high = h("span"); this.name = h("span");
    this.scale = h("div", { className: "scale" }, this.low, this.ramp, this.high, this.name);
    this.scale.hidden = true;
    parent.append(this.box, this.scale, this.tip);
    this.patches = []; this.grid = [0, 0]; this.values = null; this.point = null; this.at = -1;
    this.onPatch = null;
    this.image.addEventListener("load", () => this.draw());
    this.canvas.addEventListener("mousemove", (e) => this.look(this.under(e)));
    this.canvas.addEventListener("mouseleave", () => this.look(-1));
    this.canvas.addEventListener("click", (e) => this.choose(this.under(e)));
    this.canvas.addEventListener("keydown", (e) => this.key(e));
    addEventListener("resize", () => this.draw());
  }

  show(address, name) {
    this.clear();
    this.patches = []; this.grid = [0, 0];
    this.image.src = address;
    this.image.alt = name;
    this.image.hidden = false;
    this.empty.hidden = true;
  }

  /** Which parts of the image are patches, as the server says. */
  layout(prompt) {
    const first = prompt.images[0];
    this.patches = first ? first.patches : [];
    this.grid = first ? first.grid : [0, 0];
    this.size = first ? first.size : [1, 1];
  }

  clear() {
    this.values = null; this.point = null; this.at = -1; this.chosen = null;
    this.scale.hidden = true;
    this.tip.textContent = "";
    this.draw();
  }

  mark(point) { this.point = point; this.draw(); }

  /** Heat: a value by sequence position. */
  heat(value, { label, signed = false, peak = null, chosen = null }) {
    this.values = this.patches.map((patch) => value(patch.position));
    const size = Math.max(...this.values.map((v) => Math.abs(v || 0)), 0);
    this.peak = peak || size || 1;
    this.signed = signed; this.label = label; this.chosen = chosen;
    this.low.textContent = signed ? short(-this.peak) : "0";
    this.high.textContent = short(this.peak);
    this.name.textContent = label;
    this.scale.hidden = false;
    const context = this.ramp.getContext("2d");
    context.clearRect(0, 0, 110, 1);
    for (let x = 0; x < 110; x++) {
      const place = signed ? (2 * x) / 109 - 1 : x / 109;
      context.fillStyle = this.paint(place);
      context.fillRect(x, 0, 1, 1);
    }
    this.draw();
  }

  paint(place) {
    return `rgba(${place < 0 ? COLD : WARM}, ${Math.min(Math.abs(place), 1) * OPAQUE})`;
  }

  /** Draw what lies over a picture of this width. */
  over(context, width, height, lines = 1) {
    const across = width / (this.size ? this.size[0] : 1), down = height / (this.size ? this.size[1] : 1);
    const corners = (box) => {
      const [left, top, right, bottom] = [box[0] * across, box[1] * down, box[2] * across, box[3] * down].map(Math.round);
      return [left, top, right - left, bottom - top];
    };
    if (this.values) {
      this.patches.forEach((patch, i) => {
        context.fillStyle = this.paint((this.values[i] || 0) / this.peak);
        context.fillRect(...corners(patch.box));
      });
    }
    const outlined = this.patches.find((patch) => patch.position === this.chosen);
    for (const [patch, style] of [[outlined, "#0a7d33"], [this.patches[this.at], "#000"]]) {
      if (!patch) continue;
      context.strokeStyle = style; context.lineWidth = 2 * lines;
      context.strokeRect(...corners(patch.box));
    }
    if (this.point) {
      const x = (this.point.x / this.image.naturalWidth) * width, y = (this.point.y / this.image.naturalHeight) * height;
      for (const [style, wide] of [["#fff", 5], ["#d55e00", 2.5]]) {
        context.strokeStyle = style; context.lineWidth = wide * lines;
        context.beginPath(); context.arc(x, y, 11 * lines, 0, 7);
        for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
          context.moveTo(x + 5 * dx * lines, y + 5 * dy * lines); context.lineTo(x + 18 * dx * lines, y + 18 * dy * lines);
        }
        context.stroke();
      }
    }
  }

  draw() {
    this.box.classList.toggle("heated", Boolean(this.values));
    this.box.classList.toggle("open", this.patches.length > 0);
    const { width, height } = this.image.getBoundingClientRect(), fine = devicePixelRatio || 1;
    if (!width) return;
    this.canvas.width = Math.round(width * fine);
    this.canvas.height = Math.round(height * fine);
    this.over(this.canvas.getContext("2d"), this.canvas.width, this.canvas.height, fine);
  }

  /** Image and what lies over it, as one canvas. */
  picture() {
    const scale = Math.max(1, Math.ceil(640 / this.image.naturalWidth));
    const canvas = h("canvas", { width: this.image.naturalWidth * scale, height: this.image.naturalHeight * scale });
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    if (this.values) { context.globalAlpha = 0.5; context.filter = "grayscale(0.7)"; }
    context.drawImage(this.image, 0, 0, canvas.width, canvas.height);
    context.globalAlpha = 1; context.filter = "none";
    this.over(context, canvas.width, canvas.height, scale);
    return canvas;
  }

  under(event) {
    const box = this.canvas.getBoundingClientRect();
    if (!this.size) return -1;
    const x = ((event.clientX - box.left) / box.width) * this.size[0], y = ((event.clientY - box.top) / box.height) * this.size[1];
    return this.patches.findIndex(({ box: [left, top, right, bottom] }) => left <= x && x < right && top <= y && y < bottom);
  }

  look(index) {
    if (index === this.at) return;
    this.at = index;
    const columns = this.grid[1];
    if (index < 0) this.tip.textContent = "";
    else {
      const value = this.values ? `: ${short(this.values[index])}` : "";
      this.tip.textContent = `row ${Math.floor(index / columns)}, column ${index % columns}, position ${this.patches[index].position}${value}`;
    }
    this.draw();
  }

  choose(index) {
    if (index >= 0 && this.onPatch) this.onPatch(this.patches[index].position);
  }

  key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: this.grid[1], ArrowUp: -this.grid[1] }[event.key];
    if (step && this.patches.length) {
      event.preventDefault();
      const next = this.at < 0 ? 0 : this.at + step;
      if (next >= 0 && next < this.patches.length) this.look(next);
    } else if (event.key === "Enter") this.choose(this.at);
    else if (event.key === "Escape") this.look(-1);
  }
}
