"""Where a map lies: against counts by hand and other libraries."""

import numpy as np
import pytest
import scenes
from maps_by_hand import CLEAN, maps_of, spot
from scipy import ndimage
from skimage.filters import threshold_otsu

from smooth_gradcam import explain, normalize_cam, occurrences, upsample_cam
from studies.localization import at_border, centre_map, fit_of, localization

MEASURES = ("pointing", "near", "energy", "obj_iou")


# localization


def test_two_by_two_by_hand():
    cam = np.array([[4, 2], [1, 1]], np.float32)
    hit = np.array([[1, 0], [0, 0]], bool)
    missed = np.array([[0, 1], [0, 0]], bool)
    # Otsu parts 4 from 2, 1 and 1
    assert localization(cam, hit) == dict(zip(MEASURES, (1, 1, 4 / 8, 1), strict=True))
    assert localization(cam, missed) == dict(zip(MEASURES, (0, 1, 2 / 8, 0), strict=True))
    assert localization(cam, ~hit) == dict(zip(MEASURES, (0, 1, 4 / 8, 0), strict=True))


def test_four_by_four_by_hand():
    cam = np.array([[9, 8, 0, 0], [9, 0, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]], np.float32)
    mask = np.zeros((4, 4), bool)
    mask[:2, :2] = True
    # 26 of 30 inside; Otsu parts 9, 8 and 9 from 3, 1 and 0: three of the mask's four pixels, and none outside
    assert localization(cam, mask) == pytest.approx({"pointing": 1, "near": 1, "energy": 26 / 30, "obj_iou": 3 / 4})
    mask = np.zeros((4, 4), bool)
    mask[1:3, :3] = True  # 12 of 30; one of the three hot pixels, of 3 + 6 - 1 in the union
    assert localization(cam, mask) == pytest.approx({"pointing": 0, "near": 1, "energy": 12 / 30, "obj_iou": 1 / 8})


@pytest.mark.parametrize(
    ("down", "right", "near"),
    [(0, 15, 1), (0, 16, 0), (15, 0, 1), (16, 0, 0), (9, 12, 1), (12, 9, 1), (10, 12, 0), (11, 11, 0), (0, 1, 1)],
)
def test_near_is_at_most_15_pixels_off_as_the_crow_flies(down, right, near):
    mask = spot((60, 70), 20, 30).astype(bool)
    for row, column in ((20 + down, 30 + right), (20 - down, 30 - right)):
        found = localization(spot((60, 70), row, column), mask)
        assert (found["pointing"], found["near"]) == (0, near)
    assert localization(spot((60, 70), 20, 30), mask)["pointing"] == 1


@pytest.mark.parametrize("seed", range(12))
def test_obj_iou_is_that_of_otsus_threshold(seed):
    rng = np.random.default_rng(seed)
    cam = rng.gamma(0.5, 1, (rng.integers(2, 12), rng.integers(2, 12))).astype(np.float32)
    mask = ndimage.gaussian_filter(rng.random((61, 47)), 4) > 0.5
    heat = upsample_cam(cam, mask.shape)
    grey = np.round(255 * heat / heat.max()).astype(np.uint8)
    hot = grey > threshold_otsu(grey)
    assert 0 < hot.sum() < hot.size
    assert localization(cam, mask)["obj_iou"] == np.logical_and(hot, mask).sum() / np.logical_or(hot, mask).sum()


@pytest.mark.parametrize("seed", range(3))
def test_energy_is_the_share_of_the_enlarged_map_inside(seed):
    rng = np.random.default_rng(seed)
    cam, mask = rng.random((5, 3), np.float32), rng.random((50, 30)) < 0.2
    heat = upsample_cam(cam, (50, 30)).astype(float)
    assert localization(cam, mask)["energy"] == pytest.approx(heat[mask].sum() / heat.sum(), rel=1e-5)
    assert localization(7 * cam, mask) == pytest.approx(localization(cam, mask))  # no unit


def test_energy_of_a_flat_map_is_the_masks_share():
    mask = np.zeros((40, 60), bool)
    mask[5:25, 10:40] = True
    assert localization(np.full((4, 6), 0.3, np.float32), mask)["energy"] == pytest.approx(mask.mean(), rel=1e-5)


def test_zero_map_scores_zero():
    mask = np.zeros((20, 30), bool)
    mask[0, 0] = True
    assert localization(np.zeros((2, 3), np.float32), mask) == dict.fromkeys(MEASURES, 0.0)


@pytest.mark.parametrize("grid", [(3, 5), (5, 3)], ids=["landscape", "portrait"])
@pytest.mark.parametrize("corner", [(0, -1), (-1, 0)])
def test_rows_stay_rows(grid, corner):
    mask = np.kron(spot(grid, *corner), np.ones((40, 40))).astype(bool)
    found = localization(spot(grid, *corner), mask)
    assert (found["pointing"], found["near"]) == (1, 1)
    assert found["energy"] > 0.6
    assert found["obj_iou"] > 0.6
    across = localization(spot(grid, corner[1], corner[0]), mask)
    assert across == dict.fromkeys(MEASURES, 0.0) | {"energy": pytest.approx(0, abs=1e-6)}


# borders, the centre, words of several tokens


OFF = {"near": 0.0, "pointing": 0.0}


@pytest.mark.parametrize(
    ("row", "column", "fit", "sink"),
    [
        *[(row, column, OFF, 1.0) for row, column in ((0, 2), (3, 2), (1, 0), (1, 4), (0, 0), (3, 4))],
        *[(row, column, OFF, 0.0) for row, column in ((1, 1), (2, 3), (1, 3), (2, 1))],
        (0, 0, {"near": 1.0, "pointing": 0.0}, 0.0),
        (0, 0, {"near": 1.0, "pointing": 1.0}, 0.0),
    ],
)
def test_a_sink_is_a_maximum_at_the_border_and_off_the_object(row, column, fit, sink):
    assert at_border(spot((4, 5), row, column), fit) == sink
    assert at_border(np.zeros((4, 5), np.float32), OFF) == 0


def test_the_map_that_knows_nothing_is_a_gaussian_in_the_middle():
    cam = centre_map((3, 5))
    assert cam.shape == (3, 5)
    assert cam.dtype == np.float32
    assert cam[1, 2] == cam.max() == 1
    assert cam[1, 3] == pytest.approx(np.exp(-0.5))  # half a half side off
    assert cam[0, 2] == cam[2, 2] == pytest.approx(np.exp(-2))


def test_a_word_of_several_tokens_is_graded_as_its_best_token_and_located_as_a_whole():
    mask = np.zeros((8, 8), bool)
    mask[:4, :4] = True
    on, off = spot((2, 2), 0, 0), spot((2, 2), 1, 1)
    whole = fit_of([off, on, off], mask)
    assert (whole["pointing"], whole["border"]) == (0, float(not whole["near"]))
    assert whole["obj_iou"] == localization(on, mask)["obj_iou"] > localization(off, mask)["obj_iou"]
    assert fit_of([on, off], mask)["obj_iou"] == localization(off, mask)["obj_iou"]  # the tokens', not the word's
    assert fit_of([on], mask)["obj_iou"] == localization(on, mask)["obj_iou"]


# a model that sees


@pytest.fixture(scope="module")
def dog(demo):
    return maps_of(demo, "dog", [12])


def test_map_of_the_dog_fits_the_dog(dog):
    things = {thing.kind: localization(dog.maps[12], thing.mask) for thing in scenes.demo_scene().objects}
    assert things["dog"]["near"] == 1
    assert things["dog"]["energy"] > 0.5
    assert things["dog"]["obj_iou"] > max(things[kind]["obj_iou"] for kind in things if kind != "dog") + 0.3


def test_each_object_word_points_at_its_own_object_and_near_no_other(demo):
    things = scenes.demo_scene().objects
    spans = sorted(span for thing in things for span in occurrences(demo.answer, thing.kind))
    words = explain(demo, spans, [12], CLEAN)
    assert [word.target for word in words] == ["plane", "house", "dog", "bicycle"]
    for word in words:
        found = {thing.kind: localization(word.maps[12], thing.mask) for thing in things}
        assert [kind for kind in found if found[kind]["near"]] == [word.target]
        assert normalize_cam(word.maps[12]).max() == 1
