# %% [markdown]
# # At which layer is the answer decided?
# The logit lens reads each layer's residual stream as if it were the last.

# %%
import re

import vlm_spectra as vs
from PIL import Image

model = vs.connect("localhost:50051")
# model = vs.HookedVLM.from_pretrained("spectra-tiny")  # the same, in process

# %% [markdown]
# Let the model answer, and keep what it said before its first number: the next token is the click's first digit.

# %%
task, image = "Click on the Login button", Image.open("screenshot.png")
said = model.generate(model.prepare_messages(task, image), max_new_tokens=64).text[0]
inputs = model.prepare_messages(task, image, assistant_prefill=re.split(r"\d", said)[0])

# %%
lens = model.logit_lens(inputs, top_k=5)
for i, layer in enumerate(lens.layers):
    print(f"layer {layer}: {lens.tokens[i][0][-1][0]!r} with {float(lens.probs[i, 0, -1, 0]):.0%}")

# %% [markdown]
# The whole of it as a page to explore in a browser, and the last tokens as a figure for a paper.

# %%
lens.to_html("lens.html")
figure = vs.pictures.lens(lens)
figure.save("lens.png", scale=1)
figure
