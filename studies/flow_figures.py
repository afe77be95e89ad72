"""Figures and files of the modes flow and knockout."""

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from matplotlib import colormaps
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from PIL import Image

from common.encoding import to_csv
from common.page import (
    BAND,
    GAP,
    HEAD,
    LINE,
    MARGIN,
    PAGE,
    SMALL,
    TEXT,
    WIDTHS,
    Page,
    Paper,
    fit_box,
    header,
    masthead,
    shrink,
    small_print,
)
from common.progress import show_progress
from common.terminal import say
from smooth_gradcam import Look, Reading, Settings, TokenMaps, explain
from studies.decoder import token_groups
from studies.flow import (
    PLACE_NAMES,
    Traced,
    attention_maps,
    curves_by_layer,
    flow_arrays,
    flow_findings,
    flow_rows,
    forecast_forwards,
    group_size,
    tap_modules,
    trace_photo,
)
from visualization_utils import (
    PLAIN,
    WEAK,
    draw_layer,
    look_text,
    photo_names,
    photo_rows,
    settings_text,
    spread,
    strength,
    strongest_of,
    text_rows,
)

__all__ = ["trace"]


# figures

COLOURS = {"system": "#999999", "image": "#d55e00", "user": "#0072b2", "answer": "#009e73"}
PLOT = 1.9, 1.35  # inches of one plot
THIN = "Thick lines: mean of the photos; thin ones: each."
STRIP, NARROW = 7, 0.7  # pictures side by side, at most, and inches of one, at least
LINES = 24  # of one group in a panel of flow lines, at most
BROADEST = 22  # points: a flow line that has all of the attention


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
    heads = text_rows(traced[0].maps) if len(traced) == 1 else photo_rows([part.reading for part in traced])
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
        f"their attention. {look_text(look)}{f' {THIN} {photo_names(names)}' if len(traced) > 1 else ''}"
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


def draw_taps(
    reading: Reading, maps: TokenMaps, keys: dict[str, dict[int, object]], merger: str, look: Look = PLAIN,
    paper: Paper = PAGE,
) -> Page:  # fmt: skip
    """The map at each tap (rows) of each layer (columns), and at the vision tower's merger."""
    heads, photo = text_rows(maps), reading.photo
    page = Page(WIDTHS[paper.width], "".join(text for _, text, _ in heads))
    y = masthead(page, photo, "One photo at every tap", heads, (1.6, 1.2)) + 2 * GAP
    cells = {"merger": [("merger", merger)]}
    cells |= {
        PLACE_NAMES.get(tap, tap): [(f"layer {k}", key) for k, key in found.items()] for tap, found in keys.items()
    }
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


def trace(
    readings: list[Reading], names: list[str], spans: list[tuple[int, int]], layers: list[int], settings: Settings, *,
    attention_map=False, taps=False, quiet=False, look=PLAIN, paper=PAGE, **passing,
) -> tuple[dict[str, object], list[str]]:  # fmt: skip
    """({file name: content}, findings in lines) of the mode flow: see the module's table of figures.

    `names` are those of the photos; `spans` are (start, end) in characters of each answer. `passing` are `passes`
    and `batch_size` of `explain`.
    """
    if not quiet:
        passes = 2 + 2.2 * settings.num_samples * (1 + taps) + 2 * attention_map
        say(forecast_forwards(readings, passes))
    bar = show_progress(quiet)
    pairs = zip(readings, spans, strict=True)
    traced = [trace_photo(reading, span, settings, bar, **passing) for reading, span in pairs]
    draw = functools.partial(draw_flow, traced, names, layers, look, paper)
    files = paper.figure("information_flow", draw) | {
        "information_flow.csv": to_csv(flow_rows(traced, names)),
        "information_flow.npz": flow_arrays(traced, names) | {"layers": np.array(layers)},
    }
    shares, _, gradients = curves_by_layer(traced)
    sizes = {name: np.mean([group_size(part.reading, name) for part in traced]) for name in shares}
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
