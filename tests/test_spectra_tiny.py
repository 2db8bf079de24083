"""spectra-tiny: its world, its tokenizer, its files, and that it answers whatever it is shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from vlm_spectra_server.spectra_tiny import (
    DIRECTORY,
    evaluate,
    export,
    inside,
    language,
    lessons,
    parts,
    pixels,
    tower,
    train,
    world,
)

SEEDS = range(world.HELD_OUT, world.HELD_OUT + 60)


@pytest.fixture(scope="module")
def examinee() -> evaluate.Examinee:
    if not (DIRECTORY / "model.safetensors").exists():
        pytest.skip("the trained weights are not there")
    return evaluate.Examinee()


def test_a_seed_always_gives_the_same_screen():
    for seed in SEEDS:
        first, second = world.make_screen(seed), world.make_screen(seed)
        assert first == second
        assert first.render().tobytes() == second.render().tobytes()


def test_widgets_lie_between_the_bars_and_apart():
    for seed in SEEDS:
        screen = world.make_screen(seed, count=(2, 5))
        assert len({(w.colour, w.kind) for w in screen.widgets}) == len(screen.widgets)
        for number, widget in enumerate(screen.widgets):
            left, top, right, bottom = widget.box
            assert 0 <= left < right <= screen.width
            assert world.TITLE_BAR <= top < bottom <= screen.height - world.TASK_BAR
            assert not any(world.overlap(widget.box, other.box) for other in screen.widgets[number + 1 :])


def test_deleting_a_widget_changes_its_box_and_nothing_else():
    for seed in SEEDS:
        screen = world.make_screen(seed)
        widget = screen.widgets[0]
        before, after = np.asarray(screen.render()), np.asarray(screen.without(widget).render())
        rows, columns = (before != after).any(-1).nonzero()
        left, top, right, bottom = widget.box
        assert len(rows)
        assert left <= columns.min() <= columns.max() < right
        assert top <= rows.min() <= rows.max() < bottom


@pytest.mark.parametrize(
    "text",
    ["Click on the red circle", "Wo ist der Knopf? Größe 3 €", "点击红色的圆圈", "\u202eעברית 🙂🏽\x00\n\t  end"],
)
def test_the_tokenizer_gives_back_any_text(text: str):
    tokenizer = parts.load_tokenizer()
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_words_of_the_world_are_single_tokens():
    for word in [*world.COLOURS, *world.KINDS, *world.LABELS, "click"]:
        assert len(language.encode(f" {word}")) == 1


def test_the_prompt_has_qwens_format():
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hello"}]}]
    text = parts.build_processor().apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_training_pixels_are_the_processors():
    screens = [world.make_screen(seed, size=(252, 196)) for seed in range(3)]
    ours = pixels.patchify(pixels.render(screens)).view(-1, 3, 14, 14)
    processed = parts.build_processor().image_processor([screen.render() for screen in screens], return_tensors="pt")
    theirs = processed["pixel_values"].view(-1, 3, 2, 14, 14)
    torch.testing.assert_close(theirs[:, :, 0], ours)
    torch.testing.assert_close(theirs[:, :, 1], ours)


def test_a_branch_of_a_training_sequence_equals_a_conversation_of_its_own():
    screens = [world.make_screen(seed, size=(168, 168)) for seed in range(2)]
    asked = [lessons.make_lessons(seed, screen) for seed, screen in enumerate(screens)]
    batch = language.pack(screens, asked)
    model, processor = parts.build_model(), parts.build_processor()
    embedded = model.model.language_model.embed_tokens(batch.ids)
    pictures = processor.image_processor([screen.render() for screen in screens], return_tensors="pt")
    with torch.no_grad():
        features = model.model.visual(pictures["pixel_values"], grid_thw=pictures["image_grid_thw"]).pooler_output
        embedded[:, batch.image] = features.view(len(screens), -1, features.shape[-1])
        packed = model.lm_head(
            model.model.language_model(
                inputs_embeds=embedded,
                position_ids=batch.positions,
                attention_mask={"full_attention": batch.allowed},
            ).last_hidden_state
        )[1]
        number = len(asked[0]) + 2
        branch = packed[batch.lessons[1] == number]
        user = [{"type": "image", "image": screens[1].render()}, {"type": "text", "text": asked[1][2].question}]
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": asked[1][2].answer}]
        inputs = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
        alone = model(**inputs).logits[0]
    torch.testing.assert_close(branch, alone[-len(branch) - 2 : -2], atol=1e-4, rtol=1e-4)


def test_a_random_model_of_another_shape_loads_and_answers(tmp_path):
    parts.write_random(tmp_path, seed=3, text={"num_hidden_layers": 2, "hidden_size": 96, "num_attention_heads": 4})
    examinee = evaluate.Examinee(tmp_path)
    assert examinee.model.dtype == torch.float32
    assert len(examinee.answer([Image.new("RGB", (1280, 800), "gray")], ["Hello"], tokens=4)) == 1


def test_the_shipped_files_keep_their_limits(examinee):
    assert sum(parameter.numel() for parameter in examinee.model.parameters()) <= 6_000_000
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir()) <= 13_000_000
    assert examinee.model.dtype == torch.float32
    assert examinee.model.config.model_type == "qwen2_5_vl"


@pytest.mark.parametrize("question", evaluate.STRANGE_QUESTIONS)
def test_what_it_was_not_made_for_gets_a_well_formed_answer(hooked, photo, question):
    screen = world.make_screen(world.HELD_OUT).render()
    for image in (
        photo,
        pixels.photograph(world.HELD_OUT, 640, 400),
        Image.new("RGB", (3000, 40), "white"),
        [screen, photo, screen],
    ):
        answer = hooked.generate(hooked.prepare_messages(question, image), max_new_tokens=64)
        assert evaluate.well_formed(answer.text[0]), answer.text[0]
        assert (answer.clicks[0] is None) == (evaluate.clicked(answer.text[0]) is None)


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        ("Thought: The red circle.\nAction: click(start_box='(143,38)')", True),
        ("Thought: The red circle.\nAction: click(start_box='(143,", False),
        ("red", True),
        ("3", True),
        ("red circle, blue Login button", True),
        ("red circle,", False),
        ("I see a sea", False),
        ("", False),
    ],
)
def test_well_formed_answers_are_told_from_others(answer: str, good: bool):
    assert evaluate.well_formed(answer) is good


@pytest.fixture(scope="module")
def exam(examinee) -> list[inside.Answered]:
    """Thirty new screens, each asked everything."""
    return evaluate.examine(examinee, 30)


@pytest.mark.parametrize(("task", "least"), [("click", 0.9), ("label", 0.85), ("colour", 0.85), ("count", 0.8)])
def test_most_answers_on_new_screens_are_right(exam, task: str, least: float):
    right = evaluate.tally(exam)[task]["all"]
    assert len(right) > 20
    assert np.mean(right) >= least


def test_a_deleted_widget_is_no_longer_clicked_on(examinee, exam):
    left, stayed = evaluate.examine_deletion(examinee, evaluate.right_clicks(exam)[:20]).values()
    assert np.mean(left) >= 0.9
    assert np.mean(stayed) >= 0.9


def test_an_attribution_points_at_the_asked_for_widget(hooked, exam, monkeypatch):
    monkeypatch.delitem(inside.METHODS, "occlusion")
    clicks = evaluate.right_clicks(exam)[:10]
    found = inside.pointings(hooked, clicks)
    assert max(np.mean(one.by_size) for one in found.values()) >= 0.8
    assert np.mean(inside.chance(clicks)) < 0.1


def test_the_lens_sees_the_answer_come_up(hooked, exam):
    for reading in inside.readings(hooked, evaluate.right_clicks(exam)[:8]).values():
        rank = reading.ranks.mean(1)
        assert rank[0] > 2 * rank[-2] > 0
        assert rank[-1] == 0


def test_the_evaluation_fills_the_card(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "ANALYSED", 1)
    monkeypatch.setattr(evaluate, "STRANGE_QUESTIONS", evaluate.STRANGE_QUESTIONS[:1])
    card, picture = tmp_path / "README.md", tmp_path / "lens.png"
    card.write_text(f"before {evaluate.MARKS[0]} old {evaluate.MARKS[1]} after")
    evaluate.put_into_card(evaluate.report(DIRECTORY, "cpu", 4, picture), card)
    text = card.read_text()
    assert text.startswith("before")
    assert text.endswith("after")
    assert " old " not in text
    for row in [*lessons.ASKERS, *inside.METHODS, "whole answer: mean rank", "a photograph"]:
        assert f"| {row}" in text
    assert Image.open(picture).size[0] > 300


def test_every_tensor_of_a_training_step_is_made_on_the_default_device():
    screens = [world.make_screen(seed, size=(168, 168)) for seed in range(2)]
    asked = [lessons.make_lessons(seed, screen) for seed, screen in enumerate(screens)]
    with torch.device("meta"):
        patches, grid, targets = tower.tower_batch(screens)
        packed = language.pack(screens, asked)
    tensors = [patches, grid, *targets.values(), *(value for value in vars(packed).values() if torch.is_tensor(value))]
    assert len(tensors) == 2 + len(tower.SECTIONS) + 8
    assert {tensor.device.type for tensor in tensors} == {"meta"}


class StoppedError(Exception):
    """Training is stopped."""


def stopping(function, calls: int):
    """The function, which stops the training instead of its last call."""
    left = iter(range(calls - 1, -1, -1))

    def call(*arguments):
        if not next(left):
            raise StoppedError
        return function(*arguments)

    return call


def test_training_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train.train(whole, tower_steps=2, steps=3, batch=2)
    for module, name in ((tower, "tower_batch"), (language, "pack")):
        with monkeypatch.context() as patch, pytest.raises(StoppedError):
            patch.setattr(module, name, stopping(getattr(module, name), calls=2))
            train.train(stopped, tower_steps=2, steps=3, resume=True, batch=2)
    train.train(stopped, tower_steps=2, steps=3, resume=True, batch=2)
    for stage in ("tower", "language"):
        one, other = (torch.load(folder / f"{stage}.pt", weights_only=True) for folder in (whole, stopped))
        assert one["done"] == other["done"]
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert (whole / "log.csv").read_text() == (stopped / "log.csv").read_text()

    start, trained = train.start_model(0), export.load_stages(whole)
    assert not torch.equal(start.lm_head.weight, trained.lm_head.weight)
    assert not torch.equal(start.model.visual.merger.mlp[0].weight, trained.model.visual.merger.mlp[0].weight)
    export.write(trained, tmp_path / "files")
    assert evaluate.Examinee(tmp_path / "files").answer([Image.new("RGB", (200, 200))], ["Hello"], tokens=2)
