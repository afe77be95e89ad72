"""FastV as published (Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024): image tokens are removed.

From layer K on only those image tokens go on that the prompt's last token attends to most in layer K - 1, mean over
heads; R % of them are really removed: hidden states, attention and the cache of keys and values are shorter from there
on, positions stay as they are. `--keep` of knockout mode only masks tokens, which saves nothing.

    Reading, K, R -> image_pruned            inside, the model runs so
      -> pruned_answer, said_by              a given answer's probabilities, the model's own answer
      -> flops_share, seconds                what it costs
      -> fastv_tables                        K x R over a list

Shapes:  as in `studies/decoder.py`
"""

import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from common.families import known, photo_tokens
from smooth_gradcam import Reading, at_least_float32, borrowed, get_model_layers, hooked, memory_explained
from studies.answer_tables import said_by, score_files
from studies.answers import LABELS, MEASURES, Scored, score
from studies.decoder import eager_attention, embed, run_decoder, token_groups
from studies.flow import attention_flow
from studies.knockout import Edge, knockout

__all__ = ["Kept", "fastv_tables", "flops_share", "image_pruned", "kept_count", "pruned_answer", "seconds"]

COLUMNS = {"layer": "K", "removed": "R, %", "tokens": "tokens left", "flops": "FLOPs, %", "time": "time, %"}
MASKED = {"masked": "masked"}  # accuracy of the variant that masks, see `_masked`
REPEATS = 3  # of what is timed


class Kept(NamedTuple):
    """The positions of the prompt that go on, in their order; filled once the prompt has passed."""

    positions: list[int]


class _Seen:
    """A cache that gives what it has, and takes nothing."""

    def __init__(self, cache):
        self.cache = cache

    def update(self, keys, values, layer, *args, **kwargs):
        return self.cache.layers[layer].keys, self.cache.layers[layer].values


def kept_count(count: int, removed: float) -> int:
    """How many of `count` image tokens are left, at least one, if `removed` percent go."""
    return max(1, round(count * (1 - removed / 100)))


@contextmanager
def image_pruned(reading: Reading, layer: int, removed: float):
    """Inside, the reading's model removes `removed` percent of its image tokens from decoder layer `layer` on.

        with image_pruned(reading, 2, 50) as kept:
            model.generate(**reading.inputs)

    For one sequence at a time, which begins with the reading's prompt in one pass and is run with a cache of keys and
    values, as `generate` does. Yields a `Kept`. Raises ValueError for a layer that has none before it, or a share.
    """
    model, (layers, total) = reading.model, get_model_layers(reading.model)
    if known(model).sees_ahead:
        raise ValueError(f"{type(model).__name__}: its image tokens see each other, none can be removed")
    if not 1 <= layer < total:
        raise ValueError(f"layer {layer} cannot be the first with fewer tokens: give 1 to {total - 1}")
    if not 0 < removed < 100:
        raise ValueError(f"removed={removed} must be a percentage between 0 and 100")
    prompt, image = reading.inputs["input_ids"].shape[1], photo_tokens(reading).tolist()
    kept, shape = Kept([]), {}  # shape: of the pass, "past" and "new" positions, "rows" and "columns" of shorter layers

    def note(module, args, kwargs):
        cache = _cache_of(kwargs)
        if cache is None:
            raise ValueError("the model runs without a cache of keys and values, which this needs")
        shape["past"], shape["new"] = cache.get_seq_length(), kwargs["inputs_embeds"].shape[1]
        if kwargs["inputs_embeds"].shape[0] > 1 or (shape["past"] == 0 and shape["new"] != prompt):
            raise ValueError("image tokens are removed of one sequence at a time, whose prompt comes in one pass")
        if shape["past"]:
            columns = [*kept.positions, *range(prompt, shape["past"] + shape["new"])]
            shape["columns"] = torch.tensor(columns, device=kwargs["inputs_embeds"].device)
        shape["added"], added = [], kwargs.get("deepstack_visual_embeds")
        if added is None:
            return None
        for features in added[layer:]:  # which the model would add to all image tokens
            whole = torch.zeros_like(kwargs["inputs_embeds"])
            whole[kwargs["visual_pos_masks"]] = features.to(whole)
            shape["added"].append(whole)
        return args, kwargs | {"deepstack_visual_embeds": added[:layer]}

    def rank(module, args, kwargs, output):
        if shape["past"]:
            return
        last = {"hidden_states": kwargs["hidden_states"][:, -1:], "attention_mask": None}
        last["position_embeddings"] = tuple(part[..., -1:, :] for part in kwargs["position_embeddings"])
        last |= {name: _Seen(kwargs[name]) for name in CACHES if kwargs.get(name) is not None}
        with eager_attention(model):
            weights = module.forward(**kwargs | last)[1]  # (1, heads, 1, P)
        order = weights[0, :, 0, image].mean(0).argsort(descending=True, stable=True)  # (N,)
        gone = {image[i] for i in order[kept_count(len(image), removed) :].tolist()}
        kept.positions[:] = [i for i in range(prompt) if i not in gone]
        shape["rows"] = shape["columns"] = torch.tensor(kept.positions, device=order.device)

    def shorten(i):
        def hook(module, args, kwargs):
            rows, columns = (shape[name].to(args[0].device) for name in ("rows", "columns"))
            kwargs, mask = dict(kwargs), kwargs.get("attention_mask")
            if mask is not None:
                kwargs["attention_mask"] = mask[..., columns]  # (1, 1, S, fewer)
            if shape["past"] == 0:
                if mask is not None:
                    kwargs["attention_mask"] = kwargs["attention_mask"][..., rows, :]
                kwargs["position_embeddings"] = tuple(part[..., rows, :] for part in kwargs["position_embeddings"])
                for name in ("position_ids", "cache_position"):
                    if kwargs.get(name) is not None:
                        kwargs[name] = kwargs[name][..., rows]
                args = (args[0][:, rows] if i == layer else args[0], *args[1:])
            return args, kwargs

        return hook

    def add(i):
        def hook(module, args, output):
            if i - layer >= len(shape["added"]):
                return output
            whole = shape["added"][i - layer][:, shape["rows"]].to(output[0].device)
            return output + whole if torch.is_tensor(output) else (output[0] + whole, *output[1:])

        return hook

    handles = [
        model.model.language_model.register_forward_pre_hook(note, with_kwargs=True),
        layers[layer - 1].self_attn.register_forward_hook(rank, with_kwargs=True),
        *(layers[i].register_forward_pre_hook(shorten(i), with_kwargs=True) for i in range(layer, total)),
        *(layers[i].register_forward_hook(add(i)) for i in range(layer, total)),
    ]
    with hooked(handles):
        yield kept


CACHES = ("cache", "past_key_values")  # its name since transformers 5.23, and before


def _cache_of(kwargs: dict):
    return next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)


def pruned_answer(reading: Reading, layer: int, removed: float) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(probability of each of the answer's tokens (A,), whether it is the most likely (A,), positions that are left).

    What `knockout` gives if the removed tokens are hidden from all others from that layer on.
    """
    model, prompt = reading.model, reading.inputs["input_ids"].shape[1]
    with borrowed(model), memory_explained(len(reading.positions)):
        given, cache, states = embed(reading), DynamicCache(), []
        with image_pruned(reading, layer, removed) as kept:
            for part in (given.at(slice(prompt)), given.at(slice(prompt, None))):
                if len(part):
                    states.append(run_decoder(model, part, cache)[0])
        states = torch.cat([states[0][-1:], *states[1:]])  # (A, C)
        logits = at_least_float32(model.get_output_embeddings()(states))  # (A, V)
    expected = torch.tensor(reading.tokens, device=logits.device)
    probability = logits.softmax(-1).gather(1, expected[:, None])[:, 0]
    return probability.cpu().numpy(), (logits.argmax(-1) == expected).cpu().numpy(), kept.positions


# what it costs


def flops_share(model, layer: int, tokens: int, left: int) -> float:
    """FLOPs of the prompt in the decoder, as a share of those without pruning, by the paper's formula.

    A layer with n tokens takes 4 n d^2 + 2 n^2 d + 2 n d m, with d channels and m in its MLP, or in the experts of a
    token; K layers have all `tokens` of the prompt, the others those that are `left`.
    """
    config = model.model.language_model.config
    d, m, total = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    if hasattr(config, "moe_intermediate_size"):
        m = config.moe_intermediate_size * config.num_experts_per_tok
    full, pruned = (4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m for n in (tokens, left))
    return (layer * full + (total - layer) * pruned) / (total * full)


def seconds(reading: Reading, settings: Iterable[tuple[int, float] | None]) -> list[float]:
    """Seconds that the decoder takes for the prompt, for each (K, R), and None for the whole image: the least of 3.

    The settings take turns, so that a machine that slows down slows all of them.
    """
    model, settings = reading.model, list(settings)
    prompt, least = reading.inputs["input_ids"].shape[1], [np.inf] * len(settings)
    with borrowed(model), memory_explained(len(reading.positions)):
        given = embed(reading).at(slice(prompt))
        for _ in range(REPEATS):
            for i, setting in enumerate(settings):
                with nullcontext() if setting is None else image_pruned(reading, *setting):
                    _wait(given.embeddings)
                    start = time.perf_counter()
                    _wait(run_decoder(model, given, DynamicCache()))
                    least[i] = min(least[i], time.perf_counter() - start)
    return least


def _wait(tensor: Tensor) -> None:
    """Until what computes the tensor has ended."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


# the table


def _masked(reading: Reading, settings: list[tuple[int, float]], batch_size: int) -> list[bool]:
    """Whether the model would begin with the answer if tokens were masked as by `--keep`, for each (K, R).

    As many are left, those that the answer attends to most in layer K - 1; the others are hidden from what stands
    behind the image only.
    """
    groups, attention = token_groups(reading), attention_flow(reading)
    image, total = groups["image"], len(attention)
    later = np.setdiff1d(np.arange(image[0], groups["answer"][-1] + 1), image)  # other images behind it too
    edges = []
    for layer, removed in settings:
        order = np.argsort(-attention[layer - 1, image], kind="stable")
        edges.append(Edge(range(layer, total), later, np.sort(image[order[kept_count(len(image), removed) :]])))
    return knockout(reading, edges, batch_size=batch_size)[1].all(1).tolist()


def fastv_tables(
    readings: list[Reading], photos: list[str], truths: list[dict], settings: list[tuple[int, float]],
    names: dict[str, str], *, max_new_tokens: int, batch_size: int = 8, progress: Callable = iter,
) -> tuple[dict[str, str], list[str]]:  # fmt: skip
    """({file name: content}, the table in lines) of answers with tokens removed, for each (K, R) of the settings.

    Tokens left, FLOPs and time are means over the questions, those of the decoder for the prompt; "masked" is the
    share of right answers that the masked variant would begin with. Other arguments are those of `answer_tables`.
    """
    model, scored, costs = readings[0].model, [], []
    for reading, photo, truth in progress(list(zip(readings, photos, truths, strict=True))):
        masked = [None] * len(settings)
        if "answer" in truth:
            masked = _masked(reading, settings, batch_size)
        times, tokens = seconds(reading, [None, *settings]), reading.inputs["input_ids"].shape[1]
        for (layer, removed), right, took in zip(settings, masked, times[1:], strict=True):
            with image_pruned(reading, layer, removed) as kept:
                said = said_by(reading, max_new_tokens)
            scores = score(said, truth, names) | ({} if right is None else {"masked": (right, 1)})
            labels = {"layer": layer, "removed": f"{removed:g}"}
            scored.append((reading.prompt, Scored(photo, truth, labels, said, scores)))
            left = len(kept.positions)
            costs.append((labels, left, flops_share(model, layer, tokens, left), took / times[0]))

    def columns(line):
        mine = [cost for labels, *cost in costs if all(line[name] == value for name, value in labels.items())]
        left, flops, took = np.mean(mine, axis=0)
        return {"tokens": round(left), "flops": f"{100 * flops:.0f}", "time": f"{100 * took:.0f}"}

    labels = {name: head for name, head in LABELS.items() if name not in ("hidden_from", "count")} | COLUMNS
    files, lines = score_files("fastv", scored, labels | {"count": LABELS["count"]}, columns, MEASURES | MASKED)
    lines[0] = f"FastV, R % of the image tokens removed from layer K on. {lines[0]}; masked: right answers that are "
    lines[0] += "begun with if as many tokens are only masked, those kept that the answer attends to most"
    return files, lines
