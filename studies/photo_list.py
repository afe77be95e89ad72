"""A list of photos: its items, which of them are complete, and their results.

    folder, glob, list.jsonl        read_list: Items, each with the name of its folder
      -> those not complete yet     plan: the same settings and the same photo, by content, are not computed again
      -> a folder and record each   work_off: shared among processes; a bad photo is reported, and the others go on
      -> results.jsonl              all records, in the list's order

What is done with a photo is a function that the caller gives: nothing here knows a model.
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
from common.inputs import check_inputs, open_regular, parse_json
from common.messages import check_messages, paths_of
from common.photos import load_photo
from common.processes import Processes, prefetched, progress_bar
from common.terminal import plain, say
from smooth_gradcam import ExplanationWarning
from studies.answers import task_of

__all__ = [
    *("Item", "OBJECTS", "TEXTS", "digest", "key_of", "named", "plan", "read_lines", "read_list", "run_list"),
    "work_off",
]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".mpo", ".ppm")  # in a folder
TEXTS = ("prompt", "answer", "target", "contrast")
OBJECTS = ("mask", "box", "segmentation")
MAX_LIST, MAX_LINE, MAX_NAME = 2**30, 2**24, 200  # bytes of a list, of a line in it, and of a folder's name
READABLE = 400  # characters of a message
EXAMPLE = '{"image": "a.jpg", "prompt": "What is here?", "target": "dog", "box": [10, 20, 80, 60]}'
UNNAMED = ("name", "truth", "source", "error")  # what an item's folder is not named by
RECORD, RESULTS = "result.json", "results.jsonl"
OWN_SUFFIXES = (".jsonl", ".csv", ".tex")  # of files beside the folders
NEUTRAL = ("output_dir", "quiet", "verbose", "overwrite", "image_path", "photos", "listed", "device", "batch_size")
NEUTRAL += ("recompute",)  # flags that do not change results, beyond rounding
NEUTRAL += ("messages", "messages_file")  # or are the items' own
NEUTRAL += ("together", "video", "fps", "source")  # that no list takes


# reading a list


@dataclass(frozen=True)
class Item:
    """A photo of a list, and what is asked about it; None stands for the flags' value."""

    name: str  # of its folder
    image: Path
    prompt: str | None = None
    answer: str | None = None
    target: str | None = None
    contrast: str | None = None
    object: dict = field(default_factory=dict)  # that is explained: {"mask" | "box" | "segmentation": ...}
    messages: list | None = None  # a conversation in the place of the prompt, see common/messages.py
    truth: dict = field(default_factory=dict)  # of a question, see studies/answers.py; its task
    source: str = ""  # list and line
    error: str = ""  # why it cannot be explained


def read_list(paths: Iterable[str]) -> list[Item]:
    """The items of photos, folders, globs and lists, in this order; those of folders and globs are sorted by name.

    A line is {"image", "prompt"? | "messages"?, "answer"?, "target"?, "contrast"?, "mask"? | "box"? | "segmentation"?},
    such as `EXAMPLE`, with paths relative to the list; see `object_mask` of common/photos.py. Other keys are ignored. A
    line with a fault is an item with an `error` that names file and line. What this tool wrote is left out of folders
    and globs, with a warning. Raises ValueError if a list cannot be read, or if no item is without error.
    """
    items, ours = [], []
    for path in map(Path, paths):
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if _is_photo(file))
        elif not path.exists() and glob.has_magic(str(path)):
            files = map(Path, sorted(glob.glob(str(path), recursive=True)))  # noqa: PTH207
            files = [file for file in files if _is_photo(file) or (path.suffix and file.suffix == path.suffix)]
        for file in files:
            if file != path and (file.name in (RECORD, RESULTS) or is_ours(file)):
                ours.append(file)
            else:
                items += read_lines(file) if file.suffix == ".jsonl" else [Item("", file, error=_unusable(file))]
    if ours:
        message = f"{len(ours)} files that this tool wrote are left out of the list, such as {plain(ours[0], READABLE)}"
        warnings.warn(message, ExplanationWarning, stacklevel=2)
    if not items:
        raise ValueError(f"{', '.join(map(str, paths))}: there is no photo ({', '.join(SUFFIXES)})")
    if all(item.error for item in items):
        raise ValueError(f"{items[0].error} ({len(items)} such entries, and no good one)")
    return named(items)


def _is_photo(path: Path) -> bool:
    """Whether a file of a folder or a glob counts as a photo; hidden files do not."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _unusable(path: Path) -> str:
    """Why a path cannot be a regular file; empty if it can, or if nothing is there, which is reported later."""
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as exc:  # such as a path that is too long, not permitted, or has a NUL in it
        return f"{plain(path, READABLE)} is not a usable path: {getattr(exc, 'strerror', None) or exc}"
    return "" if regular else f"{plain(path, READABLE)} is a folder, a pipe or a device"


def read_lines(
    path: Path, needed: tuple[str, ...] = ("image",), example: str = EXAMPLE, truth_of: Callable = task_of
) -> list[Item]:
    """The items of a list, named by their photos' paths there, with an `error` where a line has a fault.

    `needed` are the texts that a line must have; `truth_of(record)` is the item's truth, or raises ValueError. Raises
    ValueError for a list that cannot be read, or is empty.
    """
    items, number = [], 0
    if reason := _unusable(path):
        raise ValueError(reason)
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_LIST:
                raise ValueError(f"{path} has {size >> 20} MB: lists of up to {MAX_LIST >> 20} MB are read")
            while line := file.readline(MAX_LINE):
                rest, number = line, number + 1
                while len(rest) == MAX_LINE and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_LINE)
                source = f"{path}, line {number}"
                if line.removeprefix(BOM_UTF8).strip():
                    try:
                        items.append(_read_line(line.removeprefix(BOM_UTF8), path.parent, source, needed, truth_of))
                    except (ValueError, RecursionError) as exc:
                        error = f"{source} {plain(exc, READABLE)}: give {example}"
                        items.append(Item("", Path(), source=source, error=error))
    except OSError as exc:
        raise ValueError(f"{path} cannot be read: {exc}") from exc
    if not items:
        raise ValueError(f"{path} is empty: give lines such as {example}")
    return items


def _read_line(line: bytes, folder: Path, source: str, needed: tuple[str, ...], truth_of: Callable) -> Item:
    """The item of a line. Raises ValueError that continues "list.jsonl, line 3"."""
    if len(line) == MAX_LINE:
        raise ValueError(f"is not valid JSON (longer than {MAX_LINE} bytes)")
    record = parse_json(line)
    if not isinstance(record, dict):
        raise ValueError("is not a JSON object")
    for name in ("image", *TEXTS):
        text = record.get(name)
        missing = name in needed and not (name == "prompt" and "messages" in record)
        if (text is not None or missing) and (not isinstance(text, str) or not text.strip()):
            raise ValueError(f"has no text for {name!r}")
        if name != "image" and re.search("[\0\ud800-\udfff]", text or ""):  # a file name may have any bytes
            raise ValueError(f"has characters for {name!r} that are not text")
    objects = {name: record[name] for name in OBJECTS if record.get(name) is not None}
    if len(objects) > 1:
        raise ValueError(f"has {' and '.join(objects)} where only one of {', '.join(OBJECTS)} is allowed")
    if "mask" in objects:
        if not isinstance(objects["mask"], str):
            raise ValueError("has a mask that is not a path")
        objects["mask"] = str(folder / objects["mask"])
    image = folder / record["image"]
    for path in (image, Path(objects.get("mask", image))):
        if reason := _unusable(path):
            raise ValueError(f"cannot be explained: {reason}")
    messages = record.get("messages")
    if messages is not None:
        if record.get("prompt") is not None:
            raise ValueError("has a prompt beside its messages")
        try:
            check_messages(messages, folder)
        except ValueError as exc:
            raise ValueError(f"has messages that cannot be read: {exc}") from exc
    return Item(record["image"], image, *map(record.get, TEXTS), objects, messages, truth_of(record), source)


def named(items: list[Item]) -> list[Item]:
    """The items with the names of their photos, followed by a hash of photo and question where that is not enough.

    This is so where photos share a name (in any letter case, as some disks ignore it), or the name is too long, starts
    with a dot or ends as a file of the list's own. An item that occurs twice gets an error.
    """
    stems, result, names = Counter(item.image.stem.casefold() for item in items), [], {}
    for item in items:
        if not item.error:
            stem = item.image.stem
            values = {name: str(v) for name, v in asdict(item).items() if name not in UNNAMED}
            mark = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]
            alone = stems[stem.casefold()] == 1 and not stem.startswith(".") and Path(stem).suffix not in OWN_SUFFIXES
            if not alone or len(os.fsencode(stem)) > MAX_NAME:
                short = os.fsencode(stem.strip("."))[:MAX_NAME].decode(errors="ignore")
                stem = f"{short or 'photo'}_{mark}"
            if stem in names:
                again, first = (one.source or one.image for one in (item, names[stem]))
                item = replace(item, name="", error=f"{again} repeats {first}: the same photo with the same question")
            else:
                item = names[stem] = replace(item, name=stem)
        result.append(item)
    return result


# which items are complete


def _texts_of(item: Item) -> dict:
    """What the item itself asks, {"prompt": ..., ...}."""
    own = {name: getattr(item, name) for name in TEXTS}
    return own if item.messages is None else own | {"messages": item.messages}


def digest(path: Path) -> str:
    """The hash of a file's content; empty if it cannot be read, which is reported in the item's turn."""
    state = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while block := file.read(2**20):
                state.update(block)
    except (OSError, ValueError):
        return ""
    return state.hexdigest()


def key_of(item: Item, settings: dict) -> str:
    """A hash that differs where results would: of the contents of photo and mask, what is asked, and the settings."""
    explained = digest(Path(item.object["mask"])) if "mask" in item.object else item.object
    record = _texts_of(item) | {"object": explained, "photo": digest(item.image), "settings": settings}
    record |= {"pictures": [digest(Path(path)) for path in paths_of(item.messages)]} if item.messages else {}
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()


def _read_result(folder: Path) -> dict:
    """The record in a folder; empty if there is none, or it is damaged or not ours."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    sound = isinstance(record, dict) and isinstance(record.get("key"), str)
    return record if sound and all(isinstance(record.get(k, {}), dict) for k in ("settings", "asked", "sizes")) else {}


def _whole_record(folder: Path, key: str) -> dict | None:
    """The record in a folder if it has this key and its files are complete."""
    record = _read_result(folder)
    try:
        complete = all((folder / name).stat().st_size == size for name, size in record["sizes"].items())
        return record if complete and record["key"] == key else None
    except (OSError, ValueError, KeyError):  # no record, or files are missing
        return None


def _check_others(items: list[Item], folder: Path, keys: dict[str, str], settings: dict) -> None:
    """Raises ValueError, naming a result and what differs, if the folder has results of anything but these items."""
    known, settings = {item.name: item for item in items}, json.loads(json.dumps(settings, default=str))
    for path in sorted(file.parent for file in folder.glob(f"*/{RECORD}")):
        record, item, reason = _read_result(path), known.get(path.name), "of a photo that is not in this list"
        if not record or record["key"] in (keys.values() if item is None else [keys[path.name]]):
            continue  # a result may have another name if its photo was alone with that name in an earlier list
        if item is not None:
            if not item.image.is_file():
                continue  # it fails in its turn, and replaces nothing
            old, new = record.get("settings", settings), settings
            if old == new:
                old, new = record.get("asked", {}), _texts_of(item)
            differ = next((name for name in {**new, **old} if new.get(name) != old.get(name)), None)
            reason = f"of --{differ} {old.get(differ)!r}, and now it is {new.get(differ)!r}"
            reason = reason if differ else "of another photo or object of this name"
        about = f"{plain(path, READABLE)} holds a result {plain(reason, READABLE)}"
        raise ValueError(f"{about}: choose another --output_dir, or --overwrite it")


def plan(items: list[Item], folder: Path, settings: dict, overwrite: bool) -> tuple[dict[str, str], list[Item]]:
    """({name: key} of all items, the items whose results are not complete). Raises what `_check_others` raises."""
    for item in items:
        if any((folder / item.name).glob(f"{STAGING}*")):
            with suppress(ValueError, OSError), output_folder(folder / item.name):
                pass  # finishes or removes what a killed run left; errors are reported in the item's turn
    keys = {item.name: key_of(item, settings) for item in items}
    if not overwrite:
        _check_others(items, folder, keys, settings)
    return keys, [item for item in items if overwrite or _whole_record(folder / item.name, keys[item.name]) is None]


# explaining the items


def work_off(
    items: list[Item], folder: Path, settings: dict, processes: Processes, load: Callable, explain: Callable,
    *, reason_of: Callable, subfolders=(), overwrite=False, quiet=False, report: Callable = print, inputs=(),
) -> tuple[list[dict], int]:  # fmt: skip
    """Explain the items that are not complete; returns (records of all items, in order, how many were complete before).

    `load(item)` runs ahead of time in a thread; `explain(item, loaded)` returns (record, {file name: content}). If one
    of them raises, the record is {"name", "image", "error": `reason_of(exception)`}, and a line goes to `report`. An
    item's files and record appear together. results.jsonl is written at the end, even after Ctrl-C.

    Raises OSError if the disk is full, what `output_folder` raises and, before anything is computed, ValueError if an
    item's file or one of the `inputs` lies where this run writes or, without `overwrite`, a result is of anything else.
    """
    good, failed, start = [item for item in items if not item.error], {}, time.time()
    inputs = [*inputs, *(item.image for item in good), *(item.object.get("mask") for item in good)]
    inputs += [path for item in good for path in paths_of(item.messages)]
    own_folder = output_folder(folder, name="--output_dir", inputs=inputs)
    with own_folder if processes.first else nullcontext(lambda files: None) as write:
        if processes.first:
            written = [folder / item.name / subfolder for item in good for subfolder in ("", *subfolders)]
            check_inputs(written, inputs, "--output_dir")
        keys, todo = processes.agreed(plan(good, folder, settings, overwrite) if processes.first else None)

        def record_of(item):
            if item.error:
                return _failed_record(item, item.error)
            return failed.get(item.name) or _whole_record(folder / item.name, keys[item.name])

        def records():
            return [{k: v for k, v in record.items() if k != "sizes"} for record in map(record_of, items) if record]

        def is_done(item):
            path = folder / item.name / RECORD
            return path.exists() and path.stat().st_mtime >= start

        for error in [item.error for item in items if item.error and processes.first]:
            report(plain(error, READABLE))
        try:
            with progress_bar(todo, is_done, quiet or not processes.first):
                for item, loaded in prefetched(processes.share(todo), load):
                    try:
                        with output_folder(folder / item.name, subfolders, "--output_dir") as write_item:
                            record, files = explain(item, loaded())
                            record |= {"settings": settings, "asked": _texts_of(item), "key": keys[item.name]}
                            record |= {"files": list(files)}
                            last = RECORD, lambda sizes, own=record: _to_json(own | {"sizes": sizes}, 1)
                            write_item(files, last=last)
                    except Exception as exc:
                        if disk_full(exc):
                            raise OSError(str(exc)) from exc
                        failed[item.name] = _failed_record(item, reason_of(exc))
                        old = (folder / item.name / RECORD).exists()
                        note = f" (note: {folder / item.name} has the result of an earlier run)" if old else ""
                        report(plain(f"{item.source or item.image}: {reason_of(exc)}{note}", READABLE))
            failed |= processes.gathered(failed)
        finally:
            write({RESULTS: "".join(map(_to_json, records()))})
        return records(), len(good) - len(todo)


def _to_json(record: dict, indent: int | None = None) -> str:
    """The record as JSON, in one line without `indent`; `encode` escapes file names that are not UTF-8."""
    return json.dumps(record, ensure_ascii=False, indent=indent) + "\n"


def _failed_record(item: Item, reason: str) -> dict:
    return {"name": item.name, "image": str(item.image) if item.image.name else "", "error": reason}


def _flags_for(args: argparse.Namespace, item: Item) -> argparse.Namespace:
    """The flags with what the item asks. Raises ValueError for a contrast without a target."""
    own = {name: value for name, value in _texts_of(item).items() if value is not None}
    own = {name: text for name, text in own.items() if args.mode in MODES_OF_FLAG.get(f"--{name}", FOLDERS)}
    flags = argparse.Namespace(**vars(args) | own | {"image_path": str(item.image), "photos": [str(item.image)]})
    if flags.contrast is not None and flags.target is None:
        raise ValueError(f"a contrast {flags.contrast!r} needs a target, whose place it takes")
    return flags


def _tables_of(files: dict[str, object]) -> dict:
    """The tables among a photo's files, for its record: rows of measures, and words with their probabilities."""
    texts = {name: files[name] for name in files if name.endswith(".csv")}
    tables = {"measures": {name: list(csv.DictReader(io.StringIO(text))) for name, text in texts.items()}}
    if "words.json" in files:
        tables["words"] = json.loads(files["words.json"])["words"]
    return tables


def run_list(
    args: argparse.Namespace, explain: Callable, about: dict, *, reason_of: Callable, subfolders=(),
    summary: Callable | None = None,
) -> tuple[dict, list[Path], list[str], int]:  # fmt: skip
    """Explain each photo of a list in a folder of its own; complete results are skipped.

    `explain(flags, item, photo, device)` returns (reading, {file name: content}, lines, evidence or []) on its
    process's device; `about` is {"model": `model_identity`, "versions": ...}; `summary(records)` returns ({file name:
    content}, lines). `reason_of` and `subfolders` are those of `work_off`. Returns ({}, paths, lines, exit code).
    """
    try:
        items = read_list(args.photos)
    except ValueError as exc:
        raise ValueError(f"--image_path: {exc}") from exc
    if args.messages is not None:
        items = [item if item.messages or item.prompt else replace(item, messages=args.messages) for item in items]
    processes = Processes(cpu=args.device == "cpu" or not torch.cuda.is_available())
    settings = {name: value for name, value in vars(args).items() if name not in NEUTRAL}
    settings["model_path"] = about["model"]

    def explain_item(item, photo):
        start = time.monotonic()
        reading, files, lines, evidence = explain(_flags_for(args, item), item, photo, processes.device)
        record = {"name": item.name, "image": str(item.image), "model": args.model_path}
        record |= {"prompt": reading.prompt, "answer": reading.answer, "mode": args.mode, "said": lines}
        record |= {"seconds": round(time.monotonic() - start, 3), "versions": about["versions"]}
        record |= {"evidence": evidence[0].record} if evidence else {}
        return record | _tables_of(files), files

    folder, start = Path(args.output_dir, FOLDERS[args.mode]), time.monotonic()
    quiet, args.quiet = args.quiet, True  # one bar for all
    records, before = work_off(
        items, folder, settings, processes, lambda item: load_photo(str(item.image)), explain_item,
        subfolders=subfolders, overwrite=args.overwrite, quiet=quiet, reason_of=reason_of,
        inputs=[args.model_path, *args.photos, args.messages_file],
        report=lambda line: say(f"test_gradcam.py: {line}", sys.stderr),
    )  # fmt: skip
    if not processes.first:
        return {}, [], [], 0
    tasks = {item.name: item.truth for item in items if item.name}
    records = [record | tasks.get(record["name"], {}) for record in records]
    failed = [record for record in records if "error" in record]
    count, seconds = len(records) - len(failed) - before, time.monotonic() - start
    lines = [f"{len(items)} photos: {count} explained in {seconds:.0f} s, {before} skipped as complete"]
    lines[0] += f", {len(failed)} failed: see {RESULTS}" if failed else ""
    left_out = sum(any(line.startswith("left out: ") for line in record.get("said", ())) for record in records)
    lines += [f"{left_out} left out: the model does not say the target"] if left_out else []
    done = [(folder / record["name"], [*record["files"], RECORD]) for record in records if "error" not in record]
    if others := [path for own, names in done for path in other_files([own / name for name in names])]:
        lines.append(f"note: beside these results stand {len(others)} files of other runs, such as {others[0]}")
    paths = [(folder / RESULTS).resolve()]
    if summary is not None:
        tables, summary_lines = summary(records)
        paths, lines = paths + write_files(folder, tables), lines + summary_lines
    return {}, paths, lines, 1 if failed else 0
