"""Other ways for noisy copies to pass the model than `noisy_passes` of the core, and what spares memory or time.

    explain(reading, [span], layers, settings, passes=contrasted_passes)      the target's score minus another text's
    with recomputed(model): ...                                               less memory for many layers
    with vision_kept(model): ...                                              the vision tower runs once for a photo

Shapes:  as in `smooth_gradcam.py`; A  answer tokens     T  scored tokens     B  pictures
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from smooth_gradcam import (
    ExplanationWarning,
    Reading,
    Scored,
    Settings,
    at_least_float32,
    batch_of,
    compute_logits,
    get_model_layers,
    identity_rule,
    layer_norm_rule,
    noisy_passes,
    tokenise,
)

__all__ = ["contrasted_passes", "passes_of", "recomputed", "token_probabilities", "vision_kept", "watched_passes"]


# passes


def passes_of(contrast: str | None) -> Callable[..., Iterator[tuple[int, dict]]]:
    """The passes that settings with this contrast need."""
    return noisy_passes if contrast is None else contrasted_passes


def contrasted_passes(
    reading: Reading, spans, taps, settings: Settings, progress=None, batch_size: int = 1
) -> Iterator[tuple[int, dict]]:
    """`noisy_passes` of one part, with the gradient of its score minus that of `settings.contrast` in its place."""
    if len(spans) != 1:
        raise ValueError(f"contrast={settings.contrast!r} needs one part to take the place of, not {len(spans)}")
    other, span = put_in_place(reading, spans[0], settings.contrast)
    targets = noisy_passes(reading, spans, taps, settings, progress, batch_size)
    others = noisy_passes(other, [span], taps, settings, None, batch_size)  # the seed makes the noise the same
    for (part, pairs), (_, against) in zip(targets, others, strict=True):
        yield part, difference(pairs, against)


def put_in_place(reading: Reading, span: tuple[int, int], contrast: str) -> tuple[Reading, tuple[int, int]]:
    """The reading of the answer up to these characters and `contrast` in their place, and where it stands there."""
    part = reading.tokens_of(span)
    first, last = reading.spans[part[0]][0], reading.spans[part[-1]][1]  # whole tokens: the rest of their text is kept
    text = reading.answer[first : span[0]] + contrast + reading.answer[span[1] : last]
    tokens = tokenise(reading.processor.tokenizer, text, "contrast")
    if max(len(tokens), len(part)) > 2 * min(len(tokens), len(part)):
        message = (
            f"contrast={contrast!r} has {len(tokens)} tokens, the target {len(part)}: scores are sums over tokens, so "
            "the map mostly shows the difference in length"
        )
        warnings.warn(message, ExplanationWarning, stacklevel=2)
    spans = [*reading.spans[: part[0]], *[(first, first + len(text))] * len(tokens)]
    answer = reading.answer[:first] + text
    other = replace(reading, tokens=reading.tokens[: part[0]] + tokens, spans=spans, answer=answer)
    return other, (first, first + len(text))


def difference(pairs: dict, others: dict) -> dict:
    """The first features with the difference of the gradients. What stands before the answer is the same in both."""
    result = {}
    for key, (features, gradient) in pairs.items():
        other = others[key][1]
        if gradient is not None and gradient.dim() > 2:  # sequences that may end differently
            length = min(gradient.shape[1], other.shape[1])
            features, gradient, other = (tensor[:, :length] for tensor in (features, gradient, other))
        result[key] = features, None if gradient is None else gradient - other
    return result


def watched_passes(passes: Callable, watch: Callable[[dict], None]) -> Callable[..., Iterator[tuple[int, dict]]]:
    """`passes` that call `watch` with {key: (features, gradient or None)} of every copy and part."""

    def watched(*args, **kwargs):
        for part, pairs in passes(*args, **kwargs):
            watch(pairs)
            yield part, pairs

    return watched


# memory and time


@contextmanager
def forwards_restored(modules: Iterable[nn.Module]):
    """Inside, the forward of these modules may be replaced; afterwards they have their own again, or accelerate's."""
    before = [(module, vars(module).get("forward")) for module in modules]
    try:
        yield
    finally:
        for module, forward in before:
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


@contextmanager
def recomputed(model):
    """Inside, a forward keeps only the input of each decoder layer: the backward runs the layer once more.

    Slower, for a fraction of the memory where many layers are explained. The vision tower keeps what it keeps.
    """
    layers = get_model_layers(model)[0]
    offloaded = any(parameter.is_meta for parameter in layers.parameters())  # weights are there for a whole layer only
    with forwards_restored(layers):
        for layer in layers:  # there is no dropout, so the random state need not be kept
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        with set_checkpoint_early_stop(not offloaded):
            yield


@contextmanager
def vision_kept(model):
    """Inside, the vision tower runs once for the first pictures that it sees: what it gave is kept, and given again.

    It runs for other pictures, with other weights, and where hooks watch or change what happens in it.
    """
    tower = model.model.visual
    with forwards_restored([tower]):
        tower.forward = functools.partial(_run_once, tower, tower.forward, {})  # a copy of the model copies its parts
        yield


def _run_once(tower, run: Callable, seen: dict, pixels: Tensor, *args, **kwargs):
    kinds = (kind for module in tower.modules() for kind in (module._forward_hooks, module._forward_pre_hooks))
    if not {hook for kind in kinds for hook in kind.values()} <= {identity_rule, layer_norm_rule}:  # change no value
        return run(pixels, *args, **kwargs)
    state = id(tower), [parameter._version for parameter in tower.parameters()]
    if seen and seen["state"] == state and torch.equal(seen["pixels"], pixels):
        return copy(seen["output"])  # as the model may write into it
    output = run(pixels, *args, **kwargs)
    if not seen:
        seen.update(state=state, pixels=pixels, output=copy(output))
    return output


# probabilities


def token_probabilities(model, forced: dict[str, Tensor], pixels: Tensor, scored: Scored) -> np.ndarray:
    """Probability of each scored token for each of B pictures: pixels (B, patches, ...) -> (B, T)."""
    length = forced["input_ids"].shape[1]
    with torch.no_grad():
        batch = batch_of(forced, [{"pixel_values": picture} for picture in pixels])
        logits = compute_logits(model, batch, min(scored.predicting))  # (B, L or less, V)
    logits = at_least_float32(logits[:, [position - length for position in scored.predicting]])  # (B, T, V)
    expected = torch.tensor(scored.expected, device=logits.device).expand(len(pixels), -1)[..., None]
    return logits.softmax(-1).gather(2, expected)[..., 0].cpu().numpy()
