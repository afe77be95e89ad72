"""COCO's annotations as a list: whole objects only, no input replaced, one line about what cannot be read."""

import json
import os
import re

import pytest
from conftest import make_image

from common.photos import object_mask
from studies import coco
from studies.photo_list import read_list


@pytest.fixture
def photos(tmp_path):
    """A folder of five photos."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(5):
        make_image(40 + i, 30).save(folder / f"p{i}.png")
    (folder / "notes.txt").write_text("no photo")
    return folder


COCO = {
    "images": [
        {"id": 1, "file_name": "one.jpg", "width": 100, "height": 50},
        {"id": 2, "file_name": "two.jpg", "width": 100, "height": 50},
    ],
    "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
    "annotations": [
        {"image_id": 1, "category_id": 18, "iscrowd": 0, "area": 400, "segmentation": [[0, 0, 20, 0, 20, 20, 0, 20]]},
        {"image_id": 1, "category_id": 18, "iscrowd": 0, "area": 100, "segmentation": [[50, 0, 60, 0, 60, 10, 50, 10]]},
        {"image_id": 1, "category_id": 17, "iscrowd": 0, "area": 9, "segmentation": [[0, 0, 3, 0, 3, 3, 0, 3]]},
        {"image_id": 2, "category_id": 17, "iscrowd": 1, "area": 900, "segmentation": {"counts": [1]}},
        {"image_id": 2, "category_id": 18, "iscrowd": 0, "area": 900, "segmentation": [[9, 9, 39, 9, 39, 39, 9, 39]]},
    ],
}


def test_converter_joins_the_objects_of_a_category_and_leaves_crowds_and_crumbs_out(tmp_path, capsys):
    photos = tmp_path / "val"
    photos.mkdir()
    for name in ("one.jpg", "two.jpg"):
        make_image(100, 50).save(photos / name)
    (tmp_path / "instances.json").write_text(json.dumps(COCO))
    coco.main([str(tmp_path / "instances.json"), str(photos), "--output", str(tmp_path / "coco.jsonl")])
    assert "2 words in 2 photos" in capsys.readouterr().out
    first, second = read_list([str(tmp_path / "coco.jsonl")])
    assert (first.name, first.target, second.target) == ("one", "dog", "dog")
    mask = object_mask(first.object, (100, 50))
    assert mask[10, 10]
    assert mask[5, 55]
    assert not mask[5, 40]
    coco.main([str(tmp_path / "instances.json"), str(photos), "--output", str(tmp_path / "one.jsonl"), "--count", "1"])
    assert len(read_list([str(tmp_path / "one.jsonl")])) == 1
    (photos / "one.jpg").unlink()
    other = [{"image_id": 9, "category_id": 17, "area": 900, "segmentation": [[9, 9, 39, 9, 39, 39]]}]
    wrong = {json.dumps(COCO | {"annotations": other}): "of the image 9, which does not exist"}
    other[0] |= {"image_id": 1, "category_id": 5}
    wrong[json.dumps(COCO | {"annotations": other})] = "of the category 5, which does not exist"
    wrong[json.dumps(COCO | {"annotations": []})] = "nothing is left"
    wrong |= {json.dumps(COCO): "one.jpg", "{}": "images, annotations, categories is missing", "[": "json"}
    for content, reason in wrong.items():
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(SystemExit):
            coco.main([str(tmp_path / "bad.json"), str(photos), "--output", str(tmp_path / "no.jsonl")])
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "no.jsonl").exists()


def test_converter_replaces_none_of_its_inputs(tmp_path, capsys):
    for name in ("one.jpg", "two.jpg"):
        make_image(100, 50).save(tmp_path / name)
    annotations = tmp_path / "instances.json"
    annotations.write_text(json.dumps(COCO))
    (tmp_path / "link.jsonl").symlink_to("one.jpg")
    os.link(annotations, tmp_path / "other.jsonl")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("instances.json", "two.jpg", "link.jsonl", "other.jsonl"):
        with pytest.raises(SystemExit):
            coco.main([str(annotations), str(tmp_path), "--output", str(tmp_path / name), "--count", "1"])
        assert re.search(rf"--output .*{name} is .*: it would be replaced", capsys.readouterr().err)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    for _ in range(2):
        coco.main([str(annotations), str(tmp_path), "--output", str(tmp_path / "coco.jsonl")])


def converted(capsys, *arguments):
    """What the converter says, of a request that cannot be met: one line, which cannot steer the terminal."""
    with pytest.raises(SystemExit) as ended:
        coco.main([str(argument) for argument in arguments])
    err = capsys.readouterr().err
    assert (ended.value.code, err.count("\n"), "\x1b" in err) == (2, 1, False)
    return err


def test_annotations_that_cannot_be_read_are_one_line(tmp_path, capsys, photos):
    os.mkfifo(tmp_path / "pipe.json")
    assert "is a folder, a pipe or a device" in converted(capsys, tmp_path / "pipe.json", photos)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    assert "RecursionError" in converted(capsys, tmp_path / "deep.json", photos)
    image = {"id": 1, "file_name": "\x1b]0;a\x07.png", "width": 40, "height": 30}
    part = {"image_id": 1, "category_id": 1, "area": 400, "segmentation": [[0, 0, 20, 0, 20, 20, 0, 20]]}
    data = {"images": [image], "annotations": [part], "categories": [{"id": 1, "name": "dog"}]}
    (tmp_path / "escape.json").write_text(json.dumps(data))
    assert "photos are not in" in converted(capsys, tmp_path / "escape.json", photos)
    assert "give a share, 0 to 1" in converted(capsys, tmp_path / "escape.json", photos, "--smallest", "nan")
    make_image(30, 40).save(tmp_path / "turned.png")
    image["file_name"] = "turned.png"
    (tmp_path / "turned.json").write_text(json.dumps(data))
    assert "has (30, 40) pixels the right way up" in converted(capsys, tmp_path / "turned.json", tmp_path)
