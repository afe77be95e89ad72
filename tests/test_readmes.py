"""The Chinese README has what the English one has; the flags in the commands of all READMEs are known."""

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
from run_readmes import all_commands, commands_of, left_out

import test_gradcam

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(`+)(.+?)\1(?!`)")
LINK = re.compile(r"(!?)\[[^\[\]]*\]\(([^)]+)\)")
NUMBER = re.compile(r"\d*\.?\d+")


def prose(text):
    return FENCE.sub("", text)


def links(text, pictures):
    return [target for mark, target in LINK.findall(prose(text)) if bool(mark) == pictures]


def table_rows(text):
    """How many cells each row of each table has."""
    rows = [line.strip() for line in prose(text).splitlines() if line.strip().startswith("|")]
    return [row.count("|") for row in rows]


def elsewhere(text):
    """The links that leave the file, but for the one to the other language."""
    outside = (target for target in links(text, pictures=False) if not target.startswith("#"))
    return Counter(target for target in outside if not target.startswith("README"))


def anchors(text):
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture
def both():
    return [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md")]


@pytest.mark.parametrize(
    "found_in",
    [
        FENCE.findall,
        lambda text: links(text, pictures=True),
        table_rows,
        elsewhere,
        lambda text: len(links(text, pictures=False)),
        lambda text: Counter(code for _, code in CODE.findall(prose(text))),
        lambda text: set(re.findall(r"\$[^$]+\$", prose(text))),
        lambda text: sorted(set(NUMBER.findall(text))),
        lambda text: [len(marks) for marks in re.findall(r"^(#+) ", prose(text), re.MULTILINE)],
    ],
    ids=["blocks", "pictures", "tables", "files", "links", "code", "formulas", "numbers", "headings"],
)
def test_the_languages_have_the_same(both, found_in):
    english, chinese = map(found_in, both)
    assert english
    assert chinese == english


def test_links_within_a_readme_lead_to_its_headings(both):
    for text in both:
        inside = {target[1:] for target in links(text, pictures=False) if target.startswith("#")}
        assert inside
        assert inside <= anchors(text)


RUN = [each for each in all_commands() if "test_gradcam.py " in each and not each.endswith("--help")]


@pytest.mark.parametrize("command", [each for each in RUN if left_out(each, everything=True) != "an example"])
def test_the_command_line_has_the_flags_of_a_command(command):
    """Whether it does what is said is seen by running it: tests/run_readmes.py."""
    assert test_gradcam.parse_args(shlex.split(command.split("test_gradcam.py", 1)[1]))


def test_commands_are_those_of_blocks_and_of_code_that_begins_with_them():
    text = "```bash\npip install x && python a.py\npython b.py --c   # why\n```\n`python d.py`, `--mode e`, `f`\n"
    found = ["pip install x && python a.py", "python b.py --c", "python d.py", "python test_gradcam.py --mode e"]
    assert commands_of(text) == found
    assert [bool(left_out(command, everything=False)) for command in found] == [True, False, False, False]
