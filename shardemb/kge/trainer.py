"""The training loop of every rank: batches, steps, validation, checkpoints, final ranking.

Seed and epoch determine the data's order, so a resumed run equals an uninterrupted one.
"""

import threading
import time
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from shardemb import checkpoint
from shardemb.checkpoint.storage import name_of
from shardemb.comm import collectives, watchdog
from shardemb.coordinator import Coordinator
from shardemb.exceptions import CheckpointError, InputError, OtherDataError, TerminatedError
from shardemb.kge.config import JobConfig
from shardemb.kge.data.triples import Triples
from shardemb.kge.evaluation import check_candidates, evaluate
from shardemb.kge.model import KnowledgeGraphModel
from shardemb.kge.run_folder import RunFolder
from shardemb.kge.sampling import Sampler, seed_of
from shardemb.utils import logs
from shardemb.utils.devices import take_gpu
from shardemb.utils.memory import resident_bytes
from shardemb.utils.progress import progress_bar
from shardemb.utils.run_metrics import MetricsFile, plot_metrics, read_metrics, tell
from shardemb.utils.signals import on_sigterm

_log = logs.logger(__name__)

#: steps between two records of the loss
LOG_STEPS = 20


@dataclass
class _Progress:
    #: complete epochs
    epoch: int = 0
    #: complete steps of the next epoch
    step: int = 0
    #: the best validation MRR and its number of epochs; -1 before the first
    best: float = -1.0
    best_epoch: int = 0
    #: validations since the best one, and since the last lower rate
    since_best: int = 0
    since_change: int = 0
    #: factor of the learning rates after plateaus
    plateau: float = 1.0


class Trainer:
    """One run on one rank. The constructor and all methods are collectives.

    With ``run=None`` it writes nothing; ``resume`` continues from the newest checkpoint, if any.
    """

    def __init__(
        self,
        data: Triples,
        config: JobConfig,
        run: RunFolder | None,
        resume: bool = False,
        progress: bool = True,
    ) -> None:
        self.rank, self.world_size = collectives.rank_and_size()
        self.data, self.settings, self.config, self.run = data, config, config.training, run
        self.device = resolve_device(self.config.device)
        self.fingerprints = {"settings": config.fingerprint, **data.fingerprints}
        arguments = {"output": str(run), "resume": resume}
        collectives.agree("the training job", {**self.fingerprints, **arguments})
        if not len(data.valid) and (self.config.patience or config.optimizer.schedule == "plateau"):
            raise InputError(
                f"{data.name}: got no valid triples, expected some for training.patience or a"
                " plateau schedule"
            )
        check_candidates(config.evaluation, len(data.entities))
        self._make_model()
        self.at = _Progress()
        self.saver: checkpoint.AsyncSaver | None = None
        self.best_saver: checkpoint.AsyncSaver | None = None
        self.best_rows: list[dict[str, torch.Tensor]] | None = None
        self.file: MetricsFile | None = None
        if run is not None:
            self._open(run, resume)
        self.coordinator.steps = self.done
        watchdog.at_step(self.done + 1)
        if run is not None and self.rank == 0:
            run.save_labels(data.vocabularies)
            self.file = MetricsFile(run.metrics, step=self.done, tensorboard=run.tensorboard)
        samples = self.sampler.num_samples
        self.bar = progress_bar(
            total=self.config.epochs * samples,
            initial=self.done / self.sampler.num_steps * samples,
            unit=" queries" if config.sampling.scheme == "kvsall" else " triples",
            smoothing=0.05,
            disable=self.rank > 0 or not progress,
        )
        self.saved_at = time.monotonic()
        #: exchanged bytes and updated rows at the last record
        self.counted = (0, 0)
        self.asked_to_end = threading.Event()
        self.handling_sigterm = ExitStack()
        self.handling_sigterm.enter_context(on_sigterm(self.asked_to_end.set))

    def _make_model(self) -> None:
        data, settings, sampling = self.data, self.settings, self.settings.sampling
        counts, seed = (len(data.entities), len(data.relations)), self.config.seed
        self.against_all = sampling.scheme != "negatives"
        self.model = KnowledgeGraphModel(
            *counts, settings.model, seed, settings.loss, self.against_all, self.device
        )
        self.optimizer = settings.optimizer.make(self.model)
        clip = settings.optimizer.max_grad_norm or None
        self.coordinator = Coordinator(self.model, self.optimizer, clip, self.config.nonfinite)  # type: ignore[arg-type]
        chunks = -(-sampling.batch_size // sampling.chunk_size)
        if self.world_size > chunks and self.rank == 0 and not self.against_all:
            warnings.warn(
                f"{self.world_size} workers share {chunks} chunks a step, so some have nothing to"
                " train: lower sampling.chunk_size or raise sampling.batch_size",
                stacklevel=2,
            )
        ranks, subsampling = (self.rank, self.world_size), settings.loss.subsampling
        self.sampler = Sampler(data.train, *counts, sampling, seed, *ranks, subsampling)
        self.steps = self.config.epochs * self.sampler.num_steps
        order = torch.randperm(len(data.valid), generator=torch.Generator().manual_seed(seed))
        self.validation = data.valid[order[: self.config.validation_triples or None]]

    def _open(self, run: RunFolder, resume: bool) -> None:
        if resume:
            run.check_labels(self.data.vocabularies)
            self._resume(run)
        else:
            if results := collectives.gather(run.results(), operation="is the run new?")[0]:
                raise FileExistsError(
                    f"{run}: holds {' and '.join(results)} of a run: give another folder, or"
                    " resume=True"
                )
        keep = self.config.keep
        checkpoint.require_space(run.checkpoints, self.model, [self.optimizer], keep)
        self.saver = checkpoint.AsyncSaver(run.checkpoints, keep, self.config.background_saves)
        if self.config.patience:  # in the foreground, without another copy of the rows
            self.best_saver = checkpoint.AsyncSaver(run.best, keep=1, background=False)

    def train(self) -> dict[str, float]:
        """Train, restore the best model, and return the metrics of the test triples."""
        while not self.ended:
            self.run_epoch()
        self.finish_saving()
        self._take_best()
        result = self.evaluate("test", self.data.test)
        if self.file is not None and self.run is not None:
            plot_metrics(read_metrics(self.run.metrics), self.run.plot)
        return result

    @property
    def done(self) -> int:
        """Steps since the start of the run."""
        return self.at.epoch * self.sampler.num_steps + self.at.step

    @property
    def ended(self) -> bool:
        """Whether all epochs are complete, or ``patience`` validations were no better."""
        stopped_early = 0 < self.config.patience <= self.at.since_best
        return self.at.epoch >= self.config.epochs or (stopped_early and self.at.step == 0)

    def _resume(self, run: RunFolder) -> None:
        paths = checkpoint.checkpoints(run.checkpoints)
        damaged: list[Path] = []
        while paths:
            try:
                states, expected = [self.optimizer], self.fingerprints
                state = checkpoint.load(paths[-1], self.model, states, fingerprints=expected)
            except CheckpointError as error:
                if len(paths) == 1 or isinstance(error, OtherDataError):
                    raise
                damaged.append(Path(paths.pop()))
                if self.rank == 0:
                    warnings.warn(f"{error}; going back to {name_of(paths[-1])}", stacklevel=2)
                    _log.info("%s; going back to %s", error, name_of(paths[-1]))
            else:
                self.at = _Progress(**state["progress"])
                if self.config.patience:
                    self._resume_best(run)
                break
        for path in damaged if self.rank == 0 else ():  # the run will save these steps again
            path.rename(path.with_suffix(".damaged"))

    def _resume_best(self, run: RunFolder) -> None:
        """Best checkpoints newer than the loaded checkpoint are stale."""
        paths = [Path(path) for path in checkpoint.checkpoints(run.best)]
        others = [path for path in paths if path != self._best_path(run)]
        known = len(others) < len(paths)
        if not collectives.gather(known, operation="is the best checkpoint there?")[0]:
            self.at.best, self.at.since_best = -1.0, 0
        for path in others if self.rank == 0 else ():
            path.rename(path.with_suffix(".stale"))

    def _best_path(self, run: RunFolder) -> Path:
        return run.best_checkpoint(self.at.best_epoch * self.sampler.num_steps)

    def run_epoch(self) -> None:
        """Train an epoch; validate and save as configured."""
        self.model.train()
        at, num_steps = self.at, self.sampler.num_steps
        seen, triples, steps, total, start = 0, 0, 0, torch.zeros(()), time.perf_counter()
        ends = False
        while at.step < num_steps:
            self.settings.optimizer.set_rates(self.optimizer, self.done, self.steps, at.plateau)
            size = self.sampler.size(at.step)
            loss, plain, queries = self._loss(at.epoch, at.step)
            (loss / queries).backward()
            waited = time.monotonic() - self.saved_at
            save = self.rank == 0 and 0 < self.config.checkpoint_seconds <= waited
            flags = [save, self.asked_to_end.is_set()]
            due, ends = map(bool, self.coordinator.reduce(flags, loss))
            if self.coordinator.step():
                seen, triples, total = seen + queries, triples + size, total + plain
            at.step, steps = at.step + 1, steps + 1
            if (due or ends) and at.step < num_steps:
                self._save()
                if ends:
                    self._end()
            if at.step % LOG_STEPS == 0 or at.step == num_steps:
                self._log(total, seen, triples, steps, time.perf_counter() - start)
                seen, triples, steps, total, start = 0, 0, 0, torch.zeros(()), time.perf_counter()
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

    def _loss(self, epoch: int, step: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return this rank's loss with and without regularizers, and all ranks' queries."""
        model, sampler = self.settings.model, self.sampler
        if model.entity_dropout or model.relation_dropout:  # dropout masks depend on the rank
            torch.manual_seed(seed_of(self.config.seed, 3, epoch, step, self.rank))
        low = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            if self.against_all:
                queries = sampler.queries(epoch, step)
                loss, plain = self.model.loss_vs_all(queries)
                return loss, plain, len(queries.entities)
            loss, plain = self.model.loss(sampler.batches(epoch, step))
            return loss, plain, sampler.num_corruptions * sampler.size(step)

    def _validate(self) -> None:
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

    @property
    def _tables(self) -> tuple[Any, Any]:
        return self.model.entity, self.model.relation

    def _keep_best(self) -> None:
        if self.best_saver is not None:
            self._save(self.best_saver)
        else:
            self.best_rows = [{"weight": t._stored_rows()["weight"].clone()} for t in self._tables]

    def _take_best(self) -> None:
        if not self.config.patience or self.at.best_epoch in (0, self.at.epoch):
            return
        if self.best_saver is not None and self.run is not None:
            self.best_saver.wait()
            checkpoint.load(self._best_path(self.run), self.model, optimizer_state=False)
        elif self.best_rows is not None:
            for table, rows in zip(self._tables, self.best_rows, strict=True):
                table._load_stored_rows(rows)

    def _end(self) -> None:
        step, saved = self.done, "nothing is saved without an output"
        self.finish_saving()
        if self.run is not None:
            saved = f"saved as {self.run.checkpoint(step).name}"
        raise TerminatedError(f"SIGTERM came in step {step}: {saved}")

    def _save(self, saver: checkpoint.AsyncSaver | None = None) -> None:
        if self.saver is None:
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
            self.saved_at = time.monotonic()

    def finish_saving(self) -> None:
        """Wait for the last checkpoint and restore the SIGTERM handler."""
        if self.saver is not None:
            self.saver.wait()
        self.handling_sigterm.close()

    def _log(
        self, total: torch.Tensor, queries: int, triples: int, steps: int, seconds: float
    ) -> None:
        entity = self.model.entity
        counts = (entity.exchanged_bytes, self.optimizer.rows_updated[next(entity.parameters())])
        since = [now - before for now, before in zip(counts, self.counted, strict=True)]
        self.counted = counts
        figures = torch.zeros(self.world_size, 4, dtype=torch.float64, device=self.device)
        own = [total.item(), *since, self._memory()]
        figures[self.rank] = torch.tensor(own, dtype=torch.float64)
        collectives.all_reduce(figures, operation="figures for the log")
        losses, exchanged, touched, memory = figures.T.tolist()
        loss = sum(losses) / max(1, queries)
        ends = self.at.step == self.sampler.num_steps  # otherwise the bar uses its own clock
        text = f"epoch {self.at.epoch + 1}/{self.config.epochs} loss {loss:.3f}"
        self.bar.set_description(text, refresh=ends)
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
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        return resident_bytes()

    def _record(self, kind: str, **figures: Any) -> None:
        if self.file is not None:
            self.file.write(kind, self.done, **figures)
        tell(kind, self.done, figures)

    def evaluate(self, split: str, triples: torch.Tensor) -> dict[str, float]:
        """Rank a split and record the metrics; empty without triples."""
        if not len(triples):
            return {}
        self.model.eval()
        self.bar.set_description(f"ranking {len(triples):,} {split} triples")
        start = time.perf_counter()
        config = replace(self.settings.evaluation, per_relation=False)
        result = evaluate(self.model, triples, self.data.splits, config, self.config.seed)
        seconds = round(time.perf_counter() - start, 3)
        more = {"triples": len(triples), "seconds": seconds}
        self._record(split, epoch=self.at.epoch, **result, **more)
        self.bar.set_postfix_str(f"{split} MRR {result['mrr']:.3f}")
        return result

    def close(self) -> None:
        """Close progress bar and files; wait for a running save."""
        self.handling_sigterm.close()
        for saver in (self.saver, self.best_saver):
            if saver is not None:
                saver.close()
        self.bar.close()
        if self.file is not None:
            self.file.close()


def resolve_device(name: str) -> torch.device:
    """Return the CPU, or this rank's GPU as the current one; ValueError without any."""
    if name == "cpu":
        return torch.device("cpu")
    return take_gpu("training.device: got 'cuda'", otherwise="cpu")
