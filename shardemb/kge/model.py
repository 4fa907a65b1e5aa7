"""A knowledge-graph model: a sharded entity table, a replicated relation table, a scorer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shardemb.embedding import Embedding
from shardemb.exceptions import InputError
from shardemb.kge.known_answers import Side
from shardemb.kge.losses import LossConfig, lp
from shardemb.kge.sampling import Batch, Queries, choose
from shardemb.kge.scorers import SCORERS
from shardemb.kge.vs_all import gather_queries, share_of, vs_all
from shardemb.sharding.options import Sharding
from shardemb.transforms import probe_constrainer, resolve_constrainer
from shardemb.utils.validation import at_least, one_of, within


@dataclass(frozen=True)
class ModelConfig:
    """The scorer, its tables and regularizers."""

    #: scorer: "complex", "distmult", "hole", "quate", "rotate", "simple", "transe" (L2) or
    #: "transe_l1"
    scorer: str = "complex"
    #: real numbers in an entity's row: for ComplEx and RotatE twice the complex ones, for QuatE
    #: four times the quaternions
    dim: int = 256
    #: rank heads as tails of a second, reciprocal relation (Lacroix et al. 2018), instead of by the
    #: relation itself
    reciprocal: bool = True
    #: standard deviation of the initial rows; near 0 a product's gradient is small, and the first
    #: epochs learn little
    init_std: float = 0.1
    #: row-wise function after each step ("normalize", "clamp_norm", ...); "" for none
    constrainer: str = ""
    #: keyword arguments of the constrainer
    constrainer_kwargs: dict[str, Any] = field(default_factory=dict)
    #: probability that an element of an entity's row is dropped in training
    entity_dropout: float = 0.0
    #: of a relation's
    relation_dropout: float = 0.0
    #: weight of the N3 regularizer of a query's rows: head, relation and tail, or without the
    #: answer against all entities
    n3: float = 0.05
    #: weight of the Lp regularizer, per query
    lp: float = 0.0
    #: its p
    lp_power: float = 2.0

    def __post_init__(self) -> None:
        one_of("model", self, {"scorer": sorted(SCORERS)})
        at_least("model", self, dim=1, init_std=1e-9, n3=0, lp=0, lp_power=1)
        within("model", self, entity_dropout=(0, 0.99), relation_dropout=(0, 0.99))
        if self.dim % (divisor := SCORERS[self.scorer].divisor):
            raise InputError(
                f"model.dim: got {self.dim}, expected a multiple of {divisor} for {self.scorer!r}"
            )
        try:
            constrainer = resolve_constrainer(self.constrainer or None, self.constrainer_kwargs)
            if constrainer is not None:
                probe_constrainer(constrainer, (self.dim,), torch.get_default_dtype(), "entity")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"model.constrainer, model.constrainer_kwargs: {error.args[0]}"
            ) from error


class KnowledgeGraphModel(nn.Module):
    """Scores triples; entities are row-sharded over the default process group.

    Args:
        num_entities: rows of the entity table.
        num_relations: relations of the graph; the table has twice as many if they are reciprocal.
        config: the model's settings.
        seed: of the initial rows.
        loss: the loss.
        dense: dense gradients of the entity table, for losses over all entities.
        device: of the tables.
    """

    def __init__(
        self,
        num_entities: int,
        num_relations: int,
        config: ModelConfig,
        seed: int,
        loss: LossConfig | None = None,
        dense: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config, self.loss_config = config, loss or LossConfig()
        self.num_relations = num_relations
        self.scorer = SCORERS[config.scorer]
        # gradients are summed, because the loss is divided by the global batch
        common: dict[str, Any] = {
            "embedding_dim": config.dim,
            "initializer": "normal",
            "initializer_kwargs": {"std": config.init_std},
            "device": device,
            "initialize": True,
        }
        self.entity = Embedding(
            num_entities,
            constrainer=config.constrainer or None,
            constrainer_kwargs=config.constrainer_kwargs,
            kernel="dense" if dense else "sparse",
            sharding=Sharding(gradient_reduction="sum"),
            dropout=config.entity_dropout or None,
            seed=2 * seed,
            name="entity",
            **common,
        )
        self.relation = Embedding(
            num_relations * (1 + config.reciprocal),
            normalizer=self.scorer.relation_normalizer,
            kernel="dense",
            sharding=Sharding("replicated", gradient_reduction="sum"),
            dropout=config.relation_dropout or None,
            seed=2 * seed + 1,
            name="relation",
            **common,
        )

    def queries(self, side: Side, entities: Tensor, relations: Tensor) -> Tensor:
        """Return the scorer's queries ``(B, D)`` for ids ``(B,)``. A collective.

        ``side`` is "tail" for (entity, relation, ?), "head" for (?, relation, entity).
        """
        head = side == "head"
        known = self.entity(entities.to(self.entity.device))
        return self._query(head, known, self.relation(self._relation_rows(head, relations)))

    def _relation_rows(self, head: Tensor | bool, relations: Tensor) -> Tensor:
        shift = self.num_relations * self.config.reciprocal
        return (relations + shift * head).to(self.relation.device)

    def _query(self, head: Tensor | bool, known: Tensor, relation: Tensor) -> Tensor:
        if self.config.reciprocal:  # the reciprocal relation's row asks for the head
            head = False
        if isinstance(head, bool):
            return self.scorer.query(known, relation, head)
        for_head, for_tail = (self.scorer.query(known, relation, side) for side in (True, False))
        return choose(head, for_head, for_tail)

    def loss(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Sum the losses of this rank's chunks, with one lookup of all entities. A collective.

        Returns:
            Sums over queries: the loss with regularizers, and without (detached).
        """
        parts = [ids for batch in batches for ids in (batch.heads, batch.tails, batch.candidates)]
        ids = torch.cat([part.reshape(-1) for part in parts] or [torch.empty(0, dtype=torch.int64)])
        rows = self.entity(ids.to(self.entity.device))
        looked_up = [
            part_rows.view(*part.shape, -1)
            for part, part_rows in zip(parts, rows.split([p.numel() for p in parts]), strict=True)
        ]
        total, plain = rows.sum() * 0 if not len(ids) else rows.new_zeros(()), rows.new_zeros(())
        for number, batch in enumerate(batches):
            loss, penalty = self._loss(batch, *looked_up[3 * number : 3 * number + 3])
            plain += loss.detach()
            total = total + loss + penalty
        return total, plain

    def _loss(
        self, batch: Batch, heads: Tensor, tails: Tensor, candidates: Tensor
    ) -> tuple[Tensor, Tensor]:
        corruptions = batch.replaced_heads
        # without reciprocal relations, all corruptions share relation and true score
        own = len(corruptions) if self.config.reciprocal else 1
        relations = self.relation(
            torch.stack([self._relation_rows(head, batch.relations) for head in corruptions[:own]])
        )
        queries: list[Tensor] = []
        positives: list[Tensor] = []
        for number, head in enumerate(corruptions):
            known, answers = choose(head, tails, heads), choose(head, heads, tails)
            queries.append(self._query(head, known, relations[number % own]))
            score = self.scorer.score(queries[-1], answers) if number < own else positives[0]
            positives.append(score)
        penalty = self._penalty(heads, tails) * len(corruptions)
        penalty = penalty + self._penalty(relations) * (len(corruptions) // own)
        negative = self.scorer.score_all(torch.stack(queries), candidates)
        if len(batch.masked):
            with torch.no_grad():  # -inf has no gradient in any loss
                negative.view(-1).index_fill_(0, batch.masked.to(negative.device), -torch.inf)
        loss = self.loss_config(torch.stack(positives), negative)
        if batch.weights is not None:
            loss = loss * batch.weights.to(loss.device)
        return loss.sum(), penalty

    def loss_vs_all(self, queries: Queries) -> tuple[Tensor, Tensor]:
        """Compare the answers of a step's queries with all entities. A collective.

        Each rank gets the queries of all, and scores its own entities.

        Returns:
            As :meth:`loss`; sum the gradients of the first over ranks.
        """
        device, plan = self.entity.device, self.entity.plan
        share = share_of(len(queries.entities), plan)
        head = queries.head[share]
        known = self.entity(queries.entities[share].to(device))
        relations = self.relation(self._relation_rows(head, queries.relations[share]))
        query = self._query(head, known, relations)
        query = gather_queries(query, len(queries.entities), plan)
        rows = self.entity.local_rows(trainable=True)
        if self.entity.dropout is not None:
            rows = self.entity.dropout(rows)
        owned, local = plan.owned(queries.answers)
        loss = vs_all(
            self.scorer.score_all(query, rows),
            (queries.places[owned].to(device), local.to(device)),
            torch.bincount(queries.places, minlength=len(query)).to(device),
            self.entity.max_id,
            self.loss_config.name,
            self.loss_config.label_smoothing,
        )
        if queries.weights is not None:
            loss = loss * queries.weights.to(device)
        return loss.sum() + self._penalty(known, relations), loss.detach()[share].sum()

    def _penalty(self, *rows: Tensor) -> Tensor:
        config, penalty = self.config, rows[0].new_zeros(())
        if config.n3 or config.lp:
            moduli = [self.scorer.modulus(x) for x in rows]
            for weight, power in ((config.n3, 3.0), (config.lp, config.lp_power)):
                if weight:
                    penalty = penalty + weight * lp(*moduli, power=power)
        return penalty
