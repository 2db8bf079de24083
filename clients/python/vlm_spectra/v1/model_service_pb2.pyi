from vlm_spectra.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ModelState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_STATE_UNSPECIFIED: _ClassVar[ModelState]
    MODEL_STATE_LOADING: _ClassVar[ModelState]
    MODEL_STATE_READY: _ClassVar[ModelState]
    MODEL_STATE_FAILED: _ClassVar[ModelState]
    MODEL_STATE_RESTARTING: _ClassVar[ModelState]

class CoordinateSystem(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COORDINATE_SYSTEM_UNSPECIFIED: _ClassVar[CoordinateSystem]
    COORDINATE_SYSTEM_PROCESSED_PIXELS: _ClassVar[CoordinateSystem]
    COORDINATE_SYSTEM_THOUSANDTHS: _ClassVar[CoordinateSystem]
MODEL_STATE_UNSPECIFIED: ModelState
MODEL_STATE_LOADING: ModelState
MODEL_STATE_READY: ModelState
MODEL_STATE_FAILED: ModelState
MODEL_STATE_RESTARTING: ModelState
COORDINATE_SYSTEM_UNSPECIFIED: CoordinateSystem
COORDINATE_SYSTEM_PROCESSED_PIXELS: CoordinateSystem
COORDINATE_SYSTEM_THOUSANDTHS: CoordinateSystem

class ModelInfo(_message.Message):
    __slots__ = ("family", "layers", "heads", "kv_heads", "head_dim", "hidden", "mlp", "vocab", "vision_layers", "vision_heads", "vision_hidden", "patch_size", "merge_size", "image_token_id", "context", "dtype", "revision", "attention", "device", "parameters", "coordinates", "norm_eps", "norm_centers", "scales_outputs", "stream_scales")
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    MLP_FIELD_NUMBER: _ClassVar[int]
    VOCAB_FIELD_NUMBER: _ClassVar[int]
    VISION_LAYERS_FIELD_NUMBER: _ClassVar[int]
    VISION_HEADS_FIELD_NUMBER: _ClassVar[int]
    VISION_HIDDEN_FIELD_NUMBER: _ClassVar[int]
    PATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    MERGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    COORDINATES_FIELD_NUMBER: _ClassVar[int]
    NORM_EPS_FIELD_NUMBER: _ClassVar[int]
    NORM_CENTERS_FIELD_NUMBER: _ClassVar[int]
    SCALES_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    STREAM_SCALES_FIELD_NUMBER: _ClassVar[int]
    family: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    mlp: int
    vocab: int
    vision_layers: int
    vision_heads: int
    vision_hidden: int
    patch_size: int
    merge_size: int
    image_token_id: int
    context: int
    dtype: _tensor_pb2.Dtype
    revision: str
    attention: str
    device: str
    parameters: int
    coordinates: CoordinateSystem
    norm_eps: float
    norm_centers: bool
    scales_outputs: bool
    stream_scales: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, family: _Optional[str] = ..., layers: _Optional[int] = ..., heads: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., hidden: _Optional[int] = ..., mlp: _Optional[int] = ..., vocab: _Optional[int] = ..., vision_layers: _Optional[int] = ..., vision_heads: _Optional[int] = ..., vision_hidden: _Optional[int] = ..., patch_size: _Optional[int] = ..., merge_size: _Optional[int] = ..., image_token_id: _Optional[int] = ..., context: _Optional[int] = ..., dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., revision: _Optional[str] = ..., attention: _Optional[str] = ..., device: _Optional[str] = ..., parameters: _Optional[int] = ..., coordinates: _Optional[_Union[CoordinateSystem, str]] = ..., norm_eps: _Optional[float] = ..., norm_centers: _Optional[bool] = ..., scales_outputs: _Optional[bool] = ..., stream_scales: _Optional[_Iterable[float]] = ...) -> None: ...

class HookSpec(_message.Message):
    __slots__ = ("name", "shape", "dtype", "description", "layers", "intervene_only")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    INTERVENE_ONLY_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[str]
    dtype: _tensor_pb2.Dtype
    description: str
    layers: _containers.RepeatedScalarFieldContainer[int]
    intervene_only: bool
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[str]] = ..., dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., description: _Optional[str] = ..., layers: _Optional[_Iterable[int]] = ..., intervene_only: _Optional[bool] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "state", "error", "info", "hooks", "progress", "memory")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    HOOKS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: ModelState
    error: str
    info: ModelInfo
    hooks: _containers.RepeatedCompositeFieldContainer[HookSpec]
    progress: float
    memory: int
    def __init__(self, name: _Optional[str] = ..., state: _Optional[_Union[ModelState, str]] = ..., error: _Optional[str] = ..., info: _Optional[_Union[ModelInfo, _Mapping]] = ..., hooks: _Optional[_Iterable[_Union[HookSpec, _Mapping]]] = ..., progress: _Optional[float] = ..., memory: _Optional[int] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models", "loadable", "crc32c")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    LOADABLE_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    loadable: _containers.RepeatedScalarFieldContainer[str]
    crc32c: int
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., loadable: _Optional[_Iterable[str]] = ..., crc32c: _Optional[int] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("name", "include_vocabulary")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    name: str
    include_vocabulary: bool
    def __init__(self, name: _Optional[str] = ..., include_vocabulary: _Optional[bool] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model", "vocabulary", "local_socket", "crc32c")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    LOCAL_SOCKET_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    model: Model
    vocabulary: _containers.RepeatedScalarFieldContainer[str]
    local_socket: str
    crc32c: int
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ..., vocabulary: _Optional[_Iterable[str]] = ..., local_socket: _Optional[str] = ..., crc32c: _Optional[int] = ...) -> None: ...

class LoadModelRequest(_message.Message):
    __slots__ = ("name", "dtype", "device", "attention")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: _tensor_pb2.Dtype
    device: str
    attention: str
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., device: _Optional[str] = ..., attention: _Optional[str] = ...) -> None: ...

class LoadModelResponse(_message.Message):
    __slots__ = ("model", "crc32c")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    model: Model
    crc32c: int
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ..., crc32c: _Optional[int] = ...) -> None: ...

class UnloadModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnloadModelResponse(_message.Message):
    __slots__ = ("crc32c",)
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    crc32c: int
    def __init__(self, crc32c: _Optional[int] = ...) -> None: ...
