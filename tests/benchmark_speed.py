"""What do all layers cost beside one, and a word beside a forward pass? python tests/benchmark_speed.py

The pass alone (generation and loading aside), in turns; medians and their ratios: plain forward passes of the noisy
copies, the map of the answer at layer 0 and at all layers, and the maps of one word and of all content words at all
layers, which share their forward passes.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from smooth_gradcam import Reading, Settings, explain, get_model_layers, read, score_parts  # noqa: E402
from studies.words import choose_words  # noqa: E402
from test_gradcam import load_model, load_processor  # noqa: E402


@torch.inference_mode()
def forward_passes(reading: Reading, count: int):
    """`count` plain forward passes of the photo with its answer."""
    forced, _ = score_parts(reading.inputs, reading.tokens, [range(len(reading.tokens))])
    for _ in range(count):
        reading.model(**forced, use_cache=False).logits[0, -1, 0].item()  # which waits for the device


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model_path", default=str(ROOT / "demo_model"))
    parser.add_argument("--image_path", default=str(ROOT / "demo.jpeg"))
    parser.add_argument("--prompt", default="Describe the main content in this image in detail.")
    parser.add_argument("--num_samples", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    model = load_model(options.model_path, options.device, "auto")
    reading = read(model, load_processor(options.model_path, 10**9), options.image_path, options.prompt)
    answer, words = [(0, len(reading.answer))], choose_words(reading.answer, reading.spans, "content")
    total, settings = get_model_layers(model)[1], Settings(options.num_samples)
    runs = {
        "forward": lambda: forward_passes(reading, options.num_samples),
        "layer 0": lambda: explain(reading, answer, [0], settings),
        "all layers": lambda: explain(reading, answer, range(total), settings),
        "one word": lambda: explain(reading, words[:1], range(total), settings),
        "all words": lambda: explain(reading, words, range(total), settings),
    }
    explain(reading, answer, [0], Settings(use_smooth=False))  # warms up
    seconds = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, measure in runs.items():
            start = time.perf_counter()
            measure()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{platform.machine()} {options.device}, torch {torch.__version__}, transformers {transformers.__version__}")
    height, width = reading.grid
    print(f"{height} x {width} image tokens, {options.num_samples} copies, {options.repeats} repeats")
    for name, median in medians.items():
        print(f"{name:>10}: {median:.3f} s  ({min(seconds[name]):.3f} to {max(seconds[name]):.3f})")
    further = (medians["all words"] - medians["one word"]) / (len(words) - 1)
    print(f"all {total} layers / layer 0: {medians['all layers'] / medians['layer 0']:.2f}")
    print(f"each further word of {len(words)} / forward: {further / medians['forward']:.2f}")


if __name__ == "__main__":
    main()
