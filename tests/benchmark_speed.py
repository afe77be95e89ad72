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
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import smooth_gradcam as core  # noqa: E402
from smooth_gradcam import compute_token_maps, compute_word_maps, get_model_layers  # noqa: E402


@torch.inference_mode()
def forward_passes(model, processor, image, prompt, answer: str, count: int):
    """`count` plain forward passes of the photo with its answer."""
    inputs = core._prepare_inputs(model, processor, core.load_rgb(image), prompt)
    forced = core._teacher_force(inputs, core._tokenise(processor.tokenizer, answer))
    for _ in range(count):
        model(**forced, use_cache=False)


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
    words = [word.target for word in compute_word_maps(*arguments, [0], use_smooth=False, answer=first.answer)]
    words, layers = list(dict.fromkeys(words)), range(total)
    given = {"num_samples": options.num_samples, "answer": first.answer}
    runs = {
        "forward": lambda: forward_passes(*arguments, first.answer, options.num_samples),
        "layer 0": lambda: compute_token_maps(*arguments, [0], **given),
        "all layers": lambda: compute_token_maps(*arguments, layers, **given),
        "one word": lambda: compute_word_maps(*arguments, layers, words=words[:1], **given),
        "all words": lambda: compute_word_maps(*arguments, layers, words="content", **given),
    }
    seconds = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, measure in runs.items():
            start = time.perf_counter()
            measure()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    count = len(compute_word_maps(*arguments, [0], use_smooth=False, answer=first.answer))
    print(f"{platform.machine()} {options.device}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{first.grid[0]} x {first.grid[1]} image tokens, {options.num_samples} copies, {options.repeats} repeats")
    for name, median in medians.items():
        print(f"{name:>10}: {median:.3f} s  ({min(seconds[name]):.3f} to {max(seconds[name]):.3f})")
    further = (medians["all words"] - medians["one word"]) / (count - 1)
    print(f"all {total} layers / layer 0: {medians['all layers'] / medians['layer 0']:.2f}")
    print(f"each further word of {count} / forward: {further / medians['forward']:.2f}")


if __name__ == "__main__":
    main()
