"""Tables for a paper: a mean or a share and its interval in each cell, as text and as LaTeX.

    values, photos -> interval      95 % of resampled photos, as the questions about a photo are not independent
    lines -> to_text, to_latex      a line is a dictionary: labels as they are, measures as numbers

A measure m of a line is m, between m_low and m_high; a line may lack it.

Shapes:  P  photos     R  resamples
"""

import numpy as np

from common.encoding import decimal

__all__ = ["RESAMPLES", "interval", "known_measures", "to_latex", "to_text", "with_interval"]

RESAMPLES = 1000


def interval(values: np.ndarray, photos: np.ndarray, seed: int = 0, weights=None) -> tuple[float, float, float]:
    """(mean, low, high) of values (n,) of the photos (n,): a 95 % interval by resampling photos.

    With `weights` (n,), the share sum(values) / sum(weights), such as precision: hits among what was said. nan if the
    weights are all zero; resamples in which they are have no part in the interval.
    """
    weights = np.ones(len(values)) if weights is None else weights
    _, indices = np.unique(photos, return_inverse=True)
    sums, counts = (np.bincount(indices, column) for column in (values, weights))  # (P,)
    resamples = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))  # (R, P)
    if not counts.any():
        return (float("nan"),) * 3
    sums, total = sums[resamples].sum(1), counts[resamples].sum(1)
    low, high = np.percentile(sums[total > 0] / total[total > 0], [2.5, 97.5])
    return float(values.sum() / weights.sum()), float(low), float(high)


def with_interval(measure: str, numbers: tuple[float, float, float]) -> dict[str, float]:
    """The (mean, low, high) of a measure as entries of a line; none if they are nan."""
    names = (measure, f"{measure}_low", f"{measure}_high")
    return {} if np.isnan(numbers[0]) else dict(zip(names, numbers, strict=True))


def known_measures(table: list[dict], measures) -> list[str]:
    """Those of the measures that a line of the table has."""
    return [measure for measure in measures if any(measure in line for line in table)]


def to_text(table: list[dict], labels: dict[str, str], measures: dict[str, str]) -> list[str]:
    """The table as lines of text, with a mean and its interval in each cell.

    `labels` and `measures` are {column: its head}; a measure that no line has is left out.
    """
    known = known_measures(table, measures)
    rows = [[*labels.values(), *(measures[measure] for measure in known)]]
    for line in table:
        cells = [
            f"{decimal(line[m])} ({decimal(line[f'{m}_low'])}-{decimal(line[f'{m}_high'])})" if m in line else ""
            for m in known
        ]
        rows.append([*(str(line[label]) for label in labels), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def to_latex(
    table: list[dict], caption: str, labels: dict[str, str], measures: dict[str, str], best: dict[str, float]
) -> str:
    """A LaTeX table with booktabs: means with half the width of their interval, in bold where they are the `best`.

    `best` is {measure: its value as printed}, for the lines whose last label is not empty.
    """
    known, lines, last = known_measures(table, measures), [], list(labels)[-1]
    for line in table:
        cells = []
        for m in known:
            number = decimal(line[m]) if m in line else "--"
            value = number.replace("-", "$-$") if m in line else number
            half = f" \\tiny$\\pm${decimal((line[f'{m}_high'] - line[f'{m}_low']) / 2)}" if m in line else ""
            bold = m in line and line[last] != "" and float(number) == best.get(m)
            cells.append(f"\\textbf{{{value}}}{half}" if bold else value + half)
        lines.append(" & ".join([*(_escaped(str(line[label])) for label in labels), *cells]) + " \\\\")
    heads = " & ".join([*map(_escaped, labels.values()), *(_head(measures[m]) for m in known)])
    return "\n".join(
        [
            "% \\usepackage{booktabs}",
            "\\begin{table}",
            f"\\caption{{{_head(caption)}}}",
            f"\\begin{{tabular}}{{{'l' * len(labels)}{'r' * len(known)}}}",
            "\\toprule",
            f"{heads} \\\\",
            "\\midrule",
            *lines,
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
            "",
        ]
    )


def _head(text: str) -> str:
    return _escaped(text).replace(" - ", " $-$ ")


def _escaped(text: str) -> str:
    """The text with the special characters of LaTeX escaped."""
    for character in "&%$#_{}":
        text = text.replace(character, f"\\{character}")
    return text
