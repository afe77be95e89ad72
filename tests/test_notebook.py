"""What a notebook shows: the maps as they are, every text escaped, and nothing of it where no notebook is."""

import base64
import copy
import html
import io
import pickle
import re
import sys
import types

import numpy as np
import pytest
from conftest import DEMO, make_image
from drawn_maps import ANSWER, hot_spot, make_maps
from PIL import Image

from common.evidence import Evidence
from common.files import write_files
from common.flags import parse_args
from common.notebook import FADED, Shown, maps_html, reading_html, show_in_notebook
from smooth_gradcam import Reading, TokenMaps, colorize_cam, normalize_cam
from studies.words import create_word_maps, draw_words
from test_gradcam import single_layer_visualization
from visualization_utils import (
    create_comparative_analysis,
    create_layer_comparison_grid,
    draw_grid,
    visualize_multiple_layers,
)


def pictures_of(text):
    """The pictures in it, as arrays."""
    found = re.findall(r'src="data:image/\w+;base64,([^"]*)"', text)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def random_maps(layers, grid=(4, 6), **changes):
    rng = np.random.default_rng(0)
    return make_maps({layer: rng.random(grid).astype(np.float32) for layer in layers}, **changes)


def evident(maps, p, without):
    return type(maps)(**{**vars(maps), "evidence": Evidence(p, without)})


# maps


@pytest.mark.parametrize("grid", [(4, 6), (6, 4), (1, 200)])
def test_maps_are_shown_cell_by_cell_in_the_colours_of_the_figures(grid):
    maps = random_maps([3, 9], grid)
    pictures = pictures_of(maps_html(maps))
    assert len(pictures) == 2
    for cam, picture in zip(maps.maps.values(), pictures, strict=True):
        side = len(picture) // grid[0]
        assert picture.shape == (side * grid[0], side * grid[1], 3)
        assert max(picture.shape) <= 200
        np.testing.assert_array_equal(picture[side // 2 :: side, side // 2 :: side], colorize_cam(normalize_cam(cam)))


def test_what_is_explained_and_what_it_rests_on_are_said():
    text = maps_html(evident(random_maps([3], target="red car"), 0.97, 0.1))
    assert re.search(r"a <mark[^>]*>red car</mark> in the center", text)
    assert "p 0.97, 10 % of it left without the photo" in text
    assert "layer 3, max 0.9" in text
    assert "Doubt" not in text
    assert "<mark" not in maps_html(random_maps([3]))


def test_a_map_that_is_not_to_be_believed_is_faded_and_says_so():
    maps = evident(random_maps([3], target="red car"), 0.97, 0.96)
    text = maps_html(maps)
    assert "this does not come from the photo (99 % of p is left without it): drawn in 35 % of the colours" in text
    (picture,) = pictures_of(text)
    expected = colorize_cam(FADED * normalize_cam(maps.maps[3]))
    side = len(picture) // 4
    assert np.abs(picture[::side, ::side].astype(int) - expected).max() <= 3
    assert picture[..., 0].max() < colorize_cam(np.float32(1))[0]


@pytest.mark.parametrize("why", ["no gradient", "zero everywhere"])
def test_a_layer_without_a_map_says_why_and_has_no_colours(why):
    maps = make_maps({0: hot_spot((4, 6), (0, 0)), 7: np.zeros((4, 6), np.float32)}, why=why)
    text = maps_html(maps)
    assert len(pictures_of(text)) == 1
    assert f"{why}: no map" in text


def test_of_many_layers_some_are_shown_and_the_rest_counted():
    text = maps_html(random_maps(range(28)))
    shown = [int(layer) for layer in re.findall(r"layer (\d+), max", text)]
    assert len(shown) == len(pictures_of(text)) == 12
    assert (shown[0], shown[-1]) == (0, 27)
    assert set(np.diff(shown)) == {2, 3}
    assert "… and 16 more" in text
    assert "more" not in maps_html(random_maps(range(12)))


HOSTILE = "<script>alert(1)</script>\"><img src=x onerror=alert(1)>&amp;'\x1b]0;x\x07"


def test_texts_of_models_and_users_are_escaped(demo):
    maps = random_maps([0], answer=HOSTILE, prompt=HOSTILE, target="<img src=x")
    named = make_maps({HOSTILE: hot_spot((4, 6), (0, 0))}, answer=HOSTILE)
    reading = type(demo)(**{**vars(demo), "prompt": HOSTILE, "answer": HOSTILE})
    framed = Shown({}, page=f"<p>{HOSTILE}</p>")._repr_html_()
    for text in (maps_html(maps), maps_html(named), reading_html(reading), framed):
        assert "<script" not in text
        assert "<img src=x" not in text
        assert "&lt;script&gt;" in text
        tags = set(re.findall(r"<(\w+)", text))
        assert tags <= {"table", "tr", "th", "td", "mark", "div", "br", "img", "iframe"}


def test_a_reading_shows_its_photos_small_with_prompt_and_answer(demo):
    text = reading_html(demo)
    (photo,) = pictures_of(text)
    assert photo.shape == (300, 400, 3)
    assert np.abs(photo.astype(int) - np.asarray(demo.photo.resize((400, 300)))).mean() < 5
    assert html.escape(demo.answer) in text
    assert html.escape(demo.prompt) in text
    assert f"{demo.photo.width} × {demo.photo.height}" in text
    assert len(text) < 200_000


# results


def test_results_show_the_figure_that_is_written(tmp_path):
    results, files = draw_grid(make_image(300, 200), random_maps([0, 3]))
    write_files(tmp_path, {"figure.png": files["layer_comparison_grid.png"]})
    shown = Image.open(io.BytesIO(results._repr_png_()))
    written = Image.open(tmp_path / "figure.png")
    assert shown.width == 1000 < written.width
    small = np.asarray(written.resize(shown.size, Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(np.asarray(shown) - small).mean() < 1
    assert results._repr_html_() is None
    assert not any(isinstance(value, np.ndarray) for key, value in dict.items(results[0]) if key != "cam")


def test_words_show_their_page_in_a_frame():
    results, files = draw_words(make_image(300, 200), "", [random_maps([3])], [[0.5]], [["x"]])
    (page,) = re.findall(r'srcdoc="([^"]*)"', results._repr_html_())
    assert html.unescape(page) == files["index.html"]
    assert 'sandbox="allow-scripts allow-downloads"' in results._repr_html_()
    assert results._repr_png_() is None


def test_results_are_dicts_and_copies_of_them_plain_ones():
    results, _ = draw_grid(make_image(300, 200), random_maps([0, 3]))
    for twin in (pickle.loads(pickle.dumps(results)), copy.deepcopy(results), copy.copy(results), results.copy()):
        assert type(twin) is dict
        np.testing.assert_array_equal(twin[3]["heatmap"], results[3]["heatmap"])


def test_each_builder_returns_what_a_notebook_shows(make_model, processor, image, tmp_path, blank_figures):
    usual = make_model(), processor, image, "What is there?"
    options = {"num_samples": 1, "noise_std": 0, "answer": ANSWER, "quiet": True}
    for builder in (
        create_layer_comparison_grid,
        visualize_multiple_layers,
        create_comparative_analysis,
        single_layer_visualization,
    ):
        results = builder(*usual, save_dir=tmp_path / builder.__name__, **options)
        assert results._repr_png_().startswith(b"\x89PNG")
    assert "iframe" in create_word_maps(*usual, save_dir=tmp_path / "words", **options)._repr_html_()


# where a notebook is


class Formatter(dict):
    for_type = dict.__setitem__


def test_formatters_are_registered_with_the_ipython_that_runs(monkeypatch, demo):
    formatters = {"text/html": Formatter(), "text/plain": Formatter()}
    shell = types.SimpleNamespace(display_formatter=types.SimpleNamespace(formatters=formatters))
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    show_in_notebook()
    assert formatters["text/html"] == {TokenMaps: maps_html, Reading: reading_html}
    said = []
    for value in (random_maps([3], target="red car"), demo):
        formatters["text/plain"][type(value)](value, types.SimpleNamespace(text=said.append), False)
    assert said[0] == "TokenMaps of 'red car' at layer 3: maps of (4, 6)"
    assert said[1] == f"Reading of 1 photos with the answer {demo.answer!r}"


@pytest.mark.parametrize("module", [None, types.SimpleNamespace(get_ipython=lambda: None)])
def test_without_a_running_ipython_nothing_happens(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "IPython", module)
    show_in_notebook()


@pytest.mark.parametrize(
    "own",
    [["-f", "/run/kernel-1.json"], ["--f=/run/kernel-1.json"], ["-f", "k.json", "--HistoryManager.hist_file=:memory:"]],
)
def test_the_kernels_own_flag_is_not_ours(monkeypatch, capsys, own):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", *own])
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    with pytest.raises(SystemExit):
        parse_args()
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    assert parse_args().mode == "grid"
    sys.argv += ["--mode", "single", "--layer", "3"]
    assert parse_args().layer == 3
    sys.argv += ["-f", "notes.txt"]
    with pytest.raises(SystemExit):
        parse_args()
    with pytest.raises(SystemExit):
        parse_args(own)
    assert capsys.readouterr().err.count("error: ") == 3


CELLS = """
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration
from smooth_gradcam import read
from studies.words import create_word_maps
from visualization_utils import create_layer_comparison_grid, compute_token_maps
model = Qwen2_5_VLForConditionalGeneration.from_pretrained(MODEL).eval()
processor = AutoProcessor.from_pretrained(MODEL)
usual = model, processor, PHOTO, "What is in this image?"
settings = {"num_samples": 1, "noise_std": 0, "answer": "a dog and a house"}
---
read(*usual)
---
compute_token_maps(*usual, [3, 14], target="dog", **settings)
---
create_layer_comparison_grid(*usual, [3, 14], FOLDER + "/grid", **settings)
---
create_word_maps(*usual, [14], FOLDER + "/words", **settings)
---
from test_gradcam import parse_args
parse_args().mode
"""


def test_a_notebook_shows_reading_maps_and_results(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    names = f"MODEL, PHOTO, FOLDER = {str(DEMO)!r}, {str(DEMO.parent / 'demo.jpeg')!r}, {str(tmp_path)!r}\n"
    names += "import torch\ntorch.set_num_threads(1)\n"
    cells = [nbformat.v4.new_code_cell(cell) for cell in (names + CELLS).split("---\n")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    where = {"metadata": {"path": str(DEMO.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    shown = [[out["data"] for out in cell["outputs"] if out["output_type"] == "execute_result"] for cell in cells]
    (reading,), (maps,), (grid,), (words,), (mode,) = shown[1:]
    assert len(pictures_of(reading["text/html"])) == 1
    assert len(pictures_of(maps["text/html"])) == 2
    assert ">dog</mark>" in maps["text/html"]
    assert Image.open(io.BytesIO(base64.b64decode(grid["image/png"]))).width == 1000
    assert "srcdoc=" in words["text/html"]
    assert mode["text/plain"] == "'grid'"
