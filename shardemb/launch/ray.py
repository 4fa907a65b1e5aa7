"""Ray: who is connected to which cluster, what room it has, and one rank a worker on it.

Ray is imported when it is asked for: the extra ``[ray]``.
"""

import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardemb.comm import watchdog
from shardemb.exceptions import InputError, MissingExtraError, WorkerError, restart_may_help
from shardemb.utils import logs, run_metrics

_log = logs.logger(__name__)

PLACEMENTS = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
#: of Ray Train's processes, unless the user has set them
_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": (
        "0.5"
    ),  # between two looks at the workers; a report waits for one
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": (
        "5"
    ),  # for which a worker that has stopped is waited for
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths are relative to where the user is
}
#: what Ray Train says again and again, to all who have no dashboard
_NOISE = "Failed to query Ray Train Controller actor state|Reporting training result"


def load_ray() -> Any:
    """Return the module; ModuleNotFoundError that says how to install it."""
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", _NOISE)  # read when it is imported
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
    """Be connected to a Ray cluster, and to no other than the one that is named.

    Args:
        address: "local" starts a Ray of its own on this machine, that listens to this machine alone
            and ends with the block; "auto" is the cluster that this machine is a node of;
            "HOST:PORT" one's head; None what this process is connected to already.
        cpus: of "local": how many logical CPUs it has; None for this machine's.
        log_to_driver: whether what workers print is printed here.

    Yields:
        The module ``ray``.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: an address of another form; this process is connected already, or is not,
            against ``address``.
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
        if error := _refusal(host, port):  # Ray itself would try for a quarter of an hour
            raise _missing(address, error) from error
        # of those that listen on 127.0.0.1 alone Ray would ask another address of this machine
        alone = (
            host in ("127.0.0.1", "localhost", "[::1]")
            and _refusal(ray.util.get_node_ip_address(), port) is not None
        )
    environment = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
    options: dict[str, Any] = {
        "address": address,
        "log_to_driver": log_to_driver,
        "configure_logging": False,
    }
    with ExitStack() as stack:
        if alone:
            stack.enter_context(_on_this_machine_alone(ray))
        if address == "local":
            # workers find the modules that this process finds, as spawned processes do
            environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
            environment["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # it asks the dashboard
            options |= {"num_cpus": cpus, "include_dashboard": False}
        try:
            ray.init(**options, runtime_env={"env_vars": environment})
        except ConnectionError as error:
            raise _missing(address, error) from error
        stack.callback(ray.shutdown)
        yield ray


@contextmanager
def _on_this_machine_alone(ray: Any) -> Iterator[None]:
    """Let Ray start or find one that listens on 127.0.0.1.

    It would on all interfaces, whatever address it is given.
    """
    constants, switch = ray._private.ray_constants, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    before = constants.ENABLE_RAY_CLUSTER
    with _environment({switch: "0"}):
        constants.ENABLE_RAY_CLUSTER = False  # read from the environment when Ray was imported
        try:
            yield
        finally:
            constants.ENABLE_RAY_CLUSTER = before


def _missing(address: str, error: OSError) -> ConnectionError:
    return ConnectionError(
        f"Ray at {address!r}: {error}: is the cluster up, and its address right?"
    )


def _refusal(host: str, port: str) -> OSError | None:
    """Return why nobody answers there; None if somebody does."""
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        return error
    return None


def check_address(address: str) -> None:
    """Raise ValueError for an address that is neither "local", "auto" nor HOST:PORT."""
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
    address: str | None = "local",
    use_gpu: bool = False,
    cpus_per_worker: float = 1.0,
    resources_per_worker: Mapping[str, float] | None = None,
    placement: str = "PACK",
    max_failures: int = 3,
    wait_s: float = 60.0,
    resize_s: float = 60.0,
    parquet: str = "",
    timeout_s: float = 300,
    storage: Path | None = None,
) -> Any:
    """Run ``fn(*args)`` on every rank of a process group of a Ray cluster's workers.

    By Ray Train's TorchTrainer.

    When a worker or its node dies, all ranks start again, in fresh processes and a fresh process
    group: ``fn`` goes on from its newest checkpoint, or from the beginning. An error that would
    come again (ValueError, TypeError, FileNotFoundError, FloatingPointError and the like) ends the
    job at once.

    Args:
        fn: picklable; it finds its rank with ``torch.distributed``.
        workers: number of ranks; or the least and the most, of which Ray takes as many as the
            cluster has room for. When it gets room for more, all ranks start again.
        args: picklable.
        address: see :func:`shardemb.connected`.
        use_gpu: give each rank a GPU, and the group NCCL instead of gloo.
        cpus_per_worker: logical CPUs of a rank; torch takes as many threads, one at least.
        resources_per_worker: others, by name ("memory" in bytes).
        placement: "PACK", "SPREAD", "STRICT_PACK" or "STRICT_SPREAD".
        max_failures: how often ranks may start again.
        wait_s: seconds to wait until the cluster has room for the ranks.
        resize_s: seconds between two looks whether there is room for more ranks.
        parquet: what ranks get shares of, see :func:`shardemb.share`; "" for nothing.
        timeout_s: seconds after which a collective gives up on a rank that does not come.
        storage: folder for Ray Train's own records, that all nodes see; None for ``~/ray_results``.

    Returns:
        What rank 0 returned (picklable).

    Raises:
        WorkerError: a rank raised what would come again, or workers have failed too often.
        ValueError: the cluster has no room for the ranks.
        ModuleNotFoundError, ConnectionError: see :func:`shardemb.connected`.
    """
    least, most = (workers, workers) if isinstance(workers, int) else workers
    if not 1 <= least <= most:
        raise InputError(f"got {workers} workers, expected at least 1, or (least, most)")
    resources = {
        **(resources_per_worker or {}),
        "CPU": cpus_per_worker,
        **({"GPU": 1.0} if use_gpu else {}),
    }
    logical = math.ceil(most * cpus_per_worker) if address == "local" else None
    with connected(address, cpus=logical):
        require_room(least, resources, placement, wait_s)
        outcome = fit(
            Work(fn, args, timeout_s, math.floor(cpus_per_worker), address == "local", parquet),
            workers,
            resources,
            placement,
            resize_s,
            max_failures,
            storage,
        )
    if isinstance(outcome, WorkerError):
        raise outcome
    return outcome


def require_room(
    workers: int, resources: Mapping[str, float], placement: str, wait_s: float
) -> None:
    """Return when the cluster has room for so many workers of these resources each, busy or not.

    Ray Train itself would try for ever, and not listen to Ctrl-C.

    Raises:
        ValueError: it has not, after ``wait_s`` seconds.
    """
    ray, deadline = load_ray(), time.monotonic() + wait_s
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fits = [
            int(min(node.get(name, 0.0) / amount + 1e-9 for name, amount in resources.items()))
            for node in nodes
        ]
        room = {"STRICT_PACK": max(fits, default=0), "STRICT_SPREAD": sum(map(bool, fits))}.get(
            placement, sum(fits)
        )
        if room >= workers:
            return
        if time.monotonic() >= deadline:
            wanted = ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
            have = "; ".join(
                ", ".join(f"{node.get(name, 0.0):g} {name}" for name in resources) for node in nodes
            )
            raise InputError(
                f"got {workers} workers of {wanted} each ({placement}), expected at most {room}:"
                f" the cluster's {len(nodes)} nodes have {have}: ask for less, or add nodes (waited"
                f" {wait_s:g} s)"
            )
        time.sleep(min(1.0, wait_s))


@dataclass(frozen=True)
class Work:
    """What each rank does."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    timeout_s: float
    threads: int
    #: on this machine alone
    local: bool
    #: that each rank gets a share of, and its rows
    parquet: str = ""
    rows: int = 0


def fit(
    work: Work,
    workers: int | tuple[int, int],
    resources: Mapping[str, float],
    placement: str,
    resize_s: float,
    max_failures: int,
    storage: Path | None,
) -> Any:
    """Let Ray Train run a function on workers; return what rank 0 returned, or a WorkerError."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import WorkerGroupError

    use_gpu, datasets = "GPU" in resources, {}
    if work.parquet:
        import ray.data

        ray.data.DataContext.get_current().enable_progress_bars = False
        datasets["share"] = ray.data.read_parquet(work.parquet)
        work = replace(work, rows=datasets["share"].count())
    environment = {"GLOO_SOCKET_IFNAME": "lo"} if work.local else {}
    environment |= logs.environment()
    settings = _SETTINGS | {
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(work.timeout_s),  # of a report; Ray Train has none
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(work.timeout_s + 30),
    }
    with _environment(settings):
        trainer = TorchTrainer(
            _rank_main,
            train_loop_config={"work": work},
            datasets=datasets,
            # the watch is first to give up, and says why
            torch_config=TorchConfig(
                "nccl" if use_gpu else "gloo", timeout_s=round(work.timeout_s + 10)
            ),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=use_gpu,
                resources_per_worker=dict(resources),
                placement_strategy=placement,
                elastic_resize_monitor_interval_s=resize_s,
            ),
            run_config=RunConfig(
                # another name than before, or Ray Train would go on with its own records
                name=f"shardemb-{time.time_ns()}",
                storage_path=None if storage is None else str(Path(storage).resolve()),
                failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=3),
                worker_runtime_env={"env_vars": environment},
                logging_config=LoggingConfig(log_level="ERROR" if work.local else "WARNING"),
            ),
        )
        try:
            return _in_thread(trainer.fit).return_value
        except WorkerGroupError as error:
            failures = [
                WorkerError(rank, _name_of(found), str(found))
                for rank, found in error.worker_failures.items()
            ]
            return min(failures, key=lambda failure: failure.order)


def _name_of(error: BaseException) -> str:
    """Return an exception's class.

    Or "died", which is what Ray's own exceptions of a worker mean.
    """
    return "died" if type(error).__module__.startswith("ray.") else type(error).__name__


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Let Ray Train find settings that the user has not set."""
    mine = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)


def _in_thread(call: Callable[[], Any]) -> Any:
    """Call in another thread, so that Ray Train leaves SIGINT to this one.

    And Ctrl-C is KeyboardInterrupt.
    """
    done: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(call())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="shardemb-ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)  # without a time-out, a signal would wait too
    if failed:
        raise failed[0]
    return done[0]


#: of this process, if it is a rank
_work: Work | None = None


def share(batch_rows: int = 1 << 17) -> tuple[Iterator[Any], int]:
    """Return this rank's share of the job's Parquet as Arrow tables.

    And how many rows all shares have together.

    Ray Data deals the rows to the ranks, as many to each: a few that are left over come to nobody,
    and who gets which may be another one in each attempt.
    """
    import ray.train

    assert _work is not None, "not on a worker of run_on_ray(parquet=...)"
    return (
        ray.train.get_dataset_shard("share").iter_batches(
            batch_size=batch_rows, batch_format="pyarrow"
        ),
        _work.rows,
    )


def _listener(rank: int, report: Callable[[dict[str, Any]], None]) -> run_metrics.Listener:
    """Return what hands a rank's records to Ray: gauges for Prometheus, and Ray Train's report.

    A report waits for all ranks and for the controller, so there is one for an epoch and one for a
    validation.
    """
    from ray.util.metrics import Gauge

    gauges: dict[str, Any] = {}

    def listener(kind: str, step: int, figures: dict[str, Any]) -> None:
        mine = {
            name: value[rank] if isinstance(value, list) else value
            for name, value in figures.items()
        }
        for name, value in {"step": step, **mine}.items():
            full = f"shardemb_{name}" if kind == "train" else f"shardemb_{kind}_{name}"
            if full not in gauges:
                gauges[full] = Gauge(
                    full, description=f"{name} of shardemb's {kind} records", tag_keys=("rank",)
                )
            gauges[full].set(value, tags={"rank": str(rank)})
        if kind != "train" or figures["epoch"] % 1 == 0:
            report({"kind": kind, "step": step, **figures})

    return listener


def _rank_main(config: dict[str, Any]) -> Any:
    """Run on each worker, in Ray Train's thread."""
    import ray.train
    import torch
    import torch.distributed as dist

    global _work
    work = _work = config["work"]
    rank = dist.get_rank()
    torch.set_num_threads(max(1, work.threads))
    watchdog.set_timeout(work.timeout_s)
    run_metrics.listen(_listener(rank, ray.train.report))
    if rank == 0:  # also after a failure, where Ray Train does not say that it starts again
        _log.info("Ray Train starts %d ranks", dist.get_world_size())
    try:
        return watchdog.attend(work.fn, *work.args)
    except Exception as error:
        elsewhere = watchdog.raised_elsewhere()
        if elsewhere is not None and not elsewhere.restart_may_help:
            return elsewhere  # this rank has lost one that raised, whatever it was in
        watchdog.report(error)
        if not restart_may_help(error):  # Ray Train would start again after an exception
            if dist.get_backend() == "gloo":
                dist.destroy_process_group()  # so that the others do not wait for this rank
            return WorkerError.of(rank, error)
        raise
