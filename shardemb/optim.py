"""Row-wise optimizers, and the options of FBGEMM's optimizers in backward.

A row-wise optimizer is an ordinary ``torch.optim.Optimizer``. A step sorts the touched rows of a
sparse gradient and passes over them once, in chunks that stay in cache: sum a row's gradients, read
it, decay, update, constrain (on the coordinator's request), write. Other rows and their moments
stay, as with torch.optim.SparseAdam. A dense gradient touches all rows. float32 rows on the CPU use
the C loops of :mod:`shardemb.kernels.rows`, others torch's operators.

Class names differ from torch.optim's, because PyKEEN's class_resolver rejects duplicates at import.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shardemb import kernels
from shardemb.exceptions import InputError
from shardemb.kernels import CHUNK_ROWS
from shardemb.utils.types import RowFunction

#: the state of some rows, by name
State = dict[str, Tensor]
#: hyper-parameters
Group = Mapping[str, Any]


def _undecorated(method: Any) -> Any:
    """The guard of torch's methods imports torch._dynamo: 1.2 s of CPU and 70 MB."""
    return getattr(method, "__wrapped__", method)


class RowWiseOptimizer(torch.optim.Optimizer):
    """An update rule that uses only a row, its gradient and its state.

    Subclasses define :attr:`state_per_row` and :meth:`update_rows`, and take some of these
    hyper-parameters:

    ``lr``
        learning rate
    ``eps``
        added to the root
    ``betas``
        decay of the first and second moment
    ``weight_decay``
        decoupled (Loshchilov & Hutter 2019): first scales touched rows by ``1 - lr * weight_decay``

    Args:
        params: parameters ``(R, ...)``, or groups of them.
        defaults: hyper-parameters.

    Raises:
        ValueError: ``lr``, ``eps`` or ``weight_decay`` below 0, or ``betas`` not in [0, 1).
    """

    #: the state's names, and whether each has one number a row instead of D
    state_per_row: ClassVar[dict[str, bool]] = {}
    #: rows of each parameter that this process has updated
    rows_updated: Counter[Tensor]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with hyper-parameters; ValueError for complex ones."""
        check_hyperparameters(type(self).__name__, {**self.defaults, **param_group})
        _undecorated(torch.optim.Optimizer.add_param_group)(self, param_group)
        if not hasattr(self, "rows_updated"):
            self.rows_updated = Counter()
        if any(parameter.is_complex() for parameter in self.param_groups[-1]["params"]):
            raise InputError(
                f"{type(self).__name__}: got a complex parameter, expected real ones: use"
                " torch.view_as_real"
            )

    zero_grad = _undecorated(torch.optim.Optimizer.zero_grad)
    state_dict = _undecorated(torch.optim.Optimizer.state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.rows_updated = Counter()
        for group in self.param_groups:  # older state dicts, and torch.optim's, may lack some
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load ``state_dict``'s result; the state stays float32, which torch would cast."""
        _undecorated(torch.optim.Optimizer.load_state_dict)(self, state_dict)
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for name, parameter in zip(names, parameters, strict=True):
            for key, value in state_dict["state"].get(name, {}).items():
                if key in self.state_per_row:
                    self.state[parameter][key] = value.to(parameter.device)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        constrain: Mapping[Tensor, RowFunction] | None = None,
    ) -> Any:
        """Update the rows that have a gradient.

        Args:
            closure: computes the loss and the gradients.
            constrain: by parameter, a function of rows ``(n, D)`` applied to updated rows.

        Returns:
            The result of ``closure``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group, (constrain or {}).get(parameter))
        return loss

    def _step_one(self, parameter: Tensor, group: Group, constrain: RowFunction | None) -> None:
        assert parameter.grad is not None
        state = self._state_of(parameter)
        state["step"] += 1
        group, data = {**group, "step": state["step"]}, parameter.detach()
        weights = data.contiguous()
        tensors = [_as_rows(weights), *(_as_rows(state[name]) for name in self.state_per_row)]
        if parameter.grad.is_sparse:
            rows, values = _rows_and_values(parameter.grad)
            merged = kernels.merge(rows, parameter.shape[0])
            self.rows_updated[parameter] += merged.unique.shape[0]
            numbers: dict[str, Any] = {k: group[k] for k in ("eps", "betas") if k in group}
            numbers |= {"lr": self.rate(group), "decay": group["weight_decay"] * group["lr"]}
            rule, (weight, *kept) = _RULES.get(type(self)), tensors
            if rule is None or not kernels.update(
                rule, weight, values, merged, kept, constrain=constrain, **numbers
            ):
                self._update(tensors, merged.unique, merged.sum(values), group, constrain)
        else:
            self.rows_updated[parameter] += len(tensors[0])
            grad = _as_rows(parameter.grad.contiguous())
            self._update(tensors, None, grad, group, constrain)
        if weights is not data:  # not contiguous
            data.copy_(weights)

    def _update(
        self,
        tensors: list[Tensor],
        rows: Tensor | None,
        grad: Tensor,
        group: Group,
        constrain: RowFunction | None,
    ) -> None:
        for start in range(0, len(grad), CHUNK_ROWS):
            stop = min(start + CHUNK_ROWS, len(grad))
            chunk = None if rows is None else rows[start:stop]
            # a slice is a view, index_select a copy that is written back
            parts = [t[start:stop] if chunk is None else t.index_select(0, chunk) for t in tensors]
            weight = parts[0].to(_state_dtype(tensors[0]))
            if group["weight_decay"]:
                weight.mul_(1 - group["lr"] * group["weight_decay"])
            kept = dict(zip(self.state_per_row, parts[1:], strict=True))
            self.update_rows(weight, grad[start:stop].to(weight.dtype), kept, group)
            if weight is not parts[0]:
                parts[0].copy_(weight)
            if constrain is not None:
                parts[0].copy_(constrain(parts[0]))
            if chunk is not None:
                for tensor, part in zip(tensors, parts, strict=True):
                    tensor.index_copy_(0, chunk, part)

    def rate(self, group: Group) -> float:
        """Return the learning rate of step ``group["step"]``, with bias correction."""
        return float(group["lr"])

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        state.setdefault("step", 0)
        for name, per_row in self.state_per_row.items():
            shape = parameter.shape[:1] if per_row else parameter.shape
            if name not in state:
                dtype, device = _state_dtype(parameter), parameter.device
                state[name] = kernels.empty(shape, dtype, device).zero_()
            if state[name].shape != shape:
                raise InputError(
                    f"{type(self).__name__}: got {name!r} of shape {tuple(state[name].shape)} for a"
                    f" parameter {tuple(parameter.shape)}, expected {tuple(shape)}: was the state"
                    " saved by another optimizer?"
                )
        return state

    def update_rows(self, weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
        """Update rows and state in place.

        Args:
            weight: ``(n, D)``.
            grad: ``(n, D)``, read-only.
            state: ``(n, 1)`` or ``(n, D)`` by name.
            group: hyper-parameters, and "step", the parameter's steps including this one.
        """
        raise NotImplementedError


def merged_gradient(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return a sparse gradient's distinct rows ``(n,)``, ascending, and their summed values."""
    rows, values = _rows_and_values(grad)
    if grad.is_coalesced():
        return rows, values
    merged = kernels.merge(rows, len(grad))
    return merged.unique, merged.sum(values)


def _rows_and_values(grad: Tensor) -> tuple[Tensor, Tensor]:
    if grad.sparse_dim() != 1:
        raise InputError(
            f"got a gradient with {grad.sparse_dim()} sparse dimensions, expected 1: that of rows"
        )
    return grad._indices()[0], _as_rows(kernels.contiguous(grad._values()))


def _as_rows(tensor: Tensor) -> Tensor:
    """View a tensor ``(R, ...)`` as ``(R, D)``; a scalar is one row."""
    if tensor.dim() == 2:
        return tensor
    num_rows = tensor.shape[0] if tensor.dim() else 1
    return tensor.view(num_rows, math.prod(tensor.shape[1:]))


def why_refused(optimizer: torch.optim.Optimizer, group: Group, sparse: bool) -> str | None:
    """Return why a torch optimizer cannot take a table's gradient, and what can; or None."""
    name = type(optimizer).__name__
    if not type(optimizer).__module__.startswith("torch.optim"):
        return None
    if isinstance(optimizer, torch.optim.SparseAdam):
        text = "SparseAdam takes no dense gradients: use shardemb.optim.LazyAdam, which takes both"
        return None if sparse else text
    if not sparse:
        return None
    if not isinstance(optimizer, torch.optim.SGD | torch.optim.Adagrad):
        ours = "shardemb.optim.LazyAdam" if "Adam" in name else "one of shardemb.optim"
        return f"{name} takes no sparse gradients: use {ours}, or kernel='dense'"
    if group.get("weight_decay"):
        return (
            f"{name} takes no sparse gradients with weight_decay={group['weight_decay']}: use one"
            " of shardemb.optim, whose weight_decay is of touched rows, or kernel='dense'"
        )
    return None


def _state_dtype(parameter: Tensor) -> torch.dtype:
    """At least float32: eps would be 0 in half precision."""
    return torch.promote_types(parameter.dtype, torch.float32)


def moves_touched_rows_only(optimizer: torch.optim.Optimizer, group: Group) -> bool:
    """Whether a step on a sparse gradient surely leaves other rows unchanged."""
    if isinstance(optimizer, RowWiseOptimizer):
        return True
    known = isinstance(optimizer, torch.optim.SGD | torch.optim.Adagrad | torch.optim.SparseAdam)
    return known and not group.get("momentum") and not group.get("weight_decay")


def check_hyperparameters(who: str, values: Mapping[str, Any]) -> None:
    """Raise ValueError for a rate, eps, decay or beta out of range."""
    for key in ("lr", "eps", "weight_decay"):
        if key in values and not 0 <= values[key] < math.inf:
            raise InputError(
                f"{who}: got {key}={values[key]}, expected a finite number, at least 0"
            )
    if "betas" in values and not all(0 <= beta < 1 for beta in values["betas"]):
        raise InputError(
            f"{who}: got betas={values['betas']}, expected two numbers, at least 0 and below 1"
        )


class SparseSGD(RowWiseOptimizer):
    """Touched rows: ``w -= lr * g``; no momentum, which would move other rows too."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def update_rows(self, weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
        """See the class."""
        weight.add_(grad, alpha=-group["lr"])


class SparseAdagrad(RowWiseOptimizer):
    """``s += g^2``, ``w -= lr * g / (sqrt(s) + eps)``, as torch.optim.Adagrad on sparse gradients.

    Duchi et al. 2011.
    """

    state_per_row: ClassVar[dict[str, bool]] = {"sum": False}

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-2, eps: float = 1e-10, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    def update_rows(self, weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
        """See the class."""
        root = state["sum"].addcmul_(grad, grad).sqrt().add_(group["eps"])
        weight.addcdiv_(grad, root, value=-group["lr"])


class RowWiseAdagrad(RowWiseOptimizer):
    """Adagrad with one accumulator a row: ``s += mean(g^2)``, ``w -= lr * g / (sqrt(s) + eps)``.

    The rule of FBGEMM's EXACT_ROWWISE_ADAGRAD, and so of the fused kernel: gradients of duplicate
    ids are summed, then each row is updated once. ``eps`` is torch.optim.Adagrad's.
    """

    state_per_row: ClassVar[dict[str, bool]] = {"sum": True}

    def __init__(
        self, params: Iterable[Any], lr: float = 0.1, eps: float = 1e-10, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    def update_rows(self, weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
        """See the class."""
        root = state["sum"].add_(_mean_square(grad)).sqrt().add_(group["eps"])
        weight.addcdiv_(grad, root, value=-group["lr"])


def _mean_square(grad: Tensor) -> Tensor:
    """Return ``(n, 1)``; 0 for rows without columns, whose mean would be NaN."""
    return grad.square().sum(1, keepdim=True) / max(1, grad.shape[1])


class LazyAdam(RowWiseOptimizer):
    """Adam (Kingma & Ba 2015) on touched rows and their moments, by torch.optim.SparseAdam's rule.

    Bias correction counts the parameter's steps, not the row's.
    """

    state_per_row: ClassVar[dict[str, bool]] = {"exp_avg": False, "exp_avg_sq": False}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def update_rows(self, weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
        """See the class."""
        beta1, beta2 = group["betas"]
        mean = state["exp_avg"].lerp_(grad, 1 - beta1)
        square = _mean_square(grad) if self.state_per_row["exp_avg_sq"] else grad.square()
        # SparseAdam adds eps before the second bias correction, torch.optim.Adam after it
        root = state["exp_avg_sq"].lerp_(square, 1 - beta2).sqrt().add_(group["eps"])
        weight.addcdiv_(mean, root, value=-self.rate(group))

    def rate(self, group: Group) -> float:
        """See :class:`RowWiseOptimizer`."""
        beta1, beta2 = group["betas"]
        return float(
            group["lr"] * math.sqrt(1 - beta2 ** group["step"]) / (1 - beta1 ** group["step"])
        )


class RowWiseAdam(LazyAdam):
    """:class:`LazyAdam` with one second moment a row, of ``mean(g^2)``, in half the memory.

    FBGEMM's PARTIAL_ROWWISE_ADAM; arguments of :class:`LazyAdam`.
    """

    state_per_row: ClassVar[dict[str, bool]] = {"exp_avg": False, "exp_avg_sq": True}


#: exact types: a subclass may have another update_rows than the C loops
_RULES = {
    SparseSGD: "sgd",
    SparseAdagrad: "adagrad",
    RowWiseAdagrad: "rowwise_adagrad",
    LazyAdam: "adam",
    RowWiseAdam: "rowwise_adam",
}


_FUSED = ("sgd", "adagrad", "rowwise_adagrad")


@dataclass(frozen=True)
class FusedOptimizer:
    """The update of touched rows that FBGEMM makes in backward: ``Fused(optimizer=...)``."""

    #: "sgd", "adagrad" or "rowwise_adagrad", which FBGEMM has on CPU and CUDA
    name: str = "rowwise_adagrad"
    #: learning rate; ``Embedding.set_learning_rate`` changes it during training
    lr: float = 0.1
    #: added to Adagrad's root; torch's 1e-10, not FBGEMM's 1e-8
    eps: float = 1e-10
    #: must be 0: FBGEMM would ignore it
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in _FUSED:
            raise InputError(
                f"got fused optimizer {self.name!r}, expected one of {_FUSED}; for"
                " others use kernel='sparse' with one of shardemb.optim or torch.optim"
            )
        check_hyperparameters("FusedOptimizer", vars(self))
        if self.weight_decay:
            raise InputError(
                f"got weight_decay={self.weight_decay} for a fused optimizer, which FBGEMM would"
                " silently ignore: use kernel='sparse' with e.g."
                " shardemb.optim.RowWiseAdagrad(parameters, weight_decay=...)"
            )

    def state_columns(self, columns: int) -> int:
        """Return the columns of state of a row with ``columns``."""
        return {"sgd": 0, "rowwise_adagrad": 1, "adagrad": columns}[self.name]
