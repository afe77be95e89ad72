"""Pictures drawn band by band: what is made of a large photo fits beside it, and every pixel is as if drawn at once."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from smooth_gradcam import Look, colorize_cam, normalize_cam, opacity_of, overlay_cam, upsample_cam

__all__ = ["lay_on_white", "render_heatmap", "render_overlay"]

BAND = 2**18  # pixels that are worked on at once


def column_bands(height: int, width: int) -> list[slice]:
    """The columns of a picture, about BAND pixels at a time.

    OpenCV rounds alike only where bands begin at a multiple of its vectors, PyTorch where none is narrower than 128.
    """
    step = max(128, BAND // height // 64 * 64)
    edges = [*range(0, max(width - step, 0) + 1, step), width]
    return [slice(*ends) for ends in zip(edges, edges[1:], strict=False)]


def upsampled_bands(cam: np.ndarray, size: tuple[int, int], how: str) -> Iterator[tuple[slice, np.ndarray]]:
    """(columns, `upsample_cam` in them) from left to right, the same values as at once."""
    height, width = size
    bands = column_bands(height, width)
    if len(bands) > 1:  # bilinear weights go along the rows first, and then, with the columns as they are, down
        cam = upsample_cam(cam, (len(cam), width), how)
    for columns in bands:
        part = cam[:, columns] if len(bands) > 1 else cam
        yield columns, upsample_cam(part, (height, columns.stop - columns.start), how)


def render_heatmap(cam: np.ndarray, size: tuple[int, int], look: Look, peak: float | None = None) -> np.ndarray:
    """The heatmap of `render_cam` at `size` = (height, width) pixels: uint8 RGB."""
    picture = np.empty((*size, 3), np.uint8)
    for columns, share in upsampled_bands(normalize_cam(cam, peak), size, look.upsample):
        picture[:, columns] = colorize_cam(share, look.colormap)
    return picture


def render_overlay(photo: Image.Image, cam: np.ndarray, look: Look, peak: float | None = None) -> np.ndarray:
    """The superimposed picture of `render_cam`, of an RGB photo: uint8 RGB of the photo's own size."""
    picture = np.empty((photo.height, photo.width, 3), np.uint8)
    for columns, share in upsampled_bands(normalize_cam(cam, peak), picture.shape[:2], look.upsample):
        below = np.asarray(photo.crop((columns.start, 0, columns.stop, photo.height)))
        picture[:, columns] = overlay_cam(below, colorize_cam(share, look.colormap), opacity_of(share, look))
    return picture


def lay_on_white(image: Image.Image) -> Image.Image:
    """A picture with transparency as RGB on white."""
    white = Image.new("RGB", image.size)
    for columns in column_bands(image.height, image.width):
        box = (columns.start, 0, columns.stop, image.height)
        part = image.crop(box).convert("RGBA")
        white.paste(Image.alpha_composite(Image.new("RGBA", part.size, "white"), part).convert("RGB"), box)
    return white
