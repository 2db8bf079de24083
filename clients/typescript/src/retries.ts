/** Trying again: what a server refused for now, and nothing that has begun to answer. */
import { BusyError, type SpectraError, UnavailableError, WorkerDiedError } from "./errors.js";

/** Seconds between two attempts at most. */
const LONGEST = 30;

/** Waits so many seconds; less long where the signal says so. */
export function pause(seconds: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const timer = setTimeout(end, 1000 * seconds);
    function end(): void {
      clearTimeout(timer);
      signal?.removeEventListener("abort", end);
      resolve();
    }
    if (signal?.aborted === true) {
      end();
    } else {
      signal?.addEventListener("abort", end);
    }
  });
}

/** A controller of one's own that a caller's signal aborts too; the signal does not hold it once it is aborted. */
export function following(signal: AbortSignal | undefined): AbortController {
  const controller = new AbortController();
  if (signal?.aborted === true) {
    controller.abort();
  }
  signal?.addEventListener("abort", () => controller.abort(), { once: true, signal: controller.signal });
  return controller;
}

/** The attempts of one call. */
export class Retries {
  private tried = 0;
  private deaths = 0;
  private readonly end: number;

  /**
   * @param number How often the call may be tried again.
   * @param timeout Seconds that all attempts may take together; no limit where absent.
   */
  constructor(
    private readonly number: number,
    timeout: number | undefined,
    private readonly signal: AbortSignal | undefined,
  ) {
    this.end = timeout === undefined ? Infinity : performance.now() + 1000 * timeout;
  }

  /** Seconds that are left of the timeout, for the next attempt; undefined for no limit. */
  get left(): number | undefined {
    return this.end === Infinity ? undefined : Math.max(this.end - performance.now(), 1) / 1000;
  }

  /**
   * Waits until trying again makes sense; false where it does not, at once. It does where the server said when
   * (`RetryInfo`): it is busy, or replaces a worker. A request whose worker died may have killed it: it is tried again
   * once, or it would kill one worker after the other, for everybody.
   */
  async wait(error: SpectraError): Promise<boolean> {
    const passing = error instanceof BusyError || error instanceof UnavailableError;
    if (!passing || error.retryAfter === undefined || this.tried >= this.number) {
      return false;
    }
    this.deaths += error instanceof WorkerDiedError ? 1 : 0;
    if (this.deaths > 1) {
      return false;
    }
    const seconds = Math.min(error.retryAfter * 1.5 ** this.tried, LONGEST) * (0.75 + Math.random() / 2);
    if (performance.now() + 1000 * seconds > this.end) {
      return false;
    }
    this.tried++;
    await pause(seconds, this.signal);
    return true;
  }
}
