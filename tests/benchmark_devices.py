"""How far are maps on a GPU, or in half precision, from those of the CPU in float32?

    python tests/benchmark_devices.py            # what the machine has

One word of the demo model at all layers, one clean copy, by each method: the largest difference of any layer, as a
share of the layer's maximum; at how many layers the hottest image token is the same; and the seconds of the whole call.
"""

import argparse
import platform
import sys
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import common.attention  # noqa: E402, F401  (adds its methods)
import common.evidence  # noqa: E402, F401
import common.parent  # noqa: E402, F401
from common.checkpoint import load_model, load_processor  # noqa: E402
from smooth_gradcam import METHODS, compute_token_maps  # noqa: E402

PROMPT = "Describe the main content in this image in detail."


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", default="dog")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if gpu else platform.machine()
    print(f"{where}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    print("| | method | largest difference | same hottest token | seconds |\n|---|---|---|---|---|")
    model, processor = str(ROOT / "demo_model"), load_processor(str(ROOT / "demo_model"), 10**9)
    asked = {"layers": range(28), "target": options.target, "use_smooth": False}
    usual = {}
    for device, dtype in [
        ("cpu", "float32"),
        ("cpu", "bfloat16"),
        *[("cuda", t) for t in ("float32", "bfloat16")] * gpu,
    ]:
        loaded = load_model(model, device, dtype)
        for method in (name for name in METHODS if name != "auto"):
            start = time.perf_counter()
            maps = compute_token_maps(loaded, processor, ROOT / "demo.jpeg", PROMPT, method=method, **asked).maps
            seconds = time.perf_counter() - start
            first = usual.setdefault(method, maps)
            worst = max(abs(first[k] - maps[k]).max() / first[k].max() for k in first if first[k].any())
            same = sum(first[k].argmax() == maps[k].argmax() for k in first)
            print(
                f"| {device} {dtype} | `{method}` | {worst:.2g} | {same} of {len(first)} | {seconds:.1f} |", flush=True
            )


if __name__ == "__main__":
    main()
