"""Labels, positions and sizes of a prompt's image, as `create_logit_lens` takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from .. import arrays
from ..errors import InvalidInputError
from ..inputs import Inputs


class VLMMetadataExtractor:
    """What stands where in a prompt with one image."""

    @staticmethod
    def extract_metadata_qwen(
        model: Any, processor: Any, inputs: Inputs | Mapping[str, Any], image: Image.Image
    ) -> dict[str, Any]:
        """The metadata of a Qwen-VL model's prompt.

        Args:
            model: The transformers model, `HookedVLM.model`.
            processor: Its processor.
            inputs: From `prepare_messages`, or what the processor returned: `input_ids` and `image_grid_thw`.
            image: The prompt's image.

        Returns:
            `token_labels`, [seq], image tokens numbered from `<IMG001>`; `image_token_positions`; `image_size`, width
            and height after resizing; `grid_size`, rows and columns of image tokens; `patch_size`, pixels along a
            token's side after resizing; `num_image_tokens`; `total_patches`.

        Raises:
            InvalidInputError: The inputs are a batch of several prompts, or have not exactly one image.
        """
        vision = model.config.vision_config
        merge = int(getattr(vision, "spatial_merge_size", 1))
        patch = int(vision.patch_size) * merge
        if isinstance(inputs, Inputs):
            ids = arrays.to_numpy(inputs.input_ids)
            grids = [layout.grid for layout in inputs.images]
        else:
            ids = arrays.to_numpy(inputs["input_ids"])
            ids = ids[None] if ids.ndim == 1 else ids
            sizes = arrays.to_numpy(inputs["image_grid_thw"]) if "image_grid_thw" in inputs else np.zeros((0, 3), int)
            grids = [(int(size[1]) // merge, int(size[2]) // merge) for size in sizes]
        if len(ids) != 1 or len(grids) != 1:
            raise InvalidInputError(
                f"metadata are of one prompt with one image, not of {len(ids)} with {len(grids)}; logit_lens(inputs)"
                ".to_html(path) takes any batch.",
                field="inputs",
            )
        if not isinstance(image, Image.Image):
            raise InvalidInputError(f"the image is a PIL image, not {type(image).__name__}.", field="image")
        rows, columns = grids[0]
        positions = np.flatnonzero(ids[0] == model.config.image_token_id).tolist()
        texts = {token: processor.tokenizer.decode([token]) for token in np.unique(ids[0]).tolist()}
        labels = [texts[token] for token in ids[0].tolist()]
        for number, position in enumerate(positions, 1):
            labels[position] = f"<IMG{number:03d}>"
        return {
            "token_labels": labels,
            "image_token_positions": positions,
            "image_size": (columns * patch, rows * patch),
            "grid_size": (rows, columns),
            "patch_size": patch,
            "num_image_tokens": len(positions),
            "total_patches": rows * columns,
        }
