"""Objects that a caption invents: CHAIR (Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018).

    file of names -> read_names: {word or phrase: object}
    caption -> mentions: the objects that it names
    caption, objects that are there -> chair: {measure: (part, whole)}

A file of names has a line for each object: its name, and after commas other words for it, in all their forms
("dog, dogs, puppy, puppies"); lines that begin with # are comments. coco_names.txt has COCO's 80 names and their
plurals, and no synonyms: add your own to a copy.
"""

import re
from pathlib import Path

from common.inputs import open_regular

__all__ = ["COCO_NAMES", "chair", "mentions", "read_names"]

COCO_NAMES = Path(__file__).with_name("coco_names.txt")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, a hyphen is a blank."""
    return re.findall(r"[^\W_]+", text.lower())


def read_names(path: Path = COCO_NAMES) -> dict[str, str]:
    """{word or phrase: name of the object}. Raises ValueError naming file and line."""
    names = {}
    try:
        with open_regular(path) as file:
            lines = file.read().decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as exc:
        raise ValueError(f"{path} cannot be read: {exc}") from exc
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        phrases = [" ".join(words_of(part)) for part in line.split(",")]
        for phrase in phrases:
            if not phrase:
                raise ValueError(f"{path}, line {number} has an empty name: give such as dog, dogs, puppy")
            if names.setdefault(phrase, phrases[0]) != phrases[0]:
                raise ValueError(f"{path}, line {number}: {phrase!r} is a name of {names[phrase]!r} already")
    if not names:
        raise ValueError(f"{path} has no names: give a line for each object, such as dog, dogs, puppy")
    return names


def mentions(text: str, names: dict[str, str]) -> list[str]:
    """The objects that a text names, in their order, each time they are named; of two names the longer ("hot dog")."""
    words, found, i = words_of(text), [], 0
    longest = max(len(name.split()) for name in names)
    while i < len(words):
        phrases = (" ".join(words[i : i + count]) for count in range(longest, 0, -1) if i + count <= len(words))
        name = next((phrase for phrase in phrases if phrase in names), None)
        found += [names[name]] if name else []
        i += len(name.split()) if name else 1
    return found


def chair(said: str, objects: list[str], names: dict[str, str]) -> dict[str, tuple[float, float]]:
    """CHAIR_i, invented among all mentions; CHAIR_s, captions that invent; "named", the objects that are mentioned.

    `objects` are those that are there. Raises ValueError for one that `names` lacks.
    """
    if unknown := [name for name in objects if " ".join(words_of(name)) not in names]:
        raise ValueError(f"the object {unknown[0]!r} is not in the file of names")
    there = {names[" ".join(words_of(name))] for name in objects}
    said_objects = mentions(said, names)
    invented = sum(name not in there for name in said_objects)
    named = len(there & set(said_objects)), len(there)
    return {"chair_i": (invented, len(said_objects)), "chair_s": (invented > 0, 1), "named": named}
