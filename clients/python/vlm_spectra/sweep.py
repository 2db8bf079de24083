"""A sweep of activation patching: which activation, put from one run into another, moves the answer.

Two prompts of as many tokens, `clean` and `corrupted`, differ in what is studied. Each cell of a sweep is a forward
pass of one of them in which one activation has the value that it has in the other (Vig et al. 2020; Meng et al. 2022,
"Locating and Editing Factual Associations in GPT"):

- "denoising": the corrupted prompt runs, and a clean activation is put in: what suffices to restore the answer?
- "noising": the clean prompt runs, and a corrupted activation is put in: what is needed for the answer?

Shapes: n hooks (one a layer, as a rule), m columns: positions, or heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from . import arrays, scalars, tables
from .arrays import Array
from .cost import Cost
from .errors import InvalidInputError
from .inputs import Inputs, layout_number, on_grid

if TYPE_CHECKING:
    import pandas

    from .pictures.figure import Figure


@dataclass(frozen=True, eq=False)
class PatchSweep:
    """The metric in every cell.

    Attributes:
        mode: "denoising" or "noising".
        axis: "positions" or "heads".
        clean: The prompt whose activations are right.
        corrupted: The other.
        hooks: [n] the patched hooks, by full name.
        columns: [m] the patched positions or heads.
        values: [n, m] float32, the metric with that cell patched.
        clean_value: The metric of the clean prompt.
        corrupted_value: The metric of the corrupted prompt.
        target_tokens: The tokens whose logit, or log-probability, the metric is.
        cost: What the call took on the server; None in process.
    """

    mode: str
    axis: str
    clean: Inputs = field(repr=False)
    corrupted: Inputs = field(repr=False)
    hooks: list[str] = field(repr=False)
    columns: list[int] = field(repr=False)
    values: Array = field(repr=False)
    clean_value: float
    corrupted_value: float
    target_tokens: list[str]
    cost: Cost | None = field(default=None, repr=False)

    @property
    def start(self) -> float:
        """The metric of the prompt that runs, before anything is patched."""
        return self.corrupted_value if self.mode == "denoising" else self.clean_value

    @property
    def goal(self) -> float:
        """The metric of the prompt that the patches come from."""
        return self.clean_value if self.mode == "denoising" else self.corrupted_value

    @property
    def effect(self) -> Array:
        """[n, m] float32, how far each patch moves the metric: values - start."""
        return self.values - self.start

    @property
    def normalized(self) -> Array:
        """[n, m] float32, the effect as a share of the way from start to goal; 0 where these are the same."""
        way = self.goal - self.start
        return self.effect / way if way else self.effect * 0.0

    @property
    def labels(self) -> list[str]:
        """[m] what each column is: a token's label, or a head's number."""
        if self.axis == "heads":
            return [str(head) for head in self.columns]
        return [self.clean.token_labels[0][position] for position in self.columns]

    def image_grid(self, row: int, image: int = 0, tile: int | None = None) -> Array:
        """The normalized effect at an image's tokens for one hook, [grid_h, grid_w] float32; NaN where not patched.

        Args:
            row: The hook's number in `hooks`.
            image: The number of the image.
            tile: The number of one tile, for its grid alone.

        Raises:
            InvalidInputError: The columns are heads.
        """
        if self.axis == "heads":
            raise InvalidInputError("this sweep is over heads; one over positions has an image's grid.", field="axis")
        layout = layout_number(self.clean.images, image)
        found = np.full(len(self.clean.token_labels[0]), np.nan, dtype=np.float32)
        found[self.columns] = arrays.to_numpy(self.normalized)[scalars.index(row, "row of hooks", len(self.hooks))]
        kind = "torch" if arrays.is_torch(self.values) else "numpy"
        return on_grid(arrays.convert(found, kind), layout, tile)

    def top(self, k: int = 5) -> list[tuple[str, int, float]]:
        """The k strongest cells: hook, position or head, and normalized effect; strongest first."""
        effect = arrays.to_numpy(self.normalized)
        order = np.argsort(-effect, axis=None, kind="stable")[: scalars.count(k, "k", scalars.LARGEST)]
        width = len(self.columns)
        return [(self.hooks[i // width], self.columns[i % width], float(effect.flat[i])) for i in order.tolist()]

    def picture(self) -> Figure:
        """The normalized effect as a figure that shows itself in a notebook; `.save(path)` writes it."""
        from .pictures import patching

        return patching(self)

    def _repr_html_(self) -> str:
        return self.picture().to_html()

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a cell: hook, position or head, label, value, effect and normalized effect.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        values, effect = arrays.to_numpy(self.values), arrays.to_numpy(self.effect)
        normalized, labels, name = arrays.to_numpy(self.normalized), self.labels, self.axis[:-1]
        frame: pandas.DataFrame = tables.pandas().DataFrame.from_records(
            [
                {
                    "hook": hook,
                    name: column,
                    "label": labels[j],
                    "value": float(values[i, j]),
                    "effect": float(effect[i, j]),
                    "normalized": float(normalized[i, j]),
                }
                for i, hook in enumerate(self.hooks)
                for j, column in enumerate(self.columns)
            ]
        )
        return frame
