"""Knowledge-graph embeddings on sharded tables: ingest, triples, scorers, losses, sampling, model, evaluation, trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardemb.kge.evaluation import EvaluationConfig, evaluate
    from shardemb.kge.ingestion import ingest
    from shardemb.kge.losses import LossConfig
    from shardemb.kge.model import KnowledgeGraphModel, ModelConfig
    from shardemb.kge.optimizers import OptimizerConfig
    from shardemb.kge.sampling import SamplingConfig
    from shardemb.kge.trainer import TrainingConfig, train
    from shardemb.kge.triples import Triples

__all__ = [
    "EvaluationConfig",
    "KnowledgeGraphModel",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "SamplingConfig",
    "TrainingConfig",
    "Triples",
    "evaluate",
    "ingest",
    "train",
]

_ROOMS = {
    "EvaluationConfig": "evaluation",
    "KnowledgeGraphModel": "model",
    "LossConfig": "losses",
    "ModelConfig": "model",
    "OptimizerConfig": "optimizers",
    "SamplingConfig": "sampling",
    "TrainingConfig": "trainer",
    "Triples": "triples",
    "evaluate": "evaluation",
    "ingest": "ingestion",
    "train": "trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'shardemb.kge' has no attribute {name!r}")
    return getattr(import_module(f"shardemb.kge.{_ROOMS[name]}"), name)
