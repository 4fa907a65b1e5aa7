"""``shardemb plan``: the cost of a configuration on a graph of some size, as text."""

import dataclasses
from dataclasses import dataclass
from operator import attrgetter
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
from shardemb.utils.files import cache_folder, write_json
from shardemb.utils.validation import bytes_of

#: settings that an estimate ignores, and their values in it
_NOT_COUNTED = {
    "model.scorer": "complex",
    "model.constrainer": "",
    "sampling.negatives": "uniform",
    "sampling.filtered": False,
    "training.precision": "float32",
}
#: settings that an estimate uses
_COUNTED = (
    *("model.dim", "model.reciprocal", "optimizer.name", "sampling.chunk_size"),
    *("sampling.num_negatives", "sampling.corrupt", "training.background_saves"),
)


@dataclass(frozen=True)
class Plan:
    """The result of :func:`plan`."""

    estimate: Estimate
    #: fewest ranks with enough memory; None if above MOST_WORKERS, or without a machine
    fewest: int | None
    #: assumptions
    assumed: list[str]

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        more = {"fewest_workers": self.fewest, "assumed": self.assumed}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**self.estimate.to_json(), **more})

    def text(self) -> str:
        """Return a readable page."""
        result, job, machine = self.estimate, self.estimate.job, self.estimate.machine
        hosts = f" of {machine.name}, {_hosts(job.workers, machine)}" if machine else ""
        lines = [
            f"{job.entities:,} rows x {job.dim} columns, float32, {job.optimizer}, on"
            f" {job.workers:,} rank(s){hosts}",
            f"a step: {job.batch_size:,} triples, {job.rank_triples:,} a rank; {job.negatives:,}"
            f" negatives for each side of a chunk of {job.chunk_size:,}",
            "",
            "memory of a rank",
            *(_entry(name, size) for name, size in result.memory.items() if size),
            _entry("in all", result.memory_bytes) + self._verdict(),
        ]
        if result.host_bytes:
            ranks = min(job.workers, machine.ranks_per_host) if machine else 1
            lines.append(
                f"{_entry('copy on the host', result.host_bytes)}  for checkpoints in the"
                f" background, {_bytes(ranks * result.host_bytes)} a host"
            )
        disk = _bytes((job.keep + 1) * result.checkpoint_bytes)
        lines += [
            "",
            f"a checkpoint: {_bytes(result.checkpoint_bytes)} in all, {result.pieces:,} file(s) a"
            f" rank; on the disk with {job.keep} kept and one under way: {disk}",
            "",
            f"a step of a rank looks up {result.ids:,} ids, {result.distinct:,} of them distinct;"
            f" all ranks touch {result.touched:,} rows",
        ]
        if job.workers > 1:
            lines.append(f"it sends {_bytes(sum(result.exchange.values()))} to others")
            lines += [_entry(name, size) for name, size in result.exchange.items()]
        assumed = [f"  {line}" for line in self.assumed]
        return "\n".join([*lines, "", *self._time(), "", "assumed", *assumed])

    def _verdict(self) -> str:
        usable, machine = self.estimate.usable_bytes, self.estimate.machine
        if usable is None or machine is None:
            return ""
        least = "no number of ranks holds it"
        if self.fewest is not None:
            least = f"the fewest ranks that fit: {self.fewest:,}, {_hosts(self.fewest, machine)}"
        fits = "fits" if self.estimate.fits else "does not fit"
        return f"  of {_bytes(usable)}: {fits}; {least}"

    def _time(self) -> list[str]:
        result = self.estimate
        seconds, rate = result.step_seconds, result.triples_per_second
        if result.seconds is None or seconds is None or rate is None:
            return ["time: not known of this machine; measure it with: shardemb bench calibrate"]
        parts = [f"  {name:<24}{1e3 * part:>9.3f} ms" for name, part in result.seconds.items()]
        lines = [f"time of a step: {1e3 * seconds:,.3g} ms, {rate:,.0f} triples/s in all", *parts]
        if triples := result.job.triples:
            lines.append(f"an epoch of {triples:,} triples: {_duration(triples / rate)}")
        return lines


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
) -> Plan:
    """Estimate a job's memory, exchange and time.

    Args:
        config: the job's settings.
        machine: None for memory and exchange alone.
        entities: of the graph.
        relations: of the graph, without reciprocal ones.
        triples: of an epoch; 0 if unknown.
        batch_size: triples in a step of all ranks; None for the configuration's, or a chunk a rank
            if that is the default.
        workers: ranks; None for the fewest that fit, or 1 without a machine.
        zipf: exponent of heads and tails.

    Raises:
        ValueError: a size out of range, or a configuration without negatives.
        MemoryError: no number of ranks holds the job.
    """
    sampling = config.sampling
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
    notes = {"settings": _settings(config, _COUNTED)}
    if others := [k for k, counted in _NOT_COUNTED.items() if attrgetter(k)(config) != counted]:
        counted = ", ".join(repr(_NOT_COUNTED[key]) for key in others)
        notes["not counted"] = f"{_settings(config, others)}; as if it were {counted}"
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
        background_saves=config.training.background_saves,
        keep=config.training.keep,
    )
    fewest = None
    if machine is not None:
        fewest = fewest_workers(job, machine, batch_grows=batch_size is None)
    if workers is None:
        why = "as nobody said how many"
        if machine is not None:
            if fewest is None:
                raise OutOfMemoryError(
                    f"plan: {entities:,} rows x {job.dim} columns with {job.optimizer} do not fit"
                    f" {MOST_WORKERS:,} ranks of {machine.name}: use fewer columns, or more memory"
                    " a rank"
                )
            why, batch = "the fewest that fit", batch_size or sampling.chunk_size * fewest
            job = dataclasses.replace(job, workers=fewest, batch_size=batch)
        notes["workers"] = f"{job.workers:,}, {why}"
    if batch_size is None:
        notes["batch size"] = f"{job.batch_size:,} triples, a chunk a rank"
    result = estimate(job, machine)
    return Plan(result, fewest, assumptions(result, notes))


def _settings(config: JobConfig, keys: Any) -> str:
    return ", ".join(f"{key} = {attrgetter(key)(config)!r}" for key in keys)


def calibrated() -> Path:
    """Return the file of this machine's rates, written by ``shardemb bench calibrate``."""
    return cache_folder() / "machine.json"


def machine_of(
    device: str,
    memory: str | None = None,
    ranks_per_host: int | None = None,
    network: str | None = None,
) -> Machine | None:
    """Return a machine by name.

    Args:
        device: "cpu" for this machine's measured rates (None if there are none), a name in
            :data:`~shardemb.planning.cost_model.DATA_SHEETS`, or a file of measured rates.
        memory: other size, such as "80GiB".
        ranks_per_host: other number.
        network: other bytes a second of a rank between hosts, such as "3GB".

    Raises:
        ValueError: an unknown name, or a file without rates.
        FileNotFoundError: no such file.
    """
    if device in DATA_SHEETS:
        machine = DATA_SHEETS[device]
    elif device == "cpu":
        if not calibrated().exists():
            if memory or ranks_per_host or network:
                raise InputError(
                    "plan: --memory, --ranks-per-host and --network need --device, or what shardemb"
                    " bench calibrate measures"
                )
            return None
        machine = Machine.load(calibrated())
    elif device.endswith(".json"):
        machine = Machine.load(Path(device))
    else:
        raise InputError(
            f"plan: got --device {device!r}, expected cpu, {', '.join(DATA_SHEETS)} or a FILE.json"
        )
    changes: dict[str, Any] = {}
    if memory is not None:
        changes["memory_bytes"] = bytes_of("--memory", memory)
    if ranks_per_host is not None:
        changes["ranks_per_host"] = ranks_per_host
    if network is not None:
        changes["network_bandwidth"] = float(bytes_of("--network", network))
    return dataclasses.replace(machine, **changes)


def _hosts(ranks: int, machine: Machine) -> str:
    hosts = -(-ranks // machine.ranks_per_host)
    return f"{hosts:,} host(s) of {min(ranks, machine.ranks_per_host)}"


def _entry(name: str, size: float) -> str:
    return f"  {name:<24}{_bytes(size):>12}"


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
