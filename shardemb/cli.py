"""The command line: parsers and printing. ``--help`` answers without loading torch."""

import argparse
import dataclasses
import json
import os
import resource
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardemb import __version__
from shardemb.exceptions import InputError, TerminatedError, WorkerError
from shardemb.utils.signals import on_sigterm

_RUN: dict[str, Any] = {"type": Path, "metavar": "RUN"}
_JSON: dict[str, Any] = {"type": Path, "metavar": "FILE"}
_NUMBER: dict[str, Any] = {"type": int, "metavar": "N"}


def parser() -> argparse.ArgumentParser:
    """Return the parser; ``run`` of its result is the function to call."""
    parser = argparse.ArgumentParser(
        prog="shardemb", description="Embedding tables, row-sharded over processes."
    )
    parser.add_argument("--version", action="version", version=f"shardemb {__version__}")
    parser.add_argument(
        "--verbose", action="store_true", help="log what the package does, to stderr"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for add_command in (
        *(_add_train, _add_evaluate, _add_watching, _add_ingest, _add_query, _add_serve),
        *(_add_checkpoint, _add_plan, _add_bench),
    ):
        add_command(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code.

    0 for success, 1 for a failure, 2 for bad usage, 130 for Ctrl-C, 143 for SIGTERM.
    """
    arguments = parser().parse_args(argv)
    arguments.argv = sys.argv[1:] if argv is None else argv
    resumes = "; --resume goes on from the newest checkpoint" * (arguments.command == "train")
    try:
        from shardemb.utils import logs  # reads SHARDEMB_LOG, which may be invalid

        if arguments.verbose:
            logs.verbose()
        return arguments.run(arguments)
    except KeyboardInterrupt:
        _say(f"shardemb: interrupted{resumes}")
        return 130
    except Exception as error:
        failure = error if isinstance(error, WorkerError) else WorkerError.of(0, error)
        if failure.error == TerminatedError.__name__:
            _say(f"shardemb: {failure.message}; --resume goes on from there")
            return 143  # as shells report SIGTERM
        if not failure.for_user:
            if failure is not error or not failure.trace:
                raise
            _say(failure.trace)
        rank = f"rank {failure.rank}: " if failure is error else ""
        hint = resumes if failure.restart_may_help else ""
        _say(f"shardemb: error: {rank}{'; '.join(failure.message.splitlines())}{hint}")
        return 1


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _end() -> None:
    """Clean up and end, as after Ctrl-C."""
    sys.exit(143)  # as shells report SIGTERM


#: adds an argument to a command
_Add = Callable[..., Any]


def _command(commands: Any, name: str, run: Any, text: str, **options: Any) -> _Add:
    command = commands.add_parser(name, help=text, **options)
    command.set_defaults(run=run)
    return lambda name, text, **options: command.add_argument(name, help=text, **options)


def _options(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names}


def _overrides(arguments: argparse.Namespace) -> list[str]:
    """Return the settings of --set, and those of options with a key as their name."""
    given = {key: value for key, value in vars(arguments).items() if "." in key}
    options = [f"{key}={value}" for key, value in given.items() if value is not None]
    return arguments.overrides + options


def _add_overrides(add: _Add, metavar: str = "KEY=VALUE", example: str = "") -> None:
    text = f"override a setting{example}; repeatable"
    add("--set", text, action="append", default=[], dest="overrides", metavar=metavar)


def _add_timeout(add: _Add) -> None:
    text = "of a collective (default: 300)"
    add("--timeout", text, type=float, default=300, dest="timeout_s", metavar="SECONDS")


def _add_train(commands: Any) -> None:
    text = "train and rank a knowledge-graph model on sharded tables"
    add = _command(commands, "train", _train, text)
    add("config", "settings; without it the defaults", nargs="?", type=Path, metavar="CONFIG.toml")
    text = (
        "wordnet, pykeen:NAME, what ingest made, a folder with train/valid/test files, or a file of"
        " triples"
    )
    add("--dataset", text)
    text = "ranks, one process each (default: 1); on Ray also a least and a most"
    add("--workers", text, default="", metavar="N[:MOST]")
    text = "what starts the ranks (default: local)"
    add("--launcher", text, choices=("local", "torchrun", "ray"), dest="launch.launcher")
    text = (
        "Ray: local, one of our own on this machine (default); auto, that of this node; or"
        " HOST:PORT of its head"
    )
    add("--address", text, type=json.dumps, dest="launch.address", metavar="ADDRESS")
    text = "Ray: start again after so many failures (default: 3)"
    add("--max-failures", text, dest="launch.max_failures", **_NUMBER)
    text = "a GPU for each rank: training.device = cuda"
    add("--use-gpu", text, action="store_const", const="cuda", dest="training.device")
    add("--output", "run folder, made anew", required=True, **_RUN)
    add("--resume", "go on from the newest checkpoint in RUN", action="store_true")
    _add_overrides(add, example=", e.g. training.epochs=3")
    _add_timeout(add)


def _train(arguments: argparse.Namespace) -> int:
    from shardemb.kge.config import JobConfig
    from shardemb.kge.job import train_run
    from shardemb.kge.run_folder import RunFolder

    run = RunFolder(arguments.output)
    overrides, (least, separator, most) = _overrides(arguments), arguments.workers.partition(":")
    overrides += [f"launch.workers={least}"] * bool(least)
    overrides += [f"launch.max_workers={most}"] * bool(separator)
    # --resume alone keeps the run's settings
    base = arguments.config or (run.resumable_config if arguments.resume else None)
    config = JobConfig.load(base, overrides, arguments.dataset)
    command = shlex.join(["shardemb", *arguments.argv])
    options = _options(arguments, "output", "resume", "timeout_s")
    result = train_run(config, **options, command=command, notify=_say)
    if result is None:  # torchrun's other ranks
        return 0
    for name, value in result.items():
        print(f"test {'filtered' if config.evaluation.filtered else 'raw'} {name:10} {value:.4f}")
    print(f"run folder: {run} (loss and MRR: {run.plot})")
    return 0


def _add_evaluate(commands: Any) -> None:
    text = "rank a split's triples with a run's newest, or best, checkpoint"
    add = _command(commands, "evaluate", _evaluate, text)
    add("output", "run folder", **_RUN)
    splits = ("train", "valid", "test")
    add("--split", "default: test", choices=splits, default="test")
    add("--dataset", "the run's dataset, if it is not where it was", metavar="PATH")
    add("--workers", "ranks, one process each (default: 1)", type=int, default=1)
    add("--checkpoint", "another checkpoint than RUN's", type=Path, metavar="PATH")
    _add_overrides(add, "evaluation.KEY=VALUE")
    add("--device", "where rows lie (default: as in training)", choices=("cpu", "cuda"))
    add("--json", "write the figures there too", **_JSON)
    _add_timeout(add)


def _evaluate(arguments: argparse.Namespace) -> int:
    from shardemb.kge.job import evaluate_run
    from shardemb.utils.files import write_json

    names = "output", "split", "workers", "overrides", "dataset", "checkpoint", "device"
    result = evaluate_run(**_options(arguments, *names, "timeout_s"), notify=_say)
    triples, relations = result["triples"], result["relations"]
    _print_figures(
        [(s, triples * (1 + (s == "both")), row) for s, row in result["sides"].items()],
        [(f"{row['side']} of {row['label']}", row["count"], row) for row in relations],
    )
    if arguments.json is not None:
        write_json(arguments.json, result)
    return 0


def _print_figures(*tables: list[tuple[str, int, Any]]) -> None:
    names = list(tables[0][0][2])
    for rows in filter(None, tables):
        print(" ".join(f"{name:>11}" for name in names), f"{'queries':>9}")
        for title, queries, row in rows:
            print(" ".join(f"{row[name]:11.4f}" for name in names), f"{queries:9,}  {title}")


def _add_watching(commands: Any) -> None:
    add = _command(commands, "plot", _plot, "draw a run's loss, MRR and throughput")
    add("path", "run folder", **_RUN)
    add("--output", "default: RUN/metrics.png", type=Path, metavar="FILE.png")
    text = "show a run's progress, speed and memory by rank while it goes"
    add = _command(commands, "top", _top, text)
    add("path", "run folder", **_RUN)
    add("--every", "between two looks (default: 2)", type=float, default=2.0, metavar="SECONDS")
    add("--once", "look once, and end", action="store_true")


def _plot(arguments: argparse.Namespace) -> int:
    from shardemb.kge.run_folder import RunFolder
    from shardemb.utils.run_metrics import plot_metrics, read_metrics

    run = RunFolder(arguments.path)
    output = arguments.output or run.plot
    plot_metrics(read_metrics(run.existing(run.metrics)), output)
    print(output)
    return 0


def _top(arguments: argparse.Namespace) -> int:
    from shardemb.kge.run_folder import RunFolder
    from shardemb.utils.run_metrics import describe, read_metrics

    run, clear = RunFolder(arguments.path), "\x1b[H\x1b[2J" * sys.stdout.isatty()
    if not arguments.every > 0:
        raise InputError(f"--every: got {arguments.every} seconds, expected more than 0")
    shown = None
    while True:
        records = read_metrics(run.existing(run.metrics))
        if clear or len(records) != shown:  # a log file gets new records only
            text = describe(records, time.time()) or "no record yet"
            print(f"{clear}{run}\n{text}", flush=True)
        shown = len(records)
        if arguments.once or (records and records[-1]["kind"] == "test"):
            return 0
        time.sleep(arguments.every)


def _add_ingest(commands: Any) -> None:
    text = "make a dataset folder of files of triples of any size"
    usage = "%(prog)s [options] SOURCE... OUT"
    add = _command(commands, "ingest", _ingest, text, usage=usage)
    text = (
        "a folder with train/valid/test files or folders of part files; or files, or folders of"
        " part files, of one graph to be split; then the dataset folder, made anew. Files are .tsv,"
        " .txt, .nt (also .gz) or .parquet"
    )
    add("paths", text, nargs="+", type=Path, metavar="SOURCE... OUT")
    add("--memory", "that the process may take (default: 4GiB)", default="4GiB")
    add("--threads", "default: one for each core", **_NUMBER)
    for split in ("valid", "test"):
        text = f"triples of one graph that become {split} (default: a twentieth, 5,000 at most)"
        add(f"--{split}", text, **_NUMBER)
    text = "what becomes of valid and test triples with labels that no training triple holds"
    choices = ("keep", "drop", "error")
    add("--unseen", f"{text} (default: keep)", choices=choices, default="keep")
    text = "what becomes of N-Triples whose object is a literal (default: error)"
    add("--literals", text, choices=("error", "drop", "keep"), default="error")
    text = "check the hashes of a dataset folder, the only path, instead"
    add("--verify", text, action="store_true")


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
        files = dataset.read(out, verify=True)[0]["files"].values()
        size = sum(entry["size"] for entry in files)
        print(f"{out}: {len(files)} files, {size:,} bytes: undamaged")
        return 0
    start, names = time.perf_counter(), ("memory", "threads", "valid", "test", "unseen", "literals")
    with on_sigterm(_end):
        ingest(sources, out, **_options(arguments, *names), progress=True)
    made = dataset.read(out)[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{out}: {made['entities']:,} entities, {made['relations']:,} relations")
    for split, count in made["triples"].items():
        print(f"{split:>7}: {count:>13,} triples, {made['duplicates'][split]:,} of them repeated")
    if made["literals"]["dropped"]:
        print(f"dropped: {made['literals']['dropped']:>13,} triples with a literal")
    print(f"{time.perf_counter() - start:,.1f} s, {peak:,} MiB of memory at most")
    return 0


def _add_query(commands: Any) -> None:
    text = "print an entity's nearest neighbours, or the best tails of (head, relation)"
    add = _command(commands, "query", _query, text)
    add("path", "run folder or checkpoint", **_RUN)
    add("entity", "label, or id if there are no labels")
    add("relation", "with it: the best tails of (entity, relation, ?)", nargs="?")
    add("-k", "how many (default: 10)", type=int, default=10)
    metrics, text = ("cosine", "dot", "l2"), "of neighbours (default: cosine)"
    add("--metric", text, choices=metrics, default="cosine")
    add("--inverse", "the best heads of (?, relation, entity) instead", action="store_true")
    add("--table", "the table to search for neighbours (default: the largest)")


def _query(arguments: argparse.Namespace) -> int:
    from shardemb.kge.job import query_run

    names = "path", "entity", "relation", "k", "metric", "inverse", "table"
    for label, score in query_run(**_options(arguments, *names)):
        print(f"{score:12.6g}  {label}")
    return 0


def _add_serve(commands: Any) -> None:
    text = "serve a checkpoint's rows to the jobs of a Ray cluster, until Ctrl-C or SIGTERM"
    add = _command(commands, "serve", _serve, text)
    add("path", "run folder or checkpoint, which every node must see", **_RUN)
    add("--shards", "processes that share the rows (default: 1)", default=1, **_NUMBER)
    add("--name", "by which clients find it (default: shardemb)", default="shardemb")
    text = (
        "of Ray: local starts one for this machine, auto is the cluster that it is a node of"
        " (default: local)"
    )
    add("--address", text, default="local", metavar="local|auto|HOST:PORT")
    text = "requests that may wait at a shard; more are refused, and asked again (default: 64)"
    add("--max-pending", text, type=int, default=64, metavar="K")


def _serve(arguments: argparse.Namespace) -> int:
    from shardemb.launch.ray import connected
    from shardemb.serving.ray_service import serve
    from shardemb.serving.store import newest

    path = newest(arguments.path)  # check before Ray starts
    shards, name = arguments.shards, arguments.name
    cpus = max(os.cpu_count() or 1, shards) if arguments.address == "local" else None
    with (
        connected(arguments.address, cpus=cpus, log_to_driver=False) as ray,
        on_sigterm(_end),  # after Ray has set its own handler
        serve(path, shards, name, max_pending=arguments.max_pending) as service,
    ):
        tables = ", ".join(
            f"{prefix or table.name} ({table.max_id:,} rows)"
            for prefix, table in service.info.tables.items()
        )
        address = ray.get_runtime_context().gcs_address
        print(f"serving {service.info.path} as {name!r} from {shards} shard(s): {tables}")
        print(f"on Ray at {address}; until Ctrl-C or SIGTERM")
        print(f"in a job of it: client = shardemb.serving.connect({name!r}); client.lookup([0, 1])")
        elsewhere = f"with shardemb.launch.ray.connected({address!r}): ..."
        print(f"elsewhere on its nodes: {elsewhere}", flush=True)
        _watch(service)
    return 0


def _watch(service: Any) -> None:
    client = service.client()
    last = client.health()
    while True:
        time.sleep(1)
        for old, new in zip(last, now := client.health(), strict=True):
            if (old.ok, old.pid) == (new.ok, new.pid):
                continue
            state = f"is away: {new.error}"
            if new.ok:
                state = f"serves on node {new.node}, process {new.pid}, restart {new.restarts}"
            print(f"{time.strftime('%H:%M:%S')} shard {new.shard} {state}", flush=True)
        last = now


def _add_checkpoint(commands: Any) -> None:
    command = commands.add_parser("checkpoint", help="list, verify, export and import checkpoints")
    actions = command.add_subparsers(dest="action", required=True)
    listed = "list the finished checkpoints of a run, and what they hold"
    verified = "check all files of all checkpoints; the exit code is 1 at the first fault"
    for name, run, text in (("ls", _list, listed), ("verify", _verify, verified)):
        add = _command(actions, name, run, text)
        add("path", "run folder, folder of checkpoints, or one checkpoint", **_RUN)
    add = _command(actions, "export", _export, "write a table for other programs")
    add("source", "run folder (its newest checkpoint), or a checkpoint", **_RUN)
    add("out", "file, or folder for sharded; must not be there", type=Path, metavar="OUT")
    formats = ("safetensors", "sharded", "parquet", "npy", "word2vec")
    text = "default: by the suffix .safetensors, .parquet, .npy, .txt or .vec"
    add("--format", text, choices=formats)
    add("--table", "default: the largest")
    add("--raw", "rows as stored, without the normalizer", action="store_true")
    add = _command(actions, "import", _import, "make a run folder of other programs' rows")
    text = ".npy, .safetensors, .parquet, or word2vec's .txt or .vec"
    add("source", text, type=Path, metavar="FILE")
    add("out", "run folder, made anew", **_RUN)
    add("--table", "name of the table (default: entity)", default="entity")
    add("--key", "the tensor or column to take, if there are several")
    add("--labels", "text with a label a line, in the order of the rows", **_JSON)


def _checkpoints(path: Path) -> list[Path]:
    from shardemb.checkpoint.manifest import MANIFEST, checkpoints
    from shardemb.kge.run_folder import RunFolder
    from shardemb.serving.store import newest

    if (path / MANIFEST).is_file():
        return [path]
    folders = dict.fromkeys([RunFolder(path).checkpoints, newest(path).parent])
    return [Path(finished) for folder in folders for finished in checkpoints(folder)]


def _list(arguments: argparse.Namespace) -> int:
    from shardemb.checkpoint.manifest import Manifest

    for path in _checkpoints(arguments.path):
        manifest = Manifest(path)
        values, files = manifest.values, _files(manifest)
        print(f"{path}  {values['time']}  {values['world_size']} rank(s)  {files}")
        for prefix, table in values["tables"].items():
            parts = manifest.shards.get(f"{prefix}.weight" if prefix else "weight")
            dtype = parts[0].dtype if parts else ""
            shape = " x ".join(f"{size:,}" for size in (table["max_id"], *table["shape"]))
            name = prefix or table["name"]
            print(f"  {name}: {shape}  {dtype}{' complex' * table['complex']}")
        if optimizers := [optimizer["class"] for optimizer in values["optimizers"]]:
            print(f"  optimizers: {', '.join(optimizers)}")
    return 0


def _files(manifest: Any) -> str:
    size = sum(entry["size"] for entry in manifest.files.values())
    return f"{len(manifest.files)} file(s)  {size:,} bytes"


def _verify(arguments: argparse.Namespace) -> int:
    from shardemb.checkpoint.manifest import verify

    for path in _checkpoints(arguments.path):
        print(f"{path}: {_files(verify(path)).replace('  ', ', ')}: undamaged")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from shardemb.serving.export import export_table

    names = "source", "out", "format", "table", "raw"
    print(export_table(**_options(arguments, *names), shown=True))
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from shardemb.serving.export import import_table
    from shardemb.utils.files import read_text

    if not arguments.source.is_file():
        raise FileNotFoundError(f"{arguments.source}: no such file")
    labels = read_text(arguments.labels).splitlines() if arguments.labels else None
    print(import_table(arguments.source, arguments.out, arguments.table, labels, arguments.key))
    return 0


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


def _add_plan(commands: Any) -> None:
    text = "estimate memory, exchange and time of a job, and the fewest workers that hold it"
    add = _command(commands, "plan", _plan, text)
    count: dict[str, Any] = {"type": _count, "metavar": "N"}
    text = "settings of the job; without it the defaults"
    add("config", text, nargs="?", type=Path, metavar="CONFIG.toml")
    add("--entities", "rows of the sharded table, e.g. 1e9", required=True, **count)
    add("--relations", "of the graph (default: 1000)", default=1000, **count)
    add("--triples", "of an epoch, to tell how long it takes", default=0, **count)
    add("--dim", "columns of a row: model.dim", dest="model.dim", **count)
    add("--optimizer", "of the rows: optimizer.name", dest="optimizer.name", metavar="NAME")
    text = "of a chunk and a side: sampling.num_negatives"
    add("--negatives", text, dest="sampling.num_negatives", **count)
    text = "triples that share negatives: sampling.chunk_size"
    add("--chunk-size", text, dest="sampling.chunk_size", **count)
    add("--batch-size", "triples of a step of all ranks (default: a chunk a rank)", **count)
    add("--workers", "ranks (default: the fewest that fit)", **count)
    text = "exponent of entities' frequency (default: 0.8)"
    add("--zipf", text, type=float, default=0.8, metavar="A")
    text = (
        "cpu, the machine that bench calibrate has measured last (default); its FILE.json; or h100"
        " or h200 by their data sheets"
    )
    add("--device", text, default="cpu", metavar="cpu|h100|h200|FILE.json")
    add("--memory", "another memory of a GPU, or of a host, e.g. 80GiB", metavar="SIZE")
    add("--ranks-per-host", "another number of ranks that share a host", **count)
    add("--network", "bytes a second that a rank sends to other hosts, e.g. 3GB", metavar="SIZE")
    _add_overrides(add)
    add("--json", "write the estimate there too", **_JSON)


def _plan(arguments: argparse.Namespace) -> int:
    from shardemb.kge.config import JobConfig
    from shardemb.planning import report

    names = "device", "memory", "ranks_per_host", "network"
    machine = report.machine_of(**_options(arguments, *names))
    names = "entities", "relations", "triples", "batch_size", "workers", "zipf"  # type: ignore
    config = JobConfig.load(arguments.config, _overrides(arguments))
    plan = report.plan(config, machine, **_options(arguments, *names))
    print(plan.text())
    if arguments.json is not None:
        plan.save(arguments.json)
    return 0


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="measure this machine")
    actions = bench.add_subparsers(dest="action", required=True)
    text = "measure the rates that plan needs, a quarter of a minute on an idle machine"
    add = _command(actions, "calibrate", _calibrate, text)
    add("--device", "that rows lie on (default: cpu)", choices=("cpu", "cuda"), default="cpu")
    add("--threads", "of a rank (default: 1)", default=1, **_NUMBER)
    add("--output", "default: where plan --device cpu looks", type=Path, metavar="FILE.json")


def _calibrate(arguments: argparse.Namespace) -> int:
    from shardemb.planning.calibrate import calibrate
    from shardemb.planning.report import calibrated

    path = arguments.output or calibrated()
    machine = calibrate(arguments.device, arguments.threads)
    machine.save(path, shardemb=__version__)
    for name, value in dataclasses.asdict(machine).items():
        print(f"{name:>26}: {value:,.4g}" if isinstance(value, float) else f"{name:>26}: {value}")
    print(path)
    return 0
