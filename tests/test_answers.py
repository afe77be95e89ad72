"""Scores of answers: against numbers counted by hand."""

import csv
import json

import numpy as np
import pytest
from conftest import make_image

from smooth_gradcam import read
from studies import answer_tables
from studies.answer_tables import said_when_hidden, score_files
from studies.answers import (
    LABELS,
    Scored,
    kind_of,
    normalised,
    said_answer,
    said_letter,
    says_yes,
    score,
    score_table,
    truth_of,
)
from studies.chair import COCO_NAMES, chair, mentions, read_names
from studies.tables import interval

NAMES = {"dog": "dog", "dogs": "dog", "puppy": "dog", "hot dog": "hot dog", "cat": "cat", "cats": "cat", "car": "car"}


# yes or no


@pytest.mark.parametrize(
    ("said", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no, there is not", False),
        ("There is not a dog", False),
        ("Yes. There is no cat.", True),  # only the first sentence counts
        ("No, there is a dog.", False),
        ("Nothing", True),  # is no "no": all else is yes, as POPE's code has it
        ("NO", True),
        ("", True),
    ],
)
def test_yes_is_what_pope_takes_for_yes(said, yes):
    assert says_yes(said) == yes


SAID = [  # said, right: TP, TP, TP, FP, FP, FN, TN, TN, TN, TN
    *("Yes Yes", "Yes Yes", "Yes Yes", "Yes No", "Yes No", "No Yes", "No No", "No No", "No No", "No No"),
]


def scored(pairs, labels=None, photos=None, task=None):
    truths = [{"answer": right} | ({"task": task} if task else {}) for _, right in pairs]
    return [
        Scored(photos[i] if photos else f"{i}.jpg", truth, labels or {}, said, score(said, truth, {}))
        for i, ((said, _), truth) in enumerate(zip(pairs, truths, strict=True))
    ]


def test_precision_recall_and_f1_by_hand():
    (line,) = score_table(scored([pair.split() for pair in SAID]))
    assert (line["questions"], line["count"], line["photos"]) == ("yes or no", 10, 10)
    assert line["accuracy"] == pytest.approx(7 / 10)
    assert line["precision"] == pytest.approx(3 / 5)
    assert line["recall"] == pytest.approx(3 / 4)
    assert line["f1"] == pytest.approx(2 * 0.6 * 0.75 / (0.6 + 0.75))
    assert line["yes"] == pytest.approx(5 / 10)
    for measure in ("accuracy", "precision", "recall", "f1", "yes"):
        assert 0 <= line[f"{measure}_low"] < line[measure] < line[f"{measure}_high"] <= 1


def test_precision_of_a_model_that_never_says_yes_is_left_out():
    (line,) = score_table(scored([("No", "Yes"), ("No", "No")]))
    assert "precision" not in line
    assert (line["recall"], line["f1"], line["yes"], line["accuracy"]) == (0, 0, 0, 0.5)


def test_interval_of_a_share_resamples_photos_with_what_they_weigh():
    values, weights, photos = np.array([1.0, 1, 0, 0]), np.array([1.0, 1, 1, 0]), np.array(list("aabc"))
    mean, low, high = interval(values, photos, weights=weights)
    assert mean == pytest.approx(2 / 3)
    assert (low, high) == (0, 1)  # a alone is 1, b alone 0; c alone weighs nothing and has no part
    assert np.isnan(interval(values, photos, weights=np.zeros(4))).all()
    assert interval(values, photos, weights=np.ones(4)) == interval(values, photos)


def test_each_layer_and_each_task_has_a_line_of_its_own():
    found = scored([("Yes", "Yes"), ("No", "No")], {"hidden_from": "nowhere"}, task="animals")
    found += scored([("Yes", "No"), ("Yes", "Yes")], {"hidden_from": 7}, task="animals")
    found += scored([("Yes", "No")], {"hidden_from": 7}, task="cars")
    lines = {(line["task"], line["hidden_from"]): line for line in score_table(found)}
    assert {key: line["accuracy"] for key, line in lines.items()} == {
        ("", "nowhere"): 1, ("", 7): pytest.approx(1 / 3),
        ("animals", "nowhere"): 1, ("animals", 7): 0.5, ("cars", 7): 0,
    }  # fmt: skip


# choices, open answers, words


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"), ("B.", "B"), ("(C) a bird", "C"), ("A: one", "A"), ("The answer is B.", "B"),
        ("I think the answer is: (C).", "C"), ("a dog", "A"), ("The dog.", "A"), ("A dog", "A"), ("D", None),
        ("Because", None), ("a whale", None), ("The answer is a bird", None), ("", None),
    ],
)  # fmt: skip
def test_letter_of_a_choice(said, letter):
    assert said_letter(said, ["a dog", "a cat", "a bird"]) == letter


def test_choices_in_the_same_words_are_none():
    assert said_letter("a dog", ["a dog", "the dog"]) is None


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("The Stop Sign.", "stop sign"),
        ("two  dogs\n", "2 dogs"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("red/blue", "red blue"),
        ("yes!", "yes"),  # between letters a mark is a blank, at the end nothing is left
        ("red, blue", "red blue"),
        ("don't", "dont"),
        ("a", ""),
    ],
)
def test_answers_are_compared_as_vqa_does(answer, same):
    assert normalised(answer) == same


@pytest.mark.parametrize(("people", "expected"), [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (10, 1)])
def test_an_open_answer_is_right_if_three_people_gave_it(people, expected):
    truth = truth_of({"answers": ["The stop"] * people + ["go"] * (10 - people)})
    part, whole = score("Stop.", truth, {})["accuracy"]
    assert (part / whole, whole) == (pytest.approx(expected), 1)
    assert truth["answer"] == ("The stop" if people > 5 else "go")  # what most said is what knockout forces


def test_kind_follows_from_what_is_true():
    kinds = {
        "yes or no": {"answer": "yes."},
        "words": {"answer": "Yes, a dog"},
        "choice": {"answer": "A", "choices": ["x", "y"]},
        "open": {"answers": ["x"]},
        "caption": {"objects": []},
    }
    for kind, record in kinds.items():
        assert kind_of(truth_of(record)) == kind
    assert score("A red cat.", {"answer": "A red"}, {}) == {"accuracy": (True, 1)}
    assert score("A cat.", {"answer": "A red"}, {}) == {"accuracy": (False, 1)}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "has no text for 'answer'"),
        ({"answers": []}, "has no list of texts for 'answers'"),
        ({"answers": "stop"}, "has no list of texts for 'answers'"),
        ({"objects": ["dog", 3]}, "has no list of texts for 'objects'"),
        ({"objects": [], "answers": ["a"]}, "has answers and objects, which call for different scores"),
        ({"choices": ["x"], "answer": "A"}, "has 1 choices: give 2 to 26"),
        ({"choices": ["x", "y"], "answer": "C"}, "has the answer 'C', which is no letter from A to B"),
        ({"choices": ["x", "y"], "answer": "AB"}, "has the answer 'AB', which is no letter"),
        ({"answer": "x", "task": 3}, "has no text for 'task'"),
    ],
)
def test_what_cannot_be_true_is_told(record, message):
    with pytest.raises(ValueError, match=message):
        truth_of(record)


# captions


def test_mentions_are_counted_each_time_and_the_longer_name_wins():
    text = "Two dogs and a hot-dog; a puppy, a hotdog and a dogsled near the Car."
    assert mentions(text, NAMES) == ["dog", "hot dog", "dog", "car"]


def test_chair_by_hand():
    captions = {
        "A dog and a cat and a cat.": ["dog"],  # 2 of 3 mentions invented
        "A puppy.": ["dog", "car"],  # 0 of 1
        "Nothing here.": ["car"],  # 0 of 0
        "A car and a dog.": [],  # 2 of 2
    }
    found = [
        Scored(f"{i}.jpg", {"objects": there}, {}, said, chair(said, there, NAMES))
        for i, (said, there) in enumerate(captions.items())
    ]
    (line,) = score_table(found)
    assert line["chair_i"] == pytest.approx(4 / 6)
    assert line["chair_s"] == pytest.approx(2 / 4)
    assert line["named"] == pytest.approx(2 / 4)
    with pytest.raises(ValueError, match="the object 'cow' is not in the file of names"):
        chair("", ["cow"], NAMES)


def test_coco_names_are_80_and_their_plurals():
    names = read_names()
    assert len(set(names.values())) == 80
    assert names["mice"] == "mouse"
    assert names["hot dogs"] == "hot dog"
    assert mentions("People with knives on benches, skis", names) == ["person", "knife", "bench", "skis"]
    assert sum(not line.startswith("#") for line in COCO_NAMES.read_text().splitlines()) == 80


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dog, dogs\ncat, dogs\n", "names.txt, line 2: 'dogs' is a name of 'dog' already"),
        ("# animals\n\ndog, ,dogs\n", "names.txt, line 3 has an empty name"),
        ("# none\n", "names.txt has no names"),
        ("\udcff", "names.txt cannot be read"),
    ],
)
def test_bad_names_are_told_with_their_line(tmp_path, text, message):
    (tmp_path / "names.txt").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        read_names(tmp_path / "names.txt")
    with pytest.raises(ValueError, match="none.txt cannot be read"):
        read_names(tmp_path / "none.txt")


# answers of a model


def test_answers_of_a_hidden_image_know_nothing_of_it(model, processor, image):
    other = make_image(168, 113).resize(image.size)
    one, two = (read(model, processor, photo, "what?", "red") for photo in (image, other))
    assert said_when_hidden(one, None, 6) == read(model, processor, image, "what?", max_new_tokens=6).answer
    assert said_when_hidden(one, 0, 6) == said_when_hidden(two, 0, 6)
    assert said_when_hidden(one, None, 6) != said_when_hidden(two, None, 6)  # or there is nothing to hide


def test_tables_have_what_was_said_and_its_scores():
    found = scored([("Yes", "Yes"), ("No", "Yes")], {"hidden_from": 3}, ["a.jpg", "a.jpg"], "animals")
    files, lines = score_files("answers", [("dog?", found[0]), ("cat?", found[1])], LABELS)
    first, second = csv.DictReader(files["answers.csv"].splitlines())
    assert (first["photo"], first["prompt"], first["hidden_from"], first["said"]) == ("a.jpg", "dog?", "3", "Yes")
    assert (second["accuracy"], second["accuracy_of"], second["precision_of"], second["recall_of"]) == tuple("0101")
    assert [line.split()[:6] for line in lines[1:3]] == [
        ["questions", "task", "image", "hidden", "from", "n"],
        ["yes", "or", "no", "3", "2", "0.50"],
    ]
    assert "2 questions about 1 photos; yes or no as POPE reads it" in lines[0]
    assert "yes or no & animals & 3 & 2 & 0.50" in files["answers_table.tex"]
    assert files["answers_table.csv"].startswith("questions,task,hidden_from,count,photos,accuracy,accuracy_low,")


@pytest.fixture
def answers_list(tmp_path, image):
    def write(*records):
        for name in ("one.png", "two.png"):
            image.save(tmp_path / name)
        (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, records)))
        return tmp_path / "list.jsonl"

    return write


QUESTION = {"image": "one.png", "prompt": "red?", "answer": "Yes"}
CAPTION = {"image": "two.png", "prompt": "what?", "objects": ["dog"]}


def test_a_list_is_answered_and_scored_at_each_layer(drive, tmp_path, answers_list, monkeypatch):
    """What each run says is put in its own line of the table."""

    def said(reading, layer, max_new_tokens):
        assert max_new_tokens == 5
        return {None: "Yes", 0: "No", 2: "a cat and a dog"}[layer]

    monkeypatch.setattr(answer_tables, "said_when_hidden", said)
    flags = ["--answers", answers_list(QUESTION, CAPTION), "--hide_from", "0,2", "--max_new_tokens", 5]
    code, out, err = drive("--mode", "knockout", *flags)
    assert (code, err) == (0, "")
    table = list(csv.DictReader((tmp_path / "out/knockout/answers_table.csv").open()))
    found = {(line["questions"], line["hidden_from"]): line["accuracy"] or line["chair_i"] for line in table}
    assert found == {
        ("yes or no", "nowhere"): "1.0000", ("yes or no", "0"): "0.0000", ("yes or no", "2"): "1.0000",
        ("caption", "2"): "0.5000", ("caption", "nowhere"): "", ("caption", "0"): "",
    }  # fmt: skip
    assert "accuracy" in out
    assert (tmp_path / "out/knockout/knockout.csv").read_text().count("one.png") == 5  # the caption has no right answer
    assert (tmp_path / "out/knockout/answers_table.tex").is_file()


def test_captions_alone_have_only_the_table(drive, tmp_path, answers_list):
    path = answers_list(CAPTION)
    assert drive("--mode", "knockout", "--answers", path, "--max_new_tokens", 3)[0] == 0
    names = {file.name for file in (tmp_path / "out/knockout").iterdir()}
    assert names == {"answers.csv", "answers_table.csv", "answers_table.tex"}
    code, _, err = drive("--mode", "knockout", "--answers", path, "--window", 2)
    assert code == 2
    assert "--window needs right answers" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hide_from", "9"], "--hide_from: "),
        (["--hide_from", "late", "2"], "--hide_from takes one of auto"),
        (["--synonyms", "none.txt"], "--synonyms none.txt cannot be read"),
    ],
)
def test_what_cannot_be_scored_is_told_by_its_flag(drive, answers_list, flags, message):
    code, _, err = drive("--mode", "knockout", "--answers", answers_list(QUESTION), *flags)
    assert code == 2
    assert f"error: {message}" in err


def test_an_unknown_object_is_told_with_its_line(drive, answers_list):
    path = answers_list(QUESTION, CAPTION | {"objects": ["unicorn"]})
    code, _, err = drive("--mode", "knockout", "--answers", path)
    assert code == 2
    assert f"--answers {path}, line 2: the object 'unicorn' is not in the file of names" in err


@pytest.mark.parametrize("flag", ["--hide_from=1", "--synonyms=a.txt"])
def test_flags_of_scores_need_a_list(drive, flag):
    code, _, err = drive("--mode", "knockout", flag)
    assert code == 2
    assert f"{flag.split('=')[0]} needs --answers" in err


@pytest.mark.parametrize(
    ("truth", "said"),
    [({"answer": "yes"}, "Yes"), ({"answer": "NO."}, "No."), ({"answer": "two"}, "two"), ({"objects": ["dog"]}, None)]
    + [({"answer": "B", "choices": ["yes", "no"]}, "B")],
)
def test_yes_and_no_are_measured_as_models_say_them(truth, said):
    assert said_answer(truth) == said
