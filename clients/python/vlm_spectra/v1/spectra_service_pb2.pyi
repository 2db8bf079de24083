from vlm_spectra.v1 import inputs_pb2 as _inputs_pb2
from vlm_spectra.v1 import intervention_pb2 as _intervention_pb2
from vlm_spectra.v1 import stream_pb2 as _stream_pb2
from vlm_spectra.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Reduction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REDUCTION_UNSPECIFIED: _ClassVar[Reduction]
    REDUCTION_MEAN_HEADS: _ClassVar[Reduction]
    REDUCTION_NORM: _ClassVar[Reduction]

class AttributionMethod(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ATTRIBUTION_METHOD_UNSPECIFIED: _ClassVar[AttributionMethod]
    ATTRIBUTION_METHOD_DIRECT_LOGIT: _ClassVar[AttributionMethod]
    ATTRIBUTION_METHOD_GRADIENT_X_INPUT: _ClassVar[AttributionMethod]
    ATTRIBUTION_METHOD_INTEGRATED_GRADIENTS: _ClassVar[AttributionMethod]
    ATTRIBUTION_METHOD_OCCLUSION: _ClassVar[AttributionMethod]
    ATTRIBUTION_METHOD_ATTENTION_ROLLOUT: _ClassVar[AttributionMethod]
    ATTRIBUTION_METHOD_RELEVANCY: _ClassVar[AttributionMethod]
    ATTRIBUTION_METHOD_GRAD_CAM: _ClassVar[AttributionMethod]
    ATTRIBUTION_METHOD_ATTRIBUTION_PATCHING: _ClassVar[AttributionMethod]

class Baseline(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BASELINE_UNSPECIFIED: _ClassVar[Baseline]
    BASELINE_MEAN: _ClassVar[Baseline]
    BASELINE_BLACK: _ClassVar[Baseline]
    BASELINE_BLURRED: _ClassVar[Baseline]

class PatchMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PATCH_MODE_UNSPECIFIED: _ClassVar[PatchMode]
    PATCH_MODE_DENOISING: _ClassVar[PatchMode]
    PATCH_MODE_NOISING: _ClassVar[PatchMode]
REDUCTION_UNSPECIFIED: Reduction
REDUCTION_MEAN_HEADS: Reduction
REDUCTION_NORM: Reduction
ATTRIBUTION_METHOD_UNSPECIFIED: AttributionMethod
ATTRIBUTION_METHOD_DIRECT_LOGIT: AttributionMethod
ATTRIBUTION_METHOD_GRADIENT_X_INPUT: AttributionMethod
ATTRIBUTION_METHOD_INTEGRATED_GRADIENTS: AttributionMethod
ATTRIBUTION_METHOD_OCCLUSION: AttributionMethod
ATTRIBUTION_METHOD_ATTENTION_ROLLOUT: AttributionMethod
ATTRIBUTION_METHOD_RELEVANCY: AttributionMethod
ATTRIBUTION_METHOD_GRAD_CAM: AttributionMethod
ATTRIBUTION_METHOD_ATTRIBUTION_PATCHING: AttributionMethod
BASELINE_UNSPECIFIED: Baseline
BASELINE_MEAN: Baseline
BASELINE_BLACK: Baseline
BASELINE_BLURRED: Baseline
PATCH_MODE_UNSPECIFIED: PatchMode
PATCH_MODE_DENOISING: PatchMode
PATCH_MODE_NOISING: PatchMode

class PrepareRequest(_message.Message):
    __slots__ = ("model", "prompts", "images")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompts: _containers.RepeatedCompositeFieldContainer[_inputs_pb2.Prompt]
    images: _containers.RepeatedCompositeFieldContainer[_inputs_pb2.Image]
    def __init__(self, model: _Optional[str] = ..., prompts: _Optional[_Iterable[_Union[_inputs_pb2.Prompt, _Mapping]]] = ..., images: _Optional[_Iterable[_Union[_inputs_pb2.Image, _Mapping]]] = ...) -> None: ...

class PrepareResponse(_message.Message):
    __slots__ = ("rows", "images", "missing_images", "crc32c")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    MISSING_IMAGES_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[_inputs_pb2.PreparedRow]
    images: _containers.RepeatedCompositeFieldContainer[_inputs_pb2.ImageLayout]
    missing_images: _containers.RepeatedScalarFieldContainer[str]
    crc32c: int
    def __init__(self, rows: _Optional[_Iterable[_Union[_inputs_pb2.PreparedRow, _Mapping]]] = ..., images: _Optional[_Iterable[_Union[_inputs_pb2.ImageLayout, _Mapping]]] = ..., missing_images: _Optional[_Iterable[str]] = ..., crc32c: _Optional[int] = ...) -> None: ...

class GenerateOptions(_message.Message):
    __slots__ = ("max_new_tokens", "do_sample", "temperature", "top_p", "seed", "stop", "output_hidden_states")
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DO_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_p: float
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    output_hidden_states: bool
    def __init__(self, max_new_tokens: _Optional[int] = ..., do_sample: _Optional[bool] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., output_hidden_states: _Optional[bool] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("model", "prompts", "options", "interventions")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    INTERVENTIONS_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompts: _containers.RepeatedCompositeFieldContainer[_inputs_pb2.Prompt]
    options: GenerateOptions
    interventions: _containers.RepeatedCompositeFieldContainer[_intervention_pb2.Intervention]
    def __init__(self, model: _Optional[str] = ..., prompts: _Optional[_Iterable[_Union[_inputs_pb2.Prompt, _Mapping]]] = ..., options: _Optional[_Union[GenerateOptions, _Mapping]] = ..., interventions: _Optional[_Iterable[_Union[_intervention_pb2.Intervention, _Mapping]]] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("row", "index", "id", "text", "logprob")
    ROW_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    row: int
    index: int
    id: int
    text: str
    logprob: float
    def __init__(self, row: _Optional[int] = ..., index: _Optional[int] = ..., id: _Optional[int] = ..., text: _Optional[str] = ..., logprob: _Optional[float] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("header", "progress", "token", "summary", "chunk", "crc32c")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    header: _stream_pb2.Header
    progress: _stream_pb2.Progress
    token: Token
    summary: _stream_pb2.Summary
    chunk: _tensor_pb2.TensorChunk
    crc32c: int
    def __init__(self, header: _Optional[_Union[_stream_pb2.Header, _Mapping]] = ..., progress: _Optional[_Union[_stream_pb2.Progress, _Mapping]] = ..., token: _Optional[_Union[Token, _Mapping]] = ..., summary: _Optional[_Union[_stream_pb2.Summary, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.TensorChunk, _Mapping]] = ..., crc32c: _Optional[int] = ...) -> None: ...

class ForwardOptions(_message.Message):
    __slots__ = ("logits_to_keep", "output_hidden_states", "output_attentions")
    LOGITS_TO_KEEP_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_ATTENTIONS_FIELD_NUMBER: _ClassVar[int]
    logits_to_keep: LogitsToKeep
    output_hidden_states: bool
    output_attentions: bool
    def __init__(self, logits_to_keep: _Optional[_Union[LogitsToKeep, _Mapping]] = ..., output_hidden_states: _Optional[bool] = ..., output_attentions: _Optional[bool] = ...) -> None: ...

class LogitsToKeep(_message.Message):
    __slots__ = ("last", "positions")
    LAST_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    last: int
    positions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, last: _Optional[int] = ..., positions: _Optional[_Iterable[int]] = ...) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("model", "prompts", "options", "interventions")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    INTERVENTIONS_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompts: _containers.RepeatedCompositeFieldContainer[_inputs_pb2.Prompt]
    options: ForwardOptions
    interventions: _containers.RepeatedCompositeFieldContainer[_intervention_pb2.Intervention]
    def __init__(self, model: _Optional[str] = ..., prompts: _Optional[_Iterable[_Union[_inputs_pb2.Prompt, _Mapping]]] = ..., options: _Optional[_Union[ForwardOptions, _Mapping]] = ..., interventions: _Optional[_Iterable[_Union[_intervention_pb2.Intervention, _Mapping]]] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("header", "progress", "summary", "chunk", "crc32c")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    header: _stream_pb2.Header
    progress: _stream_pb2.Progress
    summary: _stream_pb2.Summary
    chunk: _tensor_pb2.TensorChunk
    crc32c: int
    def __init__(self, header: _Optional[_Union[_stream_pb2.Header, _Mapping]] = ..., progress: _Optional[_Union[_stream_pb2.Progress, _Mapping]] = ..., summary: _Optional[_Union[_stream_pb2.Summary, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.TensorChunk, _Mapping]] = ..., crc32c: _Optional[int] = ...) -> None: ...

class CaptureSelection(_message.Message):
    __slots__ = ("hooks", "positions", "heads", "dtype", "reduction", "compression")
    HOOKS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    REDUCTION_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    hooks: _containers.RepeatedScalarFieldContainer[str]
    positions: _inputs_pb2.Positions
    heads: _inputs_pb2.Heads
    dtype: _tensor_pb2.Dtype
    reduction: Reduction
    compression: _tensor_pb2.Compression
    def __init__(self, hooks: _Optional[_Iterable[str]] = ..., positions: _Optional[_Union[_inputs_pb2.Positions, _Mapping]] = ..., heads: _Optional[_Union[_inputs_pb2.Heads, _Mapping]] = ..., dtype: _Optional[_Union[_tensor_pb2.Dtype, str]] = ..., reduction: _Optional[_Union[Reduction, str]] = ..., compression: _Optional[_Union[_tensor_pb2.Compression, str]] = ...) -> None: ...

class Target(_message.Message):
    __slots__ = ("token", "minus", "position", "answer")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    MINUS_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    token: TokenReference
    minus: TokenReference
    position: int
    answer: str
    def __init__(self, token: _Optional[_Union[TokenReference, _Mapping]] = ..., minus: _Optional[_Union[TokenReference, _Mapping]] = ..., position: _Optional[int] = ..., answer: _Optional[str] = ...) -> None: ...

class TokenReference(_message.Message):
    __slots__ = ("id", "text")
    ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    id: int
    text: str
    def __init__(self, id: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...

class RunWithCacheRequest(_message.Message):
    __slots__ = ("run", "resume")
    RUN_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    run: CaptureRun
    resume: CaptureResume
    def __init__(self, run: _Optional[_Union[CaptureRun, _Mapping]] = ..., resume: _Optional[_Union[CaptureResume, _Mapping]] = ...) -> None: ...

class CaptureRun(_message.Message):
    __slots__ = ("model", "prompts", "selection", "interventions", "forward", "generate", "backward_from", "linger_seconds", "shared_memory")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    INTERVENTIONS_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FROM_FIELD_NUMBER: _ClassVar[int]
    LINGER_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompts: _containers.RepeatedCompositeFieldContainer[_inputs_pb2.Prompt]
    selection: CaptureSelection
    interventions: _containers.RepeatedCompositeFieldContainer[_intervention_pb2.Intervention]
    forward: ForwardOptions
    generate: GenerateOptions
    backward_from: Target
    linger_seconds: int
    shared_memory: bool
    def __init__(self, model: _Optional[str] = ..., prompts: _Optional[_Iterable[_Union[_inputs_pb2.Prompt, _Mapping]]] = ..., selection: _Optional[_Union[CaptureSelection, _Mapping]] = ..., interventions: _Optional[_Iterable[_Union[_intervention_pb2.Intervention, _Mapping]]] = ..., forward: _Optional[_Union[ForwardOptions, _Mapping]] = ..., generate: _Optional[_Union[GenerateOptions, _Mapping]] = ..., backward_from: _Optional[_Union[Target, _Mapping]] = ..., linger_seconds: _Optional[int] = ..., shared_memory: _Optional[bool] = ...) -> None: ...

class CaptureResume(_message.Message):
    __slots__ = ("capture_id", "offsets", "shared_memory")
    CAPTURE_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    capture_id: str
    offsets: _containers.RepeatedCompositeFieldContainer[TensorOffset]
    shared_memory: bool
    def __init__(self, capture_id: _Optional[str] = ..., offsets: _Optional[_Iterable[_Union[TensorOffset, _Mapping]]] = ..., shared_memory: _Optional[bool] = ...) -> None: ...

class ReleaseCaptureRequest(_message.Message):
    __slots__ = ("capture_id",)
    CAPTURE_ID_FIELD_NUMBER: _ClassVar[int]
    capture_id: str
    def __init__(self, capture_id: _Optional[str] = ...) -> None: ...

class ReleaseCaptureResponse(_message.Message):
    __slots__ = ("crc32c",)
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    crc32c: int
    def __init__(self, crc32c: _Optional[int] = ...) -> None: ...

class TensorOffset(_message.Message):
    __slots__ = ("index", "offset")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    index: int
    offset: int
    def __init__(self, index: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class EstimateRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: CaptureRun
    def __init__(self, run: _Optional[_Union[CaptureRun, _Mapping]] = ...) -> None: ...

class EstimateResponse(_message.Message):
    __slots__ = ("tensors", "byte_count", "compute_seconds", "crc32c")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    BYTE_COUNT_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorHeader]
    byte_count: int
    compute_seconds: float
    crc32c: int
    def __init__(self, tensors: _Optional[_Iterable[_Union[_tensor_pb2.TensorHeader, _Mapping]]] = ..., byte_count: _Optional[int] = ..., compute_seconds: _Optional[float] = ..., crc32c: _Optional[int] = ...) -> None: ...

class RunWithCacheResponse(_message.Message):
    __slots__ = ("header", "progress", "token", "summary", "ready", "chunk", "crc32c")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    header: _stream_pb2.Header
    progress: _stream_pb2.Progress
    token: Token
    summary: _stream_pb2.Summary
    ready: _tensor_pb2.TensorReady
    chunk: _tensor_pb2.TensorChunk
    crc32c: int
    def __init__(self, header: _Optional[_Union[_stream_pb2.Header, _Mapping]] = ..., progress: _Optional[_Union[_stream_pb2.Progress, _Mapping]] = ..., token: _Optional[_Union[Token, _Mapping]] = ..., summary: _Optional[_Union[_stream_pb2.Summary, _Mapping]] = ..., ready: _Optional[_Union[_tensor_pb2.TensorReady, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.TensorChunk, _Mapping]] = ..., crc32c: _Optional[int] = ...) -> None: ...

class LogitLensRequest(_message.Message):
    __slots__ = ("model", "prompts", "interventions", "hook", "layers", "positions", "top_k", "targets")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    INTERVENTIONS_FIELD_NUMBER: _ClassVar[int]
    HOOK_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompts: _containers.RepeatedCompositeFieldContainer[_inputs_pb2.Prompt]
    interventions: _containers.RepeatedCompositeFieldContainer[_intervention_pb2.Intervention]
    hook: str
    layers: _containers.RepeatedScalarFieldContainer[int]
    positions: _inputs_pb2.Positions
    top_k: int
    targets: _containers.RepeatedCompositeFieldContainer[TokenReference]
    def __init__(self, model: _Optional[str] = ..., prompts: _Optional[_Iterable[_Union[_inputs_pb2.Prompt, _Mapping]]] = ..., interventions: _Optional[_Iterable[_Union[_intervention_pb2.Intervention, _Mapping]]] = ..., hook: _Optional[str] = ..., layers: _Optional[_Iterable[int]] = ..., positions: _Optional[_Union[_inputs_pb2.Positions, _Mapping]] = ..., top_k: _Optional[int] = ..., targets: _Optional[_Iterable[_Union[TokenReference, _Mapping]]] = ...) -> None: ...

class LogitLensResponse(_message.Message):
    __slots__ = ("header", "progress", "summary", "chunk", "crc32c")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    header: _stream_pb2.Header
    progress: _stream_pb2.Progress
    summary: _stream_pb2.Summary
    chunk: _tensor_pb2.TensorChunk
    crc32c: int
    def __init__(self, header: _Optional[_Union[_stream_pb2.Header, _Mapping]] = ..., progress: _Optional[_Union[_stream_pb2.Progress, _Mapping]] = ..., summary: _Optional[_Union[_stream_pb2.Summary, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.TensorChunk, _Mapping]] = ..., crc32c: _Optional[int] = ...) -> None: ...

class AttributeRequest(_message.Message):
    __slots__ = ("model", "prompts", "interventions", "method", "target", "steps", "baseline", "corrupted", "window", "stride")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    INTERVENTIONS_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    BASELINE_FIELD_NUMBER: _ClassVar[int]
    CORRUPTED_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    STRIDE_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompts: _containers.RepeatedCompositeFieldContainer[_inputs_pb2.Prompt]
    interventions: _containers.RepeatedCompositeFieldContainer[_intervention_pb2.Intervention]
    method: AttributionMethod
    target: Target
    steps: int
    baseline: Baseline
    corrupted: _containers.RepeatedCompositeFieldContainer[_inputs_pb2.Prompt]
    window: int
    stride: int
    def __init__(self, model: _Optional[str] = ..., prompts: _Optional[_Iterable[_Union[_inputs_pb2.Prompt, _Mapping]]] = ..., interventions: _Optional[_Iterable[_Union[_intervention_pb2.Intervention, _Mapping]]] = ..., method: _Optional[_Union[AttributionMethod, str]] = ..., target: _Optional[_Union[Target, _Mapping]] = ..., steps: _Optional[int] = ..., baseline: _Optional[_Union[Baseline, str]] = ..., corrupted: _Optional[_Iterable[_Union[_inputs_pb2.Prompt, _Mapping]]] = ..., window: _Optional[int] = ..., stride: _Optional[int] = ...) -> None: ...

class AttributeResponse(_message.Message):
    __slots__ = ("header", "progress", "summary", "chunk", "crc32c")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    header: _stream_pb2.Header
    progress: _stream_pb2.Progress
    summary: _stream_pb2.Summary
    chunk: _tensor_pb2.TensorChunk
    crc32c: int
    def __init__(self, header: _Optional[_Union[_stream_pb2.Header, _Mapping]] = ..., progress: _Optional[_Union[_stream_pb2.Progress, _Mapping]] = ..., summary: _Optional[_Union[_stream_pb2.Summary, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.TensorChunk, _Mapping]] = ..., crc32c: _Optional[int] = ...) -> None: ...

class PatchSweepRequest(_message.Message):
    __slots__ = ("model", "prompts", "corrupted", "interventions", "hooks", "positions", "heads", "metric", "mode")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    CORRUPTED_FIELD_NUMBER: _ClassVar[int]
    INTERVENTIONS_FIELD_NUMBER: _ClassVar[int]
    HOOKS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompts: _containers.RepeatedCompositeFieldContainer[_inputs_pb2.Prompt]
    corrupted: _containers.RepeatedCompositeFieldContainer[_inputs_pb2.Prompt]
    interventions: _containers.RepeatedCompositeFieldContainer[_intervention_pb2.Intervention]
    hooks: _containers.RepeatedScalarFieldContainer[str]
    positions: _inputs_pb2.Positions
    heads: _inputs_pb2.Heads
    metric: Target
    mode: PatchMode
    def __init__(self, model: _Optional[str] = ..., prompts: _Optional[_Iterable[_Union[_inputs_pb2.Prompt, _Mapping]]] = ..., corrupted: _Optional[_Iterable[_Union[_inputs_pb2.Prompt, _Mapping]]] = ..., interventions: _Optional[_Iterable[_Union[_intervention_pb2.Intervention, _Mapping]]] = ..., hooks: _Optional[_Iterable[str]] = ..., positions: _Optional[_Union[_inputs_pb2.Positions, _Mapping]] = ..., heads: _Optional[_Union[_inputs_pb2.Heads, _Mapping]] = ..., metric: _Optional[_Union[Target, _Mapping]] = ..., mode: _Optional[_Union[PatchMode, str]] = ...) -> None: ...

class PatchSweepResponse(_message.Message):
    __slots__ = ("header", "progress", "summary", "chunk", "crc32c")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    header: _stream_pb2.Header
    progress: _stream_pb2.Progress
    summary: _stream_pb2.Summary
    chunk: _tensor_pb2.TensorChunk
    crc32c: int
    def __init__(self, header: _Optional[_Union[_stream_pb2.Header, _Mapping]] = ..., progress: _Optional[_Union[_stream_pb2.Progress, _Mapping]] = ..., summary: _Optional[_Union[_stream_pb2.Summary, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.TensorChunk, _Mapping]] = ..., crc32c: _Optional[int] = ...) -> None: ...

class GetUnembeddingRequest(_message.Message):
    __slots__ = ("model", "tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    tokens: _containers.RepeatedCompositeFieldContainer[TokenReference]
    def __init__(self, model: _Optional[str] = ..., tokens: _Optional[_Iterable[_Union[TokenReference, _Mapping]]] = ...) -> None: ...

class GetUnembeddingResponse(_message.Message):
    __slots__ = ("header", "progress", "summary", "chunk", "crc32c")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    header: _stream_pb2.Header
    progress: _stream_pb2.Progress
    summary: _stream_pb2.Summary
    chunk: _tensor_pb2.TensorChunk
    crc32c: int
    def __init__(self, header: _Optional[_Union[_stream_pb2.Header, _Mapping]] = ..., progress: _Optional[_Union[_stream_pb2.Progress, _Mapping]] = ..., summary: _Optional[_Union[_stream_pb2.Summary, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.TensorChunk, _Mapping]] = ..., crc32c: _Optional[int] = ...) -> None: ...
