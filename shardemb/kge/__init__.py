"""Knowledge-graph embeddings on sharded tables: data, models, training, evaluation, jobs."""

from typing import TYPE_CHECKING

from shardemb.utils.lazy import lazy_names

if TYPE_CHECKING:
    from shardemb.kge.config import JobConfig, TrainingConfig
    from shardemb.kge.data.ingest import ingest
    from shardemb.kge.data.triples import Triples
    from shardemb.kge.evaluation import EvaluationConfig, evaluate
    from shardemb.kge.job import evaluate_run, query_run, train, train_run
    from shardemb.kge.losses import LossConfig
    from shardemb.kge.model import KnowledgeGraphModel, ModelConfig
    from shardemb.kge.optimizers import OptimizerConfig
    from shardemb.kge.sampling import SamplingConfig

_MODULES = {
    "EvaluationConfig": "evaluation",
    "JobConfig": "config",
    "KnowledgeGraphModel": "model",
    "LossConfig": "losses",
    "ModelConfig": "model",
    "OptimizerConfig": "optimizers",
    "SamplingConfig": "sampling",
    "TrainingConfig": "config",
    "Triples": "data.triples",
    "evaluate": "evaluation",
    "evaluate_run": "job",
    "ingest": "data.ingest",
    "query_run": "job",
    "train": "job",
    "train_run": "job",
}

__all__ = [
    "EvaluationConfig",
    "JobConfig",
    "KnowledgeGraphModel",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "SamplingConfig",
    "TrainingConfig",
    "Triples",
    "evaluate",
    "evaluate_run",
    "ingest",
    "query_run",
    "train",
    "train_run",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
