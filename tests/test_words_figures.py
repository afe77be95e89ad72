"""The figure of words: each stands under its text and beside its layer, on as many pages as it takes."""

import dataclasses
import itertools

import numpy as np
import pytest
from conftest import check_layout, make_image
from drawn_maps import (
    ASPECTS,
    CLOSE,
    FAR,
    FORMATS,
    LONG,
    SHAPES,
    box_of,
    crops,
    drawn,
    greyish,
    hot_spot,
    laid_out,
    make_maps,
    make_photo,
    middle,
    numbered_words,
    of_all_sizes,
    prose_of,
    share_of,
    texts_of,
    unlike,
    worded,
    words_files,
)
from matplotlib.colors import to_rgba

import common.page
import studies.words_figure
from common.evidence import Evidence
from common.page import Paper
from smooth_gradcam import Look, colorize_cam
from studies.words import draw_words, html_data
from studies.words_figure import word_figures


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    monkeypatch.setattr(common.page, "DPI", 100)  # quicker


# room for all


@of_all_sizes(1, 40, 100, 300)
def test_any_number_of_words_of_any_photo_fits_on_page_and_column(aspect, count, width):
    size = ASPECTS[aspect]
    answer = " ".join(f"a w{i:03d}," for i in range(count))
    maps = worded([f"w{i:03d}" for i in range(count)], answer, (size[1] // 28, size[0] // 28), [3, 27], [27])
    maps = resting(maps, ([0.9, 0.08], [0.99, 0.99], [2e-6, 1e-7]), likeness={3: 0.1})
    files = words_files(make_image(*size), maps, paper=Paper(width))
    names = [name for name in files if name.endswith(".png")]
    for name in {names[0], names[-1]}:
        assert laid_out(files[name](), width).get_size_inches()[1] <= 9


def resting(maps, evidence, **changes):
    """The maps with these pairs of probabilities in turn."""
    pairs = itertools.cycle(evidence)
    return [dataclasses.replace(word, evidence=Evidence(*next(pairs)), **changes) for word in maps]


def draw_pages(files):
    """The drawn pages of the words' figure."""
    return [drawn(content) for name, content in files.items() if name.endswith(".png")]


PLACES = "There is a plane at the top left, a house on the right, a dog at the bottom left and a bicycle at the bottom."
PARTS = {
    "one": ["dog"],
    "ten": ["plane", "top", "left", "house", "right", "dog", "bottom", "left", "bicycle", "bottom"],
    "all": PLACES.replace(",", "").replace(".", "").split(),
}
GREY_WORDS = "Grey: the word has no map at that layer, for the reason that stands there."
SCRIPTS = "左上角有一只狗 🐕, extraordinarilylongcompoundword 中间有"


@pytest.mark.parametrize(
    ("words", "answer", "shape", "layers", "blind"),
    [
        (PARTS["one"], PLACES, "landscape", [12], []),
        (PARTS["ten"], PLACES, "landscape", [0, 12, 27], [27]),
        (PARTS["all"], PLACES, "portrait", [0], []),
        (PARTS["one"], LONG, "portrait", range(28), []),
        (PARTS["ten"], PLACES, "wide", [0, 12], []),
        (PARTS["ten"], PLACES, "tall", [0, 12], [12]),
        (["左", "狗", "🐕", "extraordinarilylongcompoundword", "中间"], SCRIPTS, "landscape", [3, 9], []),
    ],
    ids=["one", "ten", "all", "28 layers", "wide", "tall", "scripts"],
)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_figure_of_words_has_room_for_all(pages, words, answer, shape, layers, blind):
    grid = SHAPES[shape]
    maps = worded(words, answer, grid, layers, blind)
    drawn_pages = draw_pages(words_files(make_photo(grid), maps))
    cells, found, rows = 0, "", []
    for figure, page in zip(pages, drawn_pages, strict=True):
        check_layout(figure)
        cells += len([axes for axes in figure.axes if axes.images]) - 1  # but the colour scale
        found += "".join(texts_of(figure)).replace(" ", "")
        rows += [text.split(",")[0] for text in texts_of(figure) if text.startswith("layer ")]
        assert len(page) <= 9 * common.page.DPI
    assert cells == len(words) * len(layers) + 1  # and the photo
    assert all(word in found for word in words)
    assert set(rows) == {f"layer {layer}" for layer in layers}
    grey = max(share_of(page, greyish) for page in drawn_pages)
    assert grey > 0.01 if blind else grey < 0.005
    assert (GREY_WORDS in " ".join(map(prose_of, pages))) == bool(blind)


def test_text_before_a_word_is_that_next_to_it(pages):
    maps = worded(["bicycle"], PLACES, SHAPES["landscape"], [3])
    drawn(words_files(make_photo(maps[0].grid), maps)["words_by_layer.png"])
    assert any(text.endswith("left and a") for text in texts_of(pages[0]))


# what stands where in a figure


def check_words(figure, page, maps, results):
    """Pictures stand under their word, which stands under the text before it, and beside or above their layer."""
    layers = [f"layer {layer}" for layer in maps[0].maps]
    numbers = {text: box_of(text) for text in figure.texts if text.get_text() in layers}
    labels = {text: box_of(text) for text in figure.texts if text.get_text().split(",")[0] in layers}
    heads = {text: box_of(text) for text in figure.texts if (text.get_weight(), text.get_size()) == ("bold", 7)}
    before = {text: box_of(text) for text in figure.texts if text.get_color() == "0.45"}
    words, cells, pictures = {f"w{i:02d}": f"a{i:02d}" for i in range(len(maps))}, [], crops(figure, page)
    if "Prompt" in texts_of(figure):  # the first page
        assert unlike(pictures.pop(0)[1], np.asarray(make_image(336, 224))) < CLOSE
    for box, crop in pictures:

        def above(texts, box=box):
            """The nearest of those that begin where the box does, or left of it."""
            here = [text for text, at in texts.items() if at[0] < box[0] + 3 and at[3] < box[1] + 3]
            return max(here, key=lambda text: tuple(texts[text][[3, 0]].round()))

        below = [text for text, at in labels.items() if abs(at[0] - box[0]) < 3 and 0 <= at[1] - box[3] < 8]
        row = below[0] if below else min(numbers, key=lambda text: abs(middle(numbers[text]) - middle(box))[1])
        assert below or abs(middle(numbers[row]) - middle(box))[1] < 3
        head = above(heads)
        word, layer = head.get_text(), int(row.get_text().split(",")[0].split()[1])
        text = above(before, heads[head])
        assert text.get_text() == words[word]
        assert abs(before[text][0] - heads[head][0]) < 3
        assert heads[head][1] - before[text][3] < 8
        assert unlike(crop, results[word][layer]["superimposed"]) < CLOSE
        cells.append((word, layer))
    return cells


def test_pictures_of_words_stand_under_their_word_and_beside_their_layer(pages):
    photo, maps = numbered_words(13, [3, 27, 9])
    results, files = draw_words(photo, "", maps, [[0.5]] * 13, [["x"]] * 13)
    page = drawn(files["words_by_layer.png"])
    cells = check_words(pages[0], page, maps, results)
    for layer in (3, 27, 9):
        assert [word for word, own in cells if own == layer] == [word.target for word in maps]
    assert len(cells) == 3 * len(maps)
    assert "Smooth Grad-CAM (gradcam), word by word" in texts_of(pages[0])
    first, second = results["w00"][3]["superimposed"], results["w01"][3]["superimposed"]
    assert unlike(first, second) > FAR < unlike(first, results["w00"][27]["superimposed"])


@pytest.mark.parametrize(("count", "layers"), [(9, range(10)), (25, [0, 9, 27]), (50, [5])], ids=["9", "25", "50"])
def test_long_answers_take_several_pages_and_each_word_stands_once(pages, count, layers):
    photo, maps = numbered_words(count, layers)
    results, files = draw_words(photo, "", maps, [[0.5]] * count, [["x"]] * count)
    names = [name for name in files if name.endswith(".png")]
    assert names == ["words_by_layer.png", *(f"words_by_layer_{i}.png" for i in range(2, len(names) + 1))]
    found = []
    for i, name in enumerate(names):
        page = drawn(files[name])
        assert len(page) <= 9 * common.page.DPI  # on a page of a paper
        check_layout(pages[i])
        cells = check_words(pages[i], page, maps, results)
        words, rows = sorted({int(word[1:]) for word, _ in cells}), sorted({layer for _, layer in cells})
        said = " ".join(" ".join(texts_of(pages[i])).split())  # a title may go on in a second line
        assert f"Smooth Grad-CAM (gradcam), word by word ({words[0] + 1}–{words[-1] + 1} of {count})" in said
        assert f", layers {rows[0]}–{rows[-1]}" in prose_of(pages[i]) or len(rows) == len(layers)
        found += cells
    assert sorted(found) == sorted((word.target, layer) for word in maps for layer in layers)


# what the words rest on

HOT = "Hot: where the explained words come from"
BELIEVED, PHOTOLESS, UNLIKELY = (0.98, 0.03), (0.5, 0.5), (4e-6, 0.0)
REASONS = "Weak: below 5 % of the strongest of all, hardly said (p below 0.1), or more than 80 % of p kept without the"
REASONS += " photo"


def test_evidence_stands_under_each_word_and_is_coloured_if_it_is_doubted(pages):
    photo, maps = numbered_words(3, [3])
    drawn(words_files(photo, resting(maps, [BELIEVED, PHOTOLESS, UNLIKELY]))["words_by_layer.png"])
    heads = [box_of(text) for text in pages[0].texts if (text.get_weight(), text.get_size()) == ("bold", 7)]
    found = {text.get_text(): text for text in pages[0].texts if text.get_text().startswith("p ")}
    assert list(found) == ["p .98, 3 % kept", "p .50, 100 % kept", "p 4e-6, 0 % kept"]
    for head, text in zip(heads, found.values(), strict=True):
        assert text.get_size() == 6
        assert box_of(text)[0] == pytest.approx(head[0], abs=3)
        assert 0 <= box_of(text)[1] - head[3] < 6
    colours = [text.get_color() for text in found.values()]
    assert colours[0] == "0.3" != colours[1] == colours[2]
    prose = prose_of(pages[0])
    assert "Under each word: its probability p, and the share of p that is kept without the photo." in prose
    labels = [text for text in texts_of(pages[0]) if text.startswith("max ")]
    assert [text.endswith(", weak") for text in labels] == [False, True, True]


@pytest.mark.parametrize("count", [1, 3])
def test_caption_of_words_that_are_believed_has_no_doubt(pages, count):
    photo, maps = numbered_words(count, [3])
    drawn(words_files(photo, resting(maps, [(0.1, 0.08)]))["words_by_layer.png"])
    prose = prose_of(pages[0])
    assert HOT in prose
    assert not {"believed", "Weak", "hardly"} & set(prose.replace(":", " ").split())


@pytest.mark.parametrize("evidence", [[PHOTOLESS, BELIEVED], [BELIEVED, UNLIKELY]])
def test_caption_says_what_weak_is_and_does_not_take_the_first_word_for_all(pages, evidence):
    photo, maps = numbered_words(2, [3])
    drawn(words_files(photo, resting(maps, evidence))["words_by_layer.png"])
    prose = prose_of(pages[0])
    assert HOT in prose
    assert "Not to be believed" not in prose
    assert f"{REASONS}; the last two are not to be believed, and drawn in 35 % of the colours." in prose


def test_caption_of_doubted_words_alone_says_that_none_is_to_be_believed(pages):
    photo, maps = numbered_words(2, [3])
    drawn(words_files(photo, resting(maps, [PHOTOLESS, UNLIKELY]))["words_by_layer.png"])
    prose = prose_of(pages[0])
    assert "Hot:" not in prose
    assert "Not to be believed, so drawn in 35 % of the colours: the map as read at each layer" in prose
    assert f"{REASONS}. " in prose


def test_caption_speaks_of_the_words_and_layers_of_its_page(pages):
    photo, maps = numbered_words(60, [5])
    maps = resting(maps, [BELIEVED], likeness={5: 0.2})
    draw_pages(words_files(photo, maps))
    count, drawn_before = len(pages[0].axes) - 2, len(pages)  # of words on the first page, and of pages
    assert drawn_before > 1
    draw_pages(words_files(photo, resting(maps[:count], [PHOTOLESS]) + maps[count:]))
    first, last = (prose_of(page) for page in (pages[drawn_before], pages[-1]))
    assert "Not to be believed" in first
    assert "middle layers" not in first
    assert "believed" not in last
    assert "Of most words, layer 5 shows something else than the middle layers (correlation 0.2)." in last


# layers without a map


@pytest.mark.parametrize("why", ["no gradient", "zero everywhere"])
def test_a_word_without_a_map_is_a_grey_panel_and_has_no_map_in_the_page(drawings, why):
    pages, panels = drawings
    photo, maps = numbered_words(2, [3, 9])
    zero = {3: np.zeros((4, 6), np.float32), 9: maps[1].maps[9]}
    maps[1] = dataclasses.replace(maps[1], maps=zero, no_gradient=frozenset([3] * (why == "no gradient")))
    page = drawn(words_files(photo, maps)["words_by_layer.png"])
    assert [" ".join(words.split()) for words in panels] == [f"{why}: no map"]
    assert [np.ptp(crop, axis=-1).max() == 0 for _, crop in crops(pages[0], page)[1:]] == [False, True, False, False]
    assert GREY_WORDS in prose_of(pages[0])
    data = html_data(photo, "", maps, [[0.5]] * 2, [["x"]] * 2)
    assert [[bool(text) for text in word["maps"]] for word in data["words"]] == [[True, True], [False, True]]
    assert data["words"][1]["maps"][0] == ""


# strength and scale


@pytest.mark.parametrize(("scale", "shares"), [("map", [1, 1, 1]), ("word", [1, 0.5, 1]), ("all", [0.5, 0.25, 1])])
def test_full_colour_is_at_the_maximum_of_map_word_or_all(scale, shares):
    grid, look = FORMATS["square"], Look(scale=scale)
    one = {3: hot_spot(grid, (0, 0)), 9: hot_spot(grid, (0, 0)) / 2}
    words = [make_maps(one, target="dog"), make_maps({3: 2 * one[3], 9: one[9]}, target="car")]
    photo = make_photo(grid)
    results = draw_words(photo, "", words, [[0.5]] * 2, [["x"]] * 2, look)[0]
    found = [results["dog"][3], results["dog"][9], results["car"][3]]
    for pictures, share in zip(found, shares, strict=True):
        assert (pictures["heatmap"][0, 0] == colorize_cam(np.array(share))).all()


# layout: pictures as wide as their columns, on pages of a paper's height

SIDES_OF = {"1:3": (84, 252), "9:16": (252, 448), "1:1": (224, 224), "16:9": (448, 252), "4:1": (448, 112)}
VOCABULARY = ["plane", "watermelon", "dog", "left", "a", "extraordinarily", "(bicycle)", "right,", "umbrellas", "left"]


@pytest.fixture
def unpainted(monkeypatch):
    """Pictures are black: their places are the same."""
    monkeypatch.setattr(
        studies.words_figure, "draw_layer", lambda photo, *_: np.zeros((photo.height, photo.width, 3), np.uint8)
    )


def described(count, size, layers=(3, 12, 27)):
    """Maps of so many words of an answer, the words that the model says surely and those that it does not in turn."""
    said = [VOCABULARY[i % len(VOCABULARY)] for i in range(count)]
    words = [word.strip("(),") for word in said]
    maps = worded(words, "There is " + ", at the ".join(said) + ".", (size[1] // 28, size[0] // 28), layers)
    return resting(maps, [(0.98, 0.03), (0.99, 0.99), (2e-6, 1e-7)])


def pictures_of(figure):
    """The boxes of the maps, in inches, by rows from above."""
    maps = [axes for axes in figure.axes if axes.images and not axes.images[0].get_array().any()]
    rows = {}
    for box in sorted((box_of(axes) / figure.dpi for axes in maps), key=lambda box: (box[1].round(2), box[0])):
        rows.setdefault(box[1].round(2), []).append(box)
    return list(rows.values())


@pytest.mark.usefixtures("unpainted")
@pytest.mark.parametrize("width", ["page", "column"])
@pytest.mark.parametrize("count", [1, 4, 20, 100])
@pytest.mark.parametrize("ratio", SIDES_OF)
def test_pictures_fill_their_columns_and_columns_the_page(ratio, count, width):
    size = SIDES_OF[ratio]
    files = word_figures(make_image(*size), described(count, size), paper=Paper(width))
    names = list(files)
    for name in {names[0], names[len(names) // 2], names[-1]}:
        figure = laid_out(files[name](), width)  # nothing overlaps or is outside, no text is below 6 points
        inches = figure.get_size_inches()
        assert inches[1] <= 9
        rows = pictures_of(figure)
        wide, high = rows[0][0][2:] - rows[0][0][:2]
        assert wide / high == pytest.approx(size[0] / size[1], rel=0.02)
        for row in rows:
            assert len(row) * wide >= 0.8 * (row[-1][2] - row[0][0])
        if count == 1 and wide * high > 6:  # large enough
            continue
        layers = max((box_of(text)[2] / figure.dpi for text in figure.texts if is_layer(text)), default=0)
        used = max(row[-1][2] for row in rows) - min(row[0][0] for row in rows)
        if name == names[0]:  # the last page may have fewer words than a row has places
            assert used >= 0.8 * (inches[0] - 0.1 - max(0.1, layers))


def is_layer(text):
    return text.get_text() in ("layer 3", "layer 12", "layer 27") and text.get_size() == 7


@pytest.mark.usefixtures("unpainted")
@pytest.mark.parametrize("ratio", SIDES_OF)
def test_four_words_leave_nothing_empty_at_the_right(ratio):
    size = SIDES_OF[ratio]
    for width in ("page", "column"):
        (*_, page) = word_figures(make_image(*size), described(4, size), paper=Paper(width)).values()
        figure = laid_out(page(), width)
        for row in pictures_of(figure):
            assert row[-1][2] > 0.9 * figure.get_size_inches()[0]


@pytest.mark.usefixtures("unpainted")
@pytest.mark.parametrize("size", [(20, 4000), (4000, 20)])
def test_extreme_photos_keep_several_pictures_side_by_side_and_pages_of_a_papers_height(size):
    maps = described(12, (56, 56))
    for width in ("page", "column"):
        figures = [
            laid_out(draw(), width) for draw in word_figures(make_image(*size), maps, paper=Paper(width)).values()
        ]
        assert max(figure.get_size_inches()[1] for figure in figures) <= 9
        assert len(figures) <= 12
        assert size == (4000, 20) or len(pictures_of(figures[0])[0]) >= 4


@pytest.mark.usefixtures("unpainted")
def test_four_words_fit_on_one_page_of_a_column():
    for size in ((252, 448), (224, 224), (448, 252), (448, 112)):
        assert list(word_figures(make_image(*size), described(4, size), paper=Paper("column", ("pdf",)))) == [
            "words_by_layer.png",
            "words_by_layer.pdf",
        ]


@pytest.mark.usefixtures("unpainted")
def test_layers_stand_side_by_side_where_one_column_would_leave_the_page_empty():
    size, layers = (224, 224), range(28)
    (page,) = word_figures(make_image(*size), described(1, size, layers)).values()
    figure = laid_out(page(), "page")
    assert sum(map(len, pictures_of(figure))) == 28
    assert len(pictures_of(figure)[0]) >= 4
    labels = {f"layer {layer}" for layer in layers}
    found = {text.get_text().split(",")[0] for text in figure.texts} & labels
    assert found == labels
    assert "the layers of each word side by side" in prose_of(figure)


@pytest.mark.usefixtures("unpainted")
def test_later_pages_mark_their_part_of_the_answer():
    maps = described(40, (252, 448))
    files = list(word_figures(make_image(252, 448), maps).values())
    assert len(files) > 1
    for draw in files:
        figure = laid_out(draw(), "page")
        assert any(patch.get_facecolor() == to_rgba(common.page.MARKER) for patch in figure.artists)
        assert len(figure.axes) - 1 - sum(map(len, pictures_of(figure))) == (draw is files[0])  # the photo


# headings


def headings(maps, **options):
    """The bold text over the pictures, with its lines joined."""
    figures = [draw().figure for draw in word_figures(make_image(336, 224), maps, **options).values()]
    return [text.get_text() for figure in figures for text in figure.texts if is_heading(text)]


def is_heading(text):
    return text.get_weight() == "bold" and text.get_size() <= 7


@pytest.mark.usefixtures("unpainted")
def test_headings_have_no_punctuation_and_the_number_of_their_occurrence():
    answer = 'A dog (left), a hot-dog; left: "dog", left.'
    maps = worded(["dog", "left", "hot-dog", "left", "dog", "left"], answer, (4, 6), [3])
    assert headings(maps) == ["dog", "left", "hot-dog", "left (2)", "dog (3)", "left (3)"]
    figure = next(iter(word_figures(make_image(336, 224), maps).values()))().figure
    assert [text.get_text() for text in figure.texts if text.get_color() == "0.45"] == ["A", "a"]


@pytest.mark.usefixtures("unpainted")
def test_headings_wider_than_their_column_are_smaller_or_wrapped():
    size = (84, 252)
    for draw in word_figures(make_image(*size), described(20, size), paper=Paper("column")).values():
        figure = laid_out(draw(), "column")
        found = [text for text in figure.texts if is_heading(text) and text.get_text() not in ("Prompt", "Answer")]
        assert {text.get_size() for text in found} <= {6, 7}
        for text in found:
            left, _, right, _ = box_of(text) / figure.dpi
            assert right - left < 3.1
