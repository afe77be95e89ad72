"""What noisy copies do for a map: python tests/benchmark_smoothing.py

In beds of the demo model (see beds.py), every object word of its own answer is explained with 1 to 50 noisy copies and
noise of 0 to 0.4 (standard deviation, for pixel values in [0, 1]). Of each map: how often its maximum lies on or at
most 15 pixels off the object, its Obj-IoU, and on some words the area under the insertion curve. The copies of a
smaller number are the first ones of the larger. Printed as a table, and written as smoothing.csv and smoothing.png.

"Likeness" is Spearman's correlation of a map with the one of 20 other copies of the same noise: how much of it a
preview has already.
"""

import argparse
import csv
import functools
import multiprocessing
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo_model")]
import beds  # noqa: E402

import smooth_gradcam as core  # noqa: E402
from common.checkpoint import load_model, load_processor  # noqa: E402
from common.encoding import DPI  # noqa: E402
from common.page import BAND, GAP, MARGIN, TITLE, WIDTHS, Page  # noqa: E402
from studies.faithfulness import auc, insertion_deletion  # noqa: E402
from studies.faithfulness_figures import STYLES  # noqa: E402
from studies.localization import localization  # noqa: E402
from studies.randomization import spearman  # noqa: E402

DRAWN = ("gradcam", "hirescam", "product")  # methods
MEASURES = ("near", "obj_iou", "insertion", "likeness")
STEPS = 16  # of the insertion curve
OTHERS = 20  # copies of the map that likeness compares with


def copies_of_maps(reading, spans: dict, layer: int, settings: core.Settings) -> dict:
    """{(drawn, word): (copies, H, W)} raw maps of each noisy copy, one forward a copy; `spans` are the words'."""
    words, taps, maps = list(spans), core.find_taps(reading.model, [layer], settings.settled().tap), {}
    with core.borrowed(reading.model):
        for part, pairs in core.noisy_passes(reading, list(spans.values()), taps, settings.settled()):
            for method in DRAWN:
                cam = core.token_map(layer, *pairs[layer], reading, method)
                maps.setdefault((method, words[part]), []).append(cam.reshape(reading.grid))
    return {key: np.stack(stack) for key, stack in maps.items()}


def measure_scene(job) -> list[dict]:
    """The rows of one scene: (drawn, noise, copies, averaging) -> measures, of each of its words."""
    bed, number, layer, noises, counts, faithful, model_path = job
    drawn = beds.DRAWS[bed](number)
    reading = core.read(*_load(model_path), drawn.photo, drawn.prompt)
    masks = {name: mask for name, mask in drawn.masks.items() if f" {name} " in reading.answer}
    spans = {word: core.find_target(reading.answer, word) for word in masks}
    if not spans:
        return []
    targets, rows = {}, []
    if number < faithful:
        clean = core.explain(reading, list(spans.values()), [layer], core.Settings(use_smooth=False))
        targets = dict(zip(spans, clean, strict=True))
    for noise in noises:
        maps = copies_of_maps(reading, spans, layer, core.Settings(max(counts), noise, seed=0))
        others = copies_of_maps(reading, spans, layer, core.Settings(OTHERS, noise, seed=1))
        for (method, word), stack in maps.items():
            reference = others[method, word].mean(0)
            for count in counts if noise else [1]:
                raw, scaled = stack[:count].mean(0), np.mean([core.normalize_cam(cam) for cam in stack[:count]], axis=0)
                for averaging, cam in {"raw": raw, "normalised": scaled}.items():
                    row = {
                        "bed": bed,
                        "scene": number,
                        "word": word,
                        "drawn": method,
                        "noise_std": noise,
                        "num_samples": count,
                    }
                    row |= {"averaging": averaging} | localization(cam, masks[word])
                    row["likeness"] = spearman(cam, reference) if noise else 1.0
                    if word in targets and averaging == "raw":
                        target = replace(targets[word], maps={layer: cam}, no_gradient=frozenset())
                        faith = insertion_deletion(reading, target, steps=STEPS, random_orders=0, batch_size=STEPS)
                        row["insertion"] = auc(faith.insertion[layer], faith.shares)
                        row["deletion"] = auc(faith.deletion[layer], faith.shares)
                    rows.append(row)
    return rows


@functools.cache
def _load(path: str):
    torch.set_num_threads(1)
    return load_model(path, "cpu", "auto"), load_processor(path, 10**9)


def mean(rows: list[dict], measure: str, **wanted) -> float:
    """Mean of a measure over the rows that have it and these values."""
    values = [row[measure] for row in rows if measure in row and all(row[k] == v for k, v in wanted.items())]
    return float(np.mean(values)) if values else float("nan")


def draw(rows: list[dict], noises: list[float], counts: list[int], path: Path) -> None:
    """Each measure by noise at 10 copies (above) and by copies at each noise, for the default (below)."""
    page = Page(WIDTHS["page"], "")
    names = {"near": "on or near the object", "obj_iou": "Obj-IoU", "insertion": "insertion"}
    names["likeness"] = f"likeness to {OTHERS} others"
    middle = min(counts, key=lambda count: abs(count - 10))
    noisy = [noise for noise in noises if noise]
    colours = {method: STYLES[method][0] for method in DRAWN}
    blues = dict(zip(noisy, np.linspace(0.75, 0.0, len(noisy)), strict=True))
    blues = {noise: (0, 0.45 * shade + 0.1, 0.35 + 0.6 * shade) for noise, shade in blues.items()}

    def column(measure, drawn, noise, count):
        return mean(rows, measure, drawn=drawn, noise_std=noise, num_samples=count, averaging="raw")

    y = page.lines(MARGIN, MARGIN, page.inner, "What noisy copies do for a map", TITLE, weight="bold") + GAP
    y = page.legend(y, colours) + GAP
    places, y = page.places(y, len(MEASURES), 1.25, BAND + 1.2 + 0.45)
    for (x, top, width), measure in zip(places, MEASURES, strict=True):
        label = f"noise_std, {middle} copies"
        axes = page.plot(x, top, width, 1.2, names[measure], xlabel=label, ylim=(0, 1.03))
        for drawn, colour in colours.items():
            values = [column(measure, drawn, noise, middle if noise else 1) for noise in noises]
            axes.plot(noises, values, marker="o", markersize=3, color=colour)
    y = page.legend(y, {f"gradcam, noise {noise:g}": blue for noise, blue in blues.items()}) + GAP
    places, y = page.places(y, len(MEASURES), 1.25, BAND + 1.2 + 0.45)
    for (x, top, width), measure in zip(places, MEASURES, strict=True):
        axes = page.plot(x, top, width, 1.2, names[measure], xlabel="num_samples", ylim=(0, 1.03), xscale="log")
        for noise, blue in blues.items():
            values = [column(measure, "gradcam", noise, count) for count in counts]
            axes.plot(counts, values, marker="o", markersize=3, color=blue)
        axes.set_xticks(counts, counts)
        axes.minorticks_off()
    Image.fromarray(np.asarray(page.finish(y))).save(path, dpi=(DPI, DPI), optimize=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model_path", default=str(ROOT / "demo_model"))
    parser.add_argument("--beds", nargs="+", choices=beds.DRAWS, default=["scenes"])
    parser.add_argument("--scenes", type=int, default=20, help="pictures of each bed")
    parser.add_argument("--faithful", type=int, default=8, help="scenes whose words' insertion is measured")
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--noise_std", type=float, nargs="+", default=[0.0, 0.05, 0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--num_samples", type=int, nargs="+", default=[1, 3, 5, 10, 20, 50])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--output_dir", type=Path, default=ROOT / "build" / "benchmark")
    options = parser.parse_args()
    start = time.perf_counter()
    settings = (options.layer, options.noise_std, options.num_samples, options.faithful, options.model_path)
    jobs = [(bed, number, *settings) for bed in options.beds for number in range(options.scenes)]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        rows = [row for part in pool.imap(measure_scene, jobs) for row in part]
        pool.close()
        pool.join()
    words = len({(row["bed"], row["scene"], row["word"]) for row in rows})
    print(f"{words} words in {len(jobs)} pictures, layer {options.layer}, {platform.machine()}", end=", ")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}", end=", ")
    print(f"{options.processes} processes, {time.perf_counter() - start:.0f} s")
    measures = ("pointing", *MEASURES[:2], "energy", *MEASURES[2:])
    columns = ("bed", "drawn", "averaging", "noise_std", "num_samples")
    keys = [dict(zip(columns, key, strict=True)) for key in sorted({tuple(row[c] for c in columns) for row in rows})]
    table = [key | {name: mean(rows, name, **key) for name in measures} for key in keys]
    print(f"{'bed':8} {'drawn':9} {'averaging':11} noise copies  " + " ".join(f"{name:>9}" for name in measures))
    for line in table:
        key = "{bed:8} {drawn:9} {averaging:11} {noise_std:5.2f} {num_samples:6d}".format(**line)
        values = " ".join(f"{line[name]:9.3f}" for name in measures)
        print(f"{key}  {values}")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    with (options.output_dir / "smoothing.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    draw(rows, options.noise_std, options.num_samples, options.output_dir / "smoothing.png")
    print(f"wrote {options.output_dir / 'smoothing.csv'} and smoothing.png")


if __name__ == "__main__":
    main()
