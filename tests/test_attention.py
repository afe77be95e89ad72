"""Attention over the photo as a method: against transformers' own weights, in every mode, and what it refuses."""

import contextlib
import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import check_layout, make_image
from drawn_maps import laid_out, layered, measured, texts_of
from family_models import ANSWER, OF_FAMILY, PROMPT, make_processor, make_random
from PIL import Image

import smooth_gradcam as core
from common import attention
from common.evidence import explain_by_methods, explain_with_evidence
from common.page import DPI, Paper
from common.parent import parent
from common.passes import watched_passes
from smooth_gradcam import Settings, SmoothQwenGradCAM, compute_token_maps, explain, find_target, read
from studies.faithfulness import comparison_rows, side_by_side
from studies.faithfulness_figures import STYLES, draw_comparison
from studies.heads import head_attention, head_findings, head_rows
from studies.heads_figures import draw_heads

CLEAN = Settings(use_smooth=False, method="attention")
HEADS = 4  # of the tiny models


@contextlib.contextmanager
def eager(model):
    config = model.model.language_model.config
    before, config._attn_implementation = config._attn_implementation, "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def eager_attention(reading):
    """(layers, heads, L, L) of prompt and answer, as the model gives them."""
    inputs = dict(reading.inputs)
    tokens = torch.tensor([reading.tokens])
    fills = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "mm_token_type_ids": 0 * tokens}
    for name, fill in fills.items():
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], fill], 1)
    with eager(reading.model), torch.no_grad():
        return torch.cat(reading.model(**inputs, use_cache=False, output_attentions=True).attentions).numpy()


def map_of(weights, reading, tokens, head=slice(None)):
    """(layers, H, W) by definition: the mean over these tokens' predicting positions, and over heads."""
    rows = [reading.inputs["input_ids"].shape[1] - 1 + i for i in tokens]
    over_rows = weights[:, head][..., rows, :].mean(-2)
    mean = over_rows.mean(1) if head == slice(None) else over_rows
    return mean[:, reading.positions.numpy()].reshape(-1, *reading.grid)


@pytest.fixture(scope="module")
def windowed(tokenizer):
    """A tiny Qwen2.5-VL whose last layers see 9 positions back, and whose queries share keys."""
    text = OF_FAMILY["qwen2_5_vl"][0]
    before = dict(text)
    text |= {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}
    try:
        return make_random("qwen2_5_vl", tokenizer), make_processor("qwen2_5_vl", tokenizer)
    finally:
        text.clear()
        text |= before


@pytest.fixture(scope="module")
def mask_path(tmp_path_factory, image):
    """The right half is the object."""
    mask = Image.new("1", image.size)
    mask.paste(1, (image.width // 2, 0, *image.size))
    mask.save(path := tmp_path_factory.mktemp("mask") / "mask.png")
    return path


def reading_of(model, processor, answer=ANSWER):
    return read(model, processor, make_image(168, 112), PROMPT, answer)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "windowed"])
def test_maps_are_the_model_s_own_attention(family, tokenizer, windowed, monkeypatch):
    monkeypatch.setattr(attention, "ROWS", 2)  # several chunks
    given = windowed if family == "windowed" else (make_random(family, tokenizer), make_processor(family, tokenizer))
    reading = reading_of(*given)
    spans = [find_target(reading, word) for word in ("red", "the red cat 猫", "cat")]
    weights = eager_attention(reading)
    assert (weights[-1, 0, -1, :-9] == 0).all() == (family == "windowed")
    for head in (None, 0, HEADS - 1):
        settings = Settings(use_smooth=False, method="attention", head=head)
        for span, found in zip(spans, explain(reading, spans, range(5), settings), strict=True):
            expected = map_of(weights, reading, reading.tokens_of(span), slice(None) if head is None else head)
            np.testing.assert_allclose(np.stack(list(found.maps.values())), expected, rtol=1e-5, atol=1e-9)


def test_maps_of_the_demo_model_are_its_own_attention(demo):
    words = ("dog", "house", "plane")
    spans = [find_target(demo, word) for word in words]
    weights = eager_attention(demo)
    for span, found in zip(spans, explain(demo, spans, range(28), CLEAN), strict=True):
        expected = map_of(weights, demo, demo.tokens_of(span))
        np.testing.assert_allclose(np.stack(list(found.maps.values())), expected, rtol=1e-3, atol=1e-6)


def test_a_window_that_ends_behind_the_photo_leaves_zeros_and_no_missing_gradient(windowed):
    reading = reading_of(*windowed)
    (found,) = explain(reading, [find_target(reading, "cat")], range(5), CLEAN)
    assert found.blank == dict.fromkeys((2, 3, 4), "zero everywhere")


def test_no_gradient_is_taken_and_no_square_of_positions_is_held(model, processor, image, monkeypatch):
    reading = read(model, processor, image, PROMPT, ANSWER * 30)
    monkeypatch.setattr(torch.autograd, "grad", None)
    monkeypatch.setattr(core, "compute_logits", None)
    shapes, real = [], attention.attention_rows

    def watch(*given):
        weights = real(*given)
        shapes.append(weights.shape)
        assert not weights.requires_grad
        return weights

    monkeypatch.setattr(attention, "attention_rows", watch)
    explain(reading, [(0, len(reading.answer))], [0, 1, 2], CLEAN)
    length = reading.inputs["input_ids"].shape[1] + len(reading.tokens) - 1
    assert length > 4 * attention.ROWS
    assert {(shape[2] <= attention.ROWS, shape[3]) for shape in shapes} == {(True, length)}


def test_copies_are_averaged_as_those_of_any_method(model, processor, image):
    reading = read(model, processor, image, PROMPT, ANSWER)
    settings, span = Settings(3, 0.3, method="attention"), find_target(reading, "cat")
    (found,), (at_once,) = (explain(reading, [span], [1], settings, batch_size=size) for size in (1, 3))
    generator, expected = torch.Generator().manual_seed(0), 0
    for _ in range(3):
        noisy = core.add_noise(reading.inputs["pixel_values"], 0.3, processor.image_processor, generator)
        copy = core.replace(reading, inputs=reading.inputs | {"pixel_values": noisy})
        expected = expected + explain(copy, [span], [1], CLEAN)[0].maps[1] / 3
    np.testing.assert_allclose(found.maps[1], expected, rtol=1e-5)
    np.testing.assert_allclose(at_once.maps[1], expected, rtol=1e-5)


def test_several_photos_share_the_attention(model, processor, image):
    reading = read(model, processor, [image, make_image(112, 112)], PROMPT, ANSWER)
    maps = explain(reading, [find_target(reading, "cat")], [0], CLEAN)
    weights = eager_attention(reading)
    row = reading.inputs["input_ids"].shape[1] - 1 + reading.tokens_of(find_target(reading, "cat"))[0]
    expected = weights[0][:, row].mean(0)[reading.positions.numpy()]
    assert [m.image for m in maps] == [0, 1]
    np.testing.assert_allclose(np.concatenate([m.maps[0].ravel() for m in maps]), expected, rtol=1e-5)


def test_the_model_is_left_as_it_was(model, processor, image):
    reading, config = read(model, processor, image, PROMPT, ANSWER), model.model.language_model.config
    before = config._attn_implementation
    explain(reading, [(0, 3)], [0], CLEAN)
    with pytest.raises(ValueError, match="head=9"):
        explain(reading, [(0, 3)], [0], Settings(use_smooth=False, method="attention", head=9))
    assert (config._attn_implementation, len(attention._WATCHERS)) == (before, 0)


def test_attention_that_cannot_be_seen_is_an_error_and_no_empty_map(model, processor, image, monkeypatch):
    reading = read(model, processor, image, PROMPT, ANSWER)
    monkeypatch.setattr(attention, "WATCHED", "sdpa")  # the model computes it as usual
    monkeypatch.setattr(attention.AttentionInterface, "register", lambda *given: None)
    for method in ("attention", "rollout", "chefer"):
        with pytest.raises(core.ExplanationError, match="layer [01] gives no attention"):
            explain(reading, [(0, 3)], [1], Settings(use_smooth=False, method=method))


def test_it_is_a_method_in_python(model, processor, image):
    options = {"answer": ANSWER, "target": "cat", "method": "attention", "head": 2}
    cam = SmoothQwenGradCAM(model, processor, 1, 2, 0.1, **options)
    cam.generate_cam(image, PROMPT)
    alone = compute_token_maps(model, processor, image, PROMPT, [1], num_samples=2, **options)
    np.testing.assert_array_equal(cam.result.maps[1], alone.maps[1])
    reading = read(model, processor, image, PROMPT, ANSWER)
    settings = {name: Settings(use_smooth=False, method=name) for name in ("gradcam", "attention")}
    together = explain_by_methods(reading, [(0, 3)], [1], settings)["attention"]
    (found,) = explain_with_evidence(reading, [(0, 3)], [1], CLEAN)
    assert found.evidence.p > 0
    np.testing.assert_array_equal(together[0].maps[1], found.maps[1])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            {"score": "logprob"},
            "score='logprob' cannot be combined with method='attention': attention takes no gradient",
        ),
        (
            {"rules": "attnlrp"},
            "rules='attnlrp' cannot be combined with method='attention': attention takes no gradient",
        ),
        ({"tap": "output"}, "tap='output' cannot be combined with method='attention': attention takes no gradient"),
        (
            {"contrast": "dog"},
            "contrast='dog' cannot be combined with method='attention': attention is the same whichever",
        ),
        ({"method": "gradcam", "head": 1}, "head=1 cannot be combined with method='gradcam'"),
    ],
)
def test_settings_that_cannot_act_are_refused(options, why):
    with pytest.raises(ValueError, match=why):
        Settings(**{"method": "attention"} | options)


@pytest.mark.parametrize("head", [-1, HEADS, 1.5, "1"])
def test_a_head_that_does_not_exist_is_refused_with_those_that_do(model, processor, image, head):
    reading = read(model, processor, image, PROMPT, ANSWER)
    with pytest.raises(
        ValueError, match=rf"head={head!r} does not exist: each layer of the model has 0 to {HEADS - 1}"
    ):
        explain(reading, [(0, 3)], [0], Settings(method="attention", head=head))


def test_a_module_has_no_attention_of_the_answer(model, processor, image):
    reading = read(model, processor, image, PROMPT, ANSWER)
    with pytest.raises(ValueError, match="layer model.visual.merger has no attention of the answer"):
        explain(reading, [(0, 3)], [model.model.visual.merger], CLEAN)


def test_the_attention_does_not_depend_on_the_word_that_follows(model, processor, image):
    """Why a contrast is refused."""
    maps = []
    for answer, target, which in (("the red cat", "cat", 1), ("the red the", "the", 2)):
        given = {"answer": answer, "target": target, "target_occurrence": which, "method": "attention"}
        maps.append(compute_token_maps(model, processor, image, PROMPT, [1], **given))
    np.testing.assert_array_equal(maps[0].maps[1], maps[1].maps[1])


# the command line


def test_every_mode_maps_by_attention(drive, tmp_path):
    base = ("--method", "attention", "--noise_std", 0, "--answer", ANSWER)
    maps = {}
    for mode, folder in (("single", "single"), ("grid", "grid"), ("multi", "multilayer")):
        code, _, err = drive(
            "--mode", mode, *base, "--target", "cat", "--save_raw", *(["--layer", 1] * (mode == "single"))
        )
        assert (code, err) == (0, "")
        raw = np.load(tmp_path / "out" / folder / "maps.npz")
        assert json.loads(str(raw["settings"]))["method"] == "attention"
        maps[mode] = raw["maps"][raw["layers"].tolist().index(1)]
    code, _, err = drive("--mode", "words", *base, "--words", "cat", "--layers", "1")
    assert (code, err) == (0, "")
    for mode in ("comparative", "evaluate", "flow"):
        extra = ("--steps", 4, "--randomize") if mode == "evaluate" else ()
        assert drive("--mode", mode, *base, "--target", "cat", *extra)[0] == 0
    maps["flow"] = np.load(tmp_path / "out/flow/information_flow.npz")["maps_0"][1]
    maps["words"] = np.load(tmp_path / "out/words/maps.npz")["maps"][0, 0]
    for mode, cam in maps.items():
        np.testing.assert_allclose(cam, maps["single"], rtol=1e-5, err_msg=mode)


def test_flow_has_gradients_beside_attention_maps(drive, tmp_path):
    found = {}
    for method in ("attention", "gradcam"):
        drive("--mode", "flow", "--method", method, "--answer", ANSWER, "--noise_std", 0)
        found[method] = dict(np.load(tmp_path / "out/flow/information_flow.npz"))
    np.testing.assert_array_equal(found["attention"]["gradient_0"], found["gradcam"]["gradient_0"])
    assert found["gradcam"]["gradient_0"].any()
    assert not np.allclose(found["attention"]["maps_0"], found["gradcam"]["maps_0"])


def test_compare_measures_it_with_the_others(drive, tmp_path):
    flags = ("--mode", "evaluate", "--compare", "--answer", ANSWER, "--layers", "1", "--noise_std", 0, "--steps", 4)
    assert drive(*flags, "--score", "logprob")[0] == 0
    with (tmp_path / "out/evaluate/comparison.csv").open() as file:
        assert "attention" in {row["method"] for row in csv.DictReader(file)}
    assert drive(*flags, "--target", "cat", "--contrast", "dog")[0] == 0
    with (tmp_path / "out/evaluate/comparison.csv").open() as file:
        assert {"gradcam", "attention"} & {row["method"] for row in csv.DictReader(file)} == {"gradcam"}


@pytest.mark.parametrize("width", ["page", "column"])
def test_the_comparison_of_all_methods_has_room_for_their_names(width):
    """Each method has a plot of its own under its name, and no title runs into another or off the page."""
    assert set(STYLES) == set(core.METHODS) - {"auto"}
    every = {method: layered((12, 16), [0, 5, 27], seed=i) for i, method in enumerate(STYLES)}
    together = side_by_side(every)
    measures = measured(together, 5)
    rows = comparison_rows(every, together, measures, None)
    files = draw_comparison(make_image(448, 336), together, measures, rows, paper=Paper(width))
    names = [text for draw in files.values() for text in texts_of(laid_out(draw(), width)) if text in STYLES]
    assert names == list(STYLES)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--tap", "output"), "--tap cannot be combined with --method attention: attention takes no gradient"),
        (("--rules", "plain"), "--rules cannot be combined with --method attention"),
        (("--score", "logprob"), "--score cannot be combined with --method attention"),
        (("--recompute",), "--recompute cannot be combined with --method attention"),
        (("--target", "cat", "--contrast", "dog"), "--contrast cannot be combined with --method attention"),
        (("--mode", "words", "--prompt_words"), "--prompt_words cannot be combined with --method attention"),
        (("--mode", "flow", "--taps"), "--taps cannot be combined with --method attention"),
        (("--head", 4), "--head 4 does not exist: each layer of the model has 0 to 3"),
        (("--head", -1), "--head -1 does not exist: each layer of the model has 0 to 3"),
        (("--method", "gradcam", "--head", 1), "--head needs --method attention"),
    ],
)
def test_flags_that_cannot_act_are_refused(drive, flags, why):
    code, _, err = drive("--method", "attention", "--answer", ANSWER, *flags)
    assert code == 2
    assert why in err


def test_head_acts(drive, tmp_path):
    maps = []
    for head in (0, 3):
        assert (
            drive("--method", "attention", "--answer", ANSWER, "--head", head, "--save_raw", "--noise_std", 0)[0] == 0
        )
        maps.append(np.load(tmp_path / "out/single/maps.npz")["maps"])
    assert not np.allclose(*maps)


# every head


def test_heads_are_the_model_s_own(windowed):
    reading = reading_of(*windowed)
    span = find_target(reading, "red cat")
    found = head_attention(reading, span)
    rows = [reading.inputs["input_ids"].shape[1] - 1 + i for i in reading.tokens_of(span)]
    expected = eager_attention(reading)[:, :, rows].mean(2)[..., reading.positions.numpy()]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
    (maps,) = explain(reading, [span], range(5), CLEAN)
    mean = found.mean(1).reshape(5, *reading.grid)
    np.testing.assert_allclose(np.stack(list(maps.maps.values())), mean, rtol=1e-5, atol=1e-9)


def test_rows_of_heads_know_their_share_and_where_they_point():
    grid = (3, 4)
    attention, mask = np.zeros((2, 2, 12), np.float32), np.zeros((30, 40), bool)
    mask[:10, :10] = True  # the first image token
    attention[0, 0, 0], attention[0, 1, 11], attention[1, 1, 0] = 0.5, 0.25, 0.125
    rows = head_rows(attention, SimpleNamespace(grid=grid), mask)
    known = {(row["layer"], row["head"]): (row["image"], row["pointing"], row["energy"] > 0.5) for row in rows}
    assert known == {(0, 0): (0.5, 1, True), (0, 1): (0.25, 0, False), (1, 0): (0, 0, False), (1, 1): (0.125, 1, True)}
    assert "energy" not in head_rows(attention, SimpleNamespace(grid=grid), None)[0]
    said = head_findings(rows)
    assert "0.00 (layer 1, head 0) to 0.50 (layer 0, head 0)" in said[0]
    assert "2 of 4 have their maximum on the object" in said[1]
    assert "(layer 0, head 0, with" in said[1]


@pytest.mark.parametrize(("width", "layers", "heads"), [("column", 28, 28), ("column", 36, 16), ("page", 28, 6)])
@pytest.mark.parametrize("grid", [(12, 16), (16, 9), (4, 30)])
def test_figures_of_heads_are_at_most_nine_inches_high_and_have_every_head_once(pages, width, layers, heads, grid):
    attention = np.random.default_rng(0).random((layers, heads, grid[0] * grid[1]), np.float32)
    photo = Image.new("RGB", (28 * grid[1], 28 * grid[0]))
    maps = core.TokenMaps({0: attention[0, 0].reshape(grid)}, grid, "What is it?", "a cat", [1, 2], "cat", (2, 5), [1],
                          frozenset(), Settings(method="attention"))  # fmt: skip
    reading = SimpleNamespace(photo=photo, grid=grid)
    drawn = draw_heads(reading, maps, attention, head_rows(attention, reading, None), paper=Paper(width))
    named = 0
    for draw in drawn.values():
        page = np.asarray(draw())
        assert page.shape[0] <= 9 * DPI
        check_layout(pages[-1])
        words = [text.get_text() for text in pages[-1].texts]
        named += sum(word.startswith("layer ") for word in words) * sum(word.isdigit() for word in words)
    blocks = sum("head" in [t.get_text()] for t in pages[0].texts)
    assert named == layers * heads * blocks


def test_flow_draws_every_head_and_writes_a_table(drive, tmp_path, mask_path):
    flags = ("--mode", "flow", "--heads", "--answer", ANSWER, "--target", "cat", "--noise_std", 0)
    code, out, err = drive(*flags)
    assert (code, err) == (0, "")
    assert (tmp_path / "out/flow/heads.png").is_file()
    with (tmp_path / "out/flow/heads.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["layer"], row["head"]) for row in rows] == [(str(k), str(h)) for k in range(4) for h in range(4)]
    assert "energy" not in rows[0]
    code, out, err = drive(*flags, "--mask", mask_path)
    assert (code, err) == (0, "")
    assert "have their maximum on the object" in out
    with (tmp_path / "out/flow/heads.csv").open() as file:
        masked = list(csv.DictReader(file))
    assert [row["image"] for row in masked] == [row["image"] for row in rows]
    assert {row["pointing"] for row in masked} <= {"0", "1"}


def test_mask_in_flow_mode_needs_heads(drive, mask_path):
    code, _, err = drive("--mode", "flow", "--mask", mask_path)
    assert (code, "--mask needs --heads in flow mode" in err) == (2, True)


# the parent's pictures


def test_the_parent_s_map_is_that_of_its_code(model, processor, image):
    """Written from its steps: gradients cut at zero, mean over places, weighted mean, ReLU, / maximum, threshold."""
    reading, pairs = read(model, processor, image, PROMPT, ANSWER), []
    span, settings = (0, len(ANSWER)), Settings(3, 0.2, method="parent")
    watched = watched_passes(core.noisy_passes, lambda own: pairs.append(own[1]))
    (found,) = explain(reading, [span], [1], settings, passes=watched)
    (paper,) = explain(reading, [span], [1], core.replace(settings, method="paper"))
    expected, partly = 0, 0
    for features, gradient in pairs:
        features, gradient = (tensor[0, reading.positions].numpy() for tensor in (features, gradient))
        weights = np.maximum(gradient, 0).mean(axis=0)
        heat = np.maximum((features * weights).mean(axis=1), 0)
        heat /= heat.max()
        partly += ((heat > 0) & (heat < 0.5)).sum()
        heat[heat < 0.5] = 0
        expected = expected + heat / 3
    assert partly > 3
    assert found.settings.settled().tap == paper.settings.settled().tap == "post_attention_layernorm"
    np.testing.assert_allclose(found.maps[1].ravel(), expected, rtol=1e-5)
    assert not np.allclose(found.maps[1] / found.maps[1].max(), paper.maps[1] / paper.maps[1].max(), atol=0.1)


def test_the_parent_scores_the_end_of_turn_of_a_whole_answer(model, processor, image):
    reading, scored = read(model, processor, image, PROMPT, ANSWER), []
    real = core.features_and_gradients

    def watch(model, forced, taps, targets, settings):
        scored.append([target.expected for target in targets])
        return real(model, forced, taps, targets, settings)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(core, "features_and_gradients", watch)
        for span in ((0, len(ANSWER)), (0, 3)):
            explain(reading, [span], [1], Settings(use_smooth=False, method="parent"))
    end = processor.tokenizer.eos_token_id
    assert [tokens[0][-1] == end for tokens in scored] == [True, False]


def test_a_copy_with_a_stronger_map_counts_no_more(model, processor, image):
    """Each copy is divided by its own maximum: the map does not know how strong the gradient is."""
    features, gradients = torch.rand(2, 9, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(parent(features, gradients), parent(features, 7 * gradients))
    assert parent(features, gradients).max() == 1
    assert parent(features, -gradients).tolist() == [0] * 9


@pytest.mark.parametrize("mode", ["grid", "words"])
def test_the_parent_s_method_acts_in_modes(drive, mode):
    assert drive("--mode", mode, "--method", "parent", "--answer", ANSWER, "--layers", 1)[0] == 0


def test_the_parent_s_gradients_share_no_relevance_out(drive):
    code, _, err = drive("--mode", "words", "--method", "parent", "--prompt_words", "--answer", ANSWER)
    assert (code, "--prompt_words cannot be combined with --method parent" in err) == (2, True)


# rollout, relevance x attention


@pytest.mark.parametrize("family", ["qwen3_vl", "windowed"])
def test_rollout_is_a_row_of_the_product_of_all_layers(family, tokenizer, windowed, monkeypatch):
    monkeypatch.setattr(attention, "ROWS", 7)
    given = windowed if family == "windowed" else (make_random(family, tokenizer), make_processor(family, tokenizer))
    reading = reading_of(*given)
    spans = [find_target(reading, word) for word in ("red cat", "the")]
    weights = eager_attention(reading).mean(1)
    maps = explain(reading, spans, range(5), Settings(use_smooth=False, method="rollout"))
    for span, found in zip(spans, maps, strict=True):
        rows = [reading.inputs["input_ids"].shape[1] - 1 + i for i in reading.tokens_of(span)]
        product = np.eye(weights.shape[-1])
        for layer in reversed(range(5)):  # A_4 ... A_layer, as published
            product = product @ (weights[layer] + np.eye(weights.shape[-1])) / 2
            expected = product[rows].mean(0)[reading.positions.numpy()].reshape(reading.grid)
            np.testing.assert_allclose(found.maps[layer], expected, rtol=1e-4, atol=1e-9)
            assert product[rows].sum(1) == pytest.approx(1)


@pytest.mark.parametrize("score", ["logit", "logprob"])
@pytest.mark.parametrize("family", ["qwen3_vl", "windowed"])
def test_relevance_is_that_of_the_whole_matrices(family, score, tokenizer, windowed, monkeypatch):
    """The equations on eager attention, its weights and their gradients by autograd."""
    monkeypatch.setattr(attention, "ROWS", 7)
    given = windowed if family == "windowed" else (make_random(family, tokenizer), make_processor(family, tokenizer))
    reading = reading_of(*given)
    span = find_target(reading, "red cat")
    forced, (target,) = core.score_parts(reading.inputs, reading.tokens, [reading.tokens_of(span)])
    with eager(reading.model):
        # weights take part in the graph from the first layer on
        embedded = reading.model.get_input_embeddings()
        handle = embedded.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
        output = reading.model(**forced, use_cache=False, output_attentions=True)
        handle.remove()
    logits = output.logits[0, target.predicting]
    gradients = torch.autograd.grad(core.SCORES[score](logits, torch.tensor(target.expected)), output.attentions)
    settings = Settings(use_smooth=False, method="chefer", score=score)
    (found,) = explain(reading, [span], range(5), settings)
    for layer in range(5):  # from this layer up, as published
        relevance = torch.eye(output.attentions[0].shape[-1], dtype=torch.float64)
        for weights, gradient in list(zip(output.attentions, gradients, strict=True))[layer:]:
            mean = (weights[0].detach() * gradient[0]).relu().mean(0).double()
            relevance = relevance + mean @ relevance
        expected = relevance[target.predicting].mean(0)[reading.positions].reshape(reading.grid).numpy()
        np.testing.assert_allclose(found.maps[layer], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("method", ["rollout", "chefer"])
def test_both_are_methods_of_the_command_line(drive, tmp_path, method):
    base = ("--method", method, "--answer", ANSWER, "--noise_std", 0)
    assert drive("--mode", "words", "--words", "cat", "--layers", 1, *base)[0] == 0
    assert drive("--mode", "flow", "--target", "cat", *base)[0] == 0
    words, flow = np.load(tmp_path / "out/words/maps.npz"), np.load(tmp_path / "out/flow/information_flow.npz")
    np.testing.assert_allclose(words["maps"][0, 0], flow["maps_0"][1], rtol=1e-4)
    assert drive(*base, "--head", 1)[0] == 2
    assert drive(*base, "--rules", "plain")[0] == 2
    assert drive(*base, "--recompute")[0] == (2 if method == "rollout" else 0)
    assert drive(*base, "--target", "cat", "--contrast", "dog")[0] == 2
