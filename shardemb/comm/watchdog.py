"""Ends a rank whose peer has died, stopped, raised or run out of data, with a named error.

gloo reports a lost connection without naming the peer, and does not detect a stopped peer. So each
process group has an alarm in its store, set by a rank whose collective fails or exceeds the
timeout. A thread on every rank reads it four times a second and answers with the rank's state. A
rank that raised or ended has left a notice; one without answer or notice is dead or stopped.
Waiting ranks read the alarm too, so all end together.
"""

import atexit
import ctypes
import json
import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch.distributed as dist

from shardemb.exceptions import InputError, PeerFailureError, WorkerError, restart_may_help

#: seconds between two reads of the alarm
_LOOK = 0.25
#: seconds that a wait polls before it sleeps
_SPIN = 0.002
#: seconds in which a live rank answers an alarm
_GRACE = 1.0
#: seconds after which a waiting rank checks whether others have ended
_LATE = 1.0
#: equal reads in a row that prove that all others have ended or wait
_SURE = 3
#: failed reads in a row before the watchdog gives up
_FAILURES = 240

_timeout = float(os.environ.get("SHARDEMB_TIMEOUT", "300"))
_step = 0


def set_timeout(seconds: float) -> None:
    """Set the seconds that a collective may take; by default 300, or ``SHARDEMB_TIMEOUT``.

    Raises:
        ValueError: not above 0.
    """
    global _timeout
    if not seconds > 0:
        raise InputError(f"got a timeout of {seconds} seconds, expected more than 0")
    _timeout = float(seconds)


def timeout() -> float:
    """Return the seconds that a collective may take."""
    return _timeout


def at_step(step: int) -> None:
    """Set the number of the next training step, for errors."""
    global _step
    _step = step


def step() -> int:
    """Return the number of the training step."""
    return _step


@dataclass(eq=False)
class PeerWatchdog:
    """The alarm of one process group.

    ``ranks`` are its members' ranks in the default group, ``store`` is a client of this rank alone,
    ``slices`` says whether waits can have a timeout, as gloo's.
    """

    group: Any
    ranks: list[int]
    store: Any
    slices: bool
    #: what this rank waits in, and since when
    operation: str = ""
    since: float = 0.0
    #: whether the alarm is set, or the store is gone
    alarmed: bool = False
    #: when this rank read it
    alarmed_at: float = math.inf
    #: whether some ranks have ended, and all others wait
    deserted: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.rank = dist.get_rank()
        self.others = [rank for rank in self.ranks if rank != self.rank]
        self._leaves = threading.Event()
        self._thread = threading.Thread(target=self._look, name="shardemb-watchdog", daemon=True)
        self._thread.start()
        _looking.add(self)

    def _look(self) -> None:
        failures, announced, previous, times = 0, "", {}, 0  # type: int, str, dict[int, str], int
        while not self.alarmed and failures < _FAILURES:
            try:
                if self._read("alarm", [None]):
                    self._set(f"answer/{self.rank}", self._state())
                    self.alarmed_at, self.alarmed = time.monotonic(), True
                    return
                waits_for, since = f"{self.operation} {self.since}", self.since
                late = bool(self.operation) and time.monotonic() - since > _LATE
                if (late and announced != waits_for) or (announced and not late):
                    announced = waits_for if late else ""
                    self._set(f"waits/{self.rank}", announced)
                ended = self._read("ended", self.others) if late else {}
                waits = self._read("waits", set(self.others) - ended.keys()) if ended else {}
                everyone = len(ended) + len(waits) == len(self.others)
                sure = bool(ended) and everyone and all(waits.values())
                times = times + 1 if sure and waits == previous else int(sure)
                previous, self.deserted = waits, times >= _SURE and since == self.since
                failures = 0
            except dist.DistNetworkError:  # the rank that hosts the store is gone
                self.alarmed = True
            except Exception:
                failures += 1
            if self._leaves.wait(_LOOK):
                return

    def leave(self) -> None:
        """Stop the thread; a request to the store at exit aborts the process."""
        self._leaves.set()
        self._thread.join(_GRACE)

    def _state(self) -> str:
        return json.dumps({"step": _step, "operation": self.operation})

    def _set(self, key: str, text: str) -> None:
        with self._lock:
            self.store.set(key, text)

    def _read(self, kind: str, ranks: Iterable[int | None]) -> dict[Any, str]:
        keys = {rank: kind if rank is None else f"{kind}/{rank}" for rank in ranks}
        with self._lock:
            return {
                rank: self.store.get(key).decode()
                for rank, key in keys.items()
                if self.store.check([key])
            }

    def notice(self, kind: str, text: str, alarm: bool = False) -> None:
        """Leave a notice for the other ranks, if the store answers."""

        def leave() -> None:
            self._set(f"{kind}/{self.rank}", text)
            if alarm:
                self._set("alarm", "")

        _within(_GRACE, leave)

    def wait(self, work: Any, operation: str) -> None:
        """Wait for a collective; PeerFailureError if it fails or exceeds the timeout."""
        self.operation, self.since, self.deserted = operation, time.monotonic(), False
        # poll first: on virtual cores, a sleeping thread wakes up to 0.3 ms late
        if self.slices:
            soon = self.since + _SPIN
            while not work.is_completed() and time.monotonic() < soon:
                os.sched_yield()
        while True:
            # a collective that completes after a slice still returns its own result
            whole = not self.slices or work.is_completed()
            try:
                work.wait() if whole else work.wait(_SLICE)
            except RuntimeError as error:
                waited = time.monotonic() - self.since
                if whole:  # the library has given up
                    raise self.failure(str(error), lost=waited < _timeout) from error
                if work.is_completed():
                    continue
                if self.alarmed or self.deserted or waited >= _timeout:
                    raise self.failure("no answer", lost=False) from None
            else:
                self.operation = ""
                return

    def failure(self, why: str, lost: bool) -> PeerFailureError:
        """Set the alarm, wait for answers, and return an error that names the failed rank."""
        seconds, operation, own_step = time.monotonic() - self.since, self.operation, _step
        heard: dict[str, dict[int, str]] = {"raised": {}, "ended": {}, "answer": {}}
        raised, ended, answers = heard.values()

        def inquire() -> bool:
            self._set("alarm", "")
            self._set(f"answer/{self.rank}", self._state())
            deadline = min(time.monotonic(), self.alarmed_at) + _GRACE
            while True:
                for kind, by_rank in heard.items():
                    by_rank |= self._read(kind, self.others)
                if raised or {*answers, *ended} >= {*self.others} or time.monotonic() > deadline:
                    return True
                time.sleep(0.05)

        answered = _within(_GRACE + 0.4, inquire)
        # keep the group: its destructor would wait forever
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.group))
        states = {rank: json.loads(text) for rank, text in answers.items()}
        silent = [rank for rank in self.others if rank not in answers and rank not in ended]
        own_state = {"step": own_step, "operation": operation}
        elsewhere = [rank for rank, state in states.items() if state != own_state]
        rank = self.others[0]
        if raised:
            rank = min(raised)
            what = f"raised {json.loads(raised[rank])['text']}"
        elif not answered:
            what = "has stopped or died, as far as can be seen: the store does not answer"
        elif silent:
            rank = silent[0]
            what = f"has {'' if lost else 'stopped or '}died: it does not answer"
        elif ended:
            rank = min(ended)
            what = f"has ended {ended[rank]}, while others go on: did it run out of data?"
        elif elsewhere:
            rank = elsewhere[0]
            its_step, its_operation = states[rank]["step"], states[rank]["operation"]
            what = f"is elsewhere, in step {its_step}, {its_operation or 'no collective'}"
        else:
            what = f"is in the same operation, which failed: {why[:200]}"
        return PeerFailureError(
            f"rank {rank} {what}; rank {self.rank} waited {seconds:.1f} s for it in step"
            f" {own_step}, {operation}",
            rank=rank,
            step=own_step,
            operation=operation,
            seconds=seconds,
        )


def _within(seconds: float, function: Callable[[], Any]) -> bool:
    done: list[Any] = []

    def run() -> None:
        with suppress(Exception):
            done.append(function())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(done)


_SLICE = timedelta(seconds=_LOOK)
_watchdogs: dict[Any, PeerWatchdog] = {}
#: includes those of groups no longer in use
_looking: WeakSet[PeerWatchdog] = WeakSet()
_begun: Counter[str] = Counter()


def watch(group: Any) -> PeerWatchdog:
    """Return a group's watchdog, started at first use; None for the default group."""
    key = dist.group.WORLD if group is None else group
    watchdog = _watchdogs.get(key)
    return watchdog if watchdog is not None else _begin(key)


def _begin(group: Any) -> PeerWatchdog:
    # a store may keep keys of a failed attempt (torchrun), or of an earlier group
    name = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}-{group.group_name}"
    _begun[name] += 1
    default: Any = dist.distributed_c10d._get_default_store()
    store = dist.PrefixStore(f"shardemb-{name}-{_begun[name]}", default.clone())
    store.set_timeout(timedelta(seconds=2 * _GRACE))
    _hook_in()
    ranks, slices = dist.get_process_group_ranks(group), dist.get_backend(group) == "gloo"
    _watchdogs[group] = PeerWatchdog(group, ranks, store, slices)
    return _watchdogs[group]


def forget(group: Any) -> None:
    """Stop the watchdog of a group no longer in use."""
    watchdog = _watchdogs.pop(group, None)
    if watchdog is not None:
        watchdog.alarmed = True  # ends its thread
    _unhook()


#: the previous hook; None while ours is not installed
_next_hook: Callable[..., Any] | None = None


def _hook_in() -> None:
    """An excepthook, because at exit Python first waits for threads, which may wait for ranks."""
    global _next_hook
    if _next_hook is None:
        _next_hook, sys.excepthook = sys.excepthook, _on_error
    atexit.unregister(_leave)
    atexit.register(_leave)


def _unhook() -> None:
    global _next_hook
    # a later hook may call ours
    if not _watchdogs and sys.excepthook is _on_error and _next_hook is not None:
        sys.excepthook, _next_hook = _next_hook, None


def _on_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    hook = _next_hook or sys.__excepthook__
    report(error)
    hook(kind, error, trace)


def report(error: BaseException) -> None:
    """Report this rank's exception to the other ranks."""
    if not isinstance(error, PeerFailureError):
        text = f"{type(error).__name__}: {str(error)[:300]} (step {_step})"
        notice = json.dumps({"text": text, "restart_may_help": restart_may_help(error)})
        for watchdog in _watchdogs.values():
            watchdog.notice("raised", notice, alarm=True)
    _watchdogs.clear()
    _unhook()


def raised_elsewhere() -> WorkerError | None:
    """Return the exception reported by another rank; for launchers."""
    watchdog = _of_default_group()
    notices: dict[int, str] = {}
    if watchdog is not None:
        _within(_GRACE, lambda: notices.update(watchdog._read("raised", watchdog.others)))
    if not notices:
        return None
    rank = min(notices)
    notice = json.loads(notices[rank])
    name, _, text = notice["text"].partition(": ")
    return WorkerError(rank, name, text, restart_may_help=notice["restart_may_help"])


def _of_default_group() -> PeerWatchdog | None:
    return _watchdogs.get(dist.group.WORLD) if dist.is_initialized() else None


def _end() -> None:
    for watchdog in _watchdogs.values():
        watchdog.notice("ended", f"after step {max(0, _step - 1)}")


def _leave() -> None:
    _end()
    for watchdog in list(_looking):
        watchdog.leave()


def finish() -> None:
    """Report this rank's end, and wait for the others'; PeerFailureError if one failed."""
    watchdog = _of_default_group()
    if watchdog is None:
        return
    _end()
    watchdog.operation, watchdog.since = "the end", time.monotonic()
    missing = set(watchdog.others)

    def look() -> None:
        missing.difference_update(watchdog._read("ended", watchdog.others))

    while missing and not (_within(_GRACE, look) and not missing):
        if watchdog.alarmed or time.monotonic() - watchdog.since > _timeout:
            raise watchdog.failure("others have not ended", lost=False)
        time.sleep(0.02)


def attend(fn: Callable[..., Any], *args: Any) -> Any:
    """Run a rank's function, watched until all ranks have ended; for launchers."""
    watch(None)
    result = fn(*args)
    finish()
    return result


@contextmanager
def guarded(group: Any, operation: str) -> Iterator[None]:
    """Turn errors of a library's own collectives into PeerFailureError."""
    watchdog = watch(group)
    watchdog.operation, watchdog.since = operation, time.monotonic()
    try:
        yield
    except RuntimeError as error:
        lost = any(word in str(error) for word in ("gloo", "Connection", "imed out"))
        if lost and not isinstance(error, PeerFailureError):
            in_time = time.monotonic() - watchdog.since < _timeout
            raise watchdog.failure(str(error), lost=in_time) from error
        raise
    watchdog.operation = ""
