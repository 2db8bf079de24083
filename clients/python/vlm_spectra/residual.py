"""The residual stream taken apart, from what a cache holds: TransformerLens's methods, by its names and labels.

Where attention and MLP add their outputs as they are, a component is what was added: `hook_attn_out`, `hook_mlp_out`.
Where a norm or a multiplier stands in between, those two are already behind it, and heads and neurons are scaled the
same way, element by element, so that they too add up. The weights of the norms before attention, MLP and unembedding
are applied to nothing here: as in TransformerLens after folding, they belong to what reads the stream (`unembed`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import array_api_compat

from . import arrays, scalars
from .arrays import Array, cut, index_of
from .calls import choose
from .context import CacheContext
from .errors import InvalidInputError, NotSupportedError, ShapeMismatchError, UnknownHookError, shown
from .shorthand import in_block

Stack = Any
"""An array [components, ...], or, where labels were asked for, a pair of it and the list of its labels."""

EMBED = "lm.hook_embed"
FINAL_SCALE = "lm.ln_final.hook_scale"
ADDED = ("extra_out", "deepstack")
"""What some families add to the stream beside attention and MLP: within a layer, and behind one."""


class ResidualStream(Mapping[str, Any]):
    """What the residual stream of a cached run is made of.

    `layer` counts as in TransformerLens: components are those that enter layer `layer`; the number of layers, -1 or
    None mean the stream before the unembedding. `pos_slice` selects from the positions that were captured; an int takes
    their axis away. Shapes: c components, b rows (no axis after `remove_batch_dim`), p positions, d hidden width.
    """

    context: CacheContext

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """The hooks of this cache."""

    def stack_activation(self, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None) -> Array:
        """One activation of all layers below `layer`, [layers, ...].

        Args:
            activation_name: TransformerLens's short name ("resid_post", "z", "pattern", ...), or what stands behind
                `lm.blocks.{layer}.` in a hook's name.
            layer: How many layers; -1 or None for all.
            sublayer_type: "attn", "mlp", "ln1", "ln2" where the short name does not say it.

        Raises:
            UnknownHookError: The cache lacks some of them; the message names them.
        """
        hook = in_block(activation_name, sublayer_type)
        return _stack(self._all([_block(each, hook) for each in range(self._upto(layer))]))

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Any = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Stack:
        """The residual stream at the input of each layer, [c, b, p, d]: "0_pre", "1_pre", ..., "final_post".

        Needs `hook_resid_pre` of those layers, or `hook_resid_post` of the layer before (and `lm.hook_embed` for the
        first); at the end of the model `hook_resid_post` of the last. No weights are needed.

        Args:
            layer: Up to which layer.
            incl_mid: Also between attention and MLP, "0_mid"; needs `hook_resid_mid`.
            apply_ln: Also divide by the norm's scale: at the end of the model each vector by its own, as the final norm
                would; else all by that of `layer`, which needs its `ln1.hook_scale`.
            pos_slice: The positions.
            mlp_input: Up to the MLP of `layer` instead of its attention.
            return_labels: Also return the labels.
        """
        end, count = self._upto(layer, mlp_input), self.context.sizes().layers
        index = self._places(pos_slice)
        parts, labels = [], []
        for each in range(end + 1):
            parts.append(self._entering(each))
            labels.append("final_post" if each == count else f"{each}_pre")
            if (incl_mid and each < end) or (mlp_input and each == end):
                parts += self._all([_block(each, "hook_resid_mid")])
                labels.append(f"{each}_mid")
        stack = _stack([cut(part, index, -2) for part in parts])
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, end, mlp_input, pos_slice, recompute_ln=end == count)
        return (stack, labels) if return_labels else stack

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Stack:
        """What each layer added to the residual stream, [c, b, p, d]: "embed", "0_attn_out", "0_mlp_out", ...

        Needs `lm.hook_embed`, `hook_attn_out` and `hook_mlp_out`; of a family that adds more also that: image features
        between layers, `hook_deepstack`, "0_deepstack"; what a block adds besides, `hook_extra_out`, "0_extra_out".
        With all of them the sum is the stream: where a layer ends by multiplying it, so are the components before. No
        weights are needed.

        Args:
            layer: The layers before this one.
            mlp_input: Also the attention of `layer`: what its MLP reads.
            mode: "attn" or "mlp" for those outputs alone.
            apply_ln: Divide by the scale of the norm that reads the stream there; see `apply_ln_to_stack`.
            pos_slice: The positions.
            incl_embeds: Also the embeddings.
            return_labels: Also return the labels.
        """
        choose("mode", mode, ("all", "mlp", "attn"))
        end = self._upto(layer, mlp_input)
        wanted = [("embed", EMBED, 0)] if incl_embeds else []
        for each in range(end + 1):
            kinds = ["attn_out"] if mode != "mlp" and (each < end or mlp_input) else []
            kinds += ["mlp_out"] if mode != "attn" and each < end else []
            kinds += [kind for kind in ADDED if mode == "all" and each < end and self._has(f"hook_{kind}", each)]
            wanted += [_component(each, kind) for kind in kinds]
        index = self._places(pos_slice)
        labels, parts = [label for label, _, _ in wanted], self._components(wanted, index, end)
        stack = _stack(parts) if parts else self._none(index)
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, end, mlp_input, pos_slice)
        return (stack, labels) if return_labels else stack

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Any = None,
        apply_ln: bool = False,
    ) -> Stack:
        """What each head added to the residual stream, [c, b, p, d]: "L0H0", "L0H1", ...

        Needs `attn.hook_head_out`, heads x d numbers a position and layer: capture few positions. Where a norm or a
        multiplier stands behind attention, also `attn.hook_out` and `hook_attn_out`. No weights are needed: the output
        projection was applied where they are. Layers without attention heads are passed over.

        Args:
            layer: The layers before this one.
            return_labels: Also return the labels.
            incl_remainder: Also "remainder", the rest of the stream that enters `layer`; needs it, as
                `accumulated_resid` does.
            pos_slice: The positions.
            apply_ln: Divide by the scale of the norm that reads the stream there.
        """
        end, index = self._upto(layer), self._places(pos_slice)
        parts, labels = self._heads(end, index, end)
        stack = _joined(parts) if parts else self._none(index)
        if incl_remainder:
            stack = _joined([stack, (cut(self._entering(end), index, -2) - _sum(stack))[None]])
            labels.append("remainder")
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, end, pos_slice=pos_slice)
        return (stack, labels) if return_labels else stack

    def stack_neuron_results(
        self,
        layer: int | None = None,
        pos_slice: Any = None,
        neuron_slice: Any = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Array | None = None,
        mlp_input: bool = False,
        *,
        model: Any = None,
    ) -> Stack:
        """What each neuron added to the residual stream, [c, b, p, d]: "L0N0", "L0N1", ...

        Needs `mlp.hook_post`, and the MLPs' down projections: a model in process has them, one behind a server does not
        send them. Where a norm or a multiplier stands behind the MLP, also `mlp.hook_out` and `hook_mlp_out`.

        Args:
            layer: The layers before this one.
            pos_slice: The positions.
            neuron_slice: The neurons; an int means one.
            return_labels: Also return the labels.
            incl_remainder: Also "remainder", the rest of the stream that enters `layer` (its MLP with `mlp_input`).
            apply_ln: Divide by the scale of the norm that reads the stream there.
            project_output_onto: [d] or [d, n]: give the components' dot products with these directions instead of the
                components, which are then never made.
            mlp_input: Take the norm and the remainder of the MLP of `layer` instead of its attention.
            model: The model, where it is not the one that filled the cache.

        Raises:
            NotSupportedError: The weights are not at hand, or a layer is a mixture of experts.
        """
        end, index = self._upto(layer, mlp_input), self._places(pos_slice)
        onto, flat = _columns(project_output_onto)
        parts, labels = self._neurons(end, index, index_of(neuron_slice, "neuron_slice"), onto, model)
        stack = _joined(parts) if parts else _projected(self._none(index), onto)
        if incl_remainder:
            rest = _projected(cut(self._entering(end, mlp_input), index, -2), onto)
            stack = _joined([stack, (rest - _sum(stack))[None]])
            labels.append("remainder")
        if apply_ln:
            stack = self._scaled(stack, end, mlp_input, pos_slice, onto)
        stack = stack[..., 0] if flat else stack
        return (stack, labels) if return_labels else stack

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Any = None,
        return_labels: bool = False,
        project_output_onto: Array | None = None,
        *,
        model: Any = None,
    ) -> Stack:
        """The residual stream by head and neuron, [c, b, p, d]: heads, neurons (or MLPs), "embed", "bias".

        Needs what `stack_head_results` and `stack_neuron_results` (or, without neurons, `hook_mlp_out`) need,
        `lm.hook_embed`, and the stream at the end: "bias" is what is left of it, the output projections' biases and
        rounding. Layers without attention heads have one component, "0_attn_out", and stand behind the heads; image
        features that a family adds between layers, "0_deepstack", behind the embeddings.

        Args:
            layer: The layers before this one.
            mlp_input: Also the attention of `layer`: what its MLP reads.
            expand_neurons: False for MLPs as wholes, "0_mlp_out": this needs no weights.
            apply_ln: Divide by the scale of the norm that reads the stream there.
            pos_slice: The positions.
            return_labels: Also return the labels.
            project_output_onto: As for `stack_neuron_results`.
            model: The model, where it is not the one that filled the cache.
        """
        end, index = self._upto(layer, mlp_input), self._places(pos_slice)
        attended = end + 1 if mlp_input else end
        onto, flat = _columns(project_output_onto)
        parts, labels = self._heads(attended, index, end, onto)
        headless = [each for each in range(attended) if not self._has("attn.hook_head_out", each)]
        singles = [(each, "attn_out") for each in headless]
        added = [(each, kind) for kind in ADDED for each in range(end) if self._has(f"hook_{kind}", each)]
        if expand_neurons:
            neurons, names = self._neurons(end, index, slice(None), onto, model)
            parts, labels = parts + neurons, labels + names
        else:
            singles += [(each, "mlp_out") for each in range(end)]
        alone = [_component(*each) for each in singles]
        alone += [("embed", EMBED, 0), *(_component(*each) for each in added)]
        parts += [_projected(part, onto)[None] for part in self._components(alone, index, end)]
        labels += [label for label, _, _ in alone]
        whole = _projected(cut(self._entering(end, mlp_input), index, -2), onto)
        left = whole - sum((_sum(part) for part in parts[1:]), _sum(parts[0]))
        stack = _joined([*parts, left[None]])
        if apply_ln:
            stack = self._scaled(stack, end, mlp_input, pos_slice, onto)
        stack = stack[..., 0] if flat else stack
        return (stack, [*labels, "bias"]) if return_labels else stack

    def apply_ln_to_stack(
        self,
        residual_stack: Array,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool | None = None,
        recompute_ln: bool = False,
    ) -> Array:
        """Components as a layer's norm scales them: each over the run's own scale, [c, b, p, d] float32.

        Needs `ln1.hook_scale` of `layer` (`ln2.hook_scale` with `mlp_input`), or at the end of the model
        `lm.ln_final.hook_scale`: 4 bytes a position. The norm's weight is not applied; `unembed` has the final one.

        Args:
            residual_stack: [c, b, p, d].
            layer: The layer whose norm reads the stream; None or -1 for the final norm.
            mlp_input: The norm before the MLP instead of the one before attention.
            pos_slice: The positions that the stack has, of those captured.
            batch_slice: Rows to take of stack and scale.
            has_batch_dim: Whether the stack has a batch axis; None for as the cache has it.
            recompute_ln: At the end of the model, divide every vector by its own scale, as for a logit lens.
        """
        info, end = self.context.sizes(), self._upto(layer, mlp_input)
        batched = self.context.has_batch_dim if has_batch_dim is None else has_batch_dim
        rows, index = index_of(batch_slice, "batch_slice"), self._places(pos_slice)
        stack = arrays.wide(cut(residual_stack, rows, 1) if batched else residual_stack)
        xp = array_api_compat.array_namespace(stack)
        if info.norm_centers:
            stack = stack - xp.mean(stack, axis=-1, keepdims=True)
        if recompute_ln and end == info.layers:
            return stack / xp.sqrt(xp.mean(stack * stack, axis=-1, keepdims=True) + info.norm_eps)
        return stack / self._scale(end, mlp_input, index, rows)

    def logit_attrs(
        self,
        residual_stack: Array,
        tokens: Any,
        incorrect_tokens: Any = None,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool | None = None,
        *,
        model: Any = None,
    ) -> Array:
        """What each component adds to a token's logit, [c, b, p] float32.

        The final norm's scale is held at this run's value; a bias of the unembedding is no component's, and a soft cap
        comes after the sum. Needs `lm.ln_final.hook_scale`, and from the model the directions of the tokens: behind a
        server 4 x d bytes for each different token (`unembed`).

        Args:
            residual_stack: [c, b, p, d], from one of the other methods.
            tokens: A token by text or id; [b] of them, one a row; [p], one a position (where b is not as many); or
                [b, p].
            incorrect_tokens: Tokens, as many, whose logits are subtracted.
            pos_slice: The positions that the stack has, of those captured.
            batch_slice: Rows to take of stack and scale; the tokens are those of the rows taken.
            has_batch_dim: Whether the stack has a batch axis; None for as the cache has it.
            model: The model, where it is not the one that filled the cache.
        """
        batched = self.context.has_batch_dim if has_batch_dim is None else has_batch_dim
        rows, index = index_of(batch_slice, "batch_slice"), self._places(pos_slice)
        stack = cut(residual_stack, rows, 1) if batched else residual_stack
        directions = self._directions(tokens, stack, model)
        if incorrect_tokens is not None:
            wrong = self._directions(incorrect_tokens, stack, model)
            if wrong.shape != directions.shape:
                raise ShapeMismatchError(
                    f"tokens are {list(directions.shape[:-1])} and incorrect_tokens {list(wrong.shape[:-1])}; there "
                    "must be as many.",
                    field="incorrect_tokens",
                )
            directions = directions - wrong
        of_rows = batched and not isinstance(rows, int) and stack.ndim == 4 and directions.ndim == 2
        if of_rows and directions.shape[0] == stack.shape[1]:
            directions = directions[:, None]
        scale = self._scale(self.context.sizes().layers, False, index, rows)[..., 0]
        xp = array_api_compat.array_namespace(stack)
        try:
            # Component by component: a product of the whole stack would be as large as the stack.
            return xp.stack([xp.sum(arrays.wide(part) * directions, axis=-1) / scale for part in stack])
        except (RuntimeError, ValueError) as error:
            raise ShapeMismatchError(
                f"components {list(stack.shape[1:])} do not go with tokens {list(directions.shape[:-1])} and cached "
                f"scales {list(scale.shape)}; were the same pos_slice and batch_slice given?"
            ) from error

    # What the methods above share.

    def _places(self, pos_slice: Any) -> Any:
        """The positions, as an index.

        Raises:
            InvalidInputError: They are no selection, or what was kept are no vectors of the stream any more.
        """
        if self.context.reduce is not None:
            raise InvalidInputError(
                f"this cache was captured with reduce={self.context.reduce!r}; the residual stream is taken apart in "
                "whole vectors, as they are kept without it.",
                field="reduce",
            )
        return index_of(pos_slice, "pos_slice")

    def _upto(self, layer: int | None, mlp_input: bool = False) -> int:
        count = self.context.sizes().layers
        number = count if layer is None or layer == -1 else scalars.whole(layer)
        if number is None or not 0 <= number <= count:
            raise InvalidInputError(
                f"layer is {shown(layer)}; possible are 0 to {count}, or -1 for {count}, the end of the model.",
                field="layer",
            )
        if mlp_input and number == count:
            raise InvalidInputError(f"mlp_input needs a layer from 0 to {count - 1}.", field="mlp_input")
        return number

    def _has(self, hook: str, layer: int) -> bool:
        return layer in self.context.hooks.get(hook, ())

    def _all(self, names: Sequence[str]) -> list[Array]:
        """Activations by full name.

        Raises:
            NotSupportedError: The model has not such a hook.
            UnknownHookError: The cache lacks one; the message says what to capture.
        """
        missing = [name for name in names if name not in self]
        for name in missing:
            hook = name.split(".", 3)[-1]
            if name.startswith("lm.blocks.") and not self._has(hook, _number(name)):
                layers = self.context.hooks.get(hook)
                where = f"in layer {_number(name)}" if layers else "in any layer"
                raise NotSupportedError(f"the {self.context.sizes().family} model has no {hook} {where}.")
        if missing:
            hooks = list(dict.fromkeys(_wildcard(name) for name in missing))
            raise UnknownHookError(
                f"this needs {', '.join(hooks)}, which this cache does not hold; capture with "
                f"run_with_cache([{', '.join(repr(hook) for hook in dict.fromkeys(map(_wildcard, names)))}])."
            )
        return [self[name] for name in names]

    def _components(self, wanted: Sequence[tuple[str, str, int]], index: Any, end: int) -> list[Array]:
        """Parts of the stream as they stand in that of layer `end`; each is given as by `_component`."""
        found = self._all([name for _, name, _ in wanted])
        pairs = zip(found, (since for _, _, since in wanted), strict=True)
        return [_times(cut(part, index, -2), self._gain(since, end)) for part, since in pairs]

    def _gain(self, layer: int, end: int) -> float:
        return self.context.sizes().gain(layer, end)

    def _none(self, index: Any) -> Array:
        """No component, in the shape of a stack."""
        return cut(self._entering(0), index, -2)[None][:0]

    def _entering(self, layer: int, mlp_input: bool = False) -> Array:
        """The stream that enters a layer, its MLP, or the unembedding."""
        if mlp_input:
            return self._all([_block(layer, "hook_resid_mid")])[0]
        count, before = self.context.sizes().layers, layer - 1
        pre = EMBED if layer == 0 else _block(before, "hook_resid_post")
        if layer < count and (_block(layer, "hook_resid_pre") in self or pre not in self):
            return self._all([_block(layer, "hook_resid_pre")])[0]
        stream = self._all([pre])[0]
        if layer == 0 or layer == count or not self._has("hook_deepstack", before):
            return stream
        return stream + self._all([_block(before, "hook_deepstack")])[0]

    def _heads(self, end: int, index: Any, at: int, onto: Array | None = None) -> tuple[list[Array], list[str]]:
        """Each layer's heads, [heads, b, p, d], as they stand in the stream of layer `at`, and their labels."""
        layers = [each for each in range(end) if self._has("attn.hook_head_out", each)]
        parts: list[Array] = []
        labels: list[str] = []
        for each, shares in zip(
            layers, self._all([_block(each, "attn.hook_head_out") for each in layers]), strict=True
        ):
            factor = self._factor(each, "attn", index)
            shares = cut(shares, index, -3)
            shares = shares if factor is None else shares * factor[..., None, :]
            shares = _projected(_times(shares, self._gain(each, at)), onto)
            parts.append(array_api_compat.array_namespace(shares).moveaxis(shares, -2, 0))
            kept = self.context.heads or range(shares.shape[-2])
            labels += [f"L{each}H{head}" for head in kept]
        return parts, labels

    def _neurons(
        self, end: int, index: Any, chosen: Any, onto: Array | None, model: Any
    ) -> tuple[list[Array], list[str]]:
        """Each layer's neurons, [neurons, b, p, d], and their labels."""
        chosen = slice(chosen, chosen + 1 or None) if isinstance(chosen, int) else chosen
        found = self.context.resolve(model)
        parts: list[Array] = []
        labels: list[str] = []
        activations = self._all([_block(each, "mlp.hook_post") for each in range(end)])
        for each, active in enumerate(activations):
            factor = self._factor(each, "mlp", index)
            active = arrays.wide(cut(cut(active, index, -2), chosen, -1))
            weights = arrays.wide(arrays.like(found._down_projection(each), active))
            numbers = list(range(weights.shape[0]))
            numbers = numbers[chosen] if isinstance(chosen, slice) else [numbers[each] for each in chosen]
            weights = cut(weights, chosen, 0)
            if factor is None:
                shares = active[..., None] * _projected(weights, onto)
            else:
                shares = _projected(active[..., None] * (weights * factor[..., None, :]), onto)
            shares = _times(shares, self._gain(each, end))
            parts.append(array_api_compat.array_namespace(shares).moveaxis(shares, -2, 0))
            labels += [f"L{each}N{number}" for number in numbers]
        return parts, labels

    def _factor(self, layer: int, part: str, index: Any) -> Array | None:
        """What a norm or a multiplier behind attention or MLP multiplies its output by, [b, p, d]; None without one."""
        if not self.context.sizes().scales_outputs:
            return None
        before, after = self._all([_block(layer, f"{part}.hook_out"), _block(layer, f"hook_{part}_out")])
        before, after = arrays.wide(cut(before, index, -2)), arrays.wide(cut(after, index, -2))
        xp = array_api_compat.array_namespace(before)
        return xp.where(before == 0, xp.zeros_like(before), after / xp.where(before == 0, xp.ones_like(before), before))

    def _scale(self, layer: int, mlp_input: bool, index: Any, rows: Any) -> Array:
        """The cached scale of a norm, [b, p, 1]."""
        end = layer == self.context.sizes().layers
        name = FINAL_SCALE if end else _block(layer, f"ln{2 if mlp_input else 1}.hook_scale")
        scale = cut(self._all([name])[0], index, -2)
        return cut(scale, rows, 0) if self.context.has_batch_dim else scale

    def _scaled(self, stack: Array, end: int, mlp_input: bool, pos_slice: Any, onto: Array | None) -> Array:
        """`apply_ln_to_stack`, also of components that are projected already."""
        if onto is None:
            return self.apply_ln_to_stack(stack, end, mlp_input, pos_slice)
        if self.context.sizes().norm_centers:
            raise NotSupportedError("apply_ln and project_output_onto do not go together with a norm that centers.")
        scale = self._scale(end, mlp_input, self._places(pos_slice), slice(None))
        return arrays.wide(stack) / scale

    def _directions(self, tokens: Any, stack: Array, model: Any) -> Array:
        """The residual directions of tokens, [..., d] float32."""
        if isinstance(tokens, str):
            flat: list[Any] = [tokens]
            shape: tuple[int, ...] = ()
        elif isinstance(tokens, list | tuple) and all(isinstance(token, str) for token in tokens):
            flat, shape = list(tokens), (len(tokens),)
        else:
            ids = arrays.to_numpy(tokens)
            if ids.dtype.kind not in "iu":
                raise InvalidInputError(
                    f"tokens are given by their texts or ids, not as {ids.dtype}.",
                    field="tokens",
                )
            flat, shape = ids.reshape(-1).tolist(), ids.shape
        different = list(dict.fromkeys(flat))
        rows = arrays.to_numpy(self.context.resolve(model).unembed(different))
        chosen = rows[[different.index(token) for token in flat]]
        return arrays.like(chosen.reshape(*shape, rows.shape[-1]), stack)


def _block(layer: int, hook: str) -> str:
    return f"lm.blocks.{layer}.{hook}"


def _component(layer: int, kind: str) -> tuple[str, str, int]:
    """What a layer added: its label, its hook, and the first layer whose end multiplies it."""
    return f"{layer}_{kind}", _block(layer, f"hook_{kind}"), layer + (kind == "deepstack")


def _number(name: str) -> int:
    return int(name.split(".")[2])


def _wildcard(name: str) -> str:
    return ".".join("*" if segment.isdigit() else segment for segment in name.split("."))


def _stack(parts: Sequence[Array]) -> Array:
    return array_api_compat.array_namespace(*parts[:1]).stack(list(parts))


def _joined(parts: Sequence[Array]) -> Array:
    return array_api_compat.array_namespace(*parts[:1]).concat(list(parts), axis=0)


def _times(part: Array, gain: float) -> Array:
    return part if gain == 1.0 else part * gain


def _sum(stack: Array) -> Array:
    return array_api_compat.array_namespace(stack).sum(stack, axis=0)


def _columns(onto: Array | None) -> tuple[Array | None, bool]:
    """Directions as [d, n], and whether there was but one, [d]."""
    flat = onto is not None and onto.ndim == 1
    return (onto[:, None] if onto is not None and flat else onto), flat


def _projected(stack: Array, onto: Array | None) -> Array:
    """Components [..., d], or their dot products with [d, n]."""
    return stack if onto is None else arrays.wide(stack) @ arrays.wide(arrays.like(onto, stack))
