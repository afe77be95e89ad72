"""What is printed steers no terminal, and passes one function."""

import ast
import unicodedata
from pathlib import Path

from any_text import ANYTHING, QUICK
from hypothesis import given

from common.terminal import plain

ROOT = Path(__file__).parent.parent


@QUICK
@given(ANYTHING)
def test_a_printed_line_is_one_line_that_steers_nothing(text):
    said = plain(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in said)
    assert not any(
        unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI") for c in said
    )
    assert plain("猫 👨\u200d👩 قطة a\\b") == "猫 👨\u200d👩 قطة a\\b"


def test_all_that_a_run_prints_passes_one_function():
    """But for the line that a parser ends with, which passes `plain`."""
    files = [ROOT / "test_gradcam.py", ROOT / "visualization_utils.py", *(ROOT / "common").glob("*.py")]
    files += [path for path in (ROOT / "studies").glob("*.py") if path.name != "coco.py"]  # a script of its own
    calls = {
        path.name
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("print", "print_exc")
    }
    assert calls == {"terminal.py", "template.py"}  # that is the child of a process that reads what it prints
