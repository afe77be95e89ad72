"""The page under the figures: text of any script that is wrapped by its measured width, and panels placed in inches.

    text -> excerpt -> lines -> runs (marked or not) -> page -> uint8 RGB array

Lengths are inches from the page's top left corner, text sizes are points. The page finds its height when it is done:
what is drawn is kept as steps, which run when the height is known.
"""

import functools
import unicodedata
import warnings

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle
from PIL import Image

DPI = 250
LINE = 1.35 / 72  # line height per point of text
GAP, BAND = 0.08, 0.18  # between pictures; the line that a panel's title stands on
MARKER = "#ffe08a"


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

    def finish(self, height: float) -> np.ndarray:
        """The page cut at that height, uint8 RGB at DPI pixels per inch."""
        self.height = height
        figure = Figure(figsize=(self.width, height), dpi=DPI, facecolor="white")
        for step in self.steps:
            step(figure)
        return figure_to_array(figure)
