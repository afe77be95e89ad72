"""Figures of parts: nine inches at most, numbered files, what stands on each page, and curves that coincide."""

import numpy as np
import pytest
from conftest import check_layout
from drawn_maps import laid_out, texts_of
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common.page import HEIGHT, MARGIN, SMALL, Page, Paper, header, small_print
from common.parts import LOW, Part, apart, captions, nested, numbered, rows_of_plots


def paged(heights, aboves=None, caption_of=lambda i: f"Sentence {i}."):
    """{file name: what draws it} of parts that write their number."""
    aboves = aboves or [None] * len(heights)

    def writes(i):
        return lambda page, y: page.text(MARGIN, y, f"part {i}", SMALL)

    parts = [Part(h, writes(i), caption_of(i), above) for i, (h, above) in enumerate(zip(heights, aboves, strict=True))]

    def head(page, number):
        return header(page, MARGIN, MARGIN, f"Title{number}", [])

    def foot(page, y, shown):
        return small_print(page, y, captions(shown))

    return numbered("figure", Paper("column"), "", head, parts, foot)


def texts(draw):
    return texts_of(laid_out(draw(), "column"))


def test_parts_that_fit_stand_on_one_page_without_a_number():
    files = paged([2, 2, 2])
    assert list(files) == ["figure.png"]
    assert {"Title", "part 0", "part 1", "part 2"} <= set(texts(files["figure.png"]))


@pytest.mark.parametrize("heights", [[3.0] * 7, [8.0, 1.5, 0.5], [2.5, 4.0, 2.5, 4.0]])
def test_no_page_is_higher_than_a_paper_and_every_part_stands_once_in_order(heights):
    files = paged(heights)
    assert list(files) == ["figure.png", *(f"figure_{i}.png" for i in range(2, len(files) + 1))]
    assert len(files) > 1
    shown = []
    for i, draw in enumerate(files.values(), 1):
        page = draw()
        assert page.figure.get_size_inches()[1] <= HEIGHT == 9
        FigureCanvasAgg(page.figure)
        check_layout(page.figure)
        assert f"Title ({i}\xa0of\xa0{len(files)})" in texts_of(page.figure)
        shown += [text for text in texts_of(page.figure) if text.startswith("part")]
    assert shown == [f"part {i}" for i in range(len(heights))]


def test_a_page_says_only_what_is_of_its_own_parts_and_each_sentence_once():
    files = paged([3, 3, 4, 4], caption_of=lambda i: ["Both.", "Both.", "Third.", ""][i])
    first, second = (" ".join(texts(draw)) for draw in files.values())
    assert first.count("Both.") == 1
    assert "Third." not in first
    assert "Third." in second
    assert "Both." not in second


def test_parts_of_one_group_stay_together_and_its_heading_stands_where_it_goes_on():
    def heading(page, y):
        page.text(MARGIN, y, "heading", SMALL)
        return y + 0.2

    together = [texts(draw) for draw in paged([5, 2, 2, 2], [None, heading, heading, heading]).values()]
    assert [page.count("heading") for page in together] == [0, 1]
    assert {"part 1", "part 2", "part 3"} <= set(together[1])
    too_long = [texts(draw) for draw in paged([3, 3, 3, 3, 3], [None, *[heading] * 4]).values()]
    assert [page.count("heading") for page in too_long] == [1, 1, 1]
    assert [sum(text.startswith("part") for text in page) for page in too_long] == [2, 2, 1]


def test_plots_are_low_in_a_column_and_have_a_part_for_each_row():
    def draw(page, axes, values):
        axes.plot(values)

    plots = [(f"plot {i}", ([0, i],), {"xlabel": "x"}) for i in range(3)]
    for width, rows, high in ((7.2, 2, 1.75), (3.3, 3, LOW)):
        page = Page(width, "")
        parts = rows_of_plots(page, plots, (2.75, 1.75), 0.4, draw, caption="c")
        assert len(parts) == rows
        for part in parts:
            part.draw(page, 0)
            assert part.height == pytest.approx(0.18 + high + 0.4)
            assert part.caption == "c"
        assert {round(box[3], 6) for box in page.boxes.values()} == {high}
        assert [axes.lines[0].get_ydata().tolist() for axes in page.boxes] == [[0, 0], [0, 1], [0, 2]]


def test_nested_curves_that_coincide_can_all_be_seen():
    figure = Figure(figsize=(2, 1), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    colours = [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    for i, colour in enumerate(colours):
        axes.plot([0, 1], [0.5, 0.5], color=colour, **nested(i, 3))
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].reshape(-1, 3)
    for channel in range(3):  # where one colour alone is strong
        strong = (pixels[:, channel] > 150) & (np.delete(pixels, channel, 1) < 110).all(1)
        assert strong.sum() > 40


def test_of_curves_apart_one_has_colour_and_stands_in_front():
    axes = Figure().add_subplot()
    curves = {"one": np.array([1.0, 2]), "other": np.array([1.0, 2]), "last": np.array([0.0, 1])}
    apart(axes, [3, 4], curves, "other", "#ff0000", "s")
    front = max(axes.lines, key=lambda line: line.get_zorder())
    assert front.get_label() == "other"
    assert (front.get_color(), front.get_marker()) == ("#ff0000", "s")
    assert [line.get_label() for line in axes.lines if line.get_color() == "0.7"] == ["one", "last"]
    assert list(front.get_ydata()) == [1, 2]
