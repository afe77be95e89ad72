"""How far a run is: bars, and how long what is slow will take.

Shapes:  P  tokens of photo and prompt     A  answer tokens
"""

import functools
import time
from contextlib import contextmanager

from tqdm.auto import tqdm

from common.passes import token_probabilities
from common.terminal import say
from smooth_gradcam import Reading, Settings, borrowed, hooked, memory_explained, score_parts

__all__ = ["answer_progress", "forecast_copies", "show_progress"]

LONG = 4096  # tokens from which on a sequence is slow enough for a forecast
BACKWARD = 2  # forward passes that a backward pass through all layers takes the time of


def show_progress(quiet: bool, what: str = "noisy copies", unit: str = "copy"):
    """A tqdm bar, silent if `quiet` or where stderr is no terminal."""
    return functools.partial(tqdm, desc=what, unit=unit, leave=False, disable=True if quiet else None)


@contextmanager
def answer_progress(model, quiet: bool, max_new_tokens: int):
    """Inside, a bar shows the tokens that the model answers with; a long prompt is announced before it is read."""
    with show_progress(quiet, "answer", "token")(total=max_new_tokens) as bar:

        def announce(module, args, kwargs):
            if not quiet and (length := kwargs["input_ids"].shape[1]) > LONG:
                say(f"reading {length:,} tokens of photo and prompt before the answer's first: this takes a while")

        def count(*_):  # what a hook returns would take the place of the output
            bar.update()

        before = model.register_forward_pre_hook(announce, with_kwargs=True)
        with hooked([before, model.register_forward_hook(count)]):
            yield


def forecast_copies(reading: Reading, settings: Settings, parts: int = 1, methods: int = 1) -> None:
    """Say how long the copies of a long sequence will take, each a forward and a backward pass of each part."""
    length = reading.inputs["input_ids"].shape[1] + len(reading.tokens)  # P + A
    if length <= LONG:
        return
    forced, (scored,) = score_parts(reading.inputs, reading.tokens, [[len(reading.tokens) - 1]])
    with borrowed(reading.model), memory_explained(len(reading.positions)):
        start = time.monotonic()
        token_probabilities(reading.model, forced, reading.inputs["pixel_values"][None], scored)
    each = (time.monotonic() - start) * (1 + BACKWARD * parts) * (1 if settings.contrast is None else 2)
    copies = methods * settings.num_samples
    say(f"expected: {copies} noisy copies of {length:,} tokens, {each:.0f} s each: about {copies * each:.0f} seconds")
