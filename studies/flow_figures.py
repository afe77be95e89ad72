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

from common.files import decimal, to_csv
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
    excerpt,
    fit_box,
    header,
    masthead,
    shrink,
    small_print,
)
from common.terminal import say
from smooth_gradcam import Look, Reading, Settings, TokenMaps, explain, get_model_layers
from studies.decoder import _length, token_groups
from studies.flow import (
    TAP_NAMES,
    Traced,
    _size,
    attention_maps,
    curves_by_layer,
    flow_arrays,
    flow_findings,
    flow_rows,
    forecast,
    tap_modules,
    trace_photo,
)
from studies.knockout import (
    EXPLAINED,
    KEPT,
    Severed,
    _words,
    explained_line,
    find_cliff,
    find_onset,
    knockout_arrays,
    knockout_rows,
    mean_change,
    said_instead,
    sever_photo,
    strongest,
    truncated,
    truncation_finding,
)
from visualization_utils import (
    PLAIN,
    WEAK,
    draw_layer,
    look_text,
    settings_text,
    show_progress,
    spread,
    strength,
    strongest_of,
    text_rows,
)

__all__ = ["sever", "trace"]


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
        say(forecast(readings, passes))
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
        say(f"{runs} runs of each photo; {forecast(readings, 2 + runs * share)}")
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
