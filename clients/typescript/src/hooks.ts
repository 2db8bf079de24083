/** Hook points: the names under which activations are captured and changed. */
import { dtypeFromWire, type DtypeName } from "./dtypes.js";
import { InvalidInputError, UnknownHookError } from "./errors.js";
import type { HookSpec as HookSpecMessage } from "./gen/vlm_spectra/v1/model_service_pb.js";

/** What ends the name of a gradient. */
export const GRADIENT = "_grad";

/** A name or wildcard, a list of them, or a predicate on full names. */
export type HookFilter = string | readonly string[] | ((name: string) => boolean);

/** A hook point. */
export interface HookSpec {
  /** Its name, `{layer}` in the place of the layer. */
  readonly name: string;
  /** Its axes by name. */
  readonly shape: readonly string[];
  readonly dtype: DtypeName;
  readonly description: string;
  /** The layers that have it; empty where it is not in a layer. */
  readonly layers: readonly number[];
  /** It can be changed but not captured. */
  readonly interveneOnly: boolean;
}

/** A hook point from its message. */
export function hookFromWire(message: HookSpecMessage): HookSpec {
  const { name, shape, description, layers, interveneOnly } = message;
  return { name, shape, dtype: dtypeFromWire(message.dtype), description, layers, interveneOnly };
}

/** Whether a full name fits a pattern, segment by segment; `*` is any text, `?` any character. */
export function matches(pattern: string, name: string): boolean {
  const ours = pattern.split(".");
  const theirs = name.split(".");
  return ours.length === theirs.length && ours.every((each, i) => expression(each).test(theirs[i]));
}

function expression(segment: string): RegExp {
  const plain = segment.replace(/[.+^${}()|[\]\\]/g, "\\$&");
  return new RegExp(`^${plain.replaceAll("*", ".*").replaceAll("?", ".")}$`, "su");
}

/** The full names of a hook, one a layer. */
function namesOf(spec: HookSpec): string[] {
  return spec.layers.length > 0 ? spec.layers.map((layer) => spec.name.replaceAll("{layer}", String(layer))) : [spec.name];
}

/** All hooks of a model. */
export class Catalogue {
  /** The full names, one a layer. */
  readonly names: readonly string[];
  private readonly known: ReadonlySet<string>;

  constructor(readonly specs: readonly HookSpec[]) {
    this.names = specs.flatMap(namesOf);
    this.known = new Set(this.names);
  }

  /** Whether a name is a hook's, or that of a hook's gradient. */
  has(name: string): boolean {
    return this.known.has(name) || (name.endsWith(GRADIENT) && this.known.has(name.slice(0, -GRADIENT.length)));
  }

  /** The hooks of which some layer fits one of the patterns. */
  matching(patterns: readonly string[]): HookSpec[] {
    return this.specs.filter((spec) => namesOf(spec).some((name) => patterns.some((pattern) => matches(pattern, name))));
  }

  /** A request for hooks as the server takes it; names and wildcards are the server's to judge. */
  patterns(hooks: HookFilter): string[] {
    if (typeof hooks !== "function") {
      const list: readonly unknown[] = Array.isArray(hooks) ? hooks : [hooks];
      if (list.length === 0 || !list.every((each) => typeof each === "string")) {
        throw new InvalidInputError("hooks are a name or wildcard, a list of them that is not empty, or a function of a name.", { field: "hooks" });
      }
      return [...list];
    }
    const closed = new Set(this.specs.filter((spec) => spec.interveneOnly).map((spec) => spec.name.split(".").at(-1)));
    const found = this.names.filter((name) => !closed.has(name.split(".").at(-1)) && hooks(name));
    if (found.length === 0) {
      throw new UnknownHookError("the predicate on hook names is true for none of them.", { field: "hooks" });
    }
    return found;
  }
}
