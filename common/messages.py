"""Conversations from strangers' files: chat messages as JSON, whose pictures are opened as photos are.

    [{"role": "system", "content": "Answer briefly."},
     {"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What is it?"}]},
     {"role": "assistant", "content": "A dog."},
     {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]}]

The explained photo takes the place without a picture, or else stands before the last message's text.
"""

import argparse
import copy
import os
from pathlib import Path

from common.inputs import open_regular, parse_json
from common.photos import load_photo
from smooth_gradcam import conversation

__all__ = ["check_messages", "load_messages", "paths_of", "prompt_of", "take_last"]

PICTURE = ("image", "path", "url")  # keys of a part that name its picture
MAX_BYTES = 2**24


def load_messages(path: str) -> list[dict]:
    """The messages in a JSON file, as `check_messages` gives them. Raises ValueError that begins with the flag."""
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES} bytes are not read")
            return check_messages(parse_json(file.read()), Path(path).parent)
    except (OSError, ValueError, RecursionError) as exc:
        raise ValueError(f"--messages {path}: {getattr(exc, 'strerror', None) or exc}") from exc


def check_messages(messages, folder: Path) -> list[dict]:
    """The messages with the paths of their pictures, which are relative to the folder, made absolute.

    Raises ValueError for anything but messages of texts and pictures, with at most one place without a picture.
    """
    if not isinstance(messages, list):
        raise ValueError(f"the messages are {str(messages)[:100]!r}: give a list of them")
    parts = _pictures(messages)
    for part in parts:
        for key in set(part) & set(PICTURE):
            if part[key] is None:
                del part[key]  # as data sets have it for a place
            elif not isinstance(part[key], str) or not part[key].strip():
                raise ValueError(f"a picture of the messages is {part[key]!r}: give a path")
    empty = sum(_key(part) is None for part in parts)
    conversation([None] * (empty or not parts), messages)
    if empty > 1:
        raise ValueError(f"the messages have {empty} places for the photo: one, or none, is possible")
    for part in parts:
        path = part.get(_key(part), "").removeprefix("file://")
        if path and "://" not in path and not path.startswith("data:"):
            part[_key(part)] = str(folder.resolve() / path)
    return messages


def _pictures(messages) -> list[dict]:
    """The parts of the messages that are pictures, as they are there."""
    contents = [message.get("content") for message in messages or () if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return [part for part in parts if part.get("type") == "image"]


def _key(part: dict) -> str | None:
    """Which of its keys names the picture of a checked part; None for a place without one."""
    return next((key for key in PICTURE if key in part), None)


def paths_of(messages: list[dict] | None) -> list[str]:
    """The paths of the pictures in messages that `check_messages` gave."""
    return [part[key] for part in _pictures(messages) if (key := _key(part))]


def take_last(messages: list[dict]) -> str | None:
    """Take the path of the last picture out of messages that have no place for the photo; None if they have one."""
    parts = _pictures(messages)
    if not parts or not all(map(_key, parts)):
        return None
    return parts[-1].pop(_key(parts[-1]))


def prompt_of(args: argparse.Namespace):
    """The prompt of these flags as `read` takes it: --prompt, with --system before it, or --messages with its photos.

    Raises ValueError if one of these cannot be opened.
    """
    if args.messages is None:
        system = {"role": "system", "content": args.system}
        return args.prompt if args.system is None else [system, {"role": "user", "content": args.prompt}]
    messages = copy.deepcopy(args.messages)
    try:
        for part in _pictures(messages):
            if key := _key(part):
                part[key] = load_photo(part[key])
    except ValueError as exc:
        raise ValueError(str(exc).replace("--image_path", "--messages", 1)) from exc
    return messages
