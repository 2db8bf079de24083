/** A page in the style of a notebook: cells of code that look inside a model, over the browser's client. */
import * as vs from "@vlm-spectra/client/web";
import { cross, figure, heat, pictured, table } from "./drawing.js";

type Shown = string | Node;
type CodeMaker = new (...source: string[]) => (...values: unknown[]) => Promise<unknown>;

/** Declarations at the beginning of a line: what they declare, and the form that needs brackets without its first word. */
const DECLARED = /^(?:const|let|var)\s+([^=]+)=/gm;
const UNPACKED = /^(?:const|let|var)\s+(\{[^}]*\}\s*=[^;]*);/gm;
const FIRST_WORD = /^(?:const|let|var)\s+(?=[\w$[])/gm;
const AsyncFunction = (async () => Promise.resolve()).constructor as CodeMaker;

function byId<T extends HTMLElement>(id: string, kind: new () => T): T {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) {
    throw new Error(`the page has no ${id}`);
  }
  return found;
}

function element<K extends keyof HTMLElementTagNameMap>(name: K, className: string, ...children: Shown[]): HTMLElementTagNameMap[K] {
  const made = document.createElement(name);
  made.className = className;
  made.append(...children);
  return made;
}

const server = byId("server", HTMLInputElement);
const token = byId("token", HTMLInputElement);
const stop = byId("stop", HTMLButtonElement);

/** What cells declare, over what the page gives them. */
const shared: Record<string, unknown> = { vs, cross, figure, heat, pictured, table };
const scope = new Proxy(shared, {
  has: (names, key) => typeof key === "string" && key in names,
});

/** A cell: its code, and what that showed. */
class Cell {
  private readonly output = element("div", "output");
  private readonly button = element("button", "", "Run");
  private readonly frame: HTMLElement;

  constructor(private readonly code: HTMLTextAreaElement) {
    this.frame = element("section", "cell");
    code.replaceWith(this.frame);
    this.output.setAttribute("aria-live", "polite");
    this.button.type = "button";
    this.frame.append(element("div", "editor", this.button, code), this.output);
    code.value = code.value.trim();
    code.spellcheck = false;
    code.rows = code.value.split("\n").length;
    code.addEventListener("input", () => (code.rows = code.value.split("\n").length));
    code.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.shiftKey || event.ctrlKey)) {
        event.preventDefault();
        void run([this]);
      }
    });
    this.button.addEventListener("click", () => void run([this]));
  }

  set waiting(waiting: boolean) {
    this.button.disabled = waiting;
  }

  /** Runs the code; whether it came to its end. */
  async run(signal: AbortSignal): Promise<boolean> {
    this.output.replaceChildren();
    this.frame.dataset["state"] = "running";
    let line: HTMLPreElement | undefined;
    const write = (text: string): void => {
      line ??= this.output.appendChild(element("pre", ""));
      line.append(text);
    };
    const show = (...things: Shown[]): void => {
      line = undefined;
      for (const thing of things) {
        this.output.append(typeof thing === "string" ? element("pre", "", thing) : thing);
      }
    };
    try {
      const given = { show, write, signal, server: server.value, token: token.value };
      await compiled(this.code.value, Object.keys(given))(scope, ...Object.values(given));
      this.frame.dataset["state"] = "done";
      return true;
    } catch (error) {
      const reason = error instanceof vs.SpectraError ? error.reason : error instanceof Error ? error.name : "Error";
      this.output.append(element("pre", "wrong", `${reason}: ${error instanceof Error ? error.message : String(error)}`));
      this.frame.dataset["state"] = "failed";
      return false;
    }
  }
}

/** A cell's code as a function; what it declares at the beginning of a line becomes everybody's. */
function compiled(code: string, given: readonly string[]): InstanceType<CodeMaker> {
  for (const [, declared] of code.matchAll(DECLARED)) {
    for (const [name] of declared.matchAll(/[\w$]+/g)) {
      shared[name] ??= undefined;
    }
  }
  const source = code.replaceAll(UNPACKED, ";($1);").replaceAll(FIRST_WORD, ";");
  return new AsyncFunction("scope", ...given, `with (scope) {\n${source}\n}`);
}

const cells = [...document.querySelectorAll<HTMLTextAreaElement>("textarea.code")].map((code) => new Cell(code));
let stopping: AbortController | undefined;

/** Runs some cells one after the other, up to one that fails. */
async function run(chosen: readonly Cell[]): Promise<void> {
  if (stopping !== undefined) {
    return;
  }
  stopping = new AbortController();
  const main = document.body;
  main.dataset["state"] = "running";
  stop.disabled = false;
  cells.forEach((cell) => (cell.waiting = true));
  let well = true;
  for (const cell of chosen) {
    well = well && (await cell.run(stopping.signal));
  }
  cells.forEach((cell) => (cell.waiting = false));
  stop.disabled = true;
  stopping = undefined;
  main.dataset["state"] = well ? "done" : "failed";
}

const asked = new URLSearchParams(location.search).get("server");
server.value = asked ?? location.origin;
byId("bar", HTMLFormElement).addEventListener("submit", (event) => {
  event.preventDefault();
  void run(cells);
});
stop.addEventListener("click", () => stopping?.abort());
if (asked !== null) {
  void run(cells);
}
