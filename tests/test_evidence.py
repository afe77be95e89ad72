"""What a map rests on: probabilities with and without the photo, and the image tokens that the words need."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from drawn_maps import make_maps
from scipy.stats import spearmanr

import smooth_gradcam as core
from common.evidence import (
    Evidence,
    departures,
    doubt_of,
    explain_with_evidence,
    image_hiding,
    spearman,
    weighed,
)
from smooth_gradcam import Settings, explain, find_target, get_model_layers, read
from studies.decoder import token_groups
from studies.knockout import Edge, knockout

CLEAN = Settings(use_smooth=False)
PROMPT, ANSWER = "What is it?", "the red cat 猫"


def probabilities(reading, hidden) -> np.ndarray:
    with image_hiding(reading) as hide:
        return hide(np.atleast_2d(hidden))


def test_hidden_tokens_are_hidden_as_knockout_hides_them(model, processor, image):
    reading = read(model, processor, image, PROMPT, ANSWER)
    groups = token_groups(reading)
    tokens, later = groups["image"], np.concatenate([groups["user"], groups["answer"]])
    rng = np.random.default_rng(0)
    hidden = rng.random((11, len(tokens))) < 0.5  # more than one batch
    total = get_model_layers(model)[1]
    expected = knockout(reading, [Edge(range(total), later, tokens[row]) for row in hidden])[0]
    np.testing.assert_allclose(probabilities(reading, hidden), expected, rtol=1e-6, atol=1e-9)
    assert np.ptp(expected, 0).max() > 1e-3


# evidence


def test_evidence_is_the_mean_over_the_tokens(model, processor, image):
    reading = read(model, processor, image, PROMPT, ANSWER)
    spans = [find_target(ANSWER, word) for word in ("red", None)]
    count = len(reading.positions)
    seen = probabilities(reading, [[False] * count, [True] * count])
    for maps in explain_with_evidence(reading, spans, [0, -1], CLEAN):
        assert maps.evidence[:2] == pytest.approx(seen[:, maps.target_tokens].mean(1), rel=1e-6)
        assert maps.evidence.tokens == pytest.approx(seen[0, maps.target_tokens], rel=1e-6)


@pytest.mark.parametrize(
    ("evidence", "doubt"),
    [
        ((0.1, 0.08), ""),
        ((0.0999, 0.0), "the model hardly says this (p 0.10)"),
        ((0.002, 0.0), "the model hardly says this (p 2e-3)"),
        ((0.5, 0.4), ""),
        ((0.5, 0.1, (0.99, 0.01)), ""),
        ((0.5, 0.1, (0.99, 0.009)), "the model hardly says a part of this (p 9e-3 for a token)"),
        ((0.05, 0.0, (0.09, 0.009)), "the model hardly says this (p 0.05)"),
        ((0.5, 0.401), "this does not come from the photo (80 % of p is left without it)"),
        ((2e-6, 1.0), "the model hardly says this (p 2e-6) and this does not come from the photo (100 % of p"),
        ((0.0, 0.0), "the model hardly says this (p 0.00) and this does not"),
    ],
)
def test_doubt_begins_at_its_thresholds(evidence, doubt):
    said = Evidence(*evidence).doubt
    assert said.startswith(doubt)
    assert bool(said) == bool(doubt)
    maps = replace(make_maps({0: np.ones((2, 2), np.float32)}), evidence=Evidence(*evidence))
    assert doubt_of(maps) == said
    assert doubt_of(replace(maps, evidence=None)) == ""


def test_evidence_reads_as_a_sentence():
    assert str(Evidence(0.98, 0.0294)) == "p 0.98, 3 % of it left without the photo"


# needed tokens


def hand_made(cams, method="needed", *, answer_tokens=(0, 1, 2), explained=(0,)):
    """(reading, maps) of one part; `cams` are the maps of layers 0, 1, … of each photo."""
    grids = [cam.shape for cam in cams[0]]
    count = sum(cam.size for cam in cams[0])
    maps = [
        replace(
            make_maps({k: np.float32(cam[photo]) for k, cam in enumerate(cams)}, method=method),
            tokens=list(answer_tokens), target_tokens=list(explained), image=photo,
            target_span=(0, 3 if len(explained) == len(answer_tokens) else 1), answer="abc",
        )
        for photo in range(len(grids))
    ]  # fmt: skip
    return SimpleNamespace(positions=range(count), grids=grids), maps


def needing(tokens, p=0.9, without=0.1):
    """A `hide` for an answer of three tokens whose first needs these image tokens, each as much as the others."""

    def hide(hidden):
        lost = hidden[:, list(tokens)].mean(1)
        return np.stack([p - (p - without) * lost, np.full(len(hidden), 0.5), np.full(len(hidden), 0.5)], 1)

    return hide


def test_map_is_kept_on_the_fewest_hottest_tokens_that_the_words_need():
    one = np.array([[9, 8, 7], [6, 5, 0]])
    other = np.array([[1, 2, 3], [9, 5, 4]])
    reading, maps = hand_made([[one], [other]])
    (found,) = weighed(reading, maps, needing([0, 3]))
    assert found.maps[0].tolist() == [[9, 8, 7], [6, 0, 0]]  # the fourth hottest is needed
    assert found.maps[1].tolist() == [[1, 2, 3], [9, 5, 4]]  # the coldest is
    assert found.evidence[:2] == pytest.approx((0.9, 0.1))
    assert found.settings.method == "needed"


def test_nine_tenths_of_what_the_photo_gives_are_enough():
    cam = np.arange(20, 0, -1).reshape(4, 5)
    reading, maps = hand_made([[cam]])
    (found,) = weighed(reading, maps, needing(range(10)))
    assert np.count_nonzero(found.maps[0]) == 9
    assert (found.maps[0] == np.where(cam > 11, cam, 0)).all()


def test_map_without_enough_tokens_stays_as_it_is():
    cam = np.array([[3, 2, 0], [1, 0, 0]])
    reading, maps = hand_made([[cam]])
    assert (weighed(reading, maps, needing([4, 5]))[0].maps[0] == cam).all()


def test_words_that_do_not_come_from_the_photo_keep_their_map():
    cam = np.array([[3, 2, 5], [1, 7, 4]])
    reading, maps = hand_made([[cam]])
    assert (weighed(reading, maps, needing([4], without=0.73))[0].maps[0] == cam).all()
    assert (weighed(reading, maps, needing([4], without=0.71))[0].maps[0] == np.where(cam == 7, 7, 0)).all()


def test_tokens_of_several_photos_are_needed_together():
    first, second = np.array([[5, 1]]), np.array([[2, 9], [4, 3]])
    reading, maps = hand_made([[first, second]])
    one, two = weighed(reading, maps, needing([0, 3]))
    assert one.maps[0].tolist() == [[5, 0]]
    assert two.maps[0].tolist() == [[0, 9], [0, 0]]


def test_many_tokens_are_found_to_within_a_tenth():
    cam = np.random.default_rng(0).permutation(np.arange(1, 1001)).reshape(20, 50)
    reading, maps = hand_made([[cam]])
    runs = []

    def hide(hidden):
        runs.append(len(hidden))
        return np.stack([np.where(hidden.sum(1) >= 300, 0.1, 0.9), *[np.full(len(hidden), 0.5)] * 2], 1)

    (found,) = weighed(reading, maps, hide)
    assert 300 <= np.count_nonzero(found.maps[0]) <= 330
    assert found.maps[0].max() == 1000
    assert len(runs) <= 9


def test_auto_is_gradcam_for_the_whole_answer_and_needed_for_a_part():
    cam = np.array([[3, 2, 5], [1, 7, 4]])
    for explained, method in (((0, 1, 2), "gradcam"), ((0,), "needed")):
        reading, maps = hand_made([[cam]], "auto", explained=explained)
        (found,) = weighed(reading, maps, needing([4]))
        assert found.settings.method == method
        assert (found.maps[0] == (cam if method == "gradcam" else np.where(cam == 7, 7, 0))).all()


def test_core_takes_the_methods_once_they_are_imported(model, processor, image):
    reading = read(model, processor, image, PROMPT, ANSWER)
    span = find_target(ANSWER, "red")
    settings = replace(CLEAN, method="auto")
    (direct,), (found,) = (
        explain(reading, [span], [0, 2], settings),
        explain_with_evidence(reading, [span], [0, 2], settings),
    )
    (whole,) = explain(reading, [span], [0, 2], CLEAN)
    for layer, cam in found.maps.items():
        np.testing.assert_array_equal(cam, direct.maps[layer])
        assert set(np.unique(cam)) <= {0, *np.unique(whole.maps[layer])}
    assert found.settings.method == direct.settings.method == "needed"
    assert found.evidence == direct.evidence


def test_core_alone_does_not_know_them():
    code = "import smooth_gradcam as core; core.Settings(method='needed')"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(core.__file__).parent, capture_output=True, text=True, check=False
    )
    assert "method='needed' must be one of gradcam, hirescam, product, paper" in run.stderr


# likeness of layers


def test_likeness_is_spearmans_to_the_middle_layer_and_only_asked_layers_have_maps(model, processor, image):
    reading = read(model, processor, image, PROMPT, ANSWER)
    span = find_target(ANSWER, "red")
    (raw,) = explain(reading, [span], [0, 1, 2], CLEAN)
    norm = get_model_layers(model)[0][1].post_attention_layernorm
    (found,) = explain_with_evidence(reading, [span], [-1, 0, norm], CLEAN)
    assert list(found.maps) == [2, 0, "model.language_model.layers.1.post_attention_layernorm"]
    assert set(found.likeness) == {2, 0}
    for layer, value in found.likeness.items():
        assert value == pytest.approx(spearmanr(raw.maps[layer].ravel(), raw.maps[1].ravel()).statistic)
        np.testing.assert_array_equal(found.maps[layer], raw.maps[layer])


def test_constant_map_is_like_none():
    assert spearman(np.ones((2, 3)), np.arange(6).reshape(2, 3)) == 0


@pytest.mark.parametrize(
    ("likeness", "said"),
    [
        ({0: 0.3, 1: 1.0}, ""),
        ({0: 0.29, 1: 1.0}, "layer 0 shows something else than the middle layers (correlation 0.3)"),
        ({0: 0.21, 1: -0.1}, "layers 0, 1 show something else than the middle layers (correlation -0.1 to 0.2)"),
        ({0: 0.21, 5: 0.1}, "layer 0 shows something else than the middle layers (correlation 0.2)"),
        ({}, ""),
    ],
)
def test_layers_that_show_something_else_are_named(likeness, said):
    maps = replace(make_maps({k: np.ones((2, 2), np.float32) for k in (0, 1)}), likeness=likeness)
    assert departures(maps, maps.maps) == said
