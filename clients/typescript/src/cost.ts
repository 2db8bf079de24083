/** What a call took: seconds by phase, and memory. */
import type { Header, Summary } from "./gen/vlm_spectra/v1/stream_pb.js";

/** What a call took on the server, as the summary at the end of its stream says. Times are in seconds. */
export class Cost {
  /** The server's name for the request; it stands in the server's log. */
  readonly requestId: string;
  /** Waiting for a turn. */
  readonly queue: number;
  /** Turning text and images into tensors. */
  readonly prepare: number;
  /** The model and the analysis. */
  readonly compute: number;
  /** Copying tensors from the device into the memory they are sent from; on a GPU beside the computation. */
  readonly copy: number;
  /** Handing messages to the connection: a slow network or reader shows here. */
  readonly wire: number;
  /** From the start of the computation to the first chunk of a tensor; 0 where there was none. */
  readonly firstChunk: number;
  /** From the request's arrival to the summary. */
  readonly total: number;
  /** Bytes of tensors, before compression. */
  readonly bytes: number;
  /** Peak memory of the device, in bytes; on a CPU that of the model's process. 0 where unknown. */
  readonly peakMemory: number;
  /** Decoder layers that ran in the last forward pass. */
  readonly layersRun: number;

  constructor(header: Header | undefined, summary: Summary | undefined) {
    const timings = summary?.timings;
    this.requestId = header?.requestId ?? "";
    this.queue = timings?.queue ?? 0;
    this.prepare = timings?.prepare ?? 0;
    this.compute = timings?.compute ?? 0;
    this.copy = timings?.copy ?? 0;
    this.wire = timings?.wire ?? 0;
    this.firstChunk = timings?.firstChunk ?? 0;
    this.total = timings?.total ?? 0;
    this.bytes = Number(summary?.byteCount ?? 0);
    this.peakMemory = Number(summary?.peakMemory ?? 0);
    this.layersRun = summary?.layersRun ?? 0;
  }

  toString(): string {
    const phases = ["queue", "prepare", "compute", "copy", "wire"] as const;
    const times = phases.map((phase) => `${phase} ${this[phase].toFixed(3)} s`).join(", ");
    const peak = this.peakMemory > 0 ? `, peak ${(this.peakMemory / 1e6).toFixed(0)} MB` : "";
    return `${this.total.toFixed(3)} s (${times}), ${(this.bytes / 1e6).toFixed(1)} MB${peak}`;
  }
}
