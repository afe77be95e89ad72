"""Figures and files of flow mode with --heads: layers x heads as small maps."""

import functools
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from common.encoding import to_csv
from common.evidence import FADED, Evidence, doubt_of
from common.page import DPI, GAP, HEIGHT, MARGIN, PAGE, TINY, WIDTHS, Page, Paper, fit_box, masthead, small_print
from smooth_gradcam import PLAIN, Look, Reading, Settings, TokenMaps, colorize_cam, explain, normalize_cam, upsample_cam
from studies.heads import head_attention, head_findings, head_rows
from visualization_utils import colour_bar, reliance, text_rows

__all__ = ["draw_heads", "heads"]

LEFT, TOP = 0.42, 0.13  # for the numbers of layers and heads
CELL, LARGEST = 0.2, 0.6  # inches: of the longer side of a map, at least and at most
BETWEEN = 0.04
SELDOM = 0.05  # share on the image below which a head's map is faded
SETTINGS = "Settings: one clean copy"
FRAME = (0, 158, 115)  # around maps that point


def _caption(maps: TokenMaps, look: Look, masked: bool) -> str:
    scale = "its own maximum" if look.scale == "map" else "the maximum of all"
    framed = " Framed: its maximum lies on the object." * masked
    return (
        f"{reliance(maps)}Rows are layers, columns heads. Hot: what the positions that predict the explained tokens "
        f"attend to in the photo, as a share of {scale}; faded: less than {100 * SELDOM:.0f} % of the head's attention "
        f"is on the image.{framed} Attention is what is read, not what comes of it."
    )


def _parts(count: int, most: int) -> list[np.ndarray]:
    """0 ... count - 1 in as few runs of about the same length, at most `most`, as possible."""
    return np.array_split(np.arange(count), -(-count // max(1, most)))


def _start(photo, maps: TokenMaps, title: str, paper: Paper) -> tuple[Page, float]:
    heads = text_rows(maps)
    page = Page(WIDTHS[paper.width], "".join(text for _, text, _ in heads))
    return page, masthead(page, photo, title, heads, (1.6, 1.2)) + 2 * GAP


def _foot(page: Page, y: float, text: str, look: Look) -> float:
    return small_print(page, colour_bar(page, y, "attention", look, overlays=False), text, SETTINGS)


def draw_heads(
    reading: Reading, maps: TokenMaps, attention: np.ndarray, rows: list[dict], look: Look = PLAIN, paper: Paper = PAGE
) -> dict[str, object]:
    """{file name: the function that draws it}: small maps of all heads, in several figures where one is too high.

    `attention` (K, h, N) is that of `head_attention`, `rows` are its `head_rows`.
    """
    total, count, _ = attention.shape
    text = _caption(maps, look, "pointing" in rows[0])
    page, y = _start(reading.photo, maps, "Attention of each head", paper)
    room = HEIGHT - y - TOP - 2 * GAP - _foot(page, 0, text, look)
    aspect = reading.photo.width / reading.photo.height

    least, most = (fit_box(aspect, side, side) for side in (CELL, LARGEST))
    columns = _parts(count, int((page.inner - LEFT) / (least[0] + BETWEEN)))

    def cell(across):  # (width, height) of a map in so many blocks of layers side by side: as large as there is room
        width = (page.inner / across - LEFT) / len(columns[0]) - BETWEEN
        return fit_box(aspect, min(width, most[0]), min(room / -(-total // across) - BETWEEN, most[1]))

    across = max(range(1, 5), key=cell)
    fits = cell(across) >= least
    widest = min((page.inner - LEFT) / len(columns[0]) - BETWEEN, most[0])  # where there are several figures
    width, height = cell(across) if fits else fit_box(aspect, widest, most[1])
    pitch = max(height, TINY / 72) + BETWEEN
    blocks = np.array_split(np.arange(total), across) if fits else _parts(total, int(room / pitch))
    across = across if fits else 1
    figures = [[blocks[i : i + across], heads] for heads in columns for i in range(0, len(blocks), across)]
    files = {}
    for number, (layers, heads) in enumerate(figures, 1):
        title = "Attention of each head" + f" ({number} of {len(figures)})" * (len(figures) > 1)
        cells = _Cells(layers, heads, width, height, pitch, page.inner / across)
        draw = functools.partial(_draw, reading, maps, attention, rows, cells, title, text, look, paper)
        files |= paper.figure("heads" + f"_{number}" * (number > 1), draw)
    return files


class _Cells(NamedTuple):
    """What a figure has: blocks of layers side by side, the heads of each, and inches."""

    blocks: list[np.ndarray]
    heads: np.ndarray
    width: float  # of a map
    height: float
    pitch: float  # from a layer to the next
    step: float  # from a block to the next


def _draw(
    reading: Reading, maps: TokenMaps, attention: np.ndarray, rows: list[dict], cells: _Cells, title: str, text: str,
    look: Look, paper: Paper,
) -> Page:  # fmt: skip
    """One figure: each block is one picture."""
    page, y = _start(reading.photo, maps, title, paper)
    row_of = {(row["layer"], row["head"]): row for row in rows}
    for number, layers in enumerate(cells.blocks):
        x, picture = MARGIN + number * cells.step + LEFT, _block(reading, maps, attention, row_of, layers, cells, look)
        height, width = (pixels / DPI for pixels in picture.shape[:2])
        page.text(x - GAP / 2, y, "head", TINY, ha="right")
        for j, head in enumerate(cells.heads):
            page.text(x + (j + 0.5) * width / len(cells.heads), y, f"{head}", TINY, ha="center")
        for i, layer in enumerate(layers):
            middle = y + TOP + (i + 0.5) * height / len(layers)
            page.text(x - GAP / 2, middle, f"layer {layer}", TINY, ha="right", va="center")
        page.picture(x, y + TOP, width, height, picture).spines[:].set_visible(False)
    below = y + TOP + len(cells.blocks[0]) * cells.pitch + GAP
    return page.finish(_foot(page, below, text, look))


def _block(reading: Reading, maps: TokenMaps, attention: np.ndarray, row_of, layers, cells: _Cells, look: Look):
    """uint8 RGB of the small maps of these layers, one below the other, and of all heads of the figure."""
    across, down = (round(DPI * length) for length in (cells.width + BETWEEN, cells.pitch))
    size, gap = (round(DPI * cells.height), round(DPI * cells.width)), round(DPI * BETWEEN / 2)
    picture = np.full((len(layers) * down, len(cells.heads) * across, 3), 255, np.uint8)
    for i, layer in enumerate(layers):
        for j, head in enumerate(cells.heads):
            cam, row = attention[layer, head].reshape(reading.grid), row_of[layer, head]
            peak = (cam if look.scale == "map" else attention).max()
            peak /= (FADED if doubt_of(maps) else 1) * (FADED if row["image"] < SELDOM else 1)
            top, left = i * down + gap, j * across + gap
            if row.get("pointing"):
                picture[top - gap + 1 : top + size[0] + gap - 1, left - gap + 1 : left + size[1] + gap - 1] = FRAME
            small = colorize_cam(upsample_cam(normalize_cam(cam, peak), size, look.upsample), look.colormap)
            picture[top : top + size[0], left : left + size[1]] = small
    return picture


def heads(
    readings: list[Reading], names: list[str], spans: list[tuple[int, int]], evidence: Evidence, mask=None, *,
    look: Look = PLAIN, paper: Paper = PAGE,
) -> tuple[dict[str, object], list[str]]:  # fmt: skip
    """({file name: content}, findings in lines): heads.csv of all photos, and the first one's figures.

    `evidence` is that of the first photo's explained tokens, `mask` the object in the only photo.
    """
    attention = [head_attention(reading, span) for reading, span in zip(readings, spans, strict=True)]
    rows = [head_rows(own, reading, mask) for own, reading in zip(attention, readings, strict=True)]
    table = [
        {"photo": name} | {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
        for name, of_photo in zip(names, rows, strict=True)
        for row in of_photo
    ]
    (maps,) = explain(readings[0], spans[:1], [0], Settings(use_smooth=False, method="attention"))
    drawn = draw_heads(readings[0], replace(maps, evidence=evidence), attention[0], rows[0], look, paper)
    return drawn | {"heads.csv": to_csv(table)}, head_findings(rows[0])
