"""Pictures of results: attention and attribution over an image, heatmaps, a logit lens as a table.

    vs.pictures.attention(cache, inputs, layer=3, head="all")       # small multiples, one for each head
    vs.pictures.attribution(why)                                    # vermillion for the target, blue against it
    vs.pictures.heatmap(values, rows=layers, columns=tokens)        # patching, or whatever else is a matrix
    vs.pictures.lens(lens)                                          # a lens for a paper

Each gives a `Figure`: it shows itself in a notebook (pointing at a patch tells its value), `.save("figure.png")` or
`.save("figure.html")` writes it, `.to_image()` is a PIL image. Images keep their proportions, every figure has its
scale beside it, and no text becomes markup.
"""

from __future__ import annotations

from .figure import Figure
from .heatmaps import heatmap, lens, patching
from .overlays import attention, attribution, overlay

__all__ = ["Figure", "attention", "attribution", "heatmap", "lens", "overlay", "patching"]
