"""Noisy copies in batches, out of memory, and activations that are recomputed: the maps are those of copies alone."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import smooth_gradcam as core
from smooth_gradcam import Settings, SmoothQwenGradCAM, compute_token_maps, explain, find_target, get_model_layers, read
from studies.flow import maps_and_gradients

PROMPT = "What is it?"
ANSWER = "the red cat 猫"
SIZES = [1, 2, 3, 7, "auto"]
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
    **{method: (spans_of(None), [0, 1, 2], {"method": method}) for method in core.METHODS},
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
    return explain(reading, spans, layers, Settings(copies, 0.15, **options), **how)


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
        assert_same(maps_of(reading, case, batch_size=size, recompute=True), expected)


@pytest.mark.parametrize("how", [{}, {"recompute": True}])
def test_batches_of_one_are_the_passes_of_copies_alone_to_the_last_bit(reading, how):
    """Against a forward and a backward of each copy that know no batch."""
    settings, span = Settings(3, 0.2, rules="plain", method="paper", tap="input"), spans_of("cat")[0]
    (found,) = explain(reading, [span], [1], settings, **how)
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


def test_batches_are_as_large_as_asked_and_even(reading):
    for copies, size, expected in ((10, 7, [5, 5]), (7, 3, [3, 2, 2]), (5, 2, [2, 2, 1]), (4, 7, [4]), (3, 1, [1] * 3)):
        with Forwards(reading.model) as forwards:
            maps_of(reading, "gradcam", copies, batch_size=size)
        assert forwards.sizes == expected


# what the caller sees of it


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", ["parts", "modules", "contrast of modules"])
def test_watch_sees_each_copy_and_part_as_if_alone(reading, case, size):
    """Of a batch part by part, of a part copy by copy; in the shapes of one copy."""

    def seen(size):
        pairs = []
        maps_of(reading, case, 4, watch=pairs.append, batch_size=size)
        return pairs

    parts = len(CASES[case][0])
    alone, found = seen(1), seen(size)
    batches = {1: [[0], [1], [2], [3]], 2: [[0, 1], [2, 3]], 3: [[0, 1], [2, 3]]}.get(size, [[0, 1, 2, 3]])
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
    _, found = maps_and_gradients(reading, span, settings, batch_size=3, recompute=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_progress_counts_copies_that_are_done(reading, size):
    events = []

    def progress(copies):
        for copy in copies:
            yield copy
            events.append(copy)

    maps_of(reading, "parts", 5, progress=progress, batch_size=size, watch=lambda pairs: events.append("pass"))
    assert [event for event in events if event != "pass"] == list(range(5))
    assert events.index(0) >= 3  # not before all parts of the first


def test_documented_entries_take_batches(model, processor, image):
    options = {"answer": ANSWER, "num_samples": 3}
    expected = compute_token_maps(model, processor, image, PROMPT, [1], **options)
    with Forwards(model) as forwards:
        how = {"batch_size": "auto", "recompute": True}
        found = compute_token_maps(model, processor, image, PROMPT, [1], **options, **how)
        cam = SmoothQwenGradCAM(model, processor, 1, 3, 0.1, answer=ANSWER, batch_size=2)
        cam.generate_cam(image, PROMPT)
    assert forwards.sizes == [3, 2, 1]
    assert_same([found, cam.result], [expected] * 2)


@pytest.mark.parametrize("size", [0, -1, 2.5, "all", None, "8", 2**63])
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
@pytest.mark.parametrize("case", ["parts", "modules", "contrast"])
def test_out_of_memory_halves_the_batch_and_loses_no_copy(reading, case, error):
    expected, watched, copies = maps_of(reading, case, 7), [], []

    def progress(numbers):
        for number in numbers:
            yield number
            copies.append(number)

    how = {"batch_size": 7, "watch": watched.append, "progress": progress}
    with Forwards(reading.model, lambda _, copies: error if copies > 2 else None) as forwards:
        found = maps_of(reading, case, 7, **how)
    assert forwards.sizes == [7, 3] + [1] * (14 if case == "contrast" else 7)
    assert len(watched) == 7 * len(CASES[case][0])
    assert copies == list(range(7))
    assert_same(found, expected)


def test_out_of_memory_later_on_keeps_the_copies_that_are_done(reading):
    """Memory that another program takes: the second batch fails, and does not go back to the first."""
    expected = maps_of(reading, "parts", 8)
    with Forwards(reading.model, lambda number, _: OUT if number == 2 else None) as forwards:
        assert_same(maps_of(reading, "parts", 8, batch_size=4), expected)
    assert forwards.sizes == [4, 4, 2, 2]


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_out_of_memory_in_a_backward_repeats_no_part(reading, monkeypatch, fails):
    """Of three parts those whose backward is through are kept: only what is missing is run again, in halves."""
    expected, backward, calls, watched = maps_of(reading, "parts", 4), torch.autograd.grad, [], []

    def grad(outputs, *args, **options):
        calls.append(len(outputs))
        if len(calls) == fails:
            raise OUT
        return backward(outputs, *args, **options)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    with Forwards(reading.model) as forwards:
        found = maps_of(reading, "parts", 4, batch_size=4, watch=watched.append)
    assert forwards.sizes == [4, 2, 2]
    assert calls == [4] * fails + [2] * (2 * (4 - fails))
    assert len(watched) == 12
    assert_same(found, expected)


def test_out_of_memory_with_one_copy_is_explained(reading):
    with Forwards(reading.model, lambda *_: OUT) as forwards:
        with pytest.raises(RuntimeError, match="24 image tokens.*--recompute.*nor does --batch_size") as caught:
            maps_of(reading, "gradcam", 6, batch_size=6)
        assert isinstance(caught.value.__cause__, torch.cuda.OutOfMemoryError)
    assert forwards.sizes == [6, 3, 1]


def test_other_errors_are_not_taken_for_lack_of_memory(reading):
    error = RuntimeError("the tensor has a shape of its own")
    with (
        Forwards(reading.model, lambda *_: error) as forwards,
        pytest.raises(RuntimeError, match="a shape of its own"),
    ):
        maps_of(reading, "gradcam", 6, batch_size=6)
    assert forwards.sizes == [6]


# auto


def test_auto_takes_what_fits_into_half_of_the_free_memory(reading, monkeypatch):
    taps = core.find_taps(reading.model, [0], "input")
    need = core.kept_bytes(reading.model, taps, 40)
    for free, expected in ((0, 1), (need, 1), (2.5 * need, 2), (3.5 * need, 3), (1000 * need, 4)):
        monkeypatch.setattr(core, "free_memory", lambda device, free=free: free)
        assert core.Room(reading.model, "auto", need).size == expected
        assert core.Room(reading.model, 7, need).size == 7
    assert core.kept_bytes(reading.model, core.find_taps(reading.model, [2], "input"), 40) == need / 3
    assert core.kept_bytes(reading.model, core.find_taps(reading.model, modules(reading.model), "input"), 40) > need


def test_free_memory_is_less_than_all_memory():
    free = core.free_memory(torch.device("cpu"))
    assert 0 < free < 2**50
    assert core.free_memory(torch.device("meta")) == free


class Cuda:
    """A device of 1000 bytes, of which 200 are taken and each copy takes 190."""

    def __init__(self, monkeypatch):
        self.copies, self.resets = 0, 0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 1000))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 200 + 190 * self.copies)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def reset(self, device):
        self.resets += 1


def test_auto_on_a_gpu_measures_the_first_copy_alone(reading, monkeypatch):
    """800 bytes are free, a tenth of them to spare: three copies of 190."""
    cuda, expected = Cuda(monkeypatch), maps_of(reading, "parts", 8)
    usual = core.Room.__init__

    def room(self, model, asked, need):
        usual(self, model, asked, need)
        self.size, self.peaks = 1, {torch.device("cuda"): 0}

    monkeypatch.setattr(core.Room, "__init__", room)

    def note(number, copies):
        cuda.copies = copies

    with Forwards(reading.model, note) as forwards:
        found = maps_of(reading, "parts", 8, batch_size="auto")
    assert forwards.sizes == [1, 3, 2, 2]
    assert cuda.resets == 1
    assert_same(found, expected)


# recomputing


def test_recomputing_leaves_the_model_as_it_was(model, reading):
    layers = get_model_layers(model)[0]
    layers[1].forward = layers[1].forward  # as accelerate leaves it
    before = [dict(vars(layer)) for layer in layers]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    for error in (None, KeyError("stumble")):
        with Forwards(model, lambda *_, error=error: error) as forwards:
            if error is None:
                maps_of(reading, "modules", 2, recompute=True)
            else:
                with pytest.raises(KeyError):
                    maps_of(reading, "modules", 2, recompute=True)
        assert forwards.sizes
        assert [dict(vars(layer)) for layer in layers] == before
        assert hooks == [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    del layers[1].forward


def test_recomputing_runs_each_layer_from_the_first_tap_on_once_more(reading):
    inside, runs = [layer.self_attn for layer in get_model_layers(reading.model)[0]], []
    handles = [module.register_forward_hook(lambda *_, i=i: runs.append(i)) for i, module in enumerate(inside)]
    try:
        explain(reading, spans_of("cat"), [1], Settings(use_smooth=False), recompute=True)
    finally:
        for handle in handles:
            handle.remove()
    assert runs == [0, 1, 2, 2, 1]


def kept_by(reading, recompute):
    """Bytes that the graph of one copy keeps."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in reading.model.parameters()}
    taps = core.find_taps(reading.model, [0], "input")
    forced, targets = core.score_parts(reading.inputs, reading.tokens, [[0]])
    with core.borrowed(reading.model), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        list(core.features_and_gradients(reading.model, forced, taps, targets, Settings(), recompute))
    return sum(size for place, size in kept.items() if place not in weights)


def test_recomputing_keeps_a_fraction_of_the_activations(make_model, processor, image):
    reading = read(make_model(torch.float32, layers=8), processor, image, PROMPT, ANSWER)
    assert 0 < kept_by(reading, True) < kept_by(reading, False) / 4


def test_recomputing_works_where_accelerate_brings_the_weights(make_model, processor, image):
    accelerate = pytest.importorskip("accelerate")
    options = {"answer": ANSWER, "num_samples": 3, "batch_size": 2}
    expected = compute_token_maps(make_model(), processor, image, PROMPT, [0, 2], **options)
    away = accelerate.cpu_offload(make_model(), execution_device=torch.device("cpu"))
    found = compute_token_maps(away, processor, image, PROMPT, [0, 2], **options, recompute=True)
    assert_same([found], [expected])
    assert all(parameter.is_meta for parameter in get_model_layers(away)[0].parameters())
