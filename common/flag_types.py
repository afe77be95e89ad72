"""The types of flags: each turns the text of a flag into its value. Needs no torch.

A type raises argparse.ArgumentTypeError that says what would be valid; the parser prints it behind the flag's name.
"""

import argparse
import os
import re
from collections.abc import Callable
from contextlib import suppress

__all__ = ["LAYER_NAMES", "to_count", "to_layers", "to_opacity", "to_path", "to_rate", "to_text", "to_words"]

LAYER_NAMES = ("auto", "early", "middle", "late", "all")


def _type(check: Callable) -> Callable:
    """The type of a flag: `check` turns its text into a value, or raises ValueError saying what would be valid."""

    def convert(text):
        try:
            return check(text)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(str(exc)) from exc

    return convert


@_type
def to_count(text: str) -> int:
    with suppress(ValueError):
        if 1 <= (number := int(text)) < 2**63:
            return number
    raise ValueError(f"{text[:100]!r} must be a whole number, 1 or more, and below 2^63")


@_type
def to_layers(text: str) -> list[int | str]:
    """[name], or the indices of "6,12,18" and "0-3"."""
    text, found = text.strip(), []
    if text in LAYER_NAMES:
        return [text]
    for part in text.split(","):
        ends = re.fullmatch(r"(-?\d{1,4})(?:-(-?\d{1,4}))?", part.strip())
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (0, -1)
        if last < first or (first < 0) != (last < 0):
            names = ", ".join(LAYER_NAMES)
            raise ValueError(f"{text!r} is none of {names}, no index, and no list such as 6,12 or 0-3")
        found += range(first, last + 1)
    return found


@_type
def to_opacity(text: str) -> float | None:
    """None of "value", the number of "fixed:0.5"."""
    number = re.fullmatch(r"fixed:(\d*\.?\d+)", text)
    if text != "value" and (number is None or float(number[1]) > 1):
        raise ValueError(f"{text!r} must be value, or fixed:0.5 with a number from 0 to 1")
    return None if text == "value" else float(number[1])


@_type
def to_text(text: str) -> str:
    if not text.strip():
        raise ValueError(f"{text!r} is empty: give a text")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"{text!r} is not valid text in the terminal's encoding")
    return text


@_type
def to_words(text: str) -> str:
    if not all(word.strip() for word in text.split(",")):
        raise ValueError(f"{text!r} has an empty word: give content, all, or words such as dog,apple")
    return text


@_type
def to_path(text: str) -> str:
    """A path that a file system takes; whether anything is there is told where it is opened."""
    if not text.strip():
        raise ValueError(f"{text!r} is empty: give a path")
    try:
        os.stat(text)  # noqa: PTH116  (Path.stat is no better, and a name on the hub is no path)
    except (FileNotFoundError, NotADirectoryError):
        return text
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise ValueError(f"{text[:100]!r} is not a usable path: {reason}") from exc
    return text


@_type
def to_rate(text: str) -> float:
    with suppress(ValueError):
        if 0.01 <= (number := float(text)) <= 1000:
            return number
    raise ValueError(f"{text[:100]!r} must be frames per second, 0.01 to 1000")
