"""A small graph with a rule to learn, for tests of whole jobs."""

from shardemb.kge import SamplingConfig, Triples

SAMPLING = SamplingConfig(batch_size=60, chunk_size=20, num_negatives=30)


def graph() -> Triples:
    """A rule to learn: relation k leads from i to i + k + 1, modulo 83."""
    triples = [(f"e{i}", f"r{k}", f"e{(i + k + 1) % 83}") for i in range(83) for k in range(3)]
    held = [triple for n, triple in enumerate(triples) if n % 10 == 3]
    kept = [triple for n, triple in enumerate(triples) if n % 10 != 3]

    def columns(part: list) -> tuple:
        return tuple(list(column) for column in zip(*part, strict=True))

    return Triples.from_columns("ring", columns(kept), columns(held[::2]), columns(held[1::2]))
