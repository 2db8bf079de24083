"""What a model's inputs are, for drawing them."""

from __future__ import annotations

from .vlm_metadata import VLMMetadataExtractor

__all__ = ["VLMMetadataExtractor"]
