"""Word by word, over several pictures of one prompt or a video's temporal patches: a figure, and a page to explore.

Pictures, TokenMaps of each word as one     pictures.py
  -> table of words by pictures             word_tables: one for each layer
  -> page with a slider over pictures       pictures_html
  -> figure, page, tables                   draw_picture_words
"""

from dataclasses import replace

from PIL import Image

from common.evidence import doubt_of
from common.page import PAGE, SMALL, TINY, Paper, excerpt
from smooth_gradcam import PLAIN, Look, TokenMaps
from studies.pictures import Pictures
from studies.pictures_figure import GREY, Row, Table, row_of, tables
from studies.prompt_words import Asked
from studies.video import frames_of_a_patch, times_of
from studies.word_choice import name_words
from studies.words import data_url, html_data, json_text, words_arrays, words_html, words_record
from studies.words_figure import DOUBT, evidence_text, words_caption
from visualization_utils import method_title, strength, strongest_of, text_rows

__all__ = ["draw_picture_words", "pictures_html", "word_tables"]

NAME = 30  # columns of a word's name
FRAME_SIDES = {16: 960, 48: 640, 128: 448}  # {frames of a video up to which: pixels of the longer side on the page}


def word_tables(
    pictures: Pictures, word_maps: list[TokenMaps], look: Look = PLAIN, paper: Paper = PAGE
) -> dict[str, object]:
    """{file name: the function that draws it} of tables of words by pictures, one for each layer.

    The words of the thinking that leads to an answer have pages of their own.
    """
    files, end, named = {}, word_maps[0].thinking, list(zip(word_maps, name_words(word_maps), strict=True))
    for file, inside in (("words_by_layer", False), ("words_by_layer_thinking", True)):
        if own := [(word, name) for word, name in named if (word.target_span[0] < end) is inside]:
            files |= _tables(file, pictures, *zip(*own, strict=True), look, paper)
    return files


def _tables(file: str, pictures: Pictures, words, names, look: Look, paper: Paper) -> dict[str, object]:
    layers, strongest = list(words[0].maps), strongest_of(words)
    labels = [{layer: strength(word, layer, strongest) for layer in layers} for word in words]

    def row(i: int, layer) -> Row:
        lines = [(excerpt(names[i], (0, 0), NAME)[0], SMALL, {"weight": "bold"})]
        evidence = {"color": DOUBT if doubt_of(words[i]) else "0.3"}
        lines += [(part, TINY, evidence) for part in evidence_text(words[i]).split(", ") if part]
        return row_of(pictures, words[i], layer, True, look, strongest, [*lines, (labels[i][layer], TINY, GREY)])

    content = [Table(f"Layer {layer}", [row(i, layer) for i in range(len(words))]) for layer in layers]
    cells = [(i, layer) for i in range(len(words)) for layer in layers]
    text = words_caption(list(words), labels, cells, "a table for each, with a row for each word", look)
    title = f"{method_title(words[0].settings)}, word by word"
    title += ", of its thinking" if words[0].target_span[0] < words[0].thinking else ""
    span = words[0].target_span[0], words[-1].target_span[1]
    heads = text_rows(replace(words[0], target_span=span))[:2]
    heads[1] = (*heads[1][:2], (0, 0))
    return tables(file, pictures, content, title, heads, words[0], text, look, paper)


def pictures_html(
    pictures: Pictures, word_maps: list[TokenMaps], probabilities, tokens, look: Look = PLAIN, asked=None
) -> str:
    """The HTML page, see words_page.html: the maps of a word are those of all pictures, one after the other.

    Of a video it has every frame, each with the map of its temporal patch.
    """
    photos, names, of = list(pictures.reading.photos), pictures.labels, range(len(pictures.names))
    if video := pictures.video:
        side = next(
            size for count, size in FRAME_SIDES.items() if len(video.frames) <= count or count == max(FRAME_SIDES)
        )
        photos, pair = [_reduced(frame, side) for frame in video.frames], frames_of_a_patch(pictures.reading)
        names = times_of(len(photos), 1 / video.fps)
        of = [i // pair for i in range(len(photos))]
    data = html_data(photos[0], pictures.file_name, word_maps, probabilities, tokens, look, asked)
    data["video"] = video is not None
    data["pictures"] = [
        {"name": name, "map": number, "grid": list(pictures.reading.grids[number])}
        for name, number in zip(names, of, strict=True)
    ]
    for own, photo in list(zip(data["pictures"], photos, strict=True))[1:]:
        small = _reduced(photo, max(data["width"], data["height"]) if video else 1600)
        own |= {"photo": data_url(small), "width": small.width, "height": small.height}
    return words_html(data)


def _reduced(photo: Image.Image, side: int) -> Image.Image:
    """The photo with a longer side of `side` pixels at most."""
    small = photo.copy()
    small.thumbnail((side, side))
    return small


def draw_picture_words(
    pictures: Pictures, word_maps: list[TokenMaps], probabilities: list[list[float]], tokens: list[list[str]],
    look: Look = PLAIN, paper: Paper = PAGE, asked: Asked | None = None,
) -> dict[str, object]:  # fmt: skip
    """{file name: content} of words mode; the arguments are those of `draw_words`, the maps those of `joined`."""
    record = words_record(word_maps, probabilities, tokens, asked)
    del record["grid"]
    record |= {"pictures": list(pictures.names), "grids": [list(grid) for grid in pictures.reading.grids]}
    for own, word in zip(record["words"], word_maps, strict=True):
        own["shares"] = {str(layer): pictures.shares(word, layer) for layer in word.maps}  # of the map, by picture
    return (
        word_tables(pictures, word_maps, look, paper)
        | (asked.figures(word_maps, paper) if asked else {})
        | {
            "index.html": pictures_html(pictures, word_maps, probabilities, tokens, look, asked),
            "words.json": json_text(record),
            "maps.npz": words_arrays(word_maps) | pictures.arrays(word_maps),
        }
    )
