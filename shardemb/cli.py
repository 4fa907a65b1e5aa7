"""The command line; ``--help`` answers without loading torch."""

import argparse
import dataclasses
import json
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

from shardemb import __version__
from shardemb.exceptions import InputError, TerminatedError, WorkerError, for_user, restart_may_help


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line.

    ``run`` of what it parses is the function that does it.
    """
    parser = argparse.ArgumentParser(
        prog="shardemb", description="Embedding tables, row-sharded over processes."
    )
    parser.add_argument("--version", action="version", version=f"shardemb {__version__}")
    parser.add_argument(
        "--verbose", action="store_true", help="log what the package does, to stderr"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train", help="train and rank a knowledge-graph model on sharded tables"
    )
    train.add_argument(
        "config",
        nargs="?",
        type=Path,
        metavar="CONFIG.toml",
        help="settings; without it the defaults",
    )
    train.add_argument(
        "--dataset",
        help=(
            "wordnet, pykeen:NAME, what ingest made, a folder with train/valid/test files, or a"
            " file of triples"
        ),
    )
    train.add_argument(
        "--workers",
        metavar="N[:MOST]",
        help="ranks, one process each (default: 1); on Ray also a least and a most",
    )
    train.add_argument(
        "--launcher",
        choices=("local", "torchrun", "ray"),
        help="what starts the ranks (default: local)",
    )
    train.add_argument(
        "--address",
        help=(
            "Ray: local, one of our own on this machine (default); auto, that of this node; or"
            " HOST:PORT of its head"
        ),
    )
    train.add_argument(
        "--max-failures",
        type=int,
        metavar="N",
        help="Ray: start again after so many failures (default: 3)",
    )
    train.add_argument(
        "--use-gpu", action="store_true", help="a GPU for each rank: training.device = cuda"
    )
    train.add_argument(
        "--output", type=Path, required=True, metavar="RUN", help="run folder, made anew"
    )
    train.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in RUN"
    )
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting, e.g. training.epochs=3; repeatable",
    )
    train.add_argument(
        "--timeout",
        type=float,
        default=300,
        metavar="SECONDS",
        help="of a collective (default: 300)",
    )
    train.set_defaults(run=_train)
    _add_evaluate(commands)
    _add_ingest(commands)
    _add_query(commands)
    _add_serve(commands)
    _add_checkpoint(commands)
    _add_plan(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0, 1 for a failure, 2 for bad usage, 130 for Ctrl-C, 143 for SIGTERM.
    """
    arguments = parser().parse_args(argv)
    arguments.argv = sys.argv[1:] if argv is None else argv
    try:
        from shardemb.utils import logs  # reads SHARDEMB_LOG, which may be wrong

        if arguments.verbose:
            logs.verbose()
        return arguments.run(arguments)
    except KeyboardInterrupt:
        hint = (
            "; --resume goes on from the newest checkpoint" if arguments.command == "train" else ""
        )
        print(f"shardemb: interrupted{hint}", file=sys.stderr)
        return 130
    except TerminatedError as error:
        print(f"shardemb: {error}; --resume goes on from there", file=sys.stderr)
        return 143  # as a shell reports SIGTERM
    except Exception as error:
        if isinstance(error, WorkerError) and error.error == TerminatedError.__name__:
            print(f"shardemb: {error.message}; --resume goes on from there", file=sys.stderr)
            return 143
        if not for_user(error):
            if not isinstance(error, WorkerError) or not error.trace:
                raise
            print(error.trace, file=sys.stderr)
        rank = f"rank {error.rank}: " if isinstance(error, WorkerError) else ""
        message = error.message if isinstance(error, WorkerError) else str(error)
        lost = arguments.command == "train" and restart_may_help(error)
        hint = "; --resume goes on from the newest checkpoint" if lost else ""
        print(f"shardemb: error: {rank}{'; '.join(message.splitlines())}{hint}", file=sys.stderr)
        return 1


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate", help="rank a split's triples with a run's newest, or best, checkpoint"
    )
    evaluate.add_argument("path", type=Path, metavar="RUN", help="run folder")
    evaluate.add_argument(
        "--split", choices=("train", "valid", "test"), default="test", help="default: test"
    )
    evaluate.add_argument(
        "--workers", type=int, default=1, help="ranks, one process each (default: 1)"
    )
    evaluate.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="another checkpoint than RUN's"
    )
    evaluate.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="evaluation.KEY=VALUE",
        help="override a setting; repeatable",
    )
    evaluate.add_argument(
        "--device", choices=("cpu", "cuda"), help="where rows lie (default: as in training)"
    )
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    evaluate.add_argument(
        "--timeout",
        type=float,
        default=300,
        metavar="SECONDS",
        help="of a collective (default: 300)",
    )
    evaluate.set_defaults(run=_evaluate)
    plot = commands.add_parser("plot", help="draw a run's loss, MRR and throughput")
    plot.add_argument("path", type=Path, metavar="RUN", help="run folder")
    plot.add_argument("--output", type=Path, metavar="FILE.png", help="default: RUN/metrics.png")
    plot.set_defaults(run=_plot)
    top = commands.add_parser(
        "top", help="show a run's progress, speed and memory by rank while it goes"
    )
    top.add_argument("path", type=Path, metavar="RUN", help="run folder")
    top.add_argument(
        "--every", type=float, default=2.0, metavar="SECONDS", help="between two looks (default: 2)"
    )
    top.add_argument("--once", action="store_true", help="look once, and end")
    top.set_defaults(run=_top)


def _evaluate(arguments: argparse.Namespace) -> int:
    from shardemb.kge.config import JobConfig
    from shardemb.launch.local import run_local
    from shardemb.serving.store import newest
    from shardemb.utils.files import replacing

    run: Path = arguments.path
    written = _of_run(run, "config.toml")
    for override in arguments.set:
        if not override.strip().startswith("evaluation."):
            raise InputError(
                f"got --set {override}, expected evaluation.KEY=VALUE: the rest is as the run was"
                " trained"
            )
    config = JobConfig.load(written, arguments.set)
    checkpoint = newest(arguments.checkpoint or run)
    print(f"ranking {arguments.split} triples of {config.dataset} by {checkpoint}", file=sys.stderr)
    device = arguments.device or config.training.device
    result = run_local(
        _evaluate_rank,
        arguments.workers,
        config,
        checkpoint,
        arguments.split,
        device,
        timeout_s=arguments.timeout,
        backend="nccl" if device == "cuda" else "gloo",
    )
    names = list(result["sides"]["both"])
    for side, figures in result["sides"].items():
        _print_figures(
            side, figures, result["triples"] * (1 + (side == "both")), names, header=side == "both"
        )
    for number, row in enumerate(result["relations"]):
        _print_figures(
            f"{row['side']} of {row['label']}", row, row["count"], names, header=number == 0
        )
    if arguments.json is not None:
        with replacing(arguments.json) as partial:
            partial.write_text(
                json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
    return 0


def _of_run(run: Path, name: str) -> Path:
    """Return a file of a run folder; FileNotFoundError if it is not there."""
    if not (run / name).is_file():
        raise FileNotFoundError(
            f"{run / name}: no such file, expected a run folder that shardemb train has made"
        )
    return run / name


def _print_figures(title: str, figures: Any, queries: int, names: list[str], header: bool) -> None:
    if header:
        print(" ".join([*(f"{name:>11}" for name in names), f"{'queries':>9}"]))
    print(" ".join([*(f"{figures[name]:11.4f}" for name in names), f"{queries:9,}", f" {title}"]))


def _plot(arguments: argparse.Namespace) -> int:
    from shardemb.utils.run_metrics import plot_metrics, read_metrics

    output = arguments.output or arguments.path / "metrics.png"
    plot_metrics(read_metrics(_of_run(arguments.path, "metrics.jsonl")), output)
    print(output)
    return 0


def _top(arguments: argparse.Namespace) -> int:
    from shardemb.utils.run_metrics import describe, read_metrics

    clear = "\x1b[H\x1b[2J" * sys.stdout.isatty()
    if not arguments.every > 0:
        raise InputError(f"--every: got {arguments.every} seconds, expected more than 0")
    shown = None
    while True:
        records = read_metrics(_of_run(arguments.path, "metrics.jsonl"))
        if clear or len(records) != shown:  # a log file gets what is new
            print(
                f"{clear}{arguments.path}\n{describe(records, time.time()) or 'no record yet'}",
                flush=True,
            )
        shown = len(records)
        if arguments.once or (records and records[-1]["kind"] == "test"):
            return 0
        time.sleep(arguments.every)


def _add_ingest(commands: Any) -> None:
    ingest = commands.add_parser(
        "ingest",
        help="make a dataset folder of files of triples of any size",
        usage="%(prog)s [options] SOURCE... OUT",
    )
    ingest.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="SOURCE... OUT",
        help=(
            "a folder with train/valid/test files or folders of part files; or files, or folders of"
            " part files, of one graph to be split; then the dataset folder, made anew. Files are"
            " .tsv, .txt, .nt (also .gz) or .parquet"
        ),
    )
    ingest.add_argument(
        "--memory", default="4GiB", help="that the process may take (default: 4GiB)"
    )
    ingest.add_argument("--threads", type=int, metavar="N", help="default: one for each core")
    for split in ("valid", "test"):
        text = f"triples of one graph that become {split} (default: a twentieth, 5,000 at most)"
        ingest.add_argument(f"--{split}", type=int, metavar="N", help=text)
    ingest.add_argument(
        "--unseen",
        choices=("keep", "drop", "error"),
        default="keep",
        help=(
            "what becomes of valid and test triples with labels that no training triple holds"
            " (default: keep)"
        ),
    )
    ingest.add_argument(
        "--literals",
        choices=("error", "drop", "keep"),
        default="error",
        help="what becomes of N-Triples whose object is a literal (default: error)",
    )
    ingest.add_argument(
        "--verify",
        action="store_true",
        help="check the hashes of a dataset folder, the only path, instead",
    )
    ingest.set_defaults(run=_ingest)


def _ingest(arguments: argparse.Namespace) -> int:
    from shardemb.kge.data import dataset
    from shardemb.kge.data.ingest import ingest

    *sources, out = arguments.paths
    if arguments.verify == bool(sources):
        raise InputError(
            f"ingest: got {len(arguments.paths)} path(s), expected SOURCE... OUT, or --verify"
            " FOLDER"
        )
    if arguments.verify:
        told, _, _ = dataset.read(out, verify=True)
        print(
            f"{out}: {len(told['files'])} files, {sum(e['size'] for e in told['files'].values()):,}"
            " bytes: undamaged"
        )
        return 0
    start, options = (
        time.perf_counter(),
        ("memory", "threads", "valid", "test", "unseen", "literals"),
    )
    before = signal.signal(signal.SIGTERM, _end)
    try:
        ingest(sources, out, **{name: getattr(arguments, name) for name in options}, progress=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    told, _, _ = dataset.read(out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{out}: {told['entities']:,} entities, {told['relations']:,} relations")
    for split, count in told["triples"].items():
        print(f"{split:>7}: {count:>13,} triples, {told['duplicates'][split]:,} of them repeated")
    if told["literals"]["dropped"]:
        print(f"dropped: {told['literals']['dropped']:>13,} triples with a literal")
    print(f"{time.perf_counter() - start:,.1f} s, {peak:,} MiB of memory at most")
    return 0


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)  # what is under way cleans up


def _add_query(commands: Any) -> None:
    query = commands.add_parser(
        "query", help="print an entity's nearest neighbours, or the best tails of (head, relation)"
    )
    query.add_argument("path", type=Path, metavar="RUN", help="run folder or checkpoint")
    query.add_argument("entity", help="label, or id if there are no labels")
    query.add_argument(
        "relation", nargs="?", help="with it: the best tails of (entity, relation, ?)"
    )
    query.add_argument("-k", type=int, default=10, help="how many (default: 10)")
    query.add_argument(
        "--metric",
        choices=("cosine", "dot", "l2"),
        default="cosine",
        help="of neighbours (default: cosine)",
    )
    query.add_argument(
        "--inverse", action="store_true", help="the best heads of (?, relation, entity) instead"
    )
    query.add_argument("--table", help="the table to search for neighbours (default: the largest)")
    query.set_defaults(run=_query)


def _query(arguments: argparse.Namespace) -> int:
    from shardemb.serving.store import StoredTable, open_store

    store = open_store(arguments.path)

    def key(table: StoredTable, text: str) -> str | int:
        if table.vocabulary is None and text.removeprefix("-").isdigit():
            return int(text)
        return text

    if arguments.relation is not None:
        from shardemb.kge.predict import best_tails

        head, relation = (
            key(store["entity"], arguments.entity),
            key(store["relation"], arguments.relation),
        )
        table, found = (
            store["entity"],
            best_tails(store, head, relation, arguments.k, arguments.inverse),
        )
    else:
        table = store.table if arguments.table is None else store[arguments.table]
        found = table.nearest(key(table, arguments.entity), arguments.k, arguments.metric)
    for row, score in zip(found.ids[0].tolist(), found.scores[0].tolist(), strict=True):
        print(f"{score:12.6g}  {table.label(row)}")
    return 0


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a checkpoint's rows to the jobs of a Ray cluster, until Ctrl-C or SIGTERM",
    )
    serve.add_argument(
        "path", type=Path, metavar="RUN", help="run folder or checkpoint, which every node must see"
    )
    serve.add_argument(
        "--shards",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the rows (default: 1)",
    )
    serve.add_argument(
        "--name", default="shardemb", help="by which clients find it (default: shardemb)"
    )
    text = (
        "of Ray: local starts one for this machine, auto is the cluster that it is a node of"
        " (default: local)"
    )
    serve.add_argument("--address", default="local", metavar="local|auto|HOST:PORT", help=text)
    text = "requests that may wait at a shard; more are refused, and asked again (default: 64)"
    serve.add_argument("--max-pending", type=int, default=64, metavar="K", help=text)
    serve.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    from shardemb.launch.ray import connected
    from shardemb.serving.ray_service import serve
    from shardemb.serving.store import newest

    path = newest(arguments.path)  # before Ray is started for nothing
    cpus = max(os.cpu_count() or 1, arguments.shards) if arguments.address == "local" else None
    with connected(arguments.address, cpus=cpus, log_to_driver=False) as ray:
        before = signal.signal(signal.SIGTERM, _end)  # after Ray has set its own
        try:
            with serve(
                path, arguments.shards, arguments.name, max_pending=arguments.max_pending
            ) as service:
                tables = ", ".join(
                    f"{prefix or t.name} ({t.max_id:,} rows)"
                    for prefix, t in service.info.tables.items()
                )
                address = ray.get_runtime_context().gcs_address
                print(
                    f"serving {service.info.path} as {arguments.name!r} from {arguments.shards}"
                    f" shard(s): {tables}"
                )
                print(f"on Ray at {address}; until Ctrl-C or SIGTERM")
                print(
                    f"in a job of it: client = shardemb.serving.connect({arguments.name!r});"
                    " client.lookup([0, 1])"
                )
                print(
                    f"elsewhere on its nodes: with shardemb.launch.ray.connected({address!r}): ...",
                    flush=True,
                )
                _watch(service)
        finally:
            signal.signal(signal.SIGTERM, before)
    return 0


def _watch(service: Any) -> None:
    """Print a line whenever a shard goes or comes back."""
    client = service.client()
    last = client.health()
    while True:
        time.sleep(1)
        for old, new in zip(last, now := client.health(), strict=True):
            if (old.ok, old.pid) != (new.ok, new.pid):
                told = (
                    f"serves on node {new.node}, process {new.pid}, restart {new.restarts}"
                    if new.ok
                    else f"is away: {new.error}"
                )
                print(f"{time.strftime('%H:%M:%S')} shard {new.shard} {told}", flush=True)
        last = now


def _add_checkpoint(commands: Any) -> None:
    parser = commands.add_parser("checkpoint", help="list, verify, export and import checkpoints")
    actions = parser.add_subparsers(dest="action", required=True)
    for name, run, text in (
        ("ls", _list, "list the finished checkpoints of a run, and what they hold"),
        (
            "verify",
            _verify,
            "check all files of all checkpoints; the exit code is 1 at the first fault",
        ),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument(
            "path",
            type=Path,
            metavar="RUN",
            help="run folder, folder of checkpoints, or one checkpoint",
        )
        action.set_defaults(run=run)
    export = actions.add_parser("export", help="write a table for other programs")
    export.add_argument(
        "path", type=Path, metavar="RUN", help="run folder (its newest checkpoint), or a checkpoint"
    )
    export.add_argument(
        "out", type=Path, metavar="OUT", help="file, or folder for sharded; must not be there"
    )
    formats = ("safetensors", "sharded", "parquet", "npy", "word2vec")
    export.add_argument(
        "--format",
        choices=formats,
        help="default: by the suffix .safetensors, .parquet, .npy, .txt or .vec",
    )
    export.add_argument("--table", help="default: the largest")
    export.add_argument("--raw", action="store_true", help="rows as stored, without the normalizer")
    export.set_defaults(run=_export)
    importing = actions.add_parser("import", help="make a run folder of other programs' rows")
    importing.add_argument(
        "source",
        type=Path,
        metavar="FILE",
        help=".npy, .safetensors, .parquet, or word2vec's .txt or .vec",
    )
    importing.add_argument("out", type=Path, metavar="RUN", help="run folder, made anew")
    importing.add_argument("--table", default="entity", help="name of the table (default: entity)")
    importing.add_argument("--key", help="the tensor or column to take, if there are several")
    importing.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="text with a label a line, in the order of the rows",
    )
    importing.set_defaults(run=_import)


def _found(path: Path) -> list[Path]:
    """Return a checkpoint itself, or all of a folder's."""
    from shardemb.checkpoint.manifest import MANIFEST, checkpoints
    from shardemb.serving.store import newest

    if (path / MANIFEST).is_file():
        return [path]
    folders = dict.fromkeys([path / "checkpoints", newest(path).parent])
    return [Path(found) for folder in folders for found in checkpoints(folder)]


def _list(arguments: argparse.Namespace) -> int:
    from shardemb.checkpoint.manifest import Manifest

    for path in _found(arguments.path):
        manifest = Manifest(path)
        values, size = manifest.values, sum(entry["size"] for entry in manifest.files.values())
        print(
            f"{path}  {values['time']}  {values['world_size']} rank(s)  {len(manifest.files)}"
            f" file(s)  {size:,} bytes"
        )
        for prefix, told in values["tables"].items():
            dtype = manifest.shards.get(f"{prefix}.weight" if prefix else "weight", [None])[0]
            shape = " x ".join(f"{size:,}" for size in (told["max_id"], *told["shape"]))
            print(
                f"  {prefix or told['name']}: {shape} "
                f" {dtype.dtype if dtype else ''}{' complex' * told['complex']}"
            )
        if values["optimizers"]:
            print(
                "  optimizers:"
                f" {', '.join(optimizer['class'] for optimizer in values['optimizers'])}"
            )
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from shardemb.checkpoint.manifest import verify

    for path in _found(arguments.path):
        manifest = verify(path)
        print(
            f"{path}: {len(manifest.files)} file(s),"
            f" {sum(e['size'] for e in manifest.files.values()):,} bytes: undamaged"
        )
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from shardemb.serving.export import export_table

    print(
        export_table(
            arguments.path,
            arguments.out,
            arguments.format,
            arguments.table,
            arguments.raw,
            shown=True,
        )
    )
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from shardemb.serving.export import import_table
    from shardemb.utils.files import read_text

    if not arguments.source.is_file():
        raise FileNotFoundError(f"{arguments.source}: no such file")
    labels = read_text(arguments.labels).splitlines() if arguments.labels else None
    print(import_table(arguments.source, arguments.out, arguments.table, labels, arguments.key))
    return 0


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="estimate memory, exchange and time of a job, and the fewest workers that hold it",
    )
    plan.add_argument(
        "config",
        nargs="?",
        type=Path,
        metavar="CONFIG.toml",
        help="settings of the job; without it the defaults",
    )
    plan.add_argument(
        "--entities",
        type=_count,
        required=True,
        metavar="N",
        help="rows of the sharded table, e.g. 1e9",
    )
    plan.add_argument(
        "--relations", type=_count, default=1000, metavar="N", help="of the graph (default: 1000)"
    )
    plan.add_argument(
        "--triples",
        type=_count,
        default=0,
        metavar="N",
        help="of an epoch, to tell how long it takes",
    )
    for option, key, text in _PLANNED:
        kind: Any = (
            {"metavar": "NAME"} if option == "optimizer" else {"type": _count, "metavar": "N"}
        )
        plan.add_argument(f"--{option}", help=f"{text}: {key}", **kind)
    plan.add_argument(
        "--batch-size",
        type=_count,
        metavar="N",
        help="triples of a step of all ranks (default: a chunk a rank)",
    )
    plan.add_argument(
        "--workers", type=_count, metavar="N", help="ranks (default: the fewest that fit)"
    )
    plan.add_argument(
        "--zipf",
        type=float,
        default=0.8,
        metavar="A",
        help="exponent of entities' frequency (default: 0.8)",
    )
    text = (
        "cpu, the machine that bench calibrate has measured last (default); its FILE.json; or h100"
        " or h200 by their data sheets"
    )
    plan.add_argument("--device", default="cpu", metavar="cpu|h100|h200|FILE.json", help=text)
    plan.add_argument(
        "--memory", metavar="SIZE", help="another memory of a GPU, or of a host, e.g. 80GiB"
    )
    plan.add_argument(
        "--ranks-per-host",
        type=_count,
        metavar="N",
        help="another number of ranks that share a host",
    )
    plan.add_argument(
        "--network",
        metavar="SIZE",
        help="bytes a second that a rank sends to other hosts, e.g. 3GB",
    )
    plan.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting; repeatable",
    )
    plan.add_argument(
        "--torchrec", action="store_true", help="let TorchRec's planner place the same table too"
    )
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the estimate there too")
    plan.set_defaults(run=_plan)
    bench = commands.add_parser("bench", help="measure this machine")
    actions = bench.add_subparsers(dest="action", required=True)
    calibrate = actions.add_parser(
        "calibrate",
        help="measure the rates that plan needs, a quarter of a minute on an idle machine",
    )
    calibrate.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="that rows lie on (default: cpu)"
    )
    calibrate.add_argument(
        "--threads", type=int, default=1, metavar="N", help="of a rank (default: 1)"
    )
    calibrate.add_argument(
        "--output", type=Path, metavar="FILE.json", help="default: where plan --device cpu looks"
    )
    calibrate.set_defaults(run=_calibrate)


#: options of plan that are settings too
_PLANNED = (
    ("dim", "model.dim", "columns of a row"),
    ("optimizer", "optimizer.name", "of the rows"),
    ("negatives", "sampling.num_negatives", "of a chunk and a side"),
    ("chunk-size", "sampling.chunk_size", "triples that share negatives"),
)


def _count(text: str) -> int:
    """Read a whole number, also as 1e9."""
    try:
        number = float(text)
        if number != int(number):
            raise ValueError
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected a whole number such as 1000000 or 1e6"
        ) from None
    return int(number)


def _plan(arguments: argparse.Namespace) -> int:
    from shardemb.kge.config import JobConfig
    from shardemb.planning import report

    overrides = list(arguments.set)
    for option, key, _ in _PLANNED:
        if (value := getattr(arguments, option.replace("-", "_"))) is not None:
            overrides.append(f"{key}={value}")
    machine = report.machine_of(
        arguments.device, arguments.memory, arguments.ranks_per_host, arguments.network
    )
    plan = report.plan(
        JobConfig.load(arguments.config, overrides),
        machine,
        entities=arguments.entities,
        relations=arguments.relations,
        triples=arguments.triples,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        zipf=arguments.zipf,
        torchrec=arguments.torchrec,
    )
    print(plan.text())
    if arguments.json is not None:
        plan.save(arguments.json)
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    from shardemb.planning.calibrate import calibrate
    from shardemb.planning.report import calibrated

    path = arguments.output or calibrated()
    machine = calibrate(arguments.device, arguments.threads)
    machine.save(path, shardemb=__version__)
    for field in dataclasses.fields(machine):
        value = getattr(machine, field.name)
        print(
            f"{field.name:>26}: {value:,.4g}"
            if isinstance(value, float)
            else f"{field.name:>26}: {value}"
        )
    print(path)
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from shardemb.launch.config import run

    config = _job(arguments)
    launch, output = config.launch, arguments.output.resolve()
    if launch.launcher == "torchrun":
        call: tuple[Any, ...] = (_prepare_and_train, launch, arguments, config)
    else:
        _prepare(arguments, config)
        # Ray starts again after a failure
        call = (_train_rank, launch, config, output, arguments.resume or launch.launcher == "ray")
    gpus = config.training.device == "cuda"
    result = run(*call, gpus=gpus, timeout_s=arguments.timeout, storage=output / "ray")
    if result is None:  # torchrun's other ranks
        return 0
    for name, value in result.items():
        print(f"test {'filtered' if config.evaluation.filtered else 'raw'} {name:10} {value:.4f}")
    print(f"run folder: {arguments.output} (loss and MRR: {arguments.output / 'metrics.png'})")
    return 0


def _holds_a_run(output: Path) -> bool:
    return output.is_dir() and any(
        path.name not in ("config.toml", "run.json") for path in output.iterdir()
    )


def _job(arguments: argparse.Namespace) -> Any:
    """Return the configuration of a run.

    ValueError if it is not that of the run that shall be resumed.
    """
    from shardemb.kge.config import JobConfig

    written = arguments.output / "config.toml"
    resumed = arguments.resume and _holds_a_run(arguments.output) and written.exists()
    base = arguments.config or (
        written if resumed else None
    )  # --resume alone keeps the run's settings
    config = JobConfig.load(
        base, [*arguments.set, *_launch_overrides(arguments)], arguments.dataset
    )
    if resumed and (changed := config.differences(JobConfig.load(written))):
        raise InputError(
            f"{written}: --resume needs the settings of the run, got {'; '.join(changed)}"
        )
    return config


def _prepare(arguments: argparse.Namespace, config: Any) -> None:
    """Make the run folder, or find it.

    FileExistsError if there is a run that shall not be resumed.
    """
    from shardemb.checkpoint.manifest import checkpoints
    from shardemb.checkpoint.storage import name_of
    from shardemb.utils.files import replacing

    output: Path = arguments.output
    started, written = _holds_a_run(output), output / "config.toml"
    if started and not arguments.resume:
        raise FileExistsError(
            f"{output} is not empty: give another --output, or go on with --resume"
        )
    _make_writable(output)
    if not (started and written.exists()):
        with replacing(written) as partial:
            partial.write_text(config.to_toml(), encoding="utf-8")
    launch = config.launch
    workers = (
        f"{launch.workers} to {launch.max_workers}" if launch.max_workers else str(launch.workers)
    )
    if launch.launcher == "torchrun":
        workers = os.environ["WORLD_SIZE"]
    _write_run(output, arguments, workers)
    found = checkpoints(output / "checkpoints")
    how = (
        f"resuming from {name_of(found[-1])}"
        if found
        else "no checkpoint to resume from, starting anew"
    )
    print(
        f"training on {config.dataset}, {workers} worker(s), into {output}"
        + f": {how}" * arguments.resume,
        file=sys.stderr,
    )


def _prepare_and_train(arguments: argparse.Namespace, config: Any) -> dict[str, float] | None:
    """Train on a rank that torchrun has started.

    Rank 0 makes the run folder, and alone returns the result.
    """
    import torch.distributed as dist

    from shardemb.comm import collectives

    arguments.resume = arguments.resume or int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0
    if dist.get_rank() == 0:
        _prepare(arguments, config)
    collectives.gather(None, operation="rank 0 makes the run folder")
    result = _train_rank(config, arguments.output.resolve(), arguments.resume)
    return result if dist.get_rank() == 0 else None


def _launch_overrides(arguments: argparse.Namespace) -> list[str]:
    """Return the settings that the command line has options of their own for."""
    least, separator, most = (arguments.workers or "").partition(":")
    given = {
        "launch.launcher": arguments.launcher,
        "launch.workers": least or None,
        "launch.max_workers": most if separator else None,
        "launch.address": None if arguments.address is None else json.dumps(arguments.address),
        "launch.max_failures": arguments.max_failures,
        "training.device": "cuda" if arguments.use_gpu else None,
    }
    return [f"{key}={value}" for key, value in given.items() if value is not None]


def _write_run(output: Path, arguments: argparse.Namespace, workers: str) -> None:
    """Add to ``run.json`` how the run was started, and with what.

    Beside ``config.toml``, all that reproduces it.
    """
    import platform
    import shlex
    from datetime import datetime
    from importlib.metadata import version

    from shardemb.utils.files import replacing

    path = output / "run.json"
    starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    packages = {name: version(name) for name in ("numpy", "torch", "torchrec")} | {
        "shardemb": __version__
    }
    here = {"python": platform.python_version(), "platform": platform.platform(), **packages}
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    command = shlex.join(["shardemb", *arguments.argv])
    starts.append({"started": started, "command": command, "workers": workers, "versions": here})
    with replacing(path) as partial:
        partial.write_text(json.dumps(starts, indent=1) + "\n", encoding="utf-8")


def _make_writable(output: Path) -> None:
    """Make the run folder and try to write there.

    A run that cannot save anything ends before it starts.
    """
    try:
        str(output).encode()  # Arrow writes under no other names
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except (OSError, UnicodeEncodeError) as error:
        raise OSError(
            f"--output {output}: expected a folder that can be made and written to: {error}"
        ) from error


def _evaluate_rank(config: Any, path: Path, split: str, device: str) -> dict[str, Any]:
    import torch.distributed as dist

    from shardemb import checkpoint
    from shardemb.kge.evaluation import report
    from shardemb.kge.model import KnowledgeGraphModel
    from shardemb.kge.trainer import resolve_device

    data = _load(config)
    triples = getattr(data, split)
    if not len(triples):
        raise InputError(f"{config.dataset}: got no {split} triples, expected some to rank")
    model = KnowledgeGraphModel(
        len(data.entities),
        len(data.relations),
        config.model,
        config.training.seed,
        device=resolve_device(device),
    )
    told = {name: getattr(data, name).fingerprint for name in ("entities", "relations")}
    checkpoint.load(path, model, optimizer_state=False, fingerprints=told)
    shown = not dist.is_initialized() or dist.get_rank() == 0
    found = report(model, triples, data.splits, config.evaluation, config.training.seed, shown)
    rows = [{"label": data.relations.labels[row["relation"]], **row} for row in found.table]
    rows.sort(key=lambda row: -row["count"])
    settings = {
        "checkpoint": str(path),
        "split": split,
        "triples": len(triples),
        **dataclasses.asdict(config.evaluation),
    }
    return {**settings, "sides": found.sides, "relations": rows}


def _load(config: Any) -> Any:
    """Load the job's triples; rank 0 alone warns."""
    import torch.distributed as dist

    from shardemb.kge.data.triples import Triples

    with warnings.catch_warnings():
        if dist.is_initialized() and dist.get_rank():  # rank 0 says the same
            warnings.simplefilter("ignore")
        return Triples.load(config.dataset, config.unseen)


def _train_rank(config: Any, output: Path, resume: bool) -> dict[str, float]:
    from shardemb.kge.trainer import Settings, train
    from shardemb.launch import ray

    data = _load(config)
    if source := config.launch.ray_data:
        data = data.with_share(*ray.share(), source)
    sections = {field.name: getattr(config, field.name) for field in dataclasses.fields(Settings)}
    _, result = train(data, **sections, output=output, resume=resume)
    return result
