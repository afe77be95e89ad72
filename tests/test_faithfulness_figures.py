"""Figures of curves and re-drawn weights: everything has its place, and lines are those of the tables."""

import dataclasses
import itertools
import re

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
    colour_bars,
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
from common.page import HEIGHT, WIDTHS, Paper
from smooth_gradcam import METHODS
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
            assert laid_out(draw(), width).get_size_inches()[1] <= HEIGHT


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


# colours, curves and names


def test_colours_of_every_figure_have_a_bar_that_says_what_they_are(pages):
    photo, maps = varied(SIDES["landscape"], [3, 9, 4])
    result, staged = measured(maps, 5), {0: maps, 28: varied(SIDES["landscape"], [3, 9, 4], seed=1)[1]}
    every, together, compared, rows = _compared([3, 9, 4])
    for files, whose, bars in (
        (draw_faithfulness(photo, maps, result, score_rows(maps, result, None)), "gradcam", 2),
        (draw_randomization(photo, staged, randomization_rows(staged)), "gradcam", 1),
        (draw_comparison(photo, together, compared, rows), "each method", 2),
    ):
        drawn(only(files))
        (bar,) = colour_bars(pages[-1])
        assert len(bar.images[0].get_array()) == bars
        assert f"{whose}: share of the map's own maximum" in prose_of(pages[-1])
        assert ("over grey" in prose_of(pages[-1])) == ("overlays" in prose_of(pages[-1])) == (bars == 2)


def _compared(layers, grid=(4, 6), **options):
    """(maps of each method, the same side by side, what was measured of them, rows): the curves of all coincide."""
    every = {method: layered(grid, layers, seed=i, **options) for i, method in enumerate(STYLES)}
    together = side_by_side(every)
    compared = measured(together, 5)
    insertion = {key: compared.shares ** (0.3 if key.endswith(" 9") else 1.9) for key in compared.insertion}
    compared = dataclasses.replace(
        compared, insertion=insertion, deletion={key: 1 - curve for key, curve in insertion.items()}
    )
    return every, together, compared, comparison_rows(every, together, compared, None)


def test_compared_methods_have_a_plot_each_under_their_own_name(pages):
    every, together, compared, rows = _compared([3, 9, 27])
    drawn(only(draw_comparison(make_image(336, 224), together, compared, rows)))
    (figure,) = pages
    check_layout(figure)
    names = [text for text in figure.texts if text.get_text() in METHODS]
    assert [text.get_text() for text in names] == list(every)
    assert set(every) == set(METHODS) - {"auto"}
    plots = [axes for axes in figure.axes if axes.lines]
    assert len(plots) == len(names)
    for axes, name in zip(plots, names, strict=True):
        method, front = name.get_text(), max(axes.lines, key=lambda line: line.get_zorder())
        own = {row["layer"]: row["difference"] for row in rows if row["method"] == method}
        assert (front.get_label(), front.get_color(), front.get_marker()) == (method, *STYLES[method])
        assert dict(zip(front.get_xdata(), front.get_ydata(), strict=True)) == own
        assert {line.get_color() for line in axes.lines if line is not front} == {"0.7"}
        assert box_of(axes)[0] < box_of(name)[[0, 2]].mean() < box_of(axes)[2]
        assert box_of(name)[3] < box_of(axes)[1]
        assert max(own, key=own.get) == 9  # which is shown
        numbers = [text.get_text() for text in figure.texts if text.get_text().startswith("layer 9: ")]
        assert numbers == [f"layer 9: {own[9]:.2f}"] * len(names)


def test_numbers_below_zero_have_the_axes_minus_sign(pages):
    every, together, compared, rows = _compared([3, 4])
    drawn(only(draw_comparison(make_image(336, 224), together, compared, rows)))
    worst = rows[0]["difference"]
    assert worst < 0
    assert texts_of(pages[-1]).count(f"layer 3: −{-worst:.2f}") == len(every)
    assert not re.search(r"(?<!\w)-\.?\d", prose_of(pages[-1]))


def test_layers_whose_curves_coincide_are_told_apart(pages):
    photo, maps = varied(SIDES["landscape"], [3, 9, 4, 5, 6])
    result = measured(maps, 5)
    insertion = dict.fromkeys([3, 9, 4, 5], result.insertion[3]) | {6: result.insertion[6]}
    deletion = dict.fromkeys([3, 9, 4, 5], result.deletion[3]) | {6: result.deletion[6]}
    result = dataclasses.replace(result, insertion=insertion, deletion=deletion)
    drawn(only(draw_faithfulness(photo, maps, result, score_rows(maps, result, None))))
    plots = [axes for axes in pages[0].axes if axes.get_xlabel()]
    for axes in plots[:2]:
        coloured = [line for line in axes.lines if line.get_label() in ("layer 3", "layer 9", "layer 4")]
        coloured.sort(key=lambda line: line.get_zorder())
        widths = [line.get_linewidth() for line in coloured]
        assert len(widths) == 3
        assert widths == sorted(set(widths), reverse=True)
        assert len({line.get_linestyle() for line in coloured}) == 2
    assert "The curves of 1 of the 2 other layers lie behind those in colour." in prose_of(pages[0])
    insertion, deletion = (line for line in plots[2].lines if len(line.get_xdata()) == 5)
    assert insertion.get_markersize() > deletion.get_markersize()
    assert insertion.get_marker() != deletion.get_marker()


def test_layers_of_redrawn_weights_stand_side_by_side_with_markers_in_turn(pages):
    photo, maps = varied(SIDES["landscape"], [3, 9, 4])
    staged = {number: maps for number in (0, 14, 28)}  # all likenesses are 1
    drawn(only(draw_randomization(photo, staged, randomization_rows(staged))))
    (figure,) = pages
    for axes in [axes for axes in figure.axes if axes.get_xlabel()]:
        lines = [line for line in axes.lines if line.get_marker() != "None"]
        assert len({line.get_marker() for line in lines}) == 3
        xs = np.array([line.get_xdata() for line in lines])
        assert (np.diff(xs, axis=0) > 1).all()
        assert np.abs(xs - [0, 14, 28]).max() < 7  # nearer to its own step than to the next
    assert {"●", "■", "▲"} <= set(texts_of(figure))
    assert "overlays" not in prose_of(figure)


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
