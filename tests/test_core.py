"""The pass: one answer, then one forward and one backward for all layers, against independent oracles."""

import copy
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, asdict, fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import make_image
from pytorch_grad_cam import GradCAM
from torch import nn

import smooth_gradcam as core
from common.passes import contrasted_passes, passes_of
from smooth_gradcam import (
    ExplanationError,
    ExplanationWarning,
    Settings,
    TokenMaps,
    compute_token_maps,
    explain,
    find_target,
    get_model_layers,
    read,
    resolve_layers,
    token_spans,
)

PROMPT = "What is it?"
ANSWER = "the red cat 猫"
FORM = '{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}'
CLEAN = {"use_smooth": False, "answer": ANSWER}


def decoder(model):
    return get_model_layers(model)[0]


def rms(norm, x):
    return (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()


def dividing_by(model, denominator):
    """A copy of the model whose rules are weight * (x / denominator(norm, x))."""
    model = copy.deepcopy(model)
    for norm in (module for module in model.modules() if isinstance(module, nn.RMSNorm)):
        norm.forward = lambda x, norm=norm: norm.weight * (x / denominator(norm, x))
    return model


@pytest.fixture(scope="session")
def oracles(model):
    """For each way of passing the norms a model whose plain gradients are those: no hook, no code of the core."""
    return {"plain": model, "detached": dividing_by(model, lambda norm, x: rms(norm, x).detach())}


def oracle(
    model, processor, image, layer, method="gradcam", score="logit", pixel_values=None, scored=slice(None), sign=1
):
    """The map by the book: full graph with all parameters, full logits, the model's own record of hidden states.

    `model` is one of the `oracles`; of the answer's tokens the `scored` ones are.
    """
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}
    text = processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True) + ANSWER
    options = {"return_mm_token_type_ids": True, "return_tensors": "pt"}
    inputs = processor(text=[text], images=[image], **options)
    if pixel_values is not None:
        inputs["pixel_values"] = pixel_values
    output = model(**inputs, output_hidden_states=True)
    ids = inputs["input_ids"][0]
    answer = processor.tokenizer(ANSWER)["input_ids"]
    scores = output.logits[0] if score == "logit" else output.logits[0].log_softmax(-1)
    total = sum(scores[i - 1, ids[i]] for i in range(len(ids) - len(answer), len(ids))[scored])
    hidden = output.hidden_states[layer]
    (gradient,) = torch.autograd.grad(sign * total, hidden)
    at = ids == model.config.image_token_id
    hidden, gradient = hidden[0, at].detach().numpy(), gradient[0, at].numpy()
    if method == "paper":
        return (hidden * gradient.mean(0)).sum(1).clip(0)
    size = (hidden**2).mean(1, keepdims=True) ** 0.5
    hidden, gradient = hidden / size - (hidden / size).mean(0), gradient * size
    own = (hidden * gradient).sum(1).clip(0)
    pooled = (hidden * (own[:, None] * gradient).sum(0) / own.sum()).sum(1).clip(0)
    return {"gradcam": pooled, "hirescam": own, "product": (pooled**3 * own) ** 0.25}[method]


@pytest.mark.parametrize("rules", ["plain", "detached"])
@pytest.mark.parametrize("score", ["logit", "logprob"])
@pytest.mark.parametrize("method", ["gradcam", "hirescam", "product"])
def test_map_equals_full_graph_float64_autograd(model, oracles, processor, image, monkeypatch, method, score, rules):
    """For the score and for its opposite, which shows what the first ReLU took away."""
    plain, drawn = core.SCORES[score], set()
    options = {"method": method, "score": score, "rules": rules}
    for sign in (1, -1):
        monkeypatch.setitem(core.SCORES, score, lambda logits, tokens, sign=sign: sign * plain(logits, tokens))
        found = compute_token_maps(model, processor, image, PROMPT, [0, 1, 2], **CLEAN, **options)
        for layer, cam in found.maps.items():
            expected = oracle(oracles[rules], processor, image, layer, method, score, sign=sign)
            np.testing.assert_allclose(cam.ravel(), expected, rtol=1e-6, atol=1e-12)
            drawn |= {layer} if cam.max() > 1e-2 else set()
    assert drawn == {0, 1, 2}


def test_gradients_follow_attnlrp_unless_asked_otherwise(model, processor, image):
    given = {None: {}} | {rules: {"rules": rules} for rules in core.RULES}
    found = {key: compute_token_maps(model, processor, image, PROMPT, [1], **CLEAN, **o) for key, o in given.items()}
    assert [result.settings.rules for result in found.values()] == ["attnlrp", "attnlrp", "detached", "plain"]
    np.testing.assert_array_equal(found[None].maps[1], found["attnlrp"].maps[1])
    for a, b in (("attnlrp", "detached"), ("attnlrp", "plain"), ("detached", "plain")):
        assert not np.allclose(found[a].maps[1], found[b].maps[1], rtol=0.1)


def test_standardised_features_by_hand():
    features, gradients = torch.tensor([[3.0, -4.0], [0.0, 1.0], [0.0, 0.0]]), torch.ones(3, 2)
    u, g = core.standardised(features, gradients)
    r, q = 12.5**0.5, 0.5**0.5  # root mean squares of the first two
    mean = torch.tensor([3 / r, -4 / r + 1 / q]) / 3
    torch.testing.assert_close(u, torch.tensor([[3 / r, -4 / r], [0, 1 / q], [0, 0]]) - mean)
    torch.testing.assert_close(g, torch.tensor([[r, r], [q, q], [0, 0]]))


def test_methods_by_hand():
    """Three tokens of root mean square 1 whose mean is zero: nothing is left to be standardised."""
    a = 2**0.5
    features = torch.tensor([[a, 0, 0, -a], [-a, a, 0, 0], [0, -a, 0, a]])
    gradients = torch.tensor([[2.0, 0, 9, 0], [0, 1, 9, 0], [1, 1, 0, 0]])
    own = [2 * a, a, 0]  # g . A is 2a, a and -a
    pooled = [(2 * 2 + 1 * 0) / 3, (2 * 0 + 1 * 1) / 3, 9, 0]  # weights 2/3 and 1/3
    pooled = [pooled[0] * a, (pooled[1] - pooled[0]) * a, -pooled[1] * a]
    pooled = [max(0, value) for value in pooled]
    torch.testing.assert_close(core.hirescam(features, gradients), torch.tensor(own))
    torch.testing.assert_close(core.gradcam(features, gradients), torch.tensor(pooled))
    product = [(p**3 * o) ** 0.25 for p, o in zip(pooled, own, strict=True)]
    torch.testing.assert_close(core.product(features, gradients), torch.tensor(product))
    mean = [1.0, 2 / 3, 6, 0]
    paper = [max(0, sum(x * y for x, y in zip(row, mean, strict=True))) for row in features.tolist()]
    torch.testing.assert_close(core.paper(features, gradients), torch.tensor(paper))


@pytest.mark.parametrize("method", [core.gradcam, core.hirescam, core.product])
def test_the_length_of_a_token_does_not_change_its_map_if_gradients_make_up_for_it(method):
    """Behind a norm with a constant denominator a token of twice the length has half the gradient: the same content."""
    features, gradients = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    length = torch.linspace(0.1, 50, 9)[:, None]
    torch.testing.assert_close(method(features * length, gradients / length), method(features, gradients))


def test_a_map_that_nothing_speaks_for_is_zero_and_finite():
    for method in (method.formula for method in core.METHODS.values() if method.run is None):
        assert method(torch.zeros(3, 2), torch.ones(3, 2)).tolist() == [0, 0, 0]
        assert method(torch.randn(1, 4), torch.zeros(1, 4)).tolist() == [0]


@pytest.mark.parametrize("tap", [None, "output", "post_attention_layernorm"])
def test_the_papers_formula_is_pytorch_grad_cams_on_the_same_tensor(model, processor, image, tap):
    """Of the summed logits of the whole answer with its end of turn, as generated; layers are read at their output."""
    found = compute_token_maps(model, processor, image, PROMPT, [0, 1, 2], **CLEAN, method="paper", tap=tap)
    inputs = core.prepare_inputs(model, processor, [image], PROMPT)
    tokens = [*processor.tokenizer(ANSWER)["input_ids"], processor.tokenizer.eos_token_id]
    begin, forced = inputs["input_ids"].shape[1], forced_by_hand(inputs, tokens)
    positions, (grid,) = core.image_grids(model, inputs)

    class Answer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixels):
            logits = self.model(**forced).logits[0, begin - 1 : -1]
            return logits[range(len(tokens)), tokens].sum()[None, None]

    layers, _ = get_model_layers(model)
    if tap == "output" and transformers.__version__ < "5":
        pytest.skip("decoder layers of transformers 4 return a tuple, which pytorch-grad-cam cannot hook")
    for i, layer in enumerate(layers):
        if i == 2:  # no path leads from there to the answer
            assert found.blank[i] == "no gradient"
            continue
        target = layer if tap == "output" else layer.post_attention_layernorm
        with GradCAM(Answer(), [target], reshape_transform=lambda x: x[0, positions].T.reshape(1, -1, *grid)) as cam:
            theirs = cam(torch.zeros(1, 3, *grid), targets=[lambda output: output.sum()])[0]
        assert theirs.std() > 0.1
        assert np.corrcoef(theirs.ravel(), found.maps[i].ravel())[0, 1] > 0.999


def test_the_papers_score_of_a_word_has_no_end_of_turn(model, processor, image):
    own = {"rules": "plain", "tap": "post_attention_layernorm", "score": "logit"}
    spans = [find_target(ANSWER, "cat"), (0, len(ANSWER))]
    reading = read(model, processor, image, PROMPT, ANSWER)
    word, whole = explain(reading, spans, [0], Settings(use_smooth=False, method="paper"))
    assert {name: getattr(word.settings, name) for name in own} == own
    assert whole.target_tokens == list(range(len(whole.tokens)))
    (alone,) = explain(reading, spans[:1], [0], Settings(use_smooth=False, method="paper"))
    np.testing.assert_allclose(word.maps[0], alone.maps[0], rtol=1e-9)
    found, positions = gradients_of(model, processor, image, [0], **own)  # of the whole answer without its end
    features, gradients = (
        core.image_rows(0, tensor, positions, torch.ones(len(positions), dtype=torch.bool)) for tensor in found[0]
    )
    shorter = core.paper(features, gradients).numpy()
    assert np.corrcoef(shorter, whole.maps[0].ravel())[0, 1] < 0.9999


@pytest.mark.parametrize("given", [{"rules": "detached"}, {"tap": "input"}, {"score": "logprob"}])
def test_what_is_given_goes_before_the_methods_own(given):
    settings = Settings(method="paper", **given).settled()
    (name,) = given
    assert getattr(settings, name) == given[name]
    usual = Settings().settled()
    assert (usual.tap, usual.rules, usual.score) == ("input", "attnlrp", "logit")


def test_another_method_has_its_own_tap_and_rules():
    settings = replace(Settings(), method="paper").settled()
    assert (settings.tap, settings.rules) == ("post_attention_layernorm", "plain")


def test_smooth_map_is_mean_of_the_noisy_copies_maps(model, oracles, processor, image):
    copies = []
    record = model.model.visual.patch_embed.register_forward_pre_hook(lambda module, args: copies.append(args[0]))
    found = compute_token_maps(
        model, processor, image, PROMPT, [1], num_samples=3, noise_std=0.2, answer=ANSWER, rules="detached"
    )
    record.remove()
    noise = torch.stack(copies) - core.prepare_inputs(model, processor, [image], PROMPT)["pixel_values"]
    assert np.abs(np.corrcoef(noise.flatten(1)) - np.eye(3)).max() < 0.05  # three copies, each with noise of its own
    assert noise.std((1, 2)).tolist() == pytest.approx([0.2 / 0.268] * 3, rel=0.05)  # and no more in the last one
    one_by_one = [oracle(oracles["detached"], processor, image, 1, pixel_values=pixels) for pixels in copies]
    np.testing.assert_allclose(found.maps[1].ravel(), np.mean(one_by_one, axis=0), rtol=1e-6, atol=1e-12)


def gradients_of(model, processor, image, layers, **settings):
    """{layer: (features, gradient)} of the answer without noise, and the rows of the image tokens."""
    settings = Settings(**settings).settled()
    inputs = core.prepare_inputs(model, processor, [image], PROMPT)
    tokens = core.tokenise(processor.tokenizer, ANSWER)
    forced, scored = core.score_parts(inputs, tokens, [range(len(tokens))])
    taps = core.find_taps(model, layers, settings.tap)
    with core.borrowed(model):
        (found,) = core.features_and_gradients(model, forced, taps, scored, settings)
    return found, core.image_grids(model, inputs)[0]


def forced_by_hand(inputs, tokens):
    """The inputs with the whole answer behind them."""
    ids = inputs["input_ids"].new_tensor([tokens])
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": torch.zeros_like(ids)}
    return inputs | {name: torch.cat([inputs[name], more[name]], dim=1) for name in more.keys() & inputs.keys()}


@pytest.mark.parametrize("rules", ["plain", "detached"])
def test_gradient_agrees_with_finite_differences(model, processor, image, rules):
    """Frozen gradients are no derivative of the model, but of the model whose rules go on dividing by what they did."""
    channel, token, step = 5, 7, 1e-4
    found, positions = gradients_of(model, processor, image, [1], rules=rules)
    if rules == "detached":
        first = {}
        model = dividing_by(model, lambda norm, x: first.setdefault(norm, rms(norm, x)))

    def score_with(change):
        def shift(module, args):
            hidden = args[0].clone()
            hidden[0, positions[token], channel] += change
            return (hidden, *args[1:])

        handle = decoder(model)[1].register_forward_pre_hook(shift)
        with torch.no_grad():
            logits = model(**forced).logits[0]
        handle.remove()
        return sum(logits[p, t].item() for p, t in zip(predicting, tokens, strict=True))

    inputs = core.prepare_inputs(model, processor, [image], PROMPT)
    tokens = processor.tokenizer(ANSWER)["input_ids"]
    forced = forced_by_hand(inputs, tokens)
    predicting = list(range(inputs["input_ids"].shape[1] - 1, forced["input_ids"].shape[1] - 1))
    score_with(0)  # the first time
    gradient = found[1][1][0, positions[token], channel].item()
    numeric = (score_with(step) - score_with(-step)) / (2 * step)
    assert abs(gradient) > 1e-4
    assert gradient == pytest.approx(numeric, rel=1e-6)


def test_teacher_forced_logits_are_those_of_generation(model, processor, image):
    seen = []
    record = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output[0].detach()))
    found = compute_token_maps(model, processor, image, PROMPT, [0], use_smooth=False, max_new_tokens=6)
    record.remove()
    inputs = core.prepare_inputs(model, processor, [image], PROMPT)
    config = model.config
    banned = [config.image_token_id, config.video_token_id, config.vision_start_token_id]
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "suppress_tokens": banned}
    generated = model.generate(**inputs, **options, max_new_tokens=6)
    assert generated.sequences[0, inputs["input_ids"].shape[1] :].tolist() == found.tokens
    forced = seen[-1][-len(found.tokens) :]
    torch.testing.assert_close(forced.float(), torch.cat(generated.logits).float(), rtol=1e-6, atol=1e-6)


def test_logits_are_computed_from_the_first_scored_position_to_the_last(model, processor, image):
    seen = []
    record = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    found = compute_token_maps(model, processor, image, PROMPT, [0], **CLEAN, target="red cat")
    record.remove()
    assert 0 < found.target_tokens[0] < found.target_tokens[-1] < len(found.tokens) - 1
    assert seen == [found.target_tokens[-1] - found.target_tokens[0] + 1]


@pytest.mark.parametrize("target", ["t", "the", "red cat", "猫"])
def test_tokens_behind_the_last_scored_one_are_left_out_and_change_nothing(model, oracles, processor, image, target):
    lengths = []
    record = decoder(model)[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    found = compute_token_maps(model, processor, image, PROMPT, [1], **CLEAN, target=target, rules="detached")
    record.remove()
    prompt = core.prepare_inputs(model, processor, [image], PROMPT)["input_ids"].shape[1]
    assert lengths == [prompt + found.target_tokens[-1]]
    scored = slice(found.target_tokens[0], found.target_tokens[-1] + 1)
    expected = oracle(oracles["detached"], processor, image, 1, scored=scored)  # with the whole answer
    np.testing.assert_allclose(found.maps[1].ravel(), expected, rtol=1e-6, atol=1e-12)


def test_forward_without_logits_to_keep_gives_the_same_map(model, processor, image, monkeypatch):
    kept = compute_token_maps(model, processor, image, PROMPT, [1], **CLEAN, target="cat").maps[1]
    known = SimpleNamespace(parameters=["mm_token_type_ids"])
    monkeypatch.setattr(core.inspect, "signature", lambda function: known)
    full = compute_token_maps(model, processor, image, PROMPT, [1], **CLEAN, target="cat").maps[1]
    np.testing.assert_allclose(full, kept, rtol=1e-6)


# rules


def test_live_norms_leave_next_to_nothing_of_a_token_that_acts_through_a_norm_alone(model, processor, image):
    """So does each image token in the last layer: its length is of no effect, and sum_k g_k A_k is that effect."""
    kept = {}
    for rules in ("plain", "detached"):
        found, positions = gradients_of(model, processor, image, [2], rules=rules)
        products = (found[2][0] * found[2][1])[0, positions]  # (N, C)
        kept[rules] = (products.sum(1).abs().sum() / products.abs().sum()).item()
    assert kept["plain"] < 1e-4
    assert kept["detached"] > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_what_enters_the_last_norm_adds_up_to_the_score_if_it_is_frozen(make_model, processor, image, dtype):
    """Behind the last layer there is a norm and a linear map: what the positions contribute is all of the score."""
    model = make_model(dtype)  # float32: with the norms of transformers
    seen = []
    record = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output[0].detach()))
    sums = {}
    for rules in ("plain", "detached"):
        found, _ = gradients_of(model, processor, image, [2], rules=rules, tap="output")
        sums[rules] = (found[2][0].double() * found[2][1].double()).sum().item()
    record.remove()
    tokens = core.tokenise(processor.tokenizer, ANSWER)
    score = sum(row[token].item() for row, token in zip(seen[0][-len(tokens) :], tokens, strict=True))
    assert sums["detached"] == pytest.approx(score, rel=1e-5)
    assert abs(sums["plain"]) < 1e-4 * abs(score)


def test_attnlrps_rules_share_the_whole_score_out(make_model, processor, image):
    """But for biases and what the softmax takes: without attention, all of it."""
    model = make_model()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or ".o_proj." in name:
            torch.nn.init.zeros_(parameter)
    inputs, layers = core.prepare_inputs(model, processor, [image], PROMPT), decoder(model)
    taps = [core.Tap(i, layer, True) for i, layer in enumerate(layers)]
    with core.borrowed(model), core.attnlrp(model), core.captured(taps) as found:
        score = model(**inputs, use_cache=False).logits[0, -1, 5]
        gradients = torch.autograd.grad(score, list(found.values()))
    for hidden, gradient in zip(found.values(), gradients, strict=True):
        assert float((hidden * gradient).sum()) == pytest.approx(float(score), rel=1e-4)


@pytest.mark.parametrize(
    ("constant", "part"), [(("v_proj",), 0.25), (("q_proj", "k_proj"), 0.5)], ids=["queries and keys", "values"]
)
def test_attnlrp_gives_queries_and_keys_a_quarter_and_values_half_of_the_gradient(make_model, constant, part):
    model = make_model()
    attention = decoder(model)[1].self_attn
    for name in constant:
        module = getattr(attention, name)
        module.register_forward_hook(lambda module, args, output: output.detach())
    torch.manual_seed(0)
    x = torch.randn(1, 5, 32, dtype=torch.float64, requires_grad=True)
    positions = model.model.language_model.rotary_emb(x, torch.arange(5).expand(3, 1, 5))
    weights = torch.randn(5, 32, dtype=torch.float64)
    found = []
    for rules in (core.attnlrp, core.RULES["plain"]):
        with rules(model):
            output = attention(x, attention_mask=None, position_embeddings=positions)[0]
        found += torch.autograd.grad((output * weights).sum(), x)
    assert found[1].abs().max() > 1e-3
    torch.testing.assert_close(found[0], part * found[1])


def test_attnlrp_halves_both_sides_of_a_gated_mlp_and_holds_the_activations_ratio(make_model):
    model = make_model()
    mlp = decoder(model)[1].mlp
    torch.manual_seed(0)
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    with core.attnlrp(model):
        output = mlp(x)
    (found,) = torch.autograd.grad(output.sum(), x)
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    ratio = torch.sigmoid(gate).detach()  # silu(x) / x
    torch.testing.assert_close(output, mlp(x))
    halves = mlp.down_proj(gate * ratio * up.detach() + (gate * ratio).detach() * up).sum() / 2
    torch.testing.assert_close(found, torch.autograd.grad(halves, x)[0])


def norms_detached(modules):
    return core.hooked(norm.register_forward_hook(rule) for norm, rule in core.norm_rules(modules).items())


def test_frozen_norms_and_linear_maps_pass_on_all_of_the_output():
    """A chain with a residual, all of whose parts are linear but for the rules: A_i . g_i add up to the output."""
    torch.manual_seed(0)
    rules = nn.ModuleList(nn.RMSNorm(6, eps=1e-6, dtype=torch.float64) for _ in range(3))
    mixes = [torch.randn(6, 6, dtype=torch.float64) for _ in range(2)]
    for norm in rules:
        nn.init.normal_(norm.weight)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def contributions():
        hidden = x
        for norm, mix in zip(rules, mixes, strict=False):
            hidden = hidden + norm(hidden).roll(1, 0) @ mix
        output = rules[2](hidden)[:, 0].sum()
        (gradient,) = torch.autograd.grad(output, x)
        return (x * gradient).sum().item(), output.item()

    with norms_detached(rules):
        total, output = contributions()
    assert total == pytest.approx(output, rel=1e-12)
    total, same = contributions()
    assert same == output
    assert abs(total - output) > 0.1 * abs(output)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_frozen_norms_change_no_bit_of_the_logits(make_model, processor, image, dtype):
    model = make_model(dtype)
    inputs = core.prepare_inputs(model, processor, [image], PROMPT)
    expected = model(**inputs).logits
    with core.detached_norms(model):
        frozen = model(**inputs).logits
    assert frozen.requires_grad  # else nothing would have been frozen
    assert torch.equal(frozen, expected)
    assert frozen.dtype == dtype


@pytest.mark.parametrize("make_norm", [nn.RMSNorm, None], ids=["torch", "transformers"])
def test_token_of_zeros_has_a_finite_gradient_through_frozen_norms(make_model, make_norm):
    norm = nn.RMSNorm(32) if make_norm else copy.deepcopy(make_model(torch.float32).model.language_model.norm)
    x = torch.tensor([[0.0] * 32, [0.0, -3.0] * 16], requires_grad=True)
    with norms_detached(nn.ModuleList([norm])):
        output = norm(x)
    assert torch.equal(output, norm(x))
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient[1, 1::2], norm.weight.detach()[1::2] * 0.5**0.5 / 1.5)


def test_no_hook_of_frozen_norms_outlives_them(make_model):
    model = make_model()
    rules = [module for module in model.modules() if isinstance(module, nn.RMSNorm)]
    decoder(model)[0].input_layernorm.register_forward_hook(lambda *_: None)  # the caller's own

    def hooked():
        return [len(norm._forward_hooks) for norm in rules]

    before = hooked()
    assert len(rules) == 2 * 2 + 1 + 2 * 3 + 1  # two in each vision block and decoder layer, the merger's, the last
    with core.detached_norms(model):
        assert hooked() == [count + 1 for count in before]
    assert hooked() == before
    with pytest.raises(KeyError), core.detached_norms(model):
        raise KeyError
    assert hooked() == before


@pytest.mark.parametrize("rules", ["plain", "detached"])
@pytest.mark.parametrize("where", ["decoder", "vision", "last norm"])
def test_module_that_is_a_norm_itself_or_lies_before_some_has_its_gradient(
    model, oracles, processor, image, where, rules
):
    """Its own denominator lies below what is read, and so does nothing."""

    def find(model):
        layer, block = decoder(model)[2].input_layernorm, model.model.visual.blocks[0].norm2
        return {"decoder": layer, "vision": block, "last norm": model.model.language_model.norm}[where]

    found, positions = gradients_of(model, processor, image, [find(model)], rules=rules)
    ((features, gradient),) = found.values()
    outputs = []
    record = find(oracles[rules]).register_forward_hook(lambda module, args, output: outputs.append(output))
    inputs = core.prepare_inputs(oracles[rules], processor, [image], PROMPT)
    answer = core.tokenise(processor.tokenizer, ANSWER)
    before = inputs["input_ids"].shape[1] - 1
    logits = oracles[rules](**forced_by_hand(inputs, answer)).logits[0]
    record.remove()
    (expected,) = torch.autograd.grad(sum(logits[before + i, token] for i, token in enumerate(answer)), outputs)
    if features.dim() == 3:  # a sequence: the core's ends before the last scored token
        assert not expected[:, features.shape[1] :].any()
        outputs[0], expected = outputs[0][:, : features.shape[1]], expected[:, : features.shape[1]]
    torch.testing.assert_close(features, outputs[0].detach())
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
    assert gradient.abs().max() > 1e-3


# layers


def test_all_layers_in_one_pass_equal_one_at_a_time(model, processor, image):
    options = {"num_samples": 2, "answer": ANSWER}
    together = compute_token_maps(model, processor, image, PROMPT, [2, 0, 1], **options).maps
    assert list(together) == [2, 0, 1]
    for layer, cam in together.items():
        alone = compute_token_maps(model, processor, image, PROMPT, [layer], **options).maps[layer]
        np.testing.assert_allclose(cam, alone, rtol=1e-6)


@pytest.mark.parametrize("rules", ["plain", "detached"])
def test_last_layer_is_not_blank_at_its_input(model, processor, image, rules):
    """With the sum before the ReLU: whether something is left of it depends on the weights' luck."""
    found, positions = gradients_of(model, processor, image, [1, -1], rules=rules)
    pooled = {
        layer: (features[0, positions] @ gradient[0, positions].mean(0)).abs().max()
        for layer, (features, gradient) in found.items()
    }
    assert pooled[2] > 1e-2 * pooled[1] > 0
    maps = compute_token_maps(model, processor, image, PROMPT, [-1], **CLEAN, rules=rules, method="hirescam")
    assert list(maps.maps) == [2]
    assert maps.maps[2].max() > 0
    assert not maps.no_gradient


def test_last_layer_is_reported_without_gradient_at_its_output(model, processor, image):
    found = compute_token_maps(model, processor, image, PROMPT, [0, 1, 2], **CLEAN, tap="output")
    assert found.no_gradient == {2}
    assert not found.maps[2].any()
    entering_next = compute_token_maps(model, processor, image, PROMPT, [1, 2], **CLEAN).maps
    np.testing.assert_allclose(found.maps[0], entering_next[1], rtol=1e-6)
    np.testing.assert_allclose(found.maps[1], entering_next[2], rtol=1e-6)


def test_module_is_read_at_its_output_under_its_name(model, processor, image):
    module = decoder(model)[1].post_attention_layernorm
    (name,) = (name for name, other in model.named_modules() if other is module)
    outputs = []
    record = module.register_forward_hook(lambda module, args, output: outputs.append(output))
    found = compute_token_maps(model, processor, image, PROMPT, [module, decoder(model)[1]], **CLEAN)
    assert list(found.maps) == [name, 1]
    assert found.maps[name].max() > 0
    record.remove()


def test_vision_merger_is_in_raster_order(model, processor):
    """What the merger gives enters layer 0 unchanged, but the tower merges window by window."""
    merger = model.model.visual.merger
    for size in ((308, 196), (196, 308), (252, 252)):
        options = CLEAN | {"method": "hirescam"}
        maps = compute_token_maps(model, processor, make_image(*size), PROMPT, [0, merger], **options).maps
        (name,) = set(maps) - {0}
        assert maps[0].shape == (size[1] // 28, size[0] // 28)
        np.testing.assert_allclose(maps[name], maps[0], rtol=1e-5)


def test_vision_block_averages_the_patches_of_a_token(model, processor, image):
    """By the book: its patches come four by four in the order of the windows, of 4 x 4 tokens here."""
    block = model.model.visual.blocks[0]
    found = compute_token_maps(model, processor, image, PROMPT, [block], **CLEAN).maps["model.visual.blocks.0"]
    pairs, _ = gradients_of(model, processor, image, [block])
    heat = core.gradcam(*pairs["model.visual.blocks.0"]).reshape(-1, 4).mean(1)
    expected = torch.cat([heat[:16].reshape(4, 4), heat[16:].reshape(4, 2)], dim=1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.max() > 1e-2


class Stack(nn.Module):
    """Two layers of w * x that hand over in the way `style` says."""

    def __init__(self, style):
        super().__init__()
        self.style, self.first, self.second = style, Scale(3.0, style), Scale(5.0, style)

    def forward(self, x):
        for layer in (self.first, self.second):
            x = layer(hidden_states=x) if self.style == "keyword" else layer(x)
            x = x[0] if self.style == "tuple" else x
        return x


class Scale(nn.Module):
    def __init__(self, weight, style):
        super().__init__()
        self.weight, self.style = weight, style

    def forward(self, hidden_states):
        product = self.weight * hidden_states
        return (product, "cache") if self.style == "tuple" else product


@pytest.mark.parametrize("style", ["tuple", "tensor", "keyword"])
@pytest.mark.parametrize("at_input", [True, False])
def test_layers_that_return_tuples_or_tensors_are_captured_alike(style, at_input):
    stack = Stack(style)
    taps = [core.Tap("a", stack.first, at_input), core.Tap("b", stack.second, at_input)]
    with core.captured(taps) as captured:
        result = stack(torch.tensor([2.0]))
    gradients = torch.autograd.grad(result.sum(), [captured["a"], captured["b"]])
    assert [captured["a"].item(), captured["b"].item()] == ([2, 6] if at_input else [6, 30])
    assert [gradient.item() for gradient in gradients] == ([15, 5] if at_input else [5, 1])


def test_layer_indices_count_from_either_end():
    assert resolve_layers([0, -1, 27, np.int64(6), -22], 28) == [0, 27, 6]


@pytest.mark.parametrize("layer", [28, -29, "3", 1.5, None])
def test_layer_that_does_not_exist_is_named_with_the_valid_range(layer):
    with pytest.raises(ValueError, match=rf"layer {layer!r} .*0 to 27"):
        resolve_layers([layer], 28)


def test_no_layers_and_foreign_modules_are_errors(model, processor, image):
    with pytest.raises(ValueError, match="no layer is given"):
        compute_token_maps(model, processor, image, PROMPT, [])
    with pytest.raises(ValueError, match="the layer Linear does not belong to the model"):
        compute_token_maps(model, processor, image, PROMPT, [nn.Linear(1, 1)])
    places = "model.language_model.layers, language_model.layers, model.layers"
    with pytest.raises(ValueError, match=f"^Linear has its decoder layers at none of {places}$"):
        get_model_layers(nn.Linear(1, 1))


def test_decoder_layers_are_found_with_and_without_the_language_models_head(model):
    layers = model.model.language_model.layers
    for each in (model, model.model, SimpleNamespace(model=model.model.language_model)):  # with it, AutoModel's, text
        found, total = get_model_layers(each)
        assert found is layers
        assert total == 3


@pytest.mark.parametrize("layers", [3, "all", "1", None])
def test_layers_that_are_no_list_are_named(model, processor, image, layers):
    with pytest.raises(ValueError, match=rf"^layers={layers!r} must be a list of layers, such as \[0, -1\]$"):
        compute_token_maps(model, processor, image, PROMPT, layers)
    with pytest.raises(ValueError, match=rf"^layers={layers!r} must be a list of layers"):
        resolve_layers(layers, 28)


def test_module_without_a_row_per_image_token_is_an_error(model, processor, image):
    with pytest.raises(ValueError, match=r"lm_head gives the shape .*no row for each image token"):
        compute_token_maps(model, processor, image, PROMPT, [model.lm_head], **CLEAN)


# grid


def odd_one_out(features, gradients):
    return (features - features.median(0).values).norm(dim=1)


@pytest.mark.parametrize("size", [(280, 168), (168, 280), (224, 224)], ids=["landscape", "portrait", "square"])
@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("low", [False, True])
def test_object_in_a_corner_is_found_in_that_corner(model, processor, formula, size, right, low):
    formula("gradcam", odd_one_out)  # looks at the features alone: where is the strange one?
    photo = np.full((size[1], size[0], 3), 200, np.uint8)
    photo[:28, :28] = np.random.default_rng(0).integers(0, 256, (28, 28, 3))
    photo = photo[:: -1 if low else 1, :: -1 if right else 1].copy()
    found = compute_token_maps(model, processor, core.Image.fromarray(photo), PROMPT, [0], **CLEAN)
    assert found.grid == found.maps[0].shape == (size[1] // 28, size[0] // 28)
    row, column = np.unravel_index(found.maps[0].argmax(), found.grid)
    assert (row, column) == ((found.grid[0] - 1) * low, (found.grid[1] - 1) * right)


VISION = SimpleNamespace(window_size=56, spatial_merge_size=2, patch_size=14)  # windows of 2 x 2 tokens


@pytest.mark.parametrize(
    ("key", "grid", "expected"),
    [
        (1, (2, 3), [[0, 1, 2], [3, 4, 5]]),
        ("lm_head", (3, 2), [[0, 1], [2, 3], [4, 5]]),
        ("model.visual.patch_embed", (2, 3), [[0, 1, 2], [3, 4, 5]]),
        ("model.visual.merger", (2, 3), [[0, 1, 4], [2, 3, 5]]),
        ("model.visual.blocks.1.norm2", (3, 3), [[0, 1, 4], [2, 3, 5], [6, 7, 8]]),
    ],
)
@pytest.mark.parametrize("patches", [[0], [0, 0, 0, 4], [-2, 2, -5, 9]])  # of a token, beside their mean
def test_cells_are_the_mean_of_their_patches_row_by_row_and_out_of_window_order(key, grid, expected, patches):
    means = np.arange(grid[0] * grid[1], dtype=np.float32)
    heat = (means[:, None] + np.array(patches) - np.mean(patches)).ravel()
    assert core.to_grid(key, heat, grid, VISION).tolist() == expected


def test_windows_are_walked_one_after_another():
    assert core.window_order((3, 3), 2).tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]


# noise


def test_same_seed_same_map_other_seed_other_map(model, processor, image):
    def cam(seed):
        options = {"num_samples": 2, "answer": ANSWER, "seed": seed}
        return compute_token_maps(model, processor, image, PROMPT, [0], **options).maps[0]

    np.testing.assert_array_equal(cam(3), cam(3))
    assert not np.array_equal(cam(3), cam(4))


def test_no_noise_is_plain_gradcam(model, processor, image):
    silent = compute_token_maps(model, processor, image, PROMPT, [0], noise_std=0, answer=ANSWER)
    plain = compute_token_maps(model, processor, image, PROMPT, [0], **CLEAN)
    np.testing.assert_array_equal(silent.maps[0], plain.maps[0])
    assert silent.settings == plain.settings
    assert (silent.settings.num_samples, silent.settings.noise_std) == (1, 0)


def test_noise_is_the_same_in_both_temporal_copies_and_nowhere_else(processor, image):
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    noisy = core.add_noise(pixels, 0.15, processor.image_processor, torch.Generator().manual_seed(0))
    noise = (noisy - pixels).reshape(-1, 3, 2, 14, 14)
    assert torch.equal(noisy.reshape(-1, 3, 2, 14, 14)[:, :, 0], noisy.reshape(-1, 3, 2, 14, 14)[:, :, 1])
    assert noise[:, :, 0].unique().numel() > 0.9 * noise[:, :, 0].numel()


def test_noise_is_in_units_of_the_unit_interval(processor):
    pixels = processor.image_processor(make_image(280, 280), return_tensors="pt")["pixel_values"]
    noisy = core.add_noise(pixels, 0.15, processor.image_processor, torch.Generator().manual_seed(0))
    noise = (noisy - pixels).reshape(-1, 3, 2, 14, 14)[:, :, 0] * torch.tensor([0.26862954, 0.26130258, 0.27577711])[
        :, None, None
    ]
    torch.testing.assert_close(noise.std((0, 2, 3)), torch.full((3,), 0.15), rtol=0.02, atol=0)


def test_layers_may_come_from_an_iterator(model, processor, image):
    found = compute_token_maps(model, processor, image, PROMPT, iter([1, -1]), **CLEAN)
    assert list(found.maps) == [1, 2]


def test_progress_wraps_the_noisy_copies(model, processor, image):
    wrapped = []
    options = {"num_samples": 3, "answer": ANSWER, "progress": lambda copies: wrapped.append(list(copies)) or copies}
    compute_token_maps(model, processor, image, PROMPT, [0], **options)
    assert wrapped == [[0, 1, 2]]


# answer


def answering(monkeypatch, model, tokens):
    def generate(input_ids, **_):
        return torch.cat([input_ids, torch.tensor([tokens])], dim=1)

    monkeypatch.setattr(model, "generate", generate)


def test_end_of_turn_is_not_explained(model, processor, image, monkeypatch):
    tokens = processor.tokenizer(ANSWER)["input_ids"]
    answering(monkeypatch, model, [*tokens, processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id])
    found = compute_token_maps(model, processor, image, PROMPT, [0], use_smooth=False)
    assert (found.answer, found.target, found.tokens) == (ANSWER, ANSWER, tokens)
    assert found.target_tokens == list(range(len(tokens)))


def test_model_that_answers_nothing_is_told_of_answer(model, processor, image, monkeypatch):
    answering(monkeypatch, model, [processor.tokenizer.eos_token_id])
    with pytest.raises(ExplanationError, match="answer is empty: give a text to explain as the answer"):
        compute_token_maps(model, processor, image, PROMPT, [0])


def test_answer_holds_no_token_that_stands_for_a_picture(model, processor, image):
    wanted = torch.zeros(model.config.text_config.vocab_size)
    wanted[[model.config.image_token_id, model.config.video_token_id, model.config.vision_start_token_id]] = 99
    handle = model.lm_head.register_forward_hook(lambda module, args, output: output + wanted)
    found = compute_token_maps(model, processor, image, PROMPT, [0], use_smooth=False, max_new_tokens=4)
    handle.remove()
    assert len(found.tokens) == 4
    assert not wanted[found.tokens].any()


def test_special_tokens_within_the_answer_are_forced_but_not_scored(model, processor, image, monkeypatch):
    special = processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")
    answering(monkeypatch, model, [special, *processor.tokenizer("cat")["input_ids"]])
    found = compute_token_maps(model, processor, image, PROMPT, [0], use_smooth=False)
    assert (found.answer, found.target_tokens) == ("cat", [1])


def test_every_byte_of_a_character_belongs_to_it(tokenizer):
    text = "a猫é red 😀b"
    tokens = tokenizer(text)["input_ids"]
    spans = token_spans(tokenizer, tokens)
    byte_of = [i for i, character in enumerate(text) for _ in character.encode()]  # the oracle: one character a byte
    pieces = [tokenizer.convert_ids_to_tokens(token) for token in tokens]  # byte-level: one letter a byte
    ends = np.cumsum([len(piece) for piece in pieces])
    expected = [(byte_of[e - len(p)], byte_of[e - 1] + 1) for p, e in zip(pieces, ends, strict=True)]
    assert spans == expected
    assert len(tokens) > len(text)


def test_target_is_scored_by_the_tokens_that_write_it(model, processor, image):
    found = compute_token_maps(model, processor, image, PROMPT, [0], **CLEAN, target="猫")
    assert found.answer[slice(*found.target_span)] == found.target == "猫"
    assert processor.tokenizer.decode([found.tokens[i] for i in found.target_tokens]) == "猫"
    assert len(found.target_tokens) == 3
    whole = compute_token_maps(model, processor, image, PROMPT, [0], **CLEAN)
    assert not np.array_equal(found.maps[0], whole.maps[0])


# settings and bad arguments


WHOLE, STD = "must be a whole number, {} or more, and below 2^63", "must be 0 to 1 (0.15 is 15 % of the pixel range)"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_samples", 0, WHOLE.format(1)),
        ("num_samples", 2.5, WHOLE.format(1)),
        ("num_samples", 2**63, "must be a whole number, 1 or more, and below 2^63"),
        ("noise_std", -0.1, STD),
        ("noise_std", 1.01, STD),
        ("noise_std", float("nan"), STD),
        ("noise_std", float("inf"), STD),
        ("noise_std", "0.1", STD),
        ("seed", -1, WHOLE.format(0)),
        ("seed", "a", WHOLE.format(0)),
        ("seed", 2**63, "must be a whole number, 0 or more, and below 2^63"),
        ("tap", "both", "must be one of input, output, post_attention_layernorm"),
        ("score", "loss", "must be one of logit, logprob"),
        (
            "method",
            "cam",
            "must be one of gradcam, hirescam, product, paper, attention, rollout, chefer, parent, needed, auto",
        ),
        (
            "method",
            ["product"],
            "must be one of gradcam, hirescam, product, paper, attention, rollout, chefer, parent, needed, auto",
        ),
        ("rules", "melted", "must be one of attnlrp, detached, plain"),
        ("contrast", "", "must be a non-empty string without lone surrogates"),
        ("contrast", " \n", "must be a non-empty string without lone surrogates"),
        ("contrast", 5, "must be a non-empty string without lone surrogates"),
        ("max_new_tokens", 0, WHOLE.format(1)),
        ("max_new_tokens", 2**63, "must be a whole number, 1 or more, and below 2^63"),
        ("target_occurrence", 2**63, "must be a whole number, 1 or more, and below 2^63"),
        ("answer", "", "must be a non-empty string without lone surrogates"),
        ("answer", [1, 2], "must be a non-empty string without lone surrogates"),
        ("answer", "a<|im_end|>", "must be text without special tokens"),
        ("prompt", "  ", "must be a non-empty string without lone surrogates"),
        ("prompt", None, f"must be a text, or a list of messages such as {FORM}"),
        ("prompt", "a <|image_pad|>", "contains <|image_pad|>, which marks a picture or a turn of the chat"),
        ("prompt", "a<|im_end|>", "contains <|im_end|>, which marks a picture or a turn of the chat"),
        ("prompt", "a<|vision_pad|>", "contains <|vision_pad|>, which marks a picture or a turn of the chat"),
    ],
)
def test_bad_argument_is_named_with_its_value(model, processor, image, name, value, message):
    arguments = {"prompt": PROMPT, "answer": ANSWER} | {name: value}
    message = f"^{re.escape(f'{name}={value!r} {message}')}$"
    if name in asdict(Settings()):
        with pytest.raises(ValueError, match=message):
            Settings(**{name: value})
    with pytest.raises(ValueError, match=message):
        compute_token_maps(model, processor, image, layers=[0], **arguments)


def test_settings_are_fixed_once_they_are_checked():
    settings = Settings(num_samples=2**63 - 1, noise_std=1, seed=np.int64(3))
    assert replace(settings, noise_std=np.float32(0.5)).num_samples == 2**63 - 1
    with pytest.raises(FrozenInstanceError):
        settings.noise_std = 5
    with pytest.raises(ValueError, match="noise_std=5 must be 0 to 1"):
        replace(settings, noise_std=5)
    plain = {"num_samples": 1, "noise_std": 0, "seed": 0, "tap": None, "score": "logit", "contrast": None}
    plain |= {"method": "gradcam", "rules": None, "head": None}
    assert asdict(Settings()) == plain | {"num_samples": 10, "noise_std": 0.1}
    assert asdict(Settings(7, 0.3, use_smooth=False)) == asdict(Settings(7, 0)) == plain


def test_unknown_keyword_is_a_type_error(model, processor, image):
    with pytest.raises(TypeError, match="'colour'"):
        compute_token_maps(model, processor, image, PROMPT, [0], **CLEAN, colour="red")


def test_image_beyond_the_processors_aspect_ratio_is_a_value_error(model, processor):
    with pytest.raises(ValueError, match="aspect ratio"):
        compute_token_maps(model, processor, make_image(3000, 10), PROMPT, [0])


def test_wrong_kind_of_processor_or_model_is_told_what_to_use(model, processor, image):
    for other in (processor.tokenizer, processor.image_processor, None):
        message = f"^a {type(other).__name__} is no processor .it has no tokenizer.: use AutoProcessor$"
        with pytest.raises(ValueError, match=message):
            compute_token_maps(model, other, image, PROMPT, [0])
    part = SimpleNamespace(tokenizer=processor.tokenizer, image_processor=processor.image_processor)
    with pytest.raises(ValueError, match="is no processor .it has no apply_chat_template."):
        compute_token_maps(model, part, image, PROMPT, [0])
    with pytest.raises(ValueError, match="^Qwen2_5_VLModel cannot answer: load it with AutoModelForImageTextToText$"):
        compute_token_maps(model.model, processor, image, PROMPT, [0])


@pytest.mark.parametrize(("size", "few"), [((56, 112), "2 x 4"), ((112, 56), "4 x 2"), ((84, 84), None)])
def test_photo_of_hardly_any_image_tokens_is_warned_of(model, processor, recwarn, size, few):
    found = compute_token_maps(model, processor, make_image(*size), PROMPT, [0], **CLEAN)
    assert found.maps[0].shape == (size[1] // 28, size[0] // 28)
    assert [(type(warning.message), str(warning.message)) for warning in recwarn] == (
        [(ExplanationWarning, f"the photo is seen as {few} image tokens: too few to tell places apart")] if few else []
    )


# one reading, many explanations


def values_of(found):
    """All that TokenMaps hold, to be compared."""
    values = {field.name: getattr(found, field.name) for field in fields(found)}
    return values | {"maps": {layer: cam.tolist() for layer, cam in found.maps.items()}}


@pytest.mark.parametrize("answer", [ANSWER, None])
def test_one_reading_serves_any_number_of_explanations(model, processor, image, monkeypatch, answer):
    """Of other parts, layers and settings, in any order: the same as each with a reading of its own."""
    reading = read(model, processor, image, PROMPT, answer, 6)
    words = reading.answer.split()
    target, layers = words[-1], [[1], [2, model.model.visual.merger]]
    jobs = [
        (None, layers[0], {"num_samples": 2}),
        (target, layers[1], {"num_samples": 2, "seed": 4, "method": "hirescam", "rules": "plain", "tap": "output"}),
        (target, layers[0], {"use_smooth": False, "contrast": "犬", "score": "logprob"}),
        (None, layers[0], {"num_samples": 2}),
    ]
    alone = [
        compute_token_maps(
            model,
            processor,
            image,
            PROMPT,
            at,
            target=part,
            answer=answer,
            max_new_tokens=6,
            passes=passes_of(options.get("contrast")),
            **options,
        )
        for part, at, options in jobs
    ]
    before = {name: value.clone() for name, value in reading.inputs.items()}
    monkeypatch.setattr(model, "generate", raising(AssertionError("answers again")))
    monkeypatch.setattr(type(processor), "__call__", raising(AssertionError("reads again")))
    for (part, at, options), expected in zip(jobs, alone, strict=True):
        span = core.find_target(reading.answer, part)
        (found,) = explain(reading, [span], at, Settings(**options), passes=passes_of(options.get("contrast")))
        assert values_of(found) == values_of(expected)
        assert any(cam.any() for cam in found.maps.values())
    assert reading.inputs.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in reading.inputs.items())
    assert (reading.prompt, reading.photo.tobytes()) == (PROMPT, image.tobytes())


def test_reading_is_what_the_model_reads(model, processor, image):
    reading = read(model, processor, image, PROMPT, ANSWER)
    assert (reading.answer, reading.grid) == (ANSWER, (4, 6))
    assert reading.tokens == processor.tokenizer(ANSWER)["input_ids"]
    assert (reading.inputs["input_ids"][0, reading.positions] == model.config.image_token_id).all()
    assert (reading.inputs["input_ids"] == model.config.image_token_id).sum() == len(reading.positions) == 24
    assert [reading.tokens_of(span) for span in ((4, 7), (6, 9), (12, 13), (0, 1))] == [[4], [4, 5], [7, 8, 9], [0]]


def test_several_parts_take_no_contrast(model, processor, image):
    reading = read(model, processor, image, PROMPT, ANSWER)
    with pytest.raises(ValueError, match="contrast='a' takes the place of one part of the answer, not 2"):
        explain(reading, [(0, 3), (4, 7)], [0], Settings(contrast="a"), passes=contrasted_passes)
    with pytest.raises(ValueError, match="^contrast='a' needs passes=contrasted_passes of common/passes.py$"):
        explain(reading, [(0, 3)], [0], Settings(contrast="a"))


def test_parts_that_name_no_token_are_errors(model, processor, image):
    reading = read(model, processor, image, PROMPT, ANSWER)
    with pytest.raises(ValueError, match=r"^spans=\[\] has no part of the answer"):
        explain(reading, [], [0])
    for span in ((3, 3), (30, 33), (5, 4), (-3, 3), (0, 14), 5, None, ("a", "b"), (0.5, 1)):
        message = f": {span} must be (start, end) in the 13 characters of the answer, with a token in it"
        with pytest.raises(ValueError, match=f"^spans=.*{re.escape(message)}$"):
            explain(reading, [(0, 3), span], [0])


def plain(value):
    """Whether a value is of plain Python and NumPy, through and through."""
    if isinstance(value, (dict, list, tuple, frozenset)):
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        return all(plain(part) for part in parts)
    return value is None or type(value) in (str, bool, int, float, np.ndarray)


def test_results_are_plain_values(model, processor, image):
    """They outlive the model and its graphs, and can be stored."""
    layers = [2, model.model.visual.merger]
    found = compute_token_maps(model, processor, image, PROMPT, layers, num_samples=2, max_new_tokens=3, tap="output")
    values = {field.name: getattr(found, field.name) for field in fields(found)}
    settings = values.pop("settings")
    assert plain(values)
    assert plain(asdict(settings))
    assert not plain({"a": [torch.tensor(1)]})
    assert found.maps[2].dtype == np.float32


def test_blank_layers_are_told_apart():
    """One without a gradient from one whose map is zero everywhere, and neither from one that has a map."""
    some, zeros = np.array([[0, 1]], np.float32), np.zeros((1, 2), np.float32)
    maps = {0: some, 1: zeros, "model.visual.merger": zeros, 2: zeros}
    about = (1, 2), PROMPT, "cat", [5], "cat", (0, 3), [0]
    found = TokenMaps(maps, *about, frozenset([2, "model.visual.merger"]), Settings())
    no_gradient = dict.fromkeys([2, "model.visual.merger"], "no gradient")
    assert found.blank == {1: "zero everywhere"} | no_gradient
    assert TokenMaps({0: some}, *about, frozenset(), Settings()).blank == {}


def test_map_that_is_zero_everywhere_is_blank_but_has_a_gradient(model, processor, image, monkeypatch):
    monkeypatch.setitem(
        core.METHODS,
        "gradcam",
        core.METHODS["gradcam"]._replace(formula=lambda features, gradients: 0 * core.gradcam(features, gradients)),
    )
    found = compute_token_maps(model, processor, image, PROMPT, [1, 2], **CLEAN, tap="output")
    assert found.blank == {1: "zero everywhere", 2: "no gradient"}
    assert found.no_gradient == {2}


# what the model may do


def raising(error):
    def hook(*_):
        raise error

    return hook


def test_out_of_memory_says_how_many_image_tokens(model, processor, image):
    handle = decoder(model)[2].register_forward_pre_hook(raising(torch.cuda.OutOfMemoryError("CUDA out of memory")))
    try:
        with pytest.raises(RuntimeError, match="24 image tokens: lower batch_size, give the model fewer pixels"):
            compute_token_maps(model, processor, image, PROMPT, [0], **CLEAN)
    finally:
        handle.remove()


DAMAGED = "its weights may be damaged, or hold such values"
ADVICE = {torch.float16: "load it as float32", torch.bfloat16: "load it as float32"}
ADVICE |= {torch.float32: DAMAGED, torch.float64: DAMAGED}


@pytest.mark.parametrize("dtype", ADVICE, ids=str)
def test_values_that_are_not_finite_name_layer_and_dtype_and_what_to_do(make_model, processor, image, dtype):
    def poison(module, args):
        args[0].register_hook(lambda gradient: gradient * float("nan"))

    model = make_model(dtype)
    handle = decoder(model)[2].register_forward_pre_hook(poison)
    with pytest.raises(ExplanationError, match=f"^the gradient at layer 1 is not finite in {dtype}: {ADVICE[dtype]}$"):
        compute_token_maps(model, processor, image, PROMPT, [1], **CLEAN)
    handle.remove()
    model.lm_head.register_forward_hook(lambda module, args, output: output.abs() * float("inf"))
    with pytest.raises(ExplanationError, match=f"^the score is inf in {dtype}: {ADVICE[dtype]}$"):
        compute_token_maps(model, processor, image, PROMPT, [1], **CLEAN)


# nothing is left behind


def state_of(model, image):
    return {
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else p.grad.sum().item() for p in model.parameters()],
        "weights": [p.sum().item() for p in model.parameters()],
        "positions": getattr(model.model, "rope_deltas", None),
        "random": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),  # noqa: NPY002
        "grad_mode": torch.is_grad_enabled(),
        "image": (image.mode, image.tobytes()),
    }


def unruly(make_model):
    """A model in a state of its own: part frozen, part training, some gradients there."""
    model = make_model()
    decoder(model)[0].requires_grad_(False)
    decoder(model)[1].train()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    return model


def test_nothing_is_left_behind_after_success(make_model, processor, image):
    model = unruly(make_model)
    before = state_of(model, image)
    compute_token_maps(model, processor, image, PROMPT, [0, 2], num_samples=2, max_new_tokens=4)
    assert state_of(model, image) == before


def test_nothing_is_left_behind_after_an_exception_in_the_forward(make_model, processor, image):
    model = unruly(make_model)
    decoder(model)[2].register_forward_pre_hook(raising(KeyError("stumble")))
    before = state_of(model, image)
    with pytest.raises(KeyError, match="stumble"):
        compute_token_maps(model, processor, image, PROMPT, [0, 2], answer=ANSWER)
    assert state_of(model, image) == before


def test_threads_that_share_a_model_get_their_own_maps(model, processor, image):
    """And a model that is in use is not found in another's state."""
    jobs = [{"answer": answer, "rules": rules} for answer in ("the red cat", "cat", "red") for rules in core.RULES]

    def explain(job):
        return compute_token_maps(model, processor, image, PROMPT, [0, 1], num_samples=4, **job).maps

    alone, before = [explain(job) for job in jobs], state_of(model, image)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(explain, jobs))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal([one[0], one[1]], [other[0], other[1]])
    assert state_of(model, image)["hooks"] == before["hooks"]
    assert state_of(model, image)["requires_grad"] == before["requires_grad"]


def test_model_in_training_is_explained_in_evaluation(make_model, processor, image):
    """Its dropout is off for the pass, for the answer too, and on again behind it."""
    model = make_model()
    for layer in decoder(model):
        layer.self_attn.attention_dropout = 0.5
    answers = {"num_samples": 2, "max_new_tokens": 5}
    expected = [compute_token_maps(model, processor, image, PROMPT, [0, 1], **each) for each in (CLEAN, answers)]
    model.train()
    with torch.random.fork_rng(), torch.no_grad():
        inputs = core.prepare_inputs(model, processor, [image], PROMPT)
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)  # it does differ from one to the next
    found = [compute_token_maps(model, processor, image, PROMPT, [0, 1], **each) for each in (CLEAN, answers)]
    assert [values_of(one) for one in found] == [values_of(one) for one in expected]
    assert all(module.training for module in model.modules())


def test_models_that_share_their_decoder_wait_for_each_other(make_model):
    model, other = make_model(), make_model()
    other.model = model.model
    entered = threading.Event()

    def borrow():
        with core.borrowed(other):
            entered.set()

    with core.borrowed(model):
        threading.Thread(target=borrow).start()
        assert not entered.wait(0.2)
    assert entered.wait(10)


def test_no_graph_is_built_below_the_first_layer_asked_for(model, processor, image):
    needs = {}
    watched = {"vision": model.model.visual.merger, "below": decoder(model)[0], "above": decoder(model)[1]}
    handles = [
        module.register_forward_hook(
            lambda module, args, output, name=name: needs.update(
                {name: (output[0] if isinstance(output, tuple) else output).requires_grad}
            )
        )
        for name, module in watched.items()
    ]
    compute_token_maps(model, processor, image, PROMPT, [1, 2], **CLEAN)
    for handle in handles:
        handle.remove()
    assert needs == {"vision": False, "below": False, "above": True}


# other homes of a model


def test_caller_may_have_switched_gradients_off(model, processor, image):
    expected = compute_token_maps(model, processor, image, PROMPT, [0], **CLEAN).maps[0]
    with torch.no_grad():
        np.testing.assert_array_equal(
            compute_token_maps(model, processor, image, PROMPT, [0], **CLEAN).maps[0], expected
        )
    with torch.inference_mode():
        np.testing.assert_array_equal(
            compute_token_maps(model, processor, image, PROMPT, [0], **CLEAN).maps[0], expected
        )


@pytest.mark.parametrize("rules", core.RULES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.2), (torch.float16, 0.03)], ids=str
)
def test_every_dtype_gives_the_map_of_float64(make_model, model, processor, image, dtype, tolerance, rules):
    expected = compute_token_maps(model, processor, image, PROMPT, [1], **CLEAN, rules=rules).maps[1]
    found = compute_token_maps(make_model(dtype), processor, image, PROMPT, [1], **CLEAN, rules=rules).maps[1]
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < tolerance * expected.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_in_float32(dtype):
    """By hand: 4097 has 13 bits; half precision, with 8 or 11, would make 4096 of it."""
    features = torch.tensor([[[4096, 1], [0, 0], [0, 4096]]], dtype=dtype)  # (1, L, C)
    gradient = torch.ones_like(features)
    about = {"grids": ((1, 2),), "positions": torch.tensor([0, 2]), "own": torch.tensor([True, True])}
    reading = SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace(model_type="qwen2_5_vl", vision_config=VISION)), **about
    )
    rows = (tensor[0, [0, 2]] for tensor in (features, gradient))  # as the vision tower has them
    for key, a, g in ((0, features, gradient), ("visual.merger", *rows)):
        assert core.token_map(key, a, g, reading, "paper").tolist() == [4097, 4096]


def test_scores_are_summed_in_float32(make_model, processor, image):
    """Ten logits of 3e4 go beyond what float16 can hold, and their sum has the same gradient as before."""
    model = make_model(torch.float16)
    expected = compute_token_maps(model, processor, image, PROMPT, [1], **CLEAN).maps[1]
    model.lm_head.register_forward_hook(lambda module, args, output: output + 3e4)
    found = compute_token_maps(model, processor, image, PROMPT, [1], **CLEAN).maps[1]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("rules", core.RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_weights_offloaded_by_accelerate_give_the_same_map(make_model, processor, image, rules, dtype):
    accelerate = pytest.importorskip("accelerate")
    model = make_model(dtype)
    options = CLEAN | {"rules": rules, "method": "hirescam"}
    expected = compute_token_maps(model, processor, image, PROMPT, [0, 2], **options).maps
    away = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert away.lm_head.weight.device.type == away.model.language_model.norm.weight.device.type == "meta"
    found = compute_token_maps(away, processor, image, PROMPT, [0, 2], **options).maps
    for layer, cam in found.items():
        assert cam.max() > 0
        np.testing.assert_allclose(cam, expected[layer], rtol=1e-6)
