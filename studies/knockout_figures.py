"""Figures and files of knockout mode: what is left of an answer when attention is blocked."""

import functools

import numpy as np
from matplotlib.ticker import AutoLocator, MaxNLocator

from common.encoding import decimal, to_csv, with_minus
from common.evidence import Evidence, warnings_of
from common.page import (
    BAND,
    GAP,
    MARGIN,
    PAGE,
    SMALL,
    TEXT,
    WIDTHS,
    Page,
    Paper,
    excerpt,
    header,
    masthead,
    small_print,
    text_width,
)
from common.parts import Part, apart, captions, numbered, rows_of_plots
from common.progress import show_progress
from common.terminal import say
from smooth_gradcam import Reading, get_model_layers
from studies.decoder import sequence_length, token_groups
from studies.flow import forecast_forwards
from studies.flow_figures import COLOURS, THIN
from studies.knockout import (
    KEPT,
    Severed,
    edges_of,
    explained_lines,
    explained_text,
    find_cliff,
    find_onset,
    knockout_arrays,
    knockout_rows,
    largest_change,
    mean_change,
    said_instead,
    sever_photo,
    truncated,
    truncation_finding,
)
from studies.tasks import task_files
from visualization_utils import photo_names, photo_rows

__all__ = ["sever"]

TELLS_LITTLE = "blocked attention tells little of it"
ENDS = {"user": COLOURS["user"], "answer": COLOURS["answer"]}  # colours of the edges, by where they end
SMALL_PLOT = 0.75  # inches: height
TICKS = 0.34  # left of a row of small plots


def _severed_heads(severed: Severed) -> list[tuple]:
    """The header's rows for one photo: prompt, answer, and the explained part of it."""
    reading, tokens = severed.reading, severed.explained
    text = excerpt(explained_text(reading, tokens), (0, 0), 200)[0]
    explained = f"{len(tokens)} of {len(reading.tokens)} tokens: {text}; {severed.evidence}"
    contiguous = list(tokens) == list(range(tokens[0], tokens[-1] + 1))  # which can be marked in the answer
    start, end = (reading.spans[tokens[0]][0], reading.spans[tokens[-1]][1]) if contiguous else (0, 0)
    span = end - len(reading.answer[start:end].lstrip()), end  # a word's token often begins with a blank
    rows = [("Prompt", reading.prompt, (0, 0)), ("Answer", reading.answer, span), ("Explained", explained, (0, 0))]
    rows += [("Doubt", severed.evidence.doubt, (0, 0))] * bool(severed.evidence.doubt)
    return [(label, *excerpt(text, marked, 300)) for label, text, marked in rows]


def _plot_truncation(axes, curves: dict[str, np.ndarray], each: bool) -> None:
    """The means of {name: (photos, K + 1)}, the cliff of the first, and if `each` thin lines of its photos."""
    (main, values), *others = curves.items()
    mean, layers = values.mean(0), np.arange(values.shape[1])
    cliff = find_cliff(mean)
    if cliff is not None:
        axes.axvspan(find_onset(mean), cliff, color="#fff3c4", linewidth=0)
        axes.axvline(cliff, color="black", linewidth=0.8, linestyle="--")
        side, shift = ("right", -0.012) if cliff > len(mean) / 2 else ("left", 0.012)
        axes.text(cliff + shift * len(mean), 0.02, f"cliff: {cliff}", size=SMALL, ha=side, va="bottom")
    if each and len(values) > 1:
        axes.plot(layers, values.T, color=COLOURS["image"], linewidth=0.4, alpha=0.4)
    axes.plot(layers, mean, color=COLOURS["image"], linewidth=2.4 if others else 1.4, label=main)
    for name, values in others:
        axes.plot(layers, values.mean(0), color=COLOURS["user"], linewidth=1.2, linestyle="--", label=name)
    if others:
        style = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.24), "ncols": 2, "borderaxespad": 0}
        axes.legend(fontsize=SMALL - 1, frameon=False, handlelength=1.8, labelspacing=0.25, columnspacing=1, **style)


def _window_rows(page: Page, severed: list[Severed], window: int) -> list[Part]:
    """The mean change by layer for each edge that was blocked in windows: a plot each, before the others in grey."""
    changes = {name: mean_change(severed, name) for name in edges_of(severed)}
    room = max(text_width(name, SMALL, page.families) for name in changes) + GAP
    most = max(1, min(len(changes), int((page.inner - TICKS + GAP) / room)))
    columns = -(-len(changes) // -(-len(changes) // most))
    pitch = (page.inner - TICKS + GAP) / columns
    finite = np.concatenate([values[np.isfinite(values)] for values in changes.values()])
    low, high = min([-10, *finite]), max([5, *finite])
    limits = low - 0.08 * (high - low), high + 0.08 * (high - low)
    ticks = AutoLocator().tick_values(*limits)[:: 2 if high - low > 50 else 1]
    ticks = [tick for tick in ticks if limits[0] <= tick <= limits[1]]

    def title(page, y):
        text = f"Change of p (%) with attention blocked in {window} layer{'s' * (window > 1)} around each"
        return page.lines(MARGIN, y, page.inner, text, TEXT, weight="bold") + GAP / 2

    def draw_row(members, page, y):
        for i, name in enumerate(members):
            x, width = MARGIN + TICKS + i * pitch, pitch - 2 * GAP
            page.text(x + width / 2, y, name, SMALL, ha="center")
            axes = page.axes(x, y + BAND, width, SMALL_PLOT)
            axes.axhline(0, color="0.6", linewidth=0.6)
            apart(axes, np.arange(len(changes[name])), changes, name, ENDS[name.split()[-1]])
            axes.set_ylim(limits)
            axes.set_yticks(ticks, [with_minus(f"{tick:g}") if i == 0 else "" for tick in ticks])
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))

    said = (
        f"Blocked: in {window} layers around each (fewer at the ends), what stands behind the arrow cannot attend to "
        "what stands before it; change of the probability p of the explained tokens, by layer; grey: the other plots."
    )
    if any(edge.startswith("object") for edge in changes):
        said += " Where one part of the image is blocked, attention moves to the rest; it may cost more than all."
    rows = [[*changes][i : i + columns] for i in range(0, len(changes), columns)]
    high = BAND + SMALL_PLOT + 0.28
    return [Part(high, functools.partial(draw_row, row), said, title) for row in rows]


def _draw_knockout(
    severed: list[Severed], names: list[str], curves: dict[str, np.ndarray], what: str, window: int | None,
    finding: str, paper: Paper = PAGE,
) -> dict[str, object]:  # fmt: skip
    """{file name: what draws it}: what is left when the image is hidden from a layer on, the cliff and, if windows were
    run, their effect."""
    doubts = [one.evidence.doubt if what != "accuracy" else "" for one in severed]
    if len(severed) == 1:
        heads = _severed_heads(severed[0])
    else:
        heads = photo_rows([one.reading for one in severed], doubts)
        texts = (explained_text(one.reading, one.explained) for one in severed[:6])
        explained = "; ".join(f"{i} {text}" for i, text in enumerate(texts, 1))
        heads += [("Explained", excerpt(explained, (0, 0), 200)[0], (0, 0))] if what != "accuracy" else []
    letters = "".join(text for _, text, _ in heads)
    page = Page(WIDTHS[paper.width], letters)

    def head(page, number):
        if len(severed) == 1:
            title = f"Knockout: what the answer needs{number}"
            return masthead(page, severed[0].reading.photo, title, heads, (1.6, 1.2)) + 2 * GAP
        return header(page, MARGIN, MARGIN, f"Knockout: what the answers need{number}", heads) + 2 * GAP

    def draw_truncation(page, axes):
        _plot_truncation(axes, curves, each=what != "accuracy")

    said = (
        f"{finding[0].upper()}{finding[1:]}. Image tokens are hidden from all later positions by the attention mask; "
        "positions stay."
    )
    mean = curves["image hidden"].mean(0)
    if find_cliff(mean) is not None:
        said += (
            f" Cliff: the first layer from which on {100 * KEPT:.0f} % of the full value is kept, wherever hiding "
            "begins; yellow: from where all is lost to where all is kept. What these layers read may also be read "
            "elsewhere."
        )
    if len(curves) > 1:
        said += f" Dashed: {list(curves)[-1]}, those with most attention from the explained tokens kept."
    said += f" {THIN}" if len(severed) > 1 and what != "accuracy" else ""
    label = f"image hidden from layer … on ({len(severed[0].removed) - 1}: nothing)"
    plots = [("Truncation", (), {"xlabel": label, "ylabel": what.replace("probability", "p"), "ylim": (-0.02, 1.04)})]
    below = 0.45 + 0.2 * (len(curves) > 1)
    parts = rows_of_plots(page, plots, (2.9, 1.9), below, draw_truncation, caption=said)
    parts += _window_rows(page, severed, window) if edges_of(severed) else []

    def foot(page, y, parts):
        text = "Not to be believed. " if all(doubts) else "Partly of words that are not to be believed. " * any(doubts)
        text += captions(parts) + (f" {photo_names(names)}" if len(severed) > 1 else "")
        return small_print(page, y + GAP, text)

    return numbered("knockout", paper, letters, head, parts, foot)


def sever(
    readings: list[Reading], names: list[str], spans: list, *, window=None, keep=None, mask=None, accuracy=False,
    part="answer", runs_at_once=8, quiet=False, paper=PAGE, tasks=None,
) -> tuple[dict[str, object], list[str], list[Evidence]]:  # fmt: skip
    """({file name: content}, findings in lines, evidence of each photo's explained tokens) of knockout mode.

    `names` are those of the photos, `spans` are (start, end) in each answer, or None for the tokens that need the
    photo. With `accuracy`, the answers are the right ones, and what counts is whether the model would give them. With
    `tasks`, one for each photo or None, there are also means over the photos of each. Other arguments are those of
    `sever_photo`, which runs `runs_at_once` edges at once.
    """
    total = get_model_layers(readings[0].model)[1]
    for reading in readings:
        reading.photo  # noqa: B018  (a video, or several photos in one prompt, cannot be drawn)
    if not quiet:
        length, groups = sequence_length(readings[0]), token_groups(readings[0])
        windows = (4 if mask is None else 8) + 2 * ("other images" in groups)
        runs = (total + 1) * (1 + (keep is not None)) + total * (0 if window is None else windows)
        share = (length - groups["image"][-1] - 1) / length
        say(f"{runs} runs of each photo; {forecast_forwards(readings, 2 + runs * share)}")
    keywords = {"part": part, "window": window, "keep": keep, "mask": mask, "batch_size": runs_at_once}
    keywords["progress"] = show_progress(quiet or len(readings) > 1, "blocked runs", "batch")
    severed = [sever_photo(reading, span, **keywords) for reading, span in zip(readings, spans, strict=True)]
    what = "accuracy" if accuracy else "probability of the explained tokens"
    curves = {"image hidden": [one.right if accuracy else truncated(one, one.removed) for one in severed]}
    if keep is not None:
        others = f"all but {keep} tokens hidden"
        curves[others] = [one.kept_right if accuracy else truncated(one, one.kept) for one in severed]
    curves = {name: np.array(values, float) for name, values in curves.items()}
    doubted = not accuracy and all(one.evidence.doubt for one in severed)
    if accuracy:  # a model that seldom says these words may need the photo all the same
        doubted = curves["image hidden"][:, -1].mean() < 0.5
    named = f"{what} (answers that begin exactly as given)" if accuracy else what
    finding = truncation_finding(curves["image hidden"], named, doubted)
    lines = [] if accuracy else [*explained_lines(severed, names, spans), *_evidence_lines(severed, names)]
    lines.append(finding)
    if keep is not None:
        mean = curves[others].mean(0)
        cliff = find_cliff(mean)
        result = "no cliff" if cliff is None else f"cliff {cliff}, {decimal(mean[cliff], 3)}"
        lines.append(
            f"but for the {keep} image tokens that the explained tokens attend to most in the layer before: {result}"
        )
    for edge in edges_of(severed):
        lines.append(f"{edge}: {largest_change(mean_change(severed, edge), window)}")
    if accuracy:
        lines += said_instead(severed, names)
    files = _draw_knockout(severed, names, curves, what, window, finding, paper) | {
        "knockout.csv": to_csv(rows := knockout_rows(severed, names, tasks)),
        "knockout.npz": knockout_arrays(severed, names),
    }
    files |= task_files("knockout", rows, paper)
    return files, lines, [one.evidence for one in severed]


def _evidence_lines(severed: list[Severed], names: list[str]) -> list[str]:
    """What the explained tokens of the only photo rest on, and why those of any photo tell little."""
    lines = [f"evidence: {severed[0].evidence}"] if len(severed) == 1 else []
    doubts = {name: one.evidence.doubt for name, one in zip(names, severed, strict=True)}
    return lines + warnings_of({name: doubt and f"{doubt}: {TELLS_LITTLE}" for name, doubt in doubts.items()})
