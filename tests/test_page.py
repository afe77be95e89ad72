"""Pages: text of any kind fits, in pictures and in vector files."""

import re
import zlib

import numpy as np
import pytest
from drawn_maps import (
    FORMATS,
    SIDES,
    drawn,
    hot_spot,
    is_cold,
    is_hot,
    make_maps,
    make_photo,
    measured,
    prose_of,
    varied,
)
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

import common.page
from common.files import write_files
from common.page import WIDTHS, Page, Paper, excerpt, font_families, split_at_span, text_width, wrap
from smooth_gradcam import colorize_cam
from studies.faithfulness import score_rows
from studies.faithfulness_figures import draw_faithfulness
from visualization_utils import draw_grid, draw_single


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    monkeypatch.setattr(common.page, "DPI", 100)  # quicker


def is_red(pixel):
    return pixel[0] > 120 and pixel[2] < 60


def is_blue(pixel):
    return pixel[2] > 120 and pixel[0] < 60


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
        clear_caches()
        return character

    yield install
    clear_caches()


def clear_caches():
    font_families.cache_clear()
    common.page._lacks_bold.cache_clear()


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


def test_bold_text_is_bold_where_its_script_has_no_bold_face(installed):
    text, ink = 3 * installed(("Plain Only", 400)), {}
    for weight in ("normal", "bold"):
        page = Page(2, text)
        page.text(0.2, 0.2, text, 20, weight=weight)
        ink[weight] = (255 - np.asarray(page.finish(1)).astype(int)).sum()
    assert ink["bold"] > 1.1 * ink["normal"] > 0
    page = Page(2, "dog")
    page.text(0.2, 0.2, "dog", 20, weight="bold")
    assert not page.figure.texts[0].get_path_effects()


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


def test_colour_scales_run_from_cold_to_hot_one_above_the_other():
    page, share = Page(2, ""), np.linspace(0, 1, 256)
    page.colour_scale(0.5, 0.2, 1, 0.2, [colorize_cam(share, "jet"), colorize_cam(share)[::-1]], (0, 1), 7)
    rows = np.asarray(page.finish(1))[[round(y * common.page.DPI) for y in (0.25, 0.35)]].astype(int)
    (cold, hot), (yellow, blue) = rows[:, [round(x * common.page.DPI) for x in (0.51, 1.49)]]
    assert is_blue(cold)
    assert is_red(hot)
    assert is_hot(yellow)
    assert is_cold(blue)


# vector files, paper


@pytest.mark.parametrize("width", WIDTHS)
def test_text_in_the_written_pdf_is_6_points_or_more_and_the_page_as_wide_as_said(tmp_path, width):
    photo, maps = varied(SIDES["landscape"], range(3), blind=[1])
    paper = Paper(width, ("pdf",))
    result = measured(maps, 5)
    files = draw_grid(photo, maps, paper=paper)[1]
    rows = score_rows(maps, result, None)
    files |= draw_faithfulness(photo, maps, result, rows, paper=paper)
    files = {name: content for name, content in files.items() if name.endswith(".pdf")}
    assert {"layer_comparison_grid.pdf", "faithfulness.pdf"} <= set(files)
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
