"""Attribution: which parts of the input or of the model made a target.

The target is the logit of a token at a position, the difference of two tokens' logits, or the log-probability of a
whole answer. `docs/attribution.md` has the formulas.

Shapes: b rows, s positions, L layers, H heads.

- `direct_logit`: the residual stream at the target's position is the sum of the embedding and of what every head and
  every MLP wrote; each part is read along the target's direction, the final norm's scale held at its value in this run
  (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"). Each head is split over the positions it
  read. `total` is the sum of all parts, which is the target's value.
- `gradient_x_input`: the gradient of the target times the input embedding, summed over the embedding's width
  (Shrikumar et al. 2016). No completeness: `residual` says how far the sum is from the value.
- `integrated_gradients`: the gradient averaged on the way from a baseline, times the distance (Sundararajan et al.
  2017). `total` is the sum of scores and the baseline's value, and `residual` the convergence delta.
- `occlusion`: what the target loses when a window of the image is covered (Zeiler and Fergus 2014). No completeness.
- `attention_rollout`: attention patterns multiplied through the layers (Abnar and Zuidema 2020). `total` is the sum of
  scores, which is 1; it does not depend on the target's token.
- `relevancy`: attention patterns weighted by their gradients, through the language model and the vision tower (Chefer
  et al. 2021). No completeness.
- `grad_cam`: the vision tower's last feature maps weighted by their gradients (Selvaraju et al. 2017). No completeness.
- `attribution_patching`: to first order, what the target would lose if activations were those of a second run (Nanda
  2023; Syed et al. 2023). `total` is the sum of the embeddings' scores and the second run's value, and `residual` what
  is not linear between the two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from . import arrays, scalars
from .arrays import Array
from .cost import Cost
from .errors import InvalidInputError
from .inputs import Inputs, layout_number, on_grid

if TYPE_CHECKING:
    from PIL import Image

    from .pictures.figure import Figure

COMPLETE = ("direct_logit", "gradient_x_input", "integrated_gradients", "attribution_patching")
"""The methods whose `residual` is a figure; of the others it is NaN."""


@dataclass(frozen=True, eq=False)
class Attribution:
    """Scores of one method for one target, row by row.

    Attributes:
        method: The method.
        inputs: What was asked.
        target_ids: [b] the explained tokens; [b, n] those of an answer.
        target_tokens: [b] their texts.
        target_value: [b] float32, the explained logit, difference of logits or log-probability.
        total: [b] float32, what the method's parts add up to; see the module's description.
        scores: [b, s] float32, what each position of the input contributed. For `direct_logit`: what all heads read
            from it at the target's position, and the position's own embedding. Methods on pixels, and `relevancy`, have
            here what was found behind an image token.
        head_scores: [b, L, H] float32, for `direct_logit` and `attribution_patching`.
        mlp_scores: [b, L] float32, for `direct_logit` and `attribution_patching`.
        layer_scores: [b, L, s] float32, for `attribution_patching`: the residual stream after each layer.
        embed_score: [b] float32, for `direct_logit`: the target position's own embedding.
        bias: [b] float32, for `direct_logit`: biases of output projections, of norms and of the unembedding.
        source_scores: [b, L, H, s] float32, for `direct_logit`: each head split over what it read.
        baseline_value: [b] float32, the target's value at the baseline of `integrated_gradients`, or in the second run
            of `attribution_patching`.
        steps: Steps of the integration, where there was one.
        cost: What the call took on the server; None in process.
    """

    method: str
    inputs: Inputs = field(repr=False)
    target_ids: Array = field(repr=False)
    target_tokens: list[str]
    target_value: Array
    total: Array
    scores: Array = field(repr=False)
    head_scores: Array | None = field(default=None, repr=False)
    mlp_scores: Array | None = field(default=None, repr=False)
    layer_scores: Array | None = field(default=None, repr=False)
    embed_score: Array | None = field(default=None, repr=False)
    bias: Array | None = field(default=None, repr=False)
    source_scores: Array | None = field(default=None, repr=False)
    baseline_value: Array | None = field(default=None, repr=False)
    steps: int | None = None
    cost: Cost | None = field(default=None, repr=False)

    @property
    def residual(self) -> Array:
        """[b] float32, the completeness figure: target_value - total; NaN for a method that promises no sum."""
        residual = self.target_value - self.total
        return residual if self.method in COMPLETE else residual * float("nan")

    def image_grid(self, image: int = 0, tile: int | None = None) -> Array:
        """The scores of an image's tokens, [grid_h, grid_w] float32.

        Args:
            image: The number of the image, over all rows of the batch.
            tile: The number of one tile, for its grid alone; an overview is to be had in this way only.
        """
        layout = layout_number(self.inputs.images, image)
        return on_grid(self.scores[layout.row], layout, tile)

    def tokens(self, row: int = 0) -> list[tuple[str, float]]:
        """Every token of a row with its score, in order; padding is left out."""
        row = scalars.index(row, "row", len(self.inputs))
        labels = self.inputs.token_labels[row]
        scores = arrays.to_numpy(self.scores)[row]
        mask = arrays.to_numpy(self.inputs.attention_mask)[row]
        return [(label, float(s)) for label, s, kept in zip(labels, scores, mask, strict=True) if kept]

    def heads(self, row: int = 0) -> Array:
        """The heads' scores of a row, [L, H] float32.

        Raises:
            InvalidInputError: The method has no scores of heads.
        """
        if self.head_scores is None:
            raise InvalidInputError(
                f"{self.method} has no scores of heads; direct_logit and attribution_patching have.", field="method"
            )
        return self.head_scores[scalars.index(row, "row", len(self.inputs))]

    def top_patches(self, image: int = 0, k: int = 5) -> list[tuple[int, int, float]]:
        """The k strongest patches of an image: row and column in its token grid, and score; strongest first."""
        grid = arrays.to_numpy(self.image_grid(image))
        order = np.argsort(-grid, axis=None, kind="stable")[: scalars.count(k, "k", scalars.LARGEST)]
        return [(int(i) // grid.shape[1], int(i) % grid.shape[1], float(grid.flat[i])) for i in order]

    def picture(self, image: int | None = None, *, peak: float | None = None) -> Figure:
        """The scores over the images, with their scale: a figure that shows itself in a notebook; `.save(path)` writes.

        Args:
            image: The number of one image, over all rows of the batch; None for all of the first image's row.
            peak: The score of full colour; None for the largest there is.
        """
        from .pictures import attribution

        return attribution(self, image, peak=peak)

    def to_image(self, image: int | None = None, scale: float = 1.0) -> Image.Image:
        """`picture` as a PIL image."""
        return self.picture(image).to_image(scale)

    def show(self, image: int | None = None) -> None:
        """Open `picture` in a viewer."""
        self.picture(image).show()

    def _repr_html_(self) -> str:
        from .pictures.overlays import attribution_html

        return attribution_html(self)
