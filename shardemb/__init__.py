"""PyKEEN's ``Embedding``, at a billion rows: tables row-sharded over processes behind one interface.

``import shardemb`` is cheap: a name below is loaded (with torch) when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardemb import checkpoint, optim
    from shardemb.coordinator import Coordinator, clip_grad_norm_
    from shardemb.embedding import Embedding, Representation
    from shardemb.faults import PeerFailureError, set_timeout
    from shardemb.optim import FusedOptimizer, RowWiseAdagrad
    from shardemb.plan import RowPlan
    from shardemb.store import Store, open
    from shardemb.torchrec import TorchRecOptions

__version__ = "0.1.0"

__all__ = [
    "Coordinator",
    "Embedding",
    "FusedOptimizer",
    "PeerFailureError",
    "Representation",
    "RowPlan",
    "RowWiseAdagrad",
    "Store",
    "TorchRecOptions",
    "__version__",
    "checkpoint",
    "clip_grad_norm_",
    "open",
    "optim",
    "set_timeout",
]

_ROOMS = {
    "Coordinator": "coordinator",
    "Embedding": "embedding",
    "FusedOptimizer": "optim",
    "PeerFailureError": "faults",
    "Representation": "embedding",
    "RowPlan": "plan",
    "RowWiseAdagrad": "optim",
    "Store": "store",
    "TorchRecOptions": "torchrec",
    "clip_grad_norm_": "coordinator",
    "open": "store",
    "set_timeout": "faults",
}


def __getattr__(name: str) -> Any:
    if name in ("checkpoint", "optim"):
        return import_module(f"shardemb.{name}")
    if name not in _ROOMS:
        raise AttributeError(f"module 'shardemb' has no attribute {name!r}")
    return getattr(import_module(f"shardemb.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
