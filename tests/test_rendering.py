"""Pictures in and out, and the pure functions, against hand-computed numbers."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import make_image
from matplotlib import colormaps
from PIL import Image

from smooth_gradcam import (
    COLORMAPS,
    METHODS,
    ExplanationError,
    Look,
    SmoothQwenGradCAM,
    colorize_cam,
    colour_table,
    get_model_layers,
    gradcam,
    logit_score,
    logprob_score,
    normalize_cam,
    opacity_of,
    overlay_cam,
    render_cam,
    upsample_cam,
)

ROOT = Path(__file__).parent.parent


def test_scores_by_hand():
    logits, tokens = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 9.0, 0.0, 0.0]]), torch.tensor([2, 1])
    assert logit_score(logits, tokens).item() == 10
    expected = np.log(1 / 4) + 9 - np.log(3 + np.exp(9))
    assert logprob_score(logits, tokens).item() == pytest.approx(expected)


def test_normalized_map_has_its_own_maximum_at_one():
    """Its least value stays above zero: nothing is subtracted."""
    assert normalize_cam(np.array([[0, 1], [2, 4]])).tolist() == [[0, 0.25], [0.5, 1]]
    assert normalize_cam(np.array([[1, 2], [3, 4]])).tolist() == [[0.25, 0.5], [0.75, 1]]
    assert normalize_cam(np.full((1, 2), 1e-30)).tolist() == [[1, 1]]
    assert normalize_cam(np.zeros((2, 2))).tolist() == [[0, 0], [0, 0]]
    assert normalize_cam(np.ones((2, 2))).dtype == normalize_cam(np.zeros((2, 2))).dtype == np.float32


def test_upsampled_cell_keeps_its_area_of_the_photo():
    large = upsample_cam(np.array([[0, 0, 0], [1, 1, 1]]), (40, 60))
    assert (large.shape, large.dtype, large.min()) == ((40, 60), np.float32, 0)
    assert ((large > 0.5) == (np.arange(40) >= 20)[:, None]).all()
    large = upsample_cam(np.array([[1, 0, 0, 0]] * 3), (30, 80))
    assert ((large > 0.5) == (np.arange(80) < 20)).all()
    np.testing.assert_allclose(upsample_cam(np.ones((3, 2)), (31, 17)), 1, rtol=1e-5)


def test_upsampling_is_linear_between_the_centres_of_cells_or_shows_the_cells():
    row = [0] * 5 + [0.25, 0.75, 0.75, 0.25] + [0] * 5  # by hand, at twice the size
    cam = np.array([[0, 0, 0, 1, 0, 0, 0]])
    np.testing.assert_allclose(upsample_cam(cam, (2, 14)), [row] * 2, atol=1e-6)
    np.testing.assert_allclose(upsample_cam(cam.T, (14, 2)).T, [row] * 2, atol=1e-6)
    assert upsample_cam(cam, (2, 14), "cells").tolist() == [[0] * 6 + [1, 1] + [0] * 6] * 2


@pytest.mark.parametrize("how", ["smooth", "cells"])
def test_highest_pixel_lies_in_the_cell_of_the_maximum_and_nothing_goes_beyond(how):
    rng = np.random.default_rng(0)
    for _ in range(60):
        grid = rng.integers(3, 20, 2)
        cam = rng.random(grid).astype(np.float32) ** 4
        cam.flat[cam.argmax()] *= 1.05  # a tie would be anyone's
        size = grid * 28 + rng.integers(0, 28, 2)
        large = upsample_cam(cam, tuple(size.tolist()), how)
        pixel = np.array(np.unravel_index(large.argmax(), large.shape))
        assert tuple(((pixel + 0.5) * grid // size).astype(int)) == np.unravel_index(cam.argmax(), cam.shape)
        assert cam.min() <= large.min() <= large.max() <= cam.max()


def test_highest_pixel_of_the_demos_words_lies_in_their_cell():
    maps = np.load(ROOT / "cam_results/examples/words/maps.npz")["maps"]
    assert maps.shape[:2] == (10, 6)
    for cam in maps.reshape(-1, *maps.shape[2:]):
        row, column = np.unravel_index(upsample_cam(cam, (900, 1200)).argmax(), (900, 1200))
        assert (row // 75, column // 75) == np.unravel_index(cam.argmax(), cam.shape)


def test_jet_is_red_where_hot_and_blue_where_cold():
    cold, cool, middle, warm, hot = colorize_cam(np.array([0, 0.25, 0.5, 0.75, 1]), "jet").tolist()
    assert (cold, hot) == ([0, 0, 128], [128, 0, 0])
    between = [cool, middle, warm], [[0, 128, 255], [128, 255, 128], [255, 128, 0]]
    np.testing.assert_allclose(*between, atol=3)  # the nearest of 256 colours
    photo, cam = Image.new("RGB", (60, 40), "grey"), np.array([[0, 0, 1], [0, 0, 0]])
    for picture in render_cam(photo, cam, Look("jet", opacity=0.5)):
        assert picture[5, 55, 0] > picture[5, 55, 2] + 50  # top right, (row, column)
        assert picture[35, 5, 2] > picture[35, 5, 0] + 50


@pytest.mark.parametrize("name", [name for name in COLORMAPS if name != "jet"])
def test_colour_maps_are_matplotlibs(name):
    expected = 255 * colormaps[name](np.linspace(0, 1, 256))[:, :3]
    assert np.abs(colour_table(name) - expected).max() < 3


def lab(colour):
    return cv2.cvtColor(np.float32([[colour]]) / 255, cv2.COLOR_RGB2LAB)[0, 0]


PHOTOS = {"white": 247, "light": 230, "dark": 30, "grey": 128}
PHOTOS = {name: (value,) * 3 for name, value in PHOTOS.items()}
PHOTOS |= {"red": (220, 45, 40), "blue": (40, 55, 220), "green": (40, 170, 40), "sky": (110, 190, 250)}


@pytest.mark.parametrize("photo", PHOTOS.values(), ids=PHOTOS)
def test_cold_stays_photo_and_hot_and_half_hot_stand_out_on_any_photo(photo):
    cam = np.array([[0, 0, 0, 0, 0, 0.5, 0, 0, 0, 1.0, 0, 0]])
    superimposed = render_cam(Image.new("RGB", (12 * 9, 9), photo), cam, Look(upsample="cells"))[0]
    cold, half, hot = (superimposed[4, 9 * i + 4] for i in (0, 5, 9))
    assert tuple(cold) == photo
    assert np.linalg.norm(lab(half) - lab(cold)) > 30
    assert np.linalg.norm(lab(hot) - lab(cold)) > 35
    assert np.linalg.norm(lab(hot) - lab(half)) > 35
    assert max(abs(lab(hot) - lab(cold))[0], abs(lab(half) - lab(cold))[0]) > 12  # in grey print


def test_opacity_follows_the_value_or_is_the_same_everywhere():
    share = np.array([0, 0.25, 0.5, 1])
    np.testing.assert_allclose(opacity_of(share, Look()), [0, 0.35, 0.7, 0.7])
    np.testing.assert_allclose(opacity_of(share, Look(opacity=0.3)), 0.3)


def test_look_names_what_cannot_be():
    bad = {"colormap": "rainbow", "upsample": "cubic", "scale": "layer", "opacity": 1.5}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=f"{name}={value!r} must be "):
            Look(**{name: value})


def test_overlay_mixes_photo_and_heatmap():
    photo, heatmap = np.full((1, 1, 3), 100, np.uint8), np.array([[[0, 50, 255]]], np.uint8)
    assert overlay_cam(photo, heatmap, alpha=0.2).tolist() == [[[80, 90, 131]]]
    assert overlay_cam(photo, heatmap).dtype == np.uint8


@pytest.mark.parametrize("size", [(168, 112), (112, 168), (61, 143)])
@pytest.mark.parametrize("use_smooth", [True, False])
def test_pictures_have_the_photos_own_size(model, processor, size, use_smooth):
    cam = SmoothQwenGradCAM(model, processor, get_model_layers(model)[0][-1], 2, 0.1, answer="cat")
    superimposed, heatmap = cam.generate_cam(make_image(*size), "What is it?", use_smooth=use_smooth)
    for picture in (superimposed, heatmap):
        assert (picture.shape, picture.dtype) == ((size[1], size[0], 3), np.uint8)
    assert cam.result.answer == "cat"
    assert cam.result.settings.num_samples == (2 if use_smooth else 1)


def test_layer_without_a_map_is_told_in_words(model, processor, image, monkeypatch):
    cam = SmoothQwenGradCAM(model, processor, -1, answer="cat", tap="output")
    with pytest.raises(
        ExplanationError, match="^layer 2 has no map .no gradient.: .* tap=.input. with a decoder layer$"
    ):
        cam.generate_cam(image, "What is it?", use_smooth=False)
    monkeypatch.setitem(
        METHODS,
        "gradcam",
        METHODS["gradcam"]._replace(formula=lambda features, gradients: 0 * gradcam(features, gradients)),
    )
    cam.target_layer = 1
    with pytest.raises(ExplanationError, match="^layer 1 has no map .zero everywhere.: choose an earlier layer"):
        cam.generate_cam(image, "What is it?", use_smooth=False)


def test_bad_option_is_refused_at_once(model, processor):
    with pytest.raises(TypeError, match="'colour'"):
        SmoothQwenGradCAM(model, processor, -1, colour="red")
    with pytest.raises(TypeError, match="use_smooth is an argument of generate_cam"):
        SmoothQwenGradCAM(model, processor, -1, use_smooth=False)
    for name, value in {"num_samples": 0, "noise_std": 1.5, "seed": -1, "method": "cam", "contrast": ""}.items():
        with pytest.raises(ValueError, match=f"^{name}={value!r} must be"):
            SmoothQwenGradCAM(model, processor, -1, **{name: value})


def test_noise_may_be_set_later(model, processor, image):
    """As attributes, which act as if they had been given at first and are checked as then."""
    later = SmoothQwenGradCAM(model, processor, 0, answer="cat", seed=3)
    later.num_samples, later.noise_std = 2, 0.3
    first = SmoothQwenGradCAM(model, processor, 0, 2, 0.3, answer="cat", seed=3)
    pictures = [cam.generate_cam(image, "What is it?") for cam in (later, first)]
    np.testing.assert_array_equal(*pictures)
    np.testing.assert_array_equal(later.result.maps[0], first.result.maps[0])
    assert later.result.settings == first.result.settings
    assert (later.result.settings.num_samples, later.result.settings.noise_std) == (2, 0.3)
    later.noise_std = 2
    with pytest.raises(ValueError, match="noise_std=2 must be 0 to 1"):
        later.generate_cam(image, "What is it?")


def test_device_is_that_of_the_embeddings(make_model, processor):
    model = make_model(torch.float32)
    assert SmoothQwenGradCAM(model, processor, 0).device == torch.device("cpu")
    model.get_input_embeddings().to("meta")
    assert SmoothQwenGradCAM(model, processor, 0).device == torch.device("meta")
