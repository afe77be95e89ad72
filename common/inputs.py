"""What a run reads: regular files only, and never one that it is about to write."""

import io
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

__all__ = ["check_inputs", "open_regular"]


def open_regular(path) -> io.BufferedReader:
    """Open a file to read its bytes. Raises ValueError for a folder, a device, and a pipe, which could block."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116  (a path may be text)
        raise ValueError("it is a folder, a pipe or a device")
    return open(path, "rb", opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115


def check_inputs(folders: Iterable[Path], inputs: Iterable, name: str = "save_dir") -> None:
    """Raises ValueError if an input, or a link that leads to it, lies in one of the folders that a run writes to.

    Folders are compared by what they are on the disk, since a name is not all that leads to them. What is no path of
    something that is there (an array, None, a name on the hub) is passed over.
    """
    above = {}  # each folder above an input: the input
    for given in inputs:
        if isinstance(given, (str, os.PathLike)) and os.path.lexists(given):
            path = Path(given)
            for place in (Path(os.path.realpath(path)), Path(os.path.realpath(path.parent), path.name)):
                above |= dict.fromkeys((place, *place.parents), given)
    inputs_of = {}
    for path, given in above.items():
        with suppress(OSError):
            inputs_of[path.stat().st_dev, path.stat().st_ino] = given
    for folder in folders:
        if folder.is_dir() and (given := inputs_of.get((folder.stat().st_dev, folder.stat().st_ino))) is not None:
            raise ValueError(
                f"the input {given} lies in {folder}, the folder that this run writes to: choose another {name}"
            )
