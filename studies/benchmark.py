"""A benchmark over photos: the measures of each photo's maps, and a table of methods and layers for a paper.

Reading, mask -> rows           benchmark_photo: the measures of every method and layer
  -> mean and interval          summarise: 95 % of resampled photos, as the words of a photo are not independent
  -> benchmark.csv, .tex        to_table, to_latex
"""

from dataclasses import replace

import numpy as np
import torch

from common.encoding import decimal, to_csv
from common.evidence import Evidence, evidence_lines, explain_by_methods, settled_for
from common.page import Paper
from common.passes import SENSITIVE, patches_of, repainted, token_probabilities
from smooth_gradcam import (
    Look,
    Reading,
    Settings,
    TokenMaps,
    borrowed,
    find_target,
    noisy_passes,
    score_parts,
)
from studies import tables
from studies.faithfulness import (
    ORDERS,
    TOLERANCE,
    baseline_image,
    insertion_deletion,
    map_key,
    score_rows,
    side_by_side,
)
from studies.localization import centre_map, fit_of
from visualization_utils import draw_grid

__all__ = ["basis", "benchmark_photo", "benchmark_tables", "summarise", "to_latex", "to_table"]

MEASURES = {  # column of `_benchmark_rows`: head in the table
    "pointing": "pointing",
    "near": "near",
    "energy": "energy",
    "obj_iou": "Obj-IoU",
    "border": "border",
    "insertion": "insertion",
    "deletion": "deletion",
    "difference": "ins. - del.",
}
LABELS = {"method": "method", "layer": "layer"}
LOWER_IS_BETTER = ("border", "deletion")
TEXTS = ("method", "layer", "doubt")  # columns that are no measures


# the table


def summarise(measured: list[tuple[str, list[dict]]]) -> list[dict]:
    """The table's lines {"method", "layer", "words", "photos", "doubted", "p", "kept", measure, measure_low, ...}.

    `measured` are (photo, rows of `_benchmark_rows`) of each word, with their evidence: "doubted" is the number of
    words with a doubt, "p" and "kept" are means. A measure is the mean over the words that have it, between
    measure_low and measure_high, and measure_words is their number: words without a mask, or without a token that
    needs the photo, lack some.
    """
    rows_of = {}
    for photo, rows in measured:
        for row in rows:
            rows_of.setdefault((row["method"], row["layer"]), []).append((photo, row))
    table = []
    for (method, layer), pairs in rows_of.items():
        line = {"method": method, "layer": layer, "words": len(pairs), "photos": len({photo for photo, _ in pairs})}
        if all("kept" in row for _, row in pairs):
            line["doubted"] = sum(bool(row.get("doubt")) for _, row in pairs)
            line |= {name: float(np.mean([row[name] for _, row in pairs])) for name in ("p", "kept")}
        for measure in MEASURES:
            known = [(row[measure], photo) for photo, row in pairs if row.get(measure) is not None]
            if known:
                values, photos = (np.array(column) for column in zip(*known, strict=True))
                numbers = tables.interval(values.astype(float), photos)
                line |= tables.with_interval(measure, numbers)
                line[f"{measure}_words"] = len(known)
        table.append(line)
    return sorted(table, key=lambda line: line["layer"] == "")  # the maps first, whichever photos have which


def basis(table: list[dict]) -> str:
    """The measures that fewer words have than there are, with their number: "border of 4 words; "."""
    counts = {m: max(line.get(f"{m}_words", 0) for line in table) for m in tables.known_measures(table, MEASURES)}
    most, groups = max(line["words"] for line in table), {}
    for measure, count in counts.items():
        groups.setdefault(count, []).append(MEASURES[measure])
    return "".join(f"{', '.join(names)} of {count} words; " for count, names in groups.items() if count < most)


def to_table(table: list[dict]) -> list[str]:
    """The table as lines of text, with a mean and its interval in each cell."""
    return tables.to_text(table, LABELS, MEASURES)


def to_latex(table: list[dict], caption: str) -> str:
    """A LaTeX table with booktabs: means with half the width of their interval, the best of each measure in bold."""
    maps, best = [line for line in table if line["layer"] != ""], {}
    for m in tables.known_measures(maps, MEASURES):
        known = [float(decimal(line[m])) for line in maps if m in line]
        best[m] = (min if m in LOWER_IS_BETTER else max)(known)
    return tables.to_latex(table, caption, LABELS, MEASURES, best)


# one photo


def _sensitive_tokens(reading: Reading, tokens: list[int], baseline: str) -> list[int]:
    """Those of the tokens, indices into the answer's, that need the photo.

    Their probability on the baseline picture is more than 0.2 lower (EAGLE, 2025).
    """
    blank = baseline_image(reading.photo, baseline)
    with borrowed(reading.model):
        forced, (scored,) = score_parts(reading.inputs, reading.tokens, [tokens])
        pixels = torch.stack([patches_of(reading), repainted(reading, blank)])
        full, empty = token_probabilities(reading, forced, pixels, scored)
    return [token for token, fall in zip(tokens, full - empty, strict=True) if fall > SENSITIVE]


def _benchmark_rows(
    reading: Reading, maps: dict[str, list[TokenMaps]], mask: np.ndarray | None = None, *, steps=64, baseline="blur",
    runs_at_once=8, seed=0,
) -> list[dict]:  # fmt: skip
    """Rows {"method", "layer", evidence, measures} of the maps, then of a map of the centre and of random maps.

    `maps` has for each method the maps of the explained word and, if it has several tokens, those of each of them.
    Insertion and deletion are of the word's `_sensitive_tokens`; rows lack them if there is none. The measures of
    `localization` and `at_border` need the `mask`. A layer without a map scores 0 in these, and lacks the others.
    """
    together, rng = side_by_side({method: parts[0] for method, parts in maps.items()}), np.random.default_rng(seed)
    centre = centre_map(reading.grid)
    sensitive = _sensitive_tokens(reading, together.target_tokens, baseline)
    areas = {}
    if sensitive:
        token_maps = replace(together, maps=together.maps | {"centre": centre}, target_tokens=sensitive)
        keywords = {"steps": steps, "baseline": baseline, "batch_size": runs_at_once, "seed": seed}
        measured = insertion_deletion(reading, token_maps, random_orders=ORDERS, tolerance=TOLERANCE, **keywords)
        names = ("insertion", "deletion", "difference")
        areas = {row["layer"]: {name: row[name] for name in names} for row in score_rows(token_maps, measured, None)}

    def row(method, layer, key, cams_of_draws):
        fits = [fit_of(cams, mask) for cams in cams_of_draws] if mask is not None else [{}]
        means = {name: float(np.mean([fit[name] for fit in fits])) for name in fits[0]}
        evidence = {} if together.evidence is None else together.evidence.record
        return {"method": method, "layer": layer} | evidence | means | areas.get(key, {})

    rows = [
        row(method, layer, map_key(method, layer), [[token_maps.maps[layer] for token_maps in parts]])
        for method, parts in maps.items()
        for layer in parts[0].maps
    ]
    random = [[rng.random(reading.grid).astype(np.float32)] for _ in range(ORDERS)]
    return [*rows, row("centre", "", "centre", [[centre]]), row("random", "", "random", random)]


def benchmark_photo(
    reading: Reading, layers: list[int], methods: dict[str, Settings], target: str | None, occurrence: int, part: str,
    given: bool, mask: np.ndarray | None, *, look: Look, paper: Paper, passes=noisy_passes, batch_size: int = 1,
    **measuring,
) -> tuple[dict, list[str], list[Evidence]]:  # fmt: skip
    """({file name: content}, lines to print, evidence): the measures of every method and layer, and the first's maps.

    `passes` and `batch_size` are those of `explain`, `measuring` are keywords of `_benchmark_rows`. "auto" is called
    what it stands for. A target that the model's own answer lacks is left out, as that is no failure of the photo.
    Raises ValueError if a `given` answer lacks it.
    """
    try:
        span = find_target(reading, target, occurrence, part)
    except ValueError:
        if given:
            raise
        return {}, [f"left out: the model does not say {target!r}"], []
    tokens = reading.tokens_of(span)
    settled = (settled_for(settings, reading.is_whole(span)) for settings in methods.values())
    spans = [span, *(reading.spans[i] for i in tokens)] if mask is not None and len(tokens) > 1 else [span]
    copies = {"passes": passes, "batch_size": batch_size}
    maps = explain_by_methods(reading, spans, layers, {one.method: one for one in settled}, **copies)
    rows, first = _benchmark_rows(reading, maps, mask, **measuring), next(iter(maps.values()))[0]
    figures = draw_grid(reading.photo, first, look=look, paper=paper)[1]
    files = {name: draw for name, draw in figures.items() if name.startswith("layer_comparison_grid")}
    lines = [f"explained: {first.target!r} at layer {', '.join(map(str, layers))}", *evidence_lines(first, layers)]
    return files | {"scores.csv": to_csv(rows)}, lines, [first.evidence]


def benchmark_tables(records: list[dict]) -> tuple[dict, list[str]]:
    """({file name: content}, the table in lines) of the records of a list, see `run_list` of photo_list.py."""

    def numbers(row):
        return {k: v if k in TEXTS else float(v) for k, v in row.items() if v or k == "layer"}

    measured = [
        (record["image"], [numbers(row) for row in record["measures"]["scores.csv"]])
        for record in records
        if "scores.csv" in record.get("measures", {})
    ]
    if not measured:
        return {}, ["no word could be measured, so there is no table"]
    table = summarise(measured)
    photos = len({photo for photo, _ in measured})
    doubted = sum(any(row.get("doubt") for row in rows) for _, rows in measured)
    doubts = f"{doubted} of them doubted (hardly said, or not from the photo), and kept in; " if doubted else ""
    caption = f"{len(measured)} words in {photos} photos; {doubts}{basis(table)}"
    caption += f"95 % of {tables.RESAMPLES} resamples of the photos"
    return {"benchmark.csv": to_csv(table), "benchmark.tex": to_latex(table, caption)}, [caption, *to_table(table)]
