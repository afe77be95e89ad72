"""Photos and masks of the kinds that people have, beyond what `load_rgb` of the core opens."""

import functools
import os
import re

import cv2
import numpy as np
from PIL import Image, features

from common.bands import lay_on_white
from common.inputs import open_regular
from smooth_gradcam import conversation, load_rgb, open_image

__all__ = ["explained_photo", "load_mask", "load_photo", "object_mask", "open_photo", "open_photos", "readable"]

MOST_POLYGONS = 1000  # of a segmentation: each costs the time of a picture
BEYOND = 2  # pixels that an outline may reach beyond the photo, as rounded ones do
MAX_ASPECT = 200  # the processor refuses longer photos
AVIF = {b"avif", b"avis"}  # brands that a file of the HEIF family may have
HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"mif2", b"msf1", b"miaf"}


# photos


def open_photo(image) -> Image.Image:
    """What `load_rgb` opens, and grey values of 32 bits or floating point, as RGB.

    White is 1 (only of floating point), 255 or 65535: the first that no value exceeds. Raises ValueError for anything
    else, and with advice for a HEIC file, which Pillow cannot read.
    """
    try:
        photo = open_image(image)
    except ValueError as exc:
        kind = _heif_kind(image) if isinstance(image, (str, os.PathLike)) else None
        if kind is None:
            raise
        raise ValueError(f"{image} is {kind} photo: convert it to JPEG, e.g. with pillow-heif") from exc
    if photo.mode in "IF":
        return _scale_grey(photo, f"the image {image}" if isinstance(image, (str, os.PathLike)) else "the image")
    return lay_on_white(photo) if photo.has_transparency_data else load_rgb(photo)


def open_photos(image):
    """A photo, or a list of them, opened by `open_photo`; None, where the photos are in the messages, stays None."""
    if image is None:
        return None
    return [open_photo(each) for each in image] if isinstance(image, (list, tuple)) else open_photo(image)


def explained_photo(image, prompt):
    """The photo that figures show: `image`, or for None the last picture of the messages. Raises ValueError."""
    pictures = conversation([], prompt)[1] if image is None else [image]
    if not pictures:
        raise ValueError("image=None has no photo: give one, or messages with a picture")
    return open_photos(pictures[-1])


def _heif_kind(path: str | os.PathLike) -> str | None:
    """The kind of a file that Pillow cannot read, "a HEIC" or "an AVIF"; None if its brands say neither."""
    try:
        with open_regular(path) as file:
            head = file.read(512)
    except (OSError, ValueError):
        return None
    length = int.from_bytes(head[:4], "big")  # of the first box: major brand, version, compatible brands
    brands = {head[i : i + 4] for i in (8, *range(16, min(length, len(head)), 4))} if head[4:8] == b"ftyp" else set()
    if brands & AVIF:
        return None if features.check("avif") else "an AVIF"
    return "a HEIC" if brands & HEIC else None


def _scale_grey(image: Image.Image, name: str) -> Image.Image:
    """A picture of one channel of 32 bits, in mode I or F, as RGB: see `open_photo`."""
    values = np.asarray(image, dtype=np.float32)
    scales = [1.0, 255.0, 65535.0] if image.mode == "F" else [255.0, 65535.0]  # values of white
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= scales[-1]):  # false for nan, too
        raise ValueError(f"{name} has grey values {low:g} to {high:g}: they must be finite, 0 to {scales[-1]:g}")
    white = next(scale for scale in scales if high <= scale)
    for scale in scales[: scales.index(white)]:
        if np.mean(values <= scale) > 0.99:  # the few others would make it nearly black
            raise ValueError(f"{name} has a few grey values up to {high:g}, nearly all up to {scale:g}: clip them")
    return Image.fromarray(np.round(values * (255 / white)).astype(np.uint8)).convert("RGB")


def load_photo(path: str) -> Image.Image:
    """The photo as RGB, the right way up. Raises ValueError if it cannot be read, or is too long for the processor."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", path):
        raise ValueError(f"--image_path {path[:100]} is an address: download the photo, and give its file")
    try:
        photo = open_photo(path)
    except ValueError as exc:
        raise ValueError(f"--image_path: {exc}") from exc
    if max(photo.size) > MAX_ASPECT * min(photo.size):
        size = f"{photo.width} x {photo.height} pixels"
        raise ValueError(f"--image_path: {path} is {size}: sides up to 1 : {MAX_ASPECT} can be processed")
    return photo


def readable(path: str) -> str:
    r"""The path as text; bytes that are not UTF-8 become \xff and the like."""
    return os.fsencode(path).decode(errors="backslashreplace")


def load_mask(mask, size: tuple[int, int]) -> np.ndarray:
    """The object's pixels, bool (height, width): those of a path or PIL image that are lighter than mid grey.

    Raises ValueError if it is not of the photo's `size`, (width, height), or if the object has no pixel or all of them.
    """
    image = open_photo(mask)
    if image.size != size:
        raise ValueError(
            f"the mask has {image.width} x {image.height} pixels, the photo {size[0]} x {size[1]}: they must be equal"
        )
    pixels = np.asarray(image.convert("L")) > 127
    if pixels.all() or not pixels.any():
        raise ValueError("the mask is all white or all black: white is the object, black is the rest")
    return pixels


def object_mask(record: dict, size: tuple[int, int]) -> np.ndarray:
    """The object's pixels, bool (height, width), of {"mask": path}, {"box": ...} or {"segmentation": ...}, as in COCO.

    A box is [x, y, width, height] in pixels of the photo. A segmentation is a list of polygons [x, y, x, y, ...], a
    run-length mask {"size": [height, width], "counts": ...}, which needs pycocotools, or a list of both: their union.
    Raises ValueError for anything else, and if the object has no pixel or all of them; ImportError without pycocotools.
    """
    ((kind, value),) = record.items()
    if kind == "mask":
        try:
            return load_mask(value, size)
        except ValueError as exc:
            raise ValueError(f"the mask {value}: {exc}") from exc
    try:
        if kind == "box":
            pixels = _box_pixels(value, size)
        else:
            pixels = _segmentation_pixels([value] if isinstance(value, dict) else value, size)
    except (TypeError, ValueError, KeyError, OverflowError) as exc:
        valid = "[x, y, width, height]" if kind == "box" else "polygons [[x, y, x, y, x, y, ...], ...], or run lengths"
        raise ValueError(f"the {kind} cannot be read ({exc}): give {valid} in the photo's pixels") from exc
    if pixels.all() or not pixels.any():
        covered = "all" if pixels.all() else "none"
        raise ValueError(f"the {kind} covers {covered} of the photo's {size[0]} x {size[1]} pixels")
    return pixels.astype(bool)


def _box_pixels(box, size: tuple[int, int]) -> np.ndarray:
    x, y, width, height = _numbers(box, "the box")
    _check_inside([x, x + width], [y, y + height], size)
    pixels = np.zeros(size[::-1], np.uint8)
    left, top, right, bottom = (max(round(edge), 0) for edge in (x, y, x + width, y + height))
    pixels[top:bottom, left:right] = 1
    return pixels


def _segmentation_pixels(shapes: list, size: tuple[int, int]) -> np.ndarray:
    """The union of polygons and run-length masks, uint8 (height, width)."""
    if not isinstance(shapes, list) or len(shapes) > MOST_POLYGONS:
        count = len(shapes) if isinstance(shapes, list) else type(shapes).__name__
        raise ValueError(f"{count} polygons, where up to {MOST_POLYGONS} are drawn")
    large = np.zeros((2 * size[1], 2 * size[0]), np.uint8)  # twice as large: a pixel is inside if its middle is
    masks = [_run_lengths(shape, size) for shape in shapes if isinstance(shape, dict)]
    for shape in shapes:
        if not isinstance(shape, dict):
            corners = np.array(_numbers(shape, "a polygon"))
            if len(corners) < 6 or len(corners) % 2:
                raise ValueError(f"a polygon of {len(corners)} numbers: three corners or more have two each")
            corners = corners.reshape(-1, 2)
            _check_inside(*corners.T, size)
            cv2.fillPoly(large, [np.round(2 * corners).astype(np.int32)], 1)
    return functools.reduce(np.bitwise_or, masks, large[1::2, 1::2])


def _numbers(values, name: str) -> list[float]:
    """Finite numbers. Raises ValueError."""
    if not isinstance(values, (list, tuple)) or not all(type(value) in (int, float) for value in values):
        raise ValueError(f"{name} must be a list of numbers")
    numbers = [float(value) for value in values]
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} has a number that is not finite")
    return numbers


def _check_inside(xs, ys, size: tuple[int, int]) -> None:
    """Raises ValueError for what reaches beyond the photo: it may be of another one, or of the photo before turning."""
    for values, limit in ((xs, size[0]), (ys, size[1])):
        if min(values) < -BEYOND or max(values) > limit + BEYOND:
            raise ValueError(f"it reaches beyond the photo, which has {size[0]} x {size[1]} pixels the right way up")


def _run_lengths(record: dict, size: tuple[int, int]) -> np.ndarray:
    """A run-length mask of COCO, uint8 (height, width).

    Raises ImportError without pycocotools, ValueError for another size.
    """
    try:
        from pycocotools import mask as coco
    except ImportError as exc:
        raise ImportError("a run-length mask needs pycocotools: pip install pycocotools") from exc
    height, width = record["size"]
    if (width, height) != size:
        raise ValueError(f"the run lengths are of {width} x {height} pixels, the photo has {size[0]} x {size[1]}")
    return coco.decode(coco.frPyObjects(record, height, width) if isinstance(record["counts"], list) else record)
