"""Figures from arrays: what is hot stands where it belongs, what is unknown is grey, text of any kind fits."""

import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image

import visualization_utils
from smooth_gradcam import Faithfulness, TokenMaps, colorize_cam
from test_gradcam import randomization_rows, score_rows
from visualization_utils import (
    Page,
    draw_comparative,
    draw_faithfulness,
    draw_grid,
    draw_multilayer,
    draw_randomization,
    draw_single,
    draw_words,
    excerpt,
    font_families,
    representative_thirds,
    split_at_span,
    split_thirds,
    spread,
    text_width,
    wrap,
    write_files,
)

FORMATS = {"landscape": (4, 6), "portrait": (6, 4), "square": (5, 5)}
CORNERS = [(0, 0), (0, -1), (-1, 0), (-1, -1)]
ANSWER = "There is a dog at the top left, and a red car in the center."


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    monkeypatch.setattr(visualization_utils, "DPI", 100)  # quicker


def make_photo(grid):
    return Image.new("RGB", (grid[1] * 28, grid[0] * 28), "white")


def make_maps(maps, *, answer=ANSWER, prompt="What is in this image?", target=None, **settings):
    usual = {"num_samples": 5, "noise_std": 0.1, "seed": 0, "score": "logit", "method": "gradcam", "tap": "input"}
    start = 0 if target is None else answer.index(target)
    target = answer if target is None else target
    return TokenMaps(
        maps=maps,
        grid=next(iter(maps.values())).shape,
        prompt=prompt,
        answer=answer,
        tokens=[1, 2, 3],
        target=target,
        target_span=(start, start + len(target)),
        target_tokens=[0],
        no_gradient=frozenset(layer for layer, cam in maps.items() if not cam.any()),
        settings=usual | {"norms": "frozen", "contrast": None, "max_new_tokens": 128} | settings,
    )


def hot_spot(grid, cell):
    cam = np.zeros(grid, np.float32)
    cam[cell] = 3
    return cam


def is_red(pixel):
    return pixel[0] > 120 and pixel[2] < 60


def is_blue(pixel):
    return pixel[2] > 120 and pixel[0] < 60


@pytest.mark.parametrize("grid", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("corner", CORNERS)
def test_hot_corner_is_red_in_the_written_picture_and_the_others_blue(tmp_path, grid, corner):
    photo = make_photo(grid)
    write_files(tmp_path, draw_single(photo, make_maps({7: hot_spot(grid, corner)}))[1])
    heatmap = Image.open(tmp_path / "heatmap.png")
    overlay = Image.open(tmp_path / "superimposed_result.png")
    assert heatmap.size == overlay.size == photo.size
    for row, column in CORNERS:
        pixel = np.asarray(heatmap)[row, column]
        assert is_red(pixel) if (row, column) == corner else is_blue(pixel)
        red, _, blue = np.asarray(overlay)[row, column].astype(int)
        assert (red > blue) == ((row, column) == corner)


def share_of(figure, test):
    return np.mean(test(np.moveaxis(figure.astype(int), -1, 0)))


def blueish(pixel):
    return (pixel[2] > 110) & (pixel[0] < 20) & (pixel[1] < 20)


def greyish(pixel):
    return (np.ptp(pixel, axis=0) == 0) & (abs(pixel[0] - 204) < 2)


@pytest.mark.parametrize("grid", FORMATS.values(), ids=FORMATS)
def test_a_map_without_gradient_is_a_grey_panel_with_words(grid):
    maps = make_maps({3: hot_spot(grid, (0, 0)), 8: np.zeros(grid, np.float32)})
    results, files = draw_grid(make_photo(grid), maps)
    for kind in ("heatmap", "superimposed"):
        panel = files[f"layer_8_{kind}.png"]
        assert panel.shape == files[f"layer_3_{kind}.png"].shape
        assert np.ptp(panel, axis=-1).max() == 0
        assert 0.01 < np.mean(panel < 150) < 0.4  # the words
    assert not results[8]["cam"].any()
    assert share_of(files["layer_comparison_grid.png"], greyish) > 0.03
    alive = draw_grid(make_photo(grid), make_maps({3: hot_spot(grid, (0, 0)), 8: hot_spot(grid, (0, 0))}))[1]
    assert share_of(alive["layer_comparison_grid.png"], greyish) < 0.001


def test_every_layer_is_in_the_figure_and_has_its_files():
    grid = FORMATS["landscape"]
    maps = {layer: hot_spot(grid, (0, 0)) for layer in range(28)}
    results, files = draw_multilayer(make_photo(grid), make_maps(maps))
    assert list(results) == list(range(28))
    names = {f"layer_{i}_{kind}.png" for i in range(28) for kind in ("heatmap", "superimposed")}
    assert set(files) == names | {"original_image.png", "all_layers_comparison.png"}
    few = draw_multilayer(make_photo(grid), make_maps({0: maps[0]}))[1]
    assert len(files["all_layers_comparison.png"]) < 11 * visualization_utils.DPI  # a page
    assert share_of(few["all_layers_comparison.png"], blueish) > 0.05


def test_comparative_results_are_the_layers_of_each_third():
    grid, thirds = FORMATS["portrait"], representative_thirds(28)
    layers = [layer for third in thirds.values() for layer in third]
    maps = make_maps({layer: hot_spot(grid, (0, 0)) for layer in layers})
    results, files = draw_comparative(make_photo(grid), maps, thirds)
    assert {name: list(part) for name, part in results.items()} == thirds
    assert "comparative_analysis.png" in files
    for name, part in thirds.items():
        assert f"{name}/layer_comparison_grid.png" in files
        assert all(f"{name}/layer_{layer}_heatmap.png" in files for layer in part)


def test_thirds_hold_every_layer_once_in_order():
    for total in (3, 4, 5, 28, 36, 80):
        thirds = split_thirds(total)
        assert sum(thirds.values(), []) == list(range(total))
        assert all(thirds.values())
    with pytest.raises(ValueError, match="the model has 2"):
        split_thirds(2)


def test_spread_has_the_ends_and_no_more_than_there_are():
    assert spread(list(range(10, 20)), 4) == [10, 13, 16, 19]
    assert spread([5, 6], 4) == [5, 6]


# text

TEXTS = {
    "dollars": "It costs $5, or $x^2$, or \\frac{1}{2} with { and } and 100 %_^",
    "Chinese": "左上角有一只狗，中间有一辆红色的汽车。" * 60,
    "Arabic": "هناك كلب في أعلى اليسار وسيارة حمراء في الوسط",
    "emoji": "a dog 🐕 and a car 🚗",
    "one word": "a" * 2000,
    "lines": "first\nsecond\r\n\tthird\x00\x07",
    "long": "the dog and the car " * 300,
    "empty prompt": " ",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_any_text_can_be_drawn(text):
    grid = FORMATS["landscape"]
    maps = make_maps({0: hot_spot(grid, (0, 0))}, answer=text, prompt=text)
    figure = draw_single(make_photo(grid), maps)[1]["visualization.png"]
    assert figure.shape[1] == round(7.2 * visualization_utils.DPI)
    assert len(figure) < 8 * visualization_utils.DPI
    assert (figure[:, -4:] == 255).all()  # nothing runs out of the page


def test_wrapped_lines_fit_and_hold_all_of_the_text():
    families, drawn = font_families("")
    assert drawn
    text = "There is a dog, " * 20 + "x" * 150
    lines = wrap(text, 3.0, 8, families)
    assert "".join(text[a:b] for a, b in lines) == text
    assert all(text_width(text[a:b].rstrip(), 8, families) <= 3.0 for a, b in lines)
    assert all(text[b - 1] == " " for _, b in lines if b <= text.index("x"))


def test_explained_part_stays_in_a_cut_answer_and_is_marked():
    text = "and so on " * 100 + "the dog sits" + " and so on" * 100
    start = text.index("dog")
    cut, (a, b) = excerpt(text, (start, start + 3), 200)
    assert cut[a:b] == "dog"
    assert len(cut) <= 204
    assert cut.startswith("… on and so")
    assert cut.endswith(" …")
    lines = wrap(cut, 2.0, 8, font_families(cut)[0])
    marked = [run for line in lines for run, mark in split_at_span(cut, line, (a, b)) if mark]
    assert marked == ["dog"]


def test_explained_part_changes_the_figure_and_is_yellow():
    grid = FORMATS["landscape"]

    def yellow(pixel):
        return (pixel[0] == 255) & (pixel[1] == 224) & (pixel[2] == 138)

    cam = hot_spot(grid, (0, 0))
    whole = draw_single(make_photo(grid), make_maps({0: cam}))[1]["visualization.png"]
    part = draw_single(make_photo(grid), make_maps({0: cam}, target="red car"))[1]["visualization.png"]
    assert share_of(whole, yellow) == 0
    assert share_of(part, yellow) > 0.0005


def test_colour_scale_runs_from_the_maps_blue_to_its_red():
    page = Page(2, ["DejaVu Sans"])
    page.colour_scale(0.5, 0.2, 1, 0.2, colorize_cam(np.linspace(0, 1, 256)), (0, 1), 7)
    row = page.finish(1)[round(0.3 * visualization_utils.DPI)].astype(int)
    assert is_blue(row[round(0.51 * visualization_utils.DPI)])
    assert is_red(row[round(1.49 * visualization_utils.DPI)])


@pytest.mark.parametrize("size", [(4000, 20), (20, 4000), (28, 28)])
def test_extreme_photos_can_be_drawn(size):
    photo = Image.new("RGB", size, "white")
    maps = make_maps({0: hot_spot((2, 3), (0, 0)), 1: np.zeros((2, 3), np.float32)})
    _, files = draw_grid(photo, maps)
    assert files["layer_0_heatmap.png"].shape == (size[1], size[0], 3)
    draw_single(photo, make_maps({0: hot_spot((2, 3), (0, 0))}))


# figures of measures and words


LONG = "There is a dog at the top left, and a red car in the center of the scene, with people. " * 8
SHAPES = {"landscape": (12, 16), "portrait": (16, 12), "wide": (3, 27), "tall": (27, 3)}


@pytest.fixture
def pages(monkeypatch):
    """The pages that are drawn, as matplotlib's figures."""
    seen, real = [], visualization_utils.figure_to_array

    def keep(figure):
        seen.extend([figure] * (len(figure.axes) > 0))  # a grey panel has none
        return real(figure)

    monkeypatch.setattr(visualization_utils, "figure_to_array", keep)
    return seen


def check_layout(figure):
    """Nothing overlaps, and nothing runs out of the page."""
    renderer = figure.canvas.get_renderer()
    boxes = {f"text {i} {t.get_text()}": t.get_window_extent(renderer) for i, t in enumerate(figure.texts)}
    boxes = {name: box for name, box in boxes.items() if box.width > 1}
    boxes |= {f"axes {i}": axes.get_tightbbox(renderer) for i, axes in enumerate(figure.axes)}
    for name, box in boxes.items():
        assert box.x0 >= 0, name
        assert box.y0 >= 0, name
        assert box.x1 <= figure.bbox.width, name
        assert box.y1 <= figure.bbox.height, name
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(wide, high) < 2, (one, other)
    for axes in figure.axes:
        if axes.get_legend():
            legend = axes.get_legend().get_window_extent(renderer)
            assert not legend.overlaps(axes.bbox)


def texts_of(figure):
    return [text.get_text() for text in figure.texts]


def bumps(grid, seed):
    return np.random.default_rng(seed).random(grid).astype(np.float32)


def layered(grid, layers, blind=(), **options):
    maps = {layer: bumps(grid, layer) * (layer not in blind) for layer in layers}
    return make_maps(maps, **{"target": "dog"} | options)


def measured(token_maps, orders):
    shares = np.linspace(0, 1, 9)
    powers = np.linspace(0.2, 1.5, len(token_maps.maps))
    curves = {layer: shares**power for layer, power in zip(token_maps.maps, powers, strict=True)}
    curves = {layer: curve for layer, curve in curves.items() if layer not in token_maps.no_gradient}
    random = np.array([shares**power for power in np.linspace(0.8, 1.2, orders)]).reshape(orders, -1 if orders else 9)
    falling = {layer: 1 - curve for layer, curve in curves.items()}
    return Faithfulness(shares, curves, falling, random, 1 - random, "blur", 100)


@pytest.mark.parametrize(
    ("layers", "shape", "mask", "orders", "blind", "options"),
    [
        ([12], "landscape", False, 5, [], {}),
        ([0, 5, 11, 16, 22, 27], "landscape", True, 5, [], {"target": None}),
        (range(28), "portrait", True, 5, [], {"answer": LONG, "prompt": LONG}),
        (range(28), "wide", False, 1, [], {"answer": LONG, "contrast": "blue bus " * 9}),
        ([0, 5, 27], "tall", False, 0, [27], {"answer": LONG, "prompt": LONG}),
    ],
    ids=["one", "six", "portrait", "wide", "tall"],
)
@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")  # of no random order
def test_figure_of_curves_has_room_for_all(pages, layers, shape, mask, orders, blind, options):
    maps = layered(SHAPES[shape], layers, blind, **options)
    photo, result = make_photo(maps.grid), measured(maps, orders)
    pixels = np.tri(photo.height, photo.width, dtype=bool) if mask else None
    rows = score_rows(maps, result, pixels)
    assert draw_faithfulness(photo, maps, result, rows).shape[1] == round(7.2 * visualization_utils.DPI)
    (figure,) = pages
    check_layout(figure)
    plots = [axes for axes in figure.axes if axes.get_xlabel()]
    assert len(plots) == 4
    alive = [layer for layer in layers if layer not in blind]
    for axes, curves, random in zip(
        plots, (result.insertion, result.deletion), (result.random_insertion, result.random_deletion), strict=False
    ):
        drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
        assert set(drawn) == {*(f"layer {layer}" for layer in alive), *["random"] * bool(orders)}
        for layer in alive:
            np.testing.assert_array_equal(drawn[f"layer {layer}"], curves[layer])
        if orders:
            np.testing.assert_allclose(drawn["random"], random.mean(0))
    values = [line for axes in plots[2:] for line in axes.lines if len(line.get_xdata()) == len(alive)]
    names = ["insertion", "deletion", *(["near", "energy", "obj_iou"] if mask else ["difference"])]
    by_layer = [line for line in values if list(line.get_xdata()) == alive]
    for line, name in zip(by_layer, names, strict=True):
        assert list(line.get_ydata()) == [row[name] for row in rows[:-1]]
        low, high = line.axes.get_ylim()
        assert low < min(line.get_ydata())
        assert max(line.get_ydata()) < high
    caption = " ".join(" ".join(texts_of(figure)).split())
    assert ("Left out: layer 27" in caption) == bool(blind)
    assert (f"mean of {orders} random order" in caption) == bool(orders)
    assert ("minus that of the contrast" in caption) == ("contrast" in options)
    assert ("rather than “blue bus" in caption) == ("contrast" in options)


def test_second_occurrence_is_the_one_marked(pages):
    answer = "a dog and a dog"
    maps = layered(SHAPES["landscape"], [3], answer=answer)
    second = dataclasses.replace(maps, target_span=(12, 15))
    marks = []
    for token_maps in (maps, second):
        result = measured(token_maps, 5)
        draw_faithfulness(make_photo(maps.grid), token_maps, result, score_rows(token_maps, result, None))
        figure = pages[-1]
        (mark,) = (artist for artist in figure.artists + figure.patches if artist is not figure.patch)
        renderer = figure.canvas.get_renderer()
        left = mark.get_window_extent(renderer).x0
        marked = [text for text in figure.texts if text.get_text().strip() == "dog"]
        marks.append(left)
        assert any(abs(text.get_window_extent(renderer).x0 - left) < 3 for text in marked)
    assert marks[1] > marks[0] + 20


@pytest.mark.parametrize(
    ("layers", "numbers", "shape", "blind", "options"),
    [
        ([12], [0, 28], "wide", [], {}),
        ([0, 5, 11, 16, 22, 27], [0, 4, 8, 12, 16, 20, 24, 28], "landscape", [27], {"answer": LONG}),
        (range(28), [0, 4, 8, 12, 16, 20, 24, 28], "portrait", [], {"target": None}),
        ([0, 1, 2], [0, 1, 2, 3], "tall", [], {}),
    ],
    ids=["wide", "landscape", "portrait", "tall"],
)
def test_figure_of_redrawn_weights_has_room_for_all(pages, layers, numbers, shape, blind, options):
    given = layered(SHAPES[shape], layers, blind, **options)
    staged = {0: given}
    for number in numbers[1:]:  # ends at the opposite of what it was
        maps = {
            layer: cam.max() - cam if number == numbers[-1] else bumps(cam.shape, number)
            for layer, cam in given.maps.items()
        }
        staged[number] = dataclasses.replace(given, maps=maps)
    rows = randomization_rows(staged)
    picture = draw_randomization(make_photo(given.grid), staged, rows)
    assert len(picture) < 8 * visualization_utils.DPI
    (figure,) = pages
    check_layout(figure)
    assert {"the model", *(f"{number} re-drawn" for number in numbers[1:])} <= set(texts_of(figure))
    alive = [layer for layer in layers if layer not in blind]
    plots = [axes for axes in figure.axes if axes.get_xlabel()]
    for axes, name in zip(plots, ("spearman", "ssim"), strict=True):
        lines = [line for line in axes.lines if len(line.get_xdata()) == len(numbers) and line.get_marker() == "o"]
        assert len(lines) == len(alive)
        for line, layer in zip(lines, alive, strict=True):
            assert list(line.get_ydata()) == [row[name] for row in rows if row["layer"] == layer]
            assert axes.get_ylim()[0] < min(line.get_ydata())


PLACES = "There is a plane at the top left, a house on the right, a dog at the bottom left and a bicycle at the bottom."
PARTS = {
    "one": ["dog"],
    "ten": ["plane", "top", "left", "house", "right", "dog", "bottom", "left", "bicycle", "bottom"],
    "all": PLACES.replace(",", "").replace(".", "").split(),
}
SCRIPTS = "左上角有一只狗 🐕, extraordinarilylongcompoundword 中间有"


def worded(words, answer, grid, layers, blind=()):
    maps, end = [], 0
    for word in words:
        start = answer.index(word, end)
        end = start + len(word)
        maps.append(
            dataclasses.replace(layered(grid, layers, blind, answer=answer, target=word), target_span=(start, end))
        )
    return maps


@pytest.mark.parametrize(
    ("words", "answer", "shape", "layers", "blind"),
    [
        (PARTS["one"], PLACES, "landscape", [12], []),
        (PARTS["ten"], PLACES, "landscape", [0, 12, 27], [27]),
        (PARTS["all"], PLACES, "portrait", [0], []),
        (PARTS["one"], LONG, "portrait", range(28), []),
        (PARTS["ten"], PLACES, "wide", [0, 12], []),
        (PARTS["ten"], PLACES, "tall", [0, 12], [12]),
        (["左", "狗", "🐕", "extraordinarilylongcompoundword", "中间"], SCRIPTS, "landscape", [3, 9], []),
    ],
    ids=["one", "ten", "all", "28 layers", "wide", "tall", "scripts"],
)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_figure_of_words_has_room_for_all(pages, words, answer, shape, layers, blind):
    grid = SHAPES[shape]
    maps = worded(words, answer, grid, layers, blind)
    files = draw_words(make_photo(grid), "photo.jpg", maps, [[0.5]] * len(maps), [["x"]] * len(maps))[1]
    (figure,) = pages
    check_layout(figure)
    cells = [axes for axes in figure.axes if axes.images]
    assert len(cells) == len(words) * len(layers) + 2  # the photo and the colour scale
    found = "".join(texts_of(figure)).replace(" ", "")
    assert all(word in found for word in words)
    names = [f"layer {layer}" for layer in layers]
    assert [text for text in texts_of(figure) if text in names] == names * -(-len(words) // 10)
    assert (
        len(files["words_by_layer.png"]) < (2 + 1.7 * len(layers) * -(-len(words) // 10) + 2) * visualization_utils.DPI
    )
    grey = share_of(files["words_by_layer.png"], greyish)
    assert grey > 0.03 if blind and shape == "landscape" else grey > 0.01 if blind else grey < 0.005
    assert ("no gradient reaches the layer" in " ".join(" ".join(texts_of(figure)).split())) == bool(blind)


def test_text_before_a_word_is_that_next_to_it(pages):
    maps = worded(["bicycle"], PLACES, SHAPES["landscape"], [3])
    draw_words(make_photo(maps[0].grid), "photo.jpg", maps, [[0.5]], [["x"]])
    before = texts_of(pages[0])
    assert any(text.endswith("left and a") for text in before)
    assert "bicycle" in before
