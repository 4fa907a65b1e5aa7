"""Memory of this machine or container, and the processor's name."""

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def free_bytes(device: "torch.device") -> int | None:
    """Bytes that a rank can allocate now, a CPU rank's share; None if unknown."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    free = available_bytes() if device.type == "cpu" else None
    return None if free is None else free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def resident_bytes() -> int:
    """Bytes of memory of this process; 0 if unknown."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if status.exists() else 0


def available_bytes() -> int | None:
    """Bytes that this machine or container can allocate now; None if unknown."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = meminfo.read_text().splitlines()
    available = next(line for line in lines if line.startswith("MemAvailable"))
    free, limit = int(available.split()[1]) * 1024, container_bytes()
    return free if limit is None else min(free, limit[1])


def total_bytes() -> int:
    """Bytes of memory of this machine, or this container's limit."""
    total, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), container_bytes()
    return total if limit is None else min(total, limit[0])


def container_bytes(
    root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")
) -> tuple[int, int] | None:
    """Return this container's memory limit and its free bytes; None without a limit.

    Read from Linux' control groups, version 2 or 1, of this process and all above it
    (https://docs.kernel.org/admin-guide/cgroup-v2.html, "Memory").
    """
    limits = []
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, names, prefix = root, ("memory.max", "memory.current"), ""
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            base, prefix = root / "memory", "total_"
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *(above for above in group.parents if above.is_relative_to(base))):
            try:
                limit, used = ((folder / name).read_text().strip() for name in names)
                stat = (folder / "memory.stat").read_text().splitlines()
            except OSError:  # a container sees its own group as the root
                continue
            if limit != "max" and int(limit) < 1 << 60:  # version 1 has no word for "no limit"
                cached = int(dict(entry.split() for entry in stat)[prefix + "inactive_file"])
                limits.append((int(limit), max(0, int(limit) - int(used) + cached)))
    return (min(a for a, _ in limits), min(b for _, b in limits)) if limits else None


def cpu_name() -> str:
    """Return the processor's name."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
