"""Connects to a Ray cluster, checks that the ranks fit, and runs one rank a worker.

Ray is the extra ``[ray]``, imported on use.
"""

import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from shardemb.comm import watchdog
from shardemb.exceptions import InputError, MissingExtraError, WorkerError, restart_may_help
from shardemb.utils import logs, run_metrics
from shardemb.utils.validation import at_least, one_of

_log = logs.logger(__name__)

#: of Ray Train's processes, unless set by the user
_SETTINGS = {
    # seconds between two checks of the workers; a report waits for one
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # seconds to wait for a stopped worker
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths stay relative to the user's folder
}
#: messages that Ray Train repeats without a dashboard
_NOISE = "Failed to query Ray Train Controller actor state|Reporting training result"


@dataclass(frozen=True)
class RayOptions:
    """Which cluster runs a job, what each rank gets there, and what happens after failures.

    Raises:
        ValueError: a setting out of range; names it.
    """

    #: of the Ray cluster: "local", one of our own on this machine; "auto", that of this node; or
    #: HOST:PORT of its head
    address: str | None = "local"  # None: this process's connection
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
        placements = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
        one_of("launch", self, {"placement": placements})
        if self.address is not None:
            check_address(self.address)
        at_least("launch", self, max_failures=0, wait_seconds=0, resize_seconds=0)
        if not all(amount > 0 for amount in self.resources(gpus=False).values()):
            raise InputError(
                f"launch.cpus_per_worker: got {self.cpus_per_worker}, others"
                f" {self.resources_per_worker}: expected above 0"
            )

    def resources(self, gpus: bool) -> dict[str, float]:
        """Return a rank's resources, by Ray's names."""
        gpu = {"GPU": 1.0} if gpus else {}
        return {**self.resources_per_worker, "CPU": self.cpus_per_worker, **gpu}


def load_ray() -> Any:
    """Return the module; ModuleNotFoundError with instructions if it is missing."""
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", _NOISE)  # read when Ray is imported
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"got no Ray ({error}), expected it: pip install 'shardemb[ray]'"
        ) from error
    return ray


@contextmanager
def connected(
    address: str | None, *, cpus: int | None = None, log_to_driver: bool = True
) -> Iterator[Any]:
    """Connect to a Ray cluster, only to the named one.

    Args:
        address: "local" starts a Ray for this machine, until the block ends; "auto" is this node's
            cluster; "HOST:PORT" names a head; None is this process's connection.
        cpus: logical CPUs of "local"; None for this machine's.
        log_to_driver: print the workers' output.

    Yields:
        The module ``ray``.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: an invalid address, an address with an existing connection, or None without one.
        ConnectionError: there is no such cluster.
    """
    ray = load_ray()
    if address is None:
        if not ray.is_initialized():
            raise InputError(
                "got address None without a connection, expected 'local', 'auto' or HOST:PORT"
            )
        yield ray
        return
    check_address(address)
    if ray.is_initialized():
        raise InputError(
            f"got address {address!r}, but this process is connected to Ray already: give None to"
            " use that"
        )
    alone = address == "local"
    if address not in ("local", "auto"):
        host, _, port = address.rpartition(":")
        if error := _refusal(host, port):  # Ray itself would try for 15 minutes
            raise _missing(address, error) from error
        if host in ("127.0.0.1", "localhost", "[::1]"):
            # this node's other address does not reach a Ray on 127.0.0.1
            alone = _refusal(ray.util.get_node_ip_address(), port) is not None
    variables = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
    options = {"address": address, "log_to_driver": log_to_driver, "configure_logging": False}
    with ExitStack() as stack:
        if alone:
            stack.enter_context(_on_loopback(ray))
        if address == "local":
            # workers import from this process's module path
            variables["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
            variables["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # it needs the dashboard
            options |= {"num_cpus": cpus, "include_dashboard": False}
        try:
            ray.init(**options, runtime_env={"env_vars": variables})
        except ConnectionError as error:
            raise _missing(address, error) from error
        stack.callback(ray.shutdown)
        yield ray


@contextmanager
def _on_loopback(ray: Any) -> Iterator[None]:
    """Make Ray use 127.0.0.1; by default it listens on all interfaces."""
    constants = ray._private.ray_constants
    before = constants.ENABLE_RAY_CLUSTER
    with _environment({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}):
        constants.ENABLE_RAY_CLUSTER = False  # Ray reads the variable at import
        try:
            yield
        finally:
            constants.ENABLE_RAY_CLUSTER = before


def _missing(address: str, error: OSError) -> ConnectionError:
    hint = "is the cluster up, and its address right?"
    return ConnectionError(f"Ray at {address!r}: {error}: {hint}")


def _refusal(host: str, port: str) -> OSError | None:
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        return error
    return None


def check_address(address: str) -> None:
    """Raise ValueError unless the address is "local", "auto" or HOST:PORT."""
    if address in ("local", "auto"):
        return
    host, separator, port = address.rpartition(":")
    if address.startswith("ray://") or not separator or not host or not port.isdigit():
        raise InputError(
            f"got Ray address {address!r}, expected 'local', 'auto' on a node of the cluster, or"
            " HOST:PORT of its head; from outside of the cluster use ray job submit"
        )


def run_on_ray(
    fn: Callable[..., Any],
    workers: int | tuple[int, int],
    *args: Any,
    options: RayOptions | None = None,
    gpus: bool = False,
    timeout_s: float = 300,
    storage: Path | None = None,
) -> Any:
    """Run ``fn(*args)`` on every rank of a process group of a Ray cluster's workers.

    When a worker or its node dies, Ray Train restarts all ranks in fresh processes; ``fn``
    continues from its newest checkpoint. Errors that a restart cannot help (ValueError, TypeError,
    FileNotFoundError, FloatingPointError, ...) end the job at once.

    Args:
        fn: picklable; ``torch.distributed`` gives its rank.
        workers: number of ranks, or (least, most) of an elastic job: Ray takes as many as fit, and
            restarts all when more fit.
        args: picklable.
        options: cluster, resources and failures.
        gpus: give each rank a GPU, and the group NCCL instead of gloo.
        timeout_s: seconds that a collective waits for a missing rank.
        storage: folder for Ray Train's records, shared by all nodes; None for ``~/ray_results``.

    Returns:
        Rank 0's result (picklable).

    Raises:
        WorkerError: a rank raised an error that a restart cannot help, or workers failed too often.
        ValueError: the ranks do not fit the cluster.
        ModuleNotFoundError, ConnectionError: see :func:`connected`.
    """
    options = options or RayOptions()
    least, most = (workers, workers) if isinstance(workers, int) else workers
    if not 1 <= least <= most:
        raise InputError(f"got {workers} workers, expected at least 1, or (least, most)")
    cpus = math.ceil(most * options.cpus_per_worker) if options.address == "local" else None
    with connected(options.address, cpus=cpus):
        _require_capacity(least, options, gpus)
        main = partial(_rank_main, fn, args, timeout_s, math.floor(options.cpus_per_worker))
        outcome = _fit(main, workers, options, gpus, timeout_s, storage)
    if isinstance(outcome, WorkerError):
        raise outcome
    return outcome


def _require_capacity(workers: int, options: RayOptions, gpus: bool) -> None:
    """Checked first, because Ray Train would wait forever, and ignore Ctrl-C."""
    ray, deadline = load_ray(), time.monotonic() + options.wait_seconds
    resources = options.resources(gpus)
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fits = [
            int(min(node.get(name, 0.0) / amount + 1e-9 for name, amount in resources.items()))
            for node in nodes
        ]
        strict = {"STRICT_PACK": max(fits, default=0), "STRICT_SPREAD": sum(map(bool, fits))}
        capacity = strict.get(options.placement, sum(fits))
        if capacity >= workers:
            return
        if time.monotonic() >= deadline:
            wanted = ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
            have = "; ".join(
                ", ".join(f"{node.get(name, 0.0):g} {name}" for name in resources) for node in nodes
            )
            raise InputError(
                f"got {workers} workers of {wanted} each ({options.placement}), expected at most"
                f" {capacity}: the cluster's {len(nodes)} nodes have {have}: ask for less, or add"
                f" nodes (waited {options.wait_seconds:g} s)"
            )
        time.sleep(min(1.0, options.wait_seconds))


def _fit(
    main: Callable[[], Any],
    workers: int | tuple[int, int],
    options: RayOptions,
    gpus: bool,
    timeout_s: float,
    storage: Path | None,
) -> Any:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import WorkerGroupError

    settings = _SETTINGS | {
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(timeout_s),  # of a report
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(timeout_s + 30),
    }
    local = options.address == "local"  # all ranks are on this machine
    variables = logs.environment() | ({"GLOO_SOCKET_IFNAME": "lo"} if local else {})
    with _environment(settings):
        trainer = TorchTrainer(
            main,
            # longer than the watchdog's, which names the rank
            torch_config=TorchConfig("nccl" if gpus else "gloo", timeout_s=round(timeout_s + 10)),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=gpus,
                resources_per_worker=options.resources(gpus),
                placement_strategy=options.placement,
                elastic_resize_monitor_interval_s=options.resize_seconds,
            ),
            run_config=RunConfig(
                # a new name, or Ray Train would resume from its own records
                name=f"shardemb-{time.time_ns()}",
                storage_path=None if storage is None else str(Path(storage).resolve()),
                failure_config=FailureConfig(
                    max_failures=options.max_failures, controller_failure_limit=3
                ),
                worker_runtime_env={"env_vars": variables},
                logging_config=LoggingConfig(log_level="ERROR" if local else "WARNING"),
            ),
        )
        try:
            return _in_thread(trainer.fit).return_value
        except WorkerGroupError as error:
            failures = [
                WorkerError(rank, _name_of(failure), str(failure))
                for rank, failure in error.worker_failures.items()
            ]
            return min(failures, key=lambda failure: failure.order)


def _name_of(error: BaseException) -> str:
    """An exception's class, or "died" for Ray's own exceptions."""
    return "died" if type(error).__module__.startswith("ray.") else type(error).__name__


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _in_thread(call: Callable[[], Any]) -> Any:
    """Call in another thread, so that SIGINT raises in this one at once."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="shardemb-ray-train", daemon=True).start()
    while not wait([future], timeout=0.5).done:  # without a timeout it would delay signals
        pass
    return future.result()


def _listener(rank: int, report: Callable[[dict[str, Any]], None]) -> run_metrics.Listener:
    """A report waits for all ranks, so there is one an epoch and a validation."""
    from ray.util.metrics import Gauge

    gauges: dict[str, Any] = {}

    def listener(kind: str, step: int, figures: dict[str, Any]) -> None:
        for name, figure in {"step": step, **figures}.items():
            full = f"shardemb_{name}" if kind == "train" else f"shardemb_{kind}_{name}"
            if full not in gauges:
                text = f"{name} of shardemb's {kind} records"
                gauges[full] = Gauge(full, description=text, tag_keys=("rank",))
            value = figure[rank] if isinstance(figure, list) else figure
            gauges[full].set(value, tags={"rank": str(rank)})
        if kind != "train" or figures["epoch"] % 1 == 0:
            report({"kind": kind, "step": step, **figures})

    return listener


def _rank_main(
    fn: Callable[..., Any], args: tuple[Any, ...], timeout_s: float, threads: int
) -> Any:
    import ray.train
    import torch
    import torch.distributed as dist

    rank = dist.get_rank()
    torch.set_num_threads(max(1, threads))
    watchdog.set_timeout(timeout_s)
    run_metrics.listen(_listener(rank, ray.train.report))
    if rank == 0:  # Ray Train does not report restarts
        _log.info("Ray Train starts %d ranks", dist.get_world_size())
    try:
        return watchdog.attend(fn, *args)
    except Exception as error:
        elsewhere = watchdog.raised_elsewhere()
        if elsewhere is not None and not elsewhere.restart_may_help:
            return elsewhere  # the cause of this rank's own error
        watchdog.report(error)
        if not restart_may_help(error):  # an exception would make Ray Train restart
            if dist.get_backend() == "gloo":
                dist.destroy_process_group()  # the others stop waiting for this rank
            return WorkerError.of(rank, error)
        raise
