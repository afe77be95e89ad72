"""Pictures of large photos, rendered in vertical bands: little extra memory, and the same pixels as in one go."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from smooth_gradcam import Look, colorize_cam, normalize_cam, opacity_of, overlay_cam, upsample_cam

__all__ = ["lay_on_white", "render_heatmap", "render_overlay"]

BAND_PIXELS = 2**18  # rendered at a time


def _column_bands(height: int, width: int) -> list[slice]:
    """The columns of a picture in bands of about BAND_PIXELS.

    Pixels are the same as in one go only where bands begin at a multiple of OpenCV's vectors and, for PyTorch, are at
    least 128 wide.
    """
    step = max(128, BAND_PIXELS // height // 64 * 64)
    edges = [*range(0, max(width - step, 0) + 1, step), width]
    return [slice(*ends) for ends in zip(edges, edges[1:], strict=False)]


def _upsampled_bands(cam: np.ndarray, size: tuple[int, int], upsample: str) -> Iterator[tuple[slice, np.ndarray]]:
    """(columns, `upsample_cam` of the map there) from left to right."""
    height, width = size
    bands = _column_bands(height, width)
    if len(bands) > 1:  # bilinear weights act along the rows first, and then down, where columns do not matter
        cam = upsample_cam(cam, (len(cam), width), upsample)
    for columns in bands:
        strip = cam[:, columns] if len(bands) > 1 else cam
        yield columns, upsample_cam(strip, (height, columns.stop - columns.start), upsample)


def render_heatmap(cam: np.ndarray, size: tuple[int, int], look: Look, peak: float | None = None) -> np.ndarray:
    """The heatmap of `render_cam` at `size` = (height, width) pixels: uint8 RGB."""
    picture = np.empty((*size, 3), np.uint8)
    for columns, share in _upsampled_bands(normalize_cam(cam, peak), size, look.upsample):
        picture[:, columns] = colorize_cam(share, look.colormap)
    return picture


def render_overlay(photo: Image.Image, cam: np.ndarray, look: Look, peak: float | None = None) -> np.ndarray:
    """The superimposed picture of `render_cam`, for an RGB photo: uint8 RGB (height, width, 3) of its own size."""
    picture = np.empty((photo.height, photo.width, 3), np.uint8)
    for columns, share in _upsampled_bands(normalize_cam(cam, peak), picture.shape[:2], look.upsample):
        below = np.asarray(photo.crop((columns.start, 0, columns.stop, photo.height)))
        picture[:, columns] = overlay_cam(below, colorize_cam(share, look.colormap), opacity_of(share, look))
    return picture


def lay_on_white(image: Image.Image) -> Image.Image:
    """A picture with transparency as RGB on white."""
    white = Image.new("RGB", image.size)
    for columns in _column_bands(image.height, image.width):
        box = (columns.start, 0, columns.stop, image.height)
        band = image.crop(box).convert("RGBA")
        white.paste(Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert("RGB"), box)
    return white
