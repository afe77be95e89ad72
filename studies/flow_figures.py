"""Figures and files of flow mode: what the answer reads of a photo, layer by layer."""

import functools
from dataclasses import replace

import numpy as np
from matplotlib import colormaps
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from PIL import Image

from common.encoding import to_csv
from common.evidence import Evidence, departures, doubt_of, evidence_lines, warnings_of
from common.families import known, photo_tokens
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
from common.parts import Part, captions, numbered, rows_of_plots
from common.progress import show_progress
from common.terminal import say
from smooth_gradcam import PLAIN, Look, Reading, Settings, TokenMaps, explain, noisy_passes
from studies.decoder import stretches, token_groups
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
    colour_bar,
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

COLOURS = {"system": "#999999", "image": "#d55e00", "user": "#0072b2", "answer": "#009e73", "other images": "#cc79a7"}
MARKERS = {"system": "o", "image": "s", "user": "^", "answer": "D", "other images": "v"}
SHARE_PLOT = 2.6, 1.1  # inches
THIN = "Thick lines: mean of the photos; thin ones: each."
STRIP, NARROW = 7, 0.7  # pictures side by side, at most, and inches of one, at least
LINES = 24  # of one group in a panel of flow lines, at most
BROADEST = 22  # points: width of a flow line with all of the attention
LINES_HIGH = 1.2  # inches of a panel of flow lines


def _draw_shares(axes, curves: dict[str, np.ndarray]) -> None:
    """The mean of each group's curves (photos, K), with markers in turn: one shows where another's line covers it.

    Thin lines are those of each photo if there are several.
    """
    for i, (name, values) in enumerate(curves.items()):
        x, every = np.arange(values.shape[1]), max(len(curves), 4)
        if len(values) > 1:
            axes.plot(x, values.T, color=COLOURS[name], linewidth=0.4, alpha=0.5)
        style = {"marker": MARKERS[name], "markersize": 3, "markevery": (i, every), "linewidth": 1.2}
        axes.plot(x, values.mean(0), color=COLOURS[name], label=name, **style)


def _strip_columns(photo: Image.Image) -> int:
    """The number of pictures side by side on a page: fewer for wide photos."""
    aspect = photo.width / photo.height
    return STRIP if aspect < 2 else 4 if aspect < 5 else 3


def _strips(page: Page, traced: list[Traced], layers: list[int], look: Look) -> list[Part]:
    """A row for each photo: the photo, and its map at each layer; long rows are broken."""
    strongest, parts = strongest_of(one.maps for one in traced), []
    for number, one in enumerate(traced, 1):
        reading, maps = one.reading, one.maps
        labels = {layer: (f"layer {layer}", strength(maps, layer, strongest)) for layer in layers}
        doubt = "doubted" if doubt_of(maps) else ""
        labels[None] = ("photo", "") if len(traced) == 1 else (f"photo {number}", doubt)
        room = max(NARROW, *(page.label_width(*label) for label in labels.values()))
        columns = min(_strip_columns(reading.photo), int((page.inner + GAP / 2) / (room + GAP / 2)))
        pitch = (page.inner + GAP / 2) / columns
        width, height = fit_box(reading.photo.width / reading.photo.height, pitch - GAP / 2, 1.3)

        def draw_row(members, photo, maps, labels, pitch, size, page, y):
            small = shrink(photo, *size)
            for j, layer in enumerate(members):
                middle = MARGIN + (j + 0.5) * pitch - GAP / 4
                picture = small if layer is None else draw_layer(small, maps, layer, True, look, strongest)
                page.label(middle, y, *labels[layer])
                page.picture(middle - size[0] / 2, y + HEAD, *size, np.asarray(picture))

        cells = [None, *layers]
        for i in range(0, len(cells), columns):
            row = tuple(cells[i : i + columns])
            draw = functools.partial(draw_row, row, reading.photo, maps, labels, pitch, (width, height))
            parts.append(Part(HEAD + height + GAP / 2, draw, shown=tuple(layer for layer in row if layer is not None)))
    return parts


def _rows_of(reading: Reading) -> list[np.ndarray]:
    """The positions in each row of the photos' grids, and of what shows the photos beside that, if anything does."""
    cells = reading.positions.cpu().numpy()
    rest = np.setdiff1d(photo_tokens(reading).numpy(), cells)
    widths = [width for height, width in reading.grids for _ in range(height)]
    return [*np.split(cells, np.cumsum(widths)[:-1]), *([rest] if len(rest) else [])]


def _flow_lines(
    axes, attention: np.ndarray, groups: dict[str, np.ndarray], rows: list[np.ndarray], size: tuple[float, float]
) -> None:
    """Lines from the tokens, top to bottom, to the answer on the right, as broad as the attention (L,) to them.

    The image has a line for each of its `rows`, positions of tokens, long texts one for several tokens. `size` is
    (width, height) of the axes in inches: its edges leave room for half of the broadest line.
    """
    sums = []
    for name, group in groups.items():
        places = np.arange(len(attention))[group]
        lines = rows if name == "image" else np.array_split(places, max(min(LINES, len(places)), 1))
        sums += [(name, attention[tokens].sum()) for tokens in lines]
        sums.append((None, 0.0))  # a gap
    heights, thin = np.linspace(1, 0, len(sums)), 0.3  # points: some programs draw no thinner line
    starts = [(height, name, value) for height, (name, value) in zip(heights, sums, strict=True) if name]
    lines = LineCollection(
        [[(0, height), (0.35, height), (1, 0.5)] for height, _, _ in starts],
        linewidths=[max(BROADEST * value, thin) for _, _, value in starts],
        colors=[to_rgba(COLOURS[name], 0.75 * min(1, BROADEST * value / thin)) for _, name, value in starts],
        capstyle="butt",
    )
    axes.add_collection(lines)
    for height, name, _ in starts:
        axes.plot([-0.03], [height], marker="s", markersize=1.6, color=COLOURS[name])
    wide, high = (BROADEST / 2 / 72 / (inches - BROADEST / 72) for inches in size)
    axes.set(xlim=(-0.08, 1 + wide), ylim=(-high, 1 + high))
    axes.spines[:].set_visible(False)


def _draw_flow(
    traced: list[Traced], names: list[str], layers: list[int], look: Look = PLAIN, paper: Paper = PAGE
) -> dict[str, object]:
    """{file name: what draws it}: maps by layer, the shares of attention and gradient below them, and flow lines."""
    doubts = [doubt_of(one.maps) for one in traced]
    heads = text_rows(traced[0].maps) if len(traced) == 1 else photo_rows([one.reading for one in traced], doubts)
    letters = "".join(text for _, text, _ in heads)
    page, settings = Page(WIDTHS[paper.width], letters), traced[0].maps.settings

    def head(page, number):
        title = f"Information flow: what the answer reads, layer by layer{number}"
        return header(page, MARGIN, MARGIN, title, heads) + GAP

    def legend(page, y):
        return page.legend(y + GAP, {name: (COLOURS[name], MARKERS[name]) for name in gradients}) + GAP

    shares, per_token, gradients = curves_by_layer(traced)
    lens = np.stack([one.lens.mean(1) for one in traced])  # (photos, K)
    plots = [
        ("Attention, share of the group", (shares, "linear"), {"xlabel": "layer", "ylim": (-0.02, 1.02)}),
        ("Attention, per token", (per_token, "log"), {"xlabel": "layer"}),
        ("|gradient × hidden state|", (gradients, "linear"), {"xlabel": "layer", "ylim": (-0.02, 1.02)}),
        ("Probability after each layer", ({"answer": lens}, "linear"), {"xlabel": "layer", "ylim": (-0.02, 1.02)}),
    ]

    def draw_plot(page, axes, curves, scale):
        _draw_shares(axes, curves)
        if scale == "log":
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_locator(NullLocator())

    among = "all but the answer's own" if "other images" in shares else "system, image and user tokens"
    said = [
        "Share of the group: attention of the positions that predict the explained tokens, mean over heads, "
        f"renormalised over {among} (eq. 7 of “From Redundancy to Relevance”).",
        "Per token: the same for each token of the group, with the answer's own.",
        "|gradient × hidden state|: share of each group in its sum at the layer.",
        "Probability after each layer: of the explained tokens, by the final norm and head.",
    ]
    rows = rows_of_plots(page, plots, SHARE_PLOT, 0.4, draw_plot, above=legend)
    each = len(plots) // len(rows)
    thin = [THIN] if len(traced) > 1 else []
    curves = [row._replace(caption=" ".join(said[i * each : (i + 1) * each])) for i, row in enumerate(rows)]
    curves = [row._replace(caption=" ".join([row.caption, *thin])) for row in curves] if len(rows) == 1 else curves

    columns, first = 6 if page.inner > 5 else 3, traced[0]
    width = (page.inner + GAP) / columns

    def draw_lines(page, y):
        title = "Flow lines" if len(traced) == 1 else "Flow lines of photo 1"
        page.text(MARGIN, y, title, TEXT, weight="bold")
        y += TEXT * LINE + GAP / 2
        for i, layer in enumerate(spread(layers, columns)):
            page.text(MARGIN + i * width + (width - GAP) / 2, y, f"layer {layer}", SMALL, ha="center")
            size = width - GAP, LINES_HIGH
            axes = page.axes(MARGIN + i * width, y + BAND, *size)
            _flow_lines(axes, first.attention[layer], token_groups(first.reading), _rows_of(first.reading), size)

    lines = Part(
        TEXT * LINE + GAP / 2 + BAND + LINES_HIGH + GAP,
        draw_lines,
        "Flow lines lead from tokens (of the image, from rows of its grid) to the answer, as broad as their attention.",
        legend,
    )

    def foot(page, y, parts):
        shown = [layer for part in parts for layer in part.shown]
        text, y = captions(parts), y + GAP
        if len(rows) > 1 and thin and any(part in curves for part in parts):
            text += f" {THIN}"
        if shown:
            y = colour_bar(page, y, settings.method, look)
            believed = reliance(traced[0].maps, layers)
            if len(traced) > 1:
                believed = "Doubted: not to be believed, so drawn in faded colours. " * any(doubts)
            text += f" {believed}{look_text(look)}"
        text += f" {photo_names(names)}" if len(traced) > 1 else ""
        return small_print(page, y, text.strip(), settings_text(settings))

    parts = [*_strips(page, traced, layers, look), *curves, lines]
    return numbered("information_flow", paper, letters, head, parts, foot)


def _draw_attention_maps(
    reading: Reading, maps: TokenMaps, attention: dict[int, np.ndarray], edges, paper: Paper = PAGE
) -> dict[str, object]:
    """{file name: what draws it}: attention between bins of positions at each layer, in logarithmic colours; see
    `attention_maps`."""
    heads, groups = text_rows(maps), stretches(reading)
    letters = "".join(text for _, text, _ in heads)
    page = Page(WIDTHS[paper.width], letters)

    def head(page, number):
        return header(page, MARGIN, MARGIN, f"Attention between prompt, image and answer{number}", heads) + GAP

    across = 3 if page.inner > 5 else 2
    columns = min(across, len(attention))
    pitch = (page.inner - 0.15) / across
    side = pitch - 0.3
    positive = np.concatenate([values[values > 0] for values in attention.values()])
    low, high = np.floor(np.log10(np.percentile(positive, 1))), np.ceil(np.log10(positive.max()))
    left = (page.width - columns * pitch) / 2 + 0.25
    borders = [np.searchsorted(edges, start) for _, start, _ in groups] + [len(edges) - 1]

    def draw_row(layers, page, y):
        for i, layer in enumerate(layers):
            x, values = left + i * pitch, attention[layer]
            page.text(x + side / 2, y, f"layer {layer}", SMALL, ha="center")
            axes = page.axes(x, y + BAND, side, side)
            logs = np.full(values.shape, np.nan)
            np.log10(values, out=logs, where=values > 0)
            axes.set_facecolor("0.9")
            axes.imshow(logs.clip(low), cmap="viridis", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
            for border in borders[1:-1]:
                axes.axhline(border - 0.5, color="white", linewidth=0.6)
                axes.axvline(border - 0.5, color="white", linewidth=0.6)
            middles = [(a + b) / 2 - 0.5 for a, b in zip(borders, borders[1:], strict=False)]
            axes.set_xticks(middles, [name[0].upper() for name, *_ in groups])
            axes.set_yticks(middles, [name[0].upper() for name, *_ in groups])

    def foot(page, y, parts):
        ticks, width = np.arange(low, high + 1).astype(int), min(3.2, page.inner - 0.4)
        axes = page.axes((page.width - width) / 2, y + GAP, width, 0.11)
        axes.imshow(colormaps["viridis"](np.linspace(0, 1, 256))[None], aspect="auto", extent=(low, high, 0, 1))
        axes.set_xticks(ticks, [f"{10.0**tick:g}" for tick in ticks])
        y = page.centred(y + 0.11 + SMALL * LINE + 2 * GAP, "attention of a query to a key, logarithmic", SMALL) + GAP
        other = ", O other images" if "other images" in {name for name, *_ in groups} else ""
        caption = (
            f"Rows attend to columns: S system, I image, U user, A answer{other}. Mean over heads and over the pairs "
            f"that may see each other in stretches of {int(np.diff(edges).max())} positions at most; grey: keys behind "
            "their queries."
        )
        return small_print(page, y, caption)

    rows = [[*attention][i : i + columns] for i in range(0, len(attention), columns)]
    parts = [Part(BAND + side + 0.3, functools.partial(draw_row, row)) for row in rows]
    return numbered("attention_maps", paper, letters, head, parts, foot)


def _draw_taps(
    reading: Reading, maps: TokenMaps, keys: dict[str, dict[int, object]], merger: str, look: Look = PLAIN,
    paper: Paper = PAGE,
) -> dict[str, object]:  # fmt: skip
    """{file name: what draws it}: the map at each place (rows) of each layer (columns), and at the vision tower's
    merger.

    `keys` are {place: {layer: key of the map}}, `merger` is the merger's key.
    """
    heads, photo = text_rows(maps), reading.photo
    letters = "".join(text for _, text, _ in heads)
    page = Page(WIDTHS[paper.width], letters)

    def head(page, number):
        return masthead(page, photo, f"One photo at every tap{number}", heads, (1.6, 1.2)) + 2 * GAP

    cells = {"merger": [("merger", merger)]}
    cells |= {
        PLACE_NAMES.get(place, place): [(f"layer {k}", key) for k, key in key_of.items()]
        for place, key_of in keys.items()
    }
    columns = min(max(map(len, cells.values())), _strip_columns(photo) - 1, int(page.inner / (NARROW + GAP)))
    pitch = (page.inner + GAP) / columns
    width, height = fit_box(photo.width / photo.height, pitch - GAP, 0.7)
    small, parts = shrink(photo, width, height), []
    strengths = {}

    def place_name(name, page, y):
        page.text(MARGIN, y, name, SMALL, weight="bold")
        return y + SMALL * LINE

    def draw_row(row, page, y):
        for j, (label, key) in enumerate(row):
            middle = MARGIN + j * pitch + (pitch - GAP) / 2
            page.label(middle, y, label, strengths[key])
            page.picture(middle - width / 2, y + HEAD, width, height, draw_layer(small, maps, key, True, look))

    for name, row in cells.items():
        strongest = max(float(maps.maps[key].max()) for _, key in row)  # of the maps read at one place
        strengths |= {key: strength(maps, key, strongest) for _, key in row}
        above = functools.partial(place_name, name)
        for i in range(0, len(row), columns):
            members = row[i : i + columns]
            draw, shown = functools.partial(draw_row, members), tuple(key for _, key in members)
            parts.append(Part(HEAD + height + GAP, draw, above=above, shown=shown))

    def foot(page, y, parts):
        shown = [key for part in parts for key in part.shown]
        text = f"{reliance(maps)}Bold: where the layer is read, of at most {STRIP - 1} layers"
        text += "; merger: the image tokens before the decoder" * (merger in shown)
        text += "; grey: no gradient" * any(key in maps.blank for key in shown)
        weak = any("weak" in strengths[key] for key in shown)
        text += f"; weak: below {100 * WEAK:.0f} % of the strongest read at that place" * weak
        y = colour_bar(page, y + GAP, maps.settings.method, look)
        return small_print(
            page, y, f"{text}. {look_text(look)}", settings_text(maps.settings, "read at the named places")
        )

    return numbered("taps", paper, letters, head, parts, foot)


def trace(
    readings: list[Reading], names: list[str], spans: list[tuple[int, int]], layers: list[int], settings: Settings, *,
    attention_map=False, taps=False, quiet=False, look=PLAIN, paper=PAGE, passes=noisy_passes, batch_size: int = 1,
) -> tuple[dict[str, object], list[str], list[Evidence]]:  # fmt: skip
    """({file name: content}, findings in lines, evidence of each photo's explained tokens) of flow mode.

    `names` are those of the photos, `spans` are (start, end) in characters of each answer. The first photo's attention
    between all positions is drawn for `attention_map`, its maps at every place where a layer can be read for `taps`.
    `passes` and `batch_size` are those of `explain`.
    """
    for reading in readings:
        reading.photo  # noqa: B018  (a video, or several photos in one prompt, cannot be drawn)
    if not quiet:
        say(forecast_forwards(readings, 2 + 2.2 * settings.num_samples * (1 + taps) + 2 * attention_map))
    copies = {"progress": show_progress(quiet), "passes": passes, "batch_size": batch_size}
    pairs = zip(readings, spans, strict=True)
    traced = [trace_photo(reading, span, settings, **copies) for reading, span in pairs]
    files = _draw_flow(traced, names, layers, look, paper) | {
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
        files |= _draw_attention_maps(readings[0], traced[0].maps, attention, edges, paper)
    if taps:
        files |= _explain_taps(traced[0], layers, look, paper, **copies)
    return files, lines, [one.maps.evidence for one in traced]


def _evidence_lines(traced: list[Traced], names: list[str], layers: list[int]) -> list[str]:
    """What the maps of the only photo rest on, and what speaks against those of each of several."""
    if len(traced) == 1:
        return evidence_lines(traced[0].maps, layers)
    maps_of = {name: one.maps for name, one in zip(names, traced, strict=True)}
    faded = ": its maps are faded, and not to be believed"
    lines = warnings_of({name: (doubt := doubt_of(maps)) and f"{doubt}{faded}" for name, maps in maps_of.items()})
    return lines + warnings_of({name: departures(maps, layers) for name, maps in maps_of.items()})


def _explain_taps(traced: Traced, layers: list[int], look: Look, paper: Paper, **copies) -> dict[str, object]:
    """{file name: what draws it}: the maps at every place of the layers, of six at most, which share their passes.

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
    return _draw_taps(reading, maps, keys, names[merger], look, paper)
