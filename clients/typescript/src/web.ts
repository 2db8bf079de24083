/**
 * Look inside a vision-language model from a browser: the same library over `fetch`, by the Connect protocol or gRPC-Web,
 * which the web app of a VLM Spectra server speaks at its own address.
 */
import { createConnectTransport, createGrpcWebTransport } from "@connectrpc/connect-web";
import { sha256 } from "@noble/hashes/sha2.js";
import { bytesToHex } from "@noble/hashes/utils.js";
import crc from "crc-32/crc32c.js";
import { type CommonConnectOptions, connectOver, type RemoteVLM } from "./client.js";
import { unchanged } from "./checksum.js";
import { callerHeaders, type Connection } from "./connection.js";
import { InvalidImageError, InvalidInputError } from "./errors.js";
import { callable, check, type Kinds, oneOf, OPTIONS, text } from "./options.js";

export * from "./api.js";

/** How to reach a server, from a browser. */
export interface ConnectOptions extends CommonConnectOptions {
  /** The bearer token that the server asks for. It goes in plain text where the address begins with `http:`. */
  token?: string;
  /** "connect" where absent. */
  protocol?: "connect" | "grpc-web";
  /** Stands in for the browser's own. */
  fetch?: typeof globalThis.fetch;
}

const CONNECT: Kinds<ConnectOptions> = { ...OPTIONS.connect, token: text, protocol: oneOf("connect", "grpc-web"), fetch: callable };

/**
 * Connects to a server's model, by the address of its web app: `https://gpu-box:8080`. A page of another origin needs the
 * server's leave (`--cors-origin`).
 */
export async function connect(url: string | URL, options: ConnectOptions = {}): Promise<RemoteVLM> {
  check("connect", options, CONNECT);
  return connectOver(openConnection(String(url), options), options);
}

/** A connection; the browser opens and closes what lies under it. */
export function openConnection(url: string, { token = "", protocol = "connect", fetch = globalThis.fetch }: ConnectOptions = {}): Connection {
  if (!/^https?:\/\/[^/]+/.test(url) || !URL.canParse(url)) {
    throw new InvalidInputError(`an address is that of the server's web app, http://host:port, not '${url}'.`, { field: "address" });
  }
  const closing = new AbortController();
  const crc32c = (data: Uint8Array, before = 0): number => crc.buf(data, before) >>> 0;
  const options = {
    baseUrl: url.replace(/\/+$/, ""),
    useBinaryFormat: true,
    interceptors: [callerHeaders(token), unchanged(crc32c)],
    fetch: (input: Parameters<typeof fetch>[0], init: RequestInit = {}) => {
      const signals = init.signal ? [closing.signal, init.signal] : [closing.signal];
      return fetch(input, { ...init, signal: AbortSignal.any(signals) });
    },
  };
  const transport = protocol === "grpc-web" ? createGrpcWebTransport(options) : createConnectTransport(options);
  return {
    address: options.baseUrl,
    transport,
    streaming: () => transport,
    crc32c,
    sha256: (data) => bytesToHex(sha256(data)),
    readImage: async (address) => {
      const response = await fetch(address);
      if (!response.ok) {
        throw new InvalidImageError(`${address} cannot be read: ${response.status} ${response.statusText}.`, { field: "image" });
      }
      return new Uint8Array(await response.arrayBuffer());
    },
    close: () => {
      closing.abort();
    },
  };
}
