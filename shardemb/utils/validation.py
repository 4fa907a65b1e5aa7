"""Checks of settings; each error names the key."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from shardemb.exceptions import InputError


def one_of(section: str, settings: Any, allowed: Mapping[str, Iterable[Any]]) -> None:
    """Raise ValueError unless each named setting is one of its allowed values."""
    for name, values in allowed.items():
        choice(f"{section}.{name}", getattr(settings, name), values)


def choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raise ValueError unless a setting is one of its allowed values."""
    if value not in allowed:
        raise InputError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}")


def at_least(section: str, settings: Any, **least: float) -> None:
    """Raise ValueError unless each named setting is finite and at least its lower bound."""
    for name, low in least.items():
        value = getattr(settings, name)
        if not isinstance(value, int | float) or not low <= value < math.inf:
            kind = "" if isinstance(value, int) else "a finite number, "
            raise InputError(f"{section}.{name}: got {value!r}, expected {kind}at least {low}")


def within(section: str, settings: Any, **ranges: tuple[float, float]) -> None:
    """Raise ValueError unless each named setting lies in its range, ends included."""
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if not low <= value <= high:
            raise InputError(f"{section}.{name}: got {value}, expected {low} to {high}")


def bytes_of(name: str, text: str | int, least: int = 1) -> int:
    """Read a size such as 512MiB, 4GiB or 80GB; ValueError names the setting."""
    text = str(text)
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", text.strip().lower())
    size = 0
    if match:
        unit = (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " ")
        size = int(float(match[1]) * unit)
    if size < least:
        expected = f"at least {least >> 20}MiB" if least >> 20 else "a number of bytes above 0"
        raise InputError(f"{name}: got {text[:80]!r}, expected {expected}, such as 4GiB or 512MiB")
    return size
