"""Models as users bring them: with adapters, in wrappers, compiled, with other kernels; maps are the bare model's."""

import copy
import threading
from contextlib import suppress

import numpy as np
import pytest
import torch
from family_models import ANSWER, FAMILIES, PROMPT, decoder, make_processor, make_random
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForImageTextToText

import smooth_gradcam as core
from common.passes import recomputed, vision_kept
from smooth_gradcam import ExplanationError, SmoothQwenGradCAM, compute_token_maps, get_model_layers, read, unwrapped
from studies.knockout import image_hidden

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TWO = {"num_samples": 2, "answer": ANSWER}


def maps_of(model, processor, image, layers=(0, 1, -1), **settings):
    return compute_token_maps(model, processor, image, PROMPT, layers, **TWO | settings).maps


def assert_same(found, expected):
    assert list(found) == list(expected)
    for key, cam in expected.items():
        assert cam.any()
        np.testing.assert_allclose(found[key], cam, rtol=1e-6, atol=1e-6 * cam.max())


def state(model):
    """What a run must leave as it was."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    parameters = [(parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()]
    return hooks, parameters, [module.training for module in model.modules()]


def inside(model):
    """Modules of the vision tower, of a decoder layer, and behind the layers."""
    layers, visual = decoder(model), model.model.visual
    return [visual.blocks[0], visual.merger, layers[1].self_attn.v_proj, layers[1].mlp, layers[0].input_layernorm]


# adapters


def adapted(model, **options):
    """The model in PEFT's wrapper, with adapters that change what it says."""
    peft = pytest.importorskip("peft")
    config = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.5, "target_modules": list(PROJECTIONS)} | options
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return wrapped.to(next(model.parameters()).dtype)


@pytest.fixture(scope="module")
def with_adapters(make_model):
    return adapted(make_model())


@pytest.mark.parametrize("rules", core.RULES)
def test_maps_with_adapters_are_those_of_the_merged_model(with_adapters, make_model, processor, image, rules):
    merged = copy.deepcopy(with_adapters).merge_and_unload()
    before = state(with_adapters)
    found = maps_of(with_adapters, processor, image, rules=rules)
    assert state(with_adapters) == before
    assert_same(found, maps_of(merged, processor, image, rules=rules))
    bare = maps_of(make_model(), processor, image, rules=rules)
    assert all(np.abs(bare[key] - cam).max() > 0.01 * cam.max() for key, cam in found.items())


def test_maps_of_modules_with_adapters_are_those_of_the_merged_model(with_adapters, processor, image):
    merged = copy.deepcopy(with_adapters).merge_and_unload()
    found = maps_of(with_adapters, processor, image, inside(unwrapped(with_adapters)), method="hirescam")
    assert_same(found, maps_of(merged, processor, image, inside(merged), method="hirescam"))


def test_disabled_adapters_have_no_part_in_the_maps(with_adapters, make_model, processor, image):
    with with_adapters.disable_adapter():
        found = maps_of(with_adapters, processor, image)
    assert_same(found, maps_of(make_model(), processor, image))


def test_adapters_have_a_part_in_the_answer(with_adapters, make_model, processor, image):
    merged = copy.deepcopy(with_adapters).merge_and_unload()
    before = state(with_adapters)
    answers = [
        read(m, processor, image, PROMPT, max_new_tokens=6).tokens for m in (with_adapters, merged, make_model())
    ]
    assert state(with_adapters) == before
    assert answers[0] == answers[1] != answers[2]


def test_other_kinds_of_adapters_and_saved_modules_are_explained_as_they_run(make_model, processor, image):
    for options in ({"use_dora": True}, {"modules_to_save": ["input_layernorm", "norm", "lm_head"]}):
        wrapped = adapted(make_model(), **options)
        merged = copy.deepcopy(wrapped).merge_and_unload()
        assert_same(maps_of(wrapped, processor, image), maps_of(merged, processor, image))


def test_an_adapter_of_the_prompt_is_refused(make_model, processor, image):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_layers=3, token_dim=32)
    config.num_attention_heads = 4
    wrapped = peft.get_peft_model(make_model(torch.float32), config)
    with pytest.raises(ValueError, match="PROMPT_TUNING acts on the prompt"):
        read(wrapped, processor, image, PROMPT, ANSWER)


def test_the_documented_class_takes_a_wrapped_model(with_adapters, processor, image):
    layers, total = get_model_layers(with_adapters)
    assert total == 3
    merged = copy.deepcopy(with_adapters).merge_and_unload()
    for model, layer in ((with_adapters, layers[1]), (merged, 1)):
        cam = SmoothQwenGradCAM(model, processor, layer, 2, answer=ANSWER)
        assert cam.device.type == "cpu"
        cam.generate_cam(image, PROMPT)
        if model is with_adapters:
            first = cam.result.maps
    assert_same(first, cam.result.maps)


def test_the_image_is_hidden_from_a_wrapped_model_too(with_adapters, processor, image):
    inputs = core.prepare_inputs(unwrapped(with_adapters), processor, [image], PROMPT)
    merged = copy.deepcopy(with_adapters).merge_and_unload()
    with image_hidden(with_adapters, 1), torch.no_grad():
        found = with_adapters.eval()(**inputs).logits
    with image_hidden(merged, 1), torch.no_grad():
        torch.testing.assert_close(found, merged.eval()(**inputs).logits)


# wrappers


def in_place(model):
    model.compile(backend="eager")
    return model


def layer_by_layer(model):
    layers = decoder(model)
    layers[1] = torch.compile(layers[1], backend="eager")
    layers[2].mlp.up_proj = torch.compile(layers[2].mlp.up_proj, backend="eager")
    layers[0].self_attn = torch.compile(layers[0].self_attn, backend="eager")
    layers[0].mlp.forward = torch.compile(layers[0].mlp.forward, backend="eager")
    return model


def parts(model):
    model.model.visual = torch.compile(model.model.visual, backend="eager")
    model.model.language_model.compile(backend="eager")
    return model


WRAPPERS = {
    "data parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in place": in_place,
    "layer by layer": layer_by_layer,
    "parts": parts,
    "compiled, parallel": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_maps_in_a_wrapper_are_those_of_the_bare_model(make_model, processor, image, wrapper, used):
    bare, model = make_model(), make_model()
    wrapped = WRAPPERS[wrapper](model)
    if used:  # what has been compiled before hooks are there does not run them
        with torch.no_grad():
            wrapped(**core.prepare_inputs(bare, processor, [image], PROMPT))
    expected, before = maps_of(bare, processor, image), state(wrapped)
    assert_same(maps_of(wrapped, processor, image), expected)
    with recomputed(wrapped), vision_kept(wrapped):
        assert_same(maps_of(wrapped, processor, image), expected)
    found = maps_of(wrapped, processor, image, inside(unwrapped(wrapped)))
    assert_same(found, maps_of(bare, processor, image, inside(bare)))
    assert state(wrapped) == before


def test_maps_in_distributed_data_parallel_are_those_of_the_bare_model(make_model, processor, image, tmp_path):
    distributed, (bare, model) = torch.distributed, (make_model(), make_model())
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert_same(maps_of(wrapped, processor, image), maps_of(bare, processor, image))
    finally:
        distributed.destroy_process_group()


def test_compiled_models_compile_as_before_once_threads_have_explained(make_model, processor, image):
    models = [WRAPPERS["compiled"](make_model()) for _ in range(2)]
    jobs = [threading.Thread(target=maps_of, args=(model, processor, image)) for model in models]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    compiled = []
    torch.compile(lambda x: x + 1, backend=lambda graph, _: compiled.append(1) or graph.forward)(torch.ones(2))
    assert compiled


# other kernels


@pytest.fixture(params=(*FAMILIES, "qwen2_5_vl"))
def of_family(request, tokenizer):
    return lambda: make_random(request.param, tokenizer), make_processor(request.param, tokenizer)


class FusedMLP(nn.Module):
    """Without act_fn, as kernels have it."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Scale(nn.Module):
    """An RMSNorm that is not called so."""

    def __init__(self, norm, bias=None):
        super().__init__()
        self.weight, self.eps, self.bias = norm.weight, norm.eps, bias

    def forward(self, x):
        return self.weight * (x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt())


def fuse_in_place(layer):
    mlp = layer.mlp
    mlp.forward = lambda x: mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def fuse_class(layer):
    layer.mlp = FusedMLP(layer.mlp)


class Bypassed(nn.Linear):
    """Its weights are used, and it is not called, as where queries, keys and values are one product."""

    __call__ = nn.Linear.forward


def fuse_queries(layer):
    layer.self_attn.q_proj.__class__ = layer.self_attn.k_proj.__class__ = Bypassed


def fuse_experts(layer):
    """They run, and are not called, as where router and experts are one kernel."""
    kind = type(layer.mlp.experts)
    layer.mlp.experts.__class__ = type(kind.__name__, (kind,), {"__call__": kind.forward})


FUSED = {
    "in place": (fuse_in_place, "mlp.act_fn"),
    "class": (fuse_class, "mlp.act_fn"),
    "experts": (fuse_experts, "mlp.experts"),
    "queries": (fuse_queries, "self_attn.q_proj"),
}
KERNELS = [
    (family, how)
    for family in (*FAMILIES, "qwen2_5_vl")
    for how in FUSED
    if how == "queries" or (how == "experts") == family.endswith("moe")
]


@pytest.mark.parametrize(("of_family", "how"), KERNELS, indirect=["of_family"])
def test_a_kernel_that_passes_by_a_rule_is_told(of_family, image, how):
    make, processor = of_family
    model, (fuse, place) = make(), FUSED[how]
    fuse(decoder(model)[3])
    bare = make()
    with pytest.raises(ExplanationError, match=rf"^layers\.3\.{place} has no gradient rule.*rules=\"plain\""):
        maps_of(model, processor, image)
    assert_same(maps_of(model, processor, image, rules="plain"), maps_of(bare, processor, image, rules="plain"))
    assert_same(maps_of(model, processor, image, rules="detached"), maps_of(bare, processor, image, rules="detached"))
    assert not any(module._forward_hooks for module in decoder(model).modules())


@pytest.mark.parametrize("rules", core.RULES)
def test_a_norm_of_another_class_has_its_rule(of_family, image, rules):
    make, processor = of_family
    model, bare = make(), make()
    language = model.model.language_model
    language.norm = Scale(language.norm)
    for layer in decoder(model):
        layer.input_layernorm = Scale(layer.input_layernorm)
        layer.post_attention_layernorm = Scale(layer.post_attention_layernorm)
        if hasattr(layer.self_attn, "q_norm"):
            layer.self_attn.q_norm = Scale(layer.self_attn.q_norm)
            layer.self_attn.k_norm = Scale(layer.self_attn.k_norm)
    assert_same(maps_of(model, processor, image, rules=rules), maps_of(bare, processor, image, rules=rules))


def test_a_norm_with_a_bias_that_is_not_known_is_told(of_family, image):
    make, processor = of_family
    model = make()
    layer = decoder(model)[2]
    layer.input_layernorm = Scale(layer.input_layernorm, nn.Parameter(torch.zeros(32, dtype=torch.float64)))
    with pytest.raises(ExplanationError, match=r"^layers\.2\.input_layernorm has no gradient rule"):
        maps_of(model, processor, image, rules="detached")


@pytest.mark.parametrize("rules", core.RULES)
def test_every_module_of_an_ordinary_model_can_be_tapped(of_family, image, rules):
    make, processor = of_family
    model = make()
    reading = read(model, processor, image, PROMPT, ANSWER)
    for module in model.modules():
        with suppress(ValueError):  # of modules that give no row for each token, or no tensor
            core.explain(reading, [(0, len(reading.answer))], [module], core.Settings(1, 0.0, rules=rules))


# quantised


@pytest.mark.parametrize("rules", core.RULES)
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_linear_layers_without_gradient_are_told(make_model, processor, image, rules):
    model = torch.ao.quantization.quantize_dynamic(make_model(torch.float32), {nn.Linear}, torch.qint8)
    with pytest.raises(ExplanationError, match="^its linear layers pass no gradient"):
        maps_of(model, processor, image, rules=rules)


class NoGradientLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x.detach())


@pytest.mark.parametrize("rules", core.RULES)
def test_one_kind_of_linear_layers_without_gradient_is_told(make_model, processor, image, rules):
    model = make_model()
    decoder(model)[1].mlp.down_proj.__class__ = NoGradientLinear
    with pytest.raises(ExplanationError, match="pass no gradient: <class 'test_wrapped.NoGradientLinear'>"):
        maps_of(model, processor, image, rules=rules)


@pytest.mark.parametrize("rules", core.RULES)
def test_quantised_layers_that_pass_gradients_are_explained_as_they_are(make_model, processor, image, rules):
    quanto = pytest.importorskip("optimum.quanto")
    model = make_model(torch.float32)
    expected = maps_of(model, processor, image, rules=rules)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    for key, cam in maps_of(model, processor, image, rules=rules).items():
        assert np.abs(cam - expected[key]).max() < 0.2 * expected[key].max()


# offloaded

PARTS = {"model.visual": "cpu", "model.language_model.embed_tokens": "cpu", "model.language_model.layers": "disk"}
PARTS |= {"model.language_model.norm": "cpu", "model.language_model.rotary_emb": "cpu", "lm_head": "cpu"}
MAPS = {"layers": PARTS, "decoder": {"model.visual": "cpu", "model.language_model": "disk", "lm_head": "disk"}}


@pytest.mark.parametrize("device_map", MAPS)
def test_maps_of_an_offloaded_model_are_those_of_the_model(model_folder, processor, image, tmp_path, device_map):
    load, offload = AutoModelForImageTextToText.from_pretrained, {"offload_folder": tmp_path}
    expected = maps_of(load(model_folder).eval(), processor, image)
    offloaded = load(model_folder, device_map=MAPS[device_map], **offload).eval()
    assert any(parameter.is_meta for parameter in decoder(offloaded).parameters())
    assert_same(maps_of(offloaded, processor, image), expected)
    assert any(parameter.is_meta for parameter in decoder(offloaded).parameters())
