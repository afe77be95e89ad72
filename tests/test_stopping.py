"""Signals end a run whatever a library makes of the exception."""

import signal

import pytest

import common.stopping
from common.stopping import stoppable

pytestmark = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture(autouse=True)
def usual():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signal_ends_the_run_with_its_code(number):
    with pytest.raises(SystemExit) as stopped, stoppable():
        signal.raise_signal(number)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == signal.SIG_DFL


def test_signal_that_was_swallowed_comes_again(number, monkeypatch):
    monkeypatch.setattr(common.stopping, "AGAIN", 0.01)

    class Swallowing:
        def __del__(self):
            try:
                signal.raise_signal(number)
            except SystemExit:
                swallowed.append(number)

    def run(came):
        Swallowing()  # destroyed at once
        while len(came) < 3:
            pass

    swallowed = []
    with pytest.raises(SystemExit) as stopped, stoppable() as came:
        run(came)
    assert (stopped.value.code, swallowed) == (128 + number, [number])
    assert came == [number] * 2


def test_later_exception_is_known_to_follow_a_signal(number):
    with stoppable() as came:
        try:
            signal.raise_signal(number)
        except SystemExit as exc:
            wrapped = ValueError("as a library may turn it into another exception")
            wrapped.__cause__ = exc
        assert came == [number]
