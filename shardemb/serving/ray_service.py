"""Serves a checkpoint to all jobs of a Ray cluster: named actors hold shards of its rows.

A shard maps the checkpoint's files and reads one block of every table's slots. It has no other
state, so Ray can restart it. A lookup sends a request to each shard that owns some of the ids, or
several for very many.
"""

import asyncio
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
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
#: most bytes of a request or an answer
_REQUEST = 1 << 25
#: most labels of a request
_LABELS = 1 << 16
#: concurrent calls besides the waiting requests: health checks, refusals
_SPARE = 100


@dataclass(frozen=True)
class TableInfo:
    """A table's metadata."""

    name: str
    max_id: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    #: order of the stored rows
    order: RowOrder
    labelled: bool


@dataclass(frozen=True)
class Info:
    """Metadata of a service, the same for all shards and clients."""

    #: the service's name
    name: str
    #: the checkpoint, under the same path on every node
    path: Path
    #: sha256 of its manifest
    digest: str
    step: int
    shards: int
    #: by their names in the model
    tables: dict[str, TableInfo]

    def rows(self, shard: int) -> dict[str, tuple[int, int]]:
        """Return a shard's slots ``[first, last)`` of each table."""
        return {
            prefix: (table.max_id * shard // self.shards, table.max_id * (shard + 1) // self.shards)
            for prefix, table in self.tables.items()
        }

    def who(self, shard: int, node: str | None) -> str:
        """Name a shard, for errors."""
        rows = ", ".join(
            f"{prefix or self.tables[prefix].name} {first}-{last}"
            for prefix, (first, last) in self.rows(shard).items()
        )
        place = f"shard {shard} of {self.shards} (rows of {rows}) on node {node or 'unknown'}"
        return f"store {self.name!r}, {place}"


@dataclass(frozen=True)
class ShardHealth:
    """A shard's state."""

    shard: int
    #: whether it answered and has opened the checkpoint
    ok: bool
    #: slots [first, last) of each table
    rows: dict[str, tuple[int, int]]
    #: its node's address, the last known one if it does not answer
    node: str | None
    pid: int | None = None
    #: requests answered since its start
    served: int = 0
    #: requests that wait or are in progress
    pending: int = 0
    #: number of restarts
    restarts: int = 0
    #: why it is not ok
    error: str | None = None


class Shard:
    """The actor: reads some rows of every table."""

    def __init__(
        self,
        info: Info,
        number: int,
        max_pending: int,
        normalizers: Mapping[str, RowFunction | None] | None,
    ) -> None:
        self._info, self._number, self._max_pending = info, number, max_pending
        self._normalizers = normalizers
        ray = load_ray()
        self._node = ray.util.get_node_ip_address()
        actor = ray.get_runtime_context().get_actor_id()
        # Ray's public interface does not return the number
        self._restarts = int(ray._private.state.actors(actor_id=actor)["NumRestarts"])
        # lookups do not wait for a search, which reads all rows
        requests = ("lookup", "search", "ids_of", "labels_of")
        self._threads = {name: ThreadPoolExecutor(1) for name in requests}
        self._pending = self._served = 0
        self._store: Store | None = None
        with suppress(ShardUnavailableError):  # each request tries again
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
        """Return the shard's state, even when its queue is full."""
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
        """Return the service's metadata."""
        return self._info

    async def ask(self, key: tuple[str, int], what: str, *arguments: Any) -> Any:
        """Answer a request; ShardBusyError if too many wait."""
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
            loop, function = asyncio.get_running_loop(), getattr(self, f"_{what}")
            answer = await loop.run_in_executor(self._threads[what], function, *arguments)
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
        slots = self._info.rows(self._number)[prefix]
        excluded = None if exclude is None else torch.tensor(exclude)
        scores, ids = table.best(scores_of(vectors, metric), k, excluded, len(vectors), slots)
        return scores.numpy(), ids.numpy()

    def _ids_of(self, prefix: str, labels: list[str]) -> np.ndarray:
        return self._opened()[prefix]._ids_of(labels)

    def _labels_of(self, prefix: str, ids: np.ndarray) -> list[list[str]]:
        return self._opened()[prefix]._labels_of(torch.tensor(ids))


def _bytes(x: Tensor) -> np.ndarray:
    """As bytes: numpy lacks some dtypes, and Ray moves arrays without a copy."""
    return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def _tensor(memory: np.ndarray, dtype: torch.dtype) -> Tensor:
    """A copy, because Ray's memory is read-only."""
    return torch.tensor(memory).view(dtype)


class ServedTable(Table):
    """A table whose rows a service's shards hold."""

    def __init__(self, client: "Client", prefix: str) -> None:
        info = client.info.tables[prefix]
        self.name, self.max_id, self.shape = info.name, info.max_id, info.shape
        self.dtype, self.path = info.dtype, client.info.path
        self._client, self._prefix, self._info = client, prefix, info
        ends = [client.info.rows(shard)[prefix][1] for shard in range(client.info.shards)]
        self._ends = np.array(ends[:-1], dtype=np.int64)

    @property
    def labelled(self) -> bool:
        """Whether the service has labels for it."""
        return self._info.labelled

    def _ids_of(self, labels: list[str]) -> np.ndarray:
        starts = range(0, len(labels), _LABELS)
        parts = (labels[start : start + _LABELS] for start in starts)
        ask = self._client._ask_any
        return np.concatenate([ask("ids_of", self._prefix, part) for part in parts])

    def _labels_of(self, ids: Tensor) -> list[list[str]]:
        parts = ids.split(max(1, _LABELS // max(1, ids.shape[1])))
        ask = self._client._ask_any
        return [line for part in parts for line in ask("labels_of", self._prefix, part.numpy())]

    def _look_up(self, ids: Tensor, raw: bool) -> Tensor:
        slots = self._info.order.slots(ids).numpy()
        # numpy: torch's threads would compete with local shards
        owner, sent = np.searchsorted(self._ends, slots, side="right"), ids.numpy()
        owned = [np.flatnonzero(owner == shard) for shard in range(self._client.info.shards)]
        width = math.prod(self.shape)
        step = max(1, _REQUEST // max(1, width * self.dtype.itemsize))
        out = torch.empty(len(ids), width, dtype=self.dtype)
        for start in range(0, max(map(len, owned)), step):
            places = {
                shard: rows[start : start + step]
                for shard, rows in enumerate(owned)
                if start < len(rows)
            }
            requests = {
                shard: ("lookup", self._prefix, sent[rows], raw) for shard, rows in places.items()
            }
            for shard, (memory, dtype) in self._client._ask(requests).items():
                if dtype != out.dtype:  # a custom normalizer's dtype
                    out = out.to(dtype)
                _place(out, places[shard], memory)
        return out.reshape(-1, *self.shape)

    def _search(
        self, vectors: Tensor, k: int, metric: Metric, exclude: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        step = max(1, _REQUEST // max(1, vectors[:1].nbytes, 16 * min(k, self.max_id)))
        best: list[tuple[Tensor, Tensor]] = []
        for start in range(0, max(1, len(vectors)), step):
            part = vectors[start : start + step]
            excluded = None if exclude is None else exclude[start : start + step].numpy()
            request = ("search", self._prefix, (_bytes(part), part.dtype), k, metric, excluded)
            answers = self._client._ask(dict.fromkeys(range(self._client.info.shards), request))
            columns = zip(*answers.values(), strict=True)
            scores, ids = (torch.tensor(np.concatenate(parts, 1)) for parts in columns)
            best.append(best_of(scores, ids, k))
        scores, ids = (torch.cat(parts) for parts in zip(*best, strict=True))
        return scores, ids


def _place(out: Tensor, places: np.ndarray, memory: np.ndarray) -> None:
    if not memory.size:
        return
    row = np.dtype((np.void, out.shape[1] * out.itemsize))  # copies whole rows
    out.view(torch.uint8).numpy().view(row)[:, 0][places] = memory.view(row)


class Client(Tables[ServedTable]):
    """Reads a service's tables; :func:`connect` makes one.

    It can be pickled into tasks of any job, and threads can share it.

    Attributes:
        info: the service's metadata.
        timeout_s: seconds for a round of requests; a call needs one, two with labels, more for very
            many ids.
        wait_s: seconds that a call retries shards that are down or full; 0 raises at once.
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
        """Return all shards' states; a shard that does not answer in time is not ok."""
        shards, start = range(self.info.shards), time.monotonic()
        states = dict(
            self._round(shards, lambda actor, shard: actor.health.remote(), start, timeout_s)
        )
        for shard, state in states.items():
            if isinstance(state, ShardHealth):
                self._nodes[shard] = state.node
            else:
                rows, node = self.info.rows(shard), self._nodes.get(shard)
                states[shard] = ShardHealth(shard, False, rows, node, error=str(state))
        return [states[shard] for shard in shards]

    def _handle(self, shard: int) -> Any:
        if shard not in self._handles:
            name = f"{self.info.name}/{shard}"
            try:
                self._handles[shard] = _connected().get_actor(name, namespace=NAMESPACE)
            except ValueError:
                raise self._unavailable(shard, "there is no such actor") from None
        return self._handles[shard]

    def _unavailable(self, shard: int, why: str) -> ShardUnavailableError:
        return ShardUnavailableError(
            f"{self.info.who(shard, self._nodes.get(shard))}: {why}: a shard comes back by itself"
            f" while its service runs, so wait longer (wait_s={self.wait_s:g},"
            f" timeout_s={self.timeout_s:g}), look at health(), or serve {self.path} anew"
        )

    def _ask_any(self, *request: Any) -> Any:
        (answer,) = self._ask({random.randrange(self.info.shards): request}).values()
        return answer

    def _ask(self, requests: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        key, start, pause = (self.info.digest, self.info.shards), time.monotonic(), 0.02

        def send(actor: Any, shard: int) -> Any:
            return actor.ask.remote(key, *requests[shard])

        answers: dict[int, Any] = {}
        while True:
            failed: RuntimeError | None = None
            left = requests.keys() - answers.keys()
            for shard, answer in self._round(left, send, start, self.timeout_s):
                if isinstance(answer, ShardBusyError | ShardUnavailableError):
                    failed = answer
                else:
                    answers[shard] = answer
            if failed is None:
                return dict(sorted(answers.items()))
            if time.monotonic() + pause > start + min(self.wait_s, self.timeout_s):
                raise failed
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def _round(
        self, shards: Iterable[int], send: Callable[[Any, int], Any], start: float, seconds: float
    ) -> Iterator[tuple[int, Any]]:
        """Call shards' actors; yield each shard's answer, or why it has none."""
        ray, sent = _connected(), {}
        for shard in shards:
            try:
                sent[shard] = send(self._handle(shard), shard)
            except ShardUnavailableError as error:
                yield shard, error
        for shard, reference in sent.items():
            left = max(0.0, start + seconds - time.monotonic())
            try:
                yield shard, ray.get(reference, timeout=left)
            except ray.exceptions.GetTimeoutError:
                yield shard, self._unavailable(shard, f"got no answer within {seconds:g} s")
            except ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, ShardBusyError | ShardUnavailableError):
                    raise error.cause from error
                yield shard, error.cause
            except ray.exceptions.RayError as error:
                self._handles.pop(shard, None)  # another actor may have taken the name
                why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                yield shard, self._unavailable(shard, why)


def connect(name: str = "shardemb", *, timeout_s: float = 60.0, wait_s: float = 30.0) -> Client:
    """Return a client of the service with this name, from any job of the cluster.

    Args:
        name: the service's name.
        timeout_s: see :class:`Client`.
        wait_s: see :class:`Client`.

    Raises:
        ValueError: this process is not connected to Ray, or no service has this name.
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
    limit = max(wait_s, 1.0)
    end = time.monotonic() + limit
    while True:
        try:
            info = ray.get(handle.info.remote(), timeout=max(0.0, end - time.monotonic()))
            break
        except ray.exceptions.RayError as error:
            if time.monotonic() + 0.5 > end:
                raise ShardUnavailableError(
                    f"store {name!r}, shard 0: {type(error).__name__}: it did not answer within"
                    f" {limit:g} s: try again, or serve anew"
                ) from None
            time.sleep(0.5)
    client = Client(info, timeout_s, wait_s)
    client.health()  # errors can then name the nodes
    return client


def _names() -> list[str]:
    actors = load_ray().util.list_named_actors(all_namespaces=True)
    names = {actor["name"] for actor in actors if actor["namespace"] == NAMESPACE}
    return sorted({name.rpartition("/")[0] for name in names})


def _connected() -> Any:
    ray = load_ray()
    if not ray.is_initialized():  # get_actor would connect to any cluster
        raise InputError(
            "got no connection to Ray, expected one: with shardemb.launch.ray.connected('auto'), or"
            " HOST:PORT"
        )
    return ray


class Service:
    """The shards that this process started; they live until :meth:`stop` or its end.

    Attributes:
        info: the service's metadata.
    """

    def __init__(self, info: Info, handles: list[Any]) -> None:
        self.info, self._handles = info, handles

    def client(self, *, timeout_s: float = 60.0, wait_s: float = 30.0) -> Client:
        """Return a client, as :func:`connect` does."""
        return connect(self.info.name, timeout_s=timeout_s, wait_s=wait_s)

    def stop(self) -> None:
        """Stop the shards, and wait up to 10 seconds until their names are free."""
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

    def __exit__(self, *error: object) -> None:
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
    """Serve a checkpoint from row shards, Ray actors spread over the nodes.

    Needs a connection to Ray (:func:`shardemb.launch.ray.connected`), and the checkpoint under the
    same path on every node.

    Args:
        path: a checkpoint or run folder, as for :func:`shardemb.open_store`.
        shards: number of actors, at most the rows of the largest table.
        name: for :func:`connect`.
        normalizers: as for :func:`shardemb.open_store`.
        max_pending: most waiting requests of a shard; it refuses more, and clients retry.
        resources: a shard's options as a Ray actor; None for ``{"num_cpus": 1}``.
        timeout_s: seconds that the shards may take to start.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ValueError: an argument is out of range, the path remote, the name in use, or Ray not
            connected.
        ShardUnavailableError: a shard did not start in time, or cannot read the checkpoint.
    """
    ray = _connected()
    if not name or "/" in name:
        raise InputError(f"got name {name!r}, expected one without '/'")
    if max_pending < 1:
        raise InputError(f"got max_pending={max_pending}, expected at least 1")
    # workers have another working directory
    store = open_store(path if "://" in str(path) else Path(path).resolve(), normalizers)
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
        prefix: TableInfo(t.name, t.max_id, t.shape, t.dtype, t.order, t.labelled)
        for prefix, t in store.tables.items()
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
            except ray.exceptions.RayError as error:  # shardemb is missing there, or differs
                why = f"{info.who(shard, None)}: did not start: {error}"
                raise ShardUnavailableError(why) from error
            if not health.ok:
                raise ShardUnavailableError(health.error)
    except BaseException:
        service.stop()
        raise
    return service
