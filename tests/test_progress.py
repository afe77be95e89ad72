"""Long sequences are announced, and bars count what is done."""

import functools
import io
import re

from tqdm.auto import tqdm

import test_gradcam
from common import progress


def test_the_time_of_long_sequences_is_forecast(drive, monkeypatch):
    monkeypatch.setattr(progress, "LONG", 60)
    prompt = ["--layer", 0, "--prompt", "a " * 40]
    out = drive(*prompt, "--max_new_tokens", 2)[1]
    length = int(re.match(r"reading (\d+) tokens of photo and prompt", out)[1])
    assert length > 80
    assert re.search(rf"\nexpected: 2 noisy copies of {length + 2} tokens, \d+ s each: about \d+ seconds\n", out)
    out = drive(*prompt, "--answer", "cat")[1]
    assert "reading" not in out
    assert "expected: 2 noisy copies" in out
    out = drive(*prompt[2:], "--answer", "cat", "--mode", "evaluate", "--compare", "--steps", 1, "--layers", 0)[1]
    assert "expected: 16 noisy copies" in out
    assert "expected" not in drive(*prompt, "--answer", "cat", "--quiet")[1]
    monkeypatch.setattr(progress, "LONG", 600)
    assert "expected" not in drive(*prompt, "--answer", "cat")[1]


def test_a_bar_counts_the_tokens_of_the_answer(drive, monkeypatch):
    bars, usual = [], progress.show_progress

    class Bar(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options | {"disable": False, "file": io.StringIO(), "mininterval": 0})
            bars.append(self)

    def watched(quiet, *about):
        assert not quiet
        return functools.partial(Bar, **usual(quiet, *about).keywords)

    for module in (progress, test_gradcam):
        monkeypatch.setattr(module, "show_progress", watched)
    code, _, err = drive("--layer", 0, "--max_new_tokens", 3)
    assert (code, err) == (0, "")
    assert [(bar.desc, bar.unit, bar.total, bar.n) for bar in bars] == [
        ("answer", "token", 3, 3),
        ("noisy copies", "copy", 2, 2),
    ]
