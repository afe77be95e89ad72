"""Figures and files of evaluate mode: faithfulness, randomised weights, and methods compared."""

import functools
import itertools
from collections.abc import Iterable

import numpy as np
from matplotlib import colormaps
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from common.encoding import decimal, to_csv, with_minus
from common.evidence import doubt_of
from common.page import (
    BAND,
    GAP,
    HEAD,
    LINE,
    MARGIN,
    PAGE,
    SIGNS,
    SMALL,
    WIDTHS,
    Page,
    Paper,
    fit_box,
    header,
    masthead,
    shrink,
    small_print,
)
from common.parts import Part, apart, captions, nested, numbered, rows_of_plots
from common.photos import open_photo
from common.progress import show_progress
from smooth_gradcam import PLAIN, Look, Reading, TokenMaps, noisy_passes
from studies.faithfulness import (
    TIE,
    Faithfulness,
    chances,
    comparison_rows,
    comparison_verdict,
    map_key,
    measure,
    reservations,
    score_rows,
    side_by_side,
    verdict,
)
from studies.randomization import cascading_randomization, randomization_rows, randomization_verdict
from visualization_utils import (
    colour_bar,
    draw_layer,
    look_text,
    made_from,
    method_title,
    reliance,
    settings_text,
    spread,
    strength,
    text_rows,
)

__all__ = [
    *("CURVE_PLOT", "STYLES", "compare", "draw_comparison", "draw_faithfulness", "draw_randomization", "evaluate"),
]

INSERTION, DELETION = "#0072b2", "#d55e00"  # blue and vermilion of the Okabe-Ito palette
LEADERS = "#0072b2", "#d55e00", "#009e73"  # of layers, the best first
OTHERS = {"color": "0.72", "linewidth": 0.7}  # of all other layers
STYLES = {  # colour and marker of each method
    "gradcam": ("#0072b2", "o"),
    "hirescam": ("#009e73", "^"),
    "product": ("#d55e00", "s"),
    "paper": ("#777777", "x"),
    "needed": ("#000000", "D"),
    "parent": ("#e69f00", "P"),
    "rollout": ("#56b4e9", "<"),
    "chefer": ("#8c564b", ">"),
    "attention": ("#cc79a7", "v"),
}
CURVE_PLOT = 2.75, 1.65  # inches
TICKS = 0.24  # left of a row of small plots
SAME = 0.01  # curves that are nowhere further apart cannot be told apart


def _layer_styles(layers: list) -> dict:
    """{layer: (colour, marker)}."""
    colours = colormaps["viridis"](np.linspace(0, 0.92, len(layers)))
    return dict(zip(layers, zip(colours, itertools.cycle(SIGNS), strict=False), strict=True))


def _leading_layers(rows: list[dict]) -> dict[int, str]:
    """{layer: colour} of the three layers with the largest difference, the largest first."""
    ordered = sorted(rows, key=lambda row: -row["difference"])[: len(LEADERS)]
    return dict(zip((row["layer"] for row in ordered), LEADERS, strict=False))


def _hidden_layers(measured: Faithfulness, leading: Iterable[int], others: Iterable[int]) -> int:
    """How many of the other layers have both curves of a leading one, and so lie behind it."""

    def same(one, other):
        pairs = ((curves[one], curves[other]) for curves in (measured.insertion, measured.deletion))
        return all(np.abs(a - b).max() < SAME for a, b in pairs)

    return sum(any(same(layer, other) for layer in leading) for other in others)


def _draw_curves(axes, measured: Faithfulness, curves: dict, random: np.ndarray, colours: dict) -> None:
    """The curve of each layer, those with `colours` in colour, and the range and the mean of the random orders."""
    if len(random):
        axes.fill_between(measured.shares, random.min(0), random.max(0), color="0.9", linewidth=0)
        axes.plot(measured.shares, random.mean(0), color="0.3", linestyle="--", linewidth=1, label="random")
    for layer in [*(layer for layer in curves if layer not in colours), *colours]:
        style = OTHERS
        if layer in colours:
            style = {"color": colours[layer], **nested(list(colours).index(layer), len(colours))}
        axes.plot(measured.shares, curves[layer], label=f"layer {layer}", **style)
    axes.set_xscale("log")
    axes.set_xlim(measured.shares[1], 1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if measured.shares[1] > 0.002 else (1,)))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.xaxis.set_minor_locator(NullLocator())


def _layer_ticks(axes, layers: list, most: int) -> None:
    axes.set_xticks(layers if len(layers) <= most else spread(layers, most))


def _draw_by_layer(axes, inches: float, layers: list, rows: dict[str, tuple], levels: dict[str, tuple]) -> None:
    """Values by layer, {label: (values, colour, marker)}, and dashed levels, {label: (level, colour)}.

    `inches` is the height of the axes.
    """
    for i, (label, (level, colour)) in enumerate(levels.items()):  # dashes in turn: one shows in the other's gaps
        dashes = (4 * i, (4, 4)) if len(levels) > 1 else (0, (4, 2))
        axes.axhline(level, color=colour, linestyle=dashes, linewidth=0.8, label=label)
    for i, (label, (values, colour, marker)) in enumerate(rows.items()):
        axes.plot(layers, values, color=colour, marker=marker, label=label, **nested(i, len(rows)))
    _layer_ticks(axes, layers, 8)
    below = {
        "loc": "upper center",
        "bbox_to_anchor": (0.5, -0.46 / inches),
        "ncols": 2,
        "borderaxespad": 0,
        "markerscale": 0.7,
    }
    axes.legend(fontsize=SMALL - 1, frameon=False, handlelength=1.6, labelspacing=0.25, columnspacing=1, **below)


def draw_faithfulness(
    image, token_maps: TokenMaps, measured: Faithfulness, scores: list[dict], look: Look = PLAIN, paper: Paper = PAGE
) -> dict[str, object]:
    """{file name: what draws it}: insertion and deletion curves, the areas under them by layer and, if there was a
    mask, how well the maps fit it.

    `scores` are rows of `score_rows`.
    """
    photo, heads = open_photo(image), text_rows(token_maps)
    rows = [row for row in scores if row["layer"] in measured.insertion]
    layers, colours = [row["layer"] for row in rows], _leading_layers(rows)
    leading, title = next(iter(colours)), f"{method_title(token_maps.settings)}: faithfulness"
    letters, orders = "".join(text for _, text, _ in heads), len(measured.random_insertion)
    page = Page(WIDTHS[paper.width], letters)

    def overlay(small):
        return draw_layer(small, token_maps, leading, True, look)

    def head(page, number):
        under = f"layer {leading}, {'not to be believed' if doubt_of(token_maps) else 'the largest difference'}"
        return masthead(page, photo, title + number, heads, draw=overlay, under=under) + 2 * GAP

    others = set(layers) - set(colours)
    entries = {f"layer {layer}": colour for layer, colour in colours.items()}
    entries |= {"other layers": OTHERS["color"]} if others else {}
    entries |= {"random": "0.3"} if orders else {}

    def legend(page, y):
        return page.legend(y, entries) + GAP

    style = {"ylim": (-0.02, 1.02), "ylabel": "p of the explained tokens"}
    curves = [
        ("Insertion", (measured.insertion, measured.random_insertion), "revealed"),
        ("Deletion", (measured.deletion, measured.random_deletion), "removed"),
    ]
    curves = [
        (name, given, style | {"xlabel": f"image tokens {change}, hottest first"}) for name, given, change in curves
    ]
    blank = {"blur": "a blurred copy of the photo", "mean": "the photo's mean colour", "black": "black"}
    mean = "one random order" if orders == 1 else f"mean of {orders} random orders, with their range"
    said = (
        "A map is faithful if revealing its hottest image tokens restores the answer early and removing them destroys "
        f"it early. Removed tokens show {blank[measured.baseline]}. p: probability.{f' Dashed: {mean}.' * bool(orders)}"
    )

    if hidden := _hidden_layers(measured, colours, others):
        said += f" The curves of {hidden} of the {len(others)} other layers lie behind those in colour."

    def draw_curves(page, axes, by_layer, random):
        _draw_curves(axes, measured, by_layer, random, colours)

    parts = rows_of_plots(page, curves, CURVE_PLOT, 0.42, draw_curves, caption=said, above=legend)

    def column(name):
        return np.array([row[name] for row in rows])

    areas = {
        "insertion": (column("insertion"), INSERTION, "o"),
        "deletion": (column("deletion"), DELETION, "s"),
    }
    levels, chance = {}, {}
    if orders:
        random_row = next(row for row in scores if row["layer"] == "random")
        levels["random, insertion"] = random_row["insertion"], INSERTION
        levels["random, deletion"] = random_row["deletion"], DELETION
        chance = {"random": (random_row["difference"], "0.45")}
    style = {"ylim": (-0.02, 1.04), "xlabel": "layer"}
    plots = [("Areas under the curves", (areas, levels), style | {"ylabel": "area"})]
    if "energy" in rows[0]:
        fits = {
            "maximum on or near the object": (column("near"), "#009e73", "^"),
            "energy inside it": (column("energy"), "#cc79a7", "o"),
            "Obj-IoU": (column("obj_iou"), "#e69f00", "s"),
        }
        plots.append(("Fit to the object's mask", (fits, {}), style | {"ylabel": "share"}))
    else:
        difference = {"insertion − deletion": (column("difference"), "#009e73", "^")}
        fitted = {"ylabel": "difference", "ylim": (min(-0.3, column("difference").min()) - 0.05, 1.04)}
        plots.append(("Insertion − deletion", (difference, chance), style | fitted))

    def draw_by_layer(page, axes, values, dashed):
        _draw_by_layer(axes, page.boxes[axes][3], layers, values, dashed)

    said = (
        "Areas are those under the curves of insertion and of deletion, in which image tokens are revealed or removed, "
        "hottest first."
    )
    parts += rows_of_plots(page, plots, CURVE_PLOT, 0.46 + 3 * SMALL * LINE, draw_by_layer, caption=said)
    left_out = ", ".join(f"layer {layer} ({why})" for layer, why in token_maps.blank.items())

    def foot(page, y, parts):
        text = f"{reliance(token_maps, layers)}{captions(parts)} {look_text(look, several=False)} "
        text += f"Left out, as it has no map: {left_out}." if left_out else ""
        y = colour_bar(page, y + GAP, token_maps.settings.method, look)
        return small_print(page, y, text, f"{made_from(token_maps, photo)}; baseline {measured.baseline}")

    return numbered("faithfulness", paper, letters, head, parts, foot)


def draw_randomization(
    image, staged: dict[int, TokenMaps], scores: list[dict], look: Look = PLAIN, paper: Paper = PAGE
) -> dict[str, object]:
    """{file name: what draws it}: the maps of one layer as weights are re-drawn from the top down, and their similarity
    by layer.

    `staged` is {re-drawn layers: maps}, `scores` are rows of `randomization_rows`.
    """
    photo, original = open_photo(image), staged[0]
    heads = text_rows(original)
    layers, numbers = [layer for layer in original.maps if layer not in original.blank], list(staged)
    letters, middle = "".join(text for _, text, _ in heads), layers[len(layers) // 2]
    page, styles = Page(WIDTHS[paper.width], letters), _layer_styles(layers)
    title = f"{method_title(original.settings)}: does the map depend on the model?"

    def head(page, number):
        return header(page, MARGIN, MARGIN, title + number, heads) + GAP

    names = {number: "the model" if number == 0 else f"{number} re-drawn" for number in numbers}
    strengths = {number: strength(staged[number], middle) for number in numbers}
    room = max(page.label_width(names[number], strengths[number]) for number in numbers) + GAP
    columns = min(len(numbers), 8, int((page.inner + GAP) / room))
    pitch = (page.inner + GAP) / columns
    most = 2.2 if columns >= len(numbers) else 1.5
    width, height = fit_box(photo.width / photo.height, pitch - GAP, most)
    small = shrink(photo, width, height)

    def draw_heatmaps(members, page, y):
        for i, number in enumerate(members):
            x = MARGIN + i * pitch + (pitch - GAP - width) / 2
            page.label(x + width / 2, y, names[number], strengths[number])
            page.picture(x, y + HEAD, width, height, draw_layer(small, staged[number], middle, False, look))

    said = (
        f"Heatmaps: layer {middle} as the weights are re-drawn from the top layer down; the last step also re-draws "
        f"the vision tower. {look_text(look, overlays=False)}"
    )
    parts = [
        Part(height + HEAD + GAP, functools.partial(draw_heatmaps, numbers[i : i + columns]), said, shown=(middle,))
        for i in range(0, len(numbers), columns)
    ]

    named = layers if len(layers) <= len(SIGNS) else spread(layers, len(SIGNS))

    def legend(page, y):
        return page.legend(y + GAP, {f"layer {layer}": styles[layer] for layer in named}) + GAP

    step = min(np.diff(numbers)) if len(numbers) > 1 else 1
    shifts = np.linspace(-0.3, 0.3, len(layers)) * step if len(layers) > 1 else [0]  # so that none hides another

    def draw_likeness(page, axes, column):
        axes.axhline(0, color="0.6", linewidth=0.5)
        for layer, shift in zip(layers, shifts, strict=True):
            colour, marker = styles[layer]
            values = [row[column] for row in scores if row["layer"] == layer]
            axes.plot(np.add(numbers, shift), values, color=colour, marker=marker, markersize=2.8, linewidth=0.9)
        axes.set_xticks(numbers)

    style = {"xlabel": "decoder layers with re-drawn weights, from the top", "ylabel": "likeness"}
    style["ylim"] = min([-0.5, *(row["spearman"] for row in scores)]) - 0.05, 1.05
    plots = [("Spearman's rank correlation", ("spearman",), style), ("SSIM", ("ssim",), style)]
    said = (
        "Likeness to the model's own map: a map that stays the same shows the picture and not what the model has "
        f"learned (Adebayo et al., 2018).{' Layers stand side by side at each step.' * (len(layers) > 1)}"
    )
    parts += rows_of_plots(page, plots, CURVE_PLOT, 0.42, draw_likeness, caption=said, above=legend)

    def foot(page, y, parts):
        shown = any(part.shown for part in parts)
        y = colour_bar(page, y + GAP, original.settings.method, look, overlays=False) if shown else y
        text = f"{reliance(original, [middle])}{captions(parts)}"
        return small_print(page, y, text, made_from(original, photo))

    return numbered("randomization", paper, letters, head, parts, foot)


def draw_comparison(
    image, token_maps: TokenMaps, measured: Faithfulness, scores: list[dict], look: Look = PLAIN, paper: Paper = PAGE
) -> dict[str, object]:
    """{file name: what draws it}: each method's most faithful map, and below it the method's insertion minus deletion
    by layer, before those of the others in grey.

    `token_maps` are those of `side_by_side`, `scores` rows of `comparison_rows`.
    """
    photo, heads = open_photo(image), text_rows(token_maps)
    rows = [row for row in scores if row["method"] != "random"]
    methods, layers = (list(dict.fromkeys(row[name] for row in rows)) for name in ("method", "layer"))
    letters = "".join(text for _, text, _ in heads)
    page = Page(WIDTHS[paper.width], letters)
    title = "Which map of this answer is to be believed?" + " None" * bool(doubt_of(token_maps))

    def head(page, number):
        return header(page, MARGIN, MARGIN, title + number, heads) + GAP

    found = {method: {row["layer"]: row["difference"] for row in rows if row["method"] == method} for method in methods}
    best = {method: max(own, key=own.get) for method, own in found.items()}
    curves = {method: np.array([own.get(layer, np.nan) for layer in layers]) for method, own in found.items()}
    differences = chances(measured)
    bottom = min(-0.1, *differences, *(row["difference"] for row in rows)) - 0.05
    most = max(1, min(len(methods), int((page.inner - TICKS) / 0.9)))
    columns = -(-len(methods) // -(-len(methods) // most))  # rows of about the same length
    pitch = (page.inner - TICKS + GAP) / columns
    width, height = fit_box(photo.width / photo.height, pitch - GAP, 1.6)
    small, plot = shrink(photo, width, height), 0.8 if paper.width == "page" else 0.62

    def draw_methods(members, page, y):
        for i, method in enumerate(members):
            x, layer = MARGIN + TICKS + i * pitch, best[method]
            middle = x + (pitch - GAP) / 2
            page.text(middle, y, method, SMALL, ha="center", weight="bold")
            own = with_minus(decimal(found[method][layer]))
            page.text(middle, y + BAND, f"layer {layer}: {own}", SMALL, ha="center", color="0.3")
            picture = draw_layer(small, token_maps, map_key(method, layer), True, look)
            page.picture(middle - width / 2, y + 2 * BAND, width, height, picture)
            axes = page.axes(x, y + 2 * BAND + height + GAP, pitch - 2 * GAP, plot)
            axes.axhspan(min(differences), max(differences), color="0.88", linewidth=0)
            apart(axes, layers, curves, method, *STYLES[method])
            axes.set(ylim=(bottom, 1.05))
            axes.set_yticks((0, 0.5, 1), ("0", "0.5", "1") if i == 0 else ("", "", ""))
            _layer_ticks(axes, layers, 4 if paper.width == "page" else 3)

    said = (
        f"{reliance(token_maps)}Over each map its layer and insertion − deletion; below it the same by layer, other "
        "methods in grey, the range of random orders shaded. Insertion − deletion is the area under the insertion "
        "curve minus that under the deletion curve: how much sooner the answer comes back, and goes, if image tokens "
        f"are revealed or removed hottest first. Less than {TIE} apart is a tie. It prefers maps that cover all of "
        "what the answer needs to maps that find its densest part."
    )
    parts = []
    for i in range(0, len(methods), columns):
        members = methods[i : i + columns]
        keys = tuple(map_key(method, best[method]) for method in members)
        row = 2 * BAND + height + GAP + plot + 0.3
        parts.append(Part(row, functools.partial(draw_methods, members), said, shown=keys))

    def foot(page, y, parts):
        y = colour_bar(page, y + GAP, "each method", look)
        blank = ", ".join(f"{key} ({why})" for key, why in token_maps.blank.items())
        text = f"{captions(parts)} {look_text(look)}{f' Left out, as it has no map: {blank}.' if blank else ''}"
        if not doubt_of(token_maps):
            text = " ".join([text, *(f"{line[0].upper()}{line[1:]}." for line in reservations(scores, measured))])
        noise = settings_text(token_maps.settings).split(", ")[-3:]  # what all methods share
        return small_print(page, y, text, f"Settings: {', '.join(noise)}; baseline {measured.baseline}")

    return numbered("comparison", paper, letters, head, parts, foot)


# the files


def evaluate(
    reading: Reading, token_maps: TokenMaps, mask: np.ndarray | None = None, *, steps=64, baseline="blur",
    runs_at_once=8, seed=0, randomize=False, quiet=False, look=PLAIN, paper=PAGE, passes=noisy_passes, batch_size=1,
) -> tuple[dict[str, object], list[str]]:  # fmt: skip
    """({file name: content}, the verdict in lines) of the maps.

    `mask` is that of `load_mask`, `steps`, `baseline` and `seed` are those of `insertion_deletion`, which runs
    `runs_at_once` pictures at once. With `randomize`, the maps of a model with re-drawn weights are compared, too:
    `passes` and `batch_size` are those of `explain` for them. Raises ExplanationError if no layer has a map.
    """
    measured = measure(reading, token_maps, steps, baseline, runs_at_once, seed, quiet)
    rows = score_rows(token_maps, measured, mask)
    files = draw_faithfulness(reading.photo, token_maps, measured, rows, look, paper) | {"scores.csv": to_csv(rows)}
    lines = [*verdict(rows, measured), f"cost: {measured.forwards} pictures run through the model"]
    if randomize:
        bar = show_progress(quiet, "weights re-drawn", "stage")
        keywords = {"seed": seed, "progress": bar, "passes": passes, "batch_size": batch_size}
        staged = cascading_randomization(reading, token_maps, **keywords)
        scores = randomization_rows(staged)
        files |= draw_randomization(reading.photo, staged, scores, look, paper)
        files["randomization.csv"] = to_csv(scores)
        lines.append(randomization_verdict(scores))
    return files, lines


def compare(
    reading: Reading, maps: dict[str, TokenMaps], mask: np.ndarray | None = None, *, steps=64, baseline="blur",
    runs_at_once=8, seed=0, quiet=False, look=PLAIN, paper=PAGE,
) -> tuple[dict[str, object], list[str]]:  # fmt: skip
    """({file name: content}, the verdict in lines) of one answer's maps by several methods, {method: maps}.

    The random orders and the ends of the curves are measured once for all methods. Further arguments are those of
    `evaluate`. Raises ExplanationError if no method has a map.
    """
    together = side_by_side(maps)
    measured = measure(reading, together, steps, baseline, runs_at_once, seed, quiet)
    rows = comparison_rows(maps, together, measured, mask)
    files = draw_comparison(reading.photo, together, measured, rows, look, paper) | {"comparison.csv": to_csv(rows)}
    lines = [
        f"{method} at layer {layer} has no map ({why}): it is left out"
        for method, own in maps.items()
        for layer, why in own.blank.items()
    ]
    lines += comparison_verdict(rows, measured)
    return files, [*lines, f"cost: {measured.forwards} pictures run through the model"]
