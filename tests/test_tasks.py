"""Flow and knockout by task: means by hand, of what the runs over lists write."""

import csv
import json

import numpy as np
import pytest
from conftest import check_layout

from studies.tasks import task_files, task_means


def row(task, photo, layer, probability, **more):
    return {"task": task, "blocked": "image from", "photo": photo, "layer": layer, "probability": probability} | more


def test_means_are_over_the_photos_of_a_task_at_a_layer():
    rows = [
        row("animals", "a", 0, "0.2", answer_right=0),
        row("animals", "b", 0, "0.6", answer_right=1),
        row("animals", "a", 1, "1.0", answer_right=1),
        row("cars", "c", 0, "0.5", answer_right=1),
        {**row("cars", "c", 0, "0.1", change_percent="nan"), "blocked": "image → user"},
    ]
    lines = {(line["task"], line["blocked"], line["layer"]): line for line in task_means(rows)}
    assert len(lines) == 4
    first = lines["animals", "image from", 0]
    assert (first["photos"], first["probability"], first["answer_right"]) == (2, pytest.approx(0.4), 0.5)
    assert (first["probability_low"], first["probability_high"]) == (pytest.approx(0.2), pytest.approx(0.6))
    assert lines["cars", "image from", 0]["probability"] == 0.5
    assert "change_percent" not in lines["cars", "image → user", 0]  # nan is no number
    assert "answer_right" not in lines["cars", "image → user", 0]


def test_without_tasks_there_is_nothing_and_some_may_lack_one():
    assert task_files("knockout", [row("", "a", 0, "0.2")]) == {}
    files = task_files("knockout", [row("", "a", 0, "0.2"), row("cars", "b", 0, "0.4")])
    table = list(csv.DictReader(files["knockout_by_task.csv"].splitlines()))
    assert [(line["task"], line["probability"]) for line in table] == [("no task", "0.2000"), ("cars", "0.4000")]


@pytest.mark.parametrize("mode", ["flow", "knockout"])
def test_figure_has_a_curve_for_each_task(pages, mode):
    names = {"flow": ("share_image", "gradient_image", "p_after_layer"), "knockout": ("probability", "answer_right")}
    rows = [
        row(task, photo, layer, 0) | dict.fromkeys(names[mode], (layer + number) / 10)
        for number, task in enumerate(["animals", "cars", "places, and more"])
        for photo in "ab"
        for layer in range(4)
    ]
    np.asarray(next(iter(task_files(mode, rows).values()))())
    (figure,) = pages
    check_layout(figure)
    plots = [axes for axes in figure.axes if axes.get_xlabel()]
    assert len(plots) == len(names[mode])
    for axes in plots:
        assert [line.get_ydata()[0] for line in axes.get_lines()] == pytest.approx([0, 0.1, 0.2])


@pytest.fixture
def photos(tmp_path, image):
    """A list with two tasks, of three photos."""
    for i, name in enumerate(("one.png", "two.png", "three.png")):
        image.crop((0, 0, 168 - i, 112)).resize(image.size).save(tmp_path / name)
    records = [
        {"image": "one.png", "task": "animals"},
        {"image": "two.png", "task": "animals"},
        {"image": "three.png", "task": "cars"},
    ]

    def write(**more):
        (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(record | more) for record in records))
        return tmp_path / "list.jsonl"

    return write


@pytest.mark.parametrize(
    ("mode", "table", "column"),
    [("flow", "information_flow", "p_after_layer"), ("knockout", "knockout", "probability")],
)
def test_a_list_with_tasks_has_their_means(drive, tmp_path, photos, mode, table, column):
    flags = ["--image_path", photos(answer="red cat")]
    code, _, err = drive("--mode", mode, *flags, *(["--noise_std", 0] if mode == "flow" else []))
    assert (code, err) == (0, "")
    found = csv.DictReader((tmp_path / f"out/{mode}/{table}_by_task.csv").open())
    found = {(line["task"], line["layer"]): float(line[column]) for line in found}
    each = {
        name: [float(line[column]) for line in csv.DictReader((tmp_path / f"out/{mode}/{name}/{table}.csv").open())]
        for name in ("one", "two", "three")
    }
    for layer in range(4):
        mean = (each["one"][layer] + each["two"][layer]) / 2
        assert found["animals", str(layer)] == pytest.approx(mean, abs=1e-4)
        assert found["cars", str(layer)] == pytest.approx(each["three"][layer], abs=1e-4)
    assert (tmp_path / f"out/{mode}/{table}_by_task.png").is_file()


def test_answers_with_tasks_have_their_means(drive, tmp_path, photos):
    flags = ["--answers", photos(answer="red cat", prompt="what?"), "--max_new_tokens", 2]
    assert drive("--mode", "knockout", *flags)[0] == 0
    found = list(csv.DictReader((tmp_path / "out/knockout/knockout_by_task.csv").open()))
    assert {(line["task"], line["photos"]) for line in found} == {("animals", "2"), ("cars", "1")}
    assert {"answer_right", "answer_right_low", "probability"} <= set(found[0])
    tasks = [line["task"] for line in csv.DictReader((tmp_path / "out/knockout/answers_table.csv").open())]
    assert tasks == ["", "animals", "cars"]


def test_a_task_is_a_text(drive, photos, tmp_path):
    photos()
    lines = (tmp_path / "list.jsonl").read_text().splitlines()
    (tmp_path / "list.jsonl").write_text("\n".join([*lines[:2], json.dumps({"image": "three.png", "task": 3})]))
    code, _, err = drive("--mode", "knockout", "--image_path", tmp_path / "list.jsonl", "--answer", "red")
    assert code == 1
    assert "list.jsonl, line 3 has no text for 'task'" in err
