"""The best tails of a head and a relation, from a checkpoint."""

import torch

from shardemb.exceptions import IdRangeError, InputError
from shardemb.kge.scorers import SCORERS
from shardemb.serving.read_table import Keys, Nearest
from shardemb.serving.store import Store


@torch.no_grad()
def best_tails(
    store: Store, heads: Keys, relations: Keys, k: int = 10, inverse: bool = False
) -> Nearest:
    """Return the best tails of queries (head, relation, ?), among all entities.

    Args:
        store: a checkpoint of the trainer.
        heads: ids or labels, one or ``(q,)``.
        relations: as many.
        k: tails per query.
        inverse: return heads of (?, relation, tail) instead; ``heads`` are the tails.

    Raises:
        ValueError: not a knowledge-graph model's checkpoint, or different numbers of heads and
            relations.
        KeyError, IndexError, TypeError: as :meth:`shardemb.serving.read_table.Table.ids`.
    """
    settings = store.state.get("model")
    if settings is None or settings["scorer"] not in SCORERS:
        raise InputError(
            f"{store.path}: holds no knowledge-graph model that shardemb train has made, so it has"
            " no scorer"
        )
    scorer = SCORERS[settings["scorer"]]
    entity, relation = store["entity"], store["relation"]
    h, r = entity.ids(heads).reshape(-1), relation.ids(relations).reshape(-1)
    if len(h) != len(r):
        raise InputError(f"got {len(h)} heads and {len(r)} relations, expected as many")
    r = r + settings["num_relations"] * (inverse and settings["reciprocal"])
    if len(r) and int(r.max()) >= relation.max_id:
        raise IdRangeError(
            f"{store.path}: got relation {int(r.max())}, expected below {settings['num_relations']}"
            " with inverse=True"
        )
    known, relations = entity.lookup(h), relation.lookup(r, raw=True)
    if scorer.relation_normalizer is not None:
        relations = scorer.relation_normalizer(relations)
    queries = scorer.query(known, relations, inverse and not settings["reciprocal"])
    best = entity.best(lambda rows: scorer.score_all(queries, rows), k, queries=len(h))
    return entity.named(*best)
