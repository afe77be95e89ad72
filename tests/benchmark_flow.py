"""Where is a photo read, and do its maps tell? python tests/benchmark_flow.py

Unseen scenes, described by the model itself. Of every object word whose probability falls by more than 0.2 when the
image is hidden from all layers: its cliff (the first layer from which on hiding the image keeps 95 % of the
probability, wherever hiding begins), where its map stops pointing at its object, and where the image's share in
|gradient x input| has fallen to half of what it is at the first layer. Printed: their means, and Spearman's rank
correlation of the cliff with each, over the scenes (mean over a scene's words) and over the words.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo_model")]
import scenes  # noqa: E402
from evaluate import UNSEEN  # noqa: E402

from common.checkpoint import load_model, load_processor  # noqa: E402
from smooth_gradcam import Settings, read  # noqa: E402
from studies.decoder import token_groups  # noqa: E402
from studies.flow import group_sums, maps_and_gradients  # noqa: E402
from studies.knockout import find_cliff, sever_photo, tokens_that_need_the_photo  # noqa: E402
from studies.localization import localization  # noqa: E402
from studies.randomization import randomize_weights, spearman  # noqa: E402

MEASURES = ("cliff", "stops pointing", "gradient share halved", "strength halved")


def last_above(values: np.ndarray, limit: float) -> int:
    """The layer behind the last one whose value is above the limit."""
    return int(np.flatnonzero(values > limit)[-1]) + 1 if (values > limit).any() else 0


def measure(model, processor, number: int, size, settings: Settings) -> list[tuple[int, ...]]:
    """MEASURES of each object word of a scene that needs the photo and has a cliff."""
    scene = scenes.make_scene(UNSEEN + number, size=size)
    reading = read(model, processor, Image.fromarray(scene.image), scenes.DESCRIBE[0], None, 64)
    severed, rows = sever_photo(reading, batch_size=16), []
    needed, groups = set(tokens_that_need_the_photo(severed.removed)), token_groups(reading)
    for thing in scene.objects:
        start = reading.answer.find(thing.kind)
        span = start, start + len(thing.kind)
        tokens = reading.tokens_of(span) if start >= 0 else []
        cliff = find_cliff(severed.removed[:, tokens].mean(1)) if needed & set(tokens) else None
        if cliff is None:
            continue
        (maps,), gradient = maps_and_gradients(reading, span, settings)
        pointing = np.array([localization(cam, thing.mask)["near"] for cam in maps.maps.values()])
        share, strength = group_sums(gradient, groups)["image"], gradient[:, groups["image"]].sum(1)
        rows.append(
            (
                cliff,
                last_above(pointing, 0.5),
                last_above(share, share[0] / 2),
                last_above(strength, strength[0] / 2),
            )
        )
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model_path", default=str(ROOT / "demo_model"))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--scenes", type=int, default=50)
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of every scene, in pixels")
    parser.add_argument("--method", default="gradcam")
    parser.add_argument("--random", action="store_true", help="with the weights of all decoder layers re-drawn")
    options = parser.parse_args()
    model, processor = load_model(options.model_path, "cpu", options.dtype), load_processor(options.model_path, 10**9)
    if options.random:
        randomize_weights(model.model.language_model.layers, torch.Generator().manual_seed(0))
    settings = Settings(use_smooth=False, method=options.method)
    found = [measure(model, processor, number, options.size, settings) for number in range(options.scenes)]
    words = np.array([row for rows in found for row in rows])
    photos = np.array([np.mean(rows, 0) for rows in found if rows])
    versions = f"{model.dtype}, torch {torch.__version__}, transformers {transformers.__version__}"
    count = f"{len(words)} object words with a cliff in {len(photos)} of {options.scenes} scenes"
    print(f"{count}, {options.method}, {versions}")
    for i, name in enumerate(MEASURES if len(words) else ()):
        quartiles = np.percentile(words[:, i], (25, 50, 75))
        line = f"{name:22s} quartiles of the words at layer " + ", ".join(f"{value:.0f}" for value in quartiles)
        if i:
            correlation = spearman(photos[:, 0], photos[:, i]), spearman(words[:, 0], words[:, i])
            line += "; rank correlation with the cliff {:.2f} over scenes, {:.2f} over words".format(*correlation)
        print(line)


if __name__ == "__main__":
    main()
