"""Starts a job's ranks locally, by torchrun or on Ray; when one fails, all end."""

from typing import TYPE_CHECKING

from shardemb.exceptions import WorkerError
from shardemb.utils.lazy import lazy_names

if TYPE_CHECKING:
    from shardemb.launch.config import LaunchConfig, run
    from shardemb.launch.local import run_local
    from shardemb.launch.ray import RayOptions, run_on_ray
    from shardemb.launch.torchrun import run_under_torchrun

__all__ = [
    "LaunchConfig",
    "RayOptions",
    "WorkerError",
    "run",
    "run_local",
    "run_on_ray",
    "run_under_torchrun",
]

_MODULES = {
    "LaunchConfig": "config",
    "RayOptions": "ray",
    "run": "config",
    "run_local": "local",
    "run_on_ray": "ray",
    "run_under_torchrun": "torchrun",
}

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
