# %% [markdown]
# # Two clients share a GPU
# The server lets one request at a time use the model, in fair turns, so colleagues can work on the same box. Captures
# and interventions belong to whoever asked for them.

# %%
import threading

import vlm_spectra as vs
from PIL import Image

ADDRESS = "localhost:50051"
image = Image.open("screenshot.png")
found: dict[str, list[str]] = {"plain": [], "blind": []}


def work(name: str, hooks: list) -> None:
    """A client of its own: three answers, with its own interventions."""
    with vs.connect(ADDRESS) as model, model.run_with_hooks(hooks):
        inputs = model.prepare_messages("Click on the Login button", image)
        for _ in range(3):
            found[name].append(model.generate(inputs, max_new_tokens=24).text[0])


blind = [("lm.blocks.*.attn.hook_mask", vs.BlockAttention(keys="image"))]
threads = [threading.Thread(target=work, args=args) for args in (("plain", []), ("blind", blind))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()

# %% [markdown]
# Each client got its own answers, the same three times.

# %%
for name, texts in found.items():
    print(f"{name}: {len(texts)} answers, {len(set(texts))} different: {texts[0]!r}")
