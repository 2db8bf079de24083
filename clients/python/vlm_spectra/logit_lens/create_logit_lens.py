"""The logit-lens page from hidden states, a norm and an unembedding that are at hand.

`model.logit_lens(inputs).to_html(path)` does the same where the weights are, for any batch; this is for hidden states
that one has already, of whatever model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .. import arrays
from ..arrays import Array
from ..errors import InvalidInputError, MissingExtraError
from ..images import Picture
from ..inputs import ImageLayout, Inputs, Prompt
from ..lens import LogitLens
from ..pictures.lens_page import lens_page
from ..pictures.markup import write_page

if TYPE_CHECKING:
    import torch

TOP = 5
"""Tokens listed in a cell."""
ROWS = 256
"""Positions read at a time: memory holds the logits of so many, never of all."""
IMAGE_LABEL = re.compile(r"<IMG\d+>|<image \d+ \[\d+,\d+\]>")
"""Labels of image tokens: `VLMMetadataExtractor`'s, and `Inputs.token_labels`'."""


def create_logit_lens(
    hidden_states: Array | Sequence[Array],
    norm: Any,
    lm_head: Any,
    tokenizer: Any,
    image: Image.Image,
    token_labels: Sequence[str],
    image_size: tuple[int, int],
    grid_size: tuple[int, int],
    patch_size: int,
    model_name: str,
    image_filename: str,
    prompt: str,
    save_folder: str | os.PathLike[str] = ".",
    misc_text: str = "",
) -> Path:
    """Write the logit lens of one prompt with one image as a self-contained page.

    Args:
        hidden_states: A tuple as Hugging Face returns it, [batch, seq, hidden] or [seq, hidden] each: the residual
            stream before each block and, last, after the final norm, which is not applied to it again. Or one tensor
            [layers, (batch,) seq, hidden] of residual streams after blocks, such as
            `cache.stack("lm.blocks.*.hook_resid_post")`.
        norm: The final norm.
        lm_head: The unembedding.
        tokenizer: The tokenizer.
        image: The image, as it was given.
        token_labels: [seq]; image tokens are labelled as `VLMMetadataExtractor` or `prepare_messages` do it.
        image_size: Width and height after the processor's resizing.
        grid_size: Rows and columns of image tokens.
        patch_size: Pixels along a token's side, after resizing.
        model_name: What to call the model, on the page and in the file's name.
        image_filename: The image's name, of which the file's is made.
        prompt: What was asked.
        save_folder: Where the page goes.
        misc_text: More to say on the page.

    Returns:
        The page's path, `{model_name}_{image's name}_logit_lens.html` in the folder.

    Raises:
        InvalidInputError: Labels, grid and hidden states do not fit one another, or the page cannot be written.
        MissingExtraError: PyTorch is not installed.
    """
    if find_spec("torch") is None:
        raise MissingExtraError(
            "create_logit_lens applies a PyTorch norm and needs PyTorch: pip install torch; "
            "logit_lens(inputs).to_html(path) of a model behind a server needs nothing."
        )
    import torch

    streams, first, normed = _streams(hidden_states)
    length = streams[0].shape[0]
    if len(token_labels) != length:
        raise InvalidInputError(
            f"there are {len(token_labels)} token labels for {length} positions.", field="token_labels"
        )
    positions = [i for i, label in enumerate(token_labels) if IMAGE_LABEL.fullmatch(label)]
    if len(positions) != grid_size[0] * grid_size[1]:
        raise InvalidInputError(
            f"a grid of {grid_size[0]} x {grid_size[1]} has {grid_size[0] * grid_size[1]} image tokens; "
            f"{len(positions)} labels are of image tokens.",
            field="grid_size",
        )
    with torch.no_grad():
        results = _read(streams, normed, norm, lm_head)
    heading = f"Logit lens of {model_name}: {Path(image_filename).name}, patches of {patch_size} pixels"
    inputs = Inputs(
        prompts=(Prompt(prompt if prompt.strip() else "(no prompt)", (Picture.of(image),)),),
        input_ids=np.zeros((1, length), dtype=np.int64),
        attention_mask=np.ones((1, length), dtype=np.int64),
        token_labels=[list(token_labels)],
        images=(ImageLayout(0, image.size, tuple(image_size), tuple(grid_size), tuple(positions)),),  # type: ignore[arg-type]
        text=[prompt],
    )
    ids = results["token_ids"]
    texts = {token: str(tokenizer.decode([token])) for token in np.unique(ids).tolist()}
    answers = ids[-1, :, :, :1]
    lens = LogitLens(
        hook="hidden_states",
        inputs=inputs,
        layers=list(range(first, first + len(streams))),
        positions=[list(range(length))],
        token_ids=ids,
        tokens=[[[[texts[token] for token in cell] for cell in row] for row in layer] for layer in ids.tolist()],
        logits=results["logits"],
        probs=results["probs"],
        entropy=results["entropy"],
        kl_to_final=results["kl_to_final"],
        target_ids=answers,
        target_tokens=[[[texts[token] for token in cell] for cell in row] for row in answers.tolist()],
        target_logits=results["target_logits"],
        target_probs=results["target_probs"],
        ranks=results["ranks"],
    )
    name = f"{model_name}_{Path(image_filename).stem}_logit_lens.html".replace("/", "_").replace("\\", "_")
    path = Path(save_folder) / name
    write_page(path, lens_page(lens, f"{heading}. {misc_text}" if misc_text else heading))
    return path


def _streams(hidden_states: Array | Sequence[Array]) -> tuple[list[torch.Tensor], int, bool]:
    """The streams [seq, hidden] each, the first one's layer (-1: before all layers), and whether the last is normed."""
    tuples = isinstance(hidden_states, tuple | list)
    try:
        streams = [arrays.to_torch(stream) for stream in hidden_states]
        streams = [stream[0] if stream.ndim == 3 and len(stream) == 1 else stream for stream in streams]
        fitting = bool(streams) and all(s.ndim == 2 and s.shape == streams[0].shape for s in streams)
    except (TypeError, ValueError):
        fitting = False
    if not fitting:
        raise InvalidInputError(
            "hidden_states are of one prompt: a tuple of [1, seq, hidden], as forward(output_hidden_states=True) gives "
            "it, or one tensor [layers, seq, hidden].",
            field="hidden_states",
        )
    return streams, -1 if tuples else 0, tuples


def _read(streams: list[torch.Tensor], normed: bool, norm: Any, lm_head: Any) -> dict[str, Any]:
    """What each stream says at each position: [layers, 1, seq, ...] arrays, a block of positions at a time."""
    import torch

    parts: dict[str, list[list[torch.Tensor]]] = {}
    place = lm_head.weight
    for start in range(0, len(streams[0]), ROWS):
        block = [stream[start : start + ROWS].to(place.device, place.dtype) for stream in streams]
        final = lm_head(block[-1] if normed else norm(block[-1])).float()
        final_log, answer = final.log_softmax(-1), final.argmax(-1, keepdim=True)
        for layer, stream in enumerate(block):
            logits = final if layer == len(block) - 1 else lm_head(norm(stream)).float()
            log_probs = logits.log_softmax(-1)
            top = logits.topk(min(TOP, logits.shape[-1]), -1)
            probs = log_probs.exp()
            chosen = logits.gather(-1, answer)
            found = {
                "token_ids": top.indices,
                "logits": top.values,
                "probs": probs.gather(-1, top.indices),
                "entropy": -(probs * log_probs.clamp_min(-1e4)).sum(-1),
                "kl_to_final": (final_log.exp() * (final_log - log_probs).clamp(-1e4, 1e4)).sum(-1).clamp_min(0),
                "target_logits": chosen,
                "target_probs": probs.gather(-1, answer),
                "ranks": (logits > chosen).sum(-1, keepdim=True),
            }
            for name, value in found.items():
                parts.setdefault(name, [[] for _ in block])[layer].append(value.cpu())
    return {
        name: torch.stack([torch.cat(blocks) for blocks in layers])[:, None].numpy() for name, layers in parts.items()
    }
