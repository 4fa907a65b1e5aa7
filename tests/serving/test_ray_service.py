"""The store as a service, on one Ray of this machine that all tests of the file share."""

import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import shardemb
from shardemb import Embedding, checkpoint
from shardemb.checkpoint.manifest import CheckpointError
from shardemb.cli import main
from shardemb.launch.ray import connected
from shardemb.serving import ray_service
from shardemb.serving.ray_service import (
    Client,
    ShardBusyError,
    ShardUnavailableError,
    connect,
    serve,
)
from shardemb.vocabulary import Vocabulary

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ROOT = Path(__file__).parents[2]
HERE = {**os.environ, "PYTHONPATH": str(ROOT)}
LABELS = [f"entity-{i}" for i in range(501)]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    with connected("local", cpus=4, log_to_driver=False) as module:
        yield module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray leaves its processes' Popen objects behind
        gc.collect()


def _save(rank: int, world_size: int, folder: Path) -> None:
    torch.manual_seed(5)
    model = nn.Module()
    model.entity = Embedding(
        501, shape=6, seed=1, name="entity", normalizer="normalize", normalizer_kwargs={"dim": -1}
    )
    model.matrix = Embedding(77, shape=(2, 3), seed=2, name="matrix")
    model.complex = Embedding(100, shape=3, dtype=torch.complex64, seed=3, name="complex")
    model.short = Embedding(33, shape=5, dtype=torch.bfloat16, seed=4, name="short")
    model.relation = Embedding(
        2, shape=4, seed=5, name="relation", sharding="replicated"
    )  # fewer rows than shards
    model.tied = Embedding(200, shape=4, name="tied")
    model.tied.load_state_dict({"weight": torch.randint(-1, 2, (200, 4)).float()})
    if rank == 0:
        Vocabulary(LABELS).save(folder / "entities.arrow")
    checkpoint.save(
        folder / "checkpoints", 7, model, fingerprints={"entities": Vocabulary(LABELS).fingerprint}
    )


TABLES = ("entity", "matrix", "complex", "short", "relation", "tied")


@pytest.fixture(
    scope="module", params=[(3, 3), (1, 2), (2, 1)], ids="saved by {0[0]}, {0[1]} shards".format
)
def both(request, rank_pool, ray, tmp_path_factory) -> Iterator[tuple[shardemb.Store, Client]]:
    """A store, and the client of a service that reads the same checkpoint."""
    ranks, shards = request.param
    folder = tmp_path_factory.mktemp("run")
    rank_pool(_save, ranks, folder)
    with serve(folder, shards, f"tables-{shards}") as service:
        yield shardemb.open_store(folder), service.client()


def test_lookup_gives_what_the_store_gives(both) -> None:
    store, client = both
    assert (client.path, client.step, set(client.tables)) == (store.path, 7, set(TABLES))
    for name in TABLES:
        table, served = store[name], client[name]
        assert (served.name, served.max_id, served.shape, served.dtype) == (
            table.name,
            table.max_id,
            table.shape,
            table.dtype,
        )
        ids = torch.randint(table.max_id, (7, 9))
        for keys in (ids, torch.arange(table.max_id), [1, 1, 0], 1, np.int64(0), []):
            for raw in (False, True):
                expected, got = table.lookup(keys, raw), client.lookup(keys, name, raw)
                assert got.dtype == expected.dtype
                assert torch.equal(got, expected), (name, keys)
        got.zero_()  # a copy of one's own
    assert torch.equal(
        client.lookup(["entity-500", "entity-3"]), store.lookup(["entity-500", "entity-3"])
    )
    assert torch.equal(client.lookup("entity-17"), store.lookup("entity-17"))


def test_what_is_large_goes_in_several_rounds(both, monkeypatch: pytest.MonkeyPatch) -> None:
    store, client = both
    monkeypatch.setattr(ray_service, "_REQUEST", 500)
    monkeypatch.setattr(ray_service, "_LABELS", 30)
    before = sum(health.served for health in client.health())
    ids = torch.arange(501).flip(0)
    assert torch.equal(client.lookup(ids), store.lookup(ids))
    assert sum(health.served for health in client.health()) - before >= 501 * 24 // 500
    assert torch.equal(client.lookup(LABELS), store.lookup(LABELS))
    found, expected = client.nearest(ids[:70], 5), store.nearest(ids[:70], 5)
    torch.testing.assert_close(found.scores, expected.scores)
    assert found.labels is not None
    assert len(found.labels) == 70


@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
def test_nearest_gives_what_the_store_gives(both, metric: str) -> None:
    store, client = both
    for name in ("entity", "matrix", "complex", "short"):
        expected, found = (
            store[name].nearest([5, 30], 6, metric),
            client[name].nearest([5, 30], 6, metric),
        )
        torch.testing.assert_close(found.scores, expected.scores)
        assert torch.equal(found.ids, expected.ids), name
        assert found.labels == expected.labels
    assert client.nearest("entity-5", 3).labels is not None
    vectors = store["entity"].lookup([1, 2, 3])
    torch.testing.assert_close(
        client.nearest(vectors, 501, metric).scores, store.nearest(vectors, 501, metric).scores
    )


@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
@pytest.mark.parametrize("k", [1, 7, 300])
def test_equal_scores_are_ordered_as_the_store_orders_them(both, metric: str, k: int) -> None:
    store, client = both
    for query in (
        [3, 150],
        torch.zeros(2, 4),
        torch.ones(1, 4),
    ):  # whole numbers: sums have no rounding
        expected, found = (
            store["tied"].nearest(query, k, metric),
            client.nearest(query, k, metric, table="tied"),
        )
        assert torch.equal(found.scores, expected.scores)
        assert torch.equal(found.ids, expected.ids)
        for scores, ids in zip(found.scores.tolist(), found.ids.tolist(), strict=True):
            assert all(
                a < b
                for a, b, s, t in zip(ids, ids[1:], scores, scores[1:], strict=False)
                if s == t
            )


BAD: list[Callable[[Any], Any]] = [
    lambda tables: tables.lookup([3, 501]),
    lambda tables: tables.lookup(-1),
    lambda tables: tables.lookup([0.5]),
    lambda tables: tables.lookup("nobody"),
    lambda tables: tables["matrix"].lookup("entity-1"),
    lambda tables: tables.lookup(1, table="entities"),
    lambda tables: tables.nearest(1, metric="l1"),
    lambda tables: tables.nearest(1, k=0),
    lambda tables: tables.nearest(torch.zeros(2, 5)),
    lambda tables: tables.nearest([700]),
]


@pytest.mark.parametrize("call", BAD, ids=range(len(BAD)))
def test_what_the_store_refuses_the_client_refuses_in_the_same_words(
    both, call: Callable[[Any], Any]
) -> None:
    store, client = both
    with pytest.raises((IndexError, KeyError, TypeError, ValueError)) as expected:
        call(store)
    with pytest.raises(expected.type) as caught:
        call(client)
    assert caught.value.args == expected.value.args


def test_a_client_goes_with_a_task(both, ray) -> None:
    store, client = both

    def read(client: Client, ids: torch.Tensor) -> torch.Tensor:
        return client.lookup(ids)

    ids = torch.randint(501, (40,))
    assert torch.equal(
        ray.get(ray.remote(num_cpus=0)(read).remote(client, ids), timeout=60), store.lookup(ids)
    )


@pytest.fixture
def small(tmp_path: Path, ray) -> Path:
    checkpoint.save(tmp_path / "run", 1, Embedding(11, shape=3, name="t"))
    return Path(shardemb.open_store(tmp_path / "run").path)


def _until(true: Callable[[], bool], seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


def test_a_shard_that_is_killed_comes_back(small: Path) -> None:
    expected = shardemb.open_store(small).lookup(torch.arange(11))
    with serve(small, 2, "killed") as service, ExitStack() as ends:
        client, hasty = service.client(wait_s=40), service.client(wait_s=0)
        first, second = client.health()
        assert (first.ok, second.ok, first.rows, second.rows) == (
            True,
            True,
            {"": (0, 5)},
            {"": (5, 11)},
        )
        assert (first.restarts, first.error, first.pending) == (0, None, 0)
        done, failures, stop = [], [], threading.Event()

        def read() -> None:
            while not stop.is_set():
                try:
                    done.append(torch.equal(client.lookup(torch.arange(11)), expected))
                except Exception as error:
                    failures.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        ends.callback(thread.join, 60)
        ends.callback(stop.set)
        _until(lambda: len(done) > 3)
        assert second.pid is not None
        os.kill(second.pid, signal.SIGSTOP)  # one that is dead may be back at once
        away = client.health(timeout_s=0.5)[1]
        assert (away.ok, away.rows) == (False, {"": (5, 11)})
        os.kill(second.pid, signal.SIGKILL)
        with pytest.raises(ShardUnavailableError) as caught:
            _until(lambda: hasty.lookup([9]) is None)
        told = (
            r"store 'killed', shard 1 of 2 \(rows of t 5-11\) on node \d+\.\d+\.\d+\.\d+: .*wait"
            r" longer"
        )
        assert re.search(told, str(caught.value))
        assert torch.equal(hasty.lookup([0, 4]), expected[[0, 4]])  # the other one serves on
        before = len(done)
        _until(lambda: len(done) > before + 3)
        assert not failures
        assert all(done)
        back = client.health()[1]
        assert (back.ok, back.restarts) == (True, 1)
        assert back.pid != second.pid


def test_a_checkpoint_that_vanished_or_was_changed(small: Path, tmp_path: Path) -> None:
    with serve(small, 1, "vanished") as service:
        client = service.client(wait_s=0)
        rows = client.lookup([1, 2])
        away = tmp_path / "elsewhere"
        small.rename(away)
        assert torch.equal(client.lookup([1, 2]), rows)  # it is mapped
        (health,) = client.health()
        assert health.pid is not None
        os.kill(health.pid, signal.SIGKILL)
        _until(lambda: client.health()[0].pid not in (None, health.pid))
        with pytest.raises(
            ShardUnavailableError,
            match=rf"shard 0 of 1 .*{small}.*every node must see the checkpoint",
        ):
            client.lookup([1, 2])
        assert not client.health()[0].ok
        torch.manual_seed(3)
        checkpoint.save(small.parent, 1, Embedding(11, shape=3, name="t"))
        with pytest.raises(
            ShardUnavailableError, match="got another checkpoint than the service was started with"
        ):
            client.lookup([1, 2])
        shutil.rmtree(small)
        away.rename(small)
        assert torch.equal(client.lookup([1, 2]), rows)
        assert client.health()[0].ok


def test_a_queue_is_bounded_and_a_call_has_a_timeout(small: Path) -> None:
    def slow(rows: torch.Tensor) -> torch.Tensor:
        time.sleep(0.5)
        return 2 * rows

    expected = 2 * shardemb.open_store(small).lookup([1, 2])
    with serve(small, 1, "slow", normalizers={"": slow}, max_pending=2) as service:
        client, hasty = service.client(), service.client(wait_s=0)
        outcomes: list[Any] = []

        def read(client: Client) -> None:
            try:
                outcomes.append(torch.equal(client.lookup([1, 2]), expected))
            except ShardBusyError as error:
                outcomes.append(str(error))

        for who, refused in ((hasty, 3), (client, 0)):
            outcomes.clear()
            threads = [threading.Thread(target=read, args=(who,)) for _ in range(5)]
            for thread in threads:
                thread.start()
            if refused:
                _until(
                    lambda: client.health()[0].pending == 2
                )  # which answers while the shard is full
            for thread in threads:
                thread.join(30)
            assert sum(outcome is True for outcome in outcomes) == 5 - refused
            for text in (outcome for outcome in outcomes if outcome is not True):
                assert (
                    "2 requests wait, as many as max_pending allows: ask for more ids in fewer"
                    " calls" in text
                )
        with pytest.raises(
            ShardUnavailableError, match=r"shard 0 of 1 .*got no answer within 0\.3 s"
        ):
            service.client(timeout_s=0.3).lookup([1, 2])


def test_what_cannot_be_served(small: Path, tmp_path: Path, ray) -> None:
    with serve(small, 1, "taken", resources={"num_cpus": 0}) as service:
        with pytest.raises(ValueError, match="got name 'taken', which is in use"):
            serve(small, 1, "taken")
        with pytest.raises(
            ValueError,
            match=r"got name 'nobody', expected one of the services that run, \[.*'taken'.*\]",
        ):
            connect("nobody")
        stale = Client(replace(service.info, digest="x"))
        with pytest.raises(
            ValueError, match=r"store 'taken' serves another checkpoint.*connect\(\) again"
        ):
            stale.lookup(1)
        client = service.client(wait_s=0)
    with pytest.raises(ShardUnavailableError, match="shard 0 of 1"):
        client.lookup(1)
    with pytest.raises(
        ValueError, match="got 12 shards, expected 1 to 11, the rows of the largest table"
    ):
        serve(small, 12)
    with pytest.raises(ValueError, match="expected one without '/'"):
        serve(small, 1, "a/b")
    with pytest.raises(ValueError, match="got max_pending=0"):
        serve(small, 1, max_pending=0)
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        serve(tmp_path / "nowhere", 1)
    told = r"shard 0 of 1 .*did not start within 1 s .*\{'num_cpus': 64\}, free in the cluster"
    with pytest.raises(ShardUnavailableError, match=told):
        serve(small, 1, "huge", resources={"num_cpus": 64}, timeout_s=1)
    assert "huge" not in ray_service._names()


def test_the_command_line_serves_until_it_is_told_to_end(small: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "shardemb",
        "serve",
        str(small.parent),
        "--shards",
        "2",
        "--name",
        "cli",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=HERE
    ) as server:
        try:
            lines = [server.stdout.readline() for _ in range(4)]
            assert "as 'cli' from 2 shard(s): t (11 rows)" in lines[0], server.stderr.read()
            address = re.search(r"on Ray at (\S+);", lines[1])[1]
            code = f"""if True:
                from shardemb.launch.ray import connected
                from shardemb.serving import connect
                with connected({address!r}, log_to_driver=False):
                    client = connect("cli")
                    pids = [health.pid for health in client.health()]
                    print(client.lookup([0, 10]).tolist(), pids)
            """
            read = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, env=HERE, timeout=60
            )
            rows, pids = read.stdout.splitlines()[-1].split("]] ")
            assert rows + "]]" == str(shardemb.open_store(small).lookup([0, 10]).tolist()), (
                read.stderr
            )
            pids = [int(pid) for pid in re.findall(r"\d+", pids)]
            os.kill(pids[1], signal.SIGKILL)
            lines = iter(server.stdout.readline, "")  # Ray has a line of its own
            assert any(re.search(r"shard 1 is away: \w+", line) for line in lines)
            assert any(
                re.search(r"shard 1 serves on node \S+, process \d+, restart 1$", line)
                for line in lines
            )
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 143
            assert "Traceback" not in server.stderr.read()
            _until(lambda: not Path(f"/proc/{pids[0]}").exists(), 10)
        finally:
            server.kill()


def test_the_command_line_names_what_is_wrong(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tmp_path)]) == 1
    assert f"shardemb: error: {tmp_path}: got no finished checkpoint" in capfd.readouterr().err
    checkpoint.save(tmp_path, 1, Embedding(3, shape=2))
    assert main(["serve", str(tmp_path), "--address", "nowhere"]) == 1
    assert (
        "shardemb: error: got Ray address 'nowhere', expected 'local', 'auto'"
        in capfd.readouterr().err
    )


def test_nothing_connects_to_ray_by_itself() -> None:
    code = """if True:
        import sys, shardemb.serving
        assert "ray" not in sys.modules
        for call in (lambda: shardemb.serving.connect(), lambda: shardemb.serving.serve("x", 1)):
            try:
                call()
            except ValueError as error:
                print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=HERE, timeout=60
    )
    assert done.stdout.count("got no connection to Ray, expected one") == 2, done.stderr
