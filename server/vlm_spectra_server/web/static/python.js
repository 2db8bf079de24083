// The Python lines that make the same result.

const text = (value) => JSON.stringify(value);

/** The lines up to the inputs. */
export function opening(asked, server, model) {
  const connect = model ? `vs.connect(${text(server)}, model=${text(model)})` : `vs.connect(${text(server)})`;
  const prefill = asked.assistant_prefill ? `, assistant_prefill=${text(asked.assistant_prefill)}` : "";
  const lines = ["import vlm_spectra as vs", "from PIL import Image", "", `model = ${connect}`];
  if (asked.filename) lines.push('image = Image.open("screenshot.png")  # the image of the page');
  lines.push(`inputs = model.prepare_messages(${text(asked.task)}, ${asked.filename ? "image" : "None"}${prefill})`, "");
  return lines;
}

export { text as python };
