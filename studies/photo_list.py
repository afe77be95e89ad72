"""A list of photos: what is in it, what of it is done, who does what, and what came out.

    folder, glob, list.jsonl        read_list: Items, each with the name of its folder
      -> those not whole yet        plan: the same settings and the same photo, by content, are not computed again
      -> a folder and record each   work_off: shared among processes; a bad photo is told, and the others go on
      -> results.jsonl              all records, in the list's order

What is done with a photo is a function that is given: nothing here knows a model.
"""

import argparse
import csv
import errno
import glob
import hashlib
import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from tqdm.auto import tqdm

from common.files import output_folder, write_files
from common.flags import FOLDERS, MODES_OF_FLAG
from common.photos import load_photo

__all__ = ["Item", "Processes", "plan", "read_answers", "read_list", "run_list", "work_off"]
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")  # what counts as a photo in a folder
TEXTS = ("prompt", "answer", "target", "contrast")
OBJECTS = ("mask", "box", "segmentation")
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


def read_list(paths: Iterable[str]) -> list[Item]:
    """The items of photos, folders, globs and lists, in this order; folders and globs by name.

    A line of a list is {"image", "prompt"?, "answer"?, "target"?, "contrast"?, "mask"? | "box"? | "segmentation"?},
    with paths relative to the list: `EXAMPLE`, see `object_mask` of faithfulness.py; what else it has is ignored.
    Raises ValueError naming file and line, or if there is no photo at all.
    """
    found = []
    for path in map(Path, paths):
        chosen = [path]
        if path.is_dir():
            chosen = sorted(file for file in path.iterdir() if is_photo(file))
        elif not path.exists() and glob.has_magic(str(path)):
            there = map(Path, sorted(glob.glob(str(path), recursive=True)))  # noqa: PTH207
            chosen = [file for file in there if is_photo(file) or (path.suffix and file.suffix == path.suffix)]
        for file in chosen:
            found += read_lines(file) if file.suffix == ".jsonl" else [Item("", file)]
    if not found:
        raise ValueError(f"{', '.join(map(str, paths))}: no photo ({', '.join(SUFFIXES)}) is there")
    return named(found)


def is_photo(path: Path) -> bool:
    """Whether it counts as one where no file is named; hidden files do not."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def read_records(path: Path, needed: tuple[str, ...], others: tuple[str, ...], example: str) -> Iterator[tuple]:
    """(where it stands, record) of each line of a .jsonl that is not blank; `needed` and `others` name its texts.

    Raises ValueError saying where it is wrong, and what would be valid.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, read_record(line, where, needed, others, example)
    except (OSError, UnicodeDecodeError) as exc:
        raise ValueError(f"{path} cannot be read: {exc}") from exc


def read_record(line: str, where: str, needed: tuple[str, ...], others: tuple[str, ...], example: str) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"{where} is no JSON ({exc}): give {example}") from exc
    if not isinstance(record, dict):
        raise ValueError(f"{where} is no record: give {example}")
    for name in (*needed, *others):
        text = record.get(name)
        if (text is not None or name in needed) and (not isinstance(text, str) or not text.strip()):
            raise ValueError(f"{where} has no text for {name!r}: give {example}")
    return record


def read_lines(path: Path) -> list[Item]:
    """The items of a list. Raises ValueError saying where it is wrong."""
    items = [read_item(record, path, where) for where, record in read_records(path, ("image",), TEXTS, EXAMPLE)]
    if not items:
        raise ValueError(f"{path} is empty: give lines such as {EXAMPLE}")
    return items


def read_item(record: dict, path: Path, where: str) -> Item:
    """The item of a line. Raises ValueError saying what would be valid."""
    given = {name: record[name] for name in OBJECTS if record.get(name) is not None}
    if len(given) > 1:
        raise ValueError(f"{where} has {' and '.join(given)}: give one of {', '.join(OBJECTS)}")
    if "mask" in given:
        if not isinstance(given["mask"], str):
            raise ValueError(f"{where} has a mask that is no path: give {EXAMPLE}")
        given = {"mask": str(path.parent / given["mask"])}
    return Item("", path.parent / record["image"], *(record.get(name) for name in TEXTS), given, where)


def read_answers(path: Path) -> list[Item]:
    """The questions of --answers, named as their lines name the photos. Raises ValueError saying where it is wrong."""
    items = [
        Item(record["image"], path.parent / record["image"], record["prompt"], record["answer"], where=where)
        for where, record in read_records(path, ("image", "prompt", "answer"), (), ANSWER)
    ]
    if not items:
        raise ValueError(f"{path} is empty: give lines of {ANSWER}")
    return items


def named(items: list[Item]) -> list[Item]:
    """The items with the names of their photos, and a mark of what is asked where a name cannot stand alone.

    That is where photos have equal names, or a name is one of a file of the list's own, or leads out of its folder.
    Raises ValueError for an item that is there twice.
    """
    stems, found = [item.image.stem for item in items], {}
    for item, stem in zip(items, stems, strict=True):
        asked = {name: str(value) for name, value in asdict(item).items() if name not in ("name", "where")}
        mark = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
        alone = stems.count(stem) == 1 and not stem.startswith(".") and Path(stem).suffix not in OWN_SUFFIXES
        name = stem if alone else f"{stem.strip('.') or 'photo'}_{mark}"
        if name in found:
            first, again = (one.where or one.image for one in (found[name], item))
            raise ValueError(f"{again} is there twice: the same photo, asked the same, as {first}")
        found[name] = Item(**{**vars(item), "name": name})
    return list(found.values())


# what is done


def digest(path: Path) -> str:
    """Of a file's content; of one that cannot be read, nothing: it is told when its turn comes."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def key_of(item: Item, settings: dict) -> str:
    """Tells items apart whose results would differ: by content of photo and mask, what is asked, and the settings."""
    asked = {name: getattr(item, name) for name in (*TEXTS, "object")}
    if "mask" in item.object:
        asked["object"] = digest(Path(item.object["mask"]))
    asked |= {"photo": digest(item.image), "settings": settings}
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()


def whole_record(folder: Path, key: str) -> dict | None:
    """The record of a folder whose files are all there, and of this key."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        there = all((folder / name).stat().st_size == size for name, size in record["sizes"].items())
        return record if there and record["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or it is damaged
        return None


def plan(items: list[Item], folder: Path, settings: dict, overwrite: bool) -> tuple[dict[str, str], list[Item]]:
    """({name: key} of all items, those whose results are not whole)."""
    keys = {item.name: key_of(item, settings) for item in items}
    todo = [item for item in items if overwrite or whole_record(folder / item.name, keys[item.name]) is None]
    return keys, todo


# who does what


class Processes:
    """The processes that share a list, started by accelerate or torchrun; one alone otherwise."""

    def __init__(self, cpu: bool):
        from accelerate import PartialState

        self.state = PartialState(cpu=cpu, timeout=timedelta(days=30))  # a process waits for the slowest

    @property
    def first(self) -> bool:
        return self.state.is_main_process

    @property
    def device(self) -> str:
        return str(self.state.device)

    def agreed(self, value):
        """The first process' value, in all of them."""
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0] if self.state.num_processes > 1 else value

    def share(self, todo: list) -> list:
        """This process' part."""
        return todo[self.state.process_index :: self.state.num_processes]

    def gathered(self, found: dict) -> dict:
        """What all processes found, once all have finished."""
        from accelerate.utils import gather_object

        if self.state.num_processes == 1:
            return found
        return {name: value for part in gather_object([found]) for name, value in part.items()}


def prefetched(items: Iterable, load: Callable) -> Iterator[tuple]:
    """(item, function that gives what `load` made of it, or raises): the next is loaded while one is worked on."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            loading = item, pool.submit(load, item)
            if waiting is not None:
                yield waiting[0], waiting[1].result
            waiting = loading
        if waiting is not None:
            yield waiting[0], waiting[1].result


@contextmanager
def progress_bar(todo: list[Item], folder: Path, keys: dict[str, str], quiet: bool):
    """A bar over what all processes have finished, with the time left; its position is read from the folders."""
    finished = threading.Event()
    with tqdm(total=len(todo), desc="photos", unit="photo", disable=True if quiet else None) as bar:

        def follow():
            rest = list(todo)
            while rest and not finished.wait(0.5):
                rest = [item for item in rest if not written(folder / item.name, keys[item.name])]
                bar.update(len(todo) - len(rest) - bar.n)

        thread = threading.Thread(target=follow, daemon=True)
        if not bar.disable:
            thread.start()
        try:
            yield
        finally:
            finished.set()
            if thread.ident:
                thread.join()


def written(folder: Path, key: str) -> bool:
    try:
        return key in (folder / RECORD).read_text(encoding="utf-8")
    except OSError:
        return False


def work_off(
    items: list[Item], folder: Path, settings: dict, processes: Processes, load: Callable, explain: Callable,
    *, reason_of: Callable, subfolders=(), overwrite=False, quiet=False, tell: Callable = print,
) -> tuple[list[dict], int]:  # fmt: skip
    """Explain what is not whole; returns (records of all items, in order, how many were whole already).

    `load(item)` is called in a thread ahead of time; `explain(item, loaded)` gives (record, {file name: content}) and
    may raise. A photo that fails has a record {"name", "image", "error"}; `reason_of` an exception goes there and, in a
    line, to `tell`. results.jsonl is written at the end, if it is a Ctrl-C, too. Files appear all at once, the record
    last: what a kill leaves behind has no record, and is computed again. Raises OSError where the disk is full, and
    what `output_folder` raises.
    """
    failed = {}
    with output_folder(folder, name="--output_dir") if processes.first else nothing_written() as write:
        keys, todo = processes.agreed(plan(items, folder, settings, overwrite) if processes.first else None)

        def records():
            found = (failed.get(item.name) or whole_record(folder / item.name, keys[item.name]) for item in items)
            return [{k: v for k, v in record.items() if k != "sizes"} for record in found if record is not None]

        try:
            with progress_bar(todo, folder, keys, quiet or not processes.first):
                for item, loaded in prefetched(processes.share(todo), load):
                    try:
                        with output_folder(folder / item.name, subfolders, "--output_dir") as write_item:
                            record, files = explain(item, loaded())
                            write_whole(write_item, folder / item.name, record | {"key": keys[item.name]}, files)
                    except Exception as exc:
                        if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
                            raise
                        reason = reason_of(exc)
                        failed[item.name] = {"name": item.name, "image": str(item.image), "error": reason}
                        old = (folder / item.name / RECORD).exists()
                        earlier = f" (beware: {folder / item.name} holds what was asked of it earlier)" if old else ""
                        tell(f"{item.where or item.image}: {reason}{earlier}")
            failed |= processes.gathered(failed)
        finally:
            write({RESULTS: "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records())})
        return records(), len(items) - len(todo)


@contextmanager
def nothing_written():
    """What other processes than the first have in place of a folder."""
    yield lambda files: None


def write_whole(write: Callable, folder: Path, record: dict, files: dict) -> None:
    """Write the files and, last of all, the record, which knows their names and sizes."""
    (folder / RECORD).unlink(missing_ok=True)  # from here on the folder is not whole
    write(files)
    record["files"] = list(files)
    record["sizes"] = {name: (folder / name).stat().st_size for name in record["files"]}
    write({RECORD: json.dumps(record, ensure_ascii=False, indent=1) + "\n"})


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
    args: argparse.Namespace, explain: Callable, device: str, about: dict, *, reason_of: Callable, subfolders=(),
    summary: Callable | None = None,
) -> tuple[dict, list[Path], list[str], int]:  # fmt: skip
    """Explain each photo of a list in a folder of its own; complete results are skipped.

    `explain(flags, item, photo, device)` gives (reading, {file name: content}, lines to be said); `device` may be auto.
    `about` is {"model": what tells it from others, "versions"}; `summary` of all records gives {file name: content}
    and lines. Returns ({}, paths, lines, exit code).
    """
    try:
        items = read_list(args.photos)
    except ValueError as exc:
        raise ValueError(f"--image_path: {exc}") from exc
    processes = Processes(cpu=args.device == "cpu" or not torch.cuda.is_available())
    device = processes.device if device == "auto" else device
    settings = {name: value for name, value in vars(args).items() if name not in NO_MATTER}
    settings["model_path"] = about["model"]

    def explain_item(item, photo):
        start = time.monotonic()
        reading, files, lines = explain(asked_of(args, item), item, photo, device)
        record = {"name": item.name, "image": str(item.image), "model": args.model_path}
        record |= {"prompt": reading.prompt, "answer": reading.answer, "mode": args.mode, "said": lines}
        record |= {"seconds": round(time.monotonic() - start, 3)} | tables_of(files)
        return record | {"settings": settings, "versions": about["versions"]}, files

    folder, start = Path(args.output_dir, FOLDERS[args.mode]), time.monotonic()
    quiet, args.quiet = args.quiet, True  # one bar for all
    records, before = work_off(
        items, folder, settings, processes, lambda item: load_photo(str(item.image)), explain_item,
        subfolders=subfolders, overwrite=args.overwrite, quiet=quiet, reason_of=reason_of,
        tell=lambda line: print(f"test_gradcam.py: {line}", file=sys.stderr, flush=True),
    )  # fmt: skip
    if not processes.first:
        return {}, [], [], 0
    failed = [record for record in records if "error" in record]
    now = len(records) - len(failed) - before
    lines = [f"{len(items)} photos: {now} explained in {time.monotonic() - start:.0f} s, {before} were whole already"]
    lines[0] += f", {len(failed)} failed: see {RESULTS}" if failed else ""
    left_out = sum(any(line.startswith("left out: ") for line in record.get("said", ())) for record in records)
    lines += [f"{left_out} left out: the model does not say the target"] if left_out else []
    paths = [(folder / RESULTS).resolve()]
    if summary is not None:
        tables, said = summary(records)
        paths, lines = paths + write_files(folder, tables), lines + said
    return {}, paths, lines, 1 if failed else 0
