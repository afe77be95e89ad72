"""What only the benchmark computes, by hand, and the whole of it on a setting that is as small as can be."""

import csv

import benchmark_localization as benchmark
import numpy as np
import pytest
import torch

from smooth_gradcam import RULES, borrowed


def test_interference_is_taken_away_in_least_squares():
    own, scores = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 3.0])
    others = torch.tensor([[4.0, 0.0], [0.0, 4.0], [0.0, 0.0]])  # I = (4, 0, 0) / 4 + 3 (0, 4, 0) / 4 = (1, 3, 0)
    # s = (3 * 1 + 1 * 3) / (1 + 9) = 0.6, and (3 - 0.6, 1 - 1.8, 2) above zero is
    assert benchmark.remove_interference(own, others, scores).tolist() == pytest.approx([2.4, 0, 2])


def test_interference_without_earlier_tokens_is_none():
    own = torch.tensor([3.0, 0.0, 2.0])
    assert benchmark.remove_interference(own, torch.zeros(3, 2), torch.zeros(2)).tolist() == [3, 0, 2]


def test_tam_leaves_out_what_comes_later_and_repeats_of_the_token():
    """Four image tokens at 1 to 4; text 5, 7, 6 around them, of which 7 is the token itself."""
    ids, positions = torch.tensor([5, 0, 0, 0, 0, 7, 6, 8]), torch.arange(1, 5)
    logits = torch.zeros(8, 9)
    logits[1:5, 7] = torch.tensor([3.0, 1.0, 2.0, -1.0])  # its own map (3, 1, 2, 0)
    logits[1:5, 5] = torch.tensor([0.0, 2.0, 0.0, 0.0])  # that of the text at 0, the only one that has a score
    logits[1:5, 8] = 9.0  # comes later
    logits[[0, 5, 7], 7] = torch.tensor([1.0, 5.0, 5.0])
    expected = benchmark.rank_gaussian(np.array([[3.0, 0.0], [2.0, 0.0]]))  # s I = (0, 1, 0, 0)
    np.testing.assert_allclose(benchmark.tam(logits, ids, positions, (2, 2), 7, 6), expected, rtol=1e-6)


def test_rank_gaussian_leaves_a_constant_map_as_it_is():
    np.testing.assert_allclose(benchmark.rank_gaussian(np.full((4, 5), 2.5)), 2.5)
    assert not benchmark.rank_gaussian(np.zeros((3, 3))).any()


def test_rank_gaussian_removes_a_spike():
    heat = np.ones((5, 5))
    heat[2, 2] = 10  # mean 2, deviation sqrt(8): sigma is sqrt(2), the spike four ranks off the median
    weights = np.exp(-(np.arange(-4, 5) ** 2) / 4)
    assert benchmark.rank_gaussian(heat)[2, 2] == pytest.approx(1 + 9 * weights[-1] / weights.sum())
    assert benchmark.rank_gaussian(heat).max() < 1.05


def test_the_interval_of_constant_data_is_that_constant():
    low, high = benchmark.bootstrap(np.full((6, 2), 0.25), [0, 0, 0, 1, 2, 2], seed=0)
    np.testing.assert_allclose([low, high], 0.25)


def test_the_interval_resamples_scenes_and_not_words():
    values = np.repeat([0.0, 1.0], 500)  # two scenes: of four equally likely draws one has only the first, one only
    low, high = benchmark.bootstrap(values, np.repeat([4, 9], 500), seed=0)  # the second
    assert (low, high) == (0, 1)


def test_gradcam_plus_plus_by_hand():
    features = torch.tensor([[1.0, 2.0], [3.0, 0.0]])  # sums over the tokens: 4, 2
    gradients = torch.tensor([[1.0, -1.0], [2.0, 0.0]])
    # a = 1 / (2 + 4) and 4 / (8 + 32) in channel 0, w_0 = 1/6 + 2/10 = 11/30; channel 1 has no positive gradient, and
    # a denominator of zero, 2 - 2, does no harm
    assert benchmark.gradcam_plus_plus(features, gradients).tolist() == pytest.approx([11 / 30, 33 / 30])


def test_halving_keeps_what_reaches_half_the_maximum():
    features, gradients = torch.tensor([[4.0], [2.0], [1.9], [-3.0]]), torch.tensor([[1.0], [-5.0], [3.0], [0.0]])
    assert benchmark.positive_pooled_halved(features, gradients).tolist() == [4, 2, 0, 0]  # pooled: (1 + 3) / 4


def test_layercam_with_the_relu_outside_and_inside_the_sum():
    features, gradients = torch.tensor([[2.0, -1.0], [-4.0, 1.0]]), torch.tensor([[1.0, 1.0], [1.0, 3.0]])
    assert benchmark.layercam(features, gradients).tolist() == [1, 0]
    assert benchmark.layercam_by_channel(features, gradients).tolist() == [2, 3]


def test_best_layer_and_the_layer_that_points_best():
    means = np.array([[0.9, 1, 0.3, 0.4], [0.8, 0, 0.6, 0.5], [0.9, 0, 0.4, 0.2]])
    setup = benchmark.Setup("", [0, 5, 9], [0, 5, 9], 1, 3, 0)
    assert benchmark.best_layer(means) == 1
    assert benchmark.points_best(means, setup) == 9


@pytest.fixture(scope="module")
def setup():
    setup = benchmark.Setup(str(benchmark.ROOT / "demo_model"), [0, 13, 27], [0, 13, 27], 1, 3, 0)
    benchmark.start_worker(setup)
    return setup


@pytest.mark.parametrize("rules", RULES)
def test_attention_weights_are_the_models_own(setup, rules):
    """Their rows sum to one, and reading them leaves features and gradients as they are with the usual attention."""
    model, found = benchmark.WORKER["model"], {}
    with borrowed(model):
        for attention in ("sdpa", "eager"):
            model.set_attn_implementation(attention)
            reading = benchmark.read_scene(model, benchmark.WORKER["processor"], 0)
            forced, words = benchmark.find_words(reading, 0)
            tensors, logits = benchmark.forward(model, forced, benchmark.WORKER["taps"], setup.layers, rules)
            weights = [tensors[key] for key in list(tensors) if key[0] == "attention"]
            tensors = {key: tensor for key, tensor in tensors.items() if key[0] != "attention"}
            found[attention] = benchmark.backward(tensors, logits, words[0], reading.positions)
    assert len(weights) == 3
    for rows in weights:
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]))
        assert not rows.triu(1).any()  # no look ahead
    for key, pair in found["eager"].items():
        for one, other in zip(pair, found["sdpa"][key], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def test_attention_x_gradient_is_of_the_weights_that_were_used(setup):
    """To first order, sum of weight * gradient over a layer's row is what scaling all its values does to the score."""
    model = benchmark.WORKER["model"]
    with borrowed(model):
        model.set_attn_implementation("eager")
        forced, (word, *_) = benchmark.find_words(benchmark.read_scene(model, benchmark.WORKER["processor"], 0), 0)
        tensors, logits = benchmark.forward(model, forced, benchmark.WORKER["taps"], setup.layers, "plain")
        (gradient,) = torch.autograd.grad(
            logits[word.scored.predicting[0], word.scored.expected[0]], tensors["attention", 27]
        )
        expected = float((gradient * tensors["attention", 27].detach()).sum())

        def score(scale):
            projection = model.model.language_model.layers[27].self_attn.o_proj
            handle = projection.register_forward_pre_hook(lambda module, args: (args[0] * scale,))
            try:
                with torch.no_grad():
                    logits = model(**forced, use_cache=False).logits[0]
            finally:
                handle.remove()
            return float(logits[word.scored.predicting[0], word.scored.expected[0]])

        assert (score(1.01) - score(0.99)) / 0.02 == pytest.approx(expected, rel=0.02)


def test_the_whole(tmp_path, capsys):
    sizes = ["--scenes=1", "--words_faithful=1", "--steps=2", "--layers=3", "--processes=1"]
    benchmark.main([*sizes, f"--output_dir={tmp_path}"])
    printed = capsys.readouterr().out
    assert "in 1 unseen scenes" in printed
    assert "gradcam @ 27" in printed
    rows = list(csv.DictReader((tmp_path / "localization.csv").open()))
    assert {row["row"] for row in rows} == {*benchmark.ROWS, *benchmark.LAYERLESS, *benchmark.BOUNDS}
    assert [row["layer"] for row in rows if row["row"] == "product"] == ["0", "14", "27"]
    assert all(float(row["pointing_low"]) <= float(row["pointing"]) <= float(row["pointing_high"]) for row in rows)
    (last,) = [row for row in rows if row["row"] == "Grad-CAM of the output" and row["layer"] == "27"]
    assert float(last["near"]) == float(last["energy"]) == 0  # no gradient there
    faithful = {row["row"]: row for row in csv.DictReader((tmp_path / "faithfulness.csv").open())}
    ours = faithful["gradcam"]
    assert float(ours["difference"]) == pytest.approx(float(ours["insertion"]) - float(ours["deletion"]), abs=2e-5)
    assert {"random order", "TAM", "object (oracle)"} <= set(faithful)
    assert (tmp_path / "localization.png").stat().st_size > 10_000
