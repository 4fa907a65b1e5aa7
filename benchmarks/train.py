"""Training speed.

Triples a second on a synthetic graph, beside PyKEEN, and on a graph of 1e7 entities in bounded
memory.

    .venv/bin/python benchmarks/train.py [--large FOLDER] [--rounds 3]

The synthetic graph (1e5 entities, 50 relations, 1e6 triples, Zipf 0.85) is ingested and trained for
an epoch as ``shardemb train`` does it: batches of 1000 triples, 128 shared negatives a side, both
sides corrupted, softmax, row-wise Adagrad, 128 floats a row, one thread a process. Contestants run
in turn. PyKEEN's sLCWA loop gets the same graph, model, batch and number of negatives (256 of its
own for each triple). ``--large`` is a dataset folder such as benchmarks/ingest.py makes of Debian's
files: dim 64, throughput beside the synthetic graph's with the same settings, peak memory, and MRR
among 1000 drawn candidates after each epoch. Writes
``benchmarks/results/train_<machine>_<date>.json``.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import in_processes
from report import write

from shardemb.kge import (
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainingConfig,
    Triples,
    ingest,
    train,
)

RELATIONS, CLASSES = 50, 64


def zipf(generator: np.random.Generator, number: int, size: int, exponent: float) -> np.ndarray:
    """Draw ``size`` of ``number`` ranks, the first the most frequent."""
    shares = np.cumsum(np.arange(1, number + 1) ** -exponent)
    return np.minimum(np.searchsorted(shares / shares[-1], generator.random(size)), number - 1)


def synthetic(folder: Path, entities: int, number: int) -> Path:
    """Write a graph with popular entities and a rule to learn as TSV, and ingest it.

    The tail is of the class that head and relation say, but for a tenth of the triples; popularity
    is Zipf's, 0.85.
    """
    generator, entities = np.random.default_rng(0), entities // CLASSES * CLASSES
    heads, relations = (
        zipf(generator, entities, number, 0.85),
        zipf(generator, RELATIONS, number, 1.0),
    )
    classes = (heads + generator.integers(CLASSES, size=RELATIONS)[relations]) % CLASSES
    classes = np.where(
        generator.random(number) < 0.1, generator.integers(CLASSES, size=number), classes
    )
    tails = zipf(generator, entities // CLASSES, number, 0.85) * CLASSES + classes
    with (folder / "train.tsv").open("w") as file:
        file.writelines(
            f"e{h}\tr{r}\te{t}\n"
            for h, r, t in np.stack([heads, relations, tails], axis=1).tolist()
        )
    return ingest(
        folder / "train.tsv", folder / "dataset", valid=number // 1000, test=number // 1000
    )


def epoch(dataset: str, settings: dict[str, Any], folder: str, epochs: int) -> dict[str, Any]:
    """Train on a rank with one thread."""
    data = Triples.load(dataset)
    train(
        data,
        ModelConfig(**{"reciprocal": False, "n3": 0.0, "init_std": 0.1, **settings["model"]}),
        sampling=SamplingConfig(**settings["sampling"]),
        optimizer=OptimizerConfig(entity_lr=0.1, relation_lr=0.1, schedule="constant"),
        training=TrainingConfig(
            epochs=epochs, checkpoint_every=epochs, keep=1, validate_every=1, background_saves=False
        ),
        evaluation=EvaluationConfig(candidates=min(1000, len(data.entities) - 1)),
        output=Path(folder),
        progress=False,
    )
    return {"peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def run(dataset: Path, workers: int, settings: dict[str, Any], epochs: int = 1) -> dict[str, Any]:
    """Train in fresh processes, and read the rates that the run has written."""
    with tempfile.TemporaryDirectory(dir=dataset.parent) as folder:
        result = in_processes(workers, epoch, str(dataset), settings, folder, epochs)
        records = [
            json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()
        ]
    rates = [record["triples_per_second"] for record in records if record["kind"] == "train"]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    return {
        "triples_per_s": round(statistics.median(rates)),
        "last_loss": losses[-1],
        "valid_mrr": [record["mrr"] for record in records if record["kind"] == "valid"],
        "peak_rss_bytes": max(each["peak_rss_bytes"] for each in result),
    }


def settings_of(
    scorer: str, batch_size: int = 1000, chunk_size: int = 1000, dim: int = 128
) -> dict[str, Any]:
    """Return a contestant's settings."""
    sampling = {"batch_size": batch_size, "chunk_size": chunk_size, "num_negatives": 128}
    return {"model": {"scorer": scorer, "dim": dim}, "sampling": sampling}


def pykeen(dataset: str, dim: int, steps: int) -> dict[str, Any]:
    """Time PyKEEN's sLCWA loop, Adagrad, on as many batches of 1000."""
    from pykeen.losses import CrossEntropyLoss
    from pykeen.models import ComplEx
    from pykeen.training import SLCWATrainingLoop
    from pykeen.triples import CoreTriplesFactory

    torch.set_num_threads(1)
    data = Triples.load(dataset)
    factory = CoreTriplesFactory(
        data.train[: 1000 * steps].long(), len(data.entities), len(data.relations)
    )
    model = ComplEx(
        triples_factory=factory, embedding_dim=dim, random_seed=0, loss=CrossEntropyLoss()
    )
    loop = SLCWATrainingLoop(
        model=model,
        triples_factory=factory,
        optimizer=torch.optim.Adagrad(model.parameters(), lr=0.1),
        negative_sampler_kwargs={"num_negs_per_pos": 256},
    )
    spent = []
    for _ in range(2):  # the first warms it up
        start = time.perf_counter()
        loop.train(factory, num_epochs=1, batch_size=1000, use_tqdm=False, use_tqdm_batch=False)
        spent.append(time.perf_counter() - start)
    return {"triples_per_s": round(1000 * steps / spent[-1])}


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--large", type=Path, help="dataset folder of a graph of 1e7 entities")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large-epochs", type=int, default=2)
    parser.add_argument("--entities", type=int, default=100_000)
    parser.add_argument("--triples", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--pykeen-steps", type=int, default=5)
    parser.add_argument("--output", type=Path, help="another file for the result")
    parser.add_argument(
        "--work",
        type=Path,
        help="folder for the synthetic graph and the runs; default: a temporary one",
    )
    arguments = parser.parse_args()
    contestants = {
        "ComplEx, 1 process": (1, settings_of("complex", dim=arguments.dim)),
        "DistMult, 1 process": (1, settings_of("distmult", dim=arguments.dim)),
        "TransE, 1 process": (1, settings_of("transe", dim=arguments.dim)),
        "ComplEx, 2 workers, 1000 triples each a step": (
            2,
            settings_of("complex", 2000, dim=arguments.dim),
        ),
        "ComplEx, 2 workers, 500 triples each a step": (
            2,
            settings_of("complex", 1000, 500, dim=arguments.dim),
        ),
    }
    body: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        dataset = synthetic(Path(work), arguments.entities, arguments.triples)
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
        for number in range(arguments.rounds):
            for name, (workers, settings) in contestants.items():
                rounds[name].append(run(dataset, workers, settings))
                print(number, name, rounds[name][-1], flush=True)
        theirs = in_processes(1, pykeen, str(dataset), arguments.dim // 2, arguments.pykeen_steps)[
            0
        ]
        print("PyKEEN", theirs, flush=True)
        body["synthetic"] = {
            name: {
                "triples_per_s": statistics.median(one["triples_per_s"] for one in found),
                "rounds": found,
            }
            for name, found in rounds.items()
        }
        ours = body["synthetic"]["ComplEx, 1 process"]["triples_per_s"]
        body["synthetic"]["PyKEEN ComplEx, sLCWA"] = {
            **theirs,
            "ours_over_it": round(ours / theirs["triples_per_s"]),
        }
        if arguments.large is not None:
            body["large"] = large(
                arguments.large, dataset, arguments.rounds, arguments.large_epochs
            )
    write("train", body, arguments.output)


def large(path: Path, small: Path, rounds: int, epochs: int) -> dict[str, Any]:
    """Train the large graph, and the small one with the same settings before and after it."""
    settings, data = settings_of("complex", dim=64), Triples.load(path)
    before = [run(small, 1, settings) for _ in range(rounds)]
    found = run(path, 1, settings, epochs)
    print(path, found, flush=True)
    rates = [
        one["triples_per_s"] for one in [*before, *(run(small, 1, settings) for _ in range(rounds))]
    ]
    rows = len(data.entities)
    return {
        "dataset": data.name,
        "entities": rows,
        "relations": len(data.relations),
        "triples": len(data.train),
        **found,
        "table_and_state_bytes": rows * (64 * 4 + 4),
        "beyond_table_and_state_bytes": found["peak_rss_bytes"] - rows * (64 * 4 + 4),
        "small_triples_per_s": rates,
        "large_over_small": round(found["triples_per_s"] / statistics.median(rates), 3),
    }


if __name__ == "__main__":
    main()
