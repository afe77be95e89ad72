"""Flow and knockout of Qwen3-VL (features are added in its first layers), of several pictures and of frames.

Each against one plain run of the whole model: with its attention weights, with masks made by hand, or by autograd.
"""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from conftest import make_image
from family_models import (
    ANSWER,
    LAYERS,
    PROMPT,
    SIDES,
    autograd,
    by_the_book,
    decoder,
    make_processor,
    make_random,
)
from flow_by_hand import chosen, full_attention, prompt_length
from test_core import forced_by_hand
from test_video import VIDEO_TEMPLATE

from common.evidence import image_hiding
from smooth_gradcam import Settings, explain, read
from studies import flow
from studies.decoder import embed, picture_positions, stretches, token_groups
from studies.fastv import image_pruned, kept_count, pruned_answer
from studies.flow import (
    attention_flow,
    attention_maps,
    flow_arrays,
    flow_findings,
    flow_rows,
    gradient_flow,
    logit_lens,
    trace_photo,
)
from studies.heads import head_attention
from studies.knockout import Edge, image_hidden, knockout, sever_photo
from studies.video import Video, read_video

CLEAN = Settings(use_smooth=False)
TWO = ("qwen3_vl", "qwen2_5_vl")  # with and without features that are added in the first layers
NUMBERS = {"photo": None, "several": (0, 1, 2), "first": (0,), "ends": (0, 2), "last": (2,), "film": None}


@pytest.fixture(scope="module", params=TWO)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family, tokenizer):
    return make_random(family, tokenizer)


@pytest.fixture(scope="module")
def readings(family, model, tokenizer):
    """Of one photo, of some of three in a prompt, and of four frames."""
    processor, side = make_processor(family, tokenizer), SIDES[family]
    processor.chat_template = VIDEO_TEMPLATE
    photos = [make_image(width * side, height * side) for width, height in ((6, 4), (4, 5), (3, 4))]
    several = read(model, processor, photos, PROMPT, ANSWER)
    frames = [make_image(4 * side, 3 * side).rotate(90 * i).resize((4 * side, 3 * side)) for i in range(4)]
    found = {name: several.of(*numbers) for name, numbers in NUMBERS.items() if numbers}
    found["photo"] = read(model, processor, photos[0], PROMPT, ANSWER)
    return found | {"film": read_video(model, processor, Video(frames), PROMPT, ANSWER)}


@pytest.fixture(params=NUMBERS)
def reading(readings, request):
    return readings[request.param]


@pytest.fixture(scope="module")
def by_rules(model):
    return by_the_book(model, "attnlrp")


# oracles


def names_by_hand(reading):
    """The group of each of the L positions, by counting image tokens: those of the first picture, and so on."""
    config, ids = reading.model.config, reading.inputs["input_ids"][0].tolist()
    grids = reading.inputs.get("image_grid_thw", reading.inputs.get("video_grid_thw"))
    sizes = [rows * columns // 4 for frames, rows, columns in grids.tolist() for _ in range(frames)]  # of image tokens
    owner = iter([number for number, size in enumerate(sizes) for _ in range(size)])
    names, seen = [], False
    for token in ids[:-1]:
        if token in (config.image_token_id, config.video_token_id):
            own = next(owner) in reading.numbers
            seen |= own
            names.append("image" if own else "other images")
        else:
            names.append("user" if seen else "system")
    assert next(owner, None) is None
    return np.array(names + ["answer"] * (1 + len(reading.tokens)))


def places(reading, *groups):
    return np.flatnonzero(np.isin(names_by_hand(reading), groups))


def logits_by_hand(reading, edge, tokens):
    """(L, V) of one plain run of the whole model on prompt and tokens, with a mask of its own in each of the layers."""
    forced = forced_by_hand(reading.inputs, tokens)
    length = forced["input_ids"].shape[1]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    hidden[np.ix_(edge.queries[edge.queries < length], edge.keys[edge.keys < length])] = True
    mask = torch.zeros(1, 1, length, length, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    handles = [
        decoder(reading.model)[i].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
        )
        for i in edge.layers
    ]
    try:
        with torch.no_grad():
            return reading.model(**forced, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def probabilities_by_hand(reading, edge):
    before, count = prompt_length(reading) - 1, len(reading.tokens)
    logits = logits_by_hand(reading, edge, reading.tokens)[before : before + count]
    return logits.softmax(-1)[range(count), reading.tokens].numpy()


def behind(reading, *groups):
    """The positions of these groups that stand behind the first explained image token."""
    found = places(reading, *groups)
    return found[found > places(reading, "image")[0]]


def truncation(reading, layer, keys=None):
    later = behind(reading, "user", "answer", "other images")
    return Edge(range(layer, LAYERS), later, places(reading, "image") if keys is None else keys)


# what the decoder is given


def test_groups_are_those_counted_by_hand_and_in_stretches(reading):
    groups, names = token_groups(reading), names_by_hand(reading)
    assert set(groups) == set(names)
    for name, positions in groups.items():
        assert positions.tolist() == np.flatnonzero(names == name).tolist()
    assert [name for name, start, stop in stretches(reading) for _ in range(start, stop)] == names.tolist()
    assert all(a[0] != b[0] for a, b in zip(stretches(reading), stretches(reading)[1:], strict=False))


def test_each_group_is_there_where_it_should_be(readings):
    """Text between pictures is behind the first explained one; a prompt's own pictures are other ones."""
    kinds = {name: [name for name, *_ in stretches(reading)] for name, reading in readings.items()}
    assert kinds["photo"] == ["system", "image", "user", "answer"]
    assert kinds["several"] == ["system", "image", "user", "image", "user", "image", "user", "answer"]
    assert kinds["first"] == ["system", "image", "user", "other images", "user", "other images", "user", "answer"]
    assert kinds["last"] == ["system", "other images", "system", "other images", "system", "image", "user", "answer"]


def test_features_are_added_at_the_pictures_and_in_the_layers_where_the_model_adds_them(reading, family):
    given, total = embed(reading), LAYERS
    outputs, inputs = {}, {}
    handles = []
    for i, layer in enumerate(decoder(reading.model)):
        handles.append(layer.register_forward_hook(
            lambda m, args, out, i=i: outputs.update({i: (out[0] if isinstance(out, tuple) else out).clone()})
        ))  # fmt: skip
        handles.append(layer.register_forward_pre_hook(lambda m, args, i=i: inputs.update({i: args[0].clone()})))
    with torch.no_grad():
        reading.model(**forced_by_hand(reading.inputs, reading.tokens[:-1]), use_cache=False)
    for handle in handles:
        handle.remove()
    expected = [inputs[i + 1] - outputs[i] for i in range(total - 1)]
    count = 2 if family == "qwen3_vl" else 0
    assert [bool(part.abs().max() > 1e-3) for part in expected] == [i < count for i in range(total - 1)]
    assert len(given.added) == count
    for found, part in zip(given.added, expected, strict=False):
        torch.testing.assert_close(found, part, rtol=1e-6, atol=1e-9)
        assert set(part[0].abs().amax(-1).nonzero()[:, 0].tolist()) == set(picture_positions(reading).tolist())


# flow


@pytest.mark.parametrize("word", [None, "cat"])
def test_attention_flow_is_the_mean_of_the_models_attention(reading, word):
    span, rows = chosen(reading, word)
    found, full = attention_flow(reading, span), full_attention(reading)
    np.testing.assert_allclose(found, full[:, :, rows].mean((1, 2)), rtol=1e-4, atol=1e-7)
    per_head = head_attention(reading, span or (0, len(reading.answer)))
    np.testing.assert_allclose(per_head, full[:, :, rows][..., reading.positions].mean(2), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_attention_maps_are_the_models_attention_averaged_over_stretches(reading, monkeypatch, chunk):
    """Whatever part of the pictures a run begins and ends with."""
    monkeypatch.setattr(flow, "CHUNK", chunk)
    maps, edges = attention_maps(reading, [LAYERS - 1, 1])
    names, full = names_by_hand(reading)[:-1], full_attention(reading)
    bins = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    assert edges[-1] == len(names)
    assert all(len(set(names[one])) == 1 and one.stop - one.start <= 10 for one in bins)
    for layer, found in maps.items():
        mean, sees = full[layer].mean(0), np.tri(full.shape[-1], dtype=bool)
        cells = [(mean[a, b], sees[a, b]) for a in bins for b in bins]
        expected = [part[seen].mean() if seen.any() else np.nan for part, seen in cells]
        np.testing.assert_allclose(found.ravel(), expected, rtol=1e-4, atol=1e-7)


def test_gradient_flow_is_gradient_times_hidden_state_by_the_book(reading, by_rules):
    found = gradient_flow(reading)
    for layer, (features, gradient) in autograd(by_rules, reading, decoder(by_rules), reading.tokens).items():
        expected = (features * gradient)[0].sum(-1).abs().numpy()
        np.testing.assert_allclose(found[layer], expected, rtol=1e-5, atol=1e-6 * expected.max())


def test_probability_after_each_layer_is_by_the_final_norm_and_head(reading):
    span, rows = chosen(reading, "cat")
    model, states = reading.model, []

    def note(module, args, output):
        states.append((output[0] if isinstance(output, tuple) else output)[0, rows].clone())

    handles = [layer.register_forward_hook(note) for layer in decoder(model)]
    with torch.no_grad():
        logits = model(**forced_by_hand(reading.inputs, reading.tokens), use_cache=False).logits[0, rows]
        found = [model.lm_head(model.model.language_model.norm(state)) for state in states[:-1]]
    for handle in handles:
        handle.remove()
    tokens = [reading.tokens[row - prompt_length(reading) + 1] for row in rows]
    expected = torch.stack([*found, logits]).softmax(-1)[:, range(len(rows)), tokens]
    np.testing.assert_allclose(logit_lens(reading, span), expected, rtol=1e-6)


def test_traced_pictures_have_their_maps_and_the_groups_their_shares(readings, reading):
    """In the tables beside a plain photo, whose prompt has no other images."""
    traced = [trace_photo(readings["photo"], None, CLEAN), trace_photo(reading, (0, len(ANSWER)), CLEAN)]
    own = explain(reading, [(0, len(ANSWER))], range(LAYERS), CLEAN)
    arrays, names = flow_arrays(traced[1:], ["own"]), names_by_hand(reading)
    for j, (maps, found) in enumerate(zip(own, traced[1].pictures, strict=True)):
        stored = arrays[f"maps_0_{j}" if j else "maps_0"]
        for layer, cam in maps.maps.items():
            np.testing.assert_array_equal(found.maps[layer], cam)
            np.testing.assert_array_equal(stored[layer], cam)
    lengths = np.diff(arrays["groups_0"])[:, 0]
    assert arrays["groups"][np.repeat(arrays["group_0"], lengths)].tolist() == names.tolist()
    mean = full_attention(reading)[:, :, prompt_length(reading) - 1 : -1].mean((1, 2))
    rows = flow_rows(traced, ["photo", "own"])
    for layer, row in enumerate(rows[LAYERS:]):
        for name in set(names):
            found = float(row[f"attention_{name.replace(' ', '_')}"])
            assert found == pytest.approx(mean[layer][names == name].sum(), rel=1e-3)
            if name != "answer":
                share = mean[layer][names == name].sum() / mean[layer][names != "answer"].sum()
                assert float(row[f"share_{name.replace(' ', '_')}"]) == pytest.approx(share, rel=1e-3)
    assert {float(row.get("attention_other_images", 0)) for row in rows[:LAYERS]} == {0}
    assert ("attention_other_images" in rows[0]) == ("other images" in names)


def test_findings_name_other_images_where_there_are_any():
    shares = {name: np.array([value]) for name, value in (("system", 0.3), ("image", 0.2), ("user", 0.1))}
    shares["other images"] = np.array([0.4])
    sizes = {"system": 3, "image": 4, "user": 1, "other images": 2}
    attention, _ = flow_findings(shares, sizes, {"image": np.array([0.5])})
    assert "0.20 (layer 0) to 0.20 (layer 0) of what system, image, user and other images' tokens get" in attention
    assert "a system token 2.0, a user token 2.0 and another image's 4.0 times as much as an image token" in attention


# knockout


def test_truncation_hides_the_pictures_from_all_that_is_none_of_them(reading):
    """Also from the text between them, and other images behind them; what is added to them stays."""
    found = sever_photo(reading)
    expected = np.stack([probabilities_by_hand(reading, truncation(reading, k)) for k in range(LAYERS + 1)])
    np.testing.assert_allclose(found.removed, expected, rtol=1e-5)
    assert np.abs(expected[1:] / expected[:-1] - 1).max(1).min() > 1e-3  # or there is nothing to tell


def test_kept_tokens_are_those_with_most_attention_in_the_layer_before(reading):
    span, rows = chosen(reading, "cat")
    found, image = sever_photo(reading, span, keep=3), places(reading, "image")
    full = full_attention(reading)[:, :, rows].mean((1, 2))
    for layer in range(1, LAYERS + 1):
        hidden = image[np.argsort(full[layer - 1][image])[:-3]]
        expected = probabilities_by_hand(reading, truncation(reading, layer, hidden))
        np.testing.assert_allclose(found.kept[layer], expected, rtol=1e-5)


def test_windows_block_each_edge_in_the_layers_around(reading):
    found = sever_photo(reading, window=2)
    pairs = [("image", "user"), ("image", "answer"), ("user", "answer"), ("answer", "answer")]
    if "other images" in names_by_hand(reading):
        pairs += [("other images", "user"), ("other images", "answer")]
    assert set(found.windows) == {f"{a} → {b}" for a, b in pairs}
    for a, b in pairs:
        for layer in (0, 1, LAYERS - 1):
            edge = Edge(range(max(layer - 1, 0), layer + 1), places(reading, b), places(reading, a))
            expected = probabilities_by_hand(reading, edge)
            np.testing.assert_allclose(found.windows[f"{a} → {b}"][layer], expected, rtol=1e-5)


def test_runs_may_begin_inside_a_picture(reading):
    """Only the rest of the features is then added; in several runs at once as in one."""
    image, rng = places(reading, "image"), np.random.default_rng(0)
    length = len(names_by_hand(reading))
    edges = [Edge(range(1, 4), np.arange(start, length), rng.permutation(image)[:9]) for start in image[[3, 5, -2]]]
    found = knockout(reading, edges, batch_size=2)[0]
    expected = np.stack([probabilities_by_hand(reading, edge) for edge in edges])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_answer_without_any_picture_is_the_same_for_all(readings, reading):
    inputs = dict(reading.inputs)
    inputs[reading.pixels] = inputs[reading.pixels].flip(0) * 0.5
    other = dataclasses.replace(reading, inputs=inputs)
    (one, *_, whole), (another, *_, other_whole) = sever_photo(reading).removed, sever_photo(other).removed
    assert np.abs(whole / other_whole - 1).max() > 1e-2
    same = "other images" not in token_groups(reading)  # whose pixels have changed too
    assert np.allclose(one, another, rtol=1e-6) == same


def test_hidden_everywhere_is_hidden_as_evidence_hides_it(readings):
    for name in ("photo", "first", "last"):
        with image_hiding(readings[name]) as hide:
            hidden = hide(np.ones((1, len(readings[name].positions)), bool))[0]
        np.testing.assert_allclose(sever_photo(readings[name]).removed[0], hidden, rtol=1e-6)


# generation


@pytest.mark.parametrize("layer", [0, 1, 3, LAYERS])
def test_generation_without_the_pictures_is_greedy_search_with_masks_by_hand(reading, layer):
    pictures = places(reading, "image", "other images")
    text = np.setdiff1d(np.arange(1000), pictures)
    with image_hidden(reading.model, layer):
        output = reading.model.generate(**reading.inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    found, tokens = output[0, prompt_length(reading) :].tolist(), []
    for _ in found:
        tokens.append(logits_by_hand(reading, Edge(range(layer, LAYERS), text, pictures), tokens)[-1].argmax().item())
    assert found == tokens


@pytest.mark.parametrize("layer", [0, 1, 2, LAYERS - 1])
def test_logits_without_the_pictures_are_those_of_the_mask_by_hand(reading, layer):
    pictures = places(reading, "image", "other images")
    text = np.setdiff1d(np.arange(1000), pictures)
    with image_hidden(reading.model, layer), torch.no_grad():
        found = reading.model(**reading.inputs).logits[0]
    expected = logits_by_hand(reading, Edge(range(layer, LAYERS), text, pictures), [])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("layer", "removed"), [(1, 50), (2, 75), (3, 25)])
def test_removed_tokens_are_hidden_from_all_others(reading, layer, removed):
    """From layer 1 on, the features behind layers 1 and 2 are added to the tokens that are left."""
    probabilities, _, left = pruned_answer(reading, layer, removed)
    image, prompt = places(reading, "image"), prompt_length(reading)
    ranking = full_attention(reading)[layer - 1, :, prompt - 1, :prompt].mean(0)[image]
    best = image[np.argsort(-ranking)[: kept_count(len(image), removed)]]
    assert left == [i for i in range(prompt) if i not in image or i in best]
    gone, length = np.setdiff1d(np.arange(prompt), left), prompt + len(reading.tokens)
    expected = probabilities_by_hand(reading, Edge(range(layer, LAYERS), np.setdiff1d(np.arange(length), gone), gone))
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)


def test_generation_with_fewer_tokens_goes_on_as_it_began(reading):
    before = copy.deepcopy(reading.model.state_dict())
    with image_pruned(reading, 1, 60) as kept:
        output = reading.model.generate(**reading.inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    found, tokens, prompt = output[0, prompt_length(reading) :].tolist(), [], prompt_length(reading)
    gone = np.setdiff1d(np.arange(prompt), kept.positions)
    for _ in found:
        edge = Edge(range(1, LAYERS), np.setdiff1d(np.arange(1000), gone), gone)
        tokens.append(logits_by_hand(reading, edge, tokens)[-1].argmax().item())
    assert found == tokens
    assert all(torch.equal(value, before[name]) for name, value in reading.model.state_dict().items())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in decoder(reading.model))
