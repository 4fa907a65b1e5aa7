from pathlib import Path

import pytest
import torch

from shardemb import checkpoint
from shardemb.kge import ModelConfig, TrainingConfig, Triples, train
from shardemb.kge.sampling import SamplingConfig
from shardemb.metrics import read_metrics
from shardemb.vocabulary import Vocabulary

SAMPLING = SamplingConfig(batch_size=120, chunk_size=40, num_negatives=30)


def graph() -> Triples:
    """A rule to learn: relation k leads from i to i + k + 1, modulo 83."""
    triples = [(f"e{i}", f"r{k}", f"e{(i + k + 1) % 83}") for i in range(83) for k in range(3)]
    held = [triple for n, triple in enumerate(triples) if n % 10 == 3]
    kept = [triple for n, triple in enumerate(triples) if n % 10 != 3]

    def columns(part: list) -> tuple:
        return tuple(list(column) for column in zip(*part, strict=True))

    return Triples.from_columns("ring", columns(kept), columns(held[::2]), columns(held[1::2]))


def _train(rank: int, world_size: int, output: Path | None, epochs: int, resume: bool, constrainer: str = "") -> dict:
    config = TrainingConfig(epochs=epochs, seed=1, validate_every=2)
    model_config = ModelConfig(dim=12, init_std=0.1, n3=0.01, constrainer=constrainer)
    model, result = train(graph(), model_config, SAMPLING, config, output, resume, progress=False)
    with torch.no_grad():
        return {**result, "entity": model.entity(None).clone(), "relation": model.relation(None).clone()}


def test_any_number_of_ranks_trains_the_same_model(run_ranks, world_size: int) -> None:
    """4 ranks share 3 chunks a step: one of them has none."""
    (expected,) = run_ranks(_train, 1, None, 4, False)
    for got in run_ranks(_train, world_size, None, 4, False):
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ranks", [(1, 1), (2, 3)])
def test_a_resumed_run_ends_as_one_that_was_never_stopped(run_ranks, tmp_path: Path, ranks: tuple[int, int]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    (expected, *_) = run_ranks(_train, ranks[0], whole, 4, False)
    run_ranks(_train, ranks[0], parts, 4, False)
    newest = checkpoint.checkpoints(parts / "checkpoints")
    newest[-1].rename(parts / "checkpoints" / "lost.tmp")  # as if the run had been killed in its last epoch
    (got, *_) = run_ranks(_train, ranks[1], parts, 4, True)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
    assert sum(r["kind"] == "test" for r in read_metrics(parts / "metrics.jsonl")) == 1
    steps = [(r["kind"], r["step"]) for r in read_metrics(parts / "metrics.jsonl")]
    assert steps == [(r["kind"], r["step"]) for r in read_metrics(whole / "metrics.jsonl")]


def test_it_learns_and_writes_a_run_folder(run_ranks, tmp_path: Path) -> None:
    run_ranks(_train, 2, tmp_path, 60, False)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert {r["kind"] for r in records} == {"train", "valid", "test"}
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    assert losses[-1] < 0.5 * losses[0]
    assert records[-1]["mrr"] > 0.3
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert Vocabulary.load(tmp_path / "entities.arrow").labels == graph().entities.labels
    assert len(checkpoint.checkpoints(tmp_path / "checkpoints")) == 2


def _constrained(rank: int, world_size: int) -> float:
    return _train(rank, world_size, None, 2, False, "normalize")["entity"].norm(dim=1).sub(1).abs().max().item()


def test_the_configured_constrainer_holds_for_all_rows(run_ranks) -> None:
    assert max(run_ranks(_constrained, 2)) < 1e-6


@pytest.mark.filterwarnings("default")
def test_too_many_workers_for_the_chunks_are_told(run_ranks) -> None:
    run_ranks(_warned, 4)


def _warned(rank: int, world_size: int) -> None:
    if rank == 0:
        with pytest.warns(UserWarning, match="4 workers share 3 chunks a step"):
            _train(rank, world_size, None, 1, False)
    else:
        _train(rank, world_size, None, 1, False)


def _other_graph(rank: int, world_size: int, output: Path) -> str:
    (output / "entities.arrow").unlink()
    Vocabulary([f"x{i}" for i in range(83)]).save(output / "entities.arrow")
    with pytest.raises(ValueError) as caught:
        _train(rank, world_size, output, 4, True)
    return str(caught.value)


def test_resuming_with_another_graph_is_refused(run_ranks, tmp_path: Path) -> None:
    run_ranks(_train, 1, tmp_path, 1, False)
    (text,) = run_ranks(_other_graph, 1, tmp_path)
    assert "entities.arrow" in text


def _diverge(rank: int, world_size: int) -> None:
    config, model_config = TrainingConfig(epochs=3, validate_every=0), ModelConfig(dim=4, init_std=1e30, n3=1.0)
    with pytest.raises(FloatingPointError, match=r"step \d+: the loss is (nan|inf)"):
        train(graph(), model_config, SAMPLING, config, progress=False)


def test_a_loss_that_is_no_number_ends_all_ranks(run_ranks) -> None:
    run_ranks(_diverge, 2)


def test_settings_are_checked() -> None:
    for make in (
        lambda: TrainingConfig(epochs=0),
        lambda: TrainingConfig(seed=-1),
        lambda: SamplingConfig(batch_size=0),
        lambda: ModelConfig(scorer="nope"),
        lambda: ModelConfig(dim=0),
        lambda: ModelConfig(entity_lr=float("nan")),
        lambda: TrainingConfig(final_lr=-1.0),
    ):
        with pytest.raises(ValueError, match=r"(training|sampling|model)\.\w+: got"):
            make()
