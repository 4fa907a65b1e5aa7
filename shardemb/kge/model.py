"""A knowledge-graph model: a sharded entity table, a replicated relation table, a scorer."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shardemb.embedding import Embedding
from shardemb.kge.losses import n3, sampled_softmax
from shardemb.kge.sampling import Chunk
from shardemb.kge.scorers import SCORERS
from shardemb.optim import RowWiseAdagrad
from shardemb.transforms import probe_constrainer, resolve_constrainer


@dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    #: scorer: "complex" or "distmult"
    scorer: str = "complex"
    #: real numbers in an entity's row; ComplEx makes half as many complex ones of them
    dim: int = 256
    #: standard deviation of the initial rows
    init_std: float = 0.01
    #: row-wise function after each step ("normalize", "clamp_norm", ...); "" for none
    constrainer: str = ""
    #: keyword arguments of the constrainer
    constrainer_kwargs: dict[str, Any] = field(default_factory=dict)
    #: weight of the N3 regularizer, per query
    n3: float = 0.05
    #: learning rate of row-wise Adagrad for entities
    entity_lr: float = 0.3
    #: learning rate of row-wise Adagrad for relations
    relation_lr: float = 0.1

    def __post_init__(self) -> None:
        if self.scorer not in SCORERS:
            raise ValueError(f"model.scorer: got {self.scorer!r}, expected one of {sorted(SCORERS)}")
        if self.dim < 1:
            raise ValueError(f"model.dim: got {self.dim}, expected at least 1")
        for name in ("init_std", "n3", "entity_lr", "relation_lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"model.{name}: got {getattr(self, name)}, expected a finite number, at least 0")
        try:
            SCORERS[self.scorer]().check_dim(self.dim)
        except ValueError as error:
            raise ValueError(f"model.dim: {error}") from error
        try:
            constrainer = resolve_constrainer(self.constrainer or None, self.constrainer_kwargs)
            if constrainer is not None:
                probe_constrainer(constrainer, (self.dim,), torch.get_default_dtype(), "entity")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"model.constrainer, model.constrainer_kwargs: {error.args[0]}") from error


class KnowledgeGraphModel(nn.Module):
    """Scores triples; entities are row-sharded over the default process group.

    Args:
        num_entities: rows of the entity table.
        num_relations: the graph's relations; the table holds a reciprocal for each besides.
        config: the model's settings.
        seed: of the initial rows.
        device: of the tables.
    """

    def __init__(
        self, num_entities: int, num_relations: int, config: ModelConfig, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.config = config
        self.num_relations = num_relations
        self.scorer = SCORERS[config.scorer]()
        common: dict[str, Any] = {
            "embedding_dim": config.dim,
            "initializer": "normal",
            "initializer_kwargs": {"std": config.init_std},
            "gradient_reduction": "sum",  # the loss is already divided by the global batch
            "device": device,
            "initialize": True,
        }
        self.entity = Embedding(
            num_entities,
            constrainer=config.constrainer or None,
            constrainer_kwargs=config.constrainer_kwargs,
            seed=2 * seed,
            name="entity",
            **common,
        )
        self.relation = Embedding(
            2 * num_relations, gradient="dense", placement="replicated", seed=2 * seed + 1, name="relation", **common
        )

    def queries(self, heads: Tensor, relations: Tensor) -> Tensor:
        """Return ``(B, D)`` for entity ids ``(B,)`` and relation ids ``(B,)``. A collective."""
        return self.scorer.query(self.entity(heads), self.relation(relations))

    def loss(self, chunks: list[Chunk]) -> tuple[Tensor, Tensor]:
        """Look all entities of a step up at once, and add up the loss of this rank's chunks. A collective.

        Returns:
            The sum over queries of what training minimizes, and of its softmax part alone (detached).
        """
        parts = [ids for chunk in chunks for ids in (chunk.heads, chunk.tails, chunk.negatives)]
        ids, inverse = torch.cat(parts or [torch.empty(0, dtype=torch.int64)]).unique(return_inverse=True)
        rows = self.entity(ids)
        expanded = iter(rows.index_select(0, inverse).split([len(part) for part in parts]))
        total, softmax = rows.sum() * 0, torch.zeros(())  # a rank without chunks takes part in backward all the same
        for chunk in chunks:
            heads, tails, negatives = next(expanded), next(expanded), next(expanded)
            relations = self.relation(chunk.relations)
            query = self.scorer.query(heads, relations)
            loss = sampled_softmax(self.scorer.score(query, tails), self.scorer.score_all(query, negatives), chunk.hits())
            softmax += loss.detach()
            total = total + loss
            if self.config.n3:
                total = total + self.config.n3 * n3(*(self.scorer.modulus(x) for x in (heads, relations, tails)))
        return total, softmax

    def optimizer(self) -> RowWiseAdagrad:
        """Make the optimizer of both tables."""
        config = self.config
        rates = [(self.entity, config.entity_lr), (self.relation, config.relation_lr)]
        return RowWiseAdagrad([{"params": table.parameters(), "lr": lr, "initial_lr": lr} for table, lr in rates])
