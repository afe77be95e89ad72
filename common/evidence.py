"""What a map rests on: how likely the words are, how likely without the photo, and which image tokens they need.

    explain_with_evidence        `explain` of the core, whose maps also know their evidence and how like the middle
                                 layer's they are; explain_by_methods does so by several methods
    METHODS["needed"], ["auto"]  Grad-CAM on the image tokens alone that the words need

Import this file to have both in the core. Shapes as there, and  R runs.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

import common.attention  # their methods are there with these
import common.parent  # noqa: F401
from common.encoding import decimal
from common.families import hidden_with, photo_tokens
from common.passes import with_contrast
from smooth_gradcam import (
    METHODS,
    Method,
    Reading,
    Settings,
    TokenMaps,
    at_least_float32,
    borrowed,
    explain,
    find_taps,
    get_model_layers,
    gradcam,
    hooked,
    memory_explained,
    score_parts,
)

__all__ = [
    *("ALIKE", "DOUBTED", "FADED", "PHOTOLESS", "Evidence", "departures", "departures_of_most", "doubt_lines"),
    *("doubt_of", "evidence_lines", "explain_by_methods", "explain_with_evidence", "image_hiding", "joined", "passed"),
    *("positions_of", "probability_text", "settled_for", "share_text", "spearman", "warnings_of", "weighed"),
    "with_method",
]

DOUBTED = 0.1  # probability below which the model hardly says a word
UNSAID = 0.01  # probability of a single token below which the model hardly says the words with it
PHOTOLESS = 0.8  # share of its probability above which, left without the photo, a word does not come from it
ALIKE = 0.3  # rank correlation with the middle layer's map below which a layer shows something else
FADED = 0.35  # share of the colours that a map gets which is not to be believed
NEEDED = 0.9  # share of what the photo gives a word that is lost without the image tokens that it needs
STEP = 1.1  # their number is found to within this factor
RUNS_AT_ONCE, POSITIONS = 8, 2**14  # most runs, and keys and values of so many positions, that are in memory at once
REPORTED = 5  # photos with warnings of their own
NAMED = 10  # words that a line names


class Evidence(NamedTuple):
    """What a part of an answer rests on, as means over its tokens."""

    p: float  # probability, each token after those before it
    without: float  # the same while no text sees the photo
    tokens: tuple[float, ...] = ()  # p of each token
    contrast: float | None = None  # p of the contrast in the place of the words, if there is one

    @property
    def kept(self) -> float:
        """The share of the probability that is left without the photo, at most 1."""
        return min(1.0, self.without / self.p) if self.p else 1.0

    @property
    def hardly_said(self) -> bool:
        """Whether the model hardly says the words, or one of their tokens, which a mean over sure ones would hide."""
        return self.p < DOUBTED or min(self.tokens, default=1) < UNSAID

    @property
    def photoless(self) -> bool:
        """Whether the words do not come from the photo."""
        return self.kept > PHOTOLESS

    @property
    def doubt(self) -> str:
        """Why a map of these words is not to be believed; empty if nothing speaks against it."""
        what = f"this (p {probability_text(self.p)})"
        if self.p >= DOUBTED and self.hardly_said:
            what = f"a part of this (p {probability_text(min(self.tokens))} for a token)"
        reasons = [f"the model hardly says {what}"] * self.hardly_said
        if self.photoless:
            reasons.append(f"this does not come from the photo ({share_text(self.kept)} of p is left without it)")
        return " and ".join(reasons)

    @property
    def record(self) -> dict[str, float | str]:
        """What tables and records say of the words: {"p", "kept", "doubt"}."""
        return {"p": self.p, "kept": self.kept, "doubt": self.doubt}

    def __str__(self) -> str:
        contrast = "" if self.contrast is None else f"; the contrast's p {probability_text(self.contrast)}"
        return f"p {probability_text(self.p)}, {share_text(self.kept)} of it left without the photo{contrast}"


def probability_text(p: float) -> str:
    """Two decimals, or, below 0.01, one digit."""
    return f"{p:.2f}" if p >= 0.01 or p == 0 else f"{p:.0e}".replace("e-0", "e-")


def share_text(share: float) -> str:
    return f"{100 * share:.0f} %"


# the photo hidden from the text


@contextmanager
def image_hiding(reading: Reading) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """Yields a function that hides image tokens from the text behind them: bool (R, N) -> float32 (R, A).

    It gives the probability of each token of the answer, after those before it. In each run no position behind the
    photos attends to the hidden tokens, in any layer, and positions stay as they are; what shows a photo beside its
    cells is hidden as `hidden_with` says, and a run that hides all cells also hides what stands between several photos.
    The photos pass the model once, and in each run the text behind them.
    """
    model = reading.model
    forced, (scored,) = score_parts(reading.inputs, reading.tokens, [range(len(reading.tokens))])
    places, length = photo_tokens(reading), forced["input_ids"].shape[1]
    first, start = int(places[0]), int(places[-1]) + 1
    expected = torch.tensor(scored.expected)[:, None]
    decoder, given = model.model.language_model, {}
    name = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"  # since 5.23
    cache = DynamicCache()  # of all positions, in layers with a sliding window as well
    with borrowed(model), memory_explained(len(places)), torch.no_grad():
        with hooked([decoder.register_forward_pre_hook(lambda *args: given.update(args[2]), with_kwargs=True)]):
            model.model(**forced, **{name: cache}, use_cache=True)
        cache.crop(start - length)
        embeddings, positions = given["inputs_embeds"][:, start:], positions_of(given)[..., start:]
        pictures = given.get("visual_pos_masks")  # of Qwen3-VL, whose first layers add to them; some may come later
        later = 0 if pictures is None else int(pictures[:, start:].sum())

        def hide(hidden: np.ndarray) -> np.ndarray:
            results, runs = [], max(1, min(RUNS_AT_ONCE, POSITIONS // length))
            for rows in torch.as_tensor(hidden).split(runs):
                mask, count, own = torch.ones(len(rows), length, dtype=torch.long), len(rows), copy.deepcopy(cache)
                for seen, row in zip(mask, rows, strict=True):
                    seen[slice(first, start) if row.all() else hidden_with(reading, row)] = 0
                own.batch_repeat_interleave(count)
                text = {"inputs_embeds": embeddings.expand(count, -1, -1), "attention_mask": mask.to(embeddings.device)}
                text["position_ids"] = positions.expand(*positions.shape[:-2], count, -1)
                if later:
                    text["visual_pos_masks"] = pictures[:, start:].expand(count, -1)
                    added = given["deepstack_visual_embeds"]
                    text["deepstack_visual_embeds"] = [features[-later:].repeat(count, 1) for features in added]
                states = decoder(**text, **{name: own}, use_cache=True).last_hidden_state
                for row in states[:, [position - start for position in scored.predicting]]:  # (A, C)
                    logits = at_least_float32(model.get_output_embeddings()(row))  # (A, V): of one run at a time
                    results.append(logits.softmax(-1).gather(1, expected.to(logits.device))[:, 0].cpu().numpy())
            return np.stack(results)

        yield hide


def positions_of(inputs: dict) -> Tensor:
    """The positions in what a decoder is given, (..., 1, L); where there are none, it counts: (1, L)."""
    if (positions := inputs.get("position_ids")) is not None:
        return positions
    return torch.arange(inputs["inputs_embeds"].shape[1], device=inputs["inputs_embeds"].device)[None]


# the image tokens that the words need


def weighed(reading: Reading, results: list[TokenMaps], hide: Callable) -> list[TokenMaps]:
    """The maps with their evidence; those of the methods "needed" and "auto" on the needed image tokens alone.

    `results` are those of `explain`, of all photos of the reading; `hide` is that of `image_hiding`. A map of "auto" is
    Grad-CAM as it is for the whole answer, and "needed" for a part of it.
    """
    count, photos = len(reading.positions), len(reading.grids)
    seen, unseen = hide(np.array([[False] * count, [True] * count]))  # (A,) twice
    for i, maps in enumerate(results):
        settings = settled_for(maps.settings, maps.whole)
        results[i] = replace(maps, evidence=_evidence_of(maps.target_tokens, seen, unseen), settings=settings)
    parts = [results[i : i + photos] for i in range(0, len(results), photos)]
    wanted = [
        (part, layer)
        for part in parts
        for layer in part[0].maps
        if part[0].settings.method == "needed" and not part[0].evidence.photoless
    ]
    cams = [np.concatenate([maps.maps[layer].ravel() for maps in part]) for part, layer in wanted]  # (N,) each
    for (part, layer), cam in zip(wanted, _needed_only(cams, [part[0] for part, _ in wanted], hide), strict=True):
        for maps, own in zip(part, np.split(cam, np.cumsum([m.maps[layer].size for m in part])[:-1]), strict=True):
            maps.maps[layer] = own.reshape(maps.grid)
    return results


def settled_for(settings: Settings, whole: bool) -> Settings:
    """The settings with the method that "auto" stands for, for a `whole` answer or a part of it."""
    if settings.method != "auto":
        return settings
    return replace(settings, method="gradcam" if whole else "needed")


def _evidence_of(tokens: list[int], seen: np.ndarray, unseen: np.ndarray) -> Evidence:
    """That of these tokens of an answer whose probabilities (A,) with and without the photo are given."""
    return Evidence(float(seen[tokens].mean()), float(unseen[tokens].mean()), tuple(seen[tokens].tolist()))


def _needed_only(cams: list[np.ndarray], explained: list[TokenMaps], hide: Callable) -> list[np.ndarray]:
    """Each map (N,) with zeros but at the fewest of its hottest tokens without which the words lose what they need.

    That is `NEEDED` of the probability that the photo gives them, p - p without it. Found by bisection to within a
    factor of `STEP`; if all tokens of the map are not enough, it stays as it is.
    """
    orders = [np.argsort(-cam, kind="stable") for cam in cams]
    low, high = np.zeros(len(cams), int), np.array([np.count_nonzero(cam) for cam in cams], int)
    while len(open_ := np.flatnonzero(high > np.maximum(STEP * low, low + 1))):
        tried = np.sqrt(np.maximum(low, 0.5) * high).astype(int).clip(low + 1, high - 1)
        hidden = np.zeros((len(open_), len(cams[0])), bool)
        for row, i in zip(hidden, open_, strict=True):
            row[orders[i][: tried[i]]] = True
        for i, left in zip(open_, hide(hidden), strict=True):  # (A,)
            p, without = explained[i].evidence[:2]
            enough = left[explained[i].target_tokens].mean() <= p - NEEDED * (p - without)
            (high if enough else low)[i] = tried[i]
    return [
        np.where(np.isin(np.arange(len(cam)), order[:n]), cam, 0)
        for cam, order, n in zip(cams, orders, high, strict=True)
    ]


def _finish(reading: Reading, results: list[TokenMaps]) -> list[TokenMaps]:
    with image_hiding(reading) as hide:
        results = weighed(reading, results, hide)
    if (contrast := results[0].settings.contrast) is None:
        return results
    other, span = with_contrast(reading, results[0].target_span, contrast)
    with image_hiding(other) as hide:
        p = hide(np.zeros((1, len(reading.positions)), bool))[0, other.tokens_of(span)].mean()
    return [replace(maps, evidence=maps.evidence._replace(contrast=float(p))) for maps in results]


METHODS["needed"] = METHODS["auto"] = Method(gradcam, finish=_finish)


# maps with all that is known of them


def explain_with_evidence(
    reading: Reading, spans: list[tuple[int, int]], layers: Iterable, settings: Settings | None = None,
    progress: Callable | None = None, **options,
) -> list[TokenMaps]:  # fmt: skip
    """`explain` of the core, with the evidence of each part and each layer's likeness to the middle layer."""
    named = {"": settings or Settings()}
    return explain_by_methods(reading, spans, layers, named, progress, **options)[""]


def explain_by_methods(
    reading: Reading, spans: list[tuple[int, int]], layers: Iterable, settings: dict[str, Settings],
    progress: Callable | None = None, **options,
) -> dict[str, list[TokenMaps]]:  # fmt: skip
    """{name: maps} of several settings, {name: settings}, as `explain_with_evidence` gives them.

    The evidence is measured once for all of them, and settings that share their `passed` share their passes.
    """
    layers, results, explained = list(layers), {}, {}
    middle = get_model_layers(reading.model)[1] // 2
    for name, one in settings.items():
        way = passed(one)
        if way not in explained:
            explained[way] = explain(reading, spans, [*layers, middle], way, progress, **options)
        results[name] = _likened(explained[way], reading, layers, one.method)
    finished = iter(_finish(reading, sum(results.values(), [])))
    return {name: list(islice(finished, len(own))) for name, own in results.items()}


def with_method(settings: Settings, method: str) -> Settings:
    """The settings with another method, and with the defaults of those that cannot act with it."""
    return replace(settings, **{name: getattr(Settings, name) for name in METHODS[method].inert} | {"method": method})


def passed(settings: Settings) -> Settings:
    """The settings of the passes that these maps come from: those of "needed" and "auto" are Grad-CAM's at first."""
    return replace(settings, method="gradcam") if METHODS[settings.method].finish is _finish else settings


def _likened(results: list[TokenMaps], reading: Reading, layers: list, method: str) -> list[TokenMaps]:
    """The maps of these layers, of those of the middle layer too, with their likeness to it, as maps of the method.

    Pictures that are explained together share the likeness of their maps as one.
    """
    asked = [tap.key for tap in find_taps(reading.model, layers, "input")]
    middle, likened, count = get_model_layers(reading.model)[1] // 2, [], len(reading.grids)
    for start in range(0, len(results), count):
        pictures = results[start : start + count]  # of one part of the answer
        blank = set.intersection(*(set(maps.blank) for maps in pictures))
        known = [layer for layer in asked if isinstance(layer, int) and not {layer, middle} & blank]
        whole = {layer: np.concatenate([maps.maps[layer].ravel() for maps in pictures]) for layer in {*known, middle}}
        likeness = {layer: spearman(whole[layer], whole[middle]) for layer in known}
        for maps in pictures:
            own, named = {layer: maps.maps[layer] for layer in asked}, replace(maps.settings, method=method)
            unreached = maps.no_gradient & set(own)
            likened.append(replace(maps, maps=own, no_gradient=unreached, settings=named, likeness=dict(likeness)))
    return likened


def joined(maps: list[TokenMaps], count: int) -> list[TokenMaps]:
    """The maps of `explain`, those of `count` pictures of a part of the answer as one: (1, N).

    The maps of one picture stay as they are.
    """
    if count == 1:
        return maps
    parts = [maps[i : i + count] for i in range(0, len(maps), count)]
    return [
        replace(
            part[0],
            maps={layer: np.concatenate([one.maps[layer].ravel() for one in part])[None] for layer in part[0].maps},
            grid=(1, sum(math.prod(one.grid) for one in part)),
        )
        for part in parts
    ]


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks (n,) of the values; equal values share their mean rank."""
    _, index, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[index]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two maps, -1 to 1; 0 if one of them is the same everywhere."""
    a, b = _ranks(a.ravel()), _ranks(b.ravel())
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else 0.0


# what is said of them


def doubt_of(maps: TokenMaps) -> str:
    """Why a map is not to be believed; empty if nothing speaks against it, or its evidence was not measured."""
    return maps.evidence.doubt if maps.evidence else ""


def departures(maps: TokenMaps, layers: Iterable) -> str:
    """A clause on those of the layers whose maps show something else than the middle layer's; empty if none does."""
    apart = {layer: maps.likeness[layer] for layer in layers if maps.likeness.get(layer, 1) < ALIKE}
    if not apart:
        return ""
    numbers = sorted({decimal(value, 1) for value in apart.values()}, key=float)
    which = f"layer{'s' * (len(apart) > 1)} {', '.join(map(str, apart))}"
    correlation = " to ".join(dict.fromkeys((numbers[0], numbers[-1])))
    verb = "show" if len(apart) > 1 else "shows"
    return f"{which} {verb} something else than the middle layers (correlation {correlation})"


def evidence_lines(maps: TokenMaps, layers: Iterable) -> list[str]:
    """What the maps of one photo rest on, and what speaks against them."""
    lines = [f"evidence: {maps.evidence}"]
    if doubt := doubt_of(maps):
        lines.append(f"warning: {doubt}: the map is faded, and not to be believed")
    if (maps.evidence.contrast or 1) < UNSAID:
        lines.append(f"warning: the model would hardly say {maps.settings.contrast!r} there")
    if apart := departures(maps, layers):
        lines.append(f"warning: {apart}")
    return lines


def warnings_of(said: dict[str, str]) -> list[str]:
    """Warnings of the first photos, of {photo: what is to be said, or nothing}, and how many more there are."""
    warned = [f"{name}: {text}" if len(said) > 1 else text for name, text in said.items() if text]
    lines, more = [f"warning: {text}" for text in warned[:REPORTED]], len(warned) - REPORTED
    return lines + [f"warning: the same of {more} more photo{'s' * (more > 1)}"] * (more > 0)


def departures_of_most(parts: Iterable[TokenMaps], layers: Iterable) -> str:
    """The same of the parts of an answer that are not doubted, by the median of their correlations."""
    believed = [maps for maps in parts if not doubt_of(maps)]
    found = {layer: [maps.likeness[layer] for maps in believed if layer in maps.likeness] for layer in layers}
    middle = {layer: float(np.median(values)) for layer, values in found.items() if values}
    apart = departures(replace(believed[0], likeness=middle), middle) if believed else ""
    return apart and f"of most words, {apart}"


def doubt_lines(parts: dict[str, TokenMaps]) -> list[str]:
    """Which of the named parts of an answer do not come from the photo, and which are hardly said: a line for each."""
    known = {name: maps.evidence for name, maps in parts.items() if maps.evidence}
    photoless = [f"{name} ({share_text(own.kept)})" for name, own in known.items() if own.photoless]
    unlikely = [f"{name} (p {probability_text(own.p)})" for name, own in known.items() if own.hardly_said]
    lines = []
    for reason, names in (("not from the photo", photoless), ("hardly said", unlikely)):
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        lines += [f"{reason}: {', '.join(names[:NAMED])}{more}"] * bool(names)
    return [line.replace(" %)", " % kept)", 1) for line in lines]
