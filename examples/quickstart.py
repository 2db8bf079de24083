# %% [markdown]
# # Quickstart
# Ask a model about a screenshot, and look at what happened inside. A server has to run:
# `vlm-spectra serve --model spectra-tiny`.

# %%
import vlm_spectra as vs
from PIL import Image
from vlm_spectra.spatial import patch_overview

model = vs.connect("localhost:50051")
# model = vs.HookedVLM.from_pretrained("spectra-tiny")  # the same, in process
print(model.info.name, "has", model.info.layers, "layers of", model.info.heads, "heads")

# %% [markdown]
# The image becomes tokens, one for each patch.

# %%
image = Image.open("screenshot.png")
inputs = model.prepare_messages("Click on the Login button", image)
print(inputs)
patch_overview(image, inputs.images[0]).save("patches.png")

# %%
answer = model.generate(inputs, max_new_tokens=64)
print(answer.text[0])
print("a click at", answer.clicks[0], "in pixels of the screenshot")

# %% [markdown]
# Capture the residual stream after every layer. The cache fills while the model runs.

# %%
with model.run_with_cache("lm.blocks.*.hook_resid_post") as cache:
    outputs = model.forward(inputs, logits_to_keep=1)

print(cache)
print("next:", [(token.text, round(token.prob, 3)) for token in outputs.top_tokens(3)[0][-1]])
stream = cache.stack("lm.blocks.*.hook_resid_post")
print("the residual stream:", list(stream.shape), "layers, batch, positions, width")
