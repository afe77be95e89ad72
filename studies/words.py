"""Word by word: a map of each word of an answer, as a figure and as an HTML page to explore.

    Reading                             read: one answer
      -> spans of words                 choose_words
      -> TokenMaps of each word         map_words: one forward pass per noisy copy serves all words and layers
      -> figure, HTML, tables           draw_words, with the evidence of each word: words_figure.py, words_page.html

Shapes:  H, W  rows and columns of image tokens
"""

import base64
import io
import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from torch import nn

from common.evidence import ALIKE, doubt_of, explain_with_evidence, probability_text, share_text
from common.files import output_folder
from common.notebook import Shown
from common.page import PAGE, Paper
from common.photos import open_photo, open_photos, readable
from common.progress import show_progress
from smooth_gradcam import (
    PLAIN,
    Look,
    Reading,
    Settings,
    TokenMaps,
    colour_table,
    get_model_layers,
    noisy_passes,
    normalize_cam,
    occurrences,
    read,
)
from studies.words_figure import word_figures
from visualization_utils import (
    FADED,
    check_drawing,
    layer_pictures,
    select_layers,
    settings_text,
    strongest_of,
)

__all__ = [
    *("choose_words", "compute_word_maps", "create_word_maps", "draw_words", "html_data", "map_words", "name_words"),
    *("split_words", "word_tokens", "words_html"),
]


# choice of words

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
    """(start, end) in characters of each word of the answer; `spans` are those of its tokens, see `token_spans`.

    A word is a run of letters, digits and their marks, with an apostrophe, hyphen or decimal point inside it. In
    scripts without blanks (Chinese, Japanese, Thai, Lao, Khmer, Burmese) a word is a token of the model.
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
    """The spans in characters of the chosen words, in the answer's order; `words` as in `compute_word_maps`.

    "content" leaves out the words of `FUNCTION_WORDS`, English and Chinese, in any letter case. Raises ValueError if
    nothing is left, or for a word that is not in the answer.
    """
    if isinstance(words, str) and words in ("content", "all"):
        chosen = split_words(answer, spans)
        if words == "content":
            function_words = FUNCTION_WORDS.split()
            chosen = [span for span in chosen if answer[slice(*span)].lower() not in function_words]
        if not chosen:
            raise ValueError(f"words={words!r}: there is none in the answer {answer!r}; name the parts to explain")
        return chosen
    chosen = set()
    if not isinstance(words, Iterable):
        raise ValueError(f'words={words!r} must be "content", "all", or words of the answer')
    for word in words.split(",") if isinstance(words, str) else words:
        chosen.update(occurrences(answer, word.strip() if isinstance(word, str) else word, "words"))
    if not chosen:
        raise ValueError(f'words={words!r} must be "content", "all", or words of the answer {answer!r}')
    return sorted(chosen)


# maps


def map_words(
    reading: Reading, words, layers, settings: Settings, progress=None, passes=noisy_passes, batch_size: int = 1
) -> list[TokenMaps]:
    """The raw maps of each chosen word, with their evidence; the method "auto" is "needed", as each is of a word.

    `words` and errors are those of `compute_word_maps`, the other arguments of `explain`.
    """
    if settings.contrast is not None:
        raise ValueError(f"contrast={settings.contrast!r}: a map of each word takes no contrast")
    if settings.method == "auto":
        settings = replace(settings, method="needed")
    spans = choose_words(reading.answer, reading.spans, words)
    return explain_with_evidence(reading, spans, layers, settings, progress, passes=passes, batch_size=batch_size)


def compute_word_maps(
    model, processor, image, prompt: str, layers: Iterable[int | nn.Module],
    *, words="content", answer=None, max_new_tokens=128, progress=None, batch_size=1, **settings,
) -> list[TokenMaps]:  # fmt: skip
    """The raw maps of each word of the answer, in its order: one forward per noisy copy serves all words and layers.

    `words` is "content" (all but function words), "all", or the words themselves, each at all its occurrences, as a
    list or as "dog,apple"; `split_words` defines words, `choose_words` function words. Each map has its evidence; the
    method is "auto" unless given. The other arguments and the errors are those of `compute_token_maps`. Raises
    ValueError for words that are not in the answer, too.
    """
    settings = Settings(**{"method": "auto"} | settings)
    reading = read(model, processor, open_photos(image), prompt, answer, max_new_tokens)
    return map_words(reading, words, layers, settings, progress, batch_size=batch_size)


def word_tokens(reading: Reading, word_maps: list[TokenMaps]) -> tuple[list[list[float]], list[list[str]]]:
    """(probabilities, texts) of the tokens of each word with evidence.

    A probability is that of the token after the photo, the prompt and the answer before it. A token with only some
    bytes of a character has that character as its text.
    """
    texts = [[reading.answer[slice(*reading.spans[i])] for i in word.target_tokens] for word in word_maps]
    return [list(word.evidence.tokens) for word in word_maps], texts


def name_words(word_maps: list[TokenMaps]) -> list[str]:
    """A name for each word: the word, with a number from its second occurrence on, "dog (2)"."""
    texts = [word.target for word in word_maps]
    return [f"{text} ({texts[: i + 1].count(text)})" if text in texts[:i] else text for i, text in enumerate(texts)]


# HTML and tables

HTML_SIDE = 1600  # pixels of the longer side of the photo in the HTML page


def html_data(
    image, file_name: str, word_maps: list[TokenMaps], probabilities: list[list[float]], tokens, look: Look = PLAIN
) -> dict:
    """The data of the HTML page, with the look in which it opens, as plain values: see words_page.html.

    A raw map is stored as its maximum, and the shares of it as base64 of 16 bits each, little-endian.
    """
    photo, first = open_photo(image).copy(), word_maps[0]
    photo.thumbnail((HTML_SIDE, HTML_SIDE))
    encoded = io.BytesIO()
    photo.save(encoded, "JPEG", quality=90)

    def pack(cam):
        return base64.b64encode(np.round(65535 * normalize_cam(cam)).astype("<u2").tobytes()).decode()

    return {
        "photo": "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode(),
        "width": photo.width,
        "height": photo.height,
        "file_name": file_name,
        "prompt": first.prompt,
        "answer": first.answer,
        "grid": list(first.grid),
        "layers": list(first.maps),
        "settings": settings_text(first.settings),
        "look": {"colours": look.colormap, "opacity": look.opacity, "scale": look.scale},
        "table": base64.b64encode(colour_table(look.colormap).tobytes()).decode(),
        "faded": FADED,
        "alike": ALIKE,
        "words": [
            {
                "text": word.target,
                "start": word.target_span[0],
                "end": word.target_span[1],
                "tokens": texts,
                "probabilities": values,
                "p": probability_text(word.evidence.p) if word.evidence else None,
                "kept": share_text(word.evidence.kept) if word.evidence else None,
                "doubt": doubt_of(word),
                "likeness": [word.likeness.get(layer) for layer in word.maps],
                "maps": ["" if layer in word.blank else pack(cam) for layer, cam in word.maps.items()],
                "maxima": [float(cam.max()) for cam in word.maps.values()],
                "blank": [word.blank.get(layer, "") for layer in word.maps],
            }
            for word, values, texts in zip(word_maps, probabilities, tokens, strict=True)
        ],
    }


def words_html(data: dict) -> str:
    """The HTML page with its data, escaped so that it can end neither its script nor a line in it."""
    template = Path(__file__).with_name("words_page.html").read_text(encoding="utf-8")
    text = json.dumps(data, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return template.replace("__DATA__", text)


def _evidence_record(word: TokenMaps) -> dict[str, float] | None:
    own = word.evidence
    return own and {"p": own.p, "without_photo": own.without, "kept": own.kept}


def draw_words(
    image, file_name: str, word_maps: list[TokenMaps], probabilities: list[list[float]], tokens: list[list[str]],
    look: Look = PLAIN, paper: Paper = PAGE,
) -> tuple[dict, dict[str, object]]:  # fmt: skip
    """({name of the word: {layer: LayerPictures}}, {file name: content}) of all words.

    `probabilities` and `tokens` are those of `word_tokens`; `file_name` is the photo's, for the HTML page.
    """
    photo, first, names, strongest = open_photo(image), word_maps[0], name_words(word_maps), strongest_of(word_maps)
    results = {name: layer_pictures(photo, word, look, strongest) for name, word in zip(names, word_maps, strict=True)}
    records = [
        {
            "name": name,
            "word": word.target,
            "span": list(word.target_span),
            "tokens": texts,
            "token_ids": [word.tokens[i] for i in word.target_tokens],
            "probabilities": values,
            "evidence": _evidence_record(word),
            "doubt": doubt_of(word),
            "likeness": {str(layer): value for layer, value in word.likeness.items()},
            "maxima": {str(layer): float(cam.max()) for layer, cam in word.maps.items()},
            "no_gradient": sorted(word.no_gradient),
        }
        for name, word, values, texts in zip(names, word_maps, probabilities, tokens, strict=True)
    ]
    record = {"prompt": first.prompt, "answer": first.answer, "grid": list(first.grid), "layers": list(first.maps)}
    record |= {"settings": asdict(first.settings), "words": records}
    files = (
        word_figures(photo, word_maps, look, paper)
        | {
            "index.html": words_html(html_data(photo, file_name, word_maps, probabilities, tokens, look)),
            "words.json": json.dumps(record, ensure_ascii=False, indent=1) + "\n",
            "maps.npz": {
                "maps": np.stack([np.stack(list(word.maps.values())) for word in word_maps]),  # (words, layers, H, W)
                "layers": np.array(list(first.maps)),
                "words": np.array(names),
                "spans": np.array([word.target_span for word in word_maps]),
                "evidence": np.array(
                    [(word.evidence or (np.nan, np.nan))[:2] for word in word_maps]
                ),  # p, without photo
            },
        }
    )
    return Shown(results, page=files["index.html"]), files


def create_word_maps(
    model, processor, image, prompt, layer_range="auto", save_dir="cam_results_words",
    *, words="content", answer=None, max_new_tokens=128, num_samples=5, noise_std=0.1, quiet=False, look=PLAIN,
    paper=PAGE, batch_size=1, **settings,
):  # fmt: skip
    """A map of each word of the answer at each layer, all from one answer and one forward pass per noisy copy.

    `words` is "content" (all but function words), "all", or the words, as a list or as "dog,apple"; `layer_range` is
    as in `create_layer_comparison_grid`, and so are the `settings`, but without target and contrast, and with the
    method "auto" unless given. Writes words_by_layer.png (words across, layers down; further pages for long answers),
    index.html (a page that shows the map of the word under the pointer; it needs no network), words.json (tokens,
    spans, probabilities, evidence) and maps.npz. The pictures of a word that is hardly said, or that does not come from
    the photo, are faded.

    Returns {word: {layer: {"superimposed", "heatmap", "cam"}}}, the second "dog" as "dog (2)". Raises what
    `compute_word_maps` and `output_folder` raise.
    """
    check_drawing(look, paper)
    layers = select_layers(layer_range, get_model_layers(model)[1])
    settings = Settings(num_samples, noise_std, **{"method": "auto"} | settings)
    with output_folder(save_dir, inputs=[image]) as write:
        reading = read(model, processor, open_photos(image), prompt, answer, max_new_tokens)
        photo = reading.photo  # raises for several
        word_maps = map_words(reading, words, layers, settings, show_progress(quiet), batch_size=batch_size)
        file_name = readable(Path(image).name) if isinstance(image, (str, Path)) else ""
        results, files = draw_words(photo, file_name, word_maps, *word_tokens(reading, word_maps), look, paper)
        write(files)
    return results
