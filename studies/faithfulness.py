"""Whether a map finds what the answer needs: insertion and deletion, and the verdict on one map or on several methods.

    Reading, TokenMaps -> insertion_deletion    curves
                       -> score_rows, verdict   rows of a table, sentences

Shapes:  N  image tokens     S  steps     height, width  pixels of the photo
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageFilter

from common.encoding import decimal
from common.passes import own_patches, patches_of, repainted, token_probabilities
from common.progress import show_progress
from common.terminal import say
from smooth_gradcam import (
    ExplanationError,
    Reading,
    TokenMaps,
    borrowed,
    check_whole,
    memory_explained,
    score_parts,
)
from studies.localization import localization

__all__ = [
    *("BASELINES", "NOT_BELIEVED", "ORDERS", "SHARE", "TIE", "TOLERANCE", "Faithfulness", "auc", "baseline_image"),
    *("bends", "caveats", "chances", "check_same", "comparison_rows", "comparison_verdict", "insertion_deletion"),
    *("map_key", "measure", "reservations", "score_rows", "side_by_side", "verdict"),
]


# insertion and deletion

BASELINES = ("blur", "mean", "black")
ORDERS = 5  # random orders that maps are compared with
TOLERANCE = 0.001  # of the area under each stretch of a curve
TYPICAL = 12  # steps of a curve that are then measured


@dataclass(frozen=True)
class Faithfulness:
    """Mean probability of the explained tokens as image tokens are revealed or removed, the hottest of a map first."""

    shares: np.ndarray  # (S + 1,) shares of the image tokens that are revealed or removed, 0 to 1
    insertion: dict[int | str, np.ndarray]  # layer -> (S + 1,), from the baseline picture to the photo
    deletion: dict[int | str, np.ndarray]  # layer -> (S + 1,), from the photo to the baseline picture
    random_insertion: np.ndarray  # (orders, S + 1), in random orders
    random_deletion: np.ndarray  # (orders, S + 1)
    baseline: str
    forwards: int  # pictures that were run through the model


def auc(curve: np.ndarray, shares: np.ndarray) -> float:
    """Area under an insertion or deletion curve, in [0, 1]."""
    return float(np.trapezoid(curve, shares))


def baseline_image(image: Image.Image, baseline: str) -> Image.Image:
    """What removed image tokens show: the photo blurred by a tenth of its shorter side, its mean colour, or black.

    Raises ValueError for another name than those of `BASELINES`.
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline={baseline!r} must be one of {', '.join(BASELINES)}")
    if baseline == "blur":
        return image.filter(ImageFilter.GaussianBlur(0.1 * min(image.size)))
    mean = tuple(np.asarray(image).mean((0, 1)).round().astype(int).tolist())
    return Image.new("RGB", image.size, mean if baseline == "mean" else "black")


def check_same(reading: Reading, token_maps: TokenMaps) -> None:
    """Raises ValueError if the maps are not of this reading."""
    if reading.grid != token_maps.grid:
        raise ValueError(
            f"the maps have {token_maps.grid} image tokens, the photo {reading.grid}: another photo or processor"
        )
    if (reading.prompt, reading.tokens) != (token_maps.prompt, token_maps.tokens):
        raise ValueError(
            f"the maps explain {token_maps.answer!r} to {token_maps.prompt!r}, the reading {reading.answer!r} to "
            f"{reading.prompt!r}: another answer, or other tokens"
        )


def insertion_deletion(
    reading: Reading,
    token_maps: TokenMaps,
    *,
    steps: int = 64,
    baseline: str = "blur",
    random_orders: int = 5,
    batch_size: int = 8,
    seed: int = 0,
    extra_shares: Iterable[float] = (),
    tolerance: float = 0.0,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> Faithfulness:
    """Insertion and deletion (Petsiuk et al., RISE, 2018) by whole image tokens, for every layer that has a map.

    The image tokens are revealed on the baseline picture, or removed from the photo, in `steps` steps (fewer if there
    are fewer tokens) by their rank in the map, ties at random. The curves are the mean probability of the explained
    tokens, after the same words. A map is faithful if insertion lies far above deletion. In a random order the two are
    about equal, and `random_orders` of them are measured. One map costs 2 * (steps - 1) forward passes, run in batches
    of `batch_size`; each of `extra_shares`, in [0, 1], is measured as well. With a `tolerance`, every eighth of the
    steps is measured first, and then the middle of each stretch whose area could be off by more than that; the rest is
    interpolated. `progress` wraps the iterable over the orders.

    Raises ValueError for bad arguments, and RuntimeError if memory runs out.
    """
    for name, value, least in (("steps", steps, 1), ("random_orders", random_orders, 0), ("batch_size", batch_size, 1)):
        check_whole(name, value, least)
    check_whole("seed", seed, 0)
    check_same(reading, token_maps)
    model, count, rng = reading.model, len(reading.positions), np.random.default_rng(seed)
    blank = baseline_image(reading.photo, baseline)
    with borrowed(model):
        own, whole = own_patches(reading), patches_of(reading)
        forced, (scored,) = score_parts(reading.inputs, reading.tokens, [token_maps.target_tokens])
        ends = [
            pixels[own].unflatten(0, (count, -1)) for pixels in (repainted(reading, blank), whole)
        ]  # (N, patches, ...)
        shares = [*np.linspace(0, 1, min(steps, count) + 1), *extra_shares]
        moved = np.unique(np.round(np.multiply(shares, count)).astype(int))  # (S + 1,) numbers of tokens

        def probability(pixels):  # (B, N, patches, ...) -> (B,)
            pictures = whole.repeat(len(pixels), 1, 1)
            pictures[:, own] = pixels.flatten(1, 2)
            return token_probabilities(reading, forced, pictures, scored).mean(1)

        last = len(moved) - 1
        first = np.arange(last + 1) if tolerance == 0 else np.round(np.linspace(0, last, 9)).astype(int)
        first = np.union1d(first, np.searchsorted(moved, np.round(np.multiply(extra_shares, count))).astype(int))

        def curve(order, start, end, bounds):  # -> (S + 1,)
            values, missing = np.full(last + 1, np.nan), first[(first > 0) & (first < last)]
            values[[0, -1]] = bounds
            while len(missing):
                for i in range(0, len(missing), batch_size):
                    batch = missing[i : i + batch_size]
                    pixels = start.repeat(len(batch), 1, 1, 1)  # (B, N, ...)
                    for picture, number in zip(pixels, moved[batch], strict=True):
                        picture[order[:number]] = end[order[:number]]
                    values[batch] = probability(pixels)
                missing = bends(moved / count, values, tolerance)
            measured = ~np.isnan(values)
            forwards.append(int(measured.sum()) - 2)
            return np.interp(moved, moved[measured], values[measured])

        forwards = []
        with memory_explained(count):
            bounds = [probability(pixels[None])[0] for pixels in ends]
            ties = rng.random(count)  # the same for any number of maps, as the random orders below
            orders = {
                layer: np.lexsort((ties, -cam.ravel()))
                for layer, cam in token_maps.maps.items()
                if layer not in token_maps.blank
            }
            random = np.random.default_rng([seed, 1])
            orders |= {("random", i): random.permutation(count) for i in range(random_orders)}
            curves = {}
            for key in (progress or iter)(orders):
                order = torch.as_tensor(orders[key])
                curves[key] = [curve(order, ends[a], ends[b], (bounds[a], bounds[b])) for a, b in ((0, 1), (1, 0))]
    random = np.array([pair for key, pair in curves.items() if isinstance(key, tuple)])  # (orders, 2, S + 1)
    random = random.reshape(-1, 2, len(moved))
    layers = {key: pair for key, pair in curves.items() if not isinstance(key, tuple)}
    return Faithfulness(
        moved / count,
        {layer: insertion for layer, (insertion, _) in layers.items()},
        {layer: deletion for layer, (_, deletion) in layers.items()},
        random[:, 0],
        random[:, 1],
        baseline,
        2 + sum(forwards),
    )


def bends(shares: np.ndarray, values: np.ndarray, tolerance: float) -> np.ndarray:
    """Indices of the steps to measure next: the middle of each stretch whose area is not yet certain.

    `values` are nan where nothing is measured. Between two measured steps, the area under a monotonic curve differs
    from the trapezoid's by at most half their difference times their distance.
    """
    known = np.flatnonzero(~np.isnan(values))
    a, b = known[:-1], known[1:]
    uncertain = np.abs(values[b] - values[a]) * (shares[b] - shares[a]) / 2
    return ((a + b) // 2)[(uncertain > tolerance) & (b - a > 1)]


# rows and verdicts

SHARE = 0.1  # of the image, whose removal the verdict reports
TIE = 0.02  # difference of two areas that means nothing: one step of 64 can change an area by as much
NOT_BELIEVED = "no map of these words is to be believed, whatever it scores"  # said in place of a verdict


def score_rows(token_maps: TokenMaps, measured: Faithfulness, mask: np.ndarray | None) -> list[dict]:
    """The measures of each layer that has a map, then of the mean of the random orders: rows of scores.csv."""

    def row(layer, insertion, deletion):
        areas = [auc(curve, measured.shares) for curve in (insertion, deletion)]
        return {
            "layer": layer,
            "insertion": areas[0],
            "deletion": areas[1],
            "difference": areas[0] - areas[1],
            "p": float(deletion[0]),
            "without_hottest_10_percent": float(deletion[np.abs(measured.shares - SHARE).argmin()]),
            "baseline_picture": float(deletion[-1]),
        }

    rows = [row(layer, measured.insertion[layer], measured.deletion[layer]) for layer in measured.insertion]
    for measures in rows if mask is not None else []:
        measures |= localization(token_maps.maps[measures["layer"]], mask)
    rows.append(row("random", measured.random_insertion.mean(0), measured.random_deletion.mean(0)))
    return [row | ({} if token_maps.evidence is None else token_maps.evidence.record) | {"p": row["p"]} for row in rows]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if abs(share) >= 0.1 or abs(share) < 0.0005 else f"{100 * share:.1f} %"


def verdict(rows: list[dict], measured: Faithfulness) -> list[str]:
    """Sentences on each layer's map, on the most faithful one, and on what no map can show.

    Of words that are doubted, none is the most faithful.
    """
    *layers, random = rows
    lines, probability = [], random["p"]

    def cost(row):
        lost = (probability - row["without_hottest_10_percent"]) / (probability or 1)
        return (
            f"costs the answer {_percent(abs(lost))}" if lost > -0.0005 else f"gives the answer {_percent(-lost)} more"
        )

    for row in layers:
        line = f"layer {row['layer']}: removing the hottest 10 % of the image {cost(row)} of its probability; "
        line += f"a random 10 % {cost(random)}"
        if "energy" in row:
            side = "on" if row["pointing"] else "next to" if row["near"] else "off"
            line += f"; the maximum lies {side} the object, {_percent(row['energy'])} of the map inside it"
        lines.append(line)
    if random.get("doubt"):
        return [*lines, NOT_BELIEVED]
    best, *tied = _leaders(layers)
    differences = chances(measured)
    lines.append(
        f"most faithful: layer {best['layer']}, insertion {decimal(best['insertion'])} - deletion "
        f"{decimal(best['deletion'])} = {decimal(best['difference'])}; {len(differences)} random orders: "
        f"{decimal(min(differences))} to {decimal(max(differences))}"
    )
    if tied:
        names = ", ".join(str(row["layer"]) for row in tied)
        lines.append(f"as good, within {TIE}: layer{'s' * (len(tied) > 1)} {names}")
    count = sum(row["difference"] > max(differences) for row in layers)
    lines.append(
        f"{count} of {len(layers)} maps beat every random order"
        + ("" if count == len(layers) else ": do not rely on the others")
    )
    return lines + caveats(random)


def _leaders(rows: list[dict]) -> list[dict]:
    """The row with the largest insertion minus deletion, and those tied with it: best first."""
    ordered = sorted(rows, key=lambda row: -row["difference"])
    return [row for row in ordered if row["difference"] >= ordered[0]["difference"] - TIE]


def chances(measured: Faithfulness) -> list[float]:
    """Insertion minus deletion of each random order."""
    pairs = zip(measured.random_insertion, measured.random_deletion, strict=True)
    return [auc(insertion - deletion, measured.shares) for insertion, deletion in pairs]


def caveats(random: dict) -> list[str]:
    """Why no map can score high: much is left on the baseline picture. `random` is the random orders' row."""
    if random["baseline_picture"] <= 0.5 * random["p"]:
        return []
    kept = _percent(random["baseline_picture"] / random["p"])
    return [
        f"note: on the baseline picture alone the answer keeps {kept} of its probability, so no map can score high: "
        "another --baseline may leave less"
    ]


def comparison_verdict(rows: list[dict], measured: Faithfulness) -> list[str]:
    """Sentences on each method, on which map is most faithful and by how much, and on which others are tied with it."""
    maps, lines = rows[:-1], []
    threshold = max(chances(measured)) + TIE
    for method in dict.fromkeys(row["method"] for row in maps):
        own = [row for row in maps if row["method"] == method]
        best, mean = max(own, key=lambda row: row["difference"]), np.mean([row["difference"] for row in own])
        count = sum(row["difference"] > threshold for row in own)
        lines.append(
            f"{method}: insertion - deletion {decimal(best['difference'])} at layer {best['layer']}, mean over the "
            f"layers {decimal(mean)}; {count} of {len(own)} maps beat every random order"
        )
    doubts = reservations(rows, measured)
    best, *tied = _leaders(maps)
    if best["difference"] <= threshold or rows[-1].get("doubt"):
        return [*lines, *doubts]
    others = [row for row in maps if row["method"] not in {row["method"] for row in (best, *tied)}]
    lead = f"leads: {best['method']} at layer {best['layer']}"
    if others:
        second = max(others, key=lambda row: row["difference"])
        lead += f", {decimal(best['difference'] - second['difference'])} above the best of {second['method']}"
    if tied:
        methods = dict.fromkeys(row["method"] for row in tied)
        layers = {method: [str(row["layer"]) for row in tied if row["method"] == method] for method in methods}
        lead += f"; tied with it, within {TIE}: "
        lead += "; ".join(f"{method} at layer {', '.join(numbers)}" for method, numbers in layers.items())
    return [*lines, lead, *doubts]


def reservations(rows: list[dict], measured: Faithfulness) -> list[str]:
    """That no method's map can be trusted, or the `caveats`; empty if all is well."""
    *maps, random = rows
    if random.get("doubt"):
        return [f"none leads: {NOT_BELIEVED}"]
    none = max(row["difference"] for row in maps) <= max(chances(measured)) + TIE
    return ["none leads: no map beats the random orders, and none is to be believed"] * none + caveats(random)


# the measures of evaluate mode


def _forecast_pictures(reading: Reading, token_maps: TokenMaps, orders: int, steps: int, batch_size: int) -> str:
    """A sentence on how long insertion and deletion will take, measured on one batch."""
    with borrowed(reading.model), memory_explained(len(reading.positions)):
        forced, (scored,) = score_parts(reading.inputs, reading.tokens, [token_maps.target_tokens])
        pixels = patches_of(reading)[None].repeat(batch_size, 1, 1)
        start = time.monotonic()
        token_probabilities(reading, forced, pixels, scored)
    each = (time.monotonic() - start) / batch_size
    pictures = 2 * orders * min(steps, TYPICAL)
    return f"expected: about {pictures} pictures, {each:.2f} s each: {each * pictures / 60:.1f} minutes"


def measure(reading: Reading, token_maps: TokenMaps, steps, baseline, runs_at_once, seed, quiet) -> Faithfulness:
    """Insertion and deletion as in evaluate mode, unless `quiet` with the expected time first.

    Raises ValueError for bad arguments, ExplanationError if no layer has a map.
    """
    if set(token_maps.maps) <= set(token_maps.blank):
        raise ExplanationError("no layer has a map (no gradient, or zero everywhere), so there is nothing to evaluate")
    for name, value in (("steps", steps), ("runs_at_once", runs_at_once)):
        check_whole(name, value, 1)
    if not quiet:
        orders = len(token_maps.maps) - len(token_maps.blank) + ORDERS
        say(_forecast_pictures(reading, token_maps, orders, steps, runs_at_once))
    bar = show_progress(quiet, "orders of the image tokens", "order")
    keywords = {"steps": steps, "baseline": baseline, "batch_size": runs_at_once, "seed": seed}
    keywords |= {"random_orders": ORDERS, "extra_shares": [SHARE], "tolerance": TOLERANCE}
    return insertion_deletion(reading, token_maps, **keywords, progress=bar)


def map_key(method: str, layer: int) -> str:
    """The key of a method's map among those of several methods."""
    return f"{method}, layer {layer}"


def side_by_side(maps: dict[str, TokenMaps]) -> TokenMaps:
    """The maps of several methods, {method: maps}, as one, keyed by `map_key`."""
    cams = {map_key(method, k): cam for method, own in maps.items() for k, cam in own.maps.items()}
    no_gradient = frozenset(map_key(method, k) for method, own in maps.items() for k in own.no_gradient)
    likeness = {map_key(method, k): value for method, own in maps.items() for k, value in own.likeness.items()}
    return replace(next(iter(maps.values())), maps=cams, no_gradient=no_gradient, likeness=likeness)


def comparison_rows(
    maps: dict[str, TokenMaps], together: TokenMaps, measured: Faithfulness, mask: np.ndarray | None
) -> list[dict]:
    """The rows of `score_rows`, with method and layer in columns of their own: rows of comparison.csv."""
    pair_of = {map_key(method, k): (method, k) for method, own in maps.items() for k in own.maps}
    rows = score_rows(together, measured, mask)
    pairs = [pair_of.get(row["layer"], ("random", "")) for row in rows]
    return [{"method": method} | row | {"layer": k} for row, (method, k) in zip(rows, pairs, strict=True)]
