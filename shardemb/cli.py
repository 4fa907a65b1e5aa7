"""The command line; ``--help`` answers without loading torch."""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from shardemb import __version__

#: errors of the user's input or machine: their message is enough
_PLAIN = (
    "CheckpointError", "FileExistsError", "FileNotFoundError", "FloatingPointError", "IsADirectoryError", "MemoryError",
    "NotADirectoryError", "OSError", "PermissionError", "ValueError", "died",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for a failure, 2 for bad usage, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="shardemb", description="Embedding tables, row-sharded over processes.")
    parser.add_argument("--version", action="version", version=f"shardemb {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train and rank a knowledge-graph model on sharded tables")
    train.add_argument("config", nargs="?", type=Path, metavar="CONFIG.toml", help="settings; without it the defaults")
    train.add_argument("--dataset", help="wordnet, pykeen:NAME, a folder with train/valid/test files, or a file of triples")
    train.add_argument("--workers", type=int, default=1, help="ranks, one process each (default: 1)")
    train.add_argument("--output", type=Path, required=True, metavar="RUN", help="run folder, made anew")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in RUN")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting, e.g. training.epochs=3; repeatable",
    )
    train.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="of a collective (default: 300)")
    arguments = parser.parse_args(argv)
    try:
        return _train(arguments)
    except KeyboardInterrupt:
        print("shardemb: interrupted; --resume goes on from the newest checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        name, message = getattr(error, "error", type(error).__name__), getattr(error, "message", str(error))
        if name not in _PLAIN:
            if not getattr(error, "trace", ""):
                raise
            print(error.trace, file=sys.stderr)  # type: ignore[attr-defined]
        rank = f"rank {error.rank}: " if hasattr(error, "rank") else ""
        print(f"shardemb: error: {rank}{'; '.join(message.splitlines())}", file=sys.stderr)
        return 1


def _train(arguments: argparse.Namespace) -> int:
    from shardemb.checkpoint import checkpoints
    from shardemb.config import JobConfig
    from shardemb.files import replacing
    from shardemb.launch import run_local

    output: Path = arguments.output
    written = output / "config.toml"
    started = output.is_dir() and any(path != written for path in output.iterdir())
    if started and not arguments.resume:
        raise FileExistsError(f"{output} is not empty: give another --output, or go on with --resume")
    resumed = started and written.exists()
    base = arguments.config or (written if resumed else None)  # --resume alone keeps the run's settings
    config = JobConfig.load(base, arguments.set, arguments.dataset)
    if resumed and (changed := config.differences(JobConfig.load(written))):
        raise ValueError(f"{written}: --resume needs the settings of the run, got {'; '.join(changed)}")
    _make_writable(output)
    if not resumed:
        with replacing(written) as partial:
            partial.write_text(config.to_toml(), encoding="utf-8")
    found = checkpoints(output / "checkpoints")
    how = f"resuming from {found[-1].name}" if found else "no checkpoint to resume from, starting anew"
    print(
        f"training on {config.dataset}, {arguments.workers} worker(s), into {output}" + f": {how}" * arguments.resume,
        file=sys.stderr,
    )
    result = run_local(_train_rank, arguments.workers, config, output, arguments.resume, timeout_s=arguments.timeout)
    for name, value in result.items():
        print(f"test filtered {name:10} {value:.4f}")
    print(f"run folder: {output} (loss and MRR: {output / 'metrics.png'})")
    return 0


def _make_writable(output: Path) -> None:
    """Make the run folder and try to write there: a run that cannot save anything ends before it starts."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise OSError(f"--output {output}: expected a folder that can be made and written to: {error}") from error


def _train_rank(config: Any, output: Path, resume: bool) -> dict[str, float]:
    import torch.distributed as dist

    from shardemb.kge.trainer import train
    from shardemb.kge.triples import Triples

    with warnings.catch_warnings():
        if dist.is_initialized() and dist.get_rank():  # rank 0 says the same
            warnings.simplefilter("ignore")
        data = Triples.load(config.dataset, config.unseen)
    _, result = train(data, config.model, config.sampling, config.training, output, resume)
    return result
