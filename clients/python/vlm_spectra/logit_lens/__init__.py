"""A logit-lens page from hidden states that are at hand."""

from __future__ import annotations

from .create_logit_lens import create_logit_lens

__all__ = ["create_logit_lens"]
