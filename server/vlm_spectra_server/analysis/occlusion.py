"""Occlusion: what the target loses when a window of the image is covered (Zeiler and Fergus 2014).

A window covers whole image tokens; its pixels are replaced, after the processor's resizing, by those of a baseline
image, in every view of the image that the tower gets. Windows overlap where the stride is smaller than the window; a
token's score is then the mean over the windows that cover it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vlm_spectra.inputs import ImageLayout
from vlm_spectra.spatial import Box

from .pixels import PIXELS, PixelMap
from .subject import Subject
from .targets import Resolved

TOKENS_A_PASS = 8192
"""How many tokens run at once."""


@dataclass(frozen=True)
class Window:
    """What one pass covers of one image.

    Attributes:
        image: The image's number over all rows.
        row: Its row.
        box: The covered part, in pixels of the image as given.
        columns: The sequence positions of the tokens in it.
    """

    image: int
    row: int
    box: Box
    columns: list[int]


def attribute(
    subject: Subject, target: Resolved, baseline: torch.Tensor, pixel_map: PixelMap, size: int, stride: int
) -> dict[str, torch.Tensor]:
    """The scores of every image token; other tokens have 0.

    Args:
        subject: The batch.
        target: The target.
        baseline: What covers, of the shape of `pixel_values`.
        pixel_map: Where the pixels lie.
        size: The window's rows and columns, in image tokens.
        stride: Tokens from one window to the next.
    """
    rows, seq = subject.layout.tokens.shape
    queues: list[list[Window]] = [[] for _ in range(rows)]
    for number, image in enumerate(subject.inputs.images):
        queues[image.row] += windows(number, image, size, stride)
    count = max(map(len, queues), default=0)
    at_once = max(1, min(count, TOKENS_A_PASS // (rows * subject.tensors["input_ids"].shape[1])))
    copies = subject.copies(max(at_once, 1))
    pixels = subject.tensors[PIXELS].to(baseline.dtype)
    value = target.value(subject.logits(subject.run()))
    drops, covers = torch.zeros(rows, seq), torch.zeros(rows, seq)
    done = 0
    while done < count:
        part = range(done, min(done + at_once, count))
        covered = []
        for index in part:
            mask = torch.zeros((), dtype=torch.bool)
            for queue in queues:
                if index < len(queue):
                    mask = mask | pixel_map.within(queue[index].image, queue[index].box)
            covered.append(torch.where(mask, baseline, pixels))
        tensors = copies.tensors(len(part)) | {PIXELS: torch.cat(covered)}
        copied = target.copies(len(part))
        run = subject.run(edits=copies.edits(len(part)))
        values = copied.value(subject.logits(run, copied.columns, tensors)).view(len(part), rows)
        lost = (value - values).cpu()
        for i, index in enumerate(part):
            for row, queue in enumerate(queues):
                if index < len(queue):
                    drops[row, queue[index].columns] += lost[i, row]
                    covers[row, queue[index].columns] += 1
        done = part.stop
        subject.step(done, count)
    scores = drops / covers.clamp_min(1)
    return {"scores": scores, "total": scores.sum(1), "target_value": value}


def windows(number: int, image: ImageLayout, size: int, stride: int) -> list[Window]:
    """All windows of an image, in raster order; the last of a row or column ends at the image's edge."""
    rows, columns = image.grid
    boxes = [(token.box, token.position) for token in image.tokens()]
    middles = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, position) for box, position in boxes]
    found = []
    for top in _starts(rows, size, stride):
        for left in _starts(columns, size, stride):
            last = (min(top + size, rows) - 1) * columns + min(left + size, columns) - 1
            box: Box = (*image.box(top * columns + left)[:2], *image.box(last)[2:])
            inside = [c for x, y, c in middles if box[0] <= x < box[2] and box[1] <= y < box[3]]
            found.append(Window(number, image.row, box, inside))
    return found


def _starts(extent: int, size: int, stride: int) -> list[int]:
    starts = list(range(0, max(extent - size, 0) + 1, stride))
    if starts[-1] + size < extent:
        starts.append(extent - size)
    return starts
