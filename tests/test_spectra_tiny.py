"""spectra-tiny: its world, its tokenizer, its files, and that it answers whatever it is shown."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from vlm_spectra_server.spectra_tiny import DIRECTORY, evaluate, language, lessons, parts, pixels, world

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


def test_what_it_was_not_made_for_gets_a_well_formed_answer(examinee):
    noise = np.random.default_rng(0).normal(128, 40, (12, 20, 3)).clip(0, 255).astype(np.uint8)
    photograph = Image.fromarray(noise).resize((640, 400), Image.Resampling.BICUBIC)
    for question in ("Click on the red circle", "Klicke auf den roten Kreis", "点击红色的圆圈"):
        (answer,) = examinee.answer([photograph], [question])
        assert answer.strip()
        assert "\ufffd" not in answer
    assert evaluate.clicked(examinee.answer([photograph], ["Click on the red circle"])[0])


def test_most_clicks_on_new_screens_are_right(examinee):
    asked = []
    for seed in range(world.HELD_OUT, world.HELD_OUT + 40):
        screen = world.make_screen(seed, count=(2, 5), size=(224, 224))
        asked.append((screen, lessons.ASKERS["click"](random.Random(seed), screen)))
    answers = examinee.answer_all([(screen, lesson.question) for screen, lesson in asked])
    right = [evaluate.hits(answer, lesson.target) for (_, lesson), answer in zip(asked, answers, strict=True)]
    assert sum(right) > len(right) / 2
