"""The files that a run reads: only regular ones, never one that it is about to replace, and JSON without surprises."""

import io
import json
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

__all__ = ["check_inputs", "open_regular", "parse_json"]

MAX_DEPTH = 20  # levels of nesting in JSON


def open_regular(path) -> io.BufferedReader:
    """Open a file for reading bytes. Raises ValueError for a folder, a device, and a pipe, which could block."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116  (a path may be text)
        raise ValueError("it is a folder, a pipe or a device")
    return open(path, "rb", opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115


def check_inputs(folders: Iterable[Path], inputs: Iterable, name: str = "save_dir") -> None:
    """Raises ValueError if an input, or a link that leads to it, lies in one of the folders that a run writes to.

    Folders are compared by device and inode, since one folder can have several paths. Inputs that are not an existing
    path (an array, None, a name on the hub) are passed over.
    """
    above = {}  # each folder above an input: the input
    for source in inputs:
        if isinstance(source, (str, os.PathLike)) and os.path.lexists(source):
            path = Path(source)
            for resolved in (Path(os.path.realpath(path)), Path(os.path.realpath(path.parent), path.name)):
                above |= dict.fromkeys((resolved, *resolved.parents), source)
    inputs_of = {}
    for path, source in above.items():
        with suppress(OSError):
            inputs_of[path.stat().st_dev, path.stat().st_ino] = source
    for folder in folders:
        if folder.is_dir() and (source := inputs_of.get((folder.stat().st_dev, folder.stat().st_ino))) is not None:
            raise ValueError(
                f"the input {source} lies in {folder}, the folder that this run writes to: choose another {name}"
            )


def parse_json(text: bytes):
    """The value of UTF-8 JSON. Raises ValueError if it is none, has a name twice, or is nested deeper than 20."""
    try:
        value = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_unique)
        if _depth(value) > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"is not valid JSON ({exc})") from exc
    return value


def _unique(pairs: list[tuple]) -> dict:
    """A JSON object, for json.loads, which by itself would take the last of two values of one name."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return dict(pairs)


def _depth(value) -> int:
    """The depth of nesting of a JSON value."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if values is None else 1 + max(map(_depth, values), default=0)
