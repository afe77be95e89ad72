"""Figures from arrays: what is hot stands where it belongs, what is unknown is grey, text of any kind fits."""

import numpy as np
import pytest
from PIL import Image

import visualization_utils
from smooth_gradcam import TokenMaps, colorize_cam
from visualization_utils import (
    Page,
    draw_comparative,
    draw_grid,
    draw_multilayer,
    draw_single,
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


# files


def test_nothing_is_written_if_one_file_fails(tmp_path):
    with pytest.raises(AttributeError):
        write_files(tmp_path / "new/out", {"a.png": np.zeros((2, 2, 3), np.uint8), "b.png": None})
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_result_survives_a_failure(tmp_path):
    picture = np.zeros((2, 2, 3), np.uint8)
    write_files(tmp_path, {"layer_1_heatmap.png": picture})
    with pytest.raises(AttributeError):
        write_files(tmp_path, {"layer_1_heatmap.png": picture + 1, "b.png": None})
    assert [path.name for path in tmp_path.iterdir()] == ["layer_1_heatmap.png"]
    assert not np.asarray(Image.open(tmp_path / "layer_1_heatmap.png")).any()


def test_only_pictures_of_layers_of_an_earlier_run_are_removed(tmp_path):
    for name in ("layer_3_heatmap.png", "maps.npz", "layer_3_heatmap.png.bak", "layer_x_heatmap.png", "notes.txt"):
        (tmp_path / name).touch()
    write_files(tmp_path, {"layer_4_heatmap.png": np.zeros((2, 2, 3), np.uint8)})
    left = {path.name for path in tmp_path.iterdir()}
    kept = {"maps.npz", "layer_3_heatmap.png.bak", "layer_x_heatmap.png", "notes.txt"}
    assert left == {"layer_4_heatmap.png"} | kept


def test_a_folder_in_a_files_place_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "b.png").mkdir()
    pixels = np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(ValueError, match="b.png is a folder"):
        write_files(tmp_path, {"a.png": pixels, "b.png": pixels})
    assert {path.name for path in tmp_path.iterdir()} == {"b.png"}
