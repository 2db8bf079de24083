"""The TypeScript client: the corpus, the same bits as Python's client from the same server, cuts, cancels, refusals."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import vlm_spectra as vs
from conftest import start_server, stop_server
from proxy import Proxy
from vlm_spectra.arrays import to_numpy
from vlm_spectra.inputs import on_grid
from vlm_spectra_server.serving.host import Loading
from vlm_spectra_server.serving.server import Limits, Server
from vlm_spectra_server.spectra_tiny.parts import write_random

ROOT = Path(__file__).parent.parent
CLIENT = ROOT / "clients" / "typescript"
POST = "lm.blocks.*.hook_resid_post"
LONG = "one two three four five six seven eight nine ten " * 60

pytestmark = pytest.mark.skipif(
    shutil.which("node") is None or shutil.which("npm") is None, reason="node and npm are not installed"
)


def run(*command, cwd=CLIENT, **options):
    done = subprocess.run(list(map(str, command)), cwd=cwd, check=True, capture_output=True, text=True, **options)
    return done.stdout


@pytest.fixture(scope="module")
def built():
    """The client, compiled."""
    if not (CLIENT / "node_modules" / ".bin" / "tsc").exists():
        try:
            run("npm", "install", "--no-audit", "--no-fund", timeout=120)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"npm cannot install the client's packages: {str(error.stderr or error)[-200:]}")
    made = subprocess.run(["npx", "tsc"], cwd=CLIENT, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout
    return CLIENT / "build"


@pytest.fixture(scope="module")
def live(built):
    def call(command, address, *files):
        return json.loads(run("node", built / "test" / "live.js", command, address, *files, timeout=200))

    return call


@pytest.fixture(scope="module")
def pictures(screenshot, photo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    screenshot.save(folder / "first.png")
    photo.save(folder / "second.png")
    return folder / "first.png", folder / "second.png"


def test_the_corpus_and_the_units(built):
    run("node", "--test", built / "test" / "conformance.test.js", built / "test" / "units.test.js")


def test_generated_code_is_current(built, tmp_path):
    template = (CLIENT / "buf.gen.yaml").read_text()
    (tmp_path / "buf.gen.yaml").write_text(template.replace("out: src/gen", f"out: {tmp_path / 'gen'}"))
    tools = os.pathsep.join([str(CLIENT / "node_modules" / ".bin"), str(Path(sys.executable).parent)])
    environment = {**os.environ, "PATH": tools + os.pathsep + os.environ["PATH"]}
    run("buf", "generate", "--template", tmp_path / "buf.gen.yaml", env=environment)
    made = sorted(path.relative_to(tmp_path / "gen") for path in (tmp_path / "gen").rglob("*.ts"))
    assert made == sorted(path.relative_to(CLIENT / "src" / "gen") for path in (CLIENT / "src" / "gen").rglob("*.ts"))
    for path in made:
        kept = (CLIENT / "src" / "gen" / path).read_text()
        assert kept == (tmp_path / "gen" / path).read_text(), f"{path} is not current: run `npm run generate`"


def test_no_any():
    for path in (CLIENT / "src").glob("*.ts"):
        assert not re.search(r"[:<|,(]\s*any\b|as any\b|@ts-", path.read_text()), path


def summary(array):
    array = to_numpy(array)
    return [array.dtype.name, list(array.shape), hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()]


def expected(model, first, second):
    """What the same calls give in Python."""
    arrays, plain = {}, {}

    def add(prefix, found):
        arrays.update({f"{prefix}/{name}": summary(array) for name, array in found.items()})

    inputs = model.prepare_messages("Click on the red circle", first)
    tasks = ["Click on the red circle", "How many widgets are there?", "Say hello"]
    batch = model.prepare_messages_batch(tasks, [first, second, None])
    info = model.info
    plain["info"] = [info.name, info.layers, info.vocab, info.dtype, info.parameters]
    plain["hooks"] = sorted(model.catalogue.by_name)
    plain["ids"] = [inputs.input_ids.tolist(), batch.input_ids.tolist(), batch.attention_mask.tolist()]
    plain["labels"] = [inputs.token_labels, batch.token_labels, batch.text]
    plain["layouts"] = [
        [i.row, i.original_size, i.processed_size, i.grid, i.positions, i.patch_grids] for i in batch.images
    ]
    for name, each in (("one", inputs), ("batch", batch)):
        with model.run_with_cache(lambda name: True) as cache:
            output = model.forward(each)
        add(name, {hook: cache[hook] for hook in cache.names})
        add(name, {"logits": output.logits, "stack": cache.stack(POST)})
        plain[f"names {name}"], plain[f"bytes {name}"] = cache.names, cache.nbytes
        pattern = cache["lm.blocks.1.attn.hook_pattern"][0][0][-1]
        add(name, {"grid": on_grid(pattern, each.images[0])})
        answer = model.generate(each, max_new_tokens=6)
        add(f"generate {name}", {"sequences": answer.sequences, "logprobs": answer.logprobs})
        plain[f"text {name}"] = answer.text
        lens = model.logit_lens(each, top_k=3, positions="last")
        fields = ("token_ids", "logits", "probs", "entropy", "kl_to_final")
        add(f"lens {name}", {field: getattr(lens, field) for field in fields})
        plain[f"lens {name}"] = lens.tokens[0][0][0]
        why = model.attribute(each)
        add(f"direct {name}", {"scores": why.scores, "total": why.total, "value": why.target_value})
        add(f"direct {name}", {"heads": why.head_scores, "grid": why.image_grid(0)})
    with model.run_with_cache(f"{POST}_grad", backward_from=(5, 6)) as gradient:
        model.forward(inputs, None)
    add("gradient", {hook: gradient[hook] for hook in gradient.names})
    hooks = ["lm.blocks.*.attn.hook_pattern", POST]
    with model.run_with_cache(hooks, positions="last", heads=[1], dtype="bfloat16") as selected:
        answer = model.generate(inputs, 4, do_sample=True, temperature=0.8, top_p=0.9, seed=7)
    add("selected", {hook: selected[hook] for hook in selected.names} | {"sequences": answer.sequences})
    vector = np.sin(np.arange(info.hidden)).astype(np.float32)
    with model.run_with_cache("lm.blocks.1.hook_resid_post") as held:
        model.forward(inputs, None)
    changes = {
        "add": [("lm.blocks.2.hook_resid_post", vs.AddActivation(vector, 2.0, positions="last"))],
        "zero": [("lm.blocks.*.hook_mlp_out", vs.ZeroAblation(positions=[-1, slice(0, 3)]))],
        "scale": [("lm.blocks.1.attn.hook_pattern", vs.ScaleActivation(0.5, heads=[0]))],
        "project": [
            ("lm.blocks.*.hook_resid_pre", vs.ProjectOut(vector)),
            ("lm.blocks.1.hook_attn_out", vs.MeanAblation()),
        ],
        "block": [("lm.blocks.*.attn.hook_mask", vs.BlockAttention(positions="last", keys=[0, 1]))],
        "patch": [("lm.blocks.2.hook_resid_post", vs.PatchActivation(held["lm.blocks.1.hook_resid_post"]))],
    }
    for name, interventions in changes.items():
        with model.run_with_hooks(interventions):
            output = model.forward(inputs, 2, output_hidden_states=True)
        add(f"change {name}", {"logits": output.logits, "last": output.hidden_states[-1]})
    corrupted = model.prepare_messages("Click on the red square", first)
    sweep = model.patch_sweep(inputs, corrupted, POST, positions=[-2, -1])
    add("sweep", {f"values.{hook}": values for hook, values in zip(sweep.hooks, sweep.values, strict=True)})
    plain["sweep"] = [sweep.hooks, sweep.columns]
    add("unembed", {"directions": model.unembed(["click", 5])})
    plain["stream"] = [[token.text, token.id] for token in model.stream(inputs, 6)]
    plain["top"] = [[token.text for token in place] for place in model.forward(inputs, 2).top_tokens(3)[0]]
    estimate = model.estimate(inputs, POST)
    plain["estimate"] = [estimate.nbytes, [[name, list(shape)] for name, shape in estimate.shapes.items()]]
    return arrays, json.loads(json.dumps(plain))


def test_every_call_is_pythons_bit_for_bit(live, server, remote_numpy, pictures):
    found = live("collect", server, *pictures)
    arrays, plain = expected(remote_numpy, *pictures)
    every = {name for name, spec in remote_numpy.catalogue.by_name.items() if not spec.intervene_only}
    assert every == {name.removeprefix("one/") for name in arrays} & every
    found["plain"]["hooks"].sort()
    assert found["plain"] == plain
    assert {name: found["arrays"][name] for name in arrays} == arrays


REASONS = {
    "hook": ["UnknownHookError", "UNKNOWN_HOOK", "hooks"],
    "layer": ["UnknownHookError", "UNKNOWN_HOOK", "hooks"],
    "position": ["InvalidInputError", "INVALID_INPUT", "positions"],
    "heads": ["InvalidInputError", "INVALID_INPUT", "heads"],
    "gradient": ["InvalidInputError", "INVALID_INPUT", "backward_from"],
    "shape": ["ShapeMismatchError", "SHAPE_MISMATCH", "value"],
    "reference": ["CaptureNotFoundError", "CAPTURE_NOT_FOUND", "capture_id"],
    "token": ["InvalidInputError", "INVALID_INPUT", "target"],
    "temperature": ["InvalidInputError", "INVALID_INPUT", "temperature"],
    "image": ["InvalidImageError", "INVALID_IMAGE", "image"],
    "long": ["PromptTooLongError", "PROMPT_TOO_LONG", "task"],
    "model": ["UnknownModelError", "UNKNOWN_MODEL", "model"],
    "empty": ["InvalidInputError", "INVALID_INPUT", "task"],
    "tokens": ["InvalidInputError", "INVALID_INPUT", "max_new_tokens"],
    "aborted": ["CancelledError", "CANCELLED", ""],
    "nobody": ["UnavailableError", "UNAVAILABLE", ""],
    "address": ["InvalidInputError", "INVALID_INPUT", "address"],
    "plaintext": ["InvalidInputError", "INVALID_INPUT", "tls"],
}


def test_what_is_refused_has_its_reason(live, server):
    found = live("reasons", server)
    assert {name: error[:3] for name, error in found.items()} == REASONS
    assert "nearest: 'lm.blocks.*.hook_resid_post'" in found["hook"][3]


def test_every_reason_has_a_class(built):
    reasons = (CLIENT / "src" / "errors.ts").read_text()
    missing = [reason for reason in vs.errors.BY_REASON if f'"{reason}"' not in reasons]
    assert missing == ["MISSING_EXTRA"]  # of Python packages


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    """A server in this process with a model whose captures are some 20 MB and whose answers take minutes."""
    shape = {"hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 16, "num_attention_heads": 8}
    directory = str(write_random(tmp_path_factory.mktemp("wide") / "model", text=shape))
    server = Server(limits=Limits(host_bytes=120 << 20, capture_bytes=100 << 20))
    server.start(Loading(directory, device="cpu"))
    assert server.first.settled.wait(120)
    yield server
    server.stop(0)


def test_cuts_and_damage_and_the_model_ran_once(built, front, monkeypatch):
    with vs.connect(front.address, arrays="numpy", shared_memory=False) as model:
        with model.run_with_cache(POST) as cache:
            model.forward(model.prepare_messages(LONG), logits_to_keep=None)
        truth = {name: summary(cache[name]) for name in cache.names}
        size = cache.nbytes
    submitted, submit = [], front.first.submit

    def counted(client, method, *rest):
        submitted.append(method)
        return submit(client, method, *rest)

    monkeypatch.setattr(front.first, "submit", counted)
    with Proxy(front.address) as proxy:
        command = ["node", str(built / "test" / "live.js"), "capture", proxy.address]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr.readline() == "prepared\n"
        proxy.cuts = sorted(proxy.carried + at for at in random.Random(5).sample(range(2000, size), 6))
        proxy.damage = [proxy.carried + size // 3]
        found, errors = process.communicate("go\n", timeout=120)
        assert process.returncode == 0, errors
        assert not proxy.cuts
    assert json.loads(found) == truth
    assert submitted.count("RunWithCache") == 1


def test_a_client_that_leaves_frees_the_worker(live, front):
    with vs.connect(front.address) as model:
        inputs = model.prepare_messages("Say hello")
        begun = time.monotonic()
        model.generate(inputs, max_new_tokens=60)
        whole = (time.monotonic() - begun) * 1500 / 60
    begun = time.monotonic()
    assert live("leave", front.address) == ["CANCELLED", "CANCELLED", "1", "1", "1"]
    assert time.monotonic() - begun < whole, "three answers that were left took longer than one to its end"
    end = time.monotonic() + 20
    while front.first._running is not None:
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate, and is missing")
def test_tls_and_tokens(live, tmp_path):
    key, paper, names = tmp_path / "key", tmp_path / "paper.pem", "subjectAltName=DNS:localhost"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    run("openssl", "req", "-x509", *curve, "-subj", "/CN=us", "-addext", names, "-keyout", key, "-out", paper)
    tokens = {"all": "all-" + "a" * 30, "infer": "infer-" + "b" * 30}
    for name, token in tokens.items():
        (tmp_path / name).write_text(token)
    (tmp_path / "tokens").write_text(f"all * {tokens['all']}\ninfer infer {tokens['infer']}\n")
    (tmp_path / "tokens").chmod(0o600)
    files = ["--tls-certificate", paper, "--tls-key", key, "--token-file", tmp_path / "tokens"]
    process, address = start_server("--model", "spectra-tiny", "--device", "cpu", *map(str, files))
    try:
        found = live("secure", address, paper, tmp_path / "all", tmp_path / "infer")
    finally:
        stop_server(process)
    assert found == [1, "MISSING_SCOPE", "UNAUTHENTICATED", "UNAUTHENTICATED", "UNAVAILABLE", "UNAVAILABLE"]


def test_the_package_installs_and_runs_in_an_empty_project(built, server, pictures, tmp_path):
    packed = run("npm", "pack", "--pack-destination", tmp_path, "--json", "--ignore-scripts")
    name = json.loads(packed[packed.index("[") :])[0]["filename"]
    (tmp_path / "package.json").write_text('{"name": "empty", "version": "1.0.0", "private": true, "type": "module"}')
    try:
        run("npm", "install", "--no-audit", "--no-fund", "--prefer-offline", f"./{name}", cwd=tmp_path, timeout=120)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"npm cannot install the package's own: {str(error.stderr or error)[-200:]}")
    shutil.copy(CLIENT / "examples" / "look.mjs", tmp_path)
    shown = run("node", "look.mjs", server, "Click on the red circle", pictures[0], cwd=tmp_path, timeout=60)
    assert "layer 0:" in shown
    assert "where the last layer looks" in shown
    broken = subprocess.run(
        ["node", "look.mjs", "127.0.0.1:1", "x"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert broken.returncode == 1
    assert broken.stderr.startswith("UNAVAILABLE: the server at 127.0.0.1:1")
