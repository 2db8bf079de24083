"""PaliGemma: pictures and prompt read each other both ways; only the answer's tokens read backwards alone."""

from __future__ import annotations

from .family import Family


class PaliGemma(Family):
    """Tokens of type 0 are the prompt's, those of type 1 the answer's."""

    model_type = "paligemma"
    answer_type = 1
