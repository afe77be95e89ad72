"""Does a killed run lose a finished result? python tests/kill_runs.py --times 50

A list of photos is worked off again and again, each time killed (SIGKILL) at a random moment and resumed. After each
kill every result that was whole before must be whole still, with the same bytes, and at the end all are whole.
"""

import argparse
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
from studies.photo_list import key_of, read_list, whole_record, work_off  # noqa: E402

SLOW = 0.01  # seconds that a photo takes


def work(photos: Path, folder: Path, dies_at: str | None = None) -> None:
    """Work off the photos, in as many processes as there are; the one whose turn this photo is kills itself."""

    def explain(item, data):
        time.sleep(SLOW)
        if item.name == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        picture = np.frombuffer(data[:3000].ljust(3000, b" "), np.uint8).reshape(-1, 10, 3)
        return {"name": item.name}, {"a.png": picture, "b.txt": lambda: "text" * 20_000, "c.npz": {"cam": picture}}

    items = read_list([str(photos)])
    work_off(
        items, folder, {}, Processes(cpu=True), lambda item: item.image.read_bytes(), explain, reason_of=str, quiet=True
    )


def whole(photos: Path, folder: Path) -> dict[str, bytes]:
    """The pictures of all results that are whole."""
    items = read_list([str(photos)])
    names = [item.name for item in items if whole_record(folder / item.name, key_of(item, {}))]
    return {name: (folder / name / "a.png").read_bytes() for name in names}


def count_lost(photos: Path, folder: Path, times: int, seed: int) -> int:
    """How many results were lost or changed by so many kills; the run that is not killed must finish all."""
    lost, before, rng, context = 0, {}, random.Random(seed), multiprocessing.get_context("fork")
    for _ in range(times):
        process = context.Process(target=work, args=(photos, folder))
        process.start()
        time.sleep(rng.uniform(0.01, 0.2))
        process.kill()
        process.join()
        after = whole(photos, folder)
        lost += sum(after.get(name) != data for name, data in before.items())
        before = after
    work(photos, folder)
    after = whole(photos, folder)
    lost += sum(after.get(name) != data for name, data in before.items())
    return lost + len(read_list([str(photos)])) - len(after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", nargs="+", help="only work off a folder of photos: PHOTOS OUTPUT [DIES_AT]")
    options = parser.parse_args()
    if options.work:
        photos, folder, *dies_at = options.work
        work(Path(photos), Path(folder), *dies_at)
        return
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        photos.mkdir()
        for i in range(options.photos):
            Image.fromarray(np.full((4, 4, 3), i % 256, np.uint8)).save(photos / f"p{i:03d}.png")
        lost = count_lost(photos, Path(folder, "out"), options.times, options.seed)
    print(f"{options.times} kills, {options.photos} photos: {lost} finished results lost")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
