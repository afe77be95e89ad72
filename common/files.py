"""The folder that a run writes to: a failed run leaves no partial files, and files of others are never touched.

inputs                  check_inputs: none of them lies where the run writes
  -> staging folder     _write: all files, complete
  -> final places       _move: all files or none; what a kill interrupts here, the next run finishes
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

from common.encoding import LARGE_PICTURE, encode, pixel_count, write_large_png
from common.inputs import check_inputs

__all__ = ["DRAWING", "MOVING", "SIGN", "STAGING", "disk_full", "other_files", "output_folder", "write_files"]

STAGING = ".smooth-gradcam-"  # and the process id and random digits: the name of a folder for unfinished files
SIGN = ".sign"  # a file in a staging folder: the folder is ours
MOVING = ".moving"  # a file in a staging folder: its files are complete and being moved into place
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
DRAWING = threading.Lock()  # matplotlib draws in one thread at a time


def _stage(path: Path, name: str, content) -> None:
    if callable(content):  # a picture is drawn only now, so that not all of them are in memory at once
        with DRAWING:
            content = content()
            if hasattr(content, "vector"):
                suffix = Path(name).suffix[1:]
                content = np.asarray(content) if suffix == "png" else content.vector(suffix)
            if pixel_count(content) > LARGE_PICTURE:
                return _stage(path, name, content)  # while the lock is held: the next is drawn once this is written
    large = pixel_count(content) > LARGE_PICTURE
    data = None if large else encode(content)
    try:
        (path / name).parent.mkdir(exist_ok=True)
        write_large_png(path / name, content) if large else (path / name).write_bytes(data)
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        size = f"up to {3 * pixel_count(content) / 1e6:.1f}" if large else f"{len(data) / 1e6:.1f}"
        free = shutil.disk_usage(path).free / 1e6
        raise OSError(f"no space left for {name} in {path.parent}: it takes {size} MB, {free:.1f} MB are free") from exc
    return None


def _make_folders(folder: Path, made: list[Path]) -> None:
    """Make the folder and its missing parents; those made here are appended to `made`."""
    for path in (*reversed(folder.parents), folder):
        if not path.is_dir():
            with suppress(FileExistsError):  # another run was quicker
                path.mkdir()
                made.append(path)
            if not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def _lock(folder: Path) -> int | None:
    """An open file descriptor that locks other runs out of the folder until it is closed or this process ends.

    None where the system cannot lock folders. Raises BlockingIOError if another run holds the lock.
    """
    if fcntl is None:
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(lock)
        if not isinstance(exc, BlockingIOError):  # a network disk without locks
            return None
        names = [path.name.removeprefix(STAGING) for path in _staging_folders(folder)]
        owners = ", ".join(f"process {name.split('-')[0]}" for name in names)
        raise BlockingIOError(f"{folder} is being written by {owners or 'another run'}: choose another folder") from exc
    return lock


def _staging_folders(folder: Path) -> list[Path]:
    """The staging folders in a folder that are ours: a user's folder may have such a name, too."""
    paths = [path for path in folder.glob(f"{STAGING}*") if not path.is_symlink()]
    return [path for path in paths if os.path.isfile(path / SIGN)]  # noqa: PTH113  (Path's raises for unreadable ones)


def _remove_staging(staging: Path) -> None:
    """Remove a staging folder with its files and its folders of files, which is as deep as runs write."""
    subfolders = [path for path in staging.iterdir() if path.is_dir() and not path.is_symlink()]
    for folder in (*subfolders, staging):
        for path in folder.iterdir():
            if path not in subfolders and path != staging / SIGN:
                path.unlink()
        if folder != staging:
            folder.rmdir()
    (staging / SIGN).unlink(missing_ok=True)  # last, so that the folder is known as ours after a kill
    staging.rmdir()


def _check_path(save_dir, name: str) -> Path:
    """The folder without links and `..`. Raises ValueError if it is not a path, or a link to nothing."""
    if not isinstance(save_dir, (str, os.PathLike)) or not str(save_dir).strip() or "\0" in str(save_dir):
        raise ValueError(f"{name}={save_dir!r} must be the path of a folder")
    folder = Path(save_dir).absolute()
    for path in (folder, *folder.parents):
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{name}: {path} is a symbolic link that leads nowhere: choose another folder")
    return Path(os.path.realpath(folder))


@contextmanager
def _signals_wait():
    """Inside, Ctrl-C and SIGTERM are held back until the end, so that nothing is left half done."""
    if threading.current_thread() is not threading.main_thread():  # signals are handled only there
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
    """The folder that a run writes to, locked until the end; yields a function that writes {name: content}.

        with output_folder("cam_results/grid") as write:
            paths = write({"heatmap.png": picture})

    A content is a uint8 RGB array or PIL image (.png), a dictionary of arrays (.npz), a text, or a function that
    returns one of them or a `Page` (.png, .pdf, .svg), called when its file's turn comes. Files are written to a
    staging folder in the folder and then moved into place together: a failed run, Ctrl-C or SIGTERM leaves no partial
    files, and what SIGKILL interrupts is undone or finished by the next run. `write(files, last=(name, make))` writes
    one more file, whose text is `make({file name: size in bytes})`, and moves it last.

    Removed are only this run's staging folder, those of runs that were killed, and empty folders that this run made;
    replaced are only files of the names that are written, never one of the `inputs`, see `check_inputs`. `subfolders`
    are those that the names will need. Errors call the folder `name`.

    Raises ValueError if there can be no such folder, BlockingIOError if another run is writing there (where the system
    can lock folders; Windows cannot), and OSError if a file cannot be written.
    """
    folder, made, lock, staging = _check_path(save_dir, name), [], None, None
    subfolders = [folder / subfolder for subfolder in subfolders]
    check_inputs([folder, *subfolders], inputs, name)
    try:
        try:
            _make_folders(folder, made)
            for path in subfolders:
                if os.path.lexists(path) and not path.is_dir():
                    raise NotADirectoryError(errno.ENOTDIR, f"{path.name} is not a folder")
                if path.is_dir() and path.stat().st_dev != folder.stat().st_dev:
                    raise OSError(errno.EXDEV, f"{path.name} is on another disk")
            lock = _lock(folder)
            for stale in _staging_folders(folder) if lock is not None else ():  # of runs that no longer exist
                _finish_moving(folder, stale)
                _remove_staging(stale)
            path = folder / f"{STAGING}{os.getpid()}-{secrets.token_hex(4)}"
            path.mkdir()
            staging = path  # from here on this run removes it
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
            if lock is not None:
                os.close(lock)


def _keep(file: Path, copy: Path) -> None:
    """Give the file a second name, or copy it where the disk has no hard links."""
    try:
        os.link(file, copy, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(file, copy, follow_symlinks=False)


def _move(folder: Path, staging: Path, made: list[Path], names: Iterable[str]) -> None:
    """Move all files into place, or none: earlier files are put back if one of them cannot be replaced."""
    moved = {}  # target: a second name of the earlier file
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
        for replaced, before in moved.items():
            before.replace(replaced) if os.path.lexists(before) else replaced.unlink()
        raise OSError(
            f"{target} cannot be written ({exc.strerror}): nothing is changed, choose another folder"
        ) from exc
    (staging / MOVING).unlink()
    for before in moved.values():
        before.unlink(missing_ok=True)


def _finish_moving(folder: Path, staging: Path) -> None:
    """Move the complete files of a killed run into place."""
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
    """Write {file name: content} as `output_folder` does, and raise what it raises; returns the paths."""
    with output_folder(folder) as write:
        return write(files)


def disk_full(exc: BaseException | None) -> bool:
    """Whether an error is that of a full disk or quota, or was raised from one."""
    while exc is not None and not (isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT)):
        exc = exc.__cause__
    return exc is not None


def other_files(paths: list[Path]) -> list[Path]:
    """Files in the folders of these paths that are not among them, such as those of an earlier run."""
    files = {path for folder in {path.parent for path in paths} for path in folder.iterdir() if path.is_file()}
    return sorted(path for path in files - set(paths) if not path.name.startswith("."))
