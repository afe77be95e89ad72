"""Tables of pictures as figures: a column for each picture, or temporal patch, of a prompt, under its name.

Lengths: inches of the page
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from common.page import (
    GAP,
    HEIGHT,
    LINE,
    MARGIN,
    PAGE,
    SMALL,
    TEXT,
    TINY,
    WIDTHS,
    Page,
    Paper,
    header,
    shrink,
    text_width,
    wrap,
)
from common.parts import Part, numbered
from smooth_gradcam import PLAIN, Look, TokenMaps
from studies.pictures import Pictures
from studies.video import animate, draw_video, frames_of_a_patch
from visualization_utils import (
    WEAK,
    caption,
    footer,
    full_colour,
    method_title,
    settings_text,
    strength,
    strongest_of,
    text_rows,
)

__all__ = ["GREY", "Row", "Table", "draw_pictures", "row_of", "tables"]

LEAST = {"page": 0.9, "column": 0.62}  # width of the widest picture, where there are more than one line has room for
MOST = {"page": 2.2, "column": 1.4}  # and its height
SIDE = {"page": 0.95, "column": 0.72}  # of what stands at the left, at most
LONG = 4  # rows; the pictures of a longer table are low
SMALLER = 0.6  # share of their height that pictures may be reduced to
GREY = {"color": "0.3"}


class Row(NamedTuple):
    """A map over all pictures."""

    lines: list[tuple[str, float, dict]]  # at the left: text, points and style
    draw: Callable  # (which picture, the picture as large as it stands there) -> uint8 RGB
    below: Sequence[str] = ()  # what stands under each picture


class Table(NamedTuple):
    """Rows under a title, which may be empty."""

    title: str
    rows: list[Row]


class _Place(NamedTuple):
    """Where pictures stand."""

    side: float  # left of the pictures
    pitch: float
    sizes: list[tuple[float, float]]  # width and height of each
    chunks: list[range]  # pictures side by side


def _place(page: Page, photos: Sequence, content: list[Table], labels: list[str], width: str, body: float) -> _Place:
    """The places of these photos in tables on pages with `body` inches for them.

    A table that would need a little more than a page has smaller pictures, and is on one.
    """
    rows = [row for table in content for row in table.rows]
    texts = [line for row in rows for line in row.lines]
    side = max(text_width(text, size, page.families, style.get("weight", "normal")) for text, size, style in texts)
    side = min(side + 0.02, SIDE[width]) + GAP
    room, count = page.inner - side + GAP, len(photos)
    names = max(text_width(label, SMALL, page.families) for label in labels)
    least = max(LEAST[width], min(names, 1.5 * LEAST[width]))
    most = max(1, min(count, int(room / (least + GAP))))
    lines = -(-count // most)
    across = -(-count // lines)
    aspects = [photo.width / photo.height for photo in photos]
    wide = room / across - GAP
    high = min(wide / max(aspects), MOST[width], 2.2 * wide)
    longest = max(len(table.rows) for table in content)
    whole = (body - TEXT * LINE - SMALL * LINE - 2 * GAP) / longest - TINY * LINE - GAP
    if longest > LONG:
        high = min(high, LEAST[width])
    if lines == 1 and SMALLER * high < whole < high:
        high = whole
    sizes = [(high * aspect, high) for aspect in aspects]
    pitch = min(wide, max(high * max(aspects), min(names, wide))) + GAP
    return _Place(side, pitch, sizes, [range(i, min(i + across, count)) for i in range(0, count, across)])


def _fitting(page: Page, text: str, size: float, width: float) -> str:
    """The text, cut so that it has room."""
    if text_width(text, size, page.families) <= width:
        return text
    return text[: wrap(text.replace(" ", "\N{NO-BREAK SPACE}"), width - 0.08, size, page.families)[0][1]].rstrip() + "…"


def _side_lines(page: Page, row: Row, side: float) -> list[tuple[str, float, dict]]:
    """What stands at the left of a row, in lines of that width."""
    lines = []
    for text, size, style in row.lines:
        weight = style.get("weight", "normal")
        lines += [
            (text[slice(*line)].strip(), size, style) for line in wrap(text, side - GAP, size, page.families, weight)
        ]
    return lines


class _Figure:
    """Tables of maps over the pictures of a prompt, on pages."""

    def __init__(self, pictures: Pictures, content: list[Table], page: Page, width: str, body: float):
        self.pictures, self.photos, self.page = pictures, pictures.reading.photos, page
        self.at = at = _place(page, self.photos, content, pictures.labels, width, body)
        free = self.page.inner - at.side + GAP - len(at.chunks[0]) * at.pitch
        self.left = MARGIN + at.side + (free / 2 if len(at.chunks) == 1 else 0)
        self.small = functools.cache(lambda i: shrink(self.photos[i], *at.sizes[i]))
        self.high = at.sizes[0][1]
        self.shared = _are_shared(content)

    def _middle(self, chunk: range, i: int) -> float:
        return self.left + (i - chunk.start + 0.5) * self.at.pitch - GAP / 2

    def _above(self, table: Table, chunk: range, page: Page, y: float) -> float:
        """The title of a table, and the pictures' names; returns the y below them."""
        if table.title and chunk.start == 0:
            page.text(MARGIN, y, table.title, TEXT, weight="bold")
            y += TEXT * LINE + GAP / 2
        for i in chunk:
            text = _fitting(page, self.pictures.labels[i], SMALL, self.at.pitch - GAP)
            page.text(self._middle(chunk, i), y, text, SMALL, ha="center")
        return y + SMALL * LINE + 0.02

    def _draw_row(self, row: Row, lines: list, chunk: range, page: Page, y: float) -> None:
        top = y + max(0, (self.high - _height(lines)) / 2)
        for text, size, style in lines:
            page.text(self.left - self.at.side, top, text, size, **style)
            top += size * LINE
        for i in chunk:
            (width, height), middle = self.at.sizes[i], self._middle(chunk, i)
            page.picture(middle - width / 2, y, width, height, row.draw(i, self.small(i)))
            if row.below:
                page.text(middle, y + height + 0.01, row.below[i], TINY, ha="center", color="0.3")

    def parts(self, table: Table) -> list[Part]:
        """A part for each row, of as many pictures as are side by side."""
        parts, below = [], TINY * LINE if self.shared else 0
        for chunk in self.at.chunks:
            above = functools.partial(self._above, table, chunk)
            for row in table.rows:
                lines = _side_lines(self.page, row, self.at.side)
                draw = functools.partial(self._draw_row, row, lines, chunk)
                parts.append(Part(max(self.high + below, _height(lines)) + GAP, draw, above=above))
        return parts


def tables(
    name: str, pictures: Pictures, content: list[Table], title: str, heads, maps: TokenMaps, text: str, look: Look,
    paper: Paper,
) -> dict[str, object]:  # fmt: skip
    """{file name: the function that draws it} of tables of maps over the pictures; long ones take several pages.

    `heads` are the header's rows, `text` is the caption, and `maps` are any of them.
    """
    letters = "".join(text for _, text, _ in heads) + "".join(pictures.labels) + title
    letters += "".join(text for table in content for row in table.rows for text, _, _ in row.lines)
    text += f" All {'temporal patches' if pictures.video else 'photos'} have one scale"
    text += "; below each: its share of the map." if _are_shared(content) else "."
    if pictures.video:
        count = frames_of_a_patch(pictures.reading)
        text += f" Above each: when its first frame is shown; it is {count} frames."
    made = f"{settings_text(maps.settings)}; {pictures.made_of}"

    def head(page, number):
        return header(page, MARGIN, MARGIN, title + number, heads) + 2 * GAP

    def foot(page, y, shown):
        return footer(page, y + GAP, maps.settings.method, text, made, look)

    page = Page(WIDTHS[paper.width], letters)
    figure = _Figure(pictures, content, page, paper.width, HEIGHT - head(page, "") - foot(page, 0, []))
    return numbered(name, paper, letters, head, [part for table in content for part in figure.parts(table)], foot)


def _are_shared(content: list[Table]) -> bool:
    """Whether something stands below the pictures."""
    return any(row.below for table in content for row in table.rows)


def _height(lines: list[tuple[str, float, dict]]) -> float:
    return sum(size * LINE for _, size, _ in lines)


# single and grid


def row_of(pictures: Pictures, maps: TokenMaps, layer, overlay: bool, look: Look, strongest: float, lines) -> Row:
    draw = functools.partial(pictures.draw, maps, layer, overlay, look, strongest)
    below = [] if layer in maps.blank else [f"{100 * share:.0f} %" for share in pictures.shares(maps, layer)]
    return Row(lines, draw, below)


def draw_pictures(
    pictures: Pictures, maps: TokenMaps, grid: bool, look: Look = PLAIN, paper: Paper = PAGE
) -> dict[str, object]:
    """{file name: content} of single mode, with one layer, or of a `grid` of layers by pictures."""
    layers, strongest = list(maps.maps), strongest_of([maps])
    labels = {layer: strength(maps, layer, strongest) for layer in layers}
    if not grid and pictures.video is not None:
        parts = [replace(maps, maps={layers[0]: cam}, grid=cam.shape) for cam in pictures.split(maps, layers[0])]
        files = draw_video(pictures.reading, parts, layers[0], pictures.video, look, paper)
        return {name: content for name, content in files.items() if name != "maps.npz"}
    kinds = {"Heatmap": False, "Overlay": True} if not grid or paper.heatmaps else {"Overlay": True}
    rows = [] if grid else [Row([("Photo", SMALL, {})], lambda i, photo: np.asarray(photo))]
    for layer in layers:
        label = [(f"layer {layer}", SMALL, {}), (labels[layer], TINY, GREY)]
        rows += [
            row_of(pictures, maps, layer, overlay, look, strongest, label if grid else [(kind, SMALL, {}), *label[1:]])
            for kind, overlay in kinds.items()
        ]
    title, name = f"{method_title(maps.settings)} by layer", "layer_comparison_grid"
    if not grid:
        title, name = f"{method_title(maps.settings)}, layer {layers[0]}", "visualization"
    text = caption(maps, layers, "each layer" if grid else f"layer {layers[0]}", look)
    if any("weak" in label for label in labels.values()):
        text += f" Weak: below {100 * WEAK:.0f} % of the strongest."
    files = tables(name, pictures, [Table("", rows)], title, text_rows(maps), maps, text, look, paper)
    return files | _pictures_of(pictures, maps, layers, grid, look, strongest)


def _pictures_of(pictures: Pictures, maps: TokenMaps, layers, grid: bool, look: Look, strongest: float) -> dict:
    """The files with one picture each; of a video an animation of each layer."""
    files, photos = {}, pictures.reading.photos
    if pictures.video is not None:
        for layer in (layer for layer in layers if layer not in maps.blank):
            cams, peak = pictures.split(maps, layer), full_colour(maps, layer, look, strongest)
            files[f"layer_{layer}.webp"] = animate(pictures.video.frames, cams, pictures.video.fps, look, peak)
        return files
    for i, photo in enumerate(photos):
        if not grid:
            files[f"original_image_{i + 1}.png"] = photo
        for layer in layers:
            place = f"layer_{layer}_" if grid else ""
            names = {False: f"{place}heatmap", True: f"{place}superimposed" + "_result" * (not grid)}
            for overlay, name in names.items():
                draw = functools.partial(pictures.draw, maps, layer, overlay, look, strongest, i, photo)
                files[f"{name}_{i + 1}.png"] = draw
    return files
