"""spectra-tiny: a trained miniature Qwen2.5-VL that ships with the package.

It looks at small synthetic screens and answers in the format of UI-TARS, so that demos, tests and tutorials have a
model whose answers mean something although no model hub can be reached. Everything that made it is here: its world
(`world`), what it is asked (`lessons`), its tokenizer and architecture (`tokenizer`, `parts`), its training (`train`)
and its examination (`evaluate`).
"""

from __future__ import annotations

from pathlib import Path

DIRECTORY = Path(__file__).resolve().parent / "files"
"""The shipped model: give it to `from_pretrained` of the Auto classes."""

__all__ = ["DIRECTORY"]
