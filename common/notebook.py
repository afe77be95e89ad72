"""What a notebook shows of a value that stands last in a cell: maps as cells of colour, readings, results as figures.

    TokenMaps, Reading   formatters of IPython, registered by `show_in_notebook` where IPython runs
    Shown                a dict of results that has its figure, or its page

All texts are escaped: answers come from models. Shapes:  H, W  rows and columns of image tokens
"""

import base64
import html
import io
import sys
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image

from common.encoding import encode
from common.evidence import FADED, departures, doubt_of
from common.files import DRAWING
from common.page import MARKER, excerpt
from smooth_gradcam import Reading, TokenMaps, colorize_cam, normalize_cam

__all__ = ["Shown", "maps_html", "reading_html", "show_in_notebook"]

MOST = 12  # layers, or first photos, that are shown
SIDE = 160  # pixels of a heatmap's longer side
PHOTO_SIDE, FIGURE_WIDTH, PAGE_HEIGHT = 400, 1000, 720  # pixels
COLUMNS = 1200  # of a text
ROW = '<tr><th style="text-align:left;vertical-align:top">{}</th><td style="text-align:left">{}</td></tr>'
ITEM = '<div style="display:inline-block;margin:4px;vertical-align:top;text-align:center">{}<br>{}</div>'


class Shown(dict):
    """A dict of results that a notebook shows as their figure, or page; copies and pickles are plain dicts.

    `figure` is a picture or what draws it, as in the files of `output_folder`; `page` is the text of an HTML file.
    """

    def __init__(self, results: dict, figure: Callable | np.ndarray | None = None, page: str | None = None):
        super().__init__(results)
        self._figure, self._page = figure, page

    def _repr_png_(self) -> bytes | None:
        if self._figure is None:
            return None
        with DRAWING:
            picture = Image.fromarray(np.asarray(self._figure() if callable(self._figure) else self._figure))
        return encode(_at_most(picture, FIGURE_WIDTH, picture.height))

    def _repr_html_(self) -> str | None:
        if self._page is None:
            return None
        style = f'width="100%" height="{PAGE_HEIGHT}" style="border:0" sandbox="allow-scripts allow-downloads"'
        return f'<iframe {style} srcdoc="{html.escape(self._page)}"></iframe>'

    def __reduce__(self):
        return dict, (dict(self),)


def _at_most(picture: Image.Image, width: int, height: int) -> Image.Image:
    picture = picture.copy()
    picture.thumbnail((width, height))
    return picture


def _image(picture: Image.Image | np.ndarray, style: str = "") -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(encode(picture)).decode()}"{style}>'


def _photo(photo: Image.Image) -> str:
    file = io.BytesIO()
    _at_most(photo, PHOTO_SIDE, PHOTO_SIDE).save(file, "JPEG", quality=85)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _text(text: str, span: tuple[int, int] = (0, 0)) -> str:
    """The text escaped, cut if it is very long, and the span in it marked."""
    text, (start, end) = excerpt(text, span, COLUMNS)
    before, part, after = (html.escape(piece) for piece in (text[:start], text[start:end], text[end:]))
    return before + (f'<mark style="background:{MARKER};color:black">{part}</mark>' if part else "") + after


def _table(rows: dict[str, str]) -> str:
    return f"<table>{''.join(ROW.format(name, text) for name, text in rows.items() if text)}</table>"


def _items(items: Iterable[str], count: int) -> str:
    more = f"… and {count - MOST} more" if count > MOST else ""
    return f"<div>{''.join(items)}{more}</div>"


def maps_html(maps: TokenMaps) -> str:
    """Heatmaps, cell by cell, with what they explain and rest on; where there is no map, why.

    Of many layers some are shown, evenly spaced. A map that is not to be believed is faded, as in the figures.
    """
    doubt = doubt_of(maps)
    whole = maps.whole
    rows = {"Prompt": _text(maps.prompt), "Answer": _text(maps.answer, (0, 0) if whole else maps.target_span)}
    rows["Explained"] = "the whole answer" if whole else _text(maps.target)
    rows["Explained"] += ", which was cut off" * maps.cut_off
    rows["Method"] = maps.settings.method + f", image {maps.image}" * bool(maps.image)
    rows["Evidence"] = html.escape(str(maps.evidence)) if maps.evidence else ""
    rows["Doubt"] = html.escape(doubt) + f": drawn in {100 * FADED:.0f} % of the colours" * bool(doubt)
    layers = [*maps.maps]
    layers = [layers[i] for i in np.linspace(0, len(layers) - 1, min(MOST, len(layers))).round().astype(int)]
    rows["Layers"] = html.escape(departures(maps, layers))
    return _table(rows) + _items((_layer(maps, layer, bool(doubt)) for layer in layers), len(maps.maps))


def _layer(maps: TokenMaps, layer, faded: bool) -> str:
    cam, scale = maps.maps[layer], max(1, SIDE // max(maps.grid))
    name = html.escape(f"layer {layer}")
    if layer in maps.blank:
        height, width = (scale * count for count in maps.grid)
        grey = f"width:{max(width, 60)}px;min-height:{height}px;background:#ccc;color:#333"
        return ITEM.format(name, f'<div style="{grey}">{html.escape(maps.blank[layer])}: no map</div>')
    colours = colorize_cam(normalize_cam(cam, float(cam.max()) / (FADED if faded else 1)))
    cells = colours.repeat(scale, 0).repeat(scale, 1)
    return ITEM.format(f"{name}, max {cam.max():.2g}", _image(cells))


def reading_html(reading: Reading) -> str:
    """The photos, the prompt and the answer."""
    photos = (ITEM.format(_photo(photo), f"{photo.width} × {photo.height}") for photo in reading.photos[:MOST])
    return _items(photos, len(reading.photos)) + _table(
        {"Prompt": _text(reading.prompt), "Answer": _text(reading.answer)}
    )


def _maps_text(maps: TokenMaps, printer, cycle: bool) -> None:
    printer.text(f"TokenMaps of {maps.target!r} at layer {', '.join(map(str, maps.maps))}: maps of {maps.grid}")


def _reading_text(reading: Reading, printer, cycle: bool) -> None:
    printer.text(f"Reading of {len(reading.photos)} photos with the answer {reading.answer!r}")


def show_in_notebook() -> None:
    """Register what shows `TokenMaps` and `Reading` with the IPython that runs; without one, nothing happens."""
    ipython = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    if shell:
        formatters = shell.display_formatter.formatters
        for kind, as_html, as_text in ((TokenMaps, maps_html, _maps_text), (Reading, reading_html, _reading_text)):
            formatters["text/html"].for_type(kind, as_html)
            formatters["text/plain"].for_type(kind, as_text)  # which goes into the notebook's file too
