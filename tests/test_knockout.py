"""What needs the photo: against masks made by hand."""

import copy
import csv
import dataclasses
import io

import numpy as np
import pytest
import torch
from conftest import DESCRIBE, make_image
from flow_by_hand import GROUPS, LAYERS, chosen, full_attention, names_by_hand, prompt_length
from PIL import Image, ImageOps
from test_core import ANSWER, PROMPT, decoder, forced_by_hand, state_of, unruly

from common.passes import token_probabilities
from smooth_gradcam import find_target, read, score_parts
from studies.flow import attention_flow, attention_maps, gradient_flow
from studies.knockout import (
    Edge,
    Severed,
    change,
    cliff_interval,
    find_cliff,
    find_onset,
    image_hidden,
    knockout,
    largest_change,
    mean_change,
    sever_photo,
    tokens_that_need_the_photo,
    truncation_finding,
)
from studies.knockout_figures import sever
from studies.randomization import randomize_weights


@pytest.fixture(scope="module")
def reading(model, processor, image):
    return read(model, processor, image, PROMPT, ANSWER)


@pytest.fixture(scope="module")
def own(model, processor, image):
    """The model's own, greedy answer."""
    return read(model, processor, image, PROMPT, max_new_tokens=6)


@pytest.fixture(scope="module")
def full(reading):
    return full_attention(reading)


# knockout


def truncation(reading, layer):
    """The image hidden from this layer on from all behind it, however long the answer."""
    first, last = int(reading.positions[0]), int(reading.positions[-1])
    return Edge(range(layer, LAYERS), np.arange(last + 1, 1000), np.arange(first, last + 1))


def positions_by_hand(reading, length):
    """(3, 1, L): the image's tokens stand at their row and column, the text behind goes on from its longer side."""
    (height, width), first = reading.grid, int(reading.positions[0])
    rows, columns = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    behind = torch.arange(length - first - height * width) + max(height, width)
    text = torch.arange(-first, 0)
    places = [torch.cat([text, part, behind]) for part in (0 * rows, rows, columns)]
    return first + torch.stack(places)[:, None]


def logits_by_hand(reading, edge, tokens):
    """(L, V) of one plain forward of prompt and tokens, each layer with a mask of its own; no eager attention."""
    forced = forced_by_hand(reading.inputs, tokens)
    length = forced["input_ids"].shape[1]
    causal = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
    masked = causal.clone()
    for query in edge.queries[edge.queries < length]:
        masked[query, edge.keys[edge.keys < length]] = -torch.inf

    def mask(module, args, kwargs):
        return args, kwargs | {"attention_mask": masked[None, None]}

    layers = [decoder(reading.model)[i].self_attn for i in edge.layers]
    handles = [layer.register_forward_pre_hook(mask, with_kwargs=True) for layer in layers]
    forced |= {"attention_mask": causal[None, None], "position_ids": positions_by_hand(reading, length)}
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


def random_edges(reading, first, seed=0):
    """Of each stretch of layers one; the first position is always seen, so that no query sees nothing."""
    rng = np.random.default_rng(seed)
    length = prompt_length(reading) + len(reading.tokens)
    stretches = [range(LAYERS), range(1), range(1, 2), range(2, LAYERS), range(1, LAYERS)]
    places = [(rng.permutation(np.arange(first, length))[:50], rng.permutation(length - 1)[:50] + 1) for _ in stretches]
    return [Edge(layers, *where) for layers, where in zip(stretches, places, strict=True)]


@pytest.mark.parametrize("first", [0, 1, 50, 95])
def test_blocked_edge_is_a_mask_in_its_layers(reading, first):
    edges = random_edges(reading, first, seed=first)
    probabilities, _ = knockout(reading, edges, batch_size=2)
    expected = np.stack([probabilities_by_hand(reading, edge) for edge in edges])
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
    assert all(not np.allclose(row, expected[0], rtol=1e-2) for row in expected[1:])  # or there is nothing to tell


def test_edge_blocked_in_all_layers_is_the_mask_of_the_whole_model(model, reading):
    edge, forced = random_edges(reading, 50)[0], forced_by_hand(reading.inputs, reading.tokens)
    length, before = forced["input_ids"].shape[1], prompt_length(reading) - 1
    hidden = torch.ones(length, length).triu(1).bool()
    hidden[np.ix_(edge.queries, edge.keys)] = True
    mask = torch.zeros(1, 1, length, length, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    forced |= {"attention_mask": mask, "position_ids": positions_by_hand(reading, length)}
    with torch.no_grad():
        logits = model(**forced).logits[0, before:-1]
    expected = logits.softmax(-1)[range(len(reading.tokens)), reading.tokens]
    np.testing.assert_allclose(knockout(reading, [edge])[0][0], expected, rtol=1e-5)


def test_edge_that_hides_nothing_changes_no_bit_and_gives_the_plain_forwards_probabilities(reading):
    _, queries, keys = truncation(reading, 0)
    nowhere = Edge(range(LAYERS, LAYERS), queries, keys)
    no_key = Edge(range(LAYERS), queries, keys[:0])
    future = Edge(range(LAYERS), queries[:1], queries[1:])  # causality hides it anyway
    found = [knockout(reading, [edge])[0] for edge in (nowhere, no_key, future)]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    forced, (scored,) = score_parts(reading.inputs, reading.tokens, [range(len(reading.tokens))])
    expected = token_probabilities(reading, forced, reading.inputs["pixel_values"][None], scored)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)


def test_runs_of_a_batch_do_not_mix(reading):
    edges = [*random_edges(reading, 50), *(truncation(reading, i) for i in range(LAYERS + 1))]
    alone = [knockout(reading, [edge]) for edge in edges]
    for size in (1, 4, 100):
        probabilities, top = knockout(reading, edges, batch_size=size)
        np.testing.assert_allclose(probabilities, np.concatenate([found for found, _ in alone]), rtol=1e-6)
        np.testing.assert_array_equal(top, np.concatenate([found for _, found in alone]))


def test_progress_wraps_the_batches(reading):
    seen = []

    def progress(items):
        for item in items:
            seen.append(item)
            yield item

    knockout(reading, [truncation(reading, 0)] * 5, batch_size=2, progress=progress)
    assert len(seen) == 3


@pytest.mark.parametrize("size", [0, 1.5])
def test_bad_batch_size_is_named(reading, size):
    with pytest.raises(ValueError, match=f"^batch_size={size} must be"):
        knockout(reading, [truncation(reading, 0)], batch_size=size)


def test_answer_without_the_image_is_the_same_for_any_photo(model, processor, image, reading):
    other = read(model, processor, ImageOps.invert(image), PROMPT, ANSWER)
    edges = [truncation(reading, i) for i in range(LAYERS + 1)]
    (one, _), (another, _) = knockout(reading, edges), knockout(other, edges)
    np.testing.assert_allclose(one[0], another[0], rtol=0, atol=1e-8)
    for i in range(1, LAYERS + 1):
        assert np.abs(one[i] / another[i] - 1).max() > 0.05


def test_most_likely_tokens_are_those_of_greedy_generation(own):
    nothing = truncation(own, LAYERS)
    assert knockout(own, [nothing])[1].all()
    tokens = [*own.tokens[:3], own.tokens[3] - 1, *own.tokens[4:]]
    assert knockout(dataclasses.replace(own, tokens=tokens), [nothing])[1][0, :4].tolist() == [True] * 3 + [False]


# generation without the image


def generated(model, inputs, count=5):
    output = model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("layer", range(LAYERS + 1))
def test_generation_without_the_image_is_greedy_search_with_masks_by_hand(model, reading, layer):
    with image_hidden(model, layer):
        (found,) = generated(model, reading.inputs)
    tokens = []
    for _ in found:
        tokens.append(logits_by_hand(reading, truncation(reading, layer), tokens)[-1].argmax().item())
    assert found == tokens
    assert (found == generated(model, reading.inputs)[0]) == (layer == LAYERS)  # hidden nowhere
    _, top = knockout(dataclasses.replace(reading, tokens=tokens), [truncation(reading, layer)])
    assert top.all()


def test_logits_without_the_image_are_those_of_the_mask_by_hand(model, reading):
    for layer in range(LAYERS + 1):
        with image_hidden(model, layer), torch.no_grad():
            found = model(**reading.inputs).logits[0]
        torch.testing.assert_close(found, logits_by_hand(reading, truncation(reading, layer), []), rtol=1e-5, atol=1e-5)


def test_image_is_hidden_from_each_prompt_of_a_padded_batch(make_model, processor, image, reading):
    model = make_model(torch.float32)  # eager attention gives nan for padding in float64, whatever is hidden
    photos, prompts = [image, make_image(112, 168), make_image(168, 168)], [PROMPT, "What is it, and where?", "What?"]
    alone = [read(model, processor, *pair, ANSWER).inputs for pair in zip(photos, prompts, strict=True)]
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
            add_generation_prompt=True,
        )
        for prompt in prompts
    ]
    options = {"padding": True, "padding_side": "left", "return_mm_token_type_ids": True, "return_tensors": "pt"}
    batch = processor(text=texts, images=photos, **options)
    assert (batch["attention_mask"] == 0).any(1).sum() == 2
    batch = {name: batch[name] for name in reading.inputs}
    for layer in (0, 1, LAYERS):
        with image_hidden(model, layer):
            assert generated(model, batch) == [generated(model, inputs)[0] for inputs in alone]


@pytest.mark.parametrize("layer", [-1, LAYERS + 1, 0.5])
def test_image_cannot_be_hidden_from_layers_that_do_not_exist(model, layer):
    with pytest.raises(ValueError, match=str(layer)), image_hidden(model, layer):
        pass


# the model stays as it is


def generate_hidden(reading):
    with image_hidden(reading.model, 1):
        generated(reading.model, reading.inputs, 2)


USES = {
    "attention_flow": attention_flow,
    "attention_maps": lambda reading: attention_maps(reading, [0, 2]),
    "gradient_flow": gradient_flow,
    "knockout": lambda reading: knockout(reading, random_edges(reading, 50)),
    "sever_photo": lambda reading: sever_photo(reading, window=2, keep=3),
    "image_hidden": generate_hidden,
}


def whole_state(model, image, name):
    config, text = model.config, model.model.language_model.config
    state = state_of(model, image) | {"attention": (config._attn_implementation, text._attn_implementation)}
    state |= {"bits": [p.detach().numpy().tobytes() for p in model.parameters()]}
    return {key: value for key, value in state.items() if (key, name) != ("positions", "image_hidden")}  # generate's


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("stumbling", ["nowhere", "at once", "inside"])
def test_model_is_as_before_whatever_happens(make_model, processor, image, name, stumbling):
    model = unruly(make_model)
    reading = read(model, processor, image, PROMPT, ANSWER)
    config = model.model.language_model.config
    plain, reached = config._attn_implementation, []

    def stumble(*_):
        reached.append(config._attn_implementation)
        if stumbling == "at once" or stumbling == "inside" and reached[-1] != plain:
            raise KeyError("stumble")

    decoder(model)[2].register_forward_pre_hook(stumble)
    before = whole_state(model, image, name)
    if stumbling == "nowhere" or stumbling == "inside" and name == "gradient_flow":  # which computes as the model does
        USES[name](reading)
    else:
        with pytest.raises(KeyError, match="stumble"):
            USES[name](reading)
    assert reached
    assert whole_state(model, image, name) == before


# cliff and onset


CURVES = {
    "a rise": ([0.1, 0.1, 0.5, 0.97, 1], 3),
    "a dip behind the rise": ([0.1, 0.96, 1, 0.9, 1, 1], 4),
    "a rise beyond the full value": ([0.1, 0.5, 1.0, 0.9, 0.8], 2),
    "needed to the end": ([0.1, 0.2, 0.3, 0.94, 1], 4),
    "exactly as much as counts": ([0.5, 1.9, 2], 1),
    "four fifths are left": ([0.8, 0.5, 1, 1], None),
    "flat": ([0.5] * 5, None),
    "next to flat": ([0.96, 0.99, 0.97, 1], None),
    "better without": ([1, 0.9, 0.8], None),
    "nothing to lose": ([0, 0, 0.0099], None),
    "a little to lose": ([0, 0, 0.0101], 2),
}


@pytest.mark.parametrize("name", CURVES)
def test_cliff_by_hand(name):
    curve, expected = CURVES[name]
    assert find_cliff(np.array(curve)) == expected


def test_cliff_follows_what_counts_as_kept():
    curve = np.array([0.1, 0.3, 0.6, 0.8, 1])
    assert [find_cliff(curve, kept) for kept in (0.05, 0.25, 0.5, 0.7, 0.9)] == [None, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("curve", "onset"),
    [([0, 0, 0, 1, 1], 2), ([0, 0.04, 0.05, 0.06, 1], 2), ([0, 0.5, 1], 0), ([0.5, 0.52, 0.6, 1], 1), ([0, 0, 1], 1)],
)
def test_onset_by_hand(curve, onset):
    assert find_onset(np.array(curve)) == onset


def test_photos_that_agree_have_one_cliff():
    curves = np.tile(CURVES["a rise"][0], (7, 1))
    assert cliff_interval(curves) == (3, 3)
    assert cliff_interval(np.full((7, 5), 0.5)) is None


def test_cliffs_of_resampled_photos_lie_around_that_of_all():
    layers, rng = np.arange(29), np.random.default_rng(1)
    curves = 1 / (1 + np.exp(rng.normal(14, 3, (12, 1)) - layers))
    low, high = cliff_interval(curves)
    cliffs = [find_cliff(curve) for curve in curves]
    assert min(cliffs) <= low <= find_cliff(curves.mean(0)) <= high <= max(cliffs)
    assert low < high


def test_few_cliffs_among_resampled_photos_are_none():
    curves = np.tile([0.2] * 5, (10, 1))
    curves[0] = [0, 0, 1, 1, 1]  # 0.28 falls to 0.18: a third of the draws leave it out
    assert find_cliff(curves.mean(0)) is not None
    assert cliff_interval(curves) is None


def test_finding_names_the_cliff_and_what_is_left_there():
    found = truncation_finding(np.array([CURVES["a rise"][0]]), "p")
    assert found.startswith(
        "hidden from layer 1 or earlier, the image might as well not be there; from layer 3 on it can"
    )
    assert "be removed: p 0.100 without it, 1.000 with it, 0.970 if hidden from 3 on" in found
    assert "half of it or more from layer 2 on" in found
    assert "cliff at" not in found  # of one photo
    assert "cliff at" not in truncation_finding(np.tile(CURVES["a rise"][0], (9, 1)), "p")  # too few to tell
    found = truncation_finding(np.tile(CURVES["a rise"][0], (10, 1)), "p")
    assert "(cliff at 3 to 3 in 95 % of resampled photos)" in found
    found = truncation_finding(np.array([[0, 0, 1, 1]]), "accuracy")
    assert "layer 1 or earlier" in found
    assert "from layer 2 on it can be removed: accuracy 0.000 without it, 1.000 with it" in found
    assert "; the image is needed to the last layer: p" in truncation_finding(np.array([[0, 0, 0.2, 0.3, 1]]), "p")


@pytest.mark.parametrize("curve", [[0.8, 0.1, 0.8], [0.5, 0.4, 0.5, 0.5], [0.9, 0.1, 0.8], [0.937, 0.9, 0.11, 1]])
def test_a_dip_is_no_cliff_where_the_photo_does_not_help(curve):
    assert find_cliff(np.array(curve)) is None
    assert "hardly needs the photo" in truncation_finding(np.array([curve]), "p")


def test_no_edge_and_a_layer_that_is_not_there_are_told(reading):
    with pytest.raises(ValueError, match=r"edges=\[\] is no run"):
        knockout(reading, [])
    with pytest.raises(ValueError, match="layer 3 does not exist"):
        attention_maps(reading, [3])
    assert list(attention_maps(reading, [-1])[0]) == [2]


def test_a_prompt_without_image_is_not_blinded_by_the_one_before(model, own):
    text = {"input_ids": torch.arange(300)[None] % 90 + 100}
    with torch.no_grad():
        usual = model(**text).logits
        with image_hidden(model, 0):
            model(**own.inputs)
            torch.testing.assert_close(model(**text).logits, usual, atol=1e-4, rtol=0)  # eager attention


def test_finding_says_where_there_is_no_cliff(reading):
    chance = np.random.default_rng(0).normal(0.25, 0.02, (50, 29))
    assert truncation_finding(chance, "p").endswith("so the answer hardly needs the photo")
    nothing = truncation_finding(np.array([[0, 0, 0.005]]), "p")
    assert nothing == "no cliff: p is 0.0050 with the whole image, so there is nothing to lose"
    untrained = sever_photo(reading)  # no answer of such a model's own
    assert truncation_finding(untrained.removed.mean(1)[None], "p").startswith("no cliff")


# the sweep of one photo


def test_truncation_keeps_the_tokens_with_most_attention_in_the_layer_before(reading, full):
    span, rows = chosen(reading, "cat")
    found = sever_photo(reading, span, keep=3)
    assert found.explained == reading.tokens_of(span)
    image = reading.positions.numpy()
    for layer in range(LAYERS + 1):
        edge = truncation(reading, layer)
        np.testing.assert_allclose(found.removed[layer], probabilities_by_hand(reading, edge), rtol=1e-5)
        attention = full[layer - 1][:, rows].mean((0, 1))[image]
        hidden = image[np.argsort(attention)[:-3]] if layer else image  # before the first layer nothing is known
        expected = probabilities_by_hand(reading, edge._replace(keys=hidden))
        np.testing.assert_allclose(found.kept[layer], expected, rtol=1e-5)


def test_windows_block_each_edge_in_the_layers_around(reading):
    mask = np.zeros((112, 168), bool)
    mask[:28, :56] = True
    found = sever_photo(reading, window=2, mask=mask)
    names = np.array(names_by_hand(reading))
    places = {name: np.flatnonzero(names == name) for name in GROUPS}
    places |= {"object": places["image"][:2], "other patches": places["image"][2:]}
    pairs = [(a, b) for a in ("image", "object", "other patches") for b in ("user", "answer")]
    pairs += [("user", "answer"), ("answer", "answer")]  # of which a token sees itself and those before it
    assert set(found.windows) == {f"{a} → {b}" for a, b in pairs}
    for a, b in pairs:
        for layer in range(LAYERS):
            edge = Edge(range(max(layer - 1, 0), layer + 1), places[b], places[a])
            expected = probabilities_by_hand(reading, edge)
            np.testing.assert_allclose(found.windows[f"{a} → {b}"][layer], expected, rtol=1e-5)


def test_each_run_of_a_sweep_lands_in_its_own_curve(reading, monkeypatch):
    """Runs that are told apart by their numbers: the image hidden, all but the kept ones, then windows."""
    count = len(reading.tokens)
    right = np.array([True, False, False, True, False, True, True, False, *[True] * 12])  # of 4, 4 and 4 times 3 runs
    runs = np.arange(len(right))[:, None] + np.arange(count) / 100
    likeliest = np.repeat(right[:, None], count, 1)
    likeliest[~right, 1:] = True  # one token that is not the likeliest spoils the answer
    monkeypatch.setattr("studies.knockout.knockout", lambda reading, edges, **_: (runs[: len(edges)], likeliest))
    found = sever_photo(reading, keep=3, window=1)
    np.testing.assert_array_equal(found.removed, runs[:4])
    np.testing.assert_array_equal(found.kept, runs[4:8])
    assert found.right.tolist() == right[:4].tolist()
    assert found.kept_right.tolist() == right[4:8].tolist()
    for i, values in enumerate(found.windows.values()):
        np.testing.assert_array_equal(values, runs[8 + 3 * i : 11 + 3 * i])
    alone = sever_photo(reading, window=1)
    assert (alone.kept, alone.kept_right) == (None, None)
    np.testing.assert_array_equal(alone.windows["image → user"], runs[4:7])


@pytest.mark.parametrize(
    ("window", "layers"),
    [(1, [[0], [1], [2]]), (2, [[0], [0, 1], [1, 2]]), (3, [[0, 1], [0, 1, 2], [1, 2]])],
)
def test_windows_are_so_many_layers_around_each(reading, monkeypatch, window, layers):
    asked = []

    def note(reading, edges, **_):
        asked.extend(edges)
        values = np.zeros((len(edges), len(reading.tokens)))
        return values, values > 0

    monkeypatch.setattr("studies.knockout.knockout", note)
    sever_photo(reading, window=window)
    assert [list(edge.layers) for edge in asked[:4]] == [[0, 1, 2], [1, 2], [2], []]  # the truncation
    assert [list(edge.layers) for edge in asked[4:]] == 4 * layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep=0 must be 1 to 23: the photo has 24 image tokens"),
        ({"keep": 24}, "keep=24 must be 1 to 23"),
        ({"window": 0}, "window=0 must be 1 to 3: the model has 3 layers"),
        ({"window": 4}, "window=4 must be 1 to 3"),
    ],
)
def test_more_than_there_is_cannot_be_kept_or_blocked(reading, options, message):
    with pytest.raises(ValueError, match=message):
        sever_photo(reading, **options)


def severed_by_hand(reading, full, window, hidden=0.0):
    """Probabilities of the first tokens with the whole image, in each of two windows, and without the image."""
    removed = np.array([[hidden] * len(full), full, full])
    return Severed(reading, list(range(len(full))), removed, None, None, None, {"image → user": np.array(window)})


def test_change_is_that_of_the_likely_tokens_in_percent(reading):
    found = severed_by_hand(reading, [0.5, 0.01, 0.009], [[0.25, 0.01, 0.9], [0.6, 0.02, 0.0]])
    assert change(found, "image → user") == pytest.approx([-25, 60])  # the third is too unlikely to count
    unlikely = severed_by_hand(reading, [0.009], [[0.1], [0.1]])
    assert np.isnan(change(unlikely, "image → user")).all()
    assert mean_change([unlikely, found], "image → user") == pytest.approx([-25, 60])
    assert np.isnan(mean_change([unlikely], "image → user")).all()


def test_a_token_needs_the_photo_if_it_falls_by_more_than_a_fifth():
    removed = np.array([[0.5, 0.29, 0.31, 0.9], [0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]])
    assert tokens_that_need_the_photo(removed) == [1]


@pytest.mark.parametrize(
    ("changes", "window", "said"),
    [
        ([0, -3, 2, 0], 1, "-3.0 % at most, blocked in layer 1"),
        ([0, -3, 2, 0], 2, "-3.0 % at most, blocked in layers 0-1"),
        ([0, -3, 2, 0], 3, "-3.0 % at most, blocked in layers 0-2"),
        ([0, 1, 0, 4], 3, "+4.0 % at most, blocked in layers 2-3"),
        ([5, 1, 0, 4], 4, "+5.0 % at most, blocked in layers 0-1"),
        ([0, 0.06, 0, 0], 1, "+0.1 % at most, blocked in layer 1"),
        ([0, 0.04, 0, 0], 1, "no change in any window"),
        ([np.nan] * 4, 1, "nothing to lose, the probability is below 0.01"),
    ],
)
def test_largest_change_in_words(changes, window, said):
    assert largest_change(np.array(changes, float), window) == said


def test_accuracy_of_the_kept_tokens_is_that_of_their_runs(reading, monkeypatch):
    right, kept = np.array([False, False, False, True]), np.array([False, True, True, True])
    values = np.full((4, len(reading.tokens)), 0.5)
    severed = Severed(reading, [0], values, right, values, kept, {})
    monkeypatch.setattr("studies.knockout_figures.sever_photo", lambda *_, **__: severed)
    files, lines, _ = sever([reading], ["a"], [None], keep=3, accuracy=True, quiet=True)
    said = "accuracy (answers that begin exactly as given) 0.000 without it, 1.000 with it"
    assert f"the image is needed to the last layer: {said}" in lines[0]
    assert lines[1].endswith("in the layer before: cliff 1, 1.000")
    assert len(lines) == 2  # the model is right with the whole image, so nothing is said instead
    table = list(csv.DictReader(io.StringIO(files["knockout.csv"])))
    assert [row["answer_right"] for row in table] == [str(int(value)) for value in (*right, *kept)]


def test_severing_keeps_what_each_photos_sweep_gives(reading, own):
    files, lines, evidence = sever([reading, own], ["given", "own"], [None, None], quiet=True)
    arrays, swept = files["knockout.npz"], [sever_photo(part) for part in (reading, own)]
    curves = []
    for i, part in enumerate(swept):
        np.testing.assert_array_equal(arrays[f"removed_{i}"], part.removed)
        np.testing.assert_array_equal(arrays[f"right_{i}"], part.right)
        curves.append(part.removed[:, part.explained].mean(1))
        assert tuple(arrays[f"evidence_{i}"]) == evidence[i][:2] == (curves[i][-1], curves[i][0])
        assert evidence[i] == part.evidence
    table = list(csv.DictReader(io.StringIO(files["knockout.csv"])))
    assert [float(row["probability"]) for row in table] == pytest.approx(np.concatenate(curves), abs=1e-4)
    finding = truncation_finding(np.array(curves), "")
    assert any(line.split()[:3] == finding.split()[:3] for line in lines)
    assert [part.right[-1] for part in swept] == [False, True]


# a model that sees


WORDS = ["plane", "house", "dog", "bicycle"]


@pytest.fixture(scope="module")
def swept(demo):
    return sever_photo(demo)


def word_tokens(reading):
    return [i for word in WORDS for i in reading.tokens_of(find_target(reading.answer, word))]


def test_words_for_objects_are_read_off_the_photo_in_the_middle_layers(demo, swept):
    removed = swept.removed[:, word_tokens(demo)]
    assert set(word_tokens(demo)) <= set(swept.explained)  # they need the photo
    assert removed[-1].min() > 0.9
    assert removed[0].max() < 0.3
    for curve in (*removed.T, removed.mean(1)):
        assert 0 < find_cliff(curve) < len(curve) - 1
    assert "on it can be removed: p 0.0" in truncation_finding(removed.mean(1)[None], "p")


def test_words_of_a_hidden_photo_are_as_unlikely_as_those_of_an_empty_one(demo, swept):
    grey = Image.new("RGB", demo.photo.size, "#808080")
    empty = sever_photo(read(demo.model, demo.processor, grey, DESCRIBE, demo.answer)).removed[:, word_tokens(demo)]
    assert empty[-1].max() < 0.3
    np.testing.assert_allclose(swept.removed[0, word_tokens(demo)], empty[0], rtol=1e-3)


def test_photo_is_not_needed_behind_the_cliff_and_is_before(demo, swept):
    wrong = np.flatnonzero(~swept.right)
    assert 0 < wrong[-1] < len(swept.right) - 2
    for layer in (0, wrong[-1], wrong[-1] + 1):
        with image_hidden(demo.model, int(layer)):
            again = read(demo.model, demo.processor, demo.photo, DESCRIBE, max_new_tokens=len(demo.tokens))
        assert (again.answer == demo.answer) == swept.right[layer] == (layer > wrong[-1])


def test_without_what_it_has_learned_the_model_has_no_cliff(demo):
    model = copy.deepcopy(demo.model)
    randomize_weights([model.model.language_model, model.lm_head], torch.Generator().manual_seed(0))
    removed = sever_photo(dataclasses.replace(demo, model=model)).removed[:, word_tokens(demo)]
    assert find_cliff(removed.mean(1)) is None
    assert truncation_finding(removed.mean(1)[None], "p").startswith("no cliff")
