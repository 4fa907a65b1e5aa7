"""Where a job's ranks run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardemb.exceptions import InputError
from shardemb.launch.local import run_local
from shardemb.launch.ray import RayOptions, run_on_ray
from shardemb.launch.torchrun import run_under_torchrun
from shardemb.utils.validation import at_least, one_of


@dataclass(frozen=True)
class LaunchConfig:
    """Where a job's ranks run; this does not change the results."""

    #: who starts the ranks: "local", this process on its machine; "torchrun", which has started
    #: this one; "ray"
    launcher: str = "local"
    #: ranks; with "torchrun" what that has started counts
    workers: int = 1
    #: Ray: upper bound of an elastic job, which continues with fewer workers when the cluster
    #: shrinks; 0 for exactly ``workers``
    max_workers: int = 0
    #: of the Ray cluster: "local", one of our own on this machine; "auto", that of this node; or
    #: HOST:PORT of its head
    address: str = "local"
    #: Ray: logical CPUs of a rank, which also has as many threads
    cpus_per_worker: float = 1.0
    #: Ray: other resources of a rank, by name
    resources_per_worker: dict[str, float] = field(default_factory=dict)
    #: Ray: "PACK" ranks on few nodes, "SPREAD" them, or one of these "STRICT_"
    placement: str = "PACK"
    #: Ray: seconds between two checks whether more ranks fit, up to ``max_workers``
    resize_seconds: float = 60.0
    #: Ray: start again from the newest checkpoint after so many failures of workers or nodes
    max_failures: int = 3
    #: Ray: seconds to wait until the ranks fit the cluster
    wait_seconds: float = 60.0

    def __post_init__(self) -> None:
        one_of("launch", self, {"launcher": ("local", "torchrun", "ray")})
        at_least("launch", self, workers=1, max_workers=0)
        _ = self.ray_options  # checks its settings
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

    @property
    def ray_options(self) -> RayOptions:
        """The settings for Ray."""
        return RayOptions(
            address=self.address,
            cpus_per_worker=self.cpus_per_worker,
            resources_per_worker=self.resources_per_worker,
            placement=self.placement,
            max_failures=self.max_failures,
            wait_seconds=self.wait_seconds,
            resize_seconds=self.resize_seconds,
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
    options = config.ray_options
    return run_on_ray(
        fn, workers, *args, options=options, gpus=gpus, timeout_s=timeout_s, storage=storage
    )
