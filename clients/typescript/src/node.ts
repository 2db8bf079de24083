/** Node's way to a server: gRPC over HTTP/2 by connect-node, with windows as wide as tensors want them. */
import { createHash } from "node:crypto";
import { readFile } from "node:fs/promises";
import type { ClientHttp2Session, ClientHttp2Stream, SecureClientSessionOptions } from "node:http2";
import { finished } from "node:stream";
import { Code, ConnectError } from "@connectrpc/connect";
import type { CommonTransportOptions } from "@connectrpc/connect/protocol";
import { createTransport } from "@connectrpc/connect/protocol-grpc";
import { createNodeHttpClient, Http2SessionManager } from "@connectrpc/connect-node";
import { crc32c } from "@node-rs/crc32";
import { type CommonConnectOptions, connectOver, type RemoteVLM } from "./client.js";
import { unchanged } from "./checksum.js";
import { callerHeaders, type Connection } from "./connection.js";
import { Filler } from "./direct.js";
import { InvalidInputError } from "./errors.js";
import { check, flag, type Kinds, object, OPTIONS, seconds, text } from "./options.js";

/** Bytes that may be under way, on a stream and on the whole connection; Node's default of 64 KB waits for the network. */
const WINDOW = 16 << 20;
/** Bytes of a frame at most, where the server makes use of it; there is work to do for each. */
const FRAME = 1 << 20;
/** Bytes of a message at most, either way: what the wire's format can say. */
const MESSAGE_BYTES = 0xffffffff;
const KEEP_ALIVE_SECONDS = 20;

/** Certificates, in PEM. */
export interface Tls {
  /** Whom to trust instead of the system's authorities. */
  ca?: string | Uint8Array;
  /** The client's own certificate, where the server asks for one. */
  cert?: string | Uint8Array;
  /** Its key. */
  key?: string | Uint8Array;
  /** The name that the server's certificate must hold, where the address is another (behind a tunnel). */
  serverName?: string;
}

/** How a connection finds out that the other side is gone. */
export interface KeepAlive {
  /** Seconds without a sign of life after which a call's connection is asked for one; 20 where absent, 0 for never. */
  interval?: number;
  /** Seconds that the answer may take before the connection counts as lost; 20 where absent. */
  timeout?: number;
  /** Ask while no call runs, too; without it an idle connection is looked at when the next call comes. */
  idle?: boolean;
}

/** How to reach a server, from Node. */
export interface ConnectOptions extends CommonConnectOptions {
  /** The bearer token that the server asks for; the environment's `VLM_SPECTRA_TOKEN` where absent. */
  token?: string;
  /** Whether to speak TLS, or with which certificates. A token goes in plain text to other machines only with `false`. */
  tls?: boolean | Tls;
  keepAlive?: KeepAlive;
}

const PEM = { possible: "the text of a PEM file", holds: (value: unknown) => typeof value === "string" || value instanceof Uint8Array };
const TLS: Kinds<Tls> = { ca: PEM, cert: PEM, key: PEM, serverName: text };
const KEEP_ALIVE: Kinds<KeepAlive> = {
  interval: { ...seconds, possible: "seconds from 0", holds: (value) => value === 0 || seconds.holds(value) },
  timeout: seconds,
  idle: flag,
};
const CONNECT: Kinds<ConnectOptions> = {
  ...OPTIONS.connect,
  token: text,
  tls: { possible: "true, false, or { ca, cert, key, serverName }", holds: (value) => flag.holds(value) || object.holds(value) },
  keepAlive: object,
};

/** Connects to a server's model, by `host:port`. */
export async function connect(address: string, options: ConnectOptions = {}): Promise<RemoteVLM> {
  check("connect", options, CONNECT);
  return connectOver(openConnection(address, options), options);
}

/** Connections whose whole window is wide, not only that of each stream. */
class WideSessions extends Http2SessionManager {
  private readonly widened = new WeakSet<ClientHttp2Session>();

  override async request(...call: Parameters<Http2SessionManager["request"]>): Promise<ClientHttp2Stream> {
    const stream = await super.request(...call);
    const session = stream.session as ClientHttp2Session | undefined;
    if (session !== undefined && !this.widened.has(session)) {
      this.widened.add(session);
      session.setLocalWindowSize(WINDOW);
    }
    return stream;
  }
}

type Sessions = Pick<Http2SessionManager, "authority" | "request" | "notifyResponseByteRead">;

/** The same connections, for one call: its responses' chunks go to their places, and the rest is what can be read of them. */
function filling(sessions: Sessions, filler: Filler): Sessions {
  return {
    authority: sessions.authority,
    notifyResponseByteRead: (stream) => sessions.notifyResponseByteRead(stream),
    request: async (...call) => {
      const stream = await sessions.request(...call);
      const alive = (): void => sessions.notifyResponseByteRead(stream);
      return Object.assign(stream, { [Symbol.asyncIterator]: () => handedOn(stream, filler, alive) });
    },
  };
}

/** What a filler hands on of a stream. The stream flows as long as that is nothing, without a promise for each piece. */
async function* handedOn(stream: ClientHttp2Stream, filler: Filler, alive: () => void): AsyncGenerator<Uint8Array, undefined, undefined> {
  let wake: (parts?: readonly [Uint8Array, Iterable<Uint8Array>]) => void = () => undefined;
  let ended = false as boolean; // these change while this function waits
  let failure = undefined as Error | undefined;
  let told = 0;
  const end = (error?: Error | null): void => {
    [ended, failure] = [true, failure ?? error ?? undefined];
    wake();
  };
  finished(stream, { writable: false }, end);
  stream.on("data", (piece: Uint8Array) => {
    if (performance.now() - told > 1000) {
      told = performance.now();
      alive();
    }
    try {
      const behind = filler.parts(piece);
      const first = behind.next();
      if (first.done !== true) {
        stream.pause();
        wake([first.value, behind]);
      }
    } catch (error) {
      stream.pause();
      end(ConnectError.from(error));
    }
  });
  for (;;) {
    const parts = await new Promise<readonly [Uint8Array, Iterable<Uint8Array>] | undefined>((resolve) => {
      wake = resolve;
      if (ended) {
        resolve(undefined);
      } else {
        stream.resume();
      }
    });
    if (parts !== undefined) {
      yield parts[0];
      yield* parts[1];
    } else if (failure === undefined) {
      filler.end();
      return;
    } else {
      throw ConnectError.from(failure, Code.Unavailable);
    }
  }
}

/** A connection; it is opened with the first call. */
export function openConnection(address: string, options: ConnectOptions = {}): Connection {
  if (!/^[^/\s]+:\d+$/.test(address) || !URL.canParse(`http://${address}`)) {
    throw new InvalidInputError(`an address is host:port, not '${address}'.`, { field: "address" });
  }
  const { tls, token = process.env["VLM_SPECTRA_TOKEN"] ?? "" } = options;
  if (token !== "" && tls === undefined && !isLoopback(address)) {
    throw new InvalidInputError(`the token would go to ${address} in plain text; pass tls: true or, if the network is trusted, tls: false.`, {
      field: "tls",
    });
  }
  const baseUrl = `${tls === undefined || tls === false ? "http" : "https"}://${address}`;
  const sessions = new WideSessions(baseUrl, pings(options.keepAlive ?? {}), {
    settings: { initialWindowSize: WINDOW, maxFrameSize: FRAME },
    ...certificates(typeof tls === "object" ? tls : {}),
  });
  const over = (manager: Sessions) => createNodeHttpClient({ httpVersion: "2", sessionProvider: () => manager });
  const common: CommonTransportOptions = {
    baseUrl,
    httpClient: over(sessions),
    interceptors: [callerHeaders(token), unchanged(crc32c)],
    useBinaryFormat: true,
    acceptCompression: [],
    sendCompression: null,
    compressMinBytes: MESSAGE_BYTES,
    readMaxBytes: MESSAGE_BYTES,
    writeMaxBytes: MESSAGE_BYTES,
  };
  return {
    address,
    transport: createTransport(common),
    streaming: (places) => createTransport({ ...common, httpClient: over(filling(sessions, new Filler(places, crc32c))) }),
    crc32c,
    sha256: (data) => createHash("sha256").update(data).digest("hex"),
    readImage: readFile,
    close: () => {
      sessions.abort();
    },
  };
}

function pings(options: KeepAlive): ConstructorParameters<typeof Http2SessionManager>[1] {
  check("keepAlive", options, KEEP_ALIVE);
  const { interval = KEEP_ALIVE_SECONDS, timeout = KEEP_ALIVE_SECONDS, idle = false } = options;
  return interval === 0 ? undefined : { pingIntervalMs: 1000 * interval, pingTimeoutMs: 1000 * timeout, pingIdleConnection: idle };
}

function certificates(options: Tls): SecureClientSessionOptions {
  check("tls", options, TLS);
  const { ca, cert, key, serverName } = options;
  if ((cert === undefined) !== (key === undefined)) {
    throw new InvalidInputError("a client's certificate needs its key, and the key its certificate.", { field: "tls" });
  }
  const pem = (data: string | Uint8Array) => (typeof data === "string" ? data : Buffer.from(data));
  return {
    ...(ca === undefined ? {} : { ca: pem(ca) }),
    ...(cert === undefined ? {} : { cert: pem(cert) }),
    ...(key === undefined ? {} : { key: pem(key) }),
    ...(serverName === undefined ? {} : { servername: serverName }),
  };
}

function isLoopback(address: string): boolean {
  const host = address.replace(/:\d+$/, "");
  return host === "localhost" || host === "[::1]" || /^127(\.\d{1,3}){3}$/.test(host);
}
