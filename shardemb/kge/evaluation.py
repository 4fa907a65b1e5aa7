"""Ranks of triples and their metrics: MRR, MR, Hits@k and AMRI, by side and by relation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shardemb.comm import collectives
from shardemb.exceptions import InputError
from shardemb.kge.known_answers import SIDES, KnownAnswers
from shardemb.kge.model import KnowledgeGraphModel
from shardemb.kge.ranking import with_all, with_drawn
from shardemb.utils.progress import progress_bar
from shardemb.utils.validation import at_least, one_of

#: share of the equal candidates that rank before the answer
TIES = {"realistic": 0.5, "optimistic": 0.0, "pessimistic": 1.0}


@dataclass(frozen=True)
class EvaluationConfig:
    """How triples are ranked."""

    #: leave out other true answers (of any split)
    filtered: bool = True
    #: the rank among equal scores: "optimistic", the first; "pessimistic", the last; "realistic",
    #: their mean
    ties: str = "realistic"
    #: entities that each answer is compared with, drawn by the seed (Hu et al. 2021); 0 for all
    candidates: int = 0
    #: the k of Hits@k
    hits: list[int] = field(default_factory=lambda: [1, 3, 10])
    #: report each relation's figures besides
    per_relation: bool = False

    def __post_init__(self) -> None:
        one_of("evaluation", self, {"ties": TIES})
        at_least("evaluation", self, candidates=0)
        valid = all(type(k) is int and k > 0 for k in self.hits)
        if not valid or len(set(self.hits)) < len(self.hits):
            raise InputError(
                f"evaluation.hits: got {self.hits}, expected numbers from 1, each once"
            )


@dataclass(frozen=True)
class Report:
    """Metrics of an evaluation: "mrr", "mr", "hits_at_1", ..., "amri"."""

    #: metrics of "both", "tail" and "head"
    sides: dict[str, dict[str, float]]
    #: with per_relation: metrics by id ("relation") and "side", with the triples' number ("count")
    table: list[dict[str, Any]]

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of both sides."""
        return self.sides["both"]


def check_candidates(config: EvaluationConfig, entities: int) -> None:
    """Raise ValueError unless fewer candidates are drawn than there are entities."""
    if config.candidates >= entities:
        raise InputError(
            f"evaluation.candidates: got {config.candidates} of {entities} entities, expected"
            " fewer: 0 compares with all"
        )


def evaluate(
    model: KnowledgeGraphModel,
    triples: Tensor,
    splits: Sequence[Tensor],
    config: EvaluationConfig,
    seed: int = 0,
) -> dict[str, float]:
    """Return the metrics of both sides; arguments of :func:`report`. A collective."""
    return report(model, triples, splits, config, seed).metrics


def report(
    model: KnowledgeGraphModel,
    triples: Tensor,
    splits: Sequence[Tensor],
    config: EvaluationConfig,
    seed: int = 0,
    shown: bool = False,
) -> Report:
    """Rank heads and tails of triples. A collective.

    Args:
        model: in any mode; dropout is off.
        triples: ``(T, 3)``, the same on all ranks.
        splits: triples that are true answers, if filtered.
        config: how to rank.
        seed: of drawn candidates.
        shown: show a progress bar on this rank.

    Raises:
        FloatingPointError: a score is NaN or infinite, on all ranks.
        ValueError: no triples, or too many candidates to draw.
    """
    if not len(triples):
        raise InputError("got no triples to rank, expected one at least")
    check_candidates(config, model.entity.max_id)
    known = _known(splits, model.num_relations, triples) if config.filtered else None
    training = model.training
    model.eval()
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    bar = progress_bar(total=2 * len(triples), desc="ranking", unit=" queries", disable=not shown)
    with bar:
        try:
            for side in SIDES:
                common = model, side, triples, known
                if config.candidates:
                    compared = with_drawn(*common, config.candidates, seed, bar.update)
                else:
                    compared = with_all(*common, bar.update)
                ranks = 1 + compared.better + compared.equal * TIES[config.ties]
                parts[side] = ranks, compared.options
        finally:
            model.train(training)
    table: list[dict[str, Any]] = []
    if config.per_relation:
        relations, order = triples[:, 1].sort(stable=True)
        distinct, counts = relations.unique_consecutive(return_counts=True)
        for relation, which in zip(distinct.tolist(), order.split(counts.tolist()), strict=True):
            for name, (ranks, options) in parts.items():
                figures = metrics(ranks[which], options[which], config.hits)
                table.append({"relation": relation, "side": name, "count": len(which), **figures})
    ranks, options = (torch.cat(columns) for columns in zip(*parts.values(), strict=True))
    parts = {"both": (ranks, options), **parts}
    return Report({name: metrics(*part, config.hits) for name, part in parts.items()}, table)


def _known(splits: Sequence[Tensor], num_relations: int, triples: Tensor) -> KnownAnswers:
    rank, world_size = collectives.rank_and_size()
    parts = [
        split[len(split) * rank // world_size : len(split) * (rank + 1) // world_size]
        for split in splits
    ]
    gather = partial(collectives.all_gather_rows, operation="known answers")
    return KnownAnswers(parts, num_relations, triples, gather)


def metrics(ranks: Tensor, options: Tensor, hits: Sequence[int] = (1, 3, 10)) -> dict[str, float]:
    """Return the metrics of ranks.

    Args:
        ranks: ``(n,)`` float64, from 1.
        options: ``(n,)`` float64, number of candidates, answer included.
        hits: the k of Hits@k.

    Returns:
        "mrr", the mean reciprocal rank; "mr", the mean rank; "hits_at_k", the share of ranks up to
        k; "amri" (Berrendorf et al. 2020), 1 if all ranks are 1, 0 for random ranks and without
        other candidates.
    """
    mean, chance = ranks.mean().item(), ((options + 1) / 2).mean().item()
    return {
        "mrr": ranks.reciprocal().mean().item(),
        "mr": mean,
        **{f"hits_at_{k}": (ranks <= k).double().mean().item() for k in hits},
        "amri": 1 - (mean - 1) / (chance - 1) if chance > 1 else 0.0,
    }
