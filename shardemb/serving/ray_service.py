"""The store as a service.

Row shards of a checkpoint in named Ray actors, and one client for every job of the cluster.

A shard maps the checkpoint's files into memory and reads its own rows of every table, those that
lie together in the files. So a shard that dies comes back with what the files hold, and nothing
else has to be kept. One lookup sends one request to each shard that owns some of the ids, however
many ids there are; very many are sent in several rounds.
"""

import asyncio
import math
import os
import random
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardemb.exceptions import CheckpointError, InputError, ShardBusyError, ShardUnavailableError
from shardemb.launch.ray import load_ray
from shardemb.serving.read_table import Metric, Table, Tables, best_of, scores_of
from shardemb.serving.store import Store, open_store
from shardemb.sharding.placement import RowOrder
from shardemb.utils.types import RowFunction

NAMESPACE = "shardemb"
#: bytes of one request, or of its answer
_REQUEST = 1 << 25
#: labels of one request
_LABELS = 1 << 16
#: calls that a shard may answer beside those that wait: refusals and health
_SPARE = 100


@dataclass(frozen=True)
class TableInfo:
    """What a client must know of a table."""

    name: str
    max_id: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    #: whether the files are in the order of slots, or of ids
    sharded: bool
    labelled: bool


@dataclass(frozen=True)
class Info:
    """What is served: the same for all shards and clients."""

    #: of the service
    name: str
    #: of the checkpoint, on every node
    path: Path
    #: sha256 of its manifest
    digest: str
    step: int
    shards: int
    #: by their names in the model
    tables: dict[str, TableInfo]

    def rows(self, shard: int) -> dict[str, tuple[int, int]]:
        """Return the rows ``[first, last)`` of each table that a shard holds.

        In the order of the files.
        """
        return {
            prefix: (table.max_id * shard // self.shards, table.max_id * (shard + 1) // self.shards)
            for prefix, table in self.tables.items()
        }

    def who(self, shard: int, node: str | None) -> str:
        """Name a shard, for errors."""
        rows = ", ".join(
            f"{prefix or self.tables[prefix].name} {a}-{b}"
            for prefix, (a, b) in self.rows(shard).items()
        )
        return (
            f"store {self.name!r}, shard {shard} of {self.shards} (rows of {rows}) on node"
            f" {node or 'unknown'}"
        )


@dataclass(frozen=True)
class ShardHealth:
    """How a shard is."""

    shard: int
    #: it answered, and the checkpoint is open
    ok: bool
    #: rows [first, last) of each table, in the order of the files
    rows: dict[str, tuple[int, int]]
    #: address; of the last time that it answered, if it did not now
    node: str | None
    pid: int | None = None
    #: requests answered since it started
    served: int = 0
    #: requests that wait or are under way
    pending: int = 0
    #: how often it came back
    restarts: int = 0
    #: why it is not ok
    error: str | None = None


class Shard:
    """The actor: some rows of every table, read when they are asked for."""

    def __init__(
        self,
        info: Info,
        number: int,
        max_pending: int,
        normalizers: Mapping[str, RowFunction | None] | None,
    ) -> None:
        self._info, self._number, self._max_pending, self._normalizers = (
            info,
            number,
            max_pending,
            normalizers,
        )
        ray = load_ray()
        self._node = ray.util.get_node_ip_address()
        # what was_current_actor_reconstructed reads, which tells only whether there were any
        self._restarts = int(
            ray._private.state.actors(actor_id=ray.get_runtime_context().get_actor_id())[
                "NumRestarts"
            ]
        )
        # a search reads all rows of the shard: lookups do not wait for it
        self._threads = {
            name: ThreadPoolExecutor(1) for name in ("lookup", "search", "ids_of", "labels_of")
        }
        self._pending = self._served = 0
        self._store: Store | None = None
        with suppress(
            ShardUnavailableError
        ):  # asked again at each request: a file system that was away comes back
            self._opened()

    def _opened(self) -> Store:
        if self._store is None:
            info = self._info
            try:
                store = open_store(info.path, self._normalizers)
            except (CheckpointError, OSError) as error:
                raise self._unavailable(
                    f"{error}: every node must see the checkpoint under this path"
                ) from None
            if store.manifest.digest != info.digest:
                raise self._unavailable(
                    f"{info.path}: got another checkpoint than the service was started with (its"
                    f" manifest's sha256 is {store.manifest.digest[:12]}, expected"
                    f" {info.digest[:12]}): put it back, or serve anew"
                )
            self._store = store
        return self._store

    def _unavailable(self, text: str) -> ShardUnavailableError:
        return ShardUnavailableError(f"{self._info.who(self._number, self._node)}: {text}")

    async def health(self) -> ShardHealth:
        """Say how the shard is, also while it is full."""
        error = None
        try:
            self._opened()
        except ShardUnavailableError as failed:
            error = str(failed)
        return ShardHealth(
            shard=self._number,
            ok=error is None,
            rows=self._info.rows(self._number),
            node=self._node,
            pid=os.getpid(),
            served=self._served,
            pending=self._pending,
            restarts=self._restarts,
            error=error,
        )

    async def info(self) -> Info:
        """Say what is served."""
        return self._info

    async def ask(self, key: tuple[str, int], what: str, *arguments: Any) -> Any:
        """Answer a request, or refuse it if too many wait."""
        if key != (self._info.digest, self._info.shards):
            raise InputError(
                f"store {self._info.name!r} serves another checkpoint, or other shards, than the"
                " client knows: connect() again"
            )
        if self._pending >= self._max_pending:
            raise ShardBusyError(
                f"{self._info.who(self._number, self._node)}: {self._pending} requests wait, as"
                " many as max_pending allows: ask for more ids in fewer calls, from fewer callers,"
                " or serve with more shards or a larger max_pending"
            )
        self._pending += 1
        try:
            answer = await asyncio.get_running_loop().run_in_executor(
                self._threads[what], getattr(self, f"_{what}"), *arguments
            )
        finally:
            self._pending -= 1
        self._served += 1
        return answer

    def _lookup(self, prefix: str, ids: np.ndarray, raw: bool) -> tuple[np.ndarray, torch.dtype]:
        rows = self._opened()[prefix].lookup(torch.tensor(ids), raw)
        return _bytes(rows), rows.dtype

    @torch.no_grad()
    def _search(
        self,
        prefix: str,
        queries: tuple[np.ndarray, torch.dtype],
        k: int,
        metric: Metric,
        exclude: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        table = self._opened()[prefix]
        vectors = _tensor(*queries).reshape(-1, *table.shape)
        scores, ids = table.best_among(
            *self._info.rows(self._number)[prefix],
            scores_of(vectors, metric),
            k,
            None if exclude is None else torch.tensor(exclude),
            len(vectors),
        )
        return scores.numpy(), ids.numpy()

    def _ids_of(self, prefix: str, labels: list[str]) -> np.ndarray:
        return self._opened()[prefix]._ids_of(labels)

    def _labels_of(self, prefix: str, ids: np.ndarray) -> list[list[str]]:
        return self._opened()[prefix]._labels_of(torch.tensor(ids))


def _bytes(x: Tensor) -> np.ndarray:
    """Return a tensor's memory, for dtypes that numpy lacks too.

    Ray moves arrays without a copy.
    """
    return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def _tensor(memory: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Return a flat tensor with a copy of the memory: Ray's is read-only."""
    return torch.tensor(memory).view(dtype)


class ServedTable(Table):
    """A table whose rows the shards of a service hold."""

    def __init__(self, client: "Client", prefix: str) -> None:
        info = client.info.tables[prefix]
        self.name, self.max_id, self.shape, self.dtype = (
            info.name,
            info.max_id,
            info.shape,
            info.dtype,
        )
        self.path = client.info.path
        self._client, self._prefix, self._info = client, prefix, info
        ends = [client.info.rows(shard)[prefix][1] for shard in range(client.info.shards)]
        self._ends = np.array(ends[:-1], dtype=np.int64)

    @property
    def labelled(self) -> bool:
        """Whether the service knows labels."""
        return self._info.labelled

    def _ids_of(self, labels: list[str]) -> np.ndarray:
        parts = [labels[start : start + _LABELS] for start in range(0, len(labels), _LABELS)]
        return np.concatenate(
            [self._client._ask_any("ids_of", self._prefix, part) for part in parts]
        )

    def _labels_of(self, ids: Tensor) -> list[list[str]]:
        step = max(1, _LABELS // max(1, ids.shape[1]))
        parts = [
            self._client._ask_any("labels_of", self._prefix, part.numpy())
            for part in ids.split(step)
        ]
        return [line for part in parts for line in part]

    def _look_up(self, ids: Tensor, raw: bool) -> Tensor:
        # numpy: torch's threads would wait for cores that the shards of this node have
        order = (RowOrder(self.max_id, self._info.sharded).slots(ids)).numpy()
        owner = np.searchsorted(self._ends, order, side="right")
        owned, sent = (
            [np.flatnonzero(owner == shard) for shard in range(self._client.info.shards)],
            ids.numpy(),
        )
        width = math.prod(self.shape)
        step = max(1, _REQUEST // max(1, width * self.dtype.itemsize))
        out = torch.empty(len(ids), width, dtype=self.dtype)
        for start in range(0, max(map(len, owned)), step):
            parts = {
                shard: where[start : start + step]
                for shard, where in enumerate(owned)
                if start < len(where)
            }
            asked = {
                shard: ("lookup", self._prefix, sent[where], raw) for shard, where in parts.items()
            }
            for shard, (memory, dtype) in self._client._ask(asked).items():
                if dtype != out.dtype:  # a normalizer of one's own
                    out = out.to(dtype)
                _place(out, parts[shard], memory)
        return out.reshape(-1, *self.shape)

    def _search(
        self, vectors: Tensor, k: int, metric: Metric, exclude: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        step = max(1, _REQUEST // max(1, vectors[:1].nbytes, 16 * min(k, self.max_id)))
        found: list[tuple[Tensor, Tensor]] = []
        for start in range(0, max(1, len(vectors)), step):
            part = vectors[start : start + step]
            left_out = None if exclude is None else exclude[start : start + step].numpy()
            request = ("search", self._prefix, (_bytes(part), part.dtype), k, metric, left_out)
            answers = self._client._ask(dict.fromkeys(range(self._client.info.shards), request))
            scores, ids = (
                torch.tensor(np.concatenate(parts, 1))
                for parts in zip(*answers.values(), strict=True)
            )
            found.append(best_of(scores, ids, k))
        scores, ids = (torch.cat(parts) for parts in zip(*found, strict=True))
        return scores, ids


def _place(out: Tensor, where: np.ndarray, memory: np.ndarray) -> None:
    """Set ``out[where]`` to rows that came as memory."""
    if not memory.size:
        return
    row = np.dtype((np.void, out.shape[1] * out.itemsize))  # one copy a row
    out.view(torch.uint8).numpy().view(row)[:, 0][where] = memory.view(row)


class Client(Tables[ServedTable]):
    """Reads what a service holds; see :func:`connect`.

    It may be pickled into tasks of any job, and used by several threads.

    Attributes:
        info: what is served.
        timeout_s: seconds that a round of requests may take; a call of ordinary size is one round,
            or two with labels.
        wait_s: seconds that a call waits for a shard that is away or full; 0 to raise at once.
    """

    def __init__(self, info: Info, timeout_s: float = 60.0, wait_s: float = 30.0) -> None:
        self.info, self.timeout_s, self.wait_s = info, timeout_s, wait_s
        self.path, self.step = info.path, info.step
        self.tables = {prefix: ServedTable(self, prefix) for prefix in info.tables}
        self._handles: dict[int, Any] = {}
        self._nodes: dict[int, str | None] = {}

    def __reduce__(self) -> Any:
        return Client, (self.info, self.timeout_s, self.wait_s)

    def health(self, timeout_s: float = 5.0) -> list[ShardHealth]:
        """Ask all shards how they are; one that does not answer in time is not ok.

        Raises nothing for it.
        """
        ray, end, found = _connected(), time.monotonic() + timeout_s, []
        sent: dict[int, Any] = {}
        for shard in range(self.info.shards):
            with suppress(ShardUnavailableError):
                sent[shard] = self._handle(shard).health.remote()
        for shard in range(self.info.shards):
            try:
                if shard not in sent:
                    raise self._away(shard, "there is no such actor")
                found.append(ray.get(sent[shard], timeout=max(0.0, end - time.monotonic())))
                self._nodes[shard] = found[-1].node
            except (ShardUnavailableError, ray.exceptions.RayError) as error:
                self._handles.pop(shard, None)
                text = str(error).splitlines()[0] if str(error) else type(error).__name__
                found.append(
                    ShardHealth(
                        shard, False, self.info.rows(shard), self._nodes.get(shard), error=text
                    )
                )
        return found

    def _handle(self, shard: int) -> Any:
        if shard not in self._handles:
            try:
                self._handles[shard] = _connected().get_actor(
                    f"{self.info.name}/{shard}", namespace=NAMESPACE
                )
            except ValueError:
                raise self._away(shard, "there is no such actor") from None
        return self._handles[shard]

    def _away(self, shard: int, why: str) -> ShardUnavailableError:
        return ShardUnavailableError(
            f"{self.info.who(shard, self._nodes.get(shard))}: {why}: a shard comes back by itself"
            f" while its service runs, so wait longer (wait_s={self.wait_s:g},"
            f" timeout_s={self.timeout_s:g}), look at health(), or serve {self.path} anew"
        )

    def _ask_any(self, *request: Any) -> Any:
        (answer,) = self._ask({random.randrange(self.info.shards): request}).values()
        return answer

    def _ask(self, requests: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Send a request to each of some shards at once, and again to those that are away or full.

        Answers by shard, rising.
        """
        ray, start, pause = _connected(), time.monotonic(), 0.02
        answers: dict[int, Any] = {}
        while True:
            failed: RuntimeError | None = None
            sent: dict[int, Any] = {}
            for shard in requests.keys() - answers.keys():
                try:
                    sent[shard] = self._handle(shard).ask.remote(
                        (self.info.digest, self.info.shards), *requests[shard]
                    )
                except ShardUnavailableError as error:
                    failed = error
            for shard, answer in sent.items():
                try:
                    answers[shard] = ray.get(
                        answer, timeout=max(0.0, start + self.timeout_s - time.monotonic())
                    )
                except ray.exceptions.GetTimeoutError:
                    raise self._away(shard, f"got no answer within {self.timeout_s:g} s") from None
                except ray.exceptions.RayTaskError as error:
                    if not isinstance(error.cause, ShardBusyError | ShardUnavailableError):
                        raise error.cause from error
                    failed = error.cause
                except ray.exceptions.RayError as error:
                    self._handles.pop(shard, None)  # the name may be another actor's by now
                    failed = self._away(
                        shard, f"{type(error).__name__}: {str(error).splitlines()[0]}"
                    )
            if failed is None:
                return dict(sorted(answers.items()))
            if time.monotonic() + pause > start + min(self.wait_s, self.timeout_s):
                raise failed
            time.sleep(pause)
            pause = min(2 * pause, 0.5)


def connect(name: str = "shardemb", *, timeout_s: float = 60.0, wait_s: float = 30.0) -> Client:
    """Find a service by its name, from any job of the cluster.

    A call that meets a shard that is away, because it died and is starting again, or that is full,
    because ``max_pending`` requests wait there already, asks it again until ``wait_s`` have passed.

    Args:
        name: of the service.
        timeout_s: seconds that a round of requests may take; a call of ordinary size is one round,
            or two with labels.
        wait_s: seconds that it waits for a shard that is away or full; 0 to raise at once.

    Raises:
        ValueError: this process is not connected to Ray; there is no service of that name.
        ShardUnavailableError: the first shard does not answer.
    """
    ray = _connected()
    try:
        handle = ray.get_actor(f"{name}/0", namespace=NAMESPACE)
    except ValueError:
        raise InputError(
            f"got name {name!r}, expected one of the services that run, {_names()}: shardemb serve"
            " starts one"
        ) from None
    end = time.monotonic() + max(wait_s, 1.0)
    while True:
        try:
            client = Client(
                ray.get(handle.info.remote(), timeout=max(0.0, end - time.monotonic())),
                timeout_s,
                wait_s,
            )
            break
        except ray.exceptions.RayError as error:
            if time.monotonic() + 0.5 > end:
                raise ShardUnavailableError(
                    f"store {name!r}, shard 0: {type(error).__name__}: it did not answer within"
                    f" {max(wait_s, 1.0):g} s: try again, or serve anew"
                ) from None
            time.sleep(0.5)
    client.health()  # so that errors can name the nodes
    return client


def _names() -> list[str]:
    found = load_ray().util.list_named_actors(all_namespaces=True)
    return sorted(
        {actor["name"].rpartition("/")[0] for actor in found if actor["namespace"] == NAMESPACE}
    )


def _connected() -> Any:
    ray = load_ray()
    if not ray.is_initialized():  # get_actor would connect to any cluster that it finds
        raise InputError(
            "got no connection to Ray, expected one: with shardemb.launch.ray.connected('auto'), or"
            " HOST:PORT"
        )
    return ray


class Service:
    """The shards that this process has started.

    They live until :meth:`stop`, the end of the block, or of the process.

    Attributes:
        info: what is served.
    """

    def __init__(self, info: Info, handles: list[Any]) -> None:
        self.info, self._handles = info, handles

    def client(self, *, timeout_s: float = 60.0, wait_s: float = 30.0) -> Client:
        """Return a client, as :func:`connect` does."""
        return connect(self.info.name, timeout_s=timeout_s, wait_s=wait_s)

    def stop(self) -> None:
        """End the shards, and return when their names are free, after 10 seconds at most."""
        ray = load_ray()
        if not ray.is_initialized():
            return
        while self._handles:
            ray.kill(self._handles.pop())
        end = time.monotonic() + 10
        while self.info.name in _names() and time.monotonic() < end:
            time.sleep(0.05)

    def __enter__(self) -> "Service":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def serve(
    path: str | Path,
    shards: int,
    name: str = "shardemb",
    *,
    normalizers: Mapping[str, RowFunction | None] | None = None,
    max_pending: int = 64,
    resources: Mapping[str, Any] | None = None,
    timeout_s: float = 120.0,
) -> Service:
    """Serve a checkpoint's tables from row shards, one Ray actor each, spread over the nodes.

    The process must be connected to Ray (:func:`shardemb.launch.ray.connected`), and every node
    must see the checkpoint under the same path.

    Args:
        path: a checkpoint, or the newest one of a run folder, as :func:`shardemb.open_store` takes
            it.
        shards: how many; 1 up to the rows of the largest table.
        name: by which clients find the service.
        normalizers: as for :func:`shardemb.open_store`.
        max_pending: requests that may wait at a shard, from all clients together; more are refused,
            and clients ask again.
        resources: of a shard, as options of a Ray actor (default: ``{"num_cpus": 1}``).
        timeout_s: seconds that the shards may take to start.

    Raises:
        CheckpointError: no checkpoint there, or a damaged one.
        ValueError: a remote path, no connection to Ray, a name in use, shards or ``max_pending``
            out of range.
        ShardUnavailableError: a shard did not start in time, or its node does not see this
            checkpoint.
    """
    ray = _connected()
    if not name or "/" in name:
        raise InputError(f"got name {name!r}, expected one without '/'")
    if max_pending < 1:
        raise InputError(f"got max_pending={max_pending}, expected at least 1")
    store = open_store(
        path if "://" in str(path) else Path(path).resolve(), normalizers
    )  # workers have another working directory
    if not 1 <= shards <= store.table.max_id:
        raise InputError(
            f"{store.path}: got {shards} shards, expected 1 to {store.table.max_id}, the rows of"
            " the largest table"
        )
    if name in _names():
        raise InputError(
            f"got name {name!r}, which is in use by a service on this cluster: end that one, or"
            " give another name"
        )
    tables = {
        prefix: TableInfo(
            table.name, table.max_id, table.shape, table.dtype, table.sharded, table.labelled
        )
        for prefix, table in store.tables.items()
    }
    info = Info(name, store.path, store.manifest.digest, store.step, shards, tables)
    options = {"num_cpus": 1, **(resources or {}), "namespace": NAMESPACE, "max_restarts": -1}
    options |= {"scheduling_strategy": "SPREAD", "max_concurrency": max_pending + _SPARE}
    actor, service = ray.remote(Shard), Service(info, [])
    try:
        for shard in range(shards):
            placed = actor.options(name=f"{name}/{shard}", **options)
            service._handles.append(placed.remote(info, shard, max_pending, normalizers))
        asked = [handle.health.remote() for handle in service._handles]
        ready, late = ray.wait(asked, num_returns=shards, timeout=timeout_s)
        if late:
            shard = asked.index(late[0])
            raise ShardUnavailableError(
                f"{info.who(shard, None)}: did not start within {timeout_s:g} s ({len(ready)} of"
                f" {shards} did): it asks for {dict(resources or {'num_cpus': 1})}, free in the"
                f" cluster is {ray.available_resources()}"
            )
        for shard, answer in enumerate(asked):
            try:
                health = ray.get(answer)
            except (
                ray.exceptions.RayError
            ) as error:  # a node without this package, or with another version of it
                raise ShardUnavailableError(
                    f"{info.who(shard, None)}: did not start: {error}"
                ) from error
            if not health.ok:
                raise ShardUnavailableError(health.error)
    except BaseException:
        service.stop()
        raise
    return service
