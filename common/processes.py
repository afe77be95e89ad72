"""Processes that share a list of items, started by accelerate or torchrun; loading ahead; one progress bar for all."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

from tqdm.auto import tqdm

__all__ = ["Processes", "prefetched", "progress_bar"]


class Processes:
    """The processes that share a list, started by accelerate or torchrun; otherwise this one alone."""

    def __init__(self, cpu: bool):
        from accelerate import PartialState

        self.state = PartialState(cpu=cpu, timeout=timedelta(days=30))  # processes wait for the slowest

    @property
    def first(self) -> bool:
        return self.state.is_main_process

    @property
    def device(self) -> str:
        return str(self.state.device)

    def agreed(self, value):
        """The first process's value, in all of them."""
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0] if self.state.num_processes > 1 else value

    def share(self, items: list) -> list:
        """This process's share of the items."""
        return items[self.state.process_index :: self.state.num_processes]

    def gathered(self, records: dict) -> dict:
        """The records of all processes, once all have finished."""
        from accelerate.utils import gather_object

        if self.state.num_processes == 1:
            return records
        return {name: value for share in gather_object([records]) for name, value in share.items()}


def prefetched(items: Iterable, load: Callable) -> Iterator[tuple]:
    """(item, a function that returns `load(item)`, or raises its error): the next item is loaded in a thread."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            loading = item, pool.submit(load, item)
            if waiting is not None:
                yield waiting[0], waiting[1].result
            waiting = loading
        if waiting is not None:
            yield waiting[0], waiting[1].result


@contextmanager
def progress_bar(items: list, is_done: Callable, quiet: bool):
    """A bar over the items that all processes have finished; `is_done(item)` is called twice a second."""
    finished = threading.Event()
    with tqdm(total=len(items), desc="photos", unit="photo", disable=True if quiet else None) as bar:

        def follow():
            rest = list(items)
            while rest and not finished.wait(0.5):
                rest = [item for item in rest if not is_done(item)]
                bar.update(len(items) - len(rest) - bar.n)

        thread = threading.Thread(target=follow, daemon=True)
        if not bar.disable:
            thread.start()
        try:
            yield
        finally:
            finished.set()
            if thread.ident:
                thread.join()
