"""Does a map depend on the weights? Against other libraries' likeness, and the weights that are re-drawn."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from maps_by_hand import ANSWER, CLEAN, PROMPT, maps_of, ranked_maps
from scipy import ndimage, stats
from skimage.metrics import structural_similarity
from test_core import decoder
from torch import nn

from common.evidence import explain_with_evidence
from common.passes import passes_of
from smooth_gradcam import Settings, read
from studies import randomization
from studies.randomization import cascading_randomization, randomize_weights, spearman, ssim

# likeness of two maps


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


# readings


@pytest.fixture(scope="module")
def reading(model, processor, image):
    return read(model, processor, image, PROMPT, ANSWER)


@pytest.fixture(scope="module")
def given(reading):
    return ranked_maps(reading)


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


def test_map_of_the_dog_needs_what_the_model_has_learned(demo, dog):
    redrawn = cascading_randomization(demo, dog, stages=1)[28]
    assert abs(spearman(dog.maps[12], redrawn.maps[12])) < 0.5
    assert ssim(dog.maps[12], redrawn.maps[12]) < 0.5


def test_whole_maps_are_compared_where_few_tokens_are_needed(demo, dog):
    """As those of Grad-CAM; all are drawn with the evidence of the model itself."""
    span, settings = dog.target_span, dataclasses.replace(CLEAN, method="needed")
    (needed,) = explain_with_evidence(demo, [span], [12], settings)
    assert 0 < np.count_nonzero(needed.maps[12]) < np.count_nonzero(dog.maps[12]) / 2
    found, expected = (cascading_randomization(demo, maps, stages=1) for maps in (needed, dog))
    for number in (0, 28):
        np.testing.assert_array_equal(found[number].maps[12], expected[number].maps[12])
        assert (found[number].settings, found[number].evidence) == (dog.settings, needed.evidence)
