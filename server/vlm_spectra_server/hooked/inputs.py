"""Prompts to model inputs: the chat template, the processor, and where each image's tokens stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vlm_spectra.errors import InvalidImageError, InvalidInputError, PromptTooLongError
from vlm_spectra.inputs import ImageLayout, Inputs, Prompt
from vlm_spectra.positions import Layout

from .reading import Reading


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
    placeholder = tokenizer.convert_ids_to_tokens(reading.image_token_id)
    for prompt in prompts:
        if any(placeholder in text for text in (prompt.task, prompt.assistant_prefill, prompt.system)):
            raise InvalidInputError(
                f"a text contains {placeholder!r}, which stands for a part of an image; write it differently.",
                field="task",
            )
    texts = [_format(processor, prompt) for prompt in prompts]
    pictures = [[picture.pixels for picture in prompt.images] for prompt in prompts]
    try:
        features = processor(
            text=texts,
            images=pictures if any(pictures) else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
    except ValueError as error:
        if not any(pictures):
            raise
        shown = ", ".join(f"{picture.size[0]} x {picture.size[1]}" for prompt in prompts for picture in prompt.images)
        raise InvalidImageError(
            f"the model's processor refuses the images ({shown} pixels): {str(error).splitlines()[0]}.", field="image"
        ) from error
    tensors = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
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


def _format(processor: Any, prompt: Prompt) -> str:
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
    sizes = [picture.size for prompt in prompts for picture in prompt.images]
    if not sizes:
        return ()
    count = int((ids == reading.image_token_id).sum())
    tokens = iter(zip(reading.family.image_tokens(processor, features, sizes, count), sizes, strict=True))
    layouts = []
    for row, prompt in enumerate(prompts):
        columns = torch.nonzero(ids[row] == reading.image_token_id).flatten().tolist()
        for _ in prompt.images:
            image, size = next(tokens)
            here, columns = columns[: image.grid[0] * image.grid[1]], columns[image.grid[0] * image.grid[1] :]
            layouts.append(ImageLayout(row, size, image.processed_size, image.grid, tuple(here)))
    return tuple(layouts)


def _labels(tokenizer: Any, ids: torch.Tensor, images: Sequence[ImageLayout]) -> list[list[str]]:
    """A label a token: its text, or which part of which image it is."""
    texts = {token: tokenizer.decode([token]) for token in ids.unique().tolist()}
    labels = [[texts[token] for token in row] for row in ids.tolist()]
    numbers: dict[int, int] = {}
    for image in images:
        numbers[image.row] = numbers.get(image.row, 0) + 1
        for index, column in enumerate(image.positions):
            row, across = divmod(index, image.grid[1])
            labels[image.row][column] = f"<image {numbers[image.row]} [{row},{across}]>"
    return labels


def layout_of(reading: Reading, inputs: HookedInputs) -> Layout:
    """Which columns are tokens, and which of them are an image's."""
    tokens = inputs.tensors["attention_mask"].bool()
    image = (inputs.tensors["input_ids"] == reading.image_token_id) & tokens
    return Layout(tokens.numpy(), image.numpy())


def extended(inputs: HookedInputs, sequences: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The model's inputs for prompt and answer.

    Args:
        inputs: The prompt.
        sequences: [batch, prompt + new] ids.
        tokens: [batch, new] bool, false where a row had already ended.
    """
    tensors = dict(inputs.tensors)
    length, new = tensors["input_ids"].shape[1], tokens.shape[1]
    for name, value in inputs.tensors.items():
        if name not in ("input_ids", "attention_mask") and value.dim() == 2 and value.shape[1] == length:
            tensors[name] = torch.nn.functional.pad(value, (0, new))  # token types: text
    tensors["input_ids"] = sequences
    tensors["attention_mask"] = torch.cat([inputs.tensors["attention_mask"], tokens.long()], dim=1)
    return tensors
