"""The training job that every rank runs.

Batches, steps, validation, checkpoints, the final ranking.

A run folder holds ``config.toml``, ``metrics.jsonl``, ``metrics.png``, ``entities.arrow``,
``relations.arrow`` and ``checkpoints/``; the data's order follows from seed and epoch, so a resumed
run equals one that was never stopped.
"""

import hashlib
import os
import signal
import threading
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from shardemb import checkpoint, kernels
from shardemb.checkpoint.storage import name_of
from shardemb.comm import collectives, watchdog
from shardemb.coordinator import Coordinator
from shardemb.exceptions import CheckpointError, InputError, NonfiniteError, TerminatedError
from shardemb.kge.data.triples import Triples
from shardemb.kge.evaluation import EvaluationConfig, check_candidates, evaluate
from shardemb.kge.losses import LossConfig
from shardemb.kge.model import KnowledgeGraphModel, ModelConfig
from shardemb.kge.optimizers import OptimizerConfig
from shardemb.kge.sampling import Sampler, SamplingConfig, seed_of
from shardemb.utils import logs
from shardemb.utils.memory import resident_bytes
from shardemb.utils.progress import progress_bar
from shardemb.utils.run_metrics import MetricsFile, plot_metrics, read_metrics, tell
from shardemb.utils.types import few
from shardemb.utils.validation import at_least, one_of
from shardemb.vocabulary import Vocabulary

_log = logs.logger(__name__)

#: settings of training that a run may go on without
WHEN_TO_SAVE = ("checkpoint_every", "checkpoint_seconds", "keep", "background_saves")
#: steps between two records of the loss
LOG_STEPS = 20


@dataclass(frozen=True)
class TrainingConfig:
    """How long, and what on the way."""

    #: passes over the triples (or over the queries, with scheme "kvsall")
    epochs: int = 8
    #: of initial rows, order and negatives
    seed: int = 0
    #: epochs between two validations; 0 for none
    validate_every: int = 2
    #: triples of the validation split, drawn by the seed, that are ranked on the way; 0 for all
    validation_triples: int = 1000
    #: stop after this many validations without a better MRR, and go back to the best one; 0 for
    #: never
    patience: int = 0
    #: epochs between two checkpoints; the last epoch always makes one
    checkpoint_every: int = 1
    #: seconds after which a checkpoint is made within an epoch; 0 for none
    checkpoint_seconds: float = 0.0
    #: finished checkpoints that stay
    keep: int = 2
    #: write checkpoints while training goes on, from a copy of the rows, instead of waiting for the
    #: disk
    background_saves: bool = True
    #: what a NaN or infinite loss does: "error" ends the run, "warn" tells, "skip" leaves the step
    #: out, and tells
    nonfinite: str = "error"
    #: in which scores are computed: "float32", or "bfloat16" by torch's autocast; rows and their
    #: state stay float32
    precision: str = "float32"
    #: where rows lie: "cpu" or "cuda" (then each rank takes the GPU of its local number)
    device: str = "cpu"

    def __post_init__(self) -> None:
        one_of(
            "training",
            self,
            {
                "nonfinite": ("error", "warn", "skip"),
                "precision": ("float32", "bfloat16"),
                "device": ("cpu", "cuda"),
            },
        )
        at_least("training", self, epochs=1, checkpoint_every=1, keep=1)
        at_least(
            "training",
            self,
            seed=0,
            validate_every=0,
            validation_triples=0,
            patience=0,
            checkpoint_seconds=0,
        )
        if self.patience and not self.validate_every:
            raise InputError(
                f"training.patience: got {self.patience} with validate_every = 0, expected"
                " validations to wait for"
            )


def train(
    data: Triples,
    model: ModelConfig | None = None,
    loss: LossConfig | None = None,
    sampling: SamplingConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    training: TrainingConfig | None = None,
    evaluation: EvaluationConfig | None = None,
    output: Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> tuple[KnowledgeGraphModel, dict[str, float]]:
    """Train and rank. A collective.

    Every rank of the default process group calls it, with the same arguments.

    Args:
        data: the graph, the same on all ranks.
        model: the model's settings.
        loss: what is minimized.
        sampling: batch sizes and negatives.
        optimizer: how rows are updated, and at which rate.
        training: epochs and what happens between them.
        evaluation: how validation and test triples are ranked.
        output: run folder, on storage that all ranks see; None writes nothing.
        resume: go on from the newest checkpoint of ``output``, if there is one.
        progress: show a bar (rank 0).

    Returns:
        The model with this rank's rows, and the metrics of the test split (empty without test
        triples).

    Raises:
        FloatingPointError: the loss is NaN or infinite, on all ranks.
        CheckpointError: a checkpoint that cannot be written or read; a folder that cannot be
            written, or whose disk has too little room, before the first step.
        TerminatedError: SIGTERM came; the step that was under way is in a checkpoint.
        ValueError: a run that shall be resumed with other entities or relations; settings that do
            not go together.
        FileExistsError: ``output`` holds a run, and it shall not be resumed.
    """
    settings = Settings(
        model or ModelConfig(),
        loss or LossConfig(),
        sampling or SamplingConfig(),
        optimizer or OptimizerConfig(),
        training or TrainingConfig(),
        evaluation or EvaluationConfig(),
    )
    job = _Job(data, settings, output, resume, progress)
    try:
        while not job.ended:
            job.run_epoch()
        job.finish_saving()
        job.take_best()
        return job.model, job.evaluate("test", data.test)
    finally:
        job.close()


@dataclass(frozen=True)
class Settings:
    """All of a job's sections; ValueError for those that do not go together."""

    model: ModelConfig
    loss: LossConfig
    sampling: SamplingConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    evaluation: EvaluationConfig

    def __post_init__(self) -> None:
        if self.sampling.scheme != "negatives" and self.loss.name not in ("softmax", "logistic"):
            scheme = self.sampling.scheme
            raise InputError(
                f"loss.name: got {self.loss.name!r} with scheme {scheme!r}, expected 'softmax' or"
                " 'logistic'"
            )
        if self.sampling.scheme == "kvsall" and self.loss.subsampling:
            raise InputError(
                "loss.subsampling: got true with sampling.scheme 'kvsall', whose queries stand for"
                " many triples each"
            )
        if self.optimizer.schedule == "plateau" and not self.training.validate_every:
            raise InputError(
                "optimizer.schedule: got 'plateau' with training.validate_every = 0, expected"
                " validations to look at"
            )


@dataclass
class _Progress:
    """How far a run is; every checkpoint holds it."""

    #: epochs that are complete
    epoch: int = 0
    #: steps of the next one that are done
    step: int = 0
    #: the best validation MRR, and the epochs after which it came; -1 before the first
    best: float = -1.0
    best_epoch: int = 0
    #: validations since then, and since the rates were lowered
    since_best: int = 0
    since_change: int = 0
    #: part of the learning rates that is left after plateaus
    plateau: float = 1.0


class _Job:
    """The state of one run on one rank."""

    def __init__(
        self, data: Triples, settings: Settings, output: Path | None, resume: bool, progress: bool
    ) -> None:
        self.rank, self.world_size = collectives.rank_and_size()
        self.data, self.settings, self.config, self.output = (
            data,
            settings,
            settings.training,
            output,
        )
        sampling = settings.sampling
        self.device = resolve_device(self.config.device)
        # when to save, and how triples are ranked, may change from one start of a run to the next
        saving = {key: getattr(TrainingConfig, key) for key in WHEN_TO_SAVE}
        same = replace(
            settings, training=replace(self.config, **saving), evaluation=EvaluationConfig()
        )
        self.fingerprints = {
            "settings": hashlib.sha256(repr(same).encode()).hexdigest(),
            "entities": data.entities.fingerprint,
            "relations": data.relations.fingerprint,
            "triples": data.fingerprint,
        }
        collectives.agree(
            "the training job", {**self.fingerprints, "output": str(output), "resume": resume}
        )
        waits = self.config.patience or settings.optimizer.schedule == "plateau"
        if waits and not len(data.valid):
            raise InputError(
                f"{data.name}: got no valid triples, expected some for training.patience or a"
                " plateau schedule"
            )
        check_candidates(settings.evaluation, len(data.entities))
        self.against_all = sampling.scheme != "negatives"
        self.model = KnowledgeGraphModel(
            len(data.entities),
            len(data.relations),
            settings.model,
            self.config.seed,
            loss=settings.loss,
            dense=self.against_all,
            device=self.device,
        )
        self.optimizer = settings.optimizer.make(self.model)
        self.coordinator = Coordinator(
            self.model, self.optimizer, settings.optimizer.max_grad_norm or None
        )
        chunks = -(-sampling.batch_size // sampling.chunk_size)
        if self.world_size > chunks and self.rank == 0 and not self.against_all:
            warnings.warn(
                f"{self.world_size} workers share {chunks} chunks a step, so some have nothing to"
                " train: lower sampling.chunk_size or raise sampling.batch_size",
                stacklevel=2,
            )
        self.sampler = Sampler(
            data.train,
            len(data.entities),
            len(data.relations),
            sampling,
            self.config.seed,
            self.rank,
            self.world_size,
            settings.loss.subsampling,
            data.shared,
        )
        sample = torch.randperm(
            len(data.valid), generator=torch.Generator().manual_seed(self.config.seed)
        )
        self.validation = data.valid[sample[: self.config.validation_triples or None]]
        self.steps = self.config.epochs * self.sampler.num_steps
        self.at = _Progress()
        self.saver: checkpoint.AsyncSaver | None = None
        self.best_saver: checkpoint.AsyncSaver | None = None
        if output is not None:
            if resume:
                _same_labels(output / "entities.arrow", data.entities)
                _same_labels(output / "relations.arrow", data.relations)
                self._resume(output / "checkpoints")
            else:
                self._require_new(output)
            checkpoint.require_space(
                output / "checkpoints", self.model, [self.optimizer], self.config.keep
            )
            self.saver = checkpoint.AsyncSaver(
                output / "checkpoints", self.config.keep, self.config.background_saves
            )
            if self.config.patience:
                self.best_saver = checkpoint.AsyncSaver(
                    output / "best", keep=1, background=False
                )  # no second copy
        self.best_rows: list[dict[str, torch.Tensor]] | None = None
        self.coordinator.steps = self.done
        watchdog.at_step(self.done + 1)
        self.file = None
        if output is not None and self.rank == 0:
            for name, vocabulary in (("entities", data.entities), ("relations", data.relations)):
                if not (
                    output / f"{name}.arrow"
                ).exists():  # otherwise it is the same, and another rank may be reading it
                    vocabulary.save(output / f"{name}.arrow")
            self.file = MetricsFile(
                output / "metrics.jsonl", step=self.done, tensorboard=output / "tensorboard"
            )
        self.bar = progress_bar(
            total=self.config.epochs * self.sampler.num_samples,
            initial=(self.at.epoch + self.at.step / self.sampler.num_steps)
            * self.sampler.num_samples,
            unit=" queries" if sampling.scheme == "kvsall" else " triples",
            smoothing=0.05,
            disable=self.rank > 0 or not progress,
        )
        self.saved_at = time.monotonic()
        #: bytes exchanged and rows updated until the last record
        self.counted = (0, 0)
        self.asked_to_end = threading.Event()
        self.handler: Any = None
        if (
            threading.current_thread() is threading.main_thread()
        ):  # Python allows no other to take signals
            self.handler = signal.signal(signal.SIGTERM, self._on_sigterm)

    @property
    def done(self) -> int:
        """Steps since the beginning of the run."""
        return self.at.epoch * self.sampler.num_steps + self.at.step

    @property
    def stopped_early(self) -> bool:
        """Whether validations have not become better for too long."""
        return 0 < self.config.patience <= self.at.since_best

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to train."""
        return self.at.epoch >= self.config.epochs or (self.stopped_early and self.at.step == 0)

    def _require_new(self, output: Path) -> None:
        """Raise FileExistsError, on all ranks, if there is a run already. A collective."""
        found = [
            name for name in ("checkpoints", "best", "metrics.jsonl") if (output / name).exists()
        ]
        found = collectives.gather(found, operation="is the run folder new?")[0]
        if found:
            raise FileExistsError(
                f"{output}: holds {' and '.join(found)} of a run: give another folder, or"
                " resume=True"
            )

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self.asked_to_end.set()

    def _resume(self, folder: Path) -> None:
        """Load the newest checkpoint that is undamaged. A collective."""
        found = checkpoint.checkpoints(folder)
        damaged: list[Path] = []
        while found:
            try:
                state = checkpoint.load(
                    found[-1], self.model, [self.optimizer], fingerprints=self.fingerprints
                )
            except CheckpointError as error:
                if len(found) == 1:
                    raise
                damaged.append(Path(found.pop()))
                if self.rank == 0:
                    warnings.warn(f"{error}; going back to {name_of(found[-1])}", stacklevel=2)
                    _log.warning("%s; going back to %s", error, name_of(found[-1]))
            else:
                self.at = _Progress(**state["progress"])
                self._resume_best()
                break
        for path in damaged if self.rank == 0 else ():  # the run will save these steps again
            path.rename(path.with_suffix(".damaged"))

    def _resume_best(self) -> None:
        """Leave only the best checkpoint that this run knows of.

        Without it, the next validation is the best. A collective.
        """
        if not self.config.patience or self.output is None:
            return
        known = f"step-{self.at.best_epoch * self.sampler.num_steps:010d}"
        kept = [Path(path) for path in checkpoint.checkpoints(self.output / "best")]
        others = [
            path for path in kept if path.name != known
        ]  # of an attempt that came further than what is left of it
        there = collectives.gather(
            len(others) < len(kept), operation="is the best checkpoint there?"
        )[0]
        if not there:
            self.at.best, self.at.since_best = -1.0, 0
        for path in others if self.rank == 0 else ():
            path.rename(path.with_suffix(".stale"))

    def run_epoch(self) -> None:
        """Do the steps of an epoch, then validate and save as configured. A collective."""
        self.model.train()
        at, num_steps = self.at, self.sampler.num_steps
        seen, total, start, ends = 0, self._zero(), time.perf_counter(), False
        triples, steps = 0, 0
        while at.step < num_steps:
            self.settings.optimizer.set_rates(self.optimizer, self.done, self.steps, at.plateau)
            size = self.sampler.size(at.step)
            loss, plain, queries = self._loss(at.epoch, at.step)
            (loss / queries).backward()
            trains, due, ends = self._agree(self.done + 1, loss)
            if trains:
                self.coordinator.step()
                seen, triples, total = seen + queries, triples + size, total + plain
            else:
                self.coordinator.forget()
            at.step, steps = at.step + 1, steps + 1
            if (due or ends) and at.step < num_steps:
                self._save()
                if ends:
                    self._end()
            if at.step % LOG_STEPS == 0 or at.step == num_steps:
                self._log(total, seen, triples, steps, time.perf_counter() - start)
                seen, triples, steps, total, start = 0, 0, 0, self._zero(), time.perf_counter()
            if self.saver is not None:
                self.saver.check()
            self.bar.update(size)
        at.epoch, at.step = at.epoch + 1, 0
        if self.config.validate_every and at.epoch % self.config.validate_every == 0:
            self._validate()
        if at.epoch % self.config.checkpoint_every == 0 or ends or self.ended:
            self._save()
        if ends and not self.ended:
            self._end()

    def _zero(self) -> torch.Tensor:
        return torch.zeros((), device=self.device)

    def _loss(self, epoch: int, step: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return the loss of a step, to be added up over ranks, without regularizers.

        And its queries on all ranks.
        """
        precise, model = self.config.precision == "float32", self.settings.model
        if (
            model.entity_dropout or model.relation_dropout
        ):  # masks depend on the rank; otherwise a run is the same again
            torch.manual_seed(seed_of(self.config.seed, 3, epoch, step, self.rank))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=not precise):
            if self.against_all:
                queries = self.sampler.queries(epoch, step)
                return *self.model.loss_vs_all(queries, self.rank, self.world_size), len(
                    queries.entities
                )
            return *self.model.loss(
                self.sampler.batches(epoch, step)
            ), self.sampler.ways * self.sampler.size(step)

    def _validate(self) -> None:
        """Rank the validation triples; keep the best model, lower the rates on a plateau.

        A collective.
        """
        result = self.evaluate("valid", self.validation)
        at, options = self.at, self.settings.optimizer
        if not result:
            return
        if result["mrr"] > at.best:
            at.best, at.best_epoch, at.since_best, at.since_change = result["mrr"], at.epoch, 0, 0
            if self.config.patience:
                self._keep_best()
            return
        at.since_best, at.since_change = at.since_best + 1, at.since_change + 1
        if options.schedule == "plateau" and at.since_change >= options.plateau_patience:
            at.plateau, at.since_change = at.plateau * options.plateau_factor, 0

    def _keep_best(self) -> None:
        if self.best_saver is not None:
            self._save(self.best_saver)
        else:
            tables = (self.model.entity, self.model.relation)
            self.best_rows = [
                {"weight": table._stored_rows()["weight"].clone()} for table in tables
            ]

    def take_best(self) -> None:
        """Go back to the rows of the best validation, with ``patience``. A collective."""
        if not self.config.patience or self.at.best_epoch in (0, self.at.epoch):
            return
        if self.best_saver is not None and self.output is not None:
            self.best_saver.wait()
            name = f"step-{self.at.best_epoch * self.sampler.num_steps:010d}"
            checkpoint.load(self.output / "best" / name, self.model, optimizer_state=False)
        elif self.best_rows is not None:
            for table, rows in zip(
                (self.model.entity, self.model.relation), self.best_rows, strict=True
            ):
                table._load_stored_rows(rows)

    def _end(self) -> None:
        step = self.done
        self.finish_saving()
        where = (
            f"saved as {name_of(self.last_saved)}"
            if self.output is not None
            else "nothing is saved without an output"
        )
        raise TerminatedError(f"SIGTERM came in step {step}: {where}")

    def _agree(self, number: int, loss: torch.Tensor) -> tuple[bool, bool, bool]:
        """Return whether this step trains, whether a checkpoint is due.

        And whether the run shall end. A collective.
        """
        config = self.config
        due = self.rank == 0 and 0 < config.checkpoint_seconds <= time.monotonic() - self.saved_at
        told = self.coordinator.reduce([not torch.isfinite(loss), due, self.asked_to_end.is_set()])
        nonfinite, due, ends = (bool(flag) for flag in told)
        if nonfinite:
            advice = "lower optimizer.entity_lr or optimizer.relation_lr"
            mine = "" if torch.isfinite(loss) else f"the loss is {loss.item()}{self._bad_rows()}"
            each = collectives.gather(mine, operation="whose loss is no number?")
            several = len(each) > 1
            found = "; ".join(
                f"rank {rank}: {what}" if several else what
                for rank, what in enumerate(each)
                if what
            )
            text = f"step {number}: {found}: {advice}"
            if config.nonfinite == "error":
                raise NonfiniteError(text)
            skips = (
                f", step left out, {self.coordinator.skipped + 1} so far"
                if config.nonfinite == "skip"
                else ""
            )
            if self.rank == 0:
                warnings.warn(text + skips, stacklevel=2)
        return not (nonfinite and config.nonfinite == "skip"), due, ends

    def _bad_rows(self) -> str:
        """Name rows that are NaN or infinite, of all tables on this rank."""
        found = []
        for table in (self.model.entity, self.model.relation):
            ids = table.plan.local_ids()[kernels.nonfinite_rows(table.local_rows())].tolist()
            if ids:
                what = (
                    f"{len(ids)} rows with NaN or infinite values on rank {self.rank}: {few(ids)}"
                )
                found.append(f"table {table.name!r} has {what}")
        return f" ({'; '.join(found)})" if found else ""

    def _save(self, saver: checkpoint.AsyncSaver | None = None) -> None:
        """Save in the background, to go on with the next step. A collective."""
        if self.saver is None or self.output is None:
            return
        model = {
            "scorer": self.settings.model.scorer,
            "num_relations": self.model.num_relations,
            "reciprocal": self.settings.model.reciprocal,
        }
        (saver or self.saver).save(
            self.done,
            self.model,
            [self.optimizer],
            {"progress": asdict(self.at), "model": model},
            seed=self.config.seed,
            fingerprints=self.fingerprints,
            nonfinite="error" if self.config.nonfinite == "error" else "warn",
        )
        if saver is None:
            self.saved_at, self.last_saved = (
                time.monotonic(),
                self.output / "checkpoints" / f"step-{self.done:010d}",
            )

    def finish_saving(self) -> None:
        """Wait for the last checkpoint; SIGTERM ends the process at once from here on.

        Nothing can be lost. A collective.
        """
        if self.saver is not None:
            self.saver.wait()
        self._leave_signals()

    def _leave_signals(self) -> None:
        if self.handler is not None:
            signal.signal(signal.SIGTERM, self.handler)
            self.handler = None

    def _log(
        self, total: torch.Tensor, queries: int, triples: int, steps: int, seconds: float
    ) -> None:
        entity = self.model.entity
        counts = (entity.exchanged_bytes, self.optimizer.rows_updated[next(entity.parameters())])
        here = [
            total.item(),
            *(now - before for now, before in zip(counts, self.counted, strict=True)),
            self._memory(),
        ]
        self.counted = counts
        each = torch.zeros(self.world_size, len(here), dtype=torch.float64, device=self.device)
        each[self.rank] = torch.tensor(here, dtype=torch.float64)
        collectives.all_reduce(each, operation="figures for the log")
        losses, exchanged, touched, memory = each.T.tolist()
        loss = sum(losses) / max(1, queries)
        ends = self.at.step == self.sampler.num_steps  # otherwise the bar goes by its own clock
        self.bar.set_description(
            f"epoch {self.at.epoch + 1}/{self.config.epochs} loss {loss:.3f}", refresh=ends
        )
        self._record(
            "train",
            epoch=self.done / self.sampler.num_steps,
            loss=loss,
            triples_per_second=round(triples / seconds),
            entity_lr=self.optimizer.param_groups[0]["lr"],
            step_seconds=round(seconds / steps, 6),
            exchange_bytes=round(sum(exchanged) / steps),
            touched_rows=round(sum(touched) / steps),
            imbalance=round(max(touched) * self.world_size / max(1.0, sum(touched)), 4),
            memory_bytes=[round(size) for size in memory],
        )

    def _memory(self) -> int:
        return (
            torch.cuda.max_memory_reserved(self.device)
            if self.device.type == "cuda"
            else resident_bytes()
        )

    def _record(self, kind: str, **figures: Any) -> None:
        """Write a record down (rank 0), and let this process's listeners hear of it."""
        if self.file is not None:
            self.file.write(kind, self.done, **figures)
        tell(kind, self.done, figures)

    def evaluate(self, split: str, triples: torch.Tensor) -> dict[str, float]:
        """Rank a split, record and draw the result. A collective."""
        if not len(triples):
            return {}
        self.model.eval()
        self.bar.set_description(f"ranking {len(triples):,} {split} triples")
        start = time.perf_counter()
        config = replace(self.settings.evaluation, per_relation=False)
        data = self.data
        splits, share = (
            ((data.valid, data.test), data.train) if data.shared else (data.splits, None)
        )
        result = evaluate(self.model, triples, splits, config, self.config.seed, share)
        figures: dict[str, Any] = {
            **result,
            "triples": len(triples),
            "seconds": round(time.perf_counter() - start, 3),
        }
        self._record(split, epoch=self.at.epoch, **figures)
        if self.file is not None and self.output is not None:
            plot_metrics(read_metrics(self.output / "metrics.jsonl"), self.output / "metrics.png")
        self.bar.set_postfix_str(f"{split} MRR {result['mrr']:.3f}")
        return result

    def close(self) -> None:
        """Close bar and file, and let a checkpoint that is being written come to its end."""
        self._leave_signals()
        for saver in (self.saver, self.best_saver):
            if saver is not None:
                saver.close()
        self.bar.close()
        if self.file is not None:
            self.file.close()


def resolve_device(name: str) -> torch.device:
    """Return the CPU, or this rank's GPU, which becomes the current one; ValueError without any."""
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(
            "training.device: got 'cuda', but torch finds no GPU: use 'cpu', or install torch's"
            " CUDA build"
        )
    device = torch.device(
        "cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    )
    torch.cuda.set_device(device)
    return device


def _same_labels(path: Path, vocabulary: Vocabulary) -> None:
    if path.exists() and Vocabulary.load(path).fingerprint != vocabulary.fingerprint:
        raise InputError(
            f"{path}: the run was trained on other labels than the dataset has now: give another"
            " --output"
        )
