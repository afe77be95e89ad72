"""Figures and files of knockout mode: what is left of an answer when attention is blocked."""

import functools

import numpy as np

from common.encoding import decimal, to_csv
from common.evidence import Evidence, warnings_of
from common.page import BAND, GAP, MARGIN, PAGE, SMALL, WIDTHS, Page, Paper, excerpt, header, masthead, small_print
from common.progress import show_progress
from common.terminal import say
from smooth_gradcam import Reading, get_model_layers
from studies.decoder import sequence_length, token_groups
from studies.flow import forecast_forwards
from studies.flow_figures import COLOURS, THIN
from studies.knockout import (
    KEPT,
    Severed,
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
EDGE_STYLES = (
    ("#0072b2", "-"), ("#d55e00", "-"), ("#009e73", "-"), ("#cc79a7", "-"), ("#56b4e9", "--"), ("#e69f00", "--"),
    ("#56b4e9", ":"), ("#e69f00", ":"),
)  # fmt: skip


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


def _legend_below(axes) -> None:
    style = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.24), "ncols": 2, "borderaxespad": 0}
    axes.legend(fontsize=SMALL - 1, frameon=False, handlelength=1.8, labelspacing=0.25, columnspacing=1, **style)


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
    axes.plot(layers, mean, color=COLOURS["image"], linewidth=1.4, label=main)
    for name, values in others:
        axes.plot(layers, values.mean(0), color=COLOURS["user"], linewidth=1.2, linestyle="--", label=name)
    if others:
        _legend_below(axes)


def _plot_windows(axes, severed: list[Severed]) -> None:
    """The mean change by layer for each edge that was blocked in windows."""
    axes.axhline(0, color="0.6", linewidth=0.6)
    for name, (colour, line) in zip(severed[0].windows, EDGE_STYLES, strict=False):
        mean = mean_change(severed, name)
        axes.plot(np.arange(len(mean)), mean, color=colour, linestyle=line, linewidth=1.2, label=name)
    _legend_below(axes)


def _draw_knockout(
    severed: list[Severed], names: list[str], curves: dict[str, np.ndarray], what: str, window: int | None,
    finding: str, paper: Paper = PAGE,
) -> Page:  # fmt: skip
    """What is left when the image is hidden from a layer on, the cliff and, if windows were run, their effect."""
    doubts = [one.evidence.doubt if what != "accuracy" else "" for one in severed]
    heads = _severed_heads(severed[0]) if len(severed) == 1 else photo_rows([one.reading for one in severed], doubts)
    page = Page(WIDTHS[paper.width], "".join(text for _, text, _ in heads))
    if len(severed) == 1:
        y = masthead(page, severed[0].reading.photo, "Knockout: what the answer needs", heads, (1.6, 1.2))
    else:
        texts = (explained_text(one.reading, one.explained) for one in severed[:6])
        explained = "; ".join(f"{i} {text}" for i, text in enumerate(texts, 1))
        heads += [("Explained", excerpt(explained, (0, 0), 200)[0], (0, 0))] if what != "accuracy" else []
        y = header(page, MARGIN, MARGIN, "Knockout: what the answers need", heads)
    y += 2 * GAP
    windows, height = list(severed[0].windows), 1.9
    legend = 0.62 if len(windows) > 4 else 0.34 if windows else 0.2 if len(curves) > 1 else 0
    ((x, top, width), *others), y = page.places(y, 1 + bool(windows), 2.9, BAND + height + 0.45 + legend)
    y += GAP
    style = {"xlabel": f"image hidden from layer … on ({len(severed[0].removed) - 1}: nothing)", "ylabel": what}
    axes = page.plot(x, top, width, height, "Truncation", ylim=(-0.02, 1.04), **style)
    _plot_truncation(axes, curves, each=what != "accuracy")
    for x, top, width in others:
        style = {"xlabel": "around layer …", "ylabel": "change of p, %"}
        title = f"Attention blocked in {window} layer{'s' * (window > 1)}"
        _plot_windows(page.plot(x, top, width, height, title, **style), severed)
    doubted = "Not to be believed. " if all(doubts) else "Partly of words that are not to be believed. " * any(doubts)
    caption = (
        f"{doubted}{finding[0].upper()}{finding[1:]}. Image tokens are hidden from all later positions by the "
        f"attention mask; positions stay. Cliff: the first layer from which on {100 * KEPT:.0f} % of the full value "
        "is kept, wherever hiding begins; yellow: from where all is lost to where all is kept. What these layers read "
        "may also be read elsewhere."
    )
    if len(curves) > 1:
        caption += f" Dashed: {list(curves)[-1]}, those with most attention from the explained tokens kept."
    if windows:
        caption += (
            f" Blocked: in {window} layers around each (fewer at the ends), what stands behind the arrow cannot attend "
            "to what stands before it; change of the probability of the explained tokens. Where one part of the image "
            "is blocked, attention moves to the rest; it may cost more than blocking all."
        )
    if len(severed) > 1:
        caption += f" {THIN} {photo_names(names)}"
    return page.finish(small_print(page, y, caption))


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
    if not quiet:
        runs = (total + 1) * (1 + (keep is not None)) + total * (0 if window is None else 4 if mask is None else 8)
        length, groups = sequence_length(readings[0]), token_groups(readings[0])
        share = (length - groups["image"].stop) / length
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
    finding = truncation_finding(curves["image hidden"], what, doubted)
    lines = [] if accuracy else [*explained_lines(severed, names, spans), *_evidence_lines(severed, names)]
    lines.append(finding)
    if keep is not None:
        mean = curves[others].mean(0)
        cliff = find_cliff(mean)
        result = "no cliff" if cliff is None else f"cliff {cliff}, {decimal(mean[cliff], 3)}"
        lines.append(
            f"but for the {keep} image tokens that the explained tokens attend to most in the layer before: {result}"
        )
    for edge in severed[0].windows:
        lines.append(f"{edge}: {largest_change(mean_change(severed, edge), window)}")
    if accuracy:
        lines += said_instead(severed, names)
    draw = functools.partial(_draw_knockout, severed, names, curves, what, window, finding, paper)
    files = paper.figure("knockout", draw) | {
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
