"""C++ by Debian's gRPC: the conformance corpus, and the program of docs/languages.md against a server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google.rpc
import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = Path(next(iter(google.rpc.__path__))).parent.parent

pytestmark = [
    pytest.mark.skipif(
        not all(map(shutil.which, ("g++", "protoc", "grpc_cpp_plugin", "pkg-config"))),
        reason="a C++ compiler and gRPC are not installed: "
        "apt install g++ pkg-config libgrpc++-dev libprotobuf-dev protobuf-compiler-grpc",
    ),
    pytest.mark.timeout(600),
]


def run(*command):
    made = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert made.returncode == 0, f"{command[0]}: {made.stdout[-3000:]}{made.stderr[-3000:]}"
    return made.stdout


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """The generated code, compiled: its folder and the object files of messages."""
    for library in ("protobuf", "grpc++"):
        if subprocess.run(["pkg-config", "--exists", library]).returncode:
            pytest.skip(f"the headers of {library} are not installed")
    folder = tmp_path_factory.mktemp("cpp")
    names = ("inputs", "intervention", "spectra_service", "stream", "tensor")
    ours = [f"vlm_spectra/v1/{name}.proto" for name in names]
    theirs = [f"google/rpc/{name}.proto" for name in ("code", "error_details", "status")]
    include = ["-I", ROOT / "protos", "-I", PACKAGES]
    run("protoc", *include, f"--cpp_out={folder}", *ours, *theirs)
    plugin = f"--plugin=protoc-gen-grpc={shutil.which('grpc_cpp_plugin')}"
    run("protoc", *include, plugin, f"--grpc_out={folder}", "vlm_spectra/v1/spectra_service.proto")

    def build(source):
        run("g++", "-std=c++17", "-O0", f"-I{folder}", "-c", source, "-o", source.with_suffix(".o"))
        return source.with_suffix(".o")

    sources = sorted(path for path in folder.rglob("*.pb.cc") if not path.name.endswith(".grpc.pb.cc"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return folder, list(pool.map(build, sources))


def linked(library):
    return subprocess.run(["pkg-config", "--libs", library], capture_output=True, text=True).stdout.split()


def test_the_corpus(objects):
    folder, made = objects
    if not all(Path("/usr/include", header).exists() for header in ("zstd.h", "openssl/sha.h")):
        pytest.skip("the headers of zstd and openssl are not installed: apt install libzstd-dev libssl-dev")
    program = folder / "reader"
    source = ROOT / "protos" / "conformance" / "reader.cc"
    libraries = [*linked("protobuf"), "-lzstd", "-lcrypto"]
    run("g++", "-std=c++17", "-O0", "-Wall", f"-I{folder}", source, *made, "-o", program, *libraries)
    assert re.fullmatch(r"(\d+) of \1 cases passed\n", run(program, ROOT / "protos" / "conformance"))


def test_the_program_in_the_documentation(objects, server, remote):
    folder, made = objects
    text = (ROOT / "docs" / "languages.md").read_text()
    source = folder / "call.cc"
    source.write_text(re.search(r"```cpp\n(.*?)```", text, re.DOTALL).group(1))
    program = folder / "call"
    service = folder / "vlm_spectra" / "v1" / "spectra_service.grpc.pb.cc"
    libraries = [*linked("grpc++"), *linked("protobuf")]
    run("g++", "-std=c++17", "-O0", f"-I{folder}", source, service, *made, "-o", program, *libraries)
    shown = run(program, server)
    inputs = remote.prepare_messages("Say hello")
    assert shown.startswith(remote.generate(inputs, max_new_tokens=8).text[0])
    size = len(inputs.input_ids[0]) * remote.info.hidden * 4
    for layer in range(remote.info.layers):
        assert f"\nlm.blocks.{layer}.hook_resid_post {size}" in shown
        assert f"\n{layer} {size}" in shown
