"""Figures of Grad-CAM maps over the layers of a Qwen2.5-VL, for reading and for printing.

    photo, prompt -> TokenMaps          compute_token_maps: one pass for all layers
      -> {layer: pictures}              render_layers: heatmap and overlay in the photo's own size
      -> {file name: picture}           draw_...: these, and a figure over all of them, laid out on a Page
      -> files                          write_files: all of them or none

The drawing functions take a photo and `TokenMaps`, and know nothing of models. Every map is scaled by its own maximum.

Shapes:  H, W  rows and columns of image tokens     height, width  pixels of the photo     Lengths: inches of the page
"""

import base64
import errno
import functools
import io
import json
import os
import re
import shutil
import signal
import threading
import unicodedata
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGINT, SIGTERM

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np
from matplotlib import colormaps, font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle
from PIL import Image
from tqdm.auto import tqdm

from smooth_gradcam import (
    Faithfulness,
    TokenMaps,
    colorize_cam,
    compute_token_maps,
    compute_word_maps,
    get_model_layers,
    load_rgb,
    normalize_cam,
    render_cam,
    resolve_layers,
    word_tokens,
)

LAYER_RANGES = ("auto", "early", "middle", "late", "all")
AUTO_LAYERS, LAYERS_PER_THIRD = 6, 3  # representative layers of "auto", and of a third in the comparative analysis

WIDTH, BODY_HEIGHT = 7.2, 7.0  # two columns of a paper; what header and caption leave of its page
MARGIN, INNER = 0.12, WIDTH - 0.24  # inner: between the margins
GAP, BAND = 0.08, 0.18  # between pictures; the line that a panel's title stands on
DPI, LINE = 200, 1.35 / 72  # line: its height per point of text
MARKER = "#ffe08a"  # behind the explained part of the answer
TEXT, SMALL, TITLE = 8, 7, 11  # points
LABEL = 0.75  # width of the column that says "Prompt", "Answer", "Explained"
EXCERPT = {"prompt": 300, "answer": 420, "target": 80}  # columns of text shown of each
BOXES = " Boxes: characters that no installed font can draw."
EARLIER = re.compile(r"layer_\d+_(heatmap|superimposed)\.png|randomization\.(png|csv)")  # what another run left
STAGING = ".smooth-gradcam-"  # with the process' number behind it, the folder for files that are not finished
METHOD_NAMES = {"gradcam": "Grad-CAM", "hirescam": "HiResCAM", "best": "Grad-CAM × HiResCAM"}


# which layers


def spread(layers: list[int], count: int) -> list[int]:
    """At most `count` of the layers, evenly spaced, with the first and the last."""
    picks = np.linspace(0, len(layers) - 1, min(count, len(layers)))
    return [layers[i] for i in np.round(picks).astype(int)]


def split_thirds(total: int) -> dict[str, list[int]]:
    """The layers 0 ... total - 1 in three parts, {"early", "middle", "late"}. Raises ValueError for fewer than 3."""
    if total < 3:
        raise ValueError(f"early, middle and late layers need 3 layers or more: the model has {total}")
    first, second = total // 3, 2 * total // 3
    layers = list(range(total))
    return {"early": layers[:first], "middle": layers[first:second], "late": layers[second:]}


def representative_thirds(total: int) -> dict[str, list[int]]:
    """Up to three layers of each third: what the comparative analysis shows."""
    return {name: spread(layers, LAYERS_PER_THIRD) for name, layers in split_thirds(total).items()}


def select_layers(layer_range: str | Iterable[int], total: int) -> list[int]:
    """Layer indices of "auto" (six, evenly spaced), "early", "middle", "late" (thirds), "all", or of a list.

    Raises ValueError naming the value and what is valid.
    """
    if not isinstance(layer_range, str):
        return resolve_layers(layer_range, total)
    if layer_range not in LAYER_RANGES:
        raise ValueError(
            f"layer_range={layer_range!r} must be one of {', '.join(LAYER_RANGES)} or a list of layers 0 to {total - 1}"
        )
    layers = list(range(total))
    if layer_range == "auto":
        return spread(layers, AUTO_LAYERS)
    return layers if layer_range == "all" else split_thirds(total)[layer_range]


# pictures of one layer


def render_layers(image, token_maps: TokenMaps) -> dict[int, dict[str, np.ndarray]]:
    """{layer: {"superimposed", "heatmap", "cam"}} of every map, in their order.

    The first two are uint8 RGB (height, width, 3) in the photo's own size, a grey panel where there is no gradient;
    the last is the raw map, float32 (H, W).
    """
    image = load_rgb(image)
    grey = grey_panel(*image.size) if token_maps.no_gradient else None
    results = {}
    for layer, cam in token_maps.maps.items():
        superimposed, heatmap = (grey, grey) if layer in token_maps.no_gradient else render_cam(image, cam)
        results[layer] = {"superimposed": superimposed, "heatmap": heatmap, "cam": cam}
    return results


# text


def excerpt(text: str, span: tuple[int, int], columns: int) -> tuple[str, tuple[int, int]]:
    """A long text cut to about `columns` of its characters around the span, and where the span is then.

    Wide characters take two columns. White space and control characters become blanks.
    """
    text = "".join(" " if c.isspace() or unicodedata.category(c) in ("Cc", "Cs") else c for c in text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    limit = columns * len(text) // (len(text) + wide) if text else 0
    if len(text) <= limit:
        return text, span
    start = 0 if span[1] <= limit else min(max(span[0] - limit // 4, 0), len(text) - limit)
    word = text.find(" ", start, span[0]) + 1  # not in the middle of a word, where there are words
    start = word if 0 < word - start < 20 and start else start
    before, after = "… " * (start > 0), " …" * (start + limit < len(text))
    shift = len(before) - start
    cut = before + text[start : start + limit] + after
    return cut, (span[0] + shift, min(span[1] + shift, len(cut) - len(after)))


@functools.cache
def _characters_of(path: str) -> frozenset:
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (RuntimeError, OSError):
        return frozenset()


@functools.cache
def font_families(text: str) -> tuple[list[str], bool]:
    """Installed font families that together can draw the text, and whether they draw all of it."""
    missing = {ord(c) for c in text if not c.isspace()}
    families = ["DejaVu Sans"]
    missing -= _characters_of(font_manager.findfont("DejaVu Sans"))
    for font in font_manager.fontManager.ttflist if missing else ():
        found = missing & _characters_of(font.fname)
        if found and "LastResort" not in font.fname and font.style == "normal":
            families.append(font.name)
            missing -= found
    return families, not missing


def text_width(text: str, size: float, families: list[str]) -> float:
    """Inches that the text takes on one line."""
    font = font_manager.FontProperties(family=families, size=size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that no installed font has
        return RendererAgg(8, 8, DPI).get_text_width_height_descent(text, font, ismath=False)[0] / DPI


def wrap(text: str, width: float, size: float, families: list[str]) -> list[tuple[int, int]]:
    """(start, end) of each line, broken at blanks where there are any and between characters where not."""
    lines, start = [], 0
    while start < len(text):
        fits, over = start + 1, len(text) + 1
        while over - fits > 1:  # bisection: text[start:fits] fits, text[start:over] does not
            middle = (fits + over) // 2
            inside = text_width(text[start:middle].rstrip(), size, families) <= width
            fits, over = (middle, over) if inside else (fits, middle)
        blank = text.rfind(" ", start, fits) + 1
        end = blank if fits < len(text) and blank > start else fits
        lines.append((start, end))
        start = end
    return lines or [(0, 0)]


def split_at_span(text: str, line: tuple[int, int], span: tuple[int, int]) -> list[tuple[str, bool]]:
    """The line's text in runs (text, is it marked), in the order in which they are drawn from left to right."""
    start, end = line
    inside = [min(max(edge, start), end) for edge in span]
    edges = [start, *inside, end]
    runs = [(text[a:b], i == 1) for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False)) if a < b]
    first_strong = next((d for d in map(unicodedata.bidirectional, text[start:end]) if d in ("L", "R", "AL")), "L")
    return runs if first_strong == "L" else runs[::-1]


# panels


def figure_to_array(figure: Figure) -> np.ndarray:
    """The figure's pixels, uint8 RGB (height, width, 3)."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that no installed font has: drawn as boxes
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def grey_panel(width: int, height: int, text: str = "no gradient:\nno map") -> np.ndarray:
    """What stands in place of a map that does not exist: uint8 RGB (height, width, 3), grey, with words."""
    lines = text.split("\n")
    size = 0.8 * min(width / (0.62 * max(map(len, lines))), height / (1.4 * len(lines)))  # pixels of a letter
    figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="0.8")
    figure.text(0.5, 0.5, text, size=max(size, 1), ha="center", va="center", color="0.25", linespacing=1.3)
    return figure_to_array(figure)


def fit_box(aspect: float, width: float, height: float) -> tuple[float, float]:
    """The largest (width, height) of that aspect in a box."""
    width = min(width, height * aspect)
    return width, width / aspect


def panel_width(aspect: float, columns: int, rows: int, width: float, height: float) -> float:
    """Width of one picture when titled pairs of pictures fill the columns and rows of an area."""
    cell_width, cell_height = width / columns - GAP, height / rows - GAP - BAND
    if aspect < 1:  # a portrait pair stands side by side, a landscape pair one above the other
        return min((cell_width - GAP / 2) / 2, cell_height * aspect)
    return min(cell_width, (cell_height - GAP / 2) / 2 * aspect)


def best_columns(aspect: float, count: int, width: float, height: float) -> int:
    """How many columns of pairs give large pictures in few rows, with few cells left empty."""

    def merit(columns):
        rows = -(-count // columns)
        return panel_width(aspect, columns, rows, width, height) * rows**-0.5 * count / (columns * rows)

    return max(range(1, min(count, 12) + 1), key=merit)


# page


class Page:
    """A figure of a fixed width, filled from the top; `finish` makes the picture."""

    def __init__(self, width: float, families: list[str]):
        self.width, self.height, self.families = width, None, families
        self.steps = []  # functions of the figure

    def box(self, x, y, width, height) -> list[float]:
        """Inches from the top left as matplotlib's fractions from the bottom left."""
        return [x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height]

    def text(self, x, y, text, size, **style):
        """One line whose upper edge (with va="center": whose middle) is at y; no dollar sign starts a formula."""
        style = {"family": self.families, "parse_math": False, "size": size} | style
        y += 0.8 * size * LINE * ("va" not in style)  # the baseline
        self.steps.append(lambda figure: figure.text(*self.box(x, y, 0, 0)[:2], text, **style))

    def lines(self, x, y, width, text, size, span=(0, 0), **style) -> float:
        """Wrapped text with its span marked; returns the y below it."""
        for line in wrap(text, width, size, self.families):
            at = x
            for run, marked in split_at_span(text, line, span):
                advance = text_width(run, size, self.families)
                if marked:
                    self._mark(at, y, text_width(run.rstrip(), size, self.families), size * LINE)
                self.text(at, y, run, size, **style)
                at += advance
            y += size * LINE
        return y

    def _mark(self, x, y, width, height):
        def step(figure):
            left, bottom, w, h = self.box(x, y, width, height)
            figure.add_artist(Rectangle((left, bottom), w, h, facecolor=MARKER, zorder=-1))

        self.steps.append(step)

    def picture(self, x, y, width, height, array):
        """A uint8 RGB array in a thin frame."""
        size = max(1, round(width * DPI)), max(1, round(height * DPI))
        pixels = np.asarray(Image.fromarray(array).resize(size, Image.Resampling.LANCZOS))

        def step(figure):
            axes = figure.add_axes(self.box(x, y, width, height), xticks=[], yticks=[])
            axes.imshow(pixels, aspect="auto")
            axes.spines[:].set(linewidth=0.4, color="0.6")

        self.steps.append(step)

    def colour_scale(self, x, y, width, height, colours, ticks, size):
        """A horizontal bar of colours (n, 3) uint8 RGB from 0 to 1, with its ticks below."""

        def step(figure):
            axes = figure.add_axes(self.box(x, y, width, height), yticks=[])
            axes.imshow(colours[None], aspect="auto", extent=(0, 1, 0, 1))
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.tick_params(labelsize=size, length=2, width=0.5, pad=1.5)
            axes.spines[:].set(linewidth=0.4)

        self.steps.append(step)

    def plot(self, x, y, width, height, draw, **style):
        """Axes of that size, drawn upon by a function of them; `style` goes to their `set`."""

        def step(figure):
            axes = figure.add_axes(self.box(x, y, width, height))
            axes.tick_params(labelsize=SMALL, length=2, width=0.5)
            axes.spines[:].set(linewidth=0.5)
            axes.spines[["top", "right"]].set_visible(False)
            axes.xaxis.label.set_size(SMALL)
            axes.yaxis.label.set_size(SMALL)
            draw(axes)
            axes.set(**style)

        self.steps.append(step)

    def finish(self, height: float) -> np.ndarray:
        """The page cut at that height, uint8 RGB at DPI pixels per inch."""
        self.height = height
        figure = Figure(figsize=(self.width, height), dpi=DPI, facecolor="white")
        for step in self.steps:
            step(figure)
        return figure_to_array(figure)


# figures


def _text_rows(token_maps: TokenMaps) -> list[tuple[str, str, tuple[int, int]]]:
    """(label, text, marked span) of what was asked, answered and explained."""
    prompt, _ = excerpt(token_maps.prompt, (0, 0), EXCERPT["prompt"])
    answer, span = excerpt(token_maps.answer, token_maps.target_span, EXCERPT["answer"])
    target, _ = excerpt(token_maps.target, (0, 0), EXCERPT["target"])
    explained = f"{len(token_maps.target_tokens)} of {len(token_maps.tokens)} tokens, marked above: “{target}”"
    if token_maps.settings["contrast"] is not None:
        other, _ = excerpt(token_maps.settings["contrast"], (0, 0), EXCERPT["target"])
        explained += f", rather than “{other}” in its place"
    if token_maps.target == token_maps.answer:
        span, explained = (0, 0), f"the whole answer: {len(token_maps.tokens)} tokens"
    return [("Prompt", prompt, (0, 0)), ("Answer", answer, span), ("Explained", explained, (0, 0))]


def _title(token_maps: TokenMaps) -> str:
    return "Smooth " * bool(token_maps.settings["noise_std"]) + METHOD_NAMES[token_maps.settings["method"]]


def _settings_text(settings: dict) -> str:
    score = {"logit": "sum of the logits", "logprob": "sum of the log-probabilities"}[settings["score"]]
    tap = {"input": "the hidden states entering a layer", "output": "a layer's output"}[settings["tap"]]
    score += " of the explained tokens" + ", minus that of the contrast" * (settings["contrast"] is not None)
    copies, noise = settings["num_samples"], settings["noise_std"]
    norms = {"frozen": "norms frozen", "live": "norms live"}[settings["norms"]]
    smooth = f"mean of {copies} noisy cop{'y' if copies == 1 else 'ies'}, noise {noise:g}, seed {settings['seed']}"
    return (
        f"Score: {score}; method: {METHOD_NAMES[settings['method']]}, {norms}; read at {tap}; "
        f"{smooth if noise else 'no noise'}."
    )


def _caption(token_maps: TokenMaps, photo: Image.Image, layers: Iterable[int], arrangement: str, drawn: bool) -> str:
    height, width = token_maps.grid
    grey = [str(layer) for layer in layers if layer in token_maps.no_gradient]
    return (
        f"{arrangement}Each map is scaled by its own maximum (red); blue is zero, and colours do not compare the "
        f"strength of two maps. Overlays are half photo, half heatmap. {_settings_text(token_maps.settings)} "
        f"Photo: {photo.width} × {photo.height} pixels, seen as {width} × {height} image tokens."
        + f" Grey: no gradient reaches layer {', '.join(grey)} where it is read, so it has no map." * bool(grey)
        + BOXES * (not drawn)
    )


def _header(page: Page, x: float, y: float, title: str, rows) -> float:
    """Title, prompt, answer and what is explained; returns the y below them."""
    page.text(x, y, title, TITLE, weight="bold")
    y += TITLE * LINE + GAP
    for label, text, span in rows:
        page.text(x, y, label, TEXT, weight="bold")
        y = page.lines(x + LABEL, y, WIDTH - MARGIN - x - LABEL, text, TEXT, span) + GAP / 2
    return y


def _footer(page: Page, y: float, method: str, caption: str) -> float:
    """The colour bar and the caption; returns the y below them."""
    width, height, colours = 3.2, 0.11, colorize_cam(np.linspace(0, 1, 256))
    page.colour_scale((page.width - width) / 2, y, width, height, colours, (0, 0.25, 0.5, 0.75, 1), SMALL)
    y += height + SMALL * LINE + 0.05
    page.text(page.width / 2, y, f"{METHOD_NAMES[method]}, share of the map's own maximum, 0–1", SMALL, ha="center")
    y += SMALL * LINE + GAP
    return page.lines(MARGIN, y, page.width - 2 * MARGIN, caption, SMALL, color="0.3") + MARGIN


def _panel_figure(photo: Image.Image, token_maps: TokenMaps, layer: int, result: dict) -> np.ndarray:
    """The photo, the heatmap and the overlay of one layer, side by side, or one above the other if very wide."""
    rows, aspect = _text_rows(token_maps), photo.width / photo.height
    families, drawn = font_families("".join(text for _, text, _ in rows))
    panels = {"Photo": np.asarray(photo), "Heatmap": result["heatmap"], "Overlay": result["superimposed"]}
    columns = 3 if aspect < 2.5 else 1
    width, height = fit_box(aspect, (INNER - (columns - 1) * GAP) / columns, 4.5)
    pitch = max(width, 0.5) + GAP
    left = (WIDTH - columns * pitch + GAP) / 2
    page = Page(WIDTH, families)
    y = _header(page, MARGIN, MARGIN, f"{_title(token_maps)}, layer {layer}", rows) + GAP
    for i, (name, array) in enumerate(panels.items()):
        x, top = left + i % columns * pitch, y + i // columns * (BAND + height + GAP)
        page.text(x + (pitch - GAP) / 2, top, name, TEXT, ha="center")
        page.picture(x + (pitch - GAP - width) / 2, top + BAND, width, height, array)
    y += 3 // columns * (BAND + height + GAP) + GAP
    caption = _caption(token_maps, photo, [layer], "", drawn)
    return page.finish(_footer(page, y, token_maps.settings["method"], caption))


def _layer_cell(page: Page, x: float, y: float, panel: tuple[float, float], layer: int, result: dict) -> None:
    """Heatmap and overlay of a layer under its number, centred at x: a landscape pair stacked, a portrait pair not."""
    width, height = panel
    page.text(x, y, f"layer {layer}", SMALL, ha="center")
    y += BAND
    if width < height:
        page.picture(x - GAP / 4 - width, y, width, height, result["heatmap"])
        page.picture(x + GAP / 4, y, width, height, result["superimposed"])
    else:
        page.picture(x - width / 2, y, width, height, result["heatmap"])
        page.picture(x - width / 2, y + height + GAP / 2, width, height, result["superimposed"])


def _layers_figure(photo: Image.Image, token_maps: TokenMaps, results: dict, title: str, groups=None) -> np.ndarray:
    """The photo beside the text, below it heatmap and overlay of each layer; `groups` = {label: layers} are rows."""
    texts, aspect = _text_rows(token_maps), photo.width / photo.height
    families, drawn = font_families("".join(text for _, text, _ in texts))
    page = Page(WIDTH, families)
    width, height = fit_box(aspect, 2.3, 1.7)
    page.picture(MARGIN, MARGIN, width, height, np.asarray(photo))
    y = max(_header(page, MARGIN + width + 2 * GAP, MARGIN, title, texts), MARGIN + height) + 2 * GAP

    layers, body = list(results), BODY_HEIGHT * max(1, len(results) / 28)  # beyond 28 layers the page grows
    columns = max(map(len, groups.values())) if groups else best_columns(aspect, len(layers), INNER, body)
    rows = list(groups.items()) if groups else [("", layers[i : i + columns]) for i in range(0, len(layers), columns)]
    side = BAND * bool(groups)  # room for the row's label
    panel = panel_width(aspect, columns, len(rows), INNER - side, body)
    panel = panel, panel / aspect
    pair = (panel[0], 2 * panel[1] + GAP / 2) if aspect >= 1 else (2 * panel[0] + GAP / 2, panel[1])
    pitch = max(pair[0], 0.5) + GAP
    left = (WIDTH + side - columns * pitch + GAP) / 2
    for label, members in rows:
        page.text(left - BAND, y + BAND + pair[1] / 2, label, TEXT, rotation=90, ha="center", va="center")
        for i, layer in enumerate(members):
            _layer_cell(page, left + i * pitch + (pitch - GAP) / 2, y, panel, layer, results[layer])
        y += BAND + pair[1] + GAP
    arrangement = f"Of each layer the heatmap {'above' if aspect >= 1 else 'beside'} the overlay. "
    caption = _caption(token_maps, photo, layers, arrangement, drawn)
    return page.finish(_footer(page, y + GAP, token_maps.settings["method"], caption))


# figures of measures


def _layer_colours(layers: list) -> dict:
    return dict(zip(layers, colormaps["viridis"](np.linspace(0, 0.92, len(layers))), strict=True))


def _curves(measured, curves: dict, random: np.ndarray, colours: dict):
    """A function that draws the curve of each layer, and of the random orders the range and the mean."""

    def draw(axes):
        if len(random):
            axes.fill_between(measured.shares, random.min(0), random.max(0), color="0.88", linewidth=0)
            axes.plot(measured.shares, random.mean(0), color="0.45", linestyle="--", linewidth=1, label="random")
        for layer, curve in curves.items():
            axes.plot(measured.shares, curve, color=colours[layer], linewidth=1.2, label=f"layer {layer}")

    return draw


def _by_layer(layers: list, rows: dict[str, tuple[np.ndarray, str, str]], levels: dict[str, tuple[float, str]]):
    """A function that draws values by layer, {label: (values, colour, marker)}, and dashed levels."""

    def draw(axes):
        for label, (level, colour) in levels.items():
            axes.axhline(level, color=colour, linestyle="--", linewidth=0.8, label=label)
        for label, (values, colour, marker) in rows.items():
            axes.plot(layers, values, color=colour, marker=marker, markersize=3, linewidth=1.2, label=label)
        axes.set_xticks(layers if len(layers) <= 10 else spread(layers, 8))
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.26), "ncols": 2, "borderaxespad": 0}
        axes.legend(fontsize=SMALL - 1, frameon=False, handlelength=1.6, labelspacing=0.25, columnspacing=1, **below)

    return draw


INSERTION, DELETION = "#0072b2", "#d55e00"  # blue and vermilion of the Okabe-Ito palette


def draw_faithfulness(image, token_maps: TokenMaps, measured: Faithfulness, scores: list[dict]) -> np.ndarray:
    """Insertion and deletion curves, their areas by layer and, if a mask was given, how well the maps fit it.

    `scores` are rows as `test_gradcam.score_rows` makes them. Returns the figure, uint8 RGB (height, width, 3).
    """
    photo, texts = load_rgb(image), _text_rows(token_maps)
    families, drawn = font_families("".join(text for _, text, _ in texts))
    rows = [row for row in scores if row["layer"] in measured.insertion]
    layers = [row["layer"] for row in rows]
    leading = max(rows, key=lambda row: row["difference"])["layer"]
    page, colours = Page(WIDTH, families), _layer_colours(layers)
    width, height = fit_box(photo.width / photo.height, 2.3, 1.7)
    page.picture(MARGIN, MARGIN, width, height, render_cam(photo, token_maps.maps[leading])[0])
    under = f"layer {leading}, the largest difference"
    page.text(MARGIN, MARGIN + height + 0.03, under, SMALL, color="0.3")
    x = MARGIN + max(width, text_width(under, SMALL, families)) + 2 * GAP
    y = max(_header(page, x, MARGIN, f"{_title(token_maps)}: faithfulness", texts), MARGIN + height + BAND) + 3 * GAP

    margin, plot = 0.5, (2.8, 1.75)  # room for the axis' labels
    right = margin + plot[0] + 0.65
    style = {"xlim": (0, 1), "ylim": (0, 1.02), "ylabel": "probability of the explained tokens"}
    for x, name, curves, random, shown in (
        (margin, "Insertion", measured.insertion, measured.random_insertion, "revealed"),
        (right, "Deletion", measured.deletion, measured.random_deletion, "removed"),
    ):
        page.text(x + plot[0] / 2, y, name, TEXT, ha="center", weight="bold")
        label = f"share of the image tokens {shown}, hottest first"
        page.plot(x, y + BAND, *plot, _curves(measured, curves, random, colours), xlabel=label, **style)
    y += BAND + plot[1] + 0.42
    y = _layer_legend(page, y, colours, bool(len(measured.random_insertion))) + 2 * GAP

    def column(name):
        return np.array([row[name] for row in rows])

    areas = {
        "insertion": (column("insertion"), INSERTION, "o"),
        "deletion": (column("deletion"), DELETION, "s"),
    }
    levels = {}
    if len(measured.random_insertion):
        random_row = next(row for row in scores if row["layer"] == "random")
        levels["random, insertion"] = random_row["insertion"], INSERTION
        levels["random, deletion"] = random_row["deletion"], DELETION
    style = {"ylim": (-0.02, 1.02), "xlabel": "layer"}
    page.text(margin + plot[0] / 2, y, "Areas under the curves", TEXT, ha="center", weight="bold")
    page.plot(margin, y + BAND, *plot, _by_layer(layers, areas, levels), ylabel="area", **style)
    if "energy" in rows[0]:
        fits = {
            "maximum on or near the object": (column("near"), "#009e73", "^"),
            "energy inside it": (column("energy"), "#cc79a7", "o"),
            "Obj-IoU": (column("obj_iou"), "#e69f00", "s"),
        }
        page.text(right + plot[0] / 2, y, "Fit to the object's mask", TEXT, ha="center", weight="bold")
        page.plot(right, y + BAND, *plot, _by_layer(layers, fits, {}), ylabel="share", **style)
    else:
        difference = {"insertion − deletion": (column("difference"), "#009e73", "^")}
        levels = {"random": (random_row["difference"], "0.45")} if levels else {}
        style["ylim"] = min(-0.3, column("difference").min()) - 0.05, 1.02
        page.text(right + plot[0] / 2, y, "Insertion − deletion", TEXT, ha="center", weight="bold")
        page.plot(right, y + BAND, *plot, _by_layer(layers, difference, levels), ylabel="difference", **style)
    y += BAND + plot[1] + 0.42 + 2 * SMALL * LINE + 2 * GAP
    blank = {"blur": "a blurred copy of the photo", "mean": "the photo's mean colour", "black": "black"}
    orders, grey = len(measured.random_insertion), ", ".join(map(str, sorted(token_maps.no_gradient)))
    dashed = f"Dashed grey: mean of {orders} random order{'s' * (orders > 1)}, with their range. " * bool(orders)
    caption = (
        f"A map is faithful if revealing its hottest image tokens restores the answer early and removing them destroys "
        f"it early. Removed tokens show {blank[measured.baseline]}. {dashed}{_settings_text(token_maps.settings)}"
        + f" Left out: layer {grey}, as no gradient reaches it where it is read." * bool(grey)
        + BOXES * (not drawn)
    )
    return page.finish(page.lines(MARGIN, y, INNER, caption, SMALL, color="0.3") + MARGIN)


def _layer_legend(page: Page, y: float, colours: dict, random: bool) -> float:
    """One line that names the layers' colours, the first and last ones if they are many; returns the y below it."""
    layers = list(colours)
    entries = [(f"layer {layer}", colours[layer]) for layer in (layers if len(layers) <= 7 else spread(layers, 7))]
    entries += [("random", "0.45")] * random
    pitch = min(0.85, INNER / len(entries))
    x = (WIDTH - pitch * len(entries)) / 2
    for i, (label, colour) in enumerate(entries):
        page.text(x + i * pitch, y, "●", SMALL, color=colour, family="DejaVu Sans")
        page.text(x + i * pitch + 0.12, y, label, SMALL)
    return y + SMALL * LINE


def draw_randomization(image, staged: dict[int, TokenMaps], scores: list[dict]) -> np.ndarray:
    """The maps of one layer as weights are re-drawn from the top down, and their likeness by layer.

    `staged` is {re-drawn layers: maps}, `scores` rows as `test_gradcam.randomization_rows` makes them. Returns the
    figure, uint8 RGB (height, width, 3).
    """
    photo, given = load_rgb(image), staged[0]
    texts = _text_rows(given)
    families, drawn = font_families("".join(text for _, text, _ in texts))
    layers, numbers = [layer for layer in given.maps if layer not in given.no_gradient], list(staged)
    page, colours, shown = Page(WIDTH, families), _layer_colours(layers), layers[len(layers) // 2]
    title = f"{_title(given)}: does the map depend on the model?"
    y = _header(page, MARGIN, MARGIN, title, texts) + GAP

    columns = min(len(numbers), 8)
    pitch = (INNER + GAP) / columns
    width, height = fit_box(photo.width / photo.height, pitch - GAP, 2.2)
    for i, number in enumerate(numbers):
        x, top = MARGIN + i % columns * pitch, y + i // columns * (height + BAND + GAP)
        x += (pitch - GAP - width) / 2
        label = "the model" if number == 0 else f"{number} re-drawn"
        cam = staged[number].maps[shown]
        picture = grey_panel(*photo.size) if shown in staged[number].no_gradient else render_cam(photo, cam)[1]
        page.text(x + width / 2, top, label, SMALL, ha="center")
        page.picture(x, top + BAND, width, height, picture)
    y += -(-len(numbers) // columns) * (height + BAND + GAP) + 2 * GAP

    margin, plot, low = 0.55, (2.75, 1.75), min([-0.5, *(row["spearman"] for row in scores)]) - 0.05
    for x, name, column in ((margin, "Spearman's rank correlation", "spearman"), (margin + 3.5, "SSIM", "ssim")):

        def draw(axes, column=column):
            axes.axhline(0, color="0.6", linewidth=0.5)
            for layer in layers:
                values = [row[column] for row in scores if row["layer"] == layer]
                axes.plot(numbers, values, color=colours[layer], marker="o", markersize=2.5, linewidth=1.2)
            axes.set_xticks(numbers)

        page.text(x + plot[0] / 2, y, name, TEXT, ha="center", weight="bold")
        style = {"ylim": (low, 1.05), "xlabel": "decoder layers with re-drawn weights, from the top"}
        page.plot(x, y + BAND, *plot, draw, ylabel="likeness to the model's map", **style)
    y = _layer_legend(page, y + BAND + plot[1] + 0.42, colours, False) + 2 * GAP
    caption = (
        f"Above: the heatmap of layer {shown} as the weights are re-drawn from the top layer down; the last step also "
        f"re-draws the vision tower. A map that stays the same shows the picture and not what the model has learned "
        f"(Adebayo et al., 2018). {_settings_text(given.settings)}" + BOXES * (not drawn)
    )
    return page.finish(page.lines(MARGIN, y, INNER, caption, SMALL, color="0.3") + MARGIN)


# words


def name_words(word_maps: list[TokenMaps]) -> list[str]:
    """A name for each word: itself, and from its second occurrence on with a number, "dog (2)"."""
    texts = [word.target for word in word_maps]
    return [text + f" ({texts[: i + 1].count(text)})" * (text in texts[:i]) for i, text in enumerate(texts)]


def _columns_of_text(word_maps: list[TokenMaps]) -> list[tuple[str, str]]:
    """Of each word what the answer says between the one before and it, and it with the punctuation behind it."""
    answer, columns, end = word_maps[0].answer, [], 0
    for i, word in enumerate(word_maps):
        start, stop = word.target_span
        before, end = answer[min(end, start) : start].strip(), stop
        following = word_maps[i + 1].target_span[0] if i + 1 < len(word_maps) else len(answer)
        while end < following and not (answer[end].isspace() or answer[end].isalnum()):
            end += 1
        columns.append((before, answer[start:end]))
    return columns


def _word_heads(page: Page, xs: list[float], y: float, width: float, heads: list[tuple[str, str]]) -> float:
    """Over each column what the answer says before its word, in grey, and the word; returns the y below them."""
    texts = [(excerpt(before, (len(before),) * 2, 44)[0], excerpt(word, (0, 0), 44)[0]) for before, word in heads]
    widths = width, 0.87 * width  # letters are wider in bold
    lines = [
        [wrap(text, limit, SMALL, page.families) if text else [] for text, limit in zip(head, widths, strict=True)]
        for head in texts
    ]
    middle = y + max(len(before) for before, _ in lines) * SMALL * LINE  # the words stand on one line
    for x, (before, word), (above, below) in zip(xs, texts, lines, strict=True):
        for i, line in enumerate(above):
            page.text(x, middle - (len(above) - i) * SMALL * LINE, before[slice(*line)].strip(), SMALL, color="0.45")
        for i, line in enumerate(below):
            page.text(x, middle + i * SMALL * LINE, word[slice(*line)].strip(), SMALL, weight="bold")
    return middle + max(len(below) for _, below in lines) * SMALL * LINE


def _words_figure(photo: Image.Image, word_maps: list[TokenMaps], results: list[dict]) -> np.ndarray:
    """Words across, layers down, overlays in the cells; of long answers ten words stand side by side."""
    given, layers, aspect = word_maps[0], list(word_maps[0].maps), photo.width / photo.height
    prompt, answer, _ = (text for _, text, _ in _text_rows(given))
    families, drawn = font_families(prompt + answer + given.answer)
    columns = min(len(word_maps), 10)
    side, cell = 0.55, min(1.5, max(1.0, (INNER - 0.55) / columns - GAP))  # of the layers' labels, of a picture
    width, height = fit_box(aspect, cell, 1.5 if len(layers) <= AUTO_LAYERS else 1.0)
    cell = max(width, min(cell, 1.0))  # a word needs its room
    page = Page(max(WIDTH, 2 * MARGIN + side + columns * (cell + GAP)), families)
    photo_width, photo_height = fit_box(aspect, 2.3, 1.4)
    page.picture(MARGIN, MARGIN, photo_width, photo_height, np.asarray(photo))
    x, y = MARGIN + photo_width + 2 * GAP, MARGIN
    page.text(x, y, f"{_title(given)}, word by word", TITLE, weight="bold")
    y += TITLE * LINE + GAP
    for label, text in (("Prompt", prompt), ("Answer", answer)):
        page.text(x, y, label, TEXT, weight="bold")
        y = page.lines(x + LABEL, y, page.width - MARGIN - x - LABEL, text, TEXT) + GAP / 2
    y = max(y, MARGIN + photo_height) + 2 * GAP

    heads = _columns_of_text(word_maps)
    for first in range(0, len(word_maps), columns):
        row = range(first, min(first + columns, len(word_maps)))
        xs = [MARGIN + side + (i - first) * (cell + GAP) for i in row]
        y = _word_heads(page, xs, y, cell, [heads[i] for i in row]) + GAP / 2
        for layer in layers:
            page.text(MARGIN, y + height / 2, f"layer {layer}", SMALL, va="center")
            for x, i in zip(xs, row, strict=True):
                page.picture(x, y, width, height, results[i][layer]["superimposed"])
            y += height + GAP
        y += 2 * GAP
    caption = _caption(given, photo, [], "Each column explains one word of the answer. ", drawn)
    grey = any(word.no_gradient for word in word_maps)
    caption += " Grey: no gradient reaches the layer where it is read, so it has no map." * grey
    return page.finish(_footer(page, y, given.settings["method"], caption))


PAGE_SIDE = 1600  # pixels of the longer side of the photo in the page


def page_data(image, file_name: str, word_maps: list[TokenMaps], probabilities: list[list[float]], tokens) -> dict:
    """What the page of the words shows, as plain values: see words_page.html for its use.

    Raw maps are stored as their maximum and the share of it in 16 bits, little-endian, base64.
    """
    photo, given = load_rgb(image), word_maps[0]
    photo.thumbnail((PAGE_SIDE, PAGE_SIDE))
    encoded = io.BytesIO()
    photo.save(encoded, "JPEG", quality=90)

    def pack(cam):
        return base64.b64encode(np.round(65535 * normalize_cam(cam)).astype("<u2").tobytes()).decode()

    return {
        "photo": "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode(),
        "width": photo.width,
        "height": photo.height,
        "file_name": file_name,
        "prompt": given.prompt,
        "answer": given.answer,
        "grid": list(given.grid),
        "layers": list(given.maps),
        "settings": _settings_text(given.settings),
        "words": [
            {
                "text": word.target,
                "start": word.target_span[0],
                "end": word.target_span[1],
                "tokens": token,
                "probabilities": probability,
                "maps": ["" if layer in word.no_gradient else pack(cam) for layer, cam in word.maps.items()],
                "maxima": [float(cam.max()) for cam in word.maps.values()],
            }
            for word, probability, token in zip(word_maps, probabilities, tokens, strict=True)
        ],
    }


def words_page(data: dict) -> str:
    """The page with its data, which can end neither the script it stands in nor a line of it."""
    template = Path(__file__).with_name("words_page.html").read_text(encoding="utf-8")
    text = json.dumps(data, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return template.replace("__DATA__", text)


def draw_words(
    image, file_name: str, word_maps: list[TokenMaps], probabilities: list[list[float]], tokens: list[list[str]]
) -> tuple[dict, dict[str, object]]:
    """Of all words ({name: {layer: {"superimposed", "heatmap", "cam"}}}, {file name: picture, text or arrays}).

    `probabilities` and `tokens` are those of each word's tokens; `file_name` is the photo's, for the page.
    """
    photo, given, names = load_rgb(image), word_maps[0], name_words(word_maps)
    results = [render_layers(photo, word) for word in word_maps]
    records = [
        {
            "name": name,
            "word": word.target,
            "span": list(word.target_span),
            "tokens": token,
            "token_ids": [word.tokens[i] for i in word.target_tokens],
            "probabilities": probability,
            "maxima": {str(layer): float(cam.max()) for layer, cam in word.maps.items()},
            "no_gradient": sorted(word.no_gradient),
        }
        for name, word, probability, token in zip(names, word_maps, probabilities, tokens, strict=True)
    ]
    about = {"prompt": given.prompt, "answer": given.answer, "grid": list(given.grid), "layers": list(given.maps)}
    about |= {"settings": given.settings, "words": records}
    files = {
        "words_by_layer.png": _words_figure(photo, word_maps, results),
        "index.html": words_page(page_data(photo, file_name, word_maps, probabilities, tokens)),
        "words.json": json.dumps(about, ensure_ascii=False, indent=1) + "\n",
        "maps.npz": {
            "maps": np.stack([np.stack(list(word.maps.values())) for word in word_maps]),  # (words, layers, H, W)
            "layers": np.array(list(given.maps)),
            "words": np.array(names),
            "spans": np.array([word.target_span for word in word_maps]),
        },
    }
    return dict(zip(names, results, strict=True)), files


# the files of each mode: {name in the mode's folder: picture}


def _layer_files(results: dict, folder: str = "") -> dict[str, np.ndarray]:
    return {
        f"{folder}layer_{layer}_{kind}.png": result[kind]
        for layer, result in results.items()
        for kind in ("heatmap", "superimposed")
    }


def draw_single(image, token_maps: TokenMaps) -> tuple[dict, dict[str, np.ndarray]]:
    """One layer's ({"superimposed", "heatmap", "cam"}, {file name: uint8 RGB array})."""
    photo = load_rgb(image)
    ((layer, result),) = render_layers(photo, token_maps).items()
    return result, {
        "original_image.png": np.asarray(photo),
        "heatmap.png": result["heatmap"],
        "superimposed_result.png": result["superimposed"],
        "visualization.png": _panel_figure(photo, token_maps, layer, result),
    }


def draw_grid(image, token_maps: TokenMaps) -> tuple[dict, dict[str, np.ndarray]]:
    """Of all maps ({layer: {"superimposed", "heatmap", "cam"}}, {file name: uint8 RGB array})."""
    photo = load_rgb(image)
    results = render_layers(photo, token_maps)
    figure = _layers_figure(photo, token_maps, results, f"{_title(token_maps)} by layer")
    return results, {"layer_comparison_grid.png": figure} | _layer_files(results)


def draw_multilayer(image, token_maps: TokenMaps) -> tuple[dict, dict[str, np.ndarray]]:
    """As `draw_grid`, with the photo and under the names of the multi-layer mode."""
    results, files = draw_grid(image, token_maps)
    figure = files.pop("layer_comparison_grid.png")
    return results, {"original_image.png": np.asarray(load_rgb(image)), "all_layers_comparison.png": figure} | files


def draw_comparative(image, token_maps: TokenMaps, thirds: dict[str, list[int]]) -> tuple[dict, dict[str, np.ndarray]]:
    """Of the layers of {"early", "middle", "late"} the same dictionary with pictures for layers, and the files.

    Each third has a folder with a grid of its own; `comparative_analysis.png` stands over the three.
    """
    photo, title = load_rgb(image), _title(token_maps)
    results = render_layers(photo, token_maps)
    groups = {f"{name} layers": layers for name, layers in thirds.items()}
    files = {
        "comparative_analysis.png": _layers_figure(
            photo, token_maps, results, f"{title}: early, middle and late layers", groups
        )
    }
    parts = {name: {layer: results[layer] for layer in layers} for name, layers in thirds.items()}
    for name, part in parts.items():
        figure = _layers_figure(photo, token_maps, part, f"{title}, {name} layers")
        files |= {f"{name}/layer_comparison_grid.png": figure} | _layer_files(part, f"{name}/")
    return parts, files


# files


def _encode(content) -> bytes:
    if callable(content):  # a picture that is drawn only now, so that not all of them are in memory at once
        content = content()
    if isinstance(content, str):
        return content.encode()
    buffer = io.BytesIO()
    if isinstance(content, dict):
        np.savez_compressed(buffer, **content)
    else:  # as small as level 6, in half the time
        Image.fromarray(content).save(buffer, "PNG", dpi=(DPI, DPI), compress_level=4)
    return buffer.getvalue()


def _stage(path: Path, name: str, content) -> None:
    data = _encode(content)
    try:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(data)
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path).free / 1e6
        raise OSError(
            f"no space left for {name} in {path.parent}: it takes {len(data) / 1e6:.1f} MB, {free:.1f} MB are free"
        ) from exc


def _make_folders(folder: Path, made: list[Path]) -> None:
    """Make the folder and those missing above it; `made` gets each that was made here."""
    for path in (*reversed(folder.parents), folder):
        if not path.is_dir():
            with suppress(FileExistsError):  # another run was quicker
                path.mkdir()
                made.append(path)
            if not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def _hold(folder: Path) -> int | None:
    """An open file that keeps other runs out of the folder until it is closed, if only by the end of this process.

    None where the system cannot lock folders.
    """
    if fcntl is None:
        return None
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(held)
        if not isinstance(exc, BlockingIOError):  # a network disk without locks
            return None
        who = ", ".join(f"process {path.name.removeprefix(STAGING)}" for path in _staging_folders(folder))
        raise BlockingIOError(f"{folder} is being written by {who or 'another run'}: choose another folder") from exc
    return held


def _staging_folders(folder: Path) -> list[Path]:
    return [
        path
        for path in folder.glob(f"{STAGING}*")
        if path.name.removeprefix(STAGING).isdecimal() and path.is_dir() and not path.is_symlink()
    ]


def _remove_staging(staging: Path) -> None:
    """Remove a staging folder: its files, and those of the folders in it, which is as deep as runs write."""
    parts = [path for path in staging.iterdir() if path.is_dir() and not path.is_symlink()]
    for part in (*parts, staging):
        for path in part.iterdir():
            if path not in parts:
                path.unlink()
        part.rmdir()


def _check_path(save_dir, name: str = "save_dir") -> Path:
    """The folder without links and `..`. Raises ValueError for what is no path or a link that leads nowhere."""
    if not isinstance(save_dir, (str, os.PathLike)) or not str(save_dir).strip() or "\0" in str(save_dir):
        raise ValueError(f"{name}={save_dir!r} must be the path of a folder")
    given = Path(save_dir).absolute()
    for path in (given, *given.parents):
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{path} is a symbolic link that leads nowhere: choose another folder")
    return Path(os.path.realpath(given))


@contextmanager
def _signals_wait():
    """Inside, Ctrl-C and SIGTERM wait until the end, so that nothing is left half done."""
    if threading.current_thread() is not threading.main_thread():  # which is where Python handles signals
        yield
        return
    caught = []
    before = {number: signal.signal(number, lambda *args: caught.append(args)) for number in (SIGINT, SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number, _ in caught:
        signal.raise_signal(number)


@contextmanager
def output_folder(save_dir, subfolders: Iterable[str] = ()):
    """The folder that a run writes to, its own until the end; yields a function that writes {name: content}.

        with output_folder("cam_results/grid") as write:
            paths = write({"heatmap.png": picture})

    A content is a uint8 RGB array (.png), a dictionary of arrays (.npz), a text, or a function that gives one of them,
    called when its file's turn comes. Files are written to a staging folder in the folder and then moved into place all
    at once: a failure, Ctrl-C or SIGTERM leaves nothing behind. Nothing is ever removed but this staging folder, such
    folders of runs that were killed, and empty folders that this run made; nothing is replaced but files of the names
    that are written. `subfolders` are those that the names will need.

    Raises ValueError if the path cannot be a folder, BlockingIOError if another run is writing there (where the system
    can lock folders; Windows cannot), and OSError if it cannot be written.
    """
    folder, made, staging, held = _check_path(save_dir), [], None, None
    try:
        _make_folders(folder, made)
        for part in (folder / part for part in subfolders):
            if os.path.lexists(part) and not (part.is_dir() and os.access(part, os.W_OK)):
                raise ValueError(f"{part} cannot be written, or is no folder: choose another folder")
        held = _hold(folder)
        for stale in _staging_folders(folder) if held is not None else ():  # whoever made them is no longer there
            _remove_staging(stale)
        staging = folder / f"{STAGING}{os.getpid()}"
        staging.mkdir()
        yield functools.partial(_write, folder, staging, made)
    finally:
        with _signals_wait():
            if staging is not None and staging.is_dir():
                _remove_staging(staging)
            for path in reversed(made):
                with suppress(OSError):  # it is not empty
                    path.rmdir()
            if held is not None:
                os.close(held)


def _write(folder: Path, staging: Path, made: list[Path], files: dict[str, object]) -> list[Path]:
    for name in files:
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name} is a folder where a file is to be written: choose another folder")

    with ThreadPoolExecutor(min(4, os.cpu_count())) as pool:  # compression takes longest
        list(pool.map(functools.partial(_stage, staging), files, files.values()))
    with _signals_wait():
        for name in files:
            _make_folders((folder / name).parent, made)
            (staging / name).replace(folder / name)
    return [folder / name for name in files]


def write_files(folder, files: dict[str, object]) -> list[Path]:
    """Write {name in the folder: content} as `output_folder` does; returns the paths."""
    with output_folder(folder) as write:
        return write(files)


def earlier_files(paths: list[Path]) -> list[Path]:
    """What an earlier run left beside the given files: it may tell of another photo."""
    found = {path for parent in {path.parent for path in paths} for path in parent.iterdir()}
    return sorted(path for path in found - set(paths) if EARLIER.fullmatch(path.name))


# the documented entry points


def show_progress(quiet: bool, what: str = "noisy copies", unit: str = "copy"):
    """A tqdm bar, silent if `quiet` or where stderr is no terminal."""
    return functools.partial(tqdm, desc=what, unit=unit, leave=False, disable=True if quiet else None)


def create_layer_comparison_grid(
    model, processor, image, prompt, layer_range="auto", save_dir="cam_results_grid",
    *, num_samples=5, noise_std=0.1, quiet=False, **settings,
):  # fmt: skip
    """Grid of heatmaps and overlays over a range of layers, all from one answer and one pass.

    `image` is a path or PIL image; `layer_range` is "auto" (six layers), "early", "middle", "late" (thirds), "all" or
    a list of indices. `settings` are further keywords of `compute_token_maps`. Writes layer_comparison_grid.png,
    layer_<i>_heatmap.png and layer_<i>_superimposed.png.

    Returns {layer: {"superimposed", "heatmap", "cam"}}: uint8 RGB (height, width, 3) twice, and the raw map, float32
    (H, W). A layer without gradient has a grey panel and a zero map. Raises what `compute_token_maps` raises,
    ValueError for layers that do not exist, OSError if the folder cannot be written.
    """
    layers = select_layers(layer_range, get_model_layers(model)[1])
    settings |= {"num_samples": num_samples, "noise_std": noise_std, "progress": show_progress(quiet)}
    with output_folder(save_dir) as write:
        results, files = draw_grid(image, compute_token_maps(model, processor, image, prompt, layers, **settings))
        write(files)
    return results


def visualize_multiple_layers(
    model, processor, image, prompt, layer_indices=None, save_dir="cam_results_multilayer",
    *, num_samples=5, noise_std=0.1, quiet=False, **settings,
):  # fmt: skip
    """Heatmaps and overlays of the given layers (six representative ones for None), as the grid otherwise.

    Writes original_image.png, all_layers_comparison.png, layer_<i>_heatmap.png and layer_<i>_superimposed.png.
    Further arguments, result and errors are those of `create_layer_comparison_grid`.
    """
    layers = select_layers("auto" if layer_indices is None else layer_indices, get_model_layers(model)[1])
    settings |= {"num_samples": num_samples, "noise_std": noise_std, "progress": show_progress(quiet)}
    with output_folder(save_dir) as write:
        results, files = draw_multilayer(image, compute_token_maps(model, processor, image, prompt, layers, **settings))
        write(files)
    return results


def create_comparative_analysis(
    model, processor, image, prompt, save_dir="cam_results_comparative",
    *, num_samples=5, noise_std=0.1, quiet=False, **settings,
):  # fmt: skip
    """Early, middle and late layers side by side, up to three of each third, all from one answer and one pass.

    Writes comparative_analysis.png, and a grid with its layers' files to each of early/, middle/ and late/.
    Returns {"early": {layer: ...}, "middle": {...}, "late": {...}} with dictionaries as those of
    `create_layer_comparison_grid`, whose further arguments and errors these are.
    """
    thirds = representative_thirds(get_model_layers(model)[1])
    layers = [layer for part in thirds.values() for layer in part]
    settings |= {"num_samples": num_samples, "noise_std": noise_std, "progress": show_progress(quiet)}
    with output_folder(save_dir, thirds) as write:
        token_maps = compute_token_maps(model, processor, image, prompt, layers, **settings)
        results, files = draw_comparative(image, token_maps, thirds)
        write(files)
    return results


def create_word_maps(
    model, processor, image, prompt, layer_range="auto", save_dir="cam_results_words",
    *, words="content", num_samples=5, noise_std=0.1, quiet=False, **settings,
):  # fmt: skip
    """A map of each word of the answer at each layer, all from one answer and one forward pass per noisy copy.

    `words` is "content" (all but function words), "all", or the words, as a list or as "dog,apple"; `layer_range` as in
    `create_layer_comparison_grid`, `settings` as there but target, target_occurrence and contrast. Writes
    words_by_layer.png (words across, layers down), index.html (a page that shows each word's map at a touch; it needs
    no network), words.json (tokens, spans, probabilities) and maps.npz (the raw maps).

    Returns {word: {layer: {"superimposed", "heatmap", "cam"}}}, the second "dog" as "dog (2)". Raises what
    `compute_word_maps` raises, and OSError if the folder cannot be written.
    """
    layers = select_layers(layer_range, get_model_layers(model)[1])
    settings |= {"num_samples": num_samples, "noise_std": noise_std, "progress": show_progress(quiet)}
    file_name = Path(image).name if isinstance(image, (str, Path)) else ""
    with output_folder(save_dir) as write:
        word_maps = compute_word_maps(model, processor, image, prompt, layers, words=words, **settings)
        results, files = draw_words(image, file_name, word_maps, *word_tokens(model, processor, image, word_maps))
        write(files)
    return results
