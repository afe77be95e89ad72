"""Whether a map depends on the model: its similarity as weights are re-drawn layer by layer (Adebayo et al., 2018)."""

import copy
import operator
from collections.abc import Iterable
from dataclasses import replace

import cv2
import numpy as np
import torch
from torch import nn

from common.encoding import decimal
from common.evidence import spearman
from common.families import known
from smooth_gradcam import Reading, TokenMaps, check_whole, explain, get_model_layers, noisy_passes, normalize_cam
from studies.faithfulness import check_same

__all__ = [
    *("cascading_randomization", "randomization_rows", "randomization_verdict", "randomize_weights"),
    *("spearman", "ssim"),
]


def randomize_weights(modules: Iterable[nn.Module], generator: torch.Generator) -> None:
    """Re-draw the weights of the modules in place, each tensor from a normal with its own mean and deviation.

    Raises ValueError for weights that are not floating point, or not in memory.
    """
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        if not parameter.is_floating_point() or parameter.is_meta:
            raise ValueError(f"weights of {parameter.dtype} on {parameter.device} cannot be re-drawn")
        values = parameter.detach().float()
        deviation = values.std(correction=0).item()
        drawn = torch.randn(values.shape, generator=generator) * deviation + values.mean().item()
        parameter.data.copy_(drawn)


def cascading_randomization(
    reading: Reading, token_maps: TokenMaps, *, stages: int = 7, seed: int = 0, progress=None, passes=noisy_passes,
    batch_size: int = 1,
) -> dict[int, TokenMaps]:  # fmt: skip
    """{number of re-drawn decoder layers: maps of the same answer} (Adebayo et al., "Sanity Checks", 2018).

    On a copy of the model, which takes its memory again, weights are re-drawn from the top down: the last decoder layer
    with the norm and, if it is not tied to the embeddings, the head behind it, then further layers, in `stages` even
    steps down to the first; the last step re-draws the vision tower, too. The maps at 0 are `token_maps`. A map that
    depends on what the model has learned changes. Of the method "needed", Grad-CAM's maps of all image tokens are
    compared, also at 0: how many tokens the words need is no property of a map. `progress` wraps the iterable over the
    stages; `passes` and `batch_size` are those of `explain`. Raises ValueError for bad arguments.
    """
    check_whole("stages", stages, 1)
    check_whole("seed", seed, 0)
    check_same(reading, token_maps)
    generator, total = torch.Generator().manual_seed(operator.index(seed)), get_model_layers(reading.model)[1]
    numbers = np.unique(np.round(np.linspace(0, total, min(stages, total) + 1)).astype(int)).tolist()
    settings = token_maps.settings

    def maps_of(reading):
        modules = dict(reading.model.named_modules())
        keys, copies = [modules.get(key, key) for key in token_maps.maps], {"passes": passes, "batch_size": batch_size}
        (maps,) = explain(reading, [token_maps.target_span], keys, settings, **copies)
        return replace(maps, evidence=token_maps.evidence)  # that of the model itself, so that all are drawn alike

    if settings.method == "needed":
        settings = replace(settings, method="gradcam")
        token_maps = replace(token_maps, maps=maps_of(reading).maps, settings=settings)
    model, results = copy.deepcopy(reading.model), {0: token_maps}
    randomized = replace(reading, model=model)
    layers, _ = get_model_layers(model)
    parent = operator.attrgetter("model.language_model" if hasattr(model.model, "language_model") else "model")(model)
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    for before, number in zip(numbers, (progress or iter)(numbers[1:]), strict=False):
        fresh = [] if before else [parent.norm] if tied else [parent.norm, head]
        fresh += layers[total - number : total - before]
        if number == total:
            fresh += [model.model.get_submodule(part) for part in known(model).tower]
        randomize_weights(fresh, generator)
        results[number] = maps_of(randomized)
    return results


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two (H, W) maps, each divided by its maximum: at most 1 (Wang et al., 2004).

    Gaussian window of standard deviation 1.5 and 11 x 11 cells, constants 0.01 and 0.03, data range 1.
    """
    a, b = (normalize_cam(cam).astype(np.float64) for cam in (a, b))

    def mean(x):
        return cv2.GaussianBlur(x, (11, 11), 1.5, borderType=cv2.BORDER_REFLECT)

    a_mean, b_mean = mean(a), mean(b)
    a_variance, b_variance = mean(a * a) - a_mean**2, mean(b * b) - b_mean**2
    covariance = mean(a * b) - a_mean * b_mean
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * a_mean * b_mean + c1) * (2 * covariance + c2)
    return float((similarity / ((a_mean**2 + b_mean**2 + c1) * (a_variance + b_variance + c2))).mean())


def randomization_rows(staged: dict[int, TokenMaps]) -> list[dict]:
    """Similarity of each layer's map at each stage to that of the model itself: rows of randomization.csv."""
    original = staged[0]
    return [
        {
            "redrawn_layers": number,
            "layer": layer,
            "spearman": spearman(cam, token_maps.maps[layer]),
            "ssim": ssim(cam, token_maps.maps[layer]),
        }
        for number, token_maps in staged.items()
        for layer, cam in original.maps.items()
        if layer not in original.blank
    ]


def randomization_verdict(rows: list[dict]) -> str:
    """A sentence on how much of the maps is left when all weights are re-drawn."""
    last = max(row["redrawn_layers"] for row in rows)
    mean = float(np.mean([row["spearman"] for row in rows if row["redrawn_layers"] == last]))
    learned = "the maps depend on what the model has learned"
    conclusion = learned if mean < 0.5 else "note: the maps hardly depend on the model"
    return f"with all weights re-drawn the maps keep a mean rank correlation of {decimal(mean)}: {conclusion}"
