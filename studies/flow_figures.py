"""Figures and files of flow mode: what the answer reads of a photo, layer by layer."""

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
from common.evidence import Evidence, departures, doubt_of, evidence_lines, warnings_of
from common.families import known
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
from smooth_gradcam import PLAIN, Look, Reading, Settings, TokenMaps, explain, noisy_passes
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
    WEAK,
    draw_layer,
    look_text,
    photo_names,
    photo_rows,
    reliance,
    settings_text,
    spread,
    strength,
    strongest_of,
    text_rows,
)

__all__ = ["COLOURS", "THIN", "trace"]

COLOURS = {"system": "#999999", "image": "#d55e00", "user": "#0072b2", "answer": "#009e73"}
SHARE_PLOT = 1.9, 1.35  # inches
THIN = "Thick lines: mean of the photos; thin ones: each."
STRIP, NARROW = 7, 0.7  # pictures side by side, at most, and inches of one, at least
LINES = 24  # of one group in a panel of flow lines, at most
BROADEST = 22  # points: width of a flow line with all of the attention


def _draw_shares(axes, curves: dict[str, np.ndarray]) -> None:
    """The mean of each group's curves (photos, K), and thin lines of each photo if there are several."""
    for name, values in curves.items():
        x = np.arange(values.shape[1])
        if len(values) > 1:
            axes.plot(x, values.T, color=COLOURS[name], linewidth=0.4, alpha=0.5)
        axes.plot(x, values.mean(0), color=COLOURS[name], linewidth=1.3)


def _strip_columns(photo: Image.Image) -> int:
    """The number of pictures side by side on a page: fewer for wide photos."""
    aspect = photo.width / photo.height
    return STRIP if aspect < 2 else 4 if aspect < 5 else 3


def _strips(page: Page, y: float, traced: list[Traced], layers: list[int], look: Look) -> float:
    """A row for each photo: the photo, and its map at each layer; long rows are broken. Returns the y below."""
    strongest = strongest_of(one.maps for one in traced)
    for number, (reading, maps, *_) in enumerate(traced, 1):
        photo = reading.photo
        labels = {layer: (f"layer {layer}", strength(maps, layer, strongest)) for layer in layers}
        room = max(NARROW, *(page.label_width(*label) for label in labels.values()))
        columns = min(_strip_columns(photo), int((page.inner + GAP / 2) / (room + GAP / 2)))
        pitch = (page.inner + GAP / 2) / columns
        width, height = fit_box(photo.width / photo.height, pitch - GAP / 2, 1.3)
        small = shrink(photo, width, height)
        doubt = "doubted" if doubt_of(maps) else ""
        cells = [(("photo", "") if len(traced) == 1 else (f"photo {number}", doubt), np.asarray(small))]
        cells += [(labels[layer], draw_layer(small, maps, layer, True, look, strongest)) for layer in layers]
        for i in range(0, len(cells), columns):
            for j, (label, picture) in enumerate(cells[i : i + columns]):
                middle = MARGIN + (j + 0.5) * pitch - GAP / 4
                page.label(middle, y, *label)
                page.picture(middle - width / 2, y + HEAD, width, height, picture)
            y += HEAD + height + GAP / 2
    return y


def _flow_lines(axes, attention: np.ndarray, groups: dict[str, slice], rows: int) -> None:
    """Lines from the tokens, top to bottom, to the answer on the right, as broad as the attention (L,) to them.

    The image has a line for each of the `rows` of its grid, long texts one for several tokens.
    """
    sums = []
    for name, group in groups.items():
        values = attention[group]
        count = min(rows if name == "image" else LINES, len(values))
        sums += [(name, tokens.sum()) for tokens in np.array_split(values, max(count, 1))]
        sums.append((None, 0.0))  # a gap
    heights, thin = np.linspace(1, 0, len(sums)), 0.3  # points: some programs draw no thinner line
    starts = [(height, name, value) for height, (name, value) in zip(heights, sums, strict=True) if name]
    lines = LineCollection(
        [[(0, height), (0.35, height), (1, 0.5)] for height, _, _ in starts],
        linewidths=[max(BROADEST * value, thin) for _, _, value in starts],
        colors=[to_rgba(COLOURS[name], 0.75 * min(1, BROADEST * value / thin)) for _, name, value in starts],
    )
    axes.add_collection(lines)
    for height, name, _ in starts:
        axes.plot([-0.03], [height], marker="s", markersize=1.6, color=COLOURS[name])
    axes.set(xlim=(-0.08, 1.02), ylim=(-0.03, 1.03))
    axes.spines[:].set_visible(False)


def _draw_flow(
    traced: list[Traced], names: list[str], layers: list[int], look: Look = PLAIN, paper: Paper = PAGE
) -> Page:
    """Maps by layer, the shares of attention and gradient below them, and flow lines."""
    doubts = [doubt_of(one.maps) for one in traced]
    heads = text_rows(traced[0].maps) if len(traced) == 1 else photo_rows([one.reading for one in traced], doubts)
    page = Page(WIDTHS[paper.width], "".join(text for _, text, _ in heads))
    y = header(page, MARGIN, MARGIN, "Information flow: what the answer reads, layer by layer", heads) + GAP
    y = _strips(page, y, traced, layers, look) + GAP

    y = page.legend(y, COLOURS) + GAP
    shares, per_token, gradients = curves_by_layer(traced)
    plots = (
        ("Attention, share of the group", shares, {"ylim": (-0.02, 1.02)}),
        ("Attention, per token", per_token, {"yscale": "log"}),
        ("|gradient × hidden state|", gradients, {"ylim": (-0.02, 1.02)}),
    )
    boxes, y = page.places(y, len(plots), SHARE_PLOT[0], BAND + SHARE_PLOT[1] + 0.45)
    for (x, top, width), (title, curves, style) in zip(boxes, plots, strict=True):
        axes = page.plot(x, top, width, SHARE_PLOT[1], title, xlabel="layer")
        _draw_shares(axes, curves)
        axes.set(**style)
        if "yscale" in style:
            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_locator(NullLocator())

    columns = 6 if page.inner > 5 else 3
    first = traced[0]
    page.text(MARGIN, y, "Flow lines" if len(traced) == 1 else "Flow lines of photo 1", TEXT, weight="bold")
    y += TEXT * LINE + GAP / 2
    width = (page.inner + GAP) / columns
    for i, layer in enumerate(spread(layers, columns)):
        page.text(MARGIN + i * width + (width - GAP) / 2, y, f"layer {layer}", SMALL, ha="center")
        axes = page.axes(MARGIN + i * width, y + BAND, width - GAP, 1.5)
        _flow_lines(axes, first.attention[layer], token_groups(first.reading), first.reading.grid[0])
    y += BAND + 1.5 + 2 * GAP
    plot = ("Left", "Middle", "Right") if boxes[1][1] == boxes[0][1] else ("First plot", "Second", "Third")
    believed = reliance(traced[0].maps, layers)
    if len(traced) > 1:
        believed = "Doubted: not to be believed, so drawn in faded colours. " * any(doubts)
    caption = (
        f"{plot[0]}: attention of the positions that predict the explained tokens, mean over heads, renormalised over "
        f"system, image and user tokens (eq. 7 of “From Redundancy to Relevance”). {plot[1]}: the same for each token "
        f"of the group, with the answer's own. {plot[2]}: share of each group in the sum of |gradient × hidden state| "
        "at the layer. Flow lines lead from tokens (of the image, from rows of its grid) to the answer, as broad as "
        f"their attention. {believed}{look_text(look)}{f' {THIN} {photo_names(names)}' if len(traced) > 1 else ''}"
    )
    return page.finish(small_print(page, y, caption, settings_text(traced[0].maps.settings)))


def _draw_attention_maps(
    reading: Reading, maps: TokenMaps, attention: dict[int, np.ndarray], edges, paper: Paper = PAGE
) -> Page:
    """Attention between bins of positions at each layer, in logarithmic colours; see `attention_maps`."""
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
    borders = [np.searchsorted(edges, group.start) for group in groups.values()] + [len(edges) - 1]
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


def _draw_taps(
    reading: Reading, maps: TokenMaps, keys: dict[str, dict[int, object]], merger: str, look: Look = PLAIN,
    paper: Paper = PAGE,
) -> Page:  # fmt: skip
    """The map at each place (rows) of each layer (columns), and at the vision tower's merger.

    `keys` are {place: {layer: key of the map}}, `merger` is the merger's key.
    """
    heads, photo = text_rows(maps), reading.photo
    page = Page(WIDTHS[paper.width], "".join(text for _, text, _ in heads))
    y = masthead(page, photo, "One photo at every tap", heads, (1.6, 1.2)) + 2 * GAP
    cells = {"merger": [("merger", merger)]}
    cells |= {
        PLACE_NAMES.get(place, place): [(f"layer {k}", key) for k, key in key_of.items()]
        for place, key_of in keys.items()
    }
    columns = min(max(map(len, cells.values())), _strip_columns(photo) - 1, int(page.inner / (NARROW + GAP)))
    pitch = (page.inner + GAP) / columns
    width, height = fit_box(photo.width / photo.height, pitch - GAP, 1.5)
    small = shrink(photo, width, height)
    for name, row in cells.items():
        page.text(MARGIN, y, name, SMALL, weight="bold")
        y += SMALL * LINE
        strongest = max(float(maps.maps[key].max()) for _, key in row)  # of the maps read at one place
        for i in range(0, len(row), columns):
            for j, (label, key) in enumerate(row[i : i + columns]):
                middle = MARGIN + j * pitch + (pitch - GAP) / 2
                page.label(middle, y, label, strength(maps, key, strongest))
                picture = draw_layer(small, maps, key, True, look)
                page.picture(middle - width / 2, y + HEAD, width, height, picture)
            y += HEAD + height + GAP
    y += GAP
    caption = (
        f"{reliance(maps)}Bold: where the layer is read, of at most {STRIP - 1} layers; merger: the image tokens "
        f"before the decoder; grey: no gradient; weak: below {100 * WEAK:.0f} % of the strongest read at that place. "
        f"{look_text(look)}"
    )
    return page.finish(small_print(page, y, caption, settings_text(maps.settings, "read at the named places")))


def trace(
    readings: list[Reading], names: list[str], spans: list[tuple[int, int]], layers: list[int], settings: Settings, *,
    attention_map=False, taps=False, quiet=False, look=PLAIN, paper=PAGE, passes=noisy_passes, batch_size: int = 1,
) -> tuple[dict[str, object], list[str], list[Evidence]]:  # fmt: skip
    """({file name: content}, findings in lines, evidence of each photo's explained tokens) of flow mode.

    `names` are those of the photos, `spans` are (start, end) in characters of each answer. The first photo's attention
    between all positions is drawn for `attention_map`, its maps at every place where a layer can be read for `taps`.
    `passes` and `batch_size` are those of `explain`.
    """
    if not quiet:
        say(forecast_forwards(readings, 2 + 2.2 * settings.num_samples * (1 + taps) + 2 * attention_map))
    copies = {"progress": show_progress(quiet), "passes": passes, "batch_size": batch_size}
    pairs = zip(readings, spans, strict=True)
    traced = [trace_photo(reading, span, settings, **copies) for reading, span in pairs]
    draw = functools.partial(_draw_flow, traced, names, layers, look, paper)
    files = paper.figure("information_flow", draw) | {
        "information_flow.csv": to_csv(flow_rows(traced, names)),
        "information_flow.npz": flow_arrays(traced, names) | {"layers": np.array(layers)},
    }
    shares, _, gradients = curves_by_layer(traced)
    sizes = {name: np.mean([group_size(one.reading, name) for one in traced]) for name in shares}
    means = [{name: values.mean(0) for name, values in kind.items()} for kind in (shares, gradients)]
    explained = "the whole answer" if traced[0].maps.whole else repr(traced[0].maps.target)
    explained += "" if settings.contrast is None else f" rather than {settings.contrast!r}"
    lines = [f"explained: {explained}; maps at layer {', '.join(map(str, layers))}"]
    lines += _evidence_lines(traced, names, layers)
    for name, blank in zip(names, [one.maps.blank for one in traced], strict=True):
        reasons = [f"{layer} ({blank[layer]})" for layer in layers if layer in blank]
        lines += [f"{name} has no map at layer {', '.join(reasons)}: its pictures are grey panels"] if reasons else []
    lines += flow_findings(means[0], sizes, means[1])
    if attention_map:
        attention, edges = attention_maps(readings[0], layers)
        draw = functools.partial(_draw_attention_maps, readings[0], traced[0].maps, attention, edges, paper)
        files |= paper.figure("attention_maps", draw)
    if taps:
        files |= paper.figure("taps", _explain_taps(traced[0], layers, look, paper, **copies))
    return files, lines, [one.maps.evidence for one in traced]


def _evidence_lines(traced: list[Traced], names: list[str], layers: list[int]) -> list[str]:
    """What the maps of the only photo rest on, and what speaks against those of each of several."""
    if len(traced) == 1:
        return evidence_lines(traced[0].maps, layers)
    maps_of = {name: one.maps for name, one in zip(names, traced, strict=True)}
    faded = ": its maps are faded, and not to be believed"
    lines = warnings_of({name: (doubt := doubt_of(maps)) and f"{doubt}{faded}" for name, maps in maps_of.items()})
    return lines + warnings_of({name: departures(maps, layers) for name, maps in maps_of.items()})


def _explain_taps(traced: Traced, layers: list[int], look: Look, paper: Paper, **copies) -> Callable:
    """The function that draws the maps at every place of the layers, of six at most, which share their passes.

    `copies` are keywords of `explain`.
    """
    reading, settings = traced.reading, replace(traced.maps.settings, tap="input")
    places = tap_modules(reading.model, spread(layers, _strip_columns(reading.photo) - 1))
    merger = reading.model.model.get_submodule(known(reading.model).merger)
    modules = [module for module_of in places.values() for module in module_of.values()]
    (maps,) = explain(reading, [traced.maps.target_span], [*modules, merger], settings, **copies)
    maps = replace(maps, evidence=traced.maps.evidence)
    names = {module: name for name, module in reading.model.named_modules()}
    keys = {
        place: {layer: names.get(module, module) for layer, module in module_of.items()}
        for place, module_of in places.items()
    }
    return functools.partial(_draw_taps, reading, maps, keys, names[merger], look, paper)
