"""Write the trained model into the package: `python -m vlm_spectra_server.spectra_tiny.export --folder ...`.

Weights are stored in float16, half the size; the configuration says float32, so that loading widens them again and
every computation is exact on a processor too.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from . import DIRECTORY
from .curve import draw_curves
from .parts import build_model, save_processor


def load_stages(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    """The model with the weights of the latest checkpoint of each stage."""
    model = build_model()
    parts = {"visual": model.model.visual, "language_model": model.model.language_model, "lm_head": model.lm_head}
    for stage in ("tower", "language"):
        path = folder / f"{stage}.pt"
        if path.exists():
            modules = torch.load(path, weights_only=True, map_location="cpu")["modules"]
            if "model" in modules:
                model.load_state_dict(modules["model"])
            for name in parts.keys() & modules.keys():
                parts[name].load_state_dict(modules[name])
    return model


def write(model: Qwen2_5_VLForConditionalGeneration, directory: Path) -> None:
    """Model, processor and generation settings, as `from_pretrained` reads them."""
    model.half().save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_processor(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=Path("spectra-tiny-training"), help="where training keeps its state"
    )
    parser.add_argument("--to", type=Path, default=DIRECTORY)
    arguments = parser.parse_args()
    write(load_stages(arguments.folder), arguments.to)
    shutil.copyfile(arguments.folder / "log.csv", arguments.to / "training.csv")
    draw_curves(arguments.to / "training.csv", arguments.to / "training.png")


if __name__ == "__main__":
    main()
