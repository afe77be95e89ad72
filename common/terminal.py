"""What a run prints: answers, file names and errors may come from strangers, and must not control the terminal."""

import re
import sys

__all__ = ["plain", "say"]

# Control characters (escape sequences begin with one), line separators, bidirectional controls, surrogates.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text, longest: int | None = None) -> str:
    """The text in one line: characters that could move, recolour or reorder others are escaped as in Python, \\x1b.

    A text of more than `longest` characters is cut in its middle.
    """
    line = UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))
    if longest is None or len(line) <= longest:
        return line
    return f"{line[: longest // 2]} ... {line[len(line) - longest // 2 :]}"


def say(text, file=None) -> None:
    """Print a line, `plain`, on stdout or `file`."""
    print(plain(text), file=file or sys.stdout, flush=True)
