"""Patches of the vision tower and the tokens they become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from vlm_spectra.errors import NotSupportedError

from ..hooked.run import Capture
from .subject import Subject


class TokensOfPatches:
    """Which token stands for each patch.

    Args:
        subject: The batch.
        place: [views, patches] row * seq + column of the patch's token; -1 for class tokens and padding.
    """

    def __init__(self, subject: Subject, place: torch.Tensor) -> None:
        self.names = list(subject.catalogue.by_name)
        self.places = subject.layout.patches
        self.shape = tuple(subject.tensors["input_ids"].shape)
        self.place = place.to(subject.reading.device)
        self.valid = self.place >= 0

    @classmethod
    def of(cls, subject: Subject) -> Self | None:
        """The patches of a batch; None where it has no images."""
        images = subject.inputs.images
        return cls.required(subject) if images else None

    @classmethod
    def required(cls, subject: Subject) -> Self:
        """The patches of a batch with images.

        Raises:
            NotSupportedError: The family's vision tower cannot be looked into.
        """
        seq = subject.tensors["input_ids"].shape[1]
        views: list[torch.Tensor] = []
        for image in subject.inputs.images:
            for part, (rows, columns) in zip(image.tiles, image.patch_grids, strict=False):
                positions = torch.tensor(part.positions) + image.row * seq
                down = torch.arange(rows) * part.grid[0] // rows
                across = torch.arange(columns) * part.grid[1] // columns
                views.append(positions[down[:, None] * part.grid[1] + across].flatten())
        found = subject.layout.patches
        if found is None or len(views) != len(found.index):
            raise NotSupportedError(
                f"where the patches of the vision tower lie is not known for {subject.reading.family.name}; "
                "methods on the language model, such as integrated_gradients, work.",
                field="method",
            )
        place = torch.full(found.index.shape, -1)
        for number, view in enumerate(views):
            place[number, : len(view)] = view
        return cls(subject, place)

    def patterns(self) -> list[str]:
        """The attention patterns of the tower, in order."""
        return [n for n in self.names if n.startswith("vision.blocks.") and n.endswith(".attn.hook_pattern")]

    def streams(self) -> list[str]:
        """The residual stream after each block of the tower, in order."""
        return [n for n in self.names if n.startswith("vision.blocks.") and n.endswith(".hook_resid_post")]

    def captures(self, names: Sequence[str], ending: str = "") -> dict[str, list[Capture]]:
        """What a run keeps of the tower's hooks, each under its name with an ending."""
        return {name: [Capture(f"{name}{ending}", places=self.places)] for name in names}

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """[views, width], the mean of [views, patches, width] over a view's patches."""
        weight = self.valid[..., None].to(values.dtype)
        return (values * weight).sum(1) / weight.sum(1).clamp_min(1)

    def by_token(self, values: torch.Tensor) -> torch.Tensor:
        """[rows, seq] float32, values [views, patches] summed by token."""
        rows, seq = self.shape
        sums = torch.zeros(rows * seq, device=values.device)
        return sums.index_add(0, self.place[self.valid], values.float()[self.valid]).view(rows, seq)

    def handed_on(self, scores: torch.Tensor, through: torch.Tensor) -> torch.Tensor:
        """Scores of tokens, those of an image shared out among its patches and gathered by the patches' own tokens.

        Args:
            scores: [rows, seq].
            through: [views, patches, patches] how much of each patch (last axis) has gone into each (middle axis).
        """
        counts = self.by_token(torch.ones_like(self.valid, dtype=torch.float32)).flatten()
        place = self.place.clamp_min(0)
        shares = (scores.flatten() / counts.clamp_min(1))[place] * self.valid
        through = through * self.valid[:, None]
        through = through / through.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        handed = self.by_token((shares[:, None] @ through)[:, 0])
        return torch.where((counts > 0).view(self.shape), handed, scores)
