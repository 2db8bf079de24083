"""Second stage: teach the language model to answer questions about what the tower sees.

A picture costs more tokens than a question, so several questions share one: a sequence is the picture's prompt and,
behind it, branches that see the prompt and themselves but not each other. To the model each branch is a conversation
of its own, the same that it meets when it is asked one question.

What makes choosing the asked-for widget learnable is the second loss: two attention heads of one layer are told where
to look while the model reads the end of a question and while it says a widget's coordinates, colour or name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AttentionInterface, Qwen2_5_VLForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .lessons import Lesson
from .parts import load_tokenizer
from .pixels import TOKEN
from .tower import COVERED, cover
from .world import Screen

LOOKING_LAYER, LOOKING_HEADS = 2, (0, 1)
"""The heads that are told where to look: early enough that the layers above can use what they find."""

FORMAT_WEIGHT = 0.3
"""Weight of an answer's tokens that are the same for every screen, against 1 for those that need the picture."""

ONE_WORD = {"colour": 3.0, "count": 4.0}
"""Weight of the one token that such an answer has: a click has six, and would drown it."""

ATTENTION = "spectra_tiny_lessons"


@cache
def encode(text: str) -> tuple[int, ...]:
    """Token ids of a text."""
    return tuple(load_tokenizer()(text).input_ids)


@dataclass
class Row:
    """One picture's prompt and its branches, as lists over tokens."""

    ids: list[int] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    lesson: list[int] = field(default_factory=list)
    look: list[int] = field(default_factory=list)


@dataclass
class LanguageBatch:
    """Sequences of one length. [b, s] each unless said otherwise; -1 means none."""

    ids: torch.Tensor
    positions: torch.Tensor
    """[3, b, s]: time, height and width, as rotary embeddings want them."""
    allowed: torch.Tensor
    """[b, 1, s, s]: which token may attend to which."""
    targets: torch.Tensor
    """The token that this one must predict."""
    weights: torch.Tensor
    lessons: torch.Tensor
    """Number of the lesson that the predicted token belongs to, counted through the batch."""
    looks: torch.Tensor
    """[looks, 2]: row and position of a token that must look at a widget."""
    widgets: torch.Tensor
    """[looks, image tokens]: the tokens that show this widget."""
    image: slice
    tasks: list[str]


def answer_tokens(lesson: Lesson) -> tuple[list[int], list[int], list[float]]:
    """Ids of an answer, the number of the piece each belongs to, and each one's weight in the loss."""
    coded = load_tokenizer()(lesson.answer, return_offsets_mapping=True)
    ends = np.cumsum([len(piece.text) for piece in lesson.pieces])
    pieces = [int(np.searchsorted(ends, start, side="right")) for start, _ in coded["offset_mapping"]]
    alike = lesson.task != "count"
    weight = ONE_WORD.get(lesson.task, 1.0)
    weights = [FORMAT_WEIGHT if alike and lesson.pieces[piece].widget is None else weight for piece in pieces]
    return list(coded["input_ids"]), pieces, weights


def add_branch(row: Row, lesson: Lesson, number: int, lesson_number: int, start: int, screen: Screen) -> None:
    """Append one question and its answer. The last token of the question and all but the last of the answer predict."""
    question = encode(f"{lesson.question}<|im_end|>\n<|im_start|>assistant\n")
    answer, pieces, weights = answer_tokens(lesson)
    end = encode("<|im_end|>")[0]
    ids = [*question, *answer]
    silent = len(question) - 1
    looks = [
        -1 if lesson.pieces[piece].widget is None else screen.widgets.index(lesson.pieces[piece].widget)
        for piece in pieces
    ]
    first = screen.widgets.index(lesson.target) if lesson.target else looks[0]
    row.ids += ids
    row.branch += [number] * len(ids)
    row.position += range(start, start + len(ids))
    row.target += [-1] * silent + [*answer, end]
    row.weight += [0.0] * silent + [*weights, FORMAT_WEIGHT]
    row.lesson += [-1] * silent + [lesson_number] * (len(answer) + 1)
    row.look += [-1] * silent + [first, *looks[1:], -1]


def pack(screens: Sequence[Screen], lessons: Sequence[Sequence[Lesson]], system: str | None = None) -> LanguageBatch:
    """The batch for some screens of one size and each one's lessons."""
    rows, columns = screens[0].height // TOKEN, screens[0].width // TOKEN
    before = encode(
        (f"<|im_start|>system\n{system}<|im_end|>\n" if system else "") + "<|im_start|>user\n<|vision_start|>"
    )
    image = slice(len(before), len(before) + rows * columns)
    prompt = [*before, *[encode("<|image_pad|>")[0]] * (rows * columns), encode("<|vision_end|>")[0]]
    after = len(before) + max(rows, columns)
    sequences, tasks = [], []
    for screen, asked in zip(screens, lessons, strict=True):
        none = [-1] * len(prompt)
        row = Row(
            list(prompt), [0] * len(prompt), [0] * len(prompt), list(none), [0.0] * len(prompt), list(none), list(none)
        )
        for number, lesson in enumerate(asked):
            add_branch(row, lesson, number + 1, len(tasks), after + 1, screen)
            tasks.append(lesson.task)
        sequences.append(row)
    length = max(len(row.ids) for row in sequences)
    columns_of = {
        name: padded(sequences, name, length) for name in ("ids", "branch", "position", "target", "weight", "lesson")
    }
    positions = columns_of["position"].long().expand(3, -1, -1).clone()
    positions[:, :, : len(prompt)] = prompt_positions(len(before), rows, columns)[:, None]
    parts = [cover(screen).reshape(len(screen.widgets), -1) for screen in screens]
    looks = [(b, s, widget) for b, row in enumerate(sequences) for s, widget in enumerate(row.look) if widget >= 0]
    widgets = np.stack([parts[b][widget] for b, _, widget in looks]) >= COVERED
    return LanguageBatch(
        ids=columns_of["ids"].long().clamp(min=0),
        positions=positions,
        allowed=allowed(columns_of["branch"]),
        targets=columns_of["target"].long(),
        weights=columns_of["weight"],
        lessons=columns_of["lesson"].long(),
        looks=torch.tensor([(b, s) for b, s, _ in looks]),
        widgets=torch.tensor(widgets),
        image=image,
        tasks=tasks,
    )


def padded(sequences: Sequence[Row], name: str, length: int) -> torch.Tensor:
    """[b, s] float32 of one list of each sequence, filled up on the right: with -1, weights with 0."""
    fill = 0.0 if name == "weight" else -1.0
    return torch.tensor([getattr(row, name) + [fill] * (length - len(row.ids)) for row in sequences])


def prompt_positions(before: int, rows: int, columns: int) -> torch.Tensor:
    """[3, prompt]: one step a token for text, the place in the grid for the picture, as Qwen2.5-VL numbers them."""
    grid = torch.stack(
        [
            torch.zeros(rows, columns),
            torch.arange(rows)[:, None].expand(rows, columns),
            torch.arange(columns)[None].expand(rows, columns),
        ]
    ).flatten(1)
    text = torch.arange(before).expand(3, -1)
    end = torch.full((3, 1), before + max(rows, columns))
    return torch.cat([text, grid + before, end], dim=1).long()


def allowed(branch: torch.Tensor) -> torch.Tensor:
    """[b, 1, s, s] from each token's branch (0: the prompt): earlier tokens of the prompt and of the own branch."""
    same = branch[:, :, None] == branch[:, None, :]
    prompt = (branch == 0)[:, None, :]
    length = branch.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool).tril()
    return ((same | prompt) & earlier)[:, None]


def recording_attention(module, query, key, value, attention_mask, **options):
    """PyTorch's attention; the layer that is told where to look leaves its queries and keys behind."""
    if module.layer_idx == LOOKING_LAYER:
        module.seen = query, key
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(ATTENTION, recording_attention)


def looking_loss(model: Qwen2_5_VLForConditionalGeneration, batch: LanguageBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Minus the mean log of the attention that the told heads give to the right widget, and that attention itself."""
    attention = model.model.language_model.layers[LOOKING_LAYER].self_attn
    query, key = attention.seen
    row, position = batch.looks.unbind(1)
    shares = []
    for head in LOOKING_HEADS:
        keys = key[:, head // attention.num_key_value_groups]
        scores = torch.einsum("bsd,btd->bst", query[:, head], keys)[row, position] * attention.scaling
        scores = scores.masked_fill(~batch.allowed[row, 0, position], float("-inf"))
        shares.append(scores.log_softmax(-1)[:, batch.image].masked_fill(~batch.widgets, float("-inf")).logsumexp(-1))
    share = torch.stack(shares)
    return -share.clamp(min=-20).mean(), share.exp().mean()


def language_loss(
    model: Qwen2_5_VLForConditionalGeneration, features: torch.Tensor, batch: LanguageBatch, looking: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss, and the share of lessons answered right to the letter, by task.

    `features` [pictures * image tokens, d] are what the tower gives.
    """
    decoder = model.model.language_model
    embedded = decoder.embed_tokens(batch.ids)
    pictures = features.view(len(batch.ids), -1, features.shape[-1])
    embedded = torch.cat([embedded[:, : batch.image.start], pictures, embedded[:, batch.image.stop :]], dim=1)
    hidden = decoder(
        inputs_embeds=embedded,
        position_ids=batch.positions,
        attention_mask={"full_attention": batch.allowed},
        use_cache=False,
    ).last_hidden_state
    asked = batch.targets >= 0
    logits, targets, weights = model.lm_head(hidden[asked]), batch.targets[asked], batch.weights[asked]
    answers = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
    looks, share = looking_loss(model, batch)
    figures = exact(logits.argmax(-1) == targets, batch.lessons[asked], batch.tasks)
    return answers + looking * looks, {"answers": answers.item(), "looking": share.item(), **figures}


def exact(right: torch.Tensor, lesson: torch.Tensor, tasks: list[str]) -> dict[str, float]:
    """Share of lessons all of whose tokens are right, by task: what greedy decoding would get right to the letter."""
    wrong = torch.zeros(len(tasks)).index_add_(0, lesson, (~right).float())
    return {
        task: float(np.mean([wrong[i] == 0 for i, other in enumerate(tasks) if other == task]))
        for task in sorted(set(tasks))
    }
