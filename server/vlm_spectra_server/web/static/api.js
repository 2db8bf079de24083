// The REST interface: problems become errors, answers may come in lines.

export class Problem extends Error {
  constructor(details) {
    super(details.detail || details.title || "Something went wrong.");
    this.details = details;
  }
}

/** Called when the server wants to know who asks. */
export const wanting = { signIn: () => {} };

async function checked(answer) {
  if (answer.ok) return answer;
  let details = {};
  try { details = await answer.json(); } catch { /* not from the app */ }
  if (answer.status === 401) wanting.signIn();
  throw new Problem({ title: `The page's server answered ${answer.status}.`, status: answer.status, ...details });
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({ detail: "The page's server does not answer; is it still running?", status: 0 });
  }
}

const json = (method, body) => ({ method, headers: { "content-type": "application/json" }, body: JSON.stringify(body) });

/** The answer under an address, not yet read. */
export async function take(path, signal) {
  return checked(await reach(path, { cache: "no-store", signal }));
}

export async function get(path) {
  return (await take(path)).json();
}

export async function post(path, body) {
  return (await checked(await reach(path, json("POST", body)))).json();
}

export async function remove(path) {
  await checked(await reach(path, { method: "DELETE" }));
}

export async function upload(file) {
  const form = new FormData();
  form.append("file", file, "image");
  let answer;
  try { answer = await reach("/api/upload", { method: "POST", body: form }); } catch {
    await get("/api/session"); // the server is there: it has refused a body that it did not read to its end
    throw new Problem({ detail: `The upload broke off: ${(file.size / 1e6).toFixed(1)} MB may be more than is taken here.` });
  }
  return (await checked(answer)).json();
}

/** Ask for an analysis: `onEvent` gets what it says on its way; the result. Aborting the signal ends it. */
export async function analyse(path, body, onEvent, signal) {
  const answer = await checked(await reach(path, { ...json("POST", { ...body, stream: true }), signal }));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  const broken = "The connection broke before the result came; run it again.";
  let rest = "";
  for (;;) {
    let piece;
    try { piece = await reader.read(); } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem({ detail: broken });
    }
    const lines = (rest + (piece.value || "")).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.type === "error") throw new Problem(event.problem);
      if (event.type === "result") return event.data;
      onEvent(event);
    }
    if (piece.done) throw new Problem({ detail: broken });
  }
}

/** The numbers of a packed array. */
export function unpacked(packed) {
  const bytes = Uint8Array.from(atob(packed.float32), (c) => c.charCodeAt(0));
  return { shape: packed.shape, values: new Float32Array(bytes.buffer) };
}
