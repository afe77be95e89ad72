"""Image tokens that are really removed: against masks, and against a decoder that is run layer by layer by hand."""

import csv
import json

import numpy as np
import pytest
from flow_by_hand import LAYERS, full_attention, prompt_length
from test_core import ANSWER, PROMPT, state_of
from transformers import DynamicCache

from smooth_gradcam import generate, read
from studies import fastv
from studies.decoder import embed, run_decoder
from studies.fastv import flops_share, image_pruned, kept_count, pruned_answer, seconds
from studies.knockout import Edge, knockout

SETTINGS = [(1, 50), (1, 90), (2, 25), (2, 75)]


@pytest.fixture(scope="module")
def reading(model, processor, image):
    return read(model, processor, image, PROMPT, ANSWER)


@pytest.fixture(scope="module")
def last_row(reading):
    """Attention of the prompt's last token to all positions before it, (K, P), by one plain forward of the prompt."""
    return full_attention(reading).mean(1)[:, prompt_length(reading) - 1, : prompt_length(reading)]


def kept_by_hand(reading, last_row, layer, removed):
    image = reading.positions.numpy()
    count = kept_count(len(image), removed)
    best = image[np.argsort(-last_row[layer - 1][image], kind="stable")[:count]]
    return [i for i in range(prompt_length(reading)) if i not in image or i in best]


@pytest.mark.parametrize(("layer", "removed"), SETTINGS)
def test_tokens_that_the_prompts_last_token_attends_to_most_in_the_layer_before_are_left(
    reading, last_row, layer, removed
):
    assert pruned_answer(reading, layer, removed)[2] == kept_by_hand(reading, last_row, layer, removed)


@pytest.mark.parametrize(("layer", "removed"), SETTINGS)
def test_removing_tokens_is_hiding_them_from_all_others(reading, layer, removed):
    """Positions stay, so that nothing but what is seen makes a difference."""
    probabilities, likeliest, left = pruned_answer(reading, layer, removed)
    gone = np.setdiff1d(np.arange(prompt_length(reading)), left)
    others = np.setdiff1d(np.arange(prompt_length(reading) + len(reading.tokens)), gone)
    (expected,), (right,) = knockout(reading, [Edge(range(layer, LAYERS), others, gone)])
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
    assert likeliest.tolist() == right.tolist()
    (full,), _ = knockout(reading, [Edge(range(0), others, gone)])
    assert not np.allclose(probabilities, full, rtol=1e-3)  # or there is nothing to tell


def test_hidden_states_and_cache_are_shorter_from_that_layer_on(model, reading):
    lengths, prompt = [], prompt_length(reading)
    handles = [
        block.mlp.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
        for block in model.model.language_model.layers
    ]
    given = embed(reading)
    lengths.clear()
    cache = DynamicCache()
    try:
        with image_pruned(reading, 2, 75) as kept:
            run_decoder(model, given.at(slice(prompt)), cache)
    finally:
        for handle in handles:
            handle.remove()
    assert len(kept.positions) == prompt - 18  # of 24 image tokens
    assert lengths == [prompt, prompt, prompt - 18]
    assert [layer.keys.shape[2] for layer in cache.layers] == lengths


@pytest.mark.parametrize(("layer", "removed"), SETTINGS[::3])
def test_generation_is_greedy_search_with_the_tokens_hidden(model, reading, layer, removed):
    with image_pruned(reading, layer, removed) as kept:
        found = generate(model, reading.processor.tokenizer, reading.inputs, 5)[0]
    own = read(model, reading.processor, reading.photo, PROMPT, max_new_tokens=5)
    gone = np.setdiff1d(np.arange(prompt_length(reading)), kept.positions)
    others = np.setdiff1d(np.arange(prompt_length(reading) + 10), gone)
    expected = []
    for _ in range(5):  # what knockout says is the most likely next token, by trying the one that generation chose
        tokens = expected + [found[len(expected)]]
        given = own.__class__(**{**own.__dict__, "tokens": tokens, "spans": [(0, 1)] * len(tokens)})
        right = knockout(given, [Edge(range(layer, LAYERS), others, gone)])[1][0]
        assert right.all()
        expected = tokens
    assert found == expected


def test_model_is_as_before_also_after_an_error(model, reading):
    before, config = state_of(model, reading.photo), model.config.text_config._attn_implementation
    pruned_answer(reading, 1, 50)
    given = embed(reading)
    with pytest.raises(ValueError, match="whose prompt comes in one pass"), image_pruned(reading, 1, 50):
        run_decoder(model, given.at(slice(9)), DynamicCache())
    with pytest.raises(ValueError, match="runs without a cache"), image_pruned(reading, 1, 50):
        model(**reading.inputs, use_cache=False)
    before["positions"] = model.model.rope_deltas  # which the plain forward leaves
    assert state_of(model, reading.photo) == before
    assert model.config.text_config._attn_implementation == config


@pytest.mark.parametrize(
    ("layer", "removed", "message"),
    [(0, 50, "layer 0 cannot be"), (3, 50, "give 1 to 2"), (1, 0, "removed=0 must"), (1, 100, "removed=100 must")],
)
def test_what_cannot_be_removed_is_told(reading, layer, removed, message):
    with pytest.raises(ValueError, match=message), image_pruned(reading, layer, removed):
        pass


def test_flops_by_hand(model):
    """3 layers of 32 channels and an MLP of 48: 100 tokens in one layer, 40 in two."""
    full, few = (4 * n * 32 * 32 + 2 * n * n * 32 + 2 * n * 32 * 48 for n in (100, 40))
    assert (full, few) == (1_356_800, 389_120)
    assert flops_share(model, 1, 100, 40) == pytest.approx((full + 2 * few) / (3 * full))
    assert flops_share(model, 2, 100, 100) == 1


# the table


QUESTIONS = [
    {"image": "one.png", "prompt": "red?", "answer": "Yes"},
    {"image": "one.png", "prompt": "blue?", "answer": "No"},
]


@pytest.fixture
def questions(tmp_path, image):
    image.save(tmp_path / "one.png")
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    return ["--mode", "knockout", "--answers", tmp_path / "list.jsonl", "--max_new_tokens", 3]


def test_table_has_a_line_for_each_layer_and_share(drive, tmp_path, questions, monkeypatch):
    monkeypatch.setattr(fastv, "seconds", lambda reading, settings: [2.0, 1.5, 1.0, 1.8, 1.6][: len(settings)])
    monkeypatch.setattr(
        fastv, "_masked", lambda reading, settings, batch_size: [True, False, reading.prompt == "red?", False]
    )
    code, out, err = drive(*questions, "--fastv", "1,3", "--removed", 50, 75)
    assert (code, err) == (0, "")
    table = list(csv.DictReader((tmp_path / "out/knockout/fastv_table.csv").open()))
    assert [(line["layer"], line["removed"], line["time"], line["masked"]) for line in table] == [
        ("1", "50", "75", "1.0000"), ("1", "75", "50", "0.0000"),
        ("3", "50", "90", "0.5000"), ("3", "75", "80", "0.0000"),
    ]  # fmt: skip
    flops = [int(line["flops"]) for line in table]
    assert flops[1] < flops[0] < flops[2] < 100
    assert flops[1] < flops[3] < 100
    assert int(table[0]["tokens"]) - int(table[1]["tokens"]) == 6  # 12 and 6 of 24 image tokens
    assert "K  R, %  tokens left  FLOPs, %  time, %  n" in out
    assert (tmp_path / "out/knockout/fastv_table.tex").is_file()


def test_time_is_that_of_the_prompt_for_each_setting(reading, monkeypatch):
    clock = iter([0, 9, 10, 11, 20, 27, 30, 32, 40, 48, 50, 53])  # whole, pruned, whole, ...: 9 1, 7 2, 8 3
    monkeypatch.setattr(fastv.time, "perf_counter", lambda: next(clock))
    assert seconds(reading, [None, (1, 50)]) == [7, 1]


def test_masked_tokens_are_those_that_the_answer_attends_to_least(reading, monkeypatch):
    """The other variant, by its own ranking: hidden from what stands behind the image only."""
    asked = []

    def remember(given, edges, batch_size):
        asked.extend(edges)
        return None, np.array([[True, True], [True, False]])

    monkeypatch.setattr(fastv, "knockout", remember)
    assert fastv._masked(reading, [(1, 50), (2, 75)], 8) == [True, False]
    before, image = prompt_length(reading), reading.positions.numpy()
    rows = full_attention(reading).mean(1)[:, before - 1 : before - 1 + len(reading.tokens)].mean(1)
    for edge, layer, count in zip(asked, (1, 2), (12, 6), strict=True):
        assert edge.layers == range(layer, LAYERS)
        assert edge.queries.min() == image[-1] + 1
        best = image[np.argsort(-rows[layer - 1][image], kind="stable")[:count]]
        assert set(edge.keys) == set(image) - set(best)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fastv", "0", "--removed", "50"], "--fastv: layer 0 cannot be the first with fewer tokens: give 1 to 3"),
        (["--fastv", "9", "--removed", "50"], "--fastv: "),
        (["--fastv", "1", "--removed", "100"], "--removed 100 must be a percentage between 0 and 100"),
        (["--fastv", "1"], "--fastv and --removed need each other"),
        (["--removed", "50"], "--fastv and --removed need each other"),
    ],
)
def test_what_cannot_be_tabled_is_told_by_its_flag(drive, questions, flags, message):
    code, _, err = drive(*questions, *flags)
    assert code == 2
    assert message in err
