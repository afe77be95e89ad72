"""The beds themselves, what their benchmark computes, and what the defaults have to hold in them."""

import csv
import itertools
import os
from dataclasses import astuple, replace
from pathlib import Path

import beds
import benchmark_choices as benchmark
import numpy as np
import pytest
import torch

import smooth_gradcam as core
from common.passes import watched_passes
from smooth_gradcam import METHODS, Settings, explain, find_target, read

DECODER = Path(os.environ.get("PUBLISHED_DECODER", beds.ROOT / "build" / "qwen2.5-0.5b"))
published = pytest.mark.skipif(
    not (DECODER / "config.json").exists(), reason=f"no published decoder at {DECODER}: see demo_model/graft.py"
)
CLEAN = Settings(use_smooth=False)


@pytest.fixture(scope="module")
def scenes_bed():
    return beds.load("scenes", None)


@pytest.fixture(scope="module")
def words_bed():
    bed = beds.load("words", str(DECODER))
    bed.model.float()  # bfloat16 takes many times as long where a processor has no units for it
    return bed


# pictures, words, masks


def test_an_image_token_belongs_to_the_object_that_covers_a_quarter_of_it():
    mask = np.zeros((56, 84), bool)
    mask[:28, :28] = True  # all of the first of 2 x 3 image tokens
    mask[:14, 28:42] = True  # a quarter of the second
    mask[28:41, :14] = True  # a little less of the fourth
    word = beds.Word("dog", (0, 3), mask)
    assert word.on((2, 3)).tolist() == [[True, True, False], [False, False, False]]
    small = np.zeros((56, 84), bool)
    small[2:4, 60:62] = True
    assert beds.Word("dog", (0, 3), small).on((2, 3)).tolist() == [[False, False, True], [False, False, False]]


@pytest.mark.parametrize("name", ["scenes", "flat", "crowded"])
def test_pictures_of_a_bed_have_their_objects_and_are_the_same_again(name):
    draw = {"scenes": beds.draw_scenes, "flat": beds.draw_flat, "crowded": beds.draw_crowded}[name]
    for number in range(4):
        drawn, again = draw(number), draw(number)
        assert np.array_equal(drawn.photo, again.photo)
        for kind, mask in drawn.masks.items():
            assert mask.shape == drawn.photo.size[::-1]
            changed = (np.asarray(drawn.photo) != np.asarray(drawn.without[kind])).any(-1)
            assert changed[mask].mean() > 0.5
            assert changed[~mask].mean() < 0.35  # the rim of a large object
        assert len(drawn.masks) == {"flat": 1, "crowded": 4 + number % 2}.get(name, len(drawn.masks))


def test_a_word_counts_whose_probability_falls_by_a_quarter(monkeypatch, scenes_bed):
    drawn = beds.draw_scenes(0)
    picture = beds.read(scenes_bed.model, scenes_bed.processor, drawn)
    assert (len(picture.words), picture.tried) == (2, 2)
    word = picture.words[0]
    for said, left, counts, doubted in (
        (0.8, 0.74, True, False),
        (0.8, 0.76, False, False),
        (0.1, 0.74, True, False),
        (0.09, 0.74, False, True),
        (0.09, 0.76, False, False),
    ):
        for only_doubted, expected in ((False, counts), (True, doubted)):
            values = iter([said, left * said])
            monkeypatch.setattr(beds, "probability", lambda *_, values=values: next(values))
            assert beds.counts(picture.reading, word, drawn.without[word.name], only_doubted) == expected


# the test doubles


def test_image_tokens_are_the_embeddings_of_the_words_that_the_colours_code(model, processor):
    grid = np.array([["dog", "sky", "sky"], ["sky", "bus", "grass"], ["sea", "empty", "dog"]], dtype=object)
    inputs = core.prepare_inputs(model, processor, [beds.coded(grid)], "What is this?")
    table, tokenizer = model.get_input_embeddings().weight, processor.tokenizer
    expected = torch.stack([table[tokenizer(f" {word}")["input_ids"]].mean(0) for word in grid.ravel()])
    handle = model.model.visual.register_forward_hook(beds.WordEyes(model, processor, 0), with_kwargs=True)
    seen = {}
    watch = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    try:
        model(**inputs)
    finally:
        handle.remove()
        watch.remove()
    at = inputs["input_ids"][0] == model.config.image_token_id
    torch.testing.assert_close(seen["inputs_embeds"][0, at], expected.to(seen["inputs_embeds"]))


def test_noise_of_the_words_is_a_share_of_their_spread_and_always_the_same(model, processor):
    pixels = core.prepare_inputs(model, processor, [beds.coded(np.full((10, 10), "sky", dtype=object))], "?")
    clean, noisy, again = (
        beds.WordEyes(model, processor, spread).embeddings(pixels["pixel_values"]) for spread in (0, 0.5, 0.5)
    )
    words = beds.WordEyes(model, processor, 0).words
    assert torch.equal(noisy, again)
    assert float((noisy - clean).std()) == pytest.approx(0.5 * float(words.std(0).square().mean().sqrt()), rel=0.05)


def test_sinks_take_the_first_tokens_outliers_and_keep_the_rest():
    hidden = torch.ones(1, 5, 100)
    hidden[0, 0, 7], hidden[0, 0, 8] = -300.0, 2.0
    for args, kwargs in (((hidden, 1), {}), ((), {"hidden_states": hidden, "x": 1})):
        given, named = beds.Sinks([2, 4])(None, args, kwargs)
        planted = given[0] if given else named["hidden_states"]
        assert planted[0, [2, 4], 7].tolist() == [-300, -300]
        planted[0, [2, 4], 7] = 1
        assert torch.equal(planted, hidden)
        assert (given[1:], named.get("x")) == (((1,), None) if args else ((), 1))


def test_sinks_are_background_in_every_picture_of_words():
    for number in range(50):
        grid, empty, things = beds.word_grid(number)
        assert (grid == empty).ravel()[beds.SINKS].all()
        assert all((grid == name).sum() in (4, 6) for name in things)


# what the benchmark computes


@pytest.mark.parametrize("seed", range(5))
def test_otsu_parts_the_values_with_the_least_variance_within_the_parts(seed):
    heat = np.random.default_rng(seed).gamma(0.5, 1, (3, 40))
    for row, hot in zip(heat, benchmark.otsu(heat), strict=True):
        within = {t: sum(part.var() * len(part) for part in (row[row >= t], row[row < t])) for t in np.sort(row)[1:]}
        assert np.array_equal(hot, row >= min(within, key=within.get))
    assert not benchmark.otsu(np.zeros((1, 9))).any()


def test_pooled_weights_by_hand():
    x = torch.tensor([[[2.0, 0.0], [1.0, 3.0], [0.0, -1.0]]])  # one layer, three tokens, two channels
    g = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [0.0, 2.0]]])  # |g| 5, 1, 2; g.A 6, 3, -2
    expected = {
        "mean": (1, 7 / 3),
        "|g|": (15 / 8, 25 / 8),
        "|g|^2": (75 / 30, 109 / 30),
        "ReLU(g.A)": (18 / 9, 27 / 9),
    }
    for name, (a, b) in expected.items():
        heat = [max(0, value) for value in (2 * a, a + 3 * b, -b)]
        torch.testing.assert_close(benchmark.POOLED[name](x, g), torch.tensor([heat]))
    assert benchmark.per_token(x, g).tolist() == [[6, 3, 0]]
    names = ["ReLU(g.A) x per token", "ReLU(g.A)^3 x per token"]
    half, most = benchmark.weigh(x, g, names).values()
    torch.testing.assert_close(half, torch.tensor([[(4 * 6) ** 0.5, (11 * 3) ** 0.5, 0]]))
    torch.testing.assert_close(most, torch.tensor([[(4**3 * 6) ** 0.25, (11**3 * 3) ** 0.25, 0]]))


@pytest.mark.parametrize("name", ["gradcam", "hirescam", "product", "paper"])
def test_the_benchmarks_settings_are_the_methods(name):
    setting, generator = benchmark.NAMED[name], torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 3, 7, 5, generator=generator)
    heat = benchmark.weigh(*benchmark.FEATURES[setting.features](x, g), [setting.weights])[setting.weights]
    torch.testing.assert_close(heat, torch.stack([METHODS[name].formula(*pair) for pair in zip(x, g, strict=True)]))
    settings = Settings(method=name).settled()
    assert (settings.rules, settings.score, settings.tap) == (setting.rules, setting.score, setting.tap)


def test_scores_by_hand():
    logits, tokens = torch.tensor([[1.0, 4.0, 2.0, 1.0], [7.0, 0.0, 1.0, 4.0]]), torch.tensor([1, 3])
    assert float(benchmark.SCORES["logit - mean"](logits, tokens)) == 8 - 2 - 3
    assert float(benchmark.SCORES["logit - runner-up"](logits, tokens)) == (4 - 2) + (4 - 7)


def test_occlusion_hides_a_token_from_the_answer_and_nothing_else(scenes_bed):
    """Equal to a forward pass whose 4-D mask takes the token from all that comes after the picture."""
    reading = beds.read(scenes_bed.model, scenes_bed.processor, beds.draw_scenes(0)).reading
    span = find_target(reading.answer, "bus")
    with core.borrowed(reading.model):
        found = benchmark.occlusion(reading, [span])["token"][0].ravel()
        forced, (scored,) = core.score_parts(reading.inputs, reading.tokens, [reading.tokens_of(span)])
        seen = {}
        text = reading.model.model.language_model
        handle = text.register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True)
        with torch.no_grad():
            logits = reading.model(**forced, use_cache=False).logits[0]
            handle.remove()
            whole = logits[scored.predicting].log_softmax(-1)[range(len(scored.expected)), scored.expected].sum()
            length, after = forced["input_ids"].shape[1], int(reading.positions[-1]) + 1
            for cell in (0, int(found.argmax()), 30):
                mask = torch.full((length, length), float("-inf")).triu(1)
                mask[after:, reading.positions[cell]] = float("-inf")
                places = {"inputs_embeds": seen["inputs_embeds"], "position_ids": seen["position_ids"]}
                states = text(**places, attention_mask=mask[None, None], use_cache=False).last_hidden_state
                rows = reading.model.lm_head(states[0, scored.predicting]).log_softmax(-1)
                fall = whole - rows[range(len(scored.expected)), scored.expected].sum()
                assert found[cell] == pytest.approx(max(0, float(fall)), abs=5e-6)
    assert found.max() > 1e-4


def test_resampled_means_of_constant_data_are_that_constant():
    np.testing.assert_allclose(benchmark.resampled(np.full((6, 2), 0.25), np.array([0, 0, 0, 1, 2, 2]), 0), 0.25)


def test_the_benchmark_as_a_whole(tmp_path, capsys, monkeypatch):
    """Of two pictures, by the rules and scores that a user can choose: the other scores stand above by hand."""
    passes = [(rules, score) for rules, score in benchmark.PASSES if score == "logit" or rules == "attnlrp"]
    monkeypatch.setattr(benchmark, "PASSES", passes)
    monkeypatch.setattr(benchmark, "SETTINGS", [s for s in benchmark.SETTINGS if (s.rules, s.score) in passes])
    monkeypatch.setitem(benchmark.PICTURES, "flat", 2)
    folders = [f"--work={tmp_path / 'work'}", f"--output_dir={tmp_path}"]
    benchmark.main(["--beds", "flat", "--quick", "--steps=2", "--quiet", *folders])
    printed = capsys.readouterr().out
    assert "flat: 3 of 3 words count" in printed
    assert "| product |" in printed
    rows = list(csv.DictReader((tmp_path / "beds.csv").open()))
    assert len(rows) == len(benchmark.SETTINGS)
    assert all(0 <= float(row["pointing"]) <= 1 for row in rows)
    assert (tmp_path / "beds.png").stat().st_size > 10_000


# what holds in the beds


@pytest.fixture(scope="module")
def corners(scenes_bed):
    """The sixteen pictures as they are read, and the corner of each one's object."""
    pictures = [beds.draw_corner(number) for number in range(16)]
    return [
        (read(scenes_bed.model, scenes_bed.processor, photo, beds.scenes.DESCRIBE[0]), corner)
        for photo, corner in pictures
    ]


def test_corner_pictures_have_both_orientations_and_every_corner(corners):
    assert {reading.grid for reading, _ in corners} == {(9, 12), (12, 9)}
    assert sorted(corner for _, corner in corners) == sorted([(0, 0), (0, 1), (1, 0), (1, 1)] * 4)


def test_every_layer_lights_all_sixteen_corners(corners):
    """One object in a corner of a flat background, both orientations: the word and the whole answer, at every layer.

    The three methods are formulas on the same features and gradients.
    """
    methods, dark = ("gradcam", "hirescam", "product"), []
    assert len({astuple(replace(Settings(method=name).settled(), method="paper")) for name in methods}) == 1
    for number, (reading, corner) in enumerate(corners):
        word = beds.re.search(r"\b(" + "|".join(beds.scenes.KINDS) + r")\b", reading.answer).span()
        spans, pairs = {"word": word, "answer": (0, len(reading.answer))}, []
        explain(reading, list(spans.values()), range(28), CLEAN, passes=watched_passes(core.noisy_passes, pairs.append))
        for part, found in zip(spans, pairs, strict=True):
            for method, (layer, pair) in itertools.product(methods, found.items()):
                cam = core.token_map(layer, *pair, reading, method).reshape(reading.grid)
                dark += [(number, part, method, layer)] if beds.lit_corner(cam) != corner else []
    assert dark == []


def test_swapped_objects_swap_the_maps(scenes_bed):
    kinds, places = ["dog", "bus"], [3, 5]
    for names in (kinds, kinds[::-1]):
        scene = beds.scenes.make_scene(11, size=(280, 392), kinds=names, places=places, background="landscape")
        drawn = beds.drawn_scene(scene, beds.scenes.DESCRIBE[0])
        picture = beds.read(scenes_bed.model, scenes_bed.processor, drawn)
        assert {word.name for word in picture.words} == set(kinds)
        check_maxima(picture, 28)


@published
def test_swapped_objects_swap_the_maps_of_a_published_decoder(words_bed):
    for left, right in (("dog", "bus"), ("bus", "dog")):
        grid = np.full(beds.SIZE, "sky", dtype=object)
        grid[3:] = "grass"
        empty = grid.copy()
        grid[2:4, 1:3], grid[2:4, 6:8] = left, right
        masks = {name: (grid == name).repeat(beds.CELL, 0).repeat(beds.CELL, 1) for name in (left, right)}
        without = {name: beds.coded(np.where(grid == name, empty, grid)) for name in masks}
        prompt, answer = "What is in this image? Answer with a list.", "A dog and a bus."
        picture = beds.read(
            words_bed.model, words_bed.processor, beds.Drawn(beds.coded(grid), masks, without, prompt, answer)
        )
        assert {word.name for word in picture.words} == {"dog", "bus"}
        check_maxima(picture, 24)


def check_maxima(picture, total):
    """The maximum of every default map of a word lies on its object, in the middle half of the layers."""
    layers = range(total // 4, total - total // 4)
    for method in METHODS:
        if METHODS[method].scores_end or METHODS[method].run is not None:  # as published, and attention
            continue
        found = explain(picture.reading, [word.span for word in picture.words], layers, Settings(1, 0, method=method))
        for word, maps in zip(picture.words, found, strict=True):
            off = [layer for layer, cam in maps.maps.items() if not word.on(maps.grid).ravel()[cam.argmax()]]
            assert off == [], (method, word.name)
