"""Texts of any kind, for hypothesis."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from common.flags import parse_args
from common.terminal import plain

QUICK = settings(max_examples=60, deadline=2000, suppress_health_check=list(HealthCheck))


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>"]


CONTROL = "\x00\x07\x08\x1b\r\n\t\x7f\x9b\u200e\u202e\u2066\u2029\ufffd"
SCRIPTS = [
    "the red cat",
    "猫狗。",
    "फलाम्",
    "قطةِّ",
    "กขิ้",
    "한글",
    "é e\u0301\u0323",
    "😀👨\u200d👩\u200d👧❤\ufe0f",
    "𠮷²½_-'’",
]
ESCAPES = ["\x1b]0;title\x07", "\x1b[2J", "\x9b31m", "\u202egpj.exe", "cat\nwrote /etc/passwd"]
CHARACTERS = st.one_of(st.sampled_from("".join(SCRIPTS) + CONTROL), st.characters(codec="utf-8"))
PIECES = st.one_of(st.text(CHARACTERS, max_size=6), st.sampled_from([*SCRIPTS, *ESCAPES, " ", "\n"]))
TEXTS = st.lists(PIECES, max_size=8).map("".join)
ANYTHING = st.lists(st.one_of(PIECES, st.sampled_from([*SPECIAL, "\ud800", "a\udcff"])), max_size=8).map("".join)


BLANKS = st.text(" \t\n\u00a0\u3000", max_size=3)


def refused(capsys, flags):
    """The one line with which the flags are refused."""
    with pytest.raises(SystemExit) as exc:
        parse_args(flags)
    assert exc.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("test_gradcam.py: error: ")
    assert len(err.splitlines()) == 1
    assert plain(err[:-1]) == err[:-1]
    return err
