"""The store as a service: named Ray actors hold shards of a checkpoint's rows for all jobs.

A shard maps the checkpoint's files into memory and reads its own rows of every table, a block in
the files' order. It keeps nothing else, so one that died returns with what the files hold. A lookup
sends one request to each shard that owns some of the ids; very many ids take several rounds.
"""

import asyncio
import math
import os
import random
import time
from collections.abc import Iterator, Mapping
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
#: bytes of a request, or of its answer
_REQUEST = 1 << 25
#: labels of a request
_LABELS = 1 << 16
#: calls that a shard answers beside those that wait: refusals and health
_SPARE = 100


@dataclass(frozen=True)
class TableInfo:
    """What a client knows of a table."""

    name: str
    max_id: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    #: of the rows in the files
    order: RowOrder
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
        """Return a shard's rows ``[first, last)`` of each table, in the order of the files."""
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
    #: it answered, and the checkpoint is open
    ok: bool
    #: rows [first, last) of each table, in the order of the files
    rows: dict[str, tuple[int, int]]
    #: address; the last one known, if it does not answer now
    node: str | None
    pid: int | None = None
    #: requests answered since it started
    served: int = 0
    #: requests that wait or are being answered
    pending: int = 0
    #: how often it was restarted
    restarts: int = 0
    #: why it is not ok
    error: str | None = None


class Shard:
    """The actor: reads some rows of every table on request."""

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
        # was_current_actor_reconstructed reads this, but does not return the number
        self._restarts = int(ray._private.state.actors(actor_id=actor)["NumRestarts"])
        # a search reads all rows of the shard: lookups do not wait for it
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
        """Return the shard's state, also while it is full."""
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
        """Return what is served."""
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
        first, last = self._info.rows(self._number)[prefix]
        excluded = None if exclude is None else torch.tensor(exclude)
        to_score = scores_of(vectors, metric)
        scores, ids = table.best_among(first, last, to_score, k, excluded, len(vectors))
        return scores.numpy(), ids.numpy()

    def _ids_of(self, prefix: str, labels: list[str]) -> np.ndarray:
        return self._opened()[prefix]._ids_of(labels)

    def _labels_of(self, prefix: str, ids: np.ndarray) -> list[list[str]]:
        return self._opened()[prefix]._labels_of(torch.tensor(ids))


def _bytes(x: Tensor) -> np.ndarray:
    """Return a tensor's memory: numpy lacks some dtypes, and Ray moves arrays without a copy."""
    return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def _tensor(memory: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Return a flat tensor with a copy of the memory: Ray's is read-only."""
    return torch.tensor(memory).view(dtype)


class ServedTable(Table):
    """A table whose rows the shards of a service hold."""

    def __init__(self, client: "Client", prefix: str) -> None:
        info = client.info.tables[prefix]
        self.name, self.max_id, self.shape = info.name, info.max_id, info.shape
        self.dtype, self.path = info.dtype, client.info.path
        self._client, self._prefix, self._info = client, prefix, info
        ends = [client.info.rows(shard)[prefix][1] for shard in range(client.info.shards)]
        self._ends = np.array(ends[:-1], dtype=np.int64)

    @property
    def labelled(self) -> bool:
        """Whether the service knows labels."""
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
        # numpy: torch's threads would wait for cores that the shards of this node use
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
                if dtype != out.dtype:  # a normalizer of the user's
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
    """Set ``out[places]`` to rows that came as memory."""
    if not memory.size:
        return
    row = np.dtype((np.void, out.shape[1] * out.itemsize))  # one copy a row
    out.view(torch.uint8).numpy().view(row)[:, 0][places] = memory.view(row)


class Client(Tables[ServedTable]):
    """Reads what a service holds; see :func:`connect`.

    It may be pickled into tasks of any job, and used by several threads.

    Attributes:
        info: what is served.
        timeout_s: seconds that a round of requests may take; a call of ordinary size is one round,
            or two with labels.
        wait_s: seconds that a call waits for a shard that is down or full; 0 to raise at once.
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
        """Ask all shards for their state; one that does not answer in time is not ok."""
        ray, end, states = _connected(), time.monotonic() + timeout_s, []
        sent: dict[int, Any] = {}
        for shard in range(self.info.shards):
            with suppress(ShardUnavailableError):
                sent[shard] = self._handle(shard).health.remote()
        for shard in range(self.info.shards):
            try:
                if shard not in sent:
                    raise self._unavailable(shard, "there is no such actor")
                state = ray.get(sent[shard], timeout=max(0.0, end - time.monotonic()))
                self._nodes[shard] = state.node
            except (ShardUnavailableError, ray.exceptions.RayError) as error:
                self._handles.pop(shard, None)
                text = str(error).splitlines()[0] if str(error) else type(error).__name__
                rows, node = self.info.rows(shard), self._nodes.get(shard)
                state = ShardHealth(shard, False, rows, node, error=text)
            states.append(state)
        return states

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
        """Send some shards a request each, again if they are down or full; return the answers."""
        start, pause = time.monotonic(), 0.02
        answers: dict[int, Any] = {}
        while True:
            failed: RuntimeError | None = None
            left = {shard: requests[shard] for shard in requests.keys() - answers.keys()}
            for shard, answer in self._round(left, start + self.timeout_s):
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
        self, requests: Mapping[int, tuple[Any, ...]], end: float
    ) -> Iterator[tuple[int, Any]]:
        """Send each shard its request at once; yield its answer, or why to ask it again."""
        ray, sent = _connected(), {}
        key = self.info.digest, self.info.shards
        for shard, request in requests.items():
            try:
                sent[shard] = self._handle(shard).ask.remote(key, *request)
            except ShardUnavailableError as error:
                yield shard, error
        for shard, reference in sent.items():
            try:
                yield shard, ray.get(reference, timeout=max(0.0, end - time.monotonic()))
            except ray.exceptions.GetTimeoutError:
                why = f"got no answer within {self.timeout_s:g} s"
                raise self._unavailable(shard, why) from None
            except ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, ShardBusyError | ShardUnavailableError):
                    raise error.cause from error
                yield shard, error.cause
            except ray.exceptions.RayError as error:
                self._handles.pop(shard, None)  # the name may be another actor's by now
                why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                yield shard, self._unavailable(shard, why)


def connect(name: str = "shardemb", *, timeout_s: float = 60.0, wait_s: float = 30.0) -> Client:
    """Find a service by its name, from any job of the cluster.

    A call asks a shard that is down (it died and is starting) or full (``max_pending`` requests
    wait there) again until ``wait_s`` have passed.

    Args:
        name: of the service.
        timeout_s: see :class:`Client`.
        wait_s: see :class:`Client`.

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
    client.health()  # so that errors can name the nodes
    return client


def _names() -> list[str]:
    actors = load_ray().util.list_named_actors(all_namespaces=True)
    names = {actor["name"] for actor in actors if actor["namespace"] == NAMESPACE}
    return sorted({name.rpartition("/")[0] for name in names})


def _connected() -> Any:
    ray = load_ray()
    if not ray.is_initialized():  # get_actor would connect to any cluster that it finds
        raise InputError(
            "got no connection to Ray, expected one: with shardemb.launch.ray.connected('auto'), or"
            " HOST:PORT"
        )
    return ray


class Service:
    """The shards that this process has started; they live until :meth:`stop`, or as long as it.

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
        path: a checkpoint or run folder, as for :func:`shardemb.open_store`.
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
            except ray.exceptions.RayError as error:  # another version of this package, or none
                why = f"{info.who(shard, None)}: did not start: {error}"
                raise ShardUnavailableError(why) from error
            if not health.ok:
                raise ShardUnavailableError(health.error)
    except BaseException:
        service.stop()
        raise
    return service
