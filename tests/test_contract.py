"""One suite of calls, on every kind of model: in process, remote, remote with numpy arrays, and from an environment
that has only the base install. All results are the same, bit for bit (float32, one machine)."""

from __future__ import annotations

import json
import subprocess
import textwrap
from pathlib import Path

import congruence
import numpy as np
import pytest
import vlm_spectra as vs

ROOT = Path(__file__).parent.parent
CLIENT = ROOT / ".venv-client" / "bin" / "python"


@pytest.fixture(scope="module")
def expected(hooked, screenshot, photo):
    return congruence.collect(hooked, screenshot, photo)


def assert_same(found, expected):
    arrays, plain = found
    assert plain == expected[1]
    assert list(arrays) == list(expected[0])
    for name, array in expected[0].items():
        assert arrays[name].dtype == array.dtype, name
        assert arrays[name].shape == array.shape, name
        assert arrays[name].tobytes() == np.ascontiguousarray(array).tobytes(), f"{name} differs"


def test_the_suite_covers_every_hook(expected, hooked):
    by_name = hooked.catalogue.by_name
    names = {name.removeprefix("one image/") for name in expected[0]}
    assert {name for name, spec in by_name.items() if name.startswith("lm.") and not spec.intervene_only} <= names
    assert {by_name[name].name for name in names if name in by_name} == {
        spec.name for spec in hooked.hooks() if not spec.intervene_only
    }


@pytest.mark.parametrize("kind", ["remote", "remote_numpy"])
def test_remote_is_in_process_bit_for_bit(kind, request, expected, screenshot, photo):
    model = request.getfixturevalue(kind)
    assert isinstance(model, vs.VLM)
    assert_same(congruence.collect(model, screenshot, photo), expected)


def test_in_process_has_the_whole_interface(hooked):
    assert isinstance(hooked, vs.VLM)


def test_a_laptop_with_only_the_base_install(server, expected, screenshot, photo, tmp_path):
    if not CLIENT.exists():
        pytest.skip("no .venv-client: `make test` makes it, an environment with only the base install")
    screenshot.save(tmp_path / "first.png")
    photo.save(tmp_path / "second.png")
    script = f"""
        import importlib.util, json, sys
        assert not any(importlib.util.find_spec(name) for name in ("torch", "transformers"))
        sys.path.insert(0, {str(ROOT / "tests")!r})
        import congruence, numpy as np, vlm_spectra as vs
        from PIL import Image
        first, second = Image.open("first.png"), Image.open("second.png")
        with vs.connect({server!r}) as model:
            arrays, plain = congruence.collect(model, first, second)
            with model.run_with_cache("lm.hook_embed") as cache:
                model.forward(model.prepare_messages("Say hello"))
            cache.save("cache.safetensors")
            again = vs.ActivationCache.load("cache.safetensors")
            assert (again["lm.hook_embed"] == cache["lm.hook_embed"]).all()
        bits = {{name: array.view(np.uint16) if array.dtype.itemsize == 2 else array for name, array in arrays.items()}}
        np.savez("arrays.npz", **bits)
        json.dump(plain, open("plain.json", "w"))
        assert "torch" not in sys.modules
        try:
            vs.HookedVLM
        except vs.SpectraError as error:
            assert "pip install" in str(error)
        else:
            raise AssertionError
    """
    subprocess.run([CLIENT, "-c", textwrap.dedent(script)], cwd=tmp_path, check=True, timeout=280)
    with np.load(tmp_path / "arrays.npz") as file:
        arrays = {name: file[name].view(expected[0][name].dtype) for name in file.files}
    plain = json.loads((tmp_path / "plain.json").read_text())
    assert_same((arrays, plain), (expected[0], json.loads(json.dumps(expected[1]))))
