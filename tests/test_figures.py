"""Figures from arrays: what is hot stands where it belongs, what is unknown is grey, text of any kind fits."""

import dataclasses
import itertools
import re
import zlib

import numpy as np
import pytest
from conftest import check_layout, make_image
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image

import common.page
import test_gradcam
import visualization_utils
from common.files import write_files
from common.page import WIDTHS, Page, Paper, excerpt, font_families, split_at_span, text_width, wrap
from smooth_gradcam import METHODS, Look, Settings, TokenMaps, colorize_cam, render_cam
from studies.faithfulness import Faithfulness, comparison_rows, score_rows, side_by_side
from studies.faithfulness_figures import draw_comparison, draw_faithfulness, draw_randomization
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

FORMATS = {"landscape": (4, 6), "portrait": (6, 4), "square": (5, 5)}
CORNERS = [(0, 0), (0, -1), (-1, 0), (-1, -1)]
ANSWER = "There is a dog at the top left, and a red car in the center."


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    monkeypatch.setattr(common.page, "DPI", 100)  # quicker


def make_photo(grid):
    return Image.new("RGB", (grid[1] * 28, grid[0] * 28), "white")


def make_maps(
    maps, *, answer=ANSWER, prompt="What is in this image?", target=None, why="no gradient", settings=None, **changes
):
    """Maps of an answer; `why` those that are zero everywhere are so."""
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
        no_gradient=frozenset(layer for layer, cam in maps.items() if why == "no gradient" and not cam.any()),
        settings=settings or Settings(5, 0.1, **changes),
    )


def drawn(content):
    """A file's picture: some are drawn only when they are written."""
    return np.asarray(content() if callable(content) else content)


def hot_spot(grid, cell):
    cam = np.zeros(grid, np.float32)
    cam[cell] = 3
    return cam


def is_hot(pixel):
    """The yellow end of plasma."""
    return pixel[0] > 200 and pixel[1] > 200 and pixel[2] < 80


def is_cold(pixel):
    """Its dark blue end."""
    return pixel[0] < 40 and pixel[1] < 40 and pixel[2] > 110


def is_red(pixel):
    return pixel[0] > 120 and pixel[2] < 60


def is_blue(pixel):
    return pixel[2] > 120 and pixel[0] < 60


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


def share_of(figure, test):
    return np.mean(test(np.moveaxis(figure.astype(int), -1, 0)))


def blueish(pixel):
    return (pixel[2] > 110) & (pixel[0] < 20) & (pixel[1] < 20)


def greyish(pixel):
    return (np.ptp(pixel, axis=0) == 0) & (abs(pixel[0] - 204) < 2)


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
    figure = drawn(draw_single(make_photo(grid), maps)[1]["visualization.png"])
    assert figure.shape[1] == round(7.2 * common.page.DPI)
    assert len(figure) < 8 * common.page.DPI
    assert (figure[:, -4:] == 255).all()  # nothing runs out of the page


def make_font(path, character, family="Late Comer", weight=400):
    """A font of that one character, a square."""
    builder, pen = FontBuilder(1000), TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 700), (700, 700), (700, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder.setupGlyphOrder([".notdef", "one"])
    builder.setupCharacterMap({ord(character): "one"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "one": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (800, 0), "one": (800, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Bold" if weight == 700 else "Regular"})
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200, usWeightClass=weight)
    builder.setupPost()
    builder.save(path)


def test_font_that_was_installed_after_matplotlib_made_its_list_is_found(pages, monkeypatch, tmp_path):
    character = "\U0003134a"  # the last Chinese character of Unicode
    maps = make_maps({0: hot_spot((4, 6), (0, 0))}, answer=f"A {character}.")
    boxes = "Boxes: characters that no installed font can draw."

    def draw():
        font_families.cache_clear()
        common.page.add_new_fonts.cache_clear()
        page = drawn(draw_single(make_photo((4, 6)), maps)[1]["visualization.png"])
        return page, boxes in prose_of(pages[-1])

    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    installed, real = [], font_manager.findSystemFonts
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *args, **kwargs: [*real(*args, **kwargs), *installed])
    before, lacking = draw()
    assert lacking
    broken, font = tmp_path / "broken.ttf", tmp_path / "late.ttf"
    broken.write_bytes(b"no font")
    make_font(font, character)
    installed += [str(broken), str(font)]
    after, lacking = draw()
    assert not lacking
    assert "Late Comer" in font_families(character)[0]
    assert before.shape != after.shape or (before != after).any()
    font_families.cache_clear()


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A function that installs fonts of one character, given as (family, weight), and returns that character."""
    character = "\U0003134a"
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    monkeypatch.setattr(common.page, "add_new_fonts", lambda: None)

    def install(*fonts):
        for family, weight in fonts:
            path = tmp_path / f"{family}{weight}.ttf"
            make_font(path, character, family, weight)
            font_manager.fontManager.addfont(path)
        font_families.cache_clear()
        return character

    yield install
    font_families.cache_clear()


@pytest.mark.parametrize("weights", [(400,), (500,), (700,), (300, 600), (400, 700)])
def test_text_in_a_script_whose_font_lacks_our_weights_is_drawn_without_a_message(installed, caplog, weights):
    text = f"A {installed(*(('Few Weights', weight) for weight in weights))}."
    families = font_families(text)[0]
    assert "Few Weights" in families
    page = Page(7.2, text)
    for weight in ("normal", "bold"):
        assert text_width(text, 8, families, weight) > text_width("A .", 8, families, weight)
        page.text(0.1, 0.1, text, 8, weight=weight)
    np.asarray(page.finish(0.5))
    assert page.vector("pdf")
    assert not caplog.records


def test_bold_text_is_bold_where_its_script_has_a_bold_face(installed):
    character = installed(("Plain Only", 400), ("With Bold", 400), ("With Bold", 700))
    families = font_families(character)[0]
    assert families == ["DejaVu Sans", "With Bold"]
    bold = font_manager.FontProperties(family=["With Bold"], weight="bold")
    assert str(font_manager.findfont(bold)).endswith("With Bold700.ttf")


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
    whole, part = (
        drawn(draw_single(make_photo(grid), make_maps({0: cam}, target=target))[1]["visualization.png"])
        for target in (None, "red car")
    )
    assert share_of(whole, yellow) == 0
    assert share_of(part, yellow) > 0.0005


def test_colour_scales_run_from_cold_to_hot_one_above_the_other():
    page, share = Page(2, ""), np.linspace(0, 1, 256)
    page.colour_scale(0.5, 0.2, 1, 0.2, [colorize_cam(share, "jet"), colorize_cam(share)[::-1]], (0, 1), 7)
    rows = np.asarray(page.finish(1))[[round(y * common.page.DPI) for y in (0.25, 0.35)]].astype(int)
    (cold, hot), (yellow, blue) = rows[:, [round(x * common.page.DPI) for x in (0.51, 1.49)]]
    assert is_blue(cold)
    assert is_red(hot)
    assert is_hot(yellow)
    assert is_cold(blue)


@pytest.mark.parametrize("size", [(4000, 20), (20, 4000), (28, 28)])
def test_extreme_photos_can_be_drawn(size):
    photo = Image.new("RGB", size, "white")
    maps = make_maps({0: hot_spot((2, 3), (0, 0)), 1: np.zeros((2, 3), np.float32)})
    alone = make_maps({0: hot_spot((2, 3), (0, 0))})
    files = draw_grid(photo, maps)[1] | draw_single(photo, alone)[1] | words_files(photo, [maps])
    figures = ("layer_comparison_grid.png", "visualization.png", "words_by_layer.png")
    for name, content in files.items():
        if name in figures:
            assert drawn(content).shape[1] == round(7.2 * common.page.DPI)
        elif name.endswith(".png"):
            assert drawn(content).shape == (size[1], size[0], 3)


# figures of measures and words


LONG = "There is a dog at the top left, and a red car in the center of the scene, with people. " * 8
SHAPES = {"landscape": (12, 16), "portrait": (16, 12), "wide": (3, 27), "tall": (27, 3)}


@pytest.fixture
def drawings(monkeypatch):
    """The pages that are drawn, as matplotlib's figures, and the words on grey panels."""
    pages, panels, real = [], [], common.page.figure_to_array

    def keep(figure):
        if figure.axes:
            pages.append(figure)
        else:
            panels.append("".join(texts_of(figure)))
        return real(figure)

    monkeypatch.setattr(common.page, "figure_to_array", keep)
    return pages, panels


@pytest.fixture
def pages(drawings):
    return drawings[0]


def laid_out(page, width):
    """The page's matplotlib figure, once it is known that everything has its place."""
    assert page.figure.get_size_inches()[0] == WIDTHS[width]
    FigureCanvasAgg(page.figure)
    check_layout(page.figure)
    return page.figure


ASPECTS = {"1:5": (28, 140), "3:4": (168, 224), "2:1": (448, 224), "5:1": (280, 56)}


def of_all_sizes(one, few, many, most):
    """Every aspect on page and column, with each number somewhere."""
    page = [("1:5", most, "page"), ("3:4", few, "page"), ("2:1", few, "page"), ("5:1", one, "page")]
    column = [("1:5", one, "column"), ("3:4", many, "column"), ("2:1", few, "column"), ("5:1", few, "column")]
    return pytest.mark.parametrize(("aspect", "count", "width"), page + column)


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
    for name, content in files.items():
        if callable(content) and "layer_comparison" in name or name.startswith(("visual", "all", "compar")):
            figure = laid_out(content(), width)
            assert (
                name.startswith("visual")
                or {f"layer {layer}" for layer in maps.maps} <= set(texts_of(figure))
                or ("/" in name)
            )


@of_all_sizes(1, 40, 100, 300)
def test_any_number_of_words_of_any_photo_fits_on_page_and_column(aspect, count, width):
    size = ASPECTS[aspect]
    answer = " ".join(f"a w{i:03d}," for i in range(count))
    maps = worded([f"w{i:03d}" for i in range(count)], answer, (size[1] // 28, size[0] // 28), [3, 27], [27])
    files = words_files(make_image(*size), maps, paper=Paper(width))
    names = [name for name in files if name.endswith(".png")]
    for name in {names[0], names[-1]}:
        assert laid_out(files[name](), width).get_size_inches()[1] < 10.5


@pytest.mark.parametrize(
    ("aspect", "width"),
    [*itertools.product(("1:5", "5:1"), WIDTHS), ("3:4", "column"), ("2:1", "page")],
)
def test_figures_of_measures_fit_on_page_and_column(aspect, width):
    size = ASPECTS[aspect]
    maps = layered((size[1] // 28, size[0] // 28), range(28), answer=LONG)
    photo, result, paper = make_image(*size), measured(maps, 5), Paper(width)
    staged = {number: dataclasses.replace(maps) for number in (0, 4, 8, 12, 16, 20, 24, 28)}
    four = {method: layered(maps.grid, [0, 5, 27], seed=i) for i, method in enumerate(METHODS)}
    together = side_by_side(four)
    compared = measured(together, 5)
    for figure in (
        draw_faithfulness(photo, maps, result, score_rows(maps, result, None), paper=paper),
        draw_randomization(photo, staged, randomization_rows(staged), paper=paper),
        draw_comparison(photo, together, compared, comparison_rows(four, together, compared, None), paper=paper),
    ):
        laid_out(figure, width)


@pytest.mark.parametrize("width", WIDTHS)
def test_text_in_the_written_pdf_is_6_points_or_more_and_the_page_as_wide_as_said(tmp_path, width):
    photo, maps = varied(SIDES["landscape"], range(3), blind=[1])
    paper = Paper(width, ("pdf",))
    result = measured(maps, 5)
    files = draw_grid(photo, maps, paper=paper)[1]
    rows = score_rows(maps, result, None)
    files |= paper.figure("faithfulness", lambda: draw_faithfulness(photo, maps, result, rows, paper=paper))
    files = {name: content for name, content in files.items() if name.endswith(".pdf")}
    assert len(files) == 2
    for path in write_files(tmp_path, files):
        data = path.read_bytes()
        wide = float(re.search(rb"/MediaBox \[ ?0 0 ([\d.]+) [\d.]+ ?\]", data)[1])
        assert wide == pytest.approx(72 * WIDTHS[width])
        streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", data, re.DOTALL)
        text = b"".join(map(inflated, streams))
        sizes = {float(size) for size in re.findall(rb"/\S+ ([\d.]+) Tf", text)}
        assert {6, 7, 8} <= sizes
        assert min(sizes) == 6
        assert not re.search(rb"/Subtype /Type3", data)  # fonts that journals refuse


def inflated(stream):
    try:
        return zlib.decompress(stream)
    except zlib.error:  # a picture in another coding
        return b""


def test_vector_files_are_the_same_each_time_and_hold_the_pictures(tmp_path):
    photo, maps = varied(SIDES["landscape"], [3, 9])
    files = draw_grid(photo, maps, paper=Paper(formats=("pdf", "svg")))[1]
    files = {name: content for name, content in files.items() if name.endswith((".pdf", ".svg"))}
    assert set(files) == {"layer_comparison_grid.pdf", "layer_comparison_grid.svg"}
    (tmp_path / "again").mkdir()
    for path, again in zip(write_files(tmp_path, files), write_files(tmp_path / "again", files), strict=True):
        data = path.read_bytes()
        assert data == again.read_bytes()
        assert data.startswith(b"%PDF" if path.suffix == ".pdf" else b"<?xml")
        assert data.count(b"/Subtype /Image" if path.suffix == ".pdf" else b"<image") == 4  # photo, two maps, scale


@pytest.mark.parametrize("options", [{"width": "wide"}, {"formats": ("png",)}, {"formats": "pdf"}])
def test_paper_of_another_kind_is_refused_by_name(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} must be ")):
        Paper(**options)


def texts_of(figure):
    return [text.get_text() for text in figure.texts]


def prose_of(figure):
    """All that is written, without line breaks."""
    return " ".join(" ".join(texts_of(figure)).split())


def bumps(grid, seed):
    return np.random.default_rng(seed).random(grid).astype(np.float32)


def layered(grid, layers, blind=(), seed=0, **options):
    maps = {layer: bumps(grid, [seed, layer]) * (layer not in blind) for layer in layers}
    return make_maps(maps, **{"target": "dog"} | options)


def measured(token_maps, orders):
    shares = np.linspace(0, 1, 9)
    powers = np.linspace(0.2, 1.5, len(token_maps.maps))
    curves = {layer: shares**power for layer, power in zip(token_maps.maps, powers, strict=True)}
    curves = {layer: curve for layer, curve in curves.items() if layer not in token_maps.blank}
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
    assert drawn(draw_faithfulness(photo, maps, result, rows)).shape[1] == round(7.2 * common.page.DPI)
    (figure,) = pages
    check_layout(figure)
    plots = [axes for axes in figure.axes if axes.get_xlabel()]
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
        drawn(draw_faithfulness(make_photo(maps.grid), token_maps, result, score_rows(token_maps, result, None)))
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
    picture = drawn(draw_randomization(make_photo(given.grid), staged, rows))
    assert len(picture) < 8 * common.page.DPI
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


def words_files(photo, maps, **options):
    return draw_words(photo, "photo.jpg", maps, [[0.5]] * len(maps), [["x"]] * len(maps), **options)[1]


def draw_pages(files):
    """The drawn pages of the words' figure."""
    return [drawn(content) for name, content in files.items() if name.endswith(".png")]


PLACES = "There is a plane at the top left, a house on the right, a dog at the bottom left and a bicycle at the bottom."
PARTS = {
    "one": ["dog"],
    "ten": ["plane", "top", "left", "house", "right", "dog", "bottom", "left", "bicycle", "bottom"],
    "all": PLACES.replace(",", "").replace(".", "").split(),
}
GREY_WORDS = "Grey: the word has no map at that layer, for the reason that stands there."
SCRIPTS = "左上角有一只狗 🐕, extraordinarilylongcompoundword 中间有"


def worded(words, answer, grid, layers, blind=()):
    maps, end = [], 0
    for word in words:
        start = answer.index(word, end)
        end = start + len(word)
        token_maps = layered(grid, layers, blind, seed=start, answer=answer, target=word)
        maps.append(dataclasses.replace(token_maps, target_span=(start, end)))
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
    drawn_pages = draw_pages(words_files(make_photo(grid), maps))
    cells, found, rows = 0, "", []
    for figure, page in zip(pages, drawn_pages, strict=True):
        check_layout(figure)
        cells += len([axes for axes in figure.axes if axes.images]) - 2  # but the photo and the colour scale
        found += "".join(texts_of(figure)).replace(" ", "")
        rows += [text for text in texts_of(figure) if text.startswith("layer ")]
        assert len(page) < 10.5 * common.page.DPI
    assert cells == len(words) * len(layers)
    assert all(word in found for word in words)
    assert set(rows) == {f"layer {layer}" for layer in layers}
    grey = max(share_of(page, greyish) for page in drawn_pages)
    assert grey > 0.01 if blind else grey < 0.005
    assert (GREY_WORDS in " ".join(map(prose_of, pages))) == bool(blind)


def test_text_before_a_word_is_that_next_to_it(pages):
    maps = worded(["bicycle"], PLACES, SHAPES["landscape"], [3])
    drawn(words_files(make_photo(maps[0].grid), maps)["words_by_layer.png"])
    assert any(text.endswith("left and a") for text in texts_of(pages[0]))


# what stands where in a figure


def box_of(artist):
    """(left, top, right, bottom) in pixels of the page, from its top left."""
    height, box = artist.figure.bbox.height, artist.get_window_extent()
    return np.array([box.x0, height - box.y1, box.x1, height - box.y0])


def middle(box):
    return (box[:2] + box[2:]) / 2


def crops(figure, page):
    """[(box, the page's pixels there)] of every picture, from above and from the left, but for the colour scale."""
    boxes = [box_of(axes) for axes in figure.axes if axes.images and len(axes.images[0].get_array()) > 2]
    found = []
    for box in sorted(boxes, key=lambda box: tuple(box[[1, 0]].round())):
        left, top, right, bottom = box.round().astype(int)
        found.append((box, page[top:bottom, left:right]))
    return found


def found_under(figure, page, labels):
    """{label: the pictures below it, nearer to it than to the others above them}; those under none are left out."""
    boxes = {text.get_text(): box_of(text) for text in figure.texts if text.get_text() in labels}
    assert list(boxes) == list(labels)
    found = {label: [] for label in labels}
    for box, crop in crops(figure, page):
        top = np.array([box[[0, 2]].mean(), box[1]])
        above = {label: np.hypot(*(middle(at) - top)) for label, at in boxes.items() if at[3] < box[1] + 1}
        if above:
            found[min(above, key=above.get)].append(crop)
    return found


def unlike(crop, picture):
    """Mean difference, in levels of 255, of a picture on a page and one of any size, inside the frame."""
    size = crop.shape[1::-1]
    resized = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
    return np.abs(crop.astype(int) - resized)[2:-2, 2:-2].mean()


CLOSE, FAR = 12, 19  # pictures are laid on whole pixels, in some versions one off, and steep colours show it
SIDES = {"landscape": (336, 224), "portrait": (224, 336)}


def varied(size, layers, **options):
    """A photo and random maps of 4 x 6 or 6 x 4 cells: no two pictures of them are alike."""
    return make_image(*size), layered((size[1] // 56, size[0] // 56), layers, **options)


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
    assert "Smooth Grad-CAM, layer 7" in texts_of(pages[0])


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
        assert f"Smooth Grad-CAM, {name} layers" in texts_of(pages[-1])
        check_pictures(found_under(pages[-1], page, [f"layer {layer}" for layer in part]), part, ["superimposed"])


def check_words(figure, page, maps, results):
    """Rows stand beside their layer, columns under their word, which stands under the text before it."""
    layers = [f"layer {layer}" for layer in maps[0].maps]
    numbers = {text: box_of(text) for text in figure.texts if text.get_text() in layers}
    heads = {text: box_of(text) for text in figure.texts if (text.get_weight(), text.get_size()) == ("bold", 7)}
    before = {text: box_of(text) for text in figure.texts if text.get_color() == "0.45"}
    words, cells = {f"w{i:02d}": f"a{i:02d}" for i in range(len(maps))}, []
    assert unlike(crops(figure, page)[0][1], np.asarray(make_image(336, 224))) < CLOSE
    for box, crop in crops(figure, page)[1:]:

        def above(texts, box=box):
            """The nearest of those that begin where the box does."""
            here = [text for text, at in texts.items() if abs(at[0] - box[0]) < 3 and at[3] < box[1] + 3]
            return max(here, key=lambda text: texts[text][3])

        row = min(numbers, key=lambda text: abs(middle(numbers[text]) - middle(box))[1])
        assert abs(middle(numbers[row]) - middle(box))[1] < 3
        head = above(heads)
        word, layer = head.get_text().strip(",."), int(row.get_text().split()[1])
        text = above(before, heads[head])
        assert text.get_text() == words[word]
        assert heads[head][1] - before[text][3] < 8
        assert unlike(crop, results[word][layer]["superimposed"]) < CLOSE
        cells.append((word, layer))
    return cells


def numbered_words(count, layers):
    """A photo and maps of "a00 w00, a01 w01, ..."."""
    answer = ", ".join(f"a{i:02d} w{i:02d}" for i in range(count)) + "."
    return make_image(336, 224), worded([f"w{i:02d}" for i in range(count)], answer, (4, 6), layers)


def test_pictures_of_words_stand_under_their_word_and_beside_their_layer(pages):
    photo, maps = numbered_words(13, [3, 27, 9])
    results, files = draw_words(photo, "", maps, [[0.5]] * 13, [["x"]] * 13)
    page = drawn(files["words_by_layer.png"])
    blocks = [maps[:7], maps[7:]]
    expected = [(word.target, layer) for block in blocks for layer in (3, 27, 9) for word in block]
    assert check_words(pages[0], page, maps, results) == expected
    assert "Smooth Grad-CAM, word by word" in texts_of(pages[0])
    first, second = results["w00"][3]["superimposed"], results["w01"][3]["superimposed"]
    assert unlike(first, second) > FAR < unlike(first, results["w00"][27]["superimposed"])


@pytest.mark.parametrize(("count", "layers"), [(9, range(10)), (25, [0, 9, 27]), (50, [5])], ids=["9", "25", "50"])
def test_long_answers_take_several_pages_and_each_word_stands_once(pages, count, layers):
    photo, maps = numbered_words(count, layers)
    results, files = draw_words(photo, "", maps, [[0.5]] * count, [["x"]] * count)
    names = [name for name in files if name.endswith(".png")]
    assert names == ["words_by_layer.png", *(f"words_by_layer_{i}.png" for i in range(2, len(names) + 1))]
    found = []
    for i, name in enumerate(names):
        page = drawn(files[name])
        assert len(page) < 10.5 * common.page.DPI  # on a page of a paper
        check_layout(pages[i])
        cells = check_words(pages[i], page, maps, results)
        words, rows = sorted({int(word[1:]) for word, _ in cells}), sorted({layer for _, layer in cells})
        (title,) = (text for text in texts_of(pages[i]) if text.startswith("Smooth Grad-CAM, word by word"))
        assert f" ({words[0] + 1}–{words[-1] + 1} of {count})" in title
        assert f", layers {rows[0]}–{rows[-1]}" in prose_of(pages[i]) or len(rows) == len(layers)
        found += cells
    assert sorted(found) == sorted((word.target, layer) for word in maps for layer in layers)


def test_picture_beside_the_curves_is_that_of_the_layer_that_leads(pages):
    photo, maps = varied(SIDES["landscape"], [3, 9, 4])
    result = measured(maps, 5)  # of falling difference
    swapped = {3: result.insertion[9], 9: result.insertion[3], 4: result.insertion[4]}
    result = dataclasses.replace(result, insertion=swapped)
    page = drawn(draw_faithfulness(photo, maps, result, score_rows(maps, result, None)))
    ((box, crop),) = crops(pages[0], page)
    assert unlike(crop, LayerPictures(photo, maps, 9)["superimposed"]) < CLOSE
    (name,) = (text for text in pages[0].texts if text.get_text() == "layer 9, the largest difference")
    assert box[3] < box_of(name)[1] < box[3] + 20


def test_heatmaps_of_redrawn_weights_stand_under_their_number(pages):
    photo, given = varied(SIDES["landscape"], [3, 9, 4])
    staged = {number: varied(SIDES["landscape"], [3, 9, 4], seed=number)[1] for number in (14, 28)}
    staged = {0: given} | staged
    page = drawn(draw_randomization(photo, staged, randomization_rows(staged)))
    found = found_under(pages[0], page, ["the model", "14 re-drawn", "28 re-drawn"])
    for (crop,), maps in zip(found.values(), staged.values(), strict=True):
        assert unlike(crop, LayerPictures(photo, maps, 9)["heatmap"]) < CLOSE
    assert "the heatmap of layer 9 as" in prose_of(pages[0])


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
    assert (pictures["heatmap"] == pictures["heatmap"]).all()
    assert asked[8:] == [9, 9]


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


@pytest.mark.parametrize("why", ["no gradient", "zero everywhere"])
def test_a_word_without_a_map_is_a_grey_panel_and_has_no_map_in_the_page(drawings, why):
    pages, panels = drawings
    photo, maps = numbered_words(2, [3, 9])
    zero = {3: np.zeros((4, 6), np.float32), 9: maps[1].maps[9]}
    maps[1] = dataclasses.replace(maps[1], maps=zero, no_gradient=frozenset([3] * (why == "no gradient")))
    page = drawn(words_files(photo, maps)["words_by_layer.png"])
    assert [" ".join(words.split()) for words in panels] == [f"{why}: no map"]
    assert [np.ptp(crop, axis=-1).max() == 0 for _, crop in crops(pages[0], page)[1:]] == [False, True, False, False]
    assert GREY_WORDS in prose_of(pages[0])
    data = html_data(photo, "", maps, [[0.5]] * 2, [["x"]] * 2)
    assert [[bool(text) for text in word["maps"]] for word in data["words"]] == [[True, True], [False, True]]
    assert data["words"][1]["maps"][0] == ""


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
    drawn(draw_faithfulness(photo, maps, result, score_rows(maps, result, None)))
    left_out = "layer 2 (zero everywhere), layer 4 (zero everywhere), layer 7 (no gradient)"
    assert f" Left out, as it has no map: {left_out}. Settings: " in prose_of(pages[-1])


# what is said of the settings


STATED = {
    "usual": (
        Settings(5, 0.1),
        "Smooth Grad-CAM",
        "method gradcam, score logit, rules attnlrp, tap input, 5 noisy copies, noise 0.1, seed 0",
    ),
    "other": (
        Settings(12, 0.25, seed=7, tap="output", score="logprob", method="hirescam", rules="plain"),
        "Smooth HiResCAM",
        "method hirescam, score logprob, rules plain, tap output, 12 noisy copies, noise 0.25, seed 7",
    ),
    "one copy": (
        Settings(1, 0.5, seed=2**40, contrast="car"),
        "Smooth Grad-CAM",
        "method gradcam, score logit minus the contrast's, rules attnlrp, tap input, 1 noisy copy, noise 0.5, seed "
        "1099511627776",
    ),
    "clean": (
        Settings(use_smooth=False, seed=3, method="product", score="logprob"),
        "Grad-CAM × HiResCAM",
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
        f"{title}: faithfulness": lambda: draw_faithfulness(photo, maps, result, score_rows(maps, result, None)),
        f"{title}: does the map depend on the model?": lambda: draw_randomization(
            photo, staged, randomization_rows(staged)
        ),
    }
    figures = list((of_maps | of_measures).items())
    for heading, content in figures if title == "Smooth Grad-CAM" else figures[:1]:  # the words come from one function
        drawn(content)
        assert heading in prose_of(pages[-1])
        prose = prose_of(pages[-1])
        made = f" Settings: {stated}; photo 336 × 224 px, 6 × 4 image tokens"
        assert prose.endswith(made if heading in of_maps else (made, f"{made}; baseline blur"))
        assert prose.count("Settings:") == 1
        if heading in of_maps:
            assert f"{title.removeprefix('Smooth ')}, share of the map's own maximum; below: over grey" in texts_of(
                pages[-1]
            )
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


@pytest.mark.parametrize(("scale", "shares"), [("map", [1, 1, 1]), ("word", [1, 0.5, 1]), ("all", [0.5, 0.25, 1])])
def test_full_colour_is_at_the_maximum_of_map_word_or_all(scale, shares):
    grid, look = FORMATS["square"], Look(scale=scale)
    one = {3: hot_spot(grid, (0, 0)), 9: hot_spot(grid, (0, 0)) / 2}
    words = [make_maps(one, target="dog"), make_maps({3: 2 * one[3], 9: one[9]}, target="car")]
    photo = make_photo(grid)
    results = draw_words(photo, "", words, [[0.5]] * 2, [["x"]] * 2, look)[0]
    found = [results["dog"][3], results["dog"][9], results["car"][3]]
    for pictures, share in zip(found, shares, strict=True):
        assert (pictures["heatmap"][0, 0] == colorize_cam(np.array(share))).all()


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
