"""What is not possible gets one clear sentence, and the model works afterwards. Here in process."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
import vlm_spectra as vs
from PIL import Image
from vlm_spectra import errors
from vlm_spectra import images as image_files

POST, PATTERN, MASK = "lm.blocks.2.hook_resid_post", "lm.blocks.2.attn.hook_pattern", "lm.blocks.2.attn.hook_mask"
TASK = "Click on the red circle"


@contextlib.contextmanager
def refused(error: type[Exception], *parts: str):
    """The block raises exactly this error, its message one line that ends like a sentence and holds these parts."""
    with pytest.raises(error) as caught:
        yield caught
    assert type(caught.value) is error
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", ")"))
    assert len(message) < 400
    for part in parts:
        assert part in message, message


@pytest.fixture(autouse=True)
def _works_afterwards(hooked, inputs):
    before = hooked.forward(inputs, 1).logits
    yield
    assert torch.equal(hooked.forward(inputs, 1).logits, before)


def png(width: int, height: int) -> bytes:
    """A valid black PNG, one bit a pixel, made without holding its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(1), bytes(1 + (width + 7) // 8)
    rows = b"".join([packer.compress(row) for _ in range(height)]) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# Images and prompts.


def test_the_made_png_is_one():
    assert Image.open(io.BytesIO(png(300, 200))).convert("RGB").getpixel((299, 199)) == (0, 0, 0)


def test_an_image_of_30_000_by_30_000_pixels(hooked):
    data = png(30_000, 30_000)
    with refused(errors.InvalidImageError, "900,000,000 pixels", "64,000,000"):
        hooked.prepare_messages(TASK, data)


def test_an_image_a_little_too_large(hooked):
    with refused(errors.InvalidImageError, "8001 x 8000", "64,000,000"):
        hooked.prepare_messages(TASK, png(8001, 8000))


def test_bytes_that_are_no_image(hooked):
    with refused(errors.InvalidImageError, "9 bytes", "PNG"):
        hooked.prepare_messages(TASK, b"not a PNG")


def test_an_image_of_a_kind_that_starts_a_program(hooked, screenshot):
    """Pillow would hand it to Ghostscript."""
    buffer = io.BytesIO()
    screenshot.save(buffer, format="EPS")
    with refused(errors.InvalidImageError, "PNG"):
        hooked.prepare_messages(TASK, buffer.getvalue())


def test_a_turned_image_with_a_damaged_tag(hooked, screenshot):
    """Pillow cannot write the tag again when it turns the picture, and raises an AttributeError."""
    turned = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    maker = struct.pack("<HHI4s", 0x010F, 11, 1, b"\1\0\0\0")  # a number where a name should be
    buffer = io.BytesIO()
    screenshot.save(buffer, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0" + turned + maker + bytes(4))
    with refused(errors.InvalidImageError, "damaged"):
        hooked.prepare_messages(TASK, buffer.getvalue())


def test_a_tokenizer_that_panics(hooked, monkeypatch):
    """As one in Rust does at its own limits: not with an Exception, but the prompt's fault all the same."""

    def panics(*arguments, **more):
        raise type("PanicException", (BaseException,), {})("retry-limit-in-match over")

    monkeypatch.setattr(hooked, "processor", Panicking(hooked.processor, panics))
    with refused(errors.InvalidInputError, "tokenizer", "retry-limit"):
        hooked.prepare_messages(TASK)
    monkeypatch.undo()


class Panicking:
    """A processor whose call fails."""

    def __init__(self, processor, call):
        self._processor, self._call = processor, call

    def __getattr__(self, name):
        return getattr(self._processor, name)

    def __call__(self, *arguments, **more):
        self._call()


@pytest.mark.parametrize("kept", [0.3, 0.7])
def test_an_image_that_ends_early(hooked, screenshot, kept):
    buffer = io.BytesIO()
    screenshot.save(buffer, format="JPEG")
    with refused(errors.InvalidImageError, "damaged"):
        hooked.prepare_messages(TASK, buffer.getvalue()[: int(len(buffer.getvalue()) * kept)])


def test_an_image_file_that_is_not_there(hooked, tmp_path):
    with refused(errors.InvalidImageError, "missing.png", "No such file"):
        hooked.prepare_messages(TASK, tmp_path / "missing.png")


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), 7, np.zeros((0, 4, 3), np.uint8)])
def test_what_is_no_image(hooked, image):
    with refused(errors.InvalidImageError, "image"):
        hooked.prepare_messages(TASK, image)


@pytest.mark.parametrize(
    "address", ["https://example.com/a.png", "data:image/png;base64,iVBORw0KGgo=", "file:///a.png"]
)
def test_an_address_of_an_image(hooked, address):
    with refused(errors.InvalidImageError, address, "its bytes"):
        hooked.prepare_messages(TASK, address)


@pytest.mark.parametrize("path", ["a\0b.png", "/" + "a" * 5000])
def test_a_path_that_cannot_be(hooked, path):
    with refused(errors.InvalidImageError, "cannot be read"):
        hooked.prepare_messages(TASK, path)


def test_an_image_without_an_end(hooked, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_BYTES", 3_000_000)
    with refused(errors.InvalidImageError, "/dev/zero", "more than 3,000,000 bytes"):
        hooked.prepare_messages(TASK, "/dev/zero")


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_white_are_no_image(hooked, mode):
    with refused(errors.InvalidImageError, f"mode {mode}", "0 to 255"):
        hooked.prepare_messages(TASK, Image.new(mode, (60, 60)))


def test_sixteen_bits_a_pixel_keep_their_greys(hooked):
    grey = Image.fromarray(np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64))
    buffer = io.BytesIO()
    grey.save(buffer, "PNG")
    for image in (grey, buffer.getvalue()):
        seen = np.asarray(hooked.prepare_messages(TASK, image).prompts[0].images[0].pixels)
        assert (seen == np.asarray(grey)[..., None] >> 8).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 500)])
def test_a_tiny_or_narrow_image_works(hooked, size):
    prepared = hooked.prepare_messages(TASK, Image.new("RGB", size))
    assert prepared.images[0].original_size == size
    assert hooked.forward(prepared, 1).logits.isfinite().all()


@pytest.mark.parametrize("size", [(1, 800), (5000, 3)])
def test_an_image_too_narrow_for_the_processor(hooked, size):
    with refused(errors.InvalidImageError, f"{size[0]} x {size[1]} pixels", "ratio"):
        hooked.prepare_messages(TASK, Image.new("RGB", size))


@pytest.mark.parametrize("task", ["", "  \n"])
def test_an_empty_prompt(hooked, screenshot, task):
    with refused(errors.InvalidInputError, "task is empty"):
        hooked.prepare_messages(task, screenshot)
    with refused(errors.InvalidInputError, "task is empty"):
        hooked.prepare_messages_batch([TASK, task])


def test_what_is_no_text(hooked, screenshot):
    with refused(errors.InvalidInputError, "task is a text, not Image"):
        hooked.prepare_messages(screenshot, TASK)
    with refused(errors.InvalidInputError, "task", "character 3"):
        hooked.prepare_messages("red\ud800", screenshot)
    with refused(errors.InvalidInputError, "assistant_prefill", "NoneType"):
        hooked.prepare_messages(TASK, screenshot, assistant_prefill=None)
    for token in ("\ud800", ""):
        with refused(errors.InvalidInputError, "token"):
            hooked.attribute(hooked.prepare_messages(TASK), target=token)


def test_a_prompt_longer_than_the_context(hooked, screenshot):
    with refused(errors.PromptTooLongError, "the prompt has", "of images", "2048"):
        hooked.prepare_messages("red " * 3000, screenshot)


def test_a_placeholder_in_the_task(hooked, screenshot):
    for texts in ({"task": "What is <|image_pad|>?"}, {"task": TASK, "assistant_prefill": "<|image_pad|>"}):
        with refused(errors.InvalidInputError, "<|image_pad|>"):
            hooked.prepare_messages(image=screenshot, **texts)


def test_a_batch_of_different_lengths(hooked, screenshot):
    with refused(errors.InvalidInputError, "2, 1 and 2"):
        hooked.prepare_messages_batch([TASK, TASK], [screenshot])
    with refused(errors.InvalidInputError, "at least one"):
        hooked.prepare_messages_batch([])
    with refused(errors.InvalidInputError, "prepare_messages"):
        hooked.prepare_messages_batch(None)
    for images in (screenshot, "screenshot.png"):
        with refused(errors.InvalidInputError, "images is a list", type(images).__name__):
            hooked.prepare_messages_batch([TASK], images)


def test_inputs_that_were_not_prepared(hooked):
    with refused(errors.InvalidInputError, "prepare_messages", "str"):
        hooked.forward(TASK)


# Options.


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        pytest.param({"max_new_tokens": -(10**5000)}, "is <int that cannot be shown>", id="more than Python writes"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"temperature": 0.5}, "do_sample=True"),
        ({"do_sample": True, "temperature": 0.0}, "greater than 0"),
        ({"do_sample": True, "temperature": float("nan")}, "greater than 0"),
        ({"do_sample": True, "temperature": 1e-60}, "temperature is 1e-60"),
        ({"do_sample": True, "temperature": [[1], [1, 2]]}, "[[1], [1, 2]]"),
        pytest.param({"do_sample": True, "temperature": 10**400}, "greater than 0", id="more than a float holds"),
        ({"do_sample": True, "top_p": 1.5}, "(0, 1]"),
        ({"do_sample": True, "top_p": 1e-50}, "top_p is 1e-50"),
        ({"do_sample": True, "seed": -1}, "seed is -1"),
        ({"do_sample": True, "temperature": "hot"}, "'hot'"),
        ({"do_sample": True, "top_p": [0.5]}, "[0.5]"),
        ({"do_sample": True, "seed": 1.5}, "seed is 1.5"),
        ({"do_sample": "no"}, "True or False"),
        ({"stop": [""]}, "stop"),
        ({"stop": 3}, "stop"),
    ],
    ids=str,
)
def test_an_option_out_of_range(hooked, inputs, options, part):
    with refused(errors.InvalidInputError, part):
        hooked.generate(inputs, **options)
    with refused(errors.InvalidInputError, part):
        hooked.stream(inputs, **options)


@pytest.mark.parametrize("keep", [-1, 10_000, [10_000], []], ids=str)
def test_logits_that_are_not_there(hooked, inputs, keep):
    with refused(errors.InvalidInputError, "logits_to_keep"):
        hooked.forward(inputs, logits_to_keep=keep)


def test_numbers_are_numbers_whoever_made_them(hooked, inputs):
    """numpy's and PyTorch's integers do what Python's do; a generator does what its list does."""
    same = [
        (np.int64(2), 2),
        ([np.int64(3), torch.tensor(-1)], [3, -1]),
        (np.array([3, 5]), [3, 5]),
        (torch.tensor([3, 5]), [3, 5]),
    ]
    for given, plain in same:
        assert torch.equal(hooked.forward(inputs, given).logits, hooked.forward(inputs, plain).logits)
    given = {"max_new_tokens": np.int32(3), "temperature": np.float32(2), "top_p": np.float64(0.9), "seed": np.int64(3)}
    plain = {"max_new_tokens": 3, "temperature": 2.0, "top_p": 0.9, "seed": 3}
    answers = [hooked.generate(inputs, do_sample=True, **each).sequences for each in (given, plain)]
    assert torch.equal(*answers)
    names = ["lm.blocks.1.attn.hook_z", "lm.blocks.2.attn.hook_z"]
    with hooked.run_with_cache((n for n in names), positions=torch.tensor([4, 2]), heads=np.int64(1)) as cache:
        hooked.forward(inputs)
    with hooked.run_with_cache(names, positions=[4, 2], heads=[1]) as expected:
        hooked.forward(inputs)
    assert list(cache) == names
    assert all(torch.equal(cache[name], expected[name]) for name in names)
    assert torch.equal(cache["z", np.int64(1)], cache[names[0]])
    steps = [
        vs.AddActivation(np.ones(192, dtype), scale=scale) for dtype, scale in ((">f8", np.int64(2)), ("<f4", 2.0))
    ]
    ends = []
    for step in steps:
        with hooked.run_with_hooks((POST, each) for each in [step]):
            ends.append(hooked.forward(inputs, 1).logits)
    assert torch.equal(*ends)


def test_results_asked_for_what_they_have_not(hooked, inputs):
    with hooked.run_with_cache(POST) as cache:
        output = hooked.forward(inputs, 1)
    why = hooked.attribute(inputs)
    wrong = [
        (lambda: output.top_tokens(2.5), "k is 2.5"),
        (lambda: why.top_patches(k=0), "k is 0"),
        (lambda: why.heads(5), "no row 5"),
        (lambda: why.image_grid("first"), "no image 'first'"),
        (lambda: inputs.images[0].token(10_000), "no image token 10000"),
        (lambda: inputs.images[0].box(1.5), "no patch 1.5"),
        (lambda: inputs.images[0].boxes_of([1.5]), "position 1.5"),
        (lambda: inputs.positions_in(("left", 0, 1, 1)), "four numbers"),
        (lambda: inputs.positions_in((0, 0, 1, 1), at_least="all"), "at_least is 'all'"),
        (lambda: cache.image_grid(cache[POST][0]), "[seq]"),
        (lambda: cache.image_grid(torch.zeros(7)), "[7]"),
        (lambda: cache.image_grid(torch.zeros(7), tile="left"), "no tile 'left'"),
        (lambda: cache[3], "not by 3"),
        (lambda: cache.stack([POST]), "wildcard"),
        (lambda: cache.to("no such device"), "cannot go to no such device"),
        (lambda: cache.save(None), "no path"),
        (lambda: cache.save("/dev/null"), "a device"),
        (lambda: why.picture(0).save("a.png", scale="large"), "'large'"),
        (lambda: why.picture(0, peak="high"), "peak is 'high'"),
        (lambda: vs.pictures.overlay(inputs, "abc"), "scores are numbers"),
    ]
    for call, part in wrong:
        with refused(errors.InvalidInputError, part):
            call()


def test_logits_that_were_not_asked_for(hooked, inputs):
    with hooked.run_with_cache(POST):
        output = hooked.forward(inputs, logits_to_keep=None)
    with refused(errors.InvalidInputError, "logits_to_keep"):
        _ = output.logits


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 10_000}, "1 to 1054"),
        ({"top_k": True}, "top_k is True"),
        ({"layers": "all"}, "0 to 4"),
        ({"layers": [5]}, "0 to 4"),
        ({"hook": "hook_z"}, "hook_resid_post"),
        ({"targets": "two words"}, "tokens"),
        ({"targets": 99_999}, "out of range"),
        ({"positions": 500}, "out of range"),
    ],
    ids=str,
)
def test_a_lens_that_is_not_possible(hooked, inputs, options, part):
    with refused(errors.InvalidInputError, part):
        hooked.logit_lens(inputs, **options)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"method": "magic"}, "direct_logit"),
        ({"steps": 0}, "1 to 4096"),
        ({"baseline": "white"}, "black"),
        ({"target": "two words"}, "tokens"),
        ({"position": 500}, "out of range"),
        ({"position": "last"}, "position is 'last'"),
        ({"position": 1.5}, "position is 1.5"),
    ],
    ids=str,
)
def test_an_attribution_that_is_not_possible(hooked, inputs, options, part):
    with refused(errors.InvalidInputError, part):
        hooked.attribute(inputs, **options)


# Hooks and selections.


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("lm.blocks.2.hook_resid_pots", "lm.blocks.2.hook_resid_post"),
        ("lm.blocks.2.hook_pattern", "attn.hook_pattern"),
        ("blocks.2.hook_resid_post", "hook_resid_post"),
        ("lm.blocks.*.nonsense", "nonsense"),
        ("", "no hook ''"),
    ],
)
def test_an_unknown_hook_names_the_nearest(hooked, name, near):
    with refused(errors.UnknownHookError, near), hooked.run_with_cache(name):
        pass
    with refused(errors.UnknownHookError, near), hooked.run_with_hooks([(name, vs.ZeroAblation())]):
        pass


@pytest.mark.parametrize("layer", [5, -1, 10**9])
def test_a_layer_out_of_range(hooked, layer):
    name = f"lm.blocks.{layer}.hook_resid_post"
    with refused(errors.UnknownHookError, f"layer {layer} of", "0 to 4"), hooked.run_with_cache(name):
        pass


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"hooks": []}, "no hooks"),
        ({"hooks": MASK}, "not captured"),
        ({"hooks": [3]}, "text"),
        ({"hooks": None}, "a list of them"),
        ({"hooks": POST, "heads": [0]}, "none of the hooks has heads"),
        ({"hooks": PATTERN, "heads": [6]}, "head 6 is out of range"),
        ({"hooks": "lm.blocks.*.attn.hook_k", "heads": [2]}, "2 kv-heads"),
        ({"hooks": PATTERN, "heads": []}, "heads"),
        ({"hooks": PATTERN, "heads": slice(0, 2)}, "heads"),
        ({"hooks": POST, "positions": 500}, "position 500 is out of range"),
        ({"hooks": POST, "positions": "first"}, "last, image, text"),
        ({"hooks": POST, "positions": []}, "no positions"),
        ({"hooks": POST, "positions": slice(400, 500)}, "mean no token"),
        ({"hooks": POST, "positions": 1.5}, "int"),
        ({"hooks": POST, "positions": slice(0.5, 2)}, "int"),
        ({"hooks": POST, "positions": np.array(True)}, "int"),
        ({"hooks": POST, "positions": 10**30}, "out of range"),
        ({"hooks": POST, "dtype": "complex64"}, "complex64"),
    ],
    ids=str,
)
def test_a_capture_that_is_not_possible(hooked, inputs, options, part):
    with refused(errors.InvalidInputError, part), hooked.run_with_cache(**options):
        hooked.forward(inputs)
    with refused(errors.InvalidInputError, part), hooked.run_with_cache(**options):
        hooked.generate(inputs, max_new_tokens=2)


def test_nested_captures(hooked):
    with hooked.run_with_cache(POST), refused(errors.InvalidInputError, "nested"), hooked.run_with_cache(POST):
        pass


def test_a_name_that_the_cache_does_not_hold(hooked, inputs):
    with hooked.run_with_cache(POST) as cache:
        with refused(errors.UnknownHookError, "nothing has run"):
            _ = cache[POST]
        hooked.forward(inputs)
    with refused(errors.UnknownHookError, "lm.blocks.*.hook_resid_post"):
        _ = cache[PATTERN]


def test_rows_with_different_numbers_of_positions(hooked, screenshot):
    batch = hooked.prepare_messages_batch([TASK, "Hello"], [screenshot, None])
    with refused(errors.InvalidInputError, "text"), hooked.run_with_cache(POST, positions="text"):
        hooked.forward(batch)
    with refused(errors.InvalidInputError, "row 1"), hooked.run_with_cache(POST, positions="image"):
        hooked.forward(batch)


# Interventions.

WRONG = {
    "a patch of the wrong width": (POST, vs.PatchActivation(torch.zeros(191)), errors.ShapeMismatchError, "[191]"),
    "a patch of the wrong length": (
        POST,
        vs.PatchActivation(np.zeros((1, 3, 192), np.float32)),
        errors.ShapeMismatchError,
        "[1, 3, 192]",
    ),
    "a patch of too many axes": (POST, vs.PatchActivation(torch.zeros(1, 1, 1, 192)), errors.ShapeMismatchError, "192"),
    "a direction of the wrong width": (POST, vs.ProjectOut(torch.zeros(3)), errors.ShapeMismatchError, "[192]"),
    "a mask of the wrong shape": (MASK, vs.SetAttentionMask(torch.ones(3, 3)), errors.ShapeMismatchError, "[3, 3]"),
    "a mask of whole numbers": (
        MASK,
        vs.SetAttentionMask(torch.ones(3, 3).long()),
        errors.InvalidInputError,
        "boolean",
    ),
    "a mask of zeros and ones in lists": (MASK, vs.SetAttentionMask([[0, 1]]), errors.InvalidInputError, "not int64"),
    "a one as a mask": (MASK, vs.SetAttentionMask(1), errors.InvalidInputError, "not int"),
    "a number that no type holds": (POST, vs.PatchActivation(2**70), errors.InvalidInputError, "2**63 - 1"),
    "a function that changes the shape": (POST, lambda x: x[..., :3], errors.ShapeMismatchError, "must return"),
    "no value": (POST, vs.PatchActivation(None), errors.InvalidInputError, "no value"),
    "a text as a scale": (POST, vs.AddActivation(1.0, scale="2"), errors.InvalidInputError, "scale"),
    "an array as a factor": (POST, vs.ScaleActivation(np.ones(192)), errors.InvalidInputError, "factor"),
    "a tensor without data": (
        POST,
        vs.AddActivation(torch.zeros(192, device="meta")),
        errors.InvalidInputError,
        "data",
    ),
    "a text as a value": (POST, vs.PatchActivation("zero"), errors.InvalidInputError, "str"),
    "a reference to a capture": (
        POST,
        vs.PatchActivation(vs.CaptureRef("c1", POST)),
        errors.InvalidInputError,
        "CaptureRef",
    ),
    "a mask on a stream": (POST, vs.BlockAttention(keys="image"), errors.InvalidInputError, "does not go with"),
    "a patch on a mask": (MASK, vs.ZeroAblation(), errors.InvalidInputError, "BlockAttention"),
    "a head on a stream": (POST, vs.PatchHead(0.0), errors.InvalidInputError, "attn.hook_z"),
    "heads of a stream": (POST, vs.ZeroAblation(heads=[0]), errors.InvalidInputError, "heads"),
    "a head out of range": (PATTERN, vs.ZeroAblation(heads=[6]), errors.InvalidInputError, "head 6"),
    "a position out of range": (POST, vs.ZeroAblation(positions=900), errors.InvalidInputError, "position 900"),
    "keys out of range": (MASK, vs.BlockAttention(keys=900), errors.InvalidInputError, "position 900"),
    "a class": (POST, vs.ZeroAblation, errors.InvalidInputError, "no intervention"),
    "a number": (POST, 3, errors.InvalidInputError, "no intervention"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_intervention_that_is_not_possible(hooked, inputs, name):
    hook, action, error, part = WRONG[name]
    for call in (hooked.forward, lambda x: hooked.generate(x, 2), hooked.logit_lens, hooked.attribute):
        with refused(error, part), hooked.run_with_hooks([(hook, action)]):
            call(inputs)


def test_what_is_no_function(hooked, inputs):
    with refused(errors.InvalidInputError, "(phase, done, total)"), hooked.run_with_progress(3):
        pass
    with refused(errors.InvalidInputError, "on_row"):
        hooked.patch_sweep(inputs, inputs, POST, positions="last", on_row=3)


def test_what_is_no_pair(hooked):
    with refused(errors.InvalidInputError, "pairs"), hooked.run_with_hooks([vs.ZeroAblation()]):
        pass


# Over the network.


@pytest.mark.parametrize(
    "call",
    [
        lambda model, inputs: model.forward(inputs, logits_to_keep=[2**40]),
        lambda model, inputs: model.generate(inputs, do_sample=True, temperature=1e-60),
        lambda model, inputs: model.generate(inputs, do_sample=True, top_p=1e-50),
        lambda model, inputs: model.run_with_hooks([(POST, vs.PatchActivation(2**70))]).__enter__(),
        lambda model, inputs: model.run_with_hooks([(MASK, vs.SetAttentionMask(np.eye(3, dtype=int)))]).__enter__(),
    ],
    ids=["logits_to_keep", "temperature", "top_p", "value", "mask"],
)
def test_what_no_message_holds_is_refused_as_in_process(hooked, remote, inputs, call):
    sentences = set()
    for model in (hooked, remote):
        with refused(errors.InvalidInputError) as caught:
            call(model, inputs)
        sentences.add((str(caught.value), caught.value.field))
    assert len(sentences) == 1


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"timeout": float("inf")}, "timeout is inf"),
        ({"timeout": 1e30}, "at most 86400"),
        ({"timeout": 0}, "above 0"),
        ({"timeout": "5"}, "timeout is '5'"),
        ({"load_timeout": "5"}, "load_timeout is '5'"),
        ({"load_timeout": None}, "load_timeout is None"),
        ({"load_timeout": float("nan")}, "seconds from 0"),
        ({"retries": "4"}, "retries is '4'"),
        ({"retries": None}, "retries is None"),
        ({"retries": -1}, "from 0"),
        ({"model": 5}, "model is a text, not int"),
        ({"token": 5}, "token is a text, not int"),
        ({"token": b"abc"}, "token is a text, not bytes"),
        ({"tls": 5}, "tls is 5; possible are True"),
        ({"tls": vs.TLS(ca=5)}, "5 cannot be read"),
        ({"tls": "a\0.pem"}, "cannot be read"),
    ],
    ids=str,
)
def test_a_connection_that_is_not_possible(options, part):
    with refused(errors.InvalidInputError, part):
        vs.connect("127.0.0.1:1", **options)


def test_a_connection_s_numbers_are_numbers_whoever_made_them(server):
    with vs.connect(server, timeout=np.float32(60), load_timeout=np.int64(60), retries=np.int8(2)) as model:
        assert model.generate(model.prepare_messages(TASK), max_new_tokens=1).text


# Models.


def test_an_unknown_model(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with refused(errors.UnknownModelError, "'no/such-model'", "spectra-tiny"):
        vs.HookedVLM.from_pretrained("no/such-model", device="cpu")


def test_a_directory_without_a_model(tmp_path):
    with refused(errors.InvalidInputError, str(tmp_path), "cannot be loaded"):
        vs.HookedVLM.from_pretrained(str(tmp_path), device="cpu")


@pytest.mark.parametrize("options", [{"device": "tpu"}, {"device": "cuda:99"}, {"dtype": "int3"}], ids=str)
def test_a_placement_that_is_not_possible(options):
    with refused(errors.InvalidInputError, next(iter(options.values()))):
        vs.HookedVLM.from_pretrained("spectra-tiny", **{"device": "cpu", **options})
