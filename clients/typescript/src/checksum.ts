/**
 * The checksum of a call's answer: a running CRC-32C over its messages, chunks left out, which have their own.
 *
 * It is the field `crc32c` of every answer (stream.proto). What was changed on its way or is missing shows at the next
 * message at the latest. A message counts as it is encoded, which is always in the same way, whoever does it.
 */
import { type DescMessage, type Message, toBinary } from "@bufbuild/protobuf";
import type { Interceptor } from "@connectrpc/connect";
import { Damaged } from "./errors.js";

type Answer = Message & { readonly crc32c?: number; readonly event?: { readonly case?: string } };

/** Looks at every answer of every call over a connection: once one was sealed, one that is not has lost its checksum. */
export function unchanged(crc32c: (data: Uint8Array, before: number) => number): Interceptor {
  let seals = false;
  return (next) => async (request) => {
    const response = await next(request);
    const look = looking(response.method.output, crc32c, seals);
    const looked = (message: Answer): void => {
      seals = look(message);
    };
    if (response.stream) {
      return { ...response, message: eachOf(response.message, looked) };
    }
    looked(response.message);
    return response;
  };
}

async function* eachOf<T extends Message>(messages: AsyncIterable<T>, looked: (message: T) => void): AsyncGenerator<T, void, undefined> {
  for await (const message of messages) {
    looked(message);
    yield message;
  }
}

/**
 * Compares the messages of one call, one after the other, and tells whether they are sealed: servers that are older send
 * no checksum at all.
 */
function looking(schema: DescMessage, crc32c: (data: Uint8Array, before: number) => number, seals: boolean): (message: Answer) => boolean {
  let [crc, sealed] = [0, seals];
  return (message) => {
    if (message.event?.case === "chunk") {
      return sealed;
    }
    const { crc32c: told, ...rest } = message;
    crc = crc32c(toBinary(schema, rest), crc);
    if ((told !== undefined && crc !== told) || (sealed && told === undefined)) {
      throw new Damaged("a message of the answer was changed or lost on its way.");
    }
    sealed = told !== undefined;
    return sealed;
  };
}
