"""What a model is: its sizes and conventions."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelInfo:
    """The sizes and names of a model.

    Attributes:
        name: The name it was loaded by.
        family: The architecture, `config.model_type`.
        layers: Decoder layers.
        heads: Query heads a layer.
        kv_heads: Key and value heads a layer.
        head_dim: Width of a head.
        hidden: Width of the residual stream.
        mlp: Width of the MLP.
        vocab: Rows of the unembedding.
        vision_layers: Layers of the vision tower.
        vision_heads: Its heads.
        vision_hidden: Its width.
        patch_size: Pixels along one side of its patches.
        merge_size: Its patches along one side of an image token.
        image_token_id: The token that stands for a part of an image.
        context: The longest sequence, in tokens.
        dtype: The type of the weights, by name.
        revision: The revision of the weights.
        attention: The attention implementation.
        device: Where it runs.
        parameters: Parameters in all.
        coordinates: How it writes points: "processed_pixels" or "thousandths".
        norm_eps: What the final norm adds to the mean square under its root.
        norm_centers: Whether the final norm subtracts the mean over the width, as LayerNorm does and RMSNorm does not.
        scales_outputs: Whether a norm or a multiplier stands between attention or MLP and the residual stream.
        stream_scales: What the residual stream is multiplied by at the end of each layer; empty where nothing is.
    """

    name: str
    family: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    mlp: int
    vocab: int
    vision_layers: int
    vision_heads: int
    vision_hidden: int
    patch_size: int
    merge_size: int
    image_token_id: int
    context: int
    dtype: str
    revision: str
    attention: str
    device: str
    parameters: int
    coordinates: str
    norm_eps: float
    norm_centers: bool
    scales_outputs: bool
    stream_scales: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stream_scales", tuple(self.stream_scales))  # also of a message, or of JSON

    def gain(self, layer: int, end: int) -> float:
        """What is added to the stream within a layer is multiplied by so much until it enters layer `end`."""
        return math.prod(self.stream_scales[layer:end])
