"""Routed experts: all relevance of a token goes through its experts, whose shares are constants.

Gradients by the book, maps, and the modes are tested with the other families.
"""

import copy
import dataclasses

import accelerate
import numpy as np
import pytest
import torch
import transformers
from conftest import make_image
from family_models import (
    ANSWER,
    EXPERTS,
    LAYERS,
    PROMPT,
    SIDES,
    TEXT,
    decoder,
    make_processor,
    make_random,
)
from torch import nn

import smooth_gradcam as core
from common.passes import recomputed, watched_passes
from smooth_gradcam import Settings, explain, read
from studies.fastv import flops_share

FAMILY = "qwen3_vl_moe"
OF_FIVE = hasattr(transformers.PreTrainedModel, "set_experts_implementation")
KERNELS = ("eager", "batched_mm", "grouped_mm") if OF_FIVE else ("eager",)  # of transformers 4 there is one


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_random(FAMILY, tokenizer)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return make_processor(FAMILY, tokenizer)


@pytest.fixture(scope="module")
def reading(model, processor):
    side = SIDES[FAMILY]
    return read(model, processor, make_image(6 * side, 4 * side), PROMPT, ANSWER)


@pytest.fixture(params=KERNELS)
def single(request, tokenizer):
    """A model in float32, whose experts run as one kernel."""
    model = make_random(FAMILY, tokenizer, torch.float32)
    if OF_FIVE:
        model.set_experts_implementation(request.param)
    return model


def output_of(block, x):
    output = block(x)
    return output[0] if isinstance(output, tuple) else output  # transformers 4 gives the router's logits, too


def contributions(block, model, rules):
    """gradient x input and gradient x output of one layer's experts, (tokens,) each, for a random gradient."""
    torch.manual_seed(0)
    x = torch.randn(1, 40, TEXT["hidden_size"], dtype=model.dtype, requires_grad=True)
    weights = torch.randn(x.shape, dtype=model.dtype)
    with core.RULES[rules](model):
        output = output_of(block, x)
        (gradient,) = torch.autograd.grad((output * weights).sum(), x)
    return (gradient * x)[0].sum(-1).detach(), (output * weights)[0].sum(-1).detach()


def test_a_token_hands_on_all_relevance_that_its_experts_get(model):
    """Nothing is lost to the router, and nothing goes to other tokens; plain gradients do not add up."""
    for layer in decoder(model):
        found, expected = contributions(layer.mlp, model, "attnlrp")
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        plain, expected = contributions(layer.mlp, model, "plain")
        assert (plain - expected).abs().max() > 0.1 * expected.abs().max()


def test_tokens_go_to_different_experts(model):
    """Or there would be nothing to route, and one expert in the place of all would do."""
    seen = []
    handle = decoder(model)[0].mlp.experts.register_forward_hook(lambda module, args, output: seen.append(args))
    output_of(decoder(model)[0].mlp, torch.randn(1, 40, TEXT["hidden_size"], dtype=model.dtype))
    handle.remove()
    index = next(part for part in seen[0] if not part.is_floating_point())
    assert index.shape == (40, EXPERTS["num_experts_per_tok"])
    assert index.unique().tolist() == list(range(EXPERTS["num_experts"]))


@pytest.mark.parametrize("rules", core.RULES)
def test_no_bit_of_the_logits_is_changed(single, processor, rules):
    """Also not where a kernel rounds in its own way."""
    reading = read(single, processor, make_image(192, 128), PROMPT, ANSWER)
    experts = decoder(single)[2].mlp.experts
    experts.forward = lambda *args, run=experts.forward: run(*args) * (1 + 1e-6)
    with core.borrowed(single):
        expected = single(**reading.inputs).logits
        taps = core.find_taps(single, [0], "input")
        with core.RULES[rules](single), core.captured(taps):
            found = single(**reading.inputs).logits
    assert found.requires_grad
    assert torch.equal(found, expected)


def test_kernels_have_the_gradients_of_the_book(single, reading, processor):
    """That of the same model in float64."""
    own = read(single, processor, reading.photo, PROMPT, ANSWER)
    (found,) = explain(own, [(0, len(ANSWER))], range(LAYERS), Settings(use_smooth=False, method="hirescam"))
    (expected,) = explain(reading, [(0, len(ANSWER))], range(LAYERS), Settings(use_smooth=False, method="hirescam"))
    for layer, cam in expected.maps.items():
        np.testing.assert_allclose(found.maps[layer], cam, rtol=2e-3, atol=1e-4 * cam.max())


def test_maps_do_not_depend_on_the_batch_nor_on_recomputing(reading):
    settings, layers = Settings(num_samples=3, noise_std=0.2), range(LAYERS)
    (alone,) = explain(reading, [(0, 3)], layers, settings)
    (batched,) = explain(reading, [(0, 3)], layers, settings, batch_size=3)
    with recomputed(reading.model):
        (again,) = explain(reading, [(0, 3)], layers, settings)
    for layer, cam in alone.maps.items():
        assert cam.any()
        np.testing.assert_allclose(batched.maps[layer], cam, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(again.maps[layer], cam, rtol=1e-5, atol=1e-9)


def test_the_router_has_a_part_in_plain_gradients_alone(model, reading):
    """By the rules they are those of a model whose router is frozen at what it said."""
    frozen = copy.deepcopy(model)
    for layer in decoder(frozen):
        router = layer.mlp.gate
        router.register_forward_hook(
            lambda module, args, out: tuple(p.detach() for p in out) if isinstance(out, tuple) else out.detach()
        )
    differs = {}
    for rules in ("attnlrp", "plain"):
        found = []
        for one in (model, frozen):
            kept = {}
            passes, own = watched_passes(core.noisy_passes, kept.update), dataclasses.replace(reading, model=one)
            explain(own, [(0, len(ANSWER))], [0], Settings(use_smooth=False, rules=rules), passes=passes)
            found.append(kept[0][1])
        differs[rules] = float((found[0] - found[1]).abs().max())
    assert differs["attnlrp"] < 1e-9 < 1e-3 < differs["plain"]


def test_model_is_as_before_also_after_an_error(model, reading):
    def state():
        modules = [module for layer in decoder(model) for module in layer.modules()]
        return [(len(m._forward_hooks), len(m._forward_pre_hooks), vars(m).get("forward")) for m in modules]

    before, weights = state(), copy.deepcopy(model.state_dict())
    explain(reading, [(0, 3)], [0], Settings(use_smooth=False))
    decoder(model)[3].mlp.experts.register_forward_hook(fail := lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explain(reading, [(0, 3)], [0], Settings(use_smooth=False))
    hooks = decoder(model)[3].mlp.experts._forward_hooks
    assert list(hooks.values()) == [fail]
    hooks.clear()
    assert state() == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_layer_without_experts_among_others_is_refused_by_name(tokenizer, processor):
    model = make_random(FAMILY, tokenizer)
    decoder(model)[2].mlp = nn.Sequential(nn.Linear(32, 32, dtype=torch.float64))
    reading = read(model, processor, make_image(192, 128), PROMPT, ANSWER)
    with pytest.raises(core.ExplanationError, match=r"^layers\.2\.mlp\.gate has no gradient rule"):
        explain(reading, [(0, 3)], [0], Settings(use_smooth=False))
    (found,) = explain(reading, [(0, 3)], [0], Settings(use_smooth=False, rules="plain"))
    assert found.maps[0].any()


def test_weights_that_are_offloaded_are_refused_by_name(tokenizer, processor):
    """They are in memory while the experts run, and no longer where their gradient is made."""
    model = make_random(FAMILY, tokenizer)
    reading = read(model, processor, make_image(192, 128), PROMPT, ANSWER)
    (expected,) = explain(reading, [(0, 3)], [0], Settings(use_smooth=False, rules="plain"))
    accelerate.cpu_offload(decoder(model)[2].mlp.experts, execution_device=torch.device("cpu"))
    with pytest.raises(core.ExplanationError, match="^Qwen3VLMoeTextExperts has no gradient rule for its weights as"):
        explain(reading, [(0, 3)], [0], Settings(use_smooth=False))
    (found,) = explain(reading, [(0, 3)], [0], Settings(use_smooth=False, rules="plain"))
    np.testing.assert_allclose(found.maps[0], expected.maps[0], rtol=1e-6)


def test_flops_are_those_of_a_tokens_experts(model):
    """5 layers of 32 channels, two experts of 24 channels for each token."""
    full, few = (4 * n * 32 * 32 + 2 * n * n * 32 + 2 * n * 32 * 48 for n in (100, 40))
    assert EXPERTS["moe_intermediate_size"] * EXPERTS["num_experts_per_tok"] == 48
    model.config.text_config.intermediate_size, before = 1000, model.config.text_config.intermediate_size
    try:
        assert flops_share(model, 1, 100, 40) == pytest.approx((full + 4 * few) / (5 * full))
    finally:
        model.config.text_config.intermediate_size = before
