"""Where a job's ranks run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardemb.exceptions import InputError
from shardemb.launch.local import run_local
from shardemb.launch.ray import PLACEMENTS, check_address, run_on_ray
from shardemb.launch.torchrun import run_under_torchrun
from shardemb.utils.validation import at_least, one_of

LAUNCHERS = ("local", "torchrun", "ray")


@dataclass(frozen=True)
class LaunchConfig:
    """Where a job's ranks run; nothing but ``ray_data`` changes what the job computes."""

    #: who starts the ranks: "local", this process on its machine; "torchrun", which has started
    #: this one; "ray"
    launcher: str = "local"
    #: ranks; with "torchrun" what that has started counts
    workers: int = 1
    #: Ray: take up to so many where the cluster has room for them, and go on with fewer; 0 for
    #: ``workers``, always
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
    #: Ray: seconds between two looks whether there is room for more ranks, up to ``max_workers``
    resize_seconds: float = 60.0
    #: Ray: start again from the newest checkpoint after so many failures of workers or nodes
    max_failures: int = 3
    #: Ray: Parquet of training triples instead of the dataset's: columns head, relation and tail,
    #: of labels that it has too. Each rank gets a share of them through Ray Data, so that batches
    #: depend on the number of ranks; "" for none
    ray_data: str = ""
    #: Ray: seconds to wait until the cluster has room for the ranks
    wait_seconds: float = 60.0

    def __post_init__(self) -> None:
        one_of("launch", self, {"launcher": LAUNCHERS, "placement": PLACEMENTS})
        check_address(self.address)
        at_least(
            "launch",
            self,
            workers=1,
            max_workers=0,
            max_failures=0,
            wait_seconds=0,
            resize_seconds=0,
        )
        if 0 < self.max_workers < self.workers:
            raise InputError(
                f"launch.max_workers: got {self.max_workers}, expected 0 or at least workers ="
                f" {self.workers}"
            )
        if not self.cpus_per_worker > 0 or any(
            not amount > 0 for amount in self.resources_per_worker.values()
        ):
            raise InputError(
                f"launch.cpus_per_worker: got {self.cpus_per_worker}, others"
                f" {self.resources_per_worker}: expected above 0"
            )
        for name in ("max_workers", "ray_data"):
            if getattr(self, name) and self.launcher != "ray":
                got = f"{getattr(self, name)!r} with launcher {self.launcher!r}"
                raise InputError(f"launch.{name}: got {got}, expected launcher 'ray'")


def run(
    fn: Callable[..., Any],
    config: LaunchConfig,
    *args: Any,
    gpus: bool = False,
    timeout_s: float = 300,
    storage: Path | None = None,
) -> Any:
    """Run ``fn(*args)`` on every rank, as configured.

    See :func:`run_local`, :func:`run_under_torchrun`, :func:`run_on_ray`.
    """
    if config.launcher == "local":
        return run_local(
            fn, config.workers, *args, timeout_s=timeout_s, backend="nccl" if gpus else "gloo"
        )
    if config.launcher == "torchrun":
        return run_under_torchrun(
            fn, *args, timeout_s=timeout_s, backend="nccl" if gpus else "gloo"
        )
    workers = (config.workers, config.max_workers) if config.max_workers else config.workers
    return run_on_ray(
        fn,
        workers,
        *args,
        address=config.address,
        use_gpu=gpus,
        cpus_per_worker=config.cpus_per_worker,
        resources_per_worker=config.resources_per_worker,
        placement=config.placement,
        max_failures=config.max_failures,
        wait_s=config.wait_seconds,
        resize_s=config.resize_seconds,
        parquet=config.ray_data,
        timeout_s=timeout_s,
        storage=storage,
    )
