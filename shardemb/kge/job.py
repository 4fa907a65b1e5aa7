"""The commands ``train``, ``evaluate`` and ``query``, for Python.

:func:`train` runs on existing ranks and a graph in memory; :func:`train_run` and
:func:`evaluate_run` start the ranks of a configuration.
"""

import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from shardemb import checkpoint as checkpoints
from shardemb.comm import collectives
from shardemb.exceptions import InputError
from shardemb.kge.config import JobConfig, TrainingConfig
from shardemb.kge.data.triples import Triples, absolute
from shardemb.kge.evaluation import EvaluationConfig, report
from shardemb.kge.losses import LossConfig
from shardemb.kge.model import KnowledgeGraphModel, ModelConfig
from shardemb.kge.optimizers import OptimizerConfig
from shardemb.kge.predict import best_tails
from shardemb.kge.run_folder import RunFolder
from shardemb.kge.sampling import SamplingConfig
from shardemb.kge.trainer import Trainer, resolve_device
from shardemb.launch.config import LaunchConfig, run
from shardemb.launch.local import run_local
from shardemb.serving.store import StoredTable, newest, open_store

#: receives a line about the next phase
Notify = Callable[[str], object]


def train(
    data: Triples,
    model: ModelConfig | None = None,
    loss: LossConfig | None = None,
    sampling: SamplingConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    training: TrainingConfig | None = None,
    evaluation: EvaluationConfig | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> tuple[KnowledgeGraphModel, dict[str, float]]:
    """Train and rank. A collective: every rank calls it with the same arguments.

    The commands evaluate, query and resume the run in ``output``. A graph that
    :meth:`Triples.load` did not load needs ``--dataset`` to be evaluated, and only this function
    resumes its run: the triples of files have another order.

    Args:
        data: the graph, the same on all ranks.
        model: the model's settings.
        loss: the loss.
        sampling: batch sizes and negatives.
        optimizer: optimizer and learning rates.
        training: epochs, validation and checkpoints.
        evaluation: how triples are ranked.
        output: run folder, on storage that all ranks share; None writes nothing.
        resume: continue from the newest checkpoint of ``output``, if any.
        progress: show a progress bar on rank 0.

    Returns:
        The model with this rank's rows, and the metrics of the test split, if any.

    Raises:
        FloatingPointError: the loss is NaN or infinite, on all ranks.
        CheckpointError: a checkpoint cannot be written (checked before training) or read.
        TerminatedError: SIGTERM came; a checkpoint of the current step is complete.
        ValueError: incompatible settings, or a resumed run has other data or settings.
        FileExistsError: ``output`` holds a run, and ``resume`` is False.
    """
    config = JobConfig(
        dataset=data.dataset,
        unseen=data.unseen,
        model=model or ModelConfig(),
        loss=loss or LossConfig(),
        sampling=sampling or SamplingConfig(),
        optimizer=optimizer or OptimizerConfig(),
        training=training or TrainingConfig(),
        evaluation=evaluation or EvaluationConfig(),
        launch=LaunchConfig(workers=collectives.rank_and_size()[1]),
    )
    folder = None if output is None else RunFolder(output)
    with closing(Trainer(data, config, folder, resume, progress)) as trainer:
        if folder is not None and trainer.rank == 0:
            command = shlex.join(["python", *sys.argv])
            folder.write_start(config.to_toml(), command, str(trainer.world_size))
        return trainer.model, trainer.train()


def train_run(
    config: JobConfig,
    output: str | Path,
    *,
    resume: bool = False,
    timeout_s: float = 300.0,
    command: str = "",
    notify: Notify = lambda text: None,
) -> dict[str, float] | None:
    """Start the ranks of a job, train, and rank the test triples, as ``shardemb train``.

    Args:
        config: all settings.
        output: run folder.
        resume: continue from the newest checkpoint of ``output``, if any.
        timeout_s: seconds that a collective waits for a missing rank.
        command: recorded in ``run.json``; "" for this process's command line.
        notify: called when the folder is ready, before training.

    Returns:
        The metrics of the test split; None on torchrun's ranks other than 0.

    Raises:
        FileExistsError: ``output`` is not empty, and ``resume`` is False.
        ValueError: a resumed run has other settings.
        WorkerError: a rank failed; a single local worker raises its own exception.
        Exception: as :func:`train`.
    """
    folder, launch = RunFolder(output), config.launch
    written = folder.resumable_config if resume else None
    if written and (changed := config.differences(JobConfig.load(written))):
        raise InputError(
            f"{written}: --resume needs the settings of the run, got {'; '.join(changed)}"
        )
    _require_dataset(config, folder)
    command = command or shlex.join(["python", *sys.argv])
    options: dict[str, Any] = {
        "gpus": config.training.device == "cuda",
        "timeout_s": timeout_s,
        "storage": folder.ray.resolve(),
    }
    if launch.launcher == "torchrun":
        common = config, folder, resume, command, notify
        return run(_prepare_and_train, launch, *common, **options)
    workers = f"{launch.workers}" + f" to {launch.max_workers}" * bool(launch.max_workers)
    _prepare(config, folder, resume, command, workers, notify)
    again = resume or launch.launcher == "ray"  # Ray restarts ranks after a failure
    return run(_train_rank, launch, config, folder.path.resolve(), again, **options)


def _prepare(
    config: JobConfig, folder: RunFolder, resume: bool, command: str, workers: str, notify: Notify
) -> None:
    if not resume:
        folder.require_empty()
    folder.create()
    folder.write_start(config.to_toml(), command, workers)
    name = folder.newest()
    how = f"resuming from {name}" if name else "no checkpoint to resume from, starting anew"
    text = f"training on {config.dataset}, {workers} worker(s), into {folder}"
    notify(text + f": {how}" * resume)


def _prepare_and_train(
    config: JobConfig, folder: RunFolder, resume: bool, command: str, notify: Notify
) -> dict[str, float] | None:
    rank = dist.get_rank()
    resume = resume or int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0
    if rank == 0:
        _prepare(config, folder, resume, command, os.environ["WORLD_SIZE"], notify)
    collectives.gather(None, operation="rank 0 makes the run folder")
    result = _train_rank(config, folder.path.resolve(), resume)
    return result if rank == 0 else None


def _train_rank(config: JobConfig, output: Path, resume: bool) -> dict[str, float]:
    with closing(Trainer(_load(config), config, RunFolder(output), resume)) as trainer:
        return trainer.train()


def _load(config: JobConfig) -> Triples:
    """Load the job's triples; only rank 0 warns."""
    with warnings.catch_warnings():
        if collectives.rank_and_size()[0]:
            warnings.simplefilter("ignore")
        return Triples.load(config.dataset, config.unseen)


def _require_dataset(config: JobConfig, folder: RunFolder) -> None:
    if config.dataset:
        return
    if folder.config.exists():
        raise InputError(
            f"{folder.config}: got no dataset, as the run was trained from Python on a graph in"
            " memory: give files of the same graph by --dataset"
        )
    raise InputError("dataset: got '', expected a graph: give --dataset")


def evaluate_run(
    output: str | Path,
    *,
    split: str = "test",
    workers: int = 1,
    overrides: Iterable[str] = (),
    dataset: str | None = None,
    checkpoint: str | Path | None = None,
    device: str | None = None,
    timeout_s: float = 300.0,
    notify: Notify = lambda text: None,
) -> dict[str, Any]:
    """Rank a split's triples with a run's checkpoint, as ``shardemb evaluate``.

    Args:
        output: run folder.
        split: "train", "valid" or "test".
        workers: number of local ranks.
        overrides: settings, "evaluation.KEY=VALUE".
        dataset: another location of the run's dataset.
        checkpoint: None for the best, or else the newest.
        device: "cpu" or "cuda"; None for the training's.
        timeout_s: seconds that a collective waits for a missing rank.
        notify: called before the ranks start.

    Returns:
        "checkpoint", "split", "triples" (their number), the evaluation's settings, "sides" (metrics
        of "both", "tail" and "head") and, if configured, "relations" (metrics of each).

    Raises:
        FileNotFoundError: no run folder.
        CheckpointError: no checkpoint, or one of another dataset.
        ValueError: no triples, or a setting out of range.
        WorkerError: a rank failed; a single worker raises its own exception.
    """
    folder, overrides = RunFolder(output), list(overrides)
    written = folder.existing(folder.config)
    for override in overrides:
        if not override.strip().startswith("evaluation."):
            raise InputError(
                f"got --set {override}, expected evaluation.KEY=VALUE: the rest is as the run was"
                " trained"
            )
    config = JobConfig.load(written, overrides)
    in_memory = not config.dataset
    if dataset is not None:
        config = replace(config, dataset=absolute(dataset))
    _require_dataset(config, folder)
    path = newest(Path(checkpoint or folder.path))
    notify(f"ranking {split} triples of {config.dataset} by {path}")
    device = device or config.training.device
    backend = "nccl" if device == "cuda" else "gloo"
    arguments = config, path, split, device, in_memory
    return run_local(_evaluate_rank, workers, *arguments, timeout_s=timeout_s, backend=backend)


def _evaluate_rank(
    config: JobConfig, path: Path, split: str, device: str, in_memory: bool
) -> dict[str, Any]:
    data = _load(config)
    triples = getattr(data, split)
    if not len(triples):
        raise InputError(f"{config.dataset}: got no {split} triples, expected some to rank")
    seed = config.training.seed
    counts = len(data.entities), len(data.relations)
    model = KnowledgeGraphModel(*counts, config.model, seed, device=resolve_device(device))
    fingerprints = data.fingerprints
    if in_memory:  # files have another order than columns in memory
        del fingerprints["triples"]
    checkpoints.load(path, model, optimizer_state=False, fingerprints=fingerprints)
    shown = collectives.rank_and_size()[0] == 0
    ranked = report(model, triples, data.splits, config.evaluation, seed, shown)
    labels = data.relations.labels if ranked.table else []
    rows = [{"label": labels[row["relation"]], **row} for row in ranked.table]
    rows.sort(key=lambda row: -row["count"])
    settings = asdict(config.evaluation)
    described = {"checkpoint": str(path), "split": split, "triples": len(triples), **settings}
    return {**described, "sides": ranked.sides, "relations": rows}


def query_run(
    path: str | Path,
    entity: str | int,
    relation: str | int | None = None,
    *,
    k: int = 10,
    metric: str = "cosine",
    inverse: bool = False,
    table: str | None = None,
) -> list[tuple[str, float]]:
    """Return the nearest entities or the best answers, as ``shardemb query``.

    Args:
        path: run folder or checkpoint.
        entity: label, or id without labels.
        relation: None for the nearest entities; else for the best tails of (entity, relation, ?).
        k: number of results.
        metric: "cosine", "dot" or "l2", of nearest entities.
        inverse: the best heads of (?, relation, entity) instead.
        table: of the nearest rows; None for the largest.

    Returns:
        Labels (or ids) and scores, best first.

    Raises:
        CheckpointError, KeyError, IndexError, ValueError: as :func:`shardemb.open_store` and
            :func:`~shardemb.kge.predict.best_tails`.
    """
    store = open_store(path)
    if relation is None:
        searched = store.table if table is None else store[table]
        best = searched.nearest(_key(searched, entity), k, metric)  # type: ignore[arg-type]
    else:
        searched = store["entity"]
        keys = _key(searched, entity), _key(store["relation"], relation)
        best = best_tails(store, *keys, k, inverse)
    pairs = zip(best.ids[0].tolist(), best.scores[0].tolist(), strict=True)
    return [(searched.label(row), score) for row, score in pairs]


def _key(table: StoredTable, text: str | int) -> str | int:
    if table.vocabulary is None and str(text).removeprefix("-").isdigit():
        return int(text)
    return text
