# %% [markdown]
# # Activation patching
# Two screens that differ in one thing: the button stands elsewhere. Put single activations of the one run into the
# other, and see which of them bring the answer back.

# %%
import re

import vlm_spectra as vs
from PIL import Image

model = vs.connect("localhost:50051")
# model = vs.HookedVLM.from_pretrained("spectra-tiny")  # the same, in process

task, image = "Click on the Login button", Image.open("screenshot.png").convert("RGB")
button, sky = (48, 146, 126, 182), (140, 146, 218, 182)  # boxes in pixels of the screenshot
moved = image.copy()
moved.paste(image.crop(button), sky[:2])
moved.paste(image.crop(sky), button[:2])
moved.save("moved.png")

# %%
said = model.generate(model.prepare_messages(task, image), max_new_tokens=64).text[0]
prefill = re.split(r"\d", said)[0]
clean = model.prepare_messages(task, image, assistant_prefill=prefill)
corrupted = model.prepare_messages(task, moved, assistant_prefill=prefill)

# %% [markdown]
# Every layer, at the patches that differ and at the last token, computed on the server: only the target's logit of each
# run comes back.

# %%
places = sorted({*clean.positions_in(button), *clean.positions_in(sky)})
sweep = model.patch_sweep(clean, corrupted, "lm.blocks.*.hook_resid_post", positions=[*places, -1])
print(f"the logit of {sweep.target_tokens[0]!r}: {sweep.clean_value:.2f}; button moved: {sweep.corrupted_value:.2f}")
for hook, position, effect in sweep.top(3):
    print(f"{hook} at position {position}: {effect:.0%} of the way back")

figure = vs.pictures.patching(sweep)
figure.save("patching.png", scale=1)
figure

# %% [markdown]
# The same over the image: which patches of layer 0 carry the difference.

# %%
figure = vs.pictures.overlay(clean, sweep.image_grid(0), label="share of the way back", title="Layer 0, patch by patch")
figure.save("patching_image.png", scale=1)
figure
