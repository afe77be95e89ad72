"""Large pictures drawn in bands are those drawn at once."""

import numpy as np
import pytest
from PIL import Image

import common.bands
import common.files
import common.photos
import smooth_gradcam as core
from common.bands import lay_on_white, render_heatmap, render_overlay
from smooth_gradcam import Look


@pytest.mark.parametrize("how", ["smooth", "cells"])
@pytest.mark.parametrize("opacity", [None, 0.37])
@pytest.mark.parametrize(("size", "grid"), [((331, 777), (7, 11)), ((1009, 301), (40, 3)), ((97, 1501), (1, 53))])
def test_pictures_drawn_in_bands_are_those_drawn_at_once(monkeypatch, how, opacity, size, grid):
    numbers, look = np.random.default_rng(1), Look(upsample=how, opacity=opacity)
    photo, cam = numbers.integers(0, 256, (*size, 3), np.uint8), numbers.random(grid, np.float32) ** 3
    share = core.upsample_cam(core.normalize_cam(cam), size, how)
    heatmap = core.colorize_cam(share, look.colormap)
    overlay = core.overlay_cam(photo, heatmap, core.opacity_of(share, look))
    for band in (2**30, 2**16, 1):
        monkeypatch.setattr(common.bands, "BAND_PIXELS", band)
        np.testing.assert_array_equal(render_overlay(Image.fromarray(photo), cam, look), overlay)
        np.testing.assert_array_equal(render_heatmap(cam, size, look), heatmap)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_is_laid_on_white_in_bands_as_at_once(monkeypatch, mode):
    pixels = np.random.default_rng(2).integers(0, 256, (70, 500, 4), np.uint8)
    image = Image.fromarray(pixels).convert({"P": "RGB"}.get(mode, mode))
    if mode == "P":
        image = image.quantize(16)
        image.info["transparency"] = 3
    white = Image.new("RGBA", image.size, "white")
    expected = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    for band in (2**30, 1):
        monkeypatch.setattr(common.bands, "BAND_PIXELS", band)
        assert lay_on_white(image).tobytes() == expected.tobytes()
