# %% [markdown]
# # Where does it look?
# What the token before the click's first digit reads from the image, head by head.

# %%
import re

import vlm_spectra as vs
from PIL import Image

model = vs.connect("localhost:50051")
# model = vs.HookedVLM.from_pretrained("spectra-tiny")  # the same, in process

task, image = "Click on the Login button", Image.open("screenshot.png")
said = model.generate(model.prepare_messages(task, image), max_new_tokens=64).text[0]
inputs = model.prepare_messages(task, image, assistant_prefill=re.split(r"\d", said)[0])

# %% [markdown]
# Only the last token's rows of the pattern are computed and sent.

# %%
with model.run_with_cache("lm.blocks.*.attn.hook_pattern", positions="last") as cache:
    model.forward(inputs, logits_to_keep=None)

figure = vs.pictures.attention(cache, inputs, head="all")  # layers by heads
figure.save("attention_heads.png", scale=1)
figure

# %% [markdown]
# The head that gives the image's patches the most, alone; and each layer's mean over its heads.

# %%
share = cache.stack("lm.blocks.*.attn.hook_pattern")[:, 0, :, 0][..., cache.image_positions(0)].sum(-1)
layer, head = divmod(int(share.argmax()), model.info.heads)
print(f"layer {layer}, head {head} spends {float(share[layer, head]):.0%} on the image")
vs.pictures.attention(cache, inputs, layer=layer, head=head).save("attention.png", scale=1)
vs.pictures.attention(cache, inputs).save("attention_layers.html")
