"""What the answer reads of a photo, layer by layer: attention and gradients at every position.

    Reading -> attention_flow, gradient_flow        (layers, positions)
            -> group_sums, findings, rows, arrays

Shapes:  as in `studies/decoder.py`
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.encoding import decimal
from common.evidence import explain_with_evidence, settled_for, with_method
from common.passes import watched_passes
from smooth_gradcam import (
    METHODS,
    ExplanationError,
    Reading,
    Settings,
    TokenMaps,
    at_least_float32,
    borrowed,
    explain,
    get_model_layers,
    hooked,
    memory_explained,
    noisy_passes,
    resolve_layers,
    score_parts,
)
from studies.decoder import (
    CHUNK,
    attention_hooked,
    cache_before,
    embed,
    predicting,
    run_decoder,
    sequence_length,
    stretches,
    token_groups,
)

__all__ = [
    *("PLACE_NAMES", "Traced", "attention_flow", "attention_maps", "curves_by_layer", "flow_arrays", "flow_findings"),
    *(
        "flow_rows",
        "forecast_forwards",
        "gradient_flow",
        "group_size",
        "group_sums",
        "maps_and_gradients",
        "pooled_edges",
    ),
    *("logit_lens", "tap_modules", "trace_photo"),
]


# attention and gradients


def _attention_rows(reading: Reading, first: int, note: Callable[[int, int, Tensor], None]) -> None:
    """Call note(layer, start, weights (heads, S, T)) for all query rows from position `first` on.

    The weights are those of queries start ... start + S - 1 over keys 0 ... T - 1, T = start + S. Rows before `first`
    run as usual, then `CHUNK` rows at a time with eager attention. The peak of memory is therefore that of one layer,
    CHUNK * L * heads, besides the keys and values of L positions. Raises ExplanationError if the model gives no
    weights.
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
        given = embed(reading)
        cache = cache_before(reading, given, first)
        with attention_hooked(model, register):
            for start in range(first, len(given), CHUNK):  # noqa: B007  (the hook reads it)
                run_decoder(model, given.at(slice(start, start + CHUNK)), cache)


def attention_flow(reading: Reading, span: tuple[int, int] | None = None) -> np.ndarray:
    """Attention to every position, (K, L) float32: mean over heads and over the positions R that predict the span.

    In layer l, 1/|R| sum of A_l[i, j] over i in R; each row sums to one. `span` is (start, end) in characters of the
    answer; None is all of it. `group_sums` turns it into the shares of figure 2A of "From Redundancy to Relevance".
    """
    rows = np.array(predicting(reading, span))
    flow = np.zeros((get_model_layers(reading.model)[1], sequence_length(reading)), np.float32)

    def note(layer, start, weights):
        inside = rows[(rows >= start) & (rows < start + weights.shape[1])] - start
        if len(inside):
            mean = at_least_float32(weights[:, inside]).mean(0).sum(0) / len(rows)  # (T,)
            flow[layer, : len(mean)] += mean.cpu().numpy()

    _attention_rows(reading, int(rows.min()), note)
    return flow


def attention_maps(reading: Reading, layers: Iterable[int], pool: int | None = None) -> tuple[dict, np.ndarray]:
    """({layer: (bins, bins) float32}, edges (bins + 1,)): attention between bins of positions, mean over heads.

    A bin has at most `pool` positions of one group; None is 10 to 20, depending on the length. The mean is over the
    pairs of a query and a key that it may see, nan where there is none. Figure 2B of "From Redundancy to Relevance".
    """
    edges = pooled_edges(reading, pool)
    bin_of = torch.as_tensor(np.repeat(np.arange(len(edges) - 1), np.diff(edges)))
    bins = len(edges) - 1
    maps = {layer: torch.zeros(bins, bins) for layer in resolve_layers(layers, get_model_layers(reading.model)[1])}

    def pooled(rows, start):  # (S, T) -> (bins, bins): sums over bins
        columns = torch.zeros(len(rows), bins).index_add_(1, bin_of[: rows.shape[1]], rows)
        return torch.zeros(bins, bins).index_add_(0, bin_of[start : start + len(rows)], columns)

    def note(layer, start, weights):
        if layer in maps:
            maps[layer] += pooled(at_least_float32(weights).mean(0).cpu().float(), start)

    _attention_rows(reading, 0, note)
    pairs = np.add.reduceat(np.tri(len(bin_of)), edges[:-1], 0)
    pairs = torch.as_tensor(np.add.reduceat(pairs, edges[:-1], 1))  # numbers of queries and keys that they may see
    return {layer: torch.where(pairs > 0, sums / pairs, torch.nan).numpy() for layer, sums in maps.items()}, edges


def pooled_edges(reading: Reading, pool: int | None = None) -> np.ndarray:
    """Edges (bins + 1,) of bins of at most `pool` positions, each within one group."""
    length = sequence_length(reading) - 1  # the answer's last token predicts nothing that is explained
    pool = pool or int(np.clip(length // 60, 10, 20))
    edges = [0]
    for _, start, stop in stretches(reading):
        end = min(stop, length)
        bins = -(-(end - start) // pool)
        edges += np.round(np.linspace(start, end, bins + 1)[1:]).astype(int).tolist()
    return np.array(edges)


def gradient_flow(reading: Reading, span: tuple[int, int] | None = None, settings=None) -> np.ndarray:
    """The contribution of every position to the score of the span, |g_i . A_i|, (K, L) float32.

    A_i are the hidden states at position i where the layer is read, g_i is the gradient of the score there; mean over
    noisy copies. `settings` are a `Settings`, for None without noise. By AttnLRP's rules, g_i . A_i is relevance.
    """
    return maps_and_gradients(reading, span, settings or Settings(use_smooth=False))[1]


def maps_and_gradients(
    reading: Reading, span, settings: Settings, progress=None, passes=noisy_passes, batch_size: int = 1, by=explain
) -> tuple[list[TokenMaps], np.ndarray]:
    """(maps of all layers, of each picture in turn, `gradient_flow`) from the same passes.

    The arguments are those of `explain`, which `by` is.
    """
    total, span = get_model_layers(reading.model)[1], span or (0, len(reading.answer))
    flow = np.zeros((total, sequence_length(reading)), np.float32)
    if METHODS[settings.method].run is not None:  # no gradient comes with these maps
        copies = {"passes": passes, "batch_size": batch_size}
        token_maps = by(reading, [span], range(total), settings, progress, **copies)
        return token_maps, maps_and_gradients(reading, span, with_method(settings, "gradcam"), progress, **copies)[1]

    def watch(pairs):
        for layer, (features, gradient) in pairs.items():
            if gradient is not None:
                products = (at_least_float32(features) * at_least_float32(gradient)).sum(-1)[0].abs()
                flow[layer, : len(products)] += products.float().cpu().numpy() / settings.num_samples

    copies = {"passes": watched_passes(passes, watch), "batch_size": batch_size}
    return by(reading, [span], range(total), settings, progress, **copies), flow


def group_sums(
    flow: np.ndarray, groups: dict[str, np.ndarray], only: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
    """{group: (...)}: the share of each group in the sum of `flow` (..., L) over all groups, or only over some.

    With only=("system", "image", "user"), eq. 7 of "From Redundancy to Relevance". nan where the sum is zero.
    """
    sums = {name: flow[..., groups[name]].sum(-1) for name in (only or groups)}
    total = np.asarray(sum(sums.values()))
    total = np.where(total > 0, total, np.nan)
    return {name: value / total for name, value in sums.items()}


def logit_lens(reading: Reading, span: tuple[int, int] | None = None) -> np.ndarray:
    """The probability of each token of the span after each layer, (K, T), where it is predicted.

    The hidden states behind layer k go through the final norm and the head as those of the last layer do (logit lens);
    the last row is the model's own probability. `span` is (start, end) in characters of the answer; None is all of it.
    """
    model, rows = reading.model, predicting(reading, span)
    layers, states = get_model_layers(model)[0], []

    def note(module, args):
        states.append(args[0][0, rows])  # (T, C)

    with borrowed(model), memory_explained(len(reading.positions)):
        forced, _ = score_parts(reading.inputs, reading.tokens, [range(len(reading.tokens))])
        with hooked(layer.register_forward_pre_hook(note) for layer in layers[1:]), torch.no_grad():
            last = model.model(**forced, use_cache=False).last_hidden_state[0, rows]  # behind the final norm
        expected = torch.tensor(reading.tokens_of(span or (0, len(reading.answer))))
        expected = torch.tensor(reading.tokens)[expected][:, None]  # (T, 1)
        found = []
        with torch.no_grad():
            for state in [*map(model.model.language_model.norm, states), last]:
                logits = at_least_float32(model.get_output_embeddings()(state))  # (T, V)
                found.append(logits.softmax(-1).gather(1, expected.to(logits.device))[:, 0].cpu().numpy())
    return np.stack(found)


class Traced(NamedTuple):
    """What the answer reads of one photo, or of several pictures of one prompt."""

    reading: Reading
    pictures: list[TokenMaps]  # the maps of each picture; their evidence, settings and target are the same
    attention: np.ndarray  # (K, L)
    gradient: np.ndarray  # (K, L)
    lens: np.ndarray  # (K, T): probability of the explained tokens after each layer

    @property
    def maps(self) -> TokenMaps:
        """Those of the first picture."""
        return self.pictures[0]


def trace_photo(
    reading: Reading, span, settings: Settings, progress=None, passes=noisy_passes, batch_size: int = 1
) -> Traced:
    """Maps with their evidence and gradients of all layers, and attention; the arguments are those of `explain`.

    "auto" stands for Grad-CAM: to cut the maps of all layers to the tokens that the words need would take long.
    """
    settings = settled_for(settings, whole=True)
    maps, gradient = maps_and_gradients(reading, span, settings, progress, passes, batch_size, explain_with_evidence)
    return Traced(reading, maps, attention_flow(reading, span), gradient, logit_lens(reading, span))


def flow_findings(shares: dict[str, np.ndarray], sizes: dict[str, float], gradient: dict[str, np.ndarray]) -> list[str]:
    """Sentences on the curves by layer, each (K,): the groups' shares of attention and of the gradient.

    `shares` are those of system, image and user tokens, and of other images if there are any, `sizes` the numbers of
    tokens of these groups.
    """
    image, others = shares["image"], "other images" in shares
    every = "system, image, user and other images' tokens" if others else "system, image and user tokens"
    most, least = int(image.argmax()), int(image.argmin())
    line = (
        f"attention: the image gets {decimal(image.min())} (layer {least}) to {decimal(image.max())} (layer {most}) of "
        f"what {every} get"
    )
    per_token = {name: (shares[name] / sizes[name]).mean() for name in shares}
    tokens = {"system": "a system token", "user": "a user token"}
    tokens |= {"other images": "another image's"} if others else {}
    times = [f"{what} {per_token[name] / per_token['image']:.1f}" for name, what in tokens.items()]
    line += f"; per token {', '.join(times[:-1])} and {times[-1]}"
    lines = [f"{line} times as much as an image token, in the mean over the layers"]
    carried = gradient["image"]
    if not np.isfinite(carried).any():
        return [*lines, "gradient: none reaches the layers where they are read"]
    first = carried[np.isfinite(carried)][0]
    last = np.flatnonzero(carried >= first / 2)[-1]  # layer with half of it
    course = "and half of that or more at every layer"
    if last + 1 < len(carried):
        course = f"less than half of that from layer {last + 1} on"
    return [*lines, f"gradient: the image carries {decimal(first)} of the score at the first layer, {course}"]


def _attention_sums(traced: Traced, groups: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{group: (K,)}: attention to all positions of each group."""
    return {name: traced.attention[:, group].sum(-1) for name, group in groups.items()}


def _groups_of(traced: list[Traced]) -> list[dict[str, np.ndarray]]:
    """The `token_groups` of each, which all have the same names: a group that a prompt does not have is empty."""
    groups = [token_groups(one.reading) for one in traced]
    names = dict.fromkeys(name for own in groups for name in own)
    return [{name: own.get(name, np.zeros(0, int)) for name in names} for own in groups]


def curves_by_layer(traced: list[Traced]) -> tuple[dict, dict, dict]:
    """{group: (photos, K)} of attention shares by eq. 7, of attention per token, and of gradient shares."""
    curves = []
    for photo, groups in zip(traced, _groups_of(traced), strict=True):
        sizes, prompt = {name: len(group) for name, group in groups.items()}, [*groups]
        prompt.remove("answer")
        sizes["answer"] = np.mean(photo.maps.target_tokens) + 1  # those that the explained positions see
        curves.append(
            (
                group_sums(photo.attention, groups, prompt),
                {name: sums / max(sizes[name], 1) for name, sums in _attention_sums(photo, groups).items()},
                group_sums(photo.gradient, groups),
            )
        )
    kinds = zip(*curves, strict=True)
    return tuple({name: np.stack([curve[name] for curve in kind]) for name in kind[0]} for kind in kinds)


def flow_rows(traced: list[Traced], names: list[str]) -> list[dict]:
    """Rows of information_flow.csv, one for each photo and layer."""
    rows = []
    curves, groups = curves_by_layer(traced), _groups_of(traced)
    for i, (name, photo) in enumerate(zip(names, traced, strict=True)):
        kinds = {"attention": _attention_sums(photo, groups[i])}
        for kind, curve in zip(("share", "per_token", "gradient"), curves, strict=True):
            kinds[kind] = {group: values[i] for group, values in curve.items()}
        p, kept, doubt = photo.maps.evidence.record.values()
        for layer in range(len(photo.attention)):
            row = {"photo": name, "layer": layer, "p": f"{p:.4g}", "kept": f"{kept:.4g}", "doubt": doubt}
            row["p_after_layer"] = f"{photo.lens[layer].mean():.4g}"
            values = {f"{k}_{group}": f"{v[layer]:.4g}" for k, kind in kinds.items() for group, v in kind.items()}
            row |= {column.replace(" ", "_"): value for column, value in values.items()}
            rows.append(row)
    return rows


def flow_arrays(traced: list[Traced], names: list[str]) -> dict[str, np.ndarray]:
    """Arrays of information_flow.npz, for photo i: attention_i, gradient_i (K, L), maps_i (K, H, W), lens_i (K, T).

    And groups_i (4, 2), start and stop of each of the `groups`, or with several pictures in a prompt of each stretch of
    positions of one group, with group_i, the number of that; evidence_i (2,): p of the explained tokens, and what it is
    without the photo. Further explained pictures have maps_i_1, maps_i_2 ...
    """
    groups = list(_groups_of(traced)[0])
    arrays = {"photos": np.array(names), "groups": np.array(groups)}
    arrays["settings"] = np.array(json.dumps(asdict(traced[0].maps.settings)))
    for i, photo in enumerate(traced):
        arrays |= {f"attention_{i}": photo.attention, f"gradient_{i}": photo.gradient, f"lens_{i}": photo.lens}
        for j, maps in enumerate(photo.pictures):
            arrays[f"maps_{i}_{j}" if j else f"maps_{i}"] = np.stack(list(maps.maps.values()))
        parts = stretches(photo.reading)
        arrays[f"groups_{i}"] = np.array([(start, stop) for _, start, stop in parts])
        arrays[f"group_{i}"] = np.array([groups.index(name) for name, *_ in parts])
        arrays |= {f"answer_{i}": np.array(photo.reading.answer), f"evidence_{i}": np.array(photo.maps.evidence[:2])}
    return arrays


PLACES = ("input", "input_layernorm", "self_attn.v_proj", "post_attention_layernorm")
PLACE_NAMES = {"input": "layer input", "self_attn.v_proj": "v_proj"}  # in figures, where not the module's own


def tap_modules(model, layers: list[int]) -> dict[str, dict[int, object]]:
    """{place: {layer: what `explain` takes}} for the places of figure 7 of "From Redundancy to Relevance"."""
    decoder = get_model_layers(model)[0]
    return {
        place: {layer: layer if place == "input" else decoder[layer].get_submodule(place) for layer in layers}
        for place in PLACES
    }


def group_size(reading: Reading, name: str) -> int:
    """The number of tokens in a group, at least 1."""
    return max(len(token_groups(reading).get(name, ())), 1)


def forecast_forwards(readings: list[Reading], forwards: float) -> str:
    """A sentence on how long that many forward passes of each photo will take, measured on one of the first photo."""
    with borrowed(readings[0].model), memory_explained(len(readings[0].positions)):
        start = time.monotonic()
        embed(readings[0])
    each = time.monotonic() - start
    total = forwards * len(readings)
    return f"expected: the time of about {total:.0f} forward passes, {each:.2f} s each: {each * total:.0f} seconds"
