"""Writing: all files or none, one run to a folder, and nothing is touched that is not this run's own."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import common.files
from common.files import MOVING, SIGN, STAGING, disk_full, other_files, output_folder, write_files

ROOT = Path(__file__).parent.parent
PIXELS = np.zeros((2, 2, 3), np.uint8)


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# all or none


def test_every_kind_of_content_is_written(tmp_path):
    files = {"a.png": PIXELS + 7, "part/b.png": lambda: PIXELS + 9, "c.npz": {"maps": np.ones(3)}, "d.txt": "é"}
    paths = write_files(tmp_path / "out", files)
    assert paths == [tmp_path / "out" / name for name in files]
    assert listing(tmp_path / "out") == ["a.png", "c.npz", "d.txt", "part", "part/b.png"]
    assert [np.asarray(Image.open(path)).max() for path in paths[:2]] == [7, 9]
    assert np.load(paths[2])["maps"].tolist() == [1, 1, 1]
    assert paths[3].read_text(encoding="utf-8") == "é"


def test_pictures_are_drawn_when_their_turn_comes(tmp_path):
    drawn = []
    with output_folder(tmp_path) as write:
        files = {f"{i}.png": lambda i=i: drawn.append(i) or PIXELS for i in range(3)}
        assert drawn == []
        write(files)
    assert sorted(drawn) == [0, 1, 2]


def test_nothing_is_written_if_one_file_fails(tmp_path):
    with pytest.raises(AttributeError):
        write_files(tmp_path / "new/out", {"a.png": PIXELS, "b.png": None})
    assert listing(tmp_path) == []


def test_an_earlier_result_survives_a_failure(tmp_path):
    write_files(tmp_path, {"layer_1_heatmap.png": PIXELS})
    with pytest.raises(AttributeError):
        write_files(tmp_path, {"layer_1_heatmap.png": PIXELS + 1, "b.png": None})
    assert listing(tmp_path) == ["layer_1_heatmap.png"]
    assert not np.asarray(Image.open(tmp_path / "layer_1_heatmap.png")).any()


def test_a_folder_in_a_files_place_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "b.png").mkdir()
    with pytest.raises(ValueError, match="b.png is a folder"):
        write_files(tmp_path, {"a.png": PIXELS, "b.png": PIXELS})
    assert listing(tmp_path) == ["b.png"]


def test_a_full_disk_names_file_folder_and_need(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match=rf"no space left for a.png in {tmp_path}/out: it takes 0.0 MB, [\d.]+ MB are"):
        write_files(tmp_path / "out", {"a.png": PIXELS})
    assert listing(tmp_path) == []


@pytest.mark.parametrize("patched", ["write_bytes", "mkdir", "touch"])
def test_a_full_disk_is_known_as_such_at_every_step(tmp_path, monkeypatch, patched):
    monkeypatch.setattr(Path, patched, full_disk)
    with pytest.raises((OSError, ValueError)) as caught:
        write_files(tmp_path / "out", {"a.png": PIXELS})
    assert disk_full(caught.value)
    assert not disk_full(ValueError("no"))


# what is not ours


@pytest.mark.parametrize("save_dir", ["results/../out", "results/../results/../out/deep", "out/./../out"])
def test_failing_run_removes_nothing_of_the_folders_above(tmp_path, monkeypatch, save_dir):
    """`results/..` is the working directory, though it does not exist as long as `results` does not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis.txt").write_text("years of work")
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_files(save_dir, {"a.png": PIXELS})
    assert listing(tmp_path) == ["thesis.txt"]


def test_failing_run_leaves_what_another_has_meanwhile_written_under_a_new_folder(tmp_path):
    def others():
        write_files(tmp_path / "new/other", {"a.png": PIXELS})
        (tmp_path / "new/mine/notes.txt").touch()
        full_disk()

    with pytest.raises(OSError, match="No space"):
        write_files(tmp_path / "new/mine", {"a.png": others})
    assert listing(tmp_path) == ["new", "new/mine", "new/mine/notes.txt", "new/other", "new/other/a.png"]


def test_only_files_of_the_written_names_are_replaced(tmp_path):
    kept = {"layer_3_heatmap.png", "maps.npz", "notes.txt", ".writing-mine", f"{STAGING}notes", f"{STAGING}1.txt"}
    for name in kept:
        (tmp_path / name).touch()
    for name in (f"{STAGING}mine", f"{STAGING}123", f"{STAGING}{os.getpid()}", f"{STAGING}123-0123abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").touch()
        kept |= {name, f"{name}/thesis.txt"}
    paths = write_files(tmp_path, {"layer_4_heatmap.png": PIXELS})
    assert set(listing(tmp_path)) == kept | {"layer_4_heatmap.png"}
    assert other_files(paths) == [tmp_path / name for name in ("layer_3_heatmap.png", "maps.npz", "notes.txt")]


def test_links_are_replaced_and_their_targets_stay(tmp_path):
    (tmp_path / "target.png").write_bytes(b"mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")
    (tmp_path / "elsewhere/a.png").symlink_to(tmp_path / "target.png")
    (tmp_path / f"elsewhere/{STAGING}77").symlink_to(tmp_path)  # no staging folder, though it is named like one
    write_files(tmp_path / "out", {"a.png": PIXELS})
    assert (tmp_path / "target.png").read_bytes() == b"mine"
    assert not (tmp_path / "elsewhere/a.png").is_symlink()
    assert (tmp_path / f"elsewhere/{STAGING}77").is_symlink()


@pytest.mark.parametrize("target", ["nowhere", "link"], ids=["dangling", "looping"])
@pytest.mark.parametrize("below", ["", "deep/out"])
def test_link_that_leads_nowhere_is_refused(tmp_path, target, below):
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(ValueError, match="link is a symbolic link that leads nowhere"):
        write_files(tmp_path / "link" / below, {"a.png": PIXELS})
    assert listing(tmp_path) == ["link"]


@pytest.mark.parametrize("save_dir", [None, 3, "", "a\0b"])
def test_what_is_no_path_is_named(save_dir):
    with pytest.raises(ValueError, match="save_dir=.* must be the path of a folder"):
        write_files(save_dir, {"a.png": PIXELS})


def test_file_where_a_subfolder_has_to_be_is_refused_at_once(tmp_path):
    (tmp_path / "late").touch()
    with pytest.raises(ValueError, match="late is not a folder"):
        output_folder(tmp_path, ["early", "late"]).__enter__()
    assert listing(tmp_path) == ["late"]


@pytest.mark.parametrize("stubborn", [1, 2])
def test_a_file_that_cannot_be_replaced_undoes_those_before_it(tmp_path, monkeypatch, stubborn):
    write_files(tmp_path / "out", {"0.png": PIXELS, "1.png": PIXELS})
    (tmp_path / "out/0.png").with_suffix(".link").symlink_to("0.png")
    real = Path.replace

    def replace(self, target):
        if target.name == f"{stubborn}.png" and self.parent.name.startswith(STAGING) and self.suffix == ".png":
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    message = (
        rf"{stubborn}.png cannot be written \(Operation not permitted\): nothing is changed, choose another folder"
    )
    with pytest.raises(OSError, match=message):
        write_files(tmp_path / "out", {f"{i}.png": PIXELS + 9 for i in (0, 1, 2)})
    assert listing(tmp_path / "out") == ["0.link", "0.png", "1.png"]
    assert not np.asarray(Image.open(tmp_path / "out/0.png")).any()
    assert (tmp_path / "out/0.link").is_symlink()


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_moves_that_a_kill_interrupts_are_finished_by_the_next_run(tmp_path, moved):
    """A run that dies after so many moves; its files were complete, and so they are in the end, old or new."""

    def killed():
        real, seen = Path.replace, []

        def replace(self, target):
            seen.append(target)
            return os._exit(9) if len(seen) > moved else real(self, target)

        Path.replace = replace
        with output_folder(tmp_path) as write:
            write({"a.png": PIXELS + 9, "part/b.txt": "new"}, last=("c.txt", str))
        os._exit(0)

    write_files(tmp_path, {"a.png": PIXELS, "part/b.txt": "old", "c.txt": "old"})
    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == (9 if moved < 3 else 0)
    with output_folder(tmp_path):
        pass
    assert listing(tmp_path) == ["a.png", "c.txt", "part", "part/b.txt"]
    assert np.asarray(Image.open(tmp_path / "a.png")).max() == 9
    assert (tmp_path / "part/b.txt").read_text() == "new"
    assert (tmp_path / "c.txt").read_text() == f"{{'a.png': {(tmp_path / 'a.png').stat().st_size}, 'part/b.txt': 3}}"


def test_a_forged_staging_folder_moves_nothing_out_of_the_folder(tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/a.txt").write_text("mine")
    stale = tmp_path / f"out/{STAGING}1-ab"
    stale.mkdir(parents=True)
    for name in (SIGN, MOVING, "a.txt"):
        (stale / name).write_text("forged")
    (stale / "link").symlink_to(tmp_path / "victim")
    write_files(tmp_path / "out", {"b.txt": ""})
    assert listing(tmp_path) == ["out", "out/a.txt", "out/b.txt", "victim", "victim/a.txt"]
    assert (tmp_path / "victim/a.txt").read_text() == "mine"


# two runs


WRITER = """
import sys, time, numpy, common.files
def slow():
    print("writing", flush=True)
    time.sleep(60)
with common.files.output_folder(sys.argv[1]) as write:
    print("ready", flush=True)
    write({"a.png": numpy.ones((2, 2, 3), "uint8"), "sub/b.png": slow})
"""


@pytest.fixture
def writer(tmp_path):
    """Another process that is writing to out/ and will not be done soon."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    assert process.stdout.readline() == "writing\n"
    while not list(tmp_path.glob(f"out/{STAGING}{process.pid}-*/a.png")):
        time.sleep(0.01)
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_second_run_says_who_holds_the_folder_and_the_first_is_not_disturbed(tmp_path, writer):
    before = listing(tmp_path)
    with pytest.raises(BlockingIOError, match=rf"out is being written by process {writer.pid}: choose another"):
        write_files(tmp_path / "out", {"a.png": PIXELS})
    assert listing(tmp_path) == before
    assert writer.poll() is None


def test_same_process_cannot_write_to_a_folder_twice_at_once(tmp_path):
    with output_folder(tmp_path), pytest.raises(BlockingIOError, match=f"process {os.getpid()}"):
        write_files(tmp_path, {"a.png": PIXELS})
    assert write_files(tmp_path, {"a.png": PIXELS}) == [tmp_path / "a.png"]


def test_what_a_killed_run_left_is_removed_by_the_next_one(tmp_path, writer):
    writer.kill()
    writer.wait()
    assert list(tmp_path.glob(f"out/{STAGING}{writer.pid}-*/a.png"))
    write_files(tmp_path / "out", {"c.png": PIXELS})
    assert listing(tmp_path) == ["out", "out/c.png"]


def test_disk_that_knows_no_locks_is_written_to_and_nothing_is_removed(tmp_path, monkeypatch):
    def unlockable(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    stale = tmp_path / f"{STAGING}1-ab"
    stale.mkdir()
    (stale / SIGN).touch()
    monkeypatch.setattr(common.files.fcntl, "flock", unlockable)
    write_files(tmp_path, {"a.png": PIXELS})
    assert listing(tmp_path) == [stale.name, f"{stale.name}/{SIGN}", "a.png"]


@pytest.fixture
def _interruptible():
    """Ctrl-C is heard in tests that run in the background, too."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize("moment", ["staging", "moving"])
def test_interrupt_leaves_all_or_nothing(tmp_path, monkeypatch, moment):
    """A signal stops the main thread wherever it is; what is being moved is moved to the end."""
    (tmp_path / "a.png").write_bytes(b"before")
    (tmp_path / "b.png").write_bytes(b"before")
    real, interrupted = Path.replace, []

    def interrupt(*_):
        if not interrupted:
            interrupted.append(1)
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.1)  # time for the main thread to handle it
        return PIXELS

    def replace(self, target):
        interrupt()
        return real(self, target)

    if moment == "moving":
        monkeypatch.setattr(Path, "replace", replace)
    files = {"a.png": interrupt if moment == "staging" else PIXELS, "b.png": PIXELS}
    with pytest.raises(KeyboardInterrupt):
        write_files(tmp_path, files)
    assert listing(tmp_path) == ["a.png", "b.png"]
    unchanged = [(tmp_path / name).read_bytes() == b"before" for name in files]
    assert unchanged == ([True, True] if moment == "staging" else [False, False])
