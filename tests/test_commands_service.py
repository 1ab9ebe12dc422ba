from __future__ import annotations

import os
import signal
import threading

from autoeff.commands_service import _until_signal


def test_a_signal_stops_whatever_the_main_thread_was_doing() -> None:
    """It may come while that holds the very lock of the event on which it waits."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop = threading.Event()
    try:
        _until_signal(stop.set)
        with stop._cond:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
