"""Estimates the cost of jobs, and measures this machine."""

from typing import TYPE_CHECKING

from shardemb.utils.lazy import lazy_names

if TYPE_CHECKING:
    from shardemb.planning import calibrate
    from shardemb.planning.cost_model import Estimate, Job, Machine, estimate, fewest_workers
    from shardemb.planning.report import Plan, machine_of, plan

__all__ = [
    "Estimate",
    "Job",
    "Machine",
    "Plan",
    "calibrate",
    "estimate",
    "fewest_workers",
    "machine_of",
    "plan",
]

_COST_MODEL = ("Estimate", "Job", "Machine", "estimate", "fewest_workers")
_MODULES = dict.fromkeys(_COST_MODEL, "cost_model")
_MODULES |= dict.fromkeys(("Plan", "plan", "machine_of"), "report")
_MODULES["calibrate"] = "calibrate"

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
