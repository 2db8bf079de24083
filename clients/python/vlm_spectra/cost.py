"""What a call took: seconds by phase, and memory."""

from __future__ import annotations

from dataclasses import dataclass

from .v1 import stream_pb2


@dataclass(frozen=True)
class Cost:
    """What a call took on the server, as the summary at the end of its stream says. Times are in seconds.

    Attributes:
        request_id: The server's name for the request; it stands in the server's log.
        queue: Waiting for a turn.
        prepare: Turning text and images into tensors.
        compute: The model and the analysis.
        copy: Copying tensors from the device into the memory they are sent from; on a GPU beside the computation.
        wire: Handing messages to the connection: a slow network or reader shows here.
        first_chunk: From the start of the computation to the first chunk of a tensor; 0 where there was none.
        total: From the request's arrival to the summary.
        bytes: Bytes of tensors, before compression.
        peak_memory: Peak memory of the device, in bytes; on a CPU that of the model's process. 0 where unknown.
        layers_run: Decoder layers that ran in the last forward pass.
    """

    request_id: str
    queue: float
    prepare: float
    compute: float
    copy: float
    wire: float
    first_chunk: float
    total: float
    bytes: int
    peak_memory: int
    layers_run: int

    @classmethod
    def of(cls, request_id: str, summary: stream_pb2.Summary) -> Cost:
        """The cost that a summary tells."""
        timings = summary.timings
        return cls(
            request_id=request_id,
            queue=timings.queue,
            prepare=timings.prepare,
            compute=timings.compute,
            copy=timings.copy,
            wire=timings.wire,
            first_chunk=timings.first_chunk,
            total=timings.total,
            bytes=summary.byte_count,
            peak_memory=summary.peak_memory,
            layers_run=summary.layers_run,
        )

    def __str__(self) -> str:
        phases = ("queue", "prepare", "compute", "copy", "wire")
        times = ", ".join(f"{name} {getattr(self, name):.3f} s" for name in phases)
        peak = f", peak {self.peak_memory / 1e6:,.0f} MB" if self.peak_memory else ""
        return f"{self.total:.3f} s ({times}), {self.bytes / 1e6:,.1f} MB{peak}"
