"""A checkpoint's figures: `vlm-spectra check` measures all relations, and a server that loads a model some of them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image, ImageDraw
from vlm_spectra.errors import InvalidInputError, NotSupportedError, SpectraError
from vlm_spectra.images import Picture

from .hooked.inputs import HookedInputs
from .hooked_vlm import HookedVLM
from .relations import RELATIONS, TOLERANCES, Measured, batch, relative

SHORT = ("logits", "finite", "stream", "heads", "rows", "pattern", "lens")
"""The rows that are measured whenever a server loads a model: four short forward passes."""

TASK = "Click on the blue button"
SECOND = "What is to be seen here? Say it in one short sentence."
"""The other row of a batch, without a picture."""


@dataclass(frozen=True)
class Row:
    """One relation, measured.

    Attributes:
        name: Its name in `RELATIONS`.
        figure: The worst error; None where the relation does not apply.
        allowed: The most it may be.
        note: Why it does not apply, or what else there is to say.
    """

    name: str
    figure: float | None
    allowed: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether it holds, or does not apply."""
        return self.figure is None or self.figure <= self.allowed


def drawn(width: int = 224, height: int = 168) -> Image.Image:
    """A screen with a window and a button, for models that are given no picture."""
    image = Image.new("RGB", (width, height), (40, 70, 120))
    draw = ImageDraw.Draw(image)
    draw.rectangle((width // 10, height // 10, width * 9 // 10, height * 9 // 10), fill=(235, 235, 238))
    draw.ellipse((width // 5, height // 4, width * 2 // 5, height * 3 // 5), fill=(215, 40, 40))
    draw.rectangle((width // 2, height // 2, width * 4 // 5, height * 3 // 4), fill=(40, 90, 215))
    return image


def run_check(
    model: HookedVLM,
    image: Image.Image | None = None,
    names: Sequence[str] = tuple(RELATIONS),
) -> list[Row]:
    """Measure relations on a loaded model.

    Args:
        model: The model.
        image: The picture of the prompt; a drawn one where None.
        names: Which relations.
    """
    allowed = TOLERANCES.get(model.info.dtype)
    if allowed is None:
        raise NotSupportedError(
            f"there are no tolerances for {model.info.dtype} activations; possible are {', '.join(TOLERANCES)}.",
            field="dtype",
        )
    image = image or drawn()
    measured = Measured(model, _inputs(model, image))
    rows = []
    for name in names:
        try:
            figure = _batch(measured, image) if name == "batch" else getattr(measured, name)()
            rows.append(Row(name, float(figure), allowed[name]))
        except NotSupportedError as error:
            rows.append(Row(name, None, allowed[name], error.message))
    return rows


def _inputs(model: HookedVLM, image: Image.Image) -> HookedInputs:
    """A picture and a task; the task alone where the model's processor takes no picture."""
    try:
        return model.prepared(model.prepare_messages(TASK, image))
    except SpectraError:
        return model.prepared(model.prepare_messages(TASK))


def _batch(measured: Measured, image: Image.Image) -> float:
    model, tasks = measured.model, [TASK, SECOND]
    images = [image if measured.inputs.images else None, None]
    try:
        together = model.prepared(model.prepare_messages_batch(tasks, images))
    except InvalidInputError as error:
        raise NotSupportedError(f"the model's processor makes no such batch: {error.message}") from error
    alone = [model.prepared(model.prepare_messages(*each)) for each in zip(tasks, images, strict=True)]
    return batch(model, together, alone, "last", relative)


def refuse_if_broken(model: HookedVLM) -> float:
    """The short form, for a model that is about to serve; the seconds it took.

    Raises:
        NotSupportedError: A row fails; the message says which, by how much.
    """
    begun = time.perf_counter()
    image = drawn(112, 112) if model.reading.image_token_id >= 0 else None
    failed = [row for row in run_check(model, image, SHORT) if not row.ok]
    if failed:
        row = failed[0]
        raise NotSupportedError(
            f"the model {model.info.name!r} fails its check, so its hooks would tell lies: {row.name} "
            f"({RELATIONS[row.name]}) is off by {row.figure:.3g}, allowed is {row.allowed:.3g}. `vlm-spectra check` "
            "shows all rows."
        )
    return time.perf_counter() - begun


def command(options: Any) -> int:
    """`vlm-spectra check`: measure, print, and tell by the exit status whether all rows hold."""
    image = None if options.image is None else Picture.of(options.image).pixels
    begun = time.perf_counter()
    model = HookedVLM.from_pretrained(
        options.model,
        dtype=options.dtype or None,
        device=options.device_map or options.device or None,
        attn_implementation=options.attn_implementation or None,
        revision=options.revision or None,
    )
    loaded = time.perf_counter()
    rows = run_check(model, image)
    info = model.info
    seconds = time.perf_counter() - loaded
    if options.json:
        found = {"model": info.name, "family": info.family, "revision": info.revision, "dtype": info.dtype}
        found |= {"attention": info.attention, "device": info.device, "seconds": round(seconds, 3)}
        listed = [{**asdict(row), "ok": row.ok, "relation": RELATIONS[row.name]} for row in rows]
        print(json.dumps({**found, "ok": all(row.ok for row in rows), "rows": listed}, indent=2))
    else:
        print(f"{info.name}: {info.family}, {info.dtype}, {info.attention} attention, on {info.device}")
        print(f"loaded in {loaded - begun:.1f} s, measured in {seconds:.1f} s\n")
        print(table(rows))
    return 0 if all(row.ok for row in rows) else 1


def table(rows: Sequence[Row]) -> str:
    """The rows as lines of text."""
    lines = [f"{'row':<12}{'figure':>10}{'allowed':>10}  {'':<6}what must hold"]
    for row in rows:
        figure = "-" if row.figure is None else f"{row.figure:.2e}"
        verdict = "n/a" if row.figure is None else "ok" if row.ok else "FAILS"
        said = row.note if row.figure is None else RELATIONS[row.name]
        lines.append(f"{row.name:<12}{figure:>10}{row.allowed:>10.0e}  {verdict:<6}{said}")
    failed = [row.name for row in rows if not row.ok]
    lines.append("")
    lines.append(f"{', '.join(failed)}: not as it must be" if failed else "all rows hold")
    return "\n".join(lines)
