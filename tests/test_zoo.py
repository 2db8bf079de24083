"""Every family of the zoo: its checkpoint loads by `model_type` alone; its prompts are prepared, run and answered."""

from __future__ import annotations

import pytest
import torch
import vlm_spectra as vs
import zoo
from conftest import start_server, stop_server
from PIL import Image
from vlm_spectra.arrays import to_numpy
from vlm_spectra.errors import InvalidImageError, InvalidInputError

FAMILIES = sorted(zoo.FAMILIES)
SERVED = ("llava_next", "gemma3", "gemma4", "idefics3")


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_loads_by_its_model_type(family: str) -> None:
    model = zoo.load(family)
    assert model.info.family == family
    assert model.info.dtype == "float32"
    assert model.info.layers == 3
    assert model.info.image_token_id == model.model.config.image_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_prepared_inputs_are_transformers_own(family: str) -> None:
    """The same tensors as the processor's own chat call: every field, and no second beginning of the text."""
    model = zoo.load(family)
    inputs = model.prepare_messages("Click on the red circle", zoo.wide())
    if model.processor.chat_template:
        content = [{"type": "image", "image": zoo.wide()}, {"type": "text", "text": "Click on the red circle"}]
        theirs = model.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    else:
        theirs = model.processor(text="<image>Click on the red circle", images=zoo.wide(), return_tensors="pt")
        theirs.pop("labels")
    assert set(inputs.tensors) == set(theirs)
    for name, value in inputs.tensors.items():
        assert torch.equal(value, theirs[name].to(value.dtype)), name
        assert value.dtype == torch.float32 or not value.is_floating_point(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_image_tokens_are_counted_off_per_image(family: str) -> None:
    zoo.require(family)
    model = zoo.load(family)
    pictures = [zoo.wide(), zoo.tall()] if zoo.FAMILIES[family].two_images else [zoo.tall()]
    inputs = model.prepare_messages("What has changed?", pictures)
    ids = inputs.input_ids[0]
    expected = torch.nonzero(ids == model.info.image_token_id).flatten().tolist()
    assert [p for image in inputs.images for p in image.positions] == expected
    for image, picture in zip(inputs.images, pictures, strict=True):
        assert image.original_size == picture.size
        assert len(set(image.raster)) == image.grid[0] * image.grid[1]
        tokens = {token.position for token in image.tokens()}
        assert tokens <= set(image.positions)
        assert set(image.raster) <= tokens
        assert [image.token(i) is not None for i in range(len(image.positions))] == [
            position in tokens for position in image.positions
        ]
    labels = inputs.token_labels[0]
    assert all(labels[p].startswith("<image 1") for p in inputs.images[0].positions)
    assert len({labels[p] for p in inputs.images[-1].raster}) == len(inputs.images[-1].raster)
    assert model.forward(inputs).logits.isfinite().all()


@pytest.mark.parametrize("family", [name for name in FAMILIES if zoo.FAMILIES[name].batches])
def test_padded_batch_equals_its_rows(family: str) -> None:
    zoo.require(family)
    model, entry = zoo.load(family), zoo.FAMILIES[family]
    tasks = ["Click", "How many widgets are there on this screen?", "Say hello to me"]
    images = [zoo.wide(), zoo.tall(), None if entry.mixed else zoo.wide()]
    batch = model.prepare_messages_batch(tasks, images)
    logits = model.forward(batch, logits_to_keep=1).logits
    for row, (task, image) in enumerate(zip(tasks, images, strict=True)):
        single = model.prepare_messages(task, image)
        length = single.input_ids.shape[1]
        assert torch.equal(batch.input_ids[row, -length:], single.input_ids[0])
        assert batch.attention_mask[row].sum() == length
        shift = batch.input_ids.shape[1] - length
        for ours, alone in zip(batch.images_of(row), single.images, strict=True):
            assert [p - shift for p in ours.positions] == list(alone.positions)
        alone_logits = model.forward(single, logits_to_keep=1).logits[0]
        assert torch.allclose(logits[row], alone_logits, atol=2e-4), (logits[row] - alone_logits).abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_answers(family: str) -> None:
    zoo.require(family)
    model = zoo.load(family)
    inputs = model.prepare_messages("Click on the red circle", zoo.tall())
    answer = model.generate(inputs, max_new_tokens=3)
    new = to_numpy(answer.sequences)[0, inputs.input_ids.shape[1] :]
    assert 1 <= len(new) <= 3
    assert isinstance(answer.text[0], str)
    greedy = model.forward(inputs, logits_to_keep=1).logits[0, -1].argmax()
    assert new[0] == greedy


def test_text_alone() -> None:
    for family in ("llava", "idefics3", "qwen3_vl", "gemma3"):
        inputs = zoo.load(family).prepare_messages("Say hello")
        assert inputs.images == ()
        assert "pixel_values" not in inputs.tensors
    with pytest.raises(InvalidInputError, match="refuses the prompt"):
        zoo.load("paligemma").prepare_messages("Say hello")


def test_rows_without_an_image_are_refused_where_they_cannot_be() -> None:
    with pytest.raises(InvalidInputError, match="rows that all have images or none"):
        zoo.load("mllama").prepare_messages_batch(["Look", "Say hello"], [zoo.wide(), None])


def test_placeholders_in_a_text_are_refused() -> None:
    """Both the token an image becomes and the mark that stands for it in a template."""
    for family, mark in (("gemma3", "<start_of_image>"), ("gemma3", "<image_soft_token>"), ("ovis2", "<image>")):
        with pytest.raises(InvalidInputError, match="stands for a part of an image"):
            zoo.load(family).prepare_messages(f"What is {mark}?", zoo.wide())


def test_an_image_no_processor_takes_is_named() -> None:
    with pytest.raises(InvalidImageError, match="900 x 2"):
        zoo.load("qwen2_vl").prepare_messages("Look", Image.new("RGB", (900, 2)))
    with pytest.raises(InvalidImageError, match="640 x 33"):
        zoo.load("lfm2_vl").prepare_messages("Look", Image.new("RGB", (640, 33)))


def test_prefill_and_system_reach_the_prompt() -> None:
    for family in ("llava", "smolvlm", "paligemma"):
        text = zoo.load(family).prepare_messages("Look", zoo.wide(), "I see", system="Be brief", return_text=True)[1]
        assert "Be brief" in text
        assert text.index("Be brief") < text.index("Look") < text.index("I see")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in SERVED else pytest.mark.long) for name in zoo.FAMILIES]
)
def test_served_from_its_directory(family: str) -> None:
    """A server started on the directory gives what the model in process gives, layouts included."""
    zoo.require(family)
    here = zoo.load(family)
    process, address = start_server("--model", str(zoo.build(family)), "--device", "cpu")
    try:
        with vs.connect(address) as there:
            assert there.info.family == family
            pictures = [zoo.wide(), zoo.tall()] if zoo.FAMILIES[family].two_images else zoo.wide()
            ours, theirs = (m.prepare_messages("What has changed?", pictures) for m in (here, there))
            assert theirs.images == ours.images
            assert theirs.token_labels == ours.token_labels
            outputs = [m.forward(i, logits_to_keep=1).logits for m, i in ((here, ours), (there, theirs))]
            assert torch.equal(*outputs)
            box = (20, 26, 60, 66)
            assert theirs.positions_in(box) == ours.positions_in(box) != []
            assert there.generate(theirs, max_new_tokens=2).text == here.generate(ours, max_new_tokens=2).text
    finally:
        stop_server(process)
