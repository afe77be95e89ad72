"""A list of questions from a published data set: python studies/questions.py pope coco_pope_popular.json val2014/

Writes a .jsonl that --answers reads: a line for each question, {"image", "prompt", "task"?} and what is true of it, as
`studies/answers.py` scores it. The formats are those of the published files:

    pope        a line {"question_id", "image", "text", "label": "yes" or "no"} for each question
    scienceqa   {id: {"question", "choices", "answer": index, "hint", "image", "split", ...}}, problems.json;
                photos at PHOTOS/<split>/<id>/<image>; questions without a photo are left out
    textvqa     {"data": [{"question_id", "question", "image_id", "answers": ten texts}, ...]}; the photo is
                PHOTOS/<image_id>.jpg
    coco        instances_....json of COCO: the objects that are there, for captions and CHAIR
"""

import argparse
import json
import os
import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from string import ascii_uppercase

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common.flags import OneLineParser  # noqa: E402
from common.inputs import open_regular, parse_json  # noqa: E402
from common.terminal import plain, say  # noqa: E402
from studies.answers import truth_of  # noqa: E402
from studies.chair import mentions, read_names  # noqa: E402
from studies.photo_list import Item, read_lines  # noqa: E402

__all__ = ["FORMATS", "main", "read_questions"]

EXAMPLE = '{"image": "a.jpg", "prompt": "Is there a dog?", "answer": "Yes"}'
SUFFIXES = {  # what is appended to the question, as LLaVA-1.5 is evaluated; of POPE nothing, as published
    "pope": "",
    "scienceqa": "\nAnswer with the option's letter from the given choices directly.",
    "textvqa": "\nAnswer the question using a single word or phrase.",
    "coco": "",
}
CAPTION = "Please describe this image in detail."
READABLE = 200  # characters of a value in an error


def read_questions(path: Path) -> list[Item]:
    """The items of --answers with their truth. Raises ValueError that names the first line with a fault."""
    items = read_lines(path, ("image", "prompt"), EXAMPLE, truth_of)
    if errors := [item.error for item in items if item.error]:
        raise ValueError(errors[0])
    return items


# published files: (where in the file, the line without its photo's folder, the photo)

Lines = Iterator[tuple[str, dict, Path]]


def _get(record: dict, name: str, kind: type, where: str):
    """An entry of a record. Raises ValueError naming where it stands."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} is not a JSON object")
    if name not in record:
        raise ValueError(f"{where} has no {name!r}")
    value = record[name]
    sound = isinstance(value, kind) and not isinstance(value, bool) and (kind is not str or value.strip())
    if not sound:
        kinds = {str: "text", int: "whole number", list: "list", dict: "object"}
        raise ValueError(f"{where} has {name!r}: {plain(repr(value), READABLE)}, which is no {kinds[kind]}")
    return value


def _texts(record: dict, name: str, where: str) -> list[str]:
    values = _get(record, name, list, where)
    if not values or not all(isinstance(value, str) and value.strip() for value in values):
        raise ValueError(f"{where} has {name!r}: {plain(repr(values), READABLE)}, which is no list of texts")
    return values


def _load(path: Path):
    """The file's JSON, of any depth. Raises ValueError."""
    with open_regular(path) as file:
        try:
            return json.load(file)
        except RecursionError as exc:
            raise ValueError("is nested too deeply") from exc


def pope(path: Path, args: argparse.Namespace) -> Lines:
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            where = f"line {number}"
            if line.strip():
                try:
                    record = parse_json(line)
                except ValueError as exc:
                    raise ValueError(f"{where} {exc}") from exc
                label = _get(record, "label", str, where)
                if label not in ("yes", "no"):
                    raise ValueError(f"{where} has the label {label!r}, which is neither yes nor no")
                prompt = _get(record, "text", str, where)
                yield where, {"prompt": prompt, "answer": label.title()}, Path(_get(record, "image", str, where))


def scienceqa(path: Path, args: argparse.Namespace) -> Lines:
    problems = _load(path)
    if not isinstance(problems, dict):
        raise ValueError("is not an object with a problem for each id")
    for name, record in problems.items():
        where = f"problem {name!r}"
        split = _get(record, "split", str, where)
        if split != args.split or record.get("image") is None:
            continue
        image, question = _get(record, "image", str, where), _get(record, "question", str, where)
        choices, answer = _texts(record, "choices", where), _get(record, "answer", int, where)
        if not 2 <= len(choices) <= len(ascii_uppercase):
            raise ValueError(f"{where} has {len(choices)} choices: give 2 to {len(ascii_uppercase)}")
        if not 0 <= answer < len(choices):
            raise ValueError(
                f"{where} has the answer {answer}: with {len(choices)} choices, give 0 to {len(choices) - 1}"
            )
        options = "\n".join(f"{letter}. {text}" for letter, text in zip(ascii_uppercase, choices, strict=False))
        hint = f"Context: {record['hint']}\n" if record.get("hint") else ""
        line = {"prompt": f"{hint}{question}\n{options}", "answer": ascii_uppercase[answer], "choices": choices}
        if "subject" in record:
            line["task"] = _get(record, "subject", str, where)
        yield where, line, Path(split, name, image)


def textvqa(path: Path, args: argparse.Namespace) -> Lines:
    data = _load(path)
    for number, record in enumerate(_get(data, "data", list, "the file")):
        where = f"data[{number}]"
        image = Path(f"{_get(record, 'image_id', str, where)}.jpg")
        prompt = _get(record, "question", str, where)
        if "answers" not in record:
            raise ValueError(f"{where} has no 'answers': the test split has none, give train or val")
        yield where, {"prompt": prompt, "answers": _texts(record, "answers", where)}, image


def coco(path: Path, args: argparse.Namespace) -> Lines:
    data = _load(path)
    images, annotations = (_get(data, name, list, "the file") for name in ("images", "annotations"))
    names, there = {}, defaultdict(set)
    for number, record in enumerate(_get(data, "categories", list, "the file")):
        where = f"categories[{number}]"
        names[_get(record, "id", int, where)] = _get(record, "name", str, where)
    for number, record in enumerate(annotations):
        where = f"annotations[{number}]"
        category = _get(record, "category_id", int, where)
        if category not in names:
            raise ValueError(f"{where} is of the category {category}, which does not exist")
        there[_get(record, "image_id", int, where)].add(names[category])
    for number, text in enumerate(_get(_load(args.captions), "annotations", list, "the file") if args.captions else ()):
        where = f"{args.captions}, annotations[{number}]"
        there[_get(text, "image_id", int, where)] |= set(mentions(_get(text, "caption", str, where), args.names))
    for number, record in enumerate(images):
        where = f"images[{number}]"
        image = Path(_get(record, "file_name", str, where)).name
        yield where, {"prompt": CAPTION, "objects": sorted(there[_get(record, "id", int, where)])}, Path(image)


FORMATS = {"pope": pope, "scienceqa": scienceqa, "textvqa": textvqa, "coco": coco}


def make_lines(args: argparse.Namespace) -> list[dict]:
    """The lines of the list, of `count` questions drawn at random, or of all; paths are relative to the list.

    Raises ValueError naming where in the file a fault is, also for a photo that is not there.
    """
    found = list(FORMATS[args.format](args.file, args))
    if not found:
        raise ValueError("has no question with a photo" + f" in the split {args.split}" * (args.format == "scienceqa"))
    if args.count is not None and args.count < len(found):
        found = [found[i] for i in sorted(random.Random(args.seed).sample(range(len(found)), args.count))]
    lines, suffix = [], SUFFIXES[args.format] if args.suffix is None else args.suffix
    for where, line, image in found:
        if not (args.photos / image).is_file():
            raise ValueError(f"{where}: the photo {image} is not in {args.photos}")
        path = os.path.relpath(args.photos / image, args.output.parent)
        lines.append({"image": path} | line | {"prompt": line["prompt"] + suffix})
    return lines


def main(arguments=None) -> None:
    """The command line; `arguments` None are those of the process."""
    parser = OneLineParser(
        prog="questions.py",
        description=__doc__.split("\n")[0],
        epilog=__doc__.split("\n\n")[-1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("file", type=Path, help="of the data set")
    parser.add_argument("photos", type=Path, help="folder of the photos")
    parser.add_argument("--output", type=Path, default=Path("questions.jsonl"), help="the list (questions.jsonl)")
    parser.add_argument("--count", type=int, help="questions, drawn at random (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="test", help="of ScienceQA (test)")
    parser.add_argument(
        "--suffix", help="text behind each question (default: as LLaVA-1.5 is evaluated; pope, coco: none)"
    )
    parser.add_argument("--captions", type=Path, help="coco: captions_....json, whose objects count as there, too")
    parser.add_argument("--synonyms", type=Path, help="coco: names of objects in captions (default: coco_names.txt)")
    args = parser.parse_args(arguments)
    if args.count is not None and args.count < 1:
        parser.error(f"--count {args.count}: give 1 or more")
    try:
        args.names = read_names(args.synonyms) if args.synonyms else read_names()
    except ValueError as exc:
        parser.error(f"--synonyms {exc}")
    try:
        lines = make_lines(args)
        inputs = [args.file, args.captions, args.synonyms]
        inputs += [args.output.parent / line["image"] for line in lines]
        if args.output.exists() and any(path is not None and path.samefile(args.output) for path in inputs):
            raise ValueError(f"--output {args.output} is an input: it would be replaced, choose another")
    except (OSError, ValueError) as exc:
        parser.error(plain(f"{args.file}: {exc}"))
    try:
        args.output.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    except OSError as exc:
        parser.error(f"--output {args.output} cannot be written: {exc.strerror}")
    say(f"{len(lines)} questions about {len({line['image'] for line in lines})} photos: {args.output}")


if __name__ == "__main__":
    main()
