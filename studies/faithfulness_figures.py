"""Figures and files of evaluate mode: faithfulness, randomised weights, and methods compared."""

import functools

import numpy as np
from matplotlib import colormaps
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from common.encoding import decimal, to_csv
from common.evidence import doubt_of
from common.page import (
    BAND,
    GAP,
    HEAD,
    LINE,
    MARGIN,
    PAGE,
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
from common.photos import open_photo
from common.progress import show_progress
from smooth_gradcam import METHODS, PLAIN, Look, Reading, TokenMaps, noisy_passes
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
    "paper": ("#999999", "x"),
    "needed": ("#000000", "D"),
    "parent": ("#e69f00", "P"),
    "rollout": ("#56b4e9", "<"),
    "chefer": ("#8c564b", ">"),
    "attention": ("#cc79a7", "v"),
}
CURVE_PLOT = 2.75, 1.75  # inches


def _layer_colours(layers: list) -> dict:
    return dict(zip(layers, colormaps["viridis"](np.linspace(0, 0.92, len(layers))), strict=True))


def _leading_layers(rows: list[dict]) -> dict[int, str]:
    """{layer: colour} of the three layers with the largest difference, the largest first."""
    ordered = sorted(rows, key=lambda row: -row["difference"])[: len(LEADERS)]
    return dict(zip((row["layer"] for row in ordered), LEADERS, strict=False))


def _draw_curves(axes, measured: Faithfulness, curves: dict, random: np.ndarray, colours: dict) -> None:
    """The curve of each layer, those with `colours` in colour, and the range and the mean of the random orders."""
    if len(random):
        axes.fill_between(measured.shares, random.min(0), random.max(0), color="0.9", linewidth=0)
        axes.plot(measured.shares, random.mean(0), color="0.3", linestyle="--", linewidth=1, label="random")
    for layer, curve in curves.items():
        style = {"color": colours[layer], "linewidth": 1.4, "zorder": 3} if layer in colours else OTHERS
        axes.plot(measured.shares, curve, label=f"layer {layer}", **style)
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


def draw_faithfulness(
    image, token_maps: TokenMaps, measured: Faithfulness, scores: list[dict], look: Look = PLAIN, paper: Paper = PAGE
) -> Page:
    """Insertion and deletion curves, the areas under them by layer and, if there was a mask, how well the maps fit it.

    `scores` are rows of `score_rows`.
    """
    photo, heads = open_photo(image), text_rows(token_maps)
    rows = [row for row in scores if row["layer"] in measured.insertion]
    layers, colours = [row["layer"] for row in rows], _leading_layers(rows)
    leading, title = next(iter(colours)), f"{method_title(token_maps.settings)}: faithfulness"
    page = Page(WIDTHS[paper.width], "".join(text for _, text, _ in heads))

    def overlay(small):
        return draw_layer(small, token_maps, leading, True, look)

    under = f"layer {leading}, {'not to be believed' if doubt_of(token_maps) else 'the largest difference'}"
    y = masthead(page, photo, title, heads, draw=overlay, under=under) + 3 * GAP

    pitch = BAND + CURVE_PLOT[1] + 0.5
    style = {"ylim": (0, 1.02), "ylabel": "probability of the explained tokens"}
    curves = (
        ("Insertion", measured.insertion, measured.random_insertion, "revealed"),
        ("Deletion", measured.deletion, measured.random_deletion, "removed"),
    )
    boxes, y = page.places(y, len(curves), CURVE_PLOT[0], pitch)
    for (x, top, width), (name, by_layer, random, change) in zip(boxes, curves, strict=True):
        label = f"image tokens {change}, hottest first"
        axes = page.plot(x, top, width, CURVE_PLOT[1], name, xlabel=label, **style)
        _draw_curves(axes, measured, by_layer, random, colours)
    entries = {f"layer {layer}": colour for layer, colour in colours.items()}
    entries |= {"other layers": OTHERS["color"]} if len(layers) > len(colours) else {}
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
    plots = [("Areas under the curves", areas, levels, style | {"ylabel": "area"})]
    if "energy" in rows[0]:
        fits = {
            "maximum on or near the object": (column("near"), "#009e73", "^"),
            "energy inside it": (column("energy"), "#cc79a7", "o"),
            "Obj-IoU": (column("obj_iou"), "#e69f00", "s"),
        }
        plots.append(("Fit to the object's mask", fits, {}, style | {"ylabel": "share"}))
    else:
        difference = {"insertion − deletion": (column("difference"), "#009e73", "^")}
        fitted = {"ylabel": "difference", "ylim": (min(-0.3, column("difference").min()) - 0.05, 1.02)}
        plots.append(("Insertion − deletion", difference, chance, style | fitted))
    boxes, y = page.places(y, len(plots), CURVE_PLOT[0], pitch + 2 * SMALL * LINE)
    for (x, top, width), (name, values, dashed, style) in zip(boxes, plots, strict=True):
        _draw_by_layer(page.plot(x, top, width, CURVE_PLOT[1], name, **style), layers, values, dashed)
    y += GAP
    blank = {"blur": "a blurred copy of the photo", "mean": "the photo's mean colour", "black": "black"}
    orders = len(measured.random_insertion)
    mean = "one random order" if orders == 1 else f"mean of {orders} random orders, with their range"
    left_out = ", ".join(f"layer {layer} ({why})" for layer, why in token_maps.blank.items())
    caption = (
        f"{reliance(token_maps, layers)}A map is faithful if revealing its hottest image tokens restores the answer "
        f"early and removing them destroys it early. Removed tokens show {blank[measured.baseline]}. "
        f"{f'Dashed: {mean}. ' if orders else ''}{look_text(look)} "
        f"{f'Left out, as it has no map: {left_out}.' if left_out else ''}"
    )
    made = f"{made_from(token_maps, photo)}; baseline {measured.baseline}"
    return page.finish(small_print(page, y, caption, made))


def _layer_legend(page: Page, y: float, colours: dict) -> float:
    """The colours of the layers, of seven at most, evenly spaced; returns the y below."""
    layers = list(colours) if len(colours) <= 7 else spread(list(colours), 7)
    return page.legend(y, {f"layer {layer}": colours[layer] for layer in layers})


def draw_randomization(
    image, staged: dict[int, TokenMaps], scores: list[dict], look: Look = PLAIN, paper: Paper = PAGE
) -> Page:
    """The maps of one layer as weights are re-drawn from the top down, and their similarity by layer.

    `staged` is {re-drawn layers: maps}, `scores` are rows of `randomization_rows`.
    """
    photo, original = open_photo(image), staged[0]
    heads = text_rows(original)
    layers, numbers = [layer for layer in original.maps if layer not in original.blank], list(staged)
    page, middle = Page(WIDTHS[paper.width], "".join(text for _, text, _ in heads)), layers[len(layers) // 2]
    colours, title = _layer_colours(layers), f"{method_title(original.settings)}: does the map depend on the model?"
    y = header(page, MARGIN, MARGIN, title, heads) + GAP

    names = {number: "the model" if number == 0 else f"{number} re-drawn" for number in numbers}
    strengths = {number: strength(staged[number], middle) for number in numbers}
    room = max(page.label_width(names[number], strengths[number]) for number in numbers) + GAP
    columns = min(len(numbers), 8, int((page.inner + GAP) / room))
    pitch = (page.inner + GAP) / columns
    width, height = fit_box(photo.width / photo.height, pitch - GAP, 2.2)
    small = shrink(photo, width, height)
    for i, number in enumerate(numbers):
        x, top = MARGIN + i % columns * pitch, y + i // columns * (height + HEAD + GAP)
        x += (pitch - GAP - width) / 2
        page.label(x + width / 2, top, names[number], strengths[number])
        page.picture(x, top + HEAD, width, height, draw_layer(small, staged[number], middle, False, look))
    y += -(-len(numbers) // columns) * (height + HEAD + GAP) + 2 * GAP

    style = {"xlabel": "decoder layers with re-drawn weights, from the top", "ylabel": "likeness to the model's map"}
    style["ylim"] = min([-0.5, *(row["spearman"] for row in scores)]) - 0.05, 1.05
    boxes, y = page.places(y, 2, CURVE_PLOT[0], BAND + CURVE_PLOT[1] + 0.42)
    titles = (("Spearman's rank correlation", "spearman"), ("SSIM", "ssim"))
    for (x, top, width), (name, column) in zip(boxes, titles, strict=True):
        axes = page.plot(x, top, width, CURVE_PLOT[1], name, **style)
        axes.axhline(0, color="0.6", linewidth=0.5)
        for layer in layers:
            values = [row[column] for row in scores if row["layer"] == layer]
            axes.plot(numbers, values, color=colours[layer], marker="o", markersize=2.5, linewidth=1.2)
        axes.set_xticks(numbers)
    y = _layer_legend(page, y, colours) + 2 * GAP
    caption = (
        f"{reliance(original, [middle])}A map that stays the same shows the picture and not what the model has learned "
        f"(Adebayo et al., 2018). Above: the heatmap of layer {middle} as the weights are re-drawn from the top layer "
        f"down; the last step also re-draws the vision tower. {look_text(look)}"
    )
    return page.finish(small_print(page, y, caption, made_from(original, photo)))


def draw_comparison(
    image, token_maps: TokenMaps, measured: Faithfulness, scores: list[dict], look: Look = PLAIN, paper: Paper = PAGE
) -> Page:
    """Each method's most faithful map, and insertion minus deletion of all methods' maps by layer.

    `token_maps` are those of `side_by_side`, `scores` rows of `comparison_rows`.
    """
    photo, heads = open_photo(image), text_rows(token_maps)
    rows = [row for row in scores if row["method"] != "random"]
    methods, layers = (list(dict.fromkeys(row[name] for row in rows)) for name in ("method", "layer"))
    page = Page(WIDTHS[paper.width], "".join(text for _, text, _ in heads))
    title = "Which map of this answer is to be believed?" + " None" * bool(doubt_of(token_maps))
    y = header(page, MARGIN, MARGIN, title, heads) + 2 * GAP
    columns = min(max(3, len(methods)), int(page.inner / 1.4))
    columns = max(min(3, columns), -(-len(methods) // -(-len(methods) // columns)))  # rows of about the same length
    pitch = (page.inner + GAP) / columns
    width, height = fit_box(photo.width / photo.height, pitch - GAP, 2.4)
    small, values, row_height = shrink(photo, width, height), {}, 2 * BAND + height + GAP
    for i, method in enumerate(methods):
        own = {row["layer"]: row["difference"] for row in rows if row["method"] == method}
        best, in_row = max(own, key=own.get), min(columns, len(methods) - i // columns * columns)
        middle = MARGIN + (page.inner + GAP - pitch * in_row) / 2 + (i % columns + 0.5) * pitch - GAP / 2
        top = y + i // columns * row_height
        page.text(middle, top, METHODS[method].title, SMALL, ha="center", weight="bold")
        under = f"layer {best}, ins. − del. {decimal(own[best])}"
        page.text(middle, top + BAND, under, SMALL, ha="center", color="0.3")
        picture = draw_layer(small, token_maps, map_key(method, best), True, look)
        page.picture(middle - width / 2, top + 2 * BAND, width, height, picture)
        values[METHODS[method].title] = [own.get(layer, np.nan) for layer in layers], *STYLES[method]
    y += -(-len(methods) // columns) * row_height + 2 * GAP
    differences = chances(measured)
    low, high = min(differences), max(differences)
    bottom = min(-0.1, low, *(row["difference"] for row in rows)) - 0.05
    style = {"ylim": (bottom, 1.02), "xlabel": "layer", "ylabel": "insertion − deletion"}
    named = -(-(1 + len(methods)) // 2)  # rows of the legend
    pitch = BAND + CURVE_PLOT[1] + 0.42 + max(3, named) * SMALL * LINE + 2 * GAP
    ((x, top, width),), y = page.places(y, 1, CURVE_PLOT[0], pitch)
    axes = page.plot(x, top, width, CURVE_PLOT[1], "How faithful, by layer", **style)
    axes.axhspan(low, high, color="0.88", linewidth=0, label="random orders")
    _draw_by_layer(axes, layers, values, {})
    caption = (
        f"{reliance(token_maps)}Area under the insertion curve minus that under the deletion curve: how much sooner "
        f"the answer comes back, and goes, if image tokens are revealed or removed hottest first. Less than {TIE} "
        "apart is a tie. It prefers maps that cover all of what the answer needs to maps that find its densest part."
    )
    blank = ", ".join(f"{key} ({why})" for key, why in token_maps.blank.items())
    caption += f" {look_text(look)}{f' Left out, as it has no map: {blank}.' if blank else ''}"
    if not doubt_of(token_maps):
        caption = " ".join([caption, *(f"{line[0].upper()}{line[1:]}." for line in reservations(scores, measured))])
    noise = settings_text(token_maps.settings).split(", ")[-3:]  # what all methods share
    made = f"Settings: {', '.join(noise)}; baseline {measured.baseline}"
    return page.finish(small_print(page, y, caption, made))


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
    draw = functools.partial(draw_faithfulness, reading.photo, token_maps, measured, rows, look, paper)
    files = paper.figure("faithfulness", draw) | {"scores.csv": to_csv(rows)}
    lines = [*verdict(rows, measured), f"cost: {measured.forwards} pictures run through the model"]
    if randomize:
        bar = show_progress(quiet, "weights re-drawn", "stage")
        keywords = {"seed": seed, "progress": bar, "passes": passes, "batch_size": batch_size}
        staged = cascading_randomization(reading, token_maps, **keywords)
        scores = randomization_rows(staged)
        draw = functools.partial(draw_randomization, reading.photo, staged, scores, look, paper)
        files |= paper.figure("randomization", draw)
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
    draw = functools.partial(draw_comparison, reading.photo, together, measured, rows, look, paper)
    files = paper.figure("comparison", draw) | {"comparison.csv": to_csv(rows)}
    lines = [
        f"{method} at layer {layer} has no map ({why}): it is left out"
        for method, own in maps.items()
        for layer, why in own.blank.items()
    ]
    lines += comparison_verdict(rows, measured)
    return files, [*lines, f"cost: {measured.forwards} pictures run through the model"]
