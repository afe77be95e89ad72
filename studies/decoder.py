"""The decoder of a Qwen2.5-VL run in parts: what it gets, where each group of tokens stands, its attention as weights.

Shapes:  P  prompt tokens     A  answer tokens     L = P + A     N = H * W  image tokens     K  layers
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

from smooth_gradcam import Reading, get_model_layers, hooked, score_parts

__all__ = ["covered_tokens", "token_groups"]
CHUNK = 64  # query rows whose attention is in memory at once
COVERED = 0.25  # share of an image token from which on it belongs to the object


# the decoder's input, and the decoder run in parts


def token_groups(reading: Reading) -> dict[str, slice]:
    """The positions of each group, in their order: slices of the L positions of prompt and answer."""
    first, last = (int(reading.positions[i]) for i in (0, -1))
    prompt = reading.inputs["input_ids"].shape[1]
    if last - first + 1 != len(reading.positions):
        raise ValueError("the image tokens do not stand side by side: several pictures in one prompt are not supported")
    edges = [0, first, last + 1, prompt - 1, prompt + len(reading.tokens)]
    return dict(zip(("system", "image", "user", "answer"), map(slice, edges, edges[1:]), strict=False))


def embed(reading: Reading) -> tuple[Tensor, Tensor]:
    """What the decoder gets of prompt and answer but for the last token: (1, L - 1, C), and positions (3, 1, L - 1).

    Raises ValueError for models that feed image features to the decoder elsewhere too (Qwen3-VL).
    """
    model, seen = reading.model, {}
    forced, _ = score_parts(reading.inputs, reading.tokens, [range(len(reading.tokens))])
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model.model(**forced, use_cache=False)
    finally:
        handle.remove()
    if seen.get("deepstack_visual_embeds") is not None:
        raise ValueError(f"{type(model).__name__} feeds its image features to several layers: flow does not know how")
    return seen["inputs_embeds"], seen["position_ids"]


def run_decoder(model, embeddings: Tensor, positions: Tensor, cache) -> Tensor:
    """Hidden states (B, S, C) of a stretch of S positions behind those in the cache, which grows by them."""
    decoder = model.model.language_model
    name = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"  # of 5.23 on
    with torch.no_grad():
        given = {"inputs_embeds": embeddings, "position_ids": positions, name: cache}
        return decoder(**given, use_cache=True).last_hidden_state


def empty_cache(model):
    return DynamicCache(config=model.model.language_model.config)


@contextmanager
def eager_attention(model):
    """Inside, the decoder computes attention step by step, so that its weights can be read and its edges blocked."""
    config = model.model.language_model.config
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def attention_hooked(model, register: Callable):
    """Inside, `register(layer index, attention module)` has hooked every layer's attention; afterwards none is."""
    layers = get_model_layers(model)[0]
    with eager_attention(model), hooked(register(i, layer.self_attn) for i, layer in enumerate(layers)):
        yield


def predicting(reading: Reading, span: tuple[int, int] | None) -> list[int]:
    """The positions that predict the tokens of this part of the answer, all of it for None."""
    before = reading.inputs["input_ids"].shape[1] - 1
    tokens = reading.tokens_of(span or (0, len(reading.answer)))
    if not tokens:
        raise ValueError(f"the span {span} has no token in the answer {reading.answer!r}")
    return [before + i for i in tokens]


def sequence_length(reading: Reading) -> int:
    return reading.inputs["input_ids"].shape[1] + len(reading.tokens)


def covered_tokens(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The image tokens (N,) bool of which the object covers a quarter or more, or else the one that it covers most."""
    share = cv2.resize(mask.astype(np.float32), grid[::-1], interpolation=cv2.INTER_AREA).ravel()
    return share >= min(COVERED, share.max())
