"""Pictures: the right values at the right pixels, one scale, the image's proportions, and text that stays text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vlm_spectra as vs
from PIL import Image
from vlm_spectra import pictures
from vlm_spectra.context import CacheContext
from vlm_spectra.images import Picture
from vlm_spectra.inputs import ImageLayout, Prompt, Tile
from vlm_spectra.pictures.colours import SCALES, colours, ink
from vlm_spectra.pictures.figure import Overlay

NASTY = '</title><script>alert(1)</script> & "it\'s"'
LAYERS, HEADS, SEQ = 3, 4, 20


class Reader(HTMLParser):
    """The elements of a fragment and its text; unbalanced or unknown markup shows up in `tags`."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def grey() -> Image.Image:
    """A plain image, so that a picture's colours are the heat's."""
    return Image.new("RGB", (300, 200), (128, 128, 128))


@pytest.fixture(scope="module")
def inputs(grey: Image.Image) -> vs.Inputs:
    """Two prompts: the second row has the image, 2 x 3 patches at positions 4 to 9."""
    labels = [[NASTY] * SEQ, [f"t{i}" for i in range(SEQ - 1)] + [NASTY]]
    layout = ImageLayout(1, grey.size, (84, 56), (2, 3), tuple(range(4, 10)))
    return vs.Inputs(
        prompts=(Prompt(NASTY), Prompt(NASTY, (Picture.of(grey),))),
        input_ids=np.zeros((2, SEQ), dtype=np.int64),
        attention_mask=np.ones((2, SEQ), dtype=np.int64),
        token_labels=labels,
        images=(layout,),
        text=["", ""],
    )


@pytest.fixture(scope="module")
def patterns() -> Mapping[str, np.ndarray]:
    """Random attention patterns of two rows."""
    draws = np.random.default_rng(0).random((LAYERS, 2, HEADS, SEQ, SEQ))
    draws /= draws.sum(-1, keepdims=True)
    return {f"lm.blocks.{layer}.attn.hook_pattern": draws[layer].astype(np.float32) for layer in range(LAYERS)}


@pytest.fixture(scope="module")
def cache(inputs: vs.Inputs, patterns: Mapping[str, np.ndarray]) -> vs.ActivationCache:
    return vs.ActivationCache(patterns, CacheContext(inputs.token_labels, inputs.images))


def panel_values(figure: pictures.Figure) -> list[list[float]]:
    return [panel.values.tolist() for panel in figure.panels]


def test_attention_takes_the_right_row_of_the_pattern(
    cache: vs.ActivationCache, inputs: vs.Inputs, patterns: Mapping[str, np.ndarray]
) -> None:
    one = patterns["lm.blocks.2.attn.hook_pattern"][1]
    assert panel_values(pictures.attention(cache, inputs, layer=2, head=3)) == [one[3, -1, 4:10].tolist()]
    assert panel_values(pictures.attention(cache, inputs, layer=2, head=0, position=11)) == [one[0, 11, 4:10].tolist()]
    mean = pictures.attention(cache, inputs, layer=2, position=-3)
    assert np.allclose(panel_values(mean), [one[:, -3, 4:10].mean(0)])
    assert len(pictures.attention(cache, inputs).panels) == LAYERS
    everything = pictures.attention(cache, inputs, head="all")
    assert len(everything.panels) == LAYERS * HEADS
    assert everything.columns == HEADS, "a line of panels is a layer"
    assert panel_values(everything)[2 * HEADS + 1] == one[1, -1, 4:10].tolist()
    assert everything.scale.high == max(map(max, panel_values(everything))), "all panels have one scale"
    assert everything.panels[9].title == f"layer 2, head 1: {one[1, -1, 4:10].sum():.0%}"


def test_attention_of_selected_positions_and_heads(inputs: vs.Inputs, patterns: Mapping[str, np.ndarray]) -> None:
    name = "lm.blocks.1.attn.hook_pattern"
    context = CacheContext(inputs.token_labels, inputs.images, [[2, 7], [3, 12]], [1, 3])
    some = vs.ActivationCache({name: patterns[name][:, [1, 3]][:, :, [3, 12]]}, context)
    expected = patterns[name][1]
    assert panel_values(pictures.attention(some, inputs, head=3)) == [expected[3, 12, 4:10].tolist()]
    assert panel_values(pictures.attention(some, inputs, head=1, position=3)) == [expected[1, 3, 4:10].tolist()]
    assert "t12" in pictures.attention(some, inputs).title
    with pytest.raises(vs.SpectraError, match=r"no position 4; it kept \[3, 12\]"):
        pictures.attention(some, inputs, position=4)
    with pytest.raises(vs.SpectraError, match="holds heads 1, 3"):
        pictures.attention(some, inputs, head=0)


def test_attention_of_heads_that_were_averaged(inputs: vs.Inputs, patterns: Mapping[str, np.ndarray]) -> None:
    name = "lm.blocks.1.attn.hook_pattern"
    context = CacheContext(inputs.token_labels, inputs.images, heads=[1, 3], reduce="mean_heads")
    mean = vs.ActivationCache({name: patterns[name][:, [1, 3]].mean(1)}, context)
    figure = pictures.attention(mean, inputs)
    assert panel_values(figure) == [mean[name][1, -1, 4:10].tolist()]
    assert "mean of 2 heads" in figure.panels[0].title
    for head in (1, "all"):
        with pytest.raises(vs.SpectraError, match="holds the mean over the heads"):
            pictures.attention(mean, inputs, head=head)
    norms = vs.ActivationCache({name: patterns[name][..., 0]}, CacheContext(inputs.token_labels, reduce="norm"))
    with pytest.raises(vs.SpectraError, match="holds norms"):
        pictures.attention(norms, inputs)


def test_a_head_as_numpy_counts_it(cache: vs.ActivationCache, inputs: vs.Inputs) -> None:
    one, other = (pictures.attention(cache, inputs, layer=2, head=head) for head in (np.int64(3), 3))
    assert panel_values(one) == panel_values(other)
    assert one.panels[0].title == other.panels[0].title


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"layer": 9}, "attn.hook_pattern"),
        ({"head": 4}, "heads 0, 1, 2, 3"),
        ({"head": "most"}, "'mean' or 'all'"),
        ({"position": 20}, "position 20 is out of range"),
        ({"image": 1}, "no image 1"),
        ({"peak": 0}, "above 0"),
        ({"peak": "x"}, "peak is 'x'"),
    ],
)
def test_what_is_not_there_is_refused(
    change: dict[str, Any], sentence: str, cache: vs.ActivationCache, inputs: vs.Inputs
) -> None:
    with pytest.raises(vs.SpectraError, match=sentence):
        pictures.attention(cache, inputs, **change)


def inside(figure: pictures.Figure, x: float, y: float) -> tuple[int, ...]:
    """The colour of a one-panel figure at a place of its image, from 0 to 1 each way."""
    panel = figure.panels[0]
    picture = Image.fromarray(np.asarray(figure.to_image()))
    across, down = panel.picture.size
    width = 480
    height = width * down / across
    top = 14 + (20 + 14 if figure.title else 0) + (18 if panel.title else 0)  # margin, title, panel's title
    return picture.getpixel((int(14 + x * width), int(top + y * height)))


def test_heat_lies_where_the_patch_is(inputs: vs.Inputs) -> None:
    scores = np.zeros((2, 3))
    scores[1, 2] = 2.0
    scores[0, 0] = -1.0
    figure = pictures.overlay(inputs, scores, label="logit")
    assert figure.scale.signed
    assert (figure.scale.low, figure.scale.high) == (-2, 2)
    against, plain, for_it = inside(figure, 0.16, 0.2), inside(figure, 0.5, 0.2), inside(figure, 0.83, 0.7)
    assert plain[0] == plain[1] == plain[2], "no heat leaves the image's own grey"
    assert for_it[0] > for_it[2] + 90, "vermillion"
    assert against[2] > against[0] + 30, "blue"
    assert abs(for_it[0] - plain[0]) + abs(for_it[2] - plain[2]) > abs(against[0] - plain[0]), "less is less opaque"
    sequence = np.full(SEQ, 99.0)
    sequence[4:10] = scores.ravel()
    assert pictures.overlay(inputs, sequence, label="logit").to_image() == figure.to_image()


def test_amounts_have_a_scale_from_nothing(inputs: vs.Inputs) -> None:
    figure = pictures.overlay(inputs, np.arange(6.0).reshape(2, 3), label="share", peak=10)
    assert (figure.scale.low, figure.scale.high) == (0, 10)
    assert pictures.overlay(inputs, np.zeros((2, 3))).to_image().size == figure.to_image().size
    with pytest.raises(vs.SpectraError, match=r"\[2, 3\] over the image's tokens, not \[3, 2\]"):
        pictures.overlay(inputs, np.zeros((3, 2)))


@pytest.mark.parametrize("size", [(300, 200), (90, 700), (1999, 100), (3, 3)])
def test_images_keep_their_proportions(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "gray")
    layout = ImageLayout(0, size, (56, 56), (2, 2), (0, 1, 2, 3))
    ids = np.zeros((1, 4), dtype=np.int64)
    inputs = vs.Inputs((Prompt("x", (Picture.of(image),)),), ids, ids + 1, [list("abcd")], (layout,), [""])
    figure = pictures.overlay(inputs, np.ones((2, 2)))
    pixels = np.asarray(figure.to_image()).astype(int)
    warm = pixels[:, :, 0] - pixels[:, :, 2] > 60
    body = warm[:-50]  # without the legend
    rows, columns = np.flatnonzero(body.any(1)), np.flatnonzero(body.any(0))
    width, height = columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1
    assert abs(height + 2 - (width + 2) * size[1] / size[0]) <= 2 + size[1] / size[0], "within a pixel"
    html = Reader(figure.to_html())
    svg = next(attributes for tag, attributes in html.tags if tag == "svg")
    assert svg["viewbox"] == f"0 0 {size[0]} {size[1]}"


def test_figures_for_a_notebook_and_on_disk(
    cache: vs.ActivationCache, inputs: vs.Inputs, tmp_path: Path, patterns: Mapping[str, np.ndarray]
) -> None:
    figure = pictures.attention(cache, inputs, layer=0, head=1)
    html = figure._repr_html_()
    reader = Reader(html)
    allowed = {"div", "img", "svg", "rect", "title", "span"}
    assert {tag for tag, _ in reader.tags} <= allowed, "no script, no style sheet, no link"
    assert "<script" not in html
    assert NASTY in "".join(reader.words), "the reading token's label, as text"
    value = patterns["lm.blocks.0.attn.hook_pattern"][1, 1, -1, 9]
    assert f"row 1, column 2: {value:.3g}" in "".join(reader.words), "pointing at a patch tells its value"
    for name in ("f.png", "f.jpg", "f.webp", "f.pdf", "f.html"):
        figure.save(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.html", "f.jpg", "f.pdf", "f.png", "f.webp"]
    page = (tmp_path / "f.html").read_text("utf-8")
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    with Image.open(tmp_path / "f.png") as twice:
        assert abs(twice.width - 2 * figure.to_image().width) <= 4, "larger, not blurred"
    for path, sentence in (("f.gif", "not in '.gif'"), ("f", "not in ''"), ("no/f.png", "no directory")):
        with pytest.raises(vs.SpectraError, match=sentence):
            figure.save(tmp_path / path)


def test_heatmaps() -> None:
    values = np.array([[1.0, -2.0, np.nan], [0.0, 0.5, 2.0]])
    figure = pictures.heatmap(values, ["a", NASTY], ["x", "y", NASTY], label="logit", title=NASTY, across="position")
    assert (figure.scale.low, figure.scale.high, figure.scale.colours) == (-2, 2, "signed")
    reader = Reader(figure.to_html())
    assert {tag for tag, _ in reader.tags} <= {"div", "table", "tr", "th", "td", "span"}
    hints = [attributes["title"] for tag, attributes in reader.tags if tag == "td"]
    assert hints[1] == "a, y: -2"
    assert hints[2] == f"a, {NASTY}: nothing"
    pixels = np.asarray(figure.to_image(3)).reshape(-1, 3)
    seen = {tuple(pixel) for pixel in pixels.tolist()}
    for value in (1.0, -2.0, 0.5, 2.0):
        assert tuple(colours(np.array(value / 2), "signed").tolist()) in seen
    assert pictures.heatmap(np.ones((2, 2))).scale.colours == "amount"
    assert pictures.heatmap([[0.1, 0.2]], texts=[["10 %", "20 %"]]).to_image().width > 150
    assert pictures.heatmap(np.random.default_rng(0).random((28, 2000))).to_image().width < 12_000
    for arguments, sentence in (
        ({"values": np.zeros(3)}, r"\[rows, columns\], not \[3\]"),
        ({"values": np.zeros((0, 3))}, r"not \[0, 3\]"),
        ({"values": [[1, 2], [3]]}, "as many in each row"),
        ({"values": "abc"}, "values are numbers"),
        ({"values": np.zeros((2, 2)), "rows": ["a"]}, "1 names for 2 rows"),
        ({"values": np.zeros((2, 2)), "texts": [["a", "b"]]}, "shape of its values"),
    ):
        with pytest.raises(vs.SpectraError, match=sentence):
            pictures.heatmap(**arguments)


def test_a_lens_as_a_figure(hooked: vs.HookedVLM, screenshot: Image.Image) -> None:
    inputs = hooked.prepare_messages(NASTY, screenshot)
    lens = hooked.logit_lens(inputs)
    figure = pictures.lens(lens)
    panel = figure.panels[0]
    assert panel.rows == tuple(str(layer) for layer in reversed(lens.layers))
    assert panel.values.shape == (len(lens.layers), 12)
    assert np.allclose(panel.values[0, -1], float(lens.probs[-1, 0, -1, 0]))
    assert panel.texts[0][-1].strip("·") == lens.tokens[-1][0][-1][0].strip(" ")
    assert figure.scale.high == 1
    patch = inputs.images[0].positions[2]
    few = pictures.lens(lens, positions=[patch, -1], by="entropy")
    assert few.panels[0].columns[0] == "▦1 0,2"
    assert np.allclose(few.panels[0].values[:, 1], np.asarray(lens.entropy)[::-1, 0, -1])
    assert "<script" not in figure.to_html()
    for change, sentence in (
        ({"row": 1}, "no row 1"),
        ({"row": "x"}, "no row 'x'"),
        ({"by": "x"}, "possible are"),
        ({"positions": [999]}, "no position"),
        ({"positions": "last"}, r"no position \['last'\]"),
        ({"positions": [1.5]}, r"no position \[1.5\]"),
    ):
        with pytest.raises(vs.SpectraError, match=sentence):
            pictures.lens(lens, **change)


def test_an_attribution_shows_itself(hooked: vs.HookedVLM, screenshot: Image.Image) -> None:
    wide = screenshot.resize((301, 180))
    inputs = hooked.prepare_messages(NASTY, [screenshot, wide])
    why = hooked.attribute(inputs)
    figure = why.picture(1)
    assert figure.panels[0].picture.size == (301, 180)
    assert np.allclose(figure.panels[0].values, np.asarray(why.image_grid(1)).ravel())
    assert why.to_image(0) != why.to_image(1)
    both = why.picture()
    assert [panel.title for panel in both.panels] == ["image 1", "image 2"]
    for number, panel in enumerate(both.panels):
        assert np.allclose(panel.values, np.asarray(why.image_grid(number)).ravel())
    assert [panel.title for panel in pictures.overlay(inputs, why.scores[0]).panels] == ["image 1", "image 2"]
    reader = Reader(why._repr_html_())
    assert len([tag for tag, _ in reader.tags if tag == "img"]) == 2
    assert "script" not in {tag for tag, _ in reader.tags}
    assert f"{float(why.target_value[0]):.4f}" in "".join(reader.words)
    with pytest.raises(vs.SpectraError, match="no image 2"):
        why.to_image(2)


def test_a_sweep_as_a_figure(inputs: vs.Inputs) -> None:
    names = [f"lm.blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]
    values = np.arange(6.0, dtype=np.float32).reshape(LAYERS, 2)
    sweep = vs.PatchSweep("denoising", "positions", inputs, inputs, names, [3, 19], values, 5.0, 1.0, ["7"])
    figure = sweep.picture()
    assert sweep._repr_html_() == figure.to_html() == pictures.patching(sweep).to_html()
    panel = figure.panels[0]
    assert panel.rows == ("layer 2", "layer 1", "layer 0")
    assert np.allclose(panel.values, (values[::-1] - 1) / 4), "0 is where it starts, 1 where it goes"
    assert (figure.scale.low, figure.scale.high) == (-1, 1)
    assert "hook_resid_post" in figure.title


def test_tiles_and_overviews_are_panels_of_their_own(grey: Image.Image) -> None:
    width, height = (float(side) for side in grey.size)
    tiles = (
        Tile((1, 2), (0.0, 0.0, width, height), (0, 1), overview=True),
        Tile((2, 1), (0.0, 0.0, width / 2, height), (2, 3), (0, 0)),
        Tile((2, 1), (width / 2, 0.0, width, height), (4, 5), (0, 1)),
    )
    layout = ImageLayout(0, grey.size, (56, 56), (2, 2), tuple(range(6)), tiles)
    ids = np.zeros((1, 7), dtype=np.int64)
    inputs = vs.Inputs((Prompt("x", (Picture.of(grey),)),), ids, ids + 1, [list("abcdefg")], (layout,), [""])
    fine, overview = pictures.overlay(inputs, np.arange(7.0)).panels
    assert isinstance(fine, Overlay)
    assert dict(zip(fine.boxes, fine.values.tolist(), strict=True)) == {
        (0.0, 0.0, 150.0, 100.0): 2.0,
        (0.0, 100.0, 150.0, 200.0): 3.0,
        (150.0, 0.0, 300.0, 100.0): 4.0,
        (150.0, 100.0, 300.0, 200.0): 5.0,
    }
    assert fine.names[3] == "row 1, column 1"
    assert overview.title == "overview"
    assert overview.values.tolist() == [0.0, 1.0]
    whole = pictures.overlay(inputs, np.arange(4.0).reshape(2, 2))
    assert len(whole.panels) == 1, "a grid has no scores for the overview"


def test_tokens_that_look_at_the_same_pixels_are_added_up(grey: Image.Image) -> None:
    tile = Tile((1, 3), (0.0, 0.0, 300.0, 200.0), (0, 1, 2), resampled=True)
    layout = ImageLayout(0, grey.size, (56, 56), (1, 3), (0, 1, 2), (tile,))
    ids = np.zeros((1, 3), dtype=np.int64)
    inputs = vs.Inputs((Prompt("x", (Picture.of(grey),)),), ids, ids + 1, [list("abc")], (layout,), [""])
    panel = pictures.overlay(inputs, np.array([1.0, 2.0, 4.0])).panels[0]
    assert panel.values.tolist() == [7.0]
    assert panel.names == ("3 tokens together",)


@pytest.mark.parametrize("name", SCALES)
def test_scales_change_steadily_in_lightness_and_text_is_legible_on_them(name: str) -> None:
    steps = colours(np.linspace(-1 if name == "signed" else 0, 1, 101), name).astype(float)
    light = steps @ [0.2126, 0.7152, 0.0722]
    changes = np.diff(light)
    if name == "signed":
        assert (changes[:49] >= 0).all()
        assert (changes[51:] <= 0).all()
        assert abs(light[0] - light[-1]) < 25, "both ends weigh the same"
    else:
        assert (changes <= 0).all() or (changes >= 0).all()
    for step in steps.astype(np.uint8):
        bright, faint = sorted((luminance(step.tolist()), luminance(ink(step))), reverse=True)
        assert (bright + 0.05) / (faint + 0.05) >= 4.5


def luminance(colour: Sequence[int]) -> float:
    """Relative luminance as WCAG 2 defines it."""
    red, green, blue = (c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
