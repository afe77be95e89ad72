"""Inputs never lie where a run writes."""

import numpy as np
import pytest

from common.files import output_folder
from common.inputs import check_inputs

PIXELS = np.zeros((2, 2, 3), np.uint8)


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("way", ["itself", "subfolder", "link there", "link from there", "linked folder", "part"])
def test_an_input_in_the_folder_that_is_written_to_is_refused_before_anything_is_done(tmp_path, way):
    """By whatever way it lies there; both are named."""
    (tmp_path / "out/part/deep").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    photos = {
        "itself": tmp_path / "out/a.png",
        "subfolder": tmp_path / "out/part/deep/a.png",
        "link there": tmp_path / "photos/link.png",
        "link from there": tmp_path / "out/link.png",
        "linked folder": tmp_path / "other/a.png",
        "part": tmp_path / "photos/a.png",
    }
    photo = photos[way]
    if way == "link there":
        (tmp_path / "out/a.png").touch()
        photo.symlink_to(tmp_path / "out/a.png")
    elif way == "link from there":
        (tmp_path / "photos/a.png").touch()
        photo.symlink_to(tmp_path / "photos/a.png")
    else:
        (tmp_path / "other").symlink_to("out")
        photo.touch()
    if way == "part":
        (tmp_path / "out/linked").symlink_to(tmp_path / "photos")
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=r"the input .*png lies in .*, the folder that this run writes to: choose"):
        output_folder(tmp_path / "out", ["linked"], inputs=[photo]).__enter__()
    assert listing(tmp_path) == before


def test_inputs_elsewhere_are_no_hindrance(tmp_path):
    (tmp_path / "a.png").touch()
    check_inputs([tmp_path / "out", tmp_path], [None, PIXELS, "Qwen/Qwen2.5", "a\0b", "a" * 300], "--output_dir")
    with output_folder(tmp_path / "out", inputs=[tmp_path / "a.png", tmp_path / "none.png"]) as write:
        write({"a.png": PIXELS})
    check_inputs([tmp_path / "out"], [tmp_path / "out/../a.png"])
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="model lies in"):
        check_inputs([tmp_path / "model"], [str(tmp_path / "model")])
