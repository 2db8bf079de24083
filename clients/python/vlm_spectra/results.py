"""What `generate`, `stream` and `forward` return.

Shapes: b rows of a batch, s positions, n new tokens, d hidden width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import arrays, scalars
from .arrays import Array
from .clicks import Point, find_click
from .cost import Cost
from .errors import InvalidInputError
from .inputs import Inputs

Texts = Callable[[Sequence[int]], list[str]]
"""Token ids to their texts."""


@dataclass(frozen=True)
class Token:
    """A token as it is chosen.

    Attributes:
        row: The batch row.
        index: Its number in the answer, from 0.
        id: Its id.
        text: The text that is complete with it; empty in the middle of a character.
        logprob: The natural logarithm of its probability under the model, before temperature and top_p.
    """

    row: int
    index: int
    id: int
    text: str
    logprob: float


@dataclass(frozen=True, eq=False)
class Generation:
    """An answer.

    Attributes:
        inputs: What was asked.
        sequences: [b, s + n] int64, prompt and answer; rows that ended early are filled with the padding token.
        text: [b] the new text, special tokens left out.
        logprobs: [b, n] float32, of each chosen token under the model; NaN after a row's end.
        coordinates: How the model writes points.
        hidden_states: Where asked, layers + 1 arrays [b, s + n, d]: the residual stream before each block, then the
            final norm's output, over prompt and answer.
    """

    inputs: Inputs = field(repr=False)
    sequences: Array = field(repr=False)
    text: list[str]
    logprobs: Array = field(repr=False)
    coordinates: str = field(default="processed_pixels", repr=False)
    hidden_states: tuple[Array, ...] | None = field(default=None, repr=False)
    _tensors: Mapping[str, Array] | None = field(default=None, repr=False)

    @property
    def cost(self) -> Cost | None:
        """What the call took on the server; None in process. Waits for its end."""
        return getattr(self._tensors, "cost", None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tensors": None}

    @property
    def clicks(self) -> list[Point | None]:
        """[b] the point that each answer names, in pixels of the row's last image as it was given, or None."""
        prompts = self.inputs.prompts
        return [
            find_click(prompts[row].assistant_prefill + text, self.inputs.images_of(row), self.coordinates)
            for row, text in enumerate(self.text)
        ]


class Answer:
    """An answer as its tokens come in.

    Args:
        rows: Rows of the batch.
    """

    def __init__(self, rows: int) -> None:
        self.tokens: list[list[Token]] = [[] for _ in range(rows)]

    def add(self, token: Token) -> None:
        """A token has come."""
        self.tokens[token.row].append(token)

    def labels(self, inputs: Inputs) -> list[list[str]]:
        """[batch][seq] labels of prompt and answer; a row that ended early has empty ones behind."""
        length = max(map(len, self.tokens))
        return [
            [*inputs.token_labels[row], *(t.text for t in tokens), *([""] * (length - len(tokens)))]
            for row, tokens in enumerate(self.tokens)
        ]

    def generation(self, inputs: Inputs, tensors: Mapping[str, Array], coordinates: str) -> Generation:
        """The whole answer, with the tensors `sequences`, `logprobs` and any `hidden_states.N`."""
        text = ["".join(token.text for token in tokens) for tokens in self.tokens]
        hidden = series(tensors, "hidden_states")
        return Generation(inputs, tensors["sequences"], text, tensors["logprobs"], coordinates, hidden, tensors)


def series(tensors: Mapping[str, Array], name: str) -> tuple[Array, ...] | None:
    """The tensors `name.0`, `name.1`, ... in order, or None where there are none."""
    return tuple(tensors[each] for each in tensors if each.startswith(f"{name}.")) or None


@dataclass(frozen=True)
class TopToken:
    """One of the most probable next tokens.

    Attributes:
        id: Its id.
        text: Its text.
        prob: Its probability (softmax in float32).
        logit: Its logit.
    """

    id: int
    text: str
    prob: float
    logit: float


class Vocabulary:
    """Token ids to their texts, where the model is not at hand.

    Args:
        texts: By id.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._all = list(texts)

    def __call__(self, ids: Sequence[int]) -> list[str]:
        return [self._all[each] for each in ids]


class ForwardOutput:
    """What a forward pass returns beside activations. Behind a server each array is waited for when it is read.

    Args:
        tensors: `logits`, `hidden_states.N`, `attentions.N`, as far as they were asked for.
        texts: Token ids to texts.
    """

    def __init__(self, tensors: Mapping[str, Array], texts: Texts) -> None:
        self._tensors = tensors
        self._texts = texts

    @property
    def cost(self) -> Cost | None:
        """What the call took on the server; None in process. Waits for its end."""
        return getattr(self._tensors, "cost", None)

    @property
    def logits(self) -> Array:
        """[b, kept positions, v].

        Raises:
            InvalidInputError: None were asked for.
        """
        try:
            return self._tensors["logits"]
        except KeyError:
            raise InvalidInputError(
                "this forward pass computed no logits; ask for some with logits_to_keep (0 for all positions)."
            ) from None

    @property
    def hidden_states(self) -> tuple[Array, ...] | None:
        """Layers + 1 arrays [b, s, d]: the residual stream before each block, then the final norm's output; or None."""
        return series(self._tensors, "hidden_states")

    @property
    def attentions(self) -> tuple[Array, ...] | None:
        """Each block's attention pattern [b, heads, query, key], or None."""
        return series(self._tensors, "attentions")

    def top_tokens(self, k: int = 5) -> list[list[list[TopToken]]]:
        """The k most probable next tokens: [row][kept position][k], most probable first."""
        logits = arrays.to_numpy(self.logits).astype(np.float32)
        k = scalars.count(k, "k", logits.shape[-1])
        shifted = np.exp(logits - logits.max(-1, keepdims=True))
        probs = shifted / shifted.sum(-1, keepdims=True)
        order = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
        texts = dict(zip(ids := np.unique(order).tolist(), self._texts(ids), strict=True))

        def top(row: int, position: int) -> list[TopToken]:
            return [
                TopToken(i, texts[i], float(probs[row, position, i]), float(logits[row, position, i]))
                for i in order[row, position].tolist()
            ]

        return [[top(row, position) for position in range(order.shape[1])] for row in range(order.shape[0])]

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled or copied deeply: the arrays, all of them waited for, and the texts of the vocabulary."""
        tensors = dict(self._tensors)
        size = tensors["logits"].shape[-1] if "logits" in tensors else 0
        return {"_tensors": tensors, "_texts": Vocabulary(self._texts(range(size)))}

    def __repr__(self) -> str:
        return f"ForwardOutput({', '.join(self._tensors)})"
