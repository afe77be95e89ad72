"""The driver in processes of its own, forked from one that has imported torch: an import takes seconds, a fork none."""

import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

DRIVER = str(Path(__file__).parent.parent / "test_gradcam.py")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["test_gradcam", "studies.photo_list", "accelerate"])


def write_to(number: int, place: str) -> None:
    """What the process writes to this file descriptor goes to a file, or to "nobody", a pipe whose end is closed."""
    if place == "nobody":
        unread, to = os.pipe()
        os.close(unread)
    else:
        to = os.open(place, os.O_WRONLY | os.O_CREAT)
    os.dup2(to, number)
    os.close(to)


def drive(flags: list[str], stdout: str, stderr: str) -> None:
    """`python test_gradcam.py FLAGS`, written to two files; stdout may be "closed" or "nobody" too."""
    import torch

    torch.set_num_threads(1)
    write_to(2, stderr)
    if stdout == "closed":
        os.close(1)
        sys.stdout = None
    else:
        write_to(1, stdout)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  (as a new process has it)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [DRIVER, *flags]
    runpy.run_path(DRIVER, run_name="__main__")


def start(function, *args, **env: str):
    """A process that runs a function of this folder's modules with these environment variables."""
    process = CONTEXT.Process(target=run, args=(function, args, env))
    process.start()
    return process


def run(function, args, env) -> None:
    os.environ.update(env)
    function(*args)
