"""Photos of any size, mode and format, whole or damaged: an RGB picture of their size, or one line saying why not."""

import io
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, features

from common.photos import load_mask, open_photo
from smooth_gradcam import load_rgb

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "PPM", *(["AVIF"] if features.check("avif") else []))
every = settings(  # the same examples in every run, and nothing is kept on the disk: what fails is the change at hand
    max_examples=250,
    derandomize=True,
    database=None,
    deadline=timedelta(seconds=10),
    suppress_health_check=[HealthCheck.too_slow],
)
pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, about damaged files


@pytest.fixture(scope="module", autouse=True)
def _small_pictures():
    """A damaged size is refused at once, and takes no time."""
    usual, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 50_000
    yield
    Image.MAX_IMAGE_PIXELS = usual


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("photos") / "photo"


def encoded(image: Image.Image, kind: str, **options) -> bytes | None:
    """The file's bytes; None if the format cannot hold the mode, or Pillow (12) cannot read what it wrote."""
    buffer = io.BytesIO()
    try:
        image.save(buffer, kind, **options)
        Image.open(buffer).load()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SystemError):
        return None
    return buffer.getvalue()


HELD = [(mode, kind) for mode in MODES for kind in FORMATS if encoded(Image.new(mode, (16, 16)), kind)]
SIDES = st.integers(1, 64)
SIZES = st.tuples(SIDES, SIDES) | st.sampled_from([(1, 3000), (3000, 1), (2, 1999), (5000, 3)])


@st.composite
def photos(draw):
    """(a picture of random values, its EXIF orientation, its format, its bytes in it)."""
    mode, kind = draw(st.sampled_from(HELD))
    (width, height), numbers = draw(SIZES), np.random.default_rng(draw(st.integers(0, 99)))
    if mode == "F":
        white = draw(st.sampled_from([1, 255, 65535, 1e9]))
        image = Image.fromarray(white * numbers.random((height, width), np.float32))
    elif mode == "I":
        image = Image.fromarray(numbers.integers(0, 2 ** draw(st.sampled_from([8, 16, 31])), (height, width), np.int32))
    else:
        length = len(Image.new(mode, (width, height)).tobytes())
        image = Image.frombytes(mode, (width, height), numbers.bytes(length))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation = draw(st.integers(1, 9))
    return image, orientation, kind, encoded(image, kind, exif=exif)


@st.composite
def damaged(draw):
    """The bytes of a photo with some of them changed, and an end that may be missing."""
    data = bytearray(draw(photos())[3] or b"")
    for _ in range(draw(st.integers(0, 6))):
        near = draw(st.sampled_from([60, 400, len(data)]))  # most of what can be wrong stands at the beginning
        if data:
            data[draw(st.integers(0, min(near, len(data)) - 1))] = draw(st.sampled_from([0, 1, 127, 255]))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


def opened(path, load=open_photo) -> tuple[Image.Image | None, str]:
    """The picture, or none and why."""
    try:
        return load(path), ""
    except ValueError as exc:
        return None, str(exc)


@every
@given(photos())
def test_whole_photo_is_an_rgb_picture_of_its_size(path, photo):
    image, orientation, kind, data = photo
    assume(data is not None)  # e.g. too long for the format
    path.write_bytes(data)
    picture, why = opened(path)
    if picture is None:
        assert (image.mode in "IF", "grey values" in why) == (True, True)
    else:
        turned = orientation in (5, 6, 7, 8) and kind not in ("GIF", "BMP", "PPM")  # these hold no EXIF
        assert (picture.mode, picture.size) == ("RGB", image.size[::-1] if turned else image.size)


@every
@given(damaged())
def test_damaged_photo_is_a_picture_or_one_line(path, data):
    path.write_bytes(data)
    for load in (load_rgb, open_photo, lambda path: Image.fromarray(load_mask(path, (16, 16))).convert("RGB")):
        picture, why = opened(path, load)
        assert picture.mode == "RGB" if picture else len(why.splitlines()) == 1


MARKS = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"P6 ", b"Pf ", b"RIFF"]


@every
@given(st.sampled_from(MARKS), st.binary(max_size=200))
def test_noise_behind_the_mark_of_a_format_is_a_picture_or_one_line(path, mark, noise):
    path.write_bytes(mark + noise)
    picture, why = opened(path)
    assert picture.mode == "RGB" if picture else len(why.splitlines()) == 1
