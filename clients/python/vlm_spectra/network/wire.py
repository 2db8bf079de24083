"""Between the library's own types and the contract's messages, in both directions; client and server use the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import arrays, dtypes
from ..analyses import AttributionOptions, LensOptions, SweepOptions
from ..calls import CaptureOptions, ForwardOptions, GenerateOptions, Target, TokenLike
from ..errors import InvalidInputError
from ..hooks import HookSpec
from ..info import ModelInfo
from ..inputs import ImageLayout, Prompt, Tile
from ..interventions import (
    AddActivation,
    BlockAttention,
    CaptureRef,
    HookedIntervention,
    Intervention,
    MeanAblation,
    PatchActivation,
    PatchHead,
    ProjectOut,
    ScaleActivation,
    SetAttentionMask,
    ZeroAblation,
)
from ..positions import PositionItem, listed
from ..v1 import inputs_pb2, intervention_pb2, model_service_pb2, spectra_service_pb2, tensor_pb2

MOST_AXES = 8
"""No activation has more."""
MOST_ELEMENTS = 2**40
"""Nor as many, whatever it holds: an empty tensor's other extents count too."""
_NAMED = {
    "last": inputs_pb2.NAMED_POSITIONS_LAST,
    "image": inputs_pb2.NAMED_POSITIONS_IMAGE,
    "text": inputs_pb2.NAMED_POSITIONS_TEXT,
}
_FIELDS: dict[type[Intervention], str] = {
    PatchHead: "patch_head",
    PatchActivation: "patch_activation",
    ZeroAblation: "zero_ablation",
    MeanAblation: "mean_ablation",
    AddActivation: "add_activation",
    ScaleActivation: "scale_activation",
    ProjectOut: "project_out",
    BlockAttention: "block_attention",
    SetAttentionMask: "set_attention_mask",
}


def prompts_to_wire(prompts: Sequence[Prompt]) -> list[inputs_pb2.Prompt]:
    """Prompts with their images by hash."""
    return [
        inputs_pb2.Prompt(
            task=prompt.task,
            images=[picture.sha256 for picture in prompt.images],
            assistant_prefill=prompt.assistant_prefill,
            system=prompt.system,
        )
        for prompt in prompts
    ]


def layout_to_wire(layout: ImageLayout) -> inputs_pb2.ImageLayout:
    """An image's layout."""
    return inputs_pb2.ImageLayout(
        row=layout.row,
        original=inputs_pb2.Size(width=layout.original_size[0], height=layout.original_size[1]),
        processed=inputs_pb2.Size(width=layout.processed_size[0], height=layout.processed_size[1]),
        grid_height=layout.grid[0],
        grid_width=layout.grid[1],
        positions=layout.positions,
        tiles=[_tile_to_wire(tile) for tile in layout.tiles],
        patch_rows=[rows for rows, _ in layout.patch_grids],
        patch_columns=[columns for _, columns in layout.patch_grids],
    )


def _tile_to_wire(tile: Tile) -> inputs_pb2.ImageTile:
    left, top, right, bottom = tile.box
    return inputs_pb2.ImageTile(
        grid_height=tile.grid[0],
        grid_width=tile.grid[1],
        box=inputs_pb2.Box(left=left, top=top, right=right, bottom=bottom),
        positions=tile.positions,
        first_row=tile.origin[0],
        first_column=tile.origin[1],
        overview=tile.overview,
        resampled=tile.resampled,
    )


def _tile_from_wire(message: inputs_pb2.ImageTile) -> Tile:
    return Tile(
        (message.grid_height, message.grid_width),
        (message.box.left, message.box.top, message.box.right, message.box.bottom),
        tuple(message.positions),
        (message.first_row, message.first_column),
        message.overview,
        message.resampled,
    )


def layout_from_wire(message: inputs_pb2.ImageLayout) -> ImageLayout:
    """An image's layout."""
    return ImageLayout(
        message.row,
        (message.original.width, message.original.height),
        (message.processed.width, message.processed.height),
        (message.grid_height, message.grid_width),
        tuple(message.positions),
        tuple(_tile_from_wire(tile) for tile in message.tiles),
        tuple(zip(message.patch_rows, message.patch_columns, strict=True)),
    )


def positions_to_wire(items: Sequence[PositionItem] | None) -> inputs_pb2.Positions | None:
    """Positions; None for all."""
    if items is None:
        return None
    message = inputs_pb2.Positions()
    for item in items:
        if isinstance(item, slice):
            message.items.add(slice=inputs_pb2.Slice(start=item.start, stop=item.stop, step=item.step))
        elif isinstance(item, str):
            message.items.add(named=_NAMED[item])
        else:
            message.items.add(index=item)
    return message


def positions_from_wire(owner: Any, field: str) -> tuple[PositionItem, ...] | None:
    """The positions in a field; None where it is absent or empty."""
    if not owner.HasField(field) or not getattr(owner, field).items:
        return None
    names = {value: name for name, value in _NAMED.items()}
    items: list[PositionItem] = []
    for item in getattr(owner, field).items:
        kind = item.WhichOneof("kind")
        if kind == "index":
            items.append(item.index)
        elif kind == "slice":
            part = item.slice
            items.append(slice(*(getattr(part, n) if part.HasField(n) else None for n in ("start", "stop", "step"))))
        elif kind == "named" and item.named in names:
            items.append(names[item.named])
        else:
            raise InvalidInputError("a position is neither an index, a slice nor a known name.", field="positions")
    return listed(items)


def _heads_to_wire(heads: Sequence[int] | None) -> inputs_pb2.Heads | None:
    return None if heads is None else inputs_pb2.Heads(indices=[heads] if isinstance(heads, int) else heads)


def _heads_from_wire(owner: Any) -> tuple[int, ...] | None:
    return tuple(owner.heads.indices) if owner.HasField("heads") else None


def tensor_to_wire(value: Any) -> tensor_pb2.Tensor:
    """A small tensor, whole."""
    array = arrays.to_numpy(value)
    if array.dtype == np.float64 and np.ndim(value) == 0:
        array = array.astype(np.float32)
    array = np.ascontiguousarray(array).reshape(array.shape)
    name = dtypes.name_of(array.dtype)
    return tensor_pb2.Tensor(dtype=dtypes.to_wire(name), shape=array.shape, data=array.tobytes())


def tensor_from_wire(message: tensor_pb2.Tensor) -> np.ndarray[Any, Any]:
    """A small tensor, whole.

    Raises:
        InvalidInputError: Bytes and shape do not go together.
    """
    element = dtypes.to_numpy(dtypes.from_wire(message.dtype))
    shape = tuple(message.shape)
    if len(shape) > MOST_AXES:
        raise InvalidInputError(f"a tensor has at most {MOST_AXES} axes, not {len(shape)}.", field="value")
    count = math.prod(shape)
    if math.prod(max(extent, 1) for extent in shape) > MOST_ELEMENTS:
        raise InvalidInputError(f"a tensor of shape {list(shape)} has no place in any memory.", field="value")
    if any(extent < 0 for extent in shape) or count * element.itemsize != len(message.data):
        raise InvalidInputError(
            f"a tensor of shape {list(shape)} and type {element.name} does not have {len(message.data)} bytes.",
            field="value",
        )
    array: np.ndarray[Any, Any]
    if element == np.bool_:  # a byte that is neither 0 nor 1 is no bool in memory
        array = np.frombuffer(message.data, np.uint8) != 0
    else:
        array = np.frombuffer(message.data, dtype=element).copy()
    return array.reshape(shape)


def _value_to_wire(value: Any) -> tensor_pb2.TensorValue:
    if isinstance(value, CaptureRef):
        reference = tensor_pb2.CaptureReference(capture_id=value.capture_id, hook=value.hook)
        return tensor_pb2.TensorValue(reference=reference)
    return tensor_pb2.TensorValue(inline=tensor_to_wire(value))


def _value_from_wire(message: tensor_pb2.TensorValue) -> Any:
    kind = message.WhichOneof("source")
    if kind == "inline":
        return tensor_from_wire(message.inline)
    if kind == "reference":
        return CaptureRef(message.reference.capture_id, message.reference.hook)
    raise InvalidInputError("an intervention has no value.", field="value")


def interventions_to_wire(pairs: Sequence[HookedIntervention]) -> list[intervention_pb2.Intervention]:
    """Interventions with their hooks."""
    messages = []
    for hook, action in pairs:
        assert isinstance(action, Intervention)
        message = intervention_pb2.Intervention(
            hook=hook, positions=positions_to_wire(listed(action.positions)), heads=_heads_to_wire(action.heads)
        )
        part = getattr(message, _FIELDS[type(action)])
        part.SetInParent()
        if isinstance(action, BlockAttention):
            keys = positions_to_wire(listed(action.keys))
            if keys is not None:
                part.keys.CopyFrom(keys)
        for name in ("value", "direction", "mask"):
            if getattr(action, name, None) is not None:
                getattr(part, name).CopyFrom(_value_to_wire(getattr(action, name)))
        for name in ("scale", "factor"):
            if hasattr(action, name):
                setattr(part, name, getattr(action, name))
        messages.append(message)
    return messages


def intervention_from_wire(message: intervention_pb2.Intervention) -> HookedIntervention:
    """An intervention with its hook.

    Raises:
        InvalidInputError: It says not what to do, or with which values.
    """
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidInputError(f"the intervention at {message.hook!r} says not what to do.", field="interventions")
    where: dict[str, Any] = {
        "positions": positions_from_wire(message, "positions"),
        "heads": _heads_from_wire(message),
    }
    part = getattr(message, kind)
    build: dict[str, Callable[[], Intervention]] = {
        "patch_activation": lambda: PatchActivation(_value_from_wire(part.value), **where),
        "patch_head": lambda: PatchHead(_value_from_wire(part.value), **where),
        "zero_ablation": lambda: ZeroAblation(**where),
        "mean_ablation": lambda: MeanAblation(
            _value_from_wire(part.value) if part.HasField("value") else None, **where
        ),
        "add_activation": lambda: AddActivation(_value_from_wire(part.value), part.scale, **where),
        "scale_activation": lambda: ScaleActivation(part.factor, **where),
        "project_out": lambda: ProjectOut(_value_from_wire(part.direction), **where),
        "block_attention": lambda: BlockAttention(keys=positions_from_wire(part, "keys"), **where),
        "set_attention_mask": lambda: SetAttentionMask(_value_from_wire(part.mask), **where),
    }
    return message.hook, build[kind]()


def generate_to_wire(options: GenerateOptions) -> spectra_service_pb2.GenerateOptions:
    """The options of a generation."""
    return spectra_service_pb2.GenerateOptions(
        max_new_tokens=options.max_new_tokens,
        do_sample=options.do_sample,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        stop=options.stop,
        output_hidden_states=options.output_hidden_states,
    )


def generate_from_wire(message: spectra_service_pb2.GenerateOptions) -> GenerateOptions:
    """The options of a generation."""
    given = {n: getattr(message, n) if message.HasField(n) else None for n in ("temperature", "top_p", "seed")}
    return GenerateOptions(
        max_new_tokens=message.max_new_tokens,
        output_hidden_states=message.output_hidden_states,
        do_sample=message.do_sample,
        stop=tuple(message.stop),
        **given,
    )


def forward_to_wire(options: ForwardOptions) -> spectra_service_pb2.ForwardOptions:
    """The options of a forward pass."""
    keep = None
    if isinstance(options.logits_to_keep, tuple):
        keep = spectra_service_pb2.LogitsToKeep(positions=options.logits_to_keep)
    elif options.logits_to_keep is not None:
        keep = spectra_service_pb2.LogitsToKeep(last=options.logits_to_keep)
    return spectra_service_pb2.ForwardOptions(
        logits_to_keep=keep,
        output_hidden_states=options.output_hidden_states,
        output_attentions=options.output_attentions,
    )


def forward_from_wire(message: spectra_service_pb2.ForwardOptions) -> ForwardOptions:
    """The options of a forward pass."""
    keep: int | tuple[int, ...] | None = None
    if message.HasField("logits_to_keep"):
        keep = tuple(message.logits_to_keep.positions) or message.logits_to_keep.last
    return ForwardOptions(keep, message.output_hidden_states, message.output_attentions)


_REDUCTIONS: dict[str | None, spectra_service_pb2.Reduction] = {
    None: spectra_service_pb2.REDUCTION_UNSPECIFIED,
    "mean_heads": spectra_service_pb2.REDUCTION_MEAN_HEADS,
    "norm": spectra_service_pb2.REDUCTION_NORM,
}


def selection_to_wire(options: CaptureOptions) -> spectra_service_pb2.CaptureSelection:
    """What to capture."""
    return spectra_service_pb2.CaptureSelection(
        hooks=options.hooks,
        positions=positions_to_wire(options.positions),
        heads=_heads_to_wire(options.heads),
        dtype=tensor_pb2.DTYPE_UNSPECIFIED if options.dtype is None else dtypes.to_wire(options.dtype),
        reduction=_REDUCTIONS[options.reduce],
    )


def selection_from_wire(message: spectra_service_pb2.CaptureSelection) -> dict[str, Any]:
    """What to capture, as the arguments of `CaptureOptions.checked`."""
    return {
        "hooks": list(message.hooks),
        "positions": positions_from_wire(message, "positions"),
        "heads": _heads_from_wire(message),
        "dtype": None if message.dtype == tensor_pb2.DTYPE_UNSPECIFIED else dtypes.from_wire(message.dtype),
        "reduce": {number: name for name, number in _REDUCTIONS.items()}.get(message.reduction, str(message.reduction)),
    }


def token_to_wire(token: TokenLike) -> spectra_service_pb2.TokenReference:
    """A token by its id or text."""
    if isinstance(token, str):
        return spectra_service_pb2.TokenReference(text=token)
    return spectra_service_pb2.TokenReference(id=token)


def token_from_wire(message: spectra_service_pb2.TokenReference) -> TokenLike:
    """A token by its id or text."""
    return message.text if message.WhichOneof("kind") == "text" else message.id


def lens_to_wire(options: LensOptions) -> dict[str, Any]:
    """A lens, as fields of its request."""
    return {
        "hook": options.hook,
        "layers": options.layers,
        "positions": positions_to_wire(options.positions),
        "top_k": options.top_k,
        "targets": [token_to_wire(token) for token in options.targets],
    }


def lens_from_wire(message: spectra_service_pb2.LogitLensRequest) -> dict[str, Any]:
    """A lens, as the arguments of `LensOptions.checked`."""
    return {
        "hook": message.hook or "hook_resid_post",
        "layers": list(message.layers) or None,
        "positions": positions_from_wire(message, "positions"),
        "top_k": message.top_k,
        "targets": [token_from_wire(token) for token in message.targets] or None,
    }


def target_to_wire(target: Target) -> spectra_service_pb2.Target:
    """A scalar of the output."""
    return spectra_service_pb2.Target(
        token=None if target.token is None else token_to_wire(target.token),
        minus=None if target.minus is None else token_to_wire(target.minus),
        position=target.position,
        answer=target.answer,
    )


def target_from_wire(message: spectra_service_pb2.Target) -> Target:
    """A scalar of the output."""
    return Target(
        token_from_wire(message.token) if message.HasField("token") else None,
        token_from_wire(message.minus) if message.HasField("minus") else None,
        message.position if message.HasField("position") else None,
        message.answer if message.HasField("answer") else None,
    )


def _choice(message: Any, field: str) -> str:
    """An enum's value as the library names it.

    Raises:
        InvalidInputError: The value is unknown to this version.
    """
    kind, value = message.DESCRIPTOR.fields_by_name[field].enum_type, getattr(message, field)
    if value not in kind.values_by_number:
        raise InvalidInputError(f"{field} {value} is unknown to this version of vlm-spectra.", field=field)
    unspecified = kind.values_by_number[0].name
    return str(kind.values_by_number[value].name).removeprefix(unspecified.removesuffix("UNSPECIFIED")).lower()


def attribution_to_wire(options: AttributionOptions) -> dict[str, Any]:
    """An attribution, as fields of its request."""
    return {
        "method": spectra_service_pb2.AttributionMethod.Value(f"ATTRIBUTION_METHOD_{options.method.upper()}"),
        "target": target_to_wire(options.target),
        "steps": options.steps,
        "baseline": spectra_service_pb2.Baseline.Value(f"BASELINE_{options.baseline.upper()}"),
        "window": options.window if options.method == "occlusion" else 0,
        "stride": options.stride if options.method == "occlusion" else 0,
        "corrupted": [] if options.against is None else prompts_to_wire(options.against.prompts),
    }


def attribution_from_wire(message: spectra_service_pb2.AttributeRequest) -> dict[str, Any]:
    """An attribution, as the arguments of `AttributionOptions.checked`."""
    return {
        "method": _choice(message, "method"),
        "target": target_from_wire(message.target),
        "steps": message.steps or None,
        "baseline": _choice(message, "baseline") if message.baseline else "mean",
        "window": message.window or None,
        "stride": message.stride or None,
    }


def sweep_to_wire(options: SweepOptions) -> dict[str, Any]:
    """A sweep, as fields of its request."""
    return {
        "hooks": options.hooks,
        "positions": positions_to_wire(options.positions),
        "heads": _heads_to_wire(options.heads),
        "metric": target_to_wire(options.metric),
        "mode": spectra_service_pb2.PatchMode.Value(f"PATCH_MODE_{options.mode.upper()}"),
    }


def sweep_from_wire(message: spectra_service_pb2.PatchSweepRequest) -> dict[str, Any]:
    """A sweep, as the arguments of `SweepOptions.checked`."""
    return {
        "hooks": list(message.hooks),
        "positions": positions_from_wire(message, "positions"),
        "heads": _heads_from_wire(message),
        "metric": target_from_wire(message.metric),
        "mode": _choice(message, "mode") if message.mode else "denoising",
    }


_INFO = [name for name in ModelInfo.__dataclass_fields__ if name not in ("name", "dtype", "coordinates")]


def info_to_wire(info: ModelInfo) -> model_service_pb2.ModelInfo:
    """A model's sizes and names."""
    return model_service_pb2.ModelInfo(
        dtype=dtypes.to_wire(info.dtype),
        coordinates=f"COORDINATE_SYSTEM_{info.coordinates.upper()}",
        **{name: getattr(info, name) for name in _INFO},
    )


def info_from_wire(name: str, message: model_service_pb2.ModelInfo) -> ModelInfo:
    """A model's sizes and names."""
    coordinates = model_service_pb2.CoordinateSystem.Name(message.coordinates)
    return ModelInfo(
        name=name,
        dtype=dtypes.from_wire(message.dtype),
        coordinates=coordinates.removeprefix("COORDINATE_SYSTEM_").lower(),
        **{field: getattr(message, field) for field in _INFO},
    )


def hook_to_wire(spec: HookSpec) -> model_service_pb2.HookSpec:
    """A hook point."""
    return model_service_pb2.HookSpec(
        name=spec.name,
        shape=spec.shape,
        dtype=dtypes.to_wire(spec.dtype),
        description=spec.description,
        layers=spec.layers,
        intervene_only=spec.intervene_only,
    )


def hook_from_wire(message: model_service_pb2.HookSpec) -> HookSpec:
    """A hook point."""
    return HookSpec(
        message.name,
        tuple(message.shape),
        dtypes.from_wire(message.dtype),
        message.description,
        tuple(message.layers),
        message.intervene_only,
    )
