"""Which map holds in every bed? python tests/benchmark_choices.py --decoder build/qwen2.5-0.5b

Every word of every bed (see beds.py) is explained at every decoder layer, from one clean copy, by all combinations of

    rules     plain gradients, detached denominators of the norms, or all of AttnLRP's rules (gate and attention too)
    score     the logit, the log-probability, the logit minus the mean logit, the logit minus the runner-up's
    features  as they are; centred by their mean or median over the image tokens; normalised, each token by its root
              mean square; both; without outlier channels
    weights   gradients pooled by their mean, or weighted by |g|, |g|^2 or ReLU(g.A); each token's own; the geometric
              means of a pooled map and that, of equal parts or of three parts to one
    tap       a layer's input, its input_layernorm, its post_attention_layernorm (two of the features, some weights)

and by occlusion, which uses no gradient: each image token, and each block of 2 x 2, is hidden from question and answer
by the attention mask. Measured on image tokens: pointing (the maximum lies on the object), energy (share of the map on
it), Obj-IoU (overlap with the map above Otsu's threshold), border (the maximum lies in a border cell and off the
object), likeness (Pearson's correlation with the block occlusion map); means over the middle half of the layers. A
setting's merit in a bed is the mean of pointing, energy and Obj-IoU, and settings are ordered by their merit in the
worst bed. Intervals hold 95 % of 1000 bootstrap resamples of the pictures. For NAMED settings also insertion minus
deletion, beside that of the object's own mask, and the corners lit by whole answers on flat pictures.

Written to --output_dir: beds.csv (every setting in every bed), beds.png and README's tables as printed. What each bed
gave is kept in --work, so that `--beds eyes` measures one anew and the others are read.

Shapes: K layers   N image tokens   C channels   M maps   T tokens of a word   V vocabulary
"""

import argparse
import csv
import itertools
import platform
import time
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import beds
import numpy as np
import torch
import transformers
from benchmark_localization import resampled
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import smooth_gradcam as core
from common.encoding import DPI
from common.page import BAND, GAP, MARGIN, TITLE, WIDTHS, Page, small_print
from studies.faithfulness import auc, insertion_deletion
from studies.faithfulness_figures import STYLES

# features and gradients (K, N, C), and what of them is explained


def centred(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return x - x.mean(-2, keepdim=True), g


def normalised(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Each token divided by its root mean square, and the gradient with respect to that."""
    size = x.square().mean(-1, keepdim=True).sqrt()
    return x / size, g * size


def without_outliers(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Zero in channels whose root mean square over the image tokens is more than ten times the median channel's."""
    size = x.square().mean(-2, keepdim=True).sqrt()  # (K, 1, C)
    return x * (size <= 10 * size.median(-1, keepdim=True).values), g


FEATURES = {
    "as they are": lambda x, g: (x, g),
    "centred": centred,
    "centred by median": lambda x, g: (x - x.median(-2, keepdim=True).values, g),
    "normalised": normalised,
    "normalised and centred": lambda x, g: centred(*normalised(x, g)),
    "without outliers": without_outliers,
}


# weights: features and gradients (K, N, C) -> maps (K, N)


def per_token(x: Tensor, g: Tensor) -> Tensor:
    """Each token's own gradient: HiResCAM."""
    return (x * g).sum(-1).relu()


def pooled(x: Tensor, g: Tensor, share: Tensor) -> Tensor:
    """One weight per channel, the gradients' mean weighted by `share` (K, N): ReLU(sum_k a_k A_k)."""
    weights = torch.einsum("kn,knc->kc", share / share.sum(-1, keepdim=True).clamp_min(1e-30), g)
    return torch.einsum("knc,kc->kn", x, weights).relu()


POOLED = {
    "mean": lambda x, g: pooled(x, g, torch.ones_like(g[..., 0])),
    "|g|": lambda x, g: pooled(x, g, g.norm(dim=-1)),
    "|g|^2": lambda x, g: pooled(x, g, g.square().sum(-1)),
    "ReLU(g.A)": lambda x, g: pooled(x, g, per_token(x, g)),
}
PRODUCTS = {" x per token": 0.5, "^3 x per token": 0.75}  # exponent of the pooled map
WEIGHTS = (*POOLED, "per token", *(name + tail for tail in PRODUCTS for name in POOLED))


def weigh(x: Tensor, g: Tensor, wanted: Iterable[str]) -> dict[str, Tensor]:
    """Maps (K, N) by the name of their weights."""
    own = per_token(x, g)
    maps = {name: method(x, g) for name, method in POOLED.items()} | {"per token": own}
    maps |= {name + tail: maps[name] ** e * own ** (1 - e) for tail, e in PRODUCTS.items() for name in POOLED}
    return {name: maps[name] for name in wanted}


# scores: logits (T, V) at the tokens (T,) they predict


def logit_minus_mean(logits: Tensor, tokens: Tensor) -> Tensor:
    return core.logit_score(logits - logits.mean(-1, keepdim=True), tokens)


def logit_minus_runner_up(logits: Tensor, tokens: Tensor) -> Tensor:
    others = logits.scatter(1, tokens[:, None], float("-inf"))
    return core.logit_score(logits, tokens) - others.max(-1).values.sum()


SCORES = core.SCORES | {"logit - mean": logit_minus_mean, "logit - runner-up": logit_minus_runner_up}


# how gradients pass: `core.RULES`

PASSES = [
    *(("detached", score) for score in SCORES),
    *(("plain", score) for score in ("logit", "logprob", "logit - runner-up")),
    *(("attnlrp", score) for score in ("logit", "logprob")),
]
MODULES = ("input_layernorm", "post_attention_layernorm")  # read at their outputs
MODULE_FEATURES = ("as they are", "centred")
MODULE_WEIGHTS = ("mean", "ReLU(g.A)", "per token", "ReLU(g.A) x per token")


class Setting(NamedTuple):
    rules: str
    score: str
    features: str
    weights: str
    tap: str = "input"


SETTINGS = [Setting(*chosen, *pair) for chosen in PASSES for pair in itertools.product(FEATURES, WEIGHTS)]
SETTINGS += [
    Setting(rules, "logit", *pair, tap)
    for tap in MODULES
    for rules in ("detached", "plain")
    for pair in itertools.product(MODULE_FEATURES, MODULE_WEIGHTS)
]
NAMED = {
    "paper": Setting("plain", "logit", "as they are", "mean", "post_attention_layernorm"),
    "paper --tap input": Setting("plain", "logit", "as they are", "mean"),
    "paper --tap input --rules detached": Setting("detached", "logit", "as they are", "mean"),
    "gradcam": Setting("attnlrp", "logit", "normalised and centred", "ReLU(g.A)"),
    "hirescam": Setting("attnlrp", "logit", "normalised and centred", "per token"),
    "product": Setting("attnlrp", "logit", "normalised and centred", "ReLU(g.A)^3 x per token"),
}
CHOOSABLE = ("gradcam", "hirescam", "product", "paper")
FLAGS = {  # what a user can choose besides
    **{f"{name} --score logprob": NAMED[name]._replace(score="logprob") for name in ("gradcam", "product")},
    **{
        f"{name} --rules {rules}": NAMED[name]._replace(rules=rules)
        for rules in ("detached", "plain")
        for name in ("gradcam", "product")
    },
}
MEASURES = ("pointing", "energy", "obj_iou", "border", "likeness")


def all_maps(model, forced: dict, scored: core.Scored, positions: Tensor) -> dict[Setting, Tensor]:
    """{setting: (K, N)} of one scored part of an answer."""
    layers, total = core.get_model_layers(model)
    taps = [core.Tap(("input", i), layers[i], True) for i in range(total)]
    taps += [core.Tap((name, i), getattr(layers[i], name), False) for i in range(total) for name in MODULES]
    maps = {}
    for rules, chosen in itertools.groupby(PASSES, key=lambda chosen: chosen[0]):
        with core.RULES[rules](model), core.captured(taps) as found:
            logits = core.compute_logits(model, forced, min(scored.predicting))[0]
        length = forced["input_ids"].shape[1]
        rows = core.at_least_float32(logits[[position - length for position in scored.predicting]])
        values = [(score, SCORES[score](rows, torch.tensor(scored.expected))) for _, score in chosen]
        for number, (score, value) in enumerate(values, 1):
            gradients = torch.autograd.grad(value, list(found.values()), retain_graph=number < len(values))
            pairs = {
                key: [core.at_least_float32(tensor.detach()[0, positions]) for tensor in pair]
                for key, *pair in zip(found, found.values(), gradients, strict=True)
            }
            for tap in ("input", *MODULES):
                wanted = [s for s in SETTINGS if (s.rules, s.score, s.tap) == (rules, score, tap)]
                if wanted:
                    x, g = (torch.stack([pairs[tap, i][part] for i in range(total)]) for part in (0, 1))  # (K, N, C)
                    for name, group in itertools.groupby(wanted, key=lambda s: s.features):
                        group = list(group)
                        heat = weigh(*FEATURES[name](x, g), [s.weights for s in group])
                        maps |= {s: heat[s.weights] for s in group}
    return maps


# occlusion


def occlusion(reading: core.Reading, spans: list, batch: int = 32) -> dict[str, np.ndarray]:
    """{"token", "block": (words, H, W)}: how far each word's score falls without an image token, or 2 x 2 around it.

    The vision tower and everything up to the last image token run once; question and answer then run for each hidden
    token or block in batches, with the hidden positions out of the attention mask. The score is the log-probability,
    what would rise is zero, and a token's block value is the mean over the blocks that hold it.
    """
    model, grid = reading.model, reading.grid
    forced, scored = core.score_parts(reading.inputs, reading.tokens, [reading.tokens_of(span) for span in spans])
    start = int(reading.positions[-1]) + 1
    cells = np.arange(len(reading.positions)).reshape(grid)
    corners_of = itertools.product(range(max(1, grid[0] - 1)), range(max(1, grid[1] - 1)))
    blocks = [cells[i : i + 2, j : j + 2].ravel() for i, j in corners_of]
    hidden = [[], *([cell] for cell in cells.ravel()), *blocks]
    seen = {}
    text = model.model.language_model
    handle = text.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(**forced, use_cache=False)
        handle.remove()
        embeds, places = seen["inputs_embeds"], seen["position_ids"]
        cache = text(inputs_embeds=embeds[:, :start], position_ids=places[..., :start], use_cache=True).past_key_values
        scores = []
        for i in range(0, len(hidden), batch):
            part = hidden[i : i + batch]
            mask = torch.ones(len(part), embeds.shape[1], dtype=torch.long)
            for row, away in zip(mask, part, strict=True):
                row[reading.positions[away]] = 0
            many = deepcopy(cache)
            many.batch_repeat_interleave(len(part))
            states = text(
                inputs_embeds=embeds[:, start:].expand(len(part), -1, -1),
                position_ids=places[..., start:].expand(*places.shape[:-2], len(part), -1),
                attention_mask=mask,
                past_key_values=many,
                use_cache=True,
            ).last_hidden_state
            rows = []  # (B, T, 1) of each word
            for word in scored:
                logits = core.at_least_float32(model.lm_head(states[:, [p - start for p in word.predicting]]))
                expected = torch.tensor(word.expected).expand(len(part), -1)[..., None]
                rows.append(logits.log_softmax(-1).gather(2, expected))
            scores.append(torch.stack([row.sum((1, 2)) for row in rows]))
    values = torch.cat(scores, 1).numpy()  # (words, 1 + N + blocks)
    fall = (values[:, :1] - values[:, 1:]).clip(0)
    sums, counts = np.zeros((len(spans), cells.size)), np.zeros(cells.size)
    for block, value in zip(blocks, fall[:, cells.size :].T, strict=True):
        sums[:, block] += value[:, None]
        counts[block] += 1
    shape = (len(spans), *grid)
    return {"token": fall[:, : cells.size].reshape(shape), "block": (sums / counts).reshape(shape)}


# measures: maps (M, N), the object's image tokens (N,)


def otsu(heat: np.ndarray) -> np.ndarray:
    """(M, N) bool: above the threshold that parts each map's values with the largest variance between the parts."""
    order = -np.sort(-heat, axis=1)
    count = np.arange(1, heat.shape[1])
    total = order.sum(1, keepdims=True)
    above = order.cumsum(1)[:, :-1]
    rest = heat.shape[1] - count
    between = count * rest * (above / count - (total - above) / rest) ** 2
    last = np.take_along_axis(order, between.argmax(1)[:, None], 1)  # the smallest value above the threshold
    return (heat >= last) & (heat > 0)


def measure(heat: np.ndarray, word: beds.Word, grid: tuple[int, int], occluded: np.ndarray) -> np.ndarray:
    """(M, measures) of maps (M, N); all zero for a map of zeros."""
    on = word.on(grid).ravel()
    border = np.ones(grid, bool)
    border[1:-1, 1:-1] = False
    top, hot, alive = heat.argmax(1), otsu(heat), heat.any(1)
    energy = heat[:, on].sum(1) / np.maximum(heat.sum(1), 1e-30)
    iou = (hot & on).sum(1) / (hot | on).sum(1)
    a, b = heat - heat.mean(1, keepdims=True), occluded.ravel() - occluded.mean()
    likeness = a @ b / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b), 1e-30)
    return np.stack([on[top], energy, iou, border.ravel()[top] & ~on[top], likeness], 1) * alive[:, None]


# one bed


def middle(total: int) -> slice:
    """The middle half of the layers."""
    return slice(total // 4, total - total // 4)


def run_bed(bed: beds.Bed, count: int, faithful: int, steps: int, quiet: bool) -> dict[str, np.ndarray]:
    """Everything that is measured in a bed, as arrays: see the keys below."""
    rows, occluded, group, order, tried = [], [], [], [], 0
    _, total = core.get_model_layers(bed.model)
    left = faithful
    for number in tqdm(range(count), bed.name, disable=quiet):
        picture = bed.picture(number)
        tried += picture.tried
        reading, words = picture.reading, picture.words
        if not words:
            continue
        with core.borrowed(bed.model):
            hidden = occlusion(reading, [word.span for word in words])
            for index, word in enumerate(words):
                forced, (scored,) = core.score_parts(reading.inputs, reading.tokens, [reading.tokens_of(word.span)])
                maps = all_maps(bed.model, forced, scored, reading.positions)
                heat = torch.stack([maps[s] for s in SETTINGS]).numpy().astype(np.float64)  # (S, K, N)
                block = hidden["block"][index]
                found = measure(heat.reshape(-1, heat.shape[-1]), word, reading.grid, block)
                rows.append(found.reshape(*heat.shape[:2], -1).astype(np.float32))
                both = np.stack([hidden[name][index].ravel() for name in ("token", "block")])
                occluded.append(measure(both, word, reading.grid, block))
                group.append(number)
                if left:
                    left -= 1
                    order.append(faithfulness(bed, picture, word, maps, both[1], total, steps))
    return {
        "found": np.stack(rows),  # (words, S, K, measures)
        "occlusion": np.stack(occluded),  # (words, 2, measures)
        "picture": np.array(group),
        "tried": np.array(tried),
        "faithful": np.array(order),  # insertion - deletion: (words, named x few + block occlusion + own mask)
        "corners": corners(bed, count) if bed.name in ("flat", "eyes") else np.zeros((0, 0, 0)),  # (16, S, K) bool
    }


def faithfulness(bed, picture, word, maps, occluded, total, steps) -> list[float]:
    """Insertion minus deletion of the NAMED settings at `few(total)` layers, then of occlusion and of the own mask."""
    reading, grid = picture.reading, picture.reading.grid
    cams = {f"{name}@{i}": maps[s][i].numpy().reshape(grid) for name, s in NAMED.items() for i in few(total)}
    cams |= {"occlusion": occluded.reshape(grid), "own mask": word.covered(grid)}
    about = reading.prompt, reading.answer, reading.tokens, word.name, word.span, reading.tokens_of(word.span)
    settings = core.Settings(use_smooth=False)
    token_maps = core.TokenMaps({k: v.astype(np.float32) for k, v in cams.items()}, grid, *about, frozenset(), settings)
    options = {"steps": steps, "baseline": bed.baseline, "random_orders": 0}
    measured = insertion_deletion(reading, token_maps, **options)
    area = {k: auc(measured.insertion[k] - measured.deletion[k], measured.shares) for k in measured.insertion}
    return [area.get(key, 0.0) for key in cams]


def few(total: int) -> list[int]:
    """Four layers, early to late, of which the second and third lie in the middle half."""
    return [total * share // 100 for share in (15, 40, 60, 85)]


def corners(bed: beds.Bed, count: int) -> np.ndarray:
    """Whether the map of the whole answer is hottest in the object's quadrant: (pictures, S, K), sixteen at most."""
    lit = []
    for number in range(min(16, count)):
        photo, corner = beds.draw_corner(number)
        reading = core.read(bed.model, bed.processor, photo, beds.scenes.DESCRIBE[0], max_new_tokens=64)
        with core.borrowed(bed.model):
            part = reading.tokens_of((0, len(reading.answer)))
            forced, (scored,) = core.score_parts(reading.inputs, reading.tokens, [part])
            maps = all_maps(bed.model, forced, scored, reading.positions)
        heat = torch.stack([maps[s] for s in SETTINGS]).numpy()
        lit.append([[beds.lit_corner(cam.reshape(reading.grid)) == corner and cam.any() for cam in k] for k in heat])
    return np.array(lit)


# tables


def merit(found: np.ndarray) -> np.ndarray:
    """(..., measures) -> (...): the mean of pointing, energy and Obj-IoU."""
    return found[..., :3].mean(-1)


class Summary(NamedTuple):
    """A bed's means over the middle half of the layers."""

    settings: np.ndarray  # (S, measures)
    by_layer: np.ndarray  # (S, K, measures)
    occlusion: np.ndarray  # (2, measures)
    merits: np.ndarray  # (RESAMPLES, S)
    words: int
    tried: int
    faithful: np.ndarray  # (words, named, few)
    bounds: np.ndarray  # (words, 2), of occlusion and of the object's own mask
    agreement: dict[str, float]  # of a choice of the map by insertion - deletion with one by masks
    corners: np.ndarray  # (S,) of the worst layer, or empty


def summarise(data: dict) -> Summary:
    found, faithful = data["found"], data["faithful"].reshape(-1, len(NAMED) * 4 + 2)
    areas = faithful[:, :-2].reshape(-1, len(NAMED), 4)
    mean = found[:, :, middle(found.shape[2])].mean(2)  # (words, S, measures)
    lit = data["corners"].sum(0).min(-1) if data["corners"].size else np.zeros(0)
    return Summary(
        mean.mean(0), found.mean(0), data["occlusion"].mean(0), resampled(merit(mean), data["picture"], 0),
        len(found), int(data["tried"]), areas, faithful[:, -2:], agree(found, areas), lit,
    )  # fmt: skip


def agree(found: np.ndarray, areas: np.ndarray) -> dict[str, float]:
    """How good the choice of a map without masks is, over words: the candidates are CHOOSABLE at four layers.

    The merits of the map with the largest insertion minus deletion, of the best map by the mask, of the default at the
    middle layer and of a map taken at random; and how often the first is as good as the second but for 0.05.
    """
    if not len(areas):
        return {}
    names, layers = list(NAMED), few(found.shape[2])
    rows = [names.index(name) for name in CHOOSABLE]
    merits = merit(found[: len(areas), [SETTINGS.index(NAMED[name]) for name in CHOOSABLE]][:, :, layers])
    merits, areas = (x.reshape(len(areas), -1) for x in (merits, areas[:, rows]))
    chosen = np.take_along_axis(merits, areas.argmax(1)[:, None], 1)[:, 0]
    default = merit(found[: len(areas), SETTINGS.index(NAMED["gradcam"]), found.shape[2] // 2])
    return {
        "chosen by insertion - deletion": chosen.mean(),
        "best by masks": merits.max(1).mean(),
        "default": default.mean(),
        "at random": merits.mean(),
        "as good as the best": (chosen >= merits.max(1) - 0.05).mean(),
    }


def print_tables(found: dict[str, Summary], rows: int) -> None:
    names = list(found)
    for name, bed in found.items():
        print(f"{name}: {bed.words} of {bed.tried} words count")
    merits = np.stack([merit(bed.settings) for bed in found.values()])  # (beds, S)
    worst, which = merits.min(0), merits.argmin(0)
    low, high = np.quantile(np.min([bed.merits for bed in found.values()], 0), (0.025, 0.975), 0)
    order = np.argsort(-worst)
    places = {setting: place for place, setting in enumerate((SETTINGS[i] for i in order), 1)}
    kinds = {
        "all": lambda s: True,
        "pooled": lambda s: s.weights in POOLED,
        "per token": lambda s: s.weights == "per token",
    }

    def line(label, i):
        cells = " | ".join("{:.2f} {:.2f} {:.2f}".format(*bed.settings[i, :3]) for bed in found.values())
        lit = " ".join(f"{bed.corners[i]:.0f}" for bed in found.values() if len(bed.corners)) or "-"
        print(f"| {label} | {worst[i]:.3f} ({low[i]:.3f}-{high[i]:.3f}) {names[which[i]]} | {cells} | {lit} |")

    print("\npointing energy Obj-IoU; merit in the worst bed with its interval; corners lit of 16 at the worst layer")
    print(f"| setting | worst bed | {' | '.join(names)} | corners |")
    for kind, of_kind in kinds.items():
        for i in [i for i in order if of_kind(SETTINGS[i])][:rows]:
            line(f"{kind} {places[SETTINGS[i]]}: {', '.join(SETTINGS[i])}", i)
    for name, setting in (NAMED | FLAGS).items():
        line(f"**{name}** ({places[setting]}: {', '.join(setting)})", SETTINGS.index(setting))
    for i, name in enumerate(("token", "block")):
        cells = " | ".join("{:.2f} {:.2f} {:.2f}".format(*bed.occlusion[i, :3]) for bed in found.values())
        print(f"| occlusion by {name} | {min(merit(bed.occlusion[i]) for bed in found.values()):.3f} | {cells} | |")
    print("\nlikeness to block occlusion, share of maxima at the border and off the object")
    for name, setting in NAMED.items():
        i = SETTINGS.index(setting)
        cells = " | ".join("{:.2f} {:.2f}".format(*bed.settings[i, [4, 3]]) for bed in found.values())
        print(f"| {name} | {cells} |")
    print("\ninsertion - deletion, mean over words")
    measured = [bed for bed in found.values() if len(bed.faithful)]
    for i, name in enumerate(NAMED):
        print(f"| {name} | {' | '.join(f'{bed.faithful[:, i, 1:3].mean():.2f}' for bed in measured)} |")
    for i, name in enumerate(("occlusion", "the object's own mask")):
        print(f"| {name} | {' | '.join(f'{bed.bounds[:, i].mean():.2f}' for bed in measured)} |")
    print("\nmerit of the map chosen without masks, beside other choices")
    for name in measured[0].agreement if measured else ():
        print(f"| {name} | {' | '.join(f'{bed.agreement[name]:.2f}' for bed in measured)} |")


def write_csv(found: dict[str, Summary], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["bed", *Setting._fields, *MEASURES, "merit"])
        for name, bed in found.items():
            for setting, values in zip(SETTINGS, bed.settings, strict=True):
                writer.writerow([name, *setting, *(f"{v:.3f}" for v in (*values, merit(values)))])


COLOURS = {name: STYLES[name][0] for name in CHOOSABLE} | {
    "paper --tap input": "#e69f00",
    "paper --tap input --rules detached": "#cc79a7",
}


def draw(found: dict[str, Summary], path: Path) -> None:
    """Pointing, energy and Obj-IoU of the NAMED settings over the layers, a row for each bed."""
    page, height = Page(WIDTHS["page"], ""), 0.85
    y = page.lines(MARGIN, MARGIN, page.inner, "Which map holds in every bed?", TITLE, weight="bold") + GAP
    y = page.legend(y, {name: COLOURS[name] for name in NAMED}) + GAP
    for name, bed in found.items():
        places, below = page.places(y, 3, 1.9, BAND + height + 0.22)
        for measure, ((x, top, width), title) in enumerate(zip(places, ("pointing", "energy", "Obj-IoU"), strict=True)):
            axes = page.plot(x, top, width, height, f"{name}: {title}", ylim=(-0.02, 1.02))
            for label in NAMED:
                values = bed.by_layer[SETTINGS.index(NAMED[label]), :, measure]
                axes.plot(values, color=COLOURS[label], linewidth=1.8 if label in CHOOSABLE[:3] else 1)
        y = below
    text = (
        "By layer, on image tokens; a map is right where the three lie high in every row. Beds: pictures whose objects "
        "are known to the pixel, of the demo model (scenes, flat, crowded) and of a published decoder (eyes, words, "
        "blurred, sinks)."
    )
    Image.fromarray(np.asarray(page.finish(small_print(page, y, text)))).save(path, dpi=(DPI, DPI), optimize=True)


PICTURES = {
    "scenes": 30,
    "flat": 40,
    "crowded": 16,
    "small": 30,
    "large": 20,
    "eyes": 24,
    "words": 24,
    "blurred": 24,
    "sinks": 24,
}
FAITHFUL = {
    "scenes": 8,
    "flat": 8,
    "crowded": 8,
    "small": 8,
    "large": 8,
    "eyes": 8,
    "words": 4,
    "blurred": 4,
    "sinks": 4,
}


def parse(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--decoder", help="folder that graft.py wrote; without it only the demo model's beds")
    parser.add_argument("--beds", nargs="*", choices=PICTURES, help="to be measured anew (default: all)")
    parser.add_argument("--quick", action="store_true", help="a look: a tenth of the pictures")
    parser.add_argument("--steps", type=int, default=8, help="of insertion and deletion")
    parser.add_argument("--rows", type=int, default=8, help="of the table, of each kind")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--work", type=Path, default=beds.ROOT / "build" / "benchmark_choices")
    parser.add_argument("--output_dir", type=Path, default=beds.ROOT / "cam_results" / "benchmark")
    return parser.parse_args(arguments)


def main(arguments=None) -> None:
    options, start = parse(arguments), time.monotonic()
    available = beds.DEMO + (beds.PUBLISHED if options.decoder else ())
    options.work.mkdir(parents=True, exist_ok=True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name in available if options.beds is None else options.beds:
        count = max(2, PICTURES[name] // 10) if options.quick else PICTURES[name]
        faithful = 1 if options.quick else FAITHFUL[name]
        data = run_bed(beds.load(name, options.decoder), count, faithful, options.steps, options.quiet)
        np.savez_compressed(options.work / f"{name}.npz", **data)
    kept = [name for name in PICTURES if (options.work / f"{name}.npz").exists()]
    found = {name: summarise(dict(np.load(options.work / f"{name}.npz"))) for name in kept}
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}")
    print_tables(found, options.rows)
    write_csv(found, options.output_dir / "beds.csv")
    draw(found, options.output_dir / "beds.png")
    print(f"{(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
