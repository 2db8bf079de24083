# %% [markdown]
# # Which patches decide?
# Direct logit attribution splits the logit of the click's first digit over heads, MLPs and image patches.

# %%
import re

import vlm_spectra as vs
from PIL import Image

model = vs.connect("localhost:50051")
# model = vs.HookedVLM.from_pretrained("spectra-tiny")  # the same, in process

task, image = "Click on the Login button", Image.open("screenshot.png")
said = model.generate(model.prepare_messages(task, image), max_new_tokens=64).text[0]
inputs = model.prepare_messages(task, image, assistant_prefill=re.split(r"\d", said)[0])

# %%
why = model.attribute(inputs, method="direct_logit")
print(f"the logit of {why.target_tokens[0]!r} is {float(why.target_value[0]):.4f}")
print(f"all parts add up to {float(why.total[0]):.4f}")
print("strongest patches:", why.top_patches(0, k=3))

why.picture(0).save("attribution.png", scale=1)
why.picture(0)

# %% [markdown]
# Which heads wrote it, in numbers: layers by heads.

# %%
figure = vs.pictures.heatmap(why.heads(0), label="logit", title="Who wrote it", across="head", down="layer")
figure.save("heads.png", scale=1)
figure

# %% [markdown]
# A method that asks otherwise: blur squares of two by two patches, and see what the logit loses. It need
# not agree: this asks about pixels, through the vision tower, and the first about what the last token reads.

# %%
covered = model.attribute(inputs, method="occlusion", window=2, baseline="blurred")
print("strongest squares:", covered.top_patches(0, k=4))
covered.picture(0).save("occlusion.png", scale=1)
