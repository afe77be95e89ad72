"""Does each word of an answer light its own object, and no other? python tests/benchmark_words.py

Unseen scenes of two to four objects, described by the demo model; all content words of an answer are explained at once,
from one clean copy. Printed: how often the maximum of an object word's map lies on its object, at most 15 pixels off
it, and on another object of the scene.
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
from studies.localization import localization  # noqa: E402
from studies.words import compute_word_maps  # noqa: E402


def measure(model, processor, number: int, layer: int, **settings) -> list[tuple[float, float, float]]:
    """(on its object, near it, on another one) of each object word of an unseen scene's description."""
    scene = scenes.make_scene(UNSEEN + number)
    masks = {thing.kind: thing.mask for thing in scene.objects}
    image, settings = Image.fromarray(scene.image), {"use_smooth": False} | settings
    rows = []
    for word in compute_word_maps(model, processor, image, scenes.DESCRIBE[0], [layer], **settings):
        if word.target in masks:
            fits = {kind: localization(word.maps[layer], mask) for kind, mask in masks.items()}
            own = fits.pop(word.target)
            rows.append((own["pointing"], own["near"], max(fit["pointing"] for fit in fits.values())))
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model_path", default=str(ROOT / "demo_model"))
    parser.add_argument("--scenes", type=int, default=50)
    parser.add_argument("--layer", type=int, default=16)
    parser.add_argument("--method", default="gradcam")
    options = parser.parse_args()
    model, processor = load_model(options.model_path, "cpu", "auto"), load_processor(options.model_path, 10**9)
    several = (number for number in range(10 * options.scenes) if len(scenes.make_scene(UNSEEN + number).objects) > 1)
    numbers = [number for number, _ in zip(several, range(options.scenes), strict=False)]
    rows = [
        row for number in numbers for row in measure(model, processor, number, options.layer, method=options.method)
    ]
    own, near, other = np.sum(rows, 0).astype(int)
    print(
        f"{len(rows)} object words in {len(numbers)} unseen scenes, {options.method}, layer {options.layer}, ", end=""
    )
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"maximum on the word's own object: {own}; at most 15 pixels off it: {near}; on another object: {other}")


if __name__ == "__main__":
    main()
