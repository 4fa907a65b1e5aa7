"""The memory that is free and in use, here or in this container; and the processor."""

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def free_bytes(device: "torch.device") -> int | None:
    """Bytes that can be allocated on a device now, shared by the ranks of this machine.

    None where it cannot be known.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    free = available_bytes() if device.type == "cpu" else None
    return None if free is None else free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def resident_bytes() -> int:
    """Bytes of memory that this process has; 0 where it cannot be known."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if status.exists() else 0


def available_bytes() -> int | None:
    """Bytes of memory that are free, or can be made so at once, here or in this container.

    None where it cannot be known.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    available = next(
        line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable")
    )
    free = int(available.split()[1]) * 1024
    limit = container_bytes()
    return free if limit is None else min(free, limit[1])


def total_bytes() -> int:
    """Bytes of memory that this machine has, or that this container may have."""
    total, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), container_bytes()
    return total if limit is None else min(total, limit[0])


def container_bytes(
    root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")
) -> tuple[int, int] | None:
    """Bytes of memory that this process's container, or job, may have.

    And those of them that are free; None without a limit.

    Read from Linux' control groups, version 2 or 1, of this process and all above it
    (https://docs.kernel.org/admin-guide/cgroup-v2.html, "Memory").
    """
    found = []
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        base, old = (root / "memory", "total_") if kinds else (root, "")
        limit, used = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes")
            if old
            else ("memory.max", "memory.current")
        )
        group = base / path.lstrip("/")
        for folder in (group, *(above for above in group.parents if above.is_relative_to(base))):
            try:
                most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
                stat = dict(
                    line.split() for line in (folder / "memory.stat").read_text().splitlines()
                )
            except OSError:  # a container sees its own group as the root
                continue
            if most != "max" and int(most) < 1 << 60:  # version 1 has no word for "no limit"
                found.append(
                    (int(most), max(0, int(most) - now + int(stat[old + "inactive_file"])))
                )
    return (min(most for most, _ in found), min(free for _, free in found)) if found else None


def cpu_name() -> str:
    """Return the processor's name as Linux gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
