"""The two ways a model runs: one forward pass, and a generation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.logits_process import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper
from vlm_spectra.calls import GenerateOptions
from vlm_spectra.errors import InvalidInputError
from vlm_spectra.results import Token

from .inputs import HookedInputs
from .reading import Reading
from .run import Run, StopForward


def forward(
    reading: Reading,
    tensors: Mapping[str, torch.Tensor],
    run: Run,
    logits_to_keep: int | tuple[int, ...] | None,
) -> torch.Tensor | None:
    """One forward pass over a whole sequence.

    Args:
        reading: The model.
        tensors: Its inputs.
        run: Captures and interventions.
        logits_to_keep: As `vlm_spectra.calls.ForwardOptions` has it.

    Returns:
        Logits [batch, kept, vocab], or None where none were asked for.
    """
    keep: Any = _checked(logits_to_keep, tensors["input_ids"].shape[1])
    if isinstance(keep, tuple):
        keep = torch.tensor(keep, device=reading.device)
    run.needs_output = logits_to_keep is not None
    with run.active():
        try:
            logits = _logits(reading, tensors, 1 if keep is None else keep)
        except StopForward:
            return None
    return None if keep is None else logits


def _logits(reading: Reading, tensors: Mapping[str, torch.Tensor], keep: int | torch.Tensor) -> torch.Tensor:
    """The logits to keep of a pass; some models give those of every position whatever they are asked for."""
    logits: torch.Tensor = reading.model(**_placed(reading, tensors), use_cache=False, logits_to_keep=keep).logits
    if isinstance(keep, torch.Tensor):
        return logits if logits.shape[1] == len(keep) else logits.index_select(1, keep.to(logits.device))
    return logits[:, -keep:] if 0 < keep < logits.shape[1] else logits


def _checked(logits_to_keep: int | tuple[int, ...] | None, length: int) -> int | tuple[int, ...] | None:
    """What logits to keep of a prompt, positions counted from its start."""
    if isinstance(logits_to_keep, int) and logits_to_keep > length:
        raise InvalidInputError(
            f"logits_to_keep is {logits_to_keep}, but the prompt has {length} positions; 0 keeps all.",
            field="logits_to_keep",
        )
    if isinstance(logits_to_keep, tuple):
        if any(not -length <= position < length for position in logits_to_keep):
            raise InvalidInputError(
                f"logits_to_keep names positions {list(logits_to_keep)}; the prompt has 0 to {length - 1}.",
                field="logits_to_keep",
            )
        return tuple(position % length for position in logits_to_keep)
    return logits_to_keep


@dataclass(frozen=True)
class Scalar:
    """A number of each row's output, whose gradient is asked for.

    Attributes:
        columns: [batch][n] the positions whose logits it needs.
        value: Logits [batch, n, vocab] there to [batch] float32, differentiable.
    """

    columns: Sequence[Sequence[int]]
    value: Callable[[torch.Tensor], torch.Tensor]


def forward_and_backward(
    reading: Reading,
    tensors: Mapping[str, torch.Tensor],
    run: Run,
    logits_to_keep: int | tuple[int, ...] | None,
    scalar: Scalar,
) -> torch.Tensor | None:
    """One forward pass with autograd on, then one backward pass from a scalar: `run.gradients` get to the run's sink.

    The graph begins at the first activation whose gradient is asked for, and is gone afterwards. Rows do not depend on
    each other, so the gradient of the sum over rows is each row's own.

    Args:
        reading: The model.
        tensors: Its inputs.
        run: Captures, gradients and interventions.
        logits_to_keep: As `vlm_spectra.calls.ForwardOptions` has it.
        scalar: Where the backward pass begins.

    Returns:
        Logits [batch, kept, vocab], or None where none were asked for.
    """
    length = tensors["input_ids"].shape[1]
    wanted = _checked(logits_to_keep, length)
    if isinstance(wanted, int):
        wanted = tuple(range(length - (wanted or length), length))
    columns = sorted({*(wanted or ()), *(column for row in scalar.columns for column in row)})
    keep: Any = 0 if len(columns) == length else torch.tensor(columns, device=reading.device)
    run.needs_output = True
    try:
        with run.active(), _frozen(reading.model), torch.enable_grad():
            logits = _logits(reading, tensors, keep)
            at = torch.tensor([[columns.index(c) for c in row] for row in scalar.columns], device=logits.device)
            value = scalar.value(logits.take_along_dim(at[..., None], 1)).sum()
            run.check_traced()
            if value.requires_grad:
                torch.autograd.grad(value, run.leaves, allow_unused=True)
            run.fill_gradients()
            logits = logits.detach()
    finally:
        run.release()
    if wanted is None:
        return None
    kept = torch.tensor([columns.index(column) for column in wanted], device=logits.device)
    return logits if len(wanted) == len(columns) == length else logits.index_select(1, kept)


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """No parameter takes part in autograd; those that did do so again afterwards."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _placed(reading: Reading, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(reading.device) for name, value in tensors.items()}


@dataclass(frozen=True)
class Answer:
    """A generation's raw result.

    Attributes:
        sequences: [batch, prompt + new] ids, on the host.
        logprobs: [batch, new] float32; NaN after a row's end.
        tokens: [batch, new] bool, false after a row's end.
    """

    sequences: torch.Tensor
    logprobs: torch.Tensor
    tokens: torch.Tensor


def generate(
    reading: Reading,
    processor: Any,
    inputs: HookedInputs,
    options: GenerateOptions,
    run: Run,
    on_token: Callable[[Token], None] = lambda token: None,
) -> Answer:
    """Let the model answer, token by token, through transformers' own `generate`.

    Args:
        reading: The model.
        processor: Its processor.
        inputs: The prompt.
        options: How to choose tokens.
        run: Interventions; its `check` ends the generation between layers.
        on_token: Called with each token as it is chosen.
    """
    length = inputs.tensors["input_ids"].shape[1]
    config = copy.deepcopy(reading.model.generation_config)
    config.update(
        max_new_tokens=min(options.max_new_tokens, reading.context - length),
        max_length=None,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        use_cache=True,
    )
    ends = config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    tap = _Tap(run, processor.tokenizer, config.max_new_tokens, ends, options.stop, on_token)
    with run.active():
        sequences = reading.model.generate(
            **_placed(reading, inputs.tensors),
            generation_config=config,
            logits_processor=_sampler(options, reading.device),
            stopping_criteria=StoppingCriteriaList([tap]),
        )
    return tap.answer(sequences.cpu())


class _Tap(StoppingCriteria):
    """Sees each new token: its probability under the model, its text, whether its row ends with it."""

    def __init__(
        self,
        run: Run,
        tokenizer: Any,
        limit: int,
        ends: set[int],
        stop: Sequence[str],
        on_token: Callable[[Token], None],
    ) -> None:
        self.run, self.tokenizer, self.on_token = run, tokenizer, on_token
        self.limit, self.ends, self.stop = limit, ends, stop
        self.ids: list[list[int]] = []
        self.sent: list[str] = []
        self.logprobs: list[torch.Tensor] = []
        self.alive: list[list[bool]] = []
        self.open: list[bool] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        newest = input_ids[:, -1]
        assert self.run.last_logits is not None
        logprobs = self.run.last_logits.float().log_softmax(-1).gather(1, newest[:, None].to(torch.long))[:, 0].cpu()
        rows = len(newest)
        if not self.open:
            self.open, self.ids, self.sent = [True] * rows, [[] for _ in range(rows)], [""] * rows
        self.alive.append(list(self.open))
        self.logprobs.append(torch.where(torch.tensor(self.open), logprobs, torch.nan))
        for row, token in enumerate(newest.tolist()):
            if self.open[row]:
                self._take(row, token, float(logprobs[row]))
        return torch.tensor([not is_open for is_open in self.open], device=input_ids.device)

    def _take(self, row: int, token: int, logprob: float) -> None:
        self.ids[row].append(token)
        text = self.tokenizer.decode(self.ids[row], skip_special_tokens=True)
        self.open[row] = token not in self.ends and not any(each in text for each in self.stop)
        last = not self.open[row] or len(self.ids[row]) == self.limit
        # The end of an unfinished character waits for the next token, if there is one.
        new = "" if text.endswith("�") and not last else text[len(self.sent[row]) :]
        self.sent[row] += new
        self.on_token(Token(row, len(self.ids[row]) - 1, token, new, logprob))

    def answer(self, sequences: torch.Tensor) -> Answer:
        """What was generated."""
        return Answer(sequences, torch.stack(self.logprobs, 1), torch.tensor(self.alive).T.contiguous())


def _sampler(options: GenerateOptions, device: torch.device) -> LogitsProcessorList:
    """Sampling as data on the logits: temperature, top-p, then Gumbel noise, so that the largest is a fair sample.

    The argmax of logits + Gumbel noise is distributed as softmax(logits) (Maddison et al. 2014). The noise comes from a
    generator of its own: no global random state is read or changed.
    """
    if not options.do_sample:
        return LogitsProcessorList()
    steps: list[LogitsProcessor] = []
    if options.temperature is not None and options.temperature != 1.0:
        steps.append(TemperatureLogitsWarper(options.temperature))
    if options.top_p is not None and options.top_p < 1.0:
        steps.append(TopPLogitsWarper(options.top_p))
    return LogitsProcessorList([*steps, _GumbelNoise(options.seed, device)])


class _GumbelNoise(LogitsProcessor):
    def __init__(self, seed: int | None, device: torch.device) -> None:
        self.generator = torch.Generator(device=device)
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(scores, dtype=torch.float32).exponential_(generator=self.generator)
        return scores.float() - noise.log()
