"""What do maps cost beside a forward pass, in seconds and in memory? python tests/benchmark_speed.py

The pass alone (generation and loading aside), in turns; medians of the seconds a noisy copy takes, and the most memory
beyond what was there before: plain forward passes of the same copies, and the map of the answer at the first layer, at
six and at all, of which each has one copy at a time (1), four at a time (4), and one at a time with
activations recomputed; without noise at all layers, with what the vision tower gave for the answer, and with a pass of
its own. Of the demo model also the maps of one word and of all content words at all layers, which share their forwards.

`--shape` builds a Qwen2.5-VL of the published sizes in the place of the model, with random weights and the demo model's
vocabulary: a pass costs the same, but for the few positions that are read.
"""

import argparse
import ctypes
import functools
import gc
import platform
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from common.checkpoint import load_model, load_processor  # noqa: E402
from common.passes import recomputed, vision_kept  # noqa: E402
from smooth_gradcam import Reading, Settings, explain, get_model_layers, read, score_parts  # noqa: E402
from studies.words import choose_words  # noqa: E402
from visualization_utils import spread  # noqa: E402

ANSWER = "There is a plane at the top left, a house on the right and a dog at the bottom left."
SHAPES = {  # of the decoder: channels, gate, layers, heads, key heads; of the published 3B and 7B, and of Qwen2.5-0.5B
    "0.5B": (896, 4864, 24, 14, 2),
    "3B": (2048, 11008, 36, 16, 2),
    "7B": (3584, 18944, 28, 28, 4),
}


def random_model(shape: str, device: str):
    """A Qwen2.5-VL of this size with the demo model's vocabulary: bfloat16 on a GPU, else float32."""
    config = transformers.Qwen2_5_VLConfig.from_pretrained(ROOT / "demo_model")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    kept = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    text = {name: getattr(config.text_config, name) for name in kept} | dict(zip(names, SHAPES[shape], strict=True))
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [16, 24, 24]}
    if shape == "0.5B":
        text["rope_scaling"]["mrope_section"] = [8, 12, 12]  # heads of 64 channels
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window_size": 112}
    vision |= {"fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": text["hidden_size"], "patch_size": 14}
    ids = {name: getattr(config, name) for name in vars(config) if name.endswith("token_id")}
    sized = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device.startswith("cuda") else torch.float32)
    with torch.device(device):
        model = transformers.Qwen2_5_VLForConditionalGeneration(sized).eval()
    torch.set_default_dtype(torch.float32)
    return model


@torch.inference_mode()
def forward_passes(reading: Reading, count: int):
    """`count` plain forward passes of the photo with its answer."""
    forced, _ = score_parts(reading.inputs, reading.tokens, [range(len(reading.tokens))])
    for _ in range(count):
        reading.model(**forced, use_cache=False).logits[0, -1, 0].item()  # which waits for the device


def memory(device: str, what: str) -> float:
    """GiB in use ("now"), or the most since the last "now"; nan where nobody counts."""
    if device.startswith("cuda"):
        if what == "now":
            torch.cuda.reset_peak_memory_stats(device)
            return torch.cuda.memory_allocated(device) / 2**30
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device != "cpu" or not Path("/proc/self/clear_refs").exists():
        return float("nan")
    if what == "now":
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free goes back, or it would hide in the difference
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    name = "VmRSS" if what == "now" else "VmHWM"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 2**20


def explain_in(inside, reading: Reading, spans, layers, settings: Settings, batch_size: int, times: int = 1):
    """The maps, so many times, in a context of the model."""
    with inside(reading.model):
        for _ in range(times):
            explain(reading, spans, layers, settings, batch_size=batch_size)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--shape", choices=("demo", *SHAPES), default="demo", help="but for demo: random weights")
    parser.add_argument("--model_path", default=str(ROOT / "demo_model"))
    parser.add_argument("--image_path", default=str(ROOT / "demo.jpeg"))
    parser.add_argument("--prompt", default="Describe the main content in this image in detail.")
    parser.add_argument("--max_pixels", type=int, default=10**9)
    parser.add_argument("--num_samples", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device, shaped = options.device, options.shape != "demo"
    model = random_model(options.shape, device) if shaped else load_model(options.model_path, device, "auto")
    processor = load_processor(options.model_path, options.max_pixels)
    reading = read(model, processor, options.image_path, options.prompt, ANSWER if shaped else None)
    answer, words = [(0, len(reading.answer))], choose_words(reading.answer, reading.spans, "content")
    total, settings = get_model_layers(model)[1], Settings(options.num_samples)
    layers = {"one layer": [0], "six layers": spread(range(total), 6), "all layers": range(total)}
    ways = {"1": (nullcontext, 1), "4": (nullcontext, 4), "1, recomputed": (recomputed, 1)}
    runs = {("forward", ""): lambda: forward_passes(reading, options.num_samples)}
    for name, chosen in layers.items():
        for way, (inside, size) in ways.items():
            runs[name, way] = functools.partial(explain_in, inside, reading, answer, chosen, settings, size)
    clean = Settings(use_smooth=False)
    for way, inside in {"1": vision_kept, "1, vision tower again": nullcontext}.items():
        runs["without noise", way] = functools.partial(
            explain_in, inside, reading, answer, range(total), clean, 1, options.num_samples
        )
    if not shaped:
        runs["one word", "4"] = lambda: explain(reading, words[:1], range(total), settings, batch_size=4)
        runs["all words", "4"] = lambda: explain(reading, words, range(total), settings, batch_size=4)
    explain(reading, answer, [0], Settings(use_smooth=False))  # warms up
    seconds, peaks = {run: [] for run in runs}, dict.fromkeys(runs, float("nan"))
    for _ in range(options.repeats):
        for run, measure in runs.items():
            before, start = memory(device, "now"), time.perf_counter()
            measure()
            seconds[run].append((time.perf_counter() - start) / options.num_samples)
            peaks[run] = memory(device, "most") - before
    medians = {run: statistics.median(values) for run, values in seconds.items()}
    plain = medians["forward", ""]
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{platform.machine()} {device}"
    print(f"{where}, torch {torch.__version__}, transformers {transformers.__version__}")
    height, width = reading.grid
    print(f"{options.shape}, {model.dtype}, {height} x {width} image tokens, {options.num_samples} copies")
    print(f"{options.repeats} repeats\n")
    print("| | at once | seconds a copy | forwards | GiB |\n|---|---|---|---|---|")
    for (name, way), median in medians.items():
        print(f"| {name} | {way} | {median:.3f} | {median / plain:.1f} | {peaks[name, way]:.2f} |")
    if not shaped:
        further = (medians["all words", "4"] - medians["one word", "4"]) / (len(words) - 1)
        print(f"\neach further word of {len(words)} / forward: {further / plain:.2f}")


if __name__ == "__main__":
    main()
