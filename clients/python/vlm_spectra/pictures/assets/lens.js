"use strict";
// The logit-lens page: a table of layers by tokens that keeps only the visible columns in the document.
(() => {
  const D = JSON.parse(document.getElementById("data").textContent);
  const WIDTH = 78, NAMES = 62, SPARE = 6;
  const $ = (id) => document.getElementById(id);
  const tip = $("tip"), root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)");
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  const quoted = (text) => JSON.stringify(text).slice(1, -1).replace(/\\"/g, '"').replace(/\\\\/g, "\\");
  const number = (value) => (value >= 100 ? value.toFixed(0) : value.toPrecision(3));

  function visible(text) {
    const shown = text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍");
    return shown.replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length)) || "∅";
  }

  function element(tag, name, text, parent) {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  }

  const short = D.words.map(visible);

  // Colours: 64 steps of each scale, with the ink that reads on them.
  const STEPS = 64, paints = {};
  for (const [name, anchors] of Object.entries(D.scales)) {
    const parts = anchors.map((c) => [1, 3, 5].map((k) => parseInt(c.slice(k, k + 2), 16)));
    paints[name] = Array.from({ length: STEPS }, (_, s) => {
      const place = (s / (STEPS - 1)) * (parts.length - 1), low = Math.min(Math.floor(place), parts.length - 2);
      const mixed = parts[low].map((c, k) => Math.round(c + (parts[low + 1][k] - c) * (place - low)));
      const linear = mixed.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
      const light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
      return { ground: `rgb(${mixed})`, ink: light < 0.179 ? "#fff" : "#000" };
    });
  }
  let shade = "probability";
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const paint = () => paints[D.shades[shade].scale + (dark() ? "-dark" : "")];

  // As a part of another page (`#part,dark`), which has the images: that page's theme; what is pointed at goes both ways.
  const [part, theme] = location.hash.slice(1).split(",");
  const isPart = part === "part" && parent !== window;
  if (isPart) { root.classList.add("part"); root.dataset.theme = theme; }

  const tables = [];
  let cursor = null; // what is marked: { table, i, j }; i is -1 for a whole column
  let pinned = false;

  // Scrolling moves things under a resting mouse, which browsers report as pointing; only a mouse that moved points.
  let rest = "";
  const spot = (e) => `${e.clientX},${e.clientY}`, moved = (e) => spot(e) !== rest;
  addEventListener("mousemove", (e) => { rest = spot(e); }, { passive: true, capture: true });

  class Table {
    constructor(section, row) {
      const layers = D.layers.length, n = row.positions.length;
      Object.assign(this, { section, row, layers, n, k: row.k });
      this.words = row.wide ? new Uint32Array(bytes(row.words)) : new Uint16Array(bytes(row.words));
      this.probs = new Uint16Array(bytes(row.probs));
      this.values = { entropy: new Uint16Array(bytes(row.entropy)), kl: new Uint16Array(bytes(row.kl)) };
      this.ranks = new Uint32Array(bytes(row.ranks));
      this.hits = null;
      this.column = new Map(row.positions.map((position, j) => [position, j]));
      this.patches = new Map();
      for (const rect of section.querySelectorAll("rect[data-p]")) {
        const j = this.column.get(+rect.dataset.p);
        if (j === undefined) continue;
        if (!this.patches.has(j)) this.patches.set(j, []);
        this.patches.get(j).push(rect);
      }
      this.build();
      for (const svg of section.querySelectorAll(".shot svg")) this.listen(svg);
    }

    build() {
      const box = (this.box = this.section.querySelector(".box"));
      box.setAttribute("aria-rowcount", this.layers + 1);
      box.setAttribute("aria-colcount", this.n + 1);
      const sheet = (this.sheet = element("div", "sheet", undefined, box));
      sheet.setAttribute("role", "presentation");
      sheet.style.width = `${NAMES + WIDTH * this.n}px`;
      this.lines = ["layer", ...D.layers].map((name, r) => {
        const line = element("div", r ? "line" : "line head", undefined, sheet);
        line.setAttribute("role", "row");
        line.setAttribute("aria-rowindex", r + 1);
        const head = element("div", "name", name, line);
        head.setAttribute("role", r ? "rowheader" : "columnheader");
        return { line, cells: [] };
      });
      this.bars = [element("div", "bar", undefined, sheet), element("div", "bar", undefined, sheet)];
      this.count = 0;
      new ResizeObserver(() => this.resize()).observe(box);
      box.addEventListener("scroll", () => { this.draw(); if (cursor) place(); }, { passive: true });
      sheet.addEventListener("mouseover", (e) => { if (e.target.at && moved(e)) point(this, ...e.target.at); });
      sheet.addEventListener("mouseleave", (e) => { if (moved(e)) leave(); });
      sheet.addEventListener("click", (e) => { if (e.target.at) pin(this, ...e.target.at); });
      box.addEventListener("keydown", (e) => this.key(e));
      this.resize();
    }

    resize() {
      const wanted = Math.min(this.n, Math.ceil(this.box.clientWidth / WIDTH) + SPARE);
      if (wanted === this.count) return this.draw();
      this.count = wanted;
      this.shown = new Int32Array(wanted).fill(-1);
      this.lines.forEach(({ line, cells }, r) => {
        while (cells.length > wanted) cells.pop().remove();
        while (cells.length < wanted) {
          const cell = element("div", "cell", undefined, line);
          cell.setAttribute("role", r ? "gridcell" : "columnheader");
          cells.push(cell);
        }
      });
      this.draw();
    }

    // Column j lives in slot j % count, so that scrolling refills only what has come into view.
    draw(all = false) {
      if (all) this.shown.fill(-1);
      const first = Math.max(0, Math.floor(this.box.scrollLeft / WIDTH) - (SPARE >> 1));
      const last = Math.min(this.n, first + this.count);
      const colours = paint(), { peak } = D.shades[shade], values = this.values[shade];
      for (let j = Math.max(0, last - this.count); j < last; j++) {
        const slot = j % this.count;
        if (this.shown[slot] === j) continue;
        this.shown[slot] = j;
        for (let r = 0; r < this.lines.length; r++) {
          const cell = this.lines[r].cells[slot], i = r - 1, at = i * this.n + j;
          cell.at = [i, j];
          cell.id = `c${this.row.number}-${i}-${j}`;
          cell.style.left = `${NAMES + WIDTH * j}px`;
          cell.setAttribute("aria-colindex", j + 2);
          const hit = this.hits === null ? 0 : this.hits[(i + 1) * this.n + j];
          cell.classList.toggle("hit", hit === 1);
          cell.classList.toggle("near", hit === 2);
          this.touch(cell, i, j);
          if (i < 0) {
            cell.textContent = visible(this.row.heads[j]);
          } else {
            const value = values ? values[at] / 65535 : this.probs[at * this.k] / 65535;
            const look = colours[Math.min(STEPS - 1, Math.round(value * (STEPS - 1)))];
            cell.textContent = short[this.words[at * this.k]];
            cell.style.background = peak > 0 ? look.ground : "";
            cell.style.color = look.ink;
          }
        }
      }
    }

    cell(i, j) {
      const slot = j % this.count;
      return this.shown[slot] === j ? this.lines[i + 1].cells[slot] : null;
    }

    touch(cell, i, j) {
      const here = cursor !== null && cursor.table === this && cursor.i === i && cursor.j === j;
      cell.classList.toggle("at", here);
      cell.classList.toggle("pin", here && pinned);
    }

    show(i, j) {
      const left = NAMES + WIDTH * j, box = this.box, height = this.lines[0].line.offsetHeight;
      if (left < box.scrollLeft + NAMES || left + WIDTH > box.scrollLeft + box.clientWidth) {
        box.scrollLeft = left - (box.clientWidth - NAMES) / 2;
      }
      const top = height * (i + 1);
      if (i >= 0 && (top < box.scrollTop + height || top + height > box.scrollTop + box.clientHeight)) {
        box.scrollTop = top - box.clientHeight / 2;
      }
      this.draw();
    }

    mark(on) {
      const { i, j } = cursor, [tall, wide] = this.bars;
      for (const bar of this.bars) bar.classList.toggle("pin", pinned);
      Object.assign(tall.style, { display: on ? "block" : "none", left: `${NAMES + WIDTH * j}px`, top: 0,
        width: `${WIDTH}px`, height: `${this.sheet.offsetHeight}px` });
      const line = this.lines[i + 1].line;
      Object.assign(wide.style, { display: on && i >= 0 ? "block" : "none", left: 0, top: `${line.offsetTop}px`,
        width: `${this.sheet.offsetWidth}px`, height: `${line.offsetHeight}px` });
      for (const rect of this.patches.get(j) || []) {
        const frame = rect.parentNode.querySelector(".frame"); // lies above all patches
        for (const name of ["x", "y", "width", "height"]) frame.setAttribute(name, rect.getAttribute(name));
        rect.classList.toggle("on", on);
        frame.classList.toggle("on", on);
        frame.classList.toggle("pin", on && pinned);
      }
      const cell = this.cell(i, j);
      if (cell && on) this.box.setAttribute("aria-activedescendant", cell.id);
    }

    key(e) {
      const page = Math.max(1, Math.floor((this.box.clientWidth - NAMES) / WIDTH) - 1);
      const own = cursor && cursor.table === this;
      let i = own ? cursor.i : 0, j = own ? cursor.j : this.n - 1;
      const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
        PageUp: [0, -page], PageDown: [0, page], Home: [0, -this.n], End: [0, this.n] };
      if (e.key in moves) {
        if (own) { i += moves[e.key][0]; j += moves[e.key][1]; }
        i = Math.max(-1, Math.min(this.layers - 1, i));
        j = Math.max(0, Math.min(this.n - 1, j));
        this.show(i, j);
        move(this, i, j);
      } else if (e.key === "Enter" || e.key === " ") {
        if (own) pin(this, i, j);
      } else return;
      e.preventDefault();
    }

    listen(svg) {
      const at = (rect) => (rect && rect.dataset && rect.dataset.p ? this.column.get(+rect.dataset.p) : undefined);
      svg.addEventListener("mouseover", (e) => {
        const j = at(e.target);
        if (j !== undefined && !pinned && moved(e)) { this.show(-1, j); point(this, -1, j, e.target); }
      });
      svg.addEventListener("mouseleave", (e) => { if (moved(e)) leave(); });
      svg.addEventListener("click", (e) => {
        const j = at(e.target);
        if (j !== undefined) { this.show(-1, j); pin(this, -1, j, e.target); }
      });
      svg.addEventListener("keydown", (e) => {
        const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
        const rects = [...svg.querySelectorAll("rect[data-p]")].filter((rect) => at(rect) !== undefined);
        let here = rects.find((rect) => rect.classList.contains("on"));
        if (e.key in steps && rects.length) {
          if (here) here = nearest(rects, here, steps[e.key]) || here;
          else here = rects.reduce((a, b) => (+a.dataset.p < +b.dataset.p ? a : b));
          this.show(-1, at(here));
          move(this, -1, at(here), here);
        } else if ((e.key === "Enter" || e.key === " ") && here) pin(this, -1, at(here), here);
        else return;
        e.preventDefault();
      });
    }
  }

  // The next patch in a direction: the closest of those ahead, sideways distance counting double.
  function nearest(rects, from, [dx, dy]) {
    const centre = (rect) => ["x", "y"].map((a, k) => +rect.getAttribute(a) + +rect.getAttribute(["width", "height"][k]) / 2);
    const [x, y] = centre(from);
    let best = null, least = Infinity;
    for (const rect of rects) {
      const [u, v] = centre(rect), ahead = (u - x) * dx + (v - y) * dy, aside = Math.abs((u - x) * dy) + Math.abs((v - y) * dx);
      if (ahead > 1e-6 && ahead + 2 * aside < least) { best = rect; least = ahead + 2 * aside; }
    }
    return best;
  }

  function set(next) {
    const last = cursor, cell = last && last.table.cell(last.i, last.j);
    if (last) last.table.mark(false);
    cursor = next;
    if (isPart) parent.postMessage({ lens: { position: cursor && cursor.table.row.positions[cursor.j] } }, "*");
    if (cell) last.table.touch(cell, last.i, last.j);
    if (!cursor) { tip.style.display = "none"; return; }
    cursor.table.mark(true);
    const now = cursor.table.cell(cursor.i, cursor.j);
    if (now) cursor.table.touch(now, cursor.i, cursor.j);
    describe();
  }

  function point(table, i, j, anchor) { if (!pinned) set({ table, i, j, anchor }); }
  function leave() { if (!pinned) set(null); }
  function move(table, i, j, anchor) { set({ table, i, j, anchor }); }
  function pin(table, i, j, anchor) {
    const same = pinned && cursor && cursor.table === table && cursor.i === i && cursor.j === j;
    pinned = !same;
    set({ table, i, j, anchor });
  }

  function describe() {
    const { table, i, j } = cursor, { row } = table;
    tip.replaceChildren();
    tip.classList.toggle("pin", pinned);
    const where = (i < 0 ? "" : `layer ${D.layers[i]}, `) + `position ${row.positions[j]} `;
    const title = element("div", "", where, tip);
    element("b", "", quoted(row.labels[j]), title);
    const top = element("div", "top", undefined, tip), at = Math.max(i, 0) * table.n + j;
    for (let k = 0; k < table.k; k++) {
      const prob = table.probs[at * table.k + k] / 65535;
      element("span", "", visible(D.words[table.words[at * table.k + k]]), top);
      element("i", "", undefined, top).style.width = `${Math.round(90 * prob)}px`;
      element("span", "n", `${(100 * prob).toFixed(1)} %`, top);
    }
    const value = (name) => number((table.values[name][at] / 65535) * D.shades[name].peak);
    const last = i < 0 ? `what layer ${D.layers[0]} says; ` : "";
    element("div", "mute", `${last}entropy ${value("entropy")} nats, KL to the final layer ${value("kl")} nats`, tip);
    row.targets[j].forEach((word, t) => {
      const rank = table.ranks[at * row.targets[j].length + t];
      element("div", "mute", `rank of “${visible(D.words[word])}”: ${rank}`, tip);
    });
    if (pinned) element("div", "mute", "pinned; Escape lets go", tip);
    tip.style.display = "block";
    place();
  }

  function place() {
    const { table, i, j, anchor } = cursor;
    const thing = anchor && anchor.isConnected ? anchor : table.cell(i, j);
    const space = table.box.getBoundingClientRect();
    const r = thing ? thing.getBoundingClientRect() : space;
    const w = tip.offsetWidth, h = tip.offsetHeight;
    const below = r.bottom + 8 + h <= innerHeight;
    tip.style.left = `${Math.max(4, Math.min(r.left + 12, innerWidth - w - 8))}px`;
    tip.style.top = `${Math.max(4, Math.min(below ? r.bottom + 8 : r.top - h - 8, innerHeight - h - 4))}px`;
  }

  // Search: labels of the prompt and what layers predict, among their most probable tokens.
  let found = [], turn = -1, waiting = 0;
  function search() {
    const text = $("search").value.toLowerCase();
    found = [];
    turn = -1;
    let labels = 0;
    const fits = new Uint8Array(D.words.length);
    if (text) D.words.forEach((word, w) => { fits[w] = word.toLowerCase().includes(text) || short[w].toLowerCase().includes(text); });
    for (const table of tables) {
      table.hits = text ? new Uint8Array((table.layers + 1) * table.n) : null;
      for (const [j, rects] of table.patches) for (const rect of rects) rect.classList.remove("hit");
      for (let j = 0; text && j < table.n; j++) {
        if (table.row.labels[j].toLowerCase().includes(text)) { table.hits[j] = 1; labels++; found.push([table, -1, j]); }
        let any = table.hits[j];
        for (let i = 0; i < table.layers; i++) {
          const at = (i * table.n + j) * table.k;
          for (let k = 0; k < table.k; k++) {
            if (!fits[table.words[at + k]]) continue;
            table.hits[(i + 1) * table.n + j] = any = k ? 2 : 1; // 2: among the others of the most probable
            found.push([table, i, j]);
            break;
          }
        }
        if (any) for (const rect of table.patches.get(j) || []) rect.classList.add("hit");
      }
      table.draw(true);
    }
    const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
    $("found").textContent = text ? `${plural(labels, "label")}, ${plural(found.length - labels, "cell")}` : "";
    if (found.length) go(1);
  }
  function go(step) {
    clearTimeout(waiting);
    if (!found.length) return;
    turn = (turn + step + found.length) % found.length;
    const [table, i, j] = found[turn];
    pinned = false;
    table.show(i, j);
    table.section.querySelector(".lens").scrollIntoView({ block: "nearest" });
    move(table, i, j);
  }
  $("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 120); });
  $("search").addEventListener("keydown", (e) => {
    if (e.key !== "Enter") return;
    e.preventDefault();
    go(e.shiftKey ? -1 : 1);
  });
  $("next").addEventListener("click", () => go(1));
  $("previous").addEventListener("click", () => go(-1));

  function repaint() {
    const colours = paint(), { peak, unit, low } = D.shades[shade];
    $("ramp").style.background = `linear-gradient(90deg,${colours.map((c) => c.ground).join(",")})`;
    $("low").textContent = low;
    $("high").textContent = unit === "%" ? "100 %" : `${number(peak)} ${unit}`;
    for (const table of tables) table.draw(true);
  }
  for (const choice of document.querySelectorAll("input[name=shade]")) {
    choice.addEventListener("change", () => { shade = choice.value; repaint(); });
  }
  system.addEventListener("change", repaint);
  addEventListener("message", (e) => {
    if (!isPart || e.source !== parent || !e.data?.lens) return;
    const { theme: wanted, position, pin: fix } = e.data.lens;
    if (wanted) { root.dataset.theme = wanted; repaint(); }
    if (position === null) leave();
    const table = tables.find((each) => each.column.has(position));
    if (!table || (pinned && !fix)) return;
    const j = table.column.get(position);
    table.show(-1, j);
    (fix ? pin : point)(table, -1, j);
  });
  addEventListener("scroll", () => { if (cursor) place(); }, { passive: true });
  addEventListener("keydown", (e) => {
    const typing = e.target === $("search");
    if (e.key === "Escape") { pinned = false; set(null); }
    if (e.key === "/" && !typing) { e.preventDefault(); $("search").focus(); }
  });

  document.querySelectorAll("section[data-row]").forEach((section, number) => {
    tables.push(new Table(section, { ...D.rows[+section.dataset.row], number }));
  });
  repaint();
})();
