/**
 * The client's capture against plain connect-node streaming of the same bytes: `npm run bench`.
 *
 * A server in a process of its own plays 172 MB of residuals, made once; the ways take turns, and each round begins with
 * another one. What is compared is the median of the rounds.
 */
import { fork } from "node:child_process";
import { createServer } from "node:http2";
import type { AddressInfo } from "node:net";
import { cpus } from "node:os";
import { fileURLToPath } from "node:url";
import { create, type MessageInitShape, toBinary } from "@bufbuild/protobuf";
import { type Client, createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { crc32c } from "@node-rs/crc32";
import { RunWithCacheResponseSchema, SpectraService } from "../src/gen/vlm_spectra/v1/spectra_service_pb.js";
import { Dtype } from "../src/gen/vlm_spectra/v1/tensor_pb.js";
import { openConnection } from "../src/node.js";
import { TensorStream } from "../src/stream.js";

const LAYERS = 28;
const SHAPE = [1, 1000, 1536];
const SIZE = 4 * 1000 * 1536;
const CHUNK = 1 << 20;
const ROUNDS = Number(process.env["ROUNDS"] ?? 9);

function framed(event: MessageInitShape<typeof RunWithCacheResponseSchema>): Buffer {
  const message = toBinary(RunWithCacheResponseSchema, create(RunWithCacheResponseSchema, event));
  const head = Buffer.alloc(5);
  head.writeUInt32BE(message.length, 1);
  return Buffer.concat([head, message]);
}

function serve(): void {
  const data = new Uint8Array(SIZE).map((_, i) => (i * 2654435761) >>> 13);
  const indices = Array.from({ length: LAYERS }, (_, index) => index);
  const tensors = indices.map((index) => ({
    index,
    name: `lm.blocks.${index}.hook_resid_post`,
    dtype: Dtype.FLOAT32,
    shape: SHAPE.map(BigInt),
    byteCount: BigInt(SIZE),
  }));
  const parts = [framed({ event: { case: "header", value: { tensors } } })];
  for (const index of indices) {
    for (let at = 0; at < SIZE; at += CHUNK) {
      const part = data.subarray(at, at + CHUNK);
      parts.push(framed({ event: { case: "chunk", value: { index, offset: BigInt(at), crc32c: crc32c(part), data: part } } }));
    }
  }
  parts.push(framed({ event: { case: "summary", value: {} } }));
  const server = createServer();
  server.on("stream", (stream) => {
    stream.on("error", () => undefined);
    stream.respond({ ":status": 200, "content-type": "application/grpc+proto" }, { waitForTrailers: true });
    stream.on("wantTrailers", () => {
      stream.sendTrailers({ "grpc-status": "0" });
    });
    let next = 0;
    const play = (): void => {
      while (next < parts.length) {
        if (!stream.write(parts[next++])) {
          stream.once("drain", play);
          return;
        }
      }
      stream.end();
    };
    play();
  });
  server.listen(0, "127.0.0.1", () => process.send?.((server.address() as AddressInfo).port));
}

/** Messages as connect-node hands them on, their bytes counted. */
async function counted(client: Client<typeof SpectraService>, kept?: Uint8Array[]): Promise<number> {
  let bytes = 0;
  for await (const { event } of client.runWithCache({ start: { case: "run", value: {} } })) {
    if (event.case === "chunk") {
      bytes += event.value.data.length;
      kept?.push(event.value.data);
    }
  }
  return bytes;
}

function median(values: readonly number[]): number {
  return values.toSorted((a, b) => a - b)[values.length >> 1];
}

async function measure(): Promise<void> {
  const server = fork(fileURLToPath(import.meta.url), ["serve"]);
  const port = await new Promise<number>((resolve) => server.once("message", (message) => { resolve(message as number); }));
  const address = `127.0.0.1:${port}`;
  const connection = openConnection(address);
  const plain = createClient(SpectraService, createGrpcTransport({ baseUrl: `http://${address}` }));
  const wide = createClient(SpectraService, connection.transport);
  const ways: Record<string, () => Promise<number>> = {
    "plain connect-node": () => counted(plain),
    "plain connect-node, our windows": () => counted(wide),
    "plain connect-node, our windows, the messages kept": () => counted(wide, []),
    "the client": async () => {
      const stream = new TensorStream({
        connection,
        open: (call) => createClient(SpectraService, connection.streaming(call.places)).runWithCache({ start: { case: "run", value: {} } }, call),
      });
      await stream.done();
      return stream.names.reduce((sum, name) => sum + (stream.arrived(name) ? stream.byteCount(name) : 0), 0);
    },
  };
  const names = Object.keys(ways);
  const speeds = new Map(names.map((name) => [name, [] as number[]]));
  for (let round = -1; round < ROUNDS; round++) {
    for (const turn of names.keys()) {
      const name = names[(turn + round + 1) % names.length];
      const begun = performance.now();
      const bytes = await ways[name]();
      const speed = bytes / 1e3 / (performance.now() - begun);
      if (bytes !== LAYERS * SIZE) {
        throw new Error(`${name} got ${bytes} bytes`);
      }
      if (round >= 0) {
        speeds.get(name)?.push(speed); // the first round is for the compiler
      }
    }
  }
  const medians = new Map([...speeds].map(([name, found]) => [name, median(found)]));
  console.log(`${(LAYERS * SIZE) / 1e6} MB, ${cpus().length} cores, Node ${process.versions.node}, medians of ${ROUNDS} rounds\n`);
  console.log("| | MB/s | of plain | of plain with our windows | of that with the messages kept |\n|---|---:|---:|---:|---:|");
  for (const [name, speed] of medians) {
    const ratios = names.slice(0, 3).map((other) => (speed / (medians.get(other) ?? NaN)).toFixed(2));
    console.log(`| ${name} | ${speed.toFixed(0)} | ${ratios.join(" | ")} |`);
  }
  connection.close();
  server.kill();
  process.exit();
}

if (process.argv[2] === "serve") {
  serve();
} else {
  await measure();
}
