"""Do the maps point at the object that a word names? python tests/benchmark_localization.py

On scenes the demo model has never seen, every object word of its own answer is explained at every decoder layer, with
both methods and both scores. Printed by layer: the pointing game (the map's maximum lies on the object's pixels) and
the energy (share of the map inside them), for maps upsampled to the scene. Chance is what a flat map would score.
"""

import argparse
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo_model")]
import scenes  # noqa: E402
from evaluate import UNSEEN  # noqa: E402

from smooth_gradcam import METHODS, SCORES, compute_token_maps, get_model_layers, upsample_cam  # noqa: E402


def on_object(cam: np.ndarray, mask: np.ndarray) -> tuple[bool, float]:
    """(pointing, energy) of a raw map (H, W) for a mask (height, width) of pixels; a map of zeros scores nothing."""
    heat = upsample_cam(cam, mask.shape)
    if not heat.any():
        return False, 0.0
    return bool(mask.flat[heat.argmax()]), float(heat[mask].sum() / heat.sum())


def measure(model, processor, count: int, **settings):
    """{(score, method): (words, layers, 2) pointing and energy}, the chance level, and the words missed."""
    layers = range(get_model_layers(model)[1])
    rows = {(score, method): [] for score in SCORES for method in METHODS}
    chance, missed = [], 0
    for number in range(count):
        scene = scenes.make_scene(UNSEEN + number)
        image, prompt = Image.fromarray(scene.image), scenes.DESCRIBE[0]
        answer = compute_token_maps(model, processor, image, prompt, [-1], use_smooth=False).answer
        for thing in scene.objects:
            if f" {thing.kind} " not in answer:
                missed += 1
                continue
            chance.append(thing.mask.mean())
            for score, method in rows:
                chosen = {"answer": answer, "target": thing.kind, "score": score, "method": method}
                result = compute_token_maps(model, processor, image, prompt, layers, **chosen, **settings)
                rows[score, method].append([on_object(result.maps[layer], thing.mask) for layer in layers])
    return {key: np.array(values, float) for key, values in rows.items()}, np.mean(chance), missed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model_path", default=str(ROOT / "demo_model"))
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--num_samples", type=int, default=1, help="noisy copies")
    parser.add_argument("--noise_std", type=float, default=0.0, help="0 is plain Grad-CAM")
    options = parser.parse_args()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(options.model_path).eval()
    processor = AutoProcessor.from_pretrained(options.model_path)
    start = time.perf_counter()
    noise = {"num_samples": options.num_samples, "noise_std": options.noise_std}
    rows, chance, missed = measure(model, processor, options.scenes, **noise)
    words = len(next(iter(rows.values())))
    print(f"{words} words in {options.scenes} scenes ({missed} objects not named), {options}")
    print(f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}", end=", ")
    print(f"{time.perf_counter() - start:.0f} s; chance: {chance:.3f}")
    print("layer  " + "  ".join(f"{score + ' ' + method:>16}" for score, method in rows) + "   (pointing energy)")
    for layer in range(next(iter(rows.values())).shape[1]):
        means = (values[:, layer].mean(0) for values in rows.values())
        print(f"{layer:5d}  " + "  ".join(f"{pointing:9.3f} {energy:6.3f}" for pointing, energy in means))


if __name__ == "__main__":
    main()
