"""What files hold: pictures are known as ours, large ones are as small ones."""

import os

import numpy as np
import pytest
from PIL import Image

import common.bands
import common.files
import common.photos
from common.encoding import is_ours, with_minus
from common.files import write_files
from studies.video import animate

PIXELS = np.zeros((2, 2, 3), np.uint8)


def test_pictures_are_known_as_ours_and_photos_are_not(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green")]
    files = {"a.png": PIXELS, "wide.png": np.zeros((900, 900, 3), np.uint8)}
    files["video.webp"] = animate(frames, [np.eye(3, dtype=np.float32)], 2)
    assert all(map(is_ours, write_files(tmp_path, files)))
    frames[0].save(tmp_path / "photo.png")
    os.mkfifo(tmp_path / "fifo.png")
    assert not any(is_ours(tmp_path / name) for name in ("photo.png", "fifo.png", "none.png", "."))


@pytest.mark.parametrize("size", [(61, 83), (1, 5), (400, 1)])
def test_large_pictures_are_written_as_small_ones_are(tmp_path, monkeypatch, size):
    picture = np.random.default_rng(3).integers(0, 256, (*size, 3), np.uint8)
    kinds = {"a.png": picture, "b.png": Image.fromarray(picture), "c.png": lambda: picture}
    small = write_files(tmp_path / "small", kinds)
    monkeypatch.setattr(common.files, "LARGE_PICTURE", 3)
    large = write_files(tmp_path / "large", kinds)
    for path, other in zip(small, large, strict=True):
        with Image.open(path) as one, Image.open(other) as another:
            assert one.tobytes() == another.tobytes() == picture.tobytes()
            assert one.info["dpi"] == another.info["dpi"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("correlation -0.3 to 0.1", "correlation −0.3 to 0.1"),
        ("-.5", "−.5"),
        ("(-12 %)", "(−12 %)"),
        ("layers 19-27, 2020-21, x-1, 0.70-1.00", "layers 19-27, 2020-21, x-1, 0.70-1.00"),
        ("insertion - deletion, Obj-IoU", "insertion - deletion, Obj-IoU"),
    ],
)
def test_numbers_below_zero_have_a_minus_sign_in_figures(text, expected):
    assert with_minus(text) == expected
