"""Colour scales: from numbers to colours that colour-blind readers and black-and-white printers can tell apart.

Each scale changes steadily in lightness. Signed values are vermillion for and blue against (Okabe and Ito's pair),
white in the middle; amounts run from paper to dark blue; the dark ones are for pages on a dark ground.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RGB = tuple[int, int, int]

WARM: RGB = (213, 94, 0)
"""For the target, or simply much."""
COLD: RGB = (0, 114, 178)
"""Against the target."""

SCALES: dict[str, tuple[str, ...]] = {
    name: tuple(f"#{anchor}" for anchor in anchors.split())
    for name, anchors in {
        "amount": "ffffff eaf2fb d3e4f5 b4d2ec 8cbbe0 62a1d2 3e84bf 2366a5 134a83 08305c",
        "amount-dark": "14181d 16273a 183858 1c4b77 256095 3a7ab1 5c96c8 86b3db b3d0ea e2eefa",
        "doubt": "ffffff fdf0e0 fbddba f6c28b eea35c df8234 c4631a a04810 77310b 4d1f06",
        "doubt-dark": "14181d 2a1f16 452b15 643814 854817 a85d22 c97a3c e29d66 f2c49c fdeedd",
        "distance": "ffffff eff6ec d9ebd3 bbdbb2 96c68d 6fae69 4a934c 2e7636 1a5926 0b3c18",
        "distance-dark": "14181d 16291a 193b22 1f502c 2b6739 41804d 629b6b 8bb791 b7d3ba e4f1e4",
        "signed": "00456b 00629a 2f83bb 74abd3 b7d3e8 ffffff f6d2b4 eba873 dc7c34 bd5300 863b00",
    }.items()
}
"""The scales by name, low to high: anchors at even distances, straight lines between them."""


def colours(values: NDArray[np.floating], scale: str) -> NDArray[np.uint8]:
    """The colours of values on a scale, [..., 3].

    Args:
        values: From 0 to 1, or for "signed" from -1 to 1; what lies outside has the end's colour, NaN the lowest.
        scale: One of `SCALES`.
    """
    anchors = np.array([rgb(anchor) for anchor in SCALES[scale]], dtype=np.float64)
    values = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0)
    places = np.clip((values + 1) / 2 if scale == "signed" else values, 0, 1) * (len(anchors) - 1)
    low = np.minimum(places.astype(int), len(anchors) - 2)
    share = (places - low)[..., None]
    mixed: NDArray[np.uint8] = np.rint(anchors[low] * (1 - share) + anchors[low + 1] * share).astype(np.uint8)
    return mixed


def rgb(colour: str) -> RGB:
    """`#rrggbb` as three numbers."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def css(colour: RGB | NDArray[np.uint8]) -> str:
    """Three numbers as `#rrggbb`."""
    return "#" + "".join(f"{int(part):02x}" for part in colour)


def ink(ground: RGB | NDArray[np.uint8]) -> RGB:
    """Black or white, whichever reads better on a colour (relative luminance, WCAG 2): at least 4.5 to 1."""
    linear = [(c / 255 / 12.92) if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in map(int, ground)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (255, 255, 255) if luminance < 0.179 else (0, 0, 0)
