"""Figures of flow and knockout: what they keep of the arrays, and that everything has its place."""

import numpy as np
import pytest
from conftest import check_layout, make_image
from flow_by_hand import LAYERS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_core import ANSWER, PROMPT

from common.page import WIDTHS, Paper
from smooth_gradcam import Settings, explain, find_target, read
from studies.flow import attention_flow, gradient_flow
from studies.flow_figures import trace
from studies.knockout_figures import sever


@pytest.fixture(scope="module")
def reading(model, processor, image):
    return read(model, processor, image, PROMPT, ANSWER)


# the tables of attention and gradients


def test_trace_keeps_attention_gradients_and_maps_as_they_are_alone(reading):
    span, settings = find_target(reading.answer, "red"), Settings(num_samples=2, noise_std=0.2)
    files, lines = trace([reading], ["photo"], [span], [0, 2], settings, quiet=True)
    arrays = files["information_flow.npz"]
    (alone,) = explain(reading, [span], range(LAYERS), settings)
    np.testing.assert_array_equal(arrays["maps_0"], np.stack([alone.maps[i] for i in range(LAYERS)]))
    np.testing.assert_array_equal(arrays["attention_0"], attention_flow(reading, span))
    np.testing.assert_array_equal(arrays["gradient_0"], gradient_flow(reading, span, settings))
    assert arrays["maps_0"].max() > 0
    assert any("the image gets" in line for line in lines)


@pytest.mark.parametrize(
    ("size", "width"),
    [((56, 280), "column"), ((84, 112), "page"), ((224, 112), "column"), ((280, 56), "page")],
    ids=["1:5", "3:4", "2:1", "5:1"],
)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_figures_of_the_flow_fit_on_page_and_column(model, processor, size, width):
    photo, paper = make_image(*size), Paper(width)
    mask = np.tri(*photo.size[::-1], dtype=bool)
    several = [read(model, processor, photo, PROMPT, answer) for answer in (ANSWER, ANSWER + " " + ANSWER)]
    settings = Settings(use_smooth=False)
    for readings in (several[:1], several):
        names, spans = ["a.jpg", "b.jpg"][: len(readings)], [find_target(reading.answer, "red") for reading in readings]
        options, part = {"quiet": True, "paper": paper}, mask if len(readings) == 1 else None
        files = trace(readings, names, spans, range(LAYERS), settings, attention_map=True, taps=True, **options)[0]
        files |= sever(readings, names, spans, window=1, keep=3, mask=part, **options)[0]
        figures = {name: content for name, content in files.items() if name.endswith(".png")}
        assert set(figures) == {"information_flow.png", "attention_maps.png", "taps.png", "knockout.png"}
        for draw in figures.values():
            page = draw()
            assert page.figure.get_size_inches()[0] == WIDTHS[width]
            FigureCanvasAgg(page.figure)
            check_layout(page.figure)
