"""Examine spectra-tiny on screens it has never seen: `python -m vlm_spectra_server.spectra_tiny.evaluate`.

It is asked as anybody would ask it: through the Auto classes, the chat template and `generate`. Then the analysis is
examined on it (`inside`), and requests that it was not made for are tried. The tables it prints are the model card's;
`--card` puts them there, with the logit lens's picture.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor
from vlm_spectra.base import BaseVLM

from ..hooked_vlm import HookedVLM
from . import DIRECTORY, inside
from .inside import Answered
from .lessons import ASKERS, Lesson, name
from .pixels import photograph
from .vocabulary import COLOURS, KINDS, LABELS
from .world import HELD_OUT, Screen, Widget, make_screen

CLICK = re.compile(r"^Thought: .*\nAction: click\(start_box='\((\d+),(\d+)\)'\)$", re.DOTALL)
"""A well-formed click."""

GROUPS: dict[str, Callable[[Screen], bool]] = {
    "all": lambda screen: True,
    "light, 224 x 224": lambda screen: screen.theme == "light" and (screen.width, screen.height) == (224, 224),
    "other theme": lambda screen: screen.theme != "light",
    "other size": lambda screen: (screen.width, screen.height) != (224, 224),
}
"""Columns of the table; `light, 224 x 224` is the most common kind of screen in training."""

COMMON = "light, 224 x 224"

STRANGE_QUESTIONS = (
    "Click on the red circle",
    "Klicke auf den roten Kreis",
    "点击红色的圆圈",
    "Quelle est la capitale de la France ?",
    "Write a poem about the sea.",
    "Please consider carefully what is written here before you answer. " * 40 + "What do you see?",
)
"""Other languages, other subjects, a long prompt."""

ANALYSED = 200
"""On so many right clicks the analysis is examined."""

MARKS = "<!-- figures -->", "<!-- /figures -->"


class Examinee:
    """The model behind its processor: pictures and questions in, answers out."""

    def __init__(self, directory: Path = DIRECTORY, device: str = "cpu"):
        self.processor = AutoProcessor.from_pretrained(directory)
        self.model = AutoModelForImageTextToText.from_pretrained(directory).to(device).eval()

    @torch.inference_mode()
    def answer(self, pictures: Sequence[Image.Image], questions: Sequence[str], tokens: int = 64) -> list[str]:
        """Greedy answers to one question about each picture."""
        turns = [
            [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
            for picture, question in zip(pictures, questions, strict=True)
        ]
        inputs = self.processor.apply_chat_template(
            turns,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"return_tensors": "pt", "padding": True},
        ).to(self.model.device)
        output = self.model.generate(**inputs, max_new_tokens=tokens)
        return self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def answer_all(self, asked: Sequence[tuple[Screen, str]], batch: int = 32) -> list[str]:
        """Answers to questions about screens, in the order given."""
        answers: dict[int, str] = {}
        order = sorted(range(len(asked)), key=lambda i: (asked[i][0].width, asked[i][0].height))
        for start in tqdm(range(0, len(order), batch), desc="answers", mininterval=5):
            part = order[start : start + batch]
            said = self.answer([asked[i][0].render() for i in part], [asked[i][1] for i in part])
            answers.update(zip(part, said, strict=True))
        return [answers[i] for i in range(len(asked))]


def clicked(answer: str) -> tuple[int, int] | None:
    """The point that a well-formed answer clicks on."""
    found = CLICK.match(answer)
    return (int(found[1]), int(found[2])) if found else None


def hits(answer: str, widget: Widget) -> bool:
    """Whether the answer clicks on this widget."""
    point = clicked(answer)
    return point is not None and widget.contains(*point)


def named(answer: str) -> set[str] | None:
    """The widgets that a well-formed description lists, else None."""
    items = [item.strip() for item in answer.split(",")]
    words = set(COLOURS) | set(KINDS) | set(LABELS)
    return set(items) if all(item and set(item.split()) <= words for item in items) else None


def well_formed(answer: str) -> bool:
    """Whether an answer has one of the forms that were taught: a click, a colour, a number, a description."""
    return clicked(answer) is not None or named(answer) is not None or answer.isdigit()


def score(lesson: Lesson, screen: Screen, answer: str) -> dict[str, float]:
    """What the answer is worth: right or wrong, and for a description also how much of it is true."""
    if lesson.task in ("click", "click-single", "label"):
        return {lesson.task: hits(answer, lesson.target)}
    if lesson.task == "describe":
        there, said = {name(widget) for widget in screen.widgets}, named(answer)
        return {
            "describe: well-formed": said is not None,
            "describe: every widget": said == there,
            "describe: true part": len((said or set()) & there) / max(1, len(said or ())),
        }
    return {lesson.task: answer == lesson.answer}


def examine(examinee: Examinee, screens: int) -> list[Answered]:
    """The first held-out screens, each asked once for every task it allows."""
    exam: list[tuple[Screen, Lesson]] = []
    for seed in range(HELD_OUT, HELD_OUT + screens):
        screen = make_screen(seed, count=(2, 5))
        dice = random.Random(seed)
        lessons = (ask(dice, screen) for ask in ASKERS.values())
        exam += [(screen, lesson) for lesson in lessons if lesson]
    answers = examinee.answer_all([(screen, lesson.question) for screen, lesson in exam])
    return [Answered(screen, lesson, answer) for (screen, lesson), answer in zip(exam, answers, strict=True)]


def tally(exam: Iterable[Answered]) -> dict[str, dict[str, list[float]]]:
    """Scores by task and group."""
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in exam:
        for task, value in score(one.lesson, one.screen, one.answer).items():
            for group, belongs in GROUPS.items():
                if belongs(one.screen):
                    scores[task][group].append(float(value))
    return scores


def right_clicks(exam: Iterable[Answered]) -> list[Answered]:
    """The clicks by colour and kind that were answered right."""
    return [one for one in exam if one.lesson.task == "click" and hits(one.answer, one.lesson.target)]


def examine_deletion(examinee: Examinee, clicks: Sequence[Answered]) -> dict[str, list[float]]:
    """On right clicks: does the answer leave when the widget is deleted, and stay when another is?"""
    dice = random.Random(0)
    asked_gone, other_gone = [], []
    for click in clicks:
        screen, target = click.screen, click.lesson.target
        others = [widget for widget in screen.widgets if widget != target]
        asked_gone.append((screen.without(target), click.lesson.question))
        other_gone.append((screen.without(dice.choice(others)) if others else screen, click.lesson.question))
    answers = examinee.answer_all(asked_gone + other_gone)
    targets = [click.lesson.target for click in clicks]
    without, kept = answers[: len(clicks)], answers[len(clicks) :]
    return {
        "asked-for widget deleted: answer leaves it": [
            float(not hits(answer, target)) for answer, target in zip(without, targets, strict=True)
        ],
        "another deleted: answer stays": [
            float(hits(answer, target)) for answer, target in zip(kept, targets, strict=True)
        ],
    }


def examine_strange(model: BaseVLM, pictures: int = 10) -> dict[str, list[float]]:
    """Whether requests that it was not made for get an answer of a form that it was taught."""
    result: dict[str, list[float]] = defaultdict(list)
    for seed in range(pictures):
        photo, screen = photograph(HELD_OUT + seed, 640, 400), make_screen(HELD_OUT + seed).render()
        shown = {"a photograph": photo, "a screen": screen, "two pictures": [screen, photo]}
        for what, image in shown.items():
            for question in STRANGE_QUESTIONS[what == "a screen" :]:
                answer = model.generate(model.prepare_messages(question, image), max_new_tokens=64).text[0]
                result[what].append(float(well_formed(answer)))
    return result


def percent(values: Iterable[float]) -> str:
    """A mean in percent."""
    values = list(values)
    return f"{100 * sum(values) / len(values):.1f}" if values else "-"


def beside(values: Sequence[float], common: Sequence[float]) -> str:
    """A mean in percent and, in points, how far it is from another."""
    if not values or not common:
        return percent(values)
    points = 100 * (sum(values) / len(values) - sum(common) / len(common))
    return f"{percent(values)} ({points:+.1f})"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table: texts to the left, figures to the right."""
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)])


def answers_table(scores: dict[str, dict[str, list[float]]]) -> str:
    """Right answers in percent of the questions asked."""
    rows = []
    for task, groups in scores.items():
        cells = [
            beside(groups[group], groups[COMMON]) if group.startswith("other") else percent(groups[group])
            for group in GROUPS
        ]
        rows.append([task, len(groups["all"]), *cells])
    return markdown(["task", "asked", *GROUPS], rows)


def lens_table(found: dict[str, inside.Readings]) -> str:
    """What the lens reads, by layer."""
    rows = [
        [f"{name}: {what}", *(f"{value:.3g}" for value in values)]
        for name, reading in found.items()
        for what, values in reading.rows().items()
    ]
    layers = len(next(iter(found.values())).ranks)
    return markdown(["logit lens after layer", *map(str, range(layers))], rows)


def report(directory: Path, device: str, screens: int, picture: Path | None = None) -> str:
    """Every figure of the model card; the lens's curve goes to `picture`."""
    examinee = Examinee(directory, device)
    model = HookedVLM(examinee.model, examinee.processor, "spectra-tiny")
    exam = examine(examinee, screens)
    clicks = right_clicks(exam)
    deletion = examine_deletion(examinee, clicks)
    strange = examine_strange(model)
    analysed = clicks[:ANALYSED]
    pointings, readings = inside.pointings(model, analysed), inside.readings(model, analysed)
    if picture:
        inside.draw_readings(readings, picture)
    return "\n\n".join(
        [
            f"{screens} held-out screens, 2 to 5 widgets each; percent, and in brackets the points it is from "
            f"`{COMMON}`.",
            answers_table(tally(exam)),
            markdown(
                ["on clicks answered right", "asked", "percent"],
                [[what, len(values), percent(values)] for what, values in deletion.items()],
            ),
            "Why does it say the first digit of the coordinates? The share of clicks answered right "
            "whose strongest patch shows the asked-for widget (its box covers at least a tenth of the patch). A patch "
            f"drawn at random would show it in {percent(inside.chance(analysed))}.",
            markdown(
                ["attribution", "asked", "largest in size", "largest score"],
                [
                    [method, len(one.by_size), percent(one.by_size), percent(one.by_score)]
                    for method, one in pointings.items()
                ],
            ),
            "The rank of each token of these answers in the logit lens, 0 being the most probable, after each layer.",
            lens_table(readings),
            markdown(
                ["what it was not made for", "asked", "well-formed answers"],
                [[what, len(values), percent(values)] for what, values in strange.items()],
            ),
        ]
    )


def put_into_card(text: str, card: Path) -> None:
    """Replace what stands between the marks of the model card."""
    before, rest = card.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    card.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--screens", type=int, default=1000)
    parser.add_argument("--directory", type=Path, default=DIRECTORY)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--card", action="store_true", help="write the tables and lens.png into the model's directory")
    arguments = parser.parse_args()
    picture = arguments.directory / "lens.png" if arguments.card else None
    text = report(arguments.directory, arguments.device, arguments.screens, picture)
    print(text)
    if arguments.card:
        put_into_card(text, arguments.directory / "README.md")


if __name__ == "__main__":
    main()
