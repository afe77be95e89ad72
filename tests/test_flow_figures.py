"""Figures of flow and knockout: what they keep of the arrays, and that everything has its place."""

import re

import numpy as np
import pytest
from conftest import check_layout, make_image
from drawn_maps import colour_bars, prose_of, texts_of
from flow_by_hand import LAYERS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from test_core import ANSWER, PROMPT

from common.evidence import explain_with_evidence
from common.page import HEIGHT, WIDTHS, Paper
from smooth_gradcam import Settings, find_target, read
from studies.flow import attention_flow, gradient_flow
from studies.flow_figures import COLOURS, _flow_lines, trace
from studies.knockout import change, mean_change, sever_photo
from studies.knockout_figures import sever


@pytest.fixture(scope="module")
def reading(model, processor, image):
    return read(model, processor, image, PROMPT, ANSWER)


def test_trace_keeps_attention_gradients_and_maps_as_they_are_alone(reading):
    span, settings = find_target(reading.answer, "red"), Settings(num_samples=2, noise_std=0.2)
    files, lines, (evidence,) = trace([reading], ["photo"], [span], [0, 2], settings, quiet=True)
    arrays = files["information_flow.npz"]
    (alone,) = explain_with_evidence(reading, [span], range(LAYERS), settings)
    np.testing.assert_array_equal(arrays["maps_0"], np.stack([alone.maps[i] for i in range(LAYERS)]))
    np.testing.assert_array_equal(arrays["attention_0"], attention_flow(reading, span))
    np.testing.assert_array_equal(arrays["gradient_0"], gradient_flow(reading, span, settings))
    assert arrays["maps_0"].max() > 0
    assert tuple(arrays["evidence_0"]) == evidence[:2]
    assert evidence == alone.evidence
    assert f"evidence: {evidence}" in lines
    assert any("the image gets" in line for line in lines)


@pytest.mark.parametrize(
    ("size", "width", "photos"),
    [((56, 280), "column", 1), ((84, 112), "page", 2), ((224, 112), "column", 2), ((280, 56), "page", 1)],
    ids=["1:5", "3:4", "2:1", "5:1"],
)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_figures_of_the_flow_fit_on_page_and_column(model, processor, size, width, photos):
    photo, settings, options = make_image(*size), Settings(use_smooth=False), {"quiet": True, "paper": Paper(width)}
    mask = np.tri(*photo.size[::-1], dtype=bool) if photos == 1 else None
    readings = [read(model, processor, photo, PROMPT, answer) for answer in (ANSWER, f"{ANSWER} {ANSWER}")[:photos]]
    given = readings, ["a.jpg", "b.jpg"][:photos], [find_target(reading.answer, "red") for reading in readings]
    files = trace(*given, range(LAYERS), settings, attention_map=True, taps=True, **options)[0]
    files |= sever(*given, window=1, keep=3, mask=mask, **options)[0]
    figures = {name: content for name, content in files.items() if name.endswith(".png")}
    kinds = {re.sub(r"(_\d+)?\.png", "", name) for name in figures}
    assert kinds == {"information_flow", "attention_maps", "taps", "knockout"}
    for draw in figures.values():
        page = draw()
        assert page.figure.get_size_inches()[0] == WIDTHS[width]
        assert page.figure.get_size_inches()[1] <= HEIGHT
        FigureCanvasAgg(page.figure)
        check_layout(page.figure)


@pytest.fixture(scope="module")
def beside(model, processor, image):
    """A reading of the second of three photos in a prompt."""
    return read(model, processor, [image] * 3, PROMPT, ANSWER).of(1)


@pytest.mark.parametrize("width", WIDTHS)
def test_other_images_of_the_prompt_are_a_group_of_their_own(reading, beside, width):
    """Also beside a photo whose prompt has none."""
    spans, options = [find_target(ANSWER, "red")] * 2, {"quiet": True, "paper": Paper(width)}
    given = [beside, reading], ["a.jpg", "b.jpg"], spans
    files, lines, _ = trace(*given, range(LAYERS), Settings(use_smooth=False), attention_map=True, **options)
    files |= sever(*given, window=1, **options)[0]
    assert any("another image's" in line for line in lines)
    flow, maps = (figures_of(files, kind) for kind in ("information_flow", "attention_maps"))
    assert {"▼", "other images"} <= {text for figure in flow for text in texts_of(figure)}
    assert "A answer, O other images" in prose_of(maps[0])
    for figure in [*flow, *maps, *figures_of(files, "knockout")]:
        FigureCanvasAgg(figure)
        check_layout(figure)
    arrays, swept = (
        files["knockout.npz"],
        [sever_photo(one, span, window=1) for one, span in zip(given[0], spans, strict=True)],
    )
    edges = arrays["edges"].tolist()
    assert set(edges) - set(swept[1].windows) == {"other images → user", "other images → answer"}
    for i, one in enumerate(swept):
        for edge, found in zip(edges, arrays[f"windows_{i}"], strict=True):
            np.testing.assert_array_equal(found, one.windows.get(edge, np.full_like(found, np.nan)))
    plotted = [text for figure in figures_of(files, "knockout") for text in texts_of(figure)]
    assert set(edges) <= set(plotted)
    alone = mean_change(swept, "other images → answer")
    np.testing.assert_array_equal(alone, change(swept[0], "other images → answer"))


def figures_of(files, kind):
    """The matplotlib figures of the pages of one kind."""
    return [draw().figure for name, draw in files.items() if name.startswith(kind) and name.endswith(".png")]


@pytest.fixture(scope="module")
def traced(reading):
    settings, span = Settings(use_smooth=False), find_target(reading.answer, "red")
    options = {"attention_map": True, "taps": True, "quiet": True}
    return trace([reading], ["photo"], [span], [0, 1, 2], settings, **options)[0]


def test_colours_of_the_flow_have_a_bar_that_says_what_they_are(traced):
    for kind, label in {
        "information_flow": "gradcam: share of the map's own maximum; below: over grey",
        "taps": "gradcam: share of the map's own maximum; below: over grey",
        "attention_maps": "attention of a query to a key, logarithmic",
    }.items():
        for figure in figures_of(traced, kind):
            shown = kind == "attention_maps" or any(text.startswith("max ") for text in texts_of(figure))
            assert len(colour_bars(figure)) == texts_of(figure).count(label) == shown


def test_the_caption_says_what_the_shares_are(traced):
    said = " ".join(map(prose_of, figures_of(traced, "information_flow")))
    assert "Share of the group: attention of the positions that predict the explained tokens, mean over heads, " in said
    assert "heads, renormalised over system, image and user tokens (eq. 7 of" in said


def test_groups_have_markers_in_turn_that_the_legend_shows(traced):
    figures = figures_of(traced, "information_flow")
    plots = [axes for figure in figures for axes in figure.axes if axes.get_xlabel() == "layer"]
    assert len(plots) == 4
    for axes in plots:
        lines = {line.get_label(): line for line in axes.lines}
        assert set(lines) <= set(COLOURS)
        assert len({(line.get_marker(), line.get_markevery()) for line in lines.values()}) == len(lines)
        assert len(lines) >= 3 or set(lines) == {"answer"}  # its probability
    for figure in figures:
        if any(axes.get_xlabel() for axes in figure.axes):
            assert {"●", "■", "▲", "◆", *COLOURS} - {"other images"} <= set(texts_of(figure))
            assert not {"▼", "other images"} & set(texts_of(figure))


@pytest.mark.parametrize("token", [0, -1])
def test_flow_lines_are_not_cut_at_the_edges_of_their_panel(token):
    figure = Figure(figsize=(2, 3), dpi=200)
    figure.add_axes((0, 0, 1, 1), xticks=[], yticks=[])
    FigureCanvasAgg(figure)
    attention = np.zeros(40)
    attention[token] = 1  # all of it at an end: the broadest line
    groups = {"system": slice(0, 5), "image": slice(5, 25), "user": slice(25, 35), "answer": slice(35, 40)}
    (axes,) = figure.axes
    _flow_lines(axes, attention, groups, np.split(np.arange(5, 25), 4), (2, 3))
    (lines,) = axes.collections

    def drawn_pixels():
        figure.canvas.draw()
        return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()

    cut = drawn_pixels()
    figure.set_size_inches(3, 4)  # the same panel in the middle of a larger page, with nothing cut
    axes.set_position((1 / 6, 1 / 8, 2 / 3, 3 / 4))
    for artist in (lines, *axes.lines):
        artist.set_clip_on(False)
    whole = drawn_pixels()
    assert (whole[100:-100, 100:-100] == cut).mean() > 0.99
    margins = np.ones(whole.shape[:2], bool)
    margins[98:-98, 98:-98] = False
    assert (whole[margins] == 255).all()


def test_edges_blocked_in_windows_have_a_plot_each(reading):
    span, mask = find_target(reading.answer, "red"), np.tri(*reading.photo.size[::-1], dtype=bool)
    for given in (mask, None):
        files = sever([reading], ["photo"], [span], window=1, mask=given, quiet=True)[0]
        (figure,) = figures_of(files, "knockout")
        edges = files["knockout.npz"]["edges"].tolist()
        assert len(edges) == (4 if given is None else 8)
        plots = [axes for axes in figure.axes if axes.lines and not axes.get_xlabel()]
        fronts = [max(axes.lines, key=lambda line: line.get_zorder()) for axes in plots]
        assert [line.get_label() for line in fronts] == edges
        assert all(len(axes.lines) == len(edges) + 1 for axes in plots)  # with the line at zero
        assert set(edges) <= set(texts_of(figure))
        assert ("Where one part of the image" in prose_of(figure)) == (given is not None)


def test_captions_of_knockout_and_taps_say_nothing_of_what_is_not_there(reading, traced):
    span = find_target(reading.answer, "red")
    files, lines, _ = sever([reading], ["photo"], [span], quiet=True)
    (figure,) = figures_of(files, "knockout")
    cliff = any(text.get_text().startswith("cliff") for axes in figure.axes for text in axes.texts)
    assert ("Cliff:" in prose_of(figure)) == ("yellow" in prose_of(figure)) == cliff
    assert "Blocked" not in prose_of(figure)
    for taps in figures_of(traced, "taps"):
        assert ("weak:" in prose_of(taps)) == any(text.endswith(", weak") for text in texts_of(taps))
        assert ("grey: no gradient" in prose_of(taps)) == ("no gradient" in texts_of(taps))
        assert ("merger:" in prose_of(taps)) == ("merger" in texts_of(taps))
