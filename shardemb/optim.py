"""Row-wise optimizers: one class for Parameters, one specification for what FBGEMM updates in backward."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Rows updated at a time: 512 to 2048 keep them in cache, which halves the time.
CHUNK_ROWS = 2048


class RowWiseAdagrad(torch.optim.Optimizer):
    """Adagrad with one accumulator a row: ``s += mean(g^2)``, ``w -= lr * g / (sqrt(s) + eps)``.

    The rule is FBGEMM's EXACT_ROWWISE_ADAGRAD (one update a row and step, gradients of duplicate ids summed first), so
    this class gives what the fused kernel gives. Takes sparse gradients, whose untouched rows cost nothing, and dense
    ones.

    Args:
        params: parameters ``(R, ...)``.
        lr: learning rate.
        eps: added to the root; torch.optim.Adagrad's 1e-10.

    Raises:
        ValueError: a negative ``lr`` or ``eps``.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.1, eps: float = 1e-10) -> None:
        if lr < 0 or eps < 0:
            raise ValueError(f"got lr={lr}, eps={eps}, expected both to be at least 0")
        super().__init__(params, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the rows that have a gradient; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["sum"] = parameter.new_zeros(len(parameter))
                self._update(parameter, parameter.grad, state["sum"], group["lr"], group["eps"])
        return loss

    @staticmethod
    def _update(weight: Tensor, grad: Tensor, total: Tensor, lr: float, eps: float) -> None:
        if not grad.is_sparse:
            total += grad.reshape(len(grad), -1).square().mean(1) if grad.numel() else 0
            scale = (total.sqrt() + eps).reshape(-1, *[1] * (grad.dim() - 1))
            weight.sub_(lr * grad / scale)
            return
        merged = grad.coalesce()
        rows, values = merged.indices()[0], merged.values()
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk, g = rows[start : start + CHUNK_ROWS], values[start : start + CHUNK_ROWS]
            s = total.index_select(0, chunk) + g.reshape(len(g), -1).square().mean(1)
            total.index_copy_(0, chunk, s)
            weight.index_add_(0, chunk, g / (s.sqrt() + eps).reshape(-1, *[1] * (g.dim() - 1)), alpha=-lr)


@dataclass(frozen=True)
class FusedOptimizer:
    """What FBGEMM does to the touched rows in backward, with ``Embedding(gradient="fused", optimizer=...)``."""

    #: "sgd", "adagrad" or "rowwise_adagrad": what FBGEMM has on CPU and CUDA
    name: str = "rowwise_adagrad"
    #: learning rate; change it during training with ``Embedding.set_learning_rate``
    lr: float = 0.1
    #: added to Adagrad's root; torch's 1e-10, not FBGEMM's 1e-8
    eps: float = 1e-10

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adagrad", "rowwise_adagrad"):
            raise ValueError(
                f"got fused optimizer {self.name!r}, expected 'sgd', 'adagrad' or 'rowwise_adagrad'; "
                f"for others use gradient='sparse' with a torch.optim optimizer"
            )
        if self.lr < 0 or self.eps < 0:
            raise ValueError(f"got lr={self.lr}, eps={self.eps}, expected both to be at least 0")

    @property
    def state_columns(self) -> int | None:
        """Columns of state a row: 0, 1, or None for as many as the row has."""
        return {"sgd": 0, "rowwise_adagrad": 1, "adagrad": None}[self.name]
