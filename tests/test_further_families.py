"""Families beside Qwen-VL: tiny random models of transformers' own classes, against independent oracles."""

import inspect
import json
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import transformers
from conftest import make_image
from family_models import autograd, by_the_book, decoder, map_by_hand
from further_models import LAYERS, MAKERS, intern_processor, llava_processor, make_model
from PIL import Image
from torch import nn
from transformers.image_processing_utils import select_best_resolution

import smooth_gradcam as core
import test_gradcam
from common.checkpoint import count_layers, load_model, load_processor
from common.evidence import image_hiding
from common.families import FAMILIES, hidden_with, known, photo_tokens, seen
from common.passes import (
    contrasted_passes,
    own_patches,
    patches_of,
    repainted,
    vision_kept,
    watched_passes,
    with_contrast,
)
from smooth_gradcam import Settings, compute_token_maps, explain, find_target, read
from studies.decoder import token_groups
from studies.fastv import image_pruned, kept_count
from studies.flow import attention_flow
from studies.knockout import Edge, image_hidden, knockout, sever_photo
from studies.prompt_words import Relevances

PROMPT, ANSWER = "What is it?", "the red cat 猫"
FORMULAS = ("gradcam", "hirescam", "product", "paper")


@pytest.fixture(scope="session", params=list(MAKERS))
def family(request):
    return request.param


@pytest.fixture(scope="session")
def tokenizer(family, tmp_path_factory):
    return MAKERS[family][0](tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def processor(family, tokenizer):
    return MAKERS[family][1](tokenizer)


@pytest.fixture(scope="session")
def model(family, tokenizer):
    return make_model(family, tokenizer)


@pytest.fixture(scope="session")
def image():
    return make_image(168, 112)


@pytest.fixture(scope="session")
def reading(model, processor, image):
    return read(model, processor, image, PROMPT, ANSWER)


@pytest.fixture(scope="session")
def oracles(model):
    return {rules: by_the_book(model, rules) for rules in core.RULES}


def found_by_core(reading, layers, **settings):
    pairs, span = {}, (0, len(reading.answer))
    passes = watched_passes(core.noisy_passes, pairs.update)
    explain(reading, [span], layers, Settings(use_smooth=False, **settings), passes=passes)
    return pairs


# gradients and maps


@pytest.mark.parametrize("rules", core.RULES)
def test_gradients_at_every_layer_are_autograds(oracles, reading, rules):
    pairs = found_by_core(reading, range(LAYERS), rules=rules)
    expected = autograd(oracles[rules], reading, decoder(oracles[rules]), reading.tokens)
    for layer in range(LAYERS):
        length = pairs[layer][0].shape[1]
        for found, right in zip(pairs[layer], expected[layer], strict=True):
            assert right[0, reading.positions].abs().max() > 1e-3
            torch.testing.assert_close(found[0], right[0, :length], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", FORMULAS)
def test_maps_are_the_formulas_at_the_image_tokens(oracles, reading, method):
    settings = Settings(use_smooth=False, method=method, tap="input")
    (found,) = explain(reading, [(0, len(reading.answer))], range(LAYERS), settings)
    answer = reading.tokens + [reading.processor.tokenizer.eos_token_id] * (method == "paper")
    book = oracles[settings.settled().rules]
    expected = autograd(book, reading, decoder(book), answer)
    for layer, cam in found.maps.items():
        hidden, gradient = (tensor[0, reading.positions] for tensor in expected[layer])
        assert cam.shape == reading.grid
        np.testing.assert_allclose(cam.ravel(), map_by_hand(hidden, gradient, method), rtol=1e-5, atol=1e-7)
    assert sum(cam.max() > 1e-3 for cam in found.maps.values()) >= LAYERS - 1


UNTAPPED = "llava_onevision"  # what the last module of its tower gives is put together before it enters layer 0


def test_the_last_module_of_the_tower_has_the_map_of_the_first_layer(family, model, reading):
    """What it gives enters layer 0 unchanged, token by token."""
    merger = known(model).merger
    settings = Settings(use_smooth=False, method="hirescam")
    if family == UNTAPPED:
        message = r"^layer model\.multi_modal_projector comes before the tiles are put together: take decoder layer 0"
        with pytest.raises(ValueError, match=message):
            explain(reading, [(0, 3)], [model.model.get_submodule(merger)], settings)
        return
    (found,) = explain(reading, [(0, 3)], [0, model.model.get_submodule(merger)], settings)
    assert found.maps[0].any()
    np.testing.assert_allclose(found.maps[f"model.{merger}"], found.maps[0], rtol=1e-5)


def test_the_rules_share_the_whole_score_out(family, tokenizer, processor, image):
    """Without attention and biases: of what an image token's position would say next."""
    model = make_model(family, tokenizer)
    for name, parameter in model.named_parameters():
        if "language_model" in name and (name.endswith("bias") or ".o_proj." in name):
            nn.init.zeros_(parameter)
    inputs, layers = core.prepare_inputs(model, processor, [image], PROMPT), decoder(model)
    taps = [core.Tap(i, layer, True) for i, layer in enumerate(layers)]
    with core.borrowed(model), core.attnlrp(model), core.captured(taps) as found:
        score = model(**inputs, use_cache=False).logits[
            0, known(model).grids(model, inputs, "image", [image], processor)[0][7], 5
        ]
        gradients = torch.autograd.grad(score, list(found.values()))
    assert abs(score := float(score.detach())) > 1e-3
    for features, gradient in zip(found.values(), gradients, strict=True):
        assert float((features.detach() * gradient).sum()) == pytest.approx(score, rel=1e-6)


def test_a_decoder_without_a_module_that_has_a_rule_is_refused(family, tokenizer, processor, image):
    model = make_model(family, tokenizer)
    decoder(model)[1].mlp.forward = lambda x: x  # as a fused kernel
    with pytest.raises(
        core.ExplanationError, match=r"layers\.1\.mlp\.(up_proj|act_fn|gate_up_proj) has no gradient rule"
    ):
        compute_token_maps(model, processor, image, PROMPT, [0], answer=ANSWER, num_samples=1)


def test_copies_in_a_batch_are_those_one_by_one(family, reading):
    settings, merger = Settings(num_samples=3, noise_std=0.2), known(reading.model).merger
    layers = [0, LAYERS - 1, *([] if family == UNTAPPED else [reading.model.model.get_submodule(merger)])]
    (one,), (three,) = (explain(reading, [(0, 3)], layers, settings, batch_size=size) for size in (1, 3))
    for layer, cam in one.maps.items():
        assert cam.any()
        np.testing.assert_allclose(three.maps[layer], cam, rtol=1e-5, atol=1e-9)


def test_noise_is_in_units_of_the_unit_interval(reading, processor):
    images, pixels = processor.image_processor, reading.inputs["pixel_values"]
    noisy = core.add_noise(pixels, 0.15, images, torch.Generator().manual_seed(0))
    assert noisy.shape == pixels.shape
    noise = noisy - pixels
    if noise.dim() == 2:  # patches, with two copies of each pixel
        noise = noise.unflatten(1, (3, 2, 14, 14))
        assert torch.equal(noise[:, :, 0], noise[:, :, 1])
        noise = noise[:, :, 0]
    spread = noise.transpose(0, -3).flatten(1).std(1) * torch.tensor(images.image_std)
    torch.testing.assert_close(spread, torch.full((3,), 0.15), rtol=0.03, atol=0)


# where the photo lies


MIXING = ("out_proj.", "o_proj.", "projection_layer.", "attn.proj.", "position_embedding")


@pytest.fixture(scope="session")
def blind(family, tokenizer):
    """The model, without attention between the patches of the photo: a bright cell is one odd token."""
    model = make_model(family, tokenizer)
    for part in known(model).tower:
        for name, parameter in model.model.get_submodule(part).named_parameters():
            if any(place in name for place in MIXING):
                nn.init.zeros_(parameter)
    return model


def odd_token(reading, monkeypatch):
    """(row, column) of the image token whose features stand out as they enter layer 0."""
    odd = core.METHODS["hirescam"]._replace(formula=lambda a, g: (a - a.median(0).values).square().sum(-1))
    monkeypatch.setitem(core.METHODS, "hirescam", odd)
    (found,) = explain(reading, [(0, 3)], [0], Settings(use_smooth=False, method="hirescam"))
    return np.unravel_index(found.maps[0].argmax(), found.grid)


@pytest.mark.parametrize("size", [(240, 120), (120, 240), (180, 180), (333, 251)])
@pytest.mark.parametrize("cell", [(0, 0), (1, 4), (5, 2)])
def test_a_bright_cell_is_found_at_its_place_on_the_photo(blind, processor, monkeypatch, size, cell):
    """The cell is bright in what the model sees; that is cut out of the photo, by hand."""
    width, height = size
    shown = seen(blind, processor, Image.new("RGB", size))
    left, top = (width - shown.width) // 2, (height - shown.height) // 2
    rows, columns = read(blind, processor, Image.new("RGB", size), PROMPT, ANSWER).grid
    row, column = cell[0] * rows // 6, cell[1] * columns // 6
    tall, wide = shown.height / rows, shown.width / columns
    photo = np.full((height, width, 3), 40, np.uint8)
    photo[
        round(top + row * tall) : round(top + (row + 1) * tall),
        round(left + column * wide) : round(left + (column + 1) * wide),
    ] = 255
    reading = read(blind, processor, photo, PROMPT, ANSWER)
    assert odd_token(reading, monkeypatch) == (row, column)
    grey = reading.photo.convert("L").resize((columns, rows), Image.Resampling.BOX)  # what figures draw
    assert np.unravel_index(np.asarray(grey).argmax(), (rows, columns)) == (row, column)


def test_the_class_draws_what_the_model_sees(model, processor, image):
    cam = core.SmoothQwenGradCAM(model, processor, 0, num_samples=1, answer=ANSWER)
    superimposed, heatmap = cam.generate_cam(image, PROMPT)
    shown = seen(model, processor, image)
    assert superimposed.shape == heatmap.shape == (shown.height, shown.width, 3)


# text


def test_generated_answer_is_the_models_and_says_no_picture(family, tokenizer, processor, image):
    model = make_model(family, tokenizer)
    generated = read(model, processor, image, PROMPT, max_new_tokens=6)
    assert generated.tokens
    with torch.no_grad():  # teacher-forced, each token is the most likely one
        forced, (scored,) = core.score_parts(generated.inputs, generated.tokens, [range(len(generated.tokens))])
        logits = model(**forced).logits[0, scored.predicting]
        logits[:, model.config.image_token_id] = -torch.inf
        assert logits.argmax(-1).tolist() == generated.tokens
        model.lm_head.weight[model.config.image_token_id] = 50 * model.lm_head.weight[generated.tokens[0]]
        other = read(model, processor, image, PROMPT, max_new_tokens=6)
    assert model.config.image_token_id not in other.tokens


@pytest.mark.parametrize("text", ["the red cat", "the cat 猫狗熊 x  y\n a", "猫", " a", "é🐈ü", "1. a\n2. b"])
def test_tokens_have_their_place_in_the_answer(tokenizer, text):
    tokens = core.tokenise(tokenizer, text)
    said, spans = core.decode(tokenizer, tokens), core.token_spans(tokenizer, tokens)
    assert said.strip() == text.strip()
    assert len(spans) == len(tokens)
    covered = set()
    for start, end in spans:
        assert 0 <= start <= end <= len(said)
        covered |= set(range(start, end))
    assert covered == set(range(len(said)))
    for i, (start, end) in enumerate(spans):  # what no other token has a part in is this token's text
        if not any(a < end and b > start for a, b in spans[:i] + spans[i + 1 :]):
            assert core.decode(tokenizer, [tokens[i]]).strip() == said[start:end].strip()


@pytest.mark.parametrize(("target", "contrast"), [("red", "dog"), ("cat", "dog"), ("at", "he"), ("the", "dog")])
def test_a_contrast_stands_where_the_target_stood(reading, target, contrast):
    other, span = with_contrast(reading, find_target(reading.answer, target), contrast)
    end = find_target(reading.answer, target)[1]
    said = core.decode(reading.processor.tokenizer, other.tokens)
    assert said == other.answer
    assert said.startswith(reading.answer[: end - len(target)] + contrast)
    assert contrast in said[slice(*span)]


def test_contrast_is_the_difference_of_two_answers(oracles, reading):
    span = find_target(reading.answer, "red")
    settings = Settings(use_smooth=False, contrast="cat", method="hirescam")
    (found,) = explain(reading, [span], [1, 2], settings, passes=contrasted_passes)
    book, of_answer = oracles["attnlrp"], {}
    for answer in ("the red", "the cat"):  # "the" is scored in both alike
        tokens = reading.processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
        of_answer[answer] = autograd(book, reading, decoder(book), tokens)
    for layer, cam in found.maps.items():
        hidden, gradient = (tensor[0, reading.positions] for tensor in of_answer["the red"][layer])
        difference = gradient - of_answer["the cat"][layer][1][0, reading.positions]
        np.testing.assert_allclose(cam.ravel(), map_by_hand(hidden, difference, "hirescam"), rtol=1e-5, atol=1e-7)


# several pictures, and patches


def test_each_picture_has_its_part_of_the_map(model, processor, oracles):
    photos = [make_image(168, 112), make_image(100, 150)]
    reading = read(model, processor, photos, PROMPT, ANSWER)
    found = explain(reading, [(0, len(reading.answer))], [1], Settings(use_smooth=False))
    book = oracles["attnlrp"]
    pair = (tensor[0, reading.positions] for tensor in autograd(book, reading, decoder(book), reading.tokens)[1])
    together = np.concatenate([one.maps[1].ravel() for one in found])
    np.testing.assert_allclose(together, map_by_hand(*pair, "gradcam"), rtol=1e-5, atol=1e-7)
    assert [one.image for one in found] == [0, 1]
    alone = reading.of(1)
    assert alone.photo.size == seen(model, processor, photos[1]).size
    assert len(alone.positions) == np.prod(reading.grids[1])


UNREMOVED = "its image tokens are put together from tiles, and cannot be removed from a photo"


def test_pixels_by_token_and_back(family, reading, processor):
    if family == UNTAPPED:
        with pytest.raises(ValueError, match=f"^LlavaOnevisionForConditionalGeneration: {UNREMOVED}$"):
            patches_of(reading)
        return
    patches, pixels = patches_of(reading), reading.inputs["pixel_values"]
    assert len(own_patches(reading)) % len(reading.positions) == 0
    assert torch.equal(known(reading.model).pictures(patches, torch.zeros_like(pixels), reading), pixels)
    same = repainted(reading, reading.photo)  # the photo itself, but for how its edge is resampled
    assert same.shape == patches.shape
    assert (same - patches).abs().mean() < 0.02
    other = repainted(reading, Image.new("RGB", reading.photo.size))
    assert (other - patches).abs().mean() > 0.5


def test_vision_tower_runs_once_for_the_answer_and_the_map_without_noise(model, processor, image, monkeypatch):
    tower, calls = model.model.get_submodule(known(model).tower[0]), []
    run = tower.forward
    monkeypatch.setattr(tower, "forward", lambda *args, **kwargs: calls.append(1) or run(*args, **kwargs))
    with vision_kept(model):
        generated = read(model, processor, image, PROMPT, max_new_tokens=3)
        (kept,) = explain(generated, [(0, 1)], [0, 1], Settings(noise_std=0))
        assert len(calls) == 1
    (anew,) = explain(generated, [(0, 1)], [0, 1], Settings(noise_std=0))
    assert len(calls) == 2
    for layer in (0, 1):
        np.testing.assert_array_equal(kept.maps[layer], anew.maps[layer])


# what the answer rests on: attention by a mask that is made by hand


@contextmanager
def eager(model):
    config = model.model.language_model.config
    before, config._attn_implementation = config._attn_implementation, "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def with_mask(reading, block) -> np.ndarray:
    """(A,) probabilities of the answer if the queries do not see the keys where `block` (L, L) says so."""
    model, given = reading.model, {}
    forced, (scored,) = core.score_parts(reading.inputs, reading.tokens, [range(len(reading.tokens))])
    language_model = model.model.language_model
    with torch.no_grad(), eager(model):
        with core.hooked([language_model.register_forward_pre_hook(
            lambda *args: given.update(args[2]), with_kwargs=True)]):  # fmt: skip
            model.model(**forced, use_cache=False)
        length = forced["input_ids"].shape[1]
        block, lowest = block[:length, :length], torch.finfo(torch.float64).min
        if isinstance(masks := given["attention_mask"], dict):  # Gemma 3's own, where image tokens see each other
            assert all(mask[0, 0, reading.positions[0], reading.positions[-1]] == 0 for mask in masks.values())
            masks = {name: mask.masked_fill(block, lowest) for name, mask in masks.items()}
        else:
            masks = torch.full((1, 1, length, length), lowest, dtype=torch.float64).triu(1).masked_fill(block, lowest)
        more = {} if given.get("position_ids") is None else {"position_ids": given["position_ids"]}
        states = language_model(
            inputs_embeds=given["inputs_embeds"], attention_mask=masks, use_cache=False, **more
        ).last_hidden_state
        logits = model.lm_head(states[0, scored.predicting])
    return logits.softmax(-1)[range(len(scored.expected)), scored.expected].numpy()


def image_tokens(reading):
    return (reading.inputs["input_ids"][0] == reading.model.config.image_token_id).nonzero()[:, 0]


def covered_by_hand(reading, hidden) -> list[int]:
    """Positions of the tokens that show a photo as a whole, 6 x 6 if there are any, where half of it is hidden.

    Counted in points, as many along each side as both grids divide into.
    """
    whole, (height, width) = (
        [i for i in image_tokens(reading).tolist() if i not in reading.positions][:36],
        reading.grid,
    )
    points = np.kron(hidden.reshape(height, width), np.ones((6, 6)))  # (6 H, 6 W)
    shares = points.reshape(6, height, 6, width).mean((1, 3)).ravel()
    return [position for position, share in zip(whole, shares, strict=False) if share > 0.4999]


def test_hidden_image_is_that_of_a_mask_made_by_hand(reading):
    count = len(reading.positions)
    length = reading.inputs["input_ids"].shape[1] + len(reading.tokens)
    tokens = image_tokens(reading)
    start = int(tokens.max()) + 1
    hidden = np.stack([np.zeros(count, bool), np.ones(count, bool), np.arange(count) % 3 == 0, np.arange(count) < 50])
    with image_hiding(reading) as hide:
        found = hide(hidden)
    for row, own in zip(hidden, found, strict=True):
        block = torch.zeros(length, length, dtype=torch.bool)
        block[start:, tokens if row.all() else reading.positions[torch.as_tensor(row)]] = True
        block[start:, covered_by_hand(reading, row)] = True
        np.testing.assert_allclose(own, with_mask(reading, block), rtol=1e-5, atol=1e-8)
    assert abs(found[0] - found[1]).max() > 1e-3


def test_what_a_word_takes_from_the_photo_is_that_of_all_its_tokens(oracles, reading):
    relevances = Relevances()
    maps = explain(reading, [(0, len(reading.answer))], [1], Settings(use_smooth=False), passes=relevances)
    book = oracles["attnlrp"]
    hidden, gradient = autograd(book, reading, decoder(book), reading.tokens)[1]
    shares = (hidden * gradient).sum(-1)[0]
    shares /= shares.abs().sum()
    expected = float(shares[image_tokens(reading)].sum())
    assert abs(expected) > 1e-3
    assert relevances.asked(reading, maps).found[0].photo[0] == pytest.approx(expected, rel=1e-4)


def test_half_of_all_image_tokens_are_removed(family, reading):
    count, prompt = len(photo_tokens(reading)), reading.inputs["input_ids"].shape[1]
    if family == "gemma3":
        with (
            pytest.raises(ValueError, match="its image tokens see each other, none can be removed"),
            image_pruned(reading, 2, 50),
        ):
            pass
        return
    with core.borrowed(reading.model), image_pruned(reading, 2, 50) as kept, torch.no_grad():
        reading.model.generate(**reading.inputs, max_new_tokens=2)
    gone = set(range(prompt)) - set(kept.positions)
    assert len(gone) == count - kept_count(count, 50)
    assert gone < set(image_tokens(reading).tolist())


@pytest.mark.parametrize("layer", [0, 1])
def test_answers_with_the_image_hidden_are_those_without_a_cache(family, reading, layer):
    """Also where the prompt is longer than some layers' sliding window, of whose keys only the last are left."""
    inputs = dict(reading.inputs)
    said = {}
    for cached in (True, False):
        with core.borrowed(reading.model), image_hidden(reading.model, layer), torch.no_grad():
            options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "use_cache": cached}
            said[cached] = reading.model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    np.testing.assert_array_equal(said[True].sequences, said[False].sequences)
    np.testing.assert_allclose(torch.stack(said[True].logits), torch.stack(said[False].logits), rtol=1e-4, atol=1e-5)


def test_knockout_is_that_of_a_mask_made_by_hand(reading):
    groups = token_groups(reading)
    image, answer = groups["image"], groups["answer"]
    length = answer[-1] + 1
    found, _ = knockout(reading, [Edge(range(LAYERS), answer, image), Edge(range(0), answer, image)])
    block = torch.zeros(length, length, dtype=torch.bool)
    np.testing.assert_allclose(found[1], with_mask(reading, block), rtol=1e-5, atol=1e-8)
    block[np.ix_(answer, image)] = True
    np.testing.assert_allclose(found[0], with_mask(reading, block), rtol=1e-5, atol=1e-8)
    assert abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.parametrize("numbers", [(0,), (1,), (0, 1)])
def test_knockout_of_several_pictures_is_that_of_a_mask_or_refused(model, processor, family, numbers):
    """Where image tokens see each other, those that stand behind hidden ones would be run as if they did not."""
    reading = read(model, processor, [make_image(168, 112), make_image(100, 150)], PROMPT, ANSWER).of(*numbers)
    if family == "gemma3" and 0 in numbers:
        with pytest.raises(ValueError, match=f"^{type(model).__name__}: its image tokens see each other, so attention"):
            sever_photo(reading)
        return
    tokens, length = image_tokens(reading), reading.inputs["input_ids"].shape[1] + len(reading.tokens)
    pictures = tokens.tensor_split((tokens.diff() > 1).nonzero()[:, 0] + 1)
    if family == "llava_onevision":  # whose pictures touch: 6 x 6 tokens, and 8 lines of 12 or 12 of 8 with their ends
        pictures = tokens.split([36 + 8 * 13, 36 + 12 * 9])
    hidden = torch.cat([pictures[i] for i in numbers])
    block = torch.zeros(length, length, dtype=torch.bool)
    block[int(hidden[0]) :, hidden] = True
    block[hidden] = False
    found = sever_photo(reading).removed
    np.testing.assert_allclose(found[0], with_mask(reading, block), rtol=1e-5, atol=1e-8)
    assert abs(found[0] - found[-1]).max() > 1e-4


def test_attention_flow_is_the_models_attention(reading):
    found = attention_flow(reading)
    model, seen_weights = reading.model, []
    forced, (scored,) = core.score_parts(reading.inputs, reading.tokens, [range(len(reading.tokens))])
    hooks = [
        layer.self_attn.register_forward_hook(lambda *args: seen_weights.append(args[2][1])) for layer in decoder(model)
    ]
    with torch.no_grad(), eager(model), core.hooked(hooks):
        model(**forced, use_cache=False)
    for layer, weights in enumerate(seen_weights):
        expected = weights[0][:, scored.predicting].mean((0, 1)).numpy()
        np.testing.assert_allclose(found[layer][: len(expected)], expected, rtol=1e-4, atol=1e-7)


# the command line


@pytest.fixture(scope="session")
def folder(tmp_path_factory, family, tokenizer, processor):
    folder = tmp_path_factory.mktemp(family)
    make_model(family, tokenizer, torch.float32).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def drive(folder, image, tmp_path, capsys, blank_figures):
    image.save(tmp_path / "photo.png")
    mask = np.zeros((112, 168), np.uint8)
    mask[30:70, 60:100] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")

    def drive(*flags):
        usual = ["--model_path", folder, "--output_dir", tmp_path / "out", "--device", "cpu", "--quiet"]
        usual += ["--image_path", tmp_path / "photo.png", "--answer", "the red cat"]
        usual += [] if "knockout" in flags else ["--noise_std", 0]
        code = test_gradcam.main([str(word) for word in (*usual, *flags)])
        return (code, *capsys.readouterr())

    return drive


def test_checkpoint_is_loaded_with_its_processor(folder, family, image, processor):
    loaded, model = load_processor(str(folder), 10**6), load_model(str(folder), "cpu", "float32")
    assert type(model) is MAKERS[family][3]
    assert type(loaded) is type(processor)
    assert count_layers(str(folder)) == LAYERS
    assert read(model, loaded, image, PROMPT, ANSWER).grid == read(model, processor, image, PROMPT, ANSWER).grid


@pytest.mark.parametrize(
    "flags",
    [
        "--mode single --method product --target red --contrast cat",
        "--mode single --method needed --target red",
        "--mode grid --method paper",
        "--mode multi --layers 0 -1",
        "--mode comparative",
        "--mode words --layers 0 -1 --prompt_words",
        "--mode evaluate --layers 1 --steps 4 --randomize --mask MASK",
        "--mode evaluate --layers 1 --steps 4 --compare",
        "--mode flow --taps",
        "--mode flow --heads --mask MASK",
        "--mode knockout --window 2 --keep 5 --mask MASK",
    ],
)
def test_every_mode_runs(family, drive, tmp_path, flags):
    code, out, err = drive(*flags.replace("MASK", str(tmp_path / "mask.png")).split())
    if family == UNTAPPED and ("evaluate" in flags or "taps" in flags):
        assert code == 2
        assert (UNREMOVED if "evaluate" in flags else "comes before the tiles are put together") in err
        return
    assert code == 0, err
    assert any((tmp_path / "out").rglob("*.png"))


def test_attention_maps_are_drawn_where_the_decoder_can_be_run_in_parts(drive, family):
    code, _, err = drive("--mode", "flow", "--attention_maps")
    assert (code, "its image tokens see each other, so attention is read behind them only" in err) == (
        (2, True) if family == "gemma3" else (0, False)
    )


# LLaVA-1.5

of_llava = pytest.mark.parametrize("family", ["llava"], indirect=True)


@of_llava
def test_llava_draws_the_crop_and_says_so(drive, tmp_path):
    code, out, err = drive("--mode", "single")
    assert code == 0, err
    assert "seen: the processor shows the model only its middle, 112 x 112 of 168 x 112 pixels: that is what is" in out
    for name in ("original_image", "heatmap", "superimposed_result"):
        assert Image.open(tmp_path / f"out/single/{name}.png").size == (112, 112)
    original = np.asarray(Image.open(tmp_path / "out/single/original_image.png").convert("RGB"))
    np.testing.assert_array_equal(original, np.asarray(Image.open(tmp_path / "photo.png"))[:, 28:140])


@of_llava
def test_llava_masks_are_cut_as_the_photo_is(model, processor, drive, tmp_path):
    mask = np.zeros((112, 168), bool)
    mask[10:20, 20:40] = True
    np.testing.assert_array_equal(seen(model, processor, mask), mask[:, 28:140])
    mask[:, 28:] = False
    with pytest.raises(ValueError, match="the object is nothing of what the processor shows the model"):
        seen(model, processor, mask)
    Image.fromarray(mask).convert("L").save(tmp_path / "outside.png")
    code, _, err = drive("--mode", "evaluate", "--layers", "1", "--mask", str(tmp_path / "outside.png"))
    assert code == 2
    assert f"--mask {tmp_path / 'outside.png'}: the object is nothing of what" in err


@of_llava
@pytest.mark.parametrize("size", [(120, 60), (60, 120), (90, 90)])
def test_llava_with_a_processor_that_pads_draws_the_padded_photo(blind, tokenizer, monkeypatch, size):
    """A bright photo on padding: the cells of the photo, and no others, are those of the photo in the picture."""
    images = transformers.LlavaImageProcessor(
        size={"shortest_edge": 84}, crop_size={"height": 84, "width": 84}, do_pad=True
    )
    processor = llava_processor(tokenizer, images)
    reading = read(blind, processor, Image.new("RGB", size, "white"), PROMPT, ANSWER)
    assert reading.photo.size == (max(size), max(size))
    bright = patches_of(reading).mean(1).reshape(reading.grid).numpy() > 1
    drawn = np.asarray(reading.photo.convert("L").resize(reading.grid[::-1], Image.Resampling.BOX)) > 200
    if size[0] == size[1]:
        assert bright.all()
    else:  # the photo fills three of the six rows or columns, with half a cell at each edge
        assert 0 < bright.sum() < 36
    agree = (bright == drawn) | (np.abs(patches_of(reading).mean(1).reshape(reading.grid).numpy() - 1) < 0.8)
    assert agree.all()


@of_llava
def test_llava_has_one_size(folder, drive):
    code, _, err = drive("--max_pixels", "7055")
    assert code == 2
    assert (
        "--max_pixels 7055 is less than 84 x 84 pixels, which this model takes of any photo: give 7056 or more" in err
    )
    assert drive("--max_pixels", "7056")[0] == 0


def changed(folder, tmp_path, name, change):
    """A copy of the folder with another record in one of its JSON files."""
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    record = json.loads((other / name).read_text())
    change(record)
    (other / name).write_text(json.dumps(record))
    return other


@of_llava
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("vision_feature_select_strategy", "full", "with vision_feature_select_strategy 'default': this model takes"),
        ("image_token_index", 7, "has a processor with image token"),
    ],
)
def test_llava_with_the_processor_of_another_is_refused(folder, drive, tmp_path, setting, value, message):
    other = changed(folder, tmp_path, "config.json", lambda record: record.update({setting: value}))
    code, _, err = drive("--model_path", other)
    assert code == 2
    assert message in err


@of_llava
def test_llava_of_pixtrals_kind_is_refused(folder, drive, tmp_path):
    def change(record):
        record["vision_config"]["model_type"] = "pixtral"

    code, _, err = drive("--model_path", changed(folder, tmp_path, "config.json", change))
    assert code == 2
    assert "with a vision tower of type 'clip_vision_model': this model takes 'pixtral'" in err


@of_llava
def test_llavas_usual_number_of_layers_need_not_stand_in_its_config(folder, tmp_path):
    other = changed(folder, tmp_path, "config.json", lambda record: record["text_config"].pop("num_hidden_layers"))
    assert count_layers(str(other)) == transformers.LlamaConfig().num_hidden_layers == 32


@of_llava
def test_modules_of_llavas_vision_tower_are_refused(model, reading):
    layer = model.model.vision_tower.get_submodule(
        "vision_model.encoder.layers.0" if hasattr(model.model.vision_tower, "vision_model") else "encoder.layers.0"
    )
    with pytest.raises(ValueError, match="is in the vision tower, which is not explained here: take the projector"):
        explain(reading, [(0, 3)], [layer], Settings(use_smooth=False))


@of_llava
def test_a_tokenizer_that_makes_texts_longer_is_refused(folder, drive, tmp_path):
    def grow(record):
        record["decoder"]["decoders"].append({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"})

    code, _, err = drive("--model_path", changed(folder, tmp_path, "tokenizer.json", grow))
    assert code == 2
    assert "has a tokenizer.json with a step 'Replace': those are run that cannot make a text longer" in err


@of_llava
def test_videos_are_refused(model, reading):
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration: a video is not supported"):
        known(model).grids(model, reading.inputs, "video")


# InternVL3

of_internvl = pytest.mark.parametrize("family", ["internvl"], indirect=True)


@of_internvl
def test_internvl_has_as_many_tiles_as_max_pixels_allows(folder, model, tokenizer, tmp_path):
    other = tmp_path / "tiles"
    shutil.copytree(folder, other)
    intern_processor(tokenizer, max_patches=12).save_pretrained(other)
    for cap, grid, count in [(10**6, (12, 36), 13), (6 * 7056, (6, 18), 4), (7056, (6, 6), 1)]:
        reading = read(model, load_processor(str(other), cap), make_image(600, 200), PROMPT, ANSWER)
        assert (reading.grid, len(reading.inputs["pixel_values"])) == (grid, count)
    with pytest.raises(
        ValueError, match="--max_pixels 7055 is less than 84 x 84 pixels, which this model takes of any"
    ):
        load_processor(str(other), 7055)


of_tiles = pytest.mark.parametrize("family", ["internvl tiles"], indirect=True)


def halves(size):
    """A photo, dark but for its right half, and that with its top half dark too."""
    photo = np.full((size[1], size[0], 3), 30, np.uint8)
    photo[:, size[0] // 2 :] = 220
    other = photo.copy()
    other[: size[1] // 2] = 30
    return Image.fromarray(photo), Image.fromarray(other)


@of_tiles
@pytest.mark.parametrize(
    ("size", "grid"), [((168, 112), (12, 18)), ((100, 310), (18, 6)), ((200, 200), (12, 12)), ((90, 90), (6, 6))]
)
def test_tiles_lie_on_the_photo_as_the_processor_cuts_it(model, processor, size, grid):
    """Of a photo whose pixels say where they are, each cell's own patch says where it lies."""
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    photo = np.stack([across, down, across], -1).astype(np.uint8)
    reading = read(model, processor, photo, PROMPT, ANSWER)
    assert reading.grid == grid
    means = patches_of(reading)[own_patches(reading)].unflatten(1, (3, -1)).mean(2)  # (N, 3)
    images = processor.image_processor
    places = means * torch.tensor(images.image_std) + torch.tensor(images.image_mean)
    expected = np.stack(np.meshgrid(*((np.arange(count) + 0.5) / count for count in grid[::-1])), -1).reshape(-1, 2)
    np.testing.assert_allclose(places[:, :2].numpy(), expected, atol=0.02)


@of_tiles
def test_what_is_changed_in_the_tiles_changes_in_the_thumbnail(model, processor):
    """As if the processor had got the changed photo."""
    photo, other = halves((168, 112))
    one, two = (read(model, processor, picture, PROMPT, ANSWER) for picture in (photo, other))
    pixels = one.inputs["pixel_values"]
    found = known(model).pictures(repainted(one, other), pixels, one)
    expected = two.inputs["pixel_values"]
    assert len(found) == 7
    assert (expected[-1] - pixels[-1]).abs().mean() > 0.5
    assert (found[-1] - expected[-1]).abs().mean() < 0.03
    torch.testing.assert_close(found[:-1], expected[:-1])


@of_tiles
def test_the_second_of_two_photos_is_explained_by_its_own_tiles(model, processor):
    photos = [halves((168, 112))[0], halves((100, 310))[0]]
    both = read(model, processor, photos, PROMPT, ANSWER)
    assert both.grids == ((12, 18), (18, 6))
    second = both.of(1)
    alone = read(model, processor, photos[1], PROMPT, ANSWER)
    assert torch.equal(patches_of(second)[own_patches(second)], patches_of(alone)[own_patches(alone)])
    changed = known(model).pictures(repainted(second, halves((100, 310))[1]), second.inputs["pixel_values"], second)
    moved = [not torch.equal(*pair) for pair in zip(changed, second.inputs["pixel_values"], strict=True)]
    assert moved == [False] * 7 + [True, True, False, True]
    tokens = image_tokens(both)
    assert photo_tokens(second).tolist() == tokens[7 * 36 :].tolist()
    assert photo_tokens(both).tolist() == tokens.tolist()


@of_tiles
def test_photos_that_do_not_fill_their_tiles_are_refused(model, processor, reading, image):
    grids, inputs = known(model).grids, reading.inputs
    with pytest.raises(ValueError, match="^the processor makes 7 tiles of a photo where 5 x 1 are expected$"):
        grids(model, inputs, "image", [Image.new("RGB", (40, 200))], processor)
    with pytest.raises(ValueError, match="the prompt has 1 pictures, 252 image tokens of 7 tiles, where 2 photos"):
        grids(model, inputs, "image", [image, image], processor)


# LLaVA-OneVision

of_onevision = pytest.mark.parametrize("family", ["llava_onevision"], indirect=True)
SIZES = [(168, 112), (84, 84), (300, 84), (60, 400), (250, 250), (251, 333)]


@of_onevision
@pytest.mark.parametrize("size", SIZES)
def test_onevisions_cells_are_where_the_model_packs_its_tiles(model, processor, size):
    """Told by the model itself, from features that are made up: those of a tile's token say where it lies."""
    reading = read(model, processor, Image.new("RGB", size), PROMPT, ANSWER)
    canvas = select_best_resolution(size[::-1], model.config.image_grid_pinpoints)
    rows, columns = (edge // 84 for edge in canvas)
    down, across = np.meshgrid(np.arange(6 * rows), np.arange(6 * columns), indexing="ij")
    places = torch.tensor(np.stack([down, across], -1), dtype=torch.float32)
    tiles = places.view(rows, 6, columns, 6, 2).transpose(1, 2).reshape(rows * columns, 36, 2)
    packed, _ = model.model.pack_image_features(
        [torch.cat([torch.full((1, 36, 2), -1.0), tiles])],
        torch.tensor([size[::-1]]),
        image_newline=torch.full((2,), -2.0),
        vision_aspect_ratio="anyres_max_4",
    )
    tokens, (height, width) = image_tokens(reading), reading.grid
    assert len(packed[0]) == len(tokens)
    found = packed[0][torch.searchsorted(tokens, reading.positions)].view(height, width, 2).numpy()
    assert (np.delete(packed[0].numpy(), torch.searchsorted(tokens, reading.positions).numpy(), axis=0) < 0).all()
    assert (np.diff(found[..., 0], axis=0) > 0.9).all()  # steps of whole cells, or longer where they are made fewer
    assert (np.diff(found[..., 1], axis=1) > 0.9).all()
    np.testing.assert_allclose(found.mean((0, 1)), [3 * rows - 0.5, 3 * columns - 0.5], atol=1e-4)  # in the middle
    shown = np.minimum(canvas[0] / size[1], canvas[1] / size[0]) * np.array(size[::-1]) / 14  # the photo, in cells
    extent = np.array([np.ptp(found[..., 0]) + found[1, 0, 0] - found[0, 0, 0], np.ptp(found[..., 1])])
    extent[1] += found[0, 1, 1] - found[0, 0, 1]
    assert (extent >= shown - 1.01).all()
    assert (extent <= shown + 2.01).all()


@of_onevision
def test_onevisions_ends_of_lines_are_hidden_with_the_whole_photo_only(reading):
    height, width = reading.grid
    tokens = image_tokens(reading)
    assert torch.equal(photo_tokens(reading), tokens)
    assert len(tokens) == 36 + height * (width + 1)
    ends = tokens[36:].view(height, width + 1)[:, -1]
    almost = np.arange(height * width) > 0
    assert not set(hidden_with(reading, almost).tolist()) & set(ends.tolist())
    assert set(hidden_with(reading, almost | True).tolist()) == set(tokens.tolist())


@of_onevision
def test_the_second_photo_of_onevision_has_its_own_tokens(model, processor):
    photos = [make_image(168, 112), make_image(100, 150)]
    both = read(model, processor, photos, PROMPT, ANSWER)
    second, alone = both.of(1), read(model, processor, photos[1], PROMPT, ANSWER)
    tokens, count = image_tokens(both), len(image_tokens(alone))
    assert second.grid == alone.grid
    assert torch.equal(photo_tokens(second), tokens[-count:])
    half = np.arange(len(alone.positions)) % 2 == 0
    first = int(image_tokens(alone)[0])
    assert (hidden_with(second, half) - tokens[-count]).tolist() == (hidden_with(alone, half) - first).tolist()


@of_onevision
def test_onevision_cuts_a_photo_of_fewer_pixels_into_fewer_tiles(folder, model):
    photo = make_image(250, 250)
    grids = [read(model, load_processor(str(folder), cap), photo, PROMPT, ANSWER).grid for cap in (10**6, 28_000, 7056)]
    assert grids == [(12, 12), (12, 12), (6, 6)]
    tiles = [load_processor(str(folder), cap) for cap in (10**6, 28_000, 7056)]
    counts = [len(read(model, processor, photo, PROMPT, ANSWER).inputs["pixel_values"][0]) - 1 for processor in tiles]
    assert counts == [9, 4, 1]
    with pytest.raises(ValueError, match="--max_pixels 7055 is less than 84 x 84 pixels"):
        load_processor(str(folder), 7055)


@of_onevision
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("vision_aspect_ratio", "anyres_max_9", "with vision_aspect_ratio 'anyres_max_4': this model takes 'anyres_m"),
        ("image_grid_pinpoints", [[84, 84]], "has a processor with image_grid_pinpoints [[84, 84], [84, 168]"),
        ("vision_feature_select_strategy", "default", "with vision_feature_select_strategy 'full': this model takes"),
        ("image_token_index", 7, "has a processor with image token"),
    ],
)
def test_onevision_with_the_processor_of_another_is_refused(folder, drive, tmp_path, setting, value, message):
    other = changed(folder, tmp_path, "config.json", lambda record: record.update({setting: value}))
    code, _, err = drive("--model_path", other)
    assert code == 2
    assert message in err


@of_onevision
def test_onevisions_photos_without_tiles_are_refused(model, reading):
    inputs = reading.inputs | {"batch_num_images": torch.tensor([2])}
    with pytest.raises(ValueError, match="LlavaOnevisionForConditionalGeneration: photos that are shown without tiles"):
        known(model).grids(model, inputs)


# Gemma 3

of_gemma = pytest.mark.parametrize("family", ["gemma3"], indirect=True)


@of_gemma
def test_gemmas_prompt_begins_once(reading, tokenizer):
    """Its template writes the token of the beginning, and its tokenizer would add another."""
    assert reading.inputs["input_ids"][0].tolist().count(tokenizer.bos_token_id) == 1
    assert reading.inputs["input_ids"][0, 0] == tokenizer.bos_token_id


@of_gemma
def test_gemma_is_read_before_its_mlp_where_the_paper_is(model, reading):
    layer = decoder(model)[1]
    pair, tap = {}, "post_attention_layernorm"
    pair["paper"] = found_by_core(reading, [1], rules="plain", tap=tap)[1]
    pair["norm"] = found_by_core(reading, [layer.pre_feedforward_layernorm], rules="plain")[
        "model.language_model.layers.1.pre_feedforward_layernorm"
    ]
    for one, other in zip(pair["paper"], pair["norm"], strict=True):
        torch.testing.assert_close(one, other)


@of_gemma
def test_gemmas_own_norms_pass_gradients_by_the_rule(tokenizer):
    """Of transformers' own class, which multiplies with 1 + w: what comes back is all that the output contributes."""
    norm = decoder(make_model("gemma3", tokenizer, torch.float32))[0].post_feedforward_layernorm
    assert type(norm).__name__ == "Gemma3RMSNorm"
    x = torch.randn(1, 5, 32, requires_grad=True)
    with core.hooked([norm.register_forward_hook(core.identity_rule)]):
        y = norm(x)
    weights = torch.randn(y.shape)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    torch.testing.assert_close((gradient * x).sum(-1), (y * weights).sum(-1), rtol=1e-4, atol=1e-5)


def test_every_family_is_an_entry_with_all_that_is_needed():
    for kind, entry in FAMILIES.items():
        assert len(inspect.signature(entry.grids).parameters) >= 4, kind
        assert len(inspect.signature(entry.seen).parameters) == 2, kind
