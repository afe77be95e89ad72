"""How a photo's information flows through the decoder: what reads it, at which layers, and from where it is not needed.

    Reading                             read: photo, prompt, answer
      -> attention_flow, gradient_flow  what the answer reads by layer, forwards and backwards: (layers, positions)
      -> knockout                       what becomes of the answer if attention edges are blocked: (runs, answer tokens)
      -> figures, tables                trace and cut: the files and lines of the driver's modes flow and knockout

The figures are those of "From Redundancy to Relevance" (Zhang et al., NAACL 2025), of FastV (Chen et al., ECCV 2024)
and of "Cross-modal Information Flow in Multimodal Large Language Models" (Zhang et al., CVPR 2025), for any Qwen2.5-VL.
Where the first paper's published code and its text differ, the text is followed: that code serves LLaVA's layout alone,
reads the score one position beside those that predict the answer, and truncates at one layer that is written into the
model. Here positions are read off the input, scores are read where the answer's tokens are predicted, every layer is
tried, image tokens keep their places when they are hidden, and no weight or file of the model is changed.

Shapes:  P  prompt tokens     A  answer tokens     L = P + A     N = H * W  image tokens     K  layers
Groups of positions: system, all before the image; image; user, the prompt's text behind it; answer, from the position
that predicts the answer's first token on.
"""

import copy
import functools
import inspect
import json
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import NamedTuple

import cv2
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from smooth_gradcam import (
    ExplanationError,
    Look,
    Reading,
    Settings,
    TokenMaps,
    at_least_float32,
    borrowed,
    check_whole,
    decode,
    explain,
    generate,
    get_model_layers,
    memory_explained,
    resolve_layers,
    score_parts,
)
from visualization_utils import (
    BAND,
    GAP,
    HEAD,
    LINE,
    MARGIN,
    PAGE,
    PLAIN,
    SMALL,
    TEXT,
    WEAK,
    WIDTHS,
    Page,
    Paper,
    decimal,
    draw_layer,
    excerpt,
    fit_box,
    header,
    look_text,
    masthead,
    settings_text,
    show_progress,
    shrink,
    small_print,
    spread,
    strength,
    strongest_of,
    text_rows,
    to_csv,
)

__all__ = ["attention_flow", "gradient_flow", "knockout", "image_hidden", "token_groups", "group_sums", "find_cliff"]

CHUNK = 64  # query rows whose attention is in memory at once


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
def hooked(model, register: Callable):
    """Inside, `register(layer index, attention module)` has hooked every layer's attention; afterwards none is."""
    handles = []
    try:
        with eager_attention(model):
            for i, layer in enumerate(get_model_layers(model)[0]):
                handles.append(register(i, layer.self_attn))
            yield
    finally:
        for handle in handles:
            handle.remove()


# attention and gradients: what the answer reads


def attention_rows(reading: Reading, first: int, note: Callable[[int, int, Tensor], None]) -> None:
    """Calls note(layer, start, weights (heads, S, T)) of all query rows from position `first` on.

    The weights are those of queries start ... start + S - 1 over keys 0 ... T - 1, T = start + S. Rows before `first`
    run as the model runs them; then `CHUNK` rows at a time with eager attention, so the peak is that of one layer,
    CHUNK * L * heads, beside the keys and values of L positions. Raises ExplanationError if the model gives no weights.
    """
    model, start = reading.model, 0

    def register(i, attention):
        def hook(module, args, output):
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if weights is None:
                raise ExplanationError(f"{type(module).__name__} gives no attention weights: its layers cannot be read")
            note(i, start, weights[0])

        return attention.register_forward_hook(hook)

    with borrowed(model), memory_explained(len(reading.positions)):
        embeddings, positions = embed(reading)
        cache = empty_cache(model)
        if first:
            run_decoder(model, embeddings[:, :first], positions[..., :first], cache)
        with hooked(model, register):
            for start in range(first, embeddings.shape[1], CHUNK):  # noqa: B007  (the hook reads it)
                rows = slice(start, start + CHUNK)
                run_decoder(model, embeddings[:, rows], positions[..., rows], cache)


def predicting(reading: Reading, span: tuple[int, int] | None) -> list[int]:
    """The positions that predict the tokens of this part of the answer, all of it for None."""
    before = reading.inputs["input_ids"].shape[1] - 1
    tokens = reading.tokens_of(span or (0, len(reading.answer)))
    if not tokens:
        raise ValueError(f"the span {span} has no token in the answer {reading.answer!r}")
    return [before + i for i in tokens]


def attention_flow(reading: Reading, span: tuple[int, int] | None = None) -> np.ndarray:
    """Attention to every position, (K, L) float32: mean over heads and over the positions that predict the span.

    Of layer l, 1/|R| sum of A_l[i, j] over i in R; each row sums to one. `span` is (start, end) in characters of the
    answer, None all of it. `group_sums` makes of it the shares of figure 2A of "From Redundancy to Relevance".
    """
    rows = np.array(predicting(reading, span))
    flow = np.zeros((get_model_layers(reading.model)[1], _length(reading)), np.float32)

    def note(layer, start, weights):
        inside = rows[(rows >= start) & (rows < start + weights.shape[1])] - start
        if len(inside):
            mean = at_least_float32(weights[:, inside]).mean(0).sum(0) / len(rows)  # (T,)
            flow[layer, : len(mean)] += mean.cpu().numpy()

    attention_rows(reading, int(rows.min()), note)
    return flow


def attention_maps(reading: Reading, layers: Iterable[int], pool: int | None = None) -> tuple[dict, np.ndarray]:
    """({layer: (bins, bins) float32}, edges (bins + 1,)): attention between stretches of positions, mean over heads.

    A stretch has at most `pool` positions (10 to 20 by the length for None) of one group; the mean is over the pairs of
    a query and a key that it may see, nan where there is none. Figure 2B of "From Redundancy to Relevance".
    """
    edges = pooled_edges(reading, pool)
    where = torch.as_tensor(np.repeat(np.arange(len(edges) - 1), np.diff(edges)))
    bins = len(edges) - 1
    maps = {layer: torch.zeros(bins, bins) for layer in resolve_layers(layers, get_model_layers(reading.model)[1])}

    def pooled(rows, start):  # (S, T) -> (bins, bins): sums over stretches
        columns = torch.zeros(len(rows), bins).index_add_(1, where[: rows.shape[1]], rows)
        return torch.zeros(bins, bins).index_add_(0, where[start : start + len(rows)], columns)

    def note(layer, start, weights):
        if layer in maps:
            maps[layer] += pooled(at_least_float32(weights).mean(0).cpu().float(), start)

    attention_rows(reading, 0, note)
    seen = np.add.reduceat(np.tri(len(where)), edges[:-1], 0)
    seen = torch.as_tensor(np.add.reduceat(seen, edges[:-1], 1))  # pairs that may see each other
    return {layer: torch.where(seen > 0, cam / seen, torch.nan).numpy() for layer, cam in maps.items()}, edges


def pooled_edges(reading: Reading, pool: int | None = None) -> np.ndarray:
    """Borders (bins + 1,) of stretches of at most `pool` positions, none of which holds two groups."""
    length = _length(reading) - 1  # the answer's last token predicts nothing that is explained
    pool = pool or int(np.clip(length // 60, 10, 20))
    edges = [0]
    for part in token_groups(reading).values():
        end = min(part.stop, length)
        bins = -(-(end - edges[-1]) // pool)
        edges += np.round(np.linspace(edges[-1], end, bins + 1)[1:]).astype(int).tolist()
    return np.array(edges)


def gradient_flow(reading: Reading, span: tuple[int, int] | None = None, settings=None) -> np.ndarray:
    """What every position contributes to the score of the span, |g_i . A_i|, (K, L) float32.

    A_i are the hidden states at position i where the layer is read (as `settings`, a `Settings`, has it; without noise
    for None), g_i the gradient of the score there, mean over noisy copies. By AttnLRP's rules, g_i . A_i is relevance.
    """
    return maps_and_gradients(reading, span, settings or Settings(use_smooth=False))[1]


def maps_and_gradients(
    reading: Reading, span, settings: Settings, progress=None, **passes
) -> tuple[TokenMaps, np.ndarray]:
    """The maps of all layers, and `gradient_flow`, from the same passes (`batch_size`, `recompute`: see `explain`)."""
    total = get_model_layers(reading.model)[1]
    flow = np.zeros((total, _length(reading)), np.float32)

    def watch(pairs):
        for layer, (features, gradient) in pairs.items():
            if gradient is not None:
                products = (at_least_float32(features) * at_least_float32(gradient)).sum(-1)[0].abs()
                flow[layer, : len(products)] += products.float().cpu().numpy() / settings.num_samples

    span = span or (0, len(reading.answer))
    (token_maps,) = explain(reading, [span], range(total), settings, progress, watch=watch, **passes)
    return token_maps, flow


def group_sums(flow: np.ndarray, groups: dict[str, slice], only: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """{group: (...)}: the share of each group in the sum over (..., L), of all groups or of some.

    With only=("system", "image", "user"), eq. 7 of "From Redundancy to Relevance". Where the sum is zero: nan.
    """
    sums = {name: flow[..., groups[name]].sum(-1) for name in (only or groups)}
    whole = np.asarray(sum(sums.values()))
    whole = np.where(whole > 0, whole, np.nan)
    return {name: value / whole for name, value in sums.items()}


def _length(reading: Reading) -> int:
    return reading.inputs["input_ids"].shape[1] + len(reading.tokens)


# knockout: what the answer needs


class Edge(NamedTuple):
    """Attention that is blocked in one run: in these layers, none of the queries sees any of the keys."""

    layers: range
    queries: np.ndarray  # positions
    keys: np.ndarray  # positions


def knockout(
    reading: Reading, edges: list[Edge], *, batch_size: int = 8, progress: Callable | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What becomes of the answer when attention is blocked, one edge a run: two arrays (runs, A).

    The first has the probability of every token of the answer after those before it, the second says where the token is
    the most likely one; the model would give the answer greedily where all are. Positions stay as they are. What stands
    before the first blocked query is run once, the rest in batches of `batch_size`. `progress` wraps the iterable over
    the batches.
    """
    check_whole("batch_size", batch_size, 1)
    if not edges:
        raise ValueError("edges=[] is no run: give one Edge or more")
    model, total = reading.model, get_model_layers(reading.model)[1]
    before = reading.inputs["input_ids"].shape[1] - 1
    start = int(min([before, *(edge.queries.min() for edge in edges if len(edge.queries))]))
    answer = torch.tensor(reading.tokens)
    found = []
    with borrowed(model), memory_explained(len(reading.positions)):
        embeddings, positions = embed(reading)
        prefix = empty_cache(model)
        if start:
            run_decoder(model, embeddings[:, :start], positions[..., :start], prefix)
        embeddings, positions = embeddings[:, start:], positions[..., start:]
        shape = embeddings.shape[1], start + embeddings.shape[1]  # (S, T)
        for i in (progress or iter)(range(0, len(edges), batch_size)):
            part = edges[i : i + batch_size]
            cache = copy.deepcopy(prefix)
            cache.batch_repeat_interleave(len(part))
            with blocked(model, hidden_in(part, start, shape, total)):
                batch = embeddings.expand(len(part), -1, -1), positions.expand(-1, len(part), -1)
                states = run_decoder(model, *batch, cache)[:, before - start :]  # (B, A, C)
            states = states.flatten(0, 1)  # (B * A, C): a batch of slices would be copied with the weights
            logits = at_least_float32(model.get_output_embeddings()(states)).unflatten(0, (len(part), -1))  # (B, A, V)
            expected = answer.to(logits.device).expand(len(part), -1)[..., None]
            probability = logits.softmax(-1).gather(2, expected)[..., 0]
            found.append((probability.cpu().numpy(), (logits.argmax(-1) == expected[..., 0]).cpu().numpy()))
    probabilities, likeliest = zip(*found, strict=True)
    return np.concatenate(probabilities), np.concatenate(likeliest)


def hidden_in(edges: list[Edge], start: int, shape: tuple[int, int], total: int) -> Callable:
    """What `blocked` takes, of a batch of edges; queries of the pass are `shape`[0] from position `start` on."""
    hidden = torch.zeros(len(edges), *shape, dtype=torch.bool)  # (B, S, T)
    for run, edge in zip(hidden, edges, strict=True):
        queries, keys = (positions[positions < shape[1]] for positions in (edge.queries, edge.keys))
        run[np.ix_(queries - start, keys)] = True
    active = torch.tensor([[layer in edge.layers for layer in range(total)] for edge in edges])  # (B, K)
    return lambda i, S, T: hidden & active[:, i, None, None] if active[:, i].any() else None  # noqa: N803


@contextmanager
def blocked(model, hidden: Callable[[int, int, int], Tensor | None]):
    """Inside, queries do not see the keys where hidden(layer, S, T), bool (B, S, T), is true; None hides nothing.

    S are the queries of this pass, the last ones of T positions.
    """

    def register(i, attention):
        def hook(module, args, kwargs):
            mask = kwargs["attention_mask"]  # (B or 1, 1, S, T), added to the scores
            block = hidden(i, *mask.shape[-2:])
            if block is not None:
                lowest = torch.finfo(mask.dtype).min
                kwargs = kwargs | {"attention_mask": mask.masked_fill(block[:, None].to(mask.device), lowest)}
            return args, kwargs

        return attention.register_forward_pre_hook(hook, with_kwargs=True)

    with hooked(model, register):
        yield


@contextmanager
def image_hidden(model, layer: int):
    """Inside, nothing behind the image sees its tokens in decoder layers `layer` and later, in generation as well.

        with image_hidden(model, 22):
            model.generate(**inputs)

    Positions stay as they are. `layer` may be the number of layers: then nothing is hidden. Raises ValueError beyond.
    """
    total = get_model_layers(model)[1]
    check_whole("layer", layer, 0)
    if layer > total:
        raise ValueError(f"layer {layer} does not exist: the image can be hidden from layer 0 to {total} (nowhere) on")
    image, block = torch.zeros(1, 1, dtype=torch.bool), None

    def note(module, args, kwargs):
        nonlocal image
        ids = kwargs.get("input_ids")
        if ids is not None and ids.shape[1] > 1:  # a prompt, and no single token of an answer
            image = ids == model.config.image_token_id  # (B, P)

    def hidden(i, S, T):  # noqa: N803
        nonlocal block
        if i == layer:  # the later ones of the pass hide the same
            keys = torch.nn.functional.pad(image, (0, T - image.shape[1]))  # (B, T)
            last = image.shape[1] - 1 - image.flip(1).int().argmax(1)  # (B,): of the image's positions
            queries = torch.arange(T - S, T, device=image.device) > last[:, None]  # (B, S)
            block = queries[..., None] & keys[:, None]
        return block if i >= layer else None

    handle = model.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with blocked(model, hidden):
            yield
    finally:
        handle.remove()


# the two studies

HARDLY = 0.8  # share that is left without the image, if it is hardly needed
KEPT = 0.95  # of the full value: what counts as no loss
EXPLAINED = 5  # photos whose explained tokens are told
UNLIKELY = 0.01  # probability below which there is nothing that could be lost
NEEDED = 0.2  # fall in probability from which on a token needs the photo (EAGLE's sensitive tokens)
COVERED = 0.25  # share of an image token from which on it belongs to the object


class Traced(NamedTuple):
    """What is read of one photo."""

    reading: Reading
    maps: TokenMaps
    attention: np.ndarray  # (K, L)
    gradient: np.ndarray  # (K, L)


class Severed(NamedTuple):
    """What is left of one answer."""

    reading: Reading
    explained: list[int]  # T indices of the answer's tokens
    removed: np.ndarray  # (K + 1, A): the image hidden from layer k on
    right: np.ndarray  # (K + 1,) bool: whether the greedy answer would begin with this one
    kept: np.ndarray | None  # (K + 1, A): but for the image tokens with most attention in the layer before
    kept_right: np.ndarray | None  # (K + 1,) bool
    windows: dict[str, np.ndarray]  # edge -> (K, A): blocked in a window of layers around each


def trace_photo(reading: Reading, span, settings: Settings, progress=None, **passes) -> Traced:
    """Attention forwards; gradients and maps of all layers backwards."""
    maps, gradient = maps_and_gradients(reading, span, settings, progress, **passes)
    return Traced(reading, maps, attention_flow(reading, span), gradient)


def tokens_that_need_the_photo(removed: np.ndarray) -> list[int]:
    """Indices of the answer's tokens whose probability falls by more than 0.2 if the image is hidden in all layers."""
    return np.flatnonzero(removed[-1] - removed[0] > NEEDED).tolist()


def sever_photo(
    reading: Reading, span=None, *, window=None, keep=None, mask=None, batch_size=8, progress=None
) -> Severed:
    """Truncation at every layer and, for a window, attention knockout around every layer: one prefix, one sweep.

    window  layers that are blocked at once around each; None: no window is run
    keep    image tokens that stay visible in a second truncation, those with most attention in the layer before
    mask    bool (height, width) of the photo: image tokens of the object and others are blocked one by one, too
    """
    total, groups = get_model_layers(reading.model)[1], token_groups(reading)
    image, user, answer = (np.arange(groups[name].start, groups[name].stop) for name in ("image", "user", "answer"))
    later = np.concatenate([user, answer])
    edges = [Edge(range(k, total), later, image) for k in range(total + 1)]
    if keep is not None:
        if not 1 <= keep < len(image):
            raise ValueError(f"keep={keep} must be 1 to {len(image) - 1}: the photo has {len(image)} image tokens")
        attention = attention_flow(reading, span)[:, image]  # (K, N)
        order = np.argsort(-attention, axis=1, kind="stable")
        rest = [image, *(image[np.sort(row[keep:])] for row in order)]  # before layer 0 nothing is known
        edges += [Edge(range(k, total), later, keys) for k, keys in enumerate(rest)]
    windowed = {}
    if window is not None:
        if not 1 <= window <= total:
            raise ValueError(f"window={window} must be 1 to {total}: the model has {total} layers")
        windowed = {"image → user": (user, image), "image → answer": (answer, image), "user → answer": (answer, user)}
        if mask is not None:
            on = covered_tokens(mask, reading.grid)
            for name, keys in (("object", image[on]), ("other patches", image[~on])):
                windowed |= {f"{name} → user": (user, keys), f"{name} → answer": (answer, keys)}
        for queries, keys in windowed.values():
            spans = (range(max(0, k - window // 2), min(total, k + -(-window // 2))) for k in range(total))
            edges += [Edge(layers, queries, keys) for layers in spans]
    probabilities, top = knockout(reading, edges, batch_size=batch_size, progress=progress)
    right, removed, left = top.all(1), probabilities[: total + 1], probabilities[total + 1 :]
    kept = kept_right = None
    if keep is not None:
        kept, left, kept_right = left[: total + 1], left[total + 1 :], right[total + 1 : 2 * total + 2]
    explained = reading.tokens_of(span) if span else tokens_that_need_the_photo(removed)
    return Severed(
        reading,
        explained or list(range(len(reading.tokens))),
        removed,
        right[: total + 1],
        kept,
        kept_right,
        dict(zip(windowed, left.reshape(-1, total, left.shape[1]), strict=True)),
    )


def covered_tokens(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The image tokens (N,) bool of which the object covers a quarter or more, or else the one that it covers most."""
    share = cv2.resize(mask.astype(np.float32), grid[::-1], interpolation=cv2.INTER_AREA).ravel()
    return share >= min(COVERED, share.max())


def change(severed: Severed, edge: str) -> np.ndarray:
    """100 (p' - p) / p by layer, (K,), mean over the explained tokens whose p is 0.01 or more; nan without any."""
    full = severed.removed[-1, severed.explained]
    likely = np.array(severed.explained)[full >= UNLIKELY]
    if not len(likely):
        return np.full(len(severed.windows[edge]), np.nan)
    full = severed.removed[-1, likely]
    return (100 * (severed.windows[edge][:, likely] - full) / full).mean(1)


def mean_change(severed: list[Severed], edge: str) -> np.ndarray:
    """Mean of `change` over the photos that have one."""
    found = [values for values in (change(part, edge) for part in severed) if np.isfinite(values).all()]
    return np.mean(found, axis=0) if found else change(severed[0], edge)


def truncated(severed: Severed, values: np.ndarray) -> np.ndarray:
    """Mean probability of the explained tokens, (K + 1,)."""
    return values[:, severed.explained].mean(1)


# findings


def find_cliff(curve: np.ndarray, kept: float = KEPT) -> int | None:
    """The smallest k with curve[k'] >= kept * curve[-1] for all k' >= k: from layer k on the image is not needed.

    `curve` (K + 1,) is what is left if the image is hidden from layer k on, all of it at its end. None if there is no
    cliff: the full value is below 0.01, or four fifths of it are left if the image is hidden from the first layer on.
    """
    short = np.flatnonzero(curve < kept * curve[-1])
    needed = curve[-1] >= UNLIKELY and curve[0] < min(kept, HARDLY) * curve[-1]
    return int(short[-1]) + 1 if needed else None


def find_onset(curve: np.ndarray) -> int:
    """The last layer such that hidden from there on, or from any earlier one, 5 % of what the photo gives is left."""
    risen = np.flatnonzero(curve >= curve[0] + (1 - KEPT) * (curve[-1] - curve[0]))
    return max(int(risen[0]) - 1, 0)


def cliff_interval(curves: np.ndarray, draws: int = 1000) -> tuple[int, int] | None:
    """95 % of the cliffs of the mean of resampled curves (photos, K + 1); None where a tenth or more have none."""
    rng = np.random.default_rng(0)
    cliffs = [find_cliff(curves[rng.integers(len(curves), size=len(curves))].mean(0)) for _ in range(draws)]
    cliffs = sorted(cliff for cliff in cliffs if cliff is not None)
    if len(cliffs) <= 0.9 * draws:
        return None
    return cliffs[round(0.025 * (len(cliffs) - 1))], cliffs[round(0.975 * (len(cliffs) - 1))]


def truncation_finding(curves: np.ndarray, what: str) -> str:
    """In one line from where on the image can be removed, of curves (photos, K + 1)."""
    curve = curves.mean(0)
    cliff, total = find_cliff(curve), len(curve) - 1
    if curve[-1] < UNLIKELY:
        return f"no cliff: {what} is {curve[-1]:.4f} with the whole image, so there is nothing to lose"
    if cliff is None:
        kept = f"{what} is {decimal(curve[0])} if the image is hidden from layer 0 on, {decimal(curve[-1])} with it"
        return f"no cliff: {kept}, so the answer hardly needs the photo"
    half = find_cliff(curve, 0.5)
    where = "the image is needed to the last layer" if cliff == total else f"from layer {cliff} on it can be removed"
    line = (
        f"hidden from layer {find_onset(curve)} or earlier, the image might as well not be there; {where}: {what} "
        f"{decimal(curve[0], 3)} without it, {decimal(curve[-1], 3)} with it"
    )
    line += f", {decimal(curve[cliff], 3)} if hidden from {cliff} on" if cliff < total else ""
    line += f", half of it or more from layer {half} on" if half is not None else ""
    if len(curves) >= 10 and (interval := cliff_interval(curves)):
        line += f" (cliff at {interval[0]} to {interval[1]} in 95 % of resampled photos)"
    return line


def strongest(changes: np.ndarray, window: int) -> str:
    """In words the largest of the changes (K,) and where it is."""
    if not np.isfinite(changes).any():
        return f"nothing to lose, the probability is below {UNLIKELY}"
    worst = int(np.abs(changes).argmax())
    if abs(changes[worst]) < 0.05:
        return "no change in any window"
    first, last = max(0, worst - window // 2), min(len(changes), worst + -(-window // 2)) - 1
    layers = f"layer {first}" if first == last else f"layers {first}-{last}"
    return f"{changes[worst]:+.1f} % at most, blocked in {layers}"


def flow_findings(shares: dict[str, np.ndarray], sizes: dict[str, float], gradient: dict[str, np.ndarray]) -> list[str]:
    """In words what the curves by layer say, each (K,): attention shares of system, image and user, gradient shares."""
    image = shares["image"]
    most, least = int(image.argmax()), int(image.argmin())
    line = (
        f"attention: the image gets {decimal(image.min())} (layer {least}) to {decimal(image.max())} (layer {most}) of "
        "what system, image and user tokens get"
    )
    per_token = {name: (shares[name] / sizes[name]).mean() for name in shares}
    times = {name: per_token[name] / per_token["image"] for name in ("system", "user")}
    line += "; per token " + " and ".join(f"a {name} token {value:.1f}" for name, value in times.items())
    lines = [f"{line} times as much as an image token, in the mean over the layers"]
    carried = gradient["image"]
    if not np.isfinite(carried).any():
        return [*lines, "gradient: none reaches the layers where they are read"]
    first = carried[np.isfinite(carried)][0]
    kept = np.flatnonzero(carried >= first / 2)[-1]  # the last layer with half of it
    where = "and half of that or more at every layer"
    if kept + 1 < len(carried):
        where = f"less than half of that from layer {kept + 1} on"
    return [*lines, f"gradient: the image carries {decimal(first)} of the score at the first layer, {where}"]


# figures

COLOURS = {"system": "#999999", "image": "#d55e00", "user": "#0072b2", "answer": "#009e73"}
EDGE_STYLES = (
    ("#0072b2", "-"), ("#d55e00", "-"), ("#009e73", "-"), ("#56b4e9", "--"), ("#e69f00", "--"), ("#56b4e9", ":"),
    ("#e69f00", ":"),
)  # fmt: skip
PLOT = 1.9, 1.35  # inches of one plot
THIN = "Thick lines: mean of the photos; thin ones: each."
STRIP, NARROW = 7, 0.7  # pictures side by side, at most, and inches of one, at least
LINES = 24  # of one group in a panel of flow lines, at most
BROADEST = 22  # points: a flow line that has all of the attention
TAPS = ("input", "input_layernorm", "self_attn.v_proj", "post_attention_layernorm")
TAP_NAMES = {"input": "layer input", "self_attn.v_proj": "v_proj"}  # where it is not the module's


def _heads(readings: list[Reading]) -> list[tuple]:
    """Rows of the header of several photos: the prompt, where it is one, and the answers."""
    alike = len({reading.prompt for reading in readings}) == 1
    rows = [("Prompt", readings[0].prompt)] if alike else []
    shown = len(readings) if len(readings) <= 5 else 4
    for i, reading in enumerate(readings[:shown], 1):
        rows.append((f"Photo {i}", reading.answer if alike else f"{reading.prompt} → {reading.answer}"))
    rows += [("…", f"and {len(readings) - shown} more")] * (shown < len(readings))
    return [(label, excerpt(text, (0, 0), 200)[0], (0, 0)) for label, text in rows]


def numbered(names: list[str]) -> str:
    """Which photo is which, of the first ones."""
    shown = ", ".join(f"{i} {name}" for i, name in enumerate(names[:6], 1))
    return f"Photos: {shown}{f' and {len(names) - 6} more' if len(names) > 6 else ''}."


def _curves(axes, rows: dict[str, np.ndarray], colours: dict[str, str]) -> None:
    """Of each name the mean over photos (photos, K), and thin lines of each photo if there are several."""
    for name, values in rows.items():
        x = np.arange(values.shape[1])
        if len(values) > 1:
            axes.plot(x, values.T, color=colours[name], linewidth=0.4, alpha=0.5)
        axes.plot(x, values.mean(0), color=colours[name], linewidth=1.3)


def strip_columns(photo: Image.Image) -> int:
    """How many pictures stand side by side on a page: fewer of wide photos."""
    aspect = photo.width / photo.height
    return STRIP if aspect < 2 else 4 if aspect < 5 else 3


def strips(page: Page, y: float, traced: list[Traced], layers: list[int], look: Look) -> float:
    """A row for each photo: the photo, and its map at each layer; long rows are broken. Returns the y below."""
    strongest = strongest_of(part.maps for part in traced)
    for number, part in enumerate(traced, 1):
        photo = part.reading.photo
        labels = {layer: (f"layer {layer}", strength(part.maps, layer, strongest)) for layer in layers}
        room = max(NARROW, *(page.label_width(*label) for label in labels.values()))
        columns = min(strip_columns(photo), int((page.inner + GAP / 2) / (room + GAP / 2)))
        pitch = (page.inner + GAP / 2) / columns
        width, height = fit_box(photo.width / photo.height, pitch - GAP / 2, 1.3)
        small = shrink(photo, width, height)
        cells = [(("photo" if len(traced) == 1 else f"photo {number}", ""), np.asarray(small))]
        cells += [(labels[layer], draw_layer(small, part.maps, layer, True, look, strongest)) for layer in layers]
        for i in range(0, len(cells), columns):
            for j, (label, picture) in enumerate(cells[i : i + columns]):
                middle = MARGIN + (j + 0.5) * pitch - GAP / 4
                page.label(middle, y, *label)
                page.picture(middle - width / 2, y + HEAD, width, height, picture)
            y += HEAD + height + GAP / 2
    return y


def flow_lines(axes, attention: np.ndarray, groups: dict[str, slice], rows: int) -> None:
    """Lines from the tokens (top to bottom: system, image, user, answer) to the answer on the right, as broad as their
    attention (L,): of the image one for each row of its grid, of long texts one for several tokens.
    """
    parts = []
    for name, part in groups.items():
        values = attention[part]
        count = min(rows if name == "image" else LINES, len(values))
        parts += [(name, piece.sum()) for piece in np.array_split(values, max(count, 1))]
        parts.append((None, 0.0))  # a gap
    heights, thin = np.linspace(1, 0, len(parts)), 0.3  # points: below it some programs draw no thinner line
    shown = [(height, name, value) for height, (name, value) in zip(heights, parts, strict=True) if name]
    lines = LineCollection(
        [[(0, height), (0.35, height), (1, 0.5)] for height, _, _ in shown],
        linewidths=[max(BROADEST * value, thin) for _, _, value in shown],
        colors=[to_rgba(COLOURS[name], 0.75 * min(1, BROADEST * value / thin)) for _, name, value in shown],
    )
    axes.add_collection(lines)
    for height, name, _ in shown:
        axes.plot([-0.03], [height], marker="s", markersize=1.6, color=COLOURS[name])
    axes.set(xlim=(-0.08, 1.02), ylim=(-0.03, 1.03))
    axes.spines[:].set_visible(False)


def draw_flow(
    traced: list[Traced], names: list[str], layers: list[int], look: Look = PLAIN, paper: Paper = PAGE
) -> Page:
    """Maps by layer, the shares of attention and gradient under them, and flow lines."""
    heads = text_rows(traced[0].maps) if len(traced) == 1 else _heads([part.reading for part in traced])
    page = Page(WIDTHS[paper.width], "".join(text for _, text, _ in heads))
    y = header(page, MARGIN, MARGIN, "Information flow: what the answer reads, layer by layer", heads) + GAP
    y = strips(page, y, traced, layers, look) + GAP

    y = page.legend(y, COLOURS) + GAP
    shares, per_token, gradients = curves_by_layer(traced)
    plots = (
        ("Attention, share of the group", shares, {"ylim": (-0.02, 1.02)}),
        ("Attention, per token", per_token, {"yscale": "log"}),
        ("|gradient × hidden state|", gradients, {"ylim": (-0.02, 1.02)}),
    )
    places, y = page.places(y, len(plots), PLOT[0], BAND + PLOT[1] + 0.45)
    for (x, top, width), (title, rows, style) in zip(places, plots, strict=True):
        axes = page.plot(x, top, width, PLOT[1], title, xlabel="layer")
        _curves(axes, rows, COLOURS)
        axes.set(**style)
        if "yscale" in style:
            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_locator(NullLocator())

    columns = 6 if page.inner > 5 else 3
    shown, first = spread(layers, columns), traced[0]
    page.text(MARGIN, y, "Flow lines" if len(traced) == 1 else "Flow lines of photo 1", TEXT, weight="bold")
    y += TEXT * LINE + GAP / 2
    width = (page.inner + GAP) / columns
    for i, layer in enumerate(shown):
        page.text(MARGIN + i * width + (width - GAP) / 2, y, f"layer {layer}", SMALL, ha="center")
        axes = page.axes(MARGIN + i * width, y + BAND, width - GAP, 1.5)
        flow_lines(axes, first.attention[layer], token_groups(first.reading), first.reading.grid[0])
    y += BAND + 1.5 + 2 * GAP
    which = ("Left", "Middle", "Right") if places[1][1] == places[0][1] else ("First plot", "Second", "Third")
    caption = (
        f"{which[0]}: attention of the positions that predict the explained tokens, mean over heads, renormalised over "
        f"system, image and user tokens (eq. 7 of “From Redundancy to Relevance”). {which[1]}: the same for each token "
        f"of the group, with the answer's own. {which[2]}: share of each group in the sum of |gradient × hidden state| "
        "at the layer. Flow lines lead from tokens (of the image, from rows of its grid) to the answer, as broad as "
        f"their attention. {look_text(look)}{f' {THIN} {numbered(names)}' if len(traced) > 1 else ''}"
    )
    return page.finish(small_print(page, y, caption, settings_text(traced[0].maps.settings)))


def draw_attention_maps(
    reading: Reading, maps: TokenMaps, attention: dict[int, np.ndarray], edges, paper: Paper = PAGE
) -> Page:
    """Attention between stretches of positions at each layer, in logarithmic colours."""
    heads, groups = text_rows(maps), token_groups(reading)
    page = Page(WIDTHS[paper.width], "".join(text for _, text, _ in heads))
    y = header(page, MARGIN, MARGIN, "Attention between prompt, image and answer", heads) + GAP
    across = 3 if page.inner > 5 else 2
    columns = min(across, len(attention))
    pitch = (page.inner - 0.15) / across
    side = pitch - 0.3
    positive = np.concatenate([values[values > 0] for values in attention.values()])
    low, high = np.floor(np.log10(np.percentile(positive, 1))), np.ceil(np.log10(positive.max()))
    left = (page.width - columns * pitch) / 2 + 0.25
    borders = [np.searchsorted(edges, part.start) for part in groups.values()] + [len(edges) - 1]
    for i, (layer, values) in enumerate(attention.items()):
        x, top = left + i % columns * pitch, y + i // columns * (BAND + side + 0.3)
        page.text(x + side / 2, top, f"layer {layer}", SMALL, ha="center")
        axes = page.axes(x, top + BAND, side, side)
        logs = np.full(values.shape, np.nan)
        np.log10(values, out=logs, where=values > 0)
        axes.set_facecolor("0.9")
        axes.imshow(logs.clip(low), cmap="viridis", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
        for border in borders[1:-1]:
            axes.axhline(border - 0.5, color="white", linewidth=0.6)
            axes.axvline(border - 0.5, color="white", linewidth=0.6)
        middles = [(a + b) / 2 - 0.5 for a, b in zip(borders, borders[1:], strict=False)]
        axes.set_xticks(middles, [name[0].upper() for name in groups])
        axes.set_yticks(middles, [name[0].upper() for name in groups])
    y += -(-len(attention) // columns) * (BAND + side + 0.3) + GAP
    ticks, width = np.arange(low, high + 1).astype(int), min(3.2, page.inner - 0.4)
    axes = page.axes((page.width - width) / 2, y, width, 0.11)
    axes.imshow(colormaps["viridis"](np.linspace(0, 1, 256))[None], aspect="auto", extent=(low, high, 0, 1))
    axes.set_xticks(ticks, [f"{10.0**tick:g}" for tick in ticks])
    y += 0.11 + SMALL * LINE + 2 * GAP
    caption = (
        "Rows attend to columns: S system, I image, U user, A answer. Mean over heads and over the pairs that may see "
        f"each other in stretches of {int(np.diff(edges).max())} positions at most; grey: keys behind their queries."
    )
    return page.finish(small_print(page, y, caption))


def tap_modules(model, layers: list[int]) -> dict[str, dict[int, object]]:
    """{tap: {layer: what `explain` takes}} of figure 7 of "From Redundancy to Relevance"."""
    decoder = get_model_layers(model)[0]
    return {
        tap: {layer: layer if tap == "input" else decoder[layer].get_submodule(tap) for layer in layers} for tap in TAPS
    }


def draw_taps(
    reading: Reading, maps: TokenMaps, keys: dict[str, dict[int, object]], merger: str, look: Look = PLAIN,
    paper: Paper = PAGE,
) -> Page:  # fmt: skip
    """The map at each tap (rows) of each layer (columns), and at the vision tower's merger."""
    heads, photo = text_rows(maps), reading.photo
    page = Page(WIDTHS[paper.width], "".join(text for _, text, _ in heads))
    y = masthead(page, photo, "One photo at every tap", heads, (1.6, 1.2)) + 2 * GAP
    cells = {"merger": [("merger", merger)]}
    cells |= {TAP_NAMES.get(tap, tap): [(f"layer {k}", key) for k, key in found.items()] for tap, found in keys.items()}
    columns = min(max(map(len, cells.values())), strip_columns(photo) - 1, int(page.inner / (NARROW + GAP)))
    pitch = (page.inner + GAP) / columns
    width, height = fit_box(photo.width / photo.height, pitch - GAP, 1.5)
    small = shrink(photo, width, height)
    for name, found in cells.items():
        page.text(MARGIN, y, name, SMALL, weight="bold")
        y += SMALL * LINE
        strongest = max(float(maps.maps[key].max()) for _, key in found)  # of what is read at one place
        for i in range(0, len(found), columns):
            for j, (label, key) in enumerate(found[i : i + columns]):
                middle = MARGIN + j * pitch + (pitch - GAP) / 2
                page.label(middle, y, label, strength(maps, key, strongest))
                picture = draw_layer(small, maps, key, True, look)
                page.picture(middle - width / 2, y + HEAD, width, height, picture)
            y += HEAD + height + GAP
    y += GAP
    caption = (
        f"Bold: where the layer is read, of at most {STRIP - 1} layers; merger: the image tokens before the decoder; "
        f"grey: no gradient; weak: below {100 * WEAK:.0f} % of the strongest read at that place. {look_text(look)}"
    )
    return page.finish(small_print(page, y, caption, settings_text(maps.settings, "read at the named places")))


def _words(severed: Severed) -> str:
    """What the explained tokens say, each character once."""
    spans = dict.fromkeys(severed.reading.spans[i] for i in severed.explained)
    return " ".join(f"“{severed.reading.answer[slice(*span)].strip()}”" for span in spans)


def _severed_heads(severed: Severed) -> list[tuple]:
    """Rows of the header of one photo: what was asked, answered and explained."""
    reading, part = severed.reading, severed.explained
    which = f"{len(part)} of {len(reading.tokens)} tokens: {excerpt(_words(severed), (0, 0), 200)[0]}"
    whole = list(part) == list(range(part[0], part[-1] + 1))  # one piece of the answer, which can be marked
    start, end = (reading.spans[part[0]][0], reading.spans[part[-1]][1]) if whole else (0, 0)
    span = end - len(reading.answer[start:end].lstrip()), end  # a word's token often begins with a blank
    rows = [("Prompt", reading.prompt, (0, 0)), ("Answer", reading.answer, span), ("Explained", which, (0, 0))]
    return [(label, *excerpt(text, marked, 300)) for label, text, marked in rows]


def _legend_below(axes) -> None:
    style = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.24), "ncols": 2, "borderaxespad": 0}
    axes.legend(fontsize=SMALL - 1, frameon=False, handlelength=1.8, labelspacing=0.25, columnspacing=1, **style)


def plot_truncation(axes, curves: dict[str, np.ndarray], each: bool) -> None:
    """The means of {name: (photos, K + 1)} and the cliff of the first; `each`: thin lines of its photos, too."""
    (main, values), *others = curves.items()
    mean, layers = values.mean(0), np.arange(values.shape[1])
    cliff = find_cliff(mean)
    if cliff is not None:
        axes.axvspan(find_onset(mean), cliff, color="#fff3c4", linewidth=0)
        axes.axvline(cliff, color="black", linewidth=0.8, linestyle="--")
        side, shift = ("right", -0.012) if cliff > len(mean) / 2 else ("left", 0.012)
        axes.text(cliff + shift * len(mean), 0.02, f"cliff: {cliff}", size=SMALL, ha=side, va="bottom")
    if each and len(values) > 1:
        axes.plot(layers, values.T, color=COLOURS["image"], linewidth=0.4, alpha=0.4)
    axes.plot(layers, mean, color=COLOURS["image"], linewidth=1.4, label=main)
    for name, other in others:
        axes.plot(layers, other.mean(0), color=COLOURS["user"], linewidth=1.2, linestyle="--", label=name)
    if others:
        _legend_below(axes)


def plot_windows(axes, severed: list[Severed]) -> None:
    """The mean change by layer of each edge that was blocked in windows."""
    axes.axhline(0, color="0.6", linewidth=0.6)
    for name, (colour, line) in zip(severed[0].windows, EDGE_STYLES, strict=False):
        mean = mean_change(severed, name)
        axes.plot(np.arange(len(mean)), mean, color=colour, linestyle=line, linewidth=1.2, label=name)
    _legend_below(axes)


def draw_knockout(
    severed: list[Severed], names: list[str], curves: dict[str, np.ndarray], what: str, window: int | None,
    finding: str, paper: Paper = PAGE,
) -> Page:  # fmt: skip
    """What is left when the image is hidden from a layer on, its cliff and, if windows were run, their effect."""
    heads = _severed_heads(severed[0]) if len(severed) == 1 else _heads([part.reading for part in severed])
    page = Page(WIDTHS[paper.width], "".join(text for _, text, _ in heads))
    if len(severed) == 1:
        y = masthead(page, severed[0].reading.photo, "Knockout: what the answer needs", heads, (1.6, 1.2))
    else:
        said = "; ".join(f"{i} {_words(part)}" for i, part in enumerate(severed[:6], 1))
        heads += [("Explained", excerpt(said, (0, 0), 200)[0], (0, 0))] if what != "accuracy" else []
        y = header(page, MARGIN, MARGIN, "Knockout: what the answers need", heads)
    y += 2 * GAP
    windows, height = list(severed[0].windows), 1.9
    legend = 0.62 if len(windows) > 3 else 0.34 if windows else 0.2 if len(curves) > 1 else 0
    ((x, top, width), *others), y = page.places(y, 1 + bool(windows), 2.9, BAND + height + 0.45 + legend)
    y += GAP
    style = {"xlabel": f"image hidden from layer … on ({len(severed[0].removed) - 1}: nothing)", "ylabel": what}
    axes = page.plot(x, top, width, height, "Truncation", ylim=(-0.02, 1.04), **style)
    plot_truncation(axes, curves, each=what != "accuracy")
    for x, top, width in others:
        style = {"xlabel": "around layer …", "ylabel": "change of p, %"}
        title = f"Attention blocked in {window} layer{'s' * (window > 1)}"
        plot_windows(page.plot(x, top, width, height, title, **style), severed)
    caption = (
        f"{finding[0].upper()}{finding[1:]}. Image tokens are hidden from all later positions by the attention mask; "
        f"positions stay. Cliff: the first layer from which on {100 * KEPT:.0f} % of the full value is kept, wherever "
        "hiding begins; yellow: from where all is lost to where all is kept. What these layers read may also be read "
        "elsewhere."
    )
    if len(curves) > 1:
        caption += f" Dashed: {list(curves)[-1]}, those with most attention from the explained tokens kept."
    if windows:
        caption += (
            f" Blocked: in {window} layers around each (fewer at the ends), what stands behind the arrow cannot attend "
            "to what stands before it; change of the probability of the explained tokens. Where one part of the image "
            "is blocked, attention moves to the rest; it may cost more than blocking all."
        )
    if len(severed) > 1:
        caption += f" {THIN} {numbered(names)}"
    return page.finish(small_print(page, y, caption))


def curves_by_layer(traced: list[Traced]) -> tuple[dict, dict, dict]:
    """{group: (photos, K)} of attention shares after eq. 7, attention per token, and gradient shares."""
    found = []
    for part in traced:
        groups = token_groups(part.reading)
        sums = {name: part.attention[:, where].sum(-1) for name, where in groups.items()}
        sizes = {name: where.stop - where.start for name, where in groups.items()}
        sizes["answer"] = np.mean(part.maps.target_tokens) + 1  # those that the explained positions see
        found.append(
            (
                group_sums(part.attention, groups, ("system", "image", "user")),
                {name: value / max(sizes[name], 1) for name, value in sums.items()},
                group_sums(part.gradient, groups),
            )
        )
    return tuple({name: np.stack([one[name] for one in kind]) for name in kind[0]} for kind in zip(*found, strict=True))


# the modes


def forecast(readings: list[Reading], forwards: float) -> str:
    """How long so many forward passes of each photo will take, from one of the first."""
    with borrowed(readings[0].model), memory_explained(len(readings[0].positions)):
        start = time.monotonic()
        embed(readings[0])
    each = time.monotonic() - start
    total = forwards * len(readings)
    return f"expected: the time of about {total:.0f} forward passes, {each:.2f} s each: {each * total:.0f} seconds"


def trace(
    readings: list[Reading], names: list[str], spans: list[tuple[int, int]], layers: list[int], settings: Settings, *,
    attention_map=False, taps=False, quiet=False, look=PLAIN, paper=PAGE, batch_size=1, recompute=False,
) -> tuple[dict[str, object], list[str]]:  # fmt: skip
    """({file name: content}, findings in lines) of the mode flow: see the module's table of figures.

    `names` are those of the photos; `spans` are (start, end) in characters of each answer. `batch_size` and `recompute`
    are those of `explain`.
    """
    passing = {"batch_size": batch_size, "recompute": recompute}
    if not quiet:
        passes = 2 + 2.2 * settings.num_samples * (1 + taps) + 2 * attention_map
        print(forecast(readings, passes), flush=True)
    bar = show_progress(quiet)
    pairs = zip(readings, spans, strict=True)
    traced = [trace_photo(reading, span, settings, bar, **passing) for reading, span in pairs]
    draw = functools.partial(draw_flow, traced, names, layers, look, paper)
    files = paper.figure("information_flow", draw) | {
        "information_flow.csv": to_csv(flow_rows(traced, names)),
        "information_flow.npz": flow_arrays(traced, names) | {"layers": np.array(layers)},
    }
    shares, _, gradients = curves_by_layer(traced)
    sizes = {name: np.mean([_size(part.reading, name) for part in traced]) for name in shares}
    means = [{name: values.mean(0) for name, values in kind.items()} for kind in (shares, gradients)]
    explained = traced[0].maps.target
    what = "the whole answer" if explained == readings[0].answer else repr(explained)
    what += "" if settings.contrast is None else f" rather than {settings.contrast!r}"
    lines = [f"explained: {what}; maps at layer {', '.join(map(str, layers))}"]
    for name, part in zip(names, traced, strict=True):
        blank = [f"{layer} ({part.maps.blank[layer]})" for layer in layers if layer in part.maps.blank]
        lines += [f"{name} has no map at layer {', '.join(blank)}: its pictures are grey panels"] if blank else []
    lines += flow_findings(means[0], sizes, means[1])
    if attention_map:
        shown = attention_maps(readings[0], layers)
        draw = functools.partial(draw_attention_maps, readings[0], traced[0].maps, *shown, paper)
        files |= paper.figure("attention_maps", draw)
    if taps:
        files |= paper.figure("taps", draw_tapped(readings[0], spans[0], layers, settings, bar, look, paper, **passing))
    return files, lines


def _size(reading: Reading, name: str) -> int:
    part = token_groups(reading)[name]
    return max(part.stop - part.start, 1)


def draw_tapped(
    reading, span, layers: list[int], settings: Settings, progress=None, look=PLAIN, paper=PAGE, **passes
) -> Callable:
    """What draws the map of every tap of the layers, six at most, from one pass for all."""
    taken = tap_modules(reading.model, spread(layers, strip_columns(reading.photo) - 1))
    merger = reading.model.model.visual.merger
    modules = [module for found in taken.values() for module in found.values()]
    (maps,) = explain(reading, [span], [*modules, merger], replace(settings, tap="input"), progress, **passes)
    names = {module: name for name, module in reading.model.named_modules()}
    keys = {tap: {k: names.get(module, module) for k, module in found.items()} for tap, found in taken.items()}
    return functools.partial(draw_taps, reading, maps, keys, names[merger], look, paper)


def flow_rows(traced: list[Traced], names: list[str]) -> list[dict]:
    """Rows of information_flow.csv, one for each photo and layer."""
    rows = []
    for i, (name, part) in enumerate(zip(names, traced, strict=True)):
        sums = {group: part.attention[:, where].sum(-1) for group, where in token_groups(part.reading).items()}
        shares, per_token, gradients = ({g: v[0] for g, v in kind.items()} for kind in curves_by_layer([traced[i]]))
        kinds = {"attention": sums, "share": shares, "per_token": per_token, "gradient": gradients}
        for layer in range(len(part.attention)):
            row = {"photo": name, "layer": layer}
            row |= {f"{k}_{group}": f"{v[layer]:.4g}" for k, kind in kinds.items() for group, v in kind.items()}
            rows.append(row)
    return rows


def flow_arrays(traced: list[Traced], names: list[str]) -> dict[str, np.ndarray]:
    """information_flow.npz: of each photo i attention_i and gradient_i (K, L), maps_i (K, H, W), groups_i (4, 2)."""
    arrays = {"photos": np.array(names), "groups": np.array(list(COLOURS))}
    arrays["settings"] = np.array(json.dumps(asdict(traced[0].maps.settings)))
    for i, part in enumerate(traced):
        where = token_groups(part.reading).values()
        arrays |= {f"attention_{i}": part.attention, f"gradient_{i}": part.gradient}
        arrays[f"maps_{i}"] = np.stack(list(part.maps.maps.values()))
        arrays[f"groups_{i}"] = np.array([(piece.start, piece.stop) for piece in where])
        arrays[f"answer_{i}"] = np.array(part.reading.answer)
    return arrays


def sever(
    readings: list[Reading], names: list[str], spans: list, *, window=None, keep=None, mask=None, accuracy=False,
    batch_size=8, quiet=False, paper=PAGE,
) -> tuple[dict[str, object], list[str]]:  # fmt: skip
    """({file name: content}, findings in lines) of the mode knockout.

    `spans` are (start, end) of each answer, or None: the tokens that need the photo. With `accuracy`, the answers are
    the right ones, and what counts is whether the model would give them. Other arguments are those of `sever_photo`.
    """
    total = get_model_layers(readings[0].model)[1]
    if not quiet:
        runs = (total + 1) * (1 + (keep is not None)) + total * (0 if window is None else 3 if mask is None else 7)
        length, groups = _length(readings[0]), token_groups(readings[0])
        share = (length - groups["image"].stop) / length
        print(f"{runs} runs of each photo; {forecast(readings, 2 + runs * share)}", flush=True)
    options = {"window": window, "keep": keep, "mask": mask, "batch_size": batch_size}
    severed = []
    for reading, span in zip(readings, spans, strict=True):
        bar = show_progress(quiet or len(readings) > 1, "blocked runs", "batch")
        severed.append(sever_photo(reading, span, progress=bar, **options))
    what = "accuracy" if accuracy else "probability of the explained tokens"
    curves = {"image hidden": [part.right if accuracy else truncated(part, part.removed) for part in severed]}
    if keep is not None:
        but = f"all but {keep} tokens hidden"
        curves[but] = [part.kept_right if accuracy else truncated(part, part.kept) for part in severed]
    curves = {name: np.array(values, float) for name, values in curves.items()}
    finding = truncation_finding(curves["image hidden"], what)
    told = [] if accuracy else list(zip(severed, names, spans, strict=True))[:EXPLAINED]
    lines = [*(explained_line(*part) for part in told), finding]
    if keep is not None:
        cliff = find_cliff(curves[but].mean(0))
        kept = "no cliff" if cliff is None else f"cliff {cliff}, {decimal(curves[but].mean(0)[cliff], 3)}"
        lines.append(
            f"but for the {keep} image tokens that the explained tokens attend to most in the layer before: {kept}"
        )
    for edge in severed[0].windows:
        lines.append(f"{edge}: {strongest(mean_change(severed, edge), window)}")
    if accuracy:
        lines += said_instead(severed, names)
    draw = functools.partial(draw_knockout, severed, names, curves, what, window, finding, paper)
    files = paper.figure("knockout", draw) | {
        "knockout.csv": to_csv(knockout_rows(severed, names)),
        "knockout.npz": knockout_arrays(severed, names),
    }
    return files, lines


def explained_line(severed: Severed, name: str, span) -> str:
    """Which tokens of a photo's answer are explained, and why these."""
    reading = severed.reading
    why = "as asked" if span else "those that need the photo"
    if not span and len(severed.explained) == len(reading.tokens) != len(tokens_that_need_the_photo(severed.removed)):
        why = "all, as none needs the photo"
    return f"explained of {name}, {len(severed.explained)} of {len(reading.tokens)} tokens, {why}: {_words(severed)}"


def said_instead(severed: list[Severed], names: list[str]) -> list[str]:
    """What the model says where it does not give the right answer, of the first such photos."""
    lines = []
    for part, name in [pair for pair in zip(severed, names, strict=True) if not pair[0].right[-1]][:EXPLAINED]:
        reading, tokenizer = part.reading, part.reading.processor.tokenizer
        with borrowed(reading.model):
            said = decode(tokenizer, generate(reading.model, tokenizer, reading.inputs, 32))
        lines.append(f"{name}, {reading.prompt!r}: right would be {reading.answer!r}, the model says {said!r}")
    return lines


def knockout_rows(severed: list[Severed], names: list[str]) -> list[dict]:
    """Rows of knockout.csv: what was blocked, of which photo, from or around which layer, and what is left."""
    rows = []
    for name, part in zip(names, severed, strict=True):
        for kind, values, right in (
            ("image from", part.removed, part.right),
            ("image but for the kept from", part.kept, part.kept_right),
        ):
            for layer, value in enumerate(truncated(part, values) if values is not None else ()):
                row = {"blocked": kind, "photo": name, "layer": layer, "probability": f"{value:.4g}"}
                rows.append(row | {"answer_right": int(right[layer])})
        for edge in part.windows:
            left = part.windows[edge][:, part.explained].mean(1)
            pairs = zip(left, change(part, edge), strict=True)
            for layer, (value, percent) in enumerate(pairs):
                row = {"blocked": edge, "photo": name, "layer": layer, "probability": f"{value:.4g}"}
                rows.append(row | {"change_percent": f"{percent:.4g}"})
    return rows


def knockout_arrays(severed: list[Severed], names: list[str]) -> dict[str, np.ndarray]:
    """knockout.npz: of each photo i removed_i (K + 1, A), windows_i (edges, K, A), explained_i (T,) and the tokens."""
    arrays = {"photos": np.array(names), "edges": np.array(list(severed[0].windows))}
    for i, part in enumerate(severed):
        arrays |= {f"removed_{i}": part.removed, f"right_{i}": part.right, f"explained_{i}": np.array(part.explained)}
        arrays |= {f"tokens_{i}": np.array(part.reading.tokens), f"answer_{i}": np.array(part.reading.answer)}
        if part.kept is not None:
            arrays[f"kept_{i}"] = part.kept
        if part.windows:
            arrays[f"windows_{i}"] = np.stack(list(part.windows.values()))
    return arrays
