"""Prompts, and what they are once prepared for a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import array_api_compat

from .errors import InvalidInputError
from .images import Picture

Array = Any
"""A numpy array or a PyTorch tensor."""


@dataclass(frozen=True)
class Prompt:
    """One conversation turn to be answered.

    Attributes:
        task: What the user asks; not empty.
        images: The images before the task, in order.
        assistant_prefill: Text that the answer begins with.
        system: A system message; the chat template's own default where empty.
    """

    task: str
    images: tuple[Picture, ...] = ()
    assistant_prefill: str = ""
    system: str = ""

    def __post_init__(self) -> None:
        for name in ("task", "assistant_prefill", "system"):
            if not isinstance(getattr(self, name), str):
                raise InvalidInputError(f"{name} is a text, not {type(getattr(self, name)).__name__}.", field=name)
        if not self.task.strip():
            raise InvalidInputError("the task is empty: write what the model is to do.", field="task")


@dataclass(frozen=True)
class ImageLayout:
    """How an image became tokens.

    Attributes:
        row: The batch row it belongs to.
        original_size: Width and height in pixels, as given.
        processed_size: Width and height in pixels, after the processor's resizing.
        grid: Rows and columns of image tokens.
        positions: The sequence positions of its tokens, in raster order; rows * columns of them.
    """

    row: int
    original_size: tuple[int, int]
    processed_size: tuple[int, int]
    grid: tuple[int, int]
    positions: tuple[int, ...]

    def box(self, patch: int) -> tuple[float, float, float, float]:
        """The part of the original image behind one token: left, top, right, bottom in pixels."""
        rows, columns = self.grid
        row, column = divmod(patch, columns)
        width, height = self.original_size
        return column * width / columns, row * height / rows, (column + 1) * width / columns, (row + 1) * height / rows


@dataclass(frozen=True, eq=False)
class Inputs:
    """A prepared batch. Rows have the same length; shorter prompts are padded on the left.

    Attributes:
        prompts: What was asked, one a row.
        input_ids: [batch, seq] int64.
        attention_mask: [batch, seq] int64, 1 for a token, 0 for padding.
        token_labels: [batch][seq] a readable label for each token.
        images: The images of all rows, in order.
        text: [batch] the formatted prompts, before images became tokens.
    """

    prompts: tuple[Prompt, ...] = field(repr=False)
    input_ids: Array
    attention_mask: Array = field(repr=False)
    token_labels: list[list[str]] = field(repr=False)
    images: tuple[ImageLayout, ...]
    text: list[str] = field(repr=False)

    def __len__(self) -> int:
        return len(self.prompts)

    def images_of(self, row: int) -> list[ImageLayout]:
        """The images of one batch row."""
        return [image for image in self.images if image.row == row]

    def __repr__(self) -> str:
        images = ", ".join(f"{i.grid[0]}x{i.grid[1]} tokens" for i in self.images) or "none"
        return f"{type(self).__name__}(input_ids={list(self.input_ids.shape)}, images: {images})"


def layout_number(images: Sequence[ImageLayout], image: int) -> ImageLayout:
    """An image by its number over all rows of a batch.

    Raises:
        InvalidInputError: There is none of that number.
    """
    if not 0 <= image < len(images):
        raise InvalidInputError(f"there is no image {image}: the prompt has {len(images)}.", field="image")
    return images[image]


def on_grid(vector: Array, layout: ImageLayout) -> Array:
    """A vector over sequence positions, [seq], laid out as an image's token grid, [grid_h, grid_w]."""
    xp = array_api_compat.array_namespace(vector)
    index = xp.asarray(list(layout.positions), device=array_api_compat.device(vector))
    return xp.reshape(xp.take(vector, index, axis=0), layout.grid)


def make_prompts(
    tasks: Sequence[str], images: Sequence[Any] | None, assistant_prefill: str | Sequence[str], system: str
) -> tuple[Prompt, ...]:
    """Prompts from the arguments of `prepare_messages_batch`.

    Args:
        tasks: [batch] what to ask.
        images: [batch] of one image, a list of images, or None; None for no images at all.
        assistant_prefill: The start of every answer, or [batch] of them.
        system: The system message of every row.

    Raises:
        InvalidInputError: Lengths differ, a task is empty, or an image is not one.
    """
    if isinstance(tasks, str):
        raise InvalidInputError("tasks is a list of texts; for one text use prepare_messages.", field="tasks")
    tasks = list(tasks)
    if not tasks:
        raise InvalidInputError("a batch needs at least one task.", field="tasks")
    images = [None] * len(tasks) if images is None else list(images)
    prefills = [assistant_prefill] * len(tasks) if isinstance(assistant_prefill, str) else list(assistant_prefill)
    if not len(tasks) == len(images) == len(prefills):
        raise InvalidInputError(
            f"a batch has as many tasks as images and prefills, not {len(tasks)}, {len(images)} and {len(prefills)}; "
            "give None for a row without an image.",
            field="images",
        )
    return tuple(
        Prompt(task, tuple(Picture.of(image) for image in _listed(row)), prefill, system)
        for task, row, prefill in zip(tasks, images, prefills, strict=True)
    )


def _listed(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]
