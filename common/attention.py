"""Attention over the photo as a method: where the positions that predict the explained words look.

    METHODS["attention"]    at layer k, the attention of layer k itself, mean over heads or of one head
    METHODS["rollout"]      attention rollout from the last layer down to layer k (Abnar and Zuidema, ACL 2020)
    METHODS["chefer"]       relevance x attention, in the same way (Chefer et al., ICCV 2021)

The first two take no gradient. Attention says what a layer reads, not what comes of it: it does not depend on which
word follows, and tokens that all positions attend to, whatever is shown there, are hot. Import this file to have the
methods in the core. Shapes as there, and

    R  query rows that are read     T  targets     h  heads     d  channels of a head
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from smooth_gradcam import (
    METHODS,
    SCORES,
    ExplanationError,
    Method,
    Scored,
    Settings,
    at_least_float32,
    check_linear,
    compute_logits,
    get_model_layers,
    not_finite,
)

__all__ = [
    "ROWS",
    "attention_passes",
    "attention_rows",
    "check_head",
    "chefer_passes",
    "read_attention",
    "rollout_passes",
    "watched_attention",
]

ROWS = 64  # query rows whose attention is in memory at once
WATCHED = "sdpa_watched"  # the name of `_watched_sdpa` in transformers
_WATCHERS = WeakKeyDictionary()  # {attention module: what is called with its queries, keys and mask}


# what attention the model pays


def _watched_sdpa(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options):
    """transformers' attention function "sdpa" (a kernel that holds no weights), whose inputs a watcher sees."""
    output, _ = AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **options)
    if module in _WATCHERS:
        given = _WATCHERS[module](Seen(query, key, value, attention_mask, options["scaling"], output))
        output = output if given is None else given
    return output, None


class Seen(NamedTuple):
    """What the attention of a layer gets and gives."""

    query: Tensor  # (B, h, L, d), turned to the positions
    key: Tensor  # (B, h or fewer, L, d): queries may share them
    value: Tensor  # the same
    mask: Tensor | None  # None is causal; bool (True: seen), or added to the scores
    scaling: float
    output: Tensor  # (B, L, h, d)


@contextmanager
def watched_attention(model, watchers: dict[int, Callable]):
    """Inside, watchers[k](what is `Seen`) is called in the attention of layer k; what it returns is its output, if any.

    The decoder runs "sdpa", whatever it was loaded with.
    """
    AttentionInterface.register(WATCHED, _watched_sdpa)
    AttentionMaskInterface.register(WATCHED, AttentionMaskInterface()["sdpa"])

    layers, config = get_model_layers(model)[0], model.model.language_model.config
    modules, before = {layers[k].self_attn: watcher for k, watcher in watchers.items()}, config._attn_implementation
    _WATCHERS.update(modules)
    config._attn_implementation = WATCHED
    try:
        yield
    finally:
        config._attn_implementation = before
        for module in modules:
            del _WATCHERS[module]


def _check_seen(layers: list[int], found: dict) -> None:
    """Raises ExplanationError if a layer computes its attention where transformers does not let one see it."""
    if missing := [layer for layer in layers if layer not in found]:
        raise ExplanationError(f"layer {missing[0]} gives no attention: load the model without fused kernels")


def attention_rows(seen: Seen, rows: Tensor) -> Tensor:
    """softmax(q k^T scaling) of these query rows over all keys, (B, h, R, L)."""
    key, mask, shared = seen.key, seen.mask, seen.key.shape[1]
    query, rows = at_least_float32(seen.query[:, :, rows]), rows.to(key.device)
    query = query.unflatten(1, (shared, -1)).flatten(2, 3)  # (B, shared, h / shared * R, d)
    scores = query @ at_least_float32(key).transpose(2, 3) * seen.scaling
    scores = scores.unflatten(2, (-1, len(rows))).flatten(1, 2)  # (B, h, R, L)
    if mask is None:
        later = torch.arange(key.shape[2], device=rows.device) > rows[:, None]
        scores.masked_fill_(later, -torch.inf)
    elif mask.dtype == torch.bool:
        scores.masked_fill_(~mask[:, :, rows], -torch.inf)
    else:
        scores += mask[:, :, rows]
    return scores.softmax(-1)


def read_attention(
    model, inputs: dict[str, Tensor], layers: list[int], targets: list[Scored], of_heads: Callable[[Tensor], Tensor]
) -> dict[int, Tensor]:
    """{layer: (T, B, ..., L)}: attention of each target's predicting positions to all, mean over these positions.

    `of_heads` takes weights (B, h, R, L) to (B, ..., R, L), such as their mean over heads. One forward pass without
    gradients; B * h * ROWS * L weights are in memory at once, of one layer. Raises ExplanationError for values that are
    not finite.
    """
    places = sorted({place for target in targets for place in target.predicting})
    shares = torch.tensor([[target.predicting.count(place) for place in places] for target in targets])
    shares = shares / shares.sum(1, keepdim=True)  # (T, all rows)
    found = {}

    def watcher(layer):
        def watch(seen):
            for rows, share in zip(torch.tensor(places).split(ROWS), shares.split(ROWS, 1), strict=True):
                weights = of_heads(attention_rows(seen, rows))
                summed = torch.einsum("tr,b...rl->tb...l", share.to(weights), weights)
                found[layer] = found[layer] + summed if layer in found else summed

        return watch

    with watched_attention(model, {layer: watcher(layer) for layer in layers}), torch.no_grad():
        model.model(**inputs, use_cache=False)
    _check_seen(layers, found)
    if broken := [layer for layer, attention in found.items() if not attention.isfinite().all()]:
        raise not_finite(f"the attention of layer {min(broken)} is not finite", model)
    return found


def check_head(model, head: int | None) -> None:
    """Raises ValueError, with the heads that there are, for one that the model does not have."""
    heads = model.model.language_model.config.num_attention_heads
    if head is not None and not (hasattr(head, "__index__") and 0 <= head < heads):
        raise ValueError(f"head={head!r} does not exist: each layer of the model has 0 to {heads - 1}")


# the method


def attention_passes(model, forced, taps, targets: list[Scored], settings: Settings) -> Iterator[dict]:
    """In the place of `features_and_gradients`: yields {layer: (attention (B, L, 1), ones)} of each target.

    With `settings.head`, of that head. Raises ValueError for a layer that is none of the decoder's.
    """
    check_head(model, settings.head)
    _check_decoder(taps)
    of_heads = (
        (lambda weights: weights.mean(1)) if settings.head is None else (lambda weights: weights[:, settings.head])
    )
    found = read_attention(model, forced, [tap.key for tap in taps], targets, of_heads)
    for i in range(len(targets)):
        yield {layer: (of[i, ..., None], torch.ones_like(of[i, ..., None])) for layer, of in found.items()}


def _check_decoder(taps) -> None:
    if other := next((tap.key for tap in taps if not isinstance(tap.key, int)), None):
        raise ValueError(f"layer {other} has no attention of the answer: give decoder layers")


def attended(attention: Tensor, _: Tensor) -> Tensor:
    """The attention itself: (N, 1) -> (N,)."""
    return attention[:, 0]


NO_GRADIENT = dict.fromkeys(("tap", "score", "rules"), "attention takes no gradient, and is read in the layer itself")
WHATEVER = {"contrast": "attention is the same whichever word follows"}
METHODS["attention"] = Method(attended, rules="plain", run=attention_passes, inert=NO_GRADIENT | WHATEVER)


# through the layers, from the last one down


def rollout_passes(model, forced, taps, targets: list[Scored], settings: Settings) -> Iterator[dict]:
    """In the place of `features_and_gradients`: attention rollout, {layer: (shares (B, L, 1), ones)} of each target.

    v_K has 1 / T at each of the T predicting positions, and v_k = v_(k+1) (A_k + I) / 2 with the mean A_k over heads:
    how much of the answer's positions stems from each position that enters layer k, if attention were all that mixes
    them (Abnar and Zuidema, ACL 2020, section 3, one row of the product). v_k sums to one.
    """
    layers, seen = _whole_layers(model, taps), {}

    def keep(layer, one):
        seen[layer] = one._replace(value=None, output=None)

    with watched_attention(model, {layer: partial(keep, layer) for layer in layers}), torch.no_grad():
        model.model(**forced, use_cache=False)
    _check_seen(layers, seen)
    yield from _swept(model, seen, taps, targets, lambda layer, rows, target: attention_rows(seen[layer], rows), 0.5)


def chefer_passes(model, forced, taps, targets: list[Scored], settings: Settings) -> Iterator[dict]:
    """In the place of `features_and_gradients`: relevance x attention, {layer: (relevance (B, L, 1), ones)}.

    v_K as for rollout, and v_k = v_(k+1) + v_(k+1) E_h[(dS/dA_k * A_k)+], S the score: a row of R <- R + A R, eq. 5 and
    6 of Chefer et al. (ICCV 2021), for self-attention alone, as a decoder has it. The gradient of a weight is that of
    its head's output times the value that it weighs, so that rows come in chunks.
    """
    check_linear(model)
    layers, seen = _whole_layers(model, taps), {}

    def watcher(layer):
        def watch(one):
            output = one.output if one.output.requires_grad else one.output.detach().requires_grad_()
            inputs = {name: getattr(one, name).detach() for name in ("query", "key", "value")}
            seen.setdefault(layer, one._replace(**inputs, output=output))  # layers may be recomputed in the backward
            return output

        return watch

    watchers = {layer: watcher(layer) for layer in layers}
    with watched_attention(model, watchers):
        logits = compute_logits(model, forced, min(min(target.predicting) for target in targets))
    _check_seen(layers, seen)
    length, gradients = forced["input_ids"].shape[1], {}
    for i, target in enumerate(targets, 1):
        rows = at_least_float32(logits[:, [position - length for position in target.predicting]])  # (B, T, V)
        expected = torch.tensor(target.expected, device=rows.device)
        scores = sum(SCORES[settings.score](row, expected) for row in rows)
        if not scores.isfinite():
            raise not_finite(f"the score is {scores.item()}", model)
        outputs = [seen[layer].output for layer in layers]
        with watched_attention(model, watchers):
            found = torch.autograd.grad(scores, outputs, retain_graph=i < len(targets))
        gradients[i - 1] = dict(zip(layers, found, strict=True))
    seen = {layer: one._replace(output=None) for layer, one in seen.items()}

    def relevance(layer, rows, target):  # (B, h, R, L)
        weights, value = attention_rows(seen[layer], rows), at_least_float32(seen[layer].value)
        given = at_least_float32(gradients[target][layer][:, rows]).transpose(1, 2)  # (B, h, R, d)
        given = given.unflatten(1, (value.shape[1], -1)).flatten(2, 3) @ value.transpose(2, 3)
        return (weights * given.unflatten(2, (-1, len(rows))).flatten(1, 2)).relu()

    yield from _swept(model, seen, taps, targets, relevance, None)


def _whole_layers(model, taps) -> list[int]:
    """The layers from the first tapped one up to the last. Raises ValueError for a tap that is no decoder layer."""
    _check_decoder(taps)
    return list(range(min(tap.key for tap in taps), get_model_layers(model)[1]))


def _swept(model, seen: dict[int, Seen], taps, targets, rows_of: Callable, kept: float | None) -> Iterator[dict]:
    """From the last layer down, v <- v + v M for the mean M over heads of rows_of(layer, rows, target).

    With `kept`, v <- kept v + (1 - kept) v M. Yields {layer: (v, ones)} of each target, v (B, L, 1).
    """
    first = next(iter(seen.values())).query
    for number, target in enumerate(targets):
        v = torch.zeros(len(first), first.shape[2], dtype=at_least_float32(first).dtype)
        for place in target.predicting:
            v[:, place] += 1 / len(target.predicting)
        found = {}
        for layer in sorted(seen, reverse=True):
            v, taken = v.to(seen[layer].key.device), 0
            with torch.no_grad():
                for rows in v.any(0).nonzero()[:, 0].split(ROWS):
                    taken = taken + torch.einsum("br,brl->bl", v[:, rows], rows_of(layer, rows, number).mean(1))
            v = v + taken if kept is None else kept * v + (1 - kept) * taken
            if not v.isfinite().all():
                raise not_finite(f"the relevance at layer {layer} is not finite", model)
            found[layer] = v[..., None]
        yield {tap.key: (found[tap.key], torch.ones_like(found[tap.key])) for tap in taps}


HEAD = {"head": "all heads of a layer act together"}
INERT = NO_GRADIENT | WHATEVER | HEAD
METHODS["rollout"] = Method(attended, rules="plain", run=rollout_passes, inert=INERT)
RULED = dict.fromkeys(("tap", "rules"), "it has gradients of attention, without rules")
METHODS["chefer"] = Method(
    attended, rules="plain", run=chefer_passes,
    inert=RULED | HEAD | {"contrast": "relevance that is cut at zero has no difference"},
)  # fmt: skip
