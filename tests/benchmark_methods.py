"""How good are the methods' maps? python tests/benchmark_methods.py confirming --decoder build/qwen2.5-0.5b

Two tables of what a user can choose with --method: over the beds in which the settings were chosen ("choosing"), and
over beds that had no part in the choice ("confirming"); see beds.py. Every word of every bed is explained from one
clean copy at four layers of the middle half. Measured on image tokens, as in benchmark_choices.py: pointing, energy,
Obj-IoU; for some words insertion minus deletion at the middle layer, beside that of the object's own mask. Intervals
hold 95 % of 1000 resamples of the pictures.

Behind the tables:

    evidence   p and the share kept without the photo, of words that use their object, of function words, and of an
               object that is not there: how well p, kept and both part maps that point from maps that cannot
    layers     rank correlation of each layer's Grad-CAM map with the middle layer's, where it points and where it does
               not
    twins      what is left of a mention's probability without its own object, and without the other one

What each bed gave is kept in --work: beds that are there already, with the same methods, are not measured again.
"""

import argparse
import platform
import time
from dataclasses import replace
from pathlib import Path

import beds
import numpy as np
import torch
import transformers
from benchmark_choices import measure, merit
from benchmark_localization import resampled
from tqdm import tqdm

import smooth_gradcam as core
from common.evidence import ALIKE, DOUBTED, PHOTOLESS, image_hiding, spearman, weighed
from studies.faithfulness import auc, insertion_deletion
from studies.word_choice import FUNCTION_WORDS, split_words

OTHERS = ("paper", "parent", "attention", "rollout", "chefer")  # of passes of their own
DRAWN = ("needed", "gradcam", "product", "hirescam", *OTHERS)
CLEAN = core.Settings(use_smooth=False)
KINDS = ("used", "unused", "other", "function", "absent")  # words for an object that is used, for one that is not,
# for something else (a place, a colour), for nothing, and for an object that is not there
PICTURES = {"scenes": 30, "flat": 16, "crowded": 6, "small": 16, "large": 12, "photos": 16, "doubted": 30}
PICTURES |= dict.fromkeys(("eyes", "words", "blurred", "sinks", "eyes-photos", "eyes-small", "eyes-large", "twins"), 8)
PICTURES |= dict.fromkeys(("coder", "coder-photos", "coder-small", "coder-large"), 6)
FAITHFUL, STEPS = {"demo": 4, "eyes": 2, "coder": 0}, 8  # words of a bed with insertion and deletion, and their steps


def middle_layers(total: int) -> list[int]:
    """Four layers of the middle half."""
    return [total * share // 100 for share in (27, 42, 57, 72)]


def maps_of(reading: core.Reading, spans: list, layers: list[int]) -> tuple[dict, list[core.TokenMaps]]:
    """({method: a TokenMaps of the layers for each span}, Grad-CAM of all layers)."""
    kept = {}

    def collecting(*args, **options):
        for part, pairs in core.noisy_passes(*args, **options):
            for layer in layers:
                for name in ("product", "hirescam"):
                    kept[name, part, layer] = core.token_map(layer, *pairs[layer], reading, name).reshape(reading.grid)
            yield part, pairs

    whole = core.explain(reading, spans, range(len(core.get_model_layers(reading.model)[0])), CLEAN, passes=collecting)
    gradcam = [replace(maps, maps={layer: maps.maps[layer] for layer in layers}) for maps in whole]
    found = {name: core.explain(reading, spans, layers, replace(CLEAN, method=name)) for name in OTHERS}
    found["gradcam"] = gradcam
    for name in ("product", "hirescam"):
        own = [{layer: kept[name, part, layer] for layer in layers} for part in range(len(spans))]
        found[name] = [replace(maps, maps=cams) for maps, cams in zip(gradcam, own, strict=True)]
    with image_hiding(reading) as hide:
        named = [replace(m, maps=dict(m.maps), settings=replace(m.settings, method="needed")) for m in found["gradcam"]]
        found["needed"] = weighed(reading, named, hide)
    return found, whole


def evidence_rows(picture: beds.Picture, names: list[str]) -> list[tuple[int, float, float]]:
    """(kind, p, p without the photo) of each word of the answer; `names` are those of the picture's objects."""
    reading, used = picture.reading, [word.span for word in picture.words]
    rows, nothing = [], np.zeros(len(reading.positions), bool)
    with image_hiding(reading) as hide:
        seen = hide(np.stack([nothing, ~nothing]))  # (2, A)
    for span in split_words(reading.answer, reading.spans):
        word = reading.answer[slice(*span)].lower()
        kind = "unused" if word in names else "function" if word in FUNCTION_WORDS.split() else "other"
        rows.append((KINDS.index("used" if span in used else kind), *seen[:, reading.tokens_of(span)].mean(1)))
    return rows


def absent_row(bed: beds.Bed, reading: core.Reading, names: list[str], number: int) -> tuple[int, float, float]:
    """The same of an object that is not there, in an answer that names it."""
    things = beds.THINGS if bed.draw is beds.draw_words else beds.scenes.KINDS
    absent = [name for name in things if name not in names]
    answer = f"There is a {absent[number % len(absent)]}."
    other = core.answered(
        bed.model, bed.processor, reading.photos, reading.chat, reading.inputs, "image", answer, max_new_tokens=1
    )
    nothing = np.zeros(len(other.positions), bool)
    with image_hiding(other) as hide:
        seen = hide(np.stack([nothing, ~nothing]))
    return KINDS.index("absent"), *seen[:, other.tokens_of((11, len(answer) - 1))].mean(1)


def faithfulness(bed: beds.Bed, reading, word: beds.Word, maps: dict[str, core.TokenMaps], layer: int) -> list[float]:
    """Insertion minus deletion of each method's map at a layer, then of the object's own mask."""
    cams = {name: maps[name].maps[layer] for name in DRAWN} | {"own mask": word.covered(reading.grid)}
    drawn = replace(maps["gradcam"], maps=cams, no_gradient=frozenset(), evidence=None)
    found = insertion_deletion(reading, drawn, steps=STEPS, baseline=bed.baseline, random_orders=0)
    area = {key: auc(found.insertion[key] - found.deletion[key], found.shares) for key in found.insertion}
    return [area.get(key, 0.0) for key in cams]


def run_bed(bed: beds.Bed, count: int, quiet: bool) -> dict[str, np.ndarray]:
    """What is measured in a bed: see the keys below."""
    layers, middle = (
        middle_layers(total := core.get_model_layers(bed.model)[1]),
        core.get_model_layers(bed.model)[1] // 2,
    )
    found, group, evidence, likeness, hits, faithful, twins, tried = [], [], [], [], [], [], [], 0
    for number in tqdm(range(count), bed.name, disable=quiet):
        drawn = bed.draw(number)
        picture = beds.read(bed.model, bed.processor, drawn, bed.doubted)
        reading, words, names = picture.reading, picture.words, [name.split(" (")[0] for name in drawn.masks]
        tried += picture.tried
        evidence += evidence_rows(picture, names)
        evidence.append(absent_row(bed, reading, names, number))
        if not words:
            continue
        maps, whole = maps_of(reading, [word.span for word in words], layers)
        for i, word in enumerate(words):
            heat = np.stack([[maps[name][i].maps[k].ravel() for k in layers] for name in DRAWN]).astype(np.float64)
            flat = np.zeros(heat.shape[-1])
            measured = measure(heat.reshape(-1, heat.shape[-1]), word, reading.grid, flat)
            found.append(measured[:, :3].reshape(len(DRAWN), len(layers), 3))
            group.append(number)
            cams = [whole[i].maps[k].ravel() for k in range(total)]
            likeness.append([spearman(cam, cams[middle]) for cam in cams])
            hits.append([bool(word.on(reading.grid).ravel()[cam.argmax()] and cam.any()) for cam in cams])
            if len(faithful) < FAITHFUL[beds.source(bed.name)]:
                own = {name: maps[name][i] for name in DRAWN}
                faithful.append(faithfulness(bed, reading, word, own, layers[1]))
            if bed.name == "twins":
                left = {}
                for name, photo in drawn.without.items():
                    inputs = core.prepare_inputs(bed.model, bed.processor, [photo], reading.prompt)
                    left[name] = beds.probability(replace(reading, inputs=inputs), word.span)
                other = next(name for name in drawn.without if name != word.name)
                said = beds.probability(reading, word.span)
                twins.append((int(word.name[-2]), said, left[word.name], left[other]))
    return {
        "methods": np.array(DRAWN),
        "found": np.array(found, np.float32),  # (words, methods, layers, 3)
        "picture": np.array(group),
        "tried": np.array(tried),
        "evidence": np.array(evidence),  # (words of answers, 3): see `evidence_rows`
        "likeness": np.array(likeness),  # (words, K)
        "hits": np.array(hits),  # (words, K) bool
        "faithful": np.array(faithful),  # (words, methods and own mask)
        "twins": np.array(twins),  # (words, 4): mention, p, without its own object, without the other
    }


# tables


def area_under_roc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The probability that a positive value is above a negative one; equal ones count half."""
    difference = positive[:, None] - negative[None]
    return float(((difference > 0) + (difference == 0) / 2).mean())


def print_methods(found: dict[str, dict]) -> None:
    """Pointing, energy, Obj-IoU of each method in each bed, and its worst bed."""
    means = {name: data["found"].mean(2) for name, data in found.items()}  # (words, methods, 3)
    print("\npointing energy Obj-IoU, mean over four layers of the middle half")
    print(f"| method | {' | '.join(found)} | merit in the worst bed |")
    print("|---" * (len(found) + 2) + "|")
    for i, method in enumerate(DRAWN):
        cells = [" ".join(f"{value:.2f}" for value in means[name][:, i].mean(0)) for name in found]
        values = {name: merit(means[name][:, i]) for name in found}
        worst = min(values, key=lambda name: values[name].mean())
        low, high = np.quantile(resampled(values[worst], found[worst]["picture"], 0), (0.025, 0.975))
        print(f"| {method} | {' | '.join(cells)} | {values[worst].mean():.2f} ({low:.2f}-{high:.2f}), {worst} |")
    print("\n95 % intervals of pointing, energy, Obj-IoU")
    for i, method in enumerate(DRAWN):
        for name, data in found.items():
            low, high = np.quantile(resampled(means[name][:, i], data["picture"], 0), (0.025, 0.975), 0)
            spans = " ".join(f"{a:.2f}-{b:.2f}" for a, b in zip(low, high, strict=True))
            print(f"{method:9} {name:13} {spans}")
    print("\ninsertion - deletion at a middle layer, mean over words")
    print(f"| method | {' | '.join(found)} |")
    for i, method in enumerate((*DRAWN, "the object's own mask")):
        areas = [f"{data['faithful'][:, i].mean():.2f}" if len(data["faithful"]) else "-" for data in found.values()]
        print(f"| {method} | {' | '.join(areas)} |")


def print_evidence(found: dict[str, dict]) -> None:
    """How well p and the share kept part words that use their object from those that cannot point."""
    print(f"\nevidence: words in doubt, p < {DOUBTED} or more than {100 * PHOTOLESS:.0f} % kept, of each kind; area "
          "under the ROC curve, used against function and absent, by p, by 1 - kept, by p (1 - kept)")  # fmt: skip
    said = [data["evidence"] for name, data in found.items() if name != "doubted"]
    everything = found | ({"all but doubted": {"evidence": np.concatenate(said)}} if said else {})
    for name, data in everything.items():
        kind, p, without = data["evidence"].T
        kept = np.minimum(1, without / np.maximum(p, 1e-30))
        doubt = (p < DOUBTED) | (kept > PHOTOLESS)
        shares = [f"{KINDS[k]} {doubt[kind == k].sum()} of {(kind == k).sum()}" for k in range(len(KINDS))]
        used, none = kind == KINDS.index("used"), kind >= KINDS.index("function")
        areas = [area_under_roc(score[used], score[none]) for score in (p, 1 - kept, p * (1 - kept)) if used.any()]
        print(f"{name:15} {', '.join(shares)}; {' '.join(f'{area:.3f}' for area in areas)}")
    kind, p, without = list(everything.values())[-1]["evidence"].T
    kept = np.minimum(1, without / np.maximum(p, 1e-30))
    print("thresholds, all of these: share in doubt of used, of function, of absent")
    for low in (0.01, 0.05, 0.1, 0.2):
        for high in (0.6, 0.7, 0.8, 0.9, 0.95):
            doubt = (p < low) | (kept > high)
            print(f"p < {low:4} or kept > {high:4}: " + " ".join(f"{doubt[kind == k].mean():.3f}" for k in (0, 3, 4)))


def print_layers(found: dict[str, dict]) -> None:
    """Rank correlation with the middle layer, of maps that point and of maps that do not."""
    print("\nlayers: at thresholds of the correlation, share below of maps that point, and of those that do not")
    for name, data in {**found, "all": None}.items():
        chosen = list(found.values()) if data is None else [data]
        hits = np.concatenate([one["hits"].ravel().astype(bool) for one in chosen])
        likeness = np.concatenate([one["likeness"].ravel() for one in chosen])
        shares = [
            f"{t}: {(likeness[hits] < t).mean():.3f} {(likeness[~hits] < t).mean() if (~hits).any() else np.nan:.3f}"
            for t in (0.2, 0.3, 0.4, 0.5, 0.6)
        ]
        print(f"{name:13} {hits.sum()} point, {(~hits).sum()} do not; {'; '.join(shares)}")
    print("pointing and mean correlation by layer, and layers most of whose maps are below the threshold in use")
    for name, data in found.items():
        pairs = zip(data["hits"].mean(0), data["likeness"].mean(0), strict=True)
        apart = np.flatnonzero((data["likeness"] < ALIKE).mean(0) > 0.5).tolist()
        print(f"{name:13} {' '.join(f'{hit:.2f}/{like:.2f}' for hit, like in pairs)}; {apart}")


def parse(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("table", choices=("choosing", "confirming"))
    parser.add_argument("--decoder", help="folder that graft.py wrote, of Qwen2.5-0.5B-Instruct")
    parser.add_argument("--coder", help="folder that graft.py wrote, of Qwen2.5-Coder-1.5B-Instruct")
    parser.add_argument("--beds", nargs="*", help="only these of the table")
    parser.add_argument("--pictures", type=int, help="at most so many of a bed; in a folder of their own")
    parser.add_argument("--quick", action="store_true", help="a look: a tenth of the pictures")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--work", type=Path, default=beds.ROOT / "build" / "benchmark_methods")
    return parser.parse_args(arguments)


def main(arguments=None) -> None:
    options, start = parse(arguments), time.monotonic()
    names = beds.CONFIRMING if options.table == "confirming" else (*beds.DEMO, *beds.PUBLISHED)
    names = [name for name in names if options.beds is None or name in options.beds]
    given = {"demo": True, "eyes": options.decoder, "coder": options.coder}
    names = [name for name in names if given[beds.source(name)]]
    work = options.work / "quick" if options.quick else options.work
    work = work / f"{options.pictures} pictures" if options.pictures else work
    work.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in names:
        path = work / f"{name}.npz"
        if not (path.exists() and tuple(np.load(path).get("methods", ())) == DRAWN):
            count = max(2, PICTURES[name] // 10) if options.quick else PICTURES[name]
            count = min(count, options.pictures or count)
            np.savez_compressed(path, **run_bed(beds.load(name, options.decoder, options.coder), count, options.quiet))
        data = dict(np.load(path))
        if len(data["found"]):
            found[name] = data
        print(f"{name}: {len(data['found'])} of {data['tried']} words count", flush=True)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}")
    print_methods(found)
    print_evidence(found)
    print_layers(found)
    if "twins" in found:
        print("\ntwins: p of each mention; without its own object; without the other one")
        for mention in (1, 2):
            rows = found["twins"]["twins"]
            print(f"mention {mention}: " + " ".join(f"{v:.2f}" for v in rows[rows[:, 0] == mention, 1:].mean(0)))
    print(f"{(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
