"""Progress bars."""

import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Sequence[T], what: str, unit: float = 1.0, shown: bool = True) -> Iterator[T]:
    """Go over items with a progress bar, which appears after a few seconds.

    Args:
        items: to go over.
        what: is being done.
        unit: rows in an item.
        shown: whether there is a bar at all, on this rank.
    """
    bar = progress_bar(
        total=round(len(items) * unit), desc=what, unit=" rows", delay=3, disable=not shown
    )
    with bar:
        for item in items:
            yield item
            bar.update(unit)


def progress_bar(**options: Any) -> tqdm:
    """Make a tqdm bar that writes few lines into a log file."""
    tqdm.set_lock(
        threading.RLock()
    )  # its default lock is a semaphore between processes, which a killed rank leaks
    return tqdm(unit_scale=True, mininterval=0.2 if sys.stderr.isatty() else 10, **options)
