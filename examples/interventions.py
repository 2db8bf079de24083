# %% [markdown]
# # What if I cut it?
# Interventions change activations while the model runs. They are data, so they work on a server just as well.

# %%
import re

import numpy as np
import vlm_spectra as vs
from PIL import Image

model = vs.connect("localhost:50051")
# model = vs.HookedVLM.from_pretrained("spectra-tiny")  # the same, in process

task, image = "Click on the Login button", Image.open("screenshot.png")
said = model.generate(model.prepare_messages(task, image), max_new_tokens=64).text[0]
inputs = model.prepare_messages(task, image, assistant_prefill=re.split(r"\d", said)[0])

usual = model.forward(inputs, logits_to_keep=1).top_tokens(5)[0][-1]
print("usually:", [(token.text, round(token.prob, 3)) for token in usual])

# %% [markdown]
# Cut what the last token may read: the image, its patches of the button alone, the text. Or silence heads.

# %%
button = inputs.positions_in((66, 149, 136, 179))  # a box in pixels of the screenshot


def blind(keys: object) -> list:
    """The last token cannot read these."""
    return [("lm.blocks.*.attn.hook_mask", vs.BlockAttention(positions="last", keys=keys))]


cuts = {
    "nothing is cut": [],
    "it cannot read the image": blind("image"),
    "it cannot read the button": blind(button),
    "it cannot read the text": blind("text"),
    "the heads of layer 0 are silent": [("lm.blocks.0.attn.hook_z", vs.ZeroAblation())],
}


def probabilities(hooks: list) -> list[float]:
    """What the usual five tokens are worth with these interventions."""
    with model.run_with_hooks(hooks):
        logits = np.asarray(model.forward(inputs, logits_to_keep=1).logits, dtype=np.float64)[0, -1]
    shares = np.exp(logits - logits.max())
    return [float(shares[token.id] / shares.sum()) for token in usual]


table = [probabilities(hooks) for hooks in cuts.values()]
figure = vs.pictures.heatmap(
    table,
    rows=list(cuts),
    columns=[token.text for token in usual],
    texts=[[f"{share:.0%}" for share in line] for line in table],
    label="probability",
    title="What the model says if ...",
    peak=1.0,
)
figure.save("cuts.png", scale=1)
figure

# %% [markdown]
# And which layer needs the image? Cut it in one layer at a time.

# %%
for layer in range(model.info.layers):
    cut = (f"lm.blocks.{layer}.attn.hook_mask", vs.BlockAttention(positions="last", keys="image"))
    print(f"without the image in layer {layer}: {probabilities([cut])[0]:.1%} (usually {usual[0].prob:.1%})")
