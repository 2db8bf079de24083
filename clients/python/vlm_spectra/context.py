"""What a cache's arrays are about: the run's tokens and images, what was selected, and the model they come from."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from . import arrays
from .calls import CaptureOptions
from .errors import InvalidInputError
from .info import ModelInfo
from .inputs import ImageLayout, Inputs, layout_from_json, layout_to_json
from .positions import Layout

if TYPE_CHECKING:
    from .base import BaseVLM

BLOCK = "lm.blocks.{layer}."
"""What the names of a decoder block's hooks begin with."""


@dataclass(frozen=True)
class CacheContext:
    """What a cache's arrays are about.

    Attributes:
        token_labels: [batch][seq] labels of all tokens of the run.
        images: The images, with the sequence positions of their tokens.
        positions: [batch][n] the sequence position behind each index of a position axis; None where all were kept.
        heads: The heads kept; None for all.
        capture_id: The server's id of the capture, or "".
        model: The model's name and revision.
        info: The model's sizes; None where a cache was made by hand.
        hooks: The layers that have each hook of the model's decoder blocks, `hook_mlp_out`, `attn.hook_z`, ...
        has_batch_dim: Whether the arrays still have their batch axis.
        reduce: What was computed of each array before it was kept, one of `calls.REDUCTIONS`; None for nothing.
        source: The model itself, as long as it lives; never saved.
    """

    token_labels: list[list[str]] = field(default_factory=list)
    images: tuple[ImageLayout, ...] = ()
    positions: list[list[int]] | None = None
    heads: list[int] | None = None
    capture_id: str = ""
    model: str = ""
    info: ModelInfo | None = None
    hooks: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    has_batch_dim: bool = True
    reduce: str | None = None
    source: weakref.ref[Any] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(
        cls, inputs: Inputs, labels: list[list[str]], capture: CaptureOptions, model: BaseVLM, capture_id: str = ""
    ) -> CacheContext:
        """The context of a run.

        Args:
            inputs: What was asked.
            labels: [batch][seq] labels of the tokens that the run went over.
            capture: What was captured.
            model: The model that ran.
            capture_id: The server's id of the capture.
        """
        positions = None
        if capture.positions is not None:
            tokens = np.zeros((len(labels), len(labels[0])), dtype=bool)
            image = np.zeros_like(tokens)
            prompt = arrays.to_numpy(inputs.attention_mask).astype(bool)
            tokens[:, : prompt.shape[1]] = prompt
            tokens[:, prompt.shape[1] :] = [[bool(label) for label in row[prompt.shape[1] :]] for row in labels]
            for layout in inputs.images:
                image[layout.row, list(layout.positions)] = True
            positions = Layout(tokens, image).rectangle(capture.positions).tolist()
        hooks: dict[str, tuple[int, ...]] = {}
        for spec in model.catalogue.specs:
            if spec.name.startswith(BLOCK):
                name = spec.name.removeprefix(BLOCK)
                hooks[name] = tuple(sorted({*hooks.get(name, ()), *spec.layers}))
        return cls(
            token_labels=labels,
            images=inputs.images,
            positions=positions,
            heads=None if capture.heads is None else list(capture.heads),
            capture_id=capture_id,
            model=f"{model.info.name}@{model.info.revision}",
            info=model.info,
            hooks=hooks,
            reduce=capture.reduce,
            source=weakref.ref(model),
        )

    def sizes(self) -> ModelInfo:
        """The model's sizes.

        Raises:
            InvalidInputError: The cache was not filled by a model.
        """
        if self.info is None:
            raise InvalidInputError(
                "this cache does not say which model filled it, so its layers cannot be put together."
            )
        return self.info

    def resolve(self, model: Any) -> Any:
        """The model that some method needs.

        Args:
            model: What the caller gave; None for the model that filled the cache.

        Raises:
            InvalidInputError: That model is gone, as after `load`, or the one given is of another width.
        """
        found = model if model is not None else self.source() if self.source is not None else None
        if found is None:
            raise InvalidInputError(
                f"this cache no longer has its model ({self.model or 'unknown'}): it was loaded from a file, or the "
                "model was deleted. Give one with model=...",
                field="model",
            )
        if self.info is not None and found.info.hidden != self.info.hidden:
            raise InvalidInputError(
                f"the cache is of {self.model}, {self.info.hidden} wide; {found.info.name} is {found.info.hidden}.",
                field="model",
            )
        return found

    def rows(self, index: Any) -> CacheContext:
        """The context of some rows of the batch.

        Args:
            index: An int, which takes the batch axis away, a slice, or a list of ints.
        """
        kept = self._kept(index)
        images = tuple(
            dataclasses.replace(image, row=new)
            for new, row in enumerate(kept)
            for image in self.images
            if image.row == row
        )
        return dataclasses.replace(
            self,
            token_labels=[self.token_labels[row] for row in kept],
            images=images,
            positions=None if self.positions is None else [self.positions[row] for row in kept],
            capture_id="",
            has_batch_dim=self.has_batch_dim and not isinstance(index, int),
        )

    def entries(self, count: int, index: Any) -> list[int]:
        """Which entries of a vision hook belong to some rows of the batch.

        Args:
            count: How many entries the hook has: one an image, or one a view of an image.
            index: As for `rows`.
        """
        row_of = [image.row for image in self.images]
        if count != len(row_of):
            row_of = [image.row for image in self.images for _ in image.patch_grids or image.tiles]
        return [number for row in self._kept(index) for number, owner in enumerate(row_of[:count]) if owner == row]

    def _kept(self, index: Any) -> list[int]:
        try:
            return np.atleast_1d(np.arange(len(self.token_labels))[index]).tolist()  # type: ignore[no-any-return]
        except IndexError:
            raise InvalidInputError(
                f"batch_slice is {index}, but the batch has {len(self.token_labels)} rows.", field="batch_slice"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "source": None}

    def to_json(self) -> dict[str, Any]:
        """All of it but the model itself and the server's id."""
        return {
            "token_labels": self.token_labels,
            "images": [layout_to_json(image) for image in self.images],
            "positions": self.positions,
            "heads": self.heads,
            "model": self.model,
            "info": None if self.info is None else dataclasses.asdict(self.info),
            "hooks": self.hooks,
            "has_batch_dim": self.has_batch_dim,
            "reduce": self.reduce,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CacheContext:
        """What `to_json` gave; files of older versions say less."""
        info = data.get("info")
        return cls(
            token_labels=data["token_labels"],
            images=tuple(layout_from_json(image) for image in data["images"]),
            positions=data["positions"],
            heads=data["heads"],
            model=data["model"],
            info=None if info is None else ModelInfo(**info),
            hooks={name: tuple(layers) for name, layers in data.get("hooks", {}).items()},
            has_batch_dim=data.get("has_batch_dim", True),
            reduce=data.get("reduce"),
        )
