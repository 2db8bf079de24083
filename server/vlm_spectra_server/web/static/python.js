// The Python lines that make the same result.

import { unturned } from "./dom.js";

const text = (value) => unturned(JSON.stringify(value), (code) => `\\u${code}`);

/** The images of a question: their names, in order. */
export const files = (filename) => (Array.isArray(filename) ? filename : filename ? [filename] : []);

/** Lines that open images, and what `prepare_messages` gets of them. */
export function opened(filename, name) {
  const { length } = files(filename);
  if (!length) return [[], "None"];
  if (length === 1) return [[`${name} = Image.open(${text(`${name}.png`)})  # the image of the page`], name];
  return [[`${name}s = [Image.open(f"${name}-{i}.png") for i in range(1, ${length + 1})]  # the images of the page`], `${name}s`];
}

/** The lines up to the inputs; `model` where the server holds several. */
export function opening(asked, { server, tls, token }, model) {
  const options = [text(server), ...(model ? [`model=${text(model)}`] : []), ...(tls ? ["tls=True"] : [])].join(", ");
  const prefill = asked.assistant_prefill ? `, assistant_prefill=${text(asked.assistant_prefill)}` : "";
  const [lines, images] = opened(asked.filename, "screenshot");
  return ["import vlm_spectra as vs", ...(lines.length ? ["from PIL import Image"] : []), "",
    `model = vs.connect(${options})${token ? "  # your token: in VLM_SPECTRA_TOKEN" : ""}`, ...lines,
    `inputs = model.prepare_messages(${text(asked.task)}, ${images}${prefill})`, ""];
}

/** The lines that prepare a second prompt, `name`; the first one's images where it has the same. */
export function second(asked, name) {
  const { corrupted } = asked, same = text(files(corrupted.filename)) === text(files(asked.filename));
  const [lines, images] = same ? [[], opened(asked.filename, "screenshot")[1]] : opened(corrupted.filename, "second");
  const prefill = corrupted.assistant_prefill ? `, assistant_prefill=${text(corrupted.assistant_prefill)}` : "";
  return [...lines, `${name} = model.prepare_messages(${text(corrupted.task)}, ${images}${prefill})`];
}

export { text as python };
