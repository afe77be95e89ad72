"""Flow and knockout by task: means of their curves over the photos of each "task" of a list, by layer.

rows of information_flow.csv or knockout.csv, with tasks -> task_means -> ..._by_task.csv and a figure
"""

import functools

import numpy as np

from common.encoding import to_csv
from common.page import BAND, GAP, MARGIN, PAGE, WIDTHS, Page, Paper, header, small_print
from studies.tables import RESAMPLES, interval, with_interval

__all__ = ["task_files", "task_means", "task_tables"]

NO_TASK = "no task"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
TABLES = {"flow": "information_flow", "knockout": "knockout"}  # the name of each mode's files
TITLES = {"flow": "Information flow by task", "knockout": "Knockout by task: what the answers need"}
IMAGE = {"blocked": "image from"}  # rows of the truncation
PLOTS = {  # (title, column, rows, name of the x-axis)
    "flow": [
        ("Attention to the image", "share_image", {}, "layer"),
        ("|gradient × hidden state|", "gradient_image", {}, "layer"),
        ("Probability after each layer", "p_after_layer", {}, "layer"),
    ],
    "knockout": [
        ("Probability", "probability", IMAGE, "image hidden from layer … on"),
        ("Begins with this answer", "answer_right", IMAGE, "image hidden from layer … on"),
    ],
}
SAID = {
    "flow": "Attention, |gradient × hidden state|: the image's share. Probability: of the explained tokens, by the "
    "final norm and head.",
    "knockout": "Probability: of the explained tokens. Begins with this answer: its tokens are the most likely.",
}
LEFT_OUT = ("photo", "layer", "task", "blocked", "doubt")  # columns that are no measures


def task_means(rows: list[dict]) -> list[dict]:
    """Lines {"task", "blocked"?, "layer", "photos", measure, measure_low, measure_high, ...} of rows with a "task".

    The measures are all columns with numbers; a cell that is empty or nan does not count.
    """
    groups = {}
    for row in rows:
        key = {name: row[name] for name in ("task", "blocked", "layer") if name in row}
        groups.setdefault(tuple(key.items()), []).append(row)
    lines = []
    for key, members in groups.items():
        line = dict(key) | {"photos": len({row["photo"] for row in members})}
        for measure in dict.fromkeys(name for row in members for name in row if name not in LEFT_OUT):
            known = [(float(row[measure]), row["photo"]) for row in members if row.get(measure) not in (None, "")]
            values, photos = (np.array(column) for column in zip(*known, strict=True)) if known else (np.array([]),) * 2
            sound = np.isfinite(values)
            if sound.any():
                line |= with_interval(measure, interval(values[sound], photos[sound]))
        lines.append(line)
    return lines


def task_files(mode: str, rows: list[dict], paper: Paper = PAGE) -> dict[str, object]:
    """{file name: content} of flow or knockout mode by task; none if no row has a "task"."""
    if not any(row.get("task") for row in rows):
        return {}
    lines, name = task_means([row | {"task": row.get("task") or NO_TASK} for row in rows]), f"{TABLES[mode]}_by_task"
    return paper.figure(name, functools.partial(_draw, mode, lines, paper)) | {f"{name}.csv": to_csv(lines)}


def task_tables(mode: str, paper: Paper, records: list[dict]) -> tuple[dict[str, object], list[str]]:
    """({file name: content}, lines) of the records of a list that has tasks, see `run_list` of photo_list.py."""
    table = f"{TABLES[mode]}.csv"
    rows = [
        row | {"photo": record["image"], "task": record.get("task", "")}
        for record in records
        for row in record.get("measures", {}).get(table, ())
    ]
    return task_files(mode, rows, paper), []


def _draw(mode: str, lines: list[dict], paper: Paper) -> Page:
    """A curve for each task, with its interval."""
    counts = {}
    for line in lines:
        counts[line["task"]] = max(counts.get(line["task"], 0), line["photos"])
    page = Page(WIDTHS[paper.width], "".join(counts))
    y = header(
        page, MARGIN, MARGIN, TITLES[mode], [("Photos", f"{sum(counts.values())} in {len(counts)} tasks", (0, 0))]
    )
    legend = {f"{task} ({counts[task]})": COLOURS[i % len(COLOURS)] for i, task in enumerate(counts)}
    y = page.legend(y + GAP, legend)
    boxes, y = page.places(y + GAP, len(PLOTS[mode]), 1.9, BAND + 1.6 + 0.45)
    for (x, top, width), (title, measure, rows, below) in zip(boxes, PLOTS[mode], strict=True):
        axes = page.plot(x, top, width, 1.6, title, xlabel=below)
        for i, task in enumerate(counts):
            mine = [line for line in lines if line["task"] == task and measure in line and rows.items() <= line.items()]
            layers = [int(line["layer"]) for line in mine]
            mean, low, high = ([line[f"{measure}{end}"] for line in mine] for end in ("", "_low", "_high"))
            colour, line = COLOURS[i % len(COLOURS)], ("-", "--", ":", "-.")[i // len(COLOURS) % 4]
            axes.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(layers, mean, color=colour, linestyle=line, linewidth=1.2)
        axes.set_ylim(-0.02, 1.04)
    caption = f"Means over the photos of each task, and what 95 % of {RESAMPLES} resamples of the photos give. "
    caption += SAID[mode]
    return page.finish(small_print(page, y, caption))
