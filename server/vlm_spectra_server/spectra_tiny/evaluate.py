"""Examine spectra-tiny on screens it has never seen: `python -m vlm_spectra_server.spectra_tiny.evaluate`.

It is asked as anybody would ask it: through the Auto classes, the chat template and `generate`. The table it prints is
the model card's; `--card` puts it there.
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

from . import DIRECTORY
from .lessons import ASKERS, Lesson, name
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
            return_tensors="pt",
            padding=True,
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


def examine(examinee: Examinee, screens: int) -> dict[str, dict[str, list[float]]]:
    """Scores by task and group on the first held-out screens, each asked once for every task it allows."""
    exam: list[tuple[Screen, Lesson]] = []
    for seed in range(HELD_OUT, HELD_OUT + screens):
        screen = make_screen(seed, count=(2, 5))
        dice = random.Random(seed)
        lessons = (ask(dice, screen) for ask in ASKERS.values())
        exam += [(screen, lesson) for lesson in lessons if lesson]
    answers = examinee.answer_all([(screen, lesson.question) for screen, lesson in exam])
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (screen, lesson), answer in zip(exam, answers, strict=True):
        for task, value in score(lesson, screen, answer).items():
            for group, belongs in GROUPS.items():
                if belongs(screen):
                    scores[task][group].append(float(value))
    return scores


def examine_deletion(examinee: Examinee, screens: int) -> dict[str, list[float]]:
    """On clicks answered right: does the answer leave when the widget is deleted, and stay when another is?"""
    dice = random.Random(0)
    cases = []
    for seed in range(HELD_OUT, HELD_OUT + screens):
        screen = make_screen(seed, count=(2, 5))
        lesson = ASKERS["click"](random.Random(seed), screen)
        others = [widget for widget in screen.widgets if widget != lesson.target]
        if others:
            cases.append((screen, lesson, dice.choice(others)))
    questions = [lesson.question for _, lesson, _ in cases]
    variants = (
        [screen for screen, _, _ in cases],
        [screen.without(lesson.target) for screen, lesson, _ in cases],
        [screen.without(other) for screen, _, other in cases],
    )
    whole, asked_gone, other_gone = (
        examinee.answer_all(list(zip(shown, questions, strict=True))) for shown in variants
    )
    result: dict[str, list[float]] = {
        "asked-for widget deleted: answer leaves it": [],
        "another deleted: answer stays": [],
    }
    for (_, lesson, _), before, without, kept in zip(cases, whole, asked_gone, other_gone, strict=True):
        if hits(before, lesson.target):
            result["asked-for widget deleted: answer leaves it"].append(not hits(without, lesson.target))
            result["another deleted: answer stays"].append(hits(kept, lesson.target))
    return result


def percent(values: Iterable[float]) -> str:
    """A mean in percent."""
    values = list(values)
    return f"{100 * sum(values) / len(values):.1f}" if values else "-"


def table(scores: dict[str, dict[str, list[float]]], deletion: dict[str, list[float]]) -> str:
    """The figures as Markdown, in percent of the questions asked."""
    lines = ["| task | asked | " + " | ".join(GROUPS) + " |", "| --- | " + "---: | " * (len(GROUPS) + 1)]
    for task, groups in scores.items():
        cells = [percent(groups[group]) for group in GROUPS]
        lines.append(f"| {task} | {len(groups['all'])} | " + " | ".join(cells) + " |")
    lines += ["", "| deletion test on clicks answered right | asked | |", "| --- | ---: | ---: |"]
    lines += [f"| {what} | {len(values)} | {percent(values)} |" for what, values in deletion.items()]
    return "\n".join(lines)


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
    parser.add_argument("--card", action="store_true", help="write the table into the model card")
    arguments = parser.parse_args()
    examinee = Examinee(arguments.directory, arguments.device)
    scores = examine(examinee, arguments.screens)
    deletion = examine_deletion(examinee, arguments.screens // 2)
    text = f"{arguments.screens} held-out screens, 2 to 5 widgets each; percent.\n\n{table(scores, deletion)}"
    print(text)
    if arguments.card:
        put_into_card(text, arguments.directory / "README.md")


if __name__ == "__main__":
    main()
