"""Qwen2-VL and Qwen3-VL take the code of Qwen2.5-VL: tiny random models of both, against independent oracles."""

import copy
import json
import re
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from conftest import make_image
from family_models import (
    ANSWER,
    CLASSES,
    FAMILIES,
    LAYERS,
    PROMPT,
    SIDES,
    autograd,
    by_the_book,
    decoder,
    make_processor,
    make_random,
    map_by_hand,
    of_all,
)
from torch import nn

import smooth_gradcam as core
import test_gradcam
from common.checkpoint import load_model, load_processor
from common.evidence import image_hiding
from common.families import cap_pixels
from common.passes import contrasted_passes, vision_kept, watched_passes
from smooth_gradcam import Settings, compute_token_maps, explain, find_target, read
from studies.faithfulness import insertion_deletion
from studies.flow_figures import trace
from studies.knockout import sever_photo
from studies.knockout_figures import sever
from studies.words import create_word_maps

CLEAN = {"use_smooth": False, "answer": ANSWER}


STDS = {"qwen2_vl": (0.26862954, 0.26130258, 0.27577711), "qwen3_vl": (0.5, 0.5, 0.5)}
STDS["qwen3_vl_moe"] = STDS["qwen3_vl"]


FORMULAS = ("gradcam", "hirescam", "product", "paper")  # methods whose maps are a formula alone


DEEPSTACK = 2  # Qwen3-VL adds vision features behind layers 0 and 1


@pytest.fixture(scope="session", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="session")
def processor(family, tokenizer):
    return make_processor(family, tokenizer)


@pytest.fixture(scope="session")
def model(family, tokenizer):
    return make_random(family, tokenizer)


@pytest.fixture(scope="session")
def image(family):
    """4 rows of 6 image tokens."""
    return make_image(6 * SIDES[family], 4 * SIDES[family])


@pytest.fixture(scope="session")
def reading(model, processor, image):
    return read(model, processor, image, PROMPT, ANSWER)


# oracles: no hook and no rule of the core


@pytest.fixture(scope="session")
def oracles(model):
    return {rules: by_the_book(model, rules) for rules in core.RULES}


def found_by_core(reading, layers, **settings):
    pairs = {}
    explain(
        reading,
        [(0, len(reading.answer))],
        layers,
        Settings(use_smooth=False, **settings),
        passes=watched_passes(core.noisy_passes, pairs.update),
    )
    return pairs


# gradients and maps


@pytest.mark.parametrize("rules", core.RULES)
def test_gradients_at_every_layer_are_autograds(model, oracles, reading, rules):
    """Of Qwen3-VL too, whose first layers have vision features added behind them."""
    pairs = found_by_core(reading, range(LAYERS), rules=rules)
    expected = autograd(oracles[rules], reading, decoder(oracles[rules]), reading.tokens)
    for layer in range(LAYERS):
        length = pairs[layer][0].shape[1]
        for found, right in zip(pairs[layer], expected[layer], strict=True):
            assert right[0, reading.positions].abs().max() > 1e-3
            torch.testing.assert_close(found[0], right[0, :length], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_one_layer_alone_has_the_gradient_it_has_among_all(reading, layer):
    alone, all_of_them = found_by_core(reading, [layer]), found_by_core(reading, range(LAYERS))
    for a, b in zip(alone[layer], all_of_them[layer], strict=True):
        torch.testing.assert_close(a, b)


def test_layers_read_at_their_output_are_as_they_left_it(model, oracles, reading):
    """Before deepstack adds to them, in place in transformers 4."""
    layers = range(LAYERS - 1)
    expected = autograd(oracles["plain"], reading, decoder(oracles["plain"]), reading.tokens, at_input=False)
    for found in (found_by_core(reading, layers, rules="plain", tap="output"), *(
        found_by_core(reading, [layer], rules="plain", tap="output") for layer in layers
    )):  # fmt: skip
        for layer, pair in found.items():
            for a, right in zip(pair, expected[layer], strict=True):
                torch.testing.assert_close(a[0], right[0, : a.shape[1]], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rules", core.RULES)
def test_gradients_within_the_vision_tower_are_autograds(model, oracles, reading, rules):
    """Its LayerNorms pass gradients by the rules as the RMSNorms of Qwen2.5-VL's tower do; deepstack has its part."""
    tower, book = model.model.visual, oracles[rules].model.visual
    pairs = found_by_core(reading, [*tower.blocks, tower.merger], rules=rules)
    expected = autograd(oracles[rules], reading, [*book.blocks, book.merger], reading.tokens, at_input=False)
    assert len(pairs) == len(expected) == len(tower.blocks) + 1
    for found, right in zip(pairs.values(), expected.values(), strict=True):
        for a, b in zip(found, right, strict=True):
            assert b.abs().max() > 1e-3
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # rotations of the tower are in float32


@pytest.mark.parametrize("method", FORMULAS)
def test_maps_are_the_formulas_at_the_image_tokens(model, oracles, reading, method):
    rules = Settings(method=method).settled().rules
    settings = Settings(use_smooth=False, method=method, tap="input")
    (found,) = explain(reading, [(0, len(reading.answer))], range(LAYERS), settings)
    answer = reading.tokens + [reading.processor.tokenizer.eos_token_id] * (method == "paper")
    expected = autograd(oracles[rules], reading, decoder(oracles[rules]), answer)
    for layer, cam in found.maps.items():
        hidden, gradient = (tensor[0, reading.positions] for tensor in expected[layer])
        assert cam.shape == (4, 6)
        np.testing.assert_allclose(cam.ravel(), map_by_hand(hidden, gradient, method), rtol=1e-5, atol=1e-7)
    assert sum(cam.max() > 1e-3 for cam in found.maps.values()) >= LAYERS - 1


def test_contrast_is_the_difference_of_two_answers(model, oracles, reading):
    span = find_target(reading.answer, "red")
    settings = Settings(use_smooth=False, contrast="cat", method="hirescam")
    (found,) = explain(reading, [span], [1, 2], settings, passes=contrasted_passes)
    book, tokenizer = oracles["attnlrp"], reading.processor.tokenizer
    of_answer = {}
    for word in ("red", "cat"):  # what is said before the word is scored in both alike
        answer = reading.tokens[: found.target_tokens[0]] + tokenizer(word)["input_ids"]
        of_answer[word] = autograd(book, reading, decoder(book), answer)
    for layer, cam in found.maps.items():
        hidden, gradient = (tensor[0, reading.positions] for tensor in of_answer["red"][layer])
        expected = map_by_hand(hidden, gradient - of_answer["cat"][layer][1][0, reading.positions], "hirescam")
        np.testing.assert_allclose(cam.ravel(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [(11, 7), (7, 11), (9, 9)])
def test_merger_has_the_map_of_the_first_layer(model, processor, family, size):
    """What the merger gives enters layer 0 unchanged, in raster order: neither tower has windows."""
    photo = make_image(size[0] * SIDES[family], size[1] * SIDES[family])
    options = CLEAN | {"method": "hirescam"}
    maps = compute_token_maps(model, processor, photo, PROMPT, [0, model.model.visual.merger], **options).maps
    assert maps[0].shape == size[::-1]
    np.testing.assert_allclose(maps["model.visual.merger"], maps[0], rtol=1e-5)


def test_patches_of_a_token_lie_side_by_side_and_tokens_in_raster_order(model, processor, family):
    """A bright cell of the photo is the four patches of its own token, and of no other."""
    side = SIDES[family]
    photo = np.zeros((5 * side, 7 * side, 3), np.uint8)
    photo[2 * side : 3 * side, 5 * side : 6 * side] = 255
    pixels = core.prepare_inputs(model, processor, [core.load_rgb(photo)], PROMPT)["pixel_values"]
    bright = pixels.mean(1) > 0
    heat = bright.float().numpy()
    grid = core.to_grid("model.visual.blocks.0", heat, (5, 7), model.config.vision_config)
    assert bright.sum() == 4
    assert grid[2, 5] == 1


def test_noise_is_in_units_of_the_unit_interval(processor, family):
    image_processor = processor.image_processor
    np.testing.assert_allclose(image_processor.image_std, STDS[family])
    side = SIDES[family] // 2
    pixels = image_processor(make_image(20 * side, 20 * side), return_tensors="pt")["pixel_values"]
    noisy = core.add_noise(pixels, 0.15, image_processor, torch.Generator().manual_seed(0))
    noise = (noisy - pixels).reshape(-1, 3, 2, side, side)
    assert torch.equal(noisy.reshape(noise.shape)[:, :, 0], noisy.reshape(noise.shape)[:, :, 1])
    spread = noise[:, :, 0].std((0, 2, 3)) * torch.tensor(STDS[family])
    torch.testing.assert_close(spread, torch.full((3,), 0.15), rtol=0.02, atol=0)


def test_teacher_forced_logits_are_those_of_generation(model, processor, image):
    seen = []
    record = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output[0].detach()))
    found = compute_token_maps(model, processor, image, PROMPT, [0], use_smooth=False, max_new_tokens=5)
    record.remove()
    count = len(found.tokens)
    *steps, forced = seen
    generated = torch.cat([step[-1:] for step in steps[:count]])
    assert count >= 2
    torch.testing.assert_close(forced[-count:].float(), generated.float(), rtol=1e-5, atol=1e-5)


@contextmanager
def counted(module):
    """Inside, the list grows by one for each call of the module's forward; it is no hook."""
    calls, run = [], module.forward
    module.forward = lambda *args, **kwargs: calls.append(1) or run(*args, **kwargs)
    try:
        yield calls
    finally:
        del module.forward


@of_all
def test_vision_tower_runs_once_for_the_answer_and_the_map_without_noise(model, processor, family, image):
    side, tower, layers = SIDES[family], model.model.visual, [0, 1, LAYERS - 1]
    for photos in (image, [image, make_image(3 * side, 4 * side)]):
        with counted(tower) as calls:
            counting = tower.forward
            with vision_kept(model):
                generated = read(model, processor, photos, PROMPT, max_new_tokens=4)
                span = find_target(generated.answer, None)
                maps = explain(generated, [span], layers, Settings(noise_std=0))
                assert len(calls) == 1
                explain(generated, [span], [0], Settings(num_samples=2))
                assert len(calls) == 3  # noisy copies are other pictures
            assert tower.forward is counting  # as accelerate's is
            anew = explain(generated, [span], layers, Settings(noise_std=0))
            assert len(calls) == 4
        for one, other in zip(maps, anew, strict=True):
            for layer in layers:
                np.testing.assert_array_equal(one.maps[layer], other.maps[layer])


@of_all
def test_vision_tower_runs_again_where_it_or_its_hooks_may_say_otherwise(family, tokenizer, processor, image):
    model = make_random(family, tokenizer)
    tower, layers, clean = model.model.visual, [1], Settings(noise_std=0)
    with vision_kept(model):
        generated = read(model, processor, image, PROMPT, max_new_tokens=4)
        spans = [find_target(generated.answer, None)]
        (before,) = explain(generated, spans, layers, clean)
        seen = []
        record = tower.merger.register_forward_hook(lambda *_: seen.append(1))
        explain(generated, spans, layers, clean)
        record.remove()
        assert seen == [1]
        (merger,) = explain(generated, spans, [tower.merger], clean)
        assert merger.maps["model.visual.merger"].any()
        other = copy.deepcopy(model)
        other.model.visual.patch_embed.proj.weight.data.mul_(-1)
        (of_other,) = explain(replace(generated, model=other), spans, layers, clean)
        with torch.no_grad():
            tower.patch_embed.proj.weight.mul_(-1)
        (after,) = explain(generated, spans, layers, clean)
    (anew,) = explain(generated, spans, layers, clean)
    np.testing.assert_array_equal(of_other.maps[1], anew.maps[1])
    assert np.abs(after.maps[1] - before.maps[1]).max() > 0
    np.testing.assert_array_equal(after.maps[1], anew.maps[1])


# rules


def test_the_rules_share_the_whole_score_out_but_for_what_deepstack_adds_behind(family, tokenizer, processor, image):
    """Without attention and biases: of what an image token's position would say next."""
    model = make_random(family, tokenizer)
    for name, parameter in model.named_parameters():
        if "language_model" in name and (name.endswith("bias") or ".o_proj." in name):
            nn.init.zeros_(parameter)
    inputs, layers = core.prepare_inputs(model, processor, [image], PROMPT), decoder(model)
    taps = [core.Tap(i, layer, True) for i, layer in enumerate(layers)]
    taps += [core.Tap(("out", i), layer, False) for i, layer in enumerate(layers)]
    with core.borrowed(model), core.attnlrp(model), core.captured(taps) as found:
        score = model(**inputs, use_cache=False).logits[0, core.image_grids(model, inputs)[0][7], 5]
        gradients = dict(zip(found, torch.autograd.grad(score, list(found.values())), strict=True))
    score = float(score.detach())
    found = {key: tensor.detach() for key, tensor in found.items()}
    added = [float(((found[i + 1] - found["out", i]) * gradients[i + 1]).sum()) for i in range(LAYERS - 1)] + [0.0]
    deepstack = range(DEEPSTACK if family.startswith("qwen3_vl") else 0)
    assert [abs(part) > 1e-3 for part in added] == [i in deepstack for i in range(LAYERS)]
    for i in range(LAYERS):
        share = float((found[i] * gradients[i]).sum())
        assert share + sum(added[i:]) == pytest.approx(score, rel=1e-6)


@pytest.mark.parametrize(
    ("constant", "part"), [(("v_proj",), 0.25), (("q_proj", "k_proj"), 0.5)], ids=["queries and keys", "values"]
)
def test_queries_and_keys_get_a_quarter_and_values_half_of_the_gradient(family, tokenizer, constant, part):
    """Norms of queries and keys are frozen in both."""
    model = make_random(family, tokenizer)
    attention = decoder(model)[1].self_attn
    for name in constant:
        getattr(attention, name).register_forward_hook(lambda module, args, output: output.detach())
    torch.manual_seed(0)
    x = torch.randn(1, 5, 32, dtype=torch.float64, requires_grad=True)
    positions = model.model.language_model.rotary_emb(x, torch.arange(5).expand(3, 1, 5))
    weights = torch.randn(5, 32, dtype=torch.float64)
    found = []
    for rules in (core.attnlrp, core.detached_norms):
        with rules(model):
            output = attention(x, attention_mask=None, position_embeddings=positions)[0]
        found += torch.autograd.grad((output * weights).sum(), x)
    assert found[1].abs().max() > 1e-3
    torch.testing.assert_close(found[0], part * found[1])


@pytest.mark.parametrize("family", ["qwen3_vl"], indirect=True)
@pytest.mark.parametrize("rules", core.RULES)
def test_norms_of_queries_and_keys_pass_on_all_that_reaches_them(model, reading, rules):
    """Of each head and token; their plain gradient passes on nothing, as the length of a query does not matter."""
    attention = decoder(model)[2].self_attn
    for proj, norm in ((attention.q_proj, attention.q_norm), (attention.k_proj, attention.k_norm)):
        into, behind = found_by_core(reading, [proj, norm], rules=rules).values()
        into, behind = ((a * g).reshape(*behind[0].shape).sum(-1) for a, g in (into, behind))  # (1, L, heads)
        assert behind.abs().max() > 1e-3
        torch.testing.assert_close(into, behind if rules != "plain" else into * 0, rtol=1e-4, atol=1e-6)


# the command line


@pytest.fixture(scope="session")
def folder(tmp_path_factory, family, tokenizer, processor):
    folder = tmp_path_factory.mktemp(family)
    make_random(family, tokenizer, torch.float32).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def drive(folder, image, tmp_path, capsys, blank_figures):
    """Run the driver; returns (exit code, stderr)."""
    image.save(tmp_path / "photo.png")

    def drive(*flags):
        usual = ["--model_path", folder, "--output_dir", tmp_path / "out", "--device", "cpu", "--quiet"]
        usual += ["--image_path", tmp_path / "photo.png", "--answer", "the red cat", "--mode", "single"]
        code = test_gradcam.main([str(word) for word in (*usual, *flags)])
        return code, capsys.readouterr().err

    return drive


def test_checkpoint_is_loaded_with_its_processor(folder, family, image):
    """The cap on pixels is one on image tokens of the family's own size."""
    side = SIDES[family]
    processor, model = load_processor(str(folder), 15 * side**2), load_model(str(folder), "cpu", "float32")
    assert (type(model).__name__, model.dtype) == (f"{CLASSES[family]}ForConditionalGeneration", torch.float32)
    assert type(processor).__name__ == f"{CLASSES[family].removesuffix('Moe')}Processor"
    assert len(read(model, processor, image, PROMPT, ANSWER).positions) in range(9, 16)
    with pytest.raises(ValueError, match=f"less than one image token: give {side**2} or more"):
        cap_pixels(processor.image_processor, side**2 - 1)


@pytest.mark.parametrize(
    "flags",
    [
        "--mode single --method product --target red --contrast cat",
        "--mode single --method paper",
        "--mode comparative --num_samples 2",
        "--mode words --layers 0 -1 --num_samples 2",
        "--mode evaluate --layers 1 --steps 4 --num_samples 1 --randomize",
        "--mode flow --num_samples 1 --attention_maps --taps --heads",
        "--mode knockout --window 2 --keep 3",
    ],
)
def test_every_mode_runs(drive, tmp_path, flags):
    code, err = drive(*flags.split())
    assert code == 0, err
    assert any((tmp_path / "out").rglob("*.png"))


# other families


def others():
    """Tiny models whose decoders are laid out like those of the families, and a module that is no model."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 300}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    clip = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    yield "Qwen2ForCausalLM is of type qwen2,", transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**small))
    config = transformers.LlavaNextConfig(
        text_config=small | {"model_type": "llama"}, vision_config=clip | {"model_type": "clip_vision_model"}
    )
    yield (
        "LlavaNextForConditionalGeneration is of type llava_next,",
        transformers.LlavaNextForConditionalGeneration(config),
    )
    yield "Linear is of type None,", nn.Linear(2, 2)
    yield "NoneType is of type None,", None


@pytest.mark.parametrize("family", FAMILIES[:1], indirect=True)
def test_other_families_are_refused_by_name_with_what_is_supported(processor, image):
    supported = "which is not supported: supported are "
    supported += "Qwen2-VL (qwen2_vl), Qwen2.5-VL (qwen2_5_vl), Qwen3-VL (qwen3_vl), Qwen3-VL MoE (qwen3_vl_moe), "
    supported += "LLaVA-1.5 (llava), InternVL3 (internvl), Gemma 3 (gemma3), LLaVA-OneVision (llava_onevision), "
    supported += "GLM-4V (glm4v)"
    assert supported.endswith(core.supported())
    for message, other in others():
        with pytest.raises(ValueError, match=re.escape(f"{message} {supported}") + "$"):
            read(other, processor, image, PROMPT)
        with pytest.raises(ValueError, match=re.escape(message)):
            compute_token_maps(other, processor, image, PROMPT, [0])


@pytest.mark.parametrize("family", FAMILIES[:1], indirect=True)
@pytest.mark.parametrize("kind", ["qwen2", "llava_next", "glm4v_moe", "qwen2_5_omni", None, ["qwen3_vl"]])
def test_driver_refuses_other_families_before_it_loads_them(drive, tmp_path, kind):
    config = {"model_type": kind, "num_hidden_layers": 4}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    code, err = drive("--model_path", tmp_path / "other")
    assert code == 2
    assert f"is of type {kind}, which is not supported: supported are Qwen2-VL (qwen2_vl), Qwen2.5-VL" in err
    assert not (tmp_path / "out").exists()


# several images


@pytest.fixture(scope="session")
def several(model, processor, family):
    """Of three photos of different sizes: 24 + 6 * 9 + 12 image tokens."""
    side = SIDES[family]
    photos = [make_image(6 * side, 4 * side), make_image(9 * side, 6 * side), make_image(3 * side, 4 * side)]
    return read(model, processor, photos, PROMPT, ANSWER)


SIZES = ((4, 6), (6, 9), (4, 3))


@of_all
def test_several_images_stand_before_the_prompt_in_their_order(several, processor):
    assert several.grids == SIZES
    message = {"role": "user", "content": [{"type": "image"}] * 3 + [{"type": "text", "text": PROMPT}]}
    text = processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    expected = processor(text=[text], images=list(several.photos), return_tensors="pt")
    for name in ("input_ids", "pixel_values", "image_grid_thw"):
        assert torch.equal(several.inputs[name], expected[name])
    ids = several.inputs["input_ids"][0]
    assert (ids == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")).nonzero()[:, 0].tolist() == list(
        several.positions
    )
    assert len(several.positions) == 24 + 54 + 12


@of_all
@pytest.mark.parametrize("method", FORMULAS)
def test_each_image_has_its_part_of_the_map_of_all_image_tokens(model, oracles, several, method):
    settings = Settings(use_smooth=False, method=method, tap="input")
    found = explain(several, [(0, len(several.answer))], range(LAYERS), settings)
    assert [(one.image, one.grid) for one in found] == list(enumerate(SIZES))
    answer = several.tokens + [several.processor.tokenizer.eos_token_id] * (method == "paper")
    book = oracles[settings.settled().rules]
    expected = autograd(book, several, decoder(book), answer)
    for layer in range(LAYERS):
        cams = [one.maps[layer] for one in found]
        assert tuple(cam.shape for cam in cams) == SIZES
        pair = (tensor[0, several.positions] for tensor in expected[layer])
        together = np.concatenate([cam.ravel() for cam in cams])
        np.testing.assert_allclose(together, map_by_hand(*pair, method), rtol=1e-4, atol=1e-7)


@of_all
def test_maps_are_listed_part_by_part_and_image_by_image(several):
    spans = [find_target(several.answer, word) for word in ("red", "cat")]
    together = explain(several, spans, [1], Settings(num_samples=2))
    apart = sum((explain(several, [span], [1], Settings(num_samples=2)) for span in spans), [])
    assert [(one.target, one.image) for one in together] == [(w, i) for w in ("red", "cat") for i in range(3)]
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_allclose(one.maps[1], other.maps[1], rtol=1e-5, atol=1e-9)


@of_all
def test_vision_merger_of_several_images_is_in_raster_order(model, several):
    """The windows of Qwen2.5-VL's tower are walked image by image."""
    settings, tower = Settings(use_smooth=False, method="hirescam"), model.model.visual
    for one in explain(several, [(0, len(several.answer))], [0, tower.merger, tower.blocks[-1]], settings):
        np.testing.assert_allclose(one.maps["model.visual.merger"], one.maps[0], rtol=1e-5)
        assert one.maps[f"model.visual.blocks.{len(tower.blocks) - 1}"].shape == one.grid


@of_all
def test_every_image_gets_noise_of_its_own(several, processor, monkeypatch):
    """The maps are the mean over copies in which all photos are noisy."""
    seen, plain = [], core.add_noise
    monkeypatch.setattr(core, "add_noise", lambda *args: seen.append(plain(*args)) or seen[-1])
    explain(several, [(0, 3)], [1], Settings(num_samples=3, noise_std=0.2))
    noise = torch.stack(seen) - several.inputs["pixel_values"]
    ends = np.cumsum([4 * rows * columns for rows, columns in SIZES])[:-1].tolist()
    std = float(np.mean(processor.image_processor.image_std))
    for part in noise.tensor_split(ends, dim=1):
        assert float(part.std()) * std == pytest.approx(0.2, rel=0.05)
    assert noise.flatten(0, 1).unique(dim=0).shape[0] == noise.shape[0] * noise.shape[1]


@of_all
def test_an_object_is_found_in_the_image_and_the_corner_where_it_is(model, processor, family, several, monkeypatch):
    """A method that marks the odd token out of the features as they enter layer 0."""
    side = SIDES[family]
    photos = [np.full((rows * side, columns * side, 3), 128, np.uint8) for rows, columns in SIZES]
    photos[1][:side, -side:] = 255
    reading = read(model, processor, photos, PROMPT, ANSWER)
    monkeypatch.setitem(
        core.METHODS,
        "hirescam",
        core.METHODS["hirescam"]._replace(formula=lambda a, g: (a - a.median(0).values).square().sum(-1)),
    )
    settings = Settings(use_smooth=False, method="hirescam")
    cams = [one.maps["model.visual.patch_embed"] for one in explain(
        reading, [(0, 3)], [model.model.visual.patch_embed], settings
    )]  # fmt: skip
    assert np.argmax([cam.max() for cam in cams]) == 1
    assert np.unravel_index(cams[1].argmax(), cams[1].shape) == (0, SIZES[1][1] - 1)


@of_all
def test_a_list_of_one_image_is_that_image(model, processor, image):
    one, other = (read(model, processor, given, PROMPT, ANSWER) for given in (image, [image]))
    assert one.inputs.keys() == other.inputs.keys()
    assert all(torch.equal(one.inputs[name], other.inputs[name]) for name in one.inputs)
    assert (one.photo.tobytes(), one.grid) == (other.photo.tobytes(), other.grid)
    found = [explain(reading, [(0, 3)], [1])[0].maps[1] for reading in (one, other)]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_what_is_made_for_one_image_refuses_several(model, processor, several, tmp_path):
    photos = list(several.photos)
    with pytest.raises(ValueError, match="^image has 3 photos, and this takes one: use read and"):
        compute_token_maps(model, processor, photos, PROMPT, [0])
    with pytest.raises(ValueError, match="^image has 3 photos, and this"):
        core.SmoothQwenGradCAM(model, processor, 0).generate_cam(photos, PROMPT)
    message = "^the prompt has 3 images, and this takes one photo: use read and explain$"
    with pytest.raises(ValueError, match=message):
        several.photo  # noqa: B018
    with pytest.raises(ValueError, match=message):
        create_word_maps(model, processor, photos, PROMPT, answer=ANSWER, save_dir=tmp_path / "words")
    with pytest.raises(ValueError, match=message):
        insertion_deletion(several, explain(several, [(0, 3)], [0])[0])
    with pytest.raises(ValueError, match="^a mask is of one picture, and 3 are explained: choose one, reading.of.0."):
        sever_photo(several, window=1, mask=np.ones((4, 4), bool))
    for figures in (trace, sever):
        with pytest.raises(ValueError, match=message):
            figures([several], ["several"], [(0, 3)], *([[0], Settings()] if figures is trace else []), quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_lists_that_hold_no_photos_are_named(model, processor, image):
    for given, message in (
        ([], "image=.. has no photo: give one or more"),
        ([image, None], "image of type NoneType must be a path"),
        ([image, [image]], "image of type list must be a path"),
    ):
        with pytest.raises(ValueError, match=message):
            read(model, processor, given, PROMPT)


# what the answer rests on


def text_alone(reading) -> np.ndarray:
    """(A,): the answer's probabilities if the image tokens are cut out of the sequence, positions left as they are.

    With a mask, since without one transformers 4.57 takes a gap in the positions of Qwen3-VL for two packed sequences.
    """
    model, given = reading.model, {}
    forced, (scored,) = core.score_parts(reading.inputs, reading.tokens, [range(len(reading.tokens))])
    decoder = model.model.language_model
    with torch.no_grad(), core.hooked([decoder.register_forward_pre_hook(
        lambda *args: given.update(args[2]), with_kwargs=True)]):  # fmt: skip
        model.model(**forced, use_cache=False)
    length = forced["input_ids"].shape[1]
    first, last = int(reading.positions[0]), int(reading.positions[-1])
    rest = [i for i in range(length) if not first <= i <= last]
    with torch.no_grad():
        states = decoder(
            inputs_embeds=given["inputs_embeds"][:, rest], position_ids=given["position_ids"][..., rest],
            attention_mask=torch.ones(1, len(rest), dtype=torch.long), use_cache=False,
        ).last_hidden_state[0]  # fmt: skip
        logits = model.lm_head(states[[rest.index(position) for position in scored.predicting]])
    return logits.softmax(-1)[range(len(scored.expected)), scored.expected].numpy()


@of_all
@pytest.mark.parametrize("which", ["reading", "several"])
def test_answer_without_photos_is_that_of_the_text_alone(model, which, request):
    reading = request.getfixturevalue(which)
    nothing = np.zeros(len(reading.positions), bool)
    with image_hiding(reading) as hide:
        with_photo, without = hide(np.stack([nothing, ~nothing]))
    np.testing.assert_allclose(without, text_alone(reading), rtol=1e-5, atol=1e-8)
    forced, (scored,) = core.score_parts(reading.inputs, reading.tokens, [range(len(reading.tokens))])
    with torch.no_grad():
        logits = model(**forced).logits[0, scored.predicting].softmax(-1)
    expected = logits[range(len(scored.expected)), scored.expected].numpy()
    np.testing.assert_allclose(with_photo, expected, rtol=1e-5, atol=1e-8)
    assert abs(with_photo - without).max() > 1e-3
