"""Attention over the photo as a method: where the positions that predict the explained words look.

    METHODS["attention"]    at layer k, the attention of layer k itself, mean over heads or of one head

No gradient is taken. Attention says what a layer reads, not what comes of it: it does not depend on which word follows,
and tokens that all positions attend to, whatever is shown there, are hot. Import this file to have the method in the
core. Shapes as there, and

    R  query rows that are read     T  targets     h  heads     d  channels of a head
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from smooth_gradcam import METHODS, Method, Scored, Settings, at_least_float32, get_model_layers, not_finite

__all__ = ["ROWS", "attention_passes", "attention_rows", "check_head", "read_attention", "watched_attention"]

ROWS = 64  # query rows whose attention is in memory at once
WATCHED = "sdpa_watched"  # the name of `_watched_sdpa` in transformers
_WATCHERS = WeakKeyDictionary()  # {attention module: what is called with its queries, keys and mask}


# what attention the model pays


def _watched_sdpa(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options):
    """transformers' attention function "sdpa" (a kernel that holds no weights), whose inputs a watcher sees."""
    if module in _WATCHERS:
        _WATCHERS[module](query, key, attention_mask, options["scaling"])
    return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **options)


AttentionInterface.register(WATCHED, _watched_sdpa)
AttentionMaskInterface.register(WATCHED, AttentionMaskInterface()["sdpa"])


@contextmanager
def watched_attention(model, watchers: dict[int, Callable]):
    """Inside, watchers[k](queries (B, h, L, d), keys, mask, scaling) is called in the attention of layer k.

    Queries and keys are turned to their positions; keys have fewer heads where queries share them. The mask is None for
    a causal one, bool (True: seen) or added to the scores. The decoder runs "sdpa", whatever it was loaded with.
    """
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


def attention_rows(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, rows: Tensor) -> Tensor:
    """softmax(q k^T scaling) of these query rows over all keys: (B, h, L, d), (B, h or fewer, L, d) -> (B, h, R, L)."""
    query, shared = at_least_float32(query[:, :, rows]), key.shape[1]
    query = query.unflatten(1, (shared, -1)).flatten(2, 3)  # (B, shared, h / shared * R, d)
    scores = query @ at_least_float32(key).transpose(2, 3) * scaling
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
        def watch(query, key, mask, scaling):
            for rows, share in zip(torch.tensor(places).split(ROWS), shares.split(ROWS, 1), strict=True):
                weights = of_heads(attention_rows(query, key, mask, scaling, rows.to(query.device)))
                summed = torch.einsum("tr,b...rl->tb...l", share.to(weights), weights)
                found[layer] = found[layer] + summed if layer in found else summed

        return watch

    with watched_attention(model, {layer: watcher(layer) for layer in layers}), torch.no_grad():
        model.model(**inputs, use_cache=False)
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
    if other := next((tap.key for tap in taps if not isinstance(tap.key, int)), None):
        raise ValueError(f"layer {other} has no attention of the answer: give decoder layers")
    of_heads = (
        (lambda weights: weights.mean(1)) if settings.head is None else (lambda weights: weights[:, settings.head])
    )
    found = read_attention(model, forced, [tap.key for tap in taps], targets, of_heads)
    for i in range(len(targets)):
        yield {layer: (of[i, ..., None], torch.ones_like(of[i, ..., None])) for layer, of in found.items()}


def attended(attention: Tensor, _: Tensor) -> Tensor:
    """The attention itself: (N, 1) -> (N,)."""
    return attention[:, 0]


NO_GRADIENT = dict.fromkeys(("tap", "score", "rules"), "attention takes no gradient, and is read in the layer itself")
WHATEVER = {"contrast": "attention is the same whichever word follows"}
METHODS["attention"] = Method(attended, rules="plain", run=attention_passes, inert=NO_GRADIENT | WHATEVER)
