"""Functions that torch.compile leaves alone."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def not_compiled(function: Function) -> Function:
    """As torch.compiler.disable, which would import torch._dynamo (1.2 s of CPU) at once."""
    disabled = cache(lambda: torch.compiler.disable(function))

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch._C._dynamo.eval_frame.get_eval_frame_callback() is None:
            return function(*args, **kwargs)
        return disabled()(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # torch.compile reads both
    call._torchdynamo_disable_msg = "lookups are collectives"  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]
