import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ring_graph import SAMPLING, graph

import shardemb
from shardemb import checkpoint
from shardemb.checkpoint import CheckpointError
from shardemb.kge import ModelConfig, TrainingConfig, train
from shardemb.kge.losses import LossConfig
from shardemb.kge.optimizers import OptimizerConfig
from shardemb.kge.sampling import SamplingConfig
from shardemb.utils.run_metrics import read_metrics
from shardemb.vocabulary import Vocabulary


def _train(
    rank: int,
    world_size: int,
    output: Path | None,
    epochs: int,
    resume: bool,
    constrainer: str = "",
    validate_every: int = 2,
) -> dict:
    config = TrainingConfig(epochs=epochs, seed=1, validate_every=validate_every)
    model_config = ModelConfig(dim=12, init_std=0.1, n3=0.01, constrainer=constrainer)
    model, result = train(
        graph(),
        model_config,
        sampling=SAMPLING,
        training=config,
        output=output,
        resume=resume,
        progress=False,
    )
    with torch.no_grad():
        return {
            **result,
            "entity": model.entity(None).clone(),
            "relation": model.relation(None).clone(),
        }


def test_any_number_of_ranks_trains_the_same_model(run_ranks, world_size: int) -> None:
    """4 ranks share 3 chunks a step: one of them has none."""
    (expected,) = run_ranks(_train, 1, None, 4, False)
    for got in run_ranks(_train, world_size, None, 4, False):
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ranks", [(1, 1), (2, 3)])
def test_a_resumed_run_ends_as_one_that_was_never_stopped(
    run_ranks, tmp_path: Path, ranks: tuple[int, int]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    expected, *_ = run_ranks(_train, ranks[0], whole, 4, False)
    run_ranks(_train, ranks[0], parts, 4, False)
    newest = checkpoint.checkpoints(parts / "checkpoints")
    newest[-1].rename(
        parts / "checkpoints" / "lost.tmp"
    )  # as if the run had been killed in its last epoch
    got, *_ = run_ranks(_train, ranks[1], parts, 4, True)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
    assert sum(r["kind"] == "test" for r in read_metrics(parts / "metrics.jsonl")) == 1
    steps = [(r["kind"], r["step"]) for r in read_metrics(parts / "metrics.jsonl")]
    assert steps == [(r["kind"], r["step"]) for r in read_metrics(whole / "metrics.jsonl")]


def test_it_learns_and_writes_a_run_folder(run_ranks, tmp_path: Path) -> None:
    run_ranks(_train, 2, tmp_path, 60, False, "", 20)  # each validation draws the picture anew
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert {r["kind"] for r in records} == {"train", "valid", "test"}
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    assert losses[-1] < 0.5 * losses[0]
    assert records[-1]["mrr"] > 0.3
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert Vocabulary.load(tmp_path / "entities.arrow").labels == graph().entities.labels
    assert len(checkpoint.checkpoints(tmp_path / "checkpoints")) == 2


def _constrained(rank: int, world_size: int) -> float:
    return (
        _train(rank, world_size, None, 2, False, "normalize")["entity"]
        .norm(dim=1)
        .sub(1)
        .abs()
        .max()
        .item()
    )


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
    config, model_config = (
        TrainingConfig(epochs=3, validate_every=0),
        ModelConfig(dim=4, init_std=1e30, n3=1.0),
    )
    with pytest.raises(FloatingPointError, match=r"step \d+: .*the loss is (nan|inf)"):
        train(graph(), model_config, sampling=SAMPLING, training=config, progress=False)


def test_a_loss_that_is_no_number_ends_all_ranks(run_ranks) -> None:
    run_ranks(_diverge, 2)


def _options(
    rank: int,
    world_size: int,
    output: Path | None,
    settings: dict[str, dict],
    epochs: int = 3,
    resume: bool = False,
) -> dict:
    sections = {
        name: CONFIGS[name](**{**DEFAULTS[name], **settings.get(name, {})}) for name in CONFIGS
    }
    sections["training"] = replace(sections["training"], epochs=epochs)
    model, result = train(graph(), **sections, output=output, resume=resume, progress=False)
    with torch.no_grad():
        return {
            **result,
            "entity": model.entity(None).clone(),
            "relation": model.relation(None).clone(),
        }


CONFIGS: dict = {
    "model": ModelConfig,
    "loss": LossConfig,
    "sampling": SamplingConfig,
    "optimizer": OptimizerConfig,
    "training": TrainingConfig,
}
DEFAULTS: dict = {
    "model": {"dim": 12, "init_std": 0.1, "n3": 0.01},
    "loss": {},
    "sampling": {"batch_size": 60, "chunk_size": 20, "num_negatives": 30},
    "optimizer": {},
    "training": {"epochs": 3, "seed": 1, "validate_every": 1},
}
OPTIONS: dict[str, dict] = {
    "1vsall": {
        "sampling": {"scheme": "1vsall"},
        "optimizer": {"name": "adam", "entity_lr": 0.01, "schedule": "cosine"},
    },
    "kvsall": {
        "sampling": {"scheme": "kvsall"},
        "loss": {"name": "logistic"},
        "optimizer": {
            "name": "adagrad",
            "schedule": "plateau",
            "warmup_steps": 3,
            "max_grad_norm": 0.1,
        },
    },
    "rotate": {
        "model": {"scorer": "rotate", "reciprocal": False},
        "loss": {"name": "self_adversarial", "margin": 6.0, "subsampling": True},
        "sampling": {"corrupt": "bernoulli", "filtered": True, "negatives": "degree"},
        "optimizer": {"name": "rowwise_adam", "max_grad_norm": 1.0, "weight_decay": 0.01},
    },
    "dropout": {"model": {"entity_dropout": 0.3, "relation_dropout": 0.2}},
    "stopping": {"training": {"patience": 1}, "optimizer": {"schedule": "constant"}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_trains_the_same_at_any_size_and_resumes(
    run_ranks, tmp_path: Path, name: str
) -> None:
    settings = OPTIONS[name]
    (expected,) = run_ranks(_options, 1, tmp_path / "one", settings)
    others = run_ranks(_options, 3, None, settings)
    # each rank drops other elements; Adagrad's first step on a gradient of nearly 0 is a whole one,
    # whose sign is rounding's
    if name not in ("kvsall", "dropout"):
        for got in others:
            for key, value in expected.items():
                torch.testing.assert_close(got[key], value, rtol=2e-2, atol=2e-3)
    newest = checkpoint.checkpoints(tmp_path / "one/checkpoints")
    newest[-1].rename(tmp_path / "one/lost")
    (got,) = run_ranks(_options, 1, tmp_path / "one", settings, 3, True)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["1vsall", "rotate"])
def test_the_same_on_cuda(tmp_path: Path, name: str) -> None:
    settings = [{**OPTIONS[name], "training": {"device": device}} for device in ("cpu", "cuda")]
    expected, got = (
        _options(0, 1, tmp_path / str(number), each) for number, each in enumerate(settings)
    )
    for key, value in expected.items():
        torch.testing.assert_close(
            torch.as_tensor(got[key]).cpu(), torch.as_tensor(value), rtol=1e-2, atol=1e-3
        )
    near = _options(
        0, 1, None, {**OPTIONS[name], "training": {"device": "cuda", "precision": "bfloat16"}}
    )
    assert near["mrr"] > 0.5 * expected["mrr"]


@pytest.mark.parametrize("kept", [True, False])
def test_it_stops_early_and_goes_back_to_the_best(run_ranks, tmp_path: Path, kept: bool) -> None:
    output = tmp_path / "run" if kept else None
    results = run_ranks(_options, 2, output, OPTIONS["stopping"], 40)
    (short,) = run_ranks(_options, 1, tmp_path / "short", OPTIONS["stopping"], 40)
    records = [r for r in read_metrics(tmp_path / "short/metrics.jsonl") if r["kind"] == "valid"]
    scores = [r["mrr"] for r in records]
    assert len(scores) < 40
    assert scores[-1] <= max(scores[:-1])  # the last one was not better
    best = 1 + scores.index(max(scores))
    best_path = tmp_path / "short/best"
    steps = -(-len(graph().train) // 60)
    assert [path.name for path in checkpoint.checkpoints(best_path)] == [
        f"step-{best * steps:010d}"
    ]
    for got in results:
        torch.testing.assert_close(got["entity"], short["entity"], rtol=1e-2, atol=1e-3)
    for path in (best_path, tmp_path / "short"):  # opening the run gives what its metrics are of
        assert torch.equal(
            shardemb.open_store(path)["entity"].lookup(list(range(83))), short["entity"]
        )


def _again(
    rank: int, world_size: int, output: Path, settings: dict, resume: bool, dropped: str
) -> str:
    data = replace(graph(), **({dropped: getattr(graph(), dropped)[:0]} if dropped else {}))
    sections = {
        name: CONFIGS[name](**{**DEFAULTS[name], **settings.get(name, {})}) for name in CONFIGS
    }
    with pytest.raises((ValueError, FileExistsError, CheckpointError)) as caught:
        train(data, **sections, output=output, resume=resume, progress=False)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_a_run_folder_takes_one_run(run_ranks, tmp_path: Path) -> None:
    run_ranks(_options, 1, tmp_path, {})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for settings, resume, dropped, message in (
        (
            {},
            False,
            "",
            (
                f"FileExistsError: {tmp_path}: holds checkpoints and metrics.jsonl of a run: give"
                " another folder"
            ),
        ),
        ({"loss": {"label_smoothing": 0.1}}, True, "", "got settings of fingerprint"),
        ({}, True, "test", "got triples of fingerprint"),
        (
            {"training": {"patience": 1}},
            False,
            "valid",
            "ring: got no valid triples, expected some for training.patience",
        ),
    ):
        for text in run_ranks(_again, 2, tmp_path, settings, resume, dropped):
            assert message in text
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_bfloat16_trains(run_ranks) -> None:
    (exact,), (near,) = (
        run_ranks(_options, 1, None, {"training": {"precision": precision}}, 10)
        for precision in ("float32", "bfloat16")
    )
    assert near["entity"].dtype == torch.float32
    assert not torch.equal(near["entity"], exact["entity"])
    assert near["mrr"] > 0.5 * exact["mrr"]


def test_tensorboard_has_the_figures(run_ranks, tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    run_ranks(_options, 1, tmp_path, {})
    found = set()
    for path in (tmp_path / "tensorboard").iterdir():
        data, at = path.read_bytes(), 0
        while at < len(data):  # TFRecord: length, its crc, the record, its crc
            (size,) = struct.unpack_from("<Q", data, at)
            record = data[at + 12 : at + 12 + size]
            checks = struct.unpack_from("<I", data, at + 8) + struct.unpack_from(
                "<I", data, at + 12 + size
            )
            assert checks == (masked_crc32c(data[at : at + 8]), masked_crc32c(record))
            event = Event.FromString(record)
            found |= {(value.tag, event.step, value.simple_value) for value in event.summary.value}
            at += size + 16
    for record in read_metrics(tmp_path / "metrics.jsonl"):
        for figure in ("loss", "mrr", "triples_per_second"):
            if figure in record:
                expected = (
                    f"{record['kind']}/{figure}",
                    record["step"],
                    torch.tensor(record[figure]).float().item(),
                )
                assert expected in found


def _refused(rank: int, world_size: int, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _options(rank, world_size, None, settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"sampling": {"scheme": "1vsall"}, "loss": {"name": "margin"}},
            "loss.name: got 'margin' with scheme '1vsall'",
        ),
        (
            {"sampling": {"scheme": "kvsall"}, "loss": {"subsampling": True}},
            "loss.subsampling: got true with",
        ),
        (
            {"optimizer": {"schedule": "plateau"}, "training": {"validate_every": 0}},
            "optimizer.schedule: got 'plateau' with training.validate_every = 0",
        ),
        (
            {"training": {"patience": 2, "validate_every": 0}},
            "training.patience: got 2 with validate_every = 0",
        ),
        pytest.param(
            {"training": {"device": "cuda"}},
            "training.device: got 'cuda', but torch finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_settings_that_do_not_go_together(run_ranks, settings: dict, message: str) -> None:
    run_ranks(_refused, 2, settings, message)


def test_settings_are_checked() -> None:
    for make in (
        lambda: TrainingConfig(epochs=0),
        lambda: TrainingConfig(seed=-1),
        lambda: SamplingConfig(batch_size=0),
        lambda: ModelConfig(scorer="nope"),
        lambda: ModelConfig(dim=0),
        lambda: OptimizerConfig(entity_lr=float("nan")),
        lambda: OptimizerConfig(final_lr=-1.0),
    ):
        with pytest.raises(ValueError, match=r"(training|sampling|model|optimizer)\.\w+: got"):
            make()
