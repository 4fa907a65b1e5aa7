"""Optimizers and learning rates of the tables."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from shardemb import optim
from shardemb.kge.model import KnowledgeGraphModel
from shardemb.utils.validation import at_least, one_of, within

#: row-wise optimizers by name; a dense gradient touches all rows
OPTIMIZERS: dict[str, Callable[..., optim.RowWiseOptimizer]] = {
    "adagrad": optim.SparseAdagrad,
    "adam": optim.LazyAdam,
    "rowwise_adagrad": optim.RowWiseAdagrad,
    "rowwise_adam": optim.RowWiseAdam,
    "sgd": optim.SparseSGD,
}
SCHEDULES = ("constant", "linear", "cosine", "plateau")


@dataclass(frozen=True)
class OptimizerConfig:
    """How rows are updated."""

    #: "rowwise_adagrad", "adagrad", "adam" (of touched rows), "rowwise_adam" or "sgd"
    name: str = "rowwise_adagrad"
    #: learning rate of entities
    entity_lr: float = 0.3
    #: learning rate of relations
    relation_lr: float = 0.1
    #: decoupled, of touched rows
    weight_decay: float = 0.0
    #: the whole gradient's 2-norm is cut to this; 0 for no clipping
    max_grad_norm: float = 0.0
    #: of the learning rates: "constant", "linear" or "cosine" down to ``final_lr``, "plateau":
    #: times ``plateau_factor`` after ``plateau_patience`` validations without a better MRR
    schedule: str = "linear"
    #: part of the learning rates that is left in the end
    final_lr: float = 0.02
    #: steps in which the rates rise from 0
    warmup_steps: int = 0
    #: see ``schedule``
    plateau_factor: float = 0.95
    #: see ``schedule``
    plateau_patience: int = 1

    def __post_init__(self) -> None:
        one_of("optimizer", self, {"name": sorted(OPTIMIZERS), "schedule": SCHEDULES})
        at_least("optimizer", self, entity_lr=0, relation_lr=0, weight_decay=0, max_grad_norm=0)
        at_least("optimizer", self, warmup_steps=0, plateau_patience=1)
        within("optimizer", self, final_lr=(0, 1), plateau_factor=(0.01, 1))

    def make(self, model: KnowledgeGraphModel) -> optim.RowWiseOptimizer:
        """Make the optimizer of both tables."""
        rates = {model.entity: self.entity_lr, model.relation: self.relation_lr}
        decay = self.weight_decay
        return OPTIMIZERS[self.name](
            [
                {"params": table.parameters(), "lr": lr, "initial_lr": lr, "weight_decay": decay}
                for table, lr in rates.items()
            ]
        )

    def set_rates(
        self, optimizer: torch.optim.Optimizer, done: int, steps: int, plateau: float = 1.0
    ) -> None:
        """Set the learning rates of the next step, after ``done`` of all ``steps``.

        ``plateau`` is their factor after plateaus.
        """
        progress = done / steps
        left = {
            "constant": 1.0,
            "linear": 1 - (1 - self.final_lr) * progress,
            "cosine": self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * progress)) / 2,
            "plateau": plateau,
        }[self.schedule]
        if done < self.warmup_steps:
            left *= (done + 1) / self.warmup_steps
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * left
