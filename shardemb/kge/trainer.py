"""The training job that every rank runs: batches, steps, validation, checkpoints, the final ranking.

A run folder holds ``config.toml``, ``metrics.jsonl``, ``metrics.png``, ``entities.arrow``, ``relations.arrow`` and
``checkpoints/``; the data's order follows from seed and epoch, so a resumed run equals one that was never stopped.
"""

import hashlib
import math
import signal
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from shardemb import checkpoint, collectives, faults, native
from shardemb.coordinator import Coordinator
from shardemb.kge.evaluation import KnownTails, filtered_ranks, metrics
from shardemb.kge.model import KnowledgeGraphModel, ModelConfig
from shardemb.kge.sampling import Sampler, SamplingConfig, with_reciprocals
from shardemb.kge.triples import Triples
from shardemb.manifest import CheckpointError
from shardemb.metrics import MetricsFile, plot_metrics, progress_bar, read_metrics
from shardemb.storage import name_of
from shardemb.types import few
from shardemb.vocabulary import Vocabulary

#: steps between two records of the loss
LOG_STEPS = 20


@dataclass(frozen=True)
class TrainingConfig:
    """How long, and what on the way."""

    #: passes over the triples and their reciprocals
    epochs: int = 8
    #: of initial rows, order and negatives
    seed: int = 0
    #: the learning rates fall linearly to this part of themselves
    final_lr: float = 0.02
    #: epochs between two validations; 0 for none
    validate_every: int = 2
    #: triples of the validation split, drawn by the seed, that are ranked on the way; 0 for all
    validation_triples: int = 1000
    #: epochs between two checkpoints; the last epoch always makes one
    checkpoint_every: int = 1
    #: seconds after which a checkpoint is made within an epoch; 0 for none
    checkpoint_seconds: float = 0.0
    #: finished checkpoints that stay
    keep: int = 2
    #: what a NaN or infinite loss does: "error" ends the run, "warn" tells, "skip" leaves the step out, and tells
    nonfinite: str = "error"

    def __post_init__(self) -> None:
        for name in ("epochs", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("seed", "validate_every", "validation_triples"):
            if getattr(self, name) < 0:
                raise ValueError(f"training.{name}: got {getattr(self, name)}, expected at least 0")
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"training.final_lr: got {self.final_lr}, expected 0 to 1")
        if not 0 <= self.checkpoint_seconds < math.inf:
            raise ValueError(f"training.checkpoint_seconds: got {self.checkpoint_seconds}, expected a number, at least 0")
        if self.nonfinite not in ("error", "warn", "skip"):
            raise ValueError(f"training.nonfinite: got {self.nonfinite!r}, expected 'error', 'warn' or 'skip'")


class TerminatedError(RuntimeError):
    """The run was asked to end (SIGTERM), has saved what it had, and ends."""


def train(
    data: Triples,
    model_config: ModelConfig | None = None,
    sampling: SamplingConfig | None = None,
    config: TrainingConfig | None = None,
    output: Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> tuple[KnowledgeGraphModel, dict[str, float]]:
    """Train and rank. A collective: every rank of the default process group calls it, with the same arguments.

    Args:
        data: the graph, the same on all ranks.
        model_config: the model's settings.
        sampling: batch sizes and negatives.
        config: epochs and what happens between them.
        output: run folder, on storage that all ranks see; None writes nothing.
        resume: go on from the newest checkpoint of ``output``, if there is one.
        progress: show a bar (rank 0).

    Returns:
        The model with this rank's rows, and filtered MRR and Hits@k of the test split (empty without test triples).

    Raises:
        FloatingPointError: the loss is NaN or infinite, on all ranks.
        CheckpointError: a checkpoint that cannot be written or read; a folder that cannot be written, or whose disk has too
            little room, before the first step.
        TerminatedError: SIGTERM came; the step that was under way is in a checkpoint.
        ValueError: a run that shall be resumed with other entities or relations.
    """
    model_config, sampling, config = (
        model_config or ModelConfig(),
        sampling or SamplingConfig(),
        config or TrainingConfig(),
    )
    job = _Job(data, model_config, sampling, config, output, resume, progress)
    try:
        for epoch in range(job.first_epoch, config.epochs):
            job.run_epoch(epoch)
        job.finish_saving()
        return job.model, job.evaluate("test", data.test, config.epochs)
    finally:
        job.close()


class _Job:
    """The state of one run on one rank."""

    def __init__(
        self,
        data: Triples,
        model_config: ModelConfig,
        sampling: SamplingConfig,
        config: TrainingConfig,
        output: Path | None,
        resume: bool,
        progress: bool,
    ) -> None:
        self.rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.data, self.config, self.output = data, config, output
        self.fingerprints = {
            "configuration": hashlib.sha256(repr((model_config, sampling, config)).encode()).hexdigest(),
            "entities": data.entities.fingerprint,
            "relations": data.relations.fingerprint,
        }
        collectives.agree("the training job", {**self.fingerprints, "output": str(output), "resume": resume})
        self.model = KnowledgeGraphModel(len(data.entities), len(data.relations), model_config, config.seed)
        self.optimizer = self.model.optimizer()
        self.coordinator = Coordinator(self.model, self.optimizer)
        queries = with_reciprocals(data.train, len(data.relations))
        chunks = -(-sampling.batch_size // sampling.chunk_size)
        if world_size > chunks and self.rank == 0:
            warnings.warn(
                f"{world_size} workers share {chunks} chunks a step, so some have nothing to train: lower sampling.chunk_size "
                f"or raise sampling.batch_size",
                stacklevel=2,
            )
        self.sampler = Sampler(queries, len(data.entities), sampling, config.seed, self.rank, world_size)
        self.known = KnownTails(data.all(), len(data.relations))
        sample = torch.randperm(len(data.valid), generator=torch.Generator().manual_seed(config.seed))
        self.validation = data.valid[sample[: config.validation_triples or None]]
        self.steps = config.epochs * self.sampler.num_steps
        self.first_epoch, self.first_step = 0, 0
        self.saver: checkpoint.AsyncSaver | None = None
        if output is not None:
            if resume:
                _same_labels(output / "entities.arrow", data.entities)
                _same_labels(output / "relations.arrow", data.relations)
                self._resume(output / "checkpoints")
            self.coordinator.steps = self.first_epoch * self.sampler.num_steps + self.first_step
            faults.at_step(self.coordinator.steps + 1)
            checkpoint.require_room(output / "checkpoints", self.model, [self.optimizer], config.keep)
            self.saver = checkpoint.AsyncSaver(output / "checkpoints", config.keep)
        self.file = None
        if output is not None and self.rank == 0:
            for name, vocabulary in (("entities", data.entities), ("relations", data.relations)):
                if not (output / f"{name}.arrow").exists():  # otherwise it is the same, and another rank may be reading it
                    vocabulary.save(output / f"{name}.arrow")
            self.file = MetricsFile(output / "metrics.jsonl", step=self.coordinator.steps)
        self.bar = progress_bar(
            total=config.epochs * len(data.train),
            initial=(self.first_epoch + self.first_step / self.sampler.num_steps) * len(data.train),
            unit=" triples",
            smoothing=0.05,
            disable=self.rank > 0 or not progress,
        )
        self.saved_at, self.skipped = time.monotonic(), 0
        self.asked_to_end = threading.Event()
        self.handler: Any = None
        if threading.current_thread() is threading.main_thread():  # Python allows no other to take signals
            self.handler = signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self.asked_to_end.set()

    def _resume(self, folder: Path) -> None:
        """Load the newest checkpoint that is undamaged. A collective."""
        found = checkpoint.checkpoints(folder)
        told = {name: value for name, value in self.fingerprints.items() if name != "configuration"}
        damaged: list[Path] = []
        while found:
            try:
                state = checkpoint.load(found[-1], self.model, [self.optimizer], fingerprints=told)
            except CheckpointError as error:
                if len(found) == 1:
                    raise
                damaged.append(Path(found.pop()))
                if self.rank == 0:
                    warnings.warn(f"{error}; going back to {name_of(found[-1])}", stacklevel=2)
            else:
                self.first_epoch, self.first_step = state["epoch"], state["step"]
                break
        for path in damaged if self.rank == 0 else ():  # the run will save these steps again
            path.rename(path.with_suffix(".damaged"))

    def run_epoch(self, epoch: int) -> None:
        """Do the steps of an epoch, then validate and save as configured. A collective."""
        order = self.sampler.order(epoch)
        self.model.train()
        seen, total, start = 0, torch.zeros(()), time.perf_counter()
        first, self.first_step, ends = self.first_step, 0, False
        for step in range(first, self.sampler.num_steps):
            done = epoch * self.sampler.num_steps + step
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * (1 - (1 - self.config.final_lr) * done / self.steps)
            size = self.sampler.batch_size(step)
            loss, softmax = self.model.loss(self.sampler.chunks(order, epoch, step))
            trains, due, ends = self._agree(done + 1, loss)
            if trains:
                (loss / size).backward()
                self.coordinator.step()
                seen, total = seen + size, total + softmax
            if (due or ends) and step + 1 < self.sampler.num_steps:
                self._save(epoch, step + 1)
                if ends:
                    self._end(done + 1)
            if (step + 1) % LOG_STEPS == 0 or step + 1 == self.sampler.num_steps:
                self._log(epoch, done + 1, total, seen, time.perf_counter() - start)
                seen, total, start = 0, torch.zeros(()), time.perf_counter()
            if self.saver is not None:
                self.saver.check()
            self.bar.update(size / 2)  # a triple is two queries: its tail, and its head by the reciprocal relation
        epoch += 1
        if self.config.validate_every and epoch % self.config.validate_every == 0:
            self.evaluate("valid", self.validation, epoch)
        if epoch % self.config.checkpoint_every == 0 or epoch == self.config.epochs or ends:
            self._save(epoch, 0)
        if ends and epoch < self.config.epochs:
            self._end(epoch * self.sampler.num_steps)

    def _end(self, step: int) -> None:
        self.finish_saving()
        where = f"saved as {name_of(self.last_saved)}" if self.output is not None else "nothing is saved without an output"
        raise TerminatedError(f"SIGTERM came in step {step}: {where}")

    def _agree(self, number: int, loss: torch.Tensor) -> tuple[bool, bool, bool]:
        """Return whether this step trains, whether a checkpoint is due, and whether the run shall end. A collective."""
        config = self.config
        due = self.rank == 0 and 0 < config.checkpoint_seconds <= time.monotonic() - self.saved_at
        told = torch.tensor([not torch.isfinite(loss), due, self.asked_to_end.is_set()], dtype=torch.int32)
        if dist.is_initialized():
            collectives.all_reduce(told, collectives.MAX, operation="is the loss a number, shall the run go on?")
        nonfinite, due, ends = (bool(flag) for flag in told.tolist())
        if nonfinite:
            text = f"step {number}: the loss is {loss.item()}{self._bad_rows()}: lower model.entity_lr or model.relation_lr"
            if config.nonfinite == "error":
                raise FloatingPointError(text)
            self.skipped += config.nonfinite == "skip"
            if self.rank == 0:
                skips = f", step left out, {self.skipped} so far" if config.nonfinite == "skip" else ""
                warnings.warn(text + skips, stacklevel=2)
        return not (nonfinite and config.nonfinite == "skip"), due, ends

    def _bad_rows(self) -> str:
        """Name rows that are NaN or infinite, of all tables on this rank."""
        found = []
        for table in (self.model.entity, self.model.relation):
            ids = table.plan.local_ids()[native.nonfinite_rows(table.local_rows())].tolist()
            if ids:
                what = f"{len(ids)} rows with NaN or infinite values on rank {self.rank}: {few(ids)}"
                found.append(f"table {table.name!r} has {what}")
        return f" ({'; '.join(found)})" if found else ""

    def _save(self, epoch: int, step: int) -> None:
        """Save in the background, to go on with a step of an epoch. A collective."""
        if self.saver is None or self.output is None:
            return
        number = epoch * self.sampler.num_steps + step
        self.last_saved = self.output / "checkpoints" / f"step-{number:010d}"
        model = {"scorer": self.model.config.scorer, "num_relations": self.model.num_relations}
        self.saver.save(
            number,
            self.model,
            [self.optimizer],
            {"epoch": epoch, "step": step, "model": model},
            seed=self.config.seed,
            fingerprints=self.fingerprints,
            nonfinite="error" if self.config.nonfinite == "error" else "warn",
        )
        self.saved_at = time.monotonic()

    def finish_saving(self) -> None:
        """Wait for the last checkpoint; SIGTERM ends the process at once from here on: nothing can be lost. A collective."""
        if self.saver is not None:
            self.saver.wait()
        self._leave_signals()

    def _leave_signals(self) -> None:
        if self.handler is not None:
            signal.signal(signal.SIGTERM, self.handler)
            self.handler = None

    def _log(self, epoch: int, step: int, total: torch.Tensor, seen: int, seconds: float) -> None:
        if dist.is_initialized():
            collectives.all_reduce(total, operation="the loss, for the log")
        loss = total.item() / max(1, seen)
        self.bar.set_description(f"epoch {epoch + 1}/{self.config.epochs} loss {loss:.3f}")
        if self.file is not None:
            rate = round(seen / 2 / seconds)
            self.file.write("train", step, epoch=step / self.sampler.num_steps, loss=loss, triples_per_second=rate)

    def evaluate(self, split: str, triples: torch.Tensor, epoch: int) -> dict[str, float]:
        """Rank a split, record and draw the result. A collective."""
        if not len(triples):
            return {}
        self.model.eval()
        self.bar.set_description(f"ranking {len(triples):,} {split} triples")
        start = time.perf_counter()
        result = metrics(filtered_ranks(self.model, triples, self.known))
        figures: dict[str, Any] = {**result, "triples": len(triples), "seconds": round(time.perf_counter() - start, 3)}
        if self.file is not None and self.output is not None:
            self.file.write(split, epoch * self.sampler.num_steps, epoch=epoch, **figures)
            plot_metrics(read_metrics(self.output / "metrics.jsonl"), self.output / "metrics.png")
        self.bar.set_postfix_str(f"{split} MRR {result['mrr']:.3f}")
        return result

    def close(self) -> None:
        """Close bar and file, and let a checkpoint that is being written come to its end."""
        self._leave_signals()
        if self.saver is not None:
            self.saver.close()
        self.bar.close()
        if self.file is not None:
            self.file.close()


def _same_labels(path: Path, vocabulary: Vocabulary) -> None:
    if path.exists() and Vocabulary.load(path).fingerprint != vocabulary.fingerprint:
        raise ValueError(f"{path}: the run was trained on other labels than the dataset has now: give another --output")
