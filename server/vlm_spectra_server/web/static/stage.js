// The prompt's images, and what an analysis lays over them: heat on patches, a click. Patches can be pointed at, clicked,
// and walked over with the arrow keys.

import { h, short } from "./dom.js";
import { WARM, COLD, pageInk } from "./colours.js";
import { panesOf, sum } from "./panes.js";

const OPAQUE = 0.82;
const CHOSEN = "#0a7d33";

/** One pane: the image, and a canvas over it. */
class Shot {
  constructor(stage, source, pane) {
    this.stage = stage;
    this.pane = pane;
    this.cells = pane.cells;
    this.at = -1;
    this.image = h("img", { alt: source.name, src: source.address });
    this.canvas = h("canvas", { tabIndex: 0, role: "img", "aria-label": `Patches of ${pane.name || "the image"}: arrow keys walk over them, Enter chooses one` });
    const shot = h("div", { className: "shot" }, this.image, this.canvas);
    this.element = h("figure", {}, shot, pane.name ? h("figcaption", { textContent: pane.name }) : null);
    this.image.addEventListener("load", () => {
      shot.style.maxWidth = `calc(70vh * ${this.image.naturalWidth / this.image.naturalHeight})`; // the whole image in sight
      this.draw();
    });
    this.image.addEventListener("error", () => stage.onMissing?.());
    this.canvas.addEventListener("mousemove", (event) => this.look(this.under(event)));
    this.canvas.addEventListener("mouseleave", () => this.look(-1));
    this.canvas.addEventListener("blur", () => this.look(-1));
    this.canvas.addEventListener("click", (event) => this.choose(this.under(event)));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
  }

  under(event) {
    const box = this.canvas.getBoundingClientRect(), [wide, high] = this.pane.size;
    const x = ((event.clientX - box.left) / box.width) * wide, y = ((event.clientY - box.top) / box.height) * high;
    return this.cells.findIndex(({ box: [left, top, right, bottom] }) => left <= x && x < right && top <= y && y < bottom);
  }

  look(index) {
    if (index === this.at) return;
    this.at = index;
    this.stage.tell(this, this.cells[index]);
    this.draw();
  }

  choose(index) {
    if (index >= 0 && this.stage.onPatch) this.stage.onPatch(this.cells[index].positions[0]);
  }

  key(event) {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (step && this.cells.length) {
      event.preventDefault();
      const here = this.cells[this.at];
      const next = here ? this.cells.findIndex(({ row, column }) => row === here.row + step[0] && column === here.column + step[1]) : 0;
      if (next >= 0) this.look(next);
    } else if (event.key === "Enter") this.choose(this.at);
    else if (event.key === "Escape") this.look(-1);
  }

  draw() {
    const { width, height } = this.image.getBoundingClientRect(), fine = devicePixelRatio || 1;
    if (!width) return;
    this.canvas.width = Math.round(width * fine);
    this.canvas.height = Math.round(height * fine);
    this.over(this.canvas.getContext("2d"), this.canvas.width, this.canvas.height, fine);
  }

  /** Draw what lies over a picture of this size. */
  over(context, width, height, lines) {
    const { values, peak, chosen, pointed, point } = this.stage, [wide, high] = this.pane.size;
    const corners = ({ box: [left, top, right, bottom] }) => {
      const [x, end] = [left, right].map((edge) => Math.round((edge / wide) * width));
      const [y, last] = [top, bottom].map((edge) => Math.round((edge / high) * height));
      return [x, y, end - x, last - y];
    };
    if (values) for (const cell of this.cells) {
      context.fillStyle = paint(sum(cell, values) / peak);
      context.fillRect(...corners(cell));
    }
    const frame = (cell, style) => {
      if (!cell) return;
      const [x, y, across, down] = corners(cell);
      context.strokeStyle = style; context.lineWidth = 3 * lines;
      context.strokeRect(x + 1.5 * lines, y + 1.5 * lines, across - 3 * lines, down - 3 * lines);
    };
    const holding = (position) => this.cells.find((cell) => cell.positions.includes(position));
    if (chosen !== null) frame(holding(chosen), CHOSEN);
    if (pointed !== null) frame(holding(pointed), "#d55e00");
    frame(this.cells[this.at], "#000");
    if (!point || this.stage.shots[0] !== this) return;
    const x = (point.x / wide) * width, y = (point.y / high) * height;
    for (const [style, thick] of [["#fff", 5], ["#d55e00", 2.5]]) {
      context.strokeStyle = style; context.lineWidth = thick * lines;
      context.beginPath(); context.arc(x, y, 11 * lines, 0, 7);
      for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
        context.moveTo(x + 5 * dx * lines, y + 5 * dy * lines); context.lineTo(x + 18 * dx * lines, y + 18 * dy * lines);
      }
      context.stroke();
    }
  }

  /** The image and what lies over it, on a canvas. */
  picture(width) {
    const height = Math.round((width * this.image.naturalHeight) / this.image.naturalWidth);
    const canvas = h("canvas", { width, height }), context = canvas.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
    if (this.stage.values) { context.globalAlpha = 0.5; context.filter = "grayscale(0.7)"; }
    context.drawImage(this.image, 0, 0, width, height);
    context.globalAlpha = 1; context.filter = "none";
    this.over(context, width, height, 2);
    return canvas;
  }
}

const paint = (place) => `rgba(${place < 0 ? COLD : WARM}, ${Math.min(Math.abs(place), 1) * OPAQUE})`;

export class Stage {
  constructor(parent) {
    this.empty = h("div", { className: "empty", textContent: "Drop an image here, paste one, or choose an example." });
    this.box = h("div", { className: "shots" });
    this.tip = h("div", { className: "tip", role: "status" });
    this.ramp = h("canvas", { width: 110, height: 1, "aria-hidden": "true" });
    this.low = h("span"); this.high = h("span"); this.name = h("span");
    this.scale = h("div", { className: "scale" }, this.low, this.ramp, this.high, this.name);
    parent.append(this.empty, this.box, this.scale, this.tip);
    this.sources = []; this.shots = [];
    this.onPatch = this.onHover = this.onMissing = null;
    this.clear();
    new ResizeObserver(() => this.draw()).observe(this.box);
  }

  /** Show images, each with an address and a name, of whose patches nothing is known yet. */
  show(sources) {
    this.sources = sources;
    this.said = null;
    this.build(sources.map((_, image) => ({ image, name: sources.length > 1 ? `image ${image + 1}` : "", size: [1, 1], cells: [] })));
    this.empty.hidden = sources.length > 0;
    this.clear();
  }

  /** Which parts of the images are patches, as the server says. */
  layout(prompt) {
    const said = JSON.stringify(prompt.images);
    if (said === this.said) return;
    this.said = said;
    this.build(panesOf(prompt));
  }

  build(panes) {
    const same = panes.length === this.shots.length && panes.every(({ image }, i) => this.shots[i].image.src.endsWith(this.sources[image].address));
    if (same) this.shots.forEach((shot, i) => { shot.pane = panes[i]; shot.cells = panes[i].cells; });
    else {
      this.shots = panes.map((pane) => new Shot(this, this.sources[pane.image], pane));
      this.box.replaceChildren(...this.shots.map((shot) => shot.element));
    }
    this.draw();
  }

  /** Nothing lies over the images. */
  clear() {
    this.values = this.point = this.chosen = this.pointed = null;
    this.peak = 1;
    this.scale.hidden = true;
    this.tip.textContent = "";
    this.draw();
  }

  /** A click, in pixels of the first image. */
  mark(point) { this.point = point; this.draw(); }

  /** Something elsewhere points at a position. */
  pointAt(position) { this.pointed = position; this.draw(); }

  /** Heat: a value by sequence position. */
  heat(value, { label, signed = false, peak = null, chosen = null }) {
    const cells = this.shots.flatMap((shot) => shot.cells);
    this.values = value;
    this.peak = peak || cells.reduce((most, cell) => Math.max(most, Math.abs(sum(cell, value))), 0) || 1;
    this.chosen = chosen;
    this.low.textContent = signed ? short(-this.peak) : "0";
    this.high.textContent = short(this.peak);
    this.name.textContent = label;
    this.scale.hidden = cells.length === 0;
    this.rampOn(this.ramp.getContext("2d"), 0, 0, 110, 1, signed);
    this.signed = signed;
    this.draw();
  }

  rampOn(context, left, top, width, height, signed) {
    context.clearRect(left, top, width, height);
    for (let x = 0; x < width; x++) {
      context.fillStyle = paint(signed ? (2 * x) / (width - 1) - 1 : x / (width - 1));
      context.fillRect(left + x, top, 1, height);
    }
  }

  draw() {
    this.box.classList.toggle("heated", Boolean(this.values));
    this.box.classList.toggle("open", this.shots.some((shot) => shot.cells.length));
    for (const shot of this.shots) shot.draw();
  }

  /** What is known of a cell that is pointed at. */
  tell(shot, cell) {
    this.onHover?.(cell ? cell.positions[0] : null);
    if (!cell) { this.tip.textContent = ""; return; }
    const where = shot.pane.name ? `${shot.pane.name}: ` : "", value = this.values ? `: ${short(sum(cell, this.values))}` : "";
    const which = cell.positions.length > 1 ? `${cell.positions.length} tokens, from position ${cell.positions[0]}` : `row ${cell.row}, column ${cell.column}, position ${cell.positions[0]}`;
    this.tip.textContent = where + which + value;
  }

  /** The images with what lies over them, and the scale, as one canvas; nothing without an image. */
  picture() {
    if (!this.shots.length) return null;
    const width = this.shots.length > 1 ? 420 : 640, gap = 16, pictures = this.shots.map((shot) => shot.picture(width));
    const tallest = Math.max(...pictures.map((each) => each.height)), foot = this.values ? 34 : 0;
    const canvas = h("canvas", { width: (width + gap) * pictures.length - gap, height: tallest + foot });
    const context = canvas.getContext("2d");
    pictures.forEach((each, i) => context.drawImage(each, i * (width + gap), 0));
    if (!foot) return canvas;
    context.font = "14px system-ui, sans-serif"; context.textBaseline = "middle"; context.fillStyle = pageInk();
    const middle = tallest + 20, ends = context.measureText(this.low.textContent).width + 8;
    context.fillText(this.low.textContent, 0, middle);
    context.fillText(`${this.high.textContent}  ${this.name.textContent}`, ends + 118, middle);
    context.fillStyle = "#fff";
    context.fillRect(ends, middle - 6, 110, 12);
    const ramp = h("canvas", { width: 110, height: 12 });
    this.rampOn(ramp.getContext("2d"), 0, 0, 110, 12, this.signed);
    context.drawImage(ramp, ends, middle - 6);
    return canvas;
  }
}
