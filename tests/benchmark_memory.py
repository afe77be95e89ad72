"""What does a run of the command line take of a large checkpoint, in time and memory?

    OMP_WAIT_POLICY=passive OMP_NUM_THREADS=2 python tests/benchmark_memory.py --model_path MODEL
    python tests/benchmark_memory.py --model_path MODEL --device cuda

(with the first, a thread that waits for another one takes no processor time, whatever else runs on the machine).

Each row runs `test_gradcam.py` as a process of its own, from the start of Python to the written files: one
clean copy of demo.jpeg, made smaller, with a given answer of which one word is explained. Printed are the image tokens,
the processor's seconds (user and system), the wall's, and two peaks in GiB: "resident" is all memory that is in the
process at once, as the kernel counts it; "own" leaves out files that are only mapped, such as the weights in the
folder, which the kernel can drop and read again. On a GPU, "GPU" is the most that torch had reserved of its memory, to
which CUDA's own half gigabyte or so comes. `load` is the model alone, which every other row contains.

Linux only. Random weights will do: every pass takes what it takes with trained ones. Only the number of passes in which
the method "needed", the default for a word, hides image tokens depends on the values.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
ANSWER, WORD = "There is a dog on the grass.", "dog"
SIDE = 28  # pixels of an image token
SIZES = {0.05: (9, 7), 0.2: (18, 14), 0.4: (26, 20)}  # megapixels: image tokens across and down
LOAD = "import sys; from common.checkpoint import load_model as load; load(*sys.argv[1:])"
ON_GPU = "import atexit, sys, torch; atexit.register(lambda: print('GPU', torch.cuda.max_memory_reserved()))\n"
DRIVER = "import runpy; runpy.run_path('test_gradcam.py', run_name='__main__')"
TARGET, CLEAN = ["--target", WORD], ["--noise_std", "0"]
EVERY = 0.1  # seconds between two looks at a process


class Row(NamedTuple):
    """A run: its mode, "load" for none, what stands in the table, the photo, and further flags."""

    mode: str
    layers: str
    photo: float | str  # megapixels, or a name of MANY
    flags: list[str]


ROWS = {
    "load": Row("load", "", 0, []),
    "single": Row("single", "the middle one", 0.05, TARGET + CLEAN),
    "grid": Row("grid", "6", 0.05, TARGET + CLEAN),
    "multi": Row("multi", "6", 0.05, TARGET + CLEAN),
    "comparative": Row("comparative", "9", 0.05, TARGET + CLEAN),
    "words": Row("words", "6, 2 words", 0.05, CLEAN),
    "evaluate": Row("evaluate", "the middle one, 4 steps", 0.05, [*TARGET, *CLEAN, "--layers", "18", "--steps", "4"]),
    "flow": Row("flow", "all", 0.05, TARGET + CLEAN),
    "knockout": Row("knockout", "all", 0.05, TARGET),
}
for size in SIZES:
    for name, layers in {"1": "0", "6": "auto", "36": "all"}.items():
        ROWS[f"{name}@{size}"] = Row("grid", name, size, [*TARGET, *CLEAN, "--layers", layers])
    for name in ("recompute", "gradcam", "attention"):
        flags = ["--recompute"] if name == "recompute" else ["--method", name]
        shown = f"36, `{' '.join(flags)}`"
        ROWS[f"{name}@{size}"] = Row("grid", shown, size, [*TARGET, *CLEAN, "--layers", "all", *flags])
MANY = {"1k": (32, 32), "4k": (64, 64), "16k": (128, 128)}  # image tokens
for size, name in itertools.product(MANY, ("needed", "recompute", "gradcam", "attention")):
    flags = ["--method", "gradcam", "--recompute"] if name == "recompute" else ["--method", name]
    shown, flags = f"all, `{' '.join(flags)}`", [*flags, *TARGET, *CLEAN, "--layers", "all"]
    ROWS[f"{name}@{size}"] = Row("grid", shown, size, flags)


class Cost(NamedTuple):
    """What a process took."""

    processor: float  # seconds
    wall: float  # seconds
    resident: float  # GiB
    own: float  # GiB
    gpu: float  # GiB, nan without one


def watch(pid: int, own: list[int], ended: threading.Event) -> None:
    """Append the process's own memory in KiB, now and then until it has ended."""
    while not ended.wait(EVERY):
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        own += [int(line.split()[1]) for line in lines if line.startswith("RssAnon")]


def cost_of(command: list[str], log: Path) -> Cost:
    """Run the command, and wait for it alone. Raises RuntimeError, with its last lines, if it fails."""
    own, ended, start = [0], threading.Event(), time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
    looking = threading.Thread(target=watch, args=(process.pid, own, ended))
    looking.start()
    _, status, usage = os.wait4(process.pid, 0)
    ended.set()
    looking.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
    wall = time.perf_counter() - start
    reserved = [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("GPU ")]
    gpu = reserved[-1] / 2**30 if reserved else float("nan")
    return Cost(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / 2**20, max(own) / 2**20, gpu)


def command_of(row: Row, model_path: str, device: str, dtype: str, photo: Path, folder: Path) -> list[str]:
    counted = ON_GPU if device.startswith("cuda") else ""
    if row.mode == "load":
        return [sys.executable, "-c", counted + LOAD, model_path, device, dtype]
    command = [sys.executable, "-c", counted + DRIVER, "--mode", row.mode, "--model_path", model_path]
    command += ["--device", device, "--dtype", dtype, "--image_path", str(photo), "--answer", ANSWER]
    return [*command, "--output_dir", str(folder), "--quiet", *row.flags]


def without_cap(model_path: str, folder: Path) -> str:
    """A copy of the demo model whose processor lets photos of any size through; published models let 16k tokens."""
    if Path(model_path).resolve() != ROOT / "demo_model":
        return model_path
    shutil.copytree(model_path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "list", "objects"))
    path = folder / "preprocessor_config.json"
    config = json.loads(path.read_text())
    config |= {"max_pixels": 10**8, "size": config["size"] | {"longest_edge": 10**8}}
    path.write_text(json.dumps(config))
    return str(folder)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=" ".join(ROWS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output_dir", help="where files and reports of the runs are kept; else they are deleted")
    options = parser.parse_args()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    where = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else platform.machine()
    print(f"{where}, {threads} threads, Python {platform.python_version()}, {versions}, {options.dtype}\n")
    print("| row | mode | layers | image tokens | processor s | wall s | GiB resident | GiB own | GiB GPU |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.output_dir or temporary).resolve()
        for name in options.rows:
            row, place = ROWS[name], folder / name
            place.mkdir(parents=True, exist_ok=True)
            across, down = (SIZES | MANY).get(row.photo, (0, 0))
            photo, model_path = Path(temporary, f"{row.photo}.png"), options.model_path
            if across:
                Image.open(ROOT / "demo.jpeg").resize((across * SIDE, down * SIDE)).save(photo)
            if row.photo in MANY:
                model_path = without_cap(model_path, Path(temporary, "model"))
            command = command_of(row, model_path, options.device, options.dtype, photo, place)
            command += ["--max_pixels", str(10**8)] * (row.photo in MANY)
            cost = cost_of(command, place / "report.txt")
            numbers = f"{cost.processor:.0f} | {cost.wall:.0f} | {cost.resident:.1f} | {cost.own:.1f} | {cost.gpu:.1f}"
            print(f"| {name} | {row.mode} | {row.layers} | {across * down} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
