"""Lists of photos: what they hold, that nothing is lost or done twice, and that processes share them."""

import json
import os
import signal
import socket
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path

import driver_process
import numpy as np
import pytest
from conftest import make_image
from kill_runs import count_lost, work

from common.files import write_files
from common.processes import Processes
from smooth_gradcam import ExplanationWarning
from studies.photo_list import Item, key_of, named, read_list, work_off

ROOT = Path(__file__).parent.parent


@pytest.fixture
def photos(tmp_path):
    """A folder of five photos."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(5):
        make_image(40 + i, 30).save(folder / f"p{i}.png")
    (folder / "notes.txt").write_text("no photo")
    return folder


# what is in it


def test_folders_globs_lists_and_photos_are_read_in_order(photos, tmp_path):
    lines = [{"image": "photos/p3.png", "target": "dog", "box": [1, 2, 3, 4]}, {"image": "photos/p1.png", "id": 7}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    names = [f"p{i}" for i in range(5)]
    assert [item.name for item in read_list([str(photos)])] == names
    assert [item.name for item in read_list([str(photos / "*.png")])] == names
    first, second = read_list([str(tmp_path / "list.jsonl")])
    assert (first.image, first.target, first.object) == (photos / "p3.png", "dog", {"box": [1, 2, 3, 4]})
    assert (second.name, second.target, second.object) == ("p1", None, {})
    several = read_list([str(photos / "p4.png"), str(tmp_path / "list.jsonl")])
    assert [item.name for item in several] == ["p4", "p3", "p1"]


def test_photos_of_one_name_have_folders_of_their_own(tmp_path):
    a, b, c = (Item("", tmp_path / name) for name in ("a/x.png", "b/x.png", "y.png"))
    asked = Item("", tmp_path / "a/x.png", prompt="Why?")
    names = [item.name for item in named([a, b, c, asked])]
    assert len(set(names)) == 4
    assert names[2] == "y"
    assert all(name.startswith("x_") for name in (names[0], names[1], names[3]))
    assert [item.name for item in named([asked, c, b, a])] == names[3:1:-1] + names[1::-1]  # whatever the order
    first, other, again = named([a, c, a])
    assert (first.error, other.error, again.name) == ("", "", "")
    assert again.error == f"{a.image} repeats {a.image}: the same photo with the same question"


def test_names_are_folders_on_any_disk(tmp_path):
    """A disk may not know case, and a name is at most 255 bytes long there."""
    items = [Item("", tmp_path / name) for name in ("Cat.png", "cat.png", f"{'é' * 125}.png", "\udcff.png")]
    names = [item.name for item in named(items)]
    assert len({name.casefold() for name in names}) == 4
    assert max(len(os.fsencode(name)) for name in names) <= 209
    assert names[3] == "\udcff"


@pytest.mark.parametrize("name", ["results.jsonl.jpg", "benchmark.csv.jpg", "benchmark.tex.png", "...jpg", "..jpg"])
def test_no_photo_takes_a_name_of_the_lists_own_files_or_leads_out_of_its_folder(tmp_path, name):
    (item,) = named([Item("", tmp_path / name)])
    assert item.name not in ("", ".", "..", "results.jsonl", "benchmark.csv", "benchmark.tex")
    assert (tmp_path / "out" / item.name).resolve().parent == tmp_path / "out"


def test_what_is_not_named_has_to_be_a_photo(photos, tmp_path):
    (photos / "._p0.png").write_text("of a Mac")
    (photos / "README").write_text("no suffix")
    (photos / "p9.heic").write_text("a photo that is asked for by its suffix")
    names = [f"p{i}" for i in range(5)]
    for pattern in ("", "*", "**"):
        assert [item.name for item in read_list([str(photos / pattern)])] == names
    assert [item.name for item in read_list([str(photos / "*.heic")])] == ["p9"]
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"image": f"photos/p{ord(name) - 96}.png"}))
    assert [item.name for item in read_list([str(tmp_path / "*.jsonl")])] == ["p1", "p2"]


BAD_LINES = {  # line: what is told
    "{": " is not valid JSON (Expecting",
    "[1]": " is not a JSON object: give {",
    "[" * 100_000: " is not valid JSON (",
    '{"image": "a.png", "x": %s}' % ("[" * 30 + "]" * 30): " is not valid JSON (nested deeper than 20)",
    '{"image": "a.png", "x": %s}' % ("9" * 5000): " is not valid JSON (",
    '{"image": "a.png", "image": "b.png"}': " is not valid JSON (a name is there twice)",
    '{"image": "%s.png"}' % ("a" * 2**24): " is not valid JSON (longer than 16777216 bytes)",
    b'{"image": "\xff.png"}': " is not valid JSON ('utf-8' codec can't decode",
    '{"prompt": "Why?"}': " has no text for 'image'",
    '{"image": 3}': " has no text for 'image'",
    '{"image": NaN}': " has no text for 'image'",
    '{"image": "a.png", "target": ""}': " has no text for 'target'",
    '{"image": "a.png", "prompt": "a\\u0000b"}': " has characters for 'prompt' that are not text",
    '{"image": "a.png", "prompt": "\\ud800"}': " has characters for 'prompt' that are not text",
    '{"image": "a.png", "box": [1], "mask": "m.png"}': " has mask and box where only one of mask, box, segmentation is",
    '{"image": "a.png", "mask": 3}': " has a mask that is not a path",
    '{"image": "a\\u0000b.png"}': "b.png is not a usable path: embedded null byte",
    '{"image": "\\ud800.png"}': "\\ud800.png is not a usable path: 'utf-8' codec can't encode",
    '{"image": "%s.png"}' % ("a" * 300): "aaa.png is not a usable path: File name too long",
    '{"image": "."}': " is a folder, a pipe or a device",
    '{"image": "fifo"}': "fifo is a folder, a pipe or a device",
    '{"image": "/dev/zero"}': ": /dev/zero is a folder, a pipe or a device",
    '{"image": "a.png", "mask": "/dev/zero"}': ": /dev/zero is a folder, a pipe or a device",
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_a_wrong_line_is_told_with_its_number_and_the_others_are_read(tmp_path, line, reason):
    path, good = tmp_path / "list.jsonl", b'{"image": "b.png"}'
    os.mkfifo(tmp_path / "fifo")
    lines = [b"\xef\xbb\xbf" + good, b"", line if isinstance(line, bytes) else line.encode(), good.replace(b"b", b"c")]
    path.write_bytes(b"\r\n".join(lines))
    one, wrong, other = read_list([str(path)])
    assert (one.image, other.image, one.error, other.error) == (tmp_path / "b.png", tmp_path / "c.png", "", "")
    assert other.source == f"{path}, line 4"
    assert wrong.error.startswith(f"{path}, line 3")
    assert reason in wrong.error
    assert len(wrong.error) < 1000
    path.write_bytes(lines[2])
    with pytest.raises(ValueError, match="list.jsonl, line 1"):  # no line is good
        read_list([str(path)])


def test_only_a_regular_file_is_read_as_a_list(tmp_path):
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "folder.jsonl/deep.jsonl").symlink_to("/dev/zero")
    for name in ("fifo.jsonl", "folder.jsonl/deep.jsonl"):
        with pytest.raises(ValueError, match="is a folder, a pipe or a device"):
            read_list([str(tmp_path / name)])


def test_what_the_tool_wrote_is_left_out_of_folders_and_globs_and_told(photos):
    """Wherever it lies, and whatever it is called by now; what is named itself is taken."""
    write_files(photos / "out", {"heatmap.png": np.zeros((9, 9, 3), np.uint8), "results.jsonl": '{"image": "a"}'})
    (photos / "p9.png").write_bytes((photos / "out/heatmap.png").read_bytes())
    names = [f"p{i}" for i in range(5)]
    for pattern, left_out in (("", "1 files"), ("**/*.png", "2 files"), ("**/*", "2 files")):
        with pytest.warns(ExplanationWarning, match=f"{left_out} that this tool wrote are left out of the list"):
            assert [item.name for item in read_list([str(photos / pattern)])] == names
    with pytest.warns(ExplanationWarning), pytest.raises(ValueError, match="there is no photo"):
        read_list([str(photos / "**/*.jsonl")])
    assert [item.name for item in read_list([str(photos / "p9.png")])] == ["p9"]


def test_lists_of_nothing_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    reasons = {
        "empty.jsonl": "is empty",
        "no.jsonl": "cannot be read",
        ".": "there is no photo",
        "*.png": "there is no photo",
    }
    for path, reason in reasons.items():
        with pytest.raises(ValueError, match=reason):
            read_list([str(tmp_path / path)])


# what is done


ALONE = Processes(cpu=True)


class Work:
    """Explains a photo by its size; counts what was explained, and can fail."""

    def __init__(self, folder, failing=(), error=None):
        self.folder, self.failing, self.error = folder, failing, error or ValueError("no good")
        self.done, self.reported = [], []

    def load(self, item):
        return item.image.read_bytes()

    def explain(self, item, data):
        if item.name in self.failing:
            raise self.error
        self.done.append(item.name)
        record = {"name": item.name, "image": str(item.image), "bytes": len(data)}
        return record, {
            "a.txt": f"{len(data)}",
            "b.txt": lambda: ascii(item.name) * 1000,
        }

    def run(self, items, settings=None, **options):
        options = {"quiet": True, "report": self.reported.append} | options
        self.done.clear()
        return work_off(items, self.folder, settings or {}, ALONE, self.load, self.explain, reason_of=str, **options)


def records_in(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_second_run_does_what_is_not_complete_and_nothing_else(photos, tmp_path):
    work, items = Work(tmp_path / "out"), read_list([str(photos)])
    records, before = work.run(items)
    assert (work.done, before) == ([f"p{i}" for i in range(5)], 0)
    assert [record["name"] for record in records] == work.done
    assert records == records_in(tmp_path / "out")
    assert records[0]["files"] == ["a.txt", "b.txt"]
    assert (tmp_path / "out/p3/a.txt").read_text() == str((photos / "p3.png").stat().st_size)

    again, before = work.run(items)
    assert (work.done, before, again) == ([], 5, records)
    (tmp_path / "out/p4/b.txt").write_text("cut")
    (tmp_path / "out/p0/result.json").write_text("{")
    _, before = work.run(items)
    assert (work.done, before) == (["p0", "p4"], 3)
    work.run(items, overwrite=True)
    assert len(work.done) == 5
    make_image(50, 30).save(photos / "p5.png")  # the list grows
    _, before = work.run(read_list([str(photos)]))
    assert (work.done, before) == (["p5"], 5)
    assert len(records_in(tmp_path / "out")) == 6


OTHERS = {  # what else is asked: what is told of it
    "settings": "p0 holds a result of --layer 1, and now it is 3",
    "target": "p0 holds a result of --target 'dog', and now it is 'cat'",
    "photo": "p2 holds a result of another photo or object of this name",
    "fewer": "p0 holds a result of a photo that is not in this list",
}


@pytest.mark.parametrize("other", OTHERS)
def test_results_of_anything_else_stop_the_run_and_only_overwrite_replaces_them(photos, tmp_path, other):
    work, items = Work(tmp_path / "out"), read_list([str(photos)])
    items = [replace(item, target="dog") for item in items]
    work.run(items, {"layer": 1})
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    settings = {"layer": 1}
    if other == "settings":
        settings = {"layer": 3}
    elif other == "target":
        items = [replace(item, target="cat") for item in items]
    elif other == "photo":
        make_image(90, 30).save(photos / "p2.png")
    else:
        items = items[1:3]
    with pytest.raises(ValueError, match=f"{OTHERS[other]}: choose another --output_dir, or --overwrite it"):
        work.run(items, settings)
    assert work.done == []
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    work.run(items, settings, overwrite=True)
    assert work.done == [item.name for item in items]
    assert [record["name"] for record in records_in(tmp_path / "out")] == work.done
    if other == "fewer":
        assert (tmp_path / "out/p0/result.json").exists()


def test_results_stay_where_a_name_gets_a_mark_as_the_list_grows(photos, tmp_path):
    work = Work(tmp_path / "out")
    work.run(named([Item("", photos / "p0.png")]))
    (tmp_path / "more").mkdir()
    make_image(50, 30).save(tmp_path / "more/p0.png")
    work.run(named([Item("", photos / "p0.png"), Item("", tmp_path / "more/p0.png")]))
    assert len(work.done) == 2
    assert (tmp_path / "out/p0/result.json").exists()


@pytest.mark.parametrize("damage", ["3", "{}", '{"key": 3}', '{"key": "a", "settings": 3}', "[" * 100_000, "\udcff"])
def test_a_record_that_is_none_of_ours_is_no_result(photos, tmp_path, damage):
    work, items = Work(tmp_path / "out"), read_list([str(photos)])
    for name in ("p1", "others"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "result.json").write_text(damage, errors="surrogateescape")
    work.run(items)
    assert len(work.done) == 5


@pytest.mark.parametrize("way", ["photo", "mask", "list", "linked folder"])
def test_an_input_where_a_list_writes_is_refused_before_anything_is_computed(photos, tmp_path, way):
    folder = tmp_path / "out/single"
    folder.mkdir(parents=True)
    path = folder / "a.png"
    make_image(40, 30).save(path)
    item, inputs = Item("p0", photos / "p0.png"), [path] if way == "list" else []
    if way == "photo":
        item = replace(item, image=path)
    elif way == "mask":
        item = replace(item, object={"mask": str(path)})
    elif way == "linked folder":
        (folder / "p0").symlink_to(photos)
    work = Work(folder)
    with pytest.raises(ValueError, match=r"the input .*png lies in .*: choose another --output_dir"):
        work.run([item], inputs=inputs)
    assert work.done == []
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", *(["p0"] if way == "linked folder" else [])]


def test_paths_may_be_relative(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work = Work(Path("out"))
    records, _ = work.run(read_list(["photos"]))
    assert work.reported == []
    assert [record["files"] for record in records] == [["a.txt", "b.txt"]] * 5
    assert work.run(read_list(["photos"]))[1] == 5


def test_key_knows_photo_mask_and_what_is_asked(photos, tmp_path):
    mask = tmp_path / "m.png"
    make_image(40, 30).save(mask)
    base = Item("a", photos / "p0.png", target="dog", object={"mask": str(mask)})
    key = key_of(base, {"layer": 1})
    cat = Item("a", photos / "p0.png", target="cat", object=base.object)
    others = [key_of(base, {"layer": 2}), key_of(cat, {"layer": 1})]
    make_image(41, 30).save(mask)
    others.append(key_of(base, {"layer": 1}))
    assert len({key, *others}) == 4
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/q.png").write_bytes((photos / "p0.png").read_bytes())
    assert key_of(Item("b", tmp_path / "copy/q.png"), {}) == key_of(Item("a", photos / "p0.png"), {})  # by content


def test_a_bad_photo_is_told_and_the_others_go_on(photos, tmp_path):
    work, items = Work(tmp_path / "out", failing=["p1"]), read_list([str(photos)])
    records, before = work.run(items)
    assert before == 0
    assert work.done == ["p0", "p2", "p3", "p4"]
    assert work.reported == [f"{photos / 'p1.png'}: no good"]
    assert records[1] == {"name": "p1", "image": str(photos / "p1.png"), "error": "no good"}
    assert not (tmp_path / "out/p1").exists()
    work.failing = ()
    assert work.run(items)[1] == 4
    assert work.done == ["p1"]
    (photos / "p3.png").unlink()
    records, _ = work.run(items)
    assert "No such file" in records[3]["error"]
    assert work.reported[-1].endswith(f"(note: {tmp_path / 'out/p3'} has the result of an earlier run)")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("patched", ["write_bytes", "mkdir"])
def test_a_list_stops_at_the_first_photo_that_does_not_fit(photos, tmp_path, monkeypatch, patched, overwrite):
    """Finished results and their records stay, those of an earlier run that were to be replaced, too."""
    work, items, real = Work(tmp_path / "out"), read_list([str(photos)]), getattr(Path, patched)
    if overwrite:
        work.run(items)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    def full(self, *given, **options):
        if "p2" in self.parts:
            raise OSError(28, "No space left on device")
        return real(self, *given, **options)

    monkeypatch.setattr(Path, patched, full)
    with pytest.raises(OSError, match="(?i)no space left"):
        work.run(items, overwrite=overwrite)
    assert work.done in (["p0", "p1", "p2"], ["p0", "p1"])
    assert work.reported == []
    records = records_in(tmp_path / "out")
    assert [record["name"] for record in records] == [f"p{i}" for i in range(5 if overwrite else 2)]
    there = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    if overwrite:
        assert there == before
    monkeypatch.setattr(Path, patched, real)
    work.run(items)
    assert work.done == ([] if overwrite else ["p2", "p3", "p4"])


def test_a_name_that_is_not_utf8_gets_its_result_and_its_record(photos, tmp_path):
    path = os.fsencode(photos) + b"/\xff\n.png"
    Path(os.fsdecode(path)).write_bytes((photos / "p0.png").read_bytes())
    (tmp_path / "list.jsonl").write_text(json.dumps({"image": "photos/" + os.fsdecode(b"\xff\n.png")}))
    for source, count in ((photos, 6), (tmp_path / "list.jsonl", 1)):
        work = Work(tmp_path / f"out{count}")
        work.run(read_list([str(source)]))
        records = records_in(work.folder)
        assert len(records) == count
        (record,) = [record for record in records if "p" not in record["name"]]
        assert os.fsencode(record["image"]) == path
        assert (work.folder / record["name"] / "a.txt").exists()
    work.failing, work.error = [record["name"]], ValueError("a\nb \udcff")
    work.run(read_list([str(tmp_path / "list.jsonl")]), overwrite=True)
    assert "\n" not in work.reported[0]
    assert records_in(work.folder)[0]["error"] == "a\nb \udcff"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError(28, "No space left on device")])
def test_an_interrupted_list_keeps_what_is_complete_and_its_records(photos, tmp_path, error):
    work, items = Work(tmp_path / "out", failing=["p2"], error=error), read_list([str(photos)])
    with pytest.raises(type(error)):
        work.run(items)
    assert [record["name"] for record in records_in(tmp_path / "out")] == ["p0", "p1"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["p0", "p1", "results.jsonl"]
    work.failing = ()
    assert work.run(items)[1] == 2
    assert work.done == ["p2", "p3", "p4"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_runs_lose_no_finished_result(photos, tmp_path, overwrite):
    assert count_lost(photos, tmp_path / "out", times=5, seed=1, overwrite=overwrite) == 0


def test_two_processes_one_of_them_killed_and_resumed_give_what_one_gives(photos, tmp_path):
    for i in range(5, 12):
        make_image(40 + i, 30).save(photos / f"p{i}.png")

    def shared(*dies_at):
        """As torchrun starts them, and ends the other one."""
        with socket.create_server(("localhost", 0)) as server:
            env = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(server.getsockname()[1])}
        given = work, photos, tmp_path / "two", *dies_at
        running = [driver_process.start(*given, **env, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
        for ended in wait([process.sentinel for process in running], 60) if dies_at else ():
            assert ended in [process.sentinel for process in running if process.exitcode]
            for process in running:
                process.terminate()
        for process in running:
            process.join(60)
        return [process.exitcode for process in running]

    assert -signal.SIGKILL in shared("p5")
    assert not (tmp_path / "two/p5/result.json").exists()
    assert (tmp_path / "two/p0/result.json").exists()
    assert shared() == [0, 0]
    work(photos, tmp_path / "one")
    one, two = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two
