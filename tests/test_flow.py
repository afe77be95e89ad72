"""What reads the photo: against full attention and full gradients."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from flow_by_hand import GROUPS, LAYERS, chosen, full_attention, names_by_hand, prompt_length
from test_core import ANSWER, PROMPT, decoder, forced_by_hand

from smooth_gradcam import ExplanationError, Settings, add_noise, read
from studies import flow
from studies.decoder import token_groups
from studies.flow import (
    attention_flow,
    attention_maps,
    flow_findings,
    flow_rows,
    gradient_flow,
    group_sums,
    logit_lens,
    trace_photo,
)

PLAIN = Settings(use_smooth=False, rules="plain")


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


# attention


@pytest.mark.parametrize("word", [None, "cat"])
@pytest.mark.parametrize("chunk", [3, 64, 1000])
def test_attention_flow_is_the_mean_of_full_attention_however_it_is_cut(reading, full, monkeypatch, word, chunk):
    monkeypatch.setattr(flow, "CHUNK", chunk)
    span, rows = chosen(reading, word)
    found = attention_flow(reading, span)
    np.testing.assert_allclose(found, full[:, :, rows].mean((1, 2)), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(sum(found[:, part].sum(1) for part in token_groups(reading).values()), 1, rtol=1e-5)


@pytest.mark.parametrize(("pool", "chunk"), [(None, 64), (1, 5), (7, 1000), (500, 3)])
def test_attention_maps_are_full_attention_averaged_over_stretches_of_one_group(
    reading, full, monkeypatch, pool, chunk
):
    monkeypatch.setattr(flow, "CHUNK", chunk)
    maps, edges = attention_maps(reading, [2, 0], pool)
    stretches = list(itertools.pairwise(edges.tolist()))
    groups = names_by_hand(reading)[:-1]  # the last token predicts nothing
    assert [name for a, b in stretches for name in groups[a:b]] == groups
    assert all(len(set(groups[a:b])) == 1 and b - a <= (pool or 10) for a, b in stretches)
    assert list(maps) == [2, 0]
    for layer, found in maps.items():
        mean = full[layer].mean(0)
        visible = [
            (mean[a:b, c:d], np.tri(len(mean), dtype=bool)[a:b, c:d]) for a, b in stretches for c, d in stretches
        ]
        expected = [part[seen].mean() if seen.any() else np.nan for part, seen in visible]
        np.testing.assert_allclose(found.ravel(), expected, rtol=1e-4, atol=1e-7)


def test_attention_is_not_read_where_the_model_gives_no_weights(model, reading, monkeypatch):
    attention = decoder(model)[1].self_attn
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *args, **kwargs: (forward(*args, **kwargs)[0], None))
    for look in (attention_flow, lambda reading: attention_maps(reading, [0])):
        with pytest.raises(ExplanationError, match="gives no attention weights"):
            look(reading)


def test_shares_of_groups_by_hand():
    groups = {"system": slice(0, 1), "image": slice(1, 3), "user": slice(3, 4), "answer": slice(4, 5)}
    flow = np.array([[1.0, 2, 3, 2, 8], [0, 0, 0, 0, 7]])
    found = group_sums(flow, groups, only=("system", "image", "user"))
    assert {name: values[0] for name, values in found.items()} == {"system": 1 / 8, "image": 5 / 8, "user": 2 / 8}
    assert all(np.isnan(values[1]) for values in found.values())  # nothing there
    assert group_sums(flow, groups)["image"].tolist() == [5 / 16, 0]
    assert group_sums(flow[0], groups)["answer"] == 0.5


# gradients


@pytest.mark.parametrize("word", [None, "cat"])
def test_gradient_flow_is_gradient_times_hidden_state_of_full_autograd(model, reading, word):
    span, rows = chosen(reading, word)
    hidden, forced = {}, forced_by_hand(reading.inputs, reading.tokens)

    def keep(module, args, kwargs):
        hidden[module] = args[0] if args else kwargs["hidden_states"]

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in decoder(model)]
    logits = model(**forced).logits[0]
    for handle in handles:
        handle.remove()
    score = sum(logits[row, forced["input_ids"][0, row + 1]] for row in rows)
    gradients = torch.autograd.grad(score, list(hidden.values()))
    expected = [(a * g)[0].sum(-1).abs().detach().numpy() for a, g in zip(hidden.values(), gradients, strict=True)]
    np.testing.assert_allclose(gradient_flow(reading, span, PLAIN), expected, rtol=1e-5, atol=1e-6 * np.max(expected))


def test_gradient_flow_is_the_mean_of_the_noisy_copies(reading):
    settings = Settings(num_samples=2, noise_std=0.2, seed=3, rules="plain")
    generator, alone = torch.Generator().manual_seed(3), []
    for _ in range(2):
        pixels = add_noise(reading.inputs["pixel_values"], 0.2, reading.processor.image_processor, generator)
        noisy = dataclasses.replace(reading, inputs=reading.inputs | {"pixel_values": pixels})
        alone.append(gradient_flow(noisy, None, PLAIN))
    assert not np.allclose(*alone, rtol=1e-2)
    np.testing.assert_allclose(gradient_flow(reading, None, settings), np.mean(alone, axis=0), rtol=1e-5)


# the tables of attention and gradients


def test_rows_of_each_photo_and_layer_have_the_groups_shares(reading, own, full):
    span, rows = chosen(reading, "cat")
    traced = [trace_photo(own, (0, len(own.answer)), PLAIN), trace_photo(reading, span, PLAIN)]
    table = flow_rows(traced, ["own", "given"])
    assert [(row["photo"], row["layer"]) for row in table] == list(itertools.product(["own", "given"], range(LAYERS)))
    names = np.array(names_by_hand(reading))
    for layer, row_of in enumerate(table[LAYERS:]):
        mean = full[layer][:, rows].mean((0, 1))
        sums = {name: mean[names == name].sum() for name in GROUPS}
        seen = sums["system"] + sums["image"] + sums["user"]
        for name, value in sums.items():
            assert float(row_of[f"attention_{name}"]) == pytest.approx(value, rel=1e-3)
            visible = np.mean([(names[: row + 1] == name).sum() for row in rows])  # of those that explain, each
            assert float(row_of[f"per_token_{name}"]) == pytest.approx(value / visible, rel=1e-3)
            if name != "answer":
                assert float(row_of[f"share_{name}"]) == pytest.approx(value / seen, rel=1e-3)
        assert sum(float(row_of[f"gradient_{name}"]) for name in GROUPS) == pytest.approx(1, abs=1e-3)


def test_findings_on_the_flow_by_hand():
    shares = {
        "system": np.array([0.4, 0.6, 0.6]),
        "image": np.array([0.5, 0.2, 0.1]),
        "user": np.array([0.1, 0.2, 0.3]),
    }
    sizes = {"system": 2, "image": 4, "user": 1}  # per token, in the mean of the layers: 0.267, 0.067, 0.2
    gradient = {"image": np.array([0.8, 0.3, 0.5, 0.39, 0.1])}
    attention, carried = flow_findings(shares, sizes, gradient)
    assert "0.10 (layer 2) to 0.50 (layer 0)" in attention
    assert "a system token 4.0 and a user token 3.0 times as much as an image token" in attention
    assert "0.80 of the score at the first layer, less than half of that from layer 3 on" in carried
    gradient["image"] = np.array([np.nan, 0.4, 0.3, np.nan])
    assert (
        "0.40 of the score at the first layer, less than half of that from layer 3 on"
        in flow_findings(shares, sizes, gradient)[1]
    )
    gradient["image"] = np.array([0.4, 0.1, 0.3])
    assert "half of that or more" in flow_findings(shares, sizes, gradient)[1]
    gradient["image"] = np.full(3, np.nan)
    assert flow_findings(shares, sizes, gradient)[1].startswith("gradient: none reaches")


def test_half_of_the_gradient_is_no_less_than_half():
    zero = np.zeros(3)
    shares = {"system": zero + 0.5, "image": zero + 0.25, "user": zero + 0.25}
    lines = flow_findings(shares, dict.fromkeys(shares, 2), {"image": np.array([0.5, 0.25, 0.2])})
    assert lines[1].endswith("carries 0.50 of the score at the first layer, less than half of that from layer 2 on")


@pytest.mark.parametrize(("length", "most"), [(101, 10), (901, 15), (1201, 20), (3001, 20)])
def test_stretches_are_10_to_20_positions_by_the_length(monkeypatch, length, most):
    monkeypatch.setattr("studies.flow.sequence_length", lambda reading: length)
    monkeypatch.setattr("studies.flow.stretches", lambda reading: [("all", 0, length)])
    assert np.diff(flow.pooled_edges(None)).max() == most


def test_share_of_the_gradient_that_is_zero_everywhere_is_told():
    zero = np.zeros(3)
    shares = {"system": zero + 0.5, "image": zero + 0.25, "user": zero + 0.25}
    assert "carries 0.00 of the score" in flow_findings(shares, dict.fromkeys(shares, 2), {"image": zero})[1]


@pytest.mark.parametrize("word", ["cat", None])
def test_probability_after_each_layer_is_by_the_final_norm_and_head(reading, word):
    span, rows = chosen(reading, word)
    model = reading.model
    with torch.no_grad():
        output = model(**forced_by_hand(reading.inputs, reading.tokens), output_hidden_states=True)
    tokens = [reading.tokens[row - prompt_length(reading) + 1] for row in rows]
    expected = []
    for state in output.hidden_states[1:-1]:  # behind the first layer, and so on; the last is behind the norm already
        logits = model.lm_head(model.model.language_model.norm(state[0, rows]))
        expected.append(logits.softmax(-1)[range(len(rows)), tokens])
    expected.append(output.logits[0, rows].softmax(-1)[range(len(rows)), tokens])
    found = logit_lens(reading, span)
    assert found.shape == (LAYERS, len(rows))
    np.testing.assert_allclose(found, torch.stack(expected).detach().numpy(), rtol=1e-6)
    assert not np.allclose(found[0], found[-1], rtol=0.1)
