"""The decoder of a Qwen2.5-VL, run in parts: its input, the positions of each group of tokens, access to attention.

Shapes:  P  prompt tokens     A  answer tokens     L = P + A     N = H * W  image tokens     K  layers
         B  runs at once      S  positions of one pass           T  positions up to its end     C  channels
Groups of positions: system, all before the image; image; user, the prompt's text behind it; answer, from the position
that predicts the answer's first token on.
"""

import inspect
from collections.abc import Callable
from contextlib import contextmanager

import cv2
import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from common.evidence import positions_of
from common.families import known, photo_tokens
from smooth_gradcam import Reading, get_model_layers, hooked, score_parts

__all__ = [
    *("CHUNK", "attention_hooked", "cache_before", "covered_tokens", "eager_attention", "embed", "predicting"),
    *("run_decoder", "sequence_length", "token_groups"),
]

CHUNK = 64  # query rows whose attention is in memory at once
COVERED = 0.25  # share of an image token above which it belongs to the object


def token_groups(reading: Reading) -> dict[str, slice]:
    """The positions of each group, in their order: slices of the L positions of prompt and answer.

    The image is all that shows the photo, be it beside the cells of the map. Raises ValueError for several pictures in
    one prompt.
    """
    places = photo_tokens(reading)
    first, last = int(places[0]), int(places[-1])
    prompt = reading.inputs["input_ids"].shape[1]
    if last - first + 1 != len(places):
        raise ValueError("the image tokens are not contiguous: several pictures in one prompt are not supported")
    edges = [0, first, last + 1, prompt - 1, prompt + len(reading.tokens)]
    return dict(zip(("system", "image", "user", "answer"), map(slice, edges, edges[1:]), strict=False))


def embed(reading: Reading) -> tuple[Tensor, Tensor]:
    """The decoder's input for prompt and answer without its last token: (1, L - 1, C), and positions (..., 1, L - 1).

    Raises ValueError for models that feed image features to further layers of the decoder (Qwen3-VL).
    """
    model, inputs = reading.model, {}
    forced, _ = score_parts(reading.inputs, reading.tokens, [range(len(reading.tokens))])
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.update(kwargs), with_kwargs=True
    )
    with hooked([handle]), torch.no_grad():
        model.model(**forced, use_cache=False)
    if inputs.get("deepstack_visual_embeds") is not None:
        raise ValueError(f"{type(model).__name__} feeds image features to several layers, which is not supported here")
    return inputs["inputs_embeds"], positions_of(inputs)


def run_decoder(model, embeddings: Tensor, positions: Tensor, cache) -> Tensor:
    """Hidden states (B, S, C) of the S positions that follow those in the cache, which is extended by them."""
    decoder = model.model.language_model
    with torch.no_grad():
        inputs = {"inputs_embeds": embeddings, "position_ids": positions, cache_name(model): cache}
        return decoder(**inputs, use_cache=True).last_hidden_state


def cache_before(reading: Reading, embeddings: Tensor, positions: Tensor, first: int) -> DynamicCache:
    """The keys and values of all before position `first`; the others are those of `embed`.

    Raises ValueError if `first` is not behind image tokens that also see those behind them (Gemma 3): the decoder
    alone, run in parts, would hide these.
    """
    model, cache = reading.model, DynamicCache()  # of all positions, in layers with a sliding window as well
    if not known(model).sees_ahead:
        if first:
            run_decoder(model, embeddings[:, :first], positions[..., :first], cache)
        return cache
    if first <= int(photo_tokens(reading)[-1]):
        raise ValueError(
            f"{type(model).__name__}: its image tokens see each other, so attention is read behind them only"
        )
    forced, _ = score_parts(reading.inputs, reading.tokens, [range(len(reading.tokens))])
    with torch.no_grad():
        model.model(**forced, **{cache_name(model): cache}, use_cache=True)
    cache.crop(first - embeddings.shape[1])
    return cache


def cache_name(model) -> str:
    """What the decoder calls its cache of keys and values, which changed in transformers 5.23."""
    parameters = inspect.signature(model.model.language_model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


@contextmanager
def eager_attention(model):
    """Inside, the decoder computes attention in separate steps, so that weights can be read and edges blocked."""
    config = model.model.language_model.config
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def attention_hooked(model, register: Callable):
    """Inside, the attention of every layer has the hook that `register(layer index, module)` puts there."""
    layers = get_model_layers(model)[0]
    with eager_attention(model), hooked(register(i, layer.self_attn) for i, layer in enumerate(layers)):
        yield


def predicting(reading: Reading, span: tuple[int, int] | None) -> list[int]:
    """The positions that predict the tokens of the span, (start, end) in characters; None is the whole answer.

    Raises ValueError if no token has a part in it.
    """
    before = reading.inputs["input_ids"].shape[1] - 1
    tokens = reading.tokens_of(span or (0, len(reading.answer)))
    if not tokens:
        raise ValueError(f"the span {span} has no token in the answer {reading.answer!r}")
    return [before + i for i in tokens]


def sequence_length(reading: Reading) -> int:
    """L, the number of tokens of prompt and answer."""
    return reading.inputs["input_ids"].shape[1] + len(reading.tokens)


def covered_tokens(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The image tokens, (N,) bool, of which the object covers a quarter or more, or at least the one it covers most.

    `mask` are the object's pixels, bool (height, width), `grid` is (H, W).
    """
    share = cv2.resize(mask.astype(np.float32), grid[::-1], interpolation=cv2.INTER_AREA).ravel()
    return share >= min(COVERED, share.max())
