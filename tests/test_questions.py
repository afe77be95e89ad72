"""Published files of questions: each format in a small file made by hand, and what is wrong in one is told."""

import json
from pathlib import Path

import pytest
from conftest import make_image

from studies import questions
from studies.questions import read_questions

POPE = [
    {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"},
    {"question_id": 2, "image": "a.jpg", "text": "Is there a cat in the image?", "label": "no"},
    {"question_id": 3, "image": "b.jpg", "text": "Is there a car in the image?", "label": "no"},
]
PROBLEM = {"question": "Which is heavier?", "choices": ["iron", "wood"], "answer": 1, "hint": "Look.", "image": "a.jpg"}
PROBLEM |= {"split": "test", "subject": "natural science", "grade": "grade3", "lecture": "", "solution": "It is."}
SCIENCE = {
    "7": PROBLEM,
    "8": PROBLEM | {"image": None},
    "9": PROBLEM | {"split": "train"},
    "10": PROBLEM | {"hint": "", "answer": 0},
}
TEXT = {
    "dataset_type": "val",
    "data": [
        {"question_id": 1, "question": "what does it say?", "image_id": "a", "answers": ["stop"] * 7 + ["Stop!"] * 3},
        {"question_id": 2, "question": "which brand?", "image_id": "b", "answers": ["answering does not require"] * 10},
    ],
}
COCO = {
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
    "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
    "annotations": [
        {"image_id": 1, "category_id": 18, "iscrowd": 0},
        {"image_id": 1, "category_id": 18, "iscrowd": 1},
        {"image_id": 1, "category_id": 17, "iscrowd": 0},
    ],
}
FILES = {"pope": POPE, "scienceqa": SCIENCE, "textvqa": TEXT, "coco": COCO}


@pytest.fixture
def convert(tmp_path, capsys):
    """A function that writes a data set and converts it: (the items, what was said), or the error."""
    photos = tmp_path / "photos"
    for path in (photos / "a.jpg", photos / "b.jpg", photos / "test/7/a.jpg", photos / "test/10/a.jpg"):
        path.parent.mkdir(parents=True, exist_ok=True)
        make_image(40, 30).save(path)

    def run(kind, content, *flags):
        file = tmp_path / f"{kind}.json"
        if kind == "pope" and isinstance(content, list):
            content = "\n".join(map(json.dumps, content)) + "\n"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        output = tmp_path / "lists" / "questions.jsonl"
        output.parent.mkdir(exist_ok=True)
        try:
            questions.main([kind, str(file), str(photos), "--output", str(output), *map(str, flags)])
        except SystemExit:
            return None, capsys.readouterr().err
        return read_questions(output), capsys.readouterr().out

    return run


def test_pope(convert):
    items, out = convert("pope", POPE)
    assert "3 questions about 2 photos" in out
    assert [item.prompt for item in items] == [record["text"] for record in POPE]
    assert [item.truth["answer"] for item in items] == ["Yes", "No", "No"]
    assert [item.image.resolve().name for item in items] == ["a.jpg", "a.jpg", "b.jpg"]
    assert all(item.image.is_file() for item in items)  # relative to the list


def test_scienceqa(convert):
    items, _ = convert("scienceqa", SCIENCE)
    assert [item.truth["answer"] for item in items] == ["B", "A"]  # without the one of text alone, and the train split
    assert items[0].prompt.startswith("Context: Look.\nWhich is heavier?\nA. iron\nB. wood\nAnswer with the option")
    assert items[1].prompt.startswith("Which is heavier?\nA.")
    assert items[0].truth["choices"] == ["iron", "wood"]
    assert items[0].truth["task"] == "natural science"
    assert Path(items[0].image.parent.name, items[0].image.name) == Path("7/a.jpg")


def test_textvqa(convert):
    items, _ = convert("textvqa", TEXT, "--suffix", "")
    assert [item.prompt for item in items] == ["what does it say?", "which brand?"]
    assert items[0].truth["answers"] == TEXT["data"][0]["answers"]
    assert items[0].truth["answer"] == "stop"


def test_coco_and_its_captions(convert, tmp_path):
    items, _ = convert("coco", COCO)
    assert [item.truth["objects"] for item in items] == [["cat", "dog"], []]
    captions = {"annotations": [{"image_id": 2, "caption": "Two people with a hot dog."}]}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    items, _ = convert("coco", COCO, "--captions", tmp_path / "captions.json")
    assert [item.truth["objects"] for item in items] == [["cat", "dog"], ["hot dog", "person"]]


def test_a_sample_is_drawn_by_its_seed(convert):
    one, again, other = (convert("pope", POPE, "--count", 1, "--seed", seed)[0] for seed in (0, 0, 1))
    assert [item.prompt for item in one] == [item.prompt for item in again] != [item.prompt for item in other]


def without(record, name):
    return {key: value for key, value in record.items() if key != name}


BAD = [
    ("pope", [POPE[0], POPE[1] | {"label": "maybe"}], "line 2 has the label 'maybe', which is neither yes nor no"),
    ("pope", [POPE[0] | {"image": "c.jpg"}], "line 1: the photo c.jpg is not in "),
    ("pope", [POPE[0] | {"text": 3}], "line 1 has 'text': 3, which is no text"),
    ("pope", [POPE[0], without(POPE[1], "image")], "line 2 has no 'image'"),
    ("pope", '{"label": "yes"\n', "line 1 is not valid JSON"),
    ("pope", "[1]\n", "line 1 is not a JSON object"),
    ("pope", "\n", "has no question with a photo"),
    ("scienceqa", {"7": PROBLEM | {"answer": 2}}, "problem '7' has the answer 2: with 2 choices, give 0 to 1"),
    ("scienceqa", {"7": PROBLEM | {"choices": ["a"] * 30, "answer": 28}}, "problem '7' has 30 choices: give 2 to 26"),
    ("scienceqa", {"7": PROBLEM | {"choices": ["iron"], "answer": 0}}, "problem '7' has 1 choices: give 2 to 26"),
    ("scienceqa", {"7": PROBLEM | {"answer": "B"}}, "problem '7' has 'answer': 'B', which is no whole number"),
    ("scienceqa", {"7": PROBLEM | {"answer": True}}, "problem '7' has 'answer': True, which is no whole number"),
    ("scienceqa", {"7": PROBLEM | {"choices": ["iron", 3]}}, "problem '7' has 'choices': "),
    ("scienceqa", {"7": PROBLEM, "5": PROBLEM}, "problem '5': the photo test/5/a.jpg is not in "),
    ("scienceqa", {"8": PROBLEM | {"image": None}}, "has no question with a photo in the split test"),
    ("scienceqa", {"8": 3}, "problem '8' is not a JSON object"),
    ("scienceqa", [PROBLEM], "is not an object with a problem for each id"),
    ("textvqa", {"data": [without(TEXT["data"][0], "answers")]}, "data[0] has no 'answers': the test split has none"),
    ("textvqa", {"data": [TEXT["data"][0], TEXT["data"][1] | {"image_id": 7}]}, "data[1] has 'image_id': 7"),
    ("textvqa", {"data": [TEXT["data"][0] | {"answers": []}]}, "data[0] has 'answers': [], which is no list of texts"),
    ("textvqa", {"data": {}}, "the file has 'data': {}, which is no list"),
    ("textvqa", [], "the file is not a JSON object"),
    ("coco", COCO | {"annotations": [{"image_id": 1, "category_id": 99}]}, "annotations[0] is of the category 99"),
    ("coco", without(COCO, "images"), "the file has no 'images'"),
    ("coco", COCO | {"images": [{"id": 1, "file_name": "c.jpg"}]}, "images[0]: the photo c.jpg is not in "),
    ("textvqa", "{", "Expecting property name"),
]


@pytest.mark.parametrize(("kind", "content", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_what_is_wrong_is_told_with_its_place(convert, tmp_path, kind, content, message):
    items, err = convert(kind, content)
    assert items is None
    assert err.startswith(f"questions.py: error: {tmp_path / kind}.json: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "lists/questions.jsonl").exists()


def test_an_input_is_not_replaced(convert, tmp_path):
    items, err = convert("pope", POPE, "--output", tmp_path / "pope.json")
    assert items is None
    assert "is an input: it would be replaced" in err
    assert json.loads((tmp_path / "pope.json").read_text().splitlines()[0]) == POPE[0]
