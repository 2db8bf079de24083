from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class NamedPositions(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NAMED_POSITIONS_UNSPECIFIED: _ClassVar[NamedPositions]
    NAMED_POSITIONS_LAST: _ClassVar[NamedPositions]
    NAMED_POSITIONS_IMAGE: _ClassVar[NamedPositions]
    NAMED_POSITIONS_TEXT: _ClassVar[NamedPositions]
NAMED_POSITIONS_UNSPECIFIED: NamedPositions
NAMED_POSITIONS_LAST: NamedPositions
NAMED_POSITIONS_IMAGE: NamedPositions
NAMED_POSITIONS_TEXT: NamedPositions

class Prompt(_message.Message):
    __slots__ = ("task", "images", "assistant_prefill", "system")
    TASK_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    ASSISTANT_PREFILL_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_FIELD_NUMBER: _ClassVar[int]
    task: str
    images: _containers.RepeatedScalarFieldContainer[str]
    assistant_prefill: str
    system: str
    def __init__(self, task: _Optional[str] = ..., images: _Optional[_Iterable[str]] = ..., assistant_prefill: _Optional[str] = ..., system: _Optional[str] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("sha256", "data")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    data: bytes
    def __init__(self, sha256: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class Size(_message.Message):
    __slots__ = ("width", "height")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...

class ImageLayout(_message.Message):
    __slots__ = ("row", "original", "processed", "grid_height", "grid_width", "positions", "tiles", "patch_rows", "patch_columns")
    ROW_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_FIELD_NUMBER: _ClassVar[int]
    PROCESSED_FIELD_NUMBER: _ClassVar[int]
    GRID_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    GRID_WIDTH_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    TILES_FIELD_NUMBER: _ClassVar[int]
    PATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    PATCH_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    row: int
    original: Size
    processed: Size
    grid_height: int
    grid_width: int
    positions: _containers.RepeatedScalarFieldContainer[int]
    tiles: _containers.RepeatedCompositeFieldContainer[ImageTile]
    patch_rows: _containers.RepeatedScalarFieldContainer[int]
    patch_columns: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, row: _Optional[int] = ..., original: _Optional[_Union[Size, _Mapping]] = ..., processed: _Optional[_Union[Size, _Mapping]] = ..., grid_height: _Optional[int] = ..., grid_width: _Optional[int] = ..., positions: _Optional[_Iterable[int]] = ..., tiles: _Optional[_Iterable[_Union[ImageTile, _Mapping]]] = ..., patch_rows: _Optional[_Iterable[int]] = ..., patch_columns: _Optional[_Iterable[int]] = ...) -> None: ...

class ImageTile(_message.Message):
    __slots__ = ("grid_height", "grid_width", "box", "positions", "first_row", "first_column", "overview", "resampled")
    GRID_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    GRID_WIDTH_FIELD_NUMBER: _ClassVar[int]
    BOX_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    FIRST_COLUMN_FIELD_NUMBER: _ClassVar[int]
    OVERVIEW_FIELD_NUMBER: _ClassVar[int]
    RESAMPLED_FIELD_NUMBER: _ClassVar[int]
    grid_height: int
    grid_width: int
    box: Box
    positions: _containers.RepeatedScalarFieldContainer[int]
    first_row: int
    first_column: int
    overview: bool
    resampled: bool
    def __init__(self, grid_height: _Optional[int] = ..., grid_width: _Optional[int] = ..., box: _Optional[_Union[Box, _Mapping]] = ..., positions: _Optional[_Iterable[int]] = ..., first_row: _Optional[int] = ..., first_column: _Optional[int] = ..., overview: _Optional[bool] = ..., resampled: _Optional[bool] = ...) -> None: ...

class Box(_message.Message):
    __slots__ = ("left", "top", "right", "bottom")
    LEFT_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    RIGHT_FIELD_NUMBER: _ClassVar[int]
    BOTTOM_FIELD_NUMBER: _ClassVar[int]
    left: float
    top: float
    right: float
    bottom: float
    def __init__(self, left: _Optional[float] = ..., top: _Optional[float] = ..., right: _Optional[float] = ..., bottom: _Optional[float] = ...) -> None: ...

class PreparedRow(_message.Message):
    __slots__ = ("input_ids", "attention_mask", "token_labels", "text")
    INPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_MASK_FIELD_NUMBER: _ClassVar[int]
    TOKEN_LABELS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    input_ids: _containers.RepeatedScalarFieldContainer[int]
    attention_mask: _containers.RepeatedScalarFieldContainer[int]
    token_labels: _containers.RepeatedScalarFieldContainer[str]
    text: str
    def __init__(self, input_ids: _Optional[_Iterable[int]] = ..., attention_mask: _Optional[_Iterable[int]] = ..., token_labels: _Optional[_Iterable[str]] = ..., text: _Optional[str] = ...) -> None: ...

class Position(_message.Message):
    __slots__ = ("index", "slice", "named")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SLICE_FIELD_NUMBER: _ClassVar[int]
    NAMED_FIELD_NUMBER: _ClassVar[int]
    index: int
    slice: Slice
    named: NamedPositions
    def __init__(self, index: _Optional[int] = ..., slice: _Optional[_Union[Slice, _Mapping]] = ..., named: _Optional[_Union[NamedPositions, str]] = ...) -> None: ...

class Slice(_message.Message):
    __slots__ = ("start", "stop", "step")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    start: int
    stop: int
    step: int
    def __init__(self, start: _Optional[int] = ..., stop: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class Positions(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[Position]
    def __init__(self, items: _Optional[_Iterable[_Union[Position, _Mapping]]] = ...) -> None: ...

class Heads(_message.Message):
    __slots__ = ("indices",)
    INDICES_FIELD_NUMBER: _ClassVar[int]
    indices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, indices: _Optional[_Iterable[int]] = ...) -> None: ...
