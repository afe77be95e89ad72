"""The decoder of a Qwen2.5-VL, run in parts: its input, the positions of each group of tokens, access to attention.

Shapes:  P  prompt tokens     A  answer tokens     L = P + A     N = H * W  image tokens     K  layers
         B  runs at once      S  positions of one pass           T  positions up to its end     C  channels
Groups of positions: image, the explained pictures; system, the text before the first of these; user, the prompt's text
behind it; answer, from the position that predicts the answer's first token on; other images, pictures that are not
explained, if there are any. The frames of a video are pictures like any others.
"""

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from common.evidence import positions_of
from common.families import known, photo_tokens
from smooth_gradcam import Reading, get_model_layers, hooked, score_parts

__all__ = [
    *("CHUNK", "Given", "attention_hooked", "cache_before", "covered_tokens", "eager_attention", "embed"),
    *("picture_positions", "predicting", "run_decoder", "sequence_length", "stretches", "token_groups"),
]

CHUNK = 64  # query rows whose attention is in memory at once
COVERED = 0.25  # share of an image token above which it belongs to the object


def picture_positions(reading: Reading) -> np.ndarray:
    """The positions of the image tokens of all pictures of the prompt, explained or not."""
    ids = reading.inputs["input_ids"][0]
    return (ids == ids[reading.positions[0]]).nonzero()[:, 0].cpu().numpy()


def token_groups(reading: Reading) -> dict[str, np.ndarray]:
    """The positions of each group, in order: each of the L positions of prompt and answer is in one of them.

    The image is all that shows the explained photos, be it beside the cells of their maps.
    """
    prompt, image = reading.inputs["input_ids"].shape[1], photo_tokens(reading).numpy()
    pictures = picture_positions(reading)
    text, others = np.setdiff1d(np.arange(prompt - 1), pictures), np.setdiff1d(pictures, image)
    groups = {"system": text[text < image[0]], "image": image, "user": text[text > image[0]]}
    groups["answer"] = np.arange(prompt - 1, prompt + len(reading.tokens))
    return groups | ({"other images": others} if len(others) else {})


def stretches(reading: Reading) -> list[tuple[str, int, int]]:
    """(group, start, stop) of each stretch of positions of one group, in the order of the sequence."""
    names = np.empty(sequence_length(reading), object)
    for name, positions in token_groups(reading).items():
        names[positions] = name
    edges = [0, *(np.flatnonzero(names[1:] != names[:-1]) + 1).tolist(), len(names)]
    return [(names[start], start, stop) for start, stop in zip(edges, edges[1:], strict=False)]


@dataclass(frozen=True)
class Given:
    """What the decoder is given at S positions, in B runs."""

    embeddings: Tensor  # (B, S, C)
    positions: Tensor  # (..., B, S)
    pictures: Tensor | None = None  # (B, S) bool: image tokens, if the first layers add features of the photo to them
    added: tuple[Tensor, ...] = ()  # (B, S, C) of each of these layers (Qwen3-VL's deepstack), zero at other positions

    def at(self, rows: slice) -> "Given":
        """The same at some of the positions."""
        pictures = None if self.pictures is None else self.pictures[:, rows]
        added = tuple(features[:, rows] for features in self.added)
        return Given(self.embeddings[:, rows], self.positions[..., rows], pictures, added)

    def repeated(self, count: int) -> "Given":
        """The same of one run for `count` of them."""
        pictures = None if self.pictures is None else self.pictures.expand(count, -1)
        added = tuple(features.expand(count, -1, -1) for features in self.added)
        positions = self.positions.expand(*self.positions.shape[:-2], count, -1)
        return Given(self.embeddings.expand(count, -1, -1), positions, pictures, added)

    def __len__(self) -> int:
        return self.embeddings.shape[1]  # S


def embed(reading: Reading) -> Given:
    """The decoder's input for prompt and answer without its last token, L - 1 positions."""
    model, inputs = reading.model, {}
    forced, _ = score_parts(reading.inputs, reading.tokens, [range(len(reading.tokens))])
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.update(kwargs), with_kwargs=True
    )
    with hooked([handle]), torch.no_grad():
        model.model(**forced, use_cache=False)
    embeddings, positions = inputs["inputs_embeds"], positions_of(inputs)
    if inputs.get("deepstack_visual_embeds") is None:
        return Given(embeddings, positions)
    pictures, added = inputs["visual_pos_masks"], []
    for features in inputs["deepstack_visual_embeds"]:
        added.append(torch.zeros_like(embeddings))
        added[-1][pictures] = features.to(embeddings)
    return Given(embeddings, positions, pictures, tuple(added))


def run_decoder(model, given: Given, cache) -> Tensor:
    """Hidden states (B, S, C) of the S given positions, which follow those in the cache; it is extended by them."""
    decoder = model.model.language_model
    inputs = {"inputs_embeds": given.embeddings, "position_ids": given.positions, cache_name(model): cache}
    if given.added and given.pictures.any():
        inputs["visual_pos_masks"] = given.pictures
        inputs["deepstack_visual_embeds"] = [features[given.pictures] for features in given.added]
    with torch.no_grad():
        return decoder(**inputs, use_cache=True).last_hidden_state


def cache_before(reading: Reading, given: Given, first: int) -> DynamicCache:
    """The keys and values of all before position `first`; `given` is that of `embed`.

    Raises ValueError if `first` is not behind image tokens that also see those behind them (Gemma 3): the decoder
    alone, run in parts, would hide these.
    """
    model, cache = reading.model, DynamicCache()  # of all positions, in layers with a sliding window as well
    if not known(model).sees_ahead:
        if first:
            run_decoder(model, given.at(slice(first)), cache)
        return cache
    if first <= picture_positions(reading)[-1]:
        raise ValueError(
            f"{type(model).__name__}: its image tokens see each other, so attention is read behind them only"
        )
    forced, _ = score_parts(reading.inputs, reading.tokens, [range(len(reading.tokens))])
    with torch.no_grad():
        model.model(**forced, **{cache_name(model): cache}, use_cache=True)
    cache.crop(first - len(given))
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
