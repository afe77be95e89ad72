"""Do the maps point at the object that a word names, beside what others draw? python tests/benchmark_localization.py

On scenes the demo model has never seen, every object word of its own answers is explained at every decoder layer, from
one clean copy of the picture, by this project's methods and by others; the objects' pixels are known. Printed, and
written to --output_dir as localization.csv, faithfulness.csv and localization.png:

    localization  pointing, near, energy, Obj-IoU of each method over the layers (see `studies.faithfulness`),
                  and how often the maximum lies at the border instead
    faithfulness  area under insertion, under deletion, and their difference, for the first --words_faithful words

Intervals hold 95 % of 1000 bootstrap resamples of the scenes: the words of a scene are not independent.

What others draw is written from their papers' descriptions, no code of theirs has been run; see `tam` for what of TAM
could not be reproduced. One pass serves all methods: they are functions of the same captured tensors.

Shapes: N image tokens = H * W   C channels   T tokens of a word   L tokens in all   V vocabulary   S scenes
"""

import argparse
import csv
import multiprocessing
import operator
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (its usual name)
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo_model")]
import scenes  # noqa: E402
from evaluate import UNSEEN  # noqa: E402

import smooth_gradcam as core  # noqa: E402
from common.checkpoint import count_layers, load_model, load_processor  # noqa: E402
from common.encoding import DPI  # noqa: E402
from common.page import BAND, GAP, MARGIN, TITLE, WIDTHS, Page, small_print  # noqa: E402
from smooth_gradcam import paper  # noqa: E402
from studies.faithfulness import auc, insertion_deletion  # noqa: E402
from studies.faithfulness_figures import CURVE_PLOT, STYLES  # noqa: E402
from studies.localization import at_border, centre_map, localization  # noqa: E402

MEASURES = ("pointing", "near", "energy", "obj_iou", "border")  # as `localization` has them, and `at_border`
RESAMPLES = 1000


# what is drawn: from features and gradients (N, C) at the image tokens to a map (N,)


def positive_pooled(features: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM with the gradients ReLU'd before they are pooled."""
    return paper(features, gradients.relu())


def positive_pooled_halved(features: Tensor, gradients: Tensor) -> Tensor:
    """The same, and zero below half the map's maximum: what the code of "From Redundancy to Relevance" draws."""
    heat = positive_pooled(features, gradients)
    return heat * (heat >= heat.max() / 2)


def gradcam_plus_plus(features: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM++ (Chattopadhay et al., WACV 2018), eq. 19 with the exponential of the score, as their code has it.

    a_ik = g_ik^2 / (2 g_ik^2 + g_ik^3 sum_j A_jk), w_k = sum_i a_ik ReLU(g_ik), M = ReLU(sum_k w_k A_k). It is meant
    for features that are not negative; a decoder's have both signs, and the denominator can then be negative too.
    """
    divisor = 2 * gradients**2 + gradients**3 * features.sum(0)
    share = gradients**2 / torch.where(divisor == 0, 1, divisor)
    return (features @ (share * gradients.relu()).sum(0)).relu()


def layercam(features: Tensor, gradients: Tensor) -> Tensor:
    """LayerCAM (Jiang et al., TIP 2021): M_i = ReLU(sum_k ReLU(g_ik) A_ik)."""
    return (features * gradients.relu()).sum(-1).relu()


def layercam_by_channel(features: Tensor, gradients: Tensor) -> Tensor:
    """LayerCAM with the ReLU inside the sum, M_i = sum_k ReLU(ReLU(g_ik) A_ik).

    The two are the same for features that are not negative, which LayerCAM is meant for; a decoder's are both.
    """
    return (features * gradients.relu()).relu().sum(-1)


def input_x_gradient(features: Tensor, gradients: Tensor) -> Tensor:
    """Input x gradient (Shrikumar et al., 2016): |sum_k A_ik g_ik|; the signed sum above zero is HiResCAM."""
    return (features * gradients).sum(-1).abs()


def attention(weights: Tensor, gradients: Tensor) -> Tensor:
    """Attention weights (heads, T, N) from the positions that predict the word to the image tokens, their mean."""
    return weights.mean((0, 1))


def attention_x_gradient(weights: Tensor, gradients: Tensor) -> Tensor:
    """Mean over the heads of ReLU(A * g): one layer's product in Chefer et al., "Generic Attention", ICCV 2021."""
    return (weights * gradients).relu().mean((0, 1))


class Row(NamedTuple):
    """What is drawn from one layer, where it is read, and how gradients pass the norms on their way there."""

    rules: str
    place: str  # "input" or "output" of the layer, a module of it, or its "attention" weights
    method: Callable


OURS = ("gradcam", "hirescam", "product")
ROWS = {
    **{name: Row("attnlrp", "input", core.METHODS[name].formula) for name in OURS},
    **{f"{name}, plain gradients": Row("plain", "input", core.METHODS[name].formula) for name in OURS},
    "Grad-CAM of the output": Row("plain", "output", paper),
    "ReLU'd gradients, halved": Row("plain", "post_attention_layernorm", positive_pooled_halved),
    "Grad-CAM++": Row("plain", "input", gradcam_plus_plus),
    "LayerCAM": Row("plain", "input", layercam),
    "LayerCAM, AttnLRP": Row("attnlrp", "input", layercam),
    "LayerCAM by channel": Row("plain", "input", layercam_by_channel),
    "LayerCAM by channel, AttnLRP": Row("attnlrp", "input", layercam_by_channel),
    "input x gradient": Row("plain", "input", input_x_gradient),
    "attention": Row("plain", "attention", attention),
    "attention x gradient": Row("plain", "attention", attention_x_gradient),
}
USED = tuple(dict.fromkeys(row.rules for row in ROWS.values()))
LAYERLESS = ("logit lens", "TAM")
BOUNDS = ("random map", "centre", "object (oracle)")


# what is drawn without a layer: from the logits (L, V), the final hidden states read by the head, to a map (N,)


def remove_interference(own: Tensor, others: Tensor, scores: Tensor) -> Tensor:
    """TAM's estimated causal inference: own map (N,), those of M earlier tokens (N, M) and their scores (M,) -> (N,).

    The interference I is the mean of the others, weighted by the scores; s I is taken away, s least squares.
    """
    interference = others @ scores / scores.sum().clamp_min(1e-12)
    scale = own @ interference / (interference @ interference).clamp_min(1e-12)
    return (own - scale * interference).relu()


def rank_gaussian(heat: np.ndarray) -> np.ndarray:
    """TAM's rank-Gaussian filter, (H, W) -> (H, W): of 3 x 3 values the mean, weighted by their distance in rank.

    The weight is a Gaussian around the median's rank; its sigma is the nine values' coefficient of variation.
    """
    patches = np.lib.stride_tricks.sliding_window_view(np.pad(heat, 1, mode="reflect"), (3, 3))
    values = np.sort(patches.reshape(*heat.shape, 9).astype(np.float64), axis=-1)
    sigma = values.std(-1, keepdims=True) / np.maximum(values.mean(-1, keepdims=True), 1e-12)
    weights = np.exp(-0.5 * ((np.arange(9) - 4) / np.maximum(sigma, 1e-6)) ** 2)
    return (values * weights).sum(-1) / weights.sum(-1)


def logit_lens(logits: Tensor, positions: Tensor, token: int) -> Tensor:
    """The logit lens at the image tokens: ReLU of the token's logit at each of them, (N,)."""
    return logits[positions, token].relu()


def tam(logits: Tensor, ids: Tensor, positions: Tensor, grid, token: int, predicting: int) -> np.ndarray:
    """Token Activation Map (Li et al., ICCV 2025) of one answer token, (H, W).

    Raw maps are logit lenses; a text token of prompt or answer up to `predicting`, other than the token itself, weighs
    ReLU(logit of the token at its place). Written from the paper's description: which special tokens of the prompt
    count there is not told (here all do), nor how the filter treats borders (here they reflect). Their score takes the
    best token of a word; here the maps of a word's tokens are averaged, which for most words is the same.
    """
    context = torch.arange(predicting + 1)
    context = context[~torch.isin(context, positions) & (ids[: predicting + 1] != token)]
    others = logits[positions][:, ids[context]].relu()  # (N, M)
    heat = remove_interference(logit_lens(logits, positions, token), others, logits[context, token].relu())
    return rank_gaussian(heat.reshape(grid).numpy())


def bounds(mask: np.ndarray, grid: tuple[int, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Floors that know nothing of the picture, and the share of the object's mask in each image token."""
    share = F.adaptive_avg_pool2d(torch.as_tensor(mask, dtype=torch.float32)[None], grid)[0].numpy()
    maps = rng.random(grid), centre_map(grid), share
    return dict(zip(BOUNDS, maps, strict=True))


# one scene: a forward pass per kind of norms, a backward pass per word and score


class Word(NamedTuple):
    """A word of the answer that names an object of the scene, which is named once."""

    kind: str
    mask: np.ndarray
    scored: core.Scored


def read_scene(model, processor, number: int, answer: str | None = None) -> core.Reading:
    """An unseen scene, with the answer or the model's own description."""
    image = Image.fromarray(scenes.make_scene(UNSEEN + number).image)
    return core.read(model, processor, image, scenes.DESCRIBE[0], answer, max_new_tokens=64)


def find_words(reading: core.Reading, number: int) -> tuple[dict[str, Tensor], list[Word]]:
    """The inputs with the answer behind them as far as its words need it, and the words."""
    things = scenes.make_scene(UNSEEN + number).objects
    things = [thing for thing in things if len(re.findall(rf"\b{thing.kind}\b", reading.answer)) == 1]
    parts = [reading.tokens_of(core.find_target(reading.answer, thing.kind)) for thing in things]
    forced, scored = core.score_parts(reading.inputs, reading.tokens, parts) if parts else (reading.inputs, [])
    return forced, [Word(thing.kind, thing.mask, part) for thing, part in zip(things, scored, strict=True)]


def make_taps(model, layers) -> list[core.Tap]:
    """All places that are read, keyed (place, layer)."""
    decoder, _ = core.get_model_layers(model)
    wanted = {(row.place, i) for row in ROWS.values() for i in layers if row.place != "attention"}
    taps = []
    for place, i in sorted(wanted, key=operator.itemgetter(1, 0)):
        module, tap = (decoder[i], place) if place in core.TAPS else (operator.attrgetter(place)(decoder[i]), "output")
        taps.append(core.find_taps(model, [module], tap)[0]._replace(key=(place, i)))
    return taps


@contextmanager
def attention_weights(model, layers):
    """Inside, a forward pass leaves the attention weights (1, heads, L, L), keyed ("attention", layer), in a dict."""
    decoder, _ = core.get_model_layers(model)
    kept = {}

    def keep(key):
        def hook(module, args, output):
            kept[key] = output[1]

        return hook

    handles = [decoder[i].self_attn.register_forward_hook(keep(("attention", i))) for i in layers]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def forward(model, forced, taps, layers, rules: str) -> tuple[dict, Tensor]:
    """{(place, layer): tensor} of one pass, its graph kept, and the logits (L, V)."""
    with core.RULES[rules](model), core.captured(taps) as features, attention_weights(model, layers) as weights:
        logits = model(**forced, use_cache=False).logits[0]
    return features | weights, logits


def backward(tensors: dict, logits: Tensor, word: Word, positions: Tensor) -> dict:
    """{(place, layer): (features, gradients)} at the image tokens, (N, C); of attention weights (heads, T, N)."""
    value = core.logit_score(logits[word.scored.predicting].float(), torch.tensor(word.scored.expected))
    gradients = torch.autograd.grad(value, list(tensors.values()), allow_unused=True, retain_graph=True)

    def at_image(key, tensor):
        if key[0] == "attention":
            return tensor[0][:, word.scored.predicting][:, :, positions]
        return core.image_rows(key, tensor, positions, torch.ones(len(positions), dtype=torch.bool))

    return {
        key: (at_image(key, tensor.detach()), at_image(key, torch.zeros_like(tensor) if g is None else g))
        for (key, tensor), g in zip(tensors.items(), gradients, strict=True)
    }


def row_maps(pairs: dict, logits: Tensor, ids: Tensor, reading, word: Word, layers, rng) -> dict[str, list[np.ndarray]]:
    """{row: one map (H, W) per layer, or a single one}; `pairs`: rules -> what `backward` gives for the logit.

    `logits` and the token `ids` are those of the whole sequence, (L, V) and (L,).
    """
    drawn = {
        name: [row.method(*pairs[row.rules][row.place, i]).reshape(reading.grid).numpy() for i in layers]
        for name, row in ROWS.items()
    }
    place, logits = (reading.positions, reading.grid), logits.detach().float()
    chosen = list(zip(word.scored.expected, word.scored.predicting, strict=True))
    lenses = [logit_lens(logits, place[0], token).reshape(reading.grid).numpy() for token, _ in chosen]
    activations = [tam(logits, ids, *place, token, predicting) for token, predicting in chosen]
    drawn |= {"logit lens": [np.mean(lenses, 0)], "TAM": [np.mean(activations, 0)]}
    return drawn | {name: [heat] for name, heat in bounds(word.mask, reading.grid, rng).items()}


def measure(maps: list[np.ndarray], mask: np.ndarray) -> np.ndarray:
    """(maps, measures); a map of the mask's own size is not upsampled any more."""
    fits = [localization(heat, mask) for heat in maps]
    return np.array([[*fit.values(), at_border(heat, fit)] for heat, fit in zip(maps, fits, strict=True)])


class Setup(NamedTuple):
    """What every worker needs to know."""

    path: str
    layers: list[int]  # of the rows
    spread: list[int]  # of insertion and deletion
    words_faithful: int
    steps: int
    seed: int


WORKER = {}  # of this process: setup, model, processor, taps


def start_worker(setup: Setup):
    torch.set_num_threads(1)
    model = load_model(setup.path, "cpu", "auto")
    processor, taps = load_processor(setup.path, 10**9), make_taps(model, setup.layers)
    WORKER.update(setup=setup, model=model, processor=processor, taps=taps)


def measure_scene(number: int) -> list[dict]:
    """One record per named object; those of the first scenes keep the maps that insertion and deletion may need."""
    setup, model, records = WORKER["setup"], WORKER["model"], []
    model.set_attn_implementation("eager")  # the others do not tell their weights
    reading = read_scene(model, WORKER["processor"], number)
    forced, words = find_words(reading, number)
    if not words:
        return records
    with core.borrowed(model):
        passes = {rules: forward(model, forced, WORKER["taps"], setup.layers, rules) for rules in USED}
        for place, word in enumerate(words):
            pairs = {rules: backward(*run, word, reading.positions) for rules, run in passes.items()}
            rng = np.random.default_rng((setup.seed, number, place))
            rows = row_maps(pairs, passes["plain"][1], forced["input_ids"][0], reading, word, setup.layers, rng)
            kept = {(row, i): m for row, maps in rows.items() for i, m in zip(setup.layers, maps, strict=False)}
            records.append(
                {"scene": number, "kind": word.kind, "answer": reading.answer, "tokens": len(word.scored.expected)}
                | {"rows": {name: measure(maps, word.mask) for name, maps in rows.items()}}
                | {"maps": kept if number < setup.words_faithful else None}
            )
    return records


def measure_faithfulness(job: tuple[int, str, str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """{label: (3,) areas under insertion and deletion and their difference} of a word's labelled maps."""
    number, kind, answer, maps = job
    model, processor, setup = WORKER["model"], WORKER["processor"], WORKER["setup"]
    model.set_attn_implementation("sdpa")  # faster
    reading = read_scene(model, processor, number, answer)
    (word,) = core.explain(reading, [core.find_target(answer, kind)], [-1], core.Settings(use_smooth=False))
    word = replace(word, maps=maps, no_gradient=frozenset())
    curves = insertion_deletion(reading, word, steps=setup.steps, seed=setup.seed)
    random = curves.random_insertion.mean(0), curves.random_deletion.mean(0)
    areas = {  # a map of zeros ranks at random
        name: (curves.insertion.get(name, random[0]), curves.deletion.get(name, random[1])) for name in maps
    }
    areas["random order"] = random
    areas = {name: [auc(curve, curves.shares) for curve in pair] for name, pair in areas.items()}
    return {name: np.array([*pair, pair[0] - pair[1]]) for name, pair in areas.items()}


# all scenes


@contextmanager
def workers(setup: Setup, processes: int):
    """A lazy map over jobs, on this many cores, each with its own model."""
    if processes == 1:
        start_worker(setup)
        yield map
        return
    with multiprocessing.get_context("spawn").Pool(processes, start_worker, (setup,)) as pool:
        yield pool.imap
        pool.close()  # and not terminate, which would leave locks behind
        pool.join()


def best_layer(means: np.ndarray) -> int:
    """Index of the layer (layers, measures) where the sum of pointing, energy and Obj-IoU is highest."""
    return int(means[:, [0, 2, 3]].sum(1).argmax())


def points_best(means: np.ndarray, setup: Setup) -> int:
    """The layer of the spread whose means (layers, measures) point best, if in doubt that with the most energy."""
    return max(setup.spread, key=lambda i: tuple(means[setup.layers.index(i), [0, 2]]))


def chosen_maps(records: list[dict], setup: Setup) -> dict[str, tuple[str, int | None]]:
    """What insertion and deletion are tried with: {label: (row, layer)}.

    Ours at every layer of the spread; each other row at the one of them where it points best over all words, which
    favours it; rows without a layer once.
    """
    labels = {}
    for name in ROWS:
        means = np.mean([record["rows"][name] for record in records], 0)
        labels |= {f"{name} @ {i}": (name, i) for i in (setup.spread if name in OURS else [points_best(means, setup)])}
    return labels | {name: (name, None) for name in (*LAYERLESS, *BOUNDS[1:])}


def run(setup: Setup, count: int, processes: int) -> dict:
    """Everything that is measured of one checkpoint."""
    start = time.perf_counter()
    with workers(setup, processes) as each:
        found = list(tqdm(each(measure_scene, range(count)), "scenes", count))
        records = [record for records in found for record in records]
        middle = time.perf_counter()
        if not records:
            sys.exit(f"{setup.path} names no object of these scenes")
        labels = chosen_maps(records, setup)
        first = setup.layers[0]  # where rows without a layer are kept
        jobs = [
            [word[key] for key in ("scene", "kind", "answer")]
            + [{label: word["maps"][row, first if i is None else i] for label, (row, i) in labels.items()}]
            for word in records[: setup.words_faithful]
        ]
        areas = list(tqdm(each(measure_faithfulness, jobs), "insertion, deletion", len(jobs)))
    seconds = {"localization": middle - start, "insertion and deletion": time.perf_counter() - middle}
    objects = sum(len(scenes.make_scene(UNSEEN + number).objects) for number in range(count))
    return {"setup": setup, "records": records, "objects": objects, "areas": areas, "labels": labels, "time": seconds}


# tables


def resampled(values: np.ndarray, groups, seed: int) -> np.ndarray:
    """Means (RESAMPLES, ...) over words (words, ...), resampling the groups (words,) that they belong to."""
    names, index = np.unique(groups, return_inverse=True)
    totals = np.zeros((len(names), *values.shape[1:]))
    np.add.at(totals, index, values)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)
    counts = (drawn @ np.bincount(index)).reshape(-1, *[1] * (values.ndim - 1))
    return np.tensordot(drawn, totals, 1) / counts


def bootstrap(values: np.ndarray, groups, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval (low, high) of the mean over words (words, ...), resampling the groups (words,) they belong to."""
    return tuple(np.percentile(resampled(values, groups, seed), [2.5, 97.5], axis=0))


def summarise(values: list[np.ndarray], groups, seed: int) -> np.ndarray:
    """(..., 3): mean over the words, and its interval."""
    values = np.array(values)
    return np.stack([values.mean(0), *bootstrap(values, groups, seed)], axis=-1)


def tables(result: dict) -> dict[str, dict]:
    """ "rows": {name: (layers or 1, measures, 3)}; "faithfulness": {label: (3, 3)}."""
    records, areas, seed = result["records"], result["areas"], result["setup"].seed
    groups = [record["scene"] for record in records]
    rows = {name: summarise([record["rows"][name] for record in records], groups, seed) for name in records[0]["rows"]}
    groups = groups[: len(areas)]
    areas = {name: summarise([area[name] for area in areas], groups, seed) for name in areas[0]}
    return {"rows": rows, "faithfulness": areas}


def span(values) -> str:
    return "{:.2f} ({:.2f}-{:.2f})".format(*values)


def print_head(result: dict, count: int, processes: int):
    setup, records = result["setup"], result["records"]
    several = sum(record["tokens"] > 1 for record in records)
    print(
        f"\n{Path(setup.path).name}: {len(records)} words in {count} unseen scenes, {several} of more than one token;"
    )
    print(f"{result['objects'] - len(records)} objects not named exactly once; layers {setup.layers}")
    print(f"{platform.machine()}, {processes} processes, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}; no noise; seed {setup.seed}")
    print("; ".join(f"{part}: {seconds:.0f} s" for part, seconds in result["time"].items()))


def print_tables(result: dict, found: dict):
    setup = result["setup"]
    print("\nlocalization at the best layer, that of the highest sum of pointing, energy and Obj-IoU (95 % interval)")
    print(f"{'what is drawn':28s} layer  " + "  ".join(f"{name:16s}" for name in MEASURES))
    for name, values in found["rows"].items():
        i = best_layer(values[..., 0])
        layer = str(setup.layers[i]) if name in ROWS else "-"
        print(f"{name:28s} {layer:>5s}  " + "  ".join(f"{span(measure):16s}" for measure in values[i]))
    print("Of the last layer's output there is no gradient: a miss, 0 in every measure.")
    print(f"\nfaithfulness, first {len(result['areas'])} words, {setup.steps} steps, blur (95 % interval)")
    print(f"{'what is drawn @ layer':34s} insertion         deletion          difference")
    for name, values in found["faithfulness"].items():
        print(f"{name:34s} " + "  ".join(f"{span(value):16s}" for value in values))


def write_csv(path: Path, keys, measures, rows):
    """`rows`: (key, ..., (measures, 3)); each measure gets a column for its mean and for the ends of its interval."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*keys, *(f"{name}{end}" for name in measures for end in ("", "_low", "_high"))])
        writer.writerows([*row[:-1], *np.round(row[-1], 5).ravel().tolist()] for row in rows)


def write_tables(folder: Path, everything: list[tuple[dict, dict]]):
    rows, faithful = [], []
    for result, found in everything:
        setup, labels = result["setup"], result["labels"]
        for name, values in found["rows"].items():
            layers = setup.layers if name in ROWS else [""]
            rows += [(Path(setup.path).name, name, layer, value) for layer, value in zip(layers, values, strict=True)]
        for label, value in found["faithfulness"].items():
            name, layer = labels.get(label, (label, None))
            faithful.append((Path(setup.path).name, name, "" if layer is None else layer, value))
    write_csv(folder / "localization.csv", ("model", "row", "layer"), MEASURES, rows)
    areas = ("insertion", "deletion", "difference")
    write_csv(folder / "faithfulness.csv", ("model", "row", "layer"), areas, faithful)


# figure

OTHERS = {"attention": "#e69f00", "LayerCAM": "#cc79a7", "Grad-CAM of the output": "#56b4e9", "TAM": "#7f5a2a"}
BOUNDARIES = {"object (oracle)": "black", "random map": "0.4", "random order": "0.4"}
COLOURS = {name: STYLES[name][0] for name in OURS} | OTHERS | BOUNDARIES  # the rest is grey


def draw_curves(axes, layers: list[int], values: dict[str, np.ndarray]) -> None:
    """A measure of each row by layer: ours in front, the rest in grey behind the others."""
    for name, heights in values.items():
        level = name not in ROWS
        style = {"color": COLOURS.get(name, "0.78"), "linewidth": 0.7, "zorder": 1}
        style |= {"linewidth": 1, "zorder": 2} if name in COLOURS else {}
        style |= {"linewidth": 1.8, "zorder": 3} if name in OURS else {}
        style |= {"linestyle": "--"} if name in BOUNDARIES else {}
        axes.plot(layers, np.repeat(heights, len(layers)) if level else heights, label=name, **style)


def best_rows(result: dict, found: dict) -> list[tuple]:
    """(mean, low, high, label, colour) of insertion minus deletion of each row, at the layer where it points best."""
    bars = []
    for label, values in found["faithfulness"].items():
        name, layer = result["labels"].get(label, (label, None))
        if layer is None or layer == points_best(found["rows"][name][..., 0], result["setup"]):
            bars.append((*values[2], label, COLOURS.get(name, "0.78")))
    return sorted(bars)


def draw_bars(axes, bars: list[tuple]) -> None:
    mean, low, high, labels, colours = zip(*bars, strict=True)
    ends = np.abs(np.array([low, high]) - mean)
    axes.barh(range(len(labels)), mean, color=colours, xerr=ends, error_kw={"lw": 0.8, "ecolor": "0.2"}, height=0.7)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(-0.6, len(labels) - 0.4)


def draw(path: Path, everything: list[tuple[dict, dict]]) -> None:
    page, y, (width, height) = Page(WIDTHS["page"], ""), MARGIN, CURVE_PLOT
    for result, found in everything:
        layers, model = result["setup"].layers, Path(result["setup"].path).name
        title = f"Whose map points at the object of a word? {model}"
        y = page.lines(MARGIN, y, page.inner, title, TITLE, weight="bold") + GAP
        measures = {"pointing": 0, "near (15 pixels)": 1, "energy": 2, "Obj-IoU": 3}
        places, y = page.places(y, len(measures), width, BAND + height + 0.45)
        for (x, top, wide), (name, measure) in zip(places, measures.items(), strict=True):
            axes = page.plot(x, top, wide, height, name, xlabel="layer", ylim=(-0.02, 1.02))
            draw_curves(axes, layers, {row: values[:, measure, 0] for row, values in found["rows"].items()})
        named = {name: colour for name, colour in COLOURS.items() if name != "random order"}
        y = page.legend(y, named | {"other rows of the table": "0.78"}) + 2 * GAP
        bars = best_rows(result, found)
        long = 0.15 * len(bars)
        draw_bars(page.plot(2.2, y, page.width - 2.2 - 2 * MARGIN, long, "insertion − deletion"), bars)
        y += BAND + long + 0.45
    text = (
        "Above: means over the words of unseen scenes. Below: each row at the layer where it points best, with 95 % "
        "intervals; dashed: the object's own mask, and a random map. With AttnLRP: other methods with our gradients."
    )
    Image.fromarray(np.asarray(page.finish(small_print(page, y, text)))).save(path, dpi=(DPI, DPI), optimize=True)


# command line


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model_path", nargs="+", default=[str(ROOT / "demo_model")], help="one or more checkpoints")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--words_faithful", type=int, default=60, help="words whose insertion and deletion is measured")
    parser.add_argument("--steps", type=int, default=16, help="of insertion and deletion")
    parser.add_argument("--layers", type=int, help="how many, spread over the decoder; default: all")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0, help="of the random map and order, and of the resampling")
    parser.add_argument("--output_dir", default=str(ROOT / "build" / "benchmark"))
    parser.add_argument(
        "--quick", action="store_true", help="12 scenes, 6 words, 6 steps, 5 layers: a look at the plumbing"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.scenes, options.words_faithful, options.steps, options.layers = 12, 6, 6, 5
    for name in ("scenes", "words_faithful", "steps", "layers", "processes"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    return options


def make_setup(path: str, options) -> Setup:
    total = count_layers(path)

    def spread(layers, count):
        places = np.linspace(0, len(layers) - 1, min(count, len(layers))).round().astype(int)
        return [layers[i] for i in places]

    layers = spread(range(total), options.layers or total)
    return Setup(path, layers, spread(layers, 5), options.words_faithful, options.steps, options.seed)


def main(arguments=None):
    options = parse(arguments)
    folder, everything = Path(options.output_dir), []
    folder.mkdir(parents=True, exist_ok=True)
    for path in options.model_path:
        result = run(make_setup(path, options), options.scenes, options.processes)
        found = tables(result)
        print_head(result, options.scenes, options.processes)
        print_tables(result, found)
        everything.append((result, found))
    write_tables(folder, everything)
    draw(folder / "localization.png", everything)
    print(f"\nwritten to {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


if __name__ == "__main__":
    main()
