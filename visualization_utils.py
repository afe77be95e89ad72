"""Figures of Grad-CAM maps over the layers of a Qwen2.5-VL, for reading and for printing.

    photo, prompt -> TokenMaps          compute_token_maps: one pass for all layers
      -> {layer: pictures}              LayerPictures: heatmap and overlay in the photo's own size, drawn when asked for
      -> {file name: picture}           draw_...: these, and a figure over all of them, laid out on a Page
      -> files                          output_folder: all of them or none

The drawing functions take a photo, `TokenMaps` and a `Look`, and know nothing of models.

Shapes:  H, W  rows and columns of image tokens     height, width  pixels of the photo     Lengths: inches of the page
"""

import csv
import errno
import functools
import io
import os
import shutil
import signal
import threading
import unicodedata
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from signal import SIGINT, SIGTERM

import numpy as np
from matplotlib import font_manager, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from matplotlib.ticker import AutoLocator
from matplotlib.transforms import Affine2D
from PIL import Image
from tqdm.auto import tqdm

from smooth_gradcam import (
    Look,
    Settings,
    SmoothQwenGradCAM,  # noqa: F401  (users import it from here)
    TokenMaps,
    check_whole,
    colorize_cam,
    compute_token_maps,
    get_model_layers,
    load_rgb,
    opacity_of,
    overlay_cam,
    render_cam,
    render_heatmap,
    resolve_layers,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = [
    *("create_layer_comparison_grid", "visualize_multiple_layers", "create_comparative_analysis"),
    *("SmoothQwenGradCAM", "get_model_layers", "LayerPictures", "output_folder"),
    *("draw_single", "draw_grid", "draw_multilayer", "draw_comparative", "Paper"),
]

LAYER_RANGES = ("auto", "early", "middle", "late", "all")
AUTO_LAYERS, LAYERS_PER_THIRD = 6, 3  # representative layers of "auto", and of a third in the comparative analysis

WIDTHS = {"page": 7.2, "column": 3.3}  # both columns of a paper, or one
VECTOR_FORMATS = ("pdf", "svg")
BODY_HEIGHTS = {"page": 7.0, "column": 5.5}  # what header and caption leave of a paper's page
MARGIN = 0.12
GAP, BAND, HEAD = 0.08, 0.18, 0.27  # between pictures; the line that a title stands on; two lines, with the maximum
LABELS = 0.43  # left of a plot, for the numbers and the name of its axis
DPI, LINE = 200, 1.35 / 72  # line: its height per point of text
MARKER = "#ffe08a"  # behind the explained part of the answer
TEXT, SMALL, TINY, TITLE = 8, 7, 6, 11  # points; journals ask for 6 at least
LABEL = 0.75  # width of the column that says "Prompt", "Answer", "Explained"
EXCERPT = {"prompt": 300, "answer": 420, "target": 80}  # columns of text shown of each
STAGING = ".smooth-gradcam-"  # with the process' number behind it, the folder for files that are not finished
METHOD_NAMES = {
    "gradcam": "Grad-CAM",
    "hirescam": "HiResCAM",
    "product": "Grad-CAM × HiResCAM",
    "paper": "Grad-CAM as published",
}


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


def comparative_layers(total: int, layers_per_third: int | None = LAYERS_PER_THIRD) -> dict[str, list[int]]:
    """What the comparative analysis shows of each third: this many layers, evenly spaced, or all of them for None."""
    if layers_per_third is not None:
        check_whole("layers_per_third", layers_per_third, 1)
    return {name: spread(layers, layers_per_third or len(layers)) for name, layers in split_thirds(total).items()}


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


PLAIN = Look()
WEAK = 0.05  # of the strongest map of its kind: less is said to be weak


def strongest_of(words: Iterable[TokenMaps]) -> float:
    """The largest value of all maps of a figure: computed once, as there may be thousands."""
    return max(float(cam.max()) for word in words for cam in word.maps.values())


def peak_of(token_maps: TokenMaps, layer, look: Look, strongest: float | None = None) -> float:
    """The raw value that has full colour in the picture of a layer; `strongest` as of `draw_layer`."""
    if look.scale == "map":
        return float(token_maps.maps[layer].max())
    return strongest_of([token_maps]) if look.scale == "word" or strongest is None else strongest


def strength(token_maps: TokenMaps, layer, strongest: float | None = None) -> str:
    """The map's maximum in small print, and that it is weak beside the strongest of the maps; or why there is none."""
    if layer in token_maps.blank:
        return token_maps.blank[layer]
    own, strongest = (peak_of(token_maps, layer, Look(scale=scale), strongest) for scale in ("map", "all"))
    number = f"{own:#.2g}".rstrip(".")
    return f"max {number}" + (", weak" if own < WEAK * strongest else "")


def draw_layer(
    photo: Image.Image, token_maps: TokenMaps, layer, overlay: bool, look: Look = PLAIN, strongest: float | None = None
) -> np.ndarray:
    """The layer's heatmap, or the photo under it, in the photo's size; a grey panel with words if it has no map.

    `strongest` is `strongest_of` all maps of the figure, for None of these.
    """
    if layer in token_maps.blank:
        return grey_panel(*photo.size, f"{token_maps.blank[layer]}:\nno map")
    cam, peak = token_maps.maps[layer], peak_of(token_maps, layer, look, strongest)
    return render_cam(photo, cam, look, peak)[0] if overlay else render_heatmap(cam, photo.size[::-1], look, peak)


class LayerPictures(Mapping):
    """{"superimposed", "heatmap", "cam"} of one layer, drawn whenever they are asked for: many would fill the memory.

    The first two are uint8 RGB (height, width, 3) in the photo's own size, a grey panel where there is no map; the last
    is the raw map, float32 (H, W).
    """

    def __init__(self, photo: Image.Image, token_maps: TokenMaps, layer, look: Look = PLAIN, strongest=None):
        self.photo, self.token_maps, self.layer, self.look, self.strongest = photo, token_maps, layer, look, strongest

    def __getitem__(self, name: str) -> np.ndarray:
        if name == "cam":
            return self.token_maps.maps[self.layer]
        if name not in self:
            raise KeyError(name)
        overlay = name == "superimposed"
        return draw_layer(self.photo, self.token_maps, self.layer, overlay, self.look, self.strongest)

    def __contains__(self, name) -> bool:
        return name in tuple(self)

    def __iter__(self):
        return iter(("superimposed", "heatmap", "cam"))

    def __len__(self) -> int:
        return 3


def layer_pictures(
    photo: Image.Image, token_maps: TokenMaps, look: Look = PLAIN, strongest: float | None = None
) -> dict[int, LayerPictures]:
    """{layer: its pictures} of every map, in their order."""
    return {layer: LayerPictures(photo, token_maps, layer, look, strongest) for layer in token_maps.maps}


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
    before, after = "… " if start else "", " …" if start + limit < len(text) else ""
    shift = len(before) - start
    end = start + limit
    word = text.rfind(" ", max(end - 20, span[1]), end) if after else -1  # nor at the end
    cut = before + text[start : end if word < 0 else word] + after
    return cut, (span[0] + shift, min(span[1] + shift, len(cut) - len(after)))


@functools.cache
def _characters_of(path: str) -> frozenset:
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (RuntimeError, OSError):
        return frozenset()


@functools.cache
def _add_new_fonts() -> None:
    """Let matplotlib know the fonts that were installed after it had made its list."""
    known = {font.fname for font in font_manager.fontManager.ttflist}
    for path in set(font_manager.findSystemFonts()) - known:
        with suppress(OSError, RuntimeError):  # a font that it cannot read
            font_manager.fontManager.addfont(path)


@functools.cache
def font_families(text: str) -> tuple[list[str], bool]:
    """Installed font families that together can draw the text, and whether they draw all of it."""
    missing = {ord(c) for c in text if not c.isspace()}
    families = ["DejaVu Sans"]
    missing -= _characters_of(font_manager.findfont("DejaVu Sans"))
    if missing:
        _add_new_fonts()
    for font in font_manager.fontManager.ttflist if missing else ():
        found = missing & _characters_of(font.fname)
        if found and "LastResort" not in font.fname and font.style == "normal":
            families.append(font.name)
            missing -= found
    return families, not missing


def text_width(text: str, size: float, families: list[str], weight: str = "normal") -> float:
    """Inches that the text takes on one line, in pictures and in vector files: letters are not fitted to pixels."""
    font = font_manager.FontProperties(family=families, size=size, weight=weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that no installed font has
        return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72


def wrap(text: str, width: float, size: float, families: list[str], weight: str = "normal") -> list[tuple[int, int]]:
    """(start, end) of each line, broken at blanks where there are any and between characters where not."""
    lines, start = [], 0
    while start < len(text):
        fits, over = start + 1, len(text) + 1
        while over - fits > 1:  # bisection: text[start:fits] fits, text[start:over] does not
            middle = (fits + over) // 2
            inside = text_width(text[start:middle].rstrip(), size, families, weight) <= width
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
    with rc_context({"text.hinting": "none"}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that no installed font has: drawn as boxes
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def grey_panel(width: int, height: int, text: str) -> np.ndarray:
    """What stands in place of a map that does not exist: uint8 RGB (height, width, 3), grey, with words.

    The words are left out where they could not be read in print.
    """
    words, figure = text.split(), Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="0.8")
    breaks = [text.split("\n"), words]  # as it stands, or a word on each line
    sizes = [min(0.8 * width / (0.62 * max(map(len, lines))), 0.8 * height / (1.4 * len(lines))) for lines in breaks]
    size, lines = max(zip(sizes, breaks, strict=True))  # pixels of a letter
    if size >= TINY * DPI / 72:
        figure.text(0.5, 0.5, "\n".join(lines), size=size, ha="center", va="center", color="0.25", linespacing=1.3)
    return figure_to_array(figure)


def fit_box(aspect: float, width: float, height: float) -> tuple[float, float]:
    """The largest (width, height) of that aspect in a box."""
    width = min(width, height * aspect)
    return width, width / aspect


def panel_width(aspect: float, columns: int, rows: int, width: float, height: float, across: int, down: int) -> float:
    """Width of a picture when titled cells of so many pictures across and down fill the columns and rows of an area."""
    cell_width, cell_height = width / columns - GAP, height / rows - GAP - HEAD
    return min((cell_width - (across - 1) * GAP / 2) / across, (cell_height - (down - 1) * GAP / 2) / down * aspect)


def best_columns(aspect: float, count: int, most: int, width: float, height: float, across: int, down: int) -> int:
    """How many columns of cells, `most` at most, give large pictures in few rows, with few cells left empty."""

    def merit(columns):
        rows = -(-count // columns)
        return panel_width(aspect, columns, rows, width, height, across, down) * rows**-0.5 * count / (columns * rows)

    return max(range(1, min(count, most) + 1), key=merit)


# page


@dataclass(frozen=True)
class Paper:
    """What figures are made for.

    `width` is "page" (7.2 inches, both columns of a paper) or "column" (3.3 inches); no text is smaller than 6 points
    there. `formats` are written beside each figure's PNG: "pdf", "svg". With `heatmaps`, grids show the heatmap of
    each layer above or beside its overlay. Raises ValueError for anything else.
    """

    width: str = "page"
    formats: tuple[str, ...] = ()
    heatmaps: bool = False

    def __post_init__(self):
        if self.width not in WIDTHS:
            raise ValueError(f"width={self.width!r} must be one of {', '.join(WIDTHS)}")
        if isinstance(self.formats, str) or not set(self.formats) <= set(VECTOR_FORMATS):
            raise ValueError(f"formats={self.formats!r} must be a tuple of {', '.join(VECTOR_FORMATS)}")
        if not isinstance(self.heatmaps, bool):
            raise ValueError(f"heatmaps={self.heatmaps!r} must be True or False")

    def figure(self, name: str, draw) -> dict[str, object]:
        """{file name: function that draws it} of a figure in all formats."""
        return {f"{name}.{suffix}": draw for suffix in ("png", *self.formats)}


PAGE = Paper()


def check_drawing(look, paper) -> None:
    """Raises TypeError, before anything is computed, unless they are a `Look` and a `Paper`."""
    if not isinstance(look, Look):
        raise TypeError(f'look={look!r} must be a Look, such as Look(colormap="jet")')
    if not isinstance(paper, Paper):
        raise TypeError(f'paper={paper!r} must be a Paper, such as Paper("column")')


class Page:
    """A figure of a fixed width that is drawn upon from the top; `finish` says how long it is.

    `text` is what it will have to be able to write; all lengths are inches, from the top left. `numpy.asarray` gives
    its pixels, uint8 RGB (height, width, 3) at DPI pixels per inch, `vector` a file of one of `VECTOR_FORMATS`.
    """

    def __init__(self, width: float, text: str):
        self.width, self.inner = width, width - 2 * MARGIN  # inner: between the margins
        self.families, self.complete = font_families(text)
        self.figure = Figure(figsize=(width, 1), dpi=DPI, facecolor="white")
        self.from_top = Affine2D().scale(1, -1)
        self.inches = self.from_top + self.figure.dpi_scale_trans
        self.boxes = {}  # axes: where they are

    def axes(self, x, y, width, height):
        """Bare axes of that size, to be drawn upon."""
        axes = self.figure.add_axes((0, 0, 1, 1), xticks=[], yticks=[])
        axes.spines[:].set(linewidth=0.4, color="0.6")
        axes.tick_params(labelsize=SMALL, length=2, width=0.5)
        self.boxes[axes] = x, y, width, height
        return axes

    def text(self, x, y, text, size, **style):
        """One line whose upper edge (with va="center": whose middle) is at y; no dollar sign starts a formula."""
        style = {"family": self.families, "parse_math": False, "size": size} | style
        if "va" not in style:
            y += 0.8 * size * LINE  # the baseline
        self.figure.text(x, y, text, transform=self.inches, **style)

    def lines(self, x, y, width, text, size, span=(0, 0), **style) -> float:
        """Wrapped text with its span marked; returns the y below it."""
        weight = style.get("weight", "normal")
        for line in wrap(text, width, size, self.families, weight):
            at = x
            for run, marked in split_at_span(text, line, span):
                if marked:
                    box = text_width(run.rstrip(), size, self.families), size * LINE
                    mark = Rectangle((at, y), *box, facecolor=MARKER, zorder=-1, transform=self.inches)
                    self.figure.add_artist(mark)
                self.text(at, y, run, size, **style)
                at += text_width(run, size, self.families, weight)
            y += size * LINE
        return y

    def label(self, middle, y, name, largest) -> None:
        """Two lines over the middle of a picture, HEAD high: its name, and the map's strength in small print."""
        self.text(middle, y, name, SMALL, ha="center")
        self.text(middle, y + SMALL * LINE, largest, TINY, ha="center", color="0.3")

    def label_width(self, name, largest) -> float:
        """Inches that the `label` takes."""
        return max(text_width(name, SMALL, self.families), text_width(largest, TINY, self.families))

    def centred(self, y, text, size, **style) -> float:
        """Wrapped text in the middle of the page; returns the y below it."""
        for start, end in wrap(text, self.inner, size, self.families):
            self.text(self.width / 2, y, text[start:end].strip(), size, ha="center", **style)
            y += size * LINE
        return y

    def picture(self, x, y, width, height, array):
        """A uint8 RGB array in a thin frame; returns its axes, in pixels."""
        size = pixels_of(width, height)
        if array.shape[1::-1] != size:
            array = np.asarray(Image.fromarray(array).resize(size, Image.Resampling.LANCZOS))
        axes = self.axes(x, y, width, height)
        axes.imshow(array, aspect="auto")
        return axes

    def colour_scale(self, x, y, width, height, colours, ticks, size):
        """Horizontal bars of colours (n, 3) uint8 RGB from 0 to 1, one above the other, with their ticks below."""
        axes = self.axes(x, y, width, height)
        axes.imshow(np.stack(colours), aspect="auto", extent=(0, 1, 0, 1), interpolation="nearest")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.tick_params(labelsize=size, pad=1.5)
        axes.spines[:].set(color="black")

    def legend(self, y, entries: dict[str, object]) -> float:
        """Names in their colours, in as few lines as they fit in; returns the y below them."""
        pitch = 0.32 + max(text_width(label, SMALL, self.families) for label in entries)
        rows = -(-len(entries) // max(1, int(self.inner / pitch)))
        columns = -(-len(entries) // rows)
        for i, (label, colour) in enumerate(entries.items()):
            x = (self.width - pitch * columns) / 2 + 0.1 + i % columns * pitch
            self.text(x, y + i // columns * SMALL * LINE, "●", SMALL, color=colour, family="DejaVu Sans")
            self.text(x + 0.12, y + i // columns * SMALL * LINE, label, SMALL)
        return y + rows * SMALL * LINE

    def places(self, y, count: int, width: float, pitch: float) -> tuple[list[tuple[float, float, float]], float]:
        """(x, y, width) of so many plots, side by side as far as there is room, and the y below their rows."""
        columns = max(1, min(count, int(self.inner / (LABELS + 0.75 * width))))
        slot = self.inner / columns
        width = min(width, slot - LABELS - GAP)
        x = MARGIN + LABELS + (slot - LABELS - width) / 2
        found = [(x + i % columns * slot, y + i // columns * pitch, width) for i in range(count)]
        return found, y - (-count // columns) * pitch

    def plot(self, x, y, width, height, title: str, **style):
        """Axes of that size under a title that stands at y; `style` goes to their `set`."""
        self.text(x + width / 2, y, title, TEXT, ha="center", weight="bold")
        axes = self.axes(x, y + BAND, width, height)
        axes.spines[:].set(linewidth=0.5, color="black")
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(AutoLocator())
        axes.yaxis.set_major_locator(AutoLocator())
        axes.xaxis.label.set_size(SMALL)
        axes.yaxis.label.set_size(SMALL)
        axes.set(**style)
        return axes

    def finish(self, height: float) -> "Page":
        """The page itself, cut at that height."""
        self.figure.set_size_inches(self.width, height)
        self.from_top.translate(0, height)
        for axes, (x, y, w, h) in self.boxes.items():
            axes.set_position((x / self.width, 1 - (y + h) / height, w / self.width, h / height))
        return self

    def __array__(self, dtype=None, copy=None):
        return figure_to_array(self.figure).astype(dtype or np.uint8, copy=False)

    def vector(self, suffix: str) -> bytes:
        """The finished page as "pdf", with its fonts, or "svg", with text as outlines: the same bytes every time."""
        buffer, style = io.BytesIO(), {"pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "smooth-gradcam"}
        with rc_context(style), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # characters that no installed font has: drawn as boxes
            undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}[suffix]
            self.figure.savefig(buffer, format=suffix, dpi=DPI, metadata=undated)
        return buffer.getvalue()


def pixels_of(width: float, height: float) -> tuple[int, int]:
    """Pixels (width, height) of a picture on the page."""
    return max(1, round(width * DPI)), max(1, round(height * DPI))


def shrink(photo: Image.Image, width: float, height: float) -> Image.Image:
    """The photo as large as it stands on the page: maps are drawn at the size of their cell."""
    return photo.resize(pixels_of(width, height), Image.Resampling.LANCZOS)


# figures


def text_rows(token_maps: TokenMaps) -> list[tuple[str, str, tuple[int, int]]]:
    """(label, text, marked span) of what was asked, answered and explained."""
    prompt, _ = excerpt(token_maps.prompt, (0, 0), EXCERPT["prompt"])
    answer, span = excerpt(token_maps.answer, token_maps.target_span, EXCERPT["answer"])
    target, _ = excerpt(token_maps.target, (0, 0), EXCERPT["target"])
    explained = f"{len(token_maps.target_tokens)} of {len(token_maps.tokens)} tokens, marked above: “{target}”"
    if token_maps.settings.contrast is not None:
        other, _ = excerpt(token_maps.settings.contrast, (0, 0), EXCERPT["target"])
        explained += f", rather than “{other}” in its place"
    if token_maps.target == token_maps.answer:
        span, explained = (0, 0), f"the whole answer: {len(token_maps.tokens)} tokens"
    return [("Prompt", prompt, (0, 0)), ("Answer", answer, span), ("Explained", explained, (0, 0))]


def method_title(settings: Settings) -> str:
    """The method's name, smooth or not."""
    name = METHOD_NAMES[settings.method]
    return f"Smooth {name}" if settings.noise_std else name


def settings_text(settings: Settings, place: str | None = None) -> str:
    """How the maps were made, in one line; `place` is where they were read, the settings' own for None."""
    contrast = "" if settings.contrast is None else " minus the contrast's"
    noise = f"{settings.num_samples} noisy cop{'y' if settings.num_samples == 1 else 'ies'}, "
    noise += f"noise {settings.noise_std:g}, seed {settings.seed}"
    return (
        f"Settings: method {settings.method}, score {settings.score}{contrast}, rules {settings.rules}, "
        f"{place or f'tap {settings.tap}'}, {noise if settings.noise_std else 'no noise'}"
    )


def look_text(look: Look) -> str:
    """How the colours are to be read, in a sentence."""
    scale = {
        "map": "shares of each map's own maximum, which do not compare the strength of two maps",
        "word": "shares of the maximum of each word's maps",
        "all": "shares of the maximum of all maps of this run",
    }[look.scale]
    cover = "cold areas stay photo" if look.opacity is None else f"{100 * look.opacity:.0f} % heatmap over the photo"
    return f"Colours: {scale}; overlays: {cover}."


def caption(token_maps: TokenMaps, layers: Iterable[int], arrangement: str, look: Look = PLAIN) -> str:
    """What is to be read in a figure of maps at the layers."""
    blank = [f"layer {layer} ({why})" for layer, why in token_maps.blank.items() if layer in layers]
    grey = f" Grey: no map at {', '.join(blank)}." if blank else ""
    what = "where the explained words come from"
    if token_maps.settings.contrast is not None:
        what = "what speaks for the explained words rather than for the other text"
    return f"Hot: {what}, as read at {arrangement}. {look_text(look)}{grey}"


def made_from(token_maps: TokenMaps, photo: Image.Image) -> str:
    """The settings of the maps and the photo's size, in one line."""
    height, width = token_maps.grid
    return (
        f"{settings_text(token_maps.settings)}; photo {photo.width} × {photo.height} px, "
        f"{width} × {height} image tokens"
    )


def header(page: Page, x: float, y: float, title: str, rows) -> float:
    """Title, prompt, answer and what is explained; returns the y below them."""
    y = page.lines(x, y, page.width - MARGIN - x, title, TITLE, weight="bold")
    return header_rows(page, x, y + GAP, rows)


def header_rows(page: Page, x: float, y: float, rows) -> float:
    """(label, text, marked span) one below the other; returns the y below them."""
    for label, text, span in rows:
        page.text(x, y, label, TEXT, weight="bold")
        y = page.lines(x + LABEL, y, page.width - MARGIN - x - LABEL, text, TEXT, span) + GAP / 2
    return y


def masthead(
    page: Page, photo: Image.Image, title: str, rows, box=(2.3, 1.7), draw=np.asarray, under: str = ""
) -> float:
    """The photo in a box, or what `draw` makes of it, with a line under it, and the header beside it; the y below.

    On a narrow page only the title stands beside the photo.
    """
    width, height = fit_box(photo.width / photo.height, min(box[0], page.inner / 2), min(box[1], page.inner / 3))
    page.picture(MARGIN, MARGIN, width, height, draw(shrink(photo, width, height)))
    page.text(MARGIN, MARGIN + height + 0.03, under, SMALL, color="0.3")
    below = MARGIN + height + BAND * bool(under)
    x = MARGIN + max(width, text_width(under, SMALL, page.families)) + 2 * GAP
    if page.width - x > 3:
        return max(header(page, x, MARGIN, title, rows), below)
    x = MARGIN + width + 2 * GAP
    below = max(page.lines(x, MARGIN, page.width - MARGIN - x, title, TEXT, weight="bold"), below) + GAP
    return header_rows(page, MARGIN, below, rows)


def small_print(page: Page, y: float, text: str, settings: str = "") -> float:
    """A caption, and below it how the figure was made; returns the y below them, which is the page's height."""
    if not page.complete:
        text += " Boxes: characters that no installed font can draw."
    y = page.lines(MARGIN, y, page.inner, text, SMALL, color="0.3")
    return page.lines(MARGIN, y, page.inner, settings, TINY, color="0.3") + MARGIN if settings else y + MARGIN


def footer(page: Page, y: float, method: str, text: str, settings: str, look: Look = PLAIN) -> float:
    """The colour bar, above as in heatmaps, below as over mid grey, and the small print; returns the y below it."""
    width, height, share = min(3.2, page.inner - 0.2), 0.16, np.linspace(0, 1, 256)[None]
    colours = colorize_cam(share, look.colormap)
    over_grey = overlay_cam(np.full_like(colours, 128), colours, opacity_of(share, look))
    bars, ticks = [colours[0], over_grey[0]], (0, 0.25, 0.5, 0.75, 1)
    page.colour_scale((page.width - width) / 2, y, width, height, bars, ticks, SMALL)
    y += height + SMALL * LINE + 0.05
    of = {"map": "the map's own maximum", "word": "its word's maximum", "all": "the maximum of all maps"}[look.scale]
    y = page.centred(y, f"{METHOD_NAMES[method]}, share of {of}; below: over grey", SMALL)
    return small_print(page, y + GAP, text, settings)


def token_ticks(axes, grid: tuple[int, int], width: int, height: int) -> None:
    """Ticks between the image tokens along two edges of a picture."""
    for axis, count, pixels in ((axes.xaxis, grid[1], width), (axes.yaxis, grid[0], height)):
        axis.set_ticks(np.arange(1, count) * pixels / count - 0.5, [""] * (count - 1))


def panel_figure(
    photo: Image.Image, token_maps: TokenMaps, layer: int, look: Look = PLAIN, paper: Paper = PAGE
) -> Page:
    """The photo, the heatmap and the overlay of one layer, side by side, or one above the other if very wide.

    Ticks along the heatmap stand between image tokens.
    """
    rows, aspect = text_rows(token_maps), photo.width / photo.height
    page = Page(WIDTHS[paper.width], "".join(text for _, text, _ in rows))
    columns = 3 if aspect < 2.5 else 1
    width, height = fit_box(aspect, (page.inner - (columns - 1) * GAP) / columns, 4.5)
    small = shrink(photo, width, height)
    panels = {"Photo": np.asarray(small)}
    panels |= {name: draw_layer(small, token_maps, layer, name == "Overlay", look) for name in ("Heatmap", "Overlay")}
    largest = strength(token_maps, layer)
    pitch = max(width, 0.5) + GAP
    left = (page.width - columns * pitch + GAP) / 2
    y = header(page, MARGIN, MARGIN, f"{method_title(token_maps.settings)}, layer {layer}", rows) + GAP
    for i, (name, array) in enumerate(panels.items()):
        x, top = left + i % columns * pitch, y + i // columns * (HEAD + height + GAP)
        page.label(x + (pitch - GAP) / 2, top, name, largest if name == "Heatmap" else "")
        axes = page.picture(x + (pitch - GAP - width) / 2, top + HEAD, width, height, array)
        if name == "Heatmap" and layer not in token_maps.blank:
            token_ticks(axes, token_maps.grid, *small.size)
    y += 3 // columns * (HEAD + height + GAP) + GAP
    text = caption(token_maps, [layer], f"layer {layer}", look)
    return page.finish(footer(page, y, token_maps.settings.method, text, made_from(token_maps, photo), look))


def layers_figure(
    photo: Image.Image, token_maps: TokenMaps, layers: list, title: str, groups=None, look: Look = PLAIN,
    paper: Paper = PAGE,
) -> Page:  # fmt: skip
    """The photo beside the text, below it the overlay of each layer, with its heatmap if the paper is to show them.

    `groups`, {label: layers}, are rows of their own, with heatmaps where the page is wide enough.
    """
    texts, aspect = text_rows(token_maps), photo.width / photo.height
    page = Page(WIDTHS[paper.width], "".join(text for _, text, _ in texts))
    y = masthead(page, photo, title, texts) + 2 * GAP

    pairs = paper.heatmaps or (groups is not None and paper.width == "page")
    kinds = ("heatmap", "overlay") if pairs else ("overlay",)
    beside = len(kinds) > 1 and (aspect < 1 or groups is not None)
    across, down = (len(kinds), 1) if beside else (1, len(kinds))
    said = {layer: (f"layer {layer}", strength(token_maps, layer)) for layer in layers}
    room = max(page.label_width(*labels) for labels in said.values())
    inner = page.inner - (BAND if groups else 0)  # BAND: room for the row's label
    most = max(1, int((inner + GAP) / (room + GAP)))
    body = BODY_HEIGHTS[paper.width] * max(1, len(layers) / 28)  # beyond 28 layers the page grows
    if groups:
        columns = min(most, max(map(len, groups.values())))
    else:
        columns = best_columns(aspect, len(layers), most, inner, body, across, down)
    rows = [
        (label, members[i : i + columns])
        for label, members in (groups or {"": layers}).items()
        for i in range(0, len(members), columns)
    ]
    width = panel_width(aspect, columns, len(rows), inner, body, across, down)
    height = width / aspect
    step = (width + GAP / 2, 0) if beside else (0, height + GAP / 2)  # from the heatmap to the overlay
    wide, high = (width + (across - 1) * step[0], height + (down - 1) * step[1])
    pitch, small = max(wide, room) + GAP, shrink(photo, width, height)
    left = page.width - MARGIN - inner + (inner - columns * pitch + GAP) / 2
    for label, members in rows:
        page.text(left - BAND, y + HEAD + high / 2, label, TEXT, rotation=90, ha="center", va="center")
        for i, layer in enumerate(members):
            middle = left + i * pitch + (pitch - GAP) / 2
            page.label(middle, y, *said[layer])
            for j, kind in enumerate(kinds):
                picture = draw_layer(small, token_maps, layer, kind == "overlay", look)
                page.picture(middle - wide / 2 + j * step[0], y + HEAD + j * step[1], width, height, picture)
        y += HEAD + high + GAP
    arrangement = "each layer"
    if len(kinds) > 1:
        arrangement += f", in the heatmap and {'beside' if beside else 'below'} it over the photo"
    below = caption(token_maps, layers, arrangement, look)
    if any("weak" in largest for _, largest in said.values()):
        below += f" Weak: below {100 * WEAK:.0f} % of the strongest."
    return page.finish(footer(page, y + GAP, token_maps.settings.method, below, made_from(token_maps, photo), look))


# the files of each mode: {name in the mode's folder: picture, or function that draws it}


def _layer_files(results: dict, folder: str = "") -> dict[str, object]:
    return {
        f"{folder}layer_{layer}_{kind}.png": functools.partial(result.__getitem__, kind)
        for layer, result in results.items()
        for kind in ("heatmap", "superimposed")
    }


def draw_single(
    image, token_maps: TokenMaps, look: Look = PLAIN, paper: Paper = PAGE
) -> tuple[dict, dict[str, object]]:
    """One layer's ({"superimposed", "heatmap", "cam"}, {file name: content})."""
    photo = load_rgb(image)
    ((layer, result),) = layer_pictures(photo, token_maps, look).items()
    result = dict(result)
    return result, {
        "original_image.png": np.asarray(photo),
        "heatmap.png": result["heatmap"],
        "superimposed_result.png": result["superimposed"],
    } | paper.figure("visualization", functools.partial(panel_figure, photo, token_maps, layer, look, paper))


def _draw_layers(photo, token_maps: TokenMaps, name: str, look: Look, paper: Paper) -> tuple[dict, dict[str, object]]:
    results, title = layer_pictures(photo, token_maps, look), f"{method_title(token_maps.settings)} by layer"
    figure = functools.partial(layers_figure, photo, token_maps, list(results), title, look=look, paper=paper)
    return results, paper.figure(name, figure) | _layer_files(results)


def draw_grid(image, token_maps: TokenMaps, look: Look = PLAIN, paper: Paper = PAGE) -> tuple[dict, dict[str, object]]:
    """Of all maps ({layer: LayerPictures}, {file name: content})."""
    return _draw_layers(load_rgb(image), token_maps, "layer_comparison_grid", look, paper)


def draw_multilayer(
    image, token_maps: TokenMaps, look: Look = PLAIN, paper: Paper = PAGE
) -> tuple[dict, dict[str, object]]:
    """As `draw_grid`, always with heatmaps, with the photo, and under the names of the multi-layer mode."""
    photo, paper = load_rgb(image), replace(paper, heatmaps=True)
    results, files = _draw_layers(photo, token_maps, "all_layers_comparison", look, paper)
    return results, {"original_image.png": np.asarray(photo)} | files


def draw_comparative(
    image, token_maps: TokenMaps, thirds: dict[str, list[int]], look: Look = PLAIN, paper: Paper = PAGE
) -> tuple[dict, dict[str, object]]:
    """Of the layers of {"early", "middle", "late"} the same dictionary with pictures for layers, and the files.

    Each third has a folder with a grid of its own; `comparative_analysis.png` stands over the three.
    """
    photo, title = load_rgb(image), method_title(token_maps.settings)
    results = layer_pictures(photo, token_maps, look)
    draw = functools.partial(layers_figure, photo, token_maps, look=look, paper=paper)
    heading = f"{title}: early, middle and late layers"
    files = paper.figure("comparative_analysis", functools.partial(draw, list(results), heading, thirds))
    parts = {name: {layer: results[layer] for layer in layers} for name, layers in thirds.items()}
    for name, part in parts.items():
        figure = functools.partial(draw, list(part), f"{title}, {name} layers")
        files |= paper.figure(f"{name}/layer_comparison_grid", figure) | _layer_files(part, f"{name}/")
    return parts, files


# files


def decimal(value: float, digits: int = 2) -> str:
    """The value with so many digits, and no minus before a zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def to_csv(rows: list[dict]) -> str:
    """Rows as comma-separated text with a head; what a row lacks is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: decimal(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()


_DRAWING = threading.Lock()  # matplotlib draws in one thread at a time


def _encode(name: str, content) -> bytes:
    if callable(content):  # a picture that is drawn only now, so that not all of them are in memory at once
        with _DRAWING:
            content = content()
            if isinstance(content, Page):
                suffix = Path(name).suffix[1:]
                content = content.vector(suffix) if suffix in VECTOR_FORMATS else np.asarray(content)
    if isinstance(content, bytes):
        return content
    if isinstance(content, str):
        return content.encode()
    buffer = io.BytesIO()
    if isinstance(content, dict):
        np.savez_compressed(buffer, **content)
    else:  # as small as level 6, in half the time
        Image.fromarray(content).save(buffer, "PNG", dpi=(DPI, DPI), compress_level=4)
    return buffer.getvalue()


def _stage(path: Path, name: str, content) -> None:
    data = _encode(name, content)
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


def _check_path(save_dir, name: str) -> Path:
    """The folder without links and `..`. Raises ValueError for what is no path or a link that leads nowhere."""
    if not isinstance(save_dir, (str, os.PathLike)) or not str(save_dir).strip() or "\0" in str(save_dir):
        raise ValueError(f"{name}={save_dir!r} must be the path of a folder")
    given = Path(save_dir).absolute()
    for path in (given, *given.parents):
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{name}: {path} is a symbolic link that leads nowhere: choose another folder")
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
def output_folder(save_dir, subfolders: Iterable[str] = (), name: str = "save_dir"):
    """The folder that a run writes to, its own until the end; yields a function that writes {name: content}.

        with output_folder("cam_results/grid") as write:
            paths = write({"heatmap.png": picture})

    A content is a uint8 RGB array (.png), a dictionary of arrays (.npz), a text, or a function that gives one of them
    or a `Page` (.png, .pdf, .svg), called when its file's turn comes. Files are written to a staging folder in the
    folder and then moved into place all at once: a failure, Ctrl-C or SIGTERM leaves nothing behind. Nothing is ever
    removed but this staging folder, such folders of runs that were killed, and empty folders that this run made;
    nothing is replaced but files of the names that are written. `subfolders` are those that the names will need;
    errors call the folder `name`.

    Raises ValueError if there can be no such folder, BlockingIOError if another run is writing there (where the system
    can lock folders; Windows cannot), and OSError if a file cannot be written.
    """
    folder, made, held, staging = _check_path(save_dir, name), [], None, None
    try:
        try:
            _make_folders(folder, made)
            for part in (folder / part for part in subfolders):
                if os.path.lexists(part) and not part.is_dir():
                    raise NotADirectoryError(errno.ENOTDIR, f"{part.name} is no folder")
                if part.is_dir() and part.stat().st_dev != folder.stat().st_dev:
                    raise OSError(errno.EXDEV, f"{part.name} is on another disk")
            held = _hold(folder)
            for stale in _staging_folders(folder) if held is not None else ():  # whoever made them is no longer there
                _remove_staging(stale)
            mine = folder / f"{STAGING}{os.getpid()}"
            mine.mkdir()
            staging = mine  # from here on it is this run's to remove
        except BlockingIOError:
            raise
        except OSError as exc:
            raise ValueError(f"{name}: {folder} cannot be written ({exc.strerror}): choose another folder") from exc
        yield functools.partial(_write, folder, staging, made)
    finally:
        with _signals_wait():
            if staging is not None:
                _remove_staging(staging)
            for path in reversed(made):
                with suppress(OSError):  # it is not empty
                    path.rmdir()
            if held is not None:
                os.close(held)


def _keep(file: Path, copy: Path) -> None:
    """Another name for the file, or a copy where the disk knows no hard links."""
    try:
        os.link(file, copy, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(file, copy, follow_symlinks=False)


def _move(folder: Path, staging: Path, made: list[Path], names: Iterable[str]) -> None:
    """Move all files into place, or none: what was there before is put back if one cannot be replaced."""
    moved = {}  # target: what was there before
    try:
        for i, name in enumerate(names):
            target, before = folder / name, staging / f"{i}.before"
            _make_folders(target.parent, made)
            if os.path.lexists(target):
                _keep(target, before)
            (staging / name).replace(target)
            moved[target] = before
    except OSError as exc:
        for done, before in moved.items():
            before.replace(done) if os.path.lexists(before) else done.unlink()
        raise OSError(
            f"{target} cannot be written ({exc.strerror}): nothing is changed, choose another folder"
        ) from exc


def _write(folder: Path, staging: Path, made: list[Path], files: dict[str, object]) -> list[Path]:
    for name in files:
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name} is a folder where a file is to be written: choose another folder")

    with ThreadPoolExecutor(min(4, os.cpu_count())) as pool:  # compression takes longest
        list(pool.map(functools.partial(_stage, staging), files, files.values()))
    with _signals_wait():
        _move(folder, staging, made, files)
    return [folder / name for name in files]


def write_files(folder, files: dict[str, object]) -> list[Path]:
    """Write {name in the folder: content} as `output_folder` does; returns the paths."""
    with output_folder(folder) as write:
        return write(files)


def other_files(paths: list[Path]) -> list[Path]:
    """Files beside the given ones that are not among them: of an earlier run, say, and another photo."""
    found = {path for parent in {path.parent for path in paths} for path in parent.iterdir() if path.is_file()}
    return sorted(path for path in found - set(paths) if not path.name.startswith("."))


# the documented entry points


def show_progress(quiet: bool, what: str = "noisy copies", unit: str = "copy"):
    """A tqdm bar, silent if `quiet` or where stderr is no terminal."""
    return functools.partial(tqdm, desc=what, unit=unit, leave=False, disable=True if quiet else None)


def create_layer_comparison_grid(
    model, processor, image, prompt, layer_range="auto", save_dir="cam_results_grid",
    *, num_samples=5, noise_std=0.1, quiet=False, look=PLAIN, paper=PAGE, **settings,
):  # fmt: skip
    """Grid of heatmaps and overlays over a range of layers, all from one answer and one pass.

    `layer_range` is "auto" (six layers), "early", "middle", "late" (thirds), "all" or a list of indices. `image` and
    `settings` (further keywords) are those of `compute_token_maps`, `look` is a `Look`, `paper` a `Paper`. Writes
    layer_comparison_grid.png, layer_<i>_heatmap.png and layer_<i>_superimposed.png.

    Returns {layer: {"superimposed", "heatmap", "cam"}}: uint8 RGB (height, width, 3) twice, and the raw map, float32
    (H, W); see `LayerPictures`. A layer without a map has a grey panel and zeros. Raises what `compute_token_maps`
    raises, ValueError for layers that do not exist, and what `output_folder` raises.
    """
    check_drawing(look, paper)
    layers = select_layers(layer_range, get_model_layers(model)[1])
    settings |= {"num_samples": num_samples, "noise_std": noise_std, "progress": show_progress(quiet)}
    with output_folder(save_dir) as write:
        token_maps = compute_token_maps(model, processor, image, prompt, layers, **settings)
        results, files = draw_grid(image, token_maps, look, paper)
        write(files)
    return results


def visualize_multiple_layers(
    model, processor, image, prompt, layer_indices=None, save_dir="cam_results_multilayer",
    *, num_samples=5, noise_std=0.1, quiet=False, look=PLAIN, paper=PAGE, **settings,
):  # fmt: skip
    """Heatmaps and overlays of the given layers (six representative ones for None), as the grid otherwise.

    Writes original_image.png, all_layers_comparison.png, layer_<i>_heatmap.png and layer_<i>_superimposed.png.
    Further arguments, result and errors are those of `create_layer_comparison_grid`.
    """
    check_drawing(look, paper)
    layers = select_layers("auto" if layer_indices is None else layer_indices, get_model_layers(model)[1])
    settings |= {"num_samples": num_samples, "noise_std": noise_std, "progress": show_progress(quiet)}
    with output_folder(save_dir) as write:
        token_maps = compute_token_maps(model, processor, image, prompt, layers, **settings)
        results, files = draw_multilayer(image, token_maps, look, paper)
        write(files)
    return results


def create_comparative_analysis(
    model, processor, image, prompt, save_dir="cam_results_comparative",
    *, layers_per_third=LAYERS_PER_THIRD, num_samples=5, noise_std=0.1, quiet=False, look=PLAIN, paper=PAGE, **settings,
):  # fmt: skip
    """Early, middle and late layers side by side, all from one answer and one pass.

    `layers_per_third` are shown of each third, all of its layers for None. Writes comparative_analysis.png, and a grid
    with its layers' files to each of early/, middle/ and late/.
    Returns {"early": {layer: ...}, "middle": {...}, "late": {...}} with dictionaries as those of
    `create_layer_comparison_grid`, whose further arguments and errors these are.
    """
    check_drawing(look, paper)
    thirds = comparative_layers(get_model_layers(model)[1], layers_per_third)
    layers = [layer for part in thirds.values() for layer in part]
    settings |= {"num_samples": num_samples, "noise_std": noise_std, "progress": show_progress(quiet)}
    with output_folder(save_dir, thirds) as write:
        token_maps = compute_token_maps(model, processor, image, prompt, layers, **settings)
        results, files = draw_comparative(image, token_maps, thirds, look, paper)
        write(files)
    return results
