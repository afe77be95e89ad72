"""Alternatives to `noisy_passes` of the core, and context managers that save memory or time.

    explain(reading, [span], layers, settings, passes=contrasted_passes)      the target's score minus another text's
    with recomputed(model): ...                                               less memory for many layers
    with vision_kept(model): ...                                              the vision tower runs once for each photo

Shapes:  as in `smooth_gradcam.py`
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

from common.families import known
from smooth_gradcam import (
    ExplanationWarning,
    Reading,
    Scored,
    Settings,
    at_least_float32,
    batch_of,
    compute_logits,
    decode,
    get_model_layers,
    identity_rule,
    layer_norm_rule,
    noisy_passes,
    tokenise,
    unwrapped,
)

__all__ = [
    *("SENSITIVE", "UNLIKELY", "contrasted_passes", "own_patches", "passes_of", "patches_of", "recomputed"),
    *("repainted", "token_probabilities", "vision_kept", "watched_passes", "with_contrast"),
]


# passes


def passes_of(contrast: str | None) -> Callable[..., Iterator[tuple[int, dict]]]:
    """The `passes` of `explain` that settings with this contrast need."""
    return noisy_passes if contrast is None else contrasted_passes


def contrasted_passes(
    reading: Reading, spans, taps, settings: Settings, progress=None, batch_size: int = 1
) -> Iterator[tuple[int, dict]]:
    """`noisy_passes` of one part of the answer, with the gradient of its score minus that of `settings.contrast`.

    Raises ValueError for several parts.
    """
    if len(spans) != 1:
        raise ValueError(f"contrast={settings.contrast!r} takes the place of one part of the answer, not {len(spans)}")
    other, span = with_contrast(reading, spans[0], settings.contrast)
    count, own = len(other.tokens_of(span)), len(reading.tokens_of(spans[0]))
    if max(count, own) > 2 * min(count, own):
        message = (
            f"contrast={settings.contrast!r} has {count} tokens, the target {own}: scores are sums over tokens, "
            "so the map mostly shows the difference in length"
        )
        warnings.warn(message, ExplanationWarning, stacklevel=2)
    targets = noisy_passes(reading, spans, taps, settings, progress, batch_size)
    contrasts = noisy_passes(other, [span], taps, settings, None, batch_size)  # the seed makes the noise the same
    for (part, pairs), (_, contrast_pairs) in zip(targets, contrasts, strict=True):
        yield part, _difference(pairs, contrast_pairs)


def with_contrast(reading: Reading, span: tuple[int, int], contrast: str) -> tuple[Reading, tuple[int, int]]:
    """The reading of the answer up to the span with `contrast` in its place, and the span of the contrast there."""
    indices = reading.tokens_of(span)
    first, last = reading.spans[indices[0]][0], reading.spans[indices[-1]][1]  # of whole tokens: all their text is kept
    text = reading.answer[first : span[0]] + contrast + reading.answer[span[1] : last]
    tokens = _continued(reading.processor.tokenizer, text)
    spans = [*reading.spans[: indices[0]], *[(first, first + len(text))] * len(tokens)]
    answer = reading.answer[:first] + text
    other = replace(reading, tokens=reading.tokens[: indices[0]] + tokens, spans=spans, answer=answer)
    return other, (first, first + len(text))


def _continued(tokenizer, text: str) -> list[int]:
    """The tokens of a contrast, which stands behind other text: without the blank that LLaMA's tokenizer adds."""
    tokens = tokenise(tokenizer, text, "contrast")
    if decode(tokenizer, 2 * tokens) == 2 * text:
        return tokens
    line = tokenise(tokenizer, "a\n")
    return tokenise(tokenizer, f"a\n{text}", "contrast")[len(line) :]


def _difference(pairs: dict, others: dict) -> dict:
    """The features of `pairs`, with their gradients minus those of `others`.

    The positions before the answer, those of the image among them, are the same in both.
    """
    result = {}
    for key, (features, gradient) in pairs.items():
        other = others[key][1]
        if gradient is not None and gradient.dim() > 2:  # sequences, which may differ in length
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
def _forwards_restored(modules: Iterable[nn.Module]):
    """Inside, the forward of these modules may be replaced; afterwards it is the same as before, be it accelerate's."""
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
    """Inside, a forward pass stores only the input of each decoder layer, and the backward pass runs the layer again.

    Slower, for a fraction of the memory where many layers are explained. The vision tower is not changed.
    """
    layers = get_model_layers(model)[0]
    offloaded = any(parameter.is_meta for parameter in layers.parameters())  # then each layer must run as a whole
    with _forwards_restored(layers):
        for layer in layers:  # there is no dropout, so the random state does not matter
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        with set_checkpoint_early_stop(not offloaded):
            yield


@contextmanager
def vision_kept(model):
    """Inside, the vision tower's output for the first pictures that it sees is stored, and reused for the same ones.

    It runs again for other pictures, with other weights, and where hooks read or change what happens in it.
    """
    model = unwrapped(model)
    tower = model.model.get_submodule(known(model).tower[0])
    with _forwards_restored([tower]):
        # a partial and no closure: a deep copy of the model then has its own tower, and its own store
        tower.forward = functools.partial(_run_once, tower, tower.forward, {})
        yield


def _run_once(tower, run: Callable, stored: dict, *args, **kwargs):
    pixels, modules = args[0] if args else kwargs["pixel_values"], tower.modules()
    registries = (hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks))
    hooked = {hook for hooks in registries for hook in hooks.values()} - {identity_rule, layer_norm_rule}
    if not all(hook.__module__.startswith("transformers.") for hook in hooked):  # those of the rules change no value
        return run(*args, **kwargs)
    state = id(tower), [parameter._version for parameter in tower.parameters()]
    if stored and stored["state"] == state and torch.equal(stored["pixels"], pixels):
        return copy(stored["output"])  # as the model may write into it
    output = run(*args, **kwargs)
    if not stored:
        stored.update(state=state, pixels=pixels, output=copy(output))
    return output


# pixels and probabilities

UNLIKELY = 0.01  # probability below which the model would hardly give an answer
SENSITIVE = 0.2  # fall in probability without the photo from which on a token needs it (EAGLE, 2025: sensitive tokens)


def patches_of(reading: Reading) -> Tensor:
    """The pixels of all pictures, (patches, ...), image token after image token."""
    return known(reading.model).patches(reading.inputs["pixel_values"], reading)


def own_patches(reading: Reading) -> Tensor:
    """(N * k,): which of `patches_of` are those of the explained photos, cell after cell of their maps."""
    ids = reading.inputs["input_ids"][0]
    tokens = (ids == ids[reading.positions[0]]).nonzero()[:, 0]  # (M,)
    each = len(patches_of(reading)) // len(tokens)
    first = torch.searchsorted(tokens, reading.positions.to(tokens)) * each
    return (first[:, None] + torch.arange(each, device=first.device)).flatten()


def repainted(reading: Reading, photo) -> Tensor:
    """`patches_of`, with another picture of its size in the place of the only photo."""
    patches, processor, family = patches_of(reading).clone(), reading.processor.image_processor, known(reading.model)
    own, again = own_patches(reading), family.again(reading)
    other = processor(images=[family.reduced(photo, processor)], return_tensors="pt", **again)["pixel_values"]
    patches[own] = family.patches(other.to(patches), reading)[own - own.min()]
    return patches


def token_probabilities(reading: Reading, forced: dict[str, Tensor], patches: Tensor, scored: Scored) -> np.ndarray:
    """Probability of each of T scored tokens for each of B pictures: `patches_of` (B, patches, ...) -> (B, T)."""
    model, length, pictures = reading.model, forced["input_ids"].shape[1], known(reading.model).pictures
    with torch.no_grad():
        copies = [{"pixel_values": pictures(own, forced["pixel_values"], reading)} for own in patches]
        logits = compute_logits(model, batch_of(forced, copies), min(scored.predicting))  # (B, L or less, V)
    logits = at_least_float32(logits[:, [position - length for position in scored.predicting]])  # (B, T, V)
    expected = torch.tensor(scored.expected, device=logits.device).expand(len(patches), -1)[..., None]
    return logits.softmax(-1).gather(2, expected)[..., 0].cpu().numpy()
