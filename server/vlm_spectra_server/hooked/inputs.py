"""Prompts to model inputs: the chat template, the processor, and where each image's tokens stand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vlm_spectra.errors import InvalidImageError, InvalidInputError, PromptTooLongError
from vlm_spectra.inputs import ImageLayout, Inputs, Prompt, Tile
from vlm_spectra.positions import Layout

from ..families.layouts import ImageTokens
from .reading import Reading
from .views import SeenLayout, with_patch_grids


@dataclass(frozen=True, eq=False)
class HookedInputs(Inputs):
    """Inputs with the tensors that the model takes.

    Attributes:
        tensors: Every field the processor returned, on the host.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    __repr__ = Inputs.__repr__


def prepare(reading: Reading, processor: Any, prompts: Sequence[Prompt]) -> HookedInputs:
    """Format prompts, process images, and say what stands where.

    Raises:
        InvalidInputError: A text contains the image placeholder, or the family cannot do what was asked.
        InvalidImageError: The processor cannot use an image, for example because it is far too narrow.
        PromptTooLongError: More tokens than the model's context.
    """
    tokenizer = processor.tokenizer
    placeholders = {tokenizer.convert_ids_to_tokens(reading.image_token_id), _image_mark(reading, processor)}
    for prompt in prompts:
        for text in (prompt.task, prompt.assistant_prefill, prompt.system):
            for placeholder in placeholders:
                if placeholder in text:
                    raise InvalidInputError(
                        f"a text contains {placeholder!r}, which stands for a part of an image; write it differently.",
                        field="task",
                    )
    texts = [_format(reading, processor, prompt) for prompt in prompts]
    pictures = [[picture.pixels for picture in prompt.images] for prompt in prompts]
    begun = tokenizer.bos_token is not None and all(text.startswith(tokenizer.bos_token) for text in texts)
    try:
        features = processor(
            text=texts,
            images=pictures if any(pictures) else None,
            padding=True,
            padding_side="left",
            add_special_tokens=not begun,  # a template that writes the beginning needs no second one
            return_tensors="pt",
        )
    except (ValueError, RuntimeError) as error:
        if not any(pictures):
            raise InvalidInputError(
                f"the model's processor refuses the prompt: {_sentence(error)}.", field="image"
            ) from error
        shown = ", ".join(f"{picture.size[0]} x {picture.size[1]}" for prompt in prompts for picture in prompt.images)
        raise InvalidImageError(
            f"the model's processor refuses the images ({shown} pixels): {_sentence(error)}.", field="image"
        ) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a tokenizer in Rust, and nothing that can be imported
            raise
        raise InvalidInputError(
            f"the model's tokenizer fails on the prompt ({_sentence(error)}); it may be far too long.", field="task"
        ) from None
    if "cross_attention_mask" in features and not all(pictures):
        raise InvalidInputError(
            "a model that reads images by cross-attention takes rows that all have images or none.", field="images"
        )
    tensors = {
        name: value.to(reading.dtype) if value.is_floating_point() else value
        for name, value in features.items()
        if isinstance(value, torch.Tensor) and name != "labels"  # PaliGemma's, for training
    }
    ids, mask = tensors["input_ids"], tensors["attention_mask"]
    longest = int(mask.sum(1).max())
    if longest >= reading.context:
        images = int((ids == reading.image_token_id).sum(1).max())
        raise PromptTooLongError(
            f"the prompt has {longest} tokens ({images} of them of images); the model's context holds "
            f"{reading.context}, so at most {reading.context - 1} are possible.",
            field="task",
        )
    images = _layouts(reading, processor, prompts, features, ids)
    images = with_patch_grids(reading.vision, tensors, images)
    labels = _labels(tokenizer, ids, images)
    return HookedInputs(
        prompts=tuple(prompts),
        input_ids=ids,
        attention_mask=mask,
        token_labels=labels,
        images=images,
        text=texts,
        tensors=tensors,
    )


def _sentence(error: BaseException) -> str:
    """The first line of an error, without its full stop."""
    return str(error).splitlines()[0].rstrip(".")


def _image_mark(reading: Reading, processor: Any) -> str:
    """What stands for an image in a formatted text, before it becomes tokens."""
    token = processor.tokenizer.convert_ids_to_tokens(reading.image_token_id)
    return str(getattr(processor, "image_token", None) or token)


def _format(reading: Reading, processor: Any, prompt: Prompt) -> str:
    if not processor.chat_template:  # a model that is no chat model: the images, then the text
        parts = [_image_mark(reading, processor) * len(prompt.images) + prompt.task, prompt.assistant_prefill]
        return "\n".join(filter(None, [prompt.system, *parts]))
    content = [{"type": "image"} for _ in prompt.images] + [{"type": "text", "text": prompt.task}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if prompt.system:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": prompt.system}]})
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return str(text) + prompt.assistant_prefill


def _layouts(
    reading: Reading, processor: Any, prompts: Sequence[Prompt], features: Any, ids: torch.Tensor
) -> tuple[ImageLayout, ...]:
    """Which columns each image's tokens have: counted off image by image, so text between two is never taken in."""
    sizes = [[picture.size for picture in prompt.images] for prompt in prompts]
    columns = [torch.nonzero(row == reading.image_token_id).flatten().tolist() for row in ids]
    if not any(sizes):
        return ()
    batch = reading.family.image_tokens(processor, features, sizes, [len(row) for row in columns])
    return tuple(
        layout
        for row, (images, row_sizes, row_columns) in enumerate(zip(batch, sizes, columns, strict=True))
        for layout in _row_layouts(row, images, row_sizes, row_columns)
    )


def _row_layouts(
    row: int, images: Sequence[ImageTokens], sizes: Sequence[tuple[int, int]], columns: Sequence[int]
) -> Iterator[ImageLayout]:
    start = 0
    for image, size in zip(images, sizes, strict=True):
        tiles, at = [], start
        for grid in image.grids:
            rows, across = grid.shape
            stride = across + grid.breaks
            positions = tuple(columns[at + r * stride + c] for r in range(rows) for c in range(across))
            tiles.append(Tile(grid.shape, grid.box, positions, grid.origin, grid.overview, grid.resampled))
            at += grid.count
        own = tuple(columns[start : start + image.count])
        yield ImageLayout(row, size, image.processed_size, image.shape, own, tuple(tiles))
        start += image.count


def _labels(tokenizer: Any, ids: torch.Tensor, images: Sequence[ImageLayout]) -> list[list[str]]:
    """A label a token: its text, or which part of which image it is."""
    texts = {token: tokenizer.decode([token]) for token in ids.unique().tolist()}
    labels = [[texts[token] for token in row] for row in ids.tolist()]
    numbers: dict[int, int] = {}
    for image in images:
        number = numbers[image.row] = numbers.get(image.row, 0) + 1
        for column in image.positions:
            labels[image.row][column] = f"<image {number} break>"
        fine = sum(1 for tile in image.tiles if not tile.overview)
        for index, tile in enumerate(image.tiles):
            part = " overview" if tile.overview else f" tile {index + 1}" if fine > 1 else ""
            for at, column in enumerate(tile.positions):
                down, across = divmod(at, tile.grid[1])
                labels[image.row][column] = f"<image {number}{part} [{down},{across}]>"
    return labels


def layout_of(reading: Reading, inputs: HookedInputs) -> Layout:
    """Which columns are tokens, and which of them are an image's."""
    tokens = inputs.tensors["attention_mask"].bool()
    image = (inputs.tensors["input_ids"] == reading.image_token_id) & tokens
    return SeenLayout(tokens.numpy(), image.numpy(), reading.vision, inputs.tensors, inputs.images)


def extended(
    inputs: HookedInputs, sequences: torch.Tensor, tokens: torch.Tensor, answer_type: int = 0
) -> dict[str, torch.Tensor]:
    """The model's inputs for prompt and answer.

    Args:
        inputs: The prompt.
        sequences: [batch, prompt + new] ids.
        tokens: [batch, new] bool, false where a row had already ended.
        answer_type: The token type of an answer's tokens, in families that have types.
    """
    tensors = dict(inputs.tensors)
    new = tokens.shape[1]
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in tensors:
            tensors[name] = torch.nn.functional.pad(tensors[name], (0, new), value=answer_type)
    if "cross_attention_mask" in tensors:
        last = tensors["cross_attention_mask"][:, -1:]
        tensors["cross_attention_mask"] = torch.cat([tensors["cross_attention_mask"], *[last] * new], dim=1)
    tensors["input_ids"] = sequences
    tensors["attention_mask"] = torch.cat([inputs.tensors["attention_mask"], tokens.long()], dim=1)
    return tensors
