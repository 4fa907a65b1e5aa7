"""PyKEEN's ``Embedding``, at a billion rows: tables row-sharded over processes behind one interface.

``import shardemb`` is cheap: a name below is loaded (with torch) when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardemb import optim
    from shardemb.coordinator import Coordinator, clip_grad_norm_
    from shardemb.embedding import Embedding, Representation
    from shardemb.optim import FusedOptimizer, RowWiseAdagrad
    from shardemb.plan import RowPlan
    from shardemb.torchrec import TorchRecOptions

__version__ = "0.1.0"

__all__ = [
    "Coordinator",
    "Embedding",
    "FusedOptimizer",
    "Representation",
    "RowPlan",
    "RowWiseAdagrad",
    "TorchRecOptions",
    "__version__",
    "clip_grad_norm_",
    "optim",
]

_ROOMS = {
    "Coordinator": "coordinator",
    "Embedding": "embedding",
    "FusedOptimizer": "optim",
    "Representation": "embedding",
    "RowPlan": "plan",
    "RowWiseAdagrad": "optim",
    "TorchRecOptions": "torchrec",
    "clip_grad_norm_": "coordinator",
}


def __getattr__(name: str) -> Any:
    if name == "optim":
        return import_module("shardemb.optim")
    if name not in _ROOMS:
        raise AttributeError(f"module 'shardemb' has no attribute {name!r}")
    return getattr(import_module(f"shardemb.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
