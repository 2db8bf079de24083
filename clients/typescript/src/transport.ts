/** gRPC over HTTP/2 by connect-node, with windows as wide as tensors want them. */
import { randomUUID } from "node:crypto";
import type { ClientHttp2Session, ClientHttp2Stream, SecureClientSessionOptions } from "node:http2";
import type { Interceptor, Transport } from "@connectrpc/connect";
import { createGrpcTransport, Http2SessionManager } from "@connectrpc/connect-node";
import { InvalidInputError } from "./errors.js";

/** Bytes that may be under way, on a stream and on the whole connection; Node's default of 64 KB waits for the network. */
const WINDOW = 16 << 20;

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

/** A connection to one server. */
export interface Connection {
  readonly transport: Transport;
  close(): void;
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

/** A connection; it is opened with the first call. */
export function openConnection(address: string, token: string | undefined, tls: boolean | Tls | undefined): Connection {
  if (token !== undefined && tls === undefined && !isLoopback(address)) {
    throw new InvalidInputError(`the token would go to ${address} in plain text; pass tls: true or, if the network is trusted, tls: false.`, {
      field: "tls",
    });
  }
  const baseUrl = `${tls ? "https" : "http"}://${address}`;
  const { serverName: servername, ...certificates }: Tls = typeof tls === "object" ? tls : {};
  const named = servername === undefined ? {} : { servername };
  const nodeOptions = { settings: { initialWindowSize: WINDOW }, ...certificates, ...named } as SecureClientSessionOptions;
  const sessionManager = new WideSessions(baseUrl, undefined, nodeOptions);
  const client = randomUUID().replaceAll("-", "");
  const headers: Interceptor = (next) => (request) => {
    request.header.set("x-vlm-spectra-client", client);
    if (token !== undefined) {
      request.header.set("authorization", `Bearer ${token}`);
    }
    return next(request);
  };
  const transport = createGrpcTransport({ baseUrl, sessionManager, interceptors: [headers] });
  return { transport, close: () => sessionManager.abort() };
}

function isLoopback(address: string): boolean {
  const host = address.replace(/:\d+$/, "");
  return host === "localhost" || host === "[::1]" || host.startsWith("127.");
}
