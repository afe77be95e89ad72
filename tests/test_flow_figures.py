"""Figures of flow and knockout: what they keep of the arrays, and that everything has its place."""

import numpy as np
import pytest
from conftest import check_layout, make_image
from flow_by_hand import LAYERS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_core import ANSWER, PROMPT

from common.evidence import explain_with_evidence
from common.page import WIDTHS, Paper
from smooth_gradcam import Settings, find_target, read
from studies.flow import attention_flow, gradient_flow
from studies.flow_figures import trace
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
    assert set(figures) == {"information_flow.png", "attention_maps.png", "taps.png", "knockout.png"}
    for draw in figures.values():
        page = draw()
        assert page.figure.get_size_inches()[0] == WIDTHS[width]
        FigureCanvasAgg(page.figure)
        check_layout(page.figure)
