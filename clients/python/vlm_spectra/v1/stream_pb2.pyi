from vlm_spectra.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_QUEUED: _ClassVar[Phase]
    PHASE_PREPARING: _ClassVar[Phase]
    PHASE_FORWARD: _ClassVar[Phase]
    PHASE_GENERATING: _ClassVar[Phase]
    PHASE_ANALYSING: _ClassVar[Phase]
PHASE_UNSPECIFIED: Phase
PHASE_QUEUED: Phase
PHASE_PREPARING: Phase
PHASE_FORWARD: Phase
PHASE_GENERATING: Phase
PHASE_ANALYSING: Phase

class Header(_message.Message):
    __slots__ = ("request_id", "model", "revision", "capture_id", "tensors")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    CAPTURE_ID_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    revision: str
    capture_id: str
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorHeader]
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., revision: _Optional[str] = ..., capture_id: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[_tensor_pb2.TensorHeader, _Mapping]]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("phase", "done", "total")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    phase: Phase
    done: int
    total: int
    def __init__(self, phase: _Optional[_Union[Phase, str]] = ..., done: _Optional[int] = ..., total: _Optional[int] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue", "prepare", "compute", "first_chunk", "total", "copy", "wire")
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    PREPARE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FIELD_NUMBER: _ClassVar[int]
    FIRST_CHUNK_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    COPY_FIELD_NUMBER: _ClassVar[int]
    WIRE_FIELD_NUMBER: _ClassVar[int]
    queue: float
    prepare: float
    compute: float
    first_chunk: float
    total: float
    copy: float
    wire: float
    def __init__(self, queue: _Optional[float] = ..., prepare: _Optional[float] = ..., compute: _Optional[float] = ..., first_chunk: _Optional[float] = ..., total: _Optional[float] = ..., copy: _Optional[float] = ..., wire: _Optional[float] = ...) -> None: ...

class Summary(_message.Message):
    __slots__ = ("tensor_count", "byte_count", "timings", "capture_id", "revision", "layers_run", "peak_memory")
    TENSOR_COUNT_FIELD_NUMBER: _ClassVar[int]
    BYTE_COUNT_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    CAPTURE_ID_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    LAYERS_RUN_FIELD_NUMBER: _ClassVar[int]
    PEAK_MEMORY_FIELD_NUMBER: _ClassVar[int]
    tensor_count: int
    byte_count: int
    timings: Timings
    capture_id: str
    revision: str
    layers_run: int
    peak_memory: int
    def __init__(self, tensor_count: _Optional[int] = ..., byte_count: _Optional[int] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., capture_id: _Optional[str] = ..., revision: _Optional[str] = ..., layers_run: _Optional[int] = ..., peak_memory: _Optional[int] = ...) -> None: ...
