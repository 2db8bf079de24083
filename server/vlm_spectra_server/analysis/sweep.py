"""A sweep of activation patching: each cell is one activation of one run put into the other (Vig et al. 2020; Meng et
al. 2022).

Both prompts run once. Then the cells run in batches, several as rows of one pass, which begins at the patched layer
with the residual stream that entered it in the first run: earlier layers and the vision tower are not run again, and
no activation leaves the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vlm_spectra.analyses import SweepOptions
from vlm_spectra.errors import InvalidInputError
from vlm_spectra.hooks import HookSpec

from ..hooked.delivery import TensorSpec
from ..hooked.edits import AnyEdit
from .patching import check_aligned
from .subject import Subject, tiled
from .targets import Resolved

TOKENS_A_PASS = {"cpu": 1024}
"""How many tokens run at once, by kind of device: what fits a processor's cache, or fills an accelerator."""


def run(clean: Subject, corrupted: Subject, options: SweepOptions) -> None:
    """Deliver the tensors of `PatchSweepResponse`, each hook's row as soon as it is done.

    Args:
        clean: The prompt whose activations are right; it also gives the metric its token, where none was named.
        corrupted: The other, of as many tokens.
        options: What to patch.

    Raises:
        InvalidInputError: Batches, prompts of different lengths, or positions out of range.
    """
    if len(clean.inputs) != 1 or len(corrupted.inputs) != 1:
        raise InvalidInputError("a sweep takes one clean and one corrupted prompt, not batches.", field="clean")
    check_aligned(clean, corrupted)
    hooks = clean.catalogue.expand(list(options.hooks), capture=True)
    positions = clean.layout.columns(options.positions, 0)
    columns = positions if options.heads is None else list(options.heads)
    cells = len(hooks) * len(columns)
    rows = [TensorSpec(f"values.{hook}", "float32", (len(columns),)) for hook in hooks]
    baselines = [TensorSpec(name, "float32", (1,)) for name in ("clean", "corrupted")]
    numbers = [TensorSpec(n, "int64", (len(of),)) for n, of in (("target_ids", clean.columns[0]), ("columns", columns))]
    clean.delivery.announce([*baselines, *numbers, *rows])
    patched, source = (corrupted, clean) if options.mode == "denoising" else (clean, corrupted)
    first, _ = patched.capture(dict.fromkeys(_streams(hooks)), patched.columns)
    given, _ = source.capture(dict.fromkeys(hooks), source.columns)
    logits = {id(patched): first.pop("logits"), id(source): given.pop("logits")}
    target = clean.resolve(logits[id(clean)])
    deliver = clean.delivery.deliver
    deliver("clean", target.value(logits[id(clean)]))
    deliver("corrupted", target.value(logits[id(corrupted)]))
    deliver("target_ids", torch.tensor(target.ids[0]))
    deliver("columns", torch.tensor(columns))
    everywhere = options.positions is None
    where = (
        [([p], None) for p in positions]
        if options.heads is None
        else [(None if everywhere else positions, head) for head in columns]
    )
    passes = _Passes(patched, target, first)
    done = 0
    for hook in hooks:
        values = []
        for start in range(0, len(where), passes.at_once):
            part = where[start : start + passes.at_once]
            values.append(passes.values(hook, Cells(patched.catalogue.spec(hook), given[hook], part)))
            done += len(part)
            clean.step(done, cells)
        deliver(f"values.{hook}", torch.cat(values))


class Cells:
    """The edit that patches a different cell in every row.

    Args:
        spec: The hook.
        source: The other run's activation, a batch of one.
        where: For each row the positions and the head to patch, None for all.
    """

    def __init__(
        self, spec: HookSpec, source: torch.Tensor, where: Sequence[tuple[Sequence[int] | None, int | None]]
    ) -> None:
        self.source, self.rows = source, len(where)
        shape = [1] * source.dim()
        shape[0] = len(where)
        self.mask = torch.ones(shape, dtype=torch.bool, device=source.device)
        for axis, choices in (
            (spec.position_axis, [positions for positions, _ in where]),
            (spec.head_axis, [None if head is None else [head] for _, head in where]),
        ):
            if any(choice is not None for choice in choices):
                assert axis is not None
                chosen = torch.zeros(len(where), source.shape[axis], dtype=torch.bool)
                for row, choice in enumerate(choices):
                    chosen[row, slice(None) if choice is None else list(choice)] = True
                view = list(shape)
                view[axis] = source.shape[axis]
                self.mask = self.mask & chosen.to(source.device).view(view)

    def __call__(self, tensor: torch.Tensor, start: int) -> torch.Tensor:
        """The changed activation."""
        return torch.where(self.mask, self.source, tensor)


class _Passes:
    """Runs several cells at once on one prompt.

    Args:
        subject: The prompt that is patched.
        target: The metric.
        streams: The residual stream before every block that a pass may begin with.
    """

    def __init__(self, subject: Subject, target: Resolved, streams: dict[str, torch.Tensor]) -> None:
        self.subject, self.target, self.streams = subject, target, streams
        most = TOKENS_A_PASS.get(subject.reading.device.type, 16_384)
        self.at_once = max(1, most // subject.tensors["input_ids"].shape[1])
        self.copies = subject.copies(max(self.at_once, 2))
        self.one, self.two = self.copies.decoder_inputs()

    def values(self, hook: str, cells: Cells) -> torch.Tensor:
        """[rows] float32, the metric with each row's cell patched."""
        reading, subject = self.subject.reading, self.subject
        stream, resume = _stream_of(hook), None
        edits: dict[str, list[AnyEdit]] = self.copies.edits(cells.rows, tower=stream is None)
        if stream is not None:
            # The stream is as the interventions left it there.
            edits.pop(stream, None)
            entered = self.streams[stream]
            resume = (_layer(stream), entered.expand(cells.rows, *entered.shape[1:]))
        edits.setdefault(hook, []).append(cells)
        inputs: Any = tiled(self.one, self.two, cells.rows)
        with subject.run(edits=edits, resume=resume).active():
            hidden = reading.decoder(**inputs).last_hidden_state
        logits = reading.logits(hidden[:, self.target.columns[0]])
        return self.target.copies(cells.rows).value(logits)


def _layer(hook: str) -> int:
    return int(hook.split(".")[2])


def _stream_of(hook: str) -> str | None:
    """The stream that enters the block of a hook; None where a pass must begin at the embedding."""
    return f"lm.blocks.{_layer(hook)}.hook_resid_pre" if hook.startswith("lm.blocks.") else None


def _streams(hooks: Sequence[str]) -> list[str]:
    return [stream for stream in dict.fromkeys(map(_stream_of, hooks)) if stream is not None]
