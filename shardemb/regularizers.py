"""Terms of the loss that representations collect in forward, as in PyKEEN 1.11.1."""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardemb.exceptions import InputError, InputTypeError, UnknownNameError
from shardemb.utils.types import normalize_name


def _expected_norm(p: float, d: int) -> float:
    """``E[|x|^p]^(1/p)`` of ``d`` standard normal numbers, as PyKEEN's get_expected_norm."""
    if math.isinf(p):
        raise NotImplementedError("Normalization for inf norm is not implemented")
    moment = 2 ** (p / 2) * math.gamma((p + 1) / 2) / math.sqrt(math.pi)
    return float(moment * d) ** (1 / p)


def _reduce(x: Tensor, p: float, dim: int | None, normalize: bool, root: bool) -> Tensor:
    value = x.norm(p=p, dim=dim) if root else x.abs().pow(p).sum(dim=dim)
    if not normalize:
        return value
    return value / (_expected_norm(p, x.shape[-1]) if root else x.shape[-1])


class Regularizer(nn.Module):
    """Collects a term of the loss from representations.

    Args:
        weight: factor of the term.
        apply_only_once: count only the first ``update`` between two pops.
        parameters: tensors whose terms every pop adds.
    """

    weight: Tensor
    regularization_term: Tensor

    def __init__(
        self,
        weight: float = 1.0,
        apply_only_once: bool = False,
        parameters: Iterable[Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.tracked_parameters = list(parameters) if parameters else []
        self.register_buffer("weight", torch.as_tensor(weight))
        self.register_buffer("regularization_term", torch.zeros(1, dtype=torch.float32))
        self.apply_only_once = apply_only_once
        self.updated = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the unweighted term for representations ``(..., d)``."""
        raise NotImplementedError

    def update(self, *tensors: Tensor) -> None:
        """Add the terms of ``tensors``; does nothing in eval mode or without gradients."""
        counted = self.apply_only_once and self.updated
        if counted or not self.training or not torch.is_grad_enabled():
            return
        for x in tensors:
            self.regularization_term = self.regularization_term + self(x)
        self.updated = True

    @property
    def term(self) -> Tensor:
        """The weighted term so far, ``(1,)``."""
        return self.weight * self.regularization_term

    def reset(self) -> None:
        """Set the term to 0."""
        self.regularization_term = torch.zeros_like(self.regularization_term, requires_grad=False)
        self.updated = False

    def pop_regularization_term(self) -> Tensor:
        """Return the weighted term ``(1,)`` for the loss, and reset it."""
        if self.tracked_parameters:
            self.update(*self.tracked_parameters)
        term = self.term
        self.reset()
        return term

    def post_parameter_update(self) -> None:
        """Reset the term; warns if it was not used."""
        if self.updated:
            warnings.warn(
                "Resetting regularization term without using it; this may be an error.",
                stacklevel=2,
            )
        self.reset()


class NoRegularizer(Regularizer):
    """Adds nothing."""

    def update(self, *tensors: Tensor) -> None:
        """Do nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Return 0."""
        return x.new_zeros(1)


class LpRegularizer(Regularizer):
    """Mean Lp norm along ``dim``; ``normalize`` divides by that of standard normal numbers."""

    _root = True

    def __init__(
        self, *, p: float = 2.0, dim: int | None = -1, normalize: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.p, self.dim, self.normalize = p, dim, normalize

    def forward(self, x: Tensor) -> Tensor:
        """Return a scalar for ``(..., d)``."""
        return _reduce(x, self.p, self.dim, self.normalize, self._root).mean()


class PowerSumRegularizer(LpRegularizer):
    """Mean of the sum of absolute values to the power ``p``; 3 is N3 (Lacroix et al. 2018)."""

    _root = False


class NormLimitRegularizer(Regularizer):
    """Sum of the norms' excess over ``max_norm``; ``power_norm`` takes norms without the root."""

    def __init__(
        self,
        *,
        p: float = 2.0,
        dim: int | None = -1,
        max_norm: float = 1.0,
        power_norm: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.p, self.dim, self.max_norm, self.power_norm = p, dim, max_norm, power_norm

    def forward(self, x: Tensor) -> Tensor:
        """Return a scalar for ``(..., d)``."""
        norm = _reduce(x, self.p, self.dim, False, not self.power_norm)
        return (norm - self.max_norm).relu().sum()


class OrthogonalityRegularizer(Regularizer):
    """Soft orthogonality of two tensors: sum of squared cosines' excess over ``epsilon``.

    TransH (Wang et al. 2014). As in PyKEEN, a model calls :meth:`update`, with exactly two tensors.
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        apply_only_once: bool = True,
        epsilon: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        super().__init__(weight=weight, apply_only_once=apply_only_once, **kwargs)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Raise NotImplementedError: it needs two tensors."""
        raise NotImplementedError(f"{type(self).__name__} regularizer is order-sensitive!")

    def update(self, *tensors: Tensor) -> None:
        """Add the term of two tensors ``(..., d)``; ValueError for another number."""
        if len(tensors) != 2:
            raise InputError(f"Expects exactly two tensors, got {len(tensors)}")
        if self.apply_only_once and self.updated:
            return
        cosine = F.cosine_similarity(*tensors, dim=-1)
        self.regularization_term = (
            self.regularization_term + cosine.pow(2).subtract(self.epsilon).relu().sum()
        )
        self.updated = True


class CombinedRegularizer(Regularizer):
    """Mean of several regularizers, weighted by their weights.

    Args:
        regularizers: at least one, no :class:`NoRegularizer` (TypeError).
        total_weight: of the mean.
        kwargs: of :class:`Regularizer`.
    """

    normalization_factor: Tensor

    def __init__(
        self, regularizers: Iterable[Any], total_weight: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(weight=total_weight, **kwargs)
        self.regularizers = nn.ModuleList(regularizers)
        if any(isinstance(r, NoRegularizer) for r in self.regularizers):
            raise InputTypeError("Can not combine a no-op regularizer")
        total = torch.as_tensor(sum(self._weights()))
        self.register_buffer("normalization_factor", total.reciprocal())

    def _weights(self) -> list[Tensor]:
        return [r.weight for r in self.regularizers]  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted mean of the terms."""
        terms = [r.weight * r(x) for r in self.regularizers]
        return self.normalization_factor * torch.stack(terms).sum()


_REGULARIZERS: dict[str, type[Regularizer]] = {
    "combined": CombinedRegularizer,
    "lp": LpRegularizer,
    "no": NoRegularizer,
    "normlimit": NormLimitRegularizer,
    "orthogonality": OrthogonalityRegularizer,
    "powersum": PowerSumRegularizer,
}


def resolve_regularizer(regularizer: Any, kwargs: Mapping[str, Any] | None) -> nn.Module | None:
    """Resolve a name (KeyError if unknown), a class, an instance or None; TypeError for others."""
    made = hasattr(regularizer, "update") and not isinstance(regularizer, type)
    if made or regularizer is None:
        return regularizer
    if isinstance(regularizer, str):
        key = normalize_name(regularizer).removesuffix("regularizer")
        if key not in _REGULARIZERS:
            raise UnknownNameError(
                f"Invalid Regularizer name: {regularizer} (normalized to: {key}). Valid choices"
                f" are: {sorted(_REGULARIZERS)}"
            )
        regularizer = _REGULARIZERS[key]
    if not (isinstance(regularizer, type) and issubclass(regularizer, nn.Module)):
        raise InputTypeError(f"Invalid regularizer: {type(regularizer)} - {regularizer}")
    return regularizer(**(kwargs or {}))
