"""--together and --video: one map over all pictures, in single, grid and words mode, as in Python."""

import base64
import json
import re
from dataclasses import replace

import cv2
import numpy as np
import pytest
from any_text import refused
from conftest import DEMO, check_layout, load_once, make_image, read_once
from PIL import Image
from scipy.stats import spearmanr
from test_clips import write_clip
from test_video import VIDEO_TEMPLATE

import test_gradcam
from common.bands import render_heatmap, render_overlay
from common.evidence import explain_with_evidence, joined
from common.flags import MODES_OF_FLAG
from common.page import Paper
from demo_model.scenes import draw_background, sprite
from smooth_gradcam import Look, Settings, get_model_layers, read
from studies.pictures import Pictures, Source
from studies.pictures_figure import draw_pictures
from studies.pictures_words import word_tables
from studies.video import Video, read_video
from visualization_utils import FADED

ANSWER = "the red cat"
PLAIN = ["--answer", ANSWER, "--noise_std", "0", "--method", "gradcam"]
LAYERS = (0, 2)
SIZES = ((168, 112), (84, 140))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, paths = tmp_path_factory.mktemp("photos"), []
    for i, size in enumerate(SIZES):
        paths.append(folder / f"{'ab'[i]}.png")
        make_image(*size).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Seven frames in 3.5 seconds: at two a second, four temporal patches."""
    frames = [np.asarray(make_image(168, 112).rotate(20 * i)) for i in range(35)]
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", frames)


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory, model_folder):
    """The tiny model with a chat template that knows videos."""
    folder = tmp_path_factory.mktemp("model")
    for path in model_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").write_text(VIDEO_TEMPLATE)
    return folder


@pytest.fixture
def together(drive, photos, tmp_path):
    """Run with --together in a mode; returns what it said and the folder."""

    def run(mode, *flags):
        code, out, err = drive("--mode", mode, "--image_path", *photos, "--together", *PLAIN, *flags)
        assert code == 0, err
        return out, tmp_path / "out" / mode

    return run


@pytest.fixture
def filmed(drive, clip, video_folder, tmp_path, monkeypatch):
    """Run with --video in a mode; returns what it said and the folder."""
    monkeypatch.setattr(test_gradcam, "load_processor", read_once.__wrapped__)  # whose cap a run lowers

    def run(mode, *flags):
        given = ["--mode", mode, "--video", str(clip), "--model_path", str(video_folder), "--device", "cpu"]
        given += ["--output_dir", str(tmp_path / "out"), *PLAIN, *map(str, flags)]
        assert test_gradcam.main(given) == 0
        return tmp_path / "out" / mode

    return run


def in_python(model_folder, reader, shown, layers, span=None):
    """The maps of the answer, or a part of it, of each picture, and the reading."""
    model, processor = load_once(str(model_folder), "cpu", "auto"), read_once(str(model_folder), 1_000_000)
    reading = reader(model, processor, shown, "Describe the main content in this image in detail.", ANSWER)
    settings = Settings(1, 0.0, method="gradcam")
    return explain_with_evidence(reading, [span or (0, len(ANSWER))], layers, settings), reading


def picture(path):
    return np.asarray(Image.open(path)).astype(int)


# photos of one prompt


def test_together_are_the_maps_of_python(together, model_folder, photos):
    out, folder = together("single", "--layer", "2", "--save_raw")
    maps, _ = in_python(model_folder, read, [Image.open(path) for path in photos], [2])
    with np.load(folder / "maps.npz") as arrays:
        assert arrays["pictures"].tolist() == ["a.png", "b.png"]
        assert arrays["grids"].tolist() == [list(one.grid) for one in maps]
        for i, own in enumerate(maps, 1):
            np.testing.assert_allclose(arrays[f"maps_{i}"][0], own.maps[2], rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(arrays["evidence"], maps[0].evidence[:2], rtol=1e-4)
    sums = np.array([own.maps[2].sum() for own in maps])
    a, b = (f"{100 * share:.0f} %" for share in sums / sums.sum())
    assert f"layer 2: of the map {a} in a.png, {b} in b.png" in out


def test_photos_together_have_one_scale(together, model_folder, photos):
    """That of the strongest, faded as it is hardly said: the weaker one is darker."""
    _, folder = together("single", "--layer", "2")
    shown = [Image.open(path) for path in photos]
    maps, _ = in_python(model_folder, read, shown, [2])
    assert maps[0].evidence.hardly_said
    peaks = [own.maps[2].max() for own in maps]
    assert min(peaks) < 0.95 * max(peaks)
    for i, (photo, own) in enumerate(zip(shown, maps, strict=True), 1):
        cam, peak = own.maps[2], max(peaks) / FADED
        expected = {"heatmap": render_heatmap(cam, photo.size[::-1], Look(), peak)}
        expected["superimposed_result"] = render_overlay(photo.convert("RGB"), cam, Look(), peak)
        for name, array in expected.items():
            assert np.abs(picture(folder / f"{name}_{i}.png") - array).max() <= 1
        assert (picture(folder / f"original_image_{i}.png") == np.asarray(photo)).all()
    assert (folder / "visualization.png").exists()


@pytest.mark.parametrize("scale", ["map", "word", "all"])
def test_grid_of_layers_by_photos(together, model_folder, photos, scale):
    _, folder = together("grid", "--layers", *map(str, LAYERS), "--scale", scale)
    shown = [Image.open(path) for path in photos]
    maps, _ = in_python(model_folder, read, shown, LAYERS)
    largest = {layer: max(own.maps[layer].max() for own in maps) for layer in LAYERS}
    assert abs(largest[0] / largest[2] - 1) > 0.02
    for layer in LAYERS:
        peak = (largest[layer] if scale == "map" else max(largest.values())) / FADED
        for i, (photo, own) in enumerate(zip(shown, maps, strict=True), 1):
            expected = render_heatmap(own.maps[layer], photo.size[::-1], Look(), peak)
            assert np.abs(picture(folder / f"layer_{layer}_heatmap_{i}.png") - expected).max() <= 1
    names = {
        f"layer_{layer}_{kind}_{i}.png" for layer in LAYERS for kind in ("heatmap", "superimposed") for i in (1, 2)
    }
    assert {path.name for path in folder.iterdir()} == names | {"layer_comparison_grid.png"}


def test_words_of_photos_together(together, model_folder, photos):
    _, folder = together("words", "--layers", "0", "2", "--words", "red,cat")
    shown = [Image.open(path) for path in photos]
    record = json.loads((folder / "words.json").read_text())
    data = page_data(folder)
    assert record["pictures"] == ["a.png", "b.png"]
    assert [own["name"] for own in data["pictures"]] == ["1 a.png", "2 b.png"]
    arrays = np.load(folder / "maps.npz")
    for k, word in enumerate(("red", "cat")):
        start = ANSWER.index(word)
        maps, _ = in_python(model_folder, read, shown, LAYERS, (start, start + 3))
        for j, layer in enumerate(LAYERS):
            cams = [own.maps[layer] for own in maps]
            whole = np.concatenate([cam.ravel() for cam in cams])
            for i, cam in enumerate(cams, 1):
                np.testing.assert_allclose(arrays[f"maps_{i}"][k, j], cam, rtol=1e-4, atol=1e-7)
            raw = np.frombuffer(base64.b64decode(data["words"][k]["maps"][j]), "<u2") / 65535
            np.testing.assert_allclose(raw * data["words"][k]["maxima"][j], whole, rtol=1e-3, atol=2e-5 * whole.max())
            assert data["words"][k]["maxima"][j] == pytest.approx(whole.max(), rel=1e-4)
            shares = [cam.sum() / whole.sum() for cam in cams]
            np.testing.assert_allclose(record["words"][k]["shares"][str(layer)], shares, rtol=1e-4)
        assert data["words"][k]["doubt"].startswith("the model hardly says this")
    assert data["video"] is False


def page_data(folder):
    text = (folder / "index.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_words_also_show_what_they_take_from_the_prompt(together):
    out, folder = together("words", "--layers", "1", "--words", "red,cat", "--prompt_words")
    assert "prompt words at layer 1" in out
    assert (folder / "prompt_words.png").exists()
    assert len(page_data(folder)["words"][0]["asked"][0]) == len(page_data(folder)["asked"])


def test_likeness_to_the_middle_layer_is_that_of_all_pictures_as_one(model_folder, photos):
    maps, reading = in_python(model_folder, read, [Image.open(path) for path in photos], [0, 1, 2])
    middle = get_model_layers(reading.model)[1] // 2
    assert middle == 2
    for layer in (0, 1):
        both = [np.concatenate([own.maps[key].ravel() for own in maps]) for key in (layer, middle)]
        assert [own.likeness[layer] for own in maps] == pytest.approx(2 * [spearmanr(*both).statistic], abs=1e-6)


def test_joining_keeps_what_belongs_to_one_picture(model_folder, photos):
    maps, reading = in_python(model_folder, read, [Image.open(path) for path in photos], [0])
    (whole,) = joined(maps, 2)
    assert joined(maps[:1], 1) == maps[:1]
    parts = Pictures(reading, ("a", "b"), "a, b").split(whole, 0)
    for part, own in zip(parts, maps, strict=True):
        np.testing.assert_array_equal(part, own.maps[0])


# videos


def test_video_has_the_maps_of_python(filmed, video_folder, clip):
    folder = filmed("single", "--layer", "2", "--save_raw")
    video = Source.of(test_gradcam.parse_args(["--mode", "single", "--video", str(clip)])).photo
    assert (len(video.frames), video.fps) == (7, 2.0)
    maps, _ = in_python(video_folder, read_video, video, [2])
    with np.load(folder / "maps.npz") as arrays:
        assert arrays["maps"].shape == (1, 4, *maps[0].grid)
        np.testing.assert_allclose(arrays["maps"][0], [own.maps[2] for own in maps], rtol=1e-4, atol=1e-7)
        assert arrays["pictures"].tolist() == ["0.0 s", "1.0 s", "2.0 s", "3.0 s"]
    with Image.open(folder / "video.webp") as animation:
        assert (animation.n_frames, animation.size) == (7, (168, 112))
    assert {path.name for path in folder.iterdir()} == {"maps.npz", "video.webp", "video_strip.png"}


def test_grid_of_layers_by_times(filmed):
    folder = filmed("grid", "--layers", "0", "2", "--save_raw")
    assert {path.name for path in folder.iterdir()} == {
        *("layer_comparison_grid.png", "layer_0.webp", "layer_2.webp", "maps.npz")
    }
    assert np.load(folder / "maps.npz")["maps"].shape[:2] == (2, 4)
    with Image.open(folder / "layer_2.webp") as animation:
        assert animation.n_frames == 7


def test_words_of_a_video_have_every_frame_with_the_map_of_its_patch(filmed, clip):
    folder = filmed("words", "--layers", "2", "--words", "cat")
    data = page_data(folder)
    assert data["video"] is True
    assert [own["name"] for own in data["pictures"]] == [f"{i / 2:.1f} s" for i in range(7)]
    assert [own["map"] for own in data["pictures"]] == [0, 0, 1, 1, 2, 2, 3]
    frames = [data["photo"], *(own["photo"] for own in data["pictures"][1:])]
    for i, url in enumerate(frames):
        shown = cv2.imdecode(np.frombuffer(base64.b64decode(url.split(",")[1]), np.uint8), cv2.IMREAD_COLOR)
        expected = np.asarray(make_image(168, 112).rotate(20 * 5 * i))[..., ::-1]
        assert np.abs(shown[30:80, 60:110].astype(int) - expected[30:80, 60:110]).mean() < 12
    assert np.load(folder / "maps.npz")["maps"].shape[:3] == (1, 1, 4)


def test_fewer_frames_or_pixels_are_fewer_image_tokens(filmed):
    def shape(*flags):
        return np.load(filmed("grid", "--layers", "1", "--save_raw", *flags) / "maps.npz")["maps"].shape[1:]

    times, height, width = shape()
    assert shape("--fps", "1") == (2, height, width)
    _, *smaller = shape("--max_pixels", "60000")
    assert np.prod(smaller) * 28 * 28 < 1.2 * 60000 < 0.8 * height * width * 28 * 28  # grids are rounded
    assert times == 4


def test_the_map_follows_an_object_that_moves(tmp_path, capsys):
    """The demo model's dog: in each temporal patch the hottest place is on it, in one of the patch's two frames."""
    ground = draw_background(np.random.default_rng(3), 224, 336, "landscape")
    art = cv2.resize(sprite("dog", 1), (72, 72), interpolation=cv2.INTER_AREA)
    frames, lefts = [], [6 * i for i in range(40)]  # ten a second
    for left in lefts:
        frame = ground.copy()
        place = frame[140:212, left : left + 72]
        place[:] = place * (1 - art[..., 3:]) + art[..., :3]
        frames.append(np.round(255 * frame.clip(0, 1)).astype(np.uint8))
    clip = write_clip(tmp_path / "dog.mp4", frames)
    flags = ["--mode", "single", "--video", str(clip), "--noise_std", "0", "--target", "dog", "--save_raw", "--quiet"]
    assert test_gradcam.main([*flags, "--output_dir", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert "evidence: p 1.00, 0 % of it left without the photo" in capsys.readouterr().out
    (cams,) = np.load(tmp_path / "out/single/maps.npz")["maps"]
    height, width = cams.shape[1:]
    assert len(cams) == 4
    for i, cam in enumerate(cams):
        row, column = np.unravel_index(cam.argmax(), cam.shape)
        x, y = (column + 0.5) * 336 / width, (row + 0.5) * 224 / height
        assert 140 - 14 < y < 212 + 14
        assert lefts[10 * i] - 14 < x < lefts[10 * i + 5] + 72 + 14
    assert (DEMO / "video_preprocessor_config.json").exists()


# figures


@pytest.mark.parametrize("width", ["page", "column"])
def test_figures_have_room_for_what_they_say(model_folder, video_folder, photos, width):
    """Two photos with long names, and a video of eleven temporal patches; a page is as high as a paper's."""
    shown = [Image.open(path).convert("RGB") for path in photos]
    maps, reading = in_python(model_folder, read, [shown[0].resize((280, 84)), shown[1]], [0, 1, 2])
    pictures = [Pictures(reading, ("a name that is much too long to have room.png", "b.png"), "two")]
    wholes = [joined(maps, 2)]
    video = Video([make_image(112, 84).rotate(10 * i) for i in range(21)])
    maps, reading = in_python(video_folder, read_video, video, [0, 1])
    times = tuple(f"{i}.0 s" for i in range(11))
    pictures, wholes = [*pictures, Pictures(reading, times, "clip.mp4", video)], [*wholes, joined(maps, 11)]
    for own, whole in zip(pictures, wholes, strict=True):
        files = draw_pictures(own, whole[0], True, paper=Paper(width, heatmaps=True))
        files |= word_tables(own, [*whole, *whole, *whole], paper=Paper(width))
        if own.video is None:
            files |= draw_pictures(own, replace(whole[0], maps={1: whole[0].maps[1]}), False, paper=Paper(width))
        for name, draw in files.items():
            if name.startswith(("layer_comparison", "words", "visualization")):
                page = draw()
                np.asarray(page)  # drawn
                check_layout(page.figure)
                assert page.figure.get_size_inches()[1] <= 9.01, name


# what cannot be asked for


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--together"], "--together needs two photos or more"),
        (["--together", "--image_path", "a.png"], "--together needs two photos or more"),
        (["--together", "--image_path", "a.png", "*.png"], "--together needs two photos or more"),
        (["--together", "--image_path", "a.png", "a.png"], "--image_path has a photo twice: a.png"),
        (["--fps", "3"], "--fps 3 needs --video, whose frames it counts"),
        (["--video", "a.mp4", "--image_path", "a.png"], "--image_path cannot be combined with --video"),
        (["--video", "a.mp4", "--messages", "a.json"], "--messages cannot be combined with --video"),
        (["--video", "a.mp4", "--together"], "--together cannot be combined with --video"),
        (["--video", "a.mp4", "--fps", "0"], "'0' must be frames per second, 0.01 to 1000"),
        (["--video", "a.mp4", "--fps", "nan"], "'nan' must be frames per second, 0.01 to 1000"),
        (["--video", " "], "' ' is empty: give a path"),
    ],
)
def test_flags_that_cannot_act_together_are_refused(capsys, flags, why):
    assert why in refused(capsys, ["--mode", "single", *flags])


def test_modes_of_one_photo_say_why_they_take_no_several(capsys):
    for mode in ("multi", "comparative", "evaluate", "flow", "knockout"):
        for flags in (["--together", "--image_path", "a.png", "b.png"], ["--video", "a.mp4"]):
            assert mode not in MODES_OF_FLAG[flags[0]]
            said = refused(capsys, ["--mode", mode, *flags])
            assert f"{flags[0]} acts in single, grid, words mode only; in {mode} mode " in said
            assert "it cannot act" not in said


@pytest.mark.parametrize("flags", [["--video"], ["--together", "--image_path", "a"]])
def test_a_file_that_cannot_be_opened_is_named_before_the_model_is_loaded(capsys, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(test_gradcam, "load_model", None)
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"no video")
    code = test_gradcam.main(["--mode", "words", "--output_dir", str(tmp_path / "out"), *flags, str(path)])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith(f"test_gradcam.py: error: {flags[-1] if len(flags) == 1 else '--image_path'}")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_does_not_write_where_its_video_lies(capsys, clip, tmp_path):
    folder = tmp_path / "out/single"
    folder.mkdir(parents=True)
    (folder / "clip.mp4").write_bytes(clip.read_bytes())
    flags = ["--mode", "single", "--video", str(folder / "clip.mp4"), "--output_dir", str(tmp_path / "out")]
    assert test_gradcam.main([*flags, "--device", "cpu"]) == 2
    assert "the folder that this run writes to" in capsys.readouterr().err
