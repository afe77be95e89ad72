"""Figures as pages of a paper's width: text that is measured and wrapped, panels, and the parts that figures share.

Shapes:  height, width  pixels     Lengths: inches of the page, from its top left
"""

import functools
import io
import unicodedata
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from matplotlib import font_manager, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, Stroke
from matplotlib.textpath import text_to_path
from matplotlib.ticker import AutoLocator
from matplotlib.transforms import Affine2D
from PIL import Image

from common.encoding import DPI, with_minus

__all__ = [
    *("PAGE", "Page", "Paper", "WIDTHS", "HEIGHT", "BODY_HEIGHTS", "MARGIN", "GAP", "BAND", "HEAD", "LINE"),
    *("TEXT", "SMALL", "TINY", "TITLE", "add_new_fonts", "excerpt", "font_families", "text_width"),
    *("wrap", "split_at_span"),
    *("figure_to_array", "grey_panel", "fit_box", "panel_width", "best_columns", "shrink"),
    *("header", "masthead", "small_print", "MARKER", "SIGNS"),
]

WIDTHS = {"page": 7.2, "column": 3.3}  # inches: both columns of a paper, or one
VECTOR_FORMATS = ("pdf", "svg")
HEIGHT = 9.0  # inches: the most that a figure can take of a paper's page
BODY_HEIGHTS = {"page": 7.0, "column": 5.5}  # inches that header and caption leave on a paper's page
MARGIN = 0.12
GAP, BAND, HEAD = 0.08, 0.18, 0.27  # between pictures; a line with a title; two lines, a title and the maximum
AXIS = 0.43  # left of a plot, for the tick labels and the name of its axis
LINE = 1.35 / 72  # height of a line per point of text
MARKER = "#ffe08a"  # behind the explained part of the answer
TEXT, SMALL, TINY, TITLE = 8, 7, 6, 11  # points; journals ask for 6 at least
SIGNS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖"}  # of legends, for markers
LABEL = 0.75  # width of the column with "Prompt", "Answer", "Explained"


# text


def excerpt(text: str, span: tuple[int, int], columns: int) -> tuple[str, tuple[int, int]]:
    """A long text cut to about `columns` columns around the span, and the span in the cut text.

    Wide characters take two columns. White space and control characters become blanks.
    """
    text = "".join(" " if c.isspace() or unicodedata.category(c) in ("Cc", "Cs") else c for c in text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    limit = columns * len(text) // (len(text) + wide) if text else 0
    if len(text) <= limit:
        return text, span
    start = 0 if span[1] <= limit else min(max(span[0] - limit // 4, 0), len(text) - limit)
    word = text.find(" ", start, span[0]) + 1  # begin with a whole word, where there are words
    start = word if 0 < word - start < 20 and start else start
    before, after = "… " if start else "", " …" if start + limit < len(text) else ""
    shift = len(before) - start
    end = start + limit
    word = text.rfind(" ", max(end - 20, span[1]), end) if after else -1  # and end with one
    cut = before + text[start : end if word < 0 else word] + after
    return cut, (span[0] + shift, min(span[1] + shift, len(cut) - len(after)))


@functools.cache
def _characters_of(path: str) -> frozenset:
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (RuntimeError, OSError):
        return frozenset()


@functools.cache
def add_new_fonts() -> None:
    """Add the fonts to matplotlib's list that were installed after it was made."""
    known = {font.fname for font in font_manager.fontManager.ttflist}
    for path in set(font_manager.findSystemFonts()) - known:
        with suppress(OSError, RuntimeError):  # a font that it cannot read
            font_manager.fontManager.addfont(path)


WEIGHTS = {"normal": 400, "bold": 700}  # of our text


def _weight_of(font) -> int:
    return font_manager.weight_dict.get(font.weight, font.weight)


def _add_weights(family: str) -> None:
    """Let the nearest face of a family stand in for each of our weights that it lacks, without a warning."""
    fonts = font_manager.fontManager.ttflist
    faces = [font for font in fonts if font.name == family and font.style == "normal"]
    for weight in WEIGHTS.values():
        nearest = min(faces, key=lambda font: abs(_weight_of(font) - weight))  # noqa: B023  (used at once)
        stand_in = replace(nearest, weight=weight, variant="normal", stretch="normal")
        if stand_in not in fonts:
            fonts.append(stand_in)


@functools.cache
def font_families(text: str) -> tuple[list[str], bool]:
    """Installed font families that together can draw the text, and whether they can draw all of it.

    Families with a bold face come first.
    """
    missing = {ord(c) for c in text if not c.isspace()}
    families = ["DejaVu Sans"]
    missing -= _characters_of(font_manager.findfont("DejaVu Sans"))
    if missing:
        add_new_fonts()
        fonts = [font for font in font_manager.fontManager.ttflist if font.style == "normal"]
        bold = {font.name for font in fonts if _weight_of(font) >= WEIGHTS["bold"]}
        for font in sorted(fonts, key=lambda font: font.name not in bold):
            characters = missing & _characters_of(font.fname)
            if characters and "LastResort" not in font.fname:
                families.append(font.name)
                _add_weights(font.name)
                missing -= characters
    return families, not missing


@functools.cache
def _lacks_bold(text: str) -> bool:
    """Whether none of the fonts that draw some of the text has a bold face, as is usual for Chinese."""
    return any(len({*map(_face, (family,) * 2, WEIGHTS)}) == 1 for family in font_families(text)[0])


def _face(family: str, weight: str) -> str:
    return font_manager.findfont(font_manager.FontProperties(family=[family], weight=weight))


def text_width(text: str, size: float, families: list[str], weight: str = "normal") -> float:
    """Inches that the text takes on one line, in pictures and vector files alike: letters are not fitted to pixels."""
    return _text_width(text, size, tuple(families), weight)


@functools.lru_cache(10_000)  # pages are measured before they are drawn
def _text_width(text: str, size: float, families: tuple[str, ...], weight: str) -> float:
    font = font_manager.FontProperties(family=list(families), size=size, weight=weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that no installed font has
        return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72


def wrap(text: str, width: float, size: float, families: list[str], weight: str = "normal") -> list[tuple[int, int]]:
    """(start, end) of each line, broken at blanks, or between characters where there are none."""
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
    """The line's text in runs (text, whether it is marked), in the order in which they are drawn from left to right."""
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
    """A grey panel with a text, in place of a map that does not exist: uint8 RGB (height, width, 3).

    The text is left out where it would be too small to read in print.
    """
    figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="0.8")
    breaks = [text.split("\n"), text.split()]  # as it stands, or a word on each line
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
    """Width of a picture when an area is filled with columns and rows of cells: a title, `across` x `down` pictures."""
    cell_width, cell_height = width / columns - GAP, height / rows - GAP - HEAD
    return min((cell_width - (across - 1) * GAP / 2) / across, (cell_height - (down - 1) * GAP / 2) / down * aspect)


def best_columns(aspect: float, count: int, most: int, width: float, height: float, across: int, down: int) -> int:
    """The number of columns, at most `most`, that gives large pictures in few rows, with few cells left empty."""

    def merit(columns):
        rows = -(-count // columns)
        return panel_width(aspect, columns, rows, width, height, across, down) * rows**-0.5 * count / (columns * rows)

    return max(range(1, min(count, most) + 1), key=merit)


# page


@dataclass(frozen=True)
class Paper:
    """The size and formats of figures. Raises ValueError for invalid values.

    width     "page" (7.2 inches, both columns of a paper) or "column" (3.3 inches), with no text below 6 points
    formats   written beside each figure's PNG: "pdf", "svg"
    heatmaps  grids show the heatmap of each layer above or beside its overlay
    """

    width: str = "page"
    formats: tuple[str, ...] = ()
    heatmaps: bool = False

    def __post_init__(self):
        if self.width not in WIDTHS:
            raise ValueError(f"width={self.width!r} must be one of {', '.join(WIDTHS)}")
        if not isinstance(self.formats, (tuple, list)) or not set(self.formats) <= set(VECTOR_FORMATS):
            raise ValueError(f"formats={self.formats!r} must be a tuple of {', '.join(VECTOR_FORMATS)}")
        if not isinstance(self.heatmaps, bool):
            raise ValueError(f"heatmaps={self.heatmaps!r} must be True or False")

    def figure(self, name: str, draw) -> dict[str, object]:
        """{file name: the function that draws it} of a figure, in all its formats."""
        return {f"{name}.{suffix}": draw for suffix in ("png", *self.formats)}


PAGE = Paper()


class Page:
    """A figure of a fixed width that is filled from the top; `finish` sets its height.

    `text` has the characters that it must be able to write. All lengths are inches, from the top left. `numpy.asarray`
    gives its pixels, uint8 RGB (height, width, 3) at DPI pixels per inch, `vector` the bytes of a PDF or SVG file.
    """

    def __init__(self, width: float, text: str):
        self.width, self.inner = width, width - 2 * MARGIN  # inner: between the margins
        self.families, self.complete = font_families(text)
        self.figure = Figure(figsize=(width, 1), dpi=DPI, facecolor="white")
        self.from_top = Affine2D().scale(1, -1)
        self.inches = self.from_top + self.figure.dpi_scale_trans
        self.boxes = {}  # axes: (x, y, width, height)

    def axes(self, x, y, width, height):
        """Empty axes with their upper left corner at (x, y)."""
        axes = self.figure.add_axes((0, 0, 1, 1), xticks=[], yticks=[])
        axes.spines[:].set(linewidth=0.4, color="0.6")
        axes.tick_params(labelsize=SMALL, length=2, width=0.5)
        self.boxes[axes] = x, y, width, height
        return axes

    def text(self, x, y, text, size, **style):
        """One line with its upper edge (with va="center", its middle) at y; dollar signs do not start formulas."""
        style = {"family": self.families, "parse_math": False, "size": size} | style
        if style.get("weight") == "bold" and _lacks_bold(text):
            style["path_effects"] = [Stroke(linewidth=0.05 * size, foreground=style.get("color", "black")), Normal()]
        if "va" not in style:
            y += 0.8 * size * LINE  # the baseline
        self.figure.text(x, y, text, transform=self.inches, **style)

    def lines(self, x, y, width, text, size, span=(0, 0), **style) -> float:
        """Wrapped text with its span marked; returns the y below it."""
        weight = style.get("weight", "normal")
        for line in wrap(text, width, size, self.families, weight):
            left = x
            for run, marked in split_at_span(text, line, span):
                if marked:
                    box = text_width(run.rstrip(), size, self.families), size * LINE
                    mark = Rectangle((left, y), *box, facecolor=MARKER, zorder=-1, transform=self.inches)
                    self.figure.add_artist(mark)
                self.text(left, y, run, size, **style)
                left += text_width(run, size, self.families, weight)
            y += size * LINE
        return y

    def label(self, middle, y, name, largest) -> None:
        """Two lines over the middle of a picture, HEAD high: its name, and the map's maximum in small print."""
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
        size = _pixels_of(width, height)
        if array.shape[1::-1] != size:
            array = np.asarray(Image.fromarray(array).resize(size, Image.Resampling.LANCZOS))
        axes = self.axes(x, y, width, height)
        axes.imshow(array, aspect="auto")
        return axes

    def colour_scale(self, x, y, width, height, colours, ticks, size):
        """Horizontal bars of colours, each (n, 3) uint8 RGB from 0 to 1, one above the other, with ticks below.

        Returns the axes.
        """
        axes = self.axes(x, y, width, height)
        axes.imshow(np.stack(colours), aspect="auto", extent=(0, 1, 0, 1), interpolation="nearest")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.tick_params(labelsize=size, pad=1.5)
        axes.spines[:].set(color="black")
        return axes

    def legend(self, y, entries: dict[str, object]) -> float:
        """{name: colour}, or (colour, marker), as dots with names, in few lines; returns the y below them."""
        pitch = 0.32 + max(text_width(label, SMALL, self.families) for label in entries)
        rows = -(-len(entries) // max(1, int(self.inner / pitch)))
        columns = -(-len(entries) // rows)
        for i, (label, style) in enumerate(entries.items()):
            colour, marker = style if isinstance(style, tuple) and len(style) == 2 else (style, "o")
            x = (self.width - pitch * columns) / 2 + 0.1 + i % columns * pitch
            self.text(x, y + i // columns * SMALL * LINE, SIGNS[marker], SMALL, color=colour, family="DejaVu Sans")
            self.text(x + 0.12, y + i // columns * SMALL * LINE, label, SMALL)
        return y + rows * SMALL * LINE

    def places(self, y, count: int, width: float, pitch: float) -> tuple[list[tuple[float, float, float]], float]:
        """(x, y, width) of `count` plots, side by side as far as there is room, and the y below their rows."""
        columns = max(1, min(count, int(self.inner / (AXIS + 0.75 * width))))
        slot = self.inner / columns
        width = min(width, slot - AXIS - GAP)
        x = MARGIN + AXIS + (slot - AXIS - width) / 2
        boxes = [(x + i % columns * slot, y + i // columns * pitch, width) for i in range(count)]
        return boxes, y - (-count // columns) * pitch

    def plot(self, x, y, width, height, title: str, **style):
        """Axes under a title at y; `style` are keywords of their `set`."""
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
        """Set the height; returns the page."""
        self.figure.set_size_inches(self.width, height)
        self.from_top.translate(0, height)
        for axes, (x, y, w, h) in self.boxes.items():
            axes.set_position((x / self.width, 1 - (y + h) / height, w / self.width, h / height))
        return self

    def __array__(self, dtype=None, copy=None):
        return figure_to_array(self.figure).astype(dtype or np.uint8, copy=False)

    def vector(self, suffix: str) -> bytes:
        """The finished page as "pdf", with its fonts, or "svg", with text as outlines: always the same bytes."""
        buffer, style = io.BytesIO(), {"pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "smooth-gradcam"}
        with rc_context(style), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # characters that no installed font has: drawn as boxes
            undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}[suffix]
            self.figure.savefig(buffer, format=suffix, dpi=DPI, metadata=undated)
        return buffer.getvalue()


def _pixels_of(width: float, height: float) -> tuple[int, int]:
    """(width, height) in pixels of a picture of that size on a page."""
    return max(1, round(width * DPI)), max(1, round(height * DPI))


def shrink(photo: Image.Image, width: float, height: float) -> Image.Image:
    """The photo in the pixels that it has on a page, so that maps are drawn at the size of their cell."""
    return photo.resize(_pixels_of(width, height), Image.Resampling.LANCZOS)


def header(page: Page, x: float, y: float, title: str, rows) -> float:
    """The title, and the `rows` of `_header_rows` below it; returns the y below them."""
    y = page.lines(x, y, page.width - MARGIN - x, title, TITLE, weight="bold")
    return _header_rows(page, x, y + GAP, rows)


def _header_rows(page: Page, x: float, y: float, rows) -> float:
    """Rows (label, text, marked span), such as the prompt and the answer; returns the y below them."""
    for label, text, span in rows:
        page.text(x, y, label, TEXT, weight="bold")
        y = page.lines(x + LABEL, y, page.width - MARGIN - x - LABEL, text, TEXT, span) + GAP / 2
    return y


def masthead(
    page: Page, photo: Image.Image, title: str, rows, box=(2.3, 1.7), draw=np.asarray, under: str = ""
) -> float:
    """The photo in a box, or what `draw` makes of it, with a line `under` it and the header beside it.

    On a narrow page only the title stands beside the photo. Returns the y below.
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
    return _header_rows(page, MARGIN, below, rows)


def small_print(page: Page, y: float, text: str, settings: str = "") -> float:
    """A caption, and below it the settings of the figure; returns the y below them, which is the page's height."""
    if not page.complete:
        text += " Boxes: characters that no installed font can draw."
    y = page.lines(MARGIN, y, page.inner, with_minus(text), SMALL, color="0.3")
    return page.lines(MARGIN, y, page.inner, settings, TINY, color="0.3") + MARGIN if settings else y + MARGIN
