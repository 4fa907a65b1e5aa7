"""Knowledge-graph embeddings on sharded tables.

Ingest, triples, scorers, losses, sampling, model, evaluation, trainer.
"""

from typing import TYPE_CHECKING

from shardemb.utils.lazy import lazy_names

if TYPE_CHECKING:
    from shardemb.kge.data.ingest import ingest
    from shardemb.kge.data.triples import Triples
    from shardemb.kge.evaluation import EvaluationConfig, evaluate
    from shardemb.kge.losses import LossConfig
    from shardemb.kge.model import KnowledgeGraphModel, ModelConfig
    from shardemb.kge.optimizers import OptimizerConfig
    from shardemb.kge.sampling import SamplingConfig
    from shardemb.kge.trainer import TrainingConfig, train

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

_MODULES = {
    "EvaluationConfig": "evaluation",
    "KnowledgeGraphModel": "model",
    "LossConfig": "losses",
    "ModelConfig": "model",
    "OptimizerConfig": "optimizers",
    "SamplingConfig": "sampling",
    "TrainingConfig": "trainer",
    "Triples": "data.triples",
    "evaluate": "evaluation",
    "ingest": "data.ingest",
    "train": "trainer",
}

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
