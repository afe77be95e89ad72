"""The figure of words: a column for each word under its text and its evidence, a row for each layer.

Lengths: inches of the page
"""

import functools
from dataclasses import replace

from PIL import Image

from common.evidence import DOUBTED, PHOTOLESS, departures_of_most, doubt_of, probability_text, share_text
from common.page import (
    BODY_HEIGHTS,
    GAP,
    LINE,
    MARGIN,
    PAGE,
    SMALL,
    TINY,
    WIDTHS,
    Page,
    Paper,
    excerpt,
    fit_box,
    masthead,
    shrink,
    text_width,
    wrap,
)
from smooth_gradcam import PLAIN, Look, TokenMaps
from visualization_utils import (
    FADED,
    WEAK,
    caption,
    draw_layer,
    footer,
    made_from,
    method_title,
    strength,
    strongest_of,
    text_rows,
)

__all__ = ["word_figures"]

CELL, LOW = 0.75, 0.6  # least width of a word's column, and least height of a picture
DOUBT = "#b3261e"  # of the evidence of a word that is not to be believed


def _columns_of_text(word_maps: list[TokenMaps]) -> list[tuple[str, str]]:
    """For each word (the answer's text since the word before, the word with the punctuation that follows it)."""
    answer, columns, end = word_maps[0].answer, [], word_maps[0].thinking
    end = end if word_maps[0].target_span[0] >= end else 0
    for i, word in enumerate(word_maps):
        start, stop = word.target_span
        before, end = answer[min(end, start) : start].strip(), stop
        following = word_maps[i + 1].target_span[0] if i + 1 < len(word_maps) else len(answer)
        while end < following and not (answer[end].isspace() or answer[end].isalnum()):
            end += 1
        columns.append((before, answer[start:end]))
    return columns


def _wrapped_heads(page: Page, width: float, heads: list[tuple[str, str]]) -> list[tuple[list[str], list[str]]]:
    """The wrapped lines of both texts of each head, in a column of that width."""
    return [
        tuple(
            [text[slice(*line)].strip() for line in wrap(text, width, SMALL, page.families, weight)] if text else []
            for text, weight in (
                (excerpt(before, (len(before),) * 2, 44)[0], "normal"),
                (excerpt(word, (0, 0), 44)[0], "bold"),
            )
        )
        for before, word in heads
    ]


def _evidence_line(word: TokenMaps) -> str:
    """Such as "p .98, 3 % kept"; empty if it was not measured."""
    if word.evidence is None:
        return ""
    return f"p {probability_text(word.evidence.p).removeprefix('0')}, {share_text(word.evidence.kept)} kept"


class _Table:
    """The layout of the words (across) and layers (down) on the pages of the figure."""

    def __init__(self, photo: Image.Image, word_maps: list[TokenMaps], paper: Paper):
        first, self.layers = word_maps[0], list(word_maps[0].maps)
        page, strongest = Page(WIDTHS[paper.width], first.prompt + first.answer), strongest_of(word_maps)
        self.labels = [{layer: strength(word, layer, strongest) for layer in self.layers} for word in word_maps]
        self.side = max(text_width(f"layer {layer}", SMALL, page.families) for layer in self.layers) + GAP
        self.evidence = [_evidence_line(word) for word in word_maps]
        texts = {text for labels in self.labels for text in labels.values()} | {*self.evidence}
        room = max(CELL, *(text_width(text, TINY, page.families) for text in texts))  # of a column
        inner, self.body = page.inner - self.side + GAP, BODY_HEIGHTS[paper.width]
        most = max(1, int(inner / (room + GAP)))
        self.columns = -(-len(word_maps) // -(-len(word_maps) // most))  # blocks of similar numbers of words
        cell, aspect = min(1.5, inner / self.columns - GAP), photo.width / photo.height
        high = (self.body - 0.8) / len(self.layers) - TINY * LINE - GAP  # so that all layers stand on one page
        self.width, self.height = fit_box(aspect, cell, min(1.5, max(high, LOW)))
        self.pitch, self.row = max(self.width, min(cell, max(1.0, room))) + GAP, self.height + TINY * LINE + GAP
        self.heads = _wrapped_heads(page, self.pitch - GAP, _columns_of_text(word_maps))
        self.colours = [DOUBT if doubt_of(word) else "0.3" for word in word_maps]
        self.pages = self.paginate(len(word_maps))

    def heads_height(self, words: range) -> float:
        lines = sum(max(map(len, texts)) for texts in zip(*(self.heads[i] for i in words), strict=True))
        return lines * SMALL * LINE + TINY * LINE * any(self.evidence) + GAP / 2

    def draw_heads(self, page: Page, words: range, xs: list[float], y: float) -> float:
        """Over each column the text before its word, in grey, the word and its evidence; returns the y below them."""
        middle = y + max(len(self.heads[i][0]) for i in words) * SMALL * LINE  # the words stand on one line
        below = y + self.heads_height(words)
        for x, i in zip(xs, words, strict=True):
            above, word = self.heads[i]
            for j, line in enumerate(above):
                page.text(x, middle - (len(above) - j) * SMALL * LINE, line, SMALL, color="0.45")
            for j, line in enumerate(word):
                page.text(x, middle + j * SMALL * LINE, line, SMALL, weight="bold")
            page.text(x, below - GAP / 2 - TINY * LINE, self.evidence[i], TINY, color=self.colours[i])
        return below

    def paginate(self, count: int) -> list[list[tuple[range, list[int]]]]:
        """The blocks (words, layers) of each page; a block that does not fit on one page continues on the next."""
        pages, y = [[]], 0.0
        for start in range(0, count, self.columns):
            words, remaining = range(start, min(start + self.columns, count)), self.layers
            head = self.heads_height(words)
            while remaining:
                fits = int((self.body - y - head) / self.row)
                if pages[-1] and fits < len(remaining):  # a page of its own keeps more of it together
                    pages, y = [*pages, []], 0.0
                    continue
                layers, remaining = remaining[: max(1, fits)], remaining[max(1, fits) :]
                pages[-1].append((words, layers))
                y += head + len(layers) * self.row + 2 * GAP
        return pages


def word_figures(
    photo: Image.Image, word_maps: list[TokenMaps], look: Look = PLAIN, paper: Paper = PAGE
) -> dict[str, object]:
    """{file name: the function that draws it} of the figure's pages; long answers take several.

    The words of the thinking that leads to an answer have pages of their own.
    """
    files, end = {}, word_maps[0].thinking
    for name, inside in (("words_by_layer", False), ("words_by_layer_thinking", True)):
        own = [word for word in word_maps if (word.target_span[0] < end) is inside]
        table = _Table(photo, own, paper) if own else None
        for i, blocks in enumerate(table.pages if own else [], 1):
            page = name if i == 1 else f"{name}_{i}"
            files |= paper.figure(page, functools.partial(_words_figure, photo, own, table, blocks, look, paper))
    return files


def _words_figure(photo, word_maps: list[TokenMaps], table: _Table, blocks: list, look: Look, paper: Paper) -> Page:
    """One page: words across, layers down, overlays in the cells; blocks of words one below the other."""
    first = word_maps[0]
    rows = [(label, text, (0, 0)) for label, text, _ in text_rows(first)[:2]]
    page, strongest = Page(WIDTHS[paper.width], first.prompt + first.answer), strongest_of(word_maps)
    title = f"{method_title(first.settings)}, word by word"
    title += ", of its thinking" if first.target_span[0] < first.thinking else ""
    start, end, layers = blocks[0][0][0], blocks[-1][0][-1] + 1, blocks[0][1]
    if end - start < len(word_maps):
        title += f" ({start + 1}–{end} of {len(word_maps)})"
    if len(layers) < len(table.layers):
        title += f", layers {layers[0]}–{layers[-1]}" if len(layers) > 1 else f", layer {layers[0]}"
    y = masthead(page, photo, title, rows, (2.3, 1.4)) + 2 * GAP

    small, cells = shrink(photo, table.width, table.height), []
    for words, layers in blocks:
        xs = [MARGIN + table.side + i * table.pitch for i in range(len(words))]
        y = table.draw_heads(page, words, xs, y)
        for layer in layers:
            page.text(MARGIN, y + table.height / 2, f"layer {layer}", SMALL, va="center")
            for x, i in zip(xs, words, strict=True):
                picture = draw_layer(small, word_maps[i], layer, True, look, strongest)
                page.picture(x, y, table.width, table.height, picture)
                page.text(x, y + table.height + 0.02, table.labels[i][layer], TINY, color="0.3")
                cells.append((i, layer))
            y += table.row
        y += 2 * GAP
    below = _caption(word_maps, table, cells, look)
    return page.finish(footer(page, y, first.settings.method, below, made_from(first, photo), look))


def _caption(word_maps: list[TokenMaps], table: _Table, cells: list[tuple[int, int]], look: Look) -> str:
    """The caption of a page with these cells, (word, layer)."""
    shown = [word_maps[i] for i in dict.fromkeys(i for i, _ in cells)]
    doubted = [word for word in shown if doubt_of(word)]
    about = shown[0] if len(doubted) == len(shown) else replace(shown[0], evidence=None)  # not one word's for all
    below = caption(about, [], "each layer, a column for each word", look)
    if any(word.evidence for word in shown):
        below += " Under each word: its probability p, and the share of p that is kept without the photo."
    if any("weak" in table.labels[i][layer] for i, layer in cells):
        below += f" Weak: below {100 * WEAK:.0f} % of the strongest of all"
        if doubted:
            photoless = f"more than {share_text(PHOTOLESS)} of p kept without the photo"
            below += f", hardly said (p below {DOUBTED}), or {photoless}"
        if 0 < len(doubted) < len(shown):
            below += f"; the last two are not to be believed, and drawn in {100 * FADED:.0f} % of the colours"
        below += "."
    if apart := departures_of_most(shown, list(dict.fromkeys(layer for _, layer in cells))):
        below += f" {apart[0].upper()}{apart[1:]}."
    if any(layer in word_maps[i].blank for i, layer in cells):
        below += " Grey: the word has no map at that layer, for the reason that stands there."
    return below
