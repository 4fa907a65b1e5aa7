"""Handlers of SIGTERM."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_sigterm(handle: Callable[[], object]) -> Iterator[None]:
    """Call ``handle`` when SIGTERM comes within the block; does nothing off the main thread."""
    if threading.current_thread() is not threading.main_thread():  # signals need the main thread
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: handle())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
