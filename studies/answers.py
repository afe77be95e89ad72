"""How right an answer is: scores of what a model says against the truth of a question, as the papers define them.

    record of a list -> truth_of: what is true          kind_of: which score that calls for
    said, truth -> score: {measure: (part, whole)}
    Scored answers -> score_table: sum of parts / sum of wholes, with intervals over photos

Kinds:  "yes or no"   {"answer": "Yes"}                      POPE (Li et al., EMNLP 2023)
        "choice"      {"answer": "B", "choices": [...]}      the letter, as ScienceQA is scored
        "open"        {"answers": ["stop", ...]}             VQA accuracy (Antol et al., 2015), as of TextVQA
        "caption"     {"objects": ["dog", ...]}              CHAIR (Rohrbach et al., EMNLP 2018), see `chair.py`
        "words"       {"answer": "A red cat"}                the answer begins with these words
"""

import re
from collections import Counter
from collections.abc import Iterable
from string import ascii_uppercase
from typing import NamedTuple

import numpy as np

from studies.chair import chair
from studies.tables import interval, with_interval

__all__ = [
    *("LABELS", "MEASURES", "Scored", "kind_of", "normalised", "said_letter", "says_yes", "score", "score_table"),
    *("task_of", "truth_of"),
]

MEASURES = {  # column of the table: its head
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "yes": "yes ratio",
    "chair_i": "CHAIR_i",
    "chair_s": "CHAIR_s",
    "named": "named",
}
LABELS = {"questions": "questions", "task": "task", "hidden_from": "image hidden from", "count": "n"}
KINDS = {"answers": "open", "objects": "caption", "choices": "choice"}
ARTICLES = ("a", "an", "the")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": 0} | {word: number for number, word in enumerate(NUMBERS)}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


# the truth


def task_of(record: dict) -> dict:
    """The "task" of a line of any list, by which results are grouped. Raises ValueError if it is no text."""
    task = record.get("task")
    if task is not None and (not isinstance(task, str) or not task.strip()):
        raise ValueError("has no text for 'task'")
    return {} if task is None else {"task": task}


def truth_of(record: dict) -> dict:
    """What is true of a question, out of the record of a line: "answer", "answers", "objects", "choices", "task".

    Raises ValueError that continues "list.jsonl, line 3".
    """
    truth = {name: record[name] for name in ("answer", *KINDS) if record.get(name) is not None} | task_of(record)
    several = [name for name in KINDS if name in truth]
    if len(several) > 1:
        raise ValueError(f"has {' and '.join(several)}, which call for different scores")
    for name in several:
        if not isinstance(truth[name], list) or not all(isinstance(t, str) and t.strip() for t in truth[name]):
            raise ValueError(f"has no list of texts for {name!r}")
    if "answers" in truth:
        if not truth["answers"]:
            raise ValueError("has no list of texts for 'answers'")
        truth.setdefault("answer", Counter(truth["answers"]).most_common(1)[0][0])  # which knockout forces
    if "objects" not in truth and "answer" not in truth:
        raise ValueError("has no text for 'answer'")
    if "choices" in truth:
        letters = ascii_uppercase[: len(truth["choices"])]
        if not 2 <= len(truth["choices"]) <= len(ascii_uppercase):
            raise ValueError(f"has {len(truth['choices'])} choices: give 2 to {len(ascii_uppercase)}")
        if truth["answer"] not in list(letters):
            raise ValueError(f"has the answer {truth['answer']!r}, which is no letter from A to {letters[-1]}")
    return truth


def kind_of(truth: dict) -> str:
    """Which of the kinds of questions this is."""
    if (kind := next((KINDS[name] for name in KINDS if name in truth), None)) is not None:
        return kind
    return "yes or no" if re.fullmatch(r"(yes|no)\.?", truth["answer"], re.IGNORECASE) else "words"


def said_answer(truth: dict) -> str | None:
    """The answer that is measured, None if there is none: yes and no with a capital, as models say them."""
    answer = truth.get("answer")
    return answer.title() if answer is not None and kind_of(truth) == "yes or no" else answer


# scores: said, truth -> {measure: (part, whole)}


def says_yes(said: str) -> bool:
    """POPE's reading of an answer: no if its first sentence has the word "No", "no" or "not", else yes."""
    return not {"No", "no", "not"} & set(said.split(".")[0].replace(",", "").split())


def yes_or_no(said: str, truth: dict) -> dict[str, tuple[float, float]]:
    """Accuracy, precision, recall and F1 of yes, and the share of yes."""
    yes, right = says_yes(said), truth["answer"].lower().startswith("yes")
    hit = yes and right
    shares = {"accuracy": (yes == right, 1), "precision": (hit, yes), "recall": (hit, right)}
    return shares | {"f1": (2 * hit, yes + right), "yes": (yes, 1)}  # F1 = 2 TP / (2 TP + FP + FN)


def said_letter(said: str, choices: list[str]) -> str | None:
    """The chosen letter: "B", "B.", "(B) a dog", "the answer is B", or else the only choice in these very words."""
    letters, said = ascii_uppercase[: len(choices)], said.strip()
    for pattern in (rf"\(?([{letters}])(?:[.):,].*)?", rf".*\banswer is:? \(?([{letters}])\b.*"):
        if found := re.fullmatch(pattern, said, re.DOTALL):
            return found[1]
    same = [letter for letter, choice in zip(letters, choices, strict=True) if normalised(choice) == normalised(said)]
    return same[0] if len(same) == 1 else None


def choice(said: str, truth: dict) -> dict[str, tuple[float, float]]:
    return {"accuracy": (said_letter(said, truth["choices"]) == truth["answer"], 1)}


def normalised(answer: str) -> str:
    """An answer as the VQA evaluation compares it: lower case, without articles and punctuation, numbers as digits.

    Apostrophes are dropped, where that evaluation restores them by a list ("dont", "don't").
    """
    text = found = " ".join(answer.lower().split())
    number = re.search(r"\d,\d", text)
    for mark in PUNCTUATION:
        apart = not (number or f"{mark} " in text or f" {mark}" in text)
        found = found.replace(mark, " " if apart else "")
    found = re.sub(r"\.(?!\d)|['’]", "", found)
    return " ".join(str(DIGITS.get(word, word)) for word in found.split() if word not in ARTICLES)


def open_answer(said: str, truth: dict) -> dict[str, tuple[float, float]]:
    """min(number of people who said the same / 3, 1)."""
    same = sum(normalised(answer) == normalised(said) for answer in truth["answers"])
    return {"accuracy": (min(same / 3, 1), 1)}


def begins(said: str, truth: dict) -> dict[str, tuple[float, float]]:
    return {"accuracy": (said.startswith(truth["answer"]), 1)}


SCORES = {"yes or no": yes_or_no, "choice": choice, "open": open_answer, "words": begins}


def score(said: str, truth: dict, names: dict[str, str]) -> dict[str, tuple[float, float]]:
    """{measure: (part, whole)} of an answer; `names` are those of `read_names`, for captions."""
    kind = kind_of(truth)
    return chair(said, truth["objects"], names) if kind == "caption" else SCORES[kind](said, truth)


# the table


class Scored(NamedTuple):
    """An answer and its scores."""

    photo: str
    truth: dict
    labels: dict  # of the line of the table that it counts in
    said: str
    scores: dict[str, tuple[float, float]]


def score_table(scored: Iterable[Scored]) -> list[dict]:
    """Lines {"questions", "task", labels, "count", "photos", measure, measure_low, measure_high, ...}.

    A line for each kind of question and value of the labels; where questions have tasks, also for each task.
    """
    groups = {}
    for one in scored:
        for task in dict.fromkeys(("", one.truth.get("task", ""))):
            groups.setdefault((kind_of(one.truth), task), {}).setdefault(tuple(one.labels.items()), []).append(one)
    lines = []
    for (kind, task), of_labels in groups.items():
        for labels, members in of_labels.items():
            photos = np.array([one.photo for one in members])
            line = {"questions": kind, "task": task} | dict(labels)
            line |= {"count": len(members), "photos": len(set(photos))}
            for measure in members[0].scores:
                parts, wholes = np.array([one.scores[measure] for one in members], float).T
                line |= with_interval(measure, interval(parts, photos, weights=wholes))
            lines.append(line)
    return lines
