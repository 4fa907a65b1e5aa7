"""Knowledge-graph embeddings on sharded tables: ingest, triples, scorers, losses, sampling, model, evaluation, trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardemb.kge.ingestion import ingest
    from shardemb.kge.model import KnowledgeGraphModel, ModelConfig
    from shardemb.kge.trainer import TrainingConfig, train
    from shardemb.kge.triples import Triples

__all__ = ["KnowledgeGraphModel", "ModelConfig", "TrainingConfig", "Triples", "ingest", "train"]

_ROOMS = {
    "KnowledgeGraphModel": "model",
    "ModelConfig": "model",
    "TrainingConfig": "trainer",
    "Triples": "triples",
    "ingest": "ingestion",
    "train": "trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'shardemb.kge' has no attribute {name!r}")
    return getattr(import_module(f"shardemb.kge.{_ROOMS[name]}"), name)
