"""Every mode says in its lines and figures what its words rest on, and whether its maps are to be believed."""

import json

import numpy as np
import pytest
from conftest import DEMO, DESCRIBE
from drawn_maps import prose_of
from PIL import Image, ImageOps

import common.evidence
from common.evidence import explain_by_methods, explain_with_evidence, settled_for, warnings_of
from smooth_gradcam import Settings, read
from studies.video import create_video_maps
from visualization_utils import photo_rows

DESCRIPTION = (
    "There is a plane at the top left, a house on the right, a dog at the bottom left and a bicycle at the bottom."
)
PHOTOLESS = "this does not come from the photo (100 % of p is left without it)"
WORDS = {  # answer, target, how its evidence begins, and why it is doubted
    "dog": (DESCRIPTION, "dog", "p 1.00, 0 % of it left without the photo", []),
    "There": (DESCRIPTION, "There", "p 1.00, 100 % of it left without the photo", [PHOTOLESS]),
    "zebra": ("There is a zebra.", "zebra", "p 4e-6, ", ["the model hardly says this (p 4e-6)", PHOTOLESS]),
}
NOISELESS = ["--noise_std", "0", "--num_samples", "1"]
MODES = {
    "single": ["single", *NOISELESS],
    "grid": ["grid", *NOISELESS, "--layers", "14"],
    "multi": ["multi", *NOISELESS, "--layers", "14"],
    "comparative": ["comparative", *NOISELESS],
    "evaluate": ["evaluate", *NOISELESS, "--layers", "14", "--steps", "2"],
    "compare": ["evaluate", *NOISELESS, "--layers", "14", "--steps", "2", "--compare"],
    "flow": ["flow", *NOISELESS, "--layers", "14", "--taps"],
    "knockout": ["knockout"],
}
CONFIDENT = ("Hot: ", "most faithful", "leads: gradcam", "can be removed", "largest difference")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """The demo photo, small."""
    path = tmp_path_factory.mktemp("photo") / "demo.png"
    Image.open(DEMO.parent / "demo.jpeg").resize((448, 336)).save(path)
    return path


@pytest.fixture
def see(drive, drawn, pages, photo, tmp_path):
    """A function that runs a mode on the demo model: what it says, and what stands in each of its figures."""

    def see(*flags):
        code, out, err = drive("--model_path", DEMO, "--image_path", photo, "--quiet", "--mode", *flags)
        assert (code, err) == (0, "")
        return out, [prose_of(page) for page in pages]

    return see


def check_doubt(text, doubts):
    assert ("Not to be believed" in text) == bool(doubts)
    assert not doubts or not any(claim in text for claim in CONFIDENT)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_says_what_a_word_rests_on_and_what_speaks_against_its_map(see, mode, word):
    answer, target, evidence, doubts = WORDS[word]
    out, figures = see(*MODES[mode], "--answer", answer, "--target", target)
    assert out.count(f"\nevidence: {evidence}") == 1
    warned = [line for line in out.splitlines() if line.startswith("warning: ") and "show" not in line]
    assert [line.startswith(f"warning: {' and '.join(doubts)}: ") for line in warned] == [True] * bool(doubts)
    assert not doubts or not any(claim in out for claim in CONFIDENT)
    assert out.count("come from the photo") == (PHOTOLESS in doubts)  # said once
    assert len(figures) in {"comparative": [4], "flow": [2, 3]}.get(mode, [1])  # one or two pages, and taps
    for figure in figures:
        assert evidence in figure
        assert (f"Doubt {' and '.join(doubts)}" in figure) == bool(doubts) == ("Doubt" in figure)
        if mode != "flow" or "share of the map's own maximum" in figure:  # a page without maps has none to fade
            check_doubt(figure, doubts)


@pytest.mark.parametrize("mode", ["flow", "knockout"])
def test_of_several_photos_those_are_named_whose_words_are_doubted(see, photo, mode):
    scene = DEMO / "list/scene_9300000.jpg"  # without a dog
    asked = ["--answer", DESCRIPTION, "--target", "dog", "--image_path", photo, scene]
    out, (figure, *others) = see(*MODES[mode][: 5 if mode == "flow" else 1], *asked)
    assert len(others) == (mode == "flow")
    warned = [line for line in out.splitlines() if line.startswith("warning: ") and "show" not in line]
    assert len(warned) == 1
    assert warned[0].startswith("warning: scene_9300000.jpg: the model hardly says this (p ")
    assert "Doubt photo 2: the model hardly says this (p " in figure
    assert "not to be believed" in figure
    assert ("doubted" in figure) == (mode == "flow")  # above its strip


@pytest.mark.parametrize("mode", ["single", "evaluate", "flow", "knockout"])
def test_records_of_a_list_have_what_each_word_rests_on(see, photo, tmp_path, mode):
    lines = [{"image": str(photo), "answer": answer, "target": target} for answer, target, *_ in WORDS.values()]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out, figures = see(*MODES[mode], "--image_path", tmp_path / "list.jsonl")
    folder = tmp_path / "out" / mode
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    found = {record["asked"]["target"]: record["evidence"] for record in records}
    assert {word: own["doubt"] for word, own in found.items()} == {w: " and ".join(WORDS[w][3]) for w in WORDS}
    assert [found[word]["p"] for word in WORDS] == pytest.approx([1, 1, 4e-6], abs=1e-3)
    assert [found[word]["kept"] for word in WORDS] == pytest.approx([0, 1, 1], abs=1e-2)
    assert all(any(f"evidence: {WORDS[r['asked']['target']][2]}" in line for line in r["said"]) for r in records)
    doubted = [figure for figure in figures if "Doubt" in figure]
    assert {evidence for *_, evidence, doubts in WORDS.values() if doubts} == {
        evidence for *_, evidence, _ in WORDS.values() if any(evidence in figure for figure in doubted)
    }
    if mode == "evaluate":
        assert "3 words in 1 photos; 2 of them doubted (hardly said, or not from the photo), and kept in; " in out
        table = (folder / "benchmark.csv").read_text().splitlines()
        assert table[0].startswith("method,layer,words,photos,doubted,p,kept,")
        assert [line.split(",")[:5] for line in table[1:]] == [
            [method, layer, "3", "1", "2"] for method, layer in (("needed", "14"), ("centre", ""), ("random", ""))
        ]
        for record in records:
            row = record["measures"]["scores.csv"][0]
            own = record["evidence"]
            assert (row["method"], row["doubt"]) == ("needed", own["doubt"])
            assert [float(row["p"]), float(row["kept"])] == pytest.approx([own["p"], own["kept"]], abs=1e-4)


@pytest.mark.parametrize("word", WORDS)
def test_strip_of_a_video_says_what_a_word_rests_on(demo, photo, pages, tmp_path, word):
    """Twice the photo, and twice its mirror image: the dog of one of them is enough."""
    answer, target, evidence, doubts = WORDS[word]
    first = Image.open(photo)
    frames = [first, first, ImageOps.mirror(first), ImageOps.mirror(first)]
    options = {"answer": answer, "target": target, "num_samples": 1, "noise_std": 0, "quiet": True}
    maps = create_video_maps(demo.model, demo.processor, frames, DESCRIBE, None, tmp_path / "out", **options)
    (figure,) = map(prose_of, pages)
    assert evidence in figure
    assert (f"Doubt {' and '.join(doubts)}" in figure) == bool(doubts) == ("Doubt" in figure)
    check_doubt(figure, doubts)
    assert ("none needed" in figure) == (not maps[1].maps[14].any()) == (word == "dog")
    assert maps[0].settings.method == "needed"
    with np.load(tmp_path / "out/maps.npz") as file:
        assert tuple(file["evidence"]) == maps[0].evidence[:2]


# what the modes share


def test_several_methods_share_one_measurement_of_the_evidence(model, processor, image, monkeypatch):
    reading, layers, spans = read(model, processor, image, "What is it?", "the red cat"), [0, 2], [(4, 7), (8, 11)]
    methods = {name: Settings(num_samples=2, method=name) for name in ("gradcam", "paper", "needed", "auto")}
    alone = {name: explain_with_evidence(reading, spans, layers, settings) for name, settings in methods.items()}
    usual, measured = common.evidence.image_hiding, []
    monkeypatch.setattr(common.evidence, "image_hiding", lambda *given: measured.append(given) or usual(*given))
    found = explain_by_methods(reading, spans, layers, methods)
    assert len(measured) == 1
    assert list(found) == list(methods)
    for name, parts in found.items():
        for one, other in zip(parts, alone[name], strict=True):
            assert (one.target, one.settings, one.evidence, one.likeness) == (
                other.target, other.settings, other.evidence, other.likeness
            )  # fmt: skip
            for layer in layers:
                np.testing.assert_array_equal(one.maps[layer], other.maps[layer])
    assert [maps[0].settings.method for maps in found.values()] == ["gradcam", "paper", "needed", "needed"]


def test_auto_stands_for_gradcam_of_a_whole_answer_and_needed_of_a_part():
    for name, whole, part in (("auto", "gradcam", "needed"), ("paper", "paper", "paper")):
        settings = Settings(method=name, seed=3)
        assert settled_for(settings, True) == Settings(method=whole, seed=3)
        assert settled_for(settings, False) == Settings(method=part, seed=3)


def test_warnings_of_many_photos_are_counted():
    assert warnings_of({"a.png": "it is so"}) == ["warning: it is so"]
    assert warnings_of({"a.png": "", "b.png": "it is so"}) == ["warning: b.png: it is so"]
    assert warnings_of(dict.fromkeys("abc", "")) == []
    assert warnings_of(dict.fromkeys("abcde", "no")) == [f"warning: {name}: no" for name in "abcde"]
    assert warnings_of(dict.fromkeys("abcdefg", "no"))[4:] == ["warning: e: no", "warning: the same of 2 more photos"]


def test_rows_of_several_photos_number_those_that_are_doubted(model, processor, image):
    readings = [read(model, processor, image, "What is it?", "the red cat")] * 3
    assert [label for label, _, _ in photo_rows(readings, ["", "", ""])] == ["Prompt", "Photo 1", "Photo 2", "Photo 3"]
    assert photo_rows(readings, ["", "it is so", ""])[4:] == [("Doubt", "photo 2: it is so", (0, 0))]
    ((label, text, _),) = photo_rows(readings, ["so", "", "so"])[4:]
    assert label == "Doubt"
    assert text == "the model hardly says this, or it does not come from the photo: photos 1, 3"
