"""Mixed precision over rows on several ranks."""

from typing import Any

import torch

from shardemb.comm import collectives


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler for sharded tables: an overflow on any rank skips the step on all.

    torch's own sees the gradients of this rank's rows alone. Arguments are
    torch.amp.GradScaler's; ``device`` is that of the loss. :meth:`unscale_` and :meth:`step` are
    collectives. Pass it to :meth:`shardemb.Coordinator.step`, or use it as in torch's loops.
    """

    sees_all_ranks = True

    def _unscale_grads_(self, optimizer: Any, *args: Any) -> dict[torch.device, torch.Tensor]:
        found: dict[torch.device, torch.Tensor] = super()._unscale_grads_(optimizer, *args)
        flags = list(found.values()) or [torch.zeros(1)]  # a rank may have no gradient
        infinite = torch.stack([flag.sum().cpu() for flag in flags]).sum()
        collectives.all_reduce(infinite, collectives.MAX, operation="infinite gradients")
        if not found:
            return {torch.device("cpu"): infinite.reshape(1)}
        return {device: infinite.to(device).reshape(1) for device in found}
