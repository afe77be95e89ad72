"""What a run prints: an answer, a file name or an error may be a stranger's, and must not steer the terminal."""

import re
import sys

__all__ = ["plain", "say"]

# Control characters (of which an escape sequence begins with one), line separators, bidirectional controls, surrogates.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text) -> str:
    """The text in one line, with what could move, recolour or reorder others written as in Python, such as \\x1b."""
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def say(text, file=None) -> None:
    """Print a line, `plain`, on stdout or `file`."""
    print(plain(text), file=file or sys.stdout, flush=True)
