"""What each word of an answer takes from each word of the prompt, beside the photo.

The relevance of a position at a decoder layer is g . A, the gradient of the word's score times the hidden state that
enters the layer. By AttnLRP's rules, relevance is shared out: it adds up to the score (Achtibat et al., ICML 2024).

    passes = Relevances()               passes of `explain` that also collect the relevance of all positions
      -> explain(..., passes=passes)
      -> passes.asked(reading, maps)    Asked: shares of each word of the prompt and of the photo, as figure and tables

Shapes:  L  positions of prompt and answer     K  layers     Q  words of the prompt
"""

import functools
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import regex
from matplotlib.patches import Rectangle

from common.encoding import decimal
from common.families import photo_tokens
from common.page import (
    GAP,
    HEIGHT,
    LINE,
    MARGIN,
    SMALL,
    TEXT,
    TINY,
    WIDTHS,
    Page,
    Paper,
    excerpt,
    header,
    small_print,
    text_width,
    wrap,
)
from smooth_gradcam import Reading, TokenMaps, at_least_float32, decode, noisy_passes, token_spans
from studies.word_choice import name_words, split_words
from visualization_utils import settings_text, text_rows

__all__ = ["Asked", "Relevances", "Shares", "prompt_words"]

WARM, COLD = (0.70, 0.15, 0.12), (0.04, 0.36, 0.68)  # of words that speak for the explained one, and against it
NAMED = 10  # words that are reported in lines


def _percent(share: float) -> str:
    return f"{decimal(100 * share, 1)} %"


class Shares(NamedTuple):
    """What one word takes, as shares of the sum of absolute relevance over all positions, by layer: negative is
    against the word. nan where no gradient reaches the layer."""

    words: np.ndarray  # (K, Q), of each word of the prompt
    photo: np.ndarray  # (K,) of the image tokens
    answer: np.ndarray  # (K,) of the answer before the word


def prompt_words(reading: Reading) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """(spans in `reading.prompt`, positions in the sequence) of the words of all messages, Q each.

    A word is what `split_words` says. Texts that the chat template drops have none.
    """
    ids, tokenizer = reading.inputs["input_ids"][0].tolist(), reading.processor.tokenizer
    kept = [i for i, token in enumerate(ids) if token != ids[int(reading.positions[0])]]
    said = [ids[i] for i in kept]
    text, spans, words, places, end, shown = decode(tokenizer, said), token_spans(tokenizer, said), [], [], 0, 0
    for part in (part for message in reading.chat for part in message["content"] if "text" in part):
        own = part["text"].strip()
        start = text.find(unicodedata.normalize("NFC", own), end)
        shown = reading.prompt.find(own, shown)
        if start < 0 or not unicodedata.is_normalized("NFC", own):
            continue
        end = start + len(own)
        tokens = [(max(a, start) - start, min(b, end) - start) for a, b in spans if a < end and b > start]
        for a, b in split_words(own, tokens):
            words.append((shown + a, shown + b))
            places.append([i for i, (c, d) in zip(kept, spans, strict=True) if c < start + b and d > start + a])
        shown += len(own)
    return words, places


class Relevances:
    """Passes of `explain` that also collect the relevance of all positions, for each part and layer.

    Raises ValueError, when they run, for settings that share no relevance out.
    """

    def __init__(self, passes: Callable = noisy_passes):
        self.passes, self.sums = passes, {}

    def __call__(self, reading: Reading, spans, taps, settings, *args) -> Iterator[tuple[int, dict]]:
        """The same passes."""
        if (settings.tap, settings.rules) != ("input", "attnlrp"):
            wrong = f"tap {settings.tap} and rules {settings.rules}"
            raise ValueError(f"relevance of the prompt's words needs tap input and rules attnlrp, not {wrong}")
        for part, pairs in self.passes(reading, spans, taps, settings, *args):
            for key, (features, gradient) in pairs.items():
                if gradient is not None and features.dim() == 3:
                    relevance = (at_least_float32(features) * at_least_float32(gradient)).sum(-1)[0]  # (L,)
                    self.sums[part, key] = self.sums.get((part, key), 0) + relevance.cpu().numpy()
            yield part, pairs

    def asked(self, reading: Reading, word_maps: list[TokenMaps]) -> "Asked":
        """What these words, the parts that were explained, take from the prompt."""
        spans, places = prompt_words(reading)
        length, image = reading.inputs["input_ids"].shape[1], photo_tokens(reading).numpy()
        found = []
        for part, maps in enumerate(word_maps):
            rows = []
            for layer in maps.maps:
                own = self.sums.get((part, layer), np.full(length, np.nan))
                own = own / max(float(np.abs(own).sum()), np.finfo(np.float32).tiny)
                rows.append(([own[place].sum() for place in places], own[image].sum(), own[length:].sum()))
            found.append(Shares(*(np.array(column, np.float32) for column in zip(*rows, strict=True))))
        return Asked(reading.prompt, spans, list(word_maps[0].maps), found)


class Asked(NamedTuple):
    """What each explained word takes from the words of the prompt."""

    prompt: str
    spans: list[tuple[int, int]]  # Q words in the prompt
    layers: list[int]  # K
    found: list[Shares]  # of each explained word

    @property
    def middle(self) -> int:
        """Which of the layers lines and the figure show: the one in their middle."""
        return len(self.layers) // 2

    def lines(self, names: list[str]) -> list[str]:
        """A line for each of the first words."""
        k, lines = self.middle, []
        for name, own in list(zip(names, self.found, strict=True))[:NAMED]:
            line = f"{name}: {_percent(own.photo[k])} from the photo, {_percent(own.words[k].sum())} from the prompt"
            if len(self.spans):
                most = int(np.abs(own.words[k]).argmax())
                line += f" (most from {self.prompt[slice(*self.spans[most])]!r}, {_percent(own.words[k][most])})"
            lines.append(line)
        more = f"; {len(names) - NAMED} more in words.json" if len(names) > NAMED else ""
        return [f"prompt words at layer {self.layers[k]}, shares of absolute relevance{more}:", *lines]

    def record(self, names: list[str]) -> dict:
        """For words.json: the words of the prompt, and of each explained word the shares by layer."""
        words = [{"word": self.prompt[slice(*span)], "span": list(span)} for span in self.spans]
        shares = {
            name: {kind: values.tolist() for kind, values in own._asdict().items()}  # by layer
            for name, own in zip(names, self.found, strict=True)
        }
        return {"words": words, "shares": shares}

    def html_data(self) -> dict:
        """For the page: {"asked": words of the prompt, "words": what is added to each explained word}."""
        finite = functools.partial(np.nan_to_num, nan=0.0)
        more = [
            {"asked": finite(own.words).round(4).tolist(), "from_photo": finite(own.photo).round(4).tolist()}
            for own in self.found
        ]
        return {"asked": [{"start": start, "end": end} for start, end in self.spans], "words": more}

    def figures(self, word_maps: list[TokenMaps], paper: Paper) -> dict[str, object]:
        """{file name: the function that draws it} of the figure's pages; long answers and prompts take several."""
        pages, files = _pages(self, word_maps, paper), {}
        for i, blocks in enumerate(pages, 1):
            draw = functools.partial(_figure, self, word_maps, paper, blocks)
            files |= paper.figure("prompt_words" if i == 1 else f"prompt_words_{i}", draw)
        return files


class _Block(NamedTuple):
    """Lines of the prompt under a word."""

    word: int
    lines: list[tuple[int, int]]  # (start, end) in the prompt
    first: bool  # whether the prompt begins here


def _plain(text: str) -> str:
    """The text with blanks for white space and control characters, which are not drawn."""
    return regex.sub(r"\s|\p{Cc}", " ", text)


def _pages(asked: Asked, word_maps: list[TokenMaps], paper: Paper) -> list[list[_Block]]:
    """What stands on each page; the prompt of a word is on one, unless it takes more."""
    page, prompt = Page(WIDTHS[paper.width], asked.prompt + word_maps[0].answer), _plain(asked.prompt)
    top = _top(page, asked, word_maps, range(len(word_maps) - 1, len(word_maps)))
    room = HEIGHT - top - TEXT * LINE - _bottom(page, asked, word_maps[0], 0, 1.0)
    lines, pages, left = wrap(prompt, page.inner, SMALL, page.families), [[]], room
    for word in range(len(word_maps)):
        start = 0
        while start < len(lines):
            fits = max(0, int((left - GAP - _head_height(paper)) / (SMALL * LINE)))
            if fits < len(lines) - start and pages[-1]:
                pages, left = [*pages, []], room
                continue
            block = _Block(word, lines[start : start + max(1, fits)], start == 0)
            pages[-1].append(block)
            left -= _head_height(paper) + len(block.lines) * SMALL * LINE + GAP
            start += len(block.lines)
    return pages


def _head_height(paper: Paper) -> float:
    """Of a word with its numbers, which stand below it where the page is narrow."""
    return (SMALL if paper.width == "page" else SMALL + TINY) * LINE


def _top(page: Page, asked: Asked, word_maps: list[TokenMaps], words: range) -> float:
    """The title and the answer, with the part marked that is on this page, if it is not all; returns the y below."""
    title, count = f"What the words take from the prompt, layer {asked.layers[asked.middle]}", len(word_maps)
    span = word_maps[words[0]].target_span[0], word_maps[words[-1]].target_span[1]
    answer = text_rows(replace(word_maps[0], target_span=span))[1]
    title += f" ({words[0] + 1}–{words[-1] + 1} of {count})" if len(words) < count else ""
    return header(page, MARGIN, MARGIN, title, [answer if len(words) < count else (*answer[:2], (0, 0))]) + GAP


def _bottom(page: Page, asked: Asked, first: TokenMaps, y: float, largest: float) -> float:
    """The colour bar and the small print; returns the y below them."""
    bar = np.array([_tint(share) for share in np.linspace(-1, 1, 101)])  # (n, 4), to be laid on white
    colours = np.rint(255 * (1 - bar[:, 3:] * (1 - bar[:, :3]))).astype(np.uint8)
    axes = page.colour_scale((page.width - 2) / 2, y, 2, 0.12, [colours], (0, 0.5, 1), SMALL)
    axes.set_xticks((0, 0.5, 1), [_percent(-largest), "0", _percent(largest)])
    text = (
        "Red: words of the prompt that speak for the word above them; blue: against it. Relevance, gradient times "
        "hidden state, as shares of its absolute sum over all positions. What is missing to 100 % is the chat "
        "template's, or speaks against the word."
    )
    settings = settings_text(first.settings).replace(f"method {first.settings.method}, ", "")
    return small_print(page, y + 0.12 + SMALL * LINE + GAP, text, settings)


def _figure(asked: Asked, word_maps: list[TokenMaps], paper: Paper, blocks: list[_Block]) -> Page:
    """One page: the prompt under each word of the answer, its words tinted by what the word takes from them."""
    k, first, prompt, names = asked.middle, word_maps[0], _plain(asked.prompt), name_words(word_maps)
    page = Page(WIDTHS[paper.width], prompt + first.answer)
    y = _top(page, asked, word_maps, range(blocks[0].word, blocks[-1].word + 1))
    values = np.abs([own.words[k] for own in asked.found])
    largest = float(np.nan_to_num(values).max(initial=0))  # of all pages
    for block in blocks:
        own, name = asked.found[block.word], excerpt(names[block.word], (0, 0), 44)[0]
        shares = {"photo": own.photo[k], "prompt": own.words[k].sum(), "answer before it": own.answer[k]}
        numbers = ", ".join(f"{name} {_percent(share)}" for name, share in shares.items() if np.isfinite(share))
        numbers = (numbers or "no gradient reaches this layer") if block.first else "continued"
        page.text(MARGIN, y, name, SMALL, weight="bold")
        x, below = text_width(name, SMALL, page.families, "bold") + GAP, (SMALL - TINY) * LINE / 2
        x, below = (x, below) if paper.width == "page" else (0, SMALL * LINE)
        page.text(MARGIN + x, y + below, numbers, TINY, color="0.3")
        y = _tinted(page, y + _head_height(paper), prompt, block.lines, asked.spans, own.words[k], largest) + GAP
    return page.finish(_bottom(page, asked, first, y, largest))


def _tint(share: float) -> tuple[float, float, float, float]:
    """The colour and opacity of a share from -1 to 1."""
    return (*(WARM if share > 0 else COLD), 0.7 * abs(float(share)))


def _tinted(page: Page, y: float, prompt: str, lines, spans, shares: np.ndarray, largest: float) -> float:
    """Lines of the prompt, with a tint behind each word; returns the y below them."""
    for start, end in lines:
        for (a, b), share in zip(spans, shares, strict=True):
            a, b = max(a, start), min(b, end)
            if a < b and largest > 0 and np.isfinite(share):
                left = MARGIN + text_width(prompt[start:a], SMALL, page.families)
                box = text_width(prompt[a:b], SMALL, page.families), SMALL * LINE
                tint = {
                    "facecolor": _tint(share / largest),
                    "edgecolor": "none",
                    "zorder": -1,
                    "transform": page.inches,
                }
                page.figure.add_artist(Rectangle((left, y), *box, **tint))
        page.text(MARGIN, y, prompt[start:end].rstrip(), SMALL)
        y += SMALL * LINE
    return y
