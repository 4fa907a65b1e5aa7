"""PyKEEN's ``Embedding``, at a billion rows: tables row-sharded over processes.

``import shardemb`` is cheap: a name is loaded, with torch, on first use.
"""

from typing import TYPE_CHECKING

from shardemb.exceptions import PeerFailureError, ShardembError
from shardemb.utils.lazy import lazy_names

if TYPE_CHECKING:
    from shardemb import checkpoint, optim
    from shardemb.amp import GradScaler
    from shardemb.batches import join_batches
    from shardemb.comm.watchdog import set_timeout
    from shardemb.coordinator import Coordinator, clip_grad_norm_
    from shardemb.embedding import Embedding, Representation
    from shardemb.optim import FusedOptimizer, RowWiseAdagrad
    from shardemb.pooling import embedding_bag
    from shardemb.serving.store import Store, open_store
    from shardemb.sharding.options import Fused, Sharding, TorchRec
    from shardemb.sharding.placement import RowPlan
    from shardemb.sharding.wrappers import exclude_from_ddp

__version__ = "0.1.0"

__all__ = [
    "Coordinator",
    "Embedding",
    "Fused",
    "FusedOptimizer",
    "GradScaler",
    "PeerFailureError",
    "Representation",
    "RowPlan",
    "RowWiseAdagrad",
    "ShardembError",
    "Sharding",
    "Store",
    "TorchRec",
    "__version__",
    "checkpoint",
    "clip_grad_norm_",
    "embedding_bag",
    "exclude_from_ddp",
    "join_batches",
    "open_store",
    "optim",
    "set_timeout",
]

_MODULES = {
    "Coordinator": "coordinator",
    "GradScaler": "amp",
    "embedding_bag": "pooling",
    "join_batches": "batches",
    "clip_grad_norm_": "coordinator",
    "Embedding": "embedding",
    "Representation": "embedding",
    "FusedOptimizer": "optim",
    "RowWiseAdagrad": "optim",
    "set_timeout": "comm.watchdog",
    "RowPlan": "sharding.placement",
    "Fused": "sharding.options",
    "Sharding": "sharding.options",
    "TorchRec": "sharding.options",
    "exclude_from_ddp": "sharding.wrappers",
    "Store": "serving.store",
    "open_store": "serving.store",
    "checkpoint": "checkpoint",
    "optim": "optim",
}

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
