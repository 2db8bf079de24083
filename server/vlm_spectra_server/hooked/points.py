"""The hook points on a model's modules.

Each module's `forward` is wrapped once, for good. The wrapper asks for the current run: where there is none it calls
the module's own forward and nothing else, which costs a fraction of a microsecond.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from vlm_spectra.errors import NotSupportedError

from .attention import watch
from .reading import Block, Reading
from .run import Capture, Run, current_run, select
from .vision import install as install_tower
from .vision import reach_features

Around = Callable[..., Any]
"""around(run, inner, *args, **kwargs): calls inner and looks at what goes in and out."""

Multiplier: TypeAlias = float | torch.Tensor | None
"""What a block multiplies an output by before it adds it to the stream; None where the difference is taken instead."""


def install(reading: Reading) -> None:
    """Put the hook points on a model that has none yet."""
    if getattr(reading.model, "_spectra_installed", False):
        return
    reading.model._spectra_installed = True
    _wrap(reading.model, _around_model)
    _wrap(reading.decoder, _around_decoder)
    install_tower(reading.vision)
    for block in reading.blocks:
        _install_block(reading, block)
    _wrap(reading.final_norm, _around_final_norm(reading))


def _wrap(module: nn.Module | None, around: Around) -> None:
    if module is None:
        return
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        run = current_run()
        return inner(*args, **kwargs) if run is None else around(run, inner, *args, **kwargs)

    module.forward = forward


def _install_block(reading: Reading, block: Block) -> None:
    prefix = f"lm.blocks.{block.index}"
    attn, mlp = f"{prefix}.attn", f"{prefix}.mlp"
    _wrap(block.layer, _around_block(block, prefix, block.index - 1 in reading.deepstack))
    added = (f"{prefix}.hook_attn_out", block.attn_multiplier)
    mid = None if block.parallel else f"{prefix}.hook_resid_mid"
    _wrap(block.ln1, _around_norm(reading, block.ln1, f"{prefix}.ln1.hook_scale"))
    _wrap(block.attn, _around_part(attn, None if block.ln1_post else added))
    _wrap(block.ln1_post, _around_norm(reading, block.ln1_post, f"{prefix}.ln1_post.hook_scale", added=added))
    if block.attends:
        watch(reading, block, attn)
        _wrap(block.q, _around_output(f"{attn}.hook_q", block.heads, block.head_dim))
        _wrap(block.k, _around_output(f"{attn}.hook_k", block.kv_heads, block.head_dim))
        _wrap(block.v, _around_output(f"{attn}.hook_v", block.kv_heads, block.value_dim))
        _wrap(block.o, _around_output_projection(reading, block, attn))
    added = (f"{prefix}.hook_mlp_out", block.mlp_multiplier)
    _wrap(block.ln2, _around_norm(reading, block.ln2, f"{prefix}.ln2.hook_scale", stream_name=mid))
    _wrap(block.entry, _around_entry(f"{mlp}.hook_in", mid if block.ln2 is None else None))
    _wrap(block.router, _around_router(f"{mlp}.hook_router_logits", block.experts))
    _wrap(block.gate, _around_output(f"{mlp}.hook_pre"))
    _wrap(block.up, _around_output(f"{mlp}.hook_pre_linear"))
    _wrap(block.gate_up, _around_outputs([f"{mlp}.hook_pre", f"{mlp}.hook_pre_linear"]))
    _wrap(block.down, _around_input(f"{mlp}.hook_post"))
    _wrap(block.mlp, _around_part(mlp, None if block.ln2_post else added, enters=False))
    _wrap(block.ln2_post, _around_norm(reading, block.ln2_post, f"{prefix}.ln2_post.hook_scale", added=added))
    _wrap(block.extra, _around_output(f"{prefix}.hook_extra_out"))


def _around_model(run: Run, inner: Around, *args: Any, **kwargs: Any) -> Any:
    output = inner(*args, **kwargs)
    if output.logits is not None:
        run.last_logits = output.logits[:, -1]
    if run.awaited:
        raise NotSupportedError(
            f"the forward pass never came to {sorted(run.awaited)[0]!r}: what reads images does not run without one."
        )
    return output


def _around_decoder(run: Run, inner: Around, *args: Any, **kwargs: Any) -> Any:
    # Known by what it does: it was `past_key_values`, is `cache` since transformers 5.24, and a missed name is silent.
    past = next((value for value in kwargs.values() if hasattr(value, "get_seq_length")), None)
    run.start = int(past.get_seq_length()) if past is not None else 0
    run.layers_run = 0
    if kwargs.get("inputs_embeds") is not None:
        kwargs["inputs_embeds"] = reach_features(run, kwargs["inputs_embeds"])
    run.decoder_inputs = kwargs
    return inner(*args, **kwargs)


def _around_block(block: Block, prefix: str, deepstack: bool) -> Around:
    pre, post, index = f"{prefix}.hook_resid_pre", f"{prefix}.hook_resid_post", block.index
    between, written = f"lm.blocks.{index - 1}.hook_deepstack", f"{prefix}.hook_mlp_out"

    def around(run: Run, inner: Around, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        run.check()
        if run.resume is not None and index <= run.resume[0]:
            if index < run.resume[0]:
                return hidden_states
            hidden_states = run.resume[1]
        elif index == 0:
            hidden_states = run.reach("lm.hook_embed", hidden_states)
        if deepstack and run.stream is not None and run.wants(between):
            left = run.stream.to(hidden_states.device)
            added = hidden_states - left
            changed = run.reach(between, added)
            if changed is not added:
                hidden_states = left + changed
        _pass_over(run, index, hidden_states)
        run.stream = hidden_states
        output = inner(run.reach(pre, hidden_states), *args, **kwargs)
        run.layers_run = index + 1
        first = output[0] if isinstance(output, tuple) else output
        if block.mlp_multiplier is None and run.wants(written):  # the stream is that between attention and MLP
            added = first - run.stream
            changed = run.reach(written, added)
            first = first if changed is added else run.stream + changed
        run.stream = run.reach(post, first)
        run.on_layer(index + 1)
        return (run.stream, *output[1:]) if isinstance(output, tuple) else run.stream

    return around


def _pass_over(run: Run, index: int, stream: torch.Tensor) -> None:
    """The stream of layers that the model left out, before layer `index`: nothing was added."""
    for skipped in range(run.layers_run, index):
        prefix = f"lm.blocks.{skipped}"
        for name in ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"):
            part = torch.zeros_like(stream) if name.endswith("out") else stream
            run.keep(f"{prefix}.{name}", lambda capture, part=part: select(part, capture, 1, None))


def _around_norm(
    reading: Reading,
    norm: nn.Module | None,
    scale_name: str,
    stream_name: str | None = None,
    added: tuple[str, Multiplier] | None = None,
) -> Around:
    """A norm: its scale; before an MLP also the stream that enters it, after a part also what the block then adds."""

    def around(run: Run, inner: Around, x: torch.Tensor) -> torch.Tensor:
        if stream_name is not None:
            x = run.stream = _in_place(run, stream_name, x)
        y = inner(x)
        if norm is not None and run.wants(scale_name):
            y = _rescaled(run, reading, norm, scale_name, x, y)[0]
        return y if added is None else _reach_scaled(run, *added, y)

    return around


def _in_place(run: Run, name: str, x: torch.Tensor) -> torch.Tensor:
    """Reach the stream before the norm. The block adds to this very tensor later, so a change goes into its memory."""
    if name in run.edits:
        x.copy_(run.edited(name, x.clone()))
    run.keep(name, lambda capture: select(x, capture, 1, None))
    run.watch(name, x, lambda gradient, capture: select(gradient, capture, 1, None))
    return x


def _rescaled(
    run: Run, reading: Reading, norm: nn.Module, name: str, x: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A norm's output after its scale was reached, and that scale."""
    scale = reading.scale(norm, x)
    changed = run.reach(name, scale)
    if changed is scale:
        return y, scale
    bias = reading.norm_bias(norm).float()
    return (bias + (y.float() - bias) * (scale / changed)).to(y.dtype), changed


def _reach_scaled(run: Run, name: str, multiplier: Multiplier, y: torch.Tensor) -> torch.Tensor:
    """Reach what a block adds to the stream: its part's output times a multiplier."""
    if isinstance(multiplier, float) and multiplier == 1.0:
        return run.reach(name, y)
    if multiplier is None or not run.wants(name):
        return y
    added = y * multiplier
    changed = run.reach(name, added)
    return y if changed is added else changed / multiplier


def _seen(run: Run, name: str, y: torch.Tensor, like: Sequence[int]) -> torch.Tensor:
    """Reach an output as [batch, seq, width], whatever shape the module gives it."""
    if y.shape[:-1] == torch.Size(like) or not run.wants(name):
        return run.reach(name, y)
    return run.reach(name, y.view(*like, y.shape[-1])).view(y.shape)


def _entering(run: Run, args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> Any:
    """A module's arguments, its activation (the first, or `hidden_states`) changed by the hooks that it enters at."""
    x = args[0] if args else kwargs["hidden_states"]
    for name in names:
        x = run.reach(name, x)
    return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})


def _around_part(prefix: str, added: tuple[str, Multiplier] | None, enters: bool = True) -> Around:
    """Attention or an MLP: what it reads, what it gives, and, without a norm after it, what the block adds."""

    def around(run: Run, inner: Around, *args: Any, **kwargs: Any) -> Any:
        shape = (args[0] if args else kwargs["hidden_states"]).shape[:-1]
        if enters:
            args, kwargs = _entering(run, args, kwargs, f"{prefix}.hook_in")
        output = inner(*args, **kwargs)
        y = output[0] if isinstance(output, tuple) else output
        y = _seen(run, f"{prefix}.hook_out", y, shape)
        if added is not None and run.wants(added[0]):
            y = _reach_scaled(run, *added, y.view(*shape, -1)).view(y.shape)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    return around


def _around_entry(name: str, stream_name: str | None) -> Around:
    """What the MLP reads; without a norm before it that is the stream itself."""

    def around(run: Run, inner: Around, *args: Any, **kwargs: Any) -> Any:
        if stream_name is not None:
            _in_place(run, stream_name, args[0] if args else kwargs["hidden_states"])
        args, kwargs = _entering(run, args, kwargs, name)
        return inner(*args, **kwargs)

    return around


def _around_router(name: str, experts: int) -> Around:
    """A router's logits: among its outputs, one as wide as there are experts."""

    def around(run: Run, inner: Around, *args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        if not run.wants(name):
            return output
        if name in run.edits and isinstance(output, tuple):
            raise NotSupportedError(f"{name} can be captured but not changed: this router chooses experts by itself.")
        found = output if isinstance(output, tuple) else (output,)
        logits = next(each for each in reversed(found) if each.shape[-1] == experts and each.is_floating_point())
        assert run.stream is not None
        changed = run.reach(name, logits.view(len(run.stream), -1, experts))
        return output if isinstance(output, tuple) else changed.view(output.shape)

    return around


def _around_input(name: str) -> Around:
    """A linear layer whose input is a hook."""

    def around(run: Run, inner: Around, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = inner(run.reach(name, x))
        return y

    return around


def _around_output(name: str, heads: int | None = None, width: int = 0) -> Around:
    """A linear layer whose output is a hook; with heads, seen as [batch, seq, heads, head_dim].

    What stands behind each head's own width, a gate, is no part of the hook.
    """

    def around(run: Run, inner: Around, x: torch.Tensor) -> torch.Tensor:
        y = inner(x)
        if heads is None or not run.wants(name):
            return run.reach(name, y)
        apart = y.view(*y.shape[:-1], heads, -1)
        own, rest = apart[..., :width], apart[..., width:]
        changed = run.reach(name, own, 2)
        if rest.shape[-1]:
            changed = torch.cat([changed, rest], -1)
        return changed.reshape(y.shape)

    return around


def _around_outputs(names: list[str]) -> Around:
    """A linear layer with several hooks side by side in its output."""

    def around(run: Run, inner: Around, x: torch.Tensor) -> torch.Tensor:
        y = inner(x)
        if not run.wants(*names):
            return y
        parts = zip(names, y.chunk(len(names), -1), strict=True)
        return torch.cat([run.reach(name, part) for name, part in parts], -1)

    return around


def _around_output_projection(reading: Reading, block: Block, prefix: str) -> Around:
    z_name, share_name = f"{prefix}.hook_z", f"{prefix}.hook_head_out"

    def around(run: Run, inner: Around, x: torch.Tensor) -> torch.Tensor:
        if run.wants(z_name):
            z = x.view(*x.shape[:-1], block.heads, block.value_dim)
            x = run.reach(z_name, z, 2).reshape(x.shape)
        y = inner(x)
        return _head_shares(run, reading, block, share_name, x, y) if run.wants(share_name) else y

    return around


def _head_shares(run: Run, reading: Reading, block: Block, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Each head's share of the output: only what is selected is ever computed, [batch, seq, heads, hidden] is large."""
    weights = reading.head_weights(block)
    z = x.view(*x.shape[:-1], block.heads, block.value_dim)

    def shares(capture: Capture) -> torch.Tensor:
        chosen = weights
        if capture.heads is not None:
            chosen = weights.index_select(1, torch.tensor(capture.heads, device=weights.device))
        return torch.einsum("bshk,dhk->bshd", select(z, capture, 1, 2), chosen)

    if name not in run.edits:
        run.keep(name, shares)
    else:
        before = shares(Capture())
        after = run.edited(name, before)
        run.keep(name, lambda capture: select(after, capture, 1, 2))
        y = y + (after - before).sum(2)

    def gradients(gradient: torch.Tensor, capture: Capture) -> torch.Tensor:
        every = gradient[:, :, None].expand(-1, -1, block.heads, -1)
        return select(every, capture, 1, 2)

    # The output is the sum of the shares, so each share's gradient is the output's.
    return run.trace(name, y, gradients)


def _around_final_norm(reading: Reading) -> Around:
    norm = reading.final_norm
    scale_name, normalized_name, out_name = (
        f"lm.ln_final.{hook}" for hook in ("hook_scale", "hook_normalized", "hook_out")
    )

    def around(run: Run, inner: Around, x: torch.Tensor) -> torch.Tensor:
        _pass_over(run, len(reading.blocks), x)
        y = inner(x)
        if run.wants(scale_name, normalized_name):
            y, scale = _rescaled(run, reading, norm, scale_name, x, y)
        if run.wants(normalized_name):
            normalized = reading.normalized(norm, x, scale).to(x.dtype)
            changed = run.reach(normalized_name, normalized)
            if changed is not normalized:
                y = reading.norm_weight(norm) * changed + reading.norm_bias(norm)
        return run.reach(out_name, y)

    return around
