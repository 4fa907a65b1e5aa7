"""Where a job's ranks run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardemb.exceptions import InputError
from shardemb.launch.local import run_local
from shardemb.launch.ray import RayOptions, run_on_ray
from shardemb.launch.torchrun import run_under_torchrun
from shardemb.utils.validation import at_least, one_of


@dataclass(frozen=True)
class LaunchConfig(RayOptions):
    """Where a job's ranks run; this does not change the results."""

    #: who starts the ranks: "local", this process on its machine; "torchrun", which has started
    #: this one; "ray"
    launcher: str = "local"
    #: ranks; with "torchrun" what that has started counts
    workers: int = 1
    #: Ray: upper bound of an elastic job, which continues with fewer workers when the cluster
    #: shrinks; 0 for exactly ``workers``
    max_workers: int = 0

    address: str = "local"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("launch", self, {"launcher": ("local", "torchrun", "ray")})
        at_least("launch", self, workers=1, max_workers=0)
        if 0 < self.max_workers < self.workers:
            raise InputError(
                f"launch.max_workers: got {self.max_workers}, expected 0 or at least workers ="
                f" {self.workers}"
            )
        if self.max_workers and self.launcher != "ray":
            raise InputError(
                f"launch.max_workers: got {self.max_workers} with launcher {self.launcher!r},"
                " expected launcher 'ray'"
            )


def run(
    fn: Callable[..., Any],
    config: LaunchConfig,
    *args: Any,
    gpus: bool = False,
    timeout_s: float = 300,
    storage: Path | None = None,
) -> Any:
    """Run ``fn(*args)`` on every rank, as configured; return rank 0's result.

    See :func:`run_local`, :func:`run_under_torchrun` (it returns this rank's result),
    :func:`run_on_ray`.
    """
    backend = "nccl" if gpus else "gloo"
    if config.launcher == "local":
        return run_local(fn, config.workers, *args, timeout_s=timeout_s, backend=backend)
    if config.launcher == "torchrun":
        return run_under_torchrun(fn, *args, timeout_s=timeout_s, backend=backend)
    workers = (config.workers, config.max_workers) if config.max_workers else config.workers
    return run_on_ray(
        fn, workers, *args, options=config, gpus=gpus, timeout_s=timeout_s, storage=storage
    )
