"""What a figure is: panels on one scale. `drawing` makes a picture of it, `drawing_html` a fragment for a notebook."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .. import arrays, scalars
from ..arrays import Array
from ..errors import InvalidInputError, shown
from ..spatial import Box
from .markup import document, write_page, write_whole

Values = NDArray[np.float64]


def numbers(given: Array, field: str) -> Values:
    """What a caller wants drawn.

    Args:
        given: Numbers of any type, an array of them or lists.
        field: The argument.

    Raises:
        InvalidInputError: They are no numbers, or rows differ in length.
    """
    try:
        return np.asarray(arrays.to_numpy(given), dtype=np.float64)
    except (TypeError, ValueError):
        raise InvalidInputError(f"{field} are numbers, as many in each row, not {shown(given)}.", field=field) from None


@dataclass(frozen=True)
class Scale:
    """What a figure's colours mean.

    Attributes:
        low: The value of the scale's one end.
        high: The value of its other end, at full colour.
        label: What is measured, with its unit.
        colours: One of `vlm_spectra.pictures.colours.SCALES`, or "heat": more or less opaque over an image.
    """

    low: float
    high: float
    label: str
    colours: str

    @classmethod
    def over(cls, values: Values, label: str, signed: bool | None, peak: float | None, colours: str) -> Scale:
        """A scale on which values lie.

        Args:
            values: All that is drawn; what is not finite is left out.
            label: What is measured.
            signed: Whether values have two directions; None to see whether any is negative.
            peak: The value of full colour; None for the largest there is.
            colours: The colours.

        Raises:
            InvalidInputError: The peak is not above 0.
        """
        most = scalars.real(peak)
        if peak is not None and not (most and most > 0):
            raise InvalidInputError(f"peak is {shown(peak)}; it is the value of full colour, above 0.", field="peak")
        finite = values[np.isfinite(values)]
        signed = bool((finite < 0).any()) if signed is None else signed
        high = most if most is not None else float(np.abs(finite).max(initial=0.0)) or 1.0
        return cls(-high if signed else 0.0, high, label, colours)

    @property
    def signed(self) -> bool:
        """Whether the values have two directions."""
        return self.low < 0

    def places(self, values: Values) -> Values:
        """Values as 0 to 1 of the scale, or -1 to 1 of a signed one."""
        if self.signed:
            return np.clip(values / self.high, -1, 1)
        span = self.high - self.low
        return np.clip((values - self.low) / (span or 1.0), 0, 1)


@dataclass(frozen=True)
class Overlay:
    """Values over an image.

    Attributes:
        picture: The image as it was given.
        boxes: The patches: left, top, right, bottom in its pixels.
        values: [patches].
        names: [patches] what each is.
        title: What stands above it.
    """

    picture: Image.Image = field(repr=False)
    boxes: tuple[Box, ...] = field(repr=False)
    values: Values = field(repr=False)
    names: tuple[str, ...] = field(repr=False)
    title: str = ""


@dataclass(frozen=True)
class Heatmap:
    """A matrix.

    Attributes:
        values: [rows, columns]; NaN stays empty.
        rows: [rows] names.
        columns: [columns] names.
        texts: [rows][columns] what stands in each cell, or None.
        title: What stands above it.
        across: What the columns are.
        down: What the rows are.
    """

    values: Values = field(repr=False)
    rows: tuple[str, ...]
    columns: tuple[str, ...] = field(repr=False)
    texts: tuple[tuple[str, ...], ...] | None = field(default=None, repr=False)
    title: str = ""
    across: str = ""
    down: str = ""


@dataclass(frozen=True)
class Figure:
    """Panels on one scale.

    Attributes:
        panels: In reading order.
        scale: What the colours mean.
        title: What stands above all.
        columns: Panels in a line; None for what fits.
    """

    panels: tuple[Overlay | Heatmap, ...]
    scale: Scale
    title: str = ""
    columns: int | None = None

    def to_image(self, scale: float = 1.0) -> Image.Image:
        """The figure as an RGB picture.

        Args:
            scale: Makes everything larger, for print: 1 is for a screen, 3 for a paper.
        """
        from .drawing import draw

        number = scalars.real(scale)
        if number is None or not 0.1 <= number <= 10:
            raise InvalidInputError(f"scale is {shown(scale)}; possible are 0.1 to 10.", field="scale")
        return draw(self, number)

    def to_html(self) -> str:
        """The figure as a fragment of HTML that needs no style sheet and no script."""
        from .drawing_html import fragment

        return fragment(self)

    def save(self, path: str | os.PathLike[str], scale: float = 2.0) -> None:
        """Write the figure; the file's ending says how: .html, or .png, .jpg, .webp, .pdf.

        Args:
            path: Where; the file appears whole or not at all.
            scale: As for `to_image`.

        Raises:
            InvalidInputError: It cannot be written there, or the ending is another.
        """
        ending = Path(str(path)).suffix.lower()
        kinds = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".pdf": "PDF"}
        if ending in (".html", ".htm"):
            write_page(path, document(self.title or "Figure", self.to_html()))
        elif ending in kinds:
            buffer = io.BytesIO()
            options: dict[str, Any] = {"PNG": {"optimize": True}, "PDF": {"resolution": 72 * scale}}
            self.to_image(scale).save(buffer, format=kinds[ending], **options.get(kinds[ending], {}))
            write_whole(path, buffer.getvalue(), "figure")
        else:
            possible = ", ".join([".html", *kinds])
            raise InvalidInputError(f"a figure's file ends in {possible}, not in {ending!r}.", field="path")

    def show(self) -> None:
        """Open the figure in a viewer; in a notebook the figure alone as a cell's last line does it."""
        self.to_image().show()

    def _repr_html_(self) -> str:
        return self.to_html()
