"""Points that a model writes come back in the pixels of the original image, through the processor's resizing."""

from __future__ import annotations

import pytest
import vlm_spectra as vs
from PIL import Image
from vlm_spectra.clicks import find_click, find_point

FORMS = {
    "click(start_box='({x},{y})')": "UI-TARS",
    "Thought: it is near (1, 2).\nAction: click(start_box='({x}, {y})')": "an action before a bare pair",
    "click(start_box='<|box_start|>({x},{y})<|box_end|>')": "UI-TARS 1.0",
    "<|box_start|>({x},{y})<|box_end|>": "box tokens",
    "click(point='<point>{x} {y}</point>')": "UI-TARS 1.5",
    "<point>{x} {y}</point>": "point tags",
    "({x},{y})": "a pair",
    "[{x}, {y}]": "a list",
    '{{"x": {x}, "y": {y}}}': "JSON",
    '```json\n[{{"point_2d": [{x}, {y}], "label": "red circle"}}]\n```': "point_2d",
    '{{"bbox_2d": [{left}, {top}, {right}, {bottom}]}}': "the centre of bbox_2d",
    "drag(start_box='({x},{y})', end_box='(5,6)')": "the start of a drag",
    "<|box_start|>({left},{top},{right},{bottom})<|box_end|>": "the centre of a box",
}


def written(form: str, x: int, y: int) -> str:
    return form.format(x=x, y=y, left=x - 10, right=x + 10, top=y - 6, bottom=y + 6)


def answered(inputs: vs.Inputs, text: str) -> list[vs.Point | None]:
    return vs.Generation(inputs, inputs.input_ids, [text], None).clicks


@pytest.mark.parametrize("form", FORMS, ids=FORMS.values())
def test_a_written_point_is_a_point_of_the_original_image(inputs, form):
    image = inputs.images[0]
    assert image.processed_size != image.original_size
    (point,) = answered(inputs, written(form, 70, 42))
    assert point.x == pytest.approx(70 * image.original_size[0] / image.processed_size[0])
    assert point.y == pytest.approx(42 * image.original_size[1] / image.processed_size[1])


@pytest.mark.parametrize("form", FORMS, ids=FORMS.values())
def test_thousandths_are_of_width_and_height(inputs, form):
    width, height = inputs.images[0].original_size
    point = find_click(written(form, 500, 250), inputs.images, "thousandths")
    assert (point.x, point.y) == (pytest.approx(width / 2), pytest.approx(height / 4))


def test_fractions_and_negative_numbers_are_numbers():
    assert find_point("(12.5, -3)") == vs.Point(12.5, -3.0)


@pytest.mark.parametrize("text", ["", "The red circle.", "(12)", "f(x, y)", "12, 13"])
def test_a_text_without_a_point_has_none(inputs, text):
    assert answered(inputs, text) == [None]


def test_a_point_that_the_prefill_begins_is_found(hooked, screenshot):
    inputs = hooked.prepare_messages("Click on the red circle", screenshot, "Action: click(start_box='(")
    (point,) = answered(inputs, "28,14)')")
    assert point.x == pytest.approx(28 * screenshot.width / inputs.images[0].processed_size[0])


def test_a_point_belongs_to_the_last_image_of_its_row(hooked, screenshot):
    tall = Image.new("RGB", (300, 900), "white")
    inputs = hooked.prepare_messages("Click on the red circle", [screenshot, tall])
    (point,) = answered(inputs, "(28,14)")
    width, height = inputs.images[1].processed_size
    assert (point.x, point.y) == (pytest.approx(28 * 300 / width), pytest.approx(14 * 900 / height))


def test_without_an_image_there_is_no_point(hooked):
    assert answered(hooked.prepare_messages("Hello"), "(1,2)") == [None]
