"""What spectra-tiny is asked, and the right answers, in the format of UI-TARS.

A click's coordinates are pixels of the picture as the model receives it, as with Qwen2.5-VL and UI-TARS-1.5.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from .world import Screen, Widget

ASK_CLICK = (
    "Click on the {}",
    "Click on the {}",
    "Click the {}",
    "Press the {}",
    "Tap on the {}",
    "Please click on the {}",
)
ASK_LABEL = ("Click on {}", "Click on {}", "Click {}", "Press {}")
ASK_COLOUR = ("What color is the {}?", "What colour is the {}?")
ASK_COUNT = ("How many widgets are there?", "How many widgets are on the screen?", "Count the widgets.")
ASK_DESCRIPTION = ("Describe the screen.",)

ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz",
    "etaoinshrdluetaoin",
    "aeioubcdlmnprstéèàçüöäß",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789",
    "абвгдежзийклмнопрстуфхцчшщыэюя",
    "的一是不了人我在有他这中大来上国点击红色圆圈按钮请",
    "あいうえおかきくけこさしすせそたちつてとなにのはひを",
    "ابتثجحخدرزسشصضطظعغفقكلمنهوي",
    "{}[]()<>/\\|=+-*&^%$#@~`;:",
)
"""Letters of what nobody taught it."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer, and the widget that one must look at to say it."""

    text: str
    widget: Widget | None = None


@dataclass(frozen=True)
class Lesson:
    """A question about a screen. `target` is the widget it is about, if it is about one."""

    task: str
    question: str
    pieces: tuple[Piece, ...]
    target: Widget | None = None

    @property
    def answer(self) -> str:
        """The whole answer."""
        return "".join(piece.text for piece in self.pieces)


def name(widget: Widget) -> str:
    """A widget in full: "red circle", "blue Login button"."""
    return " ".join(word for word in (widget.colour, widget.label, widget.kind) if word)


def alone(screen: Screen, **attributes: str) -> bool:
    """Whether exactly one widget of the screen has these attributes."""
    return sum(all(getattr(w, key) == value for key, value in attributes.items()) for w in screen.widgets) == 1


def click(task: str, question: str, thought: str, widget: Widget) -> Lesson:
    """A request to click on a widget; the thought repeats what was asked for."""
    x, y = widget.centre
    pieces = (
        Piece(f"Thought: The {thought}.\nAction: click(start_box='("),
        Piece(f"{x},{y}", widget),
        Piece(")')"),
    )
    return Lesson(task, question, pieces, widget)


def ask_click(dice: random.Random, screen: Screen) -> Lesson:
    """By colour and kind, which together fit one widget only."""
    widget = dice.choice(screen.widgets)
    words = f"{widget.colour} {widget.kind}"
    return click("click", dice.choice(ASK_CLICK).format(words), words, widget)


def ask_click_single(dice: random.Random, screen: Screen) -> Lesson | None:
    """By colour or kind alone, where that fits one widget only."""
    options = [(w, w.kind) for w in screen.widgets if alone(screen, kind=w.kind)]
    options += [(w, f"{w.colour} widget") for w in screen.widgets if alone(screen, colour=w.colour)]
    if not options:
        return None
    widget, words = dice.choice(options)
    return click("click-single", dice.choice(ASK_CLICK).format(words), words, widget)


def ask_label(dice: random.Random, screen: Screen) -> Lesson | None:
    """By what is written on it, with or without the kind."""
    labelled = [widget for widget in screen.widgets if widget.label]
    if not labelled:
        return None
    widget = dice.choice(labelled)
    if dice.random() < 0.5:
        words, question = f"{widget.label}", dice.choice(ASK_LABEL).format(widget.label)
    else:
        words = f"{widget.label} {widget.kind}"
        question = dice.choice(ASK_CLICK).format(words)
    return click("label", question, words, widget)


def ask_colour(dice: random.Random, screen: Screen) -> Lesson | None:
    """The colour of the only widget of its kind, or of one with a label."""
    options = [(w, w.kind) for w in screen.widgets if alone(screen, kind=w.kind)]
    options += [(w, f"{w.label} {w.kind}") for w in screen.widgets if w.label]
    if not options:
        return None
    widget, words = dice.choice(options)
    question = dice.choice(ASK_COLOUR).format(words)
    return Lesson("colour", question, (Piece(widget.colour, widget),), widget)


def ask_count(dice: random.Random, screen: Screen) -> Lesson:
    """How many widgets there are."""
    return Lesson("count", dice.choice(ASK_COUNT), (Piece(str(len(screen.widgets))),))


def ask_description(dice: random.Random, screen: Screen) -> Lesson:
    """Every widget, from top to bottom."""
    pieces: list[Piece] = []
    for widget in sorted(screen.widgets, key=lambda w: (w.centre[1], w.centre[0])):
        if pieces:
            pieces.append(Piece(", "))
        pieces.append(Piece(name(widget), widget))
    return Lesson("describe", dice.choice(ASK_DESCRIPTION), tuple(pieces))


ASKERS: dict[str, Callable[[random.Random, Screen], Lesson | None]] = {
    "click": ask_click,
    "click-single": ask_click_single,
    "label": ask_label,
    "colour": ask_colour,
    "count": ask_count,
    "describe": ask_description,
}
"""Every task by its name; None where the screen has nothing to ask about."""

CURRICULUM = ("click", "click", "click-single", "label", "label", "colour", "count", "describe")
"""What a training sequence asks about its screen."""


def gibberish(dice: random.Random) -> str:
    """A request that means nothing, in some alphabet."""
    letters = dice.choice(ALPHABETS)
    words = ("".join(dice.choices(letters, k=dice.randint(1, 6))) for _ in range(dice.randint(1, 4)))
    return " ".join(words).capitalize() + dice.choice(("", ".", "?", "!"))


def make_lessons(seed: int, screen: Screen, tasks: tuple[str, ...] = CURRICULUM) -> list[Lesson]:
    """One lesson for each task that the screen allows; the others become clicks by colour and kind.

    Every other description answers gibberish, so that a request it cannot understand has an answer too.
    """
    dice = random.Random(seed)
    lessons = [ASKERS[task](dice, screen) or ask_click(dice, screen) for task in tasks]
    return [
        replace(lesson, question=gibberish(dice)) if lesson.task == "describe" and dice.random() < 0.5 else lesson
        for lesson in lessons
    ]
