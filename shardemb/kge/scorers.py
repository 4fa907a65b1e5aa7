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
    def query(self, known: Tensor, relation: Tensor, head: bool = False) -> Tensor:
        """Return ``(..., D)``, to compare with candidates.

        ``known`` are heads, and the candidates tails; the reverse if ``head`` is asked for.
        """

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
    #: of the norm
    p = 2

    def score(self, query: Tensor, candidate: Tensor) -> Tensor:
        return -torch.linalg.vector_norm(query - candidate, self.p, dim=-1)

    def score_all(self, query: Tensor, candidates: Tensor, exact: bool = False) -> Tensor:
        if exact or self.p == 1:  # L1 distances are no matrix product
            return -kernels.distances(query, candidates, self.p)
        with torch.autocast(query.device.type, enabled=False):  # it subtracts large numbers
            wide = torch.promote_types(query.dtype, torch.float32)
            query, candidates = query.to(wide), candidates.to(wide)
            squares = query.square().sum(-1), candidates.square().sum(-1)
            lengths = squares[0].unsqueeze(-1) + squares[1].unsqueeze(-2)
            square = torch.add(lengths, query @ candidates.mT, alpha=-2)
        return -square.clamp_min(1e-12).sqrt()  # smaller values are rounding errors; gradient 0


class TransE(_Distance):
    """``-||h + r - t||_2`` (Bordes et al. 2013)."""

    def query(self, known: Tensor, relation: Tensor, head: bool = False) -> Tensor:
        """Return the expected entity."""
        return known - relation if head else known + relation


class TransEL1(TransE):
    """``-||h + r - t||_1`` (Bordes et al. 2013)."""

    p = 1


class DistMult(_Product):
    """``<h, r, t>`` of real rows (Yang et al. 2015)."""

    def query(self, known: Tensor, relation: Tensor, head: bool = False) -> Tensor:
        """Return the elementwise product."""
        return known * relation


class ComplEx(_Product):
    """``Re <h, r, conj(t)>`` of complex rows (Trouillon et al. 2016)."""

    parts = 2

    def query(self, known: Tensor, relation: Tensor, head: bool = False) -> Tensor:
        """Return the complex product, for heads with the conjugate relation."""
        return _complex_product(known, relation, conjugate=head)


def _unit_complex(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.unflatten(-1, (-1, 2)), dim=-1).flatten(-2)


class RotatE(_Distance):
    """``-||h r - t||_2`` of complex rows; each element of ``r`` is a rotation (Sun et al. 2019)."""

    parts = 2
    relation_normalizer = staticmethod(_unit_complex)

    def query(self, known: Tensor, relation: Tensor, head: bool = False) -> Tensor:
        """Return the rotated head, or the tail, rotated back."""
        return _complex_product(known, relation, conjugate=head)


class SimplE(_Product):
    """``(<h_1, r_1, t_2> + <h_2, r_2, t_1>) / 2``, of rows in two halves (Kazemi & Poole 2018)."""

    parts = 2

    def query(self, known: Tensor, relation: Tensor, head: bool = False) -> Tensor:
        """Return the products in the order of the candidate's halves."""
        if head:
            return relation * _swapped_halves(known) / 2
        return _swapped_halves(known * relation) / 2

    def modulus(self, rows: Tensor) -> Tensor:
        """Return absolute values, because the halves are real."""
        return rows.abs()


def _swapped_halves(rows: Tensor) -> Tensor:
    return torch.cat(rows.chunk(2, dim=-1)[::-1], dim=-1)


def _unit_quaternions(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.unflatten(-1, (-1, 4)), dim=-1).flatten(-2)


class QuatE(_Product):
    """``-<h r, t>`` of quaternions; ``r`` are rotations (Zhang et al. 2019; PyKEEN's sign)."""

    parts = 4
    relation_normalizer = staticmethod(_unit_quaternions)

    def query(self, known: Tensor, relation: Tensor, head: bool = False) -> Tensor:
        """Return the rotated head, or the tail, rotated back."""
        if not head:
            return _hamilton_product(known, -relation)
        signs = relation.new_tensor([-1, 1, 1, 1]).repeat(relation.shape[-1] // 4)
        return _hamilton_product(known, relation * signs)


class HolE(_Product):
    """``<r, h * t>`` with circular correlation (Nickel et al. 2016)."""

    def query(self, known: Tensor, relation: Tensor, head: bool = False) -> Tensor:
        """Return the circular convolution, or for heads the correlation."""
        factor = torch.fft.rfft(relation)
        product = torch.fft.rfft(known) * (factor.conj() if head else factor)
        return torch.fft.irfft(product, n=known.shape[-1])


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
