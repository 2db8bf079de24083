from vlm_spectra.v1 import inputs_pb2 as _inputs_pb2
from vlm_spectra.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Intervention(_message.Message):
    __slots__ = ("hook", "positions", "heads", "patch_activation", "zero_ablation", "mean_ablation", "add_activation", "scale_activation", "project_out", "patch_head", "block_attention", "set_attention_mask")
    HOOK_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    PATCH_ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    ZERO_ABLATION_FIELD_NUMBER: _ClassVar[int]
    MEAN_ABLATION_FIELD_NUMBER: _ClassVar[int]
    ADD_ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    SCALE_ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    PROJECT_OUT_FIELD_NUMBER: _ClassVar[int]
    PATCH_HEAD_FIELD_NUMBER: _ClassVar[int]
    BLOCK_ATTENTION_FIELD_NUMBER: _ClassVar[int]
    SET_ATTENTION_MASK_FIELD_NUMBER: _ClassVar[int]
    hook: str
    positions: _inputs_pb2.Positions
    heads: _inputs_pb2.Heads
    patch_activation: PatchActivation
    zero_ablation: ZeroAblation
    mean_ablation: MeanAblation
    add_activation: AddActivation
    scale_activation: ScaleActivation
    project_out: ProjectOut
    patch_head: PatchHead
    block_attention: BlockAttention
    set_attention_mask: SetAttentionMask
    def __init__(self, hook: _Optional[str] = ..., positions: _Optional[_Union[_inputs_pb2.Positions, _Mapping]] = ..., heads: _Optional[_Union[_inputs_pb2.Heads, _Mapping]] = ..., patch_activation: _Optional[_Union[PatchActivation, _Mapping]] = ..., zero_ablation: _Optional[_Union[ZeroAblation, _Mapping]] = ..., mean_ablation: _Optional[_Union[MeanAblation, _Mapping]] = ..., add_activation: _Optional[_Union[AddActivation, _Mapping]] = ..., scale_activation: _Optional[_Union[ScaleActivation, _Mapping]] = ..., project_out: _Optional[_Union[ProjectOut, _Mapping]] = ..., patch_head: _Optional[_Union[PatchHead, _Mapping]] = ..., block_attention: _Optional[_Union[BlockAttention, _Mapping]] = ..., set_attention_mask: _Optional[_Union[SetAttentionMask, _Mapping]] = ...) -> None: ...

class PatchActivation(_message.Message):
    __slots__ = ("value",)
    VALUE_FIELD_NUMBER: _ClassVar[int]
    value: _tensor_pb2.TensorValue
    def __init__(self, value: _Optional[_Union[_tensor_pb2.TensorValue, _Mapping]] = ...) -> None: ...

class ZeroAblation(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MeanAblation(_message.Message):
    __slots__ = ("value",)
    VALUE_FIELD_NUMBER: _ClassVar[int]
    value: _tensor_pb2.TensorValue
    def __init__(self, value: _Optional[_Union[_tensor_pb2.TensorValue, _Mapping]] = ...) -> None: ...

class AddActivation(_message.Message):
    __slots__ = ("value", "scale")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    value: _tensor_pb2.TensorValue
    scale: float
    def __init__(self, value: _Optional[_Union[_tensor_pb2.TensorValue, _Mapping]] = ..., scale: _Optional[float] = ...) -> None: ...

class ScaleActivation(_message.Message):
    __slots__ = ("factor",)
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    factor: float
    def __init__(self, factor: _Optional[float] = ...) -> None: ...

class ProjectOut(_message.Message):
    __slots__ = ("direction",)
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    direction: _tensor_pb2.TensorValue
    def __init__(self, direction: _Optional[_Union[_tensor_pb2.TensorValue, _Mapping]] = ...) -> None: ...

class PatchHead(_message.Message):
    __slots__ = ("value",)
    VALUE_FIELD_NUMBER: _ClassVar[int]
    value: _tensor_pb2.TensorValue
    def __init__(self, value: _Optional[_Union[_tensor_pb2.TensorValue, _Mapping]] = ...) -> None: ...

class BlockAttention(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _inputs_pb2.Positions
    def __init__(self, keys: _Optional[_Union[_inputs_pb2.Positions, _Mapping]] = ...) -> None: ...

class SetAttentionMask(_message.Message):
    __slots__ = ("mask",)
    MASK_FIELD_NUMBER: _ClassVar[int]
    mask: _tensor_pb2.TensorValue
    def __init__(self, mask: _Optional[_Union[_tensor_pb2.TensorValue, _Mapping]] = ...) -> None: ...
