"""The TypeScript client: the corpus, the same bits as Python's client from the same server, cuts, cancels, refusals."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import vlm_spectra as vs
from conftest import another_door
from nodejs import CLIENT, compiled, needs_node, run
from papers import key, openssl, pem
from proxy import Proxy
from same_calls import POST, compare, summary
from vlm_spectra_server.serving.auth import Tokens
from vlm_spectra_server.serving.tls import Certificates

LONG = "one two three four five six seven eight nine ten " * 60

pytestmark = needs_node


@pytest.fixture(scope="module")
def built():
    return compiled()


@pytest.fixture(scope="module")
def live(built):
    def call(command, address, *files):
        return json.loads(run("node", built / "test" / "live.js", command, address, *files, timeout=200))

    return call


def test_the_corpus_and_the_units(built):
    run("node", "--test", *(built / "test" / f"{name}.test.js" for name in ("conformance", "units", "fuzz", "remote")))


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


def test_lint(built):
    """No `any`, no promise left alone, nothing of Node's where a browser reads it."""
    done = subprocess.run(["npm", "run", "lint", "--silent"], cwd=CLIENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_call_is_pythons_bit_for_bit(live, server, same_calls):
    compare(live("collect", server, *same_calls.files), same_calls)


REASONS = {
    "hook": ["UnknownHookError", "UNKNOWN_HOOK", "hooks"],
    "layer": ["UnknownHookError", "UNKNOWN_HOOK", "hooks"],
    "predicate": ["UnknownHookError", "UNKNOWN_HOOK", "hooks"],
    "position": ["InvalidInputError", "INVALID_INPUT", "positions"],
    "positions": ["InvalidInputError", "INVALID_INPUT", "positions"],
    "heads": ["InvalidInputError", "INVALID_INPUT", "heads"],
    "both": ["InvalidInputError", "INVALID_INPUT", "generate"],
    "gradient": ["InvalidInputError", "INVALID_INPUT", "backward_from"],
    "reduce": ["InvalidInputError", "INVALID_INPUT", "reduce"],
    "shape": ["ShapeMismatchError", "SHAPE_MISMATCH", "value"],
    "ragged": ["InvalidInputError", "INVALID_INPUT", ""],
    "reference": ["CaptureNotFoundError", "CAPTURE_NOT_FOUND", "capture_id"],
    "intervention": ["UnknownHookError", "UNKNOWN_HOOK", "hooks"],
    "token": ["InvalidInputError", "INVALID_INPUT", "target"],
    "window": ["InvalidInputError", "INVALID_INPUT", "method"],
    "sweep": ["InvalidInputError", "INVALID_INPUT", "corrupted"],
    "temperature": ["InvalidInputError", "INVALID_INPUT", "temperature"],
    "topP": ["InvalidInputError", "INVALID_INPUT", "top_p"],
    "image": ["InvalidImageError", "INVALID_IMAGE", "image"],
    "file": ["InvalidImageError", "INVALID_IMAGE", "image"],
    "long": ["PromptTooLongError", "PROMPT_TOO_LONG", "task"],
    "model": ["UnknownModelError", "UNKNOWN_MODEL", "model"],
    "empty": ["InvalidInputError", "INVALID_INPUT", "task"],
    "batch": ["InvalidInputError", "INVALID_INPUT", "tasks"],
    "tokens": ["InvalidInputError", "INVALID_INPUT", "max_new_tokens"],
    "aborted": ["CancelledError", "CANCELLED", ""],
    "deadline": ["DeadlineError", "DEADLINE_EXCEEDED", ""],
    "nobody": ["UnavailableError", "UNAVAILABLE", ""],
    "address": ["InvalidInputError", "INVALID_INPUT", "address"],
    "plaintext": ["InvalidInputError", "INVALID_INPUT", "tls"],
    "secret": ["InvalidInputError", "INVALID_INPUT", "token"],
    "key": ["InvalidInputError", "INVALID_INPUT", "tls"],
    "keepAlive": ["InvalidInputError", "INVALID_INPUT", "timeout"],
    "closed": ["UnavailableError", "UNAVAILABLE", ""],
}


def test_what_is_refused_has_its_reason(live, server):
    found = live("reasons", server)
    assert {name: error[:3] for name, error in found.items()} == REASONS
    assert "nearest: 'lm.blocks.*.hook_resid_post'" in found["hook"][3]


def test_every_reason_has_a_class(built):
    reasons = (CLIENT / "src" / "errors.ts").read_text()
    missing = [reason for reason in vs.errors.BY_REASON if f'"{reason}"' not in reasons]
    assert missing == ["MISSING_EXTRA"]  # of Python packages


def test_cuts_and_damage_and_the_model_ran_once(built, wide_front, monkeypatch):
    with vs.connect(wide_front.address, arrays="numpy", shared_memory=False) as model:
        with model.run_with_cache(POST) as cache:
            model.forward(model.prepare_messages(LONG), logits_to_keep=None)
        truth = {name: summary(cache[name]) for name in cache.names}
        size = cache.nbytes
    submitted, submit = [], wide_front.first.submit

    def counted(client, method, *rest):
        submitted.append(method)
        return submit(client, method, *rest)

    monkeypatch.setattr(wide_front.first, "submit", counted)
    with Proxy(wide_front.address) as proxy:
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


def worked(wide_front):
    """Seconds of processor time that the worker has taken."""
    fields = Path(f"/proc/{wide_front.first.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_client_that_leaves_frees_the_worker(live, wide_front):
    with vs.connect(wide_front.address) as model:
        inputs = model.prepare_messages("Say hello")
        begun = worked(wide_front)
        model.generate(inputs, max_new_tokens=100)
        whole = (worked(wide_front) - begun) * 1500 / 100
    begun = worked(wide_front)
    assert live("leave", wide_front.address) == ["1", *["CANCELLED", "1"] * 2]
    assert worked(wide_front) - begun < whole, "three answers that were left took the worker longer than one to its end"


@openssl
def test_tls_and_tokens(live, front, papers, tmp_path):
    ca, ours = papers["ca"], papers["server"]
    tokens = {"all": "all-" + "a" * 30, "infer": "infer-" + "b" * 30}
    for name, token in tokens.items():
        (tmp_path / name).write_text(token)
    (tmp_path / "tokens").write_text(f"all * {tokens['all']}\ninfer infer {tokens['infer']}\n")
    (tmp_path / "tokens").chmod(0o600)
    certificates = Certificates(pem(ours), key(ours))
    with another_door(front, tokens=Tokens(str(tmp_path / "tokens")), certificates=certificates) as server:
        found = live("secure", server.address, pem(ca), tmp_path / "all", tmp_path / "infer")
    assert found == [1, "MISSING_SCOPE", "UNAUTHENTICATED", "UNAUTHENTICATED", "UNAVAILABLE", "UNAVAILABLE"]


@openssl
def test_clients_with_certificates(live, front, papers):
    ca, ours, bob = papers["ca"], papers["server"], papers["bob"]
    with another_door(front, certificates=Certificates(pem(ours), key(ours), pem(ca))) as server:
        layers, reason = live("mutual", server.address, pem(ca), pem(bob), key(bob))
    assert layers > 1
    assert reason == "UNAVAILABLE"


def test_a_call_is_made_again_when_the_server_said(live, wide_front, monkeypatch):
    """Twice refused and then served; refused to one that does not ask again; to one that has not the time to; and a
    request that its worker died of is tried again once."""
    full, died, submit = vs.errors.BusyError, vs.errors.WorkerDiedError, wide_front.first.submit
    answers = iter([(full, 0.05), (full, 0.05), None, (full, 0.05), (full, 30.0), (died, 0.05), (died, 0.05)])

    def busy(client, method, *rest):
        answer = next(answers) if method == "Generate" else None
        if answer is not None:
            raise answer[0]("not now.", retry_after=answer[1])
        return submit(client, method, *rest)

    monkeypatch.setattr(wide_front.first, "submit", busy)
    assert live("retries", wide_front.address) == ["1", "QUEUE_FULL", "QUEUE_FULL", "WORKER_DIED"]
    assert next(answers, None) is None


def test_the_package_installs_and_runs_in_an_empty_project(built, server, same_calls, tmp_path):
    packed = run("npm", "pack", "--pack-destination", tmp_path, "--json", "--ignore-scripts")
    name = json.loads(packed[packed.index("[") :])[0]["filename"]
    (tmp_path / "package.json").write_text('{"name": "empty", "version": "1.0.0", "private": true, "type": "module"}')
    try:
        run("npm", "install", "--no-audit", "--no-fund", "--prefer-offline", f"./{name}", cwd=tmp_path, timeout=120)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"npm cannot install the package's own: {str(error.stderr or error)[-200:]}")
    (tmp_path / "page.js").write_text(
        'import { connect } from "@vlm-spectra/client/web"; connect("http://localhost:1");'
    )
    run(CLIENT / "node_modules" / ".bin" / "esbuild", "page.js", "--bundle", "--outfile=bundle.js", cwd=tmp_path)
    assert "connect" in (tmp_path / "bundle.js").read_text()  # a module of Node's would have ended it
    shutil.copy(CLIENT / "examples" / "look.mjs", tmp_path)
    shown = run("node", "look.mjs", server, "Click on the red circle", same_calls.files[0], cwd=tmp_path, timeout=60)
    assert "layer 0:" in shown
    assert "where the last layer looks" in shown
    broken = subprocess.run(
        ["node", "look.mjs", "127.0.0.1:1", "x"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert broken.returncode == 1
    assert broken.stderr.startswith("UNAVAILABLE: the server at 127.0.0.1:1")
