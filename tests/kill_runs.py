"""Does a killed run lose a finished result? python tests/kill_runs.py --times 50 [--overwrite]

A list of photos is worked off again and again, each time killed (SIGKILL) at a random moment and resumed. After each
kill every result that was complete before must be so still, with the same bytes, and at the end all are complete. With
--overwrite all are complete from the start, and each run computes them anew: each result is then that of one run.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent.parent)]
from common.processes import Processes  # noqa: E402
from studies.photo_list import plan, read_list, work_off  # noqa: E402

SLOW = 0.01  # seconds that a photo takes


def work(photos: Path, folder: Path, dies_at: str | None = None, run: int = 0) -> None:
    """Work off the photos, in as many processes as there are; the one whose turn this photo is kills itself.

    A `run` after the first computes them anew, and leaves its number in each file.
    """

    def explain(item, data):
        time.sleep(0 if run else SLOW)
        if item.name == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        picture = np.frombuffer(data[:2997].ljust(2997, b" ") + bytes([run] * 3), np.uint8).reshape(-1, 10, 3)
        files = {"a.png": picture, "b.txt": lambda: f"{run:03d} " * 20_000, "c.npz": {"cam": picture}}
        return {"name": item.name, "run": run}, files

    items, load = read_list([str(photos)]), lambda item: item.image.read_bytes()
    options = {"reason_of": str, "quiet": True, "overwrite": bool(run)}
    work_off(items, folder, {}, Processes(cpu=True), load, explain, **options)


def complete(photos: Path, folder: Path) -> dict[str, bytes]:
    """The pictures of all results that are complete, and of one run."""
    items = read_list([str(photos)])
    todo = [item.name for item in plan(items, folder, {}, overwrite=False)[1]]
    found = {}
    for part in (folder / item.name for item in items if item.name not in todo):
        with np.load(part / "c.npz") as file:
            runs = {int(file["cam"].ravel()[-1]), int(np.asarray(Image.open(part / "a.png")).ravel()[-1])}
        runs |= {int(word) for word in (part / "b.txt").read_text().split()}
        if runs == {json.loads((part / "result.json").read_text())["run"]}:
            found[part.name] = (part / "a.png").read_bytes()
    return found


def count_lost(photos: Path, folder: Path, times: int, seed: int, overwrite: bool = False) -> int:
    """How many results were lost or changed by so many kills; the run that is not killed must finish all."""
    lost, before, rng, context = 0, {}, random.Random(seed), multiprocessing.get_context("fork")
    if overwrite:
        work(photos, folder)
    for run in range(1, times + 1):
        process = context.Process(target=work, args=(photos, folder, None, run if overwrite else 0))
        process.start()
        time.sleep(rng.uniform(0.01, 0.2))
        process.kill()
        process.join()
        after = complete(photos, folder)
        lost += sum(name not in after or (not overwrite and after[name] != data) for name, data in before.items())
        before = after
    work(photos, folder)
    after = complete(photos, folder)
    lost += sum(after.get(name) != data for name, data in before.items())
    return lost + len(read_list([str(photos)])) - len(after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="compute complete results anew")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        photos.mkdir()
        for i in range(options.photos):
            Image.fromarray(np.full((4, 4, 3), i % 256, np.uint8)).save(photos / f"p{i:03d}.png")
        lost = count_lost(photos, Path(folder, "out"), options.times, options.seed, options.overwrite)
    print(f"{options.times} kills, {options.photos} photos: {lost} finished results lost")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
