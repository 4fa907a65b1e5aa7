"""Batches, negatives and what does not count among them, against brute force."""

import math
from collections import Counter

import pytest
import torch

from shardemb.kge import sampling
from shardemb.kge.known_answers import KnownAnswers, subsampling_weights
from shardemb.kge.sampling import Batch, Sampler, SamplingConfig

ENTITIES, RELATIONS = 23, 3
TRIPLES = torch.stack(
    [
        torch.arange(157) ** 2 % ENTITIES,
        torch.arange(157) % RELATIONS,
        torch.arange(157) * 7 % ENTITIES,
    ],
    1,
)
TRIPLES = TRIPLES.int()


def make(
    rank: int = 0, world_size: int = 1, subsampling: bool = False, **settings: object
) -> Sampler:
    config = SamplingConfig(**{"batch_size": 64, "chunk_size": 20, "num_negatives": 7, **settings})  # type: ignore[arg-type]
    return Sampler(TRIPLES, ENTITIES, RELATIONS, config, 3, rank, world_size, subsampling)


def chunks(batches: list[Batch]) -> list[tuple]:
    """What each chunk holds: triples, weights, candidates and what does not count of them."""
    found = []
    for batch in batches:
        corruptions, size, width = (
            len(batch.replaced_heads),
            batch.heads.shape[1],
            batch.candidates.shape[2],
        )
        masked = torch.zeros(corruptions, *batch.heads.shape, width, dtype=torch.bool)
        masked.view(-1)[batch.masked] = True
        for c in range(len(batch.heads)):
            triples = torch.stack(
                [batch.heads[c], batch.relations[c], batch.tails[c]], dim=1
            ).tolist()
            heads = [
                (h[c] if isinstance(h, torch.Tensor) else torch.full((size,), h)).tolist()
                for h in batch.replaced_heads
            ]
            weights = None if batch.weights is None else batch.weights[c].tolist()
            found.append(
                (triples, weights, heads, batch.candidates[:, c].tolist(), masked[:, c].tolist())
            )
    return sorted(found, key=repr)


OPTIONS = [
    {},
    {"chunk_size": 1},
    {"negatives": "degree", "in_batch": True},
    {"corrupt": "bernoulli", "filtered": True},
    {"corrupt": "head"},
    {"corrupt": "tail", "filtered": True, "chunk_size": 64},
    {"in_batch": True, "num_negatives": 0, "filtered": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_chunks_do_not_depend_on_the_ranks(options: dict) -> None:
    def epoch(world_size: int) -> list:
        samplers = [
            make(rank, world_size, subsampling=True, **options) for rank in range(world_size)
        ]
        return [
            chunks([batch for sampler in samplers for batch in sampler.batches(1, step)])
            for step in range(samplers[0].num_steps)
        ]

    one = epoch(1)
    assert sorted(t for step in one for chunk in step for t in chunk[0]) == sorted(
        TRIPLES.tolist()
    )  # each triple once
    for world_size in (2, 3, 7):
        assert epoch(world_size) == one


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_does_not_count_is_what_is_true(options: dict) -> None:
    sampler, known = make(**options), {tuple(triple) for triple in TRIPLES.tolist()}
    some = 0
    for step in range(sampler.num_steps):
        for triples, _, heads, candidates, masked in chunks(sampler.batches(0, step)):
            for corruption, replaced in enumerate(heads):
                for (h, r, t), head, found in zip(
                    triples, replaced, masked[corruption], strict=True
                ):
                    wrong = [(e, r, t) if head else (h, r, e) for e in candidates[corruption]]
                    expected = [
                        x == (h, r, t) or (sampler.config.filtered and x in known) for x in wrong
                    ]
                    assert found == expected
                    some += sum(expected)
                if sampler.config.in_batch:
                    answers = [
                        h if head else t for (h, _, t), head in zip(triples, replaced, strict=True)
                    ]
                    assert candidates[corruption][-len(answers) :] == answers
    assert some


def test_known_answers_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [chunks(make(filtered=True).batches(0, step)) for step in range(3)]
    monkeypatch.setattr(sampling, "_PAIRS", 5)
    assert [chunks(make(filtered=True).batches(0, step)) for step in range(3)] == whole


def test_epochs_differ_and_each_covers_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_BLOCK", 120)
    monkeypatch.setattr(sampling, "_LEAST_BLOCK", 1)
    sampler = make()
    assert sampler._block_size == 30  # of 4 chunks; 5 whole blocks, and 7 triples
    orders = [
        torch.cat([sampler.places(epoch, step) for step in range(sampler.num_steps)]).tolist()
        for epoch in range(2)
    ]
    assert [sorted(order) for order in orders] == [list(range(157))] * 2
    assert orders[0] != orders[1]
    assert [place // 30 for place in orders[0][::30]] != sorted(
        place // 30 for place in orders[0][::30]
    )
    assert all(place >= 150 for place in orders[0][150:])
    assert make().places(0, 1).tolist() == orders[0][64:128]  # a resumed run begins anywhere


def test_ranks_read_parts_of_the_triples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_BLOCK", 4 * 64)
    monkeypatch.setattr(sampling, "_LEAST_BLOCK", 1)
    config = SamplingConfig(batch_size=16, chunk_size=4, num_negatives=1)
    triples = torch.zeros(100 * 64, 3, dtype=torch.int32)
    for epoch in range(2):
        read = []
        for rank in range(2):
            sampler = Sampler(triples, 1, 1, config, 0, rank, 2)
            own = [
                sampler.places(epoch, step, chunk)
                for step in range(sampler.num_steps)
                for chunk in (rank, rank + 2)
            ]
            read.append(set((torch.cat(own) // 64).tolist()))
        assert set.union(*read) == set(range(100))
        assert len(set.intersection(*read)) <= 3  # where the parts of chunks meet
        assert set(range(50)) - read[0]  # in random order


def test_negatives_by_degree() -> None:
    config = SamplingConfig(
        batch_size=157, chunk_size=1, num_negatives=200, negatives="degree", degree_power=0.5
    )
    drawn = Sampler(TRIPLES, ENTITIES, RELATIONS, config, 0).batches(0, 0)[0].candidates.flatten()
    degree = torch.bincount(TRIPLES[:, [0, 2]].flatten().long(), minlength=ENTITIES).double().sqrt()
    expected, found = degree / degree.sum(), torch.bincount(drawn, minlength=ENTITIES) / len(drawn)
    assert (found - expected).abs().max() < 5 / math.sqrt(len(drawn))
    assert not found[degree == 0].any()


def test_bernoulli_replaces_the_side_with_fewer_answers_less_often() -> None:
    # relation 0: one head, 50 tails; replacing the tail would often give a true triple
    triples = torch.stack(
        [torch.zeros(50, dtype=torch.int64), torch.zeros(50, dtype=torch.int64), torch.arange(50)],
        1,
    )
    sampler = Sampler(
        triples, 50, 1, SamplingConfig(batch_size=50, corrupt="bernoulli", num_negatives=1), 0
    )
    replaced = torch.cat(
        [sampler.batches(epoch, 0)[0].replaced_heads[0].flatten() for epoch in range(100)]
    )  # type: ignore[union-attr]
    assert replaced.double().mean().item() == pytest.approx(50 / 51, abs=0.01)


def test_subsampling_weights() -> None:
    tails, heads = (
        Counter((h, r) for h, r, _ in TRIPLES.tolist()),
        Counter((r, t) for _, r, t in TRIPLES.tolist()),
    )
    expected = torch.tensor(
        [(tails[h, r] + heads[r, t] + 4) ** -0.5 for h, r, t in TRIPLES.tolist()]
    )
    found = subsampling_weights(TRIPLES, KnownAnswers([TRIPLES], RELATIONS))
    torch.testing.assert_close(found, expected / expected.mean())
    batch = make(subsampling=True).batches(0, 0)[0]
    place = make().places(0, 0, 0)[0]
    assert batch.weights is not None
    assert batch.weights[0, 0] == found[place]


@pytest.mark.parametrize("scheme", ["1vsall", "kvsall"])
def test_queries_against_all_entities(scheme: str) -> None:
    sampler = make(scheme=scheme)
    seen = []
    for step in range(sampler.num_steps):
        queries = sampler.queries(1, step)
        assert (queries.places.diff() >= 0).all()
        for place, answer in zip(queries.places.tolist(), queries.answers.tolist(), strict=True):
            entity, relation, head = (
                queries.entities[place].item(),
                queries.relations[place].item(),
                queries.head[place].item(),
            )
            seen.append((answer, relation, entity) if head else (entity, relation, answer))
            seen[-1] = (*seen[-1], head)
    expected = [
        (*triple, head) for head in (False, True) for triple in map(tuple, TRIPLES.tolist())
    ]
    assert sorted(seen) == sorted(expected if scheme == "1vsall" else set(expected))
    if scheme == "kvsall":
        asked = {(h, r) for h, r, _ in TRIPLES.tolist()}, {(t, r) for _, r, t in TRIPLES.tolist()}
        assert sampler.num_samples == len(asked[0]) + len(asked[1])


@pytest.mark.parametrize("only", [None, TRIPLES[:20]])
def test_known_answers(only: torch.Tensor | None) -> None:
    known, triples = (
        KnownAnswers([TRIPLES[:90], TRIPLES[90:]], RELATIONS, only),
        set(map(tuple, TRIPLES.tolist())),
    )
    asked = TRIPLES[:20]
    for side, (one, other) in (("tail", (0, 2)), ("head", (2, 0))):
        places, answers = known.answers(side, asked[:, one], asked[:, 1])  # type: ignore[arg-type]
        counts = known.counts(side, asked[:, one], asked[:, 1])  # type: ignore[arg-type]
        for i, triple in enumerate(asked.tolist()):
            expected = [t[other] for t in triples if t[one] == triple[one] and t[1] == triple[1]]
            assert sorted(set(answers[places == i].tolist())) == sorted(expected)
            assert (
                counts[i]
                == (places == i).sum()
                == sum(t[one] == triple[one] and t[1] == triple[1] for t in TRIPLES.tolist())
            )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"scheme": "2vsall"},
            "sampling.scheme: got '2vsall', expected one of 'negatives', '1vsall', 'kvsall'",
        ),
        ({"corrupt": "middle"}, "sampling.corrupt: got 'middle', expected one of"),
        ({"num_negatives": 0}, "sampling.num_negatives: got 0, expected at least 1"),
        ({"degree_power": -1.0}, "sampling.degree_power: got -1.0, expected 0 to 4"),
        (
            {"scheme": "1vsall", "filtered": True},
            "sampling.filtered: got True with scheme '1vsall', which draws no negatives",
        ),
        (
            {"scheme": "kvsall", "negatives": "degree"},
            "sampling.negatives: got 'degree' with scheme 'kvsall'",
        ),
        (
            {"in_batch": True, "num_negatives": 0, "chunk_size": 1},
            "sampling.chunk_size: got 1 with in_batch and num_negatives",
        ),
        (
            {"scheme": "1vsall", "corrupt": "bernoulli"},
            "sampling.corrupt: got 'bernoulli' with scheme '1vsall'",
        ),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)
