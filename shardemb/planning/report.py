"""``shardemb plan``.

A configuration and the size of a graph, turned into what a job takes, and told in a page of text.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardemb.exceptions import InputError, OutOfMemoryError
from shardemb.kge.config import JobConfig
from shardemb.kge.sampling import SamplingConfig
from shardemb.planning.cost_model import (
    DATA_SHEETS,
    MOST_WORKERS,
    Estimate,
    Job,
    Machine,
    assumptions,
    estimate,
    fewest_workers,
)
from shardemb.sharding.placement import RowPlan
from shardemb.sharding.torchrec_table import place
from shardemb.utils.files import cache_folder, replacing
from shardemb.utils.validation import bytes_of

#: settings that an estimate knows nothing of: it is as if they were like this
_NOT_COUNTED = {
    "model.scorer": "complex",
    "model.constrainer": "",
    "sampling.negatives": "uniform",
    "sampling.filtered": False,
    "training.precision": "float32",
}
#: settings that decide what a job takes
_TOLD = (
    *(
        "model.dim",
        "model.reciprocal",
        "optimizer.name",
        "sampling.chunk_size",
        "sampling.num_negatives",
        "sampling.corrupt",
    ),
    "training.background_saves",
)


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` has found."""

    estimate: Estimate
    #: ranks whose memory is enough; None for more than MOST_WORKERS, or without a machine
    fewest: int | None
    #: what was taken for granted
    assumed: list[str]
    #: TorchRec's planner's own answer, if it was asked
    torchrec: dict[str, Any] | None = None

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        body = {
            **self.estimate.to_json(),
            "fewest_workers": self.fewest,
            "assumed": self.assumed,
            "torchrec": self.torchrec,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")

    def text(self) -> str:
        """Return a page for a person."""
        found, job, machine = self.estimate, self.estimate.job, self.estimate.machine
        lines = [
            f"{job.entities:,} rows x {job.dim} columns, float32, {job.optimizer}, on"
            f" {job.workers:,} rank(s)"
            + (f" of {machine.name}, {_hosts(job.workers, machine)}" if machine else ""),
            (
                f"a step: {job.batch_size:,} triples, {job.rank_triples:,} a rank;"
                f" {job.negatives:,} negatives for each side of a chunk of {job.chunk_size:,}"
            ),
            "",
            "memory of a rank",
            *(f"  {name:<24}{_bytes(size):>12}" for name, size in found.memory.items() if size),
            f"  {'in all':<24}{_bytes(found.memory_bytes):>12}" + self._verdict(),
        ]
        if found.host_bytes:
            ranks = min(job.workers, machine.ranks_per_host) if machine else 1
            lines.append(
                f"  {'copy on the host':<24}{_bytes(found.host_bytes):>12}  for checkpoints in the"
                f" background, {_bytes(ranks * found.host_bytes)} a host"
            )
        lines += [
            "",
            (
                f"a checkpoint: {_bytes(found.checkpoint_bytes)} in all, {found.pieces:,} file(s) a"
                f" rank; on the disk with {job.keep} kept and one under way:"
                f" {_bytes((job.keep + 1) * found.checkpoint_bytes)}"
            ),
            "",
            (
                f"a step of a rank looks up {found.ids:,} ids, {found.distinct:,} of them distinct;"
                f" all ranks touch {found.touched:,} rows"
            ),
        ]
        if job.workers > 1:
            lines += [
                f"it sends {_bytes(sum(found.exchange.values()))} to others",
                *(f"  {name:<24}{_bytes(size):>12}" for name, size in found.exchange.items()),
            ]
        return "\n".join(
            [
                *lines,
                "",
                *self._time(),
                *self._torchrec(),
                "",
                "assumed",
                *(f"  {line}" for line in self.assumed),
            ]
        )

    def _verdict(self) -> str:
        room, machine = self.estimate.room_bytes, self.estimate.machine
        if room is None or machine is None:
            return ""
        least = "no number of ranks holds it"
        if self.fewest is not None:
            least = f"the fewest ranks that fit: {self.fewest:,}, {_hosts(self.fewest, machine)}"
        return f"  of {_bytes(room)}: {'fits' if self.estimate.fits else 'does not fit'}; {least}"

    def _time(self) -> list[str]:
        found = self.estimate
        seconds, rate = found.step_seconds, found.triples_per_second
        if found.seconds is None or seconds is None or rate is None:
            return ["time: not known of this machine; measure it with: shardemb bench calibrate"]
        lines = [
            f"time of a step: {1e3 * seconds:,.3g} ms, {rate:,.0f} triples/s in all",
            *(f"  {name:<24}{1e3 * part:>9.3f} ms" for name, part in found.seconds.items()),
        ]
        if found.job.triples:
            lines.append(
                f"an epoch of {found.job.triples:,} triples: {_duration(found.job.triples / rate)}"
            )
        return lines

    def _torchrec(self) -> list[str]:
        told = self.torchrec
        if told is None:
            return []
        if "error" in told:
            return ["", told["error"]]
        return [
            "",
            (
                f"TorchRec's planner: {told['sharding_type']}, {told['compute_kernel']},"
                f" {told['ranks']:,} rank(s) with rows, {_bytes(told['memory_bytes'])} on the"
                f" fullest; lookup, exchange and update: {1e3 * told['seconds']:,.3g} ms"
            ),
        ]


def plan(
    config: JobConfig,
    machine: Machine | None,
    *,
    entities: int,
    relations: int = 1000,
    triples: int = 0,
    batch_size: int | None = None,
    workers: int | None = None,
    zipf: float = 0.8,
    torchrec: bool = False,
) -> Plan:
    """Estimate what a job takes.

    Args:
        config: its settings.
        machine: that shall run it; None for memory and exchange alone.
        entities: of the graph.
        relations: of the graph, without reciprocal ones.
        triples: of an epoch; 0 for unknown.
        batch_size: triples of a step of all ranks; None for the configuration's, or for a chunk a
            rank if that is the default.
        workers: ranks; None for the fewest that fit, or 1 without a machine.
        zipf: exponent of how often entities are heads or tails.
        torchrec: ask TorchRec's planner too.

    Raises:
        ValueError: a size out of range; a configuration that does not draw negatives.
        MemoryError: no number of ranks holds it, and none was given.
    """
    sampling, training = config.sampling, config.training
    if sampling.scheme != "negatives":
        raise InputError(
            f"plan: got sampling.scheme {sampling.scheme!r}, which compares with all entities in"
            " every step, expected 'negatives': that is what a table of this size can be trained"
            " with"
        )
    for name, count in (("batch_size", batch_size), ("workers", workers)):
        if count is not None and count < 1:
            raise InputError(f"plan.{name}: got {count}, expected at least 1")
    if batch_size is None and sampling.batch_size != SamplingConfig().batch_size:
        batch_size = sampling.batch_size
    told = {"settings": ", ".join(f"{key} = {_setting(config, key)!r}" for key in _TOLD)}
    if others := [key for key, counted in _NOT_COUNTED.items() if _setting(config, key) != counted]:
        got = ", ".join(f"{key} = {_setting(config, key)!r}" for key in others)
        told["not counted"] = (
            f"{got}; as if it were {', '.join(repr(_NOT_COUNTED[key]) for key in others)}"
        )
    job = Job(
        entities=entities,
        relations=relations * (1 + config.model.reciprocal),
        triples=triples,
        dim=config.model.dim,
        optimizer=config.optimizer.name,
        workers=workers or 1,
        batch_size=batch_size or sampling.chunk_size * (workers or 1),
        chunk_size=sampling.chunk_size,
        negatives=sampling.num_negatives,
        sides=2 if sampling.corrupt == "both" else 1,
        in_batch=sampling.in_batch,
        zipf=zipf,
        background_saves=training.background_saves,
        keep=training.keep,
    )
    fewest = (
        None if machine is None else fewest_workers(job, machine, batch_grows=batch_size is None)
    )
    if workers is None and machine is not None:
        if fewest is None:
            raise OutOfMemoryError(
                f"plan: {entities:,} rows x {job.dim} columns with {job.optimizer} do not fit"
                f" {MOST_WORKERS:,} ranks of {machine.name}: use fewer columns, or more memory a"
                " rank"
            )
        job = dataclasses.replace(
            job, workers=fewest, batch_size=batch_size or sampling.chunk_size * fewest
        )
    if workers is None:
        told["workers"] = f"{job.workers:,}, " + (
            "the fewest that fit" if machine else "as nobody said how many"
        )
    if batch_size is None:
        told["batch size"] = f"{job.batch_size:,} triples, a chunk a rank"
    found = estimate(job, machine)
    return Plan(found, fewest, assumptions(found, told), _ask_torchrec(found) if torchrec else None)


def _setting(config: JobConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _ask_torchrec(found: Estimate) -> dict[str, Any]:
    job, machine = found.job, found.machine
    if machine is None or found.room_bytes is None:
        raise InputError(
            "plan: --torchrec needs a machine's rates: run shardemb bench calibrate, or give"
            " --device h100 or h200"
        )
    table = RowPlan("entity", job.entities, job.dim, job.workers)
    rates = {
        "memory": machine.row_bandwidth,
        "host": machine.exchange_bandwidth or machine.row_bandwidth,
        "network": machine.between_hosts or machine.row_bandwidth,
    }
    device = "cuda" if machine.gpu else "cpu"
    try:
        return place(
            table, job.optimizer, device, found.room_bytes, machine.ranks_per_host, rates, found.ids
        )
    except (MemoryError, ValueError) as error:
        return {"error": str(error)}


def calibrated() -> Path:
    """Return where the figures of this machine lie, as ``shardemb bench calibrate`` leaves them."""
    return cache_folder() / "machine.json"


def machine_of(
    device: str,
    memory: str | None = None,
    ranks_per_host: int | None = None,
    network: str | None = None,
) -> Machine | None:
    """Return a machine by name.

    Args:
        device: "cpu" for what was measured here, None if nothing was; a name of
            :data:`~shardemb.planning.cost_model.DATA_SHEETS`; or a file of measured figures.
        memory: another size, such as "80GiB".
        ranks_per_host: another number.
        network: another rate between hosts, bytes a second that a rank sends, such as "3GB".

    Raises:
        ValueError: an unknown name, or a file that holds no figures.
        FileNotFoundError: no such file.
    """
    if device in DATA_SHEETS:
        machine = DATA_SHEETS[device]
    elif device == "cpu":
        if not calibrated().exists():
            if memory or ranks_per_host or network:
                options = "--memory, --ranks-per-host and --network"
                raise InputError(
                    f"plan: {options} need --device, or what shardemb bench calibrate measures"
                )
            return None
        machine = Machine.load(calibrated())
    elif device.endswith(".json"):
        machine = Machine.load(Path(device))
    else:
        raise InputError(
            f"plan: got --device {device!r}, expected cpu, {', '.join(DATA_SHEETS)} or a FILE.json"
        )
    if memory is not None:
        machine = dataclasses.replace(machine, memory_bytes=bytes_of("--memory", memory))
    if ranks_per_host is not None:
        machine = dataclasses.replace(machine, ranks_per_host=ranks_per_host)
    if network is not None:
        machine = dataclasses.replace(
            machine, network_bandwidth=float(bytes_of("--network", network))
        )
    return machine


def _hosts(ranks: int, machine: Machine) -> str:
    hosts = -(-ranks // machine.ranks_per_host)
    return f"{hosts:,} host(s) of {min(ranks, machine.ranks_per_host)}"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.2f} {unit}"
        size /= 1024
    return f"{size:,.2f} TiB"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} seconds"
