"""What do all layers cost beside one? python tests/benchmark_speed.py

The pass alone (generation and loading aside), for layer 0 and for all layers, in turns; medians and their ratio.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from smooth_gradcam import compute_token_maps, get_model_layers  # noqa: E402


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
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(options.model_path).to(options.device).eval()
    processor = AutoProcessor.from_pretrained(options.model_path)
    total = get_model_layers(model)[1]
    arguments = model, processor, options.image_path, options.prompt
    first = compute_token_maps(*arguments, [0], use_smooth=False)  # warms up, and gives the answer
    choices = {"layer 0": [0], f"all {total} layers": range(total)}
    seconds = {name: [] for name in choices}
    for _ in range(options.repeats):
        for name, layers in choices.items():
            start = time.perf_counter()
            compute_token_maps(*arguments, layers, num_samples=options.num_samples, answer=first.answer)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{platform.machine()} {options.device}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{first.grid[0]} x {first.grid[1]} image tokens, {options.num_samples} copies, {options.repeats} repeats")
    for name, median in medians.items():
        print(f"{name:>14}: {median:.3f} s  ({min(seconds[name]):.3f} to {max(seconds[name]):.3f})")
    one, every = medians.values()
    print(f"{'ratio':>14}: {every / one:.2f}")


if __name__ == "__main__":
    main()
