"""Checks of a setting's value; each error names the key."""

import math
from collections.abc import Iterable, Mapping
from typing import Any


def one_of(section: str, settings: Any, allowed: Mapping[str, Iterable[str]]) -> None:
    """Raise ValueError unless each named setting is one of its allowed values."""
    for name, values in allowed.items():
        value = getattr(settings, name)
        if value not in values:
            raise ValueError(f"{section}.{name}: got {value!r}, expected one of {', '.join(map(repr, values))}")


def at_least(section: str, settings: Any, **least: float) -> None:
    """Raise ValueError unless each named setting is a finite number, and not below its least value."""
    for name, low in least.items():
        value = getattr(settings, name)
        if not low <= value < math.inf:
            kind = "" if isinstance(value, int) else "a finite number, "
            raise ValueError(f"{section}.{name}: got {value}, expected {kind}at least {low}")


def within(section: str, settings: Any, **ranges: tuple[float, float]) -> None:
    """Raise ValueError unless each named setting lies in its range, ends included."""
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if not low <= value <= high:
            raise ValueError(f"{section}.{name}: got {value}, expected {low} to {high}")
