"""The relations of `vlm_spectra_server.relations` for models without a processor, at every position and absolute."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
import vlm_spectra as vs
from vlm_spectra.errors import NotSupportedError
from vlm_spectra_server import relations
from vlm_spectra_server.hooked.attention import attend
from vlm_spectra_server.hooked.inputs import HookedInputs
from vlm_spectra_server.relations import Measured, absolute

TOLERANCES = {
    name: 4e-6 if name == "scores" else relations.TOLERANCES["float32"][name]
    for name in ("logits", "pattern", "scores", "rows", "stream", "heads", "lens", "direct")
}
"""What each figure of `measure` may be at most."""

WORDLESS = SimpleNamespace(tokenizer=SimpleNamespace(decode=str))
"""A processor for models that have none: tokens are called by their numbers."""

ENTERED: dict[str, torch.Tensor] = {}
"""What entered the softmax of transformers' eager attention in the newest pass, by the name of our pattern."""


def _recording(module: Any, *arguments: Any, **options: Any) -> Any:
    softmax, entered = torch.nn.functional.softmax, []

    def spy(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        entered.append(x)
        return softmax(x, *args, **kwargs)

    torch.nn.functional.softmax = spy  # type: ignore[assignment]
    try:
        output = attend("eager", module, *arguments, **options)
    finally:
        torch.nn.functional.softmax = softmax
    if hasattr(module, "_spectra_site"):
        ENTERED[module._spectra_site.scores] = entered[0]
    return output


relations.register_eager("recording", _recording)


def measure(model: Any, inputs: HookedInputs) -> dict[str, float]:
    """The worst error of each relation that applies.

    Args:
        model: A transformers model without hook points; it stays as it is.
        inputs: A prompt, padded on the left where it is a batch.
    """
    with torch.no_grad():
        expected = model(**inputs.tensors, use_cache=False).logits
    hooked = vs.HookedVLM(copy.deepcopy(model), processor=WORDLESS)
    measured = Measured(hooked, inputs, positions=None, alone=expected, error=absolute)
    assert measured.finite() == 0
    found = {}
    for name in TOLERANCES:
        try:
            found[name] = scores(measured) if name == "scores" else getattr(measured, name)()
        except NotSupportedError:
            continue
    return found


def scores(measured: Measured) -> float:
    """Scores and what enters the softmax of transformers' eager attention, by the larger of it and 1."""
    wanted, worst = [f"{prefix}.attn.hook_scores" for prefix in measured.attending], 0.0
    with relations.eager(measured.model, "recording"), measured.model.run_with_cache(wanted) as cache:
        measured.model.forward(measured.inputs, logits_to_keep=1)
    for name in wanted:
        ours = measured.at_real(cache[name], 2)
        theirs = measured.at_real(ENTERED[name].expand(cache[name].shape), 2)
        masked = theirs <= torch.finfo(theirs.dtype).min / 2
        assert torch.equal(ours == -torch.inf, masked), "other positions are masked than in transformers"
        error = (ours - theirs)[~masked].abs() / theirs[~masked].abs().clamp_min(1)
        worst = max(worst, float(error.max()))
    ENTERED.clear()
    return worst
