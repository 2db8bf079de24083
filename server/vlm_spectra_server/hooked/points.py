"""The hook points on a model's modules.

Each module's `forward` is wrapped once, for good. The wrapper asks for the current run: where there is none it calls
the module's own forward and nothing else, which costs a fraction of a microsecond.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .attention import watch
from .reading import Block, Reading
from .run import Capture, Run, current_run, select

Around = Callable[..., Any]
"""around(run, inner, *args, **kwargs): calls inner and looks at what goes in and out."""


def install(reading: Reading) -> None:
    """Put the hook points on a model that has none yet."""
    if getattr(reading.model, "_spectra_installed", False):
        return
    reading.model._spectra_installed = True
    _wrap(reading.model, _around_model)
    _wrap(reading.decoder, _around_decoder)
    for block in reading.blocks:
        _install_block(reading, block)
    _wrap(reading.final_norm, _around_final_norm(reading))


def _wrap(module: nn.Module, around: Around) -> None:
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        run = current_run()
        return inner(*args, **kwargs) if run is None else around(run, inner, *args, **kwargs)

    module.forward = forward


def _install_block(reading: Reading, block: Block) -> None:
    prefix = f"lm.blocks.{block.index}"
    heads, kv_heads, width = reading.heads, reading.kv_heads, reading.head_dim
    _wrap(block.layer, _around_block(block.index))
    _wrap(block.ln1, _around_norm(reading, block.ln1, f"{prefix}.ln1.hook_scale", f"{prefix}.attn.hook_in"))
    watch(reading.config, block.attn, f"{prefix}.attn")
    _wrap(block.q, _around_output(f"{prefix}.attn.hook_q", heads, width))
    _wrap(block.k, _around_output(f"{prefix}.attn.hook_k", kv_heads, width))
    _wrap(block.v, _around_output(f"{prefix}.attn.hook_v", kv_heads, width))
    _wrap(block.o, _around_output_projection(reading, block))
    mid = f"{prefix}.hook_resid_mid"
    _wrap(block.ln2, _around_norm(reading, block.ln2, f"{prefix}.ln2.hook_scale", f"{prefix}.mlp.hook_in", mid))
    _wrap(block.gate, _around_output(f"{prefix}.mlp.hook_pre"))
    _wrap(block.up, _around_output(f"{prefix}.mlp.hook_pre_linear"))
    _wrap(block.down, _around_down(prefix))


def _around_model(run: Run, inner: Around, *args: Any, **kwargs: Any) -> Any:
    output = inner(*args, **kwargs)
    if output.logits is not None:
        run.last_logits = output.logits[:, -1]
    return output


def _around_decoder(run: Run, inner: Around, *args: Any, **kwargs: Any) -> Any:
    past = kwargs.get("past_key_values")
    run.start = int(past.get_seq_length()) if past is not None else 0
    run.layers_run = 0
    kwargs["inputs_embeds"] = run.reach("lm.hook_embed", kwargs["inputs_embeds"])
    run.decoder_inputs = kwargs
    return inner(*args, **kwargs)


def _around_block(index: int) -> Around:
    pre, post = f"lm.blocks.{index}.hook_resid_pre", f"lm.blocks.{index}.hook_resid_post"

    def around(run: Run, inner: Around, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        run.check()
        output = inner(run.reach(pre, hidden_states), *args, **kwargs)
        run.layers_run = index + 1
        first = output[0] if isinstance(output, tuple) else output
        changed = run.reach(post, first)
        run.on_layer(index + 1)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return around


def _around_norm(
    reading: Reading, norm: nn.Module, scale_name: str, out_name: str, stream_name: str | None = None
) -> Around:
    def around(run: Run, inner: Around, x: torch.Tensor) -> torch.Tensor:
        if stream_name is not None:
            x = _in_place(run, stream_name, x)
        y = inner(x)
        if run.wants(scale_name):
            y = _rescaled(run, reading, norm, scale_name, x, y)
        return run.reach(out_name, y)

    return around


def _in_place(run: Run, name: str, x: torch.Tensor) -> torch.Tensor:
    """Reach the stream before the norm. The block adds to this very tensor later, so a change goes into its memory."""
    if name in run.edits:
        x.copy_(run.edited(name, x.clone()))
    run.keep(name, lambda capture: select(x, capture, 1, None))
    return x


def _rescaled(run: Run, reading: Reading, norm: nn.Module, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    scale = reading.scale(norm, x)
    changed = run.reach(name, scale)
    return y if changed is scale else (y.float() * (scale / changed)).to(y.dtype)


def _around_output(name: str, heads: int | None = None, width: int | None = None) -> Around:
    """A linear layer whose output is a hook; with heads, seen as [batch, seq, heads, head_dim]."""

    def around(run: Run, inner: Around, x: torch.Tensor) -> torch.Tensor:
        y = inner(x)
        if heads is None or not run.wants(name):
            return run.reach(name, y)
        return run.reach(name, y.view(*y.shape[:-1], heads, width), 2).reshape(y.shape)

    return around


def _around_output_projection(reading: Reading, block: Block) -> Around:
    prefix = f"lm.blocks.{block.index}"
    z_name, share_name = f"{prefix}.attn.hook_z", f"{prefix}.attn.hook_head_out"

    def around(run: Run, inner: Around, x: torch.Tensor) -> torch.Tensor:
        if run.wants(z_name):
            z = x.view(*x.shape[:-1], reading.heads, reading.head_dim)
            x = run.reach(z_name, z, 2).reshape(x.shape)
        y = inner(x)
        if run.wants(share_name):
            y = _head_shares(run, reading, block, share_name, x, y)
        return run.reach(f"{prefix}.hook_attn_out", run.reach(f"{prefix}.attn.hook_out", y))

    return around


def _head_shares(run: Run, reading: Reading, block: Block, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Each head's share of the output: only what is selected is ever computed, [batch, seq, heads, hidden] is large."""
    weights = reading.head_weights(block)
    z = x.view(*x.shape[:-1], reading.heads, reading.head_dim)

    def shares(capture: Capture) -> torch.Tensor:
        chosen = weights
        if capture.heads is not None:
            chosen = weights.index_select(1, torch.tensor(capture.heads, device=weights.device))
        return torch.einsum("bshk,dhk->bshd", select(z, capture, 1, 2), chosen)

    if name not in run.edits:
        run.keep(name, shares)
        return y
    before = shares(Capture())
    after = run.reach(name, before, 2)
    return y + (after - before).sum(2)


def _around_down(prefix: str) -> Around:
    def around(run: Run, inner: Around, x: torch.Tensor) -> torch.Tensor:
        y = inner(run.reach(f"{prefix}.mlp.hook_post", x))
        return run.reach(f"{prefix}.hook_mlp_out", run.reach(f"{prefix}.mlp.hook_out", y))

    return around


def _around_final_norm(reading: Reading) -> Around:
    scale_name, normalized_name, out_name = (
        f"lm.ln_final.{hook}" for hook in ("hook_scale", "hook_normalized", "hook_out")
    )

    def around(run: Run, inner: Around, x: torch.Tensor) -> torch.Tensor:
        y = inner(x)
        if run.wants(scale_name):
            y = _rescaled(run, reading, reading.final_norm, scale_name, x, y)
        if run.wants(normalized_name):
            weight = reading.family.norm_weight(reading.final_norm)
            normalized = (x.float() / reading.scale(reading.final_norm, x)).to(x.dtype)
            changed = run.reach(normalized_name, normalized)
            if changed is not normalized:
                y = weight * changed
        return run.reach(out_name, y)

    return around
