"""Kills training ranks at random moments, and checks that nothing is lost or torn.

A run trains two tables to a fixed step, with SGD whose result is the same bit by bit at every
number of ranks. Each attempt starts at 1, 2 or 3 ranks from what the last one left, and is killed:
one rank or all, at a random time or within a save. What was loaded must be the rows of its step,
bit by bit; a checkpoint that was reported as saved must still be there; the end must be that of a
run that was never stopped.
"""

import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

ROWS, DIM, STEPS, SAVE_EVERY = 3001, 16, 60, 3

_context = multiprocessing.get_context("forkserver")


def _make() -> tuple[Any, Any]:
    import torch

    from shardemb import Coordinator, Embedding, Sharding

    model = torch.nn.Module()
    sharding = Sharding(gradient_reduction="sum", deduplicate=False)
    options = {"shape": DIM, "sharding": sharding}
    model.user = Embedding(ROWS, seed=1, name="user", **options)
    model.item = Embedding(71, seed=2, name="item", **options)
    return model, Coordinator(model, torch.optim.SGD(model.parameters(), lr=0.05))


def _step(model: Any, coordinator: Any, step: int, rank: int, world_size: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(ROWS, (60,), generator=generator).chunk(world_size)[rank]
    (model.user(ids) * model.item(ids % 71)).square().sum().backward()
    coordinator.step()


def _trajectory(channel: Connection) -> None:
    """Send the rows of both tables after each step, ``(STEPS + 1, rows, DIM)``."""
    import torch

    torch.set_num_threads(1)
    model, coordinator = _make()
    rows = []
    for step in range(STEPS + 1):
        if step:
            _step(model, coordinator, step, 0, 1)
        rows.append(np.concatenate([table(None).detach().numpy() for table in model.children()]))
    channel.send(np.stack(rows))


@dataclass
class Saver:
    """How a job saves and goes on; functions of this module."""

    #: (folder, step, model, in the background?)
    save: Callable[..., None]
    #: (folder, model) to the step that was loaded, 0 for none
    load: Callable[[Path, Any], int]
    #: (folder, rows after each step) to the newest step, 0 for none; all that is there is verified
    newest: Callable[[Path, np.ndarray], int]


def _save(folder: Path, step: int, model: Any, saver: Any) -> None:
    from shardemb import checkpoint

    if saver is None:
        checkpoint.save(folder, step, model)
    else:
        saver.save(step, model)
        saver.wait()


def _load(folder: Path, model: Any) -> int:
    from shardemb import checkpoint

    paths = checkpoint.checkpoints(folder)
    if not paths:
        return 0
    checkpoint.load(paths[-1], model)
    return int(Path(paths[-1]).name.removeprefix("step-"))


def _newest(folder: Path, trajectory: np.ndarray) -> int:
    import shardemb

    step = 0
    for path in shardemb.checkpoint.checkpoints(folder):
        store = shardemb.open_store(path, verify="sha256")
        step = max(step, store.step)
        tables = store.tables.values()
        rows = np.concatenate([rows for table in tables for _, rows in table.chunks()])
        if not np.array_equal(rows, trajectory[store.step]):
            raise AssertionError(
                f"{path}: is undamaged, but its rows are not those of step {store.step}"
            )
    return step


OURS = Saver(_save, _load, _newest)


def _overwrite(folder: Path, step: int, model: Any, saver: Any) -> None:
    """The planted fault: each rank overwrites its rows of the step before, in one file."""
    folder.mkdir(exist_ok=True)
    for table in model.children():
        path = folder / f"{table.name}.npy"
        with suppress(FileExistsError), path.open("xb") as file:
            file.truncate(table.max_id * DIM * 4)
        stored = np.memmap(path, dtype=np.float32, mode="r+", shape=(table.max_id, DIM))
        stored[table.plan.local_ids().numpy()] = table.local_rows().numpy()
        stored.flush()
    (folder / "step.json").write_text(json.dumps(step))


def _load_overwritten(folder: Path, model: Any) -> int:
    import torch

    try:
        step = json.loads((folder / "step.json").read_text())
    except (FileNotFoundError, ValueError):
        return 0
    for table in model.children():
        stored = np.memmap(
            folder / f"{table.name}.npy", dtype=np.float32, mode="r", shape=(table.max_id, DIM)
        )
        table._load_stored_rows(
            {"weight": torch.from_numpy(stored[table.plan.local_ids().numpy()].copy())}
        )
    return step


def _unverified(folder: Path, trajectory: np.ndarray) -> int:
    return 0


PLANTED = Saver(_overwrite, _load_overwritten, _unverified)


def _rank_main(channel: Connection, *arguments: Any) -> None:
    try:
        _train(channel, *arguments)
    except Exception as error:  # after a kill the others lose their connection
        channel.send(("failed", f"{type(error).__name__}: {error}"))


def _train(
    channel: Connection,
    rank: int,
    world_size: int,
    store: str,
    folder: Path,
    saver: Saver,
    background: bool,
) -> None:
    import torch
    import torch.distributed as dist

    from shardemb.checkpoint import AsyncSaver

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=30),
        )
    model, coordinator = _make()
    trajectory = np.load(folder.parent / "trajectory.npy", mmap_mode="r")

    def compare(step: int) -> None:
        whole = trajectory[step]
        for table, rows in ((model.user, whole[:ROWS]), (model.item, whole[ROWS:])):
            expected = rows[table.plan.local_ids().numpy()]
            wrong = int((table.local_rows().numpy() != expected).any(1).sum())
            if wrong:
                where = f"{table.name!r} on rank {rank} of {world_size}"
                channel.send(("torn", f"step {step}: {wrong} rows of {where} are others"))

    first = saver.load(folder, model)
    compare(first)
    channel.send(("loaded", first))
    in_background = AsyncSaver(folder) if background else None
    for step in range(first + 1, STEPS + 1):
        _step(model, coordinator, step, rank, world_size)
        if step % SAVE_EVERY == 0 or step == STEPS:
            channel.send(("saving", step))
            saver.save(folder, step, model, in_background)
            channel.send(("saved", step))
    compare(STEPS)
    channel.send(("done", STEPS))


@dataclass
class Loop:
    """Attempts, kills, and what was wrong.

    Args:
        saver: of the jobs.
        seed: of the moments and world sizes.
    """

    saver: Saver
    seed: int
    kills: int = 0
    attempts: int = 0
    runs: int = 0
    #: kills between the beginning and the end of a save
    in_save: int = 0
    world_sizes: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def run(self, kills: int, seconds: float, stop_at_fault: bool = False) -> None:
        """Go on until so many attempts were killed and the last run has ended, or time is up."""
        draw, deadline = random.Random(self.seed), time.monotonic() + seconds
        with tempfile.TemporaryDirectory(prefix="crash-loop-") as base:
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(target=_trajectory, args=(sender,))
            process.start()
            self._trajectory = receiver.recv()
            np.save(Path(base) / "trajectory.npy", self._trajectory)
            process.join()
            while self.kills < kills or not self.runs:
                folder = Path(base) / f"run-{self.runs}"
                known = 0
                while True:
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"{self.kills} kills in {seconds} s, expected {kills}")
                    done, known = self._attempt(Path(base), folder, draw, known, self.kills < kills)
                    if self.faults and stop_at_fault:
                        return
                    if done:
                        break
                self.runs += 1

    def _attempt(
        self, base: Path, folder: Path, draw: random.Random, known: int, kill: bool
    ) -> tuple[bool, int]:
        """Run the job once; return whether it has ended, and the newest step reported as saved."""
        world_size, self.attempts = draw.randint(1, 3), self.attempts + 1
        self.world_sizes[world_size] += 1
        background = draw.random() < 0.5
        store = base / f"store-{self.attempts}"
        channels, ranks = [], []
        for rank in range(world_size):
            receiver, sender = _context.Pipe(duplex=False)
            arguments = (sender, rank, world_size, str(store), folder, self.saver, background)
            process = _context.Process(target=_rank_main, args=arguments)
            process.start()
            sender.close()
            channels.append(receiver)
            ranks.append(process)
        # half of the kills within a save; it takes some milliseconds
        at_save = draw.randint(1, 4) if draw.random() < 0.5 else None
        delay = draw.uniform(0, 0.012) if at_save else draw.uniform(0.0, 0.6)
        victims = [draw.randrange(world_size)] if draw.random() < 0.5 else list(range(world_size))
        status: dict[int, tuple[str, Any]] = {}
        saves, killed = 0, False
        moment = None if at_save else time.monotonic() + 0.15 + delay
        try:
            open_channels = list(channels)
            give_up = time.monotonic() + 60
            while open_channels:
                now = time.monotonic()
                if now > give_up:
                    raise TimeoutError(f"ranks hang: {status}")
                if kill and moment is not None and now >= moment:
                    for victim in victims:
                        with suppress(ProcessLookupError):
                            os.kill(ranks[victim].pid, signal.SIGKILL)
                    self.kills += 1
                    self.in_save += any(status.get(v, ("",))[0] == "saving" for v in victims)
                    time.sleep(draw.uniform(0, 0.05))  # the others see it, or not
                    for process in ranks:
                        process.kill()
                    moment, kill, killed = None, False, True
                left = give_up - now if moment is None else max(0.0, min(moment - now, 0.5))
                for channel in wait(open_channels, left):
                    try:
                        kind, value = channel.recv()  # type: ignore[union-attr]
                    except (EOFError, ConnectionResetError):
                        open_channels.remove(channel)  # type: ignore[arg-type]
                        continue
                    rank = channels.index(channel)  # type: ignore[arg-type]
                    status[rank] = (kind, value)
                    if kind == "torn":
                        self.faults.append(value)
                    elif kind == "failed" and not killed:
                        self.faults.append(f"rank {rank} of {world_size}: {value}")
                    elif kind == "loaded" and value < known:
                        self.faults.append(
                            f"step {known} was reported as saved, the next attempt found {value}"
                        )
                    elif kind == "saved":
                        known = max(known, value)
                    elif kind == "saving" and rank == 0:
                        saves += 1
                        if at_save is not None and saves == at_save:
                            moment = time.monotonic() + delay
        finally:
            for process in ranks:
                process.kill()
                process.join()
        try:
            newest = self.saver.newest(folder, self._trajectory)
        except Exception as error:  # whatever it is, a checkpoint is not what it should be
            self.faults.append(f"{type(error).__name__}: {error}")
            newest = known
        if self.saver is OURS and newest < known:
            self.faults.append(f"step {known} was reported as saved, the newest is {newest}")
        done = len(status) == world_size and all(kind == "done" for kind, _ in status.values())
        if done and self.saver is OURS and newest != STEPS:
            self.faults.append(
                f"the run came to its end, step {STEPS}, the newest checkpoint is of step {newest}"
            )
        return done, known
