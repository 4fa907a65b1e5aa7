"""Ray: who is connected to which cluster, and what it has. Ray is imported when it is asked for: the extra ``[ray]``."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def load_ray() -> Any:
    """Return the module; ModuleNotFoundError that says how to install it."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"got no Ray ({error}), expected it: pip install 'shardemb[ray]'") from error
    return ray


@contextmanager
def connected(address: str | None, *, cpus: int | None = None, log_to_driver: bool = True) -> Iterator[Any]:
    """Be connected to a Ray cluster, and to no other than the one that is named.

    Args:
        address: "local" starts a Ray of its own on this machine, that listens to this machine alone and ends with the block;
            "auto" is the cluster that this machine is a node of; "HOST:PORT" one's head; None what this process is connected
            to already.
        cpus: of "local": how many logical CPUs it has; None for this machine's.
        log_to_driver: whether what workers print is printed here.

    Yields:
        The module ``ray``.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: an address of another form; this process is connected already, or is not, against ``address``.
        ConnectionError: there is no such cluster.
    """
    ray = load_ray()
    if address is None:
        if not ray.is_initialized():
            raise ValueError("got address None without a connection, expected 'local', 'auto' or HOST:PORT")
        yield ray
        return
    _check(address)
    if ray.is_initialized():
        raise ValueError(f"got address {address!r}, but this process is connected to Ray already: give None to use that")
    options: dict[str, Any] = {"address": address, "log_to_driver": log_to_driver, "configure_logging": False}
    if address == "local":
        options |= {"num_cpus": cpus, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        ray.init(**options)
    except ConnectionError as error:
        raise ConnectionError(f"Ray at {address!r}: {error}: is the cluster up, and its address right?") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check(address: str) -> None:
    """Raise ValueError for an address that is neither "local", "auto" nor HOST:PORT."""
    if address in ("local", "auto"):
        return
    host, separator, port = address.rpartition(":")
    if address.startswith("ray://") or not separator or not host or not port.isdigit():
        raise ValueError(
            f"got Ray address {address!r}, expected 'local', 'auto' on a node of the cluster, or HOST:PORT of its head; from "
            f"outside of the cluster use ray job submit"
        )
