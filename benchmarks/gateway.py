"""The gateway: what calls cost that come as Connect or gRPC-Web through the web app, against gRPC itself.

The finished capture of `wire.py` (172 MB in chunks of 1 MiB) is read from the same server, its bytes counted and
dropped: by gRPC, and by both protocols through a web app that is a process of its own. Each round takes all of them in
another order; a candidate's share is the median of gRPC's time over its own in the same round.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
from vlm_spectra.v1 import spectra_service_pb2 as spb
from wire import CAPTURE, LAYERS, TOKENS, WIDTH, processor, started

CALL = "/vlm_spectra.v1.SpectraService/RunWithCache"
REQUEST = spb.RunWithCacheRequest(resume={"capture_id": CAPTURE}).SerializeToString()
SIZE = LAYERS * TOKENS * WIDTH * 2


@contextmanager
def gateway(server: str) -> Iterator[tuple[str, int]]:
    """The web app over a server: its address and its process id."""
    command = [sys.executable, "-m", "vlm_spectra_server.cli", "web", "--port", "0", "--server", server]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip().rsplit("/", 1)[1], process.pid
    finally:
        process.terminate()
        process.wait()


def by_grpc(address: str) -> Callable[[], None]:
    """Messages as gRPC hands them over."""
    options = [("grpc.max_receive_message_length", -1)]
    call = grpc.insecure_channel(address, options=options).unary_stream(CALL)

    def read() -> None:
        assert sum(map(len, call(REQUEST))) > SIZE

    return read


def by_http(address: str, media: str) -> Callable[[], None]:
    """An answer as it comes from the socket."""
    host, port = address.split(":")
    body = struct.pack(">BI", 0, len(REQUEST)) + REQUEST
    lines = (f"POST {CALL} HTTP/1.1", f"host: {host}", f"content-type: {media}", "connection: close")
    asked = "\r\n".join((*lines, f"content-length: {len(body)}", "", "")).encode("ascii") + body
    room = bytearray(1 << 20)

    def read() -> None:
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(asked)
            found = 0
            while count := connection.recv_into(room):
                found += count
            assert found > SIZE, bytes(room[:400])

    return read


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    with started("ours") as (server, _), gateway(server) as (page, beside):
        candidates = {
            "gRPC": by_grpc(server),
            "Connect": by_http(page, "application/connect+proto"),
            "gRPC-Web": by_http(page, "application/grpc-web+proto"),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
        for number in range(rounds + 1):
            for name in random.sample(list(candidates), len(candidates)):
                used, begun = processor(beside), time.perf_counter()
                candidates[name]()
                took = time.perf_counter() - begun
                if number:
                    times[name].append((took, processor(beside) - used))
    print(f"{SIZE / 1e6:.0f} MB, {os.cpu_count()} cores; medians of {rounds}")
    print("| | ms | MB/s | of gRPC's throughput | middle half | client's and web app's processors, ms |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, each in times.items():
        shares = [reference / mine for (mine, _), (reference, _) in zip(each, times["gRPC"], strict=True)]
        low, middle, high = statistics.quantiles(shares, n=4)
        took, used = (statistics.median(column) for column in zip(*each, strict=True))
        print(
            f"| {name} | {took * 1e3:.0f} | {SIZE / took / 1e6:.0f} | {middle:.2f} | {low:.2f} to {high:.2f} "
            f"| {used * 1e3:.0f} |"
        )


if __name__ == "__main__":
    main()
