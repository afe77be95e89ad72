"""Lists of anything: a line is an item or an error with its number; only the output folder changes."""

import json
import os
import tempfile
from pathlib import Path

import pytest
from conftest import make_image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.photos import object_mask
from common.processes import Processes
from studies.photo_list import OBJECTS, TEXTS, read_list, work_off
from studies.questions import read_questions

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
GOOD = b'{"image": "photo.png"}'
texts = st.text(st.characters(codec=None, exclude_categories=()), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.just("photo.png") | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=12,
)
images = (
    st.sampled_from(["photo.png", ".", "..", "/dev/zero", "fifo", "none.png", "a" * 300, "../outside.png"]) | values
)
objects = {
    "mask": images,
    "box": st.lists(st.floats() | values, min_size=3, max_size=5) | values,
    "segmentation": values,
}
records = st.fixed_dictionaries(
    {"image": images}, optional={**dict.fromkeys(TEXTS, values), **objects, "other": values}
) | st.dictionaries(st.sampled_from(["image", *TEXTS, *OBJECTS]) | texts, values, max_size=6)
lines = st.binary(max_size=60) | st.one_of(records, values).map(lambda value: json.dumps(value).encode())


@pytest.fixture(scope="module")
def folder():
    """A folder with a photo, a FIFO and a list's place; a photo lies outside."""
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path, "lists")
        folder.mkdir()
        make_image(40, 30).save(folder / "photo.png")
        make_image(40, 30).save(folder / "../outside.png")
        os.mkfifo(folder / "fifo")
        yield folder


def write(folder, found):
    """A list of these lines, a good one first and last; returns its path, and the numbers of lines with something."""
    path, found = folder / "list.jsonl", [GOOD, *(line.replace(b"\n", b" ") for line in found), GOOD]
    path.write_bytes(b"\n".join(found))
    return path, [number for number, line in enumerate(found, 1) if line.removeprefix(b"\xef\xbb\xbf").strip()]


def number_of(text, path):
    return int(text.removeprefix(f"{path}, line ").split()[0].rstrip(":"))


@QUICK
@given(found=st.lists(lines, max_size=6))
def test_every_line_is_an_item_or_an_error_with_its_number(folder, found):
    path, numbers = write(folder, found)
    items = read_list([str(path)])
    assert [number_of(item.source, path) for item in items] == numbers
    for item in items:
        assert bool(item.error) != bool(item.name)
        assert not item.error or number_of(item.error, path) == number_of(item.source, path)
    names = [item.name for item in items if item.name]
    assert len(set(names)) == len(names) > 0
    assert all(Path(name).name == name and len(os.fsencode(name)) < 256 for name in names)


@QUICK
@given(found=st.lists(lines, max_size=3))
def test_answers_are_read_or_refused_with_the_number_of_a_line(folder, found):
    path, numbers = write(folder, found)
    with pytest.raises(ValueError, match=f"{path}, line 1 has no text for 'prompt'"):
        read_questions(path)
    path.write_bytes(b"\n".join(found))
    try:
        items, error = read_questions(path), ""
    except ValueError as exc:
        items, error = [], str(exc)
    assert not error or error.startswith((f"{path}, line ", f"{path} is empty"))
    assert all(item.prompt and item.answer for item in items)


@settings(QUICK, max_examples=60)
@given(found=st.lists(lines, max_size=4))
def test_a_list_of_anything_changes_nothing_but_its_output_folder(folder, found):
    """Each good item is worked on, each other one is one line and a record, and all records can be read."""
    path, numbers = write(folder, found)
    items, reported = read_list([str(path)]), []

    def load(item):
        return item.image.stat().st_size

    def explain(item, size):
        if item.object:
            object_mask(item.object, (40, 30))
        return {"name": item.name, "image": str(item.image), "size": size}, {"a.txt": "text"}

    def snapshot():
        places = [folder.parent, *folder.parent.rglob("*")]
        return {place: (place.lstat().st_mtime_ns, place.lstat().st_size) for place in places}

    before = snapshot()
    with tempfile.TemporaryDirectory() as out:
        records, _ = work_off(
            items,
            Path(out, "out"),
            {},
            Processes(cpu=True),
            load,
            explain,
            reason_of=str,
            quiet=True,
            report=reported.append,
        )
        text = Path(out, "out/results.jsonl").read_bytes().decode()
        there = [path.name for path in Path(out).iterdir()]
    assert [json.loads(line)["name"] for line in text.splitlines()] == [record["name"] for record in records]
    assert text.count("\n") == len(records) == len(numbers)
    assert len(reported) == sum("error" in record for record in records)
    assert not any("\n" in line for line in reported)
    assert there == ["out"]
    assert snapshot() == before
