"""Scoring functions of triples, those of ``pykeen.nn.modules``.

A scorer turns relation and known entity into a query, which it compares with candidates by a dot
product or a distance. Candidates that share a query cost one matrix product, ``B x D`` times ``D x
N``, except for L1 distances. Complex rows are ``D / 2`` pairs of real and imaginary part,
quaternions ``D / 4`` groups of four, as in PyKEEN.

::

    complex    Re <h, r, conj(t)> of complex rows (Trouillon et al. 2016)
    distmult   <h, r, t> of real rows (Yang et al. 2015)
    hole       <r, h * t> with circular correlation (Nickel et al. 2016)
    quate      -<h r, t> of quaternions; r are rotations (Zhang et al. 2019; PyKEEN's sign)
    rotate     -||h r - t||_2 of complex rows; elements of r are rotations (Sun et al. 2019)
    simple     (<h_1, r_1, t_2> + <h_2, r_2, t_1>) / 2, of rows in halves (Kazemi & Poole 2018)
    transe     -||h + r - t||_2 (Bordes et al. 2013)
    transe_l1  -||h + r - t||_1 (Bordes et al. 2013)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from shardemb import kernels
from shardemb.utils.types import RowFunction


@dataclass(frozen=True)
class Scorer:
    """A scoring function of real rows ``(..., D)``."""

    #: known entities and relations ``(..., D)`` to queries ``(..., D)``, to compare with
    #: candidates for the tail, or for the head (the third argument)
    query: Callable[[Tensor, Tensor, bool], Tensor]
    #: candidates are compared by this norm of the difference; 0: by the dot product
    norm: int = 0
    #: real numbers of an element, such as 2 of a complex one
    parts: int = 1
    #: D must be a multiple of this
    divisor: int = 1
    #: makes relations valid, such as rotations; None if any row is
    relation_normalizer: RowFunction | None = None

    def score(self, query: Tensor, candidate: Tensor) -> Tensor:
        """Score each query against its own candidate: ``(..., D)``, ``(..., D)`` to ``(...)``."""
        if not self.norm:
            return torch.linalg.vecdot(query, candidate)
        return -torch.linalg.vector_norm(query - candidate, self.norm, dim=-1)

    def score_all(self, query: Tensor, candidates: Tensor, exact: bool = False) -> Tensor:
        """Score queries ``(..., B, D)`` against candidates ``(..., N, D)``: ``(..., B, N)``.

        ``exact`` computes distances from differences, slower than a matrix product but without its
        rounding.
        """
        if not self.norm:
            return query @ candidates.mT
        if exact or self.norm == 1:
            return -kernels.distances(query, candidates, self.norm)
        with torch.autocast(query.device.type, enabled=False):  # it subtracts large numbers
            wide = torch.promote_types(query.dtype, torch.float32)
            query, candidates = query.to(wide), candidates.to(wide)
            squares = query.square().sum(-1), candidates.square().sum(-1)
            lengths = squares[0].unsqueeze(-1) + squares[1].unsqueeze(-2)
            square = torch.add(lengths, query @ candidates.mT, alpha=-2)
        return -square.clamp_min(1e-12).sqrt()  # smaller values are rounding errors; gradient 0

    def modulus(self, rows: Tensor) -> Tensor:
        """Return absolute values of a row's elements ``(..., D / parts)``, for regularizers."""
        if self.parts == 1:
            return rows.abs()
        # keeps the root's gradient finite at 0
        return (rows.unflatten(-1, (-1, self.parts)).square().sum(-1) + 1e-12).sqrt()


def _translated(known: Tensor, relation: Tensor, head: bool) -> Tensor:
    return known - relation if head else known + relation


def _product(known: Tensor, relation: Tensor, head: bool) -> Tensor:
    return known * relation


def _complex_product(known: Tensor, relation: Tensor, head: bool) -> Tensor:
    a, b = (torch.view_as_complex(x.unflatten(-1, (-1, 2))) for x in (known, relation))
    return torch.view_as_real(a * (b.conj() if head else b)).flatten(-2)


def _unit_complex(rows: Tensor) -> Tensor:
    return F.normalize(rows.unflatten(-1, (-1, 2)), dim=-1).flatten(-2)


def _product_of_halves(known: Tensor, relation: Tensor, head: bool) -> Tensor:
    if head:
        return relation * _swapped_halves(known) / 2
    return _swapped_halves(known * relation) / 2


def _swapped_halves(rows: Tensor) -> Tensor:
    return torch.cat(rows.chunk(2, dim=-1)[::-1], dim=-1)


def _hamilton_product(known: Tensor, relation: Tensor, head: bool) -> Tensor:
    a0, a1, a2, a3 = known.unflatten(-1, (-1, 4)).unbind(-1)
    b0, b1, b2, b3 = relation.unflatten(-1, (-1, 4)).unbind(-1)
    b0 = -b0  # PyKEEN's sign; for heads with the conjugate
    if not head:
        b1, b2, b3 = -b1, -b2, -b3
    product = [
        a0 * b0 - a1 * b1 - a2 * b2 - a3 * b3,
        a0 * b1 + a1 * b0 + a2 * b3 - a3 * b2,
        a0 * b2 - a1 * b3 + a2 * b0 + a3 * b1,
        a0 * b3 + a1 * b2 - a2 * b1 + a3 * b0,
    ]
    return torch.stack(product, dim=-1).flatten(-2)


def _unit_quaternions(rows: Tensor) -> Tensor:
    return F.normalize(rows.unflatten(-1, (-1, 4)), dim=-1).flatten(-2)


def _circular(known: Tensor, relation: Tensor, head: bool) -> Tensor:
    """Convolve, or for heads correlate."""
    factor = torch.fft.rfft(relation)
    product = torch.fft.rfft(known) * (factor.conj() if head else factor)
    return torch.fft.irfft(product, n=known.shape[-1])


SCORERS: dict[str, Scorer] = {
    "complex": Scorer(_complex_product, parts=2, divisor=2),
    "distmult": Scorer(_product),
    "hole": Scorer(_circular),
    "quate": Scorer(_hamilton_product, parts=4, divisor=4, relation_normalizer=_unit_quaternions),
    "rotate": Scorer(
        _complex_product, norm=2, parts=2, divisor=2, relation_normalizer=_unit_complex
    ),
    "simple": Scorer(_product_of_halves, divisor=2),
    "transe": Scorer(_translated, norm=2),
    "transe_l1": Scorer(_translated, norm=1),
}
