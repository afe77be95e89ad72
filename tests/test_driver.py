"""The command line, in-process: what each mode writes, what each flag changes, what is refused before anything is."""

import csv
import gc
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import driver_process
import numpy as np
import pytest
import torch
from conftest import load_once, make_image
from flags_in_modes import DRIVER, OUTSIDE, PAIRS, ROOT
from PIL import Image

import common.checkpoint
import common.evidence
import common.files
import common.flags
import common.page
import smooth_gradcam as core
import test_gradcam
import visualization_utils
from common.checkpoint import load_processor
from common.evidence import explain_with_evidence
from common.families import cap_pixels
from common.flags import FOLDERS, MODES_OF_FLAG, OF_ANSWERS, parse_args
from smooth_gradcam import ExplanationError, compute_token_maps, get_model_layers
from studies import faithfulness, knockout
from test_gradcam import choose_layers, single_layer_visualization
from visualization_utils import (
    create_comparative_analysis,
    create_layer_comparison_grid,
    ninths,
    quarters,
    select_layers,
    visualize_multiple_layers,
)

PICTURES = ("heatmap", "superimposed")
ANSWER = "the red cat"


@pytest.fixture
def raw(drive, tmp_path):
    """The maps.npz of a run in single mode at layer 1."""

    def raw(*flags):
        code, _, err = drive("--layer", 1, "--save_raw", "--quiet", *flags)
        assert code == 0, err
        with np.load(tmp_path / "out/single/maps.npz") as file:
            return dict(file)

    return raw


@pytest.fixture
def no_model(drive, monkeypatch):
    """Loading a model or its processor fails the test."""
    for name in ("load_model", "load_processor"):
        monkeypatch.setattr(test_gradcam, name, lambda *_: pytest.fail("loaded"))


def written(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def of_layers(*layers, folder=""):
    return {f"{folder}layer_{layer}_{kind}.png" for layer in layers for kind in PICTURES}


SINGLE = {"original_image.png", "heatmap.png", "superimposed_result.png", "visualization.png"}
MODES = {
    "single": (["--layer", "2"], "single", SINGLE),
    "grid": (["--layer_range", "1", "-1"], "grid", {"layer_comparison_grid.png"} | of_layers(1, 3)),
    "multi": (
        ["--layers", "3", "0"],
        "multilayer",
        {"all_layers_comparison.png", "original_image.png"} | of_layers(0, 3),
    ),
    "comparative": (
        [],
        "comparative",
        {"comparative_analysis.png"}
        | {f"{third}/layer_comparison_grid.png" for third in ("early", "middle", "late")}
        | of_layers(0, folder="early/")
        | of_layers(1, folder="middle/")
        | of_layers(2, 3, folder="late/"),
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_writes_exactly_its_files_and_names_them(drive, tmp_path, mode, image):
    flags, folder, names = MODES[mode]
    code, out, err = drive("--mode", mode, *flags, "--answer", ANSWER)
    assert (code, err) == (0, "")
    assert written(tmp_path / "out") == {f"{folder}/{name}" for name in names}
    lines = out.splitlines()
    assert lines[0] == f"answer: {ANSWER}"
    assert lines[1].startswith("explained: the whole answer")
    assert lines[2].startswith("evidence: p ")
    doubts = [line for line in lines[3:] if line.startswith("warning: ")]
    assert {line.removeprefix("wrote ") for line in lines[3 + len(doubts) :]} == {
        str(tmp_path / "out" / folder / name) for name in names
    }
    for name in names:
        if "layer_" in name and "comparison" not in name:
            assert Image.open(tmp_path / "out" / folder / name).size == image.size


def test_generated_answer_is_explained_without_answer_flag(drive):
    code, out, _ = drive("--max_new_tokens", 4, "--layer", 0)
    assert code == 0
    assert len(out.splitlines()[0]) > len("answer: ")


def test_a_layer_without_gradient_is_said_and_grey(drive, tmp_path):
    code, out, _ = drive("--mode", "multi", "--layers", 0, 3, "--tap", "output", "--answer", ANSWER)
    assert code == 0
    assert "layer 3 has no map (no gradient): its pictures are grey panels" in out
    pixels = np.asarray(Image.open(tmp_path / "out/multilayer/layer_3_heatmap.png"))
    assert np.ptp(pixels, axis=-1).max() == 0
    assert np.ptp(np.asarray(Image.open(tmp_path / "out/multilayer/layer_0_heatmap.png")), axis=-1).max() > 0


def test_an_earlier_runs_layers_are_told_of_and_stay(drive, tmp_path):
    folder = tmp_path / "out/grid"
    first = drive("--mode", "grid", "--layer_range", 0, 1, "--answer", ANSWER, "--save_raw")
    assert "files of another run" not in first[1]
    (folder / "mine.png").write_bytes(b"mine")
    out = drive("--mode", "grid", "--layer_range", 1, 2, "--answer", ANSWER)[1]
    assert "grid holds files of another run too: 4 such as layer_0_heatmap.png" in out
    assert written(folder) == {"mine.png", "maps.npz", "layer_comparison_grid.png"} | of_layers(0, 1, 2)


# every flag


@pytest.fixture(scope="session")
def plain():
    return ["--answer", ANSWER]


@pytest.mark.parametrize(
    "flags",
    [
        ["--noise_std", "0", "--num_samples", "1"],
        ["--prompt", "cat"],
        ["--answer", "cat red"],
        ["--method", "product"],
        ["--method", "paper"],
        ["--dtype", "bfloat16"],
        ["--max_pixels", str(8 * 28 * 28)],
    ],
    ids=" ".join,
)
def test_a_flag_changes_the_map(raw, plain, flags):
    """Of all others `test_flag_changes_what_is_written_where_it_is_accepted` knows."""
    maps, changed = raw(*plain)["maps"], raw(*plain, *flags)["maps"]
    assert maps.shape != changed.shape or not np.array_equal(maps, changed)


def test_the_same_flags_give_the_same_map(raw, plain):
    np.testing.assert_array_equal(raw(*plain)["maps"], raw(*plain)["maps"])


def test_max_new_tokens_cuts_the_answer(raw):
    assert len(raw("--max_new_tokens", 2)["tokens"]) == 2
    assert len(raw("--max_new_tokens", 5)["tokens"]) == 5


def test_raw_file_holds_what_the_pass_knows(raw, model_folder, image):
    file = raw("--answer", ANSWER, "--target", "red", "--seed", 5, "--method", "gradcam")
    model = load_once(str(model_folder), "cpu", "auto")
    processor = load_processor(str(model_folder), 10**6)
    prompt = str(file["prompt"])
    settings = {"num_samples": 2, "noise_std": 0.15, "seed": 5, "answer": ANSWER, "target": "red"}
    expected = compute_token_maps(model, processor, image, prompt, [1], by=explain_with_evidence, **settings)
    np.testing.assert_array_equal(file["maps"], expected.maps[1][None])
    assert file["maps"].dtype == np.float32
    assert tuple(file["grid"]) == expected.grid == (4, 6)
    assert file["layers"].tolist() == [1]
    assert file["tokens"].tolist() == expected.tokens
    assert file["target_tokens"].tolist() == expected.target_tokens
    assert (str(file["answer"]), str(file["target"]), int(file["seed"])) == (ANSWER, "red", 5)
    assert (tuple(file["evidence"]), list(file["likeness"])) == (expected.evidence[:2], [expected.likeness[1]])
    assert json.loads(str(file["settings"])).items() >= asdict(expected.settings).items()
    assert json.loads(str(file["versions"]))["torch"] == torch.__version__.split("+")[0]


def test_max_pixels_only_lowers_the_cap(raw, plain):
    assert raw(*plain, "--max_pixels", 10**9)["grid"].tolist() == [4, 6]
    assert np.prod(raw(*plain, "--max_pixels", 6 * 28 * 28)["grid"]) <= 6
    assert np.prod(raw(*plain, "--max_pixels", 28 * 28)["grid"]) == 1  # below the processor's smallest picture


def test_cap_never_raises_what_the_processor_allows(model_folder):
    processor = load_processor(str(model_folder), 10**9).image_processor
    assert dict(processor.size)["longest_edge"] == 200 * 28 * 28
    with pytest.raises(ValueError, match="784"):
        cap_pixels(processor, 783)


def test_progress_is_silent_where_there_is_no_terminal(drive):
    assert drive("--answer", ANSWER)[2] == ""


def test_no_function_of_the_driver_looks_like_a_test():
    assert not [name for name in vars(test_gradcam) if name.startswith("test_")]


# evaluate mode


EVALUATE = ["--mode", "evaluate", "--layers", "0", "2", "--steps", "4", "--answer", ANSWER, "--target", "cat"]
SCORES = ["layer", "insertion", "deletion", "difference", "p", "without_hottest_10_percent", "baseline_picture"]
FITS = ["pointing", "near", "energy", "obj_iou"]
METHODS_COMPARED = ["gradcam", "hirescam", "product", "paper", "attention", "rollout", "chefer", "parent", "needed"]


@pytest.fixture
def undoubted(monkeypatch):
    """What the tiny model says counts as said, and as coming from the photo."""
    monkeypatch.setattr(common.evidence, "DOUBTED", 0)
    monkeypatch.setattr(common.evidence, "UNSAID", 0)
    monkeypatch.setattr(common.evidence, "PHOTOLESS", 1)


@pytest.fixture(scope="session")
def mask_path(tmp_path_factory, image):
    """The right half is the object."""
    mask = Image.new("1", image.size)
    mask.paste(1, (image.width // 2, 0, *image.size))
    mask.save(path := tmp_path_factory.mktemp("mask") / "mask.png")
    return path


def read_csv(path):
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ([], set()),
        (["--save_raw"], {"maps.npz"}),
        (["--randomize"], {"randomization.png", "randomization.csv"}),
        (["--randomize", "--save_raw", "--mask", "{mask}"], {"randomization.png", "randomization.csv", "maps.npz"}),
    ],
    ids=lambda names: " ".join(sorted(names)) or "plain",
)
def test_evaluate_mode_writes_exactly_its_files_and_names_them(drive, tmp_path, mask_path, flags, names):
    code, out, err = drive(*EVALUATE, *(str(word).format(mask=mask_path) for word in flags))
    assert (code, err) == (0, "")
    folder = tmp_path / "out/evaluate"
    assert written(tmp_path / "out") == {f"evaluate/{name}" for name in names | {"faithfulness.png", "scores.csv"}}
    assert {line for line in out.splitlines() if line.startswith("wrote ")} == {
        f"wrote {path}" for path in folder.iterdir()
    }
    rows = read_csv(folder / "scores.csv")
    assert [row["layer"] for row in rows] == ["0", "2", "random"]
    assert list(rows[0]) == [*SCORES, *FITS * ("--mask" in flags), "kept", "doubt"]
    for row in rows:
        assert all(0 <= float(row[name]) <= 1 for name in [*SCORES[1:], "kept"] if name != "difference")
        assert bool(row["doubt"]) == (float(row["p"]) < 0.1 or float(row["kept"]) > 0.8)
        assert float(row["difference"]) == pytest.approx(float(row["insertion"]) - float(row["deletion"]), abs=2e-4)
        assert {bool(row[name]) for name in FITS if name in row} <= {row["layer"] != "random"}
    if "--randomize" in flags:
        rows = read_csv(folder / "randomization.csv")
        assert list(rows[0]) == ["redrawn_layers", "layer", "spearman", "ssim"]
        assert [(row["redrawn_layers"], row["layer"]) for row in rows] == [
            (str(number), layer) for number in range(5) for layer in "02"
        ]
        assert {(row["spearman"], row["ssim"]) for row in rows[:2]} == {("1.0000", "1.0000")}
        assert all(-1 <= float(row["spearman"]) < 0.999 for row in rows[-2:])


@pytest.mark.usefixtures("undoubted")
def test_comparison_measures_every_method_at_every_layer_beside_one_set_of_random_orders(drive, tmp_path, mask_path):
    code, out, err = drive(*EVALUATE, "--compare", "--mask", mask_path)
    assert (code, err) == (0, "")
    assert written(tmp_path / "out") == {"evaluate/comparison.png", "evaluate/comparison.csv"}
    rows = read_csv(tmp_path / "out/evaluate/comparison.csv")
    none = re.findall(r"(\w+) at layer (\d) has no map \(zero everywhere\): it is left out", out)
    assert none == [("paper", "0")]
    there = [(method, layer) for method in METHODS_COMPARED for layer in "02" if (method, layer) not in none]
    assert [(row["method"], row["layer"]) for row in rows] == [*there, ("random", "")]
    values = {(row["method"], row["layer"]): float(row["difference"]) for row in rows[:-1]}
    for method in METHODS_COMPARED:
        own = {layer: values[key] for key in there for layer in key[1] if key[0] == method}
        best, mean = max(own, key=own.get), np.mean(list(own.values()))
        line = f"{method}: insertion - deletion {own[best]:.2f} at layer {best}, mean over the layers {mean:.2f}"
        assert line.replace("-0.00", "0.00") in out
    # one explanation of each method is the one that the usual mode makes
    drive(*EVALUATE)
    alone = {row["layer"]: row["insertion"] for row in read_csv(tmp_path / "out/evaluate/scores.csv")}
    assert {row["layer"]: row["insertion"] for row in rows if row["method"] == "needed"} == {
        layer: value for layer, value in alone.items() if layer != "random"
    }


def test_the_expected_time_comes_first_and_only_if_not_quiet(drive):
    assert re.match(r"expected: about \d+ pictures, \d+\.\d\d s each: \d+\.\d minutes\n", drive(*EVALUATE)[1])
    assert "expected:" not in drive(*EVALUATE, "--quiet")[1]


def a_number(pattern, text):
    (found,) = re.findall(pattern, text)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.usefixtures("undoubted")
def test_verdict_says_the_numbers_of_the_tables(drive, tmp_path, mask_path, monkeypatch):
    """Of a model that sees: what the tiny one gives for a probability is next to nothing."""
    monkeypatch.setattr(
        faithfulness, "localization", lambda cam, mask: dict(zip(FITS, (0, 1, 0.25, 0.125), strict=True))
    )
    monkeypatch.setattr(common.page, "DPI", 40)
    folder = tmp_path / "out/evaluate"
    real, tenth = faithfulness.insertion_deletion, []

    def stronger(*args, **kwargs):
        measured = real(*args, **kwargs)
        shares = measured.shares
        tenth.append(shares[np.abs(shares - 0.1).argmin()])
        for curves, values in ((measured.insertion, (shares, shares**2)), (measured.deletion, (1 - shares,) * 2)):
            curves.update(zip(curves, [0.9 * value for value in values], strict=True))
        measured.random_insertion[:] = 0.9 * shares
        measured.random_deletion[:] = 0.9 * np.sqrt(1 - shares)
        measured.random_insertion[1] *= 0.9
        return measured

    monkeypatch.setattr(faithfulness, "insertion_deletion", stronger)
    code, out, _ = drive(*EVALUATE, "--mask", mask_path, "--randomize")
    assert code == 0
    first, second, random = (
        {k: float(v or 0) if k != "layer" else v for k, v in row.items()} for row in read_csv(folder / "scores.csv")
    )
    assert first["p"] == 0.9
    (kept,) = a_number(r"\nevidence: p \S+, (\d+) % of it left without the photo\n", out)
    assert float(kept) == pytest.approx(100 * first["kept"], abs=0.51)
    for row in (first, second):
        line = next(line for line in out.splitlines() if line.startswith(f"layer {row['layer']}: removing"))
        lost, by_chance = (100 * (0.9 - line_row["without_hottest_10_percent"]) / 0.9 for line_row in (row, random))
        found = a_number(r"costs the answer (\S+) % of its probability; a random 10 % costs the answer (\S+) %", line)
        assert [float(value) for value in found] == pytest.approx([lost, by_chance], abs=0.51)
        assert lost == pytest.approx(100 * tenth[0], abs=0.01)
        assert line.endswith("; the maximum lies next to the object, 25 % of the map inside it")
    assert first["difference"] > second["difference"] + 0.05
    best, *numbers = a_number(
        r"most faithful: layer (\d), insertion (\S+) - deletion (\S+) = (\S+); 5 random orders: (\S+) to (\S+)", out
    )
    assert best == "0"
    chance = 0.9 * 0.5 - random["deletion"]
    expected = [first["insertion"], first["deletion"], first["difference"], 0.81 * 0.5 - random["deletion"], chance]
    assert [float(number) for number in numbers] == pytest.approx(expected, abs=0.006)
    assert "1 of 2 maps beat every random order: do not rely on the others" in out
    assert "note: on the baseline picture" not in out
    rows = read_csv(folder / "randomization.csv")
    mean = np.mean([float(row["spearman"]) for row in rows[-2:]])
    (likeness,) = a_number(r"keep a mean rank correlation of (\S+):", out)
    assert float(likeness) == pytest.approx(mean, abs=0.0051)
    depends = (
        "the maps depend on what the model has learned" if mean < 0.5 else "note: the maps hardly depend on the model"
    )
    assert depends in out


@pytest.mark.usefixtures("undoubted")
def test_verdict_warns_where_there_is_little_to_measure(drive, monkeypatch):
    monkeypatch.setattr(
        "studies.faithfulness.token_probabilities", lambda model, forced, pixels, scored: np.full((len(pixels), 1), 0.5)
    )
    said = "note: on the baseline picture alone the answer keeps 100 % of its probability, so no map can score high"
    alone, compared = drive(*EVALUATE)[1], drive(*EVALUATE, "--compare")[1]
    assert alone.count(said) == alone.count("note: ") == 1
    assert compared.count(said) == compared.count("note: on the") == 1
    assert "none leads: no map beats the random orders" in compared


@pytest.mark.parametrize("flags", [[], ["--compare"]], ids=["alone", "compared"])
def test_of_words_that_are_doubted_no_map_is_the_most_faithful(drive, flags):
    """Once it is said why, in words that no other line repeats."""
    out = drive(*EVALUATE, *flags)[1]
    (doubt,) = re.findall(r"\nwarning: (.*): the map is faded, and not to be believed\n", out)
    assert doubt.startswith("the model hardly says this (p ")
    assert out.count("hardly") == 1
    verdict = "no map of these words is to be believed, whatever it scores\n"
    assert out.count(f"\n{'none leads: ' * bool(flags)}{verdict}") == 1
    assert not re.search("most faithful|as good|leads: gradcam|note: ", out)


def test_the_tenth_that_the_verdict_speaks_of_is_measured(drive, tmp_path):
    """And not read between two steps that lie far apart."""
    hot = []
    for steps in (1, 1000):
        assert drive(*EVALUATE[: EVALUATE.index("--steps")], "--steps", steps)[0] == 0
        rows = list(csv.DictReader((tmp_path / "out/evaluate/scores.csv").open()))
        hot.append([row["without_hottest_10_percent"] for row in rows if row["layer"] != "random"])
    assert hot[0] == hot[1]


def test_an_earlier_randomization_is_told_of_and_stays(drive, tmp_path):
    drive(*EVALUATE, "--randomize")
    out = drive(*EVALUATE)[1]
    assert "evaluate holds files of another run too: 2 such as randomization.csv" in out
    assert (tmp_path / "out/evaluate/randomization.png").exists()


@pytest.mark.usefixtures("undoubted")
def test_answer_that_cannot_be_has_a_verdict(drive, tmp_path, monkeypatch):
    """Probabilities that are zero in float32."""
    monkeypatch.setattr(
        "studies.faithfulness.token_probabilities", lambda model, forced, pixels, scored: np.zeros((len(pixels), 1))
    )
    code, out, _ = drive(*EVALUATE)
    assert code == 0
    assert {row["p"] for row in read_csv(tmp_path / "out/evaluate/scores.csv")} == {"0.0000"}
    assert "costs the answer 0 % of its probability" in out
    assert "0 of 2 maps beat every random order" in out
    assert "-0" not in out.split("wrote ")[0]


def test_whole_answer_can_be_evaluated(drive, tmp_path):
    code, out, _ = drive("--mode", "evaluate", "--layers", 1, "--steps", 3, "--answer", ANSWER)
    assert code == 0
    assert "\nexplained: the whole answer" in out
    assert len(read_csv(tmp_path / "out/evaluate/scores.csv")) == 2


@pytest.mark.usefixtures("undoubted")
def test_evaluate_mode_leaves_out_a_layer_without_gradient_and_says_so(drive, tmp_path):
    flags = ["--mode", "evaluate", "--tap", "output", "--layers", 2, 3, "--steps", 3, "--answer", ANSWER]
    code, out, _ = drive(*flags, "--randomize")
    assert code == 0
    assert "layer 3 has no map (no gradient): it is left out" in out
    assert " of 1 maps beat" in out
    assert [row["layer"] for row in read_csv(tmp_path / "out/evaluate/scores.csv")] == ["2", "random"]
    assert {row["layer"] for row in read_csv(tmp_path / "out/evaluate/randomization.csv")} == {"2"}


@pytest.fixture
def pictures(model_folder):
    """How many pictures each pass through the model has, and whether activations are recomputed for it."""
    seen, model = [], load_once(str(model_folder), "cpu", "auto")
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            (len(kwargs["input_ids"]), "forward" in vars(get_model_layers(module)[0][0]))
        ),
        with_kwargs=True,
    )
    yield seen
    handle.remove()


COPIES = {
    **dict.fromkeys(("single", "grid", "multi", "comparative", "flow"), []),
    "words": ["--words", "cat"],
    "evaluate": ["--steps", "3", "--quiet", "--randomize"],
}


@pytest.mark.parametrize("mode", COPIES)
def test_noisy_copies_are_run_at_once_in_every_mode_that_has_them(drive, pictures, mode):
    def passes(*flags):
        pictures.clear()
        assert drive("--mode", mode, "--answer", ANSWER, "--num_samples", 3, *COPIES[mode], *flags)[0] == 0
        return pictures.copy()

    assert (3, False) in passes("--batch_size", 3)
    assert max(passes("--batch_size", 1)) == (1, False)
    found = passes("--batch_size", 2, "--recompute")
    assert {(2, True), (1, True)} <= set(found)
    assert max(found)[0] == 2


def test_runs_of_evaluate_and_knockout_mode_are_eight_at_once_unless_told(drive, monkeypatch):
    seen = []
    for module, name in ((faithfulness, "insertion_deletion"), (knockout, "knockout")):
        usual = getattr(module, name)

        def spy(*args, usual=usual, **options):
            seen.append(options["batch_size"])
            return usual(*args, **options)

        monkeypatch.setattr(module, name, spy)
    for flags in ([], ["--batch_size", "3"]):
        assert drive(*EVALUATE, "--quiet", *flags)[0] == 0
        assert drive("--mode", "knockout", "--answer", ANSWER, "--quiet", *flags)[0] == 0
    assert seen == [8, 8, 3, 3]


def test_batch_size_is_how_many_pictures_are_run_at_once(drive, tmp_path, model_folder):
    batches, table = {}, {}
    for size in (1, 2, 8):
        seen = batches[size] = []
        handle = load_once(str(model_folder), "cpu", "auto").register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        assert drive(*EVALUATE, "--quiet", "--batch_size", size)[0] == 0
        handle.remove()
        table[size] = (tmp_path / "out/evaluate/scores.csv").read_text()
    assert [max(batches[size]) for size in (1, 2, 8)] == [1, 2, 4]  # 3 steps between the ends, and the tenth
    assert len(batches[1]) > len(batches[2]) > len(batches[8])
    assert table[1] == table[2] == table[8]


def test_mask_is_turned_with_the_photo(drive, tmp_path, image, mask_path):
    """Both may come from a camera that was held upright; what counts is how they are seen."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, picture in (("photo", image), ("mask", Image.open(mask_path))):
        picture.rotate(90, expand=True).save(tmp_path / f"{name}.png", exif=exif)
    turned = ["--image_path", tmp_path / "photo.png", "--mask", tmp_path / "mask.png"]
    drive(*EVALUATE, "--mask", mask_path)
    expected = (tmp_path / "out/evaluate/scores.csv").read_text()
    assert drive(*EVALUATE, *turned)[0] == 0
    assert (tmp_path / "out/evaluate/scores.csv").read_text() == expected


# words mode


WORDS = ["--mode", "words", "--layers", "0", "2"]


@pytest.mark.parametrize(
    ("answer", "flags", "words"),
    [
        (ANSWER, [], ["red", "cat"]),
        (ANSWER, ["--words", "all"], ["the", "red", "cat"]),
        (ANSWER, ["--words", "cat, the"], ["the", "cat"]),
        ("cat, red cat", ["--words", "cat"], ["cat", "cat (2)"]),
        ("左边有一只猫 🐱.", ["--words", "猫,🐱"], ["猫", "🐱"]),
        ("<b>$cat$</b>", ["--words", "$cat$"], ["$cat$"]),
    ],
)
def test_words_mode_writes_exactly_its_files_and_names_them(drive, tmp_path, answer, flags, words):
    code, out, err = drive(*WORDS, "--answer", answer, *flags)
    assert (code, err) == (0, "")
    folder, names = tmp_path / "out/words", {"words_by_layer.png", "index.html", "words.json", "maps.npz"}
    assert written(tmp_path / "out") == {f"words/{name}" for name in names}
    assert out.splitlines()[:2] == [f"answer: {answer}", f"explained: {', '.join(words)} at layer 0, 2"]
    rest = [line for line in out.splitlines()[2:] if not line.startswith("warning: ")]
    assert {line.removeprefix("wrote ") for line in rest} == {str(folder / name) for name in names}
    about = json.loads((folder / "words.json").read_text(encoding="utf-8"))
    assert [word["name"] for word in about["words"]] == words
    assert about["answer"] == answer
    with np.load(folder / "maps.npz") as file:
        assert file["maps"].shape == (len(words), 2, 4, 6)
        assert file["words"].tolist() == words
        spans = file["spans"].tolist()
    for word, span, maps in zip(about["words"], spans, np.load(folder / "maps.npz")["maps"], strict=True):
        assert answer[slice(*span)] == word["word"]
        assert span == word["span"]
        assert len(word["tokens"]) == len(word["token_ids"]) == len(word["probabilities"])
        assert [word["maxima"][layer] for layer in "02"] == pytest.approx(maps.max((1, 2)).tolist())


def test_chinese_answer_is_cut_into_words(drive, tmp_path):
    assert drive(*WORDS, "--answer", "左边有猫")[0] == 0
    about = json.loads((tmp_path / "out/words/words.json").read_text(encoding="utf-8"))
    assert [word["name"] for word in about["words"]] == ["左", "边", "猫"]  # 有 is a function word
    assert [word["tokens"] for word in about["words"]] == [["左"] * 3, ["边"] * 3, ["猫"] * 3]  # a token is a byte here


def test_words_and_evaluate_mode_agree_on_the_probability(drive, tmp_path):
    drive(*EVALUATE)
    drive(*WORDS, "--answer", ANSWER, "--words", "cat")
    (word,) = json.loads((tmp_path / "out/words/words.json").read_text(encoding="utf-8"))["words"]
    score = read_csv(tmp_path / "out/evaluate/scores.csv")[0]["p"]
    assert np.mean(word["probabilities"]) == pytest.approx(float(score), abs=5e-5)
    assert float(score) > 1e-3


def test_words_maps_are_those_of_single_mode(drive, tmp_path):
    drive("--answer", ANSWER, "--target", "cat", "--layer", 2, "--save_raw")
    drive(*WORDS, "--answer", ANSWER)
    single = np.load(tmp_path / "out/single/maps.npz")["maps"][0]
    np.testing.assert_allclose(np.load(tmp_path / "out/words/maps.npz")["maps"][1, 1], single, rtol=1e-4, atol=1e-9)


def test_words_mode_says_where_no_gradient_is(drive):
    code, out, _ = drive("--mode", "words", "--tap", "output", "--layers", 2, 3, "--answer", ANSWER)
    assert code == 0
    assert out.count("has no map") == 1
    assert "layer 3 has no map of any word (no gradient): its pictures are grey panels" in out


# which flag acts in which mode


@pytest.mark.parametrize(("flag", "mode"), [pair for pair in PAIRS if pair[1] not in MODES_OF_FLAG[pair[0]]])
@pytest.mark.usefixtures("no_model")
def test_flag_is_refused_in_a_mode_where_it_cannot_act(drive, tmp_path, flag, mode):
    given = [flag] if OUTSIDE[flag] is None else [f"{flag}={OUTSIDE[flag]}"]
    code, out, err = drive("--mode", mode, *given)
    assert (code, out) == (2, "")
    acts = ", ".join(MODES_OF_FLAG[flag])
    assert err.startswith(f"test_gradcam.py: error: {flag} acts in {acts} mode only; in {mode} mode ")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


USUAL = ["--answer", "red cat, red dog", "--num_samples", "1", "--target", "red", "--steps", "4"]
IN_MODE = {mode: USUAL[:6] if mode != "evaluate" else USUAL for mode in FOLDERS} | {"words": USUAL[:4]}
IN_MODE["knockout"] = [*USUAL[:2], *USUAL[4:6], "--window", "3"]


@pytest.fixture(scope="module")
def usual():
    """What a run of each mode without the flag in question says and writes."""
    return {}


ACTING = [(flag, mode) for flag, mode in PAIRS if mode in MODES_OF_FLAG[flag]]
ACTING = [pair for pair in ACTING if pair[0] != "--recompute"]  # the same maps, for less memory: see above
COLOURS = ("--colormap", "--opacity", "--upsample", "--scale")  # act on pictures: see below
ACTING = [pair for pair in ACTING if pair[0] not in (*COLOURS, "--heatmaps", "--width")]
ACTING = [pair for pair in ACTING if pair[0] not in ("--together", "--video", "--fps")]  # see test_pictures.py
ACTING.remove(("--mask", "flow"))  # acts on --heads: see test_attention.py
ACTING = [pair for pair in ACTING if pair[0] not in ("--answers", *OF_ANSWERS)]  # of a list: see below


@pytest.mark.parametrize(("flag", "mode"), ACTING)
def test_flag_changes_what_is_written_where_it_is_accepted(drive, tmp_path, mask_path, usual, flag, mode):
    def outcome(*flags):
        code, _, err = drive("--mode", mode, *IN_MODE[mode], *flags)
        assert code == 0, err
        files = {name: (tmp_path / "out" / name).read_bytes() for name in written(tmp_path / "out")}
        if mode == "flow":
            arrays = np.load(tmp_path / "out/flow/information_flow.npz")
            files["flow/arrays"] = b"".join(arrays[f"{name}_0"].tobytes() for name in ("maps", "attention", "gradient"))
            del files["flow/information_flow.csv"]  # knows no method
        return files

    if mode not in usual:
        usual[mode] = outcome()
        shutil.rmtree(tmp_path / "out")
    value = [] if OUTSIDE[flag] is None else [OUTSIDE[flag].format(mask=mask_path)]
    value = ["dog"] if flag == "--target" else [*value, "--method", "attention"] if flag == "--head" else value
    before, files = usual[mode], outcome(flag, *value)
    if flag in ("--save_raw", "--randomize", "--attention_maps", "--taps", "--heads"):
        assert set(files) > set(before)
    elif flag in ("--layer_range", "--layers"):
        assert files != before
    else:  # what is known of the maps, beside a figure's text
        watched = [name for name in before if "heatmap" in name or name.endswith((".csv", "words.json", "arrays"))]
        assert watched
        assert all(files.get(name) != before[name] for name in watched)


def check_look(drive, tmp_path, mode, flags):
    """Each flag of the colours changes pictures, the page of words, and nothing else."""

    def outcome(*flags):
        code, _, err = drive("--mode", mode, *IN_MODE[mode], *flags)
        assert code == 0, err
        return {name: (tmp_path / "out" / name).read_bytes() for name in written(tmp_path / "out")}

    before = outcome(*flags)
    for flag in COLOURS:
        if mode in MODES_OF_FLAG.get(flag, FOLDERS):
            files = outcome(*flags, flag, OUTSIDE[flag])
            changed = {name for name in before if files[name] != before[name]}
            assert changed
            assert all(name.endswith((".png", "index.html")) for name in changed if not name.endswith(".npz"))


@pytest.mark.parametrize("mode", ["single", "grid", "multi", "comparative"])
def test_flags_of_the_colours_change_pictures_and_nothing_else(drive, tmp_path, mode):
    check_look(drive, tmp_path, mode, [])


@pytest.mark.parametrize("mode", ["words", "evaluate", "flow"])
def test_flags_of_the_colours_change_figures_and_nothing_else(drive, drawn, tmp_path, mode):
    check_look(drive, tmp_path, mode, ["--layers", "1"])


@pytest.mark.parametrize("mode", FOLDERS)
def test_every_figure_of_a_mode_is_made_for_the_paper_that_is_asked_for(drive, tmp_path, monkeypatch, mode):
    """Its files are written in the formats, its width and heatmaps are those of the flags."""
    papers, usual = [], common.page.Paper.figure
    monkeypatch.setattr(common.page.Paper, "figure", lambda *given: papers.append(given[0]) or usual(*given))
    flags = {"flow": ["--attention_maps", "--taps"], "evaluate": ["--randomize"]}.get(mode, [])
    flags += ["--heatmaps"] if mode in MODES_OF_FLAG["--heatmaps"] else []
    code, _, err = drive("--mode", mode, *IN_MODE[mode], *flags, "--format", "svg", "pdf", "svg", "--width", "column")
    assert code == 0, err
    assert {(paper.width, paper.heatmaps) for paper in papers} == {("column", mode == "multi" or "--heatmaps" in flags)}
    files = written(tmp_path / "out")
    pdf, svg, png = ({name[:-4] for name in files if name.endswith(suffix)} for suffix in (".pdf", ".svg", ".png"))
    pictures = {name for name in png if name.endswith(("heatmap", "superimposed", "superimposed_result", "image"))}
    assert pdf == svg == png - pictures
    assert len(papers) == len(pdf) > 0


@pytest.mark.parametrize("value", ["half", "fixed:1.5", "fixed:", "0.5", "fixed:-1"])
@pytest.mark.usefixtures("no_model")
def test_an_opacity_that_cannot_be_is_told(drive, value):
    code, _, err = drive(f"--opacity={value}")
    assert code == 2
    assert f"{value!r} must be value, or fixed:0.5 with a number from 0 to 1" in err


# lists of photos


@pytest.fixture
def listed(tmp_path):
    """A list of three photos, one of them damaged."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, size in enumerate([(168, 112), (112, 168), (168, 112)]):
        make_image(*size).rotate(90 * i).save(folder / f"p{i}.png")
    (folder / "p1.png").write_bytes((folder / "p1.png").read_bytes()[:200])
    box = {"box": [20, 20, 60, 40]}
    lines = [{"image": "photos/p0.png", "answer": ANSWER, "target": "red"} | box, {"image": "photos/p1.png"}]
    lines.append({"image": "photos/p2.png", "answer": "the cat", "target": "cat"} | box)
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "list.jsonl"


@pytest.mark.parametrize("mode", FOLDERS)
def test_every_mode_explains_a_list_as_each_photo_alone(drive, tmp_path, listed, mode):
    few = ["--steps", 4] if mode == "evaluate" else []
    code, out, err = drive("--mode", mode, "--image_path", listed, *few)
    assert code == 1
    assert err.count("\n") == 1
    assert "list.jsonl, line 2: " in err
    assert "3 photos: 2 explained in " in out
    folder = tmp_path / "out" / FOLDERS[mode]
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [record["name"] for record in records] == ["p0", "p1", "p2"]
    assert "error" in records[1]
    assert records[2]["answer"] == "the cat"
    if mode != "words":
        assert list(records[2]["evidence"]) == ["p", "kept", "doubt"]
    files = written(folder / "p2")
    assert files == {*records[2]["files"], "result.json"}
    if mode != "evaluate":
        asked = ["--target", "cat"] if mode != "words" else []
        code, _, err = drive("--mode", mode, "--image_path", tmp_path / "photos/p2.png", "--answer", "the cat", *asked)
        assert code == 0, err
        for name in files - {"result.json"}:
            assert (folder / name).read_bytes() == (folder / "p2" / name).read_bytes(), name
    before = {name: (folder / "p2" / name).stat().st_mtime_ns for name in files}
    code, out, _ = drive("--mode", mode, "--image_path", listed, *few)
    assert "3 photos: 0 explained in " in out
    assert " 2 skipped as complete, 1 failed" in out
    assert {name: (folder / "p2" / name).stat().st_mtime_ns for name in files} == before


def test_a_list_into_its_own_folder_takes_no_picture_of_its_own(drive, tmp_path):
    """The first time two photos, and again; also where a name is not UTF-8."""
    for name in (b"a", b"b\xff"):
        make_image(56, 84).save(Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name + b".png")))
    few = ("--answer", "cat", "--image_path", f"{tmp_path}/**/*.png", "--output_dir", tmp_path)
    for i, mode in enumerate(["single", "single", "single", "words", "flow"]):
        code, out, err = drive("--mode", mode, *few)
        assert (code, "Traceback" in err) == (0, False), err
        assert out.startswith(f"2 photos: {0 if i in (1, 2) else 2} explained in ")
        assert ("files that this tool wrote are left out of the list, such as" in err) == (i > 0)


def test_pictures_of_other_layers_beside_those_of_a_list_are_told(drive, tmp_path, listed):
    usual = ("--mode", "grid", "--image_path", tmp_path / "photos")
    assert "note: " not in drive(*usual, "--layers", 1, 2)[1]
    code, out, err = drive(*usual, "--layers", 1)
    assert (code, out) == (2, "")
    assert "p0 holds a result of --layers [1, 2], and now it is [1]: choose another --output_dir, or --overwrite" in err
    assert err.count("\n") == 1
    out = drive(*usual, "--layers", 1, "--overwrite")[1]
    assert re.search(r"note: beside these results stand 4 files of other runs, such as .*/p0/layer_2_heatmap.png", out)
    assert "note: beside these results stand 4 files of other runs" in drive(*usual, "--layers", 1)[1]


@pytest.mark.parametrize("given", ["photo", "mask", "list", "model", "photo of a list", "answers", "photo of answers"])
@pytest.mark.usefixtures("no_model")
def test_no_input_lies_where_the_run_writes(drive, tmp_path, photo_path, model_folder, given):
    """Whether it would be replaced or not; it is told before the model is loaded."""
    mode = {"mask": "evaluate", "answers": "knockout", "photo of answers": "knockout"}.get(given, "single")
    folder = tmp_path / "out" / mode
    folder.mkdir(parents=True)
    inside = shutil.copy(photo_path, folder / "original_image.png")
    line = json.dumps({"image": str(inside if "photo" in given else photo_path), "prompt": "red?", "answer": "red"})
    path = (tmp_path if "photo" in given else folder) / "results.jsonl"
    path.write_text(line)
    if given == "mask":
        Image.fromarray(np.eye(168, dtype=np.uint8)[:112] * 255).save(inside)
    flags = {
        "photo": ["--image_path", inside],
        "mask": ["--mask", inside],
        "list": ["--image_path", path],
        "photo of a list": ["--image_path", path],
        "answers": ["--answers", path],
        "photo of answers": ["--answers", path],
    }
    if given == "model":
        inside = shutil.copytree(model_folder, folder / "model")
        flags["model"] = ["--model_path", inside]
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    code, out, err = drive("--mode", mode, *flags[given])
    assert (code, out) == (2, "")
    named = inside if given not in ("list", "answers") else path
    assert f"the input {named} lies in {folder}, the folder that this run writes to: choose another --output_dir" in err
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_no_input_lies_where_the_builders_write(model, processor, image, tmp_path):
    image.save(tmp_path / "original_image.png")
    given = (model, processor, str(tmp_path / "original_image.png"), "red?")
    builders = (
        single_layer_visualization,
        create_layer_comparison_grid,
        visualize_multiple_layers,
        create_comparative_analysis,
    )
    for build in builders:
        with pytest.raises(ValueError, match="the input .*original_image.png lies in .* choose another save_dir"):
            build(*given, save_dir=tmp_path)


def test_benchmark_of_a_list_has_methods_layers_centre_and_random_rows(drive, tmp_path, listed):
    code, out, _ = drive("--mode", "evaluate", "--image_path", listed, "--compare", "--layers", 1, 2, "--steps", 4)
    assert code == 1
    with (tmp_path / "out/evaluate/benchmark.csv").open() as file:
        rows = list(csv.DictReader(file))
    layers = [(method, layer) for method in METHODS_COMPARED for layer in "12"]
    assert [(row["method"], row["layer"]) for row in rows] == [*layers, ("centre", ""), ("random", "")]
    assert {row["words"] for row in rows} == {"2"}
    for row in rows:
        assert 0 <= float(row["energy_low"]) <= float(row["energy"]) <= float(row["energy_high"]) <= 1
    assert "2 words in 2 photos" in out
    assert "\\toprule" in (tmp_path / "out/evaluate/benchmark.tex").read_text()


def test_target_that_the_models_own_answer_lacks_is_left_out_of_a_benchmark(drive, tmp_path, listed):
    listed.write_text('{"image": "photos/p0.png", "target": "xylophone"}\n')
    code, out, err = drive("--mode", "evaluate", "--image_path", listed, "--max_new_tokens", 4, "--steps", 4)
    assert (code, err) == (0, "")
    assert "1 left out: the model does not say the target" in out
    assert "no word could be measured" in out


# flow and knockout


FLOW = {"information_flow.png", "information_flow.csv", "information_flow.npz"}
KNOCKOUT = {"knockout.png", "knockout.csv", "knockout.npz"}


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["flow"], FLOW),
        (["flow", "--attention_maps", "--taps", "--layers", 0, -1], FLOW | {"attention_maps.png", "taps.png"}),
        (["knockout"], KNOCKOUT),
        (["knockout", "--window", 3, "--keep", 2, "--target", "red"], KNOCKOUT),
    ],
)
def test_studies_of_the_flow_write_their_files_and_tell_cost_and_finding(drive, tmp_path, flags, names):
    mode = flags[0]
    code, out, err = drive("--mode", *flags, "--answer", ANSWER)
    assert (code, err) == (0, "")
    found = {re.sub(r"_\d(?=\.png)", "", name) for name in written(tmp_path / "out")}  # further pages
    assert found == {f"{mode}/{name}" for name in names}
    lines = out.splitlines()
    assert "forward passes" in lines[0]
    assert lines[1] == f"answer: {ANSWER}"
    assert lines[2].startswith("explained")
    assert lines[3].startswith("evidence: p ")
    doubts = [line for line in lines[4:] if line.startswith("warning: ")]
    found = lines[4 + len(doubts)]
    assert found.startswith("attention: the image gets" if mode == "flow" else ("no cliff", "hidden from layer"))
    assert out.count("\nwrote ") == len(written(tmp_path / "out"))
    assert "→" not in out or "--window" in flags


@pytest.mark.parametrize("mode", ["flow", "knockout"])
def test_several_photos_are_one_study(drive, tmp_path, image, mode):
    paths = [tmp_path / name for name in ("landscape.png", "portrait.png")]
    image.save(paths[0])
    image.transpose(Image.Transpose.ROTATE_90).save(paths[1])
    code, out, err = drive("--mode", mode, "--answer", ANSWER, "--image_path", *paths)
    assert (code, err) == (0, "")
    assert f"landscape.png: {ANSWER}\nportrait.png: {ANSWER}\n" in out
    name = "information_flow" if mode == "flow" else mode
    rows = list(csv.DictReader((tmp_path / "out" / mode / f"{name}.csv").open()))
    alone = tmp_path / "alone"
    drive("--mode", mode, "--answer", ANSWER, "--image_path", paths[1], "--output_dir", alone)
    assert [row for row in rows if row["photo"] == "portrait.png"] == list(
        csv.DictReader((alone / mode / f"{name}.csv").open())
    )
    assert {row["photo"] for row in rows} == {"landscape.png", "portrait.png"}


def test_photos_of_one_name_are_told_apart(drive, tmp_path, image):
    paths = [tmp_path / name / "photo.png" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        image.save(path)
    code, out, _ = drive("--mode", "knockout", "--answer", ANSWER, "--image_path", *paths)
    assert code == 0
    assert all(f"{path}: {ANSWER}" in out for path in paths)


def test_a_target_that_one_photo_lacks_names_the_photo(drive, tmp_path, image, monkeypatch):
    paths = [tmp_path / name for name in ("one.png", "other.png")]
    for path in paths:
        image.save(path)
    answers = iter(["red cat", "red dog"])
    usual = test_gradcam.read
    monkeypatch.setattr(test_gradcam, "read", lambda *given: usual(*given[:4], next(answers), given[5]))
    code, _, err = drive("--mode", "flow", "--target", "cat", "--image_path", *paths)
    assert code == 2
    assert "other.png: " in err
    assert "'cat' is not in the answer 'red dog'" in err


@pytest.mark.parametrize("mode", ["single", "flow", "knockout"])
def test_a_target_that_one_photo_of_a_list_lacks_does_not_stop_the_others(drive, tmp_path, listed, mode):
    listed.write_text("".join(f'{{"image": "photos/p{i}.png", "target": "{word}"}}\n' for i, word in enumerate("xxr")))
    code, out, err = drive("--mode", mode, "--image_path", listed, "--answer", ANSWER)
    assert code == 1
    assert "line 1: target='x' is not in the answer 'the red cat'" in err
    assert "3 photos: 1 explained in " in out


@pytest.fixture
def answers_list(tmp_path, image):
    """Writes a list of questions about two photos that stand beside it; returns its path."""

    def write(*records):
        for name in ("one.png", "two.png"):
            image.save(tmp_path / name)
        path = tmp_path / "list.jsonl"
        path.write_text("\n".join(json.dumps(record) if isinstance(record, dict) else record for record in records))
        return path

    return write


def test_accuracy_over_a_list_is_what_the_model_would_answer(drive, tmp_path):
    record = {"image": str(ROOT / "demo.jpeg"), "prompt": "Is there a dog?", "answer": "Yes"}
    records = [
        record,
        record | {"answer": "No"},
        record | {"prompt": "Is there a cat?", "answer": "No, there is no cat."},
    ]
    (tmp_path / "list.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    flags = ["--model_path", ROOT / "demo_model", "--answers", tmp_path / "list.jsonl", "--keep", 5]
    code, out, err = drive("--mode", "knockout", *flags)
    assert (code, err) == (0, "")
    rows = list(csv.DictReader((tmp_path / "out/knockout/knockout.csv").open()))
    assert [row["answer_right"] for row in rows if row["layer"] == "28"] == ["1", "1", "0", "0", "1", "1"]
    assert "accuracy (answers that begin exactly as given) 0.333 without it, 0.667 with it" in out
    assert (
        "demo.jpeg, 'Is there a dog?': right would be 'No', the model says 'Yes, there is a dog at the bottom left.'"
        in out
    )
    assert "answer: " not in out


LISTS = {
    "": " is empty: give lines such as {",
    "nonsense": ", line 1 is not valid JSON (Expecting value",
    "[1, 2]": ", line 1 is not a JSON object: give {",
    '{"image": "one.png", "prompt": "red?"}': ", line 1 has no text for 'answer': give {",
    '{"image": "one.png", "prompt": "red?", "answer": " "}': ", line 1 has no text for 'answer': give {",
    '{"image": "one.png", "prompt": 3, "answer": "red"}': ", line 1 has no text for 'prompt': give {",
    '\n{"image": "none.png", "prompt": "red?", "answer": "red"}': ", line 2: the image ",
}


@pytest.mark.parametrize("text", LISTS)
@pytest.mark.usefixtures("no_model")
def test_a_bad_list_names_file_line_and_what_is_valid(drive, tmp_path, answers_list, text):
    path = answers_list(text)
    code, out, err = drive("--mode", "knockout", "--answers", path)
    assert (code, out) == (2, "")
    assert err.startswith(f"test_gradcam.py: error: --answers {path}{LISTS[text]}")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_special_token_in_a_list_is_told_with_its_line(drive, answers_list):
    record = {"image": "one.png", "prompt": "red?", "answer": "red"}
    path = answers_list("\ufeff" + json.dumps(record), json.dumps(record | {"prompt": "a\u2028b <|image_pad|>"}))
    code, _, err = drive("--mode", "knockout", "--answers", path)
    assert code == 2
    assert f"--answers {path}, line 2: prompt=" in err


@pytest.mark.parametrize(("flag", "value"), [("--keep", 24), ("--window", 5)])
def test_what_a_photo_or_model_does_not_have_is_refused(drive, flag, value):
    code, _, err = drive("--mode", "knockout", "--answer", ANSWER, flag, value)
    assert code == 2
    assert f"{flag[2:]}={value} must be 1 to {value - 1}: the " in err


# bad input


@pytest.fixture(scope="session")
def bad(tmp_path_factory, image, model_folder):
    """A folder of things that do not work."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no image")
    image.save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:700])
    Image.new("RGB", (2010, 10)).save(folder / "long.png")
    Image.new("RGB", image.size).save(folder / "black.png")
    Image.fromarray(np.full((3, 3), np.nan, np.float32)).save(folder / "nan.tiff")
    (folder / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    os.mkfifo(folder / "pipe")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    layers = '{"model_type": "qwen2_5_vl", "text_config": {"num_hidden_layers": %s}}'
    configs = {"list": "[]", "null": "null", "deep": "[" * 100_000, "zero": layers % 0, "minus": layers % -3}
    configs |= {"text": layers % '"28"', "odd": '{"model_type": "qwen2_5_vl", "text_config": [3]}'}
    configs["kernels"] = layers.replace("}}", '}, "_attn_implementation": "someone/kernel"}') % 4
    for name, text in configs.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)
    (folder / "no_config").mkdir()
    (folder / "llama").mkdir()
    (folder / "llama/config.json").write_text('{"model_type": "llama", "num_hidden_layers": 4}')
    (folder / "broken").mkdir()
    (folder / "broken/config.json").write_text('{"model_type": ')
    shutil.copytree(model_folder, folder / "no_processor", ignore=shutil.ignore_patterns("*processor*"))
    shutil.copytree(
        model_folder, folder / "no_tokenizer", ignore=shutil.ignore_patterns("*token*", "vocab*", "merges*")
    )
    shutil.copytree(model_folder, folder / "no_weights", ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


BAD = {  # flags: what the message says
    "--image_path {bad}/none.png": "none.png does not exist",
    "--image_path {bad}/no_config": "there is no photo (.jpg, .jpeg, .png, .webp, .bmp, .tif, .tiff, .gif, .avif,",
    "--image_path {bad}/*.jpeg": "no photo",
    "--image_path {bad}/none.jsonl": "none.jsonl cannot be read",
    "--mode evaluate --image_path {bad} --mask {bad}/black.png": "--mask cannot be combined with a list of photos",
    "--image_path {bad} --mode evaluate --randomize": "--randomize cannot be combined with a list of photos",
    "--image_path {bad}/text.png --overwrite": "--overwrite acts on a list of photos only",
    "--image_path {bad}/empty.png": "cannot be read as an image",
    "--image_path {bad}/text.png": "cannot be read as an image",
    "--image_path {bad}/cut.png": "truncated",
    "--image_path https://example.org/a.jpg": "a.jpg is an address: download the photo",
    "--image_path {bad}/pipe": "pipe is a folder, a pipe or a device, not an image file",
    "--image_path {bad}/phone.jpg": "phone.jpg is a HEIC photo: convert it to JPEG, e.g. with pillow-heif",
    "--image_path {long}": "argument --image_path: 'aaa",
    "--image_path {bad}/nan.tiff": "grey values nan to nan: they must be finite",
    "--image_path {bad}/long.png": "2010 x 10 pixels: sides up to 1 : 200",
    "--layer 4": "layer 4 does not exist: the model has 0 to 3, or -4 to -1",
    "--layer -5": "layer -5 does not exist",
    "--layer one": "invalid int value: 'one'",
    "--mode grid --layer_range 1 9": "layer 9 does not exist",
    "--mode grid --layer_range deep": "'deep' is none of auto, early, middle, late, all",
    "--mode grid --layer_range early 3": "--layer_range takes one of auto, early",
    "--mode words --layers all 3": "--layers takes one of auto, early",
    "--mode words --layers -3-2": "'-3-2' is none of auto, early",
    "--mode words --layers 3-1": "'3-1' is none of auto, early, middle, late, all, no index, and no list such as 6,12",
    "--mode words --layers 1,,2": "'1,,2' is none of",
    "--mode words --layers 0-99999": "'0-99999' is none of",
    "--mode multi --layers 2-5": "layer 4 does not exist: the model has 0 to 3",
    "--mode multi --layers 0 4": "layer 4 does not exist",
    "--mode single --layers 1 2": "words, evaluate, flow mode only; in single mode use --layer",
    "--mode single --layer_range all": "--layer_range acts in grid, multi, words, evaluate, flow mode only",
    "--mode grid --layer 1": "--layer acts in single mode only; in grid mode use --layers",
    "--mode multi --layer=1": "--layer acts in single mode only; in multi mode use --layers",
    "--mode comparative --layers 1": "mode only; in comparative mode early, middle and late",
    "--mode all": "invalid choice: 'all'",
    "--unknown 1": "unrecognized arguments: --unknown 1",
    "--num_samples 0": "num_samples=0 must be a whole number, 1 or more",
    "--noise_std -0.1": "noise_std=-0.1 must be 0 to 1",
    "--noise_std nan": "noise_std=nan must be 0 to 1",
    "--noise_std inf": "noise_std=inf must be 0 to 1",
    "--noise_std 15": "noise_std=15.0 must be 0 to 1 (0.15 is 15 % of the pixel range)",
    "--num_samples 99999999999999999999": "must be a whole number, 1 or more, and below 2^63",
    "--max_new_tokens 0": "argument --max_new_tokens: '0' must be a whole number, 1 or more",
    "--max_new_tokens 5 --answer cat": "--max_new_tokens cannot be combined with --answer",
    "--max_pixels 0": "argument --max_pixels: '0' must be a whole number, 1 or more",
    "--seed -1": "seed=-1 must be a whole number, 0 or more",
    "--prompt ' '": "argument --prompt: ' ' is empty",
    "--prompt \udcff": "is not valid text",
    "--answer ''": "argument --answer: '' is empty",
    "--target ''": "argument --target: '' is empty",
    "--answer cat --target dog": "target='dog' is not in the answer 'cat'",
    "--mode evaluate --steps 0": "argument --steps: '0' must be a whole number, 1 or more",
    "--mode evaluate --compare --method hirescam": "--method cannot be combined with --compare",
    "--mode evaluate --compare --randomize": "--randomize cannot be combined with --compare",
    "--mode evaluate --compare --save_raw": "--save_raw cannot be combined with --compare",
    "--mode evaluate --batch_size 0": "argument --batch_size: '0' must be a whole number, 1 or more",
    "--batch_size -2": "argument --batch_size: '-2' must be a whole number, 1 or more",
    "--batch_size all": "argument --batch_size: 'all' must be a whole number, 1 or more",
    "--batch_size 2.5": "argument --batch_size: '2.5' must be a whole number, 1 or more",
    "--mode knockout --recompute": "--recompute acts in single, grid, multi, comparative, words, evaluate, flow mode",
    "--mode evaluate --baseline x": "argument --baseline: invalid choice: 'x'",
    "--mode evaluate --mask {bad}/none.png": "none.png does not exist",
    "--mode evaluate --mask {bad}/text.png": "cannot be read as an image",
    "--mode evaluate --mask {bad}/long.png": "the mask has 2010 x 10 pixels, the photo 168 x 112",
    "--mode evaluate --mask {bad}/black.png": "the mask is all white or all black",
    "--mode evaluate --mask ''": "argument --mask: '' is empty",
    "--mode evaluate --layers 4": "layer 4 does not exist",
    "--mode words --layers 4": "layer 4 does not exist",
    "--mode words --words ''": "argument --words: '' has an empty word",
    "--mode words --words ,": "argument --words: ',' has an empty word",
    "--mode words --words cat,": "argument --words: 'cat,' has an empty word",
    "--mode words --words nothere --answer 'the red cat'": "words='nothere' is not in the answer 'the red cat'",
    "--rules warm": "argument --rules: invalid choice: 'warm'",
    "--contrast dog": "--contrast 'dog' needs a --target",
    "--contrast '' --target dog": "argument --contrast: '' is empty",
    "--target_occurrence 0 --target cat": "argument --target_occurrence: '0' must be a whole number, 1 or more",
    "--target_occurrence 2": "--target_occurrence 2 needs a --target",
    "--answer 'red cat' --target cat --target_occurrence 3": "target_occurrence=3 is more than the 1 of 'cat' in",
    "--device gpu": "--device gpu is not available: choose auto, map, cpu",
    "--model_path {bad}/none": "none does not exist",
    "--model_path {bad}/no_config": "has no config.json",
    "--model_path {bad}/empty.png": "has no config.json",
    "--model_path {bad}/llama": "is of type llama, which is not supported: supported are Qwen2-VL (qwen2_vl), ",
    "--model_path {bad}/broken": "is unreadable",
    "--model_path {bad}/list": "list is unreadable",
    "--mode knockout --mask {bad}/black.png": "--mask needs --window in knockout mode",
    "--mode knockout --window 3 --mask m.png --image_path a.png b.png": "--mask is of one photo",
    "--mode knockout --answers {bad}/none.jsonl": "none.jsonl cannot be read",
    "--mode knockout --answers list.jsonl --image_path a.png": "--image_path cannot be combined with --answers",
    "--mode knockout --answers list.jsonl --target cat": "--target cannot be combined with --answers",
    "--mode knockout --image_path a.png b.png a.png": "--image_path has a photo twice: a.png",
    "--mode knockout --layers 3": "in knockout mode every layer is tried",
    "--mode knockout --window 0": "argument --window: '0' must be a whole number, 1 or more",
    "--mode knockout --keep -1": "argument --keep: '-1' must be a whole number, 1 or more",
    "--mode flow --image_path {bad}/whole.png {bad}/cut.png": "truncated",
    "--model_path {bad}/null": "null is unreadable",
    "--model_path {bad}/deep": "deep is unreadable",
    "--model_path {bad}/odd": "odd is unreadable: its config.json holds no object where one is expected",
    "--model_path {bad}/kernels": "kernels wants attention code 'someone/kernel': this tool runs eager",
    "--model_path {bad}/zero": "num_hidden_layers 0: it must be 1 or more",
    "--model_path {bad}/minus": "num_hidden_layers -3: it must be 1 or more",
    "--model_path {bad}/text": "num_hidden_layers '28': it must be 1 or more",
    "--model_path {bad}/none_at_all": "none_at_all does not exist",
    "--model_path {long}": "argument --model_path: 'aaa",
    "--output_dir {long}": "argument --output_dir: 'aaa",
    "--output_dir {bad}/dangling": "dangling is a symbolic link that leads nowhere: choose another folder",
    "--output_dir {bad}/loop/deep": "--output_dir",
    "--output_dir {bad}/text.png": "text.png/single cannot be written (Not a directory)",
}


@pytest.mark.parametrize("flags", BAD)
@pytest.mark.usefixtures("no_model")
def test_bad_input_is_refused_before_the_model_is_loaded(drive, bad, tmp_path, flags):
    code, out, err = drive(*(word.format(bad=bad, long="a" * 5000) for word in shlex.split(flags)))
    assert (code, out) == (2, "")
    assert BAD[flags] in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


BAD_MODEL = {
    "--model_path {bad}/no_processor": "lacks a processor",
    "--model_path {bad}/no_tokenizer": "no_tokenizer lacks its tokenizer: it has neither",
    "--model_path {bad}/no_weights": "lacks its weights",
    "--max_pixels 700": "less than one image token: give 784 or more",
    "--target zebra --max_new_tokens 3": "target='zebra' is not in the answer",
    "--answer <|image_pad|>": "must be text",
    "--mode words --words zebra --max_new_tokens 3": "words='zebra' is not in the answer",
    "--mode words --answer ...": "words='content': there is none in the answer '...'",
    "--mode evaluate --tap output --layers 3 --answer cat": "no layer has a map (no gradient, or zero",
    "--prompt a<|im_end|>b": "'a<|im_end|>b' contains <|im_end|>, which marks a picture or a turn",
    "--answer 'red cat' --target zebra": "its words: red, cat",
    "--mode evaluate --target cat --contrast <|im_end|> --answer cat": "contrast='<|im_end|>' must be text",
}


@pytest.mark.parametrize("flags", BAD_MODEL)
def test_bad_input_that_only_the_model_shows_is_refused(drive, bad, tmp_path, flags):
    code, out, err = drive(*(word.format(bad=bad) for word in shlex.split(flags)))
    assert (code, out) == (2, "")
    assert BAD_MODEL[flags] in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_model")
def test_a_folder_without_room_for_a_third_is_refused(drive, tmp_path):
    (tmp_path / "out/comparative").mkdir(parents=True)
    (tmp_path / "out/comparative/late").touch()
    code, _, err = drive("--mode", "comparative")
    assert code == 2
    assert "comparative cannot be written (late is not a folder): choose another folder" in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ExplanationError("the model's answer is empty: give a text to explain as the answer"), 2),
        (ExplanationError("the gradient at layer 3 is not finite: load the model as bfloat16 or float32"), 2),
        (RuntimeError("out of memory with 16000 image tokens: (--max_pixels)"), 1),
        (MemoryError(), 1),
    ],
)
def test_a_failing_pass_writes_nothing_and_says_why_in_one_line(drive, monkeypatch, tmp_path, error, code):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(test_gradcam, "explain_with_evidence", fail)
    result, out, err = drive()
    assert (result, out) == (code, "")
    assert err == f"test_gradcam.py: error: {str(error) or 'MemoryError'}\n"
    assert not (tmp_path / "out").exists()


def test_a_failing_write_leaves_nothing_behind(drive, monkeypatch, tmp_path):
    def fail(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    code, out, err = drive("--answer", ANSWER)
    assert (code, out) == (1, "")
    assert "No space left" in err
    assert not (tmp_path / "out").exists()


# the documented functions


def check_result(result, image, grid):
    for kind in ("superimposed", "heatmap"):
        assert result[kind].shape == (image.height, image.width, 3)
        assert result[kind].dtype == np.uint8
    assert result["cam"].shape == grid
    assert result["cam"].dtype == np.float32


def test_documented_functions_return_pictures_and_maps(make_model, processor, image, tmp_path, monkeypatch):
    monkeypatch.setattr(common.page, "DPI", 40)
    model, settings = make_model(torch.float32, layers=4), {"num_samples": 2, "answer": ANSWER}
    usual = (model, processor, image, "What is there?")
    single = single_layer_visualization(*usual, save_dir=tmp_path / "single", **settings)
    check_result(single, image, (4, 6))
    assert (single["layer"], single["answer"]) == (3, ANSWER)
    grid = create_layer_comparison_grid(*usual, layer_range="late", save_dir=tmp_path / "grid", **settings)
    multi = visualize_multiple_layers(*usual, layer_indices=[-1, 0], save_dir=tmp_path / "multi", **settings)
    thirds = create_comparative_analysis(*usual, save_dir=tmp_path / "thirds", **settings)
    assert (list(grid), list(multi), list(thirds)) == ([2, 3], [3, 0], ["early", "middle", "late"])
    assert [list(third) for third in thirds.values()] == [[0], [1], [2, 3]]
    for result in (*grid.values(), *multi.values(), *thirds["late"].values()):
        check_result(result, image, (4, 6))
    np.testing.assert_array_equal(grid[3]["cam"], multi[3]["cam"])
    np.testing.assert_array_equal(grid[3]["cam"], thirds["late"][3]["cam"])


def test_layers_that_do_not_exist_name_the_valid_range(model, processor, image, tmp_path):
    for function in (create_layer_comparison_grid, visualize_multiple_layers):
        with pytest.raises(ValueError, match="0 to 2"):
            function(model, processor, image, "What?", [0, 3], tmp_path / "out")
    with pytest.raises(ValueError, match="layer_range='deep' must be one of auto, early"):
        create_layer_comparison_grid(model, processor, image, "What?", "deep", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ranges_of_28_layers():
    assert select_layers("auto", 28) == [0, 5, 10, 15, 20, 27]
    assert select_layers("early", 28) == list(range(9))
    assert select_layers("middle", 28) == list(range(9, 18))
    assert select_layers("late", 28) == list(range(18, 28))
    assert select_layers("all", 28) == list(range(28))
    assert select_layers([27, -1, 0], 28) == [27, 0]


def test_layers_that_are_taken_unless_chosen_scale_with_their_number():
    assert (quarters(28), ninths(28)) == ([7, 14, 21, 27], [6, 12, 18, 27])
    assert select_layers("auto", 24) == [0, 4, 8, 12, 16, 23]
    assert select_layers("auto", 36) == [0, 7, 14, 21, 28, 35]
    assert select_layers("auto", 64) == [0, 12, 24, 36, 48, 63]
    assert (quarters(36), ninths(36)) == ([9, 18, 27, 35], [7, 15, 23, 35])
    for total in range(1, 100):
        for layers, most in ((select_layers("auto", total), 6), (quarters(total), 4), (ninths(total), 4)):
            assert layers == sorted(set(layers))
            assert len(layers) <= most
            assert layers[-1] == total - 1
            assert layers[0] >= 0


def test_layers_of_a_mode_or_function_unless_chosen(model, processor, image, tmp_path, monkeypatch):
    explained = []
    monkeypatch.setattr(visualization_utils, "_create", lambda *given, **_: explained.append(given[4]))
    visualization_utils.visualize_multiple_layers(model, processor, image, "What?", save_dir=tmp_path)
    visualization_utils.create_layer_comparison_grid(model, processor, image, "What?", save_dir=tmp_path)
    assert explained == [[0, 1, 2], [0, 1, 2]]
    for total, layers in ((28, [6, 12, 18, 27]), (1, [0])):
        assert choose_layers(parse_args(["--mode", "multi"]), total) == layers
        assert choose_layers(parse_args(["--mode", "multi", "--layers", "auto"]), total) == select_layers("auto", total)
        assert choose_layers(parse_args([]), total) == select_layers("auto", total)
        assert choose_layers(parse_args(["--mode", "single"]), total) == [total // 2]


def test_documented_calls_check_where_to_write_before_they_compute(model, processor, image, monkeypatch):
    monkeypatch.setattr(model, "forward", lambda **_: pytest.fail("computed"))
    for function in (create_layer_comparison_grid, visualize_multiple_layers, single_layer_visualization):
        with pytest.raises(ValueError, match="save_dir=None must be the path of a folder"):
            function(model, processor, image, "What?", save_dir=None)


def test_number_in_place_of_a_list_of_layers_is_told(model, processor, image, tmp_path):
    with pytest.raises(ValueError, match=r"layers=1 must be a list of layers, such as \[0, -1\]"):
        visualize_multiple_layers(model, processor, image, "What?", 1, tmp_path / "out")


def test_comparative_analysis_can_show_all_layers_of_each_third(make_model, processor, image, tmp_path, monkeypatch):
    monkeypatch.setattr(common.page, "DPI", 40)
    model, options = make_model(torch.float32, layers=12), {"num_samples": 1, "answer": ANSWER}
    few = create_comparative_analysis(model, processor, image, "What?", tmp_path / "few", **options)
    every = create_comparative_analysis(
        model, processor, image, "What?", tmp_path / "every", layers_per_third=None, **options
    )
    assert [list(third) for third in few.values()] == [[0, 2, 3], [4, 6, 7], [8, 10, 11]]
    assert [list(third) for third in every.values()] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert (tmp_path / "every/middle/layer_5_heatmap.png").exists()


def test_names_that_users_import_from_driver_and_figures_are_there():
    for module in (test_gradcam, visualization_utils):
        for name in ("SmoothQwenGradCAM", "get_model_layers", "create_layer_comparison_grid"):
            assert callable(getattr(module, name))
        assert module.visualize_multiple_layers is visualize_multiple_layers
        assert module.create_comparative_analysis is create_comparative_analysis


# layers, wherever they are taken


def test_layers_act_in_grid_mode(drive, tmp_path):
    assert drive("--mode", "grid", "--layers", "1-2", "--answer", ANSWER)[0] == 0
    assert written(tmp_path / "out/grid") == {"layer_comparison_grid.png"} | of_layers(1, 2)


# the process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_in_the_first_seconds_gives_no_traceback(tmp_path, number):
    command = [sys.executable, DRIVER, "--output_dir", str(tmp_path / "out")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(0.5)
    run.send_signal(number)
    assert run.communicate(timeout=60) == (b"", b"")
    assert run.returncode == -number
    assert not (tmp_path / "out").exists()


@pytest.fixture
def start(tmp_path, photo_path, model_folder):
    """A function that starts the driver in a process of its own; what it says is in out.txt and err.txt."""
    started = []

    def start(*flags, stdout=tmp_path / "out.txt"):
        usual = ["--mode", "single", "--model_path", model_folder, "--image_path", photo_path, "--device", "cpu"]
        usual += ["--answer", ANSWER]
        flags = [str(word) for word in (*usual, *flags)]
        started.append(driver_process.start(driver_process.drive, flags, str(stdout), str(tmp_path / "err.txt")))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_holds_its_folder_until_a_signal_ends_it(drive, start, tmp_path, number):
    """Another run into the same folder is told who holds it."""
    run = start("--output_dir", tmp_path / "out", "--num_samples", 10**6)
    while not list(tmp_path.glob(f"out/single/{common.files.STAGING}*")):
        assert run.is_alive()
        time.sleep(0.01)
    code, out, err = drive("--answer", ANSWER)
    assert (code, out) == (1, "")
    assert f"single is being written by process {run.pid}: choose another folder" in err
    assert err.count("\n") == 1
    os.kill(run.pid, number)
    run.join(60)
    assert run.exitcode == 128 + number
    assert ((tmp_path / "out.txt").read_text(), (tmp_path / "err.txt").read_text()) == ("", "")
    assert not (tmp_path / "out").exists()


def test_exception_that_a_library_makes_of_a_signal_gives_the_signals_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(test_gradcam, "run", lambda args: fail_with(ValueError("generator didn't yield")))
    assert test_gradcam.main([], signals=[signal.SIGINT]) == 130
    assert capsys.readouterr().err == ""
    assert test_gradcam.main([]) == 2


@pytest.mark.parametrize(("stdout", "code"), [("closed", 0), ("nobody", 0), ("/dev/full", 1)])
def test_files_are_written_whatever_becomes_of_the_report(start, tmp_path, stdout, code):
    run = start("--output_dir", tmp_path / "out", "--num_samples", 1, stdout=stdout)
    run.join()
    assert run.exitcode == code
    err = (tmp_path / "err.txt").read_text()
    assert ("the files are written, but not this report" in err) == bool(code)
    assert err.count("\n") == code
    assert written(tmp_path / "out/single") == SINGLE


def test_working_directory_survives_a_failing_run(drive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis.txt").write_text("years of work")
    monkeypatch.setattr(common.files, "encode", lambda content: fail_with(OSError(28, "No space left")))
    assert drive("--answer", ANSWER, "--output_dir", "results/../out")[0] == 1
    assert written(tmp_path) == {"thesis.txt"}


def fail_with(error):
    raise error


# what is wrong is not passed over


def test_map_that_is_zero_everywhere_is_said_and_grey(drive, tmp_path, monkeypatch):
    monkeypatch.setitem(
        core.METHODS,
        "hirescam",
        core.METHODS["hirescam"]._replace(formula=lambda features, gradients: torch.zeros(len(features))),
    )
    code, out, _ = drive("--layer", 2, "--method", "hirescam", "--answer", ANSWER)
    assert code == 0
    assert "layer 2 has no map (zero everywhere): its pictures are grey panels" in out
    assert np.ptp(np.asarray(Image.open(tmp_path / "out/single/heatmap.png")), axis=-1).max() == 0


def test_warnings_take_one_line_each(drive):
    flags = ["--answer", "the cat", "--target", "cat", "--contrast", "abcdefgh ijkl"]
    code, _, err = drive(*flags, "--max_pixels", 4 * 784)
    assert code == 0
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("test_gradcam.py: warning: the photo is seen as 2 x 1 image tokens: too few")
    assert lines[1].startswith("test_gradcam.py: warning: contrast='abcdefgh ijkl' has ")


# memory


@pytest.mark.parametrize("mode", ["grid", "words"])
def test_pictures_of_the_photos_size_are_not_kept(drive, tmp_path, image, mode):
    """One megapixel, 2 pictures of each of 4 layers, of one word or three: kept, they would be 26 MB and more."""
    image.resize((1200, 900)).save(tmp_path / "large.png")
    flags = ["--mode", mode, "--layers", "all", "--image_path", tmp_path / "large.png", "--answer", "red cat dog tree"]
    drive(*flags)  # what is loaded once
    gc.collect()
    tracemalloc.start()
    code, _, err = drive(*flags)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (code, err) == (0, "")
    assert peak < 26e6


@pytest.mark.parametrize("mode", ["single", "grid", "words", "flow", "knockout"])
def test_photos_whose_names_are_not_text_are_explained(drive, tmp_path, image, mode):
    names = [os.fsdecode(b"caf\xe9.png"), os.fsdecode(b"caf\xe8.png")]
    for name in names:
        image.save(tmp_path / name)
    paths = [tmp_path / name for name in names[: 2 if mode in ("flow", "knockout") else 1]]
    code, _, err = drive("--mode", mode, "--answer", ANSWER, "--image_path", *paths)
    assert (code, err) == (0, "")
    if mode == "words":
        assert r'"caf\\xe9.png"' in (tmp_path / "out/words/index.html").read_text(encoding="utf-8")
    if mode == "single":
        code, _, err = drive("--layer", 1, "--answer", ANSWER, "--image_path", *paths, "--save_raw")
        assert (code, err) == (0, "")
        settings = json.loads(str(np.load(tmp_path / "out/single/maps.npz")["settings"]))
        assert settings["image_path"] == str(paths[0])


def test_answers_and_masks_are_read_from_regular_files_only(drive, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path / "pipe.jsonl", "/dev/zero"):
        for flags in (["knockout", "--answers"], ["evaluate", "--answer", ANSWER, "--mask"]):
            code, _, err = drive("--mode", *flags, path)
            assert code == 2
            assert err.count("\n") == 1
            assert f"{flags[-1]} {path}" in err
            assert "is a folder, a pipe or a device" in err
    (tmp_path / "list.jsonl").write_text('{"image": "/dev/zero"}\n{"image": "pipe.jsonl", "mask": "/dev/zero"}\n')
    code, _, err = drive("--image_path", tmp_path / "list.jsonl")
    assert code == 2  # no line is good
    assert "is a folder, a pipe or a device" in err
