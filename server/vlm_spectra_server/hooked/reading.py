"""Where a transformers model has its parts: the decoder's blocks, the norms, the unembedding, the sizes.

The parts are found by their shape, not by a list of models: a block's modules by the few names transformers uses for
each role, widths off the weights, and what a norm computes by trying it once.
"""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from vlm_spectra.errors import NotSupportedError

from ..families import family_of
from ..families.family import ROLES, Family
from .tower import read_tower


@dataclass(frozen=True)
class Block:
    """The parts of one decoder block, by their roles; a role that the block has not is None.

    Attributes:
        index: Its number.
        layer: The block itself.
        kind: What it mixes positions with: "attention", "linear attention", "convolution", "cross-attention", ...
        attn: What mixes positions; its output is `attn.hook_out`.
        mlp: What works on each position; its output is `mlp.hook_out`.
        entry: The module whose input is `mlp.hook_in`: the same, or the first of two bare linear layers.
        ln1: The norm before attention.
        ln2: The norm before the MLP.
        ln1_post: The norm between attention and the residual stream.
        ln2_post: The norm between the MLP and the residual stream.
        q: The projection to queries.
        k: The projection to keys.
        v: The projection to values.
        o: The projection of the heads' outputs.
        gate: The projection before the MLP's activation function.
        up: The projection that the gate multiplies.
        gate_up: Both in one, the gate first.
        down: The MLP's last projection.
        router: Chooses experts.
        attends: Whether it attends through transformers' registry, so that scores and pattern can be seen.
        parallel: Attention and MLP read the same stream and add to it together.
        attn_multiplier: What attention's output is multiplied by before it is added.
        mlp_multiplier: The same of the MLP's; None where more is done to it.
        extra: What adds to the stream after the MLP.
        scalar: What the stream is multiplied by at the block's end.
        heads: Attention heads.
        kv_heads: Key and value heads.
        head_dim: Width of a query or key.
        value_dim: Width of a value.
        neurons: Width of the MLP; 0 where it is a mixture of experts.
        experts: Experts that the router chooses from; 0 without one.
    """

    index: int
    layer: nn.Module
    kind: str
    attn: nn.Module
    mlp: nn.Module
    entry: nn.Module
    ln1: nn.Module | None
    ln2: nn.Module | None
    ln1_post: nn.Module | None
    ln2_post: nn.Module | None
    q: nn.Module | None
    k: nn.Module | None
    v: nn.Module | None
    o: nn.Linear | None
    gate: nn.Module | None
    up: nn.Module | None
    gate_up: nn.Module | None
    down: nn.Module | None
    router: nn.Module | None
    attends: bool
    parallel: bool
    attn_multiplier: float | torch.Tensor
    mlp_multiplier: float | torch.Tensor | None
    extra: nn.Module | None
    scalar: float | torch.Tensor
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    neurons: int
    experts: int

    @property
    def scales_outputs(self) -> bool:
        """Whether a norm or a multiplier stands between attention or MLP and the residual stream."""
        multipliers = (self.attn_multiplier, self.mlp_multiplier)
        plain = all(isinstance(each, float | int) and each == 1.0 for each in multipliers)
        return not plain or self.ln1_post is not None or self.ln2_post is not None


@dataclass(frozen=True)
class NormKind:
    """What a norm computes: (x - mean(x) if centered) / scale * (weight + offset) + bias."""

    centered: bool
    offset: float


class Reading:
    """The parts and sizes of a model.

    Args:
        model: A transformers model for image and text to text.

    Attributes:
        family: What is special about its architecture.
        decoder: The language model without its unembedding.
        blocks: The decoder's blocks.
        final_norm: The norm before the unembedding.
        unembedding: Hidden width to vocabulary.
        config: The language model's configuration.
        heads: Attention heads of most blocks; `kv_heads`, `head_dim`, `mlp` and `experts` likewise.
        logit_scale: What logits are multiplied by after the unembedding.
        softcap: Where logits are capped, cap * tanh(logit / cap); None where they are not.

    Raises:
        NotSupportedError: The model has not the shape this library reads; the message names the missing part.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.family: Family = family_of(self.model.config.model_type)
        self.config = self.model.config.get_text_config()
        self.decoder = self._decoder()
        self.vision = read_tower(self.model)
        self.unembedding: Any = self.model.get_output_embeddings()
        if getattr(self.unembedding, "weight", None) is None:
            raise self._unknown("no output embeddings")
        self.final_norm: Any = _first(self.decoder, ROLES["final_norm"])
        if self.final_norm is None:
            raise self._unknown(f"no final norm in {type(self.decoder).__name__}")
        self.hidden = int(self.unembedding.weight.shape[1])
        self.vocab = int(self.unembedding.weight.shape[0])
        self.blocks = [self._block(index, layer) for index, layer in enumerate(self.decoder.layers)]
        attending = [block for block in self.blocks if block.attends] or self.blocks
        self.heads = _commonest(block.heads for block in attending)
        self.kv_heads = _commonest(block.kv_heads for block in attending)
        self.head_dim = _commonest(block.head_dim for block in attending)
        self.mlp = _commonest(block.neurons for block in self.blocks)
        self.experts = _commonest(block.experts for block in self.blocks)
        context = getattr(self.config, "max_position_embeddings", None) or getattr(self.config, "max_seq_len", None)
        self.context = int(context or 4096)
        names = ("image_token_id", "image_token_index", "media_placeholder_token_id", "image_patch_id")
        found = (getattr(self.model.config, name, None) for name in names)
        self.image_token_id = int(next((each for each in found if each is not None), -1))
        self.logit_scale, self.softcap = self.family.logit_shape(self.config, _names(type(self.model).forward))
        self._kinds: dict[int, NormKind] = {}

    def _unknown(self, what: str) -> NotSupportedError:
        return NotSupportedError(f"the {self.family.name} model has not the shape this library reads: {what}.")

    def _decoder(self) -> Any:
        """The module with the blocks; some models give it with an unembedding around."""
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise self._unknown("it is an encoder and a decoder, not one stream of text and image tokens")
        decoder = self.model.get_decoder()
        while not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
            inner = _first(decoder, ROLES["decoder"])
            if inner is None or inner is decoder:
                raise self._unknown(f"no list of decoder blocks in {type(decoder).__name__}")
            decoder = inner
        return decoder

    def _block(self, index: int, layer: nn.Module) -> Block:
        names = {**ROLES, **self.family.parts_of(index)}
        parts = {role: _first(layer, paths) for role, paths in names.items() if "." not in role}
        attn, mlp, bare = parts["attn"], parts["mlp"], parts["entry"] is not None
        if attn is None or mlp is None:
            raise self._unknown(
                f"block {index}, a {type(layer).__name__}, has {', '.join(each for each, _ in layer.named_children())}"
            )
        if parts["ln1_post"] is getattr(layer, "post_attention_layernorm", None) and parts["ln1"] is not None:
            if parts["ln2"] is None:  # what is called so stands before the MLP, unless another norm does
                parts["ln2"], parts["ln1_post"] = parts["ln1_post"], None
        elif parts["ln2"] is None:
            parts["ln2"] = _first(layer, ("post_attention_layernorm",)) if parts["ln1"] is not None else None
        inside = {role: _first(attn, names[f"attn.{role}"]) for role in ("q", "k", "v", "o", "own_v")}
        if inside["own_v"] is not None:  # values go through more than a projection
            inside["v"] = None
        attends = inside["o"] is not None and "ALL_ATTENTION_FUNCTIONS" in _names(type(attn).forward)
        kind = self._kind(index, layer, attn, attends)
        attends = attends and kind == "attention"
        if not attends:
            inside = dict.fromkeys(inside)
        within = layer if bare else mlp
        roles = {role: _first(within, names[f"mlp.{role}"]) for role in ("gate", "up", "gate_up", "down", "router")}
        if _first(within, ("experts",)) is not None or not isinstance(roles["down"], nn.Module):
            roles = {role: roles[role] if role == "router" else None for role in roles}
        else:
            roles["router"] = None
            if roles["gate"] is None and roles["gate_up"] is None:  # one projection, then an activation function
                roles["gate"], roles["up"] = roles["up"], None
        o, down, router = inside["o"], roles["down"], roles["router"]
        heads, kv_heads, head_dim, value_dim = self._head_sizes(attn, o, inside["k"])
        return Block(
            index=index,
            layer=layer,
            kind=kind,
            attn=attn,
            mlp=mlp,
            entry=parts["entry"] if parts["entry"] is not None else mlp,
            ln1=parts["ln1"],
            ln2=parts["ln2"],
            ln1_post=parts["ln1_post"],
            ln2_post=parts["ln2_post"],
            q=inside["q"],
            k=inside["k"],
            v=inside["v"],
            o=o,
            gate=roles["gate"],
            up=roles["up"],
            gate_up=roles["gate_up"],
            down=down,
            router=router,
            attends=attends,
            parallel=parts["ln2"] is None and parts["ln1"] is not None,
            attn_multiplier=self.family.attn_multiplier(layer),
            mlp_multiplier=self.family.mlp_multiplier(layer),
            extra=parts["extra"],
            scalar=getattr(layer, "layer_scalar", 1.0),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            neurons=0 if down is None else int(down.in_features),
            experts=0 if router is None else _experts(router, self.config),
        )

    def _kind(self, index: int, layer: nn.Module, attn: nn.Module, attends: bool) -> str:
        if getattr(layer, "cross_attn", None) is attn:
            return "cross-attention"
        if attends:
            return "attention"
        kinds = getattr(self.config, "layer_types", None) or getattr(self.config, "layers_block_type", None)
        named = str(kinds[index]) if kinds else type(attn).__name__
        return {"conv": "convolution"}.get(named, named.replace("_", " "))

    def _head_sizes(self, attn: nn.Module, o: Any, k: Any) -> tuple[int, int, int, int]:
        """Heads, key-value heads, width of a key, width of a value; read off the module, as blocks may differ."""
        given = getattr(attn, "num_heads", None) or getattr(attn, "num_attention_heads", None)
        heads = int(given or self.config.num_attention_heads)
        width = getattr(attn, "qk_head_dim", None) or getattr(attn, "head_dim", None)
        if o is None:
            return heads, heads, int(width or self.hidden // heads), int(width or self.hidden // heads)
        head_dim = int(width or o.in_features // heads)
        value_dim = int(getattr(attn, "v_head_dim", None) or head_dim)
        heads = o.in_features // value_dim
        if k is not None:
            return heads, int(k.out_features) // head_dim, head_dim, value_dim
        latent = getattr(attn, "kv_b_proj", None) is not None  # keys of every head from one latent vector
        given = getattr(attn, "num_key_value_heads", None) or getattr(self.config, "num_key_value_heads", None)
        return heads, heads if latent else int(given or heads), head_dim, value_dim

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        device: torch.device = self.model.device
        return device

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type of the residual stream."""
        weight = getattr(self.final_norm, "weight", None)
        dtype: torch.dtype = self.model.dtype if weight is None else weight.dtype
        return dtype

    def kind_of(self, norm: nn.Module) -> NormKind:
        """What a norm computes, found by trying it once on a vector.

        Raises:
            NotSupportedError: Something else than the norms this library knows.
        """
        kind = self._kinds.get(id(norm))
        if kind is None:
            with torch.no_grad():
                kind = self._kinds[id(norm)] = self._try(norm)
        return kind

    def _try(self, norm: nn.Module) -> NormKind:
        weight: Any = getattr(norm, "weight", None)
        if weight is not None and weight.is_meta:
            return NormKind(isinstance(norm, nn.LayerNorm), 0.0)
        width = self.hidden if weight is None else len(weight)
        x = torch.linspace(0, 9, width, dtype=torch.float64).cos() * 2 + 0.7
        x = x.to(device=self.device if weight is None else weight.device, dtype=self.dtype)[None, None]
        # The class's forward: the module's own may be wrapped by hook points, or by accelerate.
        y = type(norm).forward(norm, x).float()
        errors = {}
        for kind in (NormKind(centered, offset) for centered in (False, True) for offset in (0.0, 1.0)):
            self._kinds[id(norm)] = kind
            expected = self.normalized(norm, x) * self.norm_weight(norm).float() + self.norm_bias(norm).float()
            errors[kind] = float((expected - y).abs().max())
        del self._kinds[id(norm)]
        best = min(errors, key=lambda kind: errors[kind])
        if errors[best] > 0.02 * max(float(y.abs().max()), 1e-3):
            raise self._unknown(f"{type(norm).__name__} is a norm of an unknown kind")
        return best

    def scale(self, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """What a norm divides by, [..., 1] float32: sqrt(mean(x^2) + eps); x less its mean where it centers."""
        named = (getattr(norm, name, None) for name in ("variance_epsilon", "eps", "norm_eps", "epsilon"))
        eps = next((each for each in named if each is not None), 1e-6)
        return (self.centered(norm, x).pow(2).mean(-1, keepdim=True) + eps).sqrt()

    def centered(self, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """What a norm divides: x, less its mean over the width where the norm centers; float32."""
        x = x.float()
        return x - x.mean(-1, keepdim=True) if self.kind_of(norm).centered else x

    def normalized(self, norm: nn.Module, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """A norm's output before its weight and bias, float32; with another scale where one is given."""
        return self.centered(norm, x) / (self.scale(norm, x) if scale is None else scale)

    def norm_weight(self, norm: nn.Module) -> torch.Tensor:
        """What a norm multiplies its normalized input by, [width]; the one that some add is in it."""
        weight: Any = getattr(norm, "weight", None)
        offset = self.kind_of(norm).offset
        if weight is None:
            return torch.ones(1, device=self.device, dtype=self.dtype)
        return weight + offset if offset else weight

    def norm_bias(self, norm: nn.Module) -> torch.Tensor:
        """What a norm adds at last, [width]; zero where it adds nothing."""
        bias: Any = getattr(norm, "bias", None)
        return torch.zeros_like(self.norm_weight(norm)) if bias is None else bias

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """What the model makes of the final norm's output: [..., hidden] to [..., vocab]."""
        return self.finish(self.unembedding(normed))

    def finish(self, raw: torch.Tensor) -> torch.Tensor:
        """The model's logits from the unembedding's output, element by element: scaled, then capped."""
        logits = raw if self.logit_scale == 1.0 else raw * self.logit_scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def folded_unembedding(self, ids: list[int]) -> torch.Tensor:
        """The residual directions of tokens, [n, hidden] float32.

        The dot product with the final residual stream, over the final norm's scale, plus `unembedding_bias` is the
        logit (before its soft cap, where there is one): the norm's weight and centering and the logits' scale are in
        it.
        """
        rows = self.unembedding.weight[ids].float() * self.norm_weight(self.final_norm).float() * self.logit_scale
        return rows - rows.mean(-1, keepdim=True) if self.kind_of(self.final_norm).centered else rows

    def unembedding_bias(self, ids: list[int]) -> torch.Tensor:
        """What tokens' logits have whatever the stream, [n] float32: the biases of unembedding and final norm."""
        rows = self.unembedding.weight[ids].float()
        total = (rows * self.norm_bias(self.final_norm).float()).sum(-1)
        bias = getattr(self.unembedding, "bias", None)
        return (total if bias is None else total + bias[ids].float()) * self.logit_scale

    def before_post_norm(
        self, block: Block, direction: torch.Tensor, scale: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A direction of the residual stream as one of `attn.hook_out`, with the post-norm's scale held.

        Args:
            block: The block.
            direction: [batch, hidden].
            scale: [batch, 1], `ln1_post.hook_scale` there; None where the block has no post-norm.

        Returns:
            A direction [batch, hidden] and a constant [batch], float32: `hook_attn_out @ direction` is
            `attn.hook_out @ result + constant`.
        """
        direction = direction.float() * block.attn_multiplier
        if block.ln1_post is None or scale is None:
            return direction, torch.zeros(len(direction), device=direction.device)
        constant = (direction * self.norm_bias(block.ln1_post).float()).sum(-1)
        direction = direction * self.norm_weight(block.ln1_post).float() / scale
        if self.kind_of(block.ln1_post).centered:
            direction = direction - direction.mean(-1, keepdim=True)
        return direction, constant

    def head_weights(self, block: Block) -> torch.Tensor:
        """The output projection split by heads: [hidden, heads, value_dim].

        Raises:
            NotSupportedError: A block without attention heads, or quantized weights.
        """
        if block.o is None:
            raise NotSupportedError(f"layer {block.index} is a {block.kind} layer and has no attention heads.")
        weight = block.o.weight
        if weight.shape != (self.hidden, block.heads * block.value_dim) or not weight.is_floating_point():
            raise NotSupportedError("heads cannot be told apart in a quantized output projection.")
        return weight.view(self.hidden, block.heads, block.value_dim)

    def down_projection(self, block: Block) -> torch.Tensor:
        """What each neuron writes, [mlp, hidden].

        Raises:
            NotSupportedError: The block is a mixture of experts, or its weights are quantized.
        """
        weight = getattr(block.down, "weight", None)
        if weight is None:
            raise NotSupportedError(f"layer {block.index} is a mixture of experts; its neurons cannot be told apart.")
        if weight.shape != (self.hidden, block.neurons) or not weight.is_floating_point():
            raise NotSupportedError("neurons cannot be told apart in a quantized down projection.")
        return weight.T

    def gain(self, block: Block) -> float | torch.Tensor:
        """What a block's writing is multiplied by until the last block: the scalars from this block on."""
        gain: float | torch.Tensor = 1.0
        for after in self.blocks[block.index :]:
            gain = gain * after.scalar
        return gain

    @property
    def stream_scales(self) -> tuple[float, ...]:
        """What the stream is multiplied by at the end of each block; empty where nothing is."""
        scales = tuple(float(block.scalar) for block in self.blocks)
        return scales if any(scale != 1.0 for scale in scales) else ()

    @property
    def deepstack(self) -> tuple[int, ...]:
        """The layers after which image features are added to the stream."""
        layers: tuple[int, ...] = self.family.deepstack(self.model.config)
        return layers


def _first(module: Any, paths: Any) -> Any:
    """The first of several paths that a module has, or None."""
    for path in (paths,) if isinstance(paths, str) else paths:
        found = module
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.Module) and not isinstance(found, nn.Identity):
            return found
    return None


def _names(function: Any) -> frozenset[str]:
    """Every name that a function's code uses, also one that it spells out for `getattr`; wrappers looked through."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return frozenset()
    return frozenset(code.co_names) | frozenset(each for each in code.co_consts if isinstance(each, str))


def _commonest(numbers: Any) -> int:
    """The number most blocks have, blocks without any left out; 0 where none has."""
    counts = Counter(number for number in numbers if number)
    return counts.most_common(1)[0][0] if counts else 0


def _experts(router: Any, config: Any) -> int:
    for owner in (router, router.weight if getattr(router, "weight", None) is not None else None, config):
        for name in ("out_features", "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"):
            if owner is not None and isinstance(getattr(owner, name, None), int):
                return int(getattr(owner, name))
    return 0
