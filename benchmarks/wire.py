"""The wire alone: a finished capture from a server's memory to the client's arrays, against named references.

Every candidate carries the same tensors, the residual stream of a model of 28 layers and width 2048 over 1,500 tokens
in bfloat16, 172 MB, from another process on this machine. Each round takes all of them in another order, for what one
leaves behind in memory and caches is the next one's luck; medians are compared. What takes seconds has rounds of its
own: a machine takes back what stands idle for so long. The references:

- nnsight's own client (`RemoteBackend.download_result`) reading a `torch.save` file from a small HTTP server, as it
  comes (zstd level 6, as nnsight packs it) and without compression; once with the file there, once with the file made
  when it is asked for, as it must be when a run has just ended;
- Arrow Flight, one record batch a tensor;
- a plain TCP socket, read into new arrays.

With `--rate` and `--delay` all of it goes through a link of so many Mbit/s and milliseconds, and the server's answers
also go compressed.
"""

from __future__ import annotations

import argparse
import gc
import io
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
import ml_dtypes
import numpy as np
from link import Link

LAYERS, TOKENS, WIDTH = 28, 1500, 2048
NAMES = [f"lm.blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]
CAPTURE, COMPRESSED = "benchmark", "compressed"


def tensors() -> list[np.ndarray]:
    """[1, 1500, 2048] bfloat16 a layer, with what residual streams have: a few wide channels, growth with depth."""
    dice = np.random.default_rng(0)
    scale = np.where(dice.random(WIDTH) < 0.01, 20.0, 1.0).astype(np.float32)
    stream = dice.standard_normal((1, TOKENS, WIDTH), dtype=np.float32) * scale
    found = []
    for _ in range(LAYERS):
        stream = stream + 0.3 * scale * dice.standard_normal((1, TOKENS, WIDTH), dtype=np.float32)
        found.append(stream.astype(ml_dtypes.bfloat16))
    return found


# The servers, each a process of its own that prints its address.


def serve_ours() -> None:
    """Our front with a finished capture in its store, the worker behind it holding spectra-tiny."""
    from vlm_spectra import dtypes
    from vlm_spectra.v1 import stream_pb2, tensor_pb2
    from vlm_spectra_server.serving.host import Loading
    from vlm_spectra_server.serving.pipe import shared_memory
    from vlm_spectra_server.serving.sending import Packing, Sending
    from vlm_spectra_server.serving.server import Server
    from vlm_spectra_server.serving.stores import StoredCapture
    from vlm_spectra_server.serving.turns import Job

    server = Server()
    server.start(Loading("spectra-tiny", device="cpu"))
    server.first.settled.wait()
    job = Job(0, "benchmark", "RunWithCache", b"", {}, None)
    arrays = tensors()
    header = stream_pb2.Header()
    fd, start, offsets = shared_memory(sum(a.nbytes for a in arrays)), 0, []
    for index, (name, array) in enumerate(zip(NAMES, arrays, strict=True)):
        os.pwrite(fd, array.view(np.uint8).tobytes(), start)
        header.tensors.add(
            index=index,
            name=name,
            dtype=dtypes.to_wire("bfloat16"),
            shape=array.shape,
            byte_count=array.nbytes,
            compression=tensor_pb2.COMPRESSION_NONE,
        )
        offsets.append(start)
        start += array.nbytes
    del arrays
    job.reserved = start
    job.feed.put("started")
    server.first._announce(job, {"size": start, "offsets": offsets}, header, fd)
    for index in range(LAYERS):
        job.feed.put("tensor", index)
    job.feed.put("done", stream_pb2.Summary().SerializeToString())
    for capture in (CAPTURE, COMPRESSED):
        base = {"request_id": "b", "model": "benchmark", "revision": "", "capture_id": capture}
        sending = Sending(job, base, Packing(zstd=capture == COMPRESSED))
        server._spectra.captures.add(capture, StoredCapture(job, server.first, sending, 0))
    gc.collect()
    print(server.address, flush=True)
    threading.Event().wait()


def serve_http() -> None:
    """`torch.save` files over HTTP, from memory."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    import torch
    import zstandard
    from vlm_spectra.arrays import to_torch

    saves = {"saves": dict(zip(NAMES, map(to_torch, tensors()), strict=True))}

    def made(path: str) -> bytes:
        file = io.BytesIO()
        torch.save(saves, file)
        return zstandard.ZstdCompressor(level=6).compress(file.getvalue()) if "zstd" in path else file.getvalue()

    bodies = {path: made(path) for path in ("/plain", "/zstd")}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = bodies[self.path] if self.path in bodies else made(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


def serve_flight() -> None:
    """One record batch of bytes a tensor."""
    import pyarrow as pa
    from pyarrow import flight

    schema = pa.schema([("bytes", pa.uint8())])
    batches = [pa.record_batch([pa.array(a.view(np.uint8).reshape(-1))], schema) for a in tensors()]

    class Front(flight.FlightServerBase):
        def do_get(self, context: object, ticket: object) -> flight.FlightDataStream:
            return flight.GeneratorStream(schema, iter(batches))

    server = Front("grpc://127.0.0.1:0")
    print(f"127.0.0.1:{server.port}", flush=True)
    server.serve()


def serve_tcp() -> None:
    """The bytes, one tensor after the other."""
    parts = [memoryview(a.view(np.uint8).reshape(-1)) for a in tensors()]
    listening = socket.create_server(("127.0.0.1", 0))
    print(f"127.0.0.1:{listening.getsockname()[1]}", flush=True)
    while True:
        connection, _ = listening.accept()
        with connection:
            for part in parts:
                connection.sendall(part)


SERVERS = {"ours": serve_ours, "http": serve_http, "flight": serve_flight, "tcp": serve_tcp}

# The clients: each gives the seconds to the first tensor, having all of them when it returns.


def read_ours(address: str, capture: str = CAPTURE, **options: object) -> Callable[[], float]:
    """Our stream, resumed from nothing."""
    import vlm_spectra as vs
    from vlm_spectra.network.streams import Rest, TensorStream

    model = vs.connect(address, arrays="numpy", **options)

    def read() -> float:
        begun = time.perf_counter()
        rest = Rest(model._resume, model._release, model._memory)
        stream = TensorStream(model._resume(capture, {}), address, "numpy", rest=rest)
        stream.wait_until_announced()
        stream.get(NAMES[0])
        first = time.perf_counter() - begun
        stream.wait()
        assert stream.get(NAMES[-1]).shape == (1, TOKENS, WIDTH)
        return first

    return read


def read_nnsight(address: str, path: str) -> Callable[[], float]:
    """nnsight's client, which has nothing before it has all."""
    from nnsight import CONFIG
    from nnsight.intervention.backends.remote import RemoteBackend

    CONFIG.APP.REMOTE_LOGGING = False
    backend = RemoteBackend("benchmark", host=f"http://{address}", api_key="none")
    backend.compress = "zstd" in path

    def read() -> float:
        begun = time.perf_counter()
        result = backend.download_result(f"http://{address}{path}")
        assert result["saves"][NAMES[-1]].shape == (1, TOKENS, WIDTH)
        return time.perf_counter() - begun

    return read


def read_flight(address: str) -> Callable[[], float]:
    """Arrow Flight's client."""
    from pyarrow import flight

    client = flight.connect(f"grpc://{address}")

    def read() -> float:
        begun, first, found = time.perf_counter(), 0.0, []
        for chunk in client.do_get(flight.Ticket(b"")):
            found.append(chunk.data.column(0).to_numpy().view(ml_dtypes.bfloat16).reshape(1, TOKENS, WIDTH))
            first = first or time.perf_counter() - begun
        assert len(found) == LAYERS
        return first

    return read


def read_tcp(address: str) -> Callable[[], float]:
    """`recv_into` new arrays."""
    host, port = address.split(":")

    def read() -> float:
        begun, first, found = time.perf_counter(), 0.0, []
        with socket.create_connection((host, int(port))) as connection:
            for _ in range(LAYERS):
                array = np.empty((1, TOKENS, WIDTH), ml_dtypes.bfloat16)
                view = memoryview(array.view(np.uint8).reshape(-1))
                while len(view):
                    view = view[connection.recv_into(view) :]
                found.append(array)
                first = first or time.perf_counter() - begun
        return first

    return read


@contextmanager
def started(name: str) -> Iterator[tuple[str, int]]:
    """A server process, its address and its process id."""
    command = [sys.executable, __file__, "--serve", name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process.pid
    finally:
        process.terminate()
        process.wait()


def processor(pid: int) -> float:
    """Seconds of processor time of this process and a server's."""
    mine = os.times()
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return mine.user + mine.system + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int | str, field: str) -> int:
    """VmRSS or VmHWM of a process, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def peaks(read: Callable[[], float], pid: int) -> tuple[float, float]:
    """What one reading takes beyond what was there, here and in the server, in MB."""
    gc.collect()
    for each in ("self", pid):
        Path(f"/proc/{each}/clear_refs").write_text("5")
    before = memory("self", "VmRSS"), memory(pid, "VmRSS")
    read()
    return (memory("self", "VmHWM") - before[0]) / 1e6, (memory(pid, "VmHWM") - before[1]) / 1e6


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rate", type=float, default=0, help="Mbit/s of the link, through a pacing proxy; 0: loopback")
    parser.add_argument("--delay", type=float, default=0, help="milliseconds of the link, there and back")
    arguments = parser.parse_args()
    if arguments.serve:
        SERVERS[arguments.serve]()
        return
    with started("ours") as ours, started("http") as http, started("flight") as flight, started("tcp") as tcp:
        where = {"ours": ours, "http": http, "flight": flight, "tcp": tcp}
        at = {name: address for name, (address, _) in where.items()}
        if arguments.rate:
            rate, delay = arguments.rate * 1e6 / 8, arguments.delay / 2e3
            at = {name: Link(address, rate, delay).address for name, address in at.items()}
        candidates = {
            "vlm-spectra, gRPC": ("ours", read_ours(at["ours"], shared_memory=False)),
            "nnsight, uncompressed": ("http", read_nnsight(at["http"], "/plain")),
            "nnsight, as it comes (zstd)": ("http", read_nnsight(at["http"], "/zstd")),
            "nnsight, uncompressed, saving included": ("http", read_nnsight(at["http"], "/fresh/plain")),
            "nnsight, as it comes, saving included": ("http", read_nnsight(at["http"], "/fresh/zstd")),
            "Arrow Flight": ("flight", read_flight(at["flight"])),
            "TCP socket": ("tcp", read_tcp(at["tcp"])),
        }
        if arguments.rate:
            candidates["vlm-spectra, gRPC, zstd"] = "ours", read_ours(at["ours"], COMPRESSED, shared_memory=False)
        else:
            candidates["vlm-spectra, shared memory"] = "ours", read_ours(at["ours"])
        times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in candidates}
        quick = [name for name in candidates if "saving" not in name]
        for turn in (quick, [name for name in candidates if name not in quick]):
            for number in range(arguments.rounds + 1):
                for name in random.sample(turn, len(turn)):
                    server, read = candidates[name]
                    used, begun = processor(where[server][1]), time.perf_counter()
                    first = read()
                    total = time.perf_counter() - begun
                    if number or arguments.rate:
                        times[name].append((total, first, processor(where[server][1]) - used))
        report(candidates, times, {name: pid for name, (_, pid) in where.items()}, arguments)


def report(
    candidates: dict[str, tuple[str, Callable[[], float]]],
    times: dict[str, list[tuple[float, float, float]]],
    pids: dict[str, int],
    arguments: argparse.Namespace,
) -> None:
    """The table."""
    size = LAYERS * TOKENS * WIDTH * 2
    totals = {name: statistics.median(total for total, _, _ in each) for name, each in times.items()}
    ours = totals["vlm-spectra, gRPC"]
    link = f"{arguments.rate:.0f} Mbit/s, {arguments.delay:.0f} ms" if arguments.rate else "loopback"
    print(f"{size / 1e6:.0f} MB over {link}, {os.cpu_count()} cores; medians of {len(next(iter(times.values())))}")
    print("| | ms | GB/s | times ours | first tensor, ms | both processors, ms | client's peak, MB | server's, MB |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, (server, read) in candidates.items():
        total, first = totals[name], statistics.median(first for _, first, _ in times[name])
        used = statistics.mean(used for _, _, used in times[name])
        here, there = peaks(read, pids[server])
        print(
            f"| {name} | {total * 1e3:.0f} | {size / total / 1e9:.2f} | {total / ours:.2f} | {first * 1e3:.0f} "
            f"| {used * 1e3:.0f} | {here:.0f} | {there:.0f} |"
        )


if __name__ == "__main__":
    main()
