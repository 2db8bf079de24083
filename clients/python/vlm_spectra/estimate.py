"""What a capture would take, told before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Estimate:
    """The size of a capture, and how long it may take.

    Attributes:
        shapes: Each tensor's extents, by hook name.
        nbytes: Bytes of all tensors; exact.
        compute_seconds: For the model, by the pace of its last forward pass; None where there was none yet.
        transfer_seconds: For the way to the caller's arrays, by the speed of the link as the last large capture showed
            it; 0 where nothing is sent; None where there was none yet.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    nbytes: int
    compute_seconds: float | None
    transfer_seconds: float | None

    def __str__(self) -> str:
        times = [
            f"{seconds:.2g} s {what}"
            for what, seconds in (("to compute", self.compute_seconds), ("to transfer", self.transfer_seconds))
            if seconds
        ]
        return f"{len(self.shapes)} tensors, {self.nbytes / 1e6:,.1f} MB" + "".join(f", about {time}" for time in times)
