"""Pictures in and out, and the pure functions, against hand-computed numbers."""

import numpy as np
import pytest
import torch
from conftest import make_image
from PIL import Image

from smooth_gradcam import (
    SmoothQwenGradCAM,
    colorize_cam,
    get_model_layers,
    gradcam,
    hirescam,
    load_rgb,
    logit_score,
    logprob_score,
    normalize_cam,
    overlay_cam,
    render_cam,
    upsample_cam,
)

FEATURES = torch.tensor([[1.0, 2.0], [3.0, -1.0], [-2.0, 0.0]])
GRADIENTS = torch.tensor([[1.0, 0.0], [2.0, -3.0], [0.0, 6.0]])


def test_gradcam_by_hand():  # weights (1, 1)
    assert gradcam(FEATURES, GRADIENTS).tolist() == [3, 2, 0]


def test_hirescam_by_hand():
    assert hirescam(FEATURES, GRADIENTS).tolist() == [1, 9, 0]


def test_scores_by_hand():
    logits, tokens = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 9.0, 0.0, 0.0]]), torch.tensor([2, 1])
    assert logit_score(logits, tokens).item() == 10
    expected = np.log(1 / 4) + 9 - np.log(3 + np.exp(9))
    assert logprob_score(logits, tokens).item() == pytest.approx(expected)


def test_normalized_map_has_its_own_maximum_at_one():
    assert normalize_cam(np.array([[0, 1], [2, 4]])).tolist() == [[0, 0.25], [0.5, 1]]
    assert normalize_cam(np.zeros((2, 2))).tolist() == [[0, 0], [0, 0]]


def test_upsampled_cell_keeps_its_area_of_the_photo():
    large = upsample_cam(np.array([[0, 0, 0], [1, 1, 1]]), (40, 60))
    assert (large.shape, large.dtype, large.min()) == ((40, 60), np.float32, 0)
    assert ((large > 0.5) == (np.arange(40) >= 20)[:, None]).all()
    large = upsample_cam(np.array([[1, 0, 0, 0]] * 3), (30, 80))
    assert ((large > 0.5) == (np.arange(80) < 20)).all()
    np.testing.assert_allclose(upsample_cam(np.ones((3, 2)), (31, 17)), 1, rtol=1e-5)


def test_red_is_hot_and_blue_is_cold():
    cold, cool, middle, warm, hot = colorize_cam(np.array([0, 0.25, 0.5, 0.75, 1])).tolist()
    assert (cold, hot) == ([0, 0, 128], [128, 0, 0])
    between = [cool, middle, warm], [[0, 128, 255], [128, 255, 128], [255, 128, 0]]
    np.testing.assert_allclose(*between, atol=3)  # the nearest of 256 colours
    superimposed, heatmap = render_cam(Image.new("RGB", (60, 40), "grey"), np.array([[0, 0, 1], [0, 0, 0]]))
    for picture in (superimposed, heatmap):
        assert picture[5, 55, 0] > picture[5, 55, 2] + 50  # top right, (row, column)
        assert picture[35, 5, 2] > picture[35, 5, 0] + 50


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
    assert cam.result.settings["num_samples"] == (2 if use_smooth else 1)


def test_layer_without_gradient_is_told_in_words(model, processor, image):
    cam = SmoothQwenGradCAM(model, processor, -1, answer="cat", tap="output")
    with pytest.raises(RuntimeError, match="layer 2 has no gradient"):
        cam.generate_cam(image, "What is it?", use_smooth=False)


def test_unknown_option_is_refused_at_once(model, processor):
    with pytest.raises(TypeError, match="colour"):
        SmoothQwenGradCAM(model, processor, -1, colour="red")


# photos of every kind

RED, GREEN = (255, 0, 0), (0, 255, 0)


def two_coloured(mode="RGB"):
    """4 x 2, left half red, right half green."""
    picture = Image.new("RGB", (4, 2), RED)
    picture.paste(GREEN, (2, 0, 4, 2))
    return picture.convert(mode)


def corners(image):
    return image.getpixel((0, 0)), image.getpixel((image.width - 1, image.height - 1))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "RGBX"])
def test_colour_modes_keep_their_colours(mode):
    picture = load_rgb(two_coloured(mode))
    assert (picture.mode, picture.size) == ("RGB", (4, 2))
    assert corners(picture) == (RED, GREEN)


def test_transparency_is_laid_on_white(tmp_path):
    see_through = two_coloured("RGBA")
    see_through.putpixel((0, 0), (255, 0, 0, 0))
    assert corners(load_rgb(see_through)) == ((255, 255, 255), GREEN)
    palette = two_coloured("P")
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    assert corners(load_rgb(tmp_path / "palette.png")) == ((255, 255, 255), GREEN)
    grey = Image.new("LA", (2, 2), (0, 128))
    assert load_rgb(grey).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        ("1", [False, True]),
        ("L", [0, 255]),
        ("I;16", [0, 65535]),
        ("I;16B", [0, 65535]),
        ("I", [0, 65535]),
        ("I", [0, 255]),
        ("F", [0, 1]),
        ("F", [0, 255]),
    ],
)
def test_grey_values_reach_from_black_to_white(mode, values):
    picture = Image.new(mode, (2, 1))
    picture.putpixel((1, 0), values[1])
    assert corners(load_rgb(picture)) == ((0, 0, 0), (255, 255, 255))


def test_sixteen_bit_png_keeps_its_grey(tmp_path):
    Image.fromarray(np.full((3, 3), 257 * 100, np.uint16)).save(tmp_path / "deep.png")
    assert load_rgb(tmp_path / "deep.png").getpixel((1, 1)) == (100, 100, 100)


def test_animated_file_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert load_rgb(tmp_path / "moving.gif").getpixel((0, 0)) == RED


@pytest.mark.parametrize(("orientation", "first"), [(1, RED), (3, GREEN), (6, RED), (8, GREEN)])
def test_exif_rotation_is_applied_once_and_for_all(tmp_path, orientation, first):
    exif = Image.Exif()
    exif[0x0112] = orientation
    two_coloured().save(tmp_path / "turned.png", exif=exif)
    picture = load_rgb(tmp_path / "turned.png")
    assert picture.size == ((4, 2) if orientation < 5 else (2, 4))
    assert picture.getpixel((0, 0)) == first
    assert load_rgb(picture).tobytes() == picture.tobytes()
    assert load_rgb(picture).size == picture.size


def test_callers_image_is_left_as_it_is():
    exif = Image.Exif()
    exif[0x0112] = 6
    own = two_coloured("RGBA")
    own.getexif()[0x0112] = 6
    before = (own.mode, own.size, own.tobytes(), dict(own.getexif()))
    assert load_rgb(own).size == (2, 4)
    assert (own.mode, own.size, own.tobytes(), dict(own.getexif())) == before


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "words.png").write_text("not a picture")
    make_image(64, 64).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    for name in ("empty.png", "words.png", "half.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image"):
            load_rgb(tmp_path / name)
    with pytest.raises(ValueError, match="is a folder"):
        load_rgb(tmp_path)
    with pytest.raises(ValueError, match="missing.png does not exist"):
        load_rgb(str(tmp_path / "missing.png"))
