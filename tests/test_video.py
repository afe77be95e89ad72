"""Videos: each temporal patch has its part of the map, its noise, and its place in strip and animation."""

import io
import re

import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, check_layout, make_image
from family_models import (
    ANSWER,
    FAMILIES,
    LAYERS,
    PROMPT,
    SIDES,
    autograd,
    by_the_book,
    decoder,
    make_processor,
    make_random,
    map_by_hand,
    of_all,
)
from PIL import Image

import smooth_gradcam as core
from common.page import Paper
from smooth_gradcam import Look, Settings, compute_token_maps, explain, read
from studies.video import Video, animate, create_video_maps, read_video, strip_figure


@pytest.fixture(scope="session", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="session")
def processor(family, tokenizer):
    return make_processor(family, tokenizer)


@pytest.fixture(scope="session")
def model(family, tokenizer):
    return make_random(family, tokenizer)


@pytest.fixture(scope="session")
def image(family):
    """4 rows of 6 image tokens."""
    return make_image(6 * SIDES[family], 4 * SIDES[family])


@pytest.fixture(scope="session")
def oracles(model):
    return {rules: by_the_book(model, rules) for rules in core.RULES}


@pytest.fixture(scope="session")
def frames(family):
    side = SIDES[family]
    return [make_image(7 * side, 5 * side).rotate(90 * i).resize((7 * side, 5 * side)) for i in range(4)]


VIDEO_TEMPLATE = CHAT_TEMPLATE.replace("{% else %}{{ part", "{% elif part['type'] == 'video' %}<|vision_start|>"
                                       "<|video_pad|><|vision_end|>{% else %}{{ part")  # fmt: skip


@pytest.fixture(scope="session")
def film(model, processor, frames):
    """Of four frames: two temporal patches of 5 x 7 tokens."""
    processor.chat_template = VIDEO_TEMPLATE
    return read_video(model, processor, Video(frames), PROMPT, ANSWER)


@of_all
def test_video_is_read_as_the_processor_has_it(film, frames, family):
    assert film.grids == ((5, 7), (5, 7))
    assert [photo.tobytes() for photo in film.photos] == [frames[0].tobytes(), frames[2].tobytes()]
    assert film.inputs["video_grid_thw"].tolist() == [[2, 10, 14]]
    assert "pixel_values" not in film.inputs
    ids = film.inputs["input_ids"][0]
    video = film.processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert (ids == video).nonzero()[:, 0].tolist() == film.positions.tolist()
    if family == "qwen2_5_vl":  # two frames of two a second
        assert film.inputs["second_per_grid_ts"].tolist() == [1.0]
    if family == "qwen3_vl":  # in the middle of the two
        assert "<0.2 seconds>" in film.processor.tokenizer.decode(ids)
        assert "<1.2 seconds>" in film.processor.tokenizer.decode(ids)


@of_all
def test_each_temporal_patch_has_its_part_of_the_map(oracles, film):
    found = explain(film, [(0, len(film.answer))], range(LAYERS), Settings(use_smooth=False))
    assert [(one.image, one.grid) for one in found] == [(0, (5, 7)), (1, (5, 7))]
    book = oracles["attnlrp"]
    expected = autograd(book, film, decoder(book), film.tokens)
    for layer in range(LAYERS):
        pair = (tensor[0, film.positions] for tensor in expected[layer])
        together = np.concatenate([one.maps[layer].ravel() for one in found])
        np.testing.assert_allclose(together, map_by_hand(*pair, "gradcam"), rtol=1e-4, atol=1e-7)


@of_all
def test_vision_merger_of_a_video_is_in_raster_order(model, film):
    settings = Settings(use_smooth=False, method="hirescam")
    for one in explain(film, [(0, len(film.answer))], [0, model.model.visual.merger], settings):
        np.testing.assert_allclose(one.maps["model.visual.merger"], one.maps[0], rtol=1e-5)


@of_all
def test_every_frame_gets_noise_of_its_own(film, family, monkeypatch):
    seen, plain = [], core.add_noise
    monkeypatch.setattr(core, "add_noise", lambda *args: seen.append(plain(*args)) or seen[-1])
    explain(film, [(0, 3)], [1], Settings(num_samples=2, noise_std=0.2))
    noise = (torch.stack(seen) - film.inputs["pixel_values_videos"]).unflatten(-1, (3, 2, -1))
    std = torch.tensor(film.processor.video_processor.image_std)
    for frame in noise.unbind(3):
        torch.testing.assert_close(frame.std((0, 1, 3)) * std, torch.full((3,), 0.2), rtol=0.05, atol=0)
    assert abs(np.corrcoef(noise[:, :, :, 0].flatten(), noise[:, :, :, 1].flatten())[0, 1]) < 0.05


@of_all
def test_model_answers_to_a_video(model, processor, film):
    found = read_video(model, processor, Video(film.photos, fps=1), PROMPT, max_new_tokens=3)
    assert 1 <= len(found.tokens) <= 3
    assert len(found.grids) == 1


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_bad_videos_are_named(model, processor, film, frames, image):
    with pytest.raises(ValueError, match="a video of 1 frames .196 x 140.: give two or more, all of one size"):
        Video(frames[:1])
    with pytest.raises(ValueError, match="a video of 2 frames .196 x 140, 168 x 112.: give two or more, all of one"):
        Video([frames[0], image])
    for fps in (0, -1, float("inf"), float("nan"), "2", True, 1e-300, 10**400):
        with pytest.raises(ValueError, match=re.escape(f"fps={fps!r} must be frames per second, 0.01 to 1000")):
            Video(frames, fps)
    for odd in (None, 5, frames[0], "a.png"):
        with pytest.raises(ValueError, match="must be a list of photos"):
            Video(odd)
    with pytest.raises(ValueError, match="is no processor"):
        read_video(model, processor.tokenizer, Video(frames), PROMPT, ANSWER)
    with pytest.raises(ValueError, match="^image of type Video must be a path"):
        compute_token_maps(model, processor, Video(frames), PROMPT, [0])
    with pytest.raises(ValueError, match="^the prompt has a video, and this takes one photo"):
        read_video(model, processor, Video(frames[:2]), PROMPT, ANSWER).photo  # noqa: B018
    with pytest.raises(ValueError, match="must be uint8 .height, width, 3., RGB"):
        read(model, processor, np.stack([np.asarray(frame) for frame in frames]), PROMPT)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("width", ["page", "column"])
def test_strip_and_animation_show_each_temporal_patch(model, processor, film, frames, tmp_path, width):
    """The animation has a frame for each frame; what differs between the two of a patch is the frames alone."""
    options = {"answer": ANSWER, "target": "red", "num_samples": 2, "fps": 4, "quiet": True, "paper": Paper(width)}
    patches = create_video_maps(model, processor, frames, PROMPT, -1, tmp_path / "out", **options)
    with np.load(tmp_path / "out/maps.npz") as file:
        assert file["maps"].shape == (2, 5, 7)
        for one, cam in zip(patches, file["maps"], strict=True):
            np.testing.assert_array_equal(one.maps[LAYERS - 1], cam)
    with Image.open(tmp_path / "out/video.webp") as film_file:
        assert (film_file.n_frames, film_file.size, film_file.info["loop"]) == (4, frames[0].size, 0)
        film_file.load()
        assert film_file.info["duration"] == 250
    reading = read_video(model, processor, Video(frames, 4), PROMPT, ANSWER)
    page = strip_figure(reading, patches, LAYERS - 1, Video(frames, 4), Look(), Paper(width))
    np.asarray(page)  # drawn
    said = [text.get_text() for text in page.figure.texts]
    assert {"0.0 s", "0.5 s"} <= set(said)
    check_layout(page.figure)


@pytest.mark.parametrize("peak", [None, 8])
def test_animation_has_one_scale_and_each_map_its_share_of_the_frames(peak):
    """By the colours of grey frames under maps of one cell: full, none, half. (WebP merges frames that are equal.)"""
    grey = [Image.new("RGB", (32, 32), (60 * i,) * 3) for i in range(5)]
    maps = [np.full((1, 1), value, np.float32) for value in (4, 0, 2)]
    with Image.open(io.BytesIO(animate(grey, maps, 10, peak=peak))) as film:
        seen = []
        for i in range(film.n_frames):
            film.seek(i)
            seen.append(np.asarray(film.convert("RGB")).mean((0, 1)))
    shown = zip(grey, (0, 0, 1, 1, 2), strict=True)
    expected = [core.render_cam(frame, maps[i], Look(), peak or 4)[0].mean((0, 1)) for frame, i in shown]
    np.testing.assert_allclose(seen, expected, atol=8)
