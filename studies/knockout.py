"""What is left of the answer when attention is blocked: truncation of the image, and knockout of single edges.

    Reading, edges -> knockout              (runs, answer tokens)
            -> find_cliff, findings, rows, arrays

Shapes:  as in `studies/decoder.py`
"""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.encoding import decimal
from common.evidence import Evidence
from common.families import hidden_with
from common.passes import SENSITIVE, UNLIKELY
from smooth_gradcam import (
    Reading,
    at_least_float32,
    borrowed,
    check_whole,
    decode,
    generate,
    get_model_layers,
    hooked,
    memory_explained,
    unwrapped,
)
from studies.decoder import attention_hooked, cache_before, covered_tokens, embed, run_decoder, token_groups
from studies.flow import attention_flow

__all__ = [
    *(
        "Edge",
        "Severed",
        "KEPT",
        "change",
        "cliff_interval",
        "edges_of",
        "explained_lines",
        "explained_text",
        "find_cliff",
        "find_onset",
    ),
    *("image_hidden", "knockout", "knockout_arrays", "knockout_rows", "largest_change", "mean_change", "said_instead"),
    *("sever_photo", "tokens_that_need_the_photo", "truncated", "truncation_finding"),
]


# blocked attention


class Edge(NamedTuple):
    """Attention that is blocked in one run: in these layers, none of the queries sees any of the keys."""

    layers: range
    queries: np.ndarray  # positions
    keys: np.ndarray  # positions


def knockout(
    reading: Reading, edges: list[Edge], *, batch_size: int = 8, progress: Callable | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What is left of the answer when attention is blocked, one edge in each run: two arrays (runs, A).

    The first has the probability of each token of the answer after those before it, the second, bool, whether the token
    is the most likely one; where all are, the model would give this answer greedily. Positions stay as they are. All
    before the first blocked query is run once, the rest in batches of `batch_size`. `progress` wraps the iterable over
    the batches. Raises ValueError for bad arguments, and RuntimeError if memory runs out.
    """
    check_whole("batch_size", batch_size, 1)
    if not edges:
        raise ValueError("edges=[] is no run: give one Edge or more")
    model, total = reading.model, get_model_layers(reading.model)[1]
    before = reading.inputs["input_ids"].shape[1] - 1
    start = int(min([before, *(edge.queries.min() for edge in edges if len(edge.queries))]))
    answer = torch.tensor(reading.tokens)
    results = []
    with borrowed(model), memory_explained(len(reading.positions)):
        given = embed(reading)
        prefix, given = cache_before(reading, given, start), given.at(slice(start, None))
        shape = len(given), start + len(given)  # (S, T)
        for i in (progress or iter)(range(0, len(edges), batch_size)):
            batch = edges[i : i + batch_size]
            count = len(batch)
            cache = copy.deepcopy(prefix)
            cache.batch_repeat_interleave(count)
            with _blocked(model, _hidden_in(batch, start, shape, total)):
                states = run_decoder(model, given.repeated(count), cache)[:, before - start :]  # (B, A, C)
            states = states.flatten(0, 1)  # (B * A, C): with a batch of slices, the head's weights would be copied
            logits = at_least_float32(model.get_output_embeddings()(states)).unflatten(0, (count, -1))  # (B, A, V)
            expected = answer.to(logits.device).expand(count, -1)[..., None]
            probability = logits.softmax(-1).gather(2, expected)[..., 0]
            results.append((probability.cpu().numpy(), (logits.argmax(-1) == expected[..., 0]).cpu().numpy()))
    probabilities, likeliest = zip(*results, strict=True)
    return np.concatenate(probabilities), np.concatenate(likeliest)


def _hidden_in(edges: list[Edge], start: int, shape: tuple[int, int], total: int) -> Callable:
    """The function that `_blocked` takes, for a batch of edges and a pass of `shape` (S, T) from position `start`."""
    hidden = torch.zeros(len(edges), *shape, dtype=torch.bool)  # (B, S, T)
    for run, edge in zip(hidden, edges, strict=True):
        queries, keys = (positions[positions < shape[1]] for positions in (edge.queries, edge.keys))
        run[np.ix_(queries - start, keys)] = True
    active = torch.tensor([[layer in edge.layers for layer in range(total)] for edge in edges])  # (B, K)
    return lambda i, S, T: hidden & active[:, i, None, None] if active[:, i].any() else None  # noqa: N803


@contextmanager
def _blocked(model, hidden: Callable[[int, int, int], Tensor | None]):
    """Inside, queries do not see the keys where hidden(layer, S, T), bool (B, S, T), is true; None hides nothing.

    The queries of a pass are the last S of its T positions.
    """

    def register(i, attention):
        def hook(module, args, kwargs):
            mask = kwargs["attention_mask"]  # (B or 1, 1, S, T), added to the scores
            block = hidden(i, *mask.shape[-2:])
            if block is not None:
                lowest = torch.finfo(mask.dtype).min
                kwargs = kwargs | {"attention_mask": mask.masked_fill(block[:, None].to(mask.device), lowest)}
            return args, kwargs

        return attention.register_forward_pre_hook(hook, with_kwargs=True)

    with attention_hooked(model, register):
        yield


@contextmanager
def image_hidden(model, layer: int):
    """Inside, no text sees an image token from decoder layer `layer` on, in generation as well.

        with image_hidden(model, 22):
            model.generate(**inputs)

    That is all pictures of the prompt, frames too; their tokens see each other. What Qwen3-VL adds to image tokens
    behind its first layers (deepstack) is still added, to be read by no text. Positions stay as they are. If `layer` is
    the number of layers, nothing is hidden. Raises ValueError beyond that.
    """
    model = unwrapped(model)
    total = get_model_layers(model)[1]
    check_whole("layer", layer, 0)
    if layer > total:
        raise ValueError(f"layer {layer} does not exist: the image can be hidden from layer 0 to {total} (nowhere) on")
    names = [name for name in ("image_token_id", "video_token_id") if getattr(model.config, name, None) is not None]
    pictures = torch.tensor([getattr(model.config, name) for name in names])
    image, blocks = torch.zeros(1, 0, dtype=torch.bool), {}  # (B, positions so far); of one pass, by a mask's shape

    def note(module, args, kwargs):
        nonlocal image
        blocks.clear()
        ids = kwargs.get("input_ids")
        if ids is not None and ids.shape[1] > 1:  # a prompt, and not a single token of an answer
            image = torch.isin(ids, pictures.to(ids.device))
        else:
            image = torch.nn.functional.pad(image, (0, 1))

    def hidden(i, S, T):  # noqa: N803
        if i < layer:
            return None
        if (S, T) not in blocks:
            keys = torch.nn.functional.pad(image, (0, max(0, T - image.shape[1])))
            keys = keys[:, -T:]  # (B, T), the last of a sliding window
            blocks[S, T] = ~keys[:, T - S :, None] & keys[:, None]  # (B, S, T)
        return blocks[S, T]

    with hooked([model.model.register_forward_pre_hook(note, with_kwargs=True)]), _blocked(model, hidden):
        yield


# truncation and knockout of one photo

HARDLY = 0.8  # share of the full value that is left without the image where it is hardly needed
KEPT = 0.95  # share of the full value that counts as no loss
REPORTED = 5  # photos with lines of their own


class Severed(NamedTuple):
    """What is left of the answer to one photo."""

    reading: Reading
    explained: list[int]  # T indices of the answer's tokens
    removed: np.ndarray  # (K + 1, A): the image hidden from layer k on
    right: np.ndarray  # (K + 1,) bool: whether the greedy answer would begin with this one
    kept: np.ndarray | None  # (K + 1, A): as `removed`, without the image tokens that had most attention a layer before
    kept_right: np.ndarray | None  # (K + 1,) bool
    windows: dict[str, np.ndarray]  # edge -> (K, A): blocked in a window of layers around each

    @property
    def evidence(self) -> Evidence:
        """That of the explained tokens: the image is hidden nowhere, and in all layers."""
        values = self.removed[[-1, 0]][:, self.explained]  # (2, T)
        return Evidence(*values.mean(1).tolist(), tuple(values[0].tolist()))


def tokens_that_need_the_photo(removed: np.ndarray) -> list[int]:
    """Indices of the answer's tokens whose probability falls by more than 0.2 if the image is hidden in all layers."""
    return np.flatnonzero(removed[-1] - removed[0] > SENSITIVE).tolist()


def sever_photo(
    reading: Reading, span=None, *, part="answer", window=None, keep=None, mask=None, batch_size=8, progress=None
) -> Severed:
    """Truncation at every layer and, with a window, attention knockout around every layer, in one sweep.

    span    (start, end) in characters of the answer; None is the tokens that need the photo, or all if none does
    part    the part of the answer that these are in, see `Reading.part`
    window  layers that are blocked at once around each; None leaves knockout out
    keep    image tokens that stay visible in a second truncation, those with most attention in the layer before
    mask    the object's pixels, bool (height, width): its image tokens and the others are also blocked separately

    Hidden from layer k on, the image's tokens are attended to by none but themselves from there on. What Qwen3-VL adds
    to them behind its first layers (deepstack) is still added, but what comes behind layer k - 1 or later is read by no
    other position. Of several pictures all that are explained are hidden, from the text between them and from other
    images behind them too.

    Raises ValueError for a window or a number of tokens that the model or the photo does not have, for a mask of
    several pictures, and for models whose image tokens see each other if some of these stand behind hidden ones.
    """
    total, groups = get_model_layers(reading.model)[1], token_groups(reading)
    image, user, answer = (groups[name] for name in ("image", "user", "answer"))
    others = groups.get("other images", image[:0])
    later = np.sort(np.concatenate([user, answer, others[others > image[0]]]))
    if mask is not None and len(reading.grids) > 1:
        raise ValueError(f"a mask is of one picture, and {len(reading.grids)} are explained: choose one, reading.of(0)")
    edges = [Edge(range(k, total), later, image) for k in range(total + 1)]
    if keep is not None:
        if not 1 <= keep < len(image):
            raise ValueError(f"keep={keep} must be 1 to {len(image) - 1}: the photo has {len(image)} image tokens")
        attention = attention_flow(reading, span)[:, image]  # (K, N)
        order = np.argsort(-attention, axis=1, kind="stable")
        hidden = [image, *(image[np.sort(row[keep:])] for row in order)]  # no layer comes before layer 0
        edges += [Edge(range(k, total), later, keys) for k, keys in enumerate(hidden)]
    windowed = {}
    if window is not None:
        if not 1 <= window <= total:
            raise ValueError(f"window={window} must be 1 to {total}: the model has {total} layers")
        windowed = {"image → user": (user, image), "image → answer": (answer, image), "user → answer": (answer, user)}
        windowed["answer → answer"] = answer, answer  # each to itself and those before it: the paper's last → last
        if len(others):
            windowed |= {"other images → user": (user, others), "other images → answer": (answer, others)}
        if mask is not None:
            own = np.isin(image, hidden_with(reading, covered_tokens(mask, reading.grids[0])).numpy())
            for name, keys in (("object", image[own]), ("other patches", image[~own])):
                windowed |= {f"{name} → user": (user, keys), f"{name} → answer": (answer, keys)}
        for queries, keys in windowed.values():
            windows = (range(max(0, k - window // 2), min(total, k + -(-window // 2))) for k in range(total))
            edges += [Edge(layers, queries, keys) for layers in windows]
    probabilities, likeliest = knockout(reading, edges, batch_size=batch_size, progress=progress)
    right, removed, rest = likeliest.all(1), probabilities[: total + 1], probabilities[total + 1 :]
    kept = kept_right = None
    if keep is not None:
        kept, rest, kept_right = rest[: total + 1], rest[total + 1 :], right[total + 1 : 2 * total + 2]
    explained = within = reading.tokens_of(span or reading.part(part))
    if span is None:
        explained = [token for token in tokens_that_need_the_photo(removed) if token in within]
    return Severed(
        reading,
        explained or within,
        removed,
        right[: total + 1],
        kept,
        kept_right,
        dict(zip(windowed, rest.reshape(-1, total, rest.shape[1]), strict=True)),
    )


def change(severed: Severed, edge: str) -> np.ndarray:
    """The change in percent, 100 (p' - p) / p, by layer: (K,), mean over the explained tokens whose p is 0.01 or more.

    nan if there is none.
    """
    full = severed.removed[-1, severed.explained]
    likely = np.array(severed.explained)[full >= UNLIKELY]
    if not len(likely):
        return np.full(len(severed.windows[edge]), np.nan)
    full = severed.removed[-1, likely]
    return (100 * (severed.windows[edge][:, likely] - full) / full).mean(1)


def mean_change(severed: list[Severed], edge: str) -> np.ndarray:
    """The mean `change`, (K,), over the photos that have one; nan if none has."""
    changes = [change(one, edge) for one in severed if edge in one.windows]
    known = [values for values in changes if np.isfinite(values).all()]
    return np.mean(known, axis=0) if known else changes[0]


def edges_of(severed: list[Severed]) -> list[str]:
    """The edges that were blocked in windows; where some prompts have other images, not of every photo."""
    return list(dict.fromkeys(edge for one in severed for edge in one.windows))


def truncated(severed: Severed, values: np.ndarray) -> np.ndarray:
    """The mean over the explained tokens, (K + 1,), of probabilities (K + 1, A)."""
    return values[:, severed.explained].mean(1)


# findings


def find_cliff(curve: np.ndarray, kept: float = KEPT) -> int | None:
    """The smallest k with curve[k'] >= kept * curve[-1] for all k' >= k: from layer k on the image is not needed.

    `curve` (K + 1,) is the value that is left if the image is hidden from layer k on; the last is the full value. None
    if there is no cliff: the full value is below 0.01, or four fifths of it are left if the image is hidden everywhere.
    """
    short = np.flatnonzero(curve < kept * curve[-1])
    needed = curve[-1] >= UNLIKELY and curve[0] < min(kept, HARDLY) * curve[-1]
    return int(short[-1]) + 1 if needed else None


def find_onset(curve: np.ndarray) -> int:
    """The last layer such that, if the image is hidden from it or any earlier layer on, 5 % of its effect are left."""
    risen = np.flatnonzero(curve >= curve[0] + (1 - KEPT) * (curve[-1] - curve[0]))
    return max(int(risen[0]) - 1, 0)


def cliff_interval(curves: np.ndarray, draws: int = 1000) -> tuple[int, int] | None:
    """The 95 % interval of the cliffs of means of resampled curves (photos, K + 1).

    None if a tenth of the means or more have no cliff.
    """
    rng = np.random.default_rng(0)
    cliffs = [find_cliff(curves[rng.integers(len(curves), size=len(curves))].mean(0)) for _ in range(draws)]
    cliffs = sorted(cliff for cliff in cliffs if cliff is not None)
    if len(cliffs) <= 0.9 * draws:
        return None
    return cliffs[round(0.025 * (len(cliffs) - 1))], cliffs[round(0.975 * (len(cliffs) - 1))]


def truncation_finding(curves: np.ndarray, what: str, doubted: bool = False) -> str:
    """A sentence on the layer from which the image can be removed; `curves` are (photos, K + 1), `what` names them.

    It does not say that the photo is hardly needed if that is `doubted` already.
    """
    curve = curves.mean(0)
    cliff, total = find_cliff(curve), len(curve) - 1
    if curve[-1] < UNLIKELY:
        return f"no cliff: {what} is {curve[-1]:.4f} with the whole image, so there is nothing to lose"
    if cliff is None:
        kept = f"{what} is {decimal(curve[0])} if the image is hidden from layer 0 on, {decimal(curve[-1])} with it"
        return f"no cliff: {kept}" + ", so the answer hardly needs the photo" * (not doubted)
    half = find_cliff(curve, 0.5)
    end = "the image is needed to the last layer" if cliff == total else f"from layer {cliff} on it can be removed"
    line = (
        f"hidden from layer {find_onset(curve)} or earlier, the image might as well not be there; {end}: {what} "
        f"{decimal(curve[0], 3)} without it, {decimal(curve[-1], 3)} with it"
    )
    line += f", {decimal(curve[cliff], 3)} if hidden from {cliff} on" if cliff < total else ""
    line += f", half of it or more from layer {half} on" if half is not None else ""
    if len(curves) >= 10 and (interval := cliff_interval(curves)):
        line += f" (cliff at {interval[0]} to {interval[1]} in 95 % of resampled photos)"
    return line


def largest_change(changes: np.ndarray, window: int) -> str:
    """The largest of the changes (K,) and its layers, in words."""
    if not np.isfinite(changes).any():
        return f"nothing to lose, the probability is below {UNLIKELY}"
    worst = int(np.abs(changes).argmax())
    if abs(changes[worst]) < 0.05:
        return "no change in any window"
    first, last = max(0, worst - window // 2), min(len(changes), worst + -(-window // 2)) - 1
    layers = f"layer {first}" if first == last else f"layers {first}-{last}"
    return f"{changes[worst]:+.1f} % at most, blocked in {layers}"


def explained_text(reading: Reading, explained: list[int]) -> str:
    """The text of the explained tokens, each character once."""
    spans = dict.fromkeys(reading.spans[i] for i in explained)
    return " ".join(f"“{reading.answer[slice(*span)].strip()}”" for span in spans)


def explained_lines(severed: list[Severed], names: list[str], spans: list) -> list[str]:
    """Sentences on the explained tokens of the first photos' answers, and why it is these."""
    lines = []
    for (reading, explained, removed, *_), name, span in list(zip(severed, names, spans, strict=True))[:REPORTED]:
        why = "as asked" if span else "those that need the photo"
        if not span and len(explained) == len(reading.tokens) != len(tokens_that_need_the_photo(removed)):
            why = "all, as none needs the photo"
        text = explained_text(reading, explained)
        lines.append(f"explained of {name}, {len(explained)} of {len(reading.tokens)} tokens, {why}: {text}")
    return lines


def said_instead(severed: list[Severed], names: list[str]) -> list[str]:
    """Sentences on the model's answers to the first photos where they are not the right ones."""
    lines = []
    wrong = [(one.reading, name) for one, name in zip(severed, names, strict=True) if not one.right[-1]]
    for reading, name in wrong[:REPORTED]:
        tokenizer = reading.processor.tokenizer
        with borrowed(reading.model):
            answer = decode(tokenizer, generate(reading.model, tokenizer, reading.inputs, 32)[0])
        lines.append(f"{name}, {reading.prompt!r}: right would be {reading.answer!r}, the model says {answer!r}")
    return lines


def knockout_rows(severed: list[Severed], names: list[str], tasks: list[str | None] | None = None) -> list[dict]:
    """Rows of knockout.csv: what was blocked for which photo, from or around which layer, and what is left.

    With their "task", where any of the `tasks`, those of the photos, is known.
    """
    rows = []
    for i, (name, one) in enumerate(zip(names, severed, strict=True)):
        known = {"task": tasks[i] or ""} if tasks and any(tasks) else {}
        for kind, values, right in (
            ("image from", one.removed, one.right),
            ("image but for the kept from", one.kept, one.kept_right),
        ):
            for layer, value in enumerate(truncated(one, values) if values is not None else ()):
                row = known | {"blocked": kind, "photo": name, "layer": layer, "probability": f"{value:.4g}"}
                rows.append(row | {"answer_right": int(right[layer])})
        for edge, values in one.windows.items():
            pairs = zip(truncated(one, values), change(one, edge), strict=True)
            for layer, (value, percent) in enumerate(pairs):
                row = known | {"blocked": edge, "photo": name, "layer": layer, "probability": f"{value:.4g}"}
                rows.append(row | {"change_percent": f"{percent:.4g}"})
    return rows


def knockout_arrays(severed: list[Severed], names: list[str]) -> dict[str, np.ndarray]:
    """Arrays of knockout.npz, for photo i removed_i (K + 1, A), windows_i (edges, K, A), explained_i (T,), tokens_i.

    And evidence_i (2,): p of the explained tokens, and what it is without the photo. windows_i is nan for an edge that
    photo i does not have.
    """
    edges = edges_of(severed)
    arrays = {"photos": np.array(names), "edges": np.array(edges)}
    for i, one in enumerate(severed):
        arrays |= {f"removed_{i}": one.removed, f"right_{i}": one.right, f"explained_{i}": np.array(one.explained)}
        arrays |= {f"tokens_{i}": np.array(one.reading.tokens), f"answer_{i}": np.array(one.reading.answer)}
        arrays[f"evidence_{i}"] = np.array(one.evidence[:2])
        if one.kept is not None:
            arrays[f"kept_{i}"] = one.kept
        if edges:
            none = np.full_like(one.removed[1:], np.nan)
            arrays[f"windows_{i}"] = np.stack([one.windows.get(edge, none) for edge in edges])
    return arrays
