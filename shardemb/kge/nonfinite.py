"""The trainer's policy for NaN and infinite losses."""

import warnings
from collections.abc import Sequence
from typing import Literal

import torch

from shardemb import kernels
from shardemb.comm import collectives
from shardemb.coordinator import Coordinator
from shardemb.exceptions import NonfiniteError
from shardemb.kge.model import KnowledgeGraphModel
from shardemb.utils.types import few

#: of :class:`~shardemb.kge.TrainingConfig`
POLICIES = ("error", "warn", "skip")


class LossCheck:
    """Decides, with the other ranks, whether a step trains.

    Policy "error" raises on all ranks, "warn" warns and trains, "skip" warns and does not train.
    """

    def __init__(self, policy: str, model: KnowledgeGraphModel, coordinator: Coordinator) -> None:
        self._policy, self._model, self._coordinator = policy, model, coordinator
        #: policy of checkpoints for NaN and infinite rows
        self.of_checkpoints: Literal["error", "warn"] = "error" if policy == "error" else "warn"

    def agree(
        self, step: int, loss: torch.Tensor, flags: Sequence[bool]
    ) -> tuple[bool, list[bool]]:
        """Reduce the gradients; return whether the step trains, and which flags any rank set.

        A collective. With "error", FloatingPointError on all ranks names ranks and rows.
        """
        sums = self._coordinator.reduce([not torch.isfinite(loss), *flags])
        nonfinite, *flags = (bool(number) for number in sums)
        if not nonfinite:
            return True, flags
        text = "" if torch.isfinite(loss) else f"the loss is {loss.item()}{self._bad_rows()}"
        texts = collectives.gather(text, operation="whose loss is no number?")
        by_rank = [
            f"rank {rank}: {text}" if len(texts) > 1 else text
            for rank, text in enumerate(texts)
            if text
        ]
        advice = "lower optimizer.entity_lr or optimizer.relation_lr"
        message = f"step {step}: {'; '.join(by_rank)}: {advice}"
        if self._policy == "error":
            raise NonfiniteError(message)
        skips = self._policy == "skip"
        if collectives.rank_and_size()[0] == 0:
            number = self._coordinator.skipped + 1
            warnings.warn(message + f", step left out, {number} so far" * skips, stacklevel=2)
        return not skips, flags

    def _bad_rows(self) -> str:
        tables = []
        rank = collectives.rank_and_size()[0]
        for table in (self._model.entity, self._model.relation):
            ids = table.plan.local_ids()[kernels.nonfinite_rows(table.local_rows())].tolist()
            if ids:
                tables.append(
                    f"table {table.name!r} has {len(ids)} rows with NaN or infinite values on rank"
                    f" {rank}: {few(ids)}"
                )
        return f" ({'; '.join(tables)})" if tables else ""
