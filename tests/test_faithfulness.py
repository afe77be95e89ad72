"""Insertion and deletion: against forward passes of their own, pictures pasted by hand, and rows by hand."""

import copy
import inspect

import numpy as np
import pytest
import torch
from conftest import make_image
from maps_by_hand import ANSWER, PROMPT, maps_of, ranked_maps, spot, with_maps
from PIL import Image
from scipy import ndimage
from test_core import decoder, raising, state_of, unruly

from smooth_gradcam import Settings, read
from studies import faithfulness
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
from studies.randomization import cascading_randomization

# area under a curve


def test_area_under_a_curve_by_hand():
    shares = np.array([0, 0.25, 1])
    assert auc(np.array([0, 1, 0.5]), shares) == pytest.approx(0.125 + 0.75 * 0.75)
    assert auc(np.array([1, 1, 1]), shares) == pytest.approx(1)


# insertion and deletion


@pytest.fixture(scope="module")
def reading(model, processor, image):
    return read(model, processor, image, PROMPT, ANSWER)


@pytest.fixture(scope="module")
def given(reading):
    return ranked_maps(reading)


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
        assert (row["p"], row["baseline_picture"], row["insertion"]) == (0.8, 0.2, 1.0)
        assert row["deletion"] == pytest.approx(0.348)
        assert row["difference"] == pytest.approx(0.652)


@pytest.mark.parametrize(
    ("p", "left", "said"),
    [
        (0.8, 0.4, []),
        (0.8, 0.408, ["the answer keeps 51 %"]),
        (0.01, 0.005, []),
        (0.01, 0.0051, ["the answer keeps 51 %"]),
        (0, 0, []),
    ],
)
def test_what_no_map_can_tell_is_said_beyond_its_bounds_only(p, left, said):
    lines = faithfulness.caveats({"p": p, "baseline_picture": left})
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
    row = {"insertion": 0.9, "deletion": 0.5, "p": 0.8, "without_hottest_10_percent": without}
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
    assert lines[0].startswith("layer 0: removing the hottest 10 % of the image costs the answer 50 %")
    assert lines[4].endswith("2 random orders: 0.00 to 0.10")
    assert lines[5] == "as good, within 0.02: layer 1"
    assert lines[6] == "3 of 4 maps beat every random order: do not rely on the others"  # as much as one is not more
    assert len(lines) == 7
    doubted = [row | {"doubt": "the model hardly says this"} for row in rows_by_hand(0.3, 0.281, 0.279, 0.1)]
    assert faithfulness.verdict(doubted, chance) == [*lines[:4], faithfulness.NOT_BELIEVED]


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
    assert lines[0] == (
        f"layer 0: removing the hottest 10 % of the image {said} of its probability; a random 10 % {said}"
    )


def test_a_map_leads_only_if_it_beats_chance_by_more_than_a_tie():
    chance = random_orders(0.0, 0.1)
    none = ["none leads: no map beats the random orders, and none is to be believed"]
    assert faithfulness.reservations(rows_by_hand(0.119, 0.1), chance) == none
    assert faithfulness.reservations(rows_by_hand(0.121, 0.1), chance) == []
    lines = faithfulness.comparison_verdict(rows_by_hand(0.119, 0.1), chance)
    assert [line.split(";")[1] for line in lines[:2]] == [" 0 of 1 maps beat every random order"] * 2
    assert lines[2:] == none
    lines = faithfulness.comparison_verdict(rows_by_hand(0.3, 0.25, 0.115, 0.29), chance)
    assert lines[0].endswith("at layer 0, mean over the layers 0.21; 1 of 2 maps beat every random order")
    assert lines[2] == "leads: gradcam at layer 0; tied with it, within 0.02: paper at layer 3"
    lines = faithfulness.comparison_verdict(rows_by_hand(0.3, 0.25), chance)
    assert lines[2] == "leads: gradcam at layer 0, 0.05 above the best of paper"
    doubted = [row | {"doubt": "the model hardly says this"} for row in rows_by_hand(0.3, 0.25)]
    doubts = [f"none leads: {faithfulness.NOT_BELIEVED}"]
    assert faithfulness.comparison_verdict(doubted, chance) == [*lines[:2], *doubts]
    assert faithfulness.reservations(doubted, chance) == doubts


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
