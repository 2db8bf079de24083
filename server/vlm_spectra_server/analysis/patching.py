"""Attribution patching: what replacing activations by those of a second run would take from the target, to first order
(Nanda 2023; Syed et al. 2023).

An activation's score is its difference between the two runs times the target's gradient with respect to it in the
first: one backward pass in the place of one run an activation. It is exact where the model is linear between the two.
"""

from __future__ import annotations

import torch
from vlm_spectra.errors import InvalidInputError

from ..hooked.run import Capture
from .subject import EMBED, Subject
from .targets import Resolved


def hooks(subject: Subject) -> dict[str, list[str]]:
    """The hooks that are compared, by the name of the tensor of scores."""
    blocks = [f"lm.blocks.{block.index}" for block in subject.reading.blocks]
    found = {
        "scores": [EMBED],
        "layers": [f"{block}.hook_resid_post" for block in blocks],
        "heads": [f"{block}.attn.hook_z" for block in blocks],
        "mlps": [f"{block}.hook_mlp_out" for block in blocks],
    }
    known = subject.catalogue.by_name
    return {name: each for name, each in found.items() if all(hook in known for hook in each)}


def attribute(subject: Subject, target: Resolved, against: Subject) -> dict[str, torch.Tensor]:
    """The scores of the embeddings, of the residual stream after every layer, of every head and every MLP.

    Args:
        subject: The batch.
        target: The target.
        against: The second batch, with as many positions in every row.

    Raises:
        InvalidInputError: The two do not lie position by position.
    """
    check_aligned(subject, against)
    groups = hooks(subject)
    every = [hook for each in groups.values() for hook in each]
    others, _ = against.capture(dict.fromkeys(every), against.columns)
    start = target.value(others.pop("logits"))
    scores: dict[str, torch.Tensor] = {}
    done = 0

    def take(name: str, part: torch.Tensor) -> None:
        nonlocal done
        if not name.endswith("_grad"):
            others[name] = part.float() - others[name].float()
            return
        hook = name.removesuffix("_grad")
        product = others.pop(hook) * part.float()
        if hook.endswith("hook_z"):
            scores[hook] = product.sum((1, 3))
        elif hook.endswith("hook_mlp_out"):
            scores[hook] = product.sum((1, 2))
        else:
            scores[hook] = product.sum(-1)[:, : subject.layout.length]
        done += 1
        subject.step(done, len(every))

    run = subject.run(
        captures={hook: [Capture(hook)] for hook in every},
        gradients={hook: [Capture(f"{hook}_grad")] for hook in every},
        sink=take,
    )
    value = subject.backward(run, target)
    tensors = {name: torch.stack([scores[hook] for hook in each], 1) for name, each in groups.items()}
    tensors["scores"] = tensors["scores"][:, 0]
    total = start + tensors["scores"].sum(1)
    return tensors | {"total": total, "target_value": value, "baseline_value": start}


def check_aligned(one: Subject, other: Subject) -> None:
    """Refuse two batches that do not lie position by position.

    Raises:
        InvalidInputError: They differ in rows, in length or in padding.
    """
    a, b = one.layout.tokens, other.layout.tokens
    if a.shape == b.shape and bool((a == b).all()):
        return
    shown = [" and ".join(str(int(row.sum())) for row in tokens) for tokens in (a, b)]
    raise InvalidInputError(
        f"the two prompts must have the same number of tokens in every row, for each position is replaced by the same "
        f"position of the other; they have {shown[0]} and {shown[1]} tokens. Use images of one size, and words "
        "of as many tokens.",
        field="corrupted",
    )
