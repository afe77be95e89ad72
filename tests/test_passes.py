"""Other ways to pass the model: in batches, contrasted, watched, recomputed; the maps are those of copies alone."""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import smooth_gradcam as core
from common.passes import passes_of, recomputed, watched_passes
from smooth_gradcam import Settings, SmoothQwenGradCAM, compute_token_maps, explain, find_target, get_model_layers, read
from studies.flow import maps_and_gradients

PROMPT = "What is it?"
ANSWER = "the red cat 猫"
SIZES = [1, 2, 3, 7]
OUT = torch.cuda.OutOfMemoryError("CUDA out of memory")
CPU_OUT = RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.fixture(scope="module")
def reading(model, processor, image):
    return read(model, processor, image, PROMPT, ANSWER)


def modules(model):
    """Of the vision tower two (four patches a token; out of window order), of the decoder one inside a layer."""
    visual, layers = model.model.visual, get_model_layers(model)[0]
    return [visual.blocks[0], visual.merger, layers[1].self_attn.v_proj, layers[1].post_attention_layernorm]


def spans_of(*words):
    return [find_target(ANSWER, word) for word in words]


CASES = {
    "parts": (spans_of("red", "cat", None), [0, 2], {}),
    **{method: (spans_of(None), [0, 1, 2], {"method": method}) for method in core.METHODS if method != "auto"},
    "logprob": (spans_of("cat", "red"), [1], {"score": "logprob"}),
    "plain": (spans_of("cat"), [0, 2], {"rules": "plain"}),
    "output": (spans_of("cat"), [0, 2], {"tap": "output"}),  # the last has no gradient
    "contrast": (spans_of("cat"), [0, 2], {"contrast": "dog and bird"}),
    "modules": (spans_of("cat", "red"), modules, {}),
    "contrast of modules": (spans_of("cat"), modules, {"contrast": "dog and bird"}),
}


def maps_of(reading, case, copies=5, **how):
    spans, layers, options = CASES[case]
    layers = layers(reading.model) if callable(layers) else layers
    passes = passes_of(options.get("contrast"))
    return explain(reading, spans, layers, Settings(copies, 0.15, **options), passes=passes, **how)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.no_gradient == other.no_gradient
        assert list(one.maps) == list(other.maps)
        for key, cam in one.maps.items():
            np.testing.assert_allclose(cam, other.maps[key], rtol=1e-6, atol=1e-7 * cam.max())


class Forwards:
    """Notes how many copies each forward has; fails where `fails(number of the forward, copies)` says so."""

    def __init__(self, model, fails=lambda number, copies: None):
        self.sizes, self.pixels, self.fails = [], [], fails
        self.handle = model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        copies = len(kwargs["input_ids"])
        self.sizes.append(copies)
        self.pixels.append(kwargs["pixel_values"])
        if error := self.fails(len(self.sizes), copies):
            raise error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


# equality


@pytest.mark.parametrize("case", CASES)
def test_maps_do_not_depend_on_the_batch_size_nor_on_recomputing(reading, case):
    expected = maps_of(reading, case)
    assert any(cam.any() for one in expected for cam in one.maps.values())
    for size in SIZES[1:]:
        assert_same(maps_of(reading, case, batch_size=size), expected)
    for size in (1, 3):
        with recomputed(reading.model):
            assert_same(maps_of(reading, case, batch_size=size), expected)


@pytest.mark.parametrize("way", [nullcontext, recomputed])
def test_batches_of_one_are_the_passes_of_copies_alone_to_the_last_bit(reading, way):
    """Against a forward and a backward of each copy that know no batch."""
    settings, span = Settings(3, 0.2, rules="plain", method="paper", tap="input"), spans_of("cat")[0]
    with way(reading.model):
        (found,) = explain(reading, [span], [1], settings)
    forced, (scored,) = core.score_parts(reading.inputs, reading.tokens, [reading.tokens_of(span)])
    generator, cams = torch.Generator().manual_seed(0), np.zeros(reading.grid, np.float32)
    for _ in range(3):
        noisy = core.add_noise(reading.inputs["pixel_values"], 0.2, reading.processor.image_processor, generator)
        with core.borrowed(reading.model), core.captured(core.find_taps(reading.model, [1], "input")) as features:
            logits = reading.model(**forced | {"pixel_values": noisy}, use_cache=False).logits[0]
            value = logits[scored.predicting, scored.expected].sum()
        (gradient,) = torch.autograd.grad(value, features[1])
        cams += core.token_map(1, features[1].detach(), gradient, reading, "paper").reshape(reading.grid) / 3
    np.testing.assert_array_equal(found.maps[1], cams)


def test_each_copy_has_the_noise_that_it_has_alone(reading):
    seen = {}
    for size in SIZES:
        with Forwards(reading.model) as forwards:
            maps_of(reading, "gradcam", 7, batch_size=size)
        seen[size] = torch.cat(forwards.pixels)
    assert len(seen[1]) == 7 * len(reading.inputs["pixel_values"])
    for size in SIZES:
        assert torch.equal(seen[size], seen[1])


def test_batches_are_as_large_as_asked_but_for_the_last(reading):
    for copies, size, expected in ((10, 7, [7, 3]), (7, 3, [3, 3, 1]), (4, 7, [4]), (3, 1, [1] * 3)):
        with Forwards(reading.model) as forwards:
            maps_of(reading, "gradcam", copies, batch_size=size)
        assert forwards.sizes == expected


# what the caller sees of it


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", ["parts", "modules", "contrast of modules"])
def test_watch_sees_each_copy_and_part_as_if_alone(reading, case, size):
    """Of a batch part by part, of a part copy by copy; in the shapes of one copy."""

    def seen(size):
        pairs, (spans, layers, options) = [], CASES[case]
        layers, passes = layers(reading.model) if callable(layers) else layers, passes_of(options.get("contrast"))
        watched = watched_passes(passes, pairs.append)
        explain(reading, spans, layers, Settings(4, 0.15, **options), passes=watched, batch_size=size)
        return pairs

    parts = len(CASES[case][0])
    alone, found = seen(1), seen(size)
    batches = {1: [[0], [1], [2], [3]], 2: [[0, 1], [2, 3]], 3: [[0, 1, 2], [3]]}.get(size, [[0, 1, 2, 3]])
    order = [copy * parts + part for batch in batches for part in range(parts) for copy in batch]
    assert len(found) == len(alone) == 4 * parts
    for pairs, expected in zip(found, [alone[i] for i in order], strict=True):
        assert list(pairs) == list(expected)
        for key, pair in pairs.items():
            for tensor, other in zip(pair, expected[key], strict=True):
                torch.testing.assert_close(tensor, other, rtol=1e-9, atol=1e-12)


def test_flow_is_the_same_in_batches(reading):
    span, settings = spans_of("cat")[0], Settings(5, 0.15)
    _, expected = maps_and_gradients(reading, span, settings)
    with recomputed(reading.model):
        _, found = maps_and_gradients(reading, span, settings, batch_size=3)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_progress_counts_each_copy_once(reading, size):
    copies = []
    maps_of(reading, "parts", 5, progress=lambda numbers: map(copies.append, numbers), batch_size=size)
    assert copies == list(range(5))


@pytest.mark.parametrize("progress", [lambda copies: [], lambda copies: list(copies)[1:], lambda copies: [*copies, 9]])
def test_progress_that_loses_or_adds_copies_is_an_error(reading, progress):
    with pytest.raises(ValueError, match="^progress=.* yields [024] copies in place of 3: it must yield each"):
        maps_of(reading, "gradcam", 3, progress=progress)


def test_documented_entries_take_batches(model, processor, image):
    options = {"answer": ANSWER, "num_samples": 3}
    expected = compute_token_maps(model, processor, image, PROMPT, [1], **options)
    with Forwards(model) as forwards:
        found = compute_token_maps(model, processor, image, PROMPT, [1], **options, batch_size=4)
        cam = SmoothQwenGradCAM(model, processor, 1, 3, 0.1, answer=ANSWER, batch_size=2)
        cam.generate_cam(image, PROMPT)
    assert forwards.sizes == [3, 2, 1]
    assert_same([found, cam.result], [expected] * 2)


@pytest.mark.parametrize("size", [0, -1, 2.5, "auto", None, "8", 2**63])
def test_bad_batch_size_is_named_before_anything_runs(model, processor, image, reading, size):
    with Forwards(model) as forwards:
        for function in (
            lambda: explain(reading, spans_of("cat"), [0], batch_size=size),
            lambda: compute_token_maps(model, processor, image, PROMPT, [0], batch_size=size),
            lambda: SmoothQwenGradCAM(model, processor, 0, batch_size=size),
        ):
            with pytest.raises(ValueError, match=f"^batch_size={re.escape(repr(size))} must be"):
                function()
    assert not forwards.sizes


def test_layer_that_has_no_rows_for_each_copy_is_named(reading):
    taps = [SimpleNamespace(key="odd")]
    pairs = {tap.key: (torch.zeros(5, 4), None) for tap in taps}
    with pytest.raises(ValueError, match=r"^layer odd gives the shape \(5, 4\)"):
        list(core.copy_by_copy(pairs, 2))


# out of memory


@pytest.mark.parametrize("error", [OUT, CPU_OUT], ids=["cuda", "cpu"])
def test_out_of_memory_says_what_to_do(reading, error):
    with (
        Forwards(reading.model, lambda *_: error) as forwards,
        pytest.raises(RuntimeError, match="^out of memory with 24 image tokens: lower batch_size") as caught,
    ):
        maps_of(reading, "gradcam", 6, batch_size=6)
    assert caught.value.__cause__ is error
    assert forwards.sizes == [6]


def test_other_errors_are_not_taken_for_lack_of_memory(reading):
    error = RuntimeError("the tensor has a shape of its own")
    with (
        Forwards(reading.model, lambda *_: error) as forwards,
        pytest.raises(RuntimeError, match="a shape of its own"),
    ):
        maps_of(reading, "gradcam", 6, batch_size=6)
    assert forwards.sizes == [6]


# recomputing


def test_recomputing_leaves_the_model_as_it_was(model, reading):
    layers = get_model_layers(model)[0]
    layers[1].forward = layers[1].forward  # as accelerate leaves it
    before = [dict(vars(layer)) for layer in layers]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    for error in (None, KeyError("stumble")):
        with Forwards(model, lambda *_, error=error: error) as forwards:
            if error is None:
                with recomputed(model):
                    maps_of(reading, "modules", 2)
            else:
                with pytest.raises(KeyError), recomputed(model):
                    maps_of(reading, "modules", 2)
        assert forwards.sizes
        assert [dict(vars(layer)) for layer in layers] == before
        assert hooks == [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    del layers[1].forward


def test_recomputing_runs_each_layer_from_the_first_tap_on_once_more(reading):
    inside, runs = [layer.self_attn for layer in get_model_layers(reading.model)[0]], []
    handles = [module.register_forward_hook(lambda *_, i=i: runs.append(i)) for i, module in enumerate(inside)]
    try:
        with recomputed(reading.model):
            explain(reading, spans_of("cat"), [1], Settings(use_smooth=False))
    finally:
        for handle in handles:
            handle.remove()
    assert runs == [0, 1, 2, 2, 1]


def kept_by(reading, way):
    """Bytes that the graph of one copy keeps."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in reading.model.parameters()}
    taps = core.find_taps(reading.model, [0], "input")
    forced, targets = core.score_parts(reading.inputs, reading.tokens, [[0]])
    settings, unpacked = Settings().settled(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with core.borrowed(reading.model), way(reading.model), unpacked:
        list(core.features_and_gradients(reading.model, forced, taps, targets, settings))
    return sum(size for place, size in kept.items() if place not in weights)


def test_recomputing_keeps_a_fraction_of_the_activations(make_model, processor, image):
    reading = read(make_model(torch.float32, layers=8), processor, image, PROMPT, ANSWER)
    assert 0 < kept_by(reading, recomputed) < kept_by(reading, nullcontext) / 4


def test_recomputing_works_where_accelerate_brings_the_weights(make_model, processor, image):
    accelerate = pytest.importorskip("accelerate")
    options = {"answer": ANSWER, "num_samples": 3, "batch_size": 2}
    expected = compute_token_maps(make_model(), processor, image, PROMPT, [0, 2], **options)
    away = accelerate.cpu_offload(make_model(), execution_device=torch.device("cpu"))
    with recomputed(away):
        found = compute_token_maps(away, processor, image, PROMPT, [0, 2], **options)
    assert_same([found], [expected])
    assert all(parameter.is_meta for parameter in get_model_layers(away)[0].parameters())
