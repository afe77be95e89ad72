"""The folder that a run writes to: its files are written whole, and nothing that is not its own is touched.

inputs                      check_inputs: none lies where the run writes
  -> staging folder         _write: all files, complete
  -> their places           _move: all of them or none; what a kill interrupts here, the next run finishes
"""

import errno
import functools
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGINT, SIGTERM

import numpy as np

from common.encoding import LARGE, encode, pixel_count, write_large_png
from common.inputs import check_inputs

__all__ = ["disk_full", "other_files", "output_folder", "write_files"]

STAGING = ".smooth-gradcam-"  # with the process' number and a random one, the folder for files that are not finished
SIGN = ".sign"  # in a staging folder: it is ours
MOVING = ".moving"  # in a staging folder: its files are complete, and being moved into place
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
_DRAWING = threading.Lock()  # matplotlib draws in one thread at a time


def _stage(path: Path, name: str, content) -> None:
    if callable(content):  # a picture that is drawn only now, so that not all of them are in memory at once
        with _DRAWING:
            content = content()
            if hasattr(content, "vector"):
                suffix = Path(name).suffix[1:]
                content = np.asarray(content) if suffix == "png" else content.vector(suffix)
            if pixel_count(content) > LARGE:
                return _stage(path, name, content)  # the next is drawn once it is written
    large = pixel_count(content) > LARGE
    data = None if large else encode(content)
    try:
        (path / name).parent.mkdir(exist_ok=True)
        write_large_png(path / name, content) if large else (path / name).write_bytes(data)
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        takes = f"up to {3 * pixel_count(content) / 1e6:.1f}" if large else f"{len(data) / 1e6:.1f}"
        free = shutil.disk_usage(path).free / 1e6
        raise OSError(
            f"no space left for {name} in {path.parent}: it takes {takes} MB, {free:.1f} MB are free"
        ) from exc
    return None


def _make_folders(folder: Path, made: list[Path]) -> None:
    """Make the folder and those missing above it; `made` gets each that was made here."""
    for path in (*reversed(folder.parents), folder):
        if not path.is_dir():
            with suppress(FileExistsError):  # another run was quicker
                path.mkdir()
                made.append(path)
            if not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def _hold(folder: Path) -> int | None:
    """An open file that keeps other runs out of the folder until it is closed, if only by the end of this process.

    None where the system cannot lock folders.
    """
    if fcntl is None:
        return None
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(held)
        if not isinstance(exc, BlockingIOError):  # a network disk without locks
            return None
        names = [path.name.removeprefix(STAGING) for path in _staging_folders(folder)]
        who = ", ".join(f"process {name.split('-')[0]}" for name in names)
        raise BlockingIOError(f"{folder} is being written by {who or 'another run'}: choose another folder") from exc
    return held


def _staging_folders(folder: Path) -> list[Path]:
    """Those of the folder that are ours: somebody's folder may have such a name."""
    there = [path for path in folder.glob(f"{STAGING}*") if not path.is_symlink()]
    return [path for path in there if os.path.isfile(path / SIGN)]  # noqa: PTH113  (raises for no other user's folder)


def _remove_staging(staging: Path) -> None:
    """Remove a staging folder: its files, and those of the folders in it, which is as deep as runs write."""
    parts = [path for path in staging.iterdir() if path.is_dir() and not path.is_symlink()]
    for part in (*parts, staging):
        for path in part.iterdir():
            if path not in parts and path != staging / SIGN:
                path.unlink()
        if part != staging:
            part.rmdir()
    (staging / SIGN).unlink(missing_ok=True)  # the last, so that a kill leaves a folder that is known
    staging.rmdir()


def _check_path(save_dir, name: str) -> Path:
    """The folder without links and `..`. Raises ValueError for what is no path or a link that leads nowhere."""
    if not isinstance(save_dir, (str, os.PathLike)) or not str(save_dir).strip() or "\0" in str(save_dir):
        raise ValueError(f"{name}={save_dir!r} must be the path of a folder")
    given = Path(save_dir).absolute()
    for path in (given, *given.parents):
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{name}: {path} is a symbolic link that leads nowhere: choose another folder")
    return Path(os.path.realpath(given))


@contextmanager
def _signals_wait():
    """Inside, Ctrl-C and SIGTERM wait until the end, so that nothing is left half done."""
    if threading.current_thread() is not threading.main_thread():  # which is where Python handles signals
        yield
        return
    caught = []
    before = {number: signal.signal(number, lambda *args: caught.append(args)) for number in (SIGINT, SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number, _ in caught:
        signal.raise_signal(number)


@contextmanager
def output_folder(save_dir, subfolders: Iterable[str] = (), name: str = "save_dir", inputs: Iterable = ()):
    """The folder that a run writes to, its own until the end; yields a function that writes {name: content}.

        with output_folder("cam_results/grid") as write:
            paths = write({"heatmap.png": picture})

    A content is a uint8 RGB array or PIL image (.png), a dictionary of arrays (.npz), a text, or a function that gives
    one of them or a `Page` (.png, .pdf, .svg), called when its file's turn comes. Files are written to a staging folder
    in the folder and then moved into place together: a failed run, Ctrl-C or SIGTERM leaves no partial files, and what
    SIGKILL interrupts is undone or finished by the next run. `write(files, last=(name, make))` writes one more file,
    whose text `make` makes of {file name: size in bytes}, and moves it last.

    Nothing is ever removed but this staging folder, such folders of runs that were killed, and empty folders that this
    run made; nothing is replaced but files of the names that are written, and none of the `inputs`, see `check_inputs`.
    `subfolders` are those that the names will need; errors call the folder `name`.

    Raises ValueError if there can be no such folder, BlockingIOError if another run is writing there (where the system
    can lock folders; Windows cannot), and OSError if a file cannot be written.
    """
    folder, made, held, staging = _check_path(save_dir, name), [], None, None
    check_inputs([folder, *(folder / part for part in subfolders)], inputs, name)
    try:
        try:
            _make_folders(folder, made)
            for part in (folder / part for part in subfolders):
                if os.path.lexists(part) and not part.is_dir():
                    raise NotADirectoryError(errno.ENOTDIR, f"{part.name} is no folder")
                if part.is_dir() and part.stat().st_dev != folder.stat().st_dev:
                    raise OSError(errno.EXDEV, f"{part.name} is on another disk")
            held = _hold(folder)
            for stale in _staging_folders(folder) if held is not None else ():  # whoever made them is no longer there
                _finish_moving(folder, stale)
                _remove_staging(stale)
            mine = folder / f"{STAGING}{os.getpid()}-{secrets.token_hex(4)}"
            mine.mkdir()
            staging = mine  # from here on it is this run's to remove
            (staging / SIGN).touch()
        except BlockingIOError:
            raise
        except OSError as exc:
            raise ValueError(f"{name}: {folder} cannot be written ({exc.strerror}): choose another folder") from exc
        yield functools.partial(_write, folder, staging, made)
    finally:
        with _signals_wait():
            if staging is not None:
                _remove_staging(staging)
            for path in reversed(made):
                with suppress(OSError):  # it is not empty
                    path.rmdir()
            if held is not None:
                os.close(held)


def _keep(file: Path, copy: Path) -> None:
    """Another name for the file, or a copy where the disk knows no hard links."""
    try:
        os.link(file, copy, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(file, copy, follow_symlinks=False)


def _move(folder: Path, staging: Path, made: list[Path], names: Iterable[str]) -> None:
    """Move all files into place, or none: what was there before is put back if one cannot be replaced."""
    moved = {}  # target: what was there before
    (staging / MOVING).touch()
    try:
        for i, name in enumerate(names):
            target, before = folder / name, staging / f".{i}.before"
            _make_folders(target.parent, made)
            if os.path.lexists(target):
                _keep(target, before)
            (staging / name).replace(target)
            moved[target] = before
    except OSError as exc:
        (staging / MOVING).unlink()
        for done, before in moved.items():
            before.replace(done) if os.path.lexists(before) else done.unlink()
        raise OSError(
            f"{target} cannot be written ({exc.strerror}): nothing is changed, choose another folder"
        ) from exc
    (staging / MOVING).unlink()
    for before in moved.values():
        before.unlink(missing_ok=True)


def _finish_moving(folder: Path, staging: Path) -> None:
    """Move into place what a killed run left there complete."""
    if (staging / MOVING).exists():
        for path in [path for path in staging.rglob("*") if path.is_file() and not path.name.startswith(".")]:
            target = folder / path.relative_to(staging)
            target.parent.mkdir(exist_ok=True)
            path.replace(target)


def _write(
    folder: Path, staging: Path, made: list[Path], files: dict[str, object], last: tuple[str, Callable] | None = None
) -> list[Path]:
    names = [*files, *(last or ())[:1]]
    for name in names:
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name} is a folder where a file is to be written: choose another folder")

    with ThreadPoolExecutor(min(4, os.cpu_count())) as pool:  # compression takes longest
        list(pool.map(functools.partial(_stage, staging), files, files.values()))
    if last is not None:
        _stage(staging, last[0], last[1]({name: (staging / name).stat().st_size for name in files}))
    with _signals_wait():
        _move(folder, staging, made, names)
    return [folder / name for name in names]


def write_files(folder, files: dict[str, object]) -> list[Path]:
    """Write {name in the folder: content} as `output_folder` does; returns the paths."""
    with output_folder(folder) as write:
        return write(files)


def disk_full(exc: BaseException | None) -> bool:
    """Whether an error is that of a full disk or quota, or comes of one."""
    while exc is not None and not (isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT)):
        exc = exc.__cause__
    return exc is not None


def other_files(paths: list[Path]) -> list[Path]:
    """Files beside the given ones that are not among them: of an earlier run, say, and another photo."""
    found = {path for parent in {path.parent for path in paths} for path in parent.iterdir() if path.is_file()}
    return sorted(path for path in found - set(paths) if not path.name.startswith("."))
