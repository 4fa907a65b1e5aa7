"""Runs ranks started by torchrun."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from shardemb.exceptions import InputError
from shardemb.utils import logs

_log = logs.logger(__name__)


def run_under_torchrun(
    fn: Callable[..., Any], *args: Any, timeout_s: float = 300, backend: str = "gloo"
) -> Any:
    """Run ``fn(*args)`` on this rank, and return its result; every rank of torchrun calls this.

    Arguments: see :func:`~shardemb.launch.run_local`.

    Raises:
        ValueError: torchrun did not start this process.
        Exception: the function's own.
    """
    import torch.distributed as dist

    from shardemb.comm import watchdog
    from shardemb.utils.devices import take_gpu

    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise InputError(
            "got launcher 'torchrun' in a process that torchrun has not started, expected "
            "torchrun --nproc-per-node 2 -m shardemb train ..."
        )
    watchdog.set_timeout(timeout_s)
    if backend == "nccl":
        take_gpu("got backend 'nccl'", otherwise="gloo")
    limit = timedelta(seconds=timeout_s + 10)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
    # torchrun's store keeps the addresses of a failed attempt
    prefix = f"shardemb-attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    store = dist.PrefixStore(prefix, store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    if rank == 0 and (restarts := int(os.environ["TORCHELASTIC_RESTART_COUNT"])):
        _log.info("restart %d by torchrun, with %d ranks", restarts, world_size)
    try:
        result = watchdog.attend(fn, *args)
    except BaseException as error:
        watchdog.report(error)
        raise
    dist.destroy_process_group()
    return result
