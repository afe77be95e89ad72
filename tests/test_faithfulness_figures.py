"""Figures of curves and re-drawn weights: everything has its place, and lines are those of the tables."""

import dataclasses
import itertools

import numpy as np
import pytest
from conftest import check_layout, make_image
from drawn_maps import (
    ASPECTS,
    CLOSE,
    LONG,
    SHAPES,
    SIDES,
    box_of,
    bumps,
    crops,
    drawn,
    found_under,
    laid_out,
    layered,
    make_photo,
    measured,
    only,
    prose_of,
    texts_of,
    unlike,
    varied,
)
from matplotlib.colors import to_rgb

import common.page
from common.page import WIDTHS, Paper
from common.parts import HIGHEST
from studies.faithfulness import comparison_rows, score_rows, side_by_side
from studies.faithfulness_figures import STYLES, draw_comparison, draw_faithfulness, draw_randomization
from studies.randomization import randomization_rows
from visualization_utils import LayerPictures


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    monkeypatch.setattr(common.page, "DPI", 100)  # quicker


# room for all


@pytest.mark.parametrize(
    ("aspect", "width"),
    [*itertools.product(("1:5", "5:1"), WIDTHS), ("3:4", "column"), ("2:1", "page")],
)
def test_figures_of_measures_fit_on_page_and_column(aspect, width):
    size = ASPECTS[aspect]
    maps = layered((size[1] // 28, size[0] // 28), range(28), answer=LONG)
    photo, result, paper = make_image(*size), measured(maps, 5), Paper(width)
    staged = {number: dataclasses.replace(maps) for number in (0, 4, 8, 12, 16, 20, 24, 28)}
    every = {method: layered(maps.grid, [0, 5, 27], seed=i) for i, method in enumerate(STYLES)}
    together = side_by_side(every)
    compared = measured(together, 5)
    for files in (
        draw_faithfulness(photo, maps, result, score_rows(maps, result, None), paper=paper),
        draw_randomization(photo, staged, randomization_rows(staged), paper=paper),
        draw_comparison(photo, together, compared, comparison_rows(every, together, compared, None), paper=paper),
    ):
        for draw in files.values():
            assert laid_out(draw(), width).get_size_inches()[1] <= HIGHEST


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
    for draw in draw_faithfulness(photo, maps, result, rows).values():
        assert drawn(draw).shape[1] == round(7.2 * common.page.DPI)
        check_layout(pages[-1])
    figure = pages[0]
    plots = [axes for figure in pages for axes in figure.axes if axes.get_xlabel()]
    assert len(plots) == 4
    alive = [layer for layer in layers if layer not in blind]
    for axes, curves, random in zip(
        plots, (result.insertion, result.deletion), (result.random_insertion, result.random_deletion), strict=False
    ):
        lines = {line.get_label(): line for line in axes.lines}
        assert set(lines) == {*(f"layer {layer}" for layer in alive), *["random"] * bool(orders)}
        for layer in alive:
            np.testing.assert_array_equal(lines[f"layer {layer}"].get_ydata(), curves[layer])
        if orders:
            np.testing.assert_allclose(lines["random"].get_ydata(), random.mean(0))
        ordered = sorted(rows[: len(alive)], key=lambda row: -row["difference"])
        leaders = [f"layer {row['layer']}" for row in ordered[:3]]
        coloured = {name for name, line in lines.items() if len(set(to_rgb(line.get_color()))) > 1}
        assert coloured == set(leaders) <= set(texts_of(figure))
        assert ("other layers" in texts_of(figure)) == (len(alive) > 3)
        assert axes.get_xscale() == "log"
        assert axes.get_xlim() == (1 / 8, 1)
    values = [line for axes in plots[2:] for line in axes.lines if len(line.get_xdata()) == len(alive)]
    names = ["insertion", "deletion", *(["near", "energy", "obj_iou"] if mask else ["difference"])]
    by_layer = [line for line in values if list(line.get_xdata()) == alive]
    for line, name in zip(by_layer, names, strict=True):
        assert list(line.get_ydata()) == [row[name] for row in rows[:-1]]
        low, high = line.axes.get_ylim()
        assert low < min(line.get_ydata())
        assert max(line.get_ydata()) < high
    caption = prose_of(figure)
    assert ("Left out, as it has no map: layer 27 (no gradient)." in caption) == bool(blind)
    dashed = {1: "one random order", 5: "mean of 5 random orders, with their range"}
    assert (f" Dashed: {dashed.get(orders)}. " in caption) == ("Dashed" in caption) == bool(orders)
    assert ("score logit minus the contrast's" in caption) == ("contrast" in options)
    assert ("rather than “blue bus" in caption) == ("contrast" in options)


def test_second_occurrence_is_the_one_marked(pages):
    answer = "a dog and a dog"
    maps = layered(SHAPES["landscape"], [3], answer=answer)
    second = dataclasses.replace(maps, target_span=(12, 15))
    marks = []
    for token_maps in (maps, second):
        result = measured(token_maps, 5)
        rows = score_rows(token_maps, result, None)
        drawn(only(draw_faithfulness(make_photo(maps.grid), token_maps, result, rows)))
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
    picture = drawn(only(draw_randomization(make_photo(given.grid), staged, rows)))
    assert len(picture) < 8 * common.page.DPI
    (figure,) = pages
    check_layout(figure)
    assert {"the model", *(f"{number} re-drawn" for number in numbers[1:])} <= set(texts_of(figure))
    alive = [layer for layer in layers if layer not in blind]
    plots = [axes for axes in figure.axes if axes.get_xlabel()]
    for axes, name in zip(plots, ("spearman", "ssim"), strict=True):
        lines = [line for line in axes.lines if line.get_marker() not in ("None", "")]
        assert len(lines) == len(alive)
        for line, layer in zip(lines, alive, strict=True):
            assert list(line.get_ydata()) == [row[name] for row in rows if row["layer"] == layer]
            assert axes.get_ylim()[0] < min(line.get_ydata())


# what stands where in a figure


def test_picture_beside_the_curves_is_that_of_the_layer_that_leads(pages):
    photo, maps = varied(SIDES["landscape"], [3, 9, 4])
    result = measured(maps, 5)  # of falling difference
    swapped = {3: result.insertion[9], 9: result.insertion[3], 4: result.insertion[4]}
    result = dataclasses.replace(result, insertion=swapped)
    page = drawn(only(draw_faithfulness(photo, maps, result, score_rows(maps, result, None))))
    ((box, crop),) = crops(pages[0], page)
    assert unlike(crop, LayerPictures(photo, maps, 9)["superimposed"]) < CLOSE
    (name,) = (text for text in pages[0].texts if text.get_text() == "layer 9, the largest difference")
    assert box[3] < box_of(name)[1] < box[3] + 20


def test_heatmaps_of_redrawn_weights_stand_under_their_number(pages):
    photo, given = varied(SIDES["landscape"], [3, 9, 4])
    staged = {number: varied(SIDES["landscape"], [3, 9, 4], seed=number)[1] for number in (14, 28)}
    staged = {0: given} | staged
    page = drawn(only(draw_randomization(photo, staged, randomization_rows(staged))))
    found = found_under(pages[0], page, ["the model", "14 re-drawn", "28 re-drawn"])
    for (crop,), maps in zip(found.values(), staged.values(), strict=True):
        assert unlike(crop, LayerPictures(photo, maps, 9)["heatmap"]) < CLOSE
    assert "Heatmaps: layer 9 as" in prose_of(pages[0])
