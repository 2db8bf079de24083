"""Requests for fuzzing: whatever a descriptor allows, valid requests with parts changed, and bytes that are neither.

Everything follows from the contract's descriptors, so a new field or message is fuzzed without a word here. `Pools`
holds what makes a request get past the first checks: names of hooks, hashes of images, texts of tokens.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st
from vlm_spectra.dtypes import from_wire, to_numpy
from vlm_spectra.v1 import inputs_pb2, intervention_pb2, model_service_pb2, tensor_pb2
from vlm_spectra.v1 import spectra_service_pb2 as spb

F = FieldDescriptor
_32 = (0, 1, 2, 3, 7, 64, 255, 4096, 4097, 2**16, 2**31 - 1)
_SIGNED_32 = (*_32, -1, -2, -5, -(2**31))
_UNSIGNED_32 = (*_32, 2**31, 2**32 - 1)
_64 = (2**32, 2**53 + 1, 2**62, 2**63 - 1)
_FLOATS = (0.0, -0.0, 1.0, 0.5, -1.0, 1e-30, 1e30, float("nan"), float("inf"), float("-inf"))
EDGES: dict[int, tuple[Any, ...]] = {
    F.TYPE_INT32: _SIGNED_32,
    F.TYPE_INT64: (*_SIGNED_32, *_64, -(2**63)),
    F.TYPE_UINT32: _UNSIGNED_32,
    F.TYPE_UINT64: (*_UNSIGNED_32, *_64, 2**64 - 1),
    F.TYPE_FIXED32: (0, 2**32 - 1),
    F.TYPE_BOOL: (False, True),
    F.TYPE_FLOAT: _FLOATS,
    F.TYPE_DOUBLE: _FLOATS,
    F.TYPE_ENUM: (*range(15), -1, 99, 2**31 - 1, -(2**31)),
    F.TYPE_BYTES: (b"", b"\0", b"\xff" * 8, bytes(768), b"\0\0\x80\x3f" * 192),
}
"""Values at which something could be different, by the kind of field."""
NUMBERS: dict[int, st.SearchStrategy[Any]] = {kind: st.sampled_from(values) for kind, values in EDGES.items()} | {
    F.TYPE_INT32: st.sampled_from(EDGES[F.TYPE_INT32]) | st.integers(-(2**31), 2**31 - 1),
    F.TYPE_INT64: st.sampled_from(EDGES[F.TYPE_INT64]) | st.integers(-(2**63), 2**63 - 1),
    F.TYPE_UINT32: st.sampled_from(EDGES[F.TYPE_UINT32]) | st.integers(0, 2**32 - 1),
    F.TYPE_UINT64: st.sampled_from(EDGES[F.TYPE_UINT64]) | st.integers(0, 2**64 - 1),
    F.TYPE_FLOAT: st.sampled_from(_FLOATS) | st.floats(width=32),
    F.TYPE_DOUBLE: st.sampled_from(_FLOATS) | st.floats(),
    F.TYPE_BYTES: st.sampled_from(EDGES[F.TYPE_BYTES]) | st.binary(max_size=200),
}
WILD = (
    "", " ", "\0", "\n", "*", "**", "?", "[", "[!a]*", "a" * 5000, "é漢字🙂" * 300, "../../etc/passwd", "%s%n{0}",
    "<|image_pad|>", "<|im_end|>", "\u202eabc", "lm.blocks.*.*", "lm.blocks.*.*.*",
    "lm.blocks." + "9" * 5000 + ".hook_z", "*" * 300, "_grad", "lm.*_grad", "vision.*", "None", "-1", "--help",
    "spectra-tiny ",
)  # fmt: skip
LARGEST = 300_000
"""Bytes of a field that is repeated very often."""
TEXTS = st.sampled_from(WILD) | st.text(st.characters(codec="utf-8"), max_size=30)


@dataclass
class Pools:
    """What exists on the server.

    Attributes:
        hooks: Names and wildcards of hooks.
        images: SHA-256 of images that the server has.
        captures: Ids of captures.
        texts: By field name, texts that mean something.
    """

    hooks: Sequence[str]
    images: Sequence[str]
    captures: Sequence[str]
    texts: dict[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        grads = [f"{name}_grad" for name in self.hooks[:6]]
        self.texts = {
            "hook": [*self.hooks, "hook_resid_mid", "hook_attn_out", "mlp.hook_out"],
            "hooks": [*self.hooks, *grads],
            "images": list(self.images)[:2],
            "capture_id": list(self.captures),
            "model": ["", "spectra-tiny"],
            "text": [" red", "a", " hello", "the", "\n"],
            "task": ["Say hello", "red cat", "Click on it"],
            "answer": ["yes", " red circle"],
        } | self.texts

    def of(self, name: str) -> st.SearchStrategy[str]:
        """Texts for a field."""
        known = self.texts.get(name)
        return TEXTS if not known else st.one_of(*[st.sampled_from(known)] * 4, TEXTS)


@st.composite
def tensors(draw: Any) -> tensor_pb2.Tensor:
    """A tensor whose bytes fit its shape and type."""
    dtype = draw(st.integers(1, 12))
    shape = draw(st.sampled_from([[], [0], [1], [192], [1, 192], [1, 1, 192], [1, 4, 192], [6], [32], [1, 1] * 3, [2]]))
    size = to_numpy(from_wire(dtype)).itemsize
    count = 1
    for extent in shape:
        count *= extent
    pattern = draw(st.sampled_from([b"\0" * 8, b"\x00\x00\x80\x3f" * 2, b"\xff" * 8, b"\x7f\xc0\0\0" * 2]))
    return tensor_pb2.Tensor(dtype=dtype, shape=shape, data=(pattern * count)[: size * count])


def _size(value: Any) -> int:
    return value.ByteSize() if isinstance(value, Message) else len(value) if isinstance(value, str | bytes) else 4


def _value(draw: Any, owner: FieldDescriptor, pools: Pools, depth: int) -> Any:
    if owner.type == F.TYPE_MESSAGE:
        if owner.message_type.name == "Tensor" and draw(st.booleans()):
            return draw(tensors())
        return draw(messages(owner.message_type, pools, depth - 1))
    if owner.type == F.TYPE_STRING:
        return draw(pools.of(owner.name))
    return draw(NUMBERS[owner.type])


def _put(draw: Any, message: Message, owner: FieldDescriptor, pools: Pools, depth: int) -> None:
    """Give one field a value, or several, or very many."""
    if owner.is_repeated:
        values = [_value(draw, owner, pools, depth) for _ in range(draw(st.integers(0, 3)))]
        times = draw(st.sampled_from((1,) * 12 + (2, 100, 3000)))
        values *= min(times, 1 + LARGEST // (sum(map(_size, values)) + 1))
        if draw(st.booleans()):
            message.ClearField(owner.name)
        getattr(message, owner.name).extend(values)
    elif owner.type == F.TYPE_MESSAGE:
        getattr(message, owner.name).CopyFrom(_value(draw, owner, pools, depth))
    else:
        setattr(message, owner.name, _value(draw, owner, pools, depth))


@st.composite
def messages(draw: Any, kind: Descriptor, pools: Pools, depth: int = 5) -> Message:
    """Any message of a kind."""
    message = message_factory.GetMessageClass(kind)()
    fields = [each for each in kind.fields if depth > 0 or each.type != F.TYPE_MESSAGE]
    if fields:
        for owner in draw(st.lists(st.sampled_from(fields), max_size=5)):
            _put(draw, message, owner, pools, depth)
    return message


@st.composite
def mutated(draw: Any, bases: Sequence[Message], pools: Pools) -> Message:
    """A valid request with up to three parts changed: it gets far."""
    base = draw(st.sampled_from(list(bases)))
    message = type(base)()
    message.CopyFrom(base)
    for _ in range(draw(st.sampled_from((0, 1, 1, 1, 2, 2, 3)))):
        owner: Any = message
        while owner.DESCRIPTOR.fields:
            present = [each for each, _ in owner.ListFields()]
            others = [each for each in owner.DESCRIPTOR.fields if each.name not in ("model", "images")]
            chosen = draw(st.sampled_from(present * 2 + (others or list(owner.DESCRIPTOR.fields))))
            deeper = chosen.type == F.TYPE_MESSAGE and chosen in present and draw(st.integers(0, 3))
            if not deeper:
                if chosen in present and draw(st.integers(0, 4)) == 0:
                    owner.ClearField(chosen.name)
                else:
                    _put(draw, owner, chosen, pools, 3)
                break
            owner = getattr(owner, chosen.name)
            if chosen.is_repeated:
                owner = draw(st.sampled_from(list(owner)))
    return message


def neighbours(message: Message, pools: Pools, chance: Random, number: int) -> Iterator[bytes]:
    """The message with one value changed, in so many ways: quick, where a strategy is slow."""
    for _ in range(number):
        near = type(message)()
        near.CopyFrom(message)
        places = list(_places(near))
        if places:
            owner, what, index = chance.choice(places)
            known = pools.texts.get(what.name)
            if what.type == F.TYPE_MESSAGE or chance.random() < 0.1:
                owner.ClearField(what.name) if index is None else getattr(owner, what.name).pop(index)
            else:
                values = EDGES.get(what.type) or (known if known and chance.random() < 0.8 else WILD)
                value = chance.choice(values[:4] if what.type in EDGES and chance.random() < 0.5 else values)
                if index is None:
                    setattr(owner, what.name, value)
                else:
                    getattr(owner, what.name)[index] = value
        yield near.SerializeToString()


def _places(message: Message) -> Iterator[tuple[Message, FieldDescriptor, int | None]]:
    """Every value in a message; of those that are repeated the first few."""
    for what, value in message.ListFields():
        for index in range(min(len(value), 9)) if what.is_repeated else [None]:
            yield message, what, index
            if what.type == F.TYPE_MESSAGE:
                yield from _places(value if index is None else value[index])


_UNKNOWN = (b"\xba\x3e\x03abc", b"\xb8\x3e\x01", b"\xbb\x3e\xbc\x3e", b"\xbd\x3e\0\0\0\0", b"\xb9\x3e" + b"\1" * 8)
"""Field 999 in all five wire types."""


@st.composite
def broken(draw: Any, whole: bytes) -> bytes:
    """Bytes with some lost, changed or put in."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
    return bytes(data)


@st.composite
def requests(draw: Any, bases: Sequence[Message], pools: Pools) -> bytes:
    """A request's bytes: most are valid ones with parts changed, some any message, a few no message at all."""
    kind = draw(st.sampled_from(("mutated",) * 12 + ("any",) * 5 + ("unknown",) + ("broken",) * 2))
    if kind == "any":
        return bytes(draw(messages(bases[0].DESCRIPTOR, pools)).SerializeToString())
    message = draw(mutated(bases, pools))
    if kind == "broken":
        return draw(broken(message.SerializeToString()))
    unknown = draw(st.sampled_from(_UNKNOWN)) if kind == "unknown" else b""
    return bytes(message.SerializeToString()) + unknown


def _f32(*values: float) -> tensor_pb2.TensorValue:
    data = struct.pack(f"<{len(values)}f", *values)
    return tensor_pb2.TensorValue(inline=tensor_pb2.Tensor(dtype=9, shape=[len(values)], data=data))


def bases(pools: Pools, hidden: int) -> dict[str, list[Message]]:
    """Valid requests by call, of every kind that there is."""
    plain = [inputs_pb2.Prompt(task="Say hello")]
    pictured = [inputs_pb2.Prompt(task="Click on it", images=[pools.images[0]])]
    two = [*plain, inputs_pb2.Prompt(task="What is this?", images=list(pools.images[:2]), assistant_prefill="It is")]
    last = inputs_pb2.Positions(items=[inputs_pb2.Position(named=inputs_pb2.NAMED_POSITIONS_LAST)])
    some = inputs_pb2.Positions(
        items=[inputs_pb2.Position(index=1), inputs_pb2.Position(slice=inputs_pb2.Slice(start=0, stop=9, step=3))]
    )
    heads = inputs_pb2.Heads(indices=[0, 1])
    wide, post, mask = _f32(*[0.1] * hidden), "lm.blocks.1.hook_resid_post", "lm.blocks.2.attn.hook_mask"
    pb = intervention_pb2
    changes = [
        pb.Intervention(hook=post, positions=last, patch_activation=pb.PatchActivation(value=wide)),
        pb.Intervention(hook="lm.blocks.*.attn.hook_z", heads=heads, zero_ablation=pb.ZeroAblation()),
        pb.Intervention(hook=post, mean_ablation=pb.MeanAblation()),
        pb.Intervention(hook=post, add_activation=pb.AddActivation(value=wide, scale=2)),
        pb.Intervention(hook="vision.blocks.0.hook_resid_post", scale_activation=pb.ScaleActivation(factor=0.5)),
        pb.Intervention(hook="lm.blocks.0.attn.hook_pattern", scale_activation=pb.ScaleActivation(factor=1.5)),
        pb.Intervention(hook=post, project_out=pb.ProjectOut(direction=wide)),
        pb.Intervention(hook="lm.blocks.3.attn.hook_z", heads=heads, patch_head=pb.PatchHead(value=_f32(0))),
        pb.Intervention(hook=mask, positions=last, block_attention=pb.BlockAttention(keys=some)),
        pb.Intervention(hook=mask, set_attention_mask=pb.SetAttentionMask(mask=_f32(0))),
        pb.Intervention(
            hook=post,
            patch_activation=pb.PatchActivation(
                value=tensor_pb2.TensorValue(
                    reference=tensor_pb2.CaptureReference(capture_id=pools.captures[0], hook=post)
                )
            ),
        ),
    ]
    generate = spb.GenerateOptions(max_new_tokens=3)
    sampled = spb.GenerateOptions(
        max_new_tokens=4, do_sample=True, temperature=0.7, top_p=0.9, seed=3, stop=["x"], output_hidden_states=True
    )
    forward = spb.ForwardOptions(logits_to_keep=spb.LogitsToKeep(last=1))
    all_of_it = spb.ForwardOptions(
        logits_to_keep=spb.LogitsToKeep(positions=[0, -1]), output_hidden_states=True, output_attentions=True
    )
    red = spb.Target(token=spb.TokenReference(text=" red"), minus=spb.TokenReference(id=5), position=-1)
    select = spb.CaptureSelection(hooks=["lm.blocks.*.hook_resid_post", "lm.blocks.0.attn.hook_pattern"])
    runs = [
        spb.CaptureRun(prompts=plain, selection=select, forward=forward, linger_seconds=1),
        spb.CaptureRun(
            prompts=two,
            selection=spb.CaptureSelection(
                hooks=["lm.blocks.1.attn.hook_z"], positions=last, heads=heads, dtype=7, reduction=2, compression=2
            ),
            forward=spb.ForwardOptions(),
            interventions=changes[:2],
            shared_memory=True,
        ),
        spb.CaptureRun(prompts=pictured, selection=select, generate=generate),
        spb.CaptureRun(
            prompts=pictured, selection=spb.CaptureSelection(hooks=["vision.blocks.*.hook_resid_post"]), forward=forward
        ),
        spb.CaptureRun(
            prompts=plain,
            selection=spb.CaptureSelection(hooks=[f"{post}_grad", post]),
            forward=forward,
            backward_from=red,
        ),
    ]
    methods = range(1, 9)
    model = "spectra-tiny"
    found: dict[str, list[Message]] = {
        "SpectraService/Prepare": [spb.PrepareRequest(prompts=each) for each in (plain, pictured, two)],
        "SpectraService/Generate": [
            spb.GenerateRequest(model=model, prompts=prompts, options=options, interventions=some)
            for (prompts, options), some in zip(
                itertools.product((plain, pictured, two), (generate, sampled)),
                ([], changes[:1], changes[8:9], [], changes[3:4], []),
                strict=True,
            )
        ],
        "SpectraService/Forward": [
            *(
                spb.ForwardRequest(prompts=pictured, options=forward, interventions=[change])
                for change in changes
                if not change.patch_activation.value.HasField("reference")
            ),
            spb.ForwardRequest(prompts=plain, options=forward, interventions=changes[-1:]),
            spb.ForwardRequest(prompts=two, options=all_of_it),
        ],
        "SpectraService/RunWithCache": [
            *(spb.RunWithCacheRequest(run=run) for run in runs),
            spb.RunWithCacheRequest(
                resume=spb.CaptureResume(capture_id=pools.captures[0], offsets=[spb.TensorOffset(index=1, offset=4096)])
            ),
        ],
        "SpectraService/ReleaseCapture": [spb.ReleaseCaptureRequest(capture_id="0" * 32)],
        "SpectraService/Estimate": [spb.EstimateRequest(run=run) for run in runs],
        "SpectraService/LogitLens": [
            spb.LogitLensRequest(prompts=plain, top_k=3),
            spb.LogitLensRequest(
                prompts=two,
                hook="mlp.hook_out",
                layers=[0, -1],
                positions=last,
                top_k=2,
                targets=[spb.TokenReference(text=" red")],
                interventions=changes[:1],
            ),
        ],
        "SpectraService/Attribute": [
            *(spb.AttributeRequest(prompts=pictured, method=number, target=red) for number in methods if number != 8),
            spb.AttributeRequest(prompts=plain, method=8, corrupted=plain, target=red),
            spb.AttributeRequest(prompts=pictured, method=3, steps=8, baseline=2),
            spb.AttributeRequest(prompts=pictured, method=4, window=2, stride=1, baseline=3),
            spb.AttributeRequest(prompts=plain, method=2, target=spb.Target(answer="yes"), interventions=changes[5:6]),
        ],
        "SpectraService/PatchSweep": [
            spb.PatchSweepRequest(prompts=plain, corrupted=plain, hooks=[post], positions=some, metric=red, mode=mode)
            for mode in (1, 2)
        ]
        + [spb.PatchSweepRequest(prompts=pictured, corrupted=pictured, hooks=["lm.blocks.1.attn.hook_z"], heads=heads)],
        "SpectraService/GetUnembedding": [
            spb.GetUnembeddingRequest(tokens=[spb.TokenReference(text=" red"), spb.TokenReference(id=7)])
        ],
        "ModelService/ListModels": [model_service_pb2.ListModelsRequest()],
        "ModelService/GetModel": [model_service_pb2.GetModelRequest(name=model, include_vocabulary=True)],
        "ModelService/LoadModel": [model_service_pb2.LoadModelRequest(name=model, dtype=9, device="cpu")],
        "ModelService/UnloadModel": [model_service_pb2.UnloadModelRequest(name="another")],
    }
    return found
