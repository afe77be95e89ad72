"""Ctrl-C and SIGTERM end a run wherever it is, even in a library that swallows the exception they raise."""

import _thread
import signal
import threading
from contextlib import contextmanager

__all__ = ["stoppable"]

AGAIN = 2.0  # seconds until a signal is delivered again


@contextmanager
def stoppable():
    """Inside, SIGINT and SIGTERM raise SystemExit(128 + their number), again and again until it is left.

    Yields the list of the signals that came: an exception that follows one may be what a library made of it. Behind it
    they end the process at once. To be used in the main thread.
    """
    came, timers = [], []

    def stop(number, frame):
        came.append(number)
        timer = threading.Timer(AGAIN, _thread.interrupt_main, [number])  # a destructor, for one, swallows it
        timer.daemon = True
        timers.append(timer)
        timer.start()
        raise SystemExit(128 + number)

    signals = signal.SIGINT, signal.SIGTERM
    try:
        for number in signals:
            signal.signal(number, stop)
        yield came
    finally:
        for timer in timers:
            timer.cancel()
        for number in signals:
            signal.signal(number, signal.SIG_DFL)
