"""How right a map is: each measure against a count by hand, another library, or a forward pass of its own."""

import copy
import dataclasses
import inspect

import numpy as np
import pytest
import scenes
import torch
from conftest import make_image
from PIL import Image
from scipy import ndimage, stats
from skimage.filters import threshold_otsu
from skimage.metrics import structural_similarity
from test_core import decoder, raising, state_of, unruly
from torch import nn

from common.passes import passes_of
from common.photos import load_mask
from smooth_gradcam import (
    Settings,
    explain,
    find_target,
    normalize_cam,
    occurrences,
    read,
    upsample_cam,
)
from studies import faithfulness, randomization
from studies.faithfulness import (
    BASELINES,
    SHARE,
    Faithfulness,
    auc,
    baseline_image,
    bends,
    insertion_deletion,
    score_rows,
)
from studies.localization import at_border, centre_map, fit_of, localization
from studies.randomization import cascading_randomization, randomize_weights, spearman, ssim

PROMPT = "What is it?"
ANSWER = "the red cat"
CLEAN = Settings(use_smooth=False)
MEASURES = ("pointing", "near", "energy", "obj_iou")


# the object's mask


def spot(size, row, column, value=1.0):
    cam = np.zeros(size, np.float32)
    cam[row, column] = value
    return cam


def white_on_black():
    """8 x 6 pixels, white at the top left in 3 of 8 columns and 2 of 6 rows."""
    mask = Image.new("L", (8, 6), 0)
    mask.paste(255, (0, 0, 3, 2))
    return mask


TOP_LEFT = np.zeros((6, 8), bool)
TOP_LEFT[:2, :3] = True


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "F", "I;16"])
def test_white_is_the_object_in_every_mode(tmp_path, mode):
    if mode == "I;16":
        mask = Image.fromarray(np.asarray(white_on_black()).astype(np.uint16) * 257)
    else:
        mask = white_on_black().convert("RGB").convert(mode)
    np.testing.assert_array_equal(load_mask(mask, (8, 6)), TOP_LEFT)
    if mode not in ("CMYK", "F"):
        mask.save(tmp_path / "mask.png")
        np.testing.assert_array_equal(load_mask(tmp_path / "mask.png", (8, 6)), TOP_LEFT)


def test_mask_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    white_on_black().rotate(90, expand=True).save(tmp_path / "mask.png", exif=exif)
    np.testing.assert_array_equal(load_mask(tmp_path / "mask.png", (8, 6)), TOP_LEFT)


def test_object_is_what_is_lighter_than_mid_grey():
    mask = Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8))
    assert load_mask(mask, (4, 1)).tolist() == [[False, False, True, True]]


def test_transparent_parts_of_a_mask_are_white():
    mask = Image.new("RGBA", (8, 6), "black")
    mask.paste((0, 0, 0, 0), (0, 0, 3, 2))
    np.testing.assert_array_equal(load_mask(mask, (8, 6)), TOP_LEFT)


@pytest.mark.parametrize("size", [(6, 8), (8, 7), (16, 12)])
def test_mask_of_another_size_names_both(size):
    expected = rf"the mask has 8 x 6 pixels, the photo {size[0]} x {size[1]}\b"
    with pytest.raises(ValueError, match=expected):
        load_mask(white_on_black(), size)


@pytest.mark.parametrize("colour", ["black", "white", "#010101"])
def test_mask_without_object_or_without_the_rest_is_refused(colour):
    with pytest.raises(ValueError, match="all white or all black"):
        load_mask(Image.new("RGB", (8, 6), colour), (8, 6))


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


# likeness of two maps, area under a curve


@pytest.mark.parametrize("seed", range(6))
def test_spearman_is_scipys(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 4, (2, 5, 7)).astype(np.float32)  # many ties
    c = a + rng.normal(size=a.shape)
    for one, other in ((a, b), (a, c), (c, a), (np.exp(c), -c), (a, a)):
        assert spearman(one, other) == pytest.approx(stats.spearmanr(one.ravel(), other.ravel()).statistic)
    assert spearman(c, np.exp(c)) == pytest.approx(1)
    assert spearman(c, -c) == pytest.approx(-1)


def test_spearman_of_a_map_that_is_the_same_everywhere_is_zero():
    flat, other = np.full((3, 4), 2.0), np.arange(12.0).reshape(3, 4)
    assert spearman(flat, other) == spearman(other, flat) == spearman(flat, flat) == 0


@pytest.mark.parametrize("size", [(11, 11), (12, 16), (30, 13)])
@pytest.mark.parametrize("alike", [0, 0.5, 0.9])
def test_ssim_is_that_of_scikit_image_over_the_whole_map(size, alike):
    rng = np.random.default_rng(0)
    a, b = rng.random((2, *size))
    b = alike * a + (1 - alike) * b
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    _, everywhere = structural_similarity(a / a.max(), b / b.max(), full=True, **options)
    assert ssim(5 * a, b) == pytest.approx(everywhere.mean(), abs=1e-5)  # maps are rounded to float32


def test_ssim_of_maps_smaller_than_its_window():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 4, 6))
    a, b = a / a.max(), b / b.max()

    def mean(x):
        return ndimage.gaussian_filter(x, 1.5, truncate=3.5, mode="reflect")

    covariance = mean(a * b) - mean(a) * mean(b)
    spread = mean(a * a) - mean(a) ** 2 + mean(b * b) - mean(b) ** 2
    contrast = (2 * covariance + 0.0009) / (spread + 0.0009)
    luminance = (2 * mean(a) * mean(b) + 0.0001) / (mean(a) ** 2 + mean(b) ** 2 + 0.0001)
    assert ssim(a, b) == pytest.approx((luminance * contrast).mean(), abs=1e-5)
    assert ssim(a, 3 * a) == pytest.approx(1)


def test_area_under_a_curve_by_hand():
    shares = np.array([0, 0.25, 1])
    assert auc(np.array([0, 1, 0.5]), shares) == pytest.approx(0.125 + 0.75 * 0.75)
    assert auc(np.array([1, 1, 1]), shares) == pytest.approx(1)


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


# insertion and deletion


@pytest.fixture(scope="module")
def reading(model, processor, image):
    return read(model, processor, image, PROMPT, ANSWER)


@pytest.fixture(scope="module")
def given(reading):
    """A map of a target of several tokens, whose values are all different."""
    result = maps_of(reading, "red cat", [0, 2])
    assert len(result.target_tokens) > 1
    return with_maps(result, ranked(np.random.default_rng(0), result.grid))


def maps_of(reading, target, layers, settings=CLEAN, occurrence=1):
    span, passes = find_target(reading.answer, target, occurrence), passes_of(settings.contrast)
    return explain(reading, [span], layers, settings, passes=passes)[0]


def with_maps(result, *cams, no_gradient=()):
    maps = {i: np.asarray(cam, np.float32) for i, cam in enumerate(cams)}
    return dataclasses.replace(result, maps=maps, no_gradient=frozenset(no_gradient))


def ranked(rng, grid):
    """A map that has each of 1 ... N once."""
    return 1 + rng.permutation(grid[0] * grid[1]).reshape(grid)


def measure(reading, result, **options):
    return insertion_deletion(reading, result, **{"steps": 6, "random_orders": 0, "batch_size": 8} | options)


class Watched:
    """Inside, every picture that the model is given, as (N, patches of a token, values) by its number."""

    def __init__(self, model, count):
        self.model, self.count, self.pictures, self.batches = model, count, [], []

    def __enter__(self):
        def look(module, args, kwargs):
            pixels = kwargs["pixel_values"].detach().clone()
            pictures = pixels.unflatten(0, (-1, self.count, len(pixels) // len(kwargs["input_ids"]) // self.count))
            self.pictures += list(pictures)
            self.batches.append(len(pictures))

        self.handle = self.model.register_forward_pre_hook(look, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self.handle.remove()


def plain_probability(model, processor, photo, prompt, tokens, scored):
    """Mean probability of the scored tokens, from the processor's inputs and one forward over all of the answer."""
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    text = processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[photo], return_tensors="pt")
    begin = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.tensor([tokens])], 1)
    kwargs = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        kwargs["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **kwargs).logits[0]
    return np.mean([logits[begin - 1 + i].softmax(-1)[tokens[i]].item() for i in scored])


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("target", ["red", "red cat", "cat", None])
def test_ends_are_the_probabilities_of_the_photo_and_of_the_baseline(
    reading, model, processor, image, baseline, target
):
    result = maps_of(reading, target, [1])
    found = measure(reading, result, baseline=baseline, steps=2)
    asked = (PROMPT, result.tokens, result.target_tokens)
    whole = plain_probability(model, processor, image, *asked)
    blank = plain_probability(model, processor, baseline_image(image, baseline), *asked)
    assert abs(whole - blank) > 1e-3 * whole
    assert found.insertion[1][[0, -1]] == pytest.approx([blank, whole], rel=1e-6)
    assert found.deletion[1][[0, -1]] == pytest.approx([whole, blank], rel=1e-6)
    assert found.baseline == baseline


def test_baseline_pictures(image):
    pixels = np.asarray(image).astype(float)
    assert not np.asarray(baseline_image(image, "black")).any()
    mean = np.asarray(baseline_image(image, "mean"))
    assert (mean == mean[0, 0]).all()
    assert np.abs(mean[0, 0] - pixels.mean((0, 1))).max() <= 0.5
    expected = ndimage.gaussian_filter(pixels, (11.2, 11.2, 0), mode="nearest")  # a tenth of 112 pixels
    assert np.abs(np.asarray(baseline_image(image, "blur")) - expected).mean() < 1
    assert np.abs(pixels - expected).mean() > 10
    for baseline in BASELINES:
        assert baseline_image(image, baseline).size == image.size


SIZES = {"landscape": (168, 112), "portrait": (112, 168)}


@pytest.mark.parametrize(("size", "cell"), [(SIZES["landscape"], (0, -1)), (SIZES["portrait"], (2, 1))], ids=SIZES)
def test_patches_of_the_hottest_cell_are_those_removed_first(model, processor, size, cell):
    grid = size[1] // 28, size[0] // 28
    row, column = np.arange(grid[0])[cell[0]], np.arange(grid[1])[cell[1]]
    photo = make_image(*size).point(lambda value: value // 2)
    photo.paste("white", (28 * column, 28 * row, 28 * column + 28, 28 * row + 28))
    reading = read(model, processor, photo, PROMPT, ANSWER)
    result = with_maps(maps_of(reading, "red cat", [0]), spot(grid, row, column))
    with Watched(model, grid[0] * grid[1]) as seen:
        measure(reading, result, baseline="black", steps=24)
    blank, whole, *insertion = seen.pictures[: 2 + 23]
    first = seen.pictures[2 + 23]
    all_white = processor.image_processor(Image.new("RGB", (56, 56), "white"), return_tensors="pt")["pixel_values"]
    white = (whole == all_white[:4]).all(2).all(1)
    assert white.nonzero().tolist() == [[row * grid[1] + column]]
    assert (first != whole).any((1, 2)).equal(white)
    assert (insertion[0] != blank).any((1, 2)).equal(white)
    assert torch.equal(first[white], blank[white])
    assert torch.equal(insertion[0][white], whole[white])


@pytest.mark.parametrize("steps", [24, 7, 5])
def test_picture_of_a_step_has_exactly_the_hottest_tokens_of_the_other(reading, given, steps):
    with Watched(reading.model, 24) as seen:
        found = measure(reading, given, steps=steps)
    blank, whole = seen.pictures[:2]
    hottest = np.argsort(-given.maps[0].ravel())
    numbers = np.round(np.linspace(0, 24, steps + 1)).astype(int)
    assert found.shares == pytest.approx(numbers / 24)
    middle = numbers[1:-1]
    assert len(seen.pictures) == 2 + 2 * len(middle)
    for start, end, pictures in (
        (blank, whole, seen.pictures[2 : 2 + len(middle)]),
        (whole, blank, seen.pictures[2 + len(middle) :]),
    ):
        for picture, number in zip(pictures, middle, strict=True):
            for token in range(24):
                assert torch.equal(picture[token], (end if token in hottest[:number] else start)[token])


@pytest.mark.parametrize("steps", [24, 8])
def test_inserting_an_order_passes_the_pictures_of_deleting_its_reverse(reading, given, steps):
    both = with_maps(given, given.maps[0], 25 - given.maps[0])
    found = measure(reading, both, steps=steps)
    np.testing.assert_allclose(found.insertion[0], found.deletion[1][::-1], rtol=1e-9)
    np.testing.assert_allclose(found.insertion[1], found.deletion[0][::-1], rtol=1e-9)
    assert not np.allclose(found.insertion[0], found.insertion[1], rtol=1e-3)


def test_curve_is_that_of_plain_forwards_of_the_pasted_pictures(reading, model, processor, image, given):
    """Black tokens in a photo whose sides are whole tokens can be painted by hand."""
    order = np.argsort(-given.maps[0].ravel())
    found = measure(reading, given, steps=3, baseline="black")
    for step, number in enumerate((0, 8, 16, 24)):
        shown = {"deletion": order[number:], "insertion": order[:number]}
        for name, tokens in shown.items():
            picture = Image.new("RGB", image.size, "black")
            for row, column in (divmod(int(token), 6) for token in tokens):
                box = (28 * column, 28 * row, 28 * column + 28, 28 * row + 28)
                picture.paste(image.crop(box), box)
            expected = plain_probability(model, processor, picture, PROMPT, given.tokens, given.target_tokens)
            assert getattr(found, name)[0][step] == pytest.approx(expected, rel=1e-6)


def test_batch_size_changes_nothing(reading, given):
    usual = measure(reading, given, random_orders=2)
    for batch_size in (1, 3, 1000):
        with Watched(reading.model, 24) as seen:
            found = measure(reading, given, random_orders=2, batch_size=batch_size)
        assert max(seen.batches) == min(batch_size, 5)
        for name in ("insertion", "deletion"):
            np.testing.assert_allclose(getattr(found, name)[0], getattr(usual, name)[0], rtol=1e-9)
            np.testing.assert_allclose(getattr(found, f"random_{name}"), getattr(usual, f"random_{name}"), rtol=1e-9)


def test_pictures_are_counted(reading, given):
    many = with_maps(given, given.maps[0], given.maps[0].T.reshape(4, 6))
    for options in ({}, {"steps": 1}, {"steps": 30}, {"random_orders": 3, "batch_size": 2}):
        with Watched(reading.model, 24) as seen:
            found = measure(reading, many, **options)
        assert found.forwards == len(seen.pictures)
    steps, random_orders = 6, 3
    assert found.forwards - 2 == 2 * (steps - 1) * (2 + random_orders)


def test_more_steps_than_tokens_are_as_many_as_tokens(reading, given):
    exact = measure(reading, given, steps=24)
    assert exact.shares == pytest.approx(np.arange(25) / 24)
    for steps in (60, 10**12):
        found = measure(reading, given, steps=steps)
        np.testing.assert_array_equal(found.shares, exact.shares)
        np.testing.assert_array_equal(found.insertion[0], exact.insertion[0])
        np.testing.assert_array_equal(found.deletion[0], exact.deletion[0])
        assert found.forwards == exact.forwards


def test_one_step_has_the_ends_only(reading, given):
    found = measure(reading, given, steps=1, random_orders=2)
    assert found.shares.tolist() == [0, 1]
    assert found.insertion[0].tolist() == found.deletion[0][::-1].tolist()
    assert found.random_insertion.shape == (2, 2)
    assert found.forwards == 2


@pytest.mark.filterwarnings("ignore:the photo is seen as 1 x 1 image tokens")
def test_photo_of_one_token(model, processor):
    processor = copy.deepcopy(processor)
    processor.image_processor = type(processor.image_processor)(min_pixels=784, max_pixels=784)
    reading = read(model, processor, make_image(28, 28), PROMPT, ANSWER)
    assert reading.grid == (1, 1)
    found = measure(reading, maps_of(reading, "red cat", [0]), random_orders=1)
    assert found.shares.tolist() == [0, 1]


def test_the_hottest_tenth_is_removed_whatever_the_steps(reading, model, processor, image, given):
    """2 of the 24 tokens, which are nearest to a tenth."""
    order = np.argsort(-given.maps[0].ravel())
    picture = image.copy()
    for row, column in (divmod(int(token), 6) for token in order[:2]):
        picture.paste("black", (28 * column, 28 * row, 28 * column + 28, 28 * row + 28))
    expected = plain_probability(model, processor, picture, PROMPT, given.tokens, given.target_tokens)
    for steps in (1, 3, 24):
        found = measure(reading, given, steps=steps, baseline="black", random_orders=1, extra_shares=[SHARE])
        row = score_rows(given, found, None)[0]
        assert row["without_hottest_10_percent"] == pytest.approx(expected, rel=1e-6)


def by_hand(deletion, shares=(0, 0.08, 0.16, 1)):
    """What was measured of one map and one random order, whose answer falls as `deletion` says."""
    deletion, shares = np.array(deletion, float), np.array(shares)
    insertion = np.ones_like(deletion)
    return Faithfulness(shares, {0: insertion}, {0: deletion}, insertion[None], deletion[None], "blur", 2)


def test_row_of_scores_by_hand(given):
    first, random = score_rows(given, by_hand([0.8, 0.6, 0.4, 0.2]), None)
    assert first["layer"] == 0
    assert random["layer"] == "random"
    for row in (first, random):
        # 0.08 is nearest to a tenth; 0.7 * 0.08 + 0.5 * 0.08 + 0.3 * 0.84 is the area
        assert row["without_hottest_10_percent"] == 0.6
        assert (row["probability"], row["baseline_picture"], row["insertion"]) == (0.8, 0.2, 1.0)
        assert row["deletion"] == pytest.approx(0.348)
        assert row["difference"] == pytest.approx(0.652)


@pytest.mark.parametrize(
    ("probability", "left", "said"),
    [
        (0.8, 0.4, []),
        (0.8, 0.408, ["the answer keeps 51 %"]),
        (0.01, 0.005, []),
        (0.0099, 0.0099, ["would hardly say this"]),
        (0, 0, ["would hardly say this"]),
    ],
)
def test_what_no_map_can_tell_is_said_beyond_its_bounds_only(probability, left, said):
    lines = faithfulness.caveats({"probability": probability, "baseline_picture": left})
    assert len(lines) == len(said)
    assert all(part in line for part, line in zip(said, lines, strict=True))


def test_stretches_whose_area_is_uncertain_are_halved():
    """Half the difference of the ends times their distance is what may be missing."""
    shares, nan = np.linspace(0, 1, 9), np.nan
    values = np.array([1, nan, nan, nan, 0.5, 0.1, 0.1, nan, 0.0])  # 0.125, 0.025, 0 and 0.0125
    assert bends(shares, values, 0.124).tolist() == [2]
    assert bends(shares, values, 0.125).tolist() == []
    assert bends(shares, values, 0.0124).tolist() == [2, 7]  # nothing lies between the fourth and the fifth
    assert bends(shares, values, 0.0126).tolist() == [2]


def rows_by_hand(*differences, without=0.4):
    """Rows of scores of layers 0, 1, ..., two methods in turn, and of the random orders."""
    row = {"insertion": 0.9, "deletion": 0.5, "probability": 0.8, "without_hottest_10_percent": without}
    row["baseline_picture"] = 0.1
    methods = ("gradcam", "paper")
    rows = [row | {"method": methods[i % 2], "layer": i, "difference": d} for i, d in enumerate(differences)]
    return [*rows, row | {"method": "random", "layer": "random", "difference": 0.05}]


def random_orders(*differences):
    """What was measured, of random orders whose insertion lies so far above deletion."""
    flat = np.array(differences)[:, None] * np.ones(4)
    return Faithfulness(np.linspace(0, 1, 4), {}, {}, flat, np.zeros_like(flat), "blur", 2)


def test_verdict_by_hand_at_its_bounds():
    chance = random_orders(0.0, 0.1)
    lines = faithfulness.verdict(rows_by_hand(0.3, 0.281, 0.279, 0.1), chance)
    assert lines[1].startswith("layer 0: removing the hottest 10 % of the image costs the answer 50 %")
    assert lines[5].endswith("2 random orders: 0.00 to 0.10")
    assert lines[6] == "as good, within 0.02: layer 1"
    assert lines[7] == "3 of 4 maps beat every random order: do not rely on the others"  # as much as one is not more
    assert len(lines) == 8


@pytest.mark.parametrize(
    ("without", "said"),
    [
        (0.4, "costs the answer 50 %"),
        (0.8, "costs the answer 0 %"),
        (0.8003, "costs the answer 0 %"),
        (0.8005, "gives the answer 0.1 % more"),
        (0.9, "gives the answer 12 % more"),
    ],
)
def test_what_the_hottest_tenth_is_worth_in_words(without, said):
    lines = faithfulness.verdict(rows_by_hand(0.3, without=without), random_orders(0.0))
    assert lines[1] == (
        f"layer 0: removing the hottest 10 % of the image {said} of its probability; a random 10 % {said}"
    )


def test_a_map_leads_only_if_it_beats_chance_by_more_than_a_tie():
    chance = random_orders(0.0, 0.1)
    none = ["none leads: no map beats the random orders, and none is to be believed"]
    assert faithfulness.reservations(rows_by_hand(0.119, 0.1), chance) == none
    assert faithfulness.reservations(rows_by_hand(0.121, 0.1), chance) == []
    lines = faithfulness.comparison_verdict(rows_by_hand(0.119, 0.1), chance)
    assert [line.split(";")[1] for line in lines[1:3]] == [" 0 of 1 maps beat every random order"] * 2
    assert lines[3:] == none
    lines = faithfulness.comparison_verdict(rows_by_hand(0.3, 0.25, 0.115, 0.29), chance)
    assert lines[1].endswith("at layer 0, mean over the layers 0.21; 1 of 2 maps beat every random order")
    assert lines[3] == "leads: gradcam at layer 0; tied with it, within 0.02: paper at layer 3"
    lines = faithfulness.comparison_verdict(rows_by_hand(0.3, 0.25), chance)
    assert lines[3] == "leads: gradcam at layer 0, 0.05 above the best of paper"


def test_ties_are_broken_at_random_by_the_seed(reading, given):
    flat = with_maps(given, np.ones((4, 6)))
    curves = [measure(reading, flat, steps=8, seed=seed).insertion[0] for seed in (0, 1, 2, 1)]
    assert np.array_equal(curves[1], curves[3])
    assert len({tuple(curve) for curve in curves}) == 3
    in_raster_order = measure(reading, with_maps(given, 24 - np.arange(24).reshape(4, 6)), steps=8)
    assert not any(np.allclose(curve, in_raster_order.insertion[0]) for curve in curves)
    halves = with_maps(given, np.repeat([[1.0], [2.0], [2.0], [1.0]], 6, 1))  # ties stay behind what is hotter
    with Watched(reading.model, 24) as seen:
        measure(reading, halves, steps=2)
    changed = (seen.pictures[3] != seen.pictures[1]).any((1, 2)).reshape(4, 6)
    assert changed.all(1).tolist() == changed.any(1).tolist() == [False, True, True, False]


def test_seed_draws_the_random_orders_and_leaves_a_map_without_ties(reading, given):
    one, same, other = (measure(reading, given, random_orders=2, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.random_insertion, same.random_insertion)
    np.testing.assert_array_equal(one.insertion[0], other.insertion[0])
    assert not np.allclose(one.random_insertion, other.random_insertion)
    assert not np.allclose(one.random_insertion[0], one.random_insertion[1])
    assert one.random_deletion.shape == one.random_insertion.shape == (2, 7)


def test_random_orders_insert_and_delete_the_same_order(reading, given):
    with Watched(reading.model, 24) as seen:
        measure(reading, with_maps(given, np.ones((4, 6)), no_gradient=[0]), random_orders=1)
    blank, whole = seen.pictures[:2]
    for inserted, deleted in zip(seen.pictures[2:7], seen.pictures[7:], strict=True):
        assert (inserted == whole).all((1, 2)).equal((deleted == blank).all((1, 2)))


def test_layers_without_a_map_are_left_out_and_no_random_order_is_an_empty_table(reading, given):
    dead, zero = given.maps[0], np.zeros((4, 6))  # without gradient, and zero everywhere
    found = measure(reading, with_maps(given, given.maps[0], dead, zero, no_gradient=[1]))
    assert list(found.insertion) == list(found.deletion) == [0]
    assert found.random_insertion.shape == found.random_deletion.shape == (0, 7)


def test_progress_wraps_the_orders(reading, given):
    seen = []

    def progress(items):
        for item in items:
            seen.append(item)
            yield item

    measure(reading, given, steps=2, random_orders=2, progress=progress)
    assert len(seen) == 3


@pytest.mark.parametrize("function", [insertion_deletion, cascading_randomization])
@pytest.mark.parametrize(
    ("size", "prompt", "answer", "said"),
    [
        ((112, 168), PROMPT, ANSWER, r"maps have \(4, 6\) image tokens, the photo \(6, 4\)"),
        ((168, 140), PROMPT, ANSWER, r"maps have \(4, 6\) image tokens, the photo \(5, 6\)"),
        ((336, 224), PROMPT, ANSWER, r"maps have \(4, 6\) image tokens, the photo \(8, 12\)"),
        (
            (168, 112),
            PROMPT,
            "the red dog",
            "maps explain 'the red cat' to '.*', the reading 'the red dog' to",
        ),
        (
            (168, 112),
            "Where is it?",
            ANSWER,
            "maps explain .* the reading 'the red cat' to 'Where is it",
        ),
    ],
)
def test_another_photo_prompt_or_answer_than_that_of_the_maps_is_an_error(
    model, processor, given, function, size, prompt, answer, said
):
    with pytest.raises(ValueError, match=f"^the {said}"):
        function(read(model, processor, make_image(*size), prompt, answer), given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("steps", 0), ("steps", 2.5), ("batch_size", 0), ("batch_size", -1), ("random_orders", -1), ("seed", -1)),
        *(("baseline", "grey"), ("stages", 0), ("stages", 1.5)),
    ],
)
def test_bad_measure_is_named_with_its_value(reading, given, name, value):
    function = cascading_randomization if name == "stages" else measure
    with pytest.raises(ValueError, match=f"^{name}={value!r} must be"):
        function(reading, given, **{name: value})


def test_out_of_memory_says_how_many_image_tokens(reading, given):
    handle = reading.model.register_forward_pre_hook(raising(torch.cuda.OutOfMemoryError("CUDA out of memory")))
    try:
        with pytest.raises(RuntimeError, match="24 image tokens"):
            measure(reading, given)
    finally:
        handle.remove()


@pytest.mark.parametrize("function", [measure, cascading_randomization])
@pytest.mark.parametrize("error", [None, KeyError("stumble")], ids=["done", "failed"])
def test_model_and_random_state_are_as_before(make_model, processor, image, given, function, error):
    model = unruly(make_model)
    if error:
        decoder(model)[2].register_forward_pre_hook(raising(error))
    before = state_of(model, image)
    reading = read(model, processor, image, PROMPT, ANSWER)
    if error:
        with pytest.raises(KeyError, match="stumble"):
            function(reading, given)
    else:
        function(reading, given)
    assert state_of(model, image) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_gives_about_the_curves_of_float64(make_model, processor, image, reading, given, dtype):
    expected = measure(reading, given)
    found = measure(read(make_model(dtype), processor, image, PROMPT, ANSWER), given)
    assert found.insertion[0] == pytest.approx(expected.insertion[0], rel=0.15 if dtype == torch.bfloat16 else 1e-3)


# cascading randomisation


@pytest.fixture
def lively(make_model):
    """A model of 4 layers none of whose tensors is constant, so that all change when they are re-drawn."""
    model, generator = make_model(layers=4), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


@pytest.fixture
def stages(monkeypatch):
    """The reading of every stage, with the weights as they were when its maps were computed."""
    seen, real = [], randomization.explain

    def compute(reading, *args, **kwargs):
        seen.append(dataclasses.replace(reading, model=copy.deepcopy(reading.model)))
        return real(reading, *args, **kwargs)

    monkeypatch.setattr(randomization, "explain", compute)
    return seen


def changed_names(model, other):
    before, after = model.state_dict(), other.state_dict()
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


SETTINGS = Settings(2, 0.2, seed=3, score="logprob", method="product", rules="plain", tap="output")


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_redrawn_from_the_top_down(lively, processor, image, stages, tied):
    if tied:
        lively.lm_head.weight = lively.get_input_embeddings().weight
    reading = read(lively, processor, image, PROMPT, ANSWER)
    result = maps_of(reading, "red", [0, 2], SETTINGS)
    original = copy.deepcopy(lively)
    found = cascading_randomization(reading, result, stages=2)
    assert reading.model is lively
    assert changed_names(lively, original) == set()
    assert list(found) == [0, 2, 4]
    assert found[0] is result
    names = set(original.state_dict())
    behind = {"model.language_model.norm.weight", *["lm_head.weight"] * (not tied)}
    top = {name for name in names if ".layers.2." in name or ".layers.3." in name and ".visual." not in name}
    rest = {name for name in names if ".layers.0." in name or ".layers.1." in name or ".visual." in name}
    assert min(len(top), len(rest)) > 20
    middle, last = (stage.model for stage in stages)
    assert changed_names(original, middle) == behind | top
    assert changed_names(original, last) == behind | top | rest
    assert {"model.language_model.embed_tokens.weight"} <= names - behind - top - rest
    assert changed_names(middle, last) == rest  # what is re-drawn is so once


def test_a_stage_reads_what_was_read_with_its_own_model(lively, processor, image, stages):
    reading = read(lively, processor, image, PROMPT, ANSWER)
    cascading_randomization(reading, maps_of(reading, "red", [0]), stages=2)
    for stage in stages:
        assert stage.model is not lively
        same = (field.name for field in dataclasses.fields(reading) if field.name != "model")
        assert all(getattr(stage, name) is getattr(reading, name) for name in same)


@pytest.mark.parametrize(
    ("answer", "occurrence", "settings"),
    [(ANSWER, 1, SETTINGS), ("red cat, red dog", 2, dataclasses.replace(CLEAN, contrast="cat"))],
    ids=["all settings", "occurrence and contrast"],
)
def test_maps_of_a_stage_are_those_of_its_weights(lively, processor, image, stages, answer, occurrence, settings):
    reading = read(lively, processor, image, PROMPT, answer)
    layers = [0, lively.model.visual.merger, 2]
    result = maps_of(reading, "red", layers, settings, occurrence)
    found = cascading_randomization(reading, result, stages=2, passes=passes_of(settings.contrast))
    for (number, maps), stage in zip(list(found.items())[1:], list(stages), strict=True):
        assert (maps.target, maps.settings) == ("red", settings.settled())
        assert (maps.target_span, maps.target_tokens) == (result.target_span, result.target_tokens)
        layers[1] = stage.model.model.visual.merger
        expected = maps_of(read(stage.model, processor, image, PROMPT, answer), "red", layers, settings, occurrence)
        assert list(maps.maps) == list(expected.maps) == [0, "model.visual.merger", 2]
        for layer, cam in maps.maps.items():
            np.testing.assert_array_equal(cam, expected.maps[layer])
            assert not np.allclose(cam, result.maps[layer]), number


def test_stages_are_spread_over_the_layers(make_model, processor, image, given):
    reading = read(make_model(layers=4), processor, image, PROMPT, ANSWER)
    for count, expected in ((1, [0, 4]), (3, [0, 1, 3, 4]), (4, [0, 1, 2, 3, 4]), (99, [0, 1, 2, 3, 4])):
        assert list(cascading_randomization(reading, given, stages=count)) == expected


def test_redrawing_follows_its_seed(reading, given):
    one, same, other = (cascading_randomization(reading, given, stages=1, seed=seed)[3] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.maps[0], same.maps[0])
    assert not np.allclose(one.maps[0], other.maps[0])


def test_redrawn_tensors_keep_mean_and_spread():
    layer = nn.Linear(300, 200)
    layer.weight.data = 3 + 0.5 * torch.rand(200, 300)
    layer.bias.data.fill_(7.0)
    before = layer.weight.detach().clone()
    randomize_weights([layer], torch.Generator().manual_seed(0))
    assert layer.weight.mean().item() == pytest.approx(before.mean().item(), rel=1e-3)
    assert layer.weight.std().item() == pytest.approx(before.std().item(), rel=0.02)
    assert abs(stats.kurtosis(layer.weight.detach().ravel().numpy())) < 0.1  # a normal, as the uniform one was not
    assert abs(np.corrcoef(layer.weight.detach().ravel(), before.ravel())[0, 1]) < 0.02
    assert layer.bias.tolist() == [7.0] * 200  # no spread to draw from


def test_redrawn_bfloat16_weights_stay_bfloat16():
    layer = nn.Linear(30, 20, dtype=torch.bfloat16)
    randomize_weights([layer], torch.Generator().manual_seed(0))
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.isfinite().all()


def test_quantised_and_offloaded_weights_cannot_be_redrawn(make_model, processor, image, given):
    quantised = nn.Linear(2, 2)
    quantised.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="weights of torch.int8 on cpu cannot be re-drawn"):
        randomize_weights([quantised], torch.Generator())
    with pytest.raises(ValueError, match="on meta cannot be re-drawn"):
        randomize_weights([nn.Linear(2, 2, device="meta")], torch.Generator())
    model = make_model()
    decoder(model)[-1].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="cannot be re-drawn"):
        cascading_randomization(read(model, processor, image, PROMPT, ANSWER), given)
    assert changed_names(before, model) == set()


# a model that sees


@pytest.fixture(scope="module")
def dog(demo):
    return maps_of(demo, "dog", [12])


def difference(demo, result, **options):
    found = measure(demo, result, **options)
    (layer,) = found.insertion
    pairs = zip(found.random_insertion, found.random_deletion, strict=True)
    return auc(found.insertion[layer] - found.deletion[layer], found.shares), [
        auc(insertion - deletion, found.shares) for insertion, deletion in pairs
    ]


def test_map_of_the_dog_is_faithful_and_more_so_than_the_papers_formula(demo, dog):
    ours, chance = difference(demo, dog, random_orders=2, steps=5)
    assert ours > 0.5
    assert len(chance) == 2
    assert ours > max(chance) + 0.2
    paper = maps_of(demo, "dog", [12], Settings(use_smooth=False, method="paper"))
    assert difference(demo, paper, steps=4)[0] < ours - 0.2


def test_map_of_the_dog_fits_the_dog(dog):
    things = {thing.kind: localization(dog.maps[12], thing.mask) for thing in scenes.demo_scene().objects}
    assert things["dog"]["near"] == 1
    assert things["dog"]["energy"] > 0.5
    assert things["dog"]["obj_iou"] > max(things[kind]["obj_iou"] for kind in things if kind != "dog") + 0.3


def test_map_of_the_dog_needs_what_the_model_has_learned(demo, dog):
    redrawn = cascading_randomization(demo, dog, stages=1)[28]
    assert abs(spearman(dog.maps[12], redrawn.maps[12])) < 0.5
    assert ssim(dog.maps[12], redrawn.maps[12]) < 0.5


def test_each_object_word_points_at_its_own_object_and_near_no_other(demo):
    things = scenes.demo_scene().objects
    spans = sorted(span for thing in things for span in occurrences(demo.answer, thing.kind))
    words = explain(demo, spans, [12], CLEAN)
    assert [word.target for word in words] == ["plane", "house", "dog", "bicycle"]
    for word in words:
        found = {thing.kind: localization(word.maps[12], thing.mask) for thing in things}
        assert [kind for kind in found if found[kind]["near"]] == [word.target]
        assert normalize_cam(word.maps[12]).max() == 1
