"""What the tests of figures share: maps made by hand, and what is found on a drawn page."""

import dataclasses

import numpy as np
import pytest
from conftest import check_layout, make_image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from common.page import WIDTHS
from smooth_gradcam import Settings, TokenMaps
from studies.faithfulness import Faithfulness
from studies.words import draw_words

FORMATS = {"landscape": (4, 6), "portrait": (6, 4), "square": (5, 5)}


ANSWER = "There is a dog at the top left, and a red car in the center."


def make_photo(grid):
    return Image.new("RGB", (grid[1] * 28, grid[0] * 28), "white")


def make_maps(
    maps, *, answer=ANSWER, prompt="What is in this image?", target=None, why="no gradient", settings=None, **changes
):
    """Maps of an answer; `why` those that are zero everywhere are so."""
    start = 0 if target is None else answer.index(target)
    target = answer if target is None else target
    return TokenMaps(
        maps=maps,
        grid=next(iter(maps.values())).shape,
        prompt=prompt,
        answer=answer,
        tokens=[1, 2, 3],
        target=target,
        target_span=(start, start + len(target)),
        target_tokens=[0],
        no_gradient=frozenset(layer for layer, cam in maps.items() if why == "no gradient" and not cam.any()),
        settings=settings or Settings(5, 0.1, **changes),
    )


def drawn(content):
    """A file's picture: some are drawn only when they are written."""
    return np.asarray(content() if callable(content) else content)


def only(files):
    """The content of the only file."""
    (content,) = files.values()
    return content


def colour_bars(figure):
    """The axes of colour bars."""
    return [axes for axes in figure.axes if axes.images and len(axes.images[0].get_array()) <= 2]


def hot_spot(grid, cell):
    cam = np.zeros(grid, np.float32)
    cam[cell] = 3
    return cam


def is_hot(pixel):
    """The yellow end of plasma."""
    return pixel[0] > 200 and pixel[1] > 200 and pixel[2] < 80


def is_cold(pixel):
    """Its dark blue end."""
    return pixel[0] < 40 and pixel[1] < 40 and pixel[2] > 110


def share_of(figure, test):
    return np.mean(test(np.moveaxis(figure.astype(int), -1, 0)))


def greyish(pixel):
    return (np.ptp(pixel, axis=0) == 0) & (abs(pixel[0] - 204) < 2)


LONG = "There is a dog at the top left, and a red car in the center of the scene, with people. " * 8
SHAPES = {"landscape": (12, 16), "portrait": (16, 12), "wide": (3, 27), "tall": (27, 3)}


def laid_out(page, width):
    """The page's matplotlib figure, once it is known that everything has its place."""
    assert page.figure.get_size_inches()[0] == WIDTHS[width]
    FigureCanvasAgg(page.figure)
    check_layout(page.figure)
    return page.figure


ASPECTS = {"1:5": (28, 140), "3:4": (168, 224), "2:1": (448, 224), "5:1": (280, 56)}


def of_all_sizes(one, few, many, most):
    """Every aspect on page and column, with each number somewhere."""
    page = [("1:5", most, "page"), ("3:4", few, "page"), ("2:1", few, "page"), ("5:1", one, "page")]
    column = [("1:5", one, "column"), ("3:4", many, "column"), ("2:1", few, "column"), ("5:1", few, "column")]
    return pytest.mark.parametrize(("aspect", "count", "width"), page + column)


def texts_of(figure):
    return [text.get_text() for text in figure.texts]


def prose_of(figure):
    """All that is written, without line breaks."""
    return " ".join(" ".join(texts_of(figure)).split())


def bumps(grid, seed):
    return np.random.default_rng(seed).random(grid).astype(np.float32)


def layered(grid, layers, blind=(), seed=0, **options):
    maps = {layer: bumps(grid, [seed, layer]) * (layer not in blind) for layer in layers}
    return make_maps(maps, **{"target": "dog"} | options)


def measured(token_maps, orders):
    shares = np.linspace(0, 1, 9)
    powers = np.linspace(0.2, 1.5, len(token_maps.maps))
    curves = {layer: shares**power for layer, power in zip(token_maps.maps, powers, strict=True)}
    curves = {layer: curve for layer, curve in curves.items() if layer not in token_maps.blank}
    random = np.array([shares**power for power in np.linspace(0.8, 1.2, orders)]).reshape(orders, -1 if orders else 9)
    falling = {layer: 1 - curve for layer, curve in curves.items()}
    return Faithfulness(shares, curves, falling, random, 1 - random, "blur", 100)


def words_files(photo, maps, **options):
    return draw_words(photo, "photo.jpg", maps, [[0.5]] * len(maps), [["x"]] * len(maps), **options)[1]


def worded(words, answer, grid, layers, blind=()):
    maps, end = [], 0
    for word in words:
        start = answer.index(word, end)
        end = start + len(word)
        token_maps = layered(grid, layers, blind, seed=start, answer=answer, target=word)
        maps.append(dataclasses.replace(token_maps, target_span=(start, end)))
    return maps


def box_of(artist):
    """(left, top, right, bottom) in pixels of the page, from its top left."""
    height, box = artist.figure.bbox.height, artist.get_window_extent()
    return np.array([box.x0, height - box.y1, box.x1, height - box.y0])


def middle(box):
    return (box[:2] + box[2:]) / 2


def crops(figure, page):
    """[(box, the page's pixels there)] of every picture, from above and from the left, but for the colour scale."""
    boxes = [box_of(axes) for axes in figure.axes if axes.images and len(axes.images[0].get_array()) > 2]
    found = []
    for box in sorted(boxes, key=lambda box: tuple(box[[1, 0]].round())):
        left, top, right, bottom = box.round().astype(int)
        found.append((box, page[top:bottom, left:right]))
    return found


def found_under(figure, page, labels):
    """{label: the pictures below it, nearer to it than to the others above them}; those under none are left out."""
    boxes = {text.get_text(): box_of(text) for text in figure.texts if text.get_text() in labels}
    assert list(boxes) == list(labels)
    found = {label: [] for label in labels}
    for box, crop in crops(figure, page):
        top = np.array([box[[0, 2]].mean(), box[1]])
        above = {label: np.hypot(*(middle(at) - top)) for label, at in boxes.items() if at[3] < box[1] + 1}
        if above:
            found[min(above, key=above.get)].append(crop)
    return found


def unlike(crop, picture):
    """Mean difference, in levels of 255, of a picture on a page and one of any size, inside the frame."""
    size = crop.shape[1::-1]
    resized = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
    return np.abs(crop.astype(int) - resized)[2:-2, 2:-2].mean()


CLOSE, FAR = 12, 19  # pictures are laid on whole pixels, in some versions one off, and steep colours show it
SIDES = {"landscape": (336, 224), "portrait": (224, 336)}


def varied(size, layers, **options):
    """A photo and random maps of 4 x 6 or 6 x 4 cells: no two pictures of them are alike."""
    return make_image(*size), layered((size[1] // 56, size[0] // 56), layers, **options)


def numbered_words(count, layers):
    """A photo and maps of "a00 w00, a01 w01, ..."."""
    answer = ", ".join(f"a{i:02d} w{i:02d}" for i in range(count)) + "."
    return make_image(336, 224), worded([f"w{i:02d}" for i in range(count)], answer, (4, 6), layers)
