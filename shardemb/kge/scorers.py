"""Scores of triples as pure functions of rows, with a matrix product where many candidates share a query.

A scorer splits ``score(h, r, t)`` into a query made of head and relation and a dot product with the tail, so that
candidates cost ``B x D`` times ``D x N``. Heads are ranked as tails of the reciprocal relation (Lacroix et al. 2018).
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Scorer(ABC):
    """What a model needs of a scoring function; rows are real ``(..., D)``."""

    @abstractmethod
    def query(self, head: Tensor, relation: Tensor) -> Tensor:
        """Return ``(B, D)`` so that a tail's score is its dot product with the query."""

    @abstractmethod
    def modulus(self, rows: Tensor) -> Tensor:
        """Return the absolute values of a row's elements, for regularizers."""

    def check_dim(self, dim: int) -> None:
        """Raise ValueError for a number of columns that the scorer cannot use."""

    def score(self, query: Tensor, tail: Tensor) -> Tensor:
        """Score each query against its own tail: ``(B, D)``, ``(B, D)`` to ``(B,)``."""
        return (query * tail).sum(-1)

    def score_all(self, query: Tensor, tails: Tensor) -> Tensor:
        """Score each query against all tails: ``(B, D)``, ``(N, D)`` to ``(B, N)``."""
        return query @ tails.T


class DistMult(Scorer):
    """``<h, r, t>`` of real rows (Yang et al. 2015)."""

    def query(self, head: Tensor, relation: Tensor) -> Tensor:
        """Return the elementwise product."""
        return head * relation

    def modulus(self, rows: Tensor) -> Tensor:
        """Return absolute values."""
        return rows.abs()


class ComplEx(Scorer):
    """``Re <h, r, conj(t)>`` of complex rows (Trouillon et al. 2016): ``D / 2`` real parts, then as many imaginary ones."""

    def check_dim(self, dim: int) -> None:
        """Refuse an odd number of columns."""
        if dim % 2:
            raise ValueError(f"got dim={dim}, expected an even one: ComplEx stores real and imaginary parts")

    def query(self, head: Tensor, relation: Tensor) -> Tensor:
        """Return the complex product."""
        h_re, h_im = head.chunk(2, dim=-1)
        r_re, r_im = relation.chunk(2, dim=-1)
        return torch.cat([h_re * r_re - h_im * r_im, h_re * r_im + h_im * r_re], dim=-1)

    def modulus(self, rows: Tensor) -> Tensor:
        """Return ``(..., D / 2)``; the tiny term keeps the root's gradient finite at 0."""
        re, im = rows.chunk(2, dim=-1)
        return (re.square() + im.square() + 1e-12).sqrt()


SCORERS: dict[str, type[Scorer]] = {"complex": ComplEx, "distmult": DistMult}
