"""The interface of read-only tables: rows, nearest rows, labels."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from shardemb.exceptions import (
    IdRangeError,
    InputError,
    InputTypeError,
    NoTableError,
    UnknownNameError,
)

Metric = Literal["cosine", "dot", "l2"]
#: ids or labels, one or many
Keys = int | str | Sequence[int] | Sequence[str] | np.ndarray | Tensor


@dataclass(frozen=True)
class Nearest:
    """The best rows for each of ``q`` queries, best first; equal scores by id."""

    #: (q, k) int64
    ids: Tensor
    #: (q, k): cosines or dot products in falling order, or distances in rising order
    scores: Tensor
    #: q lists of k labels; None without a vocabulary
    labels: list[list[str]] | None


class Table(ABC):
    """A read-only table.

    Attributes:
        name: the table's name.
        max_id: number of rows.
        shape: of a row.
        dtype: of :meth:`lookup`.
        path: the checkpoint.
    """

    name: str
    max_id: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    path: Path

    @property
    @abstractmethod
    def labelled(self) -> bool:
        """Whether the rows have labels."""

    @abstractmethod
    def _ids_of(self, labels: list[str]) -> np.ndarray:
        """Return the ids of labels; KeyError for an unknown one."""

    @abstractmethod
    def _labels_of(self, ids: Tensor) -> list[list[str]]:
        """Return labels for ids ``(q, k)``."""

    @abstractmethod
    def _look_up(self, ids: Tensor, raw: bool) -> Tensor:
        """Return rows ``(n, *shape)`` for valid ids ``(n,)``."""

    @abstractmethod
    def _search(
        self, vectors: Tensor, k: int, metric: Metric, exclude: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return scores (higher is nearer) and ids ``(q, k)``; excluded ids score -inf."""

    def ids(self, keys: Keys) -> Tensor:
        """Return int64 ids for ids or labels of any shape.

        Raises:
            KeyError: an unknown label, or no vocabulary.
            IndexError: an id out of range.
            TypeError: neither integers nor labels.
        """
        where = f"{self.path}: table {self.name!r}"
        labels = [keys] if isinstance(keys, str) else keys
        if isinstance(labels, Sequence) and labels and all(isinstance(x, str) for x in labels):
            if not self.labelled:
                raise UnknownNameError(
                    f"{where}: got a label, but there is no vocabulary beside the checkpoint:"
                    " give ids"
                )
            try:
                ids = torch.from_numpy(self._ids_of([str(label) for label in labels]))
            except KeyError as error:
                raise UnknownNameError(f"{where}: {error.args[0]}") from None
            return ids[0] if isinstance(keys, str) else ids
        ids = torch.as_tensor(keys)
        if ids.dtype not in (torch.int32, torch.int64) and ids.numel():
            raise InputTypeError(f"{where}: got keys of {ids.dtype}, expected integers or labels")
        ids = ids.long()
        low, high = (int(x) for x in ids.aminmax()) if ids.numel() else (0, -1)
        if low < 0 or high >= self.max_id:
            bad = low if low < 0 else high
            raise IdRangeError(f"{where}: got id {bad}, expected 0 <= id < {self.max_id}")
        return ids

    @torch.no_grad()
    def lookup(self, keys: Keys, raw: bool = False) -> Tensor:
        """Return copies of rows, normalized as forward does.

        Args:
            keys: ids or labels of any shape ``s``.
            raw: omit the normalizer.

        Returns:
            ``(*s, *shape)``.

        Raises:
            KeyError, IndexError, TypeError: as :meth:`ids`.
        """
        ids = self.ids(keys)
        return self._look_up(ids.reshape(-1), raw).reshape(*ids.shape, *self.shape)

    @torch.no_grad()
    def nearest(
        self, query: Any, k: int = 10, metric: Metric = "cosine", exclude_query: bool = True
    ) -> Nearest:
        """Return the nearest rows, by exact comparison with all rows.

        Args:
            query: ids or labels, one or ``(q,)``, or a tensor of vectors ``(q, *shape)``.
            k: rows per query.
            metric: "cosine" (0 for a zero row), "dot" (complex: real part of the Hermitian
                product), or "l2", the distance.
            exclude_query: omit the query's own rows.

        Raises:
            ValueError: an unknown metric, another shape of vectors, or k below 1.
            KeyError, IndexError, TypeError: as :meth:`ids`.
        """
        if metric not in ("cosine", "dot", "l2") or k < 1:
            raise InputError(
                f"got metric={metric!r}, k={k}, expected 'cosine', 'dot' or 'l2', and at least 1"
            )
        exclude = None
        if isinstance(query, Tensor) and (query.is_floating_point() or query.is_complex()):
            vectors = query
            if tuple(vectors.shape[1:]) != self.shape or not vectors.dim():
                raise InputError(
                    f"table {self.name!r}: got vectors of shape {tuple(query.shape)}, expected (q,"
                    f" *{self.shape})"
                )
        else:
            ids = self.ids(query).reshape(-1)
            vectors, exclude = self.lookup(ids), ids if exclude_query else None
        nearest = self.named(*self._search(vectors, k, metric, exclude))
        return nearest if metric != "l2" else replace(nearest, scores=-nearest.scores)

    def named(self, scores: Tensor, ids: Tensor) -> Nearest:
        """Add the labels to scores and ids ``(q, k)``, without excluded rows."""
        # excluded rows come last if fewer than k others exist
        kept = int((scores > -torch.inf).sum(1).min()) if scores.numel() else 0
        scores, ids = scores[:, :kept], ids[:, :kept]
        return Nearest(ids, scores, self._labels_of(ids) if self.labelled else None)


AnyTable = TypeVar("AnyTable", bound=Table)


class Tables(Generic[AnyTable]):
    """The tables of a checkpoint.

    Attributes:
        path: the checkpoint.
        step: its optimizer step.
        tables: by their names in the model.
    """

    path: Path
    step: int
    tables: Mapping[str, AnyTable]

    def __getitem__(self, name: str) -> AnyTable:
        try:
            return self.tables[name]
        except KeyError:
            raise UnknownNameError(
                f"{self.path}: got table {name!r}, expected one of {sorted(self.tables)}"
            ) from None

    @property
    def table(self) -> AnyTable:
        """The table with the most rows, such as a knowledge graph's entities."""
        if not self.tables:
            raise NoTableError(f"{self.path}: has no table")
        return max(self.tables.values(), key=lambda table: table.max_id)

    def _chosen(self, name: str | None) -> AnyTable:
        return self.table if name is None else self[name]

    def lookup(self, keys: Keys, table: str | None = None, raw: bool = False) -> Tensor:
        """As :meth:`Table.lookup`; by default of :attr:`table`."""
        return self._chosen(table).lookup(keys, raw)

    def nearest(
        self,
        query: Any,
        k: int = 10,
        metric: Metric = "cosine",
        exclude_query: bool = True,
        table: str | None = None,
    ) -> Nearest:
        """As :meth:`Table.nearest`; by default of :attr:`table`."""
        return self._chosen(table).nearest(query, k, metric, exclude_query)


def best_of(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k highest scores, falling, and their ids; equal scores by id.

    Unlike with topk, the result does not depend on how the rows are divided. Takes scores ``(q,
    n)``, and ids ``(q, n)`` or ``(n,)`` for all queries.
    """
    ids, n, k = ids.expand(scores.shape), scores.shape[1], min(k, scores.shape[1])
    # one more score shows whether a tie crosses the end
    best, places = scores.topk(min(k + 1, n), dim=1)
    tied = (best[:, k - 1] == best[:, k]).nonzero().squeeze(1).tolist() if 0 < k < n else []
    best, best_ids = best[:, :k], ids.gather(1, places[:, :k])
    for line in tied:
        equal = (scores[line] == best[line, -1]).nonzero().squeeze(1)
        count = int((best[line] == best[line, -1]).sum())
        best_ids[line, k - count :] = ids[line, equal].topk(count, largest=False).values
    order = best_ids.argsort(dim=1)
    best_ids, best = best_ids.gather(1, order), best.gather(1, order)
    best, order = best.sort(dim=1, descending=True, stable=True)
    return best, best_ids.gather(1, order)


def scores_of(queries: Tensor, metric: Metric) -> Callable[[Tensor], Tensor]:
    """Return a function from rows ``(n, *shape)`` to scores ``(q, n)``; higher is nearer."""
    flat = _real(queries)

    def scores(rows: Tensor) -> Tensor:
        other = _real(rows)
        if metric == "l2":  # a matmul's rounding is as large as small distances
            return -torch.cdist(flat, other, compute_mode="donot_use_mm_for_euclid_dist")
        product = flat @ other.T
        if metric == "dot":
            return product
        norms = flat.norm(dim=1, keepdim=True) * other.norm(dim=1)
        return product / norms.clamp_min(torch.finfo(flat.dtype).tiny)

    return scores


def _real(x: Tensor) -> Tensor:
    """Flatten rows into real numbers, at least float32."""
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.reshape(len(x), -1).to(torch.promote_types(x.dtype, torch.float32))
