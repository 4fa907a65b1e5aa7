"""Scoring functions of triples, those of ``pykeen.nn.modules``.

A scorer turns relation and known entity into a query, which it compares with candidates by a dot
product or a distance. Candidates that share a query cost one matrix product, ``B x D`` times ``D x
N``, except for L1 distances. Complex rows are ``D / 2`` pairs of real and imaginary part,
quaternions ``D / 4`` groups of four, as in PyKEEN.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from shardemb import kernels
from shardemb.exceptions import InputError
from shardemb.utils.types import RowFunction


class Scorer(ABC):
    """A scoring function of real rows ``(..., D)``."""

    #: D must be a multiple of this
    parts = 1
    #: makes relations valid, such as rotations; None if any row is
    relation_normalizer: RowFunction | None = None

    @abstractmethod
    def tail_query(self, head: Tensor, relation: Tensor) -> Tensor:
        """Return ``(..., D)``, to compare with candidates for the tail."""

    @abstractmethod
    def head_query(self, tail: Tensor, relation: Tensor) -> Tensor:
        """Return ``(..., D)``, to compare with candidates for the head."""

    @abstractmethod
    def score(self, query: Tensor, candidate: Tensor) -> Tensor:
        """Score each query against its own candidate: ``(..., D)``, ``(..., D)`` to ``(...)``."""

    @abstractmethod
    def score_all(self, query: Tensor, candidates: Tensor, exact: bool = False) -> Tensor:
        """Score queries ``(..., B, D)`` against candidates ``(..., N, D)``: ``(..., B, N)``.

        ``exact`` computes distances from differences, slower than a matrix product but without its
        rounding.
        """

    def modulus(self, rows: Tensor) -> Tensor:
        """Return absolute values of a row's elements ``(..., D / parts)``, for regularizers."""
        if self.parts == 1:
            return rows.abs()
        # keeps the root's gradient finite at 0
        return (rows.unflatten(-1, (-1, self.parts)).square().sum(-1) + 1e-12).sqrt()

    def check_dim(self, dim: int) -> None:
        """Raise ValueError for a number of columns that the scorer cannot use."""
        if dim % self.parts:
            raise InputError(
                f"got dim={dim}, expected a multiple of {self.parts}: {type(self).__name__}"
                " needs it"
            )


class _Product(Scorer):
    def score(self, query: Tensor, candidate: Tensor) -> Tensor:
        return torch.linalg.vecdot(query, candidate)

    def score_all(self, query: Tensor, candidates: Tensor, exact: bool = False) -> Tensor:
        return query @ candidates.mT


class _Distance(Scorer):
    def score(self, query: Tensor, candidate: Tensor) -> Tensor:
        return -torch.linalg.vector_norm(query - candidate, dim=-1)

    def score_all(self, query: Tensor, candidates: Tensor, exact: bool = False) -> Tensor:
        if exact:
            return -kernels.distances(query, candidates, 2)
        with torch.autocast(query.device.type, enabled=False):  # it subtracts large numbers
            wide = torch.promote_types(query.dtype, torch.float32)
            query, candidates = query.to(wide), candidates.to(wide)
            squares = query.square().sum(-1), candidates.square().sum(-1)
            lengths = squares[0].unsqueeze(-1) + squares[1].unsqueeze(-2)
            square = torch.add(lengths, query @ candidates.mT, alpha=-2)
        return -square.clamp_min(1e-12).sqrt()  # smaller values are rounding errors; gradient 0


class TransE(_Distance):
    """``-||h + r - t||_2`` (Bordes et al. 2013)."""

    def tail_query(self, head: Tensor, relation: Tensor) -> Tensor:
        """Return the expected tail."""
        return head + relation

    def head_query(self, tail: Tensor, relation: Tensor) -> Tensor:
        """Return the expected head."""
        return tail - relation


class TransEL1(TransE):
    """``-||h + r - t||_1`` (Bordes et al. 2013); not a matrix product."""

    def score(self, query: Tensor, candidate: Tensor) -> Tensor:
        """See the base class."""
        return -(query - candidate).abs().sum(-1)

    def score_all(self, query: Tensor, candidates: Tensor, exact: bool = False) -> Tensor:
        """See the base class."""
        return -kernels.distances(query, candidates, 1)


class DistMult(_Product):
    """``<h, r, t>`` of real rows (Yang et al. 2015)."""

    def tail_query(self, head: Tensor, relation: Tensor) -> Tensor:
        """Return the elementwise product."""
        return head * relation

    def head_query(self, tail: Tensor, relation: Tensor) -> Tensor:
        """Return the elementwise product."""
        return tail * relation


class ComplEx(_Product):
    """``Re <h, r, conj(t)>`` of complex rows (Trouillon et al. 2016)."""

    parts = 2

    def tail_query(self, head: Tensor, relation: Tensor) -> Tensor:
        """Return the complex product."""
        return _complex_product(head, relation)

    def head_query(self, tail: Tensor, relation: Tensor) -> Tensor:
        """Return the product with the conjugate relation."""
        return _complex_product(tail, relation, conjugate=True)


def _unit_complex(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.unflatten(-1, (-1, 2)), dim=-1).flatten(-2)


class RotatE(_Distance):
    """``-||h r - t||_2`` of complex rows; each element of ``r`` is a rotation (Sun et al. 2019)."""

    parts = 2
    relation_normalizer = staticmethod(_unit_complex)

    def tail_query(self, head: Tensor, relation: Tensor) -> Tensor:
        """Return the rotated head."""
        return _complex_product(head, relation)

    def head_query(self, tail: Tensor, relation: Tensor) -> Tensor:
        """Return the tail, rotated back."""
        return _complex_product(tail, relation, conjugate=True)


class SimplE(_Product):
    """``(<h_1, r_1, t_2> + <h_2, r_2, t_1>) / 2``, of rows in two halves (Kazemi & Poole 2018)."""

    parts = 2

    def tail_query(self, head: Tensor, relation: Tensor) -> Tensor:
        """Return the products in the order of a tail's halves."""
        first, second = (head * relation).chunk(2, dim=-1)
        return torch.cat([second, first], dim=-1) / 2

    def head_query(self, tail: Tensor, relation: Tensor) -> Tensor:
        """Return the products in the order of a head's halves."""
        first, second = tail.chunk(2, dim=-1)
        return relation * torch.cat([second, first], dim=-1) / 2

    def modulus(self, rows: Tensor) -> Tensor:
        """Return absolute values, because the halves are real."""
        return rows.abs()


def _unit_quaternions(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.unflatten(-1, (-1, 4)), dim=-1).flatten(-2)


class QuatE(_Product):
    """``-<h r, t>`` of quaternions; ``r`` are rotations (Zhang et al. 2019; PyKEEN's sign)."""

    parts = 4
    relation_normalizer = staticmethod(_unit_quaternions)

    def tail_query(self, head: Tensor, relation: Tensor) -> Tensor:
        """Return the rotated head."""
        return _hamilton_product(head, -relation)

    def head_query(self, tail: Tensor, relation: Tensor) -> Tensor:
        """Return the tail, rotated back."""
        signs = relation.new_tensor([-1, 1, 1, 1]).repeat(relation.shape[-1] // 4)
        return _hamilton_product(tail, relation * signs)


class HolE(_Product):
    """``<r, h * t>`` with circular correlation (Nickel et al. 2016)."""

    def tail_query(self, head: Tensor, relation: Tensor) -> Tensor:
        """Return the circular convolution."""
        return torch.fft.irfft(torch.fft.rfft(head) * torch.fft.rfft(relation), n=head.shape[-1])

    def head_query(self, tail: Tensor, relation: Tensor) -> Tensor:
        """Return the circular correlation."""
        product = torch.fft.rfft(relation).conj() * torch.fft.rfft(tail)
        return torch.fft.irfft(product, n=tail.shape[-1])


def _complex_product(a: Tensor, b: Tensor, conjugate: bool = False) -> Tensor:
    left, right = (torch.view_as_complex(x.unflatten(-1, (-1, 2))) for x in (a, b))
    return torch.view_as_real(left * (right.conj() if conjugate else right)).flatten(-2)


def _hamilton_product(a: Tensor, b: Tensor) -> Tensor:
    a0, a1, a2, a3 = a.unflatten(-1, (-1, 4)).unbind(-1)
    b0, b1, b2, b3 = b.unflatten(-1, (-1, 4)).unbind(-1)
    product = [
        a0 * b0 - a1 * b1 - a2 * b2 - a3 * b3,
        a0 * b1 + a1 * b0 + a2 * b3 - a3 * b2,
        a0 * b2 - a1 * b3 + a2 * b0 + a3 * b1,
        a0 * b3 + a1 * b2 - a2 * b1 + a3 * b0,
    ]
    return torch.stack(product, dim=-1).flatten(-2)


SCORERS: dict[str, type[Scorer]] = {
    "complex": ComplEx,
    "distmult": DistMult,
    "hole": HolE,
    "quate": QuatE,
    "rotate": RotatE,
    "simple": SimplE,
    "transe": TransE,
    "transe_l1": TransEL1,
}
