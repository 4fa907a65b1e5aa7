"""What a process costs before it trains: CPU seconds and resident memory.

``python benchmarks/startup.py [--rounds 3] [--output FILE]``

- "rank": one of two ranks of a gloo group with a table, an optimizer and three steps, in a script
  of its own, as under torchrun;
- "train": ``shardemb train`` of a graph of 83 entities with one worker and one epoch;
- "help": ``shardemb --help``;
- "import torch": what nobody can avoid.

CPU seconds of the process and its children, and the largest resident memory of one process; medians
over rounds. A minute.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RANK = """
import os, sys
import torch, torch.distributed as dist
import shardemb

rank = int(sys.argv[1])
torch.set_num_threads(1)
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
table = shardemb.Embedding(1000, shape=16, constrainer="normalize", seed=0)
optimizer = shardemb.RowWiseAdagrad(table.parameters(), lr=0.1)
coordinator = shardemb.Coordinator(table, optimizer)
for step in range(3):
    table(torch.arange(20) + rank).cos().sum().backward()
    coordinator.step()
dist.barrier()
"""


def measured(*commands: list[str], folder: str) -> tuple[float, float]:
    """Run commands at once; return CPU seconds of all, and MB resident of the largest."""
    report = "import os, resource, sys, subprocess; " \
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL); " \
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); " \
        "print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, done.returncode)"  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", report, *command],
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=environment,
        )
        for command in commands
    ]
    seconds, megabytes = 0.0, 0.0
    for process in processes:
        output, _ = process.communicate(timeout=120)
        cpu, resident, code = map(float, output.split())
        if code:
            raise RuntimeError(f"{' '.join(process.args)} ended with {code:.0f}")
        seconds, megabytes = seconds + cpu, max(megabytes, resident)
    return seconds, megabytes


def contestants(folder: str) -> dict[str, list[list[str]]]:
    """Return the commands of each contestant, which run at once."""
    python, graph = sys.executable, Path(folder, "graph")
    graph.mkdir(exist_ok=True)
    triples = [f"e{i}\tr{k}\te{(i + k + 1) % 83}\n" for i in range(83) for k in range(3)]
    for split, part in (("train", triples[20:]), ("valid", triples[:10]), ("test", triples[10:20])):
        Path(graph, f"{split}.tsv").write_text("".join(part))
    store = tempfile.mktemp(dir=folder)  # gloo makes it
    run = tempfile.mkdtemp(dir=folder)
    settings = ["--set", "training.epochs=1", "--set", "model.dim=16"]
    train = ["--dataset", str(graph), "--workers", "1", "--output", f"{run}/run", *settings]
    return {
        "rank": [[python, "-c", RANK, str(rank), store] for rank in range(2)],
        "train": [[python, "-m", "shardemb", "train", *train]],
        "help": [[python, "-m", "shardemb", "--help"]],
        "import torch": [[python, "-c", "import torch"]],
    }


def main() -> None:
    """Measure and write."""
    from report import write

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rounds: dict[str, list[tuple[float, float]]] = {}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name, commands in contestants(folder).items():
                seconds, megabytes = measured(*commands, folder=folder)
                rounds.setdefault(name, []).append((seconds / len(commands), megabytes))
    results = {
        name: {
            "cpu_seconds": round(statistics.median(seconds for seconds, _ in values), 2),
            "resident_megabytes": round(statistics.median(size for _, size in values), 1),
        }
        for name, values in rounds.items()
    }
    bars = {"rank": {"resident_megabytes": 240}, "train": {"cpu_seconds": 3.5}}
    body = {"rounds": arguments.rounds, "results": results, "bars": bars}
    write("startup", body, arguments.output)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
