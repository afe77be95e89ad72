"""Progress bars, and forecasts of how long slow runs will take.

Shapes:  P  tokens of photo and prompt     A  answer tokens
"""

import functools
import time
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm

from common.terminal import say
from smooth_gradcam import Reading, Settings, borrowed, compute_logits, hooked, memory_explained, score_parts

__all__ = ["answer_progress", "forecast_copies", "show_progress"]

LONG = 4096  # tokens above which a sequence is slow enough for a forecast
BACKWARD = 2  # time of a backward pass through all layers, in forward passes


def show_progress(quiet: bool, label: str = "noisy copies", unit: str = "copy"):
    """A function that wraps an iterable in a tqdm bar, silent if `quiet` or where stderr is not a terminal."""
    return functools.partial(tqdm, desc=label, unit=unit, leave=False, disable=True if quiet else None)


@contextmanager
def answer_progress(model, quiet: bool, max_new_tokens: int):
    """Inside, a bar counts the tokens of the model's answer; a long prompt is announced before the model reads it."""
    with show_progress(quiet, "answer", "token")(total=max_new_tokens) as bar:

        def announce(module, args, kwargs):
            if not quiet and (length := kwargs["input_ids"].shape[1]) > LONG:
                say(f"reading {length:,} tokens of photo and prompt before the answer's first: this takes a while")

        def count(*_):  # returns None: a value would replace the output
            bar.update()

        before = model.register_forward_pre_hook(announce, with_kwargs=True)
        with hooked([before, model.register_forward_hook(count)]):
            yield


def forecast_copies(reading: Reading, settings: Settings, parts: int = 1, methods: int = 1) -> None:
    """Print how long the copies of a long sequence will take: each is a forward pass, and a backward pass per part.

    `parts` are those of the answer that are explained, `methods` how often all copies are computed.
    """
    length = reading.inputs["input_ids"].shape[1] + len(reading.tokens)  # P + A
    if length <= LONG:
        return
    forced, (scored,) = score_parts(reading.inputs, reading.tokens, [[len(reading.tokens) - 1]])
    with borrowed(reading.model), memory_explained(len(reading.positions)):
        start = time.monotonic()
        with torch.no_grad():
            compute_logits(reading.model, forced, min(scored.predicting))
    each = (time.monotonic() - start) * (1 + BACKWARD * parts) * (1 if settings.contrast is None else 2)
    copies = methods * settings.num_samples
    say(f"expected: {copies} noisy copies of {length:,} tokens, {each:.0f} s each: about {copies * each:.0f} seconds")
