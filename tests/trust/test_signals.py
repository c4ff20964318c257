"""What stops a program, by hand or by a scheduler, is heeded while a stage trains and given back afterwards."""

import os
import signal

import pytest

from compressft.run.progress import _on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_signals_reach_the_handler_and_are_given_back(number):
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    seen = []
    earlier = _on_signals(lambda got, frame: seen.append(got))
    try:
        os.kill(os.getpid(), number)
    finally:
        for one, handler in earlier.items():
            signal.signal(one, handler)
    assert seen == [number] and earlier == before
    assert {one: signal.getsignal(one) for one in before} == before
