/** What differs between Node and browsers: how calls travel, and what the platform lends for it. */
import type { Interceptor, Transport } from "@connectrpc/connect";
import type { Places } from "./direct.js";
import { InvalidInputError } from "./errors.js";

/** A connection to one server. */
export interface Connection {
  /** The server's address, for messages. */
  readonly address: string;
  /** How calls travel. */
  readonly transport: Transport;
  /** The transport of one streaming call; where the platform can, the bytes of tensors go straight to their places. */
  streaming(places: Places): Transport;
  /** The CRC-32C of some bytes, going on from that of the bytes before them. */
  crc32c(data: Uint8Array, before?: number): number;
  /** The SHA-256 in hexadecimal. */
  sha256(data: Uint8Array): string;
  /** The bytes of an image that is named: a path in Node, an address in a browser. */
  readImage(name: string): Promise<Uint8Array>;
  close(): void;
}

/** The headers of every call: a name for this client, and its token. */
export function callerHeaders(token: string): Interceptor {
  if (!/^[!-~]*$/.test(token)) {
    throw new InvalidInputError("a token is printable ASCII without spaces.", { field: "token" });
  }
  const client = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  return (next) => (request) => {
    request.header.set("x-vlm-spectra-client", client);
    if (token !== "") {
      request.header.set("authorization", `Bearer ${token}`);
    }
    return next(request);
  };
}
