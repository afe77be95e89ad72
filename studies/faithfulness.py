"""How far to trust a map: insertion and deletion, fit to an object's mask, and cascading randomisation.

    Reading, TokenMaps                  of the core
      -> measures                       insertion_deletion, localization, cascading_randomization
      -> rows, verdict, figures         evaluate: all of them, as the files and lines of the driver's mode

Shapes:  N  image tokens     S  steps     height, width  pixels of the photo
"""

import copy
import functools
import operator
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter
from PIL import Image, ImageFilter
from torch import nn

from smooth_gradcam import (
    ExplanationError,
    Look,
    Reading,
    TokenMaps,
    borrowed,
    check_whole,
    explain,
    get_model_layers,
    load_rgb,
    memory_explained,
    normalize_cam,
    prepare_inputs,
    score_parts,
    token_probabilities,
    upsample_cam,
)
from visualization_utils import (
    BAND,
    GAP,
    HEAD,
    LINE,
    MARGIN,
    METHOD_NAMES,
    PAGE,
    PLAIN,
    SMALL,
    WIDTHS,
    Page,
    Paper,
    decimal,
    draw_layer,
    fit_box,
    header,
    look_text,
    made_from,
    masthead,
    method_title,
    settings_text,
    show_progress,
    shrink,
    small_print,
    spread,
    strength,
    text_rows,
    to_csv,
)

__all__ = [
    *("insertion_deletion", "Faithfulness", "auc", "localization", "load_mask", "cascading_randomization"),
    *("spearman", "ssim", "evaluate", "compare", "object_mask", "benchmark_rows"),
]


# fit to an object's mask

NEAR = 15  # pixels off the object that the pointing game lets pass (Zhang et al., "Top-down Neural Attention", 2018)


def load_mask(mask, size: tuple[int, int]) -> np.ndarray:
    """The object's pixels, bool (height, width): where a path or PIL image is lighter than mid grey.

    Raises ValueError if its size is not the photo's (width, height), or if nothing or everything is the object.
    """
    image = load_rgb(mask)
    if image.size != size:
        raise ValueError(
            f"the mask has {image.width} x {image.height} pixels, the photo {size[0]} x {size[1]}: they must be equal"
        )
    pixels = np.asarray(image.convert("L")) > 127
    if pixels.all() or not pixels.any():
        raise ValueError("the mask is all object or has none: white is the object, black is the rest")
    return pixels


def object_mask(given: dict, size: tuple[int, int]) -> np.ndarray:
    """The object's pixels, bool (height, width), of {"mask": path}, {"box": ...} or {"segmentation": ...}, as in COCO.

    A box is [x, y, width, height] in pixels of the photo. A segmentation is a list of polygons [x, y, x, y, ...], a
    run-length mask {"size": [height, width], "counts": ...}, which needs pycocotools, or a list of both: their union.
    Raises ValueError for anything else, and if nothing or everything is the object; ImportError without pycocotools.
    """
    ((kind, value),) = given.items()
    if kind == "mask":
        try:
            return load_mask(value, size)
        except ValueError as exc:
            raise ValueError(f"the mask {value}: {exc}") from exc
    pixels = np.zeros(size[::-1], np.uint8)
    try:
        if kind == "box":
            if isinstance(value, (str, dict)) or not np.isfinite(value).all():
                raise ValueError(f"it is {value!r}")
            x, y, width, height = (float(number) for number in value)
            left, top, right, bottom = (max(round(edge), 0) for edge in (x, y, x + width, y + height))
            pixels[top:bottom, left:right] = 1
        else:
            for part in [value] if isinstance(value, dict) else value:
                if isinstance(part, dict):
                    pixels |= run_lengths(part, size)
                else:  # drawn twice as large: a pixel is inside if its middle is
                    large, corners = np.zeros((2 * size[1], 2 * size[0]), np.uint8), np.array(part, float)
                    if not (np.abs(corners) < 2**20).all():
                        raise ValueError("a polygon leads far out of the photo")
                    cv2.fillPoly(large, [np.round(2 * corners.reshape(-1, 2)).astype(np.int32)], 1)
                    pixels |= large[1::2, 1::2]
    except (TypeError, ValueError, KeyError) as exc:
        valid = "[x, y, width, height]" if kind == "box" else "polygons [[x, y, x, y, x, y, ...], ...], or run lengths"
        raise ValueError(f"the {kind} cannot be read ({exc}): give {valid}") from exc
    if pixels.all() or not pixels.any():
        held = "all" if pixels.all() else "nothing"
        raise ValueError(f"the {kind} holds {held} of the photo's {size[0]} x {size[1]} pixels")
    return pixels.astype(bool)


def run_lengths(part: dict, size: tuple[int, int]) -> np.ndarray:
    """A run-length mask of COCO, uint8 (height, width).

    Raises ImportError without pycocotools, ValueError for another size.
    """
    try:
        from pycocotools import mask as coco
    except ImportError as exc:
        raise ImportError("a run-length mask needs pycocotools: pip install pycocotools") from exc
    height, width = part["size"]
    if (width, height) != size:
        raise ValueError(f"the run lengths are of {width} x {height} pixels, the photo has {size[0]} x {size[1]}")
    return coco.decode(coco.frPyObjects(part, height, width) if isinstance(part["counts"], list) else part)


def localization(cam: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """How well a raw (H, W) map fits an object's mask, bool (height, width); shares in [0, 1], all 0 for a zero map.

    pointing  1 if the map's maximum lies on the object: the pointing game
    near      1 if it lies at most 15 pixels off it, the pointing game's usual tolerance
    energy    share of the map inside the object (Wang et al., Score-CAM, 2020: energy-based pointing game)
    obj_iou   intersection over union of the object and the map above Otsu's threshold (Obj-IoU; TAM, ICCV 2025)
    """
    heat = upsample_cam(cam, mask.shape)
    if not heat.any():
        return dict.fromkeys(("pointing", "near", "energy", "obj_iou"), 0.0)
    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    off = distance.flat[heat.argmax()]
    grey = np.round(255 * normalize_cam(heat)).astype(np.uint8)
    threshold, _ = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    hot = grey > threshold
    return {
        "pointing": float(off == 0),
        "near": float(off <= NEAR),
        "energy": float(heat[mask].sum() / heat.sum()),
        "obj_iou": float((hot & mask).sum() / (hot | mask).sum()),
    }


def at_border(cam: np.ndarray, fit: dict[str, float]) -> float:
    """1 if the map's maximum lies in its outermost cells, a corner or a border, and off the object: a sink, perhaps."""
    y, x = np.unravel_index(cam.argmax(), cam.shape)
    outermost = y in (0, cam.shape[0] - 1) or x in (0, cam.shape[1] - 1)
    return float(outermost and not fit["near"] and cam.any())


def centre_map(grid: tuple[int, int]) -> np.ndarray:
    """A map that knows nothing of the photo: a Gaussian in its middle, half a half side wide, float32 (H, W)."""
    y, x = (np.linspace(-1, 1, side) for side in grid)
    return np.exp(-2 * (y[:, None] ** 2 + x**2)).astype(np.float32)


# insertion and deletion

BASELINES = ("blur", "mean", "black")
ORDERS = 5  # random ones that maps are compared with
TOLERANCE = 0.001  # of the area of a stretch of a curve
TYPICAL = 12  # steps that are then measured of a curve


@dataclass(frozen=True)
class Faithfulness:
    """Mean probability of the explained tokens as image tokens are revealed or removed, the hottest of a map first."""

    shares: np.ndarray  # (S + 1,) share of the image tokens that is revealed or removed, 0 to 1
    insertion: dict[int | str, np.ndarray]  # layer -> (S + 1,), from the baseline picture to the photo
    deletion: dict[int | str, np.ndarray]  # layer -> (S + 1,), from the photo to the baseline picture
    random_insertion: np.ndarray  # (orders, S + 1), in a random order
    random_deletion: np.ndarray  # (orders, S + 1)
    baseline: str
    forwards: int  # pictures that were run through the model


def auc(curve: np.ndarray, shares: np.ndarray) -> float:
    """Area under an insertion or deletion curve, in [0, 1]."""
    return float(np.trapezoid(curve, shares))


def baseline_image(image: Image.Image, baseline: str) -> Image.Image:
    """What removed image tokens show: the photo blurred by a tenth of its shorter side, its mean colour, or black."""
    if baseline not in BASELINES:
        raise ValueError(f"baseline={baseline!r} must be one of {', '.join(BASELINES)}")
    if baseline == "blur":
        return image.filter(ImageFilter.GaussianBlur(0.1 * min(image.size)))
    mean = tuple(np.asarray(image).mean((0, 1)).round().astype(int).tolist())
    return Image.new("RGB", image.size, mean if baseline == "mean" else "black")


def _check_same(reading: Reading, token_maps: TokenMaps) -> None:
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
    are fewer tokens) by their rank in the map, ties at random; what counts is the mean probability of the explained
    tokens, after the same words. A map is faithful if insertion lies far above deletion; a random order has them about
    equal, and `random_orders` of them are measured. One map costs 2 * (steps - 1) forward passes, run in batches of
    `batch_size`; each of `extra_shares`, in [0, 1], is measured as well. With a `tolerance`, every eighth of the steps
    is, and then the middle of each stretch whose area could be off by more than that; what lies between is
    interpolated. `progress` wraps the iterable over the orders.

    Raises ValueError for bad arguments, and RuntimeError if memory runs out.
    """
    for name, value, least in (("steps", steps, 1), ("random_orders", random_orders, 0), ("batch_size", batch_size, 1)):
        check_whole(name, value, least)
    check_whole("seed", seed, 0)
    _check_same(reading, token_maps)
    model, count, rng = reading.model, len(reading.positions), np.random.default_rng(seed)
    blank = baseline_image(reading.photo, baseline)
    with borrowed(model):
        blank = prepare_inputs(model, reading.processor, blank, reading.prompt)["pixel_values"]
        forced, (scored,) = score_parts(reading.inputs, reading.tokens, [token_maps.target_tokens])
        ends = [
            pixels.unflatten(0, (count, -1)) for pixels in (blank, reading.inputs["pixel_values"])
        ]  # (N, patches, ...)
        shares = [*np.linspace(0, 1, min(steps, count) + 1), *extra_shares]
        moved = np.unique(np.round(np.multiply(shares, count)).astype(int))  # (S + 1,)

        def probability(pixels):  # (B, N, patches, ...) -> (B,)
            return token_probabilities(model, forced, pixels.flatten(1, 2), scored).mean(1)

        last = len(moved) - 1
        first = np.arange(last + 1) if tolerance == 0 else np.round(np.linspace(0, last, 9)).astype(int)
        first = np.union1d(first, np.searchsorted(moved, np.round(np.multiply(extra_shares, count))).astype(int))

        def curve(order, start, end, bounds):  # -> (S + 1,)
            values, todo = np.full(last + 1, np.nan), first[(first > 0) & (first < last)]
            values[[0, -1]] = bounds
            while len(todo):
                for i in range(0, len(todo), batch_size):
                    part = todo[i : i + batch_size]
                    pixels = start.repeat(len(part), 1, 1, 1)  # (B, N, ...)
                    for picture, number in zip(pixels, moved[part], strict=True):
                        picture[order[:number]] = end[order[:number]]
                    values[part] = probability(pixels)
                todo = bends(moved / count, values, tolerance)
            measured = ~np.isnan(values)
            forwards.append(int(measured.sum()) - 2)
            return np.interp(moved, moved[measured], values[measured])

        forwards = []
        with memory_explained(count):
            bounds = [probability(pixels[None])[0] for pixels in ends]
            orders = {
                layer: np.lexsort((rng.random(count), -cam.ravel()))
                for layer, cam in token_maps.maps.items()
                if layer not in token_maps.blank
            }
            random = np.random.default_rng([seed, 1])  # the same ones, however many maps there are
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
    """Indices of the steps that have to be measured: the middle of each stretch whose area is not yet certain.

    `values` are nan where nothing is measured. Between two measured steps the area under a curve that only rises or
    only falls differs from the trapezoid's by at most half their difference times their distance.
    """
    known = np.flatnonzero(~np.isnan(values))
    a, b = known[:-1], known[1:]
    uncertain = np.abs(values[b] - values[a]) * (shares[b] - shares[a]) / 2
    return ((a + b) // 2)[(uncertain > tolerance) & (b - a > 1)]


# cascading randomisation


def randomize_weights(modules: Iterable[nn.Module], generator: torch.Generator) -> None:
    """Re-draw the weights of the modules, in place, each tensor from a normal with its own mean and deviation."""
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        if not parameter.is_floating_point() or parameter.is_meta:
            raise ValueError(f"weights of {parameter.dtype} on {parameter.device} cannot be re-drawn")
        values = parameter.detach().float()
        deviation = values.std(correction=0).item()
        drawn = torch.randn(values.shape, generator=generator) * deviation + values.mean().item()
        parameter.data.copy_(drawn)


def cascading_randomization(
    reading: Reading, token_maps: TokenMaps, *, stages: int = 7, seed: int = 0, progress=None, **passes
) -> dict[int, TokenMaps]:
    """{number of re-drawn decoder layers: maps of the same answer} (Adebayo et al., "Sanity Checks", 2018).

    On a copy of the model, which takes its memory again, weights are re-drawn from the top down: the last decoder layer
    with the norm and, if it is not tied to the embeddings, the head behind it, then further ones, in `stages` even
    steps down to the first; behind the last step the vision tower as well. 0 are the maps that were given. A map that
    depends on what the model has learned changes. `progress` wraps the iterable over the stages, `passes` are further
    keywords of `explain`.
    """
    check_whole("stages", stages, 1)
    check_whole("seed", seed, 0)
    _check_same(reading, token_maps)
    generator, total = torch.Generator().manual_seed(operator.index(seed)), get_model_layers(reading.model)[1]
    numbers = np.unique(np.round(np.linspace(0, total, min(stages, total) + 1)).astype(int)).tolist()
    model, results = copy.deepcopy(reading.model), {0: token_maps}
    randomized = replace(reading, model=model)
    layers, _ = get_model_layers(model)
    parent = operator.attrgetter("model.language_model" if hasattr(model.model, "language_model") else "model")(model)
    head, modules = model.get_output_embeddings(), dict(model.named_modules())
    tied = head.weight is model.get_input_embeddings().weight
    for before, number in zip(numbers, (progress or iter)(numbers[1:]), strict=False):
        fresh = [] if before else [parent.norm] if tied else [parent.norm, head]
        fresh += layers[total - number : total - before]
        if number == total and hasattr(model.model, "visual"):
            fresh.append(model.model.visual)
        randomize_weights(fresh, generator)
        places = [modules[key] if isinstance(key, str) else key for key in token_maps.maps]
        (results[number],) = explain(randomized, [token_maps.target_span], places, token_maps.settings, **passes)
    return results


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks (n,) of the values, equal ones sharing the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two maps, -1 to 1; 0 if one of them is the same everywhere."""
    a, b = _ranks(a.ravel()), _ranks(b.ravel())
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else 0.0


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two (H, W) maps, each scaled by its maximum: at most 1 (Wang et al., 2004).

    Gaussian window of standard deviation 1.5 and 11 x 11 cells, constants 0.01 and 0.03, data range 1.
    """
    a, b = (normalize_cam(cam).astype(np.float64) for cam in (a, b))

    def mean(x):
        return cv2.GaussianBlur(x, (11, 11), 1.5, borderType=cv2.BORDER_REFLECT)

    a_mean, b_mean = mean(a), mean(b)
    a_variance, b_variance = mean(a * a) - a_mean**2, mean(b * b) - b_mean**2
    covariance = mean(a * b) - a_mean * b_mean
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * a_mean * b_mean + c1) * (2 * covariance + c2)
    return float((similarity / ((a_mean**2 + b_mean**2 + c1) * (a_variance + b_variance + c2))).mean())


# rows and verdict

UNLIKELY = 0.01  # probability below which the verdict says that there is nothing to measure
SHARE = 0.1  # of the image, whose removal the verdict speaks of
TIE = 0.02  # difference of two areas that says nothing: a step of 64 moves an area by as much


def score_rows(token_maps: TokenMaps, measured: Faithfulness, mask: np.ndarray | None) -> list[dict]:
    """The measures of each layer with a gradient, then of the random orders' mean: rows of scores.csv."""

    def row(layer, insertion, deletion):
        areas = [auc(curve, measured.shares) for curve in (insertion, deletion)]
        return {
            "layer": layer,
            "insertion": areas[0],
            "deletion": areas[1],
            "difference": areas[0] - areas[1],
            "probability": float(deletion[0]),
            "without_hottest_10_percent": float(deletion[np.abs(measured.shares - SHARE).argmin()]),
            "baseline_picture": float(deletion[-1]),
        }

    rows = [row(layer, measured.insertion[layer], measured.deletion[layer]) for layer in measured.insertion]
    for part in rows if mask is not None else []:
        part |= localization(token_maps.maps[part["layer"]], mask)
    return [*rows, row("random", measured.random_insertion.mean(0), measured.random_deletion.mean(0))]


def randomization_rows(staged: dict[int, TokenMaps]) -> list[dict]:
    """Likeness of each layer's map to the given one after each stage: rows of randomization.csv."""
    given = staged[0]
    return [
        {
            "redrawn_layers": number,
            "layer": layer,
            "spearman": spearman(cam, token_maps.maps[layer]),
            "ssim": ssim(cam, token_maps.maps[layer]),
        }
        for number, token_maps in staged.items()
        for layer, cam in given.maps.items()
        if layer not in given.blank
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if abs(share) >= 0.1 or abs(share) < 0.0005 else f"{100 * share:.1f} %"


def verdict(rows: list[dict], measured: Faithfulness) -> list[str]:
    """What the measures say about each layer's map, and in sum, in words."""
    *layers, random = rows
    probability = random["probability"]
    lines = [f"the model gives the explained tokens a mean probability of {probability:.3f}"]

    def cost(row):
        lost = (probability - row["without_hottest_10_percent"]) / (probability or 1)
        return (
            f"costs the answer {_percent(abs(lost))}" if lost > -0.0005 else f"gives the answer {_percent(-lost)} more"
        )

    for row in layers:
        line = f"layer {row['layer']}: removing the hottest 10 % of the image {cost(row)} of its probability; "
        line += f"a random 10 % {cost(random)}"
        if "energy" in row:
            place = "on" if row["pointing"] else "next to" if row["near"] else "off"
            line += f"; the maximum lies {place} the object, {_percent(row['energy'])} of the map inside it"
        lines.append(line)
    best, *tied = leaders(layers)
    chance = chances(measured)
    lines.append(
        f"most faithful: layer {best['layer']}, insertion {decimal(best['insertion'])} - deletion "
        f"{decimal(best['deletion'])} = {decimal(best['difference'])}; {len(chance)} random orders: "
        f"{decimal(min(chance))} to {decimal(max(chance))}"
    )
    if tied:
        names = ", ".join(str(row["layer"]) for row in tied)
        lines.append(f"as good, within {TIE}: layer{'s' * (len(tied) > 1)} {names}")
    beaten = sum(row["difference"] > max(chance) for row in layers)
    lines.append(
        f"{beaten} of {len(layers)} maps beat every random order"
        + ("" if beaten == len(layers) else ": do not rely on the others")
    )
    return lines + caveats(random)


def leaders(rows: list[dict]) -> list[dict]:
    """The rows whose insertion minus deletion is the largest, or as good: best first."""
    ordered = sorted(rows, key=lambda row: -row["difference"])
    return [row for row in ordered if row["difference"] >= ordered[0]["difference"] - TIE]


def chances(measured: Faithfulness) -> list[float]:
    """Insertion minus deletion of each random order."""
    pairs = zip(measured.random_insertion, measured.random_deletion, strict=True)
    return [auc(insertion - deletion, measured.shares) for insertion, deletion in pairs]


def caveats(random: dict) -> list[str]:
    """What no map can tell, of the row of the random orders: an answer that is unlikely, or is not from the photo."""
    if random["probability"] < UNLIKELY:
        return ["beware: the model would hardly say this of the photo, so there is little that a map could explain"]
    if random["baseline_picture"] > 0.5 * random["probability"]:
        kept = _percent(random["baseline_picture"] / random["probability"])
        return [
            f"beware: on the baseline picture alone the answer keeps {kept} of its probability: that much is not from "
            "the photo, and no map can score high"
        ]
    return []


def comparison_verdict(rows: list[dict], measured: Faithfulness) -> list[str]:
    """Which of the methods' maps is to be believed, by how much, and with which others it is tied, in words."""
    *maps, random = rows
    lines = [f"the model gives the explained tokens a mean probability of {random['probability']:.3f}"]
    chance = chances(measured)
    for method in dict.fromkeys(row["method"] for row in maps):
        own = [row for row in maps if row["method"] == method]
        best, mean = max(own, key=lambda row: row["difference"]), np.mean([row["difference"] for row in own])
        beaten = sum(row["difference"] > max(chance) + TIE for row in own)
        lines.append(
            f"{method}: insertion - deletion {decimal(best['difference'])} at layer {best['layer']}, mean over the "
            f"layers {decimal(mean)}; {beaten} of {len(own)} maps beat every random order"
        )
    doubts = reservations(rows, measured)
    best, *tied = leaders(maps)
    if best["difference"] <= max(chance) + TIE:
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
        lead += "; ".join(f"{method} at layer {', '.join(found)}" for method, found in layers.items())
    return [*lines, lead, *doubts]


def reservations(rows: list[dict], measured: Faithfulness) -> list[str]:
    """That none of several methods' maps is to be believed, and what no map can tell; nothing if all is well."""
    *maps, random = rows
    none = max(row["difference"] for row in maps) <= max(chances(measured)) + TIE
    return ["none leads: no map beats the random orders, and none is to be believed"] * none + caveats(random)


def randomization_verdict(rows: list[dict]) -> str:
    """In words, how much of the maps is left when all weights are re-drawn."""
    last = max(row["redrawn_layers"] for row in rows)
    likeness = [row["spearman"] for row in rows if row["redrawn_layers"] == last]
    mean = float(np.mean(likeness))
    depends = (
        "the maps depend on what the model has learned" if mean < 0.5 else "beware: the maps hardly need the model"
    )
    return f"with all weights re-drawn the maps keep a mean rank correlation of {decimal(mean)}: {depends}"


# figures


def _layer_colours(layers: list) -> dict:
    return dict(zip(layers, colormaps["viridis"](np.linspace(0, 0.92, len(layers))), strict=True))


def leading_layers(rows: list[dict]) -> dict[int, str]:
    """{layer: colour} of the three layers with the largest difference, in their order."""
    ordered = sorted(rows, key=lambda row: -row["difference"])[: len(LEADERS)]
    return dict(zip((row["layer"] for row in ordered), LEADERS, strict=False))


def _draw_curves(axes, measured: Faithfulness, curves: dict, random: np.ndarray, colours: dict) -> None:
    """The curve of each layer, the leaders in colour, and of the random orders the range and the mean."""
    if len(random):
        axes.fill_between(measured.shares, random.min(0), random.max(0), color="0.9", linewidth=0)
        axes.plot(measured.shares, random.mean(0), color="0.3", linestyle="--", linewidth=1, label="random")
    for layer, curve in curves.items():
        leads = {"color": colours[layer], "linewidth": 1.4, "zorder": 3} if layer in colours else REST
        axes.plot(measured.shares, curve, label=f"layer {layer}", **leads)
    axes.set_xscale("log")
    axes.set_xlim(measured.shares[1], 1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if measured.shares[1] > 0.002 else (1,)))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.xaxis.set_minor_locator(NullLocator())


def _draw_by_layer(axes, layers: list, rows: dict[str, tuple], levels: dict[str, tuple]) -> None:
    """Values by layer, {label: (values, colour, marker)}, and dashed levels, {label: (level, colour)}."""
    for label, (level, colour) in levels.items():
        axes.axhline(level, color=colour, linestyle="--", linewidth=0.8, label=label)
    for label, (values, colour, marker) in rows.items():
        axes.plot(layers, values, color=colour, marker=marker, markersize=3, linewidth=1.2, label=label)
    axes.set_xticks(layers if len(layers) <= 10 else spread(layers, 8))
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.26), "ncols": 2, "borderaxespad": 0}
    axes.legend(fontsize=SMALL - 1, frameon=False, handlelength=1.6, labelspacing=0.25, columnspacing=1, **below)


INSERTION, DELETION = "#0072b2", "#d55e00"  # blue and vermilion of the Okabe-Ito palette
LEADERS = "#0072b2", "#d55e00", "#009e73"  # of layers, the best first
REST = {"color": "0.72", "linewidth": 0.7}
STYLES = {  # of methods
    "gradcam": ("#0072b2", "o"),
    "hirescam": ("#009e73", "^"),
    "product": ("#d55e00", "s"),
    "paper": ("#999999", "x"),
}
PLOT = 2.75, 1.75


def draw_faithfulness(
    image, token_maps: TokenMaps, measured: Faithfulness, scores: list[dict], look: Look = PLAIN, paper: Paper = PAGE
) -> Page:
    """Insertion and deletion curves, their areas by layer and, if a mask was given, how well the maps fit it.

    `scores` are rows of `score_rows`.
    """
    photo, texts = load_rgb(image), text_rows(token_maps)
    rows = [row for row in scores if row["layer"] in measured.insertion]
    layers, colours = [row["layer"] for row in rows], leading_layers(rows)
    leading, title = next(iter(colours)), f"{method_title(token_maps.settings)}: faithfulness"
    page = Page(WIDTHS[paper.width], "".join(text for _, text, _ in texts))

    def overlay(small):
        return draw_layer(small, token_maps, leading, True, look)

    y = masthead(page, photo, title, texts, draw=overlay, under=f"layer {leading}, the largest difference") + 3 * GAP

    pitch = BAND + PLOT[1] + 0.5
    style = {"ylim": (0, 1.02), "ylabel": "probability of the explained tokens"}
    curves = (
        ("Insertion", measured.insertion, measured.random_insertion, "revealed"),
        ("Deletion", measured.deletion, measured.random_deletion, "removed"),
    )
    places, y = page.places(y, len(curves), PLOT[0], pitch)
    for (x, top, width), (name, found, random, shown) in zip(places, curves, strict=True):
        label = f"image tokens {shown}, hottest first"
        axes = page.plot(x, top, width, PLOT[1], name, xlabel=label, **style)
        _draw_curves(axes, measured, found, random, colours)
    entries = {f"layer {layer}": colour for layer, colour in colours.items()}
    entries |= {"other layers": REST["color"]} if len(layers) > len(colours) else {}
    entries |= {"random": "0.3"} if len(measured.random_insertion) else {}
    y = page.legend(y, entries) + 2 * GAP

    def column(name):
        return np.array([row[name] for row in rows])

    areas = {
        "insertion": (column("insertion"), INSERTION, "o"),
        "deletion": (column("deletion"), DELETION, "s"),
    }
    levels, chance = {}, {}
    if len(measured.random_insertion):
        random_row = next(row for row in scores if row["layer"] == "random")
        levels["random, insertion"] = random_row["insertion"], INSERTION
        levels["random, deletion"] = random_row["deletion"], DELETION
        chance = {"random": (random_row["difference"], "0.45")}
    style = {"ylim": (-0.02, 1.02), "xlabel": "layer"}
    by_layer = [("Areas under the curves", areas, levels, style | {"ylabel": "area"})]
    if "energy" in rows[0]:
        fits = {
            "maximum on or near the object": (column("near"), "#009e73", "^"),
            "energy inside it": (column("energy"), "#cc79a7", "o"),
            "Obj-IoU": (column("obj_iou"), "#e69f00", "s"),
        }
        by_layer.append(("Fit to the object's mask", fits, {}, style | {"ylabel": "share"}))
    else:
        difference = {"insertion − deletion": (column("difference"), "#009e73", "^")}
        fitted = {"ylabel": "difference", "ylim": (min(-0.3, column("difference").min()) - 0.05, 1.02)}
        by_layer.append(("Insertion − deletion", difference, chance, style | fitted))
    places, y = page.places(y, len(by_layer), PLOT[0], pitch + 2 * SMALL * LINE)
    for (x, top, width), (name, values, dashed, style) in zip(places, by_layer, strict=True):
        _draw_by_layer(page.plot(x, top, width, PLOT[1], name, **style), layers, values, dashed)
    y += GAP
    blank = {"blur": "a blurred copy of the photo", "mean": "the photo's mean colour", "black": "black"}
    orders = len(measured.random_insertion)
    mean = "one random order" if orders == 1 else f"mean of {orders} random orders, with their range"
    left_out = ", ".join(f"layer {layer} ({why})" for layer, why in token_maps.blank.items())
    caption = (
        f"A map is faithful if revealing its hottest image tokens restores the answer early and removing them destroys "
        f"it early. Removed tokens show {blank[measured.baseline]}. {f'Dashed: {mean}. ' if orders else ''}"
        f"{look_text(look)} "
        f"{f'Left out, as it has no map: {left_out}.' if left_out else ''}"
    )
    made = f"{made_from(token_maps, photo)}; baseline {measured.baseline}"
    return page.finish(small_print(page, y, caption, made))


def _layer_legend(page: Page, y: float, colours: dict) -> float:
    """The layers' colours, the first and last ones if they are many; returns the y below."""
    layers = list(colours) if len(colours) <= 7 else spread(list(colours), 7)
    return page.legend(y, {f"layer {layer}": colours[layer] for layer in layers})


def draw_randomization(
    image, staged: dict[int, TokenMaps], scores: list[dict], look: Look = PLAIN, paper: Paper = PAGE
) -> Page:
    """The maps of one layer as weights are re-drawn from the top down, and their likeness by layer.

    `staged` is {re-drawn layers: maps}, `scores` rows of `randomization_rows`.
    """
    photo, given = load_rgb(image), staged[0]
    texts = text_rows(given)
    layers, numbers = [layer for layer in given.maps if layer not in given.blank], list(staged)
    page, shown = Page(WIDTHS[paper.width], "".join(text for _, text, _ in texts)), layers[len(layers) // 2]
    colours, title = _layer_colours(layers), f"{method_title(given.settings)}: does the map depend on the model?"
    y = header(page, MARGIN, MARGIN, title, texts) + GAP

    names = {number: "the model" if number == 0 else f"{number} re-drawn" for number in numbers}
    strengths = {number: strength(staged[number], shown) for number in numbers}
    room = max(page.label_width(names[number], strengths[number]) for number in numbers) + GAP
    columns = min(len(numbers), 8, int((page.inner + GAP) / room))
    pitch = (page.inner + GAP) / columns
    width, height = fit_box(photo.width / photo.height, pitch - GAP, 2.2)
    small = shrink(photo, width, height)
    for i, number in enumerate(numbers):
        x, top = MARGIN + i % columns * pitch, y + i // columns * (height + HEAD + GAP)
        x += (pitch - GAP - width) / 2
        page.label(x + width / 2, top, names[number], strengths[number])
        page.picture(x, top + HEAD, width, height, draw_layer(small, staged[number], shown, False, look))
    y += -(-len(numbers) // columns) * (height + HEAD + GAP) + 2 * GAP

    style = {"xlabel": "decoder layers with re-drawn weights, from the top", "ylabel": "likeness to the model's map"}
    style["ylim"] = min([-0.5, *(row["spearman"] for row in scores)]) - 0.05, 1.05
    places, y = page.places(y, 2, PLOT[0], BAND + PLOT[1] + 0.42)
    titles = (("Spearman's rank correlation", "spearman"), ("SSIM", "ssim"))
    for (x, top, width), (name, column) in zip(places, titles, strict=True):
        axes = page.plot(x, top, width, PLOT[1], name, **style)
        axes.axhline(0, color="0.6", linewidth=0.5)
        for layer in layers:
            values = [row[column] for row in scores if row["layer"] == layer]
            axes.plot(numbers, values, color=colours[layer], marker="o", markersize=2.5, linewidth=1.2)
        axes.set_xticks(numbers)
    y = _layer_legend(page, y, colours) + 2 * GAP
    caption = (
        f"A map that stays the same shows the picture and not what the model has learned (Adebayo et al., 2018). "
        f"Above: the heatmap of layer {shown} as the weights are re-drawn from the top layer down; the last step also "
        f"re-draws the vision tower. {look_text(look)}"
    )
    return page.finish(small_print(page, y, caption, made_from(given, photo)))


def draw_comparison(
    image, token_maps: TokenMaps, measured: Faithfulness, scores: list[dict], look: Look = PLAIN, paper: Paper = PAGE
) -> Page:
    """Each method's most faithful map, and insertion minus deletion of all of them by layer.

    `token_maps` are `side_by_side`'s, `scores` rows of `comparison_rows`.
    """
    photo, texts = load_rgb(image), text_rows(token_maps)
    rows = [row for row in scores if row["method"] != "random"]
    methods, layers = (list(dict.fromkeys(row[name] for row in rows)) for name in ("method", "layer"))
    page = Page(WIDTHS[paper.width], "".join(text for _, text, _ in texts))
    y = header(page, MARGIN, MARGIN, "Which map of this answer is to be believed?", texts) + 2 * GAP
    columns = min(max(3, len(methods)), int(page.inner / 1.4))
    pitch = (page.inner + GAP) / columns
    width, height = fit_box(photo.width / photo.height, pitch - GAP, 2.4)
    small, values, row_height = shrink(photo, width, height), {}, 2 * BAND + height + GAP
    for i, method in enumerate(methods):
        own = {row["layer"]: row["difference"] for row in rows if row["method"] == method}
        best, beside = max(own, key=own.get), min(columns, len(methods) - i // columns * columns)
        middle = MARGIN + (page.inner + GAP - pitch * beside) / 2 + (i % columns + 0.5) * pitch - GAP / 2
        top = y + i // columns * row_height
        page.text(middle, top, METHOD_NAMES[method], SMALL, ha="center", weight="bold")
        under = f"layer {best}, ins. − del. {decimal(own[best])}"
        page.text(middle, top + BAND, under, SMALL, ha="center", color="0.3")
        picture = draw_layer(small, token_maps, map_key(method, best), True, look)
        page.picture(middle - width / 2, top + 2 * BAND, width, height, picture)
        values[METHOD_NAMES[method]] = [own.get(layer, np.nan) for layer in layers], *STYLES[method]
    y += -(-len(methods) // columns) * row_height + 2 * GAP
    chance = chances(measured)
    low, high = min(chance), max(chance)
    bottom = min(-0.1, low, *(row["difference"] for row in rows)) - 0.05
    style = {"ylim": (bottom, 1.02), "xlabel": "layer", "ylabel": "insertion − deletion"}
    ((x, top, width),), y = page.places(y, 1, PLOT[0], BAND + PLOT[1] + 0.42 + 3 * SMALL * LINE + 2 * GAP)
    axes = page.plot(x, top, width, PLOT[1], "How faithful, by layer", **style)
    axes.axhspan(low, high, color="0.88", linewidth=0, label="random orders")
    _draw_by_layer(axes, layers, values, {})
    caption = (
        "Area under the insertion curve minus that under the deletion curve: how much sooner the answer comes back, "
        f"and goes, if image tokens are revealed or removed hottest first. Less than {TIE} apart is a tie. It prefers "
        "maps that cover all of what the answer needs to maps that find its densest part."
    )
    blank = ", ".join(f"{key} ({why})" for key, why in token_maps.blank.items())
    caption += f" {look_text(look)}{f' Left out, as it has no map: {blank}.' if blank else ''}"
    caption = " ".join([caption, *(f"{line[0].upper()}{line[1:]}." for line in reservations(scores, measured))])
    noise = settings_text(token_maps.settings).split(", ")[-3:]  # what all methods share
    made = f"Settings: {', '.join(noise)}; baseline {measured.baseline}"
    return page.finish(small_print(page, y, caption, made))


# of one photo of a benchmark

SENSITIVE = 0.2  # of probability that a token loses on the baseline picture, if it needs the photo (EAGLE)


def sensitive_tokens(reading: Reading, tokens: list[int], baseline: str) -> list[int]:
    """Those of the answer's tokens whose probability falls by more than 0.2 on the baseline picture (EAGLE, 2025)."""
    blank = baseline_image(reading.photo, baseline)
    with borrowed(reading.model):
        blank = prepare_inputs(reading.model, reading.processor, blank, reading.prompt)["pixel_values"]
        forced, (scored,) = score_parts(reading.inputs, reading.tokens, [tokens])
        pixels = torch.stack([reading.inputs["pixel_values"], blank])
        full, empty = token_probabilities(reading.model, forced, pixels, scored)
    return [token for token, fall in zip(tokens, full - empty, strict=True) if fall > SENSITIVE]


def fit_of(cams: list[np.ndarray], mask: np.ndarray) -> dict[str, float]:
    """`localization` and `at_border` of the first of the maps; Obj-IoU is the best of the others, those of its tokens.

    This is how TAM (ICCV 2025) grades a word of several tokens.
    """
    first, *others = (localization(cam, mask) for cam in cams)
    best = max(fit["obj_iou"] for fit in others or [first])
    return first | {"obj_iou": best, "border": at_border(cams[0], first)}


def benchmark_rows(
    reading: Reading, maps: dict[str, list[TokenMaps]], mask: np.ndarray | None = None, *, steps=64, baseline="blur",
    batch_size=8, seed=0,
) -> list[dict]:  # fmt: skip
    """Rows {"method", "layer", measures} of the maps, then of a map of the centre and of random ones.

    `maps` are of each method the maps of the explained part and, if it has several tokens, of each of them. Insertion
    and deletion are of its tokens that need the photo, see `sensitive_tokens`; None if there is none. The measures of
    `localization` and `at_border` need the `mask`. A layer without a map misses: 0, and None.
    """
    together, rng = side_by_side({method: parts[0] for method, parts in maps.items()}), np.random.default_rng(seed)
    centre = centre_map(reading.grid)
    sensitive = sensitive_tokens(reading, together.target_tokens, baseline)
    areas = {}
    if sensitive:
        given = replace(together, maps=together.maps | {"centre": centre}, target_tokens=sensitive)
        options = {"steps": steps, "baseline": baseline, "batch_size": batch_size, "seed": seed}
        measured = insertion_deletion(reading, given, random_orders=ORDERS, tolerance=TOLERANCE, **options)
        kept = ("insertion", "deletion", "difference")
        areas = {row["layer"]: {name: row[name] for name in kept} for row in score_rows(given, measured, None)}

    def row(method, layer, key, drawn):
        fits = [fit_of(cams, mask) for cams in drawn] if mask is not None else [{}]
        means = {name: float(np.mean([fit[name] for fit in fits])) for name in fits[0]}
        return {"method": method, "layer": layer} | means | areas.get(key, {})

    rows = [
        row(method, layer, map_key(method, layer), [[part.maps[layer] for part in parts]])
        for method, parts in maps.items()
        for layer in parts[0].maps
    ]
    random = [[rng.random(reading.grid).astype(np.float32)] for _ in range(ORDERS)]
    return [*rows, row("centre", "", "centre", [[centre]]), row("random", "", "random", random)]


# the mode


def forecast(reading: Reading, token_maps: TokenMaps, orders: int, steps: int, batch_size: int) -> str:
    """How long insertion and deletion of so many orders will take, from one batch."""
    with borrowed(reading.model), memory_explained(len(reading.positions)):
        forced, (scored,) = score_parts(reading.inputs, reading.tokens, [token_maps.target_tokens])
        pixels = reading.inputs["pixel_values"][None].repeat(batch_size, 1, 1)
        start = time.monotonic()
        token_probabilities(reading.model, forced, pixels, scored)
    each = (time.monotonic() - start) / batch_size
    pictures = 2 * orders * min(steps, TYPICAL)
    return f"expected: about {pictures} pictures, {each:.2f} s each: {each * pictures / 60:.1f} minutes"


def measure(reading: Reading, token_maps: TokenMaps, steps, baseline, batch_size, seed, quiet) -> Faithfulness:
    """Insertion and deletion as the mode has them, the expected time first."""
    if set(token_maps.maps) <= set(token_maps.blank):
        raise ExplanationError("no layer has a map (no gradient, or zero everywhere), so there is nothing to evaluate")
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        check_whole(name, value, 1)
    if not quiet:
        orders = len(token_maps.maps) - len(token_maps.blank) + ORDERS
        print(forecast(reading, token_maps, orders, steps, batch_size), flush=True)
    bar = show_progress(quiet, "orders of the image tokens", "order")
    options = {"steps": steps, "baseline": baseline, "batch_size": batch_size, "seed": seed, "random_orders": ORDERS}
    return insertion_deletion(reading, token_maps, **options, extra_shares=[SHARE], tolerance=TOLERANCE, progress=bar)


def evaluate(
    reading: Reading, token_maps: TokenMaps, mask: np.ndarray | None = None, *, steps=64, baseline="blur", batch_size=8,
    seed=0, randomize=False, quiet=False, look=PLAIN, paper=PAGE, copies: dict | None = None,
) -> tuple[dict[str, object], list[str]]:  # fmt: skip
    """({file name: content}, verdict in lines) of the maps; `mask` as of `load_mask`, the rest as measured above.

    `copies` are keywords of `explain` (`batch_size`, `recompute`) for the maps of a model whose weights are re-drawn.
    Raises ExplanationError if no layer has a map.
    """
    measured = measure(reading, token_maps, steps, baseline, batch_size, seed, quiet)
    rows = score_rows(token_maps, measured, mask)
    draw = functools.partial(draw_faithfulness, reading.photo, token_maps, measured, rows, look, paper)
    files = paper.figure("faithfulness", draw) | {"scores.csv": to_csv(rows)}
    lines = [*verdict(rows, measured), f"cost: {measured.forwards} pictures run through the model"]
    if randomize:
        bar = show_progress(quiet, "weights re-drawn", "stage")
        staged = cascading_randomization(reading, token_maps, seed=seed, progress=bar, **copies or {})
        likeness = randomization_rows(staged)
        draw = functools.partial(draw_randomization, reading.photo, staged, likeness, look, paper)
        files |= paper.figure("randomization", draw)
        files["randomization.csv"] = to_csv(likeness)
        lines.append(randomization_verdict(likeness))
    return files, lines


def map_key(method: str, layer: int) -> str:
    """What a method's map is called beside those of others."""
    return f"{method}, layer {layer}"


def side_by_side(maps: dict[str, TokenMaps]) -> TokenMaps:
    """The maps of several methods as one, keyed by `map_key`."""
    cams = {map_key(method, k): cam for method, given in maps.items() for k, cam in given.maps.items()}
    none = frozenset(map_key(method, k) for method, given in maps.items() for k in given.no_gradient)
    return replace(next(iter(maps.values())), maps=cams, no_gradient=none)


def comparison_rows(
    maps: dict[str, TokenMaps], together: TokenMaps, measured: Faithfulness, mask: np.ndarray | None
) -> list[dict]:
    """Rows of `score_rows` with the method beside the layer: rows of comparison.csv."""
    places = {map_key(method, k): (method, k) for method, given in maps.items() for k in given.maps}
    rows = score_rows(together, measured, mask)
    pairs = [places.get(row["layer"], ("random", "")) for row in rows]
    return [{"method": method} | row | {"layer": k} for row, (method, k) in zip(rows, pairs, strict=True)]


def compare(
    reading: Reading, maps: dict[str, TokenMaps], mask: np.ndarray | None = None, *, steps=64, baseline="blur",
    batch_size=8, seed=0, quiet=False, look=PLAIN, paper=PAGE,
) -> tuple[dict[str, object], list[str]]:  # fmt: skip
    """({file name: content}, verdict in lines) of the maps of several methods, {method: maps}, of one answer.

    The random orders and the ends of the curves are measured once for all. Raises ExplanationError if none has a map.
    """
    together = side_by_side(maps)
    measured = measure(reading, together, steps, baseline, batch_size, seed, quiet)
    rows = comparison_rows(maps, together, measured, mask)
    draw = functools.partial(draw_comparison, reading.photo, together, measured, rows, look, paper)
    files = paper.figure("comparison", draw) | {"comparison.csv": to_csv(rows)}
    lines = [
        f"{method} at layer {layer} has no map ({why}): it is left out"
        for method, given in maps.items()
        for layer, why in given.blank.items()
    ]
    lines += comparison_verdict(rows, measured)
    return files, [*lines, f"cost: {measured.forwards} pictures run through the model"]
