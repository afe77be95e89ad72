"""Figures of Grad-CAM maps over the layers of a Qwen2.5-VL, for reading and for printing.

    photo, prompt -> TokenMaps          compute_token_maps: one pass for all layers
      -> {layer: pictures}              LayerPictures: heatmap and overlay in the photo's own size, drawn when asked for
      -> {file name: content}           draw_...: these pictures, and a figure of all of them, laid out on a Page
      -> files                          output_folder: all files or none

The drawing functions take a photo, `TokenMaps` and a `Look`, and know nothing of models.

Shapes:  H, W  rows and columns of image tokens     height, width  pixels of the photo     Lengths: inches of the page
"""

import functools
import os  # noqa: F401  (users import it from here, as gridspec, plt and Rectangle)
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from matplotlib import gridspec  # noqa: F401
from matplotlib import pyplot as plt  # noqa: F401
from matplotlib.patches import Rectangle  # noqa: F401
from PIL import Image

from common.bands import render_heatmap, render_overlay
from common.evidence import FADED, departures, doubt_of, explain_with_evidence
from common.families import seen
from common.files import output_folder
from common.lazy import LazyDict
from common.notebook import Shown, show_in_notebook
from common.page import (
    BAND,
    BODY_HEIGHTS,
    GAP,
    HEAD,
    HEIGHT,
    LINE,
    MARGIN,
    PAGE,
    SMALL,
    TEXT,
    WIDTHS,
    Page,
    Paper,
    best_columns,
    excerpt,
    fit_box,
    grey_panel,
    header,
    masthead,
    panel_width,
    shrink,
    small_print,
)
from common.parts import Part, numbered
from common.passes import passes_of
from common.photos import explained_photo, open_photo
from common.progress import show_progress
from smooth_gradcam import (
    METHODS,
    PLAIN,
    Look,
    Reading,
    Settings,
    SmoothQwenGradCAM,  # noqa: F401  (users import it from here)
    TokenMaps,
    check_whole,
    colorize_cam,
    compute_token_maps,
    get_model_layers,
    opacity_of,
    overlay_cam,
    resolve_layers,
)

__all__ = [
    *("create_layer_comparison_grid", "visualize_multiple_layers", "create_comparative_analysis"),
    *("SmoothQwenGradCAM", "get_model_layers", "LayerPictures", "output_folder", "Paper", "LAYER_RANGES", "WEAK"),
    *("draw_single", "draw_grid", "draw_multilayer", "draw_comparative", "draw_layer", "layer_pictures"),
    *("select_layers", "comparative_layers", "split_thirds", "spread", "strongest_of", "strength", "check_drawing"),
    *("text_rows", "photo_rows", "photo_names", "method_title", "settings_text", "look_text", "caption", "made_from"),
    *("colour_bar", "footer", "full_colour", "reliance", "quarters", "ninths"),
]

show_in_notebook()

LAYER_RANGES = ("auto", "early", "middle", "late", "all")
LAYERS_PER_THIRD = 3  # in the comparative analysis
EXCERPT = {"prompt": 300, "answer": 420, "target": 80}  # columns of text shown of each


# choice of layers


def spread(layers: list[int], count: int) -> list[int]:
    """At most `count` of the layers, evenly spaced, with the first and the last."""
    indices = np.linspace(0, len(layers) - 1, min(count, len(layers)))
    return [layers[i] for i in np.round(indices).astype(int)]


def split_thirds(total: int) -> dict[str, list[int]]:
    """The layers 0 ... total - 1 in three parts, {"early", "middle", "late"}. Raises ValueError for fewer than 3."""
    if total < 3:
        raise ValueError(f"early, middle and late layers need 3 layers or more: the model has {total}")
    first, second = total // 3, 2 * total // 3
    layers = list(range(total))
    return {"early": layers[:first], "middle": layers[first:second], "late": layers[second:]}


def comparative_layers(total: int, layers_per_third: int | None = LAYERS_PER_THIRD) -> dict[str, list[int]]:
    """The layers of each third that the comparative analysis shows: this many, evenly spaced, or for None all of them.

    Raises ValueError for a number below 1, or fewer than 3 layers.
    """
    if layers_per_third is not None:
        check_whole("layers_per_third", layers_per_third, 1)
    return {name: spread(layers, layers_per_third or len(layers)) for name, layers in split_thirds(total).items()}


def quarters(total: int) -> list[int]:
    """The layers of `visualize_multiple_layers` unless chosen: at a quarter, a half, three quarters, and the last."""
    return sorted({total // 4, total // 2, 3 * total // 4, total - 1})


def ninths(total: int) -> list[int]:
    """Those of multi mode: two, four and six ninths of the way to the last layer, and the last; 6 12 18 27 of 28."""
    return [*dict.fromkeys(part * (total - 1) // 9 for part in (2, 4, 6, 9))]


def select_layers(layer_range: str | Iterable[int], total: int) -> list[int]:
    """Layer indices of "auto" (six, a fifth of the layers apart), "early", "middle", "late" (thirds), "all", or a list.

    Raises ValueError that names the value and what is valid.
    """
    if not isinstance(layer_range, str):
        return resolve_layers(layer_range, total)
    if layer_range not in LAYER_RANGES:
        raise ValueError(
            f"layer_range={layer_range!r} must be one of {', '.join(LAYER_RANGES)} or a list of layers 0 to {total - 1}"
        )
    layers = list(range(total))
    if layer_range == "auto":
        return sorted({*layers[:: max(1, total // 5)][:5], total - 1})
    return layers if layer_range == "all" else split_thirds(total)[layer_range]


# pictures of one layer

WEAK = 0.05  # share of the figure's strongest map below which a map is called weak


def strongest_of(token_maps: Iterable[TokenMaps]) -> float:
    """The largest value of all maps of a figure: computed once, as there may be thousands."""
    return max(float(cam.max()) for maps in token_maps for cam in maps.maps.values())


def _peak_of(token_maps: TokenMaps, layer, look: Look, strongest: float | None = None) -> float:
    """The raw value that gets full colour in the picture of a layer; `strongest` as in `draw_layer`."""
    if look.scale == "map":
        return float(token_maps.maps[layer].max())
    return strongest_of([token_maps]) if look.scale == "word" or strongest is None else strongest


def full_colour(token_maps: TokenMaps, layer, look: Look, strongest: float | None = None) -> float:
    """The same, raised for a map that is not to be believed, so that its colours are faded."""
    return _peak_of(token_maps, layer, look, strongest) / (FADED if doubt_of(token_maps) else 1)


def strength(token_maps: TokenMaps, layer, strongest: float | None = None) -> str:
    """The label of a map: its maximum, and ", weak" if that is small beside the strongest map's; or why it is blank."""
    if layer in token_maps.blank:
        return token_maps.blank[layer]
    own, strongest = (_peak_of(token_maps, layer, Look(scale=scale), strongest) for scale in ("map", "all"))
    number = f"{own:#.2g}".rstrip(".")
    return f"max {number}" + (", weak" if own < WEAK * strongest or doubt_of(token_maps) else "")


def draw_layer(
    photo: Image.Image, token_maps: TokenMaps, layer, overlay: bool, look: Look = PLAIN, strongest: float | None = None
) -> np.ndarray:
    """The layer's heatmap, or its `overlay` on the photo, uint8 RGB of the photo's size; a grey panel without a map.

    `strongest` is `strongest_of` all maps of the figure; None means that these are all.
    """
    if layer in token_maps.blank:
        return grey_panel(*photo.size, f"{token_maps.blank[layer]}:\nno map")
    cam, peak = token_maps.maps[layer], full_colour(token_maps, layer, look, strongest)
    return render_overlay(photo, cam, look, peak) if overlay else render_heatmap(cam, photo.size[::-1], look, peak)


class LayerPictures(LazyDict):
    """{"superimposed", "heatmap", "cam"} of one layer; a picture is drawn when it is first asked for, and then kept.

    The first two are uint8 RGB (height, width, 3) of the photo's own size, grey panels where there is no map; the last
    is the raw map, float32 (H, W).
    """

    def __init__(self, photo: Image.Image, token_maps: TokenMaps, layer, look: Look = PLAIN, strongest=None):
        super().__init__("superimposed", "heatmap", cam=token_maps.maps[layer])
        self.photo, self.token_maps, self.layer, self.look, self.strongest = photo, token_maps, layer, look, strongest

    def make(self, name: str) -> np.ndarray:
        """The picture, newly drawn and not kept: those of many layers would fill memory."""
        overlay = name == "superimposed"
        return draw_layer(self.photo, self.token_maps, self.layer, overlay, self.look, self.strongest)


def layer_pictures(
    photo: Image.Image, token_maps: TokenMaps, look: Look = PLAIN, strongest: float | None = None
) -> dict[int, LayerPictures]:
    """{layer: pictures} of all maps, in their order."""
    return {layer: LayerPictures(photo, token_maps, layer, look, strongest) for layer in token_maps.maps}


def check_drawing(look, paper) -> None:
    """Raises TypeError, before anything is computed, if these are not a `Look` and a `Paper`."""
    if not isinstance(look, Look):
        raise TypeError(f'look={look!r} must be a Look, such as Look(colormap="jet")')
    if not isinstance(paper, Paper):
        raise TypeError(f'paper={paper!r} must be a Paper, such as Paper("column")')


# figures


def text_rows(token_maps: TokenMaps) -> list[tuple[str, str, tuple[int, int]]]:
    """The header's rows (label, text, marked span): prompt, answer, the explained part of it, and what speaks against
    its maps."""
    prompt, _ = excerpt(token_maps.prompt, (0, 0), EXCERPT["prompt"])
    answer, span = excerpt(token_maps.answer, token_maps.target_span, EXCERPT["answer"])
    target, _ = excerpt(token_maps.target, (0, 0), EXCERPT["target"])
    explained = f"{len(token_maps.target_tokens)} of {len(token_maps.tokens)} tokens, marked above: “{target}”"
    if token_maps.settings.contrast is not None:
        other, _ = excerpt(token_maps.settings.contrast, (0, 0), EXCERPT["target"])
        explained += f", rather than “{other}” in its place"
    if token_maps.whole:
        behind = " behind its thinking" if 0 < token_maps.thinking == token_maps.target_span[0] else ""
        explained = f"the whole answer{behind}: {len(token_maps.target_tokens)} tokens"
        span = span if behind else (0, 0)
    if token_maps.cut_off:
        explained += f"; the answer was cut off after {len(token_maps.tokens)} tokens"
    if token_maps.evidence is not None:
        explained += f"; {token_maps.evidence}"
    rows = [("Prompt", prompt, (0, 0)), ("Answer", answer, span), ("Explained", explained, (0, 0))]
    doubt = doubt_of(token_maps)
    return [*rows, ("Doubt", doubt, (0, 0))] if doubt else rows


def photo_rows(readings: list[Reading], doubts: Iterable[str] = ()) -> list[tuple]:
    """The header's rows for several photos: the prompt, if they share one, the answers, and each photo's doubt."""
    same_prompt = len({reading.prompt for reading in readings}) == 1
    rows = [("Prompt", readings[0].prompt)] if same_prompt else []
    count = len(readings) if len(readings) <= 5 else 4
    for i, reading in enumerate(readings[:count], 1):
        rows.append((f"Photo {i}", reading.answer if same_prompt else f"{reading.prompt} → {reading.answer}"))
    rows += [("…", f"and {len(readings) - count} more")] * (count < len(readings))
    doubted = {str(i): doubt for i, doubt in enumerate(doubts, 1) if doubt}
    if len(doubted) == 1:
        rows += [("Doubt", f"photo {number}: {doubt}") for number, doubt in doubted.items()]
    elif doubted:
        why = "the model hardly says this, or it does not come from the photo"
        rows.append(("Doubt", f"{why}: photos {', '.join(doubted)}"))
    return [(label, excerpt(text, (0, 0), 200)[0], (0, 0)) for label, text in rows]


def photo_names(names: list[str]) -> str:
    """A sentence with the numbers and names of the first photos."""
    numbered = ", ".join(f"{i} {name}" for i, name in enumerate(names[:6], 1))
    return f"Photos: {numbered}{f' and {len(names) - 6} more' if len(names) > 6 else ''}."


def method_title(settings: Settings) -> str:
    """The beginning of a figure's title: the technique, with "Smooth" if there is noise, and the method's name."""
    technique = "Grad-CAM" if METHODS[settings.method].run is None else "map"
    head = "" if settings.head is None else f", head {settings.head}"
    title = f"{'Smooth ' if settings.noise_std else ''}{technique} ({settings.method}{head})"
    return title[0].upper() + title[1:]


def settings_text(settings: Settings, place: str | None = None) -> str:
    """The settings of the maps in one line; `place` says where layers were read, None that it is the settings' tap."""
    settings = settings.settled()
    contrast = "" if settings.contrast is None else " minus the contrast's"
    noise = f"{settings.num_samples} noisy cop{'y' if settings.num_samples == 1 else 'ies'}, "
    noise += f"noise {settings.noise_std:g}, seed {settings.seed}"
    said = {"score": f"score {settings.score}{contrast}", "rules": f"rules {settings.rules}"}
    said |= {"tap": place or f"tap {settings.tap}"}
    said |= {"head": "mean over heads" if settings.head is None else f"head {settings.head}"}
    said = [text for name, text in said.items() if name not in METHODS[settings.method].inert]
    return ", ".join([f"Settings: method {settings.method}", *said, noise if settings.noise_std else "no noise"])


def look_text(look: Look, overlays: bool = True, several: bool = True) -> str:
    """A sentence on how to read the colours of `several` maps, and of their `overlays` if there are any."""
    own = "shares of each map's own maximum, which do not compare the strength of two maps"
    scale = {
        "map": own if several else "shares of the map's own maximum",
        "word": "shares of the maximum of each word's maps",
        "all": "shares of the maximum of all maps of this run",
    }[look.scale]
    cover = "cold areas stay photo" if look.opacity is None else f"{100 * look.opacity:.0f} % heatmap over the photo"
    return f"Colours: {scale}{f'; overlays: {cover}' if overlays else ''}."


def caption(token_maps: TokenMaps, layers: Iterable[int], arrangement: str, look: Look = PLAIN) -> str:
    """The caption of a figure of maps at these layers; `arrangement` completes "as read at"."""
    layers = list(layers)
    blank = [f"layer {layer} ({why})" for layer, why in token_maps.blank.items() if layer in layers]
    grey = f" Grey: no map at {', '.join(blank)}." if blank else ""
    evidence = "where the explained words come from"
    if token_maps.settings.contrast is not None:
        evidence = "what speaks for the explained words rather than for the other text"
    if token_maps.settings.method == "needed":
        evidence += ", on the image tokens alone that they need"
    if token_maps.settings.method == "rollout":
        evidence = "what their positions stem from, if attention were all that mixes positions"
    if token_maps.settings.method == "attention":
        evidence = "what the positions that predict the explained words attend to (which is not what comes of it)"
    hot = "" if doubt_of(token_maps) else f"Hot: {evidence}, as read at {arrangement}. "
    faded = reliance(token_maps, layers, f": the map as read at {arrangement}")
    return f"{hot}{faded}{look_text(look, several=len(layers) != 1)}{grey}"


def reliance(token_maps: TokenMaps, layers: Iterable[int] = (), which: str = "") -> str:
    """For captions: that the maps are not to be believed, and which layers show something else, where this is so."""
    faded = f"Not to be believed, so drawn in {100 * FADED:.0f} % of the colours{which}. "
    apart = departures(token_maps, layers)
    return faded * bool(doubt_of(token_maps)) + (f"{apart[0].upper()}{apart[1:]}. " if apart else "")


def made_from(token_maps: TokenMaps, photo: Image.Image) -> str:
    """The settings of the maps and the photo's size, in one line."""
    height, width = token_maps.grid
    return (
        f"{settings_text(token_maps.settings)}; photo {photo.width} × {photo.height} px, "
        f"{width} × {height} image tokens"
    )


def colour_bar(page: Page, y: float, maps: str, look: Look = PLAIN, overlays: bool = True) -> float:
    """The colours of heatmaps, below them those of `overlays` over mid grey, and what they mean; returns the y below.

    `maps` says whose they are: a method's name, or "each method".
    """
    width, height, share = min(3.2, page.inner - 0.2), 0.16 if overlays else 0.1, np.linspace(0, 1, 256)[None]
    colours = colorize_cam(share, look.colormap)
    over_grey = overlay_cam(np.full_like(colours, 128), colours, opacity_of(share, look))
    bars, ticks = [colours[0], over_grey[0]][: 1 + overlays], (0, 0.25, 0.5, 0.75, 1)
    page.colour_scale((page.width - width) / 2, y, width, height, bars, ticks, SMALL)
    y += height + SMALL * LINE + 0.05
    peak = {"map": "the map's own maximum", "word": "its word's maximum", "all": "the maximum of all maps"}[look.scale]
    return page.centred(y, f"{maps}: share of {peak}{'; below: over grey' * overlays}", SMALL) + GAP


def footer(page: Page, y: float, method: str, text: str, settings: str, look: Look = PLAIN) -> float:
    """The colour bar and the small print; returns the y below them."""
    return small_print(page, colour_bar(page, y, method, look), text, settings)


def _token_ticks(axes, grid: tuple[int, int], width: int, height: int) -> None:
    """Ticks between the image tokens along two edges of a picture."""
    for axis, count, pixels in ((axes.xaxis, grid[1], width), (axes.yaxis, grid[0], height)):
        axis.set_ticks(np.arange(1, count) * pixels / count - 0.5, [""] * (count - 1))


def _panel_figure(
    photo: Image.Image, token_maps: TokenMaps, layer: int, look: Look = PLAIN, paper: Paper = PAGE
) -> Page:
    """The photo, the heatmap and the overlay of one layer: side by side, or one below the other if they are very wide.

    Ticks along the heatmap stand between image tokens.
    """
    rows, aspect = text_rows(token_maps), photo.width / photo.height
    page, scratch = (Page(WIDTHS[paper.width], "".join(text for _, text, _ in rows)) for _ in range(2))
    y = header(page, MARGIN, MARGIN, f"{method_title(token_maps.settings)}, layer {layer}", rows) + GAP
    text, made = caption(token_maps, [layer], f"layer {layer}", look), made_from(token_maps, photo)
    columns = 3 if aspect < 2.5 else 1
    room = HEIGHT - y - footer(scratch, GAP, token_maps.settings.method, text, made, look)
    height = min(4.5, max(0.4, room / (3 // columns) - HEAD - GAP))
    width, height = fit_box(aspect, (page.inner - (columns - 1) * GAP) / columns, height)
    small = shrink(photo, width, height)
    panels = {"Photo": np.asarray(small)}
    panels |= {name: draw_layer(small, token_maps, layer, name == "Overlay", look) for name in ("Heatmap", "Overlay")}
    largest = strength(token_maps, layer)
    pitch = max(width, 0.5) + GAP
    left = (page.width - columns * pitch + GAP) / 2
    for i, (name, array) in enumerate(panels.items()):
        x, top = left + i % columns * pitch, y + i // columns * (HEAD + height + GAP)
        page.label(x + (pitch - GAP) / 2, top, name, largest if name == "Heatmap" else "")
        axes = page.picture(x + (pitch - GAP - width) / 2, top + HEAD, width, height, array)
        if name == "Heatmap" and layer not in token_maps.blank:
            _token_ticks(axes, token_maps.grid, *small.size)
    y += 3 // columns * (HEAD + height + GAP) + GAP
    return page.finish(footer(page, y, token_maps.settings.method, text, made, look))


def _layers_figure(
    name: str, photo: Image.Image, token_maps: TokenMaps, layers: list, title: str, groups=None, look: Look = PLAIN,
    paper: Paper = PAGE,
) -> dict[str, object]:  # fmt: skip
    """{file name: what draws it}: the photo beside the text, and below them the overlay of each layer, with its heatmap
    if the paper has heatmaps; on several pages where pictures would become too small on one.

    `groups`, {label: layers}, get rows of their own, with heatmaps where the page is wide enough.
    """
    heads, aspect = text_rows(token_maps), photo.width / photo.height
    letters = "".join(text for _, text, _ in heads)
    pairs = paper.heatmaps or (groups is not None and paper.width == "page")
    kinds = ("heatmap", "overlay") if pairs else ("overlay",)
    beside = len(kinds) > 1 and (aspect < 1 or groups is not None)
    across, down = (len(kinds), 1) if beside else (1, len(kinds))
    labels = {layer: (f"layer {layer}", strength(token_maps, layer)) for layer in layers}
    arrangement = "each layer"
    if len(kinds) > 1:
        arrangement += f", in the heatmap and {'beside' if beside else 'below'} it over the photo"

    def head(page, number):
        return masthead(page, photo, title + number, heads) + 2 * GAP

    def foot(page, y, parts):
        shown = [layer for part in parts for layer in part.shown]
        below = caption(token_maps, shown, arrangement, look)
        if any("weak" in labels[layer][1] for layer in shown):
            below += f" Weak: below {100 * WEAK:.0f} % of the strongest."
        return footer(page, y + GAP, token_maps.settings.method, below, made_from(token_maps, photo), look)

    page = Page(WIDTHS[paper.width], letters)
    label_room = max(page.label_width(*label) for label in labels.values())
    room = HEIGHT - head(page, "") - foot(page, 0, [Part(0, None, shown=tuple(layers))])
    most_body = BODY_HEIGHTS[paper.width] * max(1, len(layers) / 28)  # beyond 28 layers it grows
    sheets = max(1, round(most_body * min(1, len(layers) / 12) / room + 0.2))  # fewer layers have room on less
    body = min(most_body, sheets * room)
    inner = page.inner - (BAND if groups else 0)  # BAND: room for the row's label
    most = max(1, int((inner + GAP) / (label_room + GAP)))
    if groups:
        columns = min(most, max(map(len, groups.values())))
    else:
        columns = best_columns(aspect, len(layers), most, inner, body, across, down)
    rows = [
        (label, members[i : i + columns])
        for label, members in (groups or {"": layers}).items()
        for i in range(0, len(members), columns)
    ]
    width = panel_width(aspect, columns, len(rows), inner, body, across, down)
    height = width / aspect
    step = (width + GAP / 2, 0) if beside else (0, height + GAP / 2)  # from the heatmap to the overlay
    wide, high = (width + (across - 1) * step[0], height + (down - 1) * step[1])
    pitch, small = max(wide, label_room) + GAP, shrink(photo, width, height)
    left = page.width - MARGIN - inner + (inner - columns * pitch + GAP) / 2

    def draw_row(label, members, page, y):
        page.text(left - BAND, y + HEAD + high / 2, label, TEXT, rotation=90, ha="center", va="center")
        for i, layer in enumerate(members):
            middle = left + i * pitch + (pitch - GAP) / 2
            page.label(middle, y, *labels[layer])
            for j, kind in enumerate(kinds):
                picture = draw_layer(small, token_maps, layer, kind == "overlay", look)
                page.picture(middle - wide / 2 + j * step[0], y + HEAD + j * step[1], width, height, picture)

    parts = [Part(HEAD + high + GAP, functools.partial(draw_row, *row), shown=tuple(row[1])) for row in rows]
    return numbered(name, paper, letters, head, parts, foot)


# the files of each mode: {file name: content}, see `output_folder`


def _layer_files(results: dict, folder: str = "") -> dict[str, object]:
    return {
        f"{folder}layer_{layer}_{kind}.png": functools.partial(result.make, kind)
        for layer, result in results.items()
        for kind in ("heatmap", "superimposed")
    }


def draw_single(
    image, token_maps: TokenMaps, look: Look = PLAIN, paper: Paper = PAGE
) -> tuple[dict, dict[str, object]]:
    """(LayerPictures, {file name: content}) of the only layer of the maps."""
    photo = open_photo(image)
    ((layer, result),) = layer_pictures(photo, token_maps, look).items()
    return result, {
        "original_image.png": photo,
        "heatmap.png": functools.partial(result.make, "heatmap"),
        "superimposed_result.png": functools.partial(result.make, "superimposed"),
    } | paper.figure("visualization", functools.partial(_panel_figure, photo, token_maps, layer, look, paper))


def _draw_layers(photo, token_maps: TokenMaps, name: str, look: Look, paper: Paper) -> tuple[dict, dict[str, object]]:
    results, title = layer_pictures(photo, token_maps, look), f"{method_title(token_maps.settings)} by layer"
    figure = _layers_figure(name, photo, token_maps, list(results), title, look=look, paper=paper)
    return Shown(results, figure[f"{name}.png"]), figure | _layer_files(results)


def draw_grid(image, token_maps: TokenMaps, look: Look = PLAIN, paper: Paper = PAGE) -> tuple[dict, dict[str, object]]:
    """({layer: LayerPictures}, {file name: content}) of all maps."""
    return _draw_layers(open_photo(image), token_maps, "layer_comparison_grid", look, paper)


def draw_multilayer(
    image, token_maps: TokenMaps, look: Look = PLAIN, paper: Paper = PAGE
) -> tuple[dict, dict[str, object]]:
    """As `draw_grid`, always with heatmaps and the photo, and with the file names of multi mode."""
    photo, paper = open_photo(image), replace(paper, heatmaps=True)
    results, files = _draw_layers(photo, token_maps, "all_layers_comparison", look, paper)
    return results, {"original_image.png": photo} | files


def draw_comparative(
    image, token_maps: TokenMaps, thirds: dict[str, list[int]], look: Look = PLAIN, paper: Paper = PAGE
) -> tuple[dict, dict[str, object]]:
    """({"early": {layer: LayerPictures}, "middle": ..., "late": ...}, {file name: content}) of the layers of `thirds`.

    Each third gets a folder with a grid of its own; comparative_analysis.png has all three.
    """
    photo, title = open_photo(image), method_title(token_maps.settings)
    results = layer_pictures(photo, token_maps, look)
    heading, name = f"{title}: early, middle and late layers", "comparative_analysis"
    files = _layers_figure(name, photo, token_maps, list(results), heading, thirds, look, paper)
    whole = files[f"{name}.png"]
    pictures = {third: {layer: results[layer] for layer in layers} for third, layers in thirds.items()}
    for third, layers in pictures.items():
        name = f"{third}/layer_comparison_grid"
        files |= _layers_figure(name, photo, token_maps, list(layers), f"{title}, {third} layers", None, look, paper)
        files |= _layer_files(layers, f"{third}/")
    return Shown(pictures, whole), files


# the documented entry points


def _create(
    model, processor, image, prompt, layers: list[int], save_dir, draw, look: Look, paper: Paper, quiet: bool,
    subfolders=(), **settings,
):  # fmt: skip
    """Explain the layers and write the files of `draw(photo, token maps, look=, paper=)`; returns its pictures."""
    photo, passes = explained_photo(image, prompt), passes_of(settings.get("contrast"))
    settings = {"progress": show_progress(quiet), "passes": passes, "by": explain_with_evidence} | settings
    with output_folder(save_dir, subfolders, inputs=[image]) as write:
        given = None if image is None else photo
        token_maps = compute_token_maps(model, processor, given, prompt, layers, **settings)
        pictures, files = draw(seen(model, processor, photo), token_maps, look=look, paper=paper)
        write(files)
    return pictures


def create_layer_comparison_grid(
    model, processor, image, prompt, layer_range="auto", save_dir="cam_results_grid",
    *, num_samples=5, noise_std=0.1, quiet=False, look=PLAIN, paper=PAGE, **settings,
):  # fmt: skip
    """Grid of heatmaps and overlays over a range of layers, all from one answer and one pass.

    `layer_range` is "auto" (six layers), "early", "middle", "late" (thirds), "all" or a list of indices. `image` and
    `settings` (further keywords) are those of `compute_token_maps`, `look` is a `Look`, `paper` a `Paper`. Writes
    layer_comparison_grid.png, layer_<i>_heatmap.png and layer_<i>_superimposed.png.

    Returns {layer: {"superimposed", "heatmap", "cam"}}: uint8 RGB (height, width, 3) twice, and the raw map, float32
    (H, W); see `LayerPictures`. A layer without a map has grey panels and zeros. Raises ValueError for layers that do
    not exist, and what `compute_token_maps` and `output_folder` raise.
    """
    check_drawing(look, paper)
    layers = select_layers(layer_range, get_model_layers(model)[1])
    settings |= {"num_samples": num_samples, "noise_std": noise_std}
    return _create(model, processor, image, prompt, layers, save_dir, draw_grid, look, paper, quiet, **settings)


def visualize_multiple_layers(
    model, processor, image, prompt, layer_indices=None, save_dir="cam_results_multilayer",
    *, num_samples=5, noise_std=0.1, quiet=False, look=PLAIN, paper=PAGE, **settings,
):  # fmt: skip
    """Heatmaps and overlays of chosen layers, `layer_indices`; None is those of `quarters`, 7 14 21 27 of 28.

    Writes original_image.png, all_layers_comparison.png, layer_<i>_heatmap.png and layer_<i>_superimposed.png.
    Further arguments, result and errors are those of `create_layer_comparison_grid`.
    """
    check_drawing(look, paper)
    total = get_model_layers(model)[1]
    layers = quarters(total) if layer_indices is None else select_layers(layer_indices, total)
    settings |= {"num_samples": num_samples, "noise_std": noise_std}
    return _create(model, processor, image, prompt, layers, save_dir, draw_multilayer, look, paper, quiet, **settings)


def create_comparative_analysis(
    model, processor, image, prompt, save_dir="cam_results_comparative",
    *, layers_per_third=LAYERS_PER_THIRD, num_samples=5, noise_std=0.1, quiet=False, look=PLAIN, paper=PAGE, **settings,
):  # fmt: skip
    """Early, middle and late layers side by side, all from one answer and one pass.

    `layers_per_third` layers are shown of each third; None shows all of them. Writes comparative_analysis.png, and to
    each of early/, middle/ and late/ a grid with its layers' files.

    Returns {"early": {layer: ...}, "middle": {...}, "late": {...}} with dictionaries as those of
    `create_layer_comparison_grid`, which has the further arguments and errors.
    """
    check_drawing(look, paper)
    thirds = comparative_layers(get_model_layers(model)[1], layers_per_third)
    layers = [layer for third in thirds.values() for layer in third]
    settings |= {"num_samples": num_samples, "noise_std": noise_std}
    draw = functools.partial(draw_comparative, thirds=thirds)
    return _create(model, processor, image, prompt, layers, save_dir, draw, look, paper, quiet, thirds, **settings)
