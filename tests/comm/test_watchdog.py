"""Ranks that die, stop, raise or end, and what the others say; ranks that disagree.

Values that are no numbers.
"""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardemb import (
    Coordinator,
    Embedding,
    Fused,
    FusedOptimizer,
    RowWiseAdagrad,
    checkpoint,
    clip_grad_norm_,
    exceptions,
)
from shardemb.comm import collectives, shared_memory, watchdog
from shardemb.exceptions import CheckpointError, PeerFailureError, RanksDisagreeError

_context = multiprocessing.get_context("forkserver")
#: seconds
TIMEOUT = 2.5
#: a machine that also does other things
SLACK = 10.0


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user = Embedding(101, shape=4, seed=1, name="user")
        self.layer = nn.Linear(4, 1)

    def forward(self, step: int) -> torch.Tensor:
        ids = torch.arange(70 * step, 70 * step + 70) % 101
        return self.layer(self.user(ids)).square().sum()


def in_lookup(
    rank: int,
    model: Model,
    coordinator: Coordinator,
    step: int,
    fail: Callable[[], None],
    folder: Path,
) -> None:
    fail()
    model(step).backward()
    coordinator.step()


def in_lookup_by_gloo(
    rank: int, model: Model, coordinator: Coordinator, step: int, fail: Callable, folder: Path
) -> None:
    in_lookup(rank, model, coordinator, step, fail, folder)
    assert not any(collectives._host_ranks.values())


def in_backward(
    rank: int,
    model: Model,
    coordinator: Coordinator,
    step: int,
    fail: Callable[[], None],
    folder: Path,
) -> None:
    loss = model(step)
    fail()
    loss.backward()
    coordinator.step()


def in_step(
    rank: int,
    model: Model,
    coordinator: Coordinator,
    step: int,
    fail: Callable[[], None],
    folder: Path,
) -> None:
    model(step).backward()
    fail()
    coordinator.step()


def in_construction(
    rank: int, model: Model, coordinator: Coordinator, step: int, fail: Callable, folder: Path
) -> None:
    fail()
    Embedding(7, shape=2, name="new")
    coordinator.step()


def in_save(
    rank: int,
    model: Model,
    coordinator: Coordinator,
    step: int,
    fail: Callable[[], None],
    folder: Path,
) -> None:
    fail()
    checkpoint.save(folder, step, model)
    coordinator.step()


def in_different_places(
    rank: int, model: Model, coordinator: Coordinator, step: int, fail: Callable, folder: Path
) -> None:
    """Rank 0 waits, rank 2 computes for a while, and is waited for too."""
    fail()
    if rank == 2 and step == 3:
        time.sleep(1)
    model(step).backward()
    coordinator.step()


def _rank_main(
    channel, rank: int, world_size: int, store: str, scenario: Callable, how: str, folder: Path
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    half_an_hour = timedelta(minutes=30)  # as a user's own group has it
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=half_an_hour,
    )
    watchdog.set_timeout(TIMEOUT)
    if scenario is in_lookup_by_gloo:
        os.environ["SHARDEMB_SHARED_MEMORY"] = "0"  # as between machines
    model = Model()
    coordinator = Coordinator(model, RowWiseAdagrad(model.parameters(), lr=0.1))

    class End(Exception):  # noqa: N818
        pass

    def fail() -> None:
        if rank != 1 or coordinator.steps != 2:
            return
        channel.send(("failing", time.monotonic()))
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "raise":
            raise ValueError("bad luck")
        raise End

    try:
        for step in range(1, 9):
            scenario(rank, model, coordinator, step, fail, folder)
        channel.send(("finished", time.monotonic()))
    except End:
        watchdog.finish()  # as the launcher does; it raises when the others fail
    except PeerFailureError as error:
        channel.send(
            (
                "error",
                (
                    error.rank,
                    error.step,
                    error.operation,
                    error.seconds,
                    str(error),
                    time.monotonic(),
                ),
            )
        )
        watchdog.report(error)
    except BaseException as error:
        watchdog.report(error)
    time.sleep(0 if how == "raise" else 10)  # still there


def run(
    scenario: Callable, how: str, world_size: int, folder: Path
) -> tuple[float, dict[int, tuple]]:
    """Return when rank 1 failed, and what each other rank raised."""
    with tempfile.TemporaryDirectory() as base:
        channels, ranks = [], []
        try:
            for rank in range(world_size):
                here, there = _context.Pipe(duplex=False)
                arguments = (there, rank, world_size, f"{base}/store", scenario, how, folder)
                ranks.append(_context.Process(target=_rank_main, args=arguments))
                ranks[-1].start()
                there.close()
                channels.append(here)
            failed, errors, deadline = None, {}, time.monotonic() + 40
            while len(errors) < world_size - 1 and time.monotonic() < deadline:
                for channel in wait(
                    [c for r, c in enumerate(channels) if r not in errors and not c.closed], 1.0
                ):
                    rank = channels.index(channel)
                    try:
                        kind, value = channel.recv()
                    except (EOFError, ConnectionResetError):
                        channel.close()
                        continue
                    if kind == "failing":
                        failed = value
                        channel.close() if how in ("die", "raise") else None
                    elif kind == "error" and rank != 1:
                        errors[rank] = value
                    assert kind != "finished", "nobody noticed"
            assert failed is not None
            return failed, errors
        finally:
            for process in ranks:
                process.kill()  # a stopped one too
                process.join()


CASES = [
    (in_lookup, "die", 3, "lookup 3 of table 'user': ids", "has died: it does not answer"),
    (in_lookup, "stop", 2, "lookup 3 of table 'user': ids", "has stopped or died"),
    (
        in_lookup,
        "raise",
        3,
        "lookup 3 of table 'user': ids",
        "raised ValueError: bad luck (step 3)",
    ),
    (
        in_lookup,
        "end",
        3,
        "lookup 3 of table 'user': ids",
        "has ended after step 2, while others go on",
    ),
    (in_lookup_by_gloo, "die", 3, "lookup 3 of table 'user': ids", "has died: it does not answer"),
    (in_lookup_by_gloo, "stop", 2, "lookup 3 of table 'user': ids", "has stopped or died"),
    (in_backward, "die", 2, "lookup 3 of table 'user': gradients", "has died"),
    (in_backward, "raise", 3, "lookup 3 of table 'user': gradients", "raised ValueError: bad luck"),
    (in_step, "die", 3, "gradients of replicated parameters", "has died"),
    (in_step, "stop", 3, "gradients of replicated parameters", "has stopped or died"),
    (in_construction, "die", 2, "table 'new': do all ranks agree?", "has died"),
    (in_construction, "end", 2, "table 'new': do all ranks agree?", "has ended"),
    (in_save, "die", 3, "a checkpoint's vote", "has died"),
    (in_save, "stop", 2, "a checkpoint's vote", "has stopped or died"),
    (in_different_places, "die", 3, "lookup 3 of table 'user': ids", "has died"),
]


@pytest.mark.parametrize(
    ("scenario", "how", "world_size", "operation", "text"),
    CASES,
    ids=[f"{c[0].__name__}-{c[1]}-{c[2]}" for c in CASES],
)
def test_the_others_end_in_time_and_say_why(
    tmp_path: Path, scenario: Callable, how: str, world_size: int, operation: str, text: str
) -> None:
    failed, errors = run(scenario, how, world_size, tmp_path)
    assert set(errors) == set(range(world_size)) - {1}
    for rank, step, where, seconds, message, when in errors.values():
        assert (rank, step) == (1, 3)
        assert operation in where
        assert text in message
        assert re.search(r"rank [02] waited \d+\.\d s for it in step 3, ", message)
        assert 0 <= seconds <= TIMEOUT + SLACK
        assert when - failed < {"stop": TIMEOUT + 2, "end": 2.5}.get(how, 2) + SLACK


def test_a_timeout_is_a_number_above_0() -> None:
    for bad in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="expected more than 0"):
            watchdog.set_timeout(bad)
    assert watchdog.timeout() == 300


SCRIPT = """
import os, signal, sys, torch
import torch.distributed as dist
import shardemb

dist.init_process_group("gloo")
table = shardemb.Embedding(101, shape=4, seed=1, name="user")
coordinator = shardemb.Coordinator(table, shardemb.RowWiseAdagrad(table.parameters(), lr=0.1))
for step in range(5):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if step == 2 and dist.get_rank() == int(sys.argv[1]) and first:
        os.kill(os.getpid(), signal.SIGKILL)
    table(torch.arange(70)).sum().backward()
    coordinator.step()
# in one write: torchrun starts python without buffers, and the ranks end together
attempt = os.environ['TORCHELASTIC_RESTART_COUNT']
sys.stdout.write(f"attempt {attempt} rank {dist.get_rank()} done\\n")
"""


@pytest.mark.parametrize("victim", ["0", "1"])
def test_torchrun_starts_again(tmp_path: Path, victim: str) -> None:
    """A restarted attempt finds no alarm of the one before, whose store it uses."""
    (tmp_path / "loop.py").write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
    ]
    command += [
        "--master-addr",
        "127.0.0.1",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:0",
        "loop.py",
        victim,
    ]
    variables = {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"attempt 1 rank {rank} done" for rank in (0, 1)]


ALONE = """
import os, signal, sys
import torch
import torch.distributed as dist
import shardemb

rank = int(sys.argv[1])
store = "file://" + sys.argv[2]
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)  # with its 30 minutes
shardemb.set_timeout(2)
table = shardemb.Embedding(101, shape=4, seed=1, name="user")
try:
    for step in range(3):
        if rank == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        table(torch.arange(70)).sum().backward()
finally:
    dist.destroy_process_group()
"""


def test_a_process_whose_peer_has_stopped_can_exit(tmp_path: Path) -> None:
    """gloo's destructors would wait for what is under way.

    As long as the group's own timeout says.
    """
    (tmp_path / "alone.py").write_text(ALONE)
    command = [sys.executable, "alone.py"]
    options = {
        "cwd": tmp_path,
        "env": os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        "stderr": subprocess.PIPE,
        "text": True,
    }
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], **options)
        for rank in (0, 1)
    ]
    try:
        _, err = ranks[0].communicate(timeout=60)
        assert ranks[0].returncode == 1
        assert (
            "PeerFailureError: rank 1 has stopped or died: it does not answer; rank 0 waited" in err
        )
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


# --------------------
# disagreement


def _disagree(rank: int, world_size: int, what: str) -> str:
    model = nn.Module()
    model.user = Embedding(101, shape=4, seed=1, name="user")
    model.item = Embedding(11, shape=4, seed=2, name="item")
    odd = rank == world_size - 1

    def build() -> None:
        if what == "shape":
            Embedding(100 + odd, shape=4, seed=1, name="new")
        elif what == "seed":
            Embedding(100, shape=4, seed=1 + odd, name="new")
        elif what == "learning rate":
            Coordinator(model, RowWiseAdagrad(model.parameters(), lr=0.1 * (1 + odd)))
        elif what == "optimizer":
            Coordinator(
                model,
                (
                    torch.optim.SGD(model.parameters(), lr=0.1)
                    if odd
                    else RowWiseAdagrad(model.parameters())
                ),
            )
        elif what == "layer":
            model.layer = nn.Linear(2 + odd, 1)
            Coordinator(model)
        elif what == "step":
            Coordinator(model, RowWiseAdagrad(model.parameters()), steps=7 * odd)
        elif what == "order of lookups":
            for table in (model.item, model.user) if odd else (model.user, model.item):
                table(torch.arange(5))
        elif what == "number of lookups":
            for _ in range(1 + odd):
                model.user(torch.arange(90) % 101)
            model.item(torch.arange(5))

    with pytest.raises((ValueError, RuntimeError)) as caught:
        build()
    return str(caught.value)


DISAGREEMENTS = {
    "shape": r"table 'new': ranks disagree in max_id: got max_id 100 .* and 101 on rank {odd}",
    "seed": r"table 'new': ranks disagree in seed: got seed 1 .* and 2 on rank {odd}",
    "learning rate": (
        r"the coordinator: ranks disagree in optimizers: .*'lr': 0.1.* on rank 0 and .*'lr': 0.2.*"
        r" on rank {odd}"
    ),
    "optimizer": (
        r"ranks disagree in optimizers: got .*RowWiseAdagrad.* on rank 0 and .*SGD.* on rank {odd}"
    ),
    "layer": r"ranks disagree in parameters: .*\[1, 2\].* on rank 0 and .*\[1, 3\].* on rank {odd}",
    "step": r"ranks disagree in steps: got steps 0 on rank 0 and 7 on rank {odd}",
    "order of lookups": (
        r"rank 0 in step 0, lookup 1 of table 'user': ids; .*rank {odd} in step 0, lookup 1 of"
        r" table 'item': ids"
    ),
    "number of lookups": (
        r"rank 0 in step 0, lookup 1 of table 'item': ids; .*rank {odd} in step 0, lookup 2 of"
        r" table 'user': ids"
    ),
}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_ranks_that_disagree_are_told(run_ranks, what: str, ranks: int) -> None:
    for text in run_ranks(_disagree, ranks, what):
        assert re.search(DISAGREEMENTS[what].format(odd=ranks - 1), text), text


def _leaves_a_table_out(model: nn.Module, coordinator: Coordinator, odd: bool, path: Path) -> None:
    user, item = model.user(torch.arange(9)), model.item(torch.arange(9))
    (item if odd else user).sum().backward()


def _skips_backward(model: nn.Module, coordinator: Coordinator, odd: bool, path: Path) -> None:
    loss = model.user(torch.arange(9)).sum()
    if not odd:
        loss.backward()
    coordinator.step()


def _skips_a_batch(model: nn.Module, coordinator: Coordinator, odd: bool, path: Path) -> None:
    if not odd:
        model.user(torch.arange(9)).sum().backward()
    coordinator.step()


def _evaluates_alone(model: nn.Module, coordinator: Coordinator, odd: bool, path: Path) -> None:
    loss = model.user(torch.arange(9)).sum()
    if odd:
        with torch.no_grad():
            model.user(torch.arange(9))
    loss.backward()


def _saves_alone(model: nn.Module, coordinator: Coordinator, odd: bool, path: Path) -> None:
    if odd:
        checkpoint.save(path, 1, model)
    model.user(torch.arange(9)).sum().backward()


def _gathers_alone(model: nn.Module, coordinator: Coordinator, odd: bool, path: Path) -> None:
    model.user(torch.arange(9)).sum().backward()
    if odd:
        model.user.full_state_dict()
    coordinator.step()


def _clips_alone(model: nn.Module, coordinator: Coordinator, odd: bool, path: Path) -> None:
    model.user(torch.arange(9)).sum().backward()
    if odd:
        clip_grad_norm_(model, 1.0)
    coordinator.step()


def _reduces_alone(model: nn.Module, coordinator: Coordinator, odd: bool, path: Path) -> None:
    loss = model.user(torch.arange(9)).sum()
    if odd:
        coordinator.reduce([1.0])
    loss.backward()


#: what each does alone, and what the ranks are said to be in
ALONE_IN = [
    (_leaves_a_table_out, "lookup 2 of table 'user': gradients", "lookup 2 of table 'item': grad"),
    (_skips_backward, "lookup 2 of table 'user': gradients", "the coordinator: gradients"),
    (_skips_a_batch, "lookup 2 of table 'user': ids", "the coordinator: gradients"),
    (_evaluates_alone, "lookup 2 of table 'user': gradients", "lookup 3 of table 'user': ids"),
    (_saves_alone, "lookup 2 of table 'user': ids", "a checkpoint"),
    (_gathers_alone, "the coordinator: gradients", "table 'user': all rows"),
    (_clips_alone, "the coordinator: gradients", "norm of the gradients"),
    (_reduces_alone, "lookup 2 of table 'user': gradients", "the coordinator: gradients"),
]


def _in_different_operations(
    rank: int, world_size: int, run: Callable, kernel: str, by_gloo: bool, path: Path
) -> str:
    if by_gloo:
        os.environ["SHARDEMB_SHARED_MEMORY"] = "0"  # as between machines
    shared_memory._FOLDER = path / "shared"
    model = nn.Module()
    # of one shape, so that gradients could be swapped without an error
    model.user = Embedding(101, shape=4, seed=1, name="user", kernel=kernel)
    model.item = Embedding(101, shape=4, seed=2, name="item", kernel=kernel)
    model.layer = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    coordinator = Coordinator(model, optimizer)
    (model.user(torch.arange(9)).sum() + model.item(torch.arange(9)).sum()).backward()
    coordinator.step()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RanksDisagreeError) as caught:
        run(model, coordinator, rank == world_size - 1, path)
    for parameter, rows in zip(model.parameters(), before, strict=True):
        assert parameter.equal(rows)
    return str(caught.value)


@pytest.mark.parametrize("by_gloo", [False, True], ids=["memory", "gloo"])
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(("run", "usual", "alone"), ALONE_IN)
def test_different_operations_are_an_error(
    run_ranks, tmp_path: Path, run: Callable, usual: str, alone: str, ranks: int, by_gloo: bool
) -> None:
    (tmp_path / "shared").mkdir()
    kernel = "dense" if ranks == 3 else "sparse"
    for text in run_ranks(_in_different_operations, ranks, run, kernel, by_gloo, tmp_path):
        assert re.search(rf"rank 0 in step \d, {usual}", text), text
        assert re.search(rf"rank {ranks - 1} in step \d, {alone}", text), text
    assert not list((tmp_path / "shared").iterdir())


# --------------------
# NaN and infinite values


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user = Embedding(101, shape=4, seed=1, name="user")
        self.item = Embedding(11, shape=4, seed=2, name="item", kernel="dense")
        self.fused = Embedding(
            101, shape=4, seed=2, name="fused", kernel=Fused(FusedOptimizer("sgd"))
        )
        self.layer = nn.Linear(4, 1)


def _not_a_number(rank: int, world_size: int, where: str, policy: str | None) -> list[str]:
    model = Tables()
    optimizers = [
        RowWiseAdagrad([model.user._embeddings.weight]),
        torch.optim.SGD([*model.item.parameters(), *model.layer.parameters()]),
    ]
    coordinator = Coordinator(model, optimizers, nonfinite=policy)
    before = [
        parameter.detach().clone()
        for parameter in (*model.parameters(), model.fused._embeddings.weight)
    ]
    texts = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        bad = rank == world_size - 1
        ids = torch.tensor([7, 13, 99])
        rows = model.user(ids) + model.item(ids % 11) + model.fused(ids)
        if bad and where != "loss":
            rows.register_hook(lambda grad: torch.full_like(grad, torch.nan))
        loss = model.layer(rows.detach() if where == "tables" else rows).sum() + rows.sum()
        if bad and where == "loss":
            loss = loss * torch.inf
        try:
            if coordinator.backward(loss):
                coordinator.step()
        except FloatingPointError as error:
            texts.append(str(error))
    texts += [str(w.message) for w in told]
    after = [*model.parameters(), model.fused._embeddings.weight]
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    if where == "loss" and policy in ("error", "skip"):
        assert all(same)  # the fused table too
    elif policy in ("error", "skip"):
        assert all(same[:-1])
    else:
        assert not all(same)
    if policy == "skip":
        assert coordinator.skipped == 1
        if coordinator.backward(model.user(torch.tensor([3])).sum()):
            coordinator.step()
        assert (
            not torch.equal(before[0], model.user._embeddings.weight)
            or 3 not in model.user.plan.local_ids()
        )
    assert all(parameter.grad is None for parameter in model.parameters()) or policy == "error"
    return texts


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("policy", ["error", "warn", "skip", None])
@pytest.mark.parametrize("where", ["loss", "tables"])
def test_what_is_not_a_number(rank_pool, ranks: int, policy: str | None, where: str) -> None:
    texts = rank_pool(_not_a_number, ranks, where, policy)
    for told in texts:
        if policy is None:
            assert told == []
            continue
        assert len(told) >= 1
        if where == "loss":
            assert re.match(f"step 1: rank {ranks - 1}: the loss is -?inf", told[0])
    if policy is not None and where == "tables":
        text = " ".join(text for told in texts for text in told)
        assert re.search(
            r"step 1: .*table 'user': the gradient of \d rows is NaN or infinite: \d", text
        )
        assert "table 'item': the gradient of " in text
        for row in (7, 13, 99):
            assert str(row) in text


def test_policies_are_checked() -> None:
    with pytest.raises(
        ValueError,
        match=r"got nonfinite='ignore', expected one of .*'error', 'warn', 'skip'.* or None",
    ):
        Coordinator(nn.Linear(1, 1), nonfinite="ignore")


class _Late:
    """A collective that completes just after a slice of waiting for it has ended."""

    def __init__(self, work: dist.Work) -> None:
        self.work = work

    def is_completed(self) -> bool:
        return self.asked and self.work.is_completed()

    asked = False

    def wait(self, *slices: timedelta) -> None:
        self.work.wait()
        if slices:
            self.asked = True
            raise RuntimeError("Operation timed out!")


def _completes_late(rank: int, world_size: int) -> float:
    tensor = torch.ones(3)
    watch = watchdog.watch(None)
    watch.wait(_Late(dist.all_reduce(tensor, async_op=True)), "late")
    assert not watch.operation
    return tensor.sum().item()


def test_what_completes_between_two_looks_is_no_failure(run_ranks) -> None:
    assert run_ranks(_completes_late, 2) == [6.0, 6.0]


def _leave(rank: int, world_size: int) -> list[str]:
    group = dist.new_group([0, 1])
    for each in (None, group):
        watchdog.watch(each)
    watchdog.forget(group)
    watchdog._leave()
    return [thread.name for thread in threading.enumerate()]


def test_no_thread_asks_the_store_when_a_process_ends(run_ranks) -> None:
    """One that does when the interpreter is gone aborts the process, after all has gone well."""
    for names in run_ranks(_leave, 2):
        assert "shardemb-watchdog" not in names


def _hooks(rank: int, world_size: int) -> list[str]:
    """Return what was the exception hook, in order; a user's own is called and stays."""
    calls: list[str] = []

    def before(*error: object) -> None:
        calls.append("before")

    def after(*error: object) -> None:
        calls.append("after")
        watchdog._on_error(*error)

    sys.excepthook = before
    groups = [dist.new_group([0, 1]) for _ in range(2)]
    for group in (None, *groups):
        watchdog.watch(group)
    assert sys.excepthook is watchdog._on_error
    watchdog.forget(groups[0])
    assert sys.excepthook is watchdog._on_error  # as long as one is alive
    error = ValueError("bad luck")
    sys.excepthook(ValueError, error, None)
    assert sys.excepthook is before  # the report was the end of all
    watchdog.watch(None)
    sys.excepthook = after
    watchdog.forget(dist.group.WORLD)
    assert sys.excepthook is after
    watchdog.watch(None)  # does not hook in twice
    sys.excepthook(ValueError, error, None)
    assert sys.excepthook is after
    return calls


def test_the_exception_hook_is_only_borrowed(run_ranks) -> None:
    assert run_ranks(_hooks, 2) == [["before", "after", "before"]] * 2


def _fail_together(rank: int, world_size: int) -> list[str]:
    texts = []
    for errors in ({1: IndexError("id 7")}, {0: ValueError("same"), 1: ValueError("same")}):
        try:
            collectives.gather_or_raise(rank, errors.get(rank), operation="a test")
        except (ValueError, IndexError) as error:
            texts.append(f"{type(error).__name__}: {error}")
    both = {0: CheckpointError("a"), 1: exceptions.IdRangeError("b")}
    with pytest.raises(CheckpointError, match=r"^a; b$"):
        collectives.gather_or_raise(rank, both.get(rank), operation="a test")
    assert collectives.gather_or_raise(rank, None, operation="a test") == [*range(world_size)]
    return texts


@pytest.mark.parametrize("ranks", [2, 3])
def test_an_error_of_any_rank_is_raised_on_all(run_ranks, ranks: int) -> None:
    expected = ["IndexError: id 7", "ValueError: same"]
    assert run_ranks(_fail_together, ranks) == [expected] * ranks


def test_in_one_process_its_own_error_is_raised() -> None:
    assert collectives.gather_or_raise((1, 2), None, operation="a test") == [(1, 2)]
    with pytest.raises(exceptions.IdRangeError, match=r"^id 7$"):
        collectives.gather_or_raise(1, exceptions.IdRangeError("id 7"), operation="a test")
