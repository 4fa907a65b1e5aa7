"""Progress bars."""

import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


class _Bar(tqdm):
    #: tqdm's lock is a semaphore between processes, which a killed rank leaks
    _lock = threading.RLock()


def progress(items: Sequence[T], what: str, unit: float = 1.0, shown: bool = True) -> Iterator[T]:
    """Iterate with a bar titled ``what`` after 3 seconds; an item has ``unit`` rows."""
    bar = progress_bar(
        total=round(len(items) * unit), desc=what, unit=" rows", delay=3, disable=not shown
    )
    with bar:
        for item in items:
            yield item
            bar.update(unit)


def progress_bar(**options: Any) -> tqdm:
    """Make a tqdm bar that writes few lines into a log file."""
    return _Bar(unit_scale=True, mininterval=0.2 if sys.stderr.isatty() else 10, **options)
