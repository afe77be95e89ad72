"""A list of photos: what is in it, what of it is done, and what came out.

    folder, glob, list.jsonl        read_list: Items, each with the name of its folder
      -> those not complete yet     plan: the same settings and the same photo, by content, are not computed again
      -> a folder and record each   work_off: shared among processes; a bad photo is told, and the others go on
      -> results.jsonl              all records, in the list's order

What is done with a photo is a function that is given: nothing here knows a model.
"""

import argparse
import csv
import glob
import hashlib
import io
import json
import os
import re
import stat
import sys
import time
import warnings
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from common.encoding import is_ours
from common.files import STAGING, disk_full, other_files, output_folder, write_files
from common.flags import FOLDERS, MODES_OF_FLAG
from common.inputs import check_inputs, open_regular
from common.photos import load_photo
from common.processes import Processes, prefetched, progress_bar
from common.terminal import say
from smooth_gradcam import ExplanationWarning

__all__ = ["Item", "plan", "read_answers", "read_list", "run_list", "work_off"]
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")  # what counts as a photo in a folder
TEXTS = ("prompt", "answer", "target", "contrast")
OBJECTS = ("mask", "box", "segmentation")
LARGEST, LONGEST = 2**30, 2**24  # bytes of a list, and of a line in it
DEEPEST, LONGEST_NAME = 20, 200  # nesting in a line; bytes of a folder's name
EXAMPLE = '{"image": "a.jpg", "prompt": "What is here?", "target": "dog", "box": [10, 20, 80, 60]}'
ANSWER = '{"image": "a.jpg", "prompt": "Is there a dog?", "answer": "Yes"}'
RECORD, RESULTS = "result.json", "results.jsonl"
NO_MATTER = ("output_dir", "quiet", "verbose", "overwrite", "image_path", "photos", "listed", "device", "batch_size")
NO_MATTER += ("recompute",)  # to what a list's results are, beyond rounding
OWN_SUFFIXES = (".jsonl", ".csv", ".tex")  # of files beside the folders


# what is in it


@dataclass(frozen=True)
class Item:
    """A photo of a list, and what is asked of it; None is what the flags say."""

    name: str  # of its folder
    image: Path
    prompt: str | None = None
    answer: str | None = None
    target: str | None = None
    contrast: str | None = None
    object: dict = field(default_factory=dict)  # of the explained object: {"mask" | "box" | "segmentation": ...}
    where: str = ""  # in a list
    error: str = ""  # why nothing can be done with it


def read_list(paths: Iterable[str]) -> list[Item]:
    """The items of photos, folders, globs and lists, in this order; folders and globs by name.

    A line of a list is {"image", "prompt"?, "answer"?, "target"?, "contrast"?, "mask"? | "box"? | "segmentation"?},
    with paths relative to the list: `EXAMPLE`, see `object_mask` of faithfulness.py; what else it has is ignored. A
    line that is wrong is an item with an `error`, which names file and line. What this tool wrote is left out of
    folders and globs, with a warning. Raises ValueError if a list cannot be read, or if there is no photo at all.
    """
    found, ours = [], []
    for path in map(Path, paths):
        chosen = [path]
        if path.is_dir():
            chosen = sorted(file for file in path.iterdir() if is_photo(file))
        elif not path.exists() and glob.has_magic(str(path)):
            there = map(Path, sorted(glob.glob(str(path), recursive=True)))  # noqa: PTH207
            chosen = [file for file in there if is_photo(file) or (path.suffix and file.suffix == path.suffix)]
        for file in chosen:
            if file != path and (file.name in (RECORD, RESULTS) or is_ours(file)):
                ours.append(file)
            else:
                found += read_lines(file) if file.suffix == ".jsonl" else [Item("", file, error=unusable(file))]
    if ours:
        about = f"{len(ours)} files that this tool wrote are left out of the list, such as {shown(ours[0])}"
        warnings.warn(about, ExplanationWarning, stacklevel=2)
    if not found:
        raise ValueError(f"{', '.join(map(str, paths))}: no photo ({', '.join(SUFFIXES)}) is there")
    if all(item.error for item in found):
        raise ValueError(f"{found[0].error} ({len(found)} such entries, and no good one)")
    return named(found)


def is_photo(path: Path) -> bool:
    """Whether it counts as one where no file is named; hidden files do not."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def shown(text) -> str:
    """A path or message in one line, no longer than can be read, that can be written in any encoding of Unicode."""
    line = " ".join(str(text).encode(errors="backslashreplace").decode().replace("\0", "\\x00").split())
    return line if len(line) <= 400 else f"{line[:200]} ... {line[-200:]}"


def unusable(path: Path) -> str:
    """Why a path can be no regular file; nothing for one that is not there, which is told when it is opened."""
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as exc:  # too long, say, not permitted, or with a NUL in it
        return f"{shown(path)} is not a usable path: {getattr(exc, 'strerror', None) or exc}"
    return "" if regular else f"{shown(path)} is a folder, a pipe or a device"


def read_lines(path: Path, needed: tuple[str, ...] = ("image",), example: str = EXAMPLE) -> list[Item]:
    """The items of a list, named by their photos' paths there, with an `error` where a line is wrong.

    `needed` are the texts that a line must have. Raises ValueError for a list that cannot be read, or has no line.
    """
    items, number = [], 0
    if why := unusable(path):
        raise ValueError(why)
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > LARGEST:
                raise ValueError(f"{path} has {size >> 20} MB: lists of up to {LARGEST >> 20} MB are read")
            while line := file.readline(LONGEST):
                rest, number = line, number + 1
                while len(rest) == LONGEST and not rest.endswith(b"\n"):
                    rest = file.readline(LONGEST)
                where = f"{path}, line {number}"
                if line.removeprefix(BOM_UTF8).strip():
                    try:
                        items.append(read_line(line.removeprefix(BOM_UTF8), path.parent, where, needed))
                    except (ValueError, RecursionError) as exc:
                        items.append(Item("", Path(), where=where, error=f"{where} {shown(exc)}: give {example}"))
    except OSError as exc:
        raise ValueError(f"{path} cannot be read: {exc}") from exc
    if not items:
        raise ValueError(f"{path} is empty: give lines such as {example}")
    return items


def read_line(line: bytes, folder: Path, where: str, needed: tuple[str, ...]) -> Item:
    """The item of a line. Raises ValueError that continues "list.jsonl, line 3"."""
    try:
        if len(line) == LONGEST:
            raise ValueError(f"longer than {LONGEST} bytes")
        record = json.loads(line.decode(), object_pairs_hook=unique)
        if depth(record) > DEEPEST:
            raise ValueError(f"nested deeper than {DEEPEST}")
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"is no JSON ({exc})") from exc
    if not isinstance(record, dict):
        raise ValueError("is no record")
    for name in ("image", *TEXTS):
        text = record.get(name)
        if (text is not None or name in needed) and (not isinstance(text, str) or not text.strip()):
            raise ValueError(f"has no text for {name!r}")
        if name != "image" and re.search("[\0\ud800-\udfff]", text or ""):  # the name of a file may be any bytes
            raise ValueError(f"has characters for {name!r} that are no text")
    given = {name: record[name] for name in OBJECTS if record.get(name) is not None}
    if len(given) > 1:
        raise ValueError(f"has {' and '.join(given)} where one of {', '.join(OBJECTS)} can be")
    if "mask" in given:
        if not isinstance(given["mask"], str):
            raise ValueError("has a mask that is no path")
        given["mask"] = str(folder / given["mask"])
    image = folder / record["image"]
    for path in (image, Path(given.get("mask", image))):
        if why := unusable(path):
            raise ValueError(f"cannot be explained: {why}")
    return Item(record["image"], image, *map(record.get, TEXTS), given, where)


def unique(pairs: list[tuple]) -> dict:
    """A record for json.loads, which would take the last of two values of one name."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return dict(pairs)


def depth(value) -> int:
    """How deep a value of JSON is nested."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if values is None else 1 + max(map(depth, values), default=0)


def read_answers(path: Path) -> list[Item]:
    """The questions of --answers. Raises ValueError saying where the list is wrong."""
    items = read_lines(path, ("image", "prompt", "answer"), ANSWER)
    if errors := [item.error for item in items if item.error]:
        raise ValueError(errors[0])
    return items


def named(items: list[Item]) -> list[Item]:
    """The items with the names of their photos, and a mark of what is asked where a name cannot stand alone.

    That is where photos have equal names (in any case, as some disks know none), or a name is one of a file of the
    list's own, leads out of its folder, or is too long. An item that is there twice gets an error.
    """
    stems, found, names = Counter(item.image.stem.casefold() for item in items), [], {}
    for item in items:
        if not item.error:
            stem = item.image.stem
            asked = {name: str(value) for name, value in asdict(item).items() if name not in ("name", "where", "error")}
            mark = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
            alone = stems[stem.casefold()] == 1 and not stem.startswith(".") and Path(stem).suffix not in OWN_SUFFIXES
            if not alone or len(os.fsencode(stem)) > LONGEST_NAME:
                short = os.fsencode(stem.strip("."))[:LONGEST_NAME].decode(errors="ignore")
                stem = f"{short or 'photo'}_{mark}"
            if stem in names:
                again, first = (one.where or one.image for one in (item, names[stem]))
                twice = f"{again} is there twice: the same photo, asked the same, as {first}"
                item = replace(item, name="", error=twice)
            else:
                item = names[stem] = replace(item, name=stem)
        found.append(item)
    return found


# what is done


def texts_of(item: Item) -> dict:
    """What the item itself asks."""
    return {name: getattr(item, name) for name in TEXTS}


def digest(path: Path) -> str:
    """Of a file's content; of one that cannot be read, nothing: it is told when its turn comes."""
    state = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while block := file.read(2**20):
                state.update(block)
    except (OSError, ValueError):
        return ""
    return state.hexdigest()


def key_of(item: Item, settings: dict) -> str:
    """Tells items apart whose results would differ: by content of photo and mask, what is asked, and the settings."""
    given = digest(Path(item.object["mask"])) if "mask" in item.object else item.object
    asked = texts_of(item) | {"object": given, "photo": digest(item.image), "settings": settings}
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()


def read_result(folder: Path) -> dict:
    """The record of a folder; an empty one if there is none, or none of ours, or it is damaged."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(record, dict) or not isinstance(record.get("key"), str):
        return {}
    return record if all(isinstance(record.get(name, {}), dict) for name in ("settings", "asked", "sizes")) else {}


def whole_record(folder: Path, key: str) -> dict | None:
    """The record of a folder whose files are all there, and of this key."""
    record = read_result(folder)
    try:
        there = all((folder / name).stat().st_size == size for name, size in record["sizes"].items())
        return record if there and record["key"] == key else None
    except (OSError, ValueError, KeyError):  # none, or files are missing
        return None


def check_others(items: list[Item], folder: Path, keys: dict[str, str], settings: dict) -> None:
    """Raises ValueError, naming it and what differs, if the folder holds a result of anything but these items."""
    known, settings = {item.name: item for item in items}, json.loads(json.dumps(settings, default=str))
    for part in sorted(path.parent for path in folder.glob(f"*/{RECORD}")):
        record, item, why = read_result(part), known.get(part.name), "of a photo that is not in this list"
        if not record or record["key"] in (keys.values() if item is None else [keys[part.name]]):
            continue  # one without an item of its name was alone with that name when it was made
        if item is not None:
            if not item.image.is_file():
                continue  # it fails when its turn comes, and replaces nothing
            old, new = record.get("settings", settings), settings
            if old == new:
                old, new = record.get("asked", {}), texts_of(item)
            differ = next((name for name in {**new, **old} if new.get(name) != old.get(name)), None)
            why = f"of --{differ} {old.get(differ)!r}, and now it is {new.get(differ)!r}"
            why = why if differ else "of another photo or object of this name"
        raise ValueError(f"{shown(part)} holds a result {shown(why)}: choose another --output_dir, or --overwrite it")


def plan(items: list[Item], folder: Path, settings: dict, overwrite: bool) -> tuple[dict[str, str], list[Item]]:
    """({name: key} of all items, those whose results are not complete). Raises what `check_others` raises."""
    for item in items:
        if any((folder / item.name).glob(f"{STAGING}*")):
            with suppress(ValueError, OSError), output_folder(folder / item.name):
                pass  # what a killed run left is finished or removed; what prevents it is told in the item's turn
    keys = {item.name: key_of(item, settings) for item in items}
    if not overwrite:
        check_others(items, folder, keys, settings)
    todo = [item for item in items if overwrite or whole_record(folder / item.name, keys[item.name]) is None]
    return keys, todo


# working it off


def work_off(
    items: list[Item], folder: Path, settings: dict, processes: Processes, load: Callable, explain: Callable,
    *, reason_of: Callable, subfolders=(), overwrite=False, quiet=False, tell: Callable = print, inputs=(),
) -> tuple[list[dict], int]:  # fmt: skip
    """Explain what is not complete; returns (records of all items, in order, how many were complete already).

    `load(item)` is called in a thread ahead of time; `explain(item, loaded)` gives (record, {file name: content}) and
    may raise. A photo that fails has a record {"name", "image", "error"}; `reason_of` an exception goes there and, in a
    line, to `tell`. results.jsonl is written at the end, if it is a Ctrl-C, too. An item's files and its record appear
    together: what it had before is complete until then. Raises OSError where the disk is full, ValueError before
    anything is computed if one of the items' files, or of the `inputs`, lies where this run writes, or if the folder
    holds results of anything else and not `overwrite`, and what `output_folder` raises.
    """
    good, failed, start = [item for item in items if not item.error], {}, time.time()
    inputs = [*inputs, *(item.image for item in good), *(item.object.get("mask") for item in good)]
    written = [folder / item.name / part for item in good for part in ("", *subfolders)]
    alone = output_folder(folder, name="--output_dir", inputs=inputs)
    with alone if processes.first else nullcontext(lambda files: None) as write:
        if processes.first:
            check_inputs(written, inputs, "--output_dir")
        keys, todo = processes.agreed(plan(good, folder, settings, overwrite) if processes.first else None)

        def record_of(item):
            if item.error:
                return failed_record(item, item.error)
            return failed.get(item.name) or whole_record(folder / item.name, keys[item.name])

        def records():
            return [{k: v for k, v in record.items() if k != "sizes"} for record in map(record_of, items) if record]

        def is_done(item):
            path = folder / item.name / RECORD
            return path.exists() and path.stat().st_mtime >= start

        for item in items if processes.first else ():
            if item.error:
                tell(shown(item.error))
        try:
            with progress_bar(todo, is_done, quiet or not processes.first):
                for item, loaded in prefetched(processes.share(todo), load):
                    try:
                        with output_folder(folder / item.name, subfolders, "--output_dir") as write_item:
                            record, files = explain(item, loaded())
                            record |= {"settings": settings, "asked": texts_of(item)}
                            record |= {"key": keys[item.name], "files": list(files)}
                            write_item(
                                files, last=(RECORD, lambda sizes, own=record: to_json(own | {"sizes": sizes}, 1))
                            )
                    except Exception as exc:
                        if disk_full(exc):
                            raise OSError(str(exc)) from exc
                        failed[item.name] = failed_record(item, reason_of(exc))
                        old = (folder / item.name / RECORD).exists()
                        earlier = f" (beware: {folder / item.name} holds what was asked of it earlier)" if old else ""
                        tell(shown(f"{item.where or item.image}: {reason_of(exc)}{earlier}"))
            failed |= processes.gathered(failed)
        finally:
            write({RESULTS: "".join(map(to_json, records()))})
        return records(), len(good) - len(todo)


def failed_record(item: Item, reason: str) -> dict:
    return {"name": item.name, "image": str(item.image) if item.image.name else "", "error": reason}


def to_json(record: dict, indent: int | None = None) -> str:
    """A line of JSON; what is no text, as in names of files that are not UTF-8, is escaped."""
    text = json.dumps(record, ensure_ascii=False, indent=indent)
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


# the command line


def asked_of(args: argparse.Namespace, item: Item) -> argparse.Namespace:
    """The flags as they are for an item of a list. Raises ValueError for what it asks and the mode cannot do."""
    own = {name: getattr(item, name) for name in TEXTS}
    acting = {name for name in own if args.mode in MODES_OF_FLAG.get(f"--{name}", FOLDERS)}
    own = {name: own[name] for name in acting if own[name] is not None}  # a list serves modes without targets, too
    asked = argparse.Namespace(**vars(args) | own | {"image_path": str(item.image), "photos": [str(item.image)]})
    if asked.contrast is not None and asked.target is None:
        raise ValueError(f"a contrast {asked.contrast!r} needs a target, whose place it takes")
    return asked


def tables_of(files: dict[str, object]) -> dict:
    """What of a photo's files goes into its record: words with their probabilities, rows of tables."""
    tables = {name: files[name] for name in files if name.endswith(".csv")}
    found = {"measures": {name: list(csv.DictReader(io.StringIO(text))) for name, text in tables.items()}}
    if "words.json" in files:
        found["words"] = json.loads(files["words.json"])["words"]
    return found


def run_list(
    args: argparse.Namespace, explain: Callable, about: dict, *, reason_of: Callable, subfolders=(),
    summary: Callable | None = None,
) -> tuple[dict, list[Path], list[str], int]:  # fmt: skip
    """Explain each photo of a list in a folder of its own; complete results are skipped.

    `explain(flags, item, photo, device)` gives (reading, {file name: content}, lines to be said), the device being that
    of its process; `about` is {"model": what tells it from others, "versions"}; `summary` of all records gives {file
    name: content} and lines. Returns ({}, paths, lines, exit code).
    """
    try:
        items = read_list(args.photos)
    except ValueError as exc:
        raise ValueError(f"--image_path: {exc}") from exc
    processes = Processes(cpu=args.device == "cpu" or not torch.cuda.is_available())
    settings = {name: value for name, value in vars(args).items() if name not in NO_MATTER}
    settings["model_path"] = about["model"]

    def explain_item(item, photo):
        start = time.monotonic()
        reading, files, lines = explain(asked_of(args, item), item, photo, processes.device)
        record = {"name": item.name, "image": str(item.image), "model": args.model_path}
        record |= {"prompt": reading.prompt, "answer": reading.answer, "mode": args.mode, "said": lines}
        record |= {"seconds": round(time.monotonic() - start, 3), "versions": about["versions"]}
        return record | tables_of(files), files

    folder, start = Path(args.output_dir, FOLDERS[args.mode]), time.monotonic()
    quiet, args.quiet = args.quiet, True  # one bar for all
    records, before = work_off(
        items, folder, settings, processes, lambda item: load_photo(str(item.image)), explain_item,
        subfolders=subfolders, overwrite=args.overwrite, quiet=quiet, reason_of=reason_of,
        inputs=[args.model_path, *args.photos],
        tell=lambda line: say(f"test_gradcam.py: {line}", sys.stderr),
    )  # fmt: skip
    if not processes.first:
        return {}, [], [], 0
    failed = [record for record in records if "error" in record]
    now = len(records) - len(failed) - before
    lines = [f"{len(items)} photos: {now} explained in {time.monotonic() - start:.0f} s, {before} skipped as complete"]
    lines[0] += f", {len(failed)} failed: see {RESULTS}" if failed else ""
    left_out = sum(any(line.startswith("left out: ") for line in record.get("said", ())) for record in records)
    lines += [f"{left_out} left out: the model does not say the target"] if left_out else []
    done = [(folder / record["name"], [*record["files"], RECORD]) for record in records if "error" not in record]
    if others := [path for part, names in done for path in other_files([part / name for name in names])]:
        lines.append(f"beware: beside these results stand {len(others)} files of other runs, such as {others[0]}")
    paths = [(folder / RESULTS).resolve()]
    if summary is not None:
        tables, said = summary(records)
        paths, lines = paths + write_files(folder, tables), lines + said
    return {}, paths, lines, 1 if failed else 0
