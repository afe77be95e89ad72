"""Figures of several parts, on as many pages as keep to the height of a paper's, and small plots side by side.

Lengths: inches of the page, from its top left
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from common.page import BAND, HEIGHT, WIDTHS, Page, Paper

__all__ = ["Part", "apart", "captions", "nested", "numbered", "rows_of_plots"]

LOW = 1.35  # inches: the highest plot in a column


class Part(NamedTuple):
    """What stays together on a page.

    height   inches
    draw     called with the page and the y of the upper edge
    caption  its sentences of the caption
    above    called likewise, returns the y below: what stands over the first of successive parts with the same `above`
    shown    the keys of the maps in it
    """

    height: float
    draw: Callable[[Page, float], object]
    caption: str = ""
    above: Callable[[Page, float], float] | None = None
    shown: tuple = ()


def captions(parts: list[Part]) -> str:
    """What is to be said of the parts, each sentence once."""
    return " ".join(dict.fromkeys(part.caption for part in parts if part.caption))


def _lay_out(page: Page, y: float, parts: list[Part], draw: bool) -> float:
    above = None
    for part in parts:
        if part.above is not None and part.above is not above:
            y = part.above(page, y)
        above = part.above
        if draw:
            part.draw(page, y)
        y += part.height
    return y


def numbered(
    name: str, paper: Paper, text: str, head: Callable[[Page, str], float], parts: Iterable[Part],
    foot: Callable[[Page, float, list[Part]], float],
) -> dict[str, object]:  # fmt: skip
    """{file name: the function that draws it}: the parts in their order, in `name`.png, `name`_2.png and so on.

    No page is higher than HEIGHT, unless its header, one part and the caption take more.
    Successive parts with the same `above` stay together where a page has room for them.
    `text` has the characters that the pages must be able to write. `head(page, number)` draws the header, whose title
    ends with `number`, such as " (2 of 3)", and returns the y below it; `foot(page, y, parts)` draws what stands below
    these parts, the colour bar and the caption, and returns the page's height.
    """
    scratch, parts = Page(WIDTHS[paper.width], text), list(parts)
    top, most = head(scratch, " (9\xa0of\xa09)"), foot(scratch, 0, parts)

    def fits(shown):
        below = _lay_out(scratch, top, shown, draw=False)
        return below + most <= HEIGHT or below + foot(scratch, 0, shown) <= HEIGHT

    pages = [[]]
    for above, group in itertools.groupby(parts, lambda part: part.above):
        group = list(group)
        if above is not None and pages[-1] and not fits([*pages[-1], *group]) and fits(group):
            pages.append([])
        for part in group:
            if pages[-1] and not fits([*pages[-1], part]):
                pages.append([])
            pages[-1].append(part)

    def draw(i: int) -> Page:
        page = Page(WIDTHS[paper.width], text)
        y = head(page, f" ({i + 1}\xa0of\xa0{len(pages)})" if len(pages) > 1 else "")
        return page.finish(foot(page, _lay_out(page, y, pages[i], draw=True), pages[i]))

    files = {}
    for i in range(len(pages)):
        files |= paper.figure(name if i == 0 else f"{name}_{i + 1}", functools.partial(draw, i))
    return files


def rows_of_plots(
    page: Page, plots: list[tuple], size: tuple[float, float], below: float, draw: Callable, **shared
) -> list[Part]:
    """A part for each row of plots, side by side as far as there is room on a page like this one.

    `plots` are (title, arguments, keywords of `Page.plot`), `size` the (width, height) of each, LOW high at most in a
    column, `below` what stands below its axes. `draw(page, axes, *arguments)` fills the axes; `shared` are keywords of
    all parts.
    """
    height = size[1] if page.width == WIDTHS["page"] else min(size[1], LOW)
    boxes, _ = page.places(0, len(plots), size[0], BAND + height + below)

    def draw_row(members, page, y):
        for (x, _, width), (title, arguments, style) in members:
            draw(page, page.plot(x, y, width, height, title, **style), *arguments)

    rows = {}
    for box, plot in zip(boxes, plots, strict=True):
        rows.setdefault(box[1], []).append((box, plot))
    return [Part(BAND + height + below, functools.partial(draw_row, row), **shared) for row in rows.values()]


# curves that coincide


def nested(i: int, count: int) -> dict[str, float]:
    """The style of curve `i` of `count`: each narrower than those below it, and dashed in between: none is hidden."""
    above = count - 1 - i
    line = {"linestyle": (0, (2, 1.5)) if 0 < i < count - 1 else "-", "linewidth": 1.1 + 1.2 * above}
    return line | {"markersize": 3 + 1.8 * above, "zorder": 3 + i / count}


def apart(axes, x: list, curves: dict[str, np.ndarray], own: str, colour: str, marker: str = "") -> None:
    """One of the curves in colour, in front of the others in grey: in a plot for each curve, none hides another."""
    for name, values in curves.items():
        style = {"color": colour, "marker": marker, "markersize": 2.6, "linewidth": 1.2, "zorder": 3}
        axes.plot(x, values, label=name, **(style if name == own else {"color": "0.7", "linewidth": 0.6}))
