"""Real models' sizes without their weights, and where a model is placed."""

from __future__ import annotations

import json

import pytest
import torch
import vlm_spectra as vs
from accelerate import cpu_offload, dispatch_model
from transformers import AutoModelForImageTextToText
from vlm_spectra.errors import InvalidInputError, UnknownHookError, UnknownModelError
from vlm_spectra_server import cli
from vlm_spectra_server.checkpoints import refuse_offloaded
from vlm_spectra_server.hooked.catalogue import build_catalogue
from vlm_spectra_server.sizes import Prompt, build, capture_sizes, configuration, configurations
from vlm_spectra_server.spectra_tiny import DIRECTORY

SHAPES = {  # layers, heads, kv heads, head_dim, hidden, mlp
    "UI-TARS-1.5-7B": (28, 28, 4, 128, 3584, 18944),
    "Qwen2.5-VL-72B": (80, 64, 8, 128, 8192, 29568),
    "Qwen3-VL-8B": (36, 32, 8, 128, 4096, 12288),
    "LLaVA-1.5-7B": (32, 32, 32, 128, 4096, 11008),
    "SmolVLM-256M": (30, 9, 3, 64, 576, 1536),
}


@pytest.fixture(scope="module", params=SHAPES)
def real(request):
    known = configuration(request.param)
    reading = build(known)
    return known, reading, build_catalogue(reading)


def test_a_real_model_has_the_known_number_of_parameters(real):
    known, reading, _ = real
    assert sum(parameter.numel() for parameter in reading.model.parameters()) == known.parameters
    assert all(parameter.device.type == "meta" for parameter in reading.model.parameters())
    found = len(reading.blocks), reading.heads, reading.kv_heads, reading.head_dim, reading.hidden, reading.mlp
    assert found == SHAPES[known.name]


def test_the_sizes_are_the_catalogue_s(real):
    known, reading, catalogue = real
    layers, heads, kv_heads, width, hidden, mlp = SHAPES[known.name]
    listed = {size.name: size for size in capture_sizes(reading, catalogue, Prompt(tokens=500, batch=2))}
    hooks = [name for name, spec in catalogue.by_name.items() if not spec.intervene_only]
    assert sum(size.count for size in listed.values()) == len(hooks)
    for name, shape in {
        "hook_resid_post": (2, 500, hidden),
        "attn.hook_pattern": (2, heads, 500, 500),
        "attn.hook_rot_k": (2, 500, kv_heads, width),
        "attn.hook_head_out": (2, 500, heads, hidden),
        "mlp.hook_post": (2, 500, mlp),
    }.items():
        size = listed[f"lm.blocks.*.{name}"]
        assert (size.count, size.shape) == (layers, shape)
        count = layers
        for extent in shape:
            count *= extent
        assert size.bytes == 2 * count  # bfloat16 or float16
    cut = Prompt(tokens=500, positions=1, heads=2, dtype="float32")
    (size,) = capture_sizes(reading, catalogue, cut, ["lm.blocks.*.attn.hook_pattern"])
    assert (size.shape, size.bytes) == ((1, 2, 1, 500), layers * 2 * 500 * 4)


def test_the_prediction_is_what_a_run_delivers(hooked, inputs):
    prompt = Prompt(tokens=inputs.input_ids.shape[1])
    predicted = capture_sizes(
        hooked.reading, hooked.catalogue, prompt, ["lm.*", "lm.*.*", "lm.blocks.*.*", "lm.blocks.*.*.*"]
    )
    with hooked.run_with_cache(lambda name: name.startswith("lm.")) as cache:
        hooked.forward(inputs, logits_to_keep=None)
    assert sum(size.bytes for size in predicted) == sum(tensor.nbytes for tensor in cache.values())


def test_the_command(capsys):
    assert cli.main(["sizes"]) == 0
    assert capsys.readouterr().out.split()[0] in configurations()
    pattern = "lm.blocks.*.attn.hook_pattern"
    assert cli.main(["sizes", "smolvlm-256m", "--tokens", "1000", "--hooks", pattern]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split() == [pattern, "30", "[1,", "9,", "1000,", "1000]", "bfloat16", "540.0"]
    assert lines[-1].split() == ["in", "all", "30", "540.0"]
    assert cli.main(["sizes", "SmolVLM-256M", "--hooks", "lm.hook_embed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hooks"][0]["bytes"] == 1000 * 576 * 2
    for arguments, words in (
        (["sizes", "GPT-2"], "UI-TARS-1.5-7B"),
        (["sizes", "SmolVLM-256M", "--hooks", "lm.blocks.31.hook_resid_post"], "layer 31"),
        (["sizes", "SmolVLM-256M", "--tokens", "0"], "tokens is 0"),
    ):
        assert cli.main(arguments) == 1
        assert words in capsys.readouterr().err


def test_errors_are_typed(hooked):
    with pytest.raises(UnknownModelError):
        configuration("nothing")
    with pytest.raises(InvalidInputError, match="cannot be kept"):
        Prompt(tokens=3, positions=4)
    with pytest.raises(UnknownHookError):
        capture_sizes(hooked.reading, hooked.catalogue, Prompt(), ["lm.nothing"])


# Placement.

HOOKS = ["lm.hook_embed", "lm.blocks.*.attn.hook_pattern", "lm.blocks.*.attn.hook_head_out", "lm.blocks.*.hook_resid_*"]
GRADIENTS = ["lm.hook_embed_grad", "lm.blocks.*.attn.hook_q_grad"]


def run(model, inputs):
    with model.run_with_cache([*HOOKS, *GRADIENTS], backward_from=" red") as cache:
        output = model.forward(model.prepared(inputs))
    return output.logits, {name: cache[name] for name in cache.names}


def same(found, expected) -> bool:
    assert list(found[1]) == list(expected[1])
    tensors = all(torch.equal(tensor, expected[1][name]) for name, tensor in found[1].items())
    return torch.equal(found[0], expected[0]) and tensors


@pytest.fixture(scope="module")
def expected(hooked, inputs):
    return run(hooked, inputs)


@pytest.mark.parametrize("device", ["auto", {"": "cpu"}], ids=["auto", "a mapping"])
def test_a_device_map(device, inputs, expected):
    if device == "auto" and torch.cuda.is_available():
        pytest.skip("on this machine a model spreads over GPUs, which round differently")
    assert same(run(vs.HookedVLM.from_pretrained("spectra-tiny", device=device), inputs), expected)


@pytest.mark.parametrize("ours_first", [True, False])
def test_accelerate_s_hooks_and_ours_go_together(ours_first, hooked, inputs, expected):
    """Both replace `forward`; in either order every module runs within both."""
    model = AutoModelForImageTextToText.from_pretrained(DIRECTORY).eval().requires_grad_(False)
    ours = vs.HookedVLM(model, hooked.processor) if ours_first else None
    places = {name: "cpu" for name, module in model.named_modules() if name and not list(module.children())}
    dispatch_model(model, places, main_device="cpu", force_hooks=True)
    assert sum(hasattr(module, "_hf_hook") for module in model.modules()) > 60
    assert same(run(ours or vs.HookedVLM(model, hooked.processor), inputs), expected)


def test_offloaded_weights_are_refused():
    model = AutoModelForImageTextToText.from_pretrained(DIRECTORY)
    refuse_offloaded("spectra-tiny", model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(InvalidInputError, match=r"does not fit: 0\.00 of its 0\.00 billion"):
        refuse_offloaded("spectra-tiny", model)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda:99", "device 'cuda:99' is not possible here"),
        ("nowhere", "device 'nowhere' is not possible here"),
        ({"": "disk"}, "does not fit"),
    ],
    ids=str,
)
def test_a_placement_that_is_not_possible_is_refused(device, words):
    with pytest.raises(InvalidInputError, match=words):
        vs.HookedVLM.from_pretrained("spectra-tiny", device=device)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_captures_on_several_devices_end_up_right(inputs, expected):
    model = vs.HookedVLM.from_pretrained("spectra-tiny", device="balanced")
    assert len({parameter.device for parameter in model.model.parameters()}) > 1
    found = run(model, inputs)[1]
    assert len({tensor.device for tensor in found.values()}) == 1
    for name, tensor in found.items():
        assert torch.allclose(tensor.cpu(), expected[1][name], atol=1e-3), name
