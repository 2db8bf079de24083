/** The conformance corpus, and a server that plays its streams. */
import { readFileSync } from "node:fs";
import { createServer, type Http2Server, type ServerHttp2Stream } from "node:http2";
import type { AddressInfo } from "node:net";
import { fileURLToPath } from "node:url";
import { fromBinary } from "@bufbuild/protobuf";
import { Code } from "@connectrpc/connect";
import { RunWithCacheRequestSchema } from "../src/gen/vlm_spectra/v1/spectra_service_pb.js";

const FOLDER = new URL("../../../../protos/conformance/", import.meta.url);

export interface Ends {
  code: string;
  message?: string;
  /** A `google.rpc.Status`, encoded, in hexadecimal. */
  details?: string;
}

export interface Case {
  name: string;
  about: string;
  calls: { file: string; ends: Ends; resume?: { capture_id: string; offsets: Record<string, number> } }[];
  tensors: { name: string; dtype: string; shape: number[]; sha256: string; values?: (number | string | boolean)[] }[];
  tokens: [number, number, number, string][];
  error: {
    reason: string;
    message?: string;
    field?: string;
    request_id?: string;
    retry_after?: number;
    metadata?: Record<string, string>;
  } | null;
}

export interface Message {
  name: string;
  hex: string;
  json: object | null;
}

function read(file: string): unknown {
  return JSON.parse(readFileSync(fileURLToPath(new URL(file, FOLDER)), "utf8"));
}

export const cases = read("streams.json") as Case[];
export const messages = read("messages.json") as Message[];

/** A server that answers the calls of a case one after the other, over HTTP/2 as gRPC has it. */
export class Player {
  /** What the client asked to go on with. */
  readonly resumes: { captureId: string; offsets: Record<string, number> }[] = [];
  private readonly server: Http2Server;
  private next = 0;

  constructor(private readonly played: Case) {
    this.server = createServer();
    this.server.on("stream", (stream: ServerHttp2Stream) => this.answer(stream));
  }

  async listen(): Promise<string> {
    await new Promise<void>((resolve) => this.server.listen(0, "127.0.0.1", resolve));
    return `127.0.0.1:${(this.server.address() as AddressInfo).port}`;
  }

  close(): void {
    this.server.close();
  }

  private answer(stream: ServerHttp2Stream): void {
    const parts: Buffer[] = [];
    stream.on("error", () => undefined);
    stream.on("data", (part: Buffer) => parts.push(part));
    stream.on("end", () => {
      const { start } = fromBinary(RunWithCacheRequestSchema, Buffer.concat(parts).subarray(5));
      if (start.case === "resume") {
        const offsets = start.value.offsets.filter((each) => each.offset > 0n);
        this.resumes.push({
          captureId: start.value.captureId,
          offsets: Object.fromEntries(offsets.map((each) => [String(each.index), Number(each.offset)])),
        });
      }
      this.play(stream, this.played.calls[this.next++]);
    });
  }

  private play(stream: ServerHttp2Stream, call: Case["calls"][number]): void {
    const { code, message = "", details } = call.ends;
    stream.respond({ ":status": 200, "content-type": "application/grpc+proto" }, { waitForTrailers: true });
    stream.on("wantTrailers", () => {
      stream.sendTrailers({
        "grpc-status": String(code === "OK" ? 0 : numberOf(code)),
        "grpc-message": encodeURIComponent(message),
        ...(details === undefined
          ? {}
          : { "grpc-status-details-bin": Buffer.from(details, "hex").toString("base64").replace(/=+$/, "") }),
      });
    });
    stream.end(readFileSync(fileURLToPath(new URL(call.file, FOLDER))));
  }
}

function numberOf(code: string): Code {
  const camel = code.toLowerCase().replace(/(^|_)([a-z])/g, (_, __, letter: string) => letter.toUpperCase());
  return Code[camel as keyof typeof Code];
}
