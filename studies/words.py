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
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from PIL import Image
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
    read,
)
from studies.prompt_words import Asked, Relevances
from studies.word_choice import choose_words, name_words, split_words, words_of  # noqa: F401  (users import them here)
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
    *("choose_words", "compute_word_maps", "create_word_maps", "data_url", "draw_words", "html_data", "json_text"),
    *("map_words", "name_words", "split_words", "word_tokens", "words_arrays", "words_html", "words_record"),
]


# maps


def map_words(
    reading: Reading, words, layers, settings: Settings, progress=None, passes=noisy_passes, batch_size: int = 1,
    part: str = "all",
) -> list[TokenMaps]:  # fmt: skip
    """The raw maps of each chosen word, with their evidence; the method "auto" is "needed", as each is of a word.

    `words`, `part` and errors are those of `compute_word_maps`, the other arguments of `explain`.
    """
    if settings.contrast is not None:
        raise ValueError(f"contrast={settings.contrast!r}: a map of each word takes no contrast")
    if settings.method == "auto":
        settings = replace(settings, method="needed")
    spans = words_of(reading, words, part)
    return explain_with_evidence(reading, spans, layers, settings, progress, passes=passes, batch_size=batch_size)


def compute_word_maps(
    model, processor, image, prompt, layers: Iterable[int | nn.Module],
    *, words="content", part="all", answer=None, max_new_tokens=128, progress=None, batch_size=1, **settings,
) -> list[TokenMaps]:  # fmt: skip
    """The raw maps of each word of the answer, in its order: one forward per noisy copy serves all words and layers.

    `words` is "content" (all but function words), "all", or the words themselves, each at all its occurrences, as a
    list or as "dog,apple"; `split_words` defines words, `choose_words` function words. Of a reasoning model's answer,
    `part` is what stands behind its thinking ("answer"), the "thinking", or "all". Each map has its evidence; the
    method is "auto" unless given. The other arguments and the errors are those of `compute_token_maps`. Raises
    ValueError for words that are not in the answer, too.
    """
    settings = Settings(**{"method": "auto"} | settings)
    reading = read(model, processor, open_photos(image), prompt, answer, max_new_tokens)
    return map_words(reading, words, layers, settings, progress, batch_size=batch_size, part=part)


def word_tokens(reading: Reading, word_maps: list[TokenMaps]) -> tuple[list[list[float]], list[list[str]]]:
    """(probabilities, texts) of the tokens of each word with evidence.

    A probability is that of the token after the photo, the prompt and the answer before it. A token with only some
    bytes of a character has that character as its text.
    """
    texts = [[reading.answer[slice(*reading.spans[i])] for i in word.target_tokens] for word in word_maps]
    return [list(word.evidence.tokens) for word in word_maps], texts


# HTML and tables

HTML_SIDE = 1600  # pixels of the longer side of the photo in the HTML page


def html_data(
    image, file_name: str, word_maps: list[TokenMaps], probabilities: list[list[float]], tokens, look: Look = PLAIN,
    asked: Asked | None = None,
) -> dict:  # fmt: skip
    """The data of the HTML page, with the look in which it opens, as plain values: see words_page.html.

    A raw map is stored as its maximum, and the shares of it as base64 of 16 bits each, little-endian.
    """
    photo, first = open_photo(image).copy(), word_maps[0]
    photo.thumbnail((HTML_SIDE, HTML_SIDE))

    def pack(cam):
        return base64.b64encode(np.round(65535 * normalize_cam(cam)).astype("<u2").tobytes()).decode()

    from_prompt = {} if asked is None else asked.html_data()
    words = from_prompt.pop("words", [{}] * len(word_maps))
    return from_prompt | {
        "photo": data_url(photo),
        "width": photo.width,
        "height": photo.height,
        "file_name": file_name,
        "prompt": first.prompt,
        "answer": first.answer,
        "thinking": first.thinking,
        "cut_off": first.cut_off,
        "grid": list(first.grid),
        "layers": list(first.maps),
        "settings": settings_text(first.settings),
        "look": {"colours": look.colormap, "opacity": look.opacity, "scale": look.scale},
        "table": base64.b64encode(colour_table(look.colormap).tobytes()).decode(),
        "faded": FADED,
        "alike": ALIKE,
        "words": [
            more
            | {
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
            for word, values, texts, more in zip(word_maps, probabilities, tokens, words, strict=True)
        ],
    }


def data_url(photo: Image.Image) -> str:
    """The photo as a JPEG in an address."""
    encoded = io.BytesIO()
    photo.save(encoded, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()


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


def words_record(word_maps: list[TokenMaps], probabilities, tokens, asked: Asked | None = None) -> dict:
    """What words.json says; the arguments are those of `draw_words`."""
    first, names = word_maps[0], name_words(word_maps)
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
    record |= {"thinking": first.thinking, "cut_off": first.cut_off}  # characters; whether the answer has no end
    record |= {"settings": asdict(first.settings), "words": records}
    return record | ({} if asked is None else {"prompt_words": asked.record(names)})


def json_text(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False, indent=1) + "\n"


def words_arrays(word_maps: list[TokenMaps]) -> dict[str, np.ndarray]:
    """What maps.npz has beside the maps."""
    return {
        "layers": np.array(list(word_maps[0].maps)),
        "words": np.array(name_words(word_maps)),
        "spans": np.array([word.target_span for word in word_maps]),
        "evidence": np.array([(word.evidence or (np.nan, np.nan))[:2] for word in word_maps]),  # p, without photo
    }


def draw_words(
    image, file_name: str, word_maps: list[TokenMaps], probabilities: list[list[float]], tokens: list[list[str]],
    look: Look = PLAIN, paper: Paper = PAGE, asked: Asked | None = None,
) -> tuple[dict, dict[str, object]]:  # fmt: skip
    """({name of the word: {layer: LayerPictures}}, {file name: content}) of all words.

    `probabilities` and `tokens` are those of `word_tokens`; `file_name` is the photo's, for the HTML page. `asked` is
    what the words take from the prompt, which then has a figure of its own.
    """
    photo, names, strongest = open_photo(image), name_words(word_maps), strongest_of(word_maps)
    results = {name: layer_pictures(photo, word, look, strongest) for name, word in zip(names, word_maps, strict=True)}
    files = (
        word_figures(photo, word_maps, look, paper)
        | ({} if asked is None else asked.figures(word_maps, paper))
        | {
            "index.html": words_html(html_data(photo, file_name, word_maps, probabilities, tokens, look, asked)),
            "words.json": json_text(words_record(word_maps, probabilities, tokens, asked)),
            "maps.npz": words_arrays(word_maps)
            | {"maps": np.stack([np.stack(list(word.maps.values())) for word in word_maps])},  # (words, layers, H, W)
        }
    )
    return Shown(results, page=files["index.html"]), files


def create_word_maps(
    model, processor, image, prompt, layer_range="auto", save_dir="cam_results_words",
    *, words="content", part="all", prompt_words=False, answer=None, max_new_tokens=128, num_samples=5, noise_std=0.1,
    quiet=False, look=PLAIN, paper=PAGE, batch_size=1, **settings,
):  # fmt: skip
    """A map of each word of the answer at each layer, all from one answer and one forward pass per noisy copy.

    `words` is "content" (all but function words), "all", or the words, as a list or as "dog,apple"; `layer_range` is
    as in `create_layer_comparison_grid`, and so are the `settings`, but without target and contrast, and with the
    method "auto" unless given. Writes words_by_layer.png (maps under their words; further pages for long answers),
    index.html (a page that shows the map of the word under the pointer; it needs no network), words.json (tokens,
    spans, probabilities, evidence) and maps.npz; with `prompt_words` also what each word takes from those of the
    prompt, in prompt_words.png (and further pages) and on the HTML page. The pictures of a word that is hardly said, or
    that does not come from the photo, are faded.

    Returns {word: {layer: {"superimposed", "heatmap", "cam"}}}, the second "dog" as "dog (2)". Raises what
    `compute_word_maps` and `output_folder` raise.
    """
    check_drawing(look, paper)
    layers = select_layers(layer_range, get_model_layers(model)[1])
    settings = Settings(num_samples, noise_std, **{"method": "auto"} | settings)
    with output_folder(save_dir, inputs=[image]) as write:
        reading = read(model, processor, open_photos(image), prompt, answer, max_new_tokens)
        photo = reading.photo  # raises for several
        copies = {"batch_size": batch_size, "part": part, "passes": Relevances() if prompt_words else noisy_passes}
        word_maps = map_words(reading, words, layers, settings, show_progress(quiet), **copies)
        file_name = readable(Path(image).name) if isinstance(image, (str, Path)) else ""
        asked = copies["passes"].asked(reading, word_maps) if prompt_words else None
        results, files = draw_words(photo, file_name, word_maps, *word_tokens(reading, word_maps), look, paper, asked)
        write(files)
    return results
