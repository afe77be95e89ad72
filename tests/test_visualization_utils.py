"""Figures from arrays: what is hot stands where it belongs, what is unknown is grey."""

import collections
import copy
import dataclasses
import io
import operator
import pickle
import re
import types

import numpy as np
import pytest
from conftest import check_layout, make_image
from drawn_maps import (
    ASPECTS,
    CLOSE,
    FAR,
    FORMATS,
    LONG,
    SIDES,
    box_of,
    colour_bars,
    crops,
    drawn,
    found_under,
    greyish,
    hot_spot,
    is_cold,
    is_hot,
    laid_out,
    layered,
    make_maps,
    make_photo,
    measured,
    middle,
    numbered_words,
    of_all_sizes,
    only,
    prose_of,
    share_of,
    texts_of,
    unlike,
    varied,
    words_files,
)
from PIL import Image

import common.page
import test_gradcam
import visualization_utils
from common.files import write_files
from common.page import HEIGHT, Paper
from smooth_gradcam import Look, Settings, render_cam
from studies.faithfulness import score_rows
from studies.faithfulness_figures import draw_faithfulness, draw_randomization
from studies.randomization import randomization_rows
from studies.video import create_video_maps
from studies.words import create_word_maps, draw_words, html_data
from visualization_utils import (
    LayerPictures,
    comparative_layers,
    create_comparative_analysis,
    create_layer_comparison_grid,
    draw_comparative,
    draw_grid,
    draw_multilayer,
    draw_single,
    split_thirds,
    spread,
    visualize_multiple_layers,
)

CORNERS = [(0, 0), (0, -1), (-1, 0), (-1, -1)]


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    monkeypatch.setattr(common.page, "DPI", 100)  # quicker


@pytest.mark.parametrize("grid", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("corner", CORNERS)
def test_hot_corner_is_hot_in_the_written_picture_and_the_others_stay_photo(tmp_path, grid, corner):
    photo = make_photo(grid)
    files = draw_single(photo, make_maps({7: hot_spot(grid, corner)}))[1]
    write_files(tmp_path, {name: files[name] for name in ("heatmap.png", "superimposed_result.png")})
    heatmap = Image.open(tmp_path / "heatmap.png")
    overlay = Image.open(tmp_path / "superimposed_result.png")
    assert heatmap.size == overlay.size == photo.size
    for row, column in CORNERS:
        pixel = np.asarray(heatmap)[row, column]
        assert is_hot(pixel) if (row, column) == corner else is_cold(pixel)
        over = np.asarray(overlay)[row, column].astype(int)
        assert over[0] > over[2] + 100 if (row, column) == corner else (over == 255).all()  # the photo is white


def blueish(pixel):
    return (pixel[2] > 110) & (pixel[0] < 20) & (pixel[1] < 20)


def test_every_layer_is_in_the_figure_and_has_its_files():
    grid = FORMATS["landscape"]
    maps = {layer: hot_spot(grid, (0, 0)) for layer in range(28)}
    results, files = draw_multilayer(make_photo(grid), make_maps(maps))
    assert list(results) == list(range(28))
    names = {f"layer_{i}_{kind}.png" for i in range(28) for kind in ("heatmap", "superimposed")}
    assert set(files) == names | {"original_image.png", "all_layers_comparison.png"}
    few = draw_multilayer(make_photo(grid), make_maps({0: maps[0]}))[1]
    assert len(drawn(files["all_layers_comparison.png"])) < 11 * common.page.DPI  # a page
    assert share_of(drawn(few["all_layers_comparison.png"]), blueish) > 0.05


@pytest.mark.parametrize("per_third", [3, None])
def test_comparative_results_are_the_layers_of_each_third(per_third):
    grid, thirds = FORMATS["portrait"], comparative_layers(28, per_third)
    layers = [layer for third in thirds.values() for layer in third]
    maps = make_maps({layer: hot_spot(grid, (0, 0)) for layer in layers})
    results, files = draw_comparative(make_photo(grid), maps, thirds)
    assert {name: list(part) for name, part in results.items()} == thirds
    names = {"comparative_analysis.png", *(f"{name}/layer_comparison_grid.png" for name in thirds)}
    for name, part in thirds.items():
        names |= {f"{name}/layer_{layer}_{kind}.png" for layer in part for kind in ("heatmap", "superimposed")}
    assert set(files) == names


def test_thirds_hold_every_layer_once_in_order():
    for total in (3, 4, 5, 28, 36, 80):
        thirds = split_thirds(total)
        assert sum(thirds.values(), []) == list(range(total))
        assert all(thirds.values())
    with pytest.raises(ValueError, match="the model has 2"):
        split_thirds(2)


def test_comparative_analysis_has_some_layers_of_each_third_or_all():
    some = {"early": [0, 4, 8], "middle": [9, 13, 17], "late": [18, 22, 27]}
    assert comparative_layers(28) == comparative_layers(28, 3) == some
    assert comparative_layers(28, None) == comparative_layers(28, 99) == split_thirds(28)
    assert comparative_layers(28, 1) == {"early": [0], "middle": [9], "late": [18]}
    assert comparative_layers(4, 3) == comparative_layers(4, None) == {"early": [0], "middle": [1], "late": [2, 3]}
    for value in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"layers_per_third={value!r} must be a whole number, 1 or more"):
            comparative_layers(28, value)


def test_spread_has_the_ends_and_no_more_than_there_are():
    assert spread(list(range(10, 20)), 4) == [10, 13, 16, 19]
    assert spread([5, 6], 4) == [5, 6]


# text


def test_explained_part_changes_the_figure_and_is_yellow():
    grid = FORMATS["landscape"]

    def yellow(pixel):
        return (pixel[0] == 255) & (pixel[1] == 224) & (pixel[2] == 138)

    cam = hot_spot(grid, (0, 0))
    whole, part = (
        drawn(draw_single(make_photo(grid), make_maps({0: cam}, target=target))[1]["visualization.png"])
        for target in (None, "red car")
    )
    assert share_of(whole, yellow) == 0
    assert share_of(part, yellow) > 0.0005


@pytest.mark.parametrize("size", [(4000, 20), (20, 4000), (28, 28)])
def test_extreme_photos_can_be_drawn(size):
    photo = Image.new("RGB", size, "white")
    maps = make_maps({0: hot_spot((2, 3), (0, 0)), 1: np.zeros((2, 3), np.float32)})
    alone = make_maps({0: hot_spot((2, 3), (0, 0))})
    files = draw_grid(photo, maps)[1] | draw_single(photo, alone)[1] | words_files(photo, [maps])
    figures = ("layer_comparison_grid", "visualization", "words_by_layer")
    for name, content in files.items():
        if name.startswith(figures) and name.endswith(".png"):
            assert drawn(content).shape[1] == round(7.2 * common.page.DPI)
        elif name.endswith(".png"):
            assert drawn(content).shape == (size[1], size[0], 3)


# room for all


@of_all_sizes(1, 6, 28, 64)
def test_maps_of_any_number_of_layers_of_any_photo_fit_on_page_and_column(aspect, count, width):
    size = ASPECTS[aspect]
    grid = (size[1] // 28, size[0] // 28)
    maps = layered(grid, range(count), [1])
    tiny = {3: maps.maps[3] / 1e4} if count > 3 else {}
    maps, photo, paper = dataclasses.replace(maps, maps=maps.maps | tiny), make_image(*size), Paper(width)
    alone = dataclasses.replace(maps, maps={0: maps.maps[0]})
    files = draw_single(photo, alone, paper=paper)[1] | draw_multilayer(photo, maps, paper=paper)[1]
    files |= draw_grid(photo, maps, paper=paper)[1]
    if 1 < count <= 28:
        files |= draw_comparative(photo, maps, {"early": [0], "late": list(range(1, count))}, paper=paper)[1]
    shown = {}
    for name, content in files.items():
        if callable(content) and "layer_comparison" in name or name.startswith(("visual", "all", "compar")):
            figure = laid_out(content(), width)
            assert figure.get_size_inches()[1] <= HEIGHT
            shown.setdefault(re.sub(r"(_\d+)?\.png", "", name), set()).update(texts_of(figure))
    for name, texts in shown.items():
        assert name == "visualization" or {f"layer {layer}" for layer in maps.maps} <= texts or "/" in name


# what stands where in a figure


@pytest.mark.parametrize("size", SIDES.values(), ids=SIDES)
def test_panels_of_a_layer_are_the_written_pictures(pages, size):
    photo, maps = varied(size, [7])
    results, files = draw_single(photo, maps)
    page = drawn(files["visualization.png"])
    check_layout(pages[0])
    assert f"max {maps.maps[7].max():#.2g}" in texts_of(pages[0])
    found = found_under(pages[0], page, ["Photo", "Heatmap", "Overlay"])
    expected = {"Photo": np.asarray(photo), "Heatmap": results["heatmap"], "Overlay": results["superimposed"]}
    for label, (crop,) in found.items():
        assert unlike(crop, expected[label]) < CLOSE
        for other in (crop[::-1], crop[:, ::-1], crop.transpose(1, 0, 2)):
            assert unlike(other, expected[label]) > FAR
    assert "Smooth Grad-CAM (gradcam), layer 7" in texts_of(pages[0])


OVERLAYS, PAIRS = ["superimposed"], ["heatmap", "superimposed"]


@pytest.mark.parametrize(
    ("layers", "side", "kinds"),
    [
        ([5], "landscape", OVERLAYS),
        ([5], "portrait", PAIRS),
        ([9, 4, 27], "landscape", PAIRS),
        ([9, 4, 27], "portrait", OVERLAYS),
        (range(28), "portrait", PAIRS),
    ],
)
def test_pictures_under_a_layers_number_are_its_own(pages, side, layers, kinds):
    photo, maps = varied(SIDES[side], layers)
    results, files = draw_grid(photo, maps, paper=Paper(heatmaps=len(kinds) > 1))
    page = drawn(files["layer_comparison_grid.png"])
    check_layout(pages[0])
    assert unlike(crops(pages[0], page)[0][1], np.asarray(photo)) < CLOSE
    check_pictures(found_under(pages[0], page, [f"layer {layer}" for layer in layers]), results, kinds)


def check_pictures(found, results, kinds):
    """Under each layer are its pictures of these kinds, and of none but that layer."""
    names = [f"layer {layer}" for layer in results]
    assert list(found) == names
    following = [*list(results.values())[1:], *list(results.values())[:1]]
    for name, pictures, others in zip(names, results.values(), following, strict=True):
        for crop, kind in zip(found[name], kinds, strict=True):
            assert unlike(crop, pictures[kind]) < CLOSE
            assert others is pictures or unlike(crop, others[kind]) > FAR


@pytest.mark.parametrize(("side", "per_third"), [("landscape", 3), ("portrait", None)])
def test_thirds_are_rows_under_their_names(pages, monkeypatch, side, per_third):
    monkeypatch.setattr(common.page, "DPI", 150)  # seven columns of pairs are narrow
    thirds = comparative_layers(19, per_third)
    photo, maps = varied(SIDES[side], sum(thirds.values(), []))
    results, files = draw_comparative(photo, maps, thirds)
    page = drawn(files["comparative_analysis.png"])
    check_layout(pages[0])
    numbers = {text.get_text(): box_of(text) for text in pages[0].texts if text.get_text().startswith("layer ")}
    flat = {k: v for part in results.values() for k, v in part.items()}
    check_pictures(found_under(pages[0], page, numbers), flat, ["heatmap", "superimposed"])
    tops = {name: {numbers[f"layer {layer}"][1] for layer in part} for name, part in thirds.items()}
    assert all(len(top) == 1 for top in tops.values())
    below = [top for (top,) in tops.values()][1:] + [len(page)]
    sides = {text.get_text().split()[0]: middle(box_of(text))[1] for text in pages[0].texts if text.get_rotation()}
    assert list(sides) == list(thirds)
    for (name, (top,)), end in zip(tops.items(), below, strict=True):
        assert top < sides[name] < end
    for name, part in results.items():
        page = drawn(files[f"{name}/layer_comparison_grid.png"])
        assert f"Smooth Grad-CAM (gradcam), {name} layers" in texts_of(pages[-1])
        check_pictures(found_under(pages[-1], page, [f"layer {layer}" for layer in part]), part, ["superimposed"])


# pictures of one layer


def test_layers_pictures_are_drawn_when_asked_for(monkeypatch):
    photo, maps = varied(SIDES["portrait"], [3, 9])
    asked, real = [], visualization_utils.draw_layer
    monkeypatch.setattr(
        visualization_utils, "draw_layer", lambda *args, **kwargs: asked.append(args[2]) or real(*args, **kwargs)
    )
    pictures = LayerPictures(photo, maps, 9)
    results = [draw_grid(photo, maps)[0], draw_multilayer(photo, maps)[0]]
    results += draw_comparative(photo, maps, {"early": [3], "late": [9]})[0].values()
    results += draw_words(photo, "", [maps], [[0.5]], [["x"]])[0].values()
    assert list(pictures) == ["superimposed", "heatmap", "cam"]
    assert pictures["cam"] is maps.maps[9]
    assert asked == []
    for part in results:
        for layer, drawn_later in part.items():
            assert list(drawn_later) == ["superimposed", "heatmap", "cam"]
            assert (drawn_later["heatmap"] == render_cam(photo, maps.maps[layer])[1]).all()
    assert asked == [3, 9, 3, 9, 3, 9, 3, 9]
    assert pictures["heatmap"] is pictures["heatmap"]
    assert asked[8:] == [9]


def test_pictures_are_not_kept_for_the_files_that_have_them(tmp_path):
    photo, maps = varied(SIDES["portrait"], [3, 9])
    results, files = draw_grid(photo, maps)
    write_files(tmp_path, files)
    assert not any(isinstance(value, np.ndarray) for value in dict.values(results[3]) if value is not maps.maps[3])
    written = np.asarray(Image.open(tmp_path / "layer_9_heatmap.png"))
    np.testing.assert_array_equal(written, results[9]["heatmap"])


AS_A_DICT = {  # what makes a dict of three arrays of a result, in each way that Python has
    "dict": dict,
    "unpacked": lambda r: {**r},
    "keywords": lambda r: (lambda **named: named)(**r),
    "format": lambda r: {name: r[name] for name in r},
    "items": lambda r: dict(r.items()),
    "zipped": lambda r: dict(zip(r.keys(), r.values(), strict=True)),
    "method": lambda r: r.copy(),
    "or": lambda r: r | {},
    "ror": lambda r: {} | r,
    "ror of itself": lambda r: r | r,
    "update": lambda r: (found := {}).update(r) or found,
    "dict.update": lambda r: (found := {}, dict.update(found, r))[0],
    "ior": lambda r: operator.ior({}, r),
    "get": lambda r: {name: r.get(name) for name in r},
    "itemgetter": lambda r: dict(zip(r, operator.itemgetter(*r)(r), strict=True)),
    "pop": lambda r: {name: r.pop(name) for name in [*r]},
    "popitem": lambda r: dict(r.popitem() for _ in range(3)),
    "setdefault": lambda r: {name: r.setdefault(name, 5) for name in r},
    "pickle": lambda r: pickle.loads(pickle.dumps(r)),
    "old pickle": lambda r: pickle.loads(pickle.dumps(r, 0)),
    "deepcopy": copy.deepcopy,
    "shallow copy": copy.copy,
    "chain": lambda r: dict(collections.ChainMap({}, r)),
    "counter": lambda r: dict(sorted(r.items())),
    "proxy": lambda r: dict(types.MappingProxyType(r)),
    "match": lambda r: matched(r),
    "savez": lambda r: saved(r),
    "reversed": lambda r: {name: r[name] for name in reversed(r)},
    "default dict": lambda r: dict(collections.defaultdict(list, r)),
    "ordered": lambda r: dict(collections.OrderedDict(r)),
    "user dict": lambda r: dict(collections.UserDict(r)),
    "joined": lambda r: dict([*r.items()]),
}


def matched(result):
    match result:
        case {"superimposed": superimposed, "heatmap": heatmap, "cam": cam}:
            return {"superimposed": superimposed, "heatmap": heatmap, "cam": cam}
    return {}


def saved(result):
    file = io.BytesIO()
    np.savez(file, **result)
    file.seek(0)
    return dict(np.load(file))


@pytest.mark.parametrize("way", AS_A_DICT)
def test_a_layers_pictures_are_a_dict_in_every_way_python_has(way):
    photo, maps = varied(SIDES["portrait"], [3, 9])
    pictures = LayerPictures(photo, maps, 9)
    assert isinstance(pictures, dict)
    found = AS_A_DICT[way](pictures)
    superimposed, heatmap = render_cam(photo, maps.maps[9])
    assert type(found) is dict
    assert set(found) == {"superimposed", "heatmap", "cam"}
    for name, expected in (("superimposed", superimposed), ("heatmap", heatmap), ("cam", maps.maps[9])):
        np.testing.assert_array_equal(found[name], expected)


def test_a_layers_pictures_can_be_changed_as_a_dict():
    photo, maps = varied(SIDES["portrait"], [3, 9])
    pictures = LayerPictures(photo, maps, 9)
    pictures["heatmap"][:5] = 7
    assert (pictures["heatmap"][:5] == 7).all()
    pictures["overlay"] = pictures["superimposed"]
    pictures.update(superimposed="mine")
    pictures |= {"note": 1}
    assert [*pictures] == ["superimposed", "heatmap", "cam", "overlay", "note"]
    assert (pictures["superimposed"], (pictures | {"note": 2})["note"], ({"note": 2} | pictures)["note"]) == (
        "mine",
        2,
        1,
    )
    assert pictures.pop("absent", None) is pictures.get("absent") is None
    del pictures["cam"]
    assert "cam" not in pictures
    assert pictures == dict(pictures)
    assert (pictures != dict(pictures)) is False
    assert dict(pictures) == pictures
    assert "array(" in repr(pictures)
    assert "object object" not in repr(LayerPictures(photo, maps, 9))
    with pytest.raises(TypeError):
        hash(pictures)
    pictures.clear()
    assert pictures == {}


def test_layers_pictures_have_three_keys_and_are_those_of_the_core():
    photo, maps = varied(SIDES["portrait"], [3, 9])
    pictures = LayerPictures(photo, maps, 9)
    superimposed, heatmap = render_cam(photo, maps.maps[9])
    assert set(pictures) == set(dict(pictures)) == {"superimposed", "heatmap", "cam"}
    assert len(pictures) == 3
    np.testing.assert_array_equal(pictures["superimposed"], superimposed)
    np.testing.assert_array_equal(pictures["heatmap"], heatmap)
    np.testing.assert_array_equal(pictures["cam"], maps.maps[9])
    for name in ("overlay", "Heatmap", 9, None):
        assert name not in pictures
        assert pictures.get(name) is None
        with pytest.raises(KeyError):
            pictures[name]


# layers without a map


@pytest.mark.parametrize("why", ["no gradient", "zero everywhere"])
@pytest.mark.parametrize("grid", [(4, 6), (6, 4)], ids=["landscape", "portrait"])
def test_a_layer_without_a_map_is_a_grey_panel_with_words(drawings, grid, why):
    pages, panels = drawings
    photo, zero, hot = make_photo(grid), np.zeros(grid, np.float32), hot_spot(grid, (0, 0))
    maps, blank = make_maps({3: hot, 8: zero}, why=why), make_maps({8: zero}, why=why)
    alive = make_maps({3: hot, 8: hot})
    for draw, figure, names, prefix in (
        (draw_grid, "layer_comparison_grid.png", {"heatmap", "superimposed"}, "layer_8_"),
        (draw_single, "visualization.png", {"heatmap", "superimposed_result"}, ""),
    ):
        results, files = draw(photo, blank if draw is draw_single else maps)
        panels.clear()
        for name in names:
            panel = drawn(files[f"{prefix}{name}.png"])
            assert panel.shape[1::-1] == photo.size
            assert np.ptp(panel, axis=-1).max() == 0
            assert 0.01 < np.mean(panel < 150) < 0.4  # the words
        page = drawn(files[figure])
        assert {" ".join(words.split()) for words in panels} == {f"{why}: no map"}
        assert share_of(page, greyish) > 0.03
        assert f" Grey: no map at layer 8 ({why})." in prose_of(pages[-1])
        pictures = results if draw is draw_single else results[8]
        assert not pictures["cam"].any()
        assert np.ptp(pictures["heatmap"], axis=-1).max() == np.ptp(pictures["superimposed"], axis=-1).max() == 0
    grey = found_under(pages[0], drawn(draw_grid(photo, maps)[1]["layer_comparison_grid.png"]), ["layer 3", "layer 8"])
    assert all(np.ptp(crop, axis=-1).max() == 0 for crop in grey["layer 8"])
    page = drawn(draw_grid(photo, alive)[1]["layer_comparison_grid.png"])
    assert share_of(page, greyish) < 0.001
    assert "Grey" not in prose_of(pages[-1])


def test_layers_without_a_map_are_told_with_their_reasons_where_they_are_shown(pages):
    photo, maps = varied(SIDES["landscape"], range(9), blind=[2, 4, 7])
    maps = dataclasses.replace(maps, no_gradient=frozenset([7]))
    files = draw_comparative(photo, maps, split_thirds(9))[1]
    for name, said in {
        "comparative_analysis.png": "layer 2 (zero everywhere), layer 4 (zero everywhere), layer 7 (no gradient)",
        "early/layer_comparison_grid.png": "layer 2 (zero everywhere)",
        "middle/layer_comparison_grid.png": "layer 4 (zero everywhere)",
        "late/layer_comparison_grid.png": "layer 7 (no gradient)",
    }.items():
        drawn(files[name])
        assert f" stay photo. Grey: no map at {said}. Settings: " in prose_of(pages[-1])
    result = measured(maps, 5)
    drawn(only(draw_faithfulness(photo, maps, result, score_rows(maps, result, None))))
    left_out = "layer 2 (zero everywhere), layer 4 (zero everywhere), layer 7 (no gradient)"
    assert f" Left out, as it has no map: {left_out}. Settings: " in prose_of(pages[-1])


# what is said of the settings


STATED = {
    "usual": (
        Settings(5, 0.1),
        "Smooth Grad-CAM (gradcam)",
        "method gradcam, score logit, rules attnlrp, tap input, 5 noisy copies, noise 0.1, seed 0",
    ),
    "other": (
        Settings(12, 0.25, seed=7, tap="output", score="logprob", method="hirescam", rules="plain"),
        "Smooth Grad-CAM (hirescam)",
        "method hirescam, score logprob, rules plain, tap output, 12 noisy copies, noise 0.25, seed 7",
    ),
    "one copy": (
        Settings(1, 0.5, seed=2**40, contrast="car"),
        "Smooth Grad-CAM (gradcam)",
        "method gradcam, score logit minus the contrast's, rules attnlrp, tap input, 1 noisy copy, noise 0.5, seed "
        "1099511627776",
    ),
    "clean": (
        Settings(use_smooth=False, seed=3, method="product", score="logprob"),
        "Grad-CAM (product)",
        "method product, score logprob, rules attnlrp, tap input, no noise",
    ),
}


@pytest.mark.parametrize(("settings", "title", "stated"), STATED.values(), ids=STATED)
def test_every_figure_states_its_settings(pages, settings, title, stated):
    photo, maps = varied(SIDES["landscape"], [0, 1, 2], settings=settings)
    alone = dataclasses.replace(maps, maps={1: maps.maps[1]})
    words = [dataclasses.replace(word, settings=settings) for word in numbered_words(2, [1])[1]]
    result, staged = measured(maps, 5), {0: maps, 28: varied(SIDES["landscape"], [0, 1, 2], seed=1)[1]}
    of_maps = {
        f"{title}, layer 1": draw_single(photo, alone)[1]["visualization.png"],
        f"{title} by layer": draw_grid(photo, maps)[1]["layer_comparison_grid.png"],
        f"{title}: early, middle and late layers": draw_comparative(photo, maps, split_thirds(3))[1][
            "comparative_analysis.png"
        ],
        f"{title}, word by word": words_files(photo, words)["words_by_layer.png"],
    }
    of_measures = {
        f"{title}: faithfulness": only(draw_faithfulness(photo, maps, result, score_rows(maps, result, None))),
        f"{title}: does the map depend on the model?": only(
            draw_randomization(photo, staged, randomization_rows(staged))
        ),
    }
    figures = list((of_maps | of_measures).items())
    for heading, content in (
        figures if title == "Smooth Grad-CAM (gradcam)" else figures[:1]
    ):  # the words come from one function
        drawn(content)
        assert heading in prose_of(pages[-1])
        prose = prose_of(pages[-1])
        made = f" Settings: {stated}; photo 336 × 224 px, 6 × 4 image tokens"
        assert prose.endswith(made if heading in of_maps else (made, f"{made}; baseline blur"))
        assert prose.count("Settings:") == 1
        if heading in of_maps:
            assert f"{settings.method}: share of the map's own maximum; below: over grey" in texts_of(pages[-1])
            hot = "where the explained words come from"
            if settings.contrast is not None:
                hot = "what speaks for the explained words rather than for the other text"
            assert f" Hot: {hot}, as read at " in prose
    assert html_data(photo, "", words, [[0.5]] * 2, [["x"]] * 2)["settings"] == f"Settings: {stated}"


# strength and scale


def test_panels_say_their_maximum_and_what_is_weak(pages):
    grid = FORMATS["landscape"]
    photo, maps = make_photo(grid), {3: hot_spot(grid, (0, 0)), 9: hot_spot(grid, (0, 1)) / 25}
    drawn(draw_grid(photo, make_maps(maps))[1]["layer_comparison_grid.png"])
    assert {"max 3.0", "max 0.12, weak"} <= set(texts_of(pages[-1]))
    assert "Weak: below 5 % of the strongest." in prose_of(pages[-1])
    drawn(draw_grid(photo, make_maps({3: maps[3]}))[1]["layer_comparison_grid.png"])
    assert "weak" not in prose_of(pages[-1])


@pytest.mark.parametrize("look", [Look("jet", 0.5), Look(upsample="cells"), Look("viridis", scale="all")])
def test_look_reaches_every_written_picture(look):
    photo, maps = varied(SIDES["landscape"], [3, 9])
    peak = None if look.scale == "map" else max(cam.max() for cam in maps.maps.values())
    files = draw_grid(photo, maps, look)[1] | draw_comparative(photo, maps, {"early": [3], "late": [9]}, look)[1]
    for name, layer in (("layer_3", 3), ("layer_9", 9), ("early/layer_3", 3), ("late/layer_9", 9)):
        superimposed, heatmap = render_cam(photo, maps.maps[layer], look, peak)
        assert (drawn(files[f"{name}_superimposed.png"]) == superimposed).all()
        assert (drawn(files[f"{name}_heatmap.png"]) == heatmap).all()


def test_ticks_of_the_heatmap_stand_between_image_tokens(pages):
    photo, maps = varied(SIDES["landscape"], [3])
    drawn(draw_single(photo, maps)[1]["visualization.png"])
    panels = [axes for axes in pages[0].axes if axes.images and len(axes.images[0].get_array()) > 2]
    heatmap = sorted(panels, key=lambda axes: axes.get_position().x0)[1]
    height, width = heatmap.images[0].get_array().shape[:2]
    np.testing.assert_allclose(heatmap.get_xticks() + 0.5, np.arange(1, 6) * width / 6)
    np.testing.assert_allclose(heatmap.get_yticks() + 0.5, np.arange(1, 4) * height / 4)


def test_what_is_no_look_or_paper_is_refused_before_anything_is_computed(tmp_path):
    drawing = [
        *(create_layer_comparison_grid, visualize_multiple_layers, create_comparative_analysis),
        *(test_gradcam.single_layer_visualization, create_word_maps, create_video_maps),
    ]
    for draw in drawing:
        with pytest.raises(TypeError, match="paper='column' must be a Paper"):
            draw(None, None, None, "", save_dir=tmp_path / "out", paper="column")
        with pytest.raises(TypeError, match="look='jet' must be a Look"):
            draw(None, None, None, "", save_dir=tmp_path / "out", look="jet")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="heatmaps='all' must be True or False"):
        Paper(heatmaps="all")


# the height of a paper's page


@pytest.mark.parametrize(("size", "width"), [((336, 224), "column"), ((224, 336), "column"), ((224, 336), "page")])
def test_figures_of_many_layers_and_long_texts_are_nine_inches_high_at_most_and_have_every_layer_once(size, width):
    photo, maps = varied(size, range(28), answer=LONG, prompt=LONG)
    alone, paper = dataclasses.replace(maps, maps={7: maps.maps[7]}), Paper(width)
    files = draw_single(photo, alone, paper=paper)[1]
    for written in (draw_grid(photo, maps, paper=paper)[1], draw_multilayer(photo, maps, paper=paper)[1]):
        files |= written
    files |= draw_comparative(photo, maps, split_thirds(28), paper=paper)[1]
    shown = {}
    for name, draw in files.items():
        kind = re.sub(r"(_\d+)?\.png$", "", name)
        if kind.endswith(("visualization", "grid", "comparison", "analysis")):
            figure = draw().figure
            assert figure.get_size_inches()[1] <= HEIGHT
            assert len(colour_bars(figure)) == 1
            shown.setdefault(kind, []).extend(text for text in texts_of(figure) if re.fullmatch(r"layer \d+", text))
    every = [f"layer {layer}" for layer in range(28)]
    for kind in ("layer_comparison_grid", "all_layers_comparison", "comparative_analysis"):
        assert shown[kind] == every
    assert sum((shown[f"{name}/layer_comparison_grid"] for name in ("early", "middle", "late")), []) == every


def test_of_one_map_nothing_is_said_about_comparing_maps(pages):
    photo, maps = varied(SIDES["landscape"], [1, 2])
    drawn(draw_single(photo, dataclasses.replace(maps, maps={1: maps.maps[1]}))[1]["visualization.png"])
    assert "Colours: shares of the map's own maximum; overlays" in prose_of(pages[-1])
    drawn(draw_grid(photo, maps)[1]["layer_comparison_grid.png"])
    assert "which do not compare the strength of two maps" in prose_of(pages[-1])
