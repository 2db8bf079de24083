"""Train spectra-tiny: `python -m vlm_spectra_server.spectra_tiny.train`.

Two stages: the vision tower alone (`tower`), then the whole model on questions (`language`). Every step's screens and
questions follow from its number, so a run is repeatable, and one that was stopped goes on with `--resume` as if it had
not been.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import Qwen2_5_VLForConditionalGeneration

from . import language, pixels, tower
from .lessons import make_lessons
from .parts import build_model
from .pixels import FoldedEmbedding, grids, patchify, render

DENSE, SPARSE = (6, 12), (1, 5)
"""Widgets on a screen: many of them teach the tower more for each picture, few are what questions are about."""


SYSTEM = "You are a helpful assistant."
"""Some sequences begin with a system turn, so that one does not confuse the model."""

LANGUAGE_SEEDS = 1_000_000
"""Steps of the second stage count from here: its screens are new."""

SAVE_EVERY = 100
"""Steps between checkpoints."""


def start_model(seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """The untrained model. What is added to the residual stream starts small, and so do the logits."""
    model = build_model(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "lm_head")):
                weight.mul_(0.3)
            elif any(part in name for part in ("q_proj.weight", "k_proj.weight", "qkv.weight")):
                weight.mul_(0.5)
    return model


def schedule(step: int, steps: int, warm_up: int = 40) -> float:
    """Factor of the learning rate: up in a few steps, then down along a cosine to 3%."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, steps - warm_up))))


class Run:
    """One stage: steps, learning rate, checkpoints and the log."""

    def __init__(self, name: str, steps: int, rate: float, modules: dict[str, nn.Module], folder: Path):
        self.name, self.steps, self.rate, self.modules, self.folder = name, steps, rate, modules, folder
        weights = [weight for module in modules.values() for weight in module.parameters() if weight.requires_grad]
        self.optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
        self.done = 0
        self.started = time.monotonic()

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.name}.pt"

    def save(self) -> None:
        """Weights, optimisers and the step, replaced in one move so that a stop in between loses nothing."""
        state = {
            "done": self.done,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimiser": self.optimiser.state_dict(),
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def load(self) -> None:
        """Go on where `save` was."""
        state = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        self.done = state["done"]
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.optimiser.load_state_dict(state["optimiser"])

    def log(self, values: dict[str, float]) -> None:
        """One row of figures, in long form: stage, step, name, value."""
        path = self.folder / "log.csv"
        with path.open("a", newline="") as file:
            csv.writer(file).writerows((self.name, self.done, name, f"{value:.4f}") for name, value in values.items())

    def go(self, loss_of: Callable[[int], tuple[torch.Tensor, dict[str, float]]], every: int = 25) -> None:
        """Train to the last step. `loss_of(step)` gives the loss and figures to log."""
        bar = tqdm(total=self.steps, initial=self.done, desc=self.name, mininterval=5)
        while self.done < self.steps:
            for group in self.optimiser.param_groups:
                group["lr"] = self.rate * schedule(self.done, self.steps)
            self.optimiser.zero_grad(set_to_none=True)
            loss, figures = loss_of(self.done)
            loss.backward()
            for module in self.modules.values():
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            self.optimiser.step()
            self.done += 1
            bar.update()
            if self.done % every == 0 or self.done == self.steps:
                self.log({"loss": loss.item(), **figures})
                bar.set_postfix({name: f"{value:.2f}" for name, value in figures.items()})
            if self.done % SAVE_EVERY == 0 or self.done == self.steps:
                self.save()
        bar.close()


def train_tower(
    model: Qwen2_5_VLForConditionalGeneration, steps: int, folder: Path, resume: bool, batch: int = 8
) -> None:
    """Stage one."""
    visual = model.model.visual
    head = tower.Questionnaire(visual.config.out_hidden_size)
    run = Run("tower", steps, 2e-3, {"visual": visual, "head": head}, folder)
    if resume and run.checkpoint.exists():
        run.load()
    else:
        pictures = [render(tower.draw_screens(step, batch, DENSE)) for step in range(16)]
        tower.whiten(visual.patch_embed.proj, torch.cat([patchify(some) for some in pictures]))

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        screens = tower.draw_screens(step, batch, SPARSE if step % 4 == 3 else DENSE)
        patches, grid, targets = tower.tower_batch(screens)
        features = visual(patches, grid_thw=grid).pooler_output
        losses = head.losses(features, targets)
        figures = head.accuracies(features, targets) if (step + 1) % 25 == 0 else {}
        return sum(tower.WEIGHTS.get(name, 1.0) * loss for name, loss in losses.items()), figures

    run.go(loss_of)


def show_something_else(packed: language.LanguageBatch, pictures: np.ndarray, seed: int) -> None:
    """Give the first row a picture that says nothing about its questions: only the answers' form is left to learn."""
    pictures[0] = pixels.photograph(seed, pictures.shape[2], pictures.shape[1])
    kept = packed.looks[:, 0] != 0
    packed.looks, packed.widgets = packed.looks[kept], packed.widgets[kept]


def train_language(
    model: Qwen2_5_VLForConditionalGeneration, steps: int, folder: Path, resume: bool, batch: int = 8
) -> None:
    """Stage two. The tower stays as it is: its tokens already say all that the questions are about."""
    visual = model.model.visual.requires_grad_(False)
    model.model.language_model.set_attn_implementation(language.ATTENTION)
    parts = {"language_model": model.model.language_model, "lm_head": model.lm_head}
    run = Run("language", steps, 1.5e-3, parts, folder)
    if resume and run.checkpoint.exists():
        run.load()

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        seed = LANGUAGE_SEEDS + step
        screens = tower.draw_screens(seed, batch, (1, 2) if step < steps // 20 else SPARSE)
        asked = [make_lessons(seed * batch + i, screen) for i, screen in enumerate(screens)]
        packed = language.pack(screens, asked, SYSTEM if step % 8 == 7 else None)
        pictures = render(screens)
        if step % 5 == 0:
            show_something_else(packed, pictures, seed)
        with torch.no_grad():
            features = visual(patchify(pictures), grid_thw=grids(pictures)).pooler_output
        return language.language_loss(model, features, packed, looking=0.3)

    run.go(loss_of)


def train(
    folder: Path, tower_steps: int, steps: int, resume: bool = False, seed: int = 0, device: str = "cpu", batch: int = 8
) -> None:
    """Both stages. Every tensor that follows is made on the device; the first weights are the same on any."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = start_model(seed).to(device)
    model.model.visual.patch_embed = FoldedEmbedding(model.model.visual.patch_embed.proj)
    with torch.device(device):
        train_tower(model, tower_steps, folder, resume, batch)
        train_language(model, steps, folder, resume, batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tower-steps", type=int, default=5500)
    parser.add_argument("--steps", type=int, default=4000, help="of the second stage")
    parser.add_argument("--folder", type=Path, default=Path("spectra-tiny-training"), help="checkpoints and log")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    train(arguments.folder, arguments.tower_steps, arguments.steps, arguments.resume, arguments.seed, arguments.device)


if __name__ == "__main__":
    main()
