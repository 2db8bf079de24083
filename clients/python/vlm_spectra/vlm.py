"""The interface of a model that can be looked into: the same in process (`HookedVLM`) and remote (`RemoteVLM`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, overload, runtime_checkable

from .arrays import Array
from .attribution import Attribution
from .cache import ActivationCache
from .calls import TokenLike
from .estimate import Estimate
from .hooks import HookFilter, HookSpec
from .images import ImageLike
from .info import ModelInfo
from .inputs import Inputs
from .interventions import HookedIntervention
from .lens import LogitLens
from .positions import Positions
from .progress import Report
from .results import ForwardOutput, Generation, Token
from .sweep import PatchSweep


@runtime_checkable
class VLM(Protocol):
    """What a script needs of a model; the methods' own descriptions stand in `vlm_spectra.base.BaseVLM`."""

    @property
    def info(self) -> ModelInfo:
        """The model's sizes and names."""
        ...

    def hooks(self) -> list[HookSpec]:
        """The catalogue of hook points."""
        ...

    @overload
    def prepare_messages(
        self,
        task: str,
        image: ImageLike | Sequence[ImageLike] | None = ...,
        assistant_prefill: str = ...,
        return_text: Literal[False] = ...,
        *,
        system: str = ...,
    ) -> Inputs: ...

    @overload
    def prepare_messages(
        self,
        task: str,
        image: ImageLike | Sequence[ImageLike] | None = ...,
        assistant_prefill: str = ...,
        *,
        return_text: Literal[True],
        system: str = ...,
    ) -> tuple[Inputs, str]: ...

    def prepare_messages_batch(
        self,
        tasks: Sequence[str],
        images: Sequence[ImageLike | Sequence[ImageLike] | None] | None = ...,
        assistant_prefill: str | Sequence[str] = ...,
        *,
        system: str = ...,
    ) -> Inputs:
        """A left-padded batch."""
        ...

    def generate(
        self,
        inputs: Inputs,
        max_new_tokens: int = ...,
        output_hidden_states: bool = ...,
        do_sample: bool = ...,
        temperature: float | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
        stop: str | Sequence[str] = ...,
    ) -> Generation:
        """An answer."""
        ...

    def stream(
        self,
        inputs: Inputs,
        max_new_tokens: int = ...,
        do_sample: bool = ...,
        temperature: float | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
        stop: str | Sequence[str] = ...,
    ) -> Iterator[Token]:
        """An answer's tokens as they are chosen."""
        ...

    def forward(
        self,
        inputs: Inputs,
        logits_to_keep: int | Sequence[int] | None = ...,
        output_hidden_states: bool = ...,
        output_attentions: bool = ...,
    ) -> ForwardOutput:
        """One forward pass."""
        ...

    def generate_batch(self, inputs: Inputs, max_new_tokens: int = ..., **options: Any) -> Generation:
        """An answer for every row of a batch."""
        ...

    def forward_batch(self, inputs: Inputs, **options: Any) -> ForwardOutput:
        """One forward pass over a batch."""
        ...

    def run_with_cache(
        self,
        hooks: HookFilter,
        *,
        positions: Positions = ...,
        heads: Sequence[int] | None = ...,
        dtype: Any = ...,
        compression: str = ...,
        backward_from: Any = ...,
        position: int | None = ...,
        reduce: str | None = ...,
    ) -> AbstractContextManager[ActivationCache]:
        """Capture activations of the run inside the block."""
        ...

    def estimate(
        self,
        inputs: Inputs,
        hooks: HookFilter,
        *,
        positions: Positions = ...,
        heads: Sequence[int] | None = ...,
        dtype: Any = ...,
        reduce: str | None = ...,
    ) -> Estimate:
        """What a capture would take."""
        ...

    def run_with_hooks(self, hooks: Sequence[HookedIntervention]) -> AbstractContextManager[None]:
        """Change activations of every run inside the block."""
        ...

    def run_with_progress(self, report: Report) -> AbstractContextManager[None]:
        """Be told how far every call inside the block is."""
        ...

    def logit_lens(
        self,
        inputs: Inputs,
        *,
        top_k: int = ...,
        hook: str = ...,
        layers: Sequence[int] | None = ...,
        positions: Positions = ...,
        targets: TokenLike | Sequence[TokenLike] | None = ...,
    ) -> LogitLens:
        """What each layer would answer."""
        ...

    def attribute(
        self,
        inputs: Inputs,
        method: str = ...,
        target: Any = ...,
        *,
        position: int | None = ...,
        steps: int | None = ...,
        baseline: str = ...,
        window: int | None = ...,
        stride: int | None = ...,
        against: Inputs | None = ...,
    ) -> Attribution:
        """Which parts made the answer."""
        ...

    def patch_sweep(
        self,
        clean: Inputs,
        corrupted: Inputs,
        hooks: HookFilter,
        positions: Positions = ...,
        metric: Any = ...,
        mode: str = ...,
        *,
        heads: Sequence[int] | Literal["all"] | None = ...,
        position: int | None = ...,
        on_row: Callable[[PatchSweep], object] | None = ...,
    ) -> PatchSweep:
        """Which activation, put from one run into another, moves the answer."""
        ...

    def unembed(self, tokens: TokenLike | Sequence[TokenLike]) -> Array:
        """The residual directions of tokens."""
        ...

    def close(self) -> None:
        """Let go of what the model holds."""
        ...
