"""Starts one process a rank, on this machine, by torchrun, or on a Ray cluster.

And ends all of them when one fails.
"""

from typing import TYPE_CHECKING

from shardemb.exceptions import WorkerError
from shardemb.utils.lazy import lazy_names

if TYPE_CHECKING:
    from shardemb.launch.config import LaunchConfig, run
    from shardemb.launch.local import run_local
    from shardemb.launch.ray import run_on_ray
    from shardemb.launch.torchrun import run_under_torchrun

__all__ = ["LaunchConfig", "WorkerError", "run", "run_local", "run_on_ray", "run_under_torchrun"]

_MODULES = {
    "LaunchConfig": "config",
    "run": "config",
    "run_local": "local",
    "run_on_ray": "ray",
    "run_under_torchrun": "torchrun",
}

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
