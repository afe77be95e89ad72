"""Word by word: a map of each word of an answer, as a figure and as a page to explore.

    Reading                             read: one answer
      -> parts of the answer            choose_words
      -> TokenMaps of each word         explain: one forward pass per noisy copy serves all words and layers
      -> figure, page, tables           draw_words

Shapes:  H, W  rows and columns of image tokens
"""

import base64
import functools
import io
import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

from common.files import output_folder
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
from common.passes import token_probabilities
from common.photos import open_photo, open_photos, readable
from common.progress import show_progress
from smooth_gradcam import (
    Look,
    Reading,
    Settings,
    TokenMaps,
    borrowed,
    colour_table,
    explain,
    get_model_layers,
    normalize_cam,
    occurrences,
    read,
    score_parts,
)
from visualization_utils import (
    PLAIN,
    WEAK,
    caption,
    check_drawing,
    draw_layer,
    footer,
    layer_pictures,
    made_from,
    method_title,
    select_layers,
    settings_text,
    strength,
    strongest_of,
    text_rows,
)

__all__ = ["compute_word_maps", "create_word_maps", "choose_words", "split_words", "draw_words"]


# which words

UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
FUNCTION_WORDS = """
a an the this that these those some any each every all both no not nor and or but so than then as if while because of
in on at by for from to into onto with without within over under above below between among through across along around
near behind beside beyond against toward towards about up down out off upon is are was were be been being am do does
did done has have had having can could will would shall should may might must i you he she it we they me him her us
them my your his its our their there here who whom whose which what when where why how it's that's there's isn't aren't
also just very too such other another more most much many only own same
的 了 着 在 是 和 与 及 或 有 也 都 就 而 但 把 被 这 那 其 之 一个 这个 那个 个
"""  # of English and Chinese


def split_words(answer: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, end) in characters of each word of the answer, whose tokens have these spans; see `token_spans`.

    A word is a run of letters, digits and their marks, across an apostrophe or hyphen inside it and a decimal point.
    In scripts that set no blanks (Chinese, Japanese, Thai, Lao, Khmer, Burmese) it is what the model has as a token.
    """
    inside_tokens = {i for first, last in spans for i in range(first + 1, last)}
    cuts = {start for start, _ in spans} - inside_tokens
    unspaced = [bool(UNSPACED.match(character)) for character in answer]
    words = []
    for i, character in enumerate(answer):
        inside = bool(words) and words[-1][1] == i
        if character.isalnum():
            if inside and unspaced[i] == unspaced[i - 1] and not (unspaced[i] and i in cuts):
                words[-1] = words[-1][0], i + 1
            else:
                words.append((i, i + 1))
        elif inside and (unicodedata.category(character)[0] == "M" or character in "\u200c\u200d"):  # (non-)joiners
            words[-1] = words[-1][0], i + 1
        elif inside and answer[i + 1 : i + 2].isalnum() and not (unspaced[i - 1] or unspaced[i + 1]):
            number = answer[i - 1].isdigit() and answer[i + 1].isdigit()
            if character in "-'\u2019" or (character in ".," and number):
                words[-1] = words[-1][0], i + 1
    return words


def choose_words(answer: str, spans: list[tuple[int, int]], words) -> list[tuple[int, int]]:
    """The spans in characters of the chosen words, in the answer's order: see `compute_word_maps`.

    "content" leaves out the words of `FUNCTION_WORDS`, English and Chinese, whatever their letter case. Raises
    ValueError if nothing is left, or for a word that is not in the answer.
    """
    if isinstance(words, str) and words in ("content", "all"):
        found = split_words(answer, spans)
        if words == "content":
            function_words = FUNCTION_WORDS.split()
            found = [span for span in found if answer[slice(*span)].lower() not in function_words]
        if not found:
            raise ValueError(f"words={words!r}: there is none in the answer {answer!r}; name the parts to explain")
        return found
    found = set()
    if not isinstance(words, Iterable):
        raise ValueError(f'words={words!r} must be "content", "all", or words of the answer')
    for word in words.split(",") if isinstance(words, str) else words:
        found.update(occurrences(answer, word.strip() if isinstance(word, str) else word, "words"))
    if not found:
        raise ValueError(f'words={words!r} must be "content", "all", or words of the answer {answer!r}')
    return sorted(found)


# maps


def map_words(reading: Reading, words, layers, settings: Settings, progress=None, **passes) -> list[TokenMaps]:
    """The raw maps of each chosen word of a reading; arguments and errors are those of `compute_word_maps`."""
    if settings.contrast is not None:
        raise ValueError(f"contrast={settings.contrast!r}: a map of each word takes no contrast")
    return explain(reading, choose_words(reading.answer, reading.spans, words), layers, settings, progress, **passes)


def compute_word_maps(
    model, processor, image, prompt: str, layers: Iterable[int | nn.Module],
    *, words="content", answer=None, max_new_tokens=128, progress=None, batch_size=1, **settings,
) -> list[TokenMaps]:  # fmt: skip
    """The raw maps of each word of the answer, in its order: one forward per noisy copy serves all words and layers.

    `words` is "content" (all but function words), "all", or the words themselves, each at all its occurrences, as a
    list or as "dog,apple"; `split_words` says what a word is, `choose_words` what a function word. The rest is as in
    `compute_token_maps`, which says what is raised; ValueError too for words that are not in the answer.
    """
    settings = Settings(**settings)
    reading = read(model, processor, open_photos(image), prompt, answer, max_new_tokens)
    return map_words(reading, words, layers, settings, progress, batch_size=batch_size)


def word_tokens(reading: Reading, word_maps: list[TokenMaps]) -> tuple[list[list[float]], list[list[str]]]:
    """Of each word its tokens' probabilities and texts, from one forward pass of the photo without noise.

    A probability is that of the token after the photo, the prompt and the answer before it. The text of a token that
    carries only some bytes of a character is that character.
    """
    with borrowed(reading.model):
        forced, (scored,) = score_parts(reading.inputs, reading.tokens, [range(len(reading.tokens))])
        pixels = reading.inputs["pixel_values"][None]
        found = token_probabilities(reading.model, forced, pixels, scored)[0].tolist()  # (A,)
    probabilities = [[found[i] for i in word.target_tokens] for word in word_maps]
    texts = [[reading.answer[slice(*reading.spans[i])] for i in word.target_tokens] for word in word_maps]
    return probabilities, texts


# figure


def name_words(word_maps: list[TokenMaps]) -> list[str]:
    """A name for each word: itself, and from its second occurrence on with a number, "dog (2)"."""
    texts = [word.target for word in word_maps]
    return [f"{text} ({texts[: i + 1].count(text)})" if text in texts[:i] else text for i, text in enumerate(texts)]


def _columns_of_text(word_maps: list[TokenMaps]) -> list[tuple[str, str]]:
    """For each word: the text of the answer that precedes it, and the word with the punctuation that follows."""
    answer, columns, end = word_maps[0].answer, [], 0
    for i, word in enumerate(word_maps):
        start, stop = word.target_span
        before, end = answer[min(end, start) : start].strip(), stop
        following = word_maps[i + 1].target_span[0] if i + 1 < len(word_maps) else len(answer)
        while end < following and not (answer[end].isspace() or answer[end].isalnum()):
            end += 1
        columns.append((before, answer[start:end]))
    return columns


def _wrapped_heads(page: Page, width: float, heads: list[tuple[str, str]]) -> list[tuple[list[str], list[str]]]:
    """The lines of each head in a column of that width."""
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


def _heads_height(heads: list[tuple[list[str], list[str]]]) -> float:
    return sum(max(map(len, lines)) for lines in zip(*heads, strict=True)) * SMALL * LINE + GAP / 2


def _word_heads(page: Page, xs: list[float], y: float, heads: list[tuple[list[str], list[str]]]) -> None:
    """Over each column the text before its word, in grey, and the word."""
    middle = y + max(len(before) for before, _ in heads) * SMALL * LINE  # the words stand on one line
    for x, (above, below) in zip(xs, heads, strict=True):
        for i, line in enumerate(above):
            page.text(x, middle - (len(above) - i) * SMALL * LINE, line, SMALL, color="0.45")
        for i, line in enumerate(below):
            page.text(x, middle + i * SMALL * LINE, line, SMALL, weight="bold")


class _Table:
    """How the words (across) and layers (down) are laid out on the pages of the figure."""

    def __init__(self, photo: Image.Image, word_maps: list[TokenMaps], paper: Paper):
        given, self.layers = word_maps[0], list(word_maps[0].maps)
        page, strongest = Page(WIDTHS[paper.width], given.prompt + given.answer), strongest_of(word_maps)
        self.said = [{layer: strength(word, layer, strongest) for layer in self.layers} for word in word_maps]
        self.side = max(text_width(f"layer {layer}", SMALL, page.families) for layer in self.layers) + GAP
        labels = {text for words in self.said for text in words.values()}
        room = max(CELL, *(text_width(text, TINY, page.families) for text in labels))  # of a column
        inner, self.body = page.inner - self.side + GAP, BODY_HEIGHTS[paper.width]
        most = max(1, int(inner / (room + GAP)))
        self.columns = -(-len(word_maps) // -(-len(word_maps) // most))  # blocks of about as many words
        cell, aspect = min(1.5, inner / self.columns - GAP), photo.width / photo.height
        high = (self.body - 0.8) / len(self.layers) - TINY * LINE - GAP  # so that all layers stand on one page
        self.width, self.height = fit_box(aspect, cell, min(1.5, max(high, LOW)))
        self.pitch, self.row = max(self.width, min(cell, max(1.0, room))) + GAP, self.height + TINY * LINE + GAP
        self.heads = _wrapped_heads(page, self.pitch - GAP, _columns_of_text(word_maps))
        self.pages = self.paginate(len(word_maps))

    def paginate(self, count: int) -> list[list[tuple[range, list[int]]]]:
        """Of each page its blocks, (words, layers): a block goes on on the next page where it does not fit on one."""
        pages, y = [[]], 0.0
        for start in range(0, count, self.columns):
            words, rest = range(start, min(start + self.columns, count)), self.layers
            head = _heads_height([self.heads[i] for i in words])
            while rest:
                fits = int((self.body - y - head) / self.row)
                if pages[-1] and fits < len(rest):  # on a page of its own, more of it stands together
                    pages, y = [*pages, []], 0.0
                    continue
                part, rest = rest[: max(1, fits)], rest[max(1, fits) :]
                pages[-1].append((words, part))
                y += head + len(part) * self.row + 2 * GAP
        return pages


CELL, LOW = 0.75, 0.6  # width of a word's column and height of a picture, at least


def word_figures(
    photo: Image.Image, word_maps: list[TokenMaps], look: Look = PLAIN, paper: Paper = PAGE
) -> dict[str, object]:
    """{file name: function that draws a page of the figure}; long answers take several pages."""
    table, files = _Table(photo, word_maps, paper), {}
    for i, blocks in enumerate(table.pages, 1):
        name = "words_by_layer" if i == 1 else f"words_by_layer_{i}"
        files |= paper.figure(name, functools.partial(_words_figure, photo, word_maps, table, blocks, look, paper))
    return files


def _words_figure(photo, word_maps: list[TokenMaps], table: _Table, blocks: list, look: Look, paper: Paper) -> Page:
    """Words across, layers down, overlays in the cells; blocks of words one below the other."""
    given = word_maps[0]
    rows = [(label, text, (0, 0)) for label, text, _ in text_rows(given)[:2]]
    page, strongest = Page(WIDTHS[paper.width], given.prompt + given.answer), strongest_of(word_maps)
    title = f"{method_title(given.settings)}, word by word"
    first, last, layers = blocks[0][0][0], blocks[-1][0][-1], blocks[0][1]
    if last - first + 1 < len(word_maps):
        title += f" ({first + 1}–{last + 1} of {len(word_maps)})"
    if len(layers) < len(table.layers):
        title += f", layers {layers[0]}–{layers[-1]}" if len(layers) > 1 else f", layer {layers[0]}"
    y = masthead(page, photo, title, rows, (2.3, 1.4)) + 2 * GAP

    small, shown = shrink(photo, table.width, table.height), []
    for words, layers in blocks:
        xs, heads = [MARGIN + table.side + i * table.pitch for i in range(len(words))], [table.heads[i] for i in words]
        _word_heads(page, xs, y, heads)
        y += _heads_height(heads)
        for layer in layers:
            page.text(MARGIN, y + table.height / 2, f"layer {layer}", SMALL, va="center")
            for x, i in zip(xs, words, strict=True):
                picture = draw_layer(small, word_maps[i], layer, True, look, strongest)
                page.picture(x, y, table.width, table.height, picture)
                page.text(x, y + table.height + 0.02, table.said[i][layer], TINY, color="0.3")
                shown.append((i, layer))
            y += table.row
        y += 2 * GAP
    below = caption(given, [], "each layer, a column for each word", look)
    if any("weak" in table.said[i][layer] for i, layer in shown):
        below += f" Weak: below {100 * WEAK:.0f} % of the strongest of all."
    if any(layer in word_maps[i].blank for i, layer in shown):
        below += " Grey: the word has no map at that layer, for the reason that stands there."
    return page.finish(footer(page, y, given.settings.method, below, made_from(given, photo), look))


# page and tables

PAGE_SIDE = 1600  # pixels of the longer side of the photo in the page


def page_data(
    image, file_name: str, word_maps: list[TokenMaps], probabilities: list[list[float]], tokens, look: Look = PLAIN
) -> dict:
    """What the page of the words shows, and the look with which it opens, as plain values: see words_page.html.

    Raw maps are stored as their maximum and the share of it in 16 bits, little-endian, base64.
    """
    photo, given = open_photo(image).copy(), word_maps[0]
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
        "settings": settings_text(given.settings),
        "look": {"colours": look.colormap, "opacity": look.opacity, "scale": look.scale},
        "table": base64.b64encode(colour_table(look.colormap).tobytes()).decode(),
        "words": [
            {
                "text": word.target,
                "start": word.target_span[0],
                "end": word.target_span[1],
                "tokens": token,
                "probabilities": probability,
                "maps": ["" if layer in word.blank else pack(cam) for layer, cam in word.maps.items()],
                "maxima": [float(cam.max()) for cam in word.maps.values()],
                "blank": [word.blank.get(layer, "") for layer in word.maps],
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
    image, file_name: str, word_maps: list[TokenMaps], probabilities: list[list[float]], tokens: list[list[str]],
    look: Look = PLAIN, paper: Paper = PAGE,
) -> tuple[dict, dict[str, object]]:  # fmt: skip
    """Of all words ({name: {layer: LayerPictures}}, {file name: content}).

    `probabilities` and `tokens` are those of each word's tokens; `file_name` is the photo's, for the page.
    """
    photo, given, names = open_photo(image), word_maps[0], name_words(word_maps)
    strongest = strongest_of(word_maps)
    results = [layer_pictures(photo, word, look, strongest) for word in word_maps]
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
    about |= {"settings": asdict(given.settings), "words": records}
    files = word_figures(photo, word_maps, look, paper) | {
        "index.html": words_page(page_data(photo, file_name, word_maps, probabilities, tokens, look)),
        "words.json": json.dumps(about, ensure_ascii=False, indent=1) + "\n",
        "maps.npz": {
            "maps": np.stack([np.stack(list(word.maps.values())) for word in word_maps]),  # (words, layers, H, W)
            "layers": np.array(list(given.maps)),
            "words": np.array(names),
            "spans": np.array([word.target_span for word in word_maps]),
        },
    }
    return dict(zip(names, results, strict=True)), files


def create_word_maps(
    model, processor, image, prompt, layer_range="auto", save_dir="cam_results_words",
    *, words="content", answer=None, max_new_tokens=128, num_samples=5, noise_std=0.1, quiet=False, look=PLAIN,
    paper=PAGE, batch_size=1, **settings,
):  # fmt: skip
    """A map of each word of the answer at each layer, all from one answer and one forward pass per noisy copy.

    `words` is "content" (all but function words), "all", or the words, as a list or as "dog,apple"; `layer_range` as in
    `create_layer_comparison_grid`, `settings` as there but for a target and a contrast. Writes words_by_layer.png
    (words across, layers down; of long answers further pages), index.html (a page that shows each word's map at a
    touch; it needs no network), words.json (tokens, spans, probabilities) and maps.npz (the raw maps).

    Returns {word: {layer: {"superimposed", "heatmap", "cam"}}}, the second "dog" as "dog (2)". Raises what
    `compute_word_maps` and `output_folder` raise.
    """
    check_drawing(look, paper)
    layers = select_layers(layer_range, get_model_layers(model)[1])
    settings = Settings(num_samples, noise_std, **settings)
    with output_folder(save_dir, inputs=[image]) as write:
        reading = read(model, processor, open_photos(image), prompt, answer, max_new_tokens)
        photo = reading.photo  # there must be but one
        word_maps = map_words(reading, words, layers, settings, show_progress(quiet), batch_size=batch_size)
        file_name = readable(Path(image).name) if isinstance(image, (str, Path)) else ""
        results, files = draw_words(photo, file_name, word_maps, *word_tokens(reading, word_maps), look, paper)
        write(files)
    return results
