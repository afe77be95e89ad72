"""The Chinese README has what the English one has: whoever changes one is told to change the other."""

import re
from collections import Counter
from pathlib import Path

import pytest

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
