"""The entry points that users of the toolkit's README know work as it says, literally."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import vlm_spectra as vs
from PIL import Image
from vlm_spectra.logit_lens.create_logit_lens import create_logit_lens
from vlm_spectra.models.vlm_metadata import VLMMetadataExtractor

TASK = "Click on the login button"


@pytest.fixture(scope="module")
def prepared(hooked: vs.HookedVLM, screenshot: Image.Image) -> vs.Inputs:
    return hooked.prepare_messages(TASK, screenshot)


def page_data(path: Path) -> dict:
    page = path.read_text("utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))


def top_words(data: dict) -> list[list[str]]:
    """[layers, last on top][positions] the most probable token of each cell."""
    row = data["rows"][0]
    numbers = np.frombuffer(base64.b64decode(row["words"]), "<u4" if row["wide"] else "<u2")
    shaped = numbers.reshape(len(data["layers"]), len(row["positions"]), row["k"])[..., 0]
    return [[data["words"][word] for word in line] for line in shaped]


def test_the_readmes_example(
    hooked: vs.HookedVLM, prepared: vs.Inputs, screenshot: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, inputs, image = hooked, prepared, screenshot
    outputs = model.forward(inputs, output_hidden_states=True)
    metadata = VLMMetadataExtractor.extract_metadata_qwen(model.model, model.processor, inputs, image)
    create_logit_lens(
        hidden_states=outputs.hidden_states,
        norm=model.model.model.norm,
        lm_head=model.model.lm_head,
        tokenizer=model.processor.tokenizer,
        image=image,
        token_labels=metadata["token_labels"],
        image_size=metadata["image_size"],
        grid_size=metadata["grid_size"],
        patch_size=metadata["patch_size"],
        model_name="UI-TARS",
        image_filename="screenshot.png",
        prompt=TASK,
    )
    path = tmp_path / "UI-TARS_screenshot_logit_lens.html"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    data = page_data(path)
    layers = model.info.layers
    assert data["layers"] == [str(layer) for layer in reversed(range(layers))] + ["embed"]
    # The last of Hugging Face's hidden states is normed already; normed twice, it would not be the model's answer.
    answers = outputs.logits[0].argmax(-1).tolist()
    words = top_words(data)
    assert words[0] == [model.processor.tokenizer.decode([answer]) for answer in answers]
    lens = model.logit_lens(inputs)
    for layer in range(layers - 1):
        assert words[layers - 1 - layer] == [cell[0] for cell in lens.tokens[layer][0]]


def test_a_stack_of_a_cache_gives_the_models_lens(
    hooked: vs.HookedVLM, prepared: vs.Inputs, screenshot: Image.Image, tmp_path: Path
) -> None:
    components = hooked.get_model_components()
    metadata = VLMMetadataExtractor.extract_metadata_qwen(hooked.model, hooked.processor, prepared, screenshot)
    with hooked.run_with_cache("lm.blocks.*.hook_resid_post") as cache:
        hooked.forward(prepared, logits_to_keep=None)
    path = create_logit_lens(
        cache.stack("lm.blocks.*.hook_resid_post"),
        **components,
        image=screenshot,
        **{name: metadata[name] for name in ("token_labels", "image_size", "grid_size", "patch_size")},
        model_name="org/<b>model</b>",
        image_filename="shots/<script>alert(1)</script>.png",
        prompt="<script>alert(1)</script>",
        save_folder=tmp_path,
        misc_text="<script>alert(2)</script>",
    )
    assert path.parent == tmp_path
    assert path.exists()
    page = path.read_text("utf-8")
    assert "<script>alert" not in page
    assert "<b>model" not in page
    lens = hooked.logit_lens(prepared)
    data = page_data(path)
    row = data["rows"][0]
    assert top_words(data) == [[cell[0] for cell in lens.tokens[layer][0]] for layer in reversed(lens.layers)]
    probs = np.frombuffer(base64.b64decode(row["probs"]), "<u2").reshape(len(lens.layers), -1, row["k"]) / 65535
    expected = np.asarray(lens.probs)[::-1, 0]
    assert np.abs(probs - expected).max() < 1e-4
    entropy = np.frombuffer(base64.b64decode(row["entropy"]), "<u2") / 65535 * data["shades"]["entropy"]["peak"]
    assert np.abs(entropy - np.asarray(lens.entropy)[::-1, 0].ravel()).max() < 1e-3
    ranks = np.frombuffer(base64.b64decode(row["ranks"]), "<u4")
    assert ranks.tolist() == np.asarray(lens.ranks)[::-1, 0].ravel().tolist()


def test_metadata(hooked: vs.HookedVLM, prepared: vs.Inputs, screenshot: Image.Image) -> None:
    metadata = VLMMetadataExtractor.extract_metadata_qwen(hooked.model, hooked.processor, prepared, screenshot)
    layout = prepared.images[0]
    assert metadata["image_size"] == layout.processed_size
    assert metadata["grid_size"] == layout.grid
    assert metadata["image_token_positions"] == list(layout.positions)
    assert metadata["num_image_tokens"] == metadata["total_patches"] == len(layout.positions)
    assert metadata["patch_size"] * layout.grid[1] == layout.processed_size[0]
    labels = metadata["token_labels"]
    assert len(labels) == prepared.input_ids.shape[1]
    assert labels[layout.positions[0]] == "<IMG001>"
    assert "<IMG" not in labels[-1]
    raw = {name: value for name, value in prepared.tensors.items() if name in ("input_ids", "image_grid_thw")}
    assert VLMMetadataExtractor.extract_metadata_qwen(hooked.model, hooked.processor, raw, screenshot) == metadata


def test_metadata_of_a_batch_are_refused(hooked: vs.HookedVLM, screenshot: Image.Image) -> None:
    for images in ([screenshot, screenshot], None):
        inputs = hooked.prepare_messages(TASK, images)
        with pytest.raises(vs.SpectraError, match="one prompt with one image"):
            VLMMetadataExtractor.extract_metadata_qwen(hooked.model, hooked.processor, inputs, screenshot)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"token_labels": ["a"]}, "1 token labels for"),
        ({"grid_size": (1, 2)}, "a grid of 1 x 2 has 2 image tokens"),
        ({"hidden_states": ((torch.zeros(1, 2, 3),),)}, "a tuple of"),
        ({"hidden_states": ()}, "a tuple of"),
        ({"save_folder": "/nowhere"}, "no directory"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict, sentence: str, hooked: vs.HookedVLM, prepared: vs.Inputs, screenshot: Image.Image, tmp_path: Path
) -> None:
    hidden = torch.zeros(2, prepared.input_ids.shape[1], hooked.info.hidden)
    arguments = {
        "hidden_states": hidden,
        **hooked.get_model_components(),
        "image": screenshot,
        "token_labels": prepared.token_labels[0],
        "image_size": prepared.images[0].processed_size,
        "grid_size": prepared.images[0].grid,
        "patch_size": 28,
        "model_name": "m",
        "image_filename": "i.png",
        "prompt": "p",
        "save_folder": tmp_path,
    }
    with pytest.raises(vs.SpectraError, match=sentence):
        create_logit_lens(**{**arguments, **change})


def test_components_are_the_models_own(hooked: vs.HookedVLM, remote: vs.RemoteVLM, prepared: vs.Inputs) -> None:
    components = hooked.get_model_components()
    assert list(components) == ["norm", "lm_head", "tokenizer"]
    with hooked.run_with_cache("lm.blocks.*.hook_resid_post") as cache:
        outputs = hooked.forward(prepared)
    last = cache[f"lm.blocks.{hooked.info.layers - 1}.hook_resid_post"]
    with torch.no_grad():
        assert torch.equal(components["lm_head"](components["norm"](last)), outputs.logits)
    with pytest.raises(vs.SpectraError, match="stay on the server") as refusal:
        remote.get_model_components()
    assert refusal.value.reason == "NOT_SUPPORTED"


def test_the_old_place_of_the_norm_owns_nothing(hooked: vs.HookedVLM) -> None:
    assert hooked.model.model.norm is hooked.get_model_components()["norm"]
    names = [name for name, _ in hooked.model.model.named_parameters(remove_duplicate=False)]
    assert not any(name.startswith("norm.") for name in names)
    assert not any(name.startswith("model.norm.") for name in hooked.model.state_dict())


def test_other_lines_of_the_readme(hooked: vs.HookedVLM, screenshot: Image.Image) -> None:
    model, image = hooked, screenshot
    inputs, text = model.prepare_messages("Click here", image, return_text=True)
    assert "Click here" in text
    inputs = model.prepare_messages(
        "Click on the red button", image, assistant_prefill="Thought: I see that there is a"
    )
    assert inputs.text[0].endswith("Thought: I see that there is a")
    outputs = model.generate(inputs, max_new_tokens=3, output_hidden_states=True)
    assert "Click on the red button" in model.processor.decode(outputs.sequences[0])
    assert isinstance(outputs.hidden_states, tuple)
    outputs = model.forward(inputs, output_attentions=True)
    assert len(outputs.attentions) == model.info.layers
    with model.run_with_cache(["lm.blocks.*.attn.hook_pattern", "lm.blocks.*.hook_resid_post"]) as cache:
        model.forward(inputs)
    assert torch.equal(cache["lm.blocks.3.attn.hook_pattern"], outputs.attentions[3])
    assert len(cache.stack("lm.blocks.*.hook_resid_post")) == model.info.layers
    batch = model.prepare_messages_batch(["Click button", "Describe image"], [image, image])
    assert len(model.generate_batch(batch, max_new_tokens=2).text) == 2


def test_importing_them_needs_no_torch() -> None:
    code = (
        "import sys; import vlm_spectra.logit_lens.create_logit_lens, vlm_spectra.models.vlm_metadata; "
        "from vlm_spectra import pictures; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
