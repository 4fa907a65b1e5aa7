"""Python's plain values as JSON, and back as they were.

JSON turns the keys of a dict into strings and tuples into lists. Here ``{3: (1, 2)}`` becomes
``{"__dict__": [[3, {"__tuple__": [1, 2]}]]}``. Nothing else can be loaded: no code, no classes.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from shardemb.exceptions import CheckpointError, InputError

_MAKE: dict[str, Callable[[list[Any]], Any]] = {
    "__dict__": dict,
    "__counter__": lambda items: Counter(dict(items)),
    "__tuple__": tuple,
    "__set__": set,
    "__frozenset__": frozenset,
}


def to_json(value: Any, where: str) -> Any:
    """Return what JSON can hold, and :func:`from_json` reads.

    Raises:
        ValueError: a value that is not None, a bool, a number, a string, a list, a tuple, a set, a
            dict or a collections.Counter of these. ``where`` names it.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if type(value) is list:
        return [to_json(item, f"{where}[{number}]") for number, item in enumerate(value)]
    if type(value) is dict and all(type(key) is str and key not in _MAKE for key in value):
        return {key: to_json(item, f"{where}[{key!r}]") for key, item in value.items()}
    if type(value) in (dict, Counter):
        items = [
            [to_json(key, f"{where}, a key"), to_json(item, f"{where}[{key!r}]")]
            for key, item in value.items()
        ]
        return {"__dict__" if type(value) is dict else "__counter__": items}
    if type(value) in (tuple, set, frozenset):
        items = [to_json(item, f"{where}[{number}]") for number, item in enumerate(value)]
        return {f"__{type(value).__name__}__": items}
    kind = type(value)
    raise InputError(
        f"{where}: got {kind.__module__}.{kind.__qualname__}, expected None, a bool, a number, a"
        " string, or a list, tuple, set or dict of these: convert it, for example by float() or"
        " .tolist()"
    )


def from_json(value: Any, where: str) -> Any:
    """Return what :func:`to_json` was given; CheckpointError for anything else."""
    if isinstance(value, list):
        return [from_json(item, where) for item in value]
    if not isinstance(value, dict):
        return value
    (key,) = value if len(value) == 1 else ("",)
    if key not in _MAKE:
        return {key: from_json(item, where) for key, item in value.items()}
    try:
        return _MAKE[key](from_json(value[key], where))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: got a {key} that cannot be read: {error}") from error
