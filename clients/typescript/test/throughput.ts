/**
 * The stream of a capture against plain connect-node streaming of the same bytes: `npm run bench`.
 *
 * A server in a process of its own plays 172 MB of residuals, made once; both readers take it in turns.
 */
import { fork } from "node:child_process";
import { createServer } from "node:http2";
import type { AddressInfo } from "node:net";
import { fileURLToPath } from "node:url";
import { create, toBinary } from "@bufbuild/protobuf";
import { createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { crc32c } from "@node-rs/crc32";
import { RunWithCacheResponseSchema, SpectraService } from "../src/gen/vlm_spectra/v1/spectra_service_pb.js";
import { Dtype } from "../src/gen/vlm_spectra/v1/tensor_pb.js";
import { TensorStream } from "../src/stream.js";
import { openConnection } from "../src/transport.js";

const LAYERS = 28;
const SHAPE = [1, 1000, 1536];
const SIZE = 4 * 1000 * 1536;
const CHUNK = 1 << 20;
const ROUNDS = 7;

function framed(event: Parameters<typeof create<typeof RunWithCacheResponseSchema>>[1]): Buffer {
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
  server.on("stream", async (stream) => {
    stream.on("error", () => undefined);
    stream.respond({ ":status": 200, "content-type": "application/grpc+proto" }, { waitForTrailers: true });
    stream.on("wantTrailers", () => stream.sendTrailers({ "grpc-status": "0" }));
    for (const part of parts) {
      if (!stream.write(part)) {
        await new Promise((resolve) => stream.once("drain", resolve));
      }
    }
    stream.end();
  });
  server.listen(0, "127.0.0.1", () => process.send?.((server.address() as AddressInfo).port));
}

async function measure(): Promise<void> {
  const server = fork(fileURLToPath(import.meta.url), ["serve"]);
  const port = await new Promise<number>((resolve) => server.once("message", (message) => resolve(message as number)));
  const address = `127.0.0.1:${port}`;
  const ours = openConnection(address, undefined, false);
  const start = { case: "run", value: {} } as const;

  const plain = createClient(SpectraService, createGrpcTransport({ baseUrl: `http://${address}` }));
  const tuned = createClient(SpectraService, ours.transport);
  const count = async (client: typeof plain): Promise<number> => {
    let bytes = 0;
    for await (const { event } of client.runWithCache({ start })) {
      bytes += event.case === "chunk" ? event.value.data.length : 0;
    }
    return bytes;
  };
  const ways: Record<string, () => Promise<number>> = {
    "plain connect-node": () => count(plain),
    "plain, our windows": () => count(tuned),
    "the client": async () => {
      const stream = new TensorStream({ address, open: (signal) => tuned.runWithCache({ start }, { signal }) });
      await stream.done();
      let bytes = 0;
      for (const name of stream.names) {
        bytes += (await stream.get(name))!.bytes.length;
      }
      return bytes;
    },
  };
  const speeds = new Map(Object.keys(ways).map((name) => [name, [] as number[]]));
  for (let round = 0; round < ROUNDS; round++) {
    for (const [name, way] of Object.entries(ways)) {
      const begun = performance.now();
      const bytes = await way();
      if (bytes !== LAYERS * SIZE) {
        throw new Error(`${name} got ${bytes} bytes`);
      }
      speeds.get(name)!.push(bytes / 1e3 / (performance.now() - begun));
    }
  }
  const medians = [...speeds].map(([name, found]): [string, number] => [name, found.sort((a, b) => a - b)[ROUNDS >> 1]!]);
  for (const [name, speed] of medians) {
    console.log(`${name}: ${speed.toFixed(0)} MB/s (median of ${ROUNDS}), ${(speed / medians[0]![1]).toFixed(2)}x`);
  }
  ours.close();
  server.kill();
  process.exit();
}

if (process.argv[2] === "serve") {
  serve();
} else {
  await measure();
}
