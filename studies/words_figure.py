"""The figure of words: under each word its maps, one below the other or side by side, on pages of a paper's height.

Lengths: inches of the page
"""

import functools
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.evidence import DOUBTED, PHOTOLESS, departures_of_most, doubt_of, probability_text, share_text
from common.page import (
    GAP,
    HEIGHT,
    LINE,
    MARGIN,
    PAGE,
    SMALL,
    TEXT,
    TINY,
    TITLE,
    WIDTHS,
    Page,
    Paper,
    excerpt,
    masthead,
    shrink,
    text_width,
    wrap,
)
from smooth_gradcam import PLAIN, Look, TokenMaps
from studies.word_choice import name_words
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

__all__ = ["DOUBT", "evidence_text", "word_figures", "words_caption"]

SMALLEST = {"page": 0.66, "column": 0.43}  # square root of the area that a picture has at least
LARGEST = 2.5  # and at most
LEAST = 0.81  # share of its column that a picture takes at least
NARROW, LATER = 240, 160  # columns of text of the answer in a narrow figure, and on pages after the first
BROKEN = 0.65  # width above which a word may be broken
TIE = "\N{NO-BREAK SPACE}"
DOUBT = "#b3261e"  # of the evidence of a word that is not to be believed


# texts


def _contexts(word_maps: list[TokenMaps]) -> list[str]:
    """The answer's text between each word and the one before it, without the punctuation that follows that one."""
    answer, contexts, end = word_maps[0].answer, [], word_maps[0].thinking
    end = end if word_maps[0].target_span[0] >= end else 0
    for word in word_maps:
        start, stop = word.target_span
        while contexts and end < start and not (answer[end].isspace() or answer[end].isalnum()):
            end += 1
        before, end = answer[min(end, start) : start].strip(), stop
        contexts.append(before if any(map(str.isalnum, before)) else "")
    return contexts


def evidence_text(word: TokenMaps) -> str:
    """Such as "p .98, 3 % kept"; empty if it was not measured."""
    if word.evidence is None:
        return ""
    return f"p {probability_text(word.evidence.p).removeprefix('0')}, {share_text(word.evidence.kept)} kept"


def _tied(text: str) -> str:
    """The text, to be broken at its commas only."""
    return text.replace(" ", TIE).replace(f",{TIE}", ", ")


@functools.lru_cache(10_000)
def _width(text: str, size: float, families: tuple[str, ...], weight: str = "normal") -> float:
    return text_width(text, size, list(families), weight)


def _fold(text: str, width: float, size: float, families: tuple[str, ...], weight: str = "normal") -> list[str]:
    """The text in lines, broken at blanks; a word that is wider than a line at its ties, or else between letters."""
    lines, left, blank = [], 0.0, _width("n n", size, families, weight) - _width("nn", size, families, weight)
    for word in text.split(" ") if text else []:
        wide = _width(word, size, families, weight)
        if lines and blank + wide <= left:
            lines[-1] += f" {word}"
            left -= blank + wide
            continue
        parts = [word]
        if wide > width:
            word = word.replace(TIE, " ")
            parts = [word[slice(*line)].strip() for line in wrap(word, width, size, list(families), weight)]
        lines += parts
        left = width - _width(parts[-1], size, families, weight)
    return [line.replace(TIE, " ") for line in lines]


class _Head(NamedTuple):
    """What stands over the pictures of a word."""

    lines: list[tuple[str, float, dict]]  # text, points and style: the answer before the word, and the word
    evidence: list[str]


# layout


class _Layout(NamedTuple):
    """Where the pictures of words stand: those of a word in rows of `across` layers, `columns` words side by side."""

    columns: int
    across: int
    side: float  # width of what stands beside the pictures: their layers, if a row has one layer of each word
    width: float
    height: float
    pitch: float  # from picture to picture
    words: float  # from word to word
    row: float  # height of a row of pictures with what stands under them
    heads: list[_Head]
    pages: list[list[tuple[range, list]]]  # blocks of each page: words, and their layers that stand there


class _Table:
    """The texts of words and layers, and their layout on the pages of the figure."""

    def __init__(self, photo: Image.Image, word_maps: list[TokenMaps], names: list[str], look: Look, paper: Paper):
        first, self.layers, self.names = word_maps[0], list(word_maps[0].maps), names
        page, strongest = Page(WIDTHS[paper.width], first.prompt + first.answer), strongest_of(word_maps)
        self.inner, self.families, self.aspect = page.inner, tuple(page.families), photo.width / photo.height
        self.smallest = SMALLEST[paper.width] * self.aspect**0.5
        self.labels = [{layer: strength(word, layer, strongest) for layer in self.layers} for word in word_maps]
        self.contexts, self.evidence = _contexts(word_maps), [evidence_text(word) for word in word_maps]
        self.colours = [DOUBT if doubt_of(word) else "0.3" for word in word_maps]
        self.side = self._widest((_tied(f"layer {layer}") for layer in self.layers), SMALL) + GAP
        self.kinds = [
            (bool(doubt_of(word)), any("weak" in label for label in own.values()), bool(word.blank))
            for word, own in zip(word_maps, self.labels, strict=True)
        ]
        count, layer = len(names), self.layers[-1]
        title = f"{_title(first)} ({count}–{count} of {count}), layers {layer}–{layer}"  # as long as any
        self.tops = [_masthead(page, photo, title, word_maps, range(count), later) for later in (False, True)]
        self.bottoms, self.bottom = {}, functools.partial(self._bottom, photo, word_maps, look, paper)
        self.layout = self._best()

    def _bottom(self, photo, word_maps: list[TokenMaps], look: Look, paper: Paper, words: range) -> float:
        """The height of the footer under some of the words, with the longest text that it may have."""
        kinds = frozenset(self.kinds[i] for i in words)  # all that the text depends on, but for likenesses
        if kinds not in self.bottoms:
            least = {layer: min(word.likeness.get(layer, 1) for word in word_maps) for layer in self.layers}
            alike = [replace(word, likeness=least) for word in word_maps]
            first, cells = word_maps[0], [(i, layer) for i in words for layer in self.layers]
            page, below = (
                Page(WIDTHS[paper.width], first.prompt + first.answer),
                words_caption(alike, self.labels, cells, _order(2), look),
            )
            self.bottoms[kinds] = footer(page, 0, first.settings.method, below, made_from(first, photo), look)
        return self.bottoms[kinds]

    def _body(self, words: range, later: bool) -> float:
        """The height that is left for these words on the first page or a later one."""
        return HEIGHT - self.tops[later] - self.bottom(words) - TEXT * LINE - 4 * GAP  # with a line in reserve

    def _widest(self, texts, size: float, weight: str = "normal") -> float:
        """The width of the widest part of the texts between blanks, but for those that may be broken."""
        widths = (_width(part, size, self.families, weight) for text in texts for part in text.split(" "))
        return max((width for width in widths if width <= BROKEN), default=0.0)

    def _head(self, i: int, width: float) -> _Head:
        """What stands over word i, in lines of that width."""
        before, word = self.contexts[i], excerpt(self.names[i], (0, 0), 44)[0]
        before = excerpt(before, (len(before),) * 2, min(44, int(50 * width)))[0]  # about three lines
        names = {size: _fold(word, width, size, self.families, "bold") for size in (SMALL, TINY)}
        size = min(names, key=lambda size: len(names[size]))
        lines = [(line, SMALL, {"color": "0.45"}) for line in _fold(before, width, SMALL, self.families)]
        lines += [(line, size, {"weight": "bold"}) for line in names[size]]
        return _Head(lines, _fold(_tied(self.evidence[i]), width, TINY, self.families))

    def label(self, i: int, layer, across: int, width: float) -> list[str]:
        """What stands under the picture of word i at a layer, in lines of that width."""
        text = self.labels[i][layer] if across == 1 else f"layer {layer}, {self.labels[i][layer]}"
        return _fold(_tied(text), width, TINY, self.families)

    def _best(self) -> _Layout:
        """Of the layouts with the fewest pages, the one with the largest pictures and the fewest empty places."""
        words, layers = len(self.names), len(self.layers)
        under = [_tied(label) for labels in self.labels for label in labels.values()]
        under = self._widest({*under, *(_tied(f"layer {layer},") for layer in self.layers)}, TINY)
        over = max(self._widest(map(_tied, self.evidence), TINY), self._widest(self.names, TINY, "bold"))
        highest = self._body(range(words), False) - 0.8  # 0.8 for heads and labels
        most = min(LARGEST * self.aspect**0.5, self.aspect * highest)
        least, found, lower = min(self.smallest, most, self._whole(1, 1) - GAP), [], []
        for across in range(1, layers + 1):
            room = max(under, over) if across == 1 else under
            for columns in range(1, words + 1):
                whole = self._whole(columns, across)
                if whole - GAP < max(least, room) and columns * across > 1:
                    break
                pitch = min(whole, max(most, room) + GAP)
                own = self._layouts(columns, across, pitch, most)
                found += [layout for layout in own if layout.width >= max(least, self._narrowest(across, pitch))]
                lower += own  # of a photo so tall that only a narrow picture has room under its head

        def merit(layout):
            columns, across = layout.columns, layout.across
            blocks, rows = -(-words // columns), -(-layers // across)
            filled = (words * layers / (blocks * columns * rows * across)) ** 2
            filled *= (layout.side + columns * layout.words) / self.inner
            filled *= blocks / sum(map(len, layout.pages))  # layers on one page
            order = {layers: 1.1, 1: 1.25}.get(across, 1)  # layers in one column, or one row, are read easily
            return -len(layout.pages), layout.width * filled * order

        return max(found or lower, key=merit)

    def _margins(self, across: int) -> tuple[float, float]:
        """(left of the pictures, between words beside the usual gap): layers in a column are named at its left."""
        return (self.side, 0.0) if across == 1 else (0.0, 2 * GAP)

    def _whole(self, columns: int, across: int) -> float:
        """From picture to picture, where so many words with so many layers side by side take the page's width."""
        side, apart = self._margins(across)
        return (self.inner - side + GAP - (columns - 1) * apart) / (columns * across)

    def _narrowest(self, across: int, pitch: float) -> float:
        """The least width of a picture."""
        return min(pitch - GAP, LEAST * (pitch + self._margins(across)[1] / across))

    def _layouts(self, columns: int, across: int, pitch: float, most: float) -> list[_Layout]:
        """Those with pictures from the widest that has room on a page, at most `most`, to the least of its column."""
        count, text = len(self.names), pitch - GAP
        heads = [self._head(i, across * pitch - GAP) for i in range(count)]
        lines = max(len(self.label(i, layer, across, text)) for i in range(count) for layer in self.layers)
        under = lines * TINY * LINE + GAP
        highest = max(sum(_heights(heads[i : i + columns])) for i in range(0, count, columns))
        side, apart = self._margins(across)
        high = max(self._body(range(count), False) - highest - under, GAP)
        widest, found = min(text, most, high * self.aspect), []
        for width in np.linspace(widest, min(widest, self._narrowest(across, pitch)), 4):
            row = width / self.aspect + under
            pages = self._paginate(heads, columns, across, row)
            place = side, width, width / self.aspect, pitch, across * pitch + apart, row
            found.append(_Layout(columns, across, *place, heads, pages))
        return found

    def _paginate(self, heads: list[_Head], columns: int, across: int, row: float) -> list[list[tuple[range, list]]]:
        """The blocks (words, layers) of each page; a block that does not fit on one page continues on the next."""
        pages, y = [[]], 0.0
        for start in range(0, len(heads), columns):
            words, remaining = range(start, min(start + columns, len(heads))), self.layers
            head = sum(_heights(heads[start : start + columns]))
            while remaining:
                begin = pages[-1][0][0][0] if pages[-1] else start
                body = self._body(range(begin, words[-1] + 1), len(pages) > 1)
                fits = across * max(0, int((body - y - head) / row))
                if pages[-1] and fits < len(remaining):  # a page of its own keeps more of it together
                    pages, y = [*pages, []], 0.0
                    continue
                here = max(across, fits)
                pages[-1].append((words, remaining[:here]))
                y += head + -(-len(remaining[:here]) // across) * row + 2 * GAP
                remaining = remaining[here:]
        return pages


def _heights(heads: list[_Head]) -> tuple[float, float]:
    """Of the words and of their evidence, over pictures that stand side by side."""
    lines, evidence = (max(map(len, kind)) for kind in zip(*heads, strict=True))
    return lines * SMALL * LINE, evidence * TINY * LINE + GAP / 2


def _draw_heads(page: Page, heads: list[_Head], colours: list[str], xs: list[float], y: float) -> float:
    """Over each word's pictures the text before it, in grey, the word and its evidence; returns the y below them."""
    words, evidence = _heights(heads)
    y += words
    for x, head, colour in zip(xs, heads, colours, strict=True):
        for j, (line, size, style) in enumerate(head.lines):
            page.text(x, y - (len(head.lines) - j) * SMALL * LINE, line, size, **style)
        for j, line in enumerate(head.evidence):
            page.text(x, y + j * TINY * LINE, line.rstrip(","), TINY, color=colour)
    return y + evidence


def word_figures(
    photo: Image.Image, word_maps: list[TokenMaps], look: Look = PLAIN, paper: Paper = PAGE
) -> dict[str, object]:
    """{file name: the function that draws it} of the figure's pages; long answers take several.

    The words of the thinking that leads to an answer have pages of their own.
    """
    files, end, named = {}, word_maps[0].thinking, list(zip(word_maps, name_words(word_maps), strict=True))
    for file, inside in (("words_by_layer", False), ("words_by_layer_thinking", True)):
        own = [(word, name) for word, name in named if (word.target_span[0] < end) is inside]
        if not own:
            continue
        words, names = map(list, zip(*own, strict=True))
        table = _Table(photo, words, names, look, paper)
        for i, blocks in enumerate(table.layout.pages, 1):
            page = file if i == 1 else f"{file}_{i}"
            files |= paper.figure(page, functools.partial(_words_figure, photo, words, table, blocks, look, paper))
    return files


def _title(first: TokenMaps) -> str:
    title = f"{method_title(first.settings)}, word by word"
    return title + (", of its thinking" if first.target_span[0] < first.thinking else "")


def _masthead(
    page: Page, photo: Image.Image, title: str, word_maps: list[TokenMaps], words: range, later: bool
) -> float:
    """The title and the answer, whose part on this page is marked unless it is all; returns the y below.

    The first page has the photo and the prompt, too.
    """
    span = word_maps[words[0]].target_span[0], word_maps[words[-1]].target_span[1]
    if later:
        size = TITLE if page.width == WIDTHS["page"] else TEXT
        y = page.lines(MARGIN, MARGIN, page.inner, title, size, weight="bold") + GAP
        answer, span = excerpt(word_maps[0].answer, span, LATER)
        return page.lines(MARGIN, y, page.inner, answer, TEXT, span)
    prompt, answer = text_rows(replace(word_maps[0], target_span=span))[:2]
    if page.width < WIDTHS["page"]:
        answer = (answer[0], *excerpt(word_maps[0].answer, span, NARROW))
    rows = [prompt, answer if len(words) < len(word_maps) else (*answer[:2], (0, 0))]
    return masthead(page, photo, title, rows, (2.3, 1.4))


def _words_figure(photo, word_maps: list[TokenMaps], table: _Table, blocks: list, look: Look, paper: Paper) -> Page:
    """One page: overlays of words and layers; blocks of words one below the other."""
    first, at = word_maps[0], table.layout
    page, strongest = Page(WIDTHS[paper.width], first.prompt + first.answer), strongest_of(word_maps)
    title = _title(first)
    start, end, layers = blocks[0][0][0], blocks[-1][0][-1] + 1, blocks[0][1]
    later = start > 0 or layers[0] != table.layers[0]
    if end - start < len(word_maps):
        title += f" ({start + 1}–{end} of {len(word_maps)})"
    if len(layers) < len(table.layers):
        title += f", layers {layers[0]}–{layers[-1]}" if len(layers) > 1 else f", layer {layers[0]}"
    y = _masthead(page, photo, title, word_maps, range(start, end), later) + 2 * GAP

    small, cells = shrink(photo, at.width, at.height), []
    wide = (at.columns - 1) * at.words + at.across * at.pitch - GAP  # of the texts; pictures may be narrower
    left = MARGIN + at.side + (page.inner - at.side - wide) / 2 + min((at.pitch - GAP - at.width) / 2, MARGIN / 2)
    for words, layers in blocks:
        xs = [left + i * at.words for i in range(len(words))]
        y = _draw_heads(page, at.heads[words[0] : words[-1] + 1], table.colours[words[0] : words[-1] + 1], xs, y)
        for j, layer in enumerate(layers):
            top = y + j // at.across * at.row
            if at.across == 1:
                page.text(xs[0] - at.side, top + at.height / 2, f"layer {layer}", SMALL, va="center")
            for word, i in zip(xs, words, strict=True):
                x = word + j % at.across * at.pitch
                picture = draw_layer(small, word_maps[i], layer, True, look, strongest)
                page.picture(x, top, at.width, at.height, picture)
                for k, line in enumerate(table.label(i, layer, at.across, at.pitch - GAP)):
                    page.text(x, top + at.height + 0.02 + k * TINY * LINE, line.rstrip(","), TINY, color="0.3")
                cells.append((i, layer))
        y += -(-len(layers) // at.across) * at.row + 2 * GAP
    below = words_caption(word_maps, table.labels, cells, _order(at.across), look)
    return page.finish(footer(page, y, first.settings.method, below, made_from(first, photo), look))


def _order(across: int) -> str:
    return "a column for each word" if across == 1 else "the layers of each word side by side"


def words_caption(
    word_maps: list[TokenMaps], labels: list[dict], cells: list[tuple[int, int]], order: str, look: Look
) -> str:
    """The caption of a page with these cells, (word, layer), in this order."""
    shown = [word_maps[i] for i in dict.fromkeys(i for i, _ in cells)]
    doubted = [word for word in shown if doubt_of(word)]
    about = shown[0] if len(doubted) == len(shown) else replace(shown[0], evidence=None)  # not one word's for all
    below = caption(about, [], f"each layer, {order}", look)
    if any(word.evidence for word in shown):
        below += " Under each word: its probability p, and the share of p that is kept without the photo."
    if any("weak" in labels[i][layer] for i, layer in cells):
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
