"""What ends a rank whose peer has died, stopped, raised, or run out of data.

An error that says so, instead of a hang.

gloo tells that a connection was lost, not whose, and of a stopped peer nothing at all. So each
group of ranks has an alarm in the store of its process group. A rank whose collective fails, or
takes longer than the timeout, rings it; a thread on every rank looks at it four times a second and
answers with what the rank does. Who raised or ended has left a notice there; who does not answer is
dead or stopped. The ranks that wait look at the alarm too, so that all of them end together.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch.distributed as dist

from shardemb.exceptions import InputError, PeerFailureError, WorkerError, restart_may_help

#: seconds between two looks at the alarm
_LOOK = 0.25
#: seconds in which a wait asks again and again before it sleeps
_SPIN = 0.002
#: seconds in which a live rank answers an alarm
_GRACE = 1.0
#: seconds after which a rank that waits looks whether others have ended
_LATE = 1.0
#: looks at which all others must have ended or wait for the same as before, so that nobody will
#: ever come
_SURE = 3
#: looks in a row that may fail before the watch ends; a store may be slow
_FAILURES = 240

_timeout = float(os.environ.get("SHARDEMB_TIMEOUT", "300"))
_step = 0


def set_timeout(seconds: float) -> None:
    """Set how many seconds a collective may take, 300 by default (or ``SHARDEMB_TIMEOUT``).

    ValueError unless above 0.
    """
    global _timeout
    if not seconds > 0:
        raise InputError(f"got a timeout of {seconds} seconds, expected more than 0")
    _timeout = float(seconds)


def timeout() -> float:
    """Return how many seconds a collective may take."""
    return _timeout


def at_step(step: int) -> None:
    """Tell which training step follows, for errors; :class:`~shardemb.Coordinator` does."""
    global _step
    _step = step


def step() -> int:
    """Return the training step that this rank is in."""
    return _step


@dataclass(eq=False)
class PeerWatchdog:
    """The alarm of one process group.

    Args:
        group: the process group.
        ranks: its members, by their ranks in the default group.
        store: a client of this rank's own.
        slices: whether waits for its collectives can be cut in slices, as gloo's can.
    """

    group: Any
    ranks: list[int]
    store: Any
    slices: bool
    #: what this rank waits in, and since when
    operation: str = ""
    since: float = 0.0
    #: whether somebody has rung the alarm, or the store is gone
    alarmed: bool = False
    #: when this rank saw it
    alarmed_at: float = math.inf
    #: whether some ranks have ended, and all others wait
    deserted: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.rank = dist.get_rank()
        self.others = [rank for rank in self.ranks if rank != self.rank]
        self._leaves = threading.Event()
        self._thread = threading.Thread(target=self._look, name="shardemb-watch", daemon=True)
        self._thread.start()
        _looking.add(self)

    def _look(self) -> None:
        failures, said, seen, times = 0, "", {}, 0  # type: int, str, dict[int, str], int
        while not self.alarmed and failures < _FAILURES:
            try:
                if self._told("alarm", [None]):
                    self._set(f"answer/{self.rank}", self._state())
                    self.alarmed_at, self.alarmed = time.monotonic(), True
                    return
                now, since = f"{self.operation} {self.since}", self.since
                late = bool(self.operation) and time.monotonic() - since > _LATE
                if (late and said != now) or (said and not late):
                    said = now if late else ""
                    self._set(f"waits/{self.rank}", said)
                ended = self._told("ended", self.others) if late else {}
                waits = (
                    self._told("waits", [rank for rank in self.others if rank not in ended])
                    if ended
                    else {}
                )
                sure = (
                    bool(ended)
                    and len(ended) + len(waits) == len(self.others)
                    and all(waits.values())
                )
                times = times + 1 if sure and waits == seen else int(sure)
                seen, self.deserted = waits, times >= _SURE and since == self.since
                failures = 0
            except dist.DistNetworkError:  # the store is gone, with the rank that held it
                self.alarmed = True
            except Exception:
                failures += 1
            if self._leaves.wait(_LOOK):
                return

    def leave(self) -> None:
        """Look no more.

        A thread that is in the store when the interpreter ends would abort the process.
        """
        self._leaves.set()
        self._thread.join(_GRACE)

    def _state(self) -> str:
        return json.dumps({"step": _step, "operation": self.operation})

    def _set(self, key: str, text: str) -> None:
        with self._lock:
            self.store.set(key, text)

    def _told(self, kind: str, ranks: Sequence[int | None]) -> dict[Any, str]:
        """Return what ranks have left under a kind of key; None stands for a key without a rank."""
        keys = {rank: kind if rank is None else f"{kind}/{rank}" for rank in ranks}
        with self._lock:
            return {
                rank: self.store.get(key).decode()
                for rank, key in keys.items()
                if self.store.check([key])
            }

    def notice(self, kind: str, text: str, alarm: bool = False) -> None:
        """Leave word for the others, if the store still answers."""

        def leave() -> None:
            self._set(f"{kind}/{self.rank}", text)
            if alarm:
                self._set("alarm", "")

        _within(_GRACE, leave)

    def wait(self, work: Any, operation: str) -> None:
        """Return when a collective is done.

        Raises:
            PeerFailureError: it cannot be done any more, or takes longer than the timeout.
        """
        self.operation, self.since, self.deserted = operation, time.monotonic(), False
        # a sleeping thread wakes late where a machine's cores are virtual: 0.3 ms for each nap
        if self.slices:
            soon = self.since + _SPIN
            while not work.is_completed() and time.monotonic() < soon:
                os.sched_yield()
        while True:
            # it may complete between the end of a slice and this question, so that it is asked for
            # its own result
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
        """Ring the alarm, hear the others, and return what has happened.

        Args:
            why: what the collective said.
            lost: a connection was lost.
        """
        seconds, operation, here = time.monotonic() - self.since, self.operation, _step
        heard: dict[str, dict[int, str]] = {"raised": {}, "ended": {}, "answer": {}}
        raised, ended, answers = heard.values()

        def inquire() -> bool:
            self._set("alarm", "")
            self._set(f"answer/{self.rank}", self._state())
            deadline = min(time.monotonic(), self.alarmed_at) + _GRACE
            while True:
                for kind, found in heard.items():
                    found |= self._told(kind, self.others)
                if raised or {*answers, *ended} >= {*self.others} or time.monotonic() > deadline:
                    return True
                time.sleep(0.05)

        answered = _within(_GRACE + 0.4, inquire)
        # the group's destructor would wait for operations that nobody ends any more, and this
        # process could not exit
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.group))
        silent = [rank for rank in self.others if rank not in answers and rank not in ended]
        differ = [
            rank
            for rank in answers
            if json.loads(answers[rank]) != {"step": here, "operation": operation}
        ]
        if raised:
            rank, what = min(raised), f"raised {json.loads(raised[min(raised)])['text']}"
        elif not answered:
            rank, what = (
                self.others[0],
                "has stopped or died, as far as can be told: the store does not answer",
            )
        elif silent:
            rank, what = (
                silent[0],
                (
                    "has died: it does not answer"
                    if lost
                    else "has stopped or died: it does not answer"
                ),
            )
        elif ended:
            rank, what = (
                min(ended),
                f"has ended {ended[min(ended)]}, while others go on: did it run out of data?",
            )
        elif differ:
            told = json.loads(answers[differ[0]])
            rank, what = (
                differ[0],
                f"is elsewhere, in step {told['step']}, {told['operation'] or 'no collective'}",
            )
        else:
            rank, what = self.others[0], f"is in the same operation, which failed: {why[:200]}"
        return PeerFailureError(
            f"rank {rank} {what}; rank {self.rank} waited {seconds:.1f} s for it in step {here},"
            f" {operation}",
            rank=rank,
            step=here,
            operation=operation,
            seconds=seconds,
        )


def _within(seconds: float, function: Callable[[], Any]) -> bool:
    """Run a function, which may hang; return whether it has come to a good end in this time."""
    done: list[Any] = []

    def run() -> None:
        with suppress(Exception):
            done.append(function())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(done)


_SLICE = timedelta(seconds=_LOOK)
_watches: dict[Any, PeerWatchdog] = {}
#: also those of groups that are not used any more
_looking: WeakSet[PeerWatchdog] = WeakSet()
_begun: Counter[str] = Counter()


def watch(group: Any) -> PeerWatchdog:
    """Return the watch of a process group, None for the default one.

    It begins when it is first asked for.
    """
    key = dist.group.WORLD if group is None else group
    found = _watches.get(key)
    return found if found is not None else _begin(key)


def _begin(group: Any) -> PeerWatchdog:
    # a store may keep the keys of an attempt that failed, as torchrun's does, or of an earlier
    # group of the same name
    name = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}-{group.group_name}"
    _begun[name] += 1
    default: Any = dist.distributed_c10d._get_default_store()
    store = dist.PrefixStore(f"shardemb-{name}-{_begun[name]}", default.clone())
    store.set_timeout(timedelta(seconds=2 * _GRACE))
    _leave_word()
    ranks, slices = dist.get_process_group_ranks(group), dist.get_backend(group) == "gloo"
    _watches[group] = PeerWatchdog(group, ranks, store, slices)
    return _watches[group]


def forget(group: Any) -> None:
    """End the watch of a group that is not used any more."""
    found = _watches.pop(group, None)
    if found is not None:
        found.alarmed = True  # which ends its thread


def _leave_word() -> None:
    """Let the end of this process be known to the others, whether by an exception or not."""
    global _has_left_word
    if _has_left_word:
        return
    _has_left_word = True
    hook = sys.excepthook

    def on_error(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        report(error)
        hook(kind, error, trace)

    sys.excepthook = on_error
    atexit.register(_leave)


_has_left_word = False


def report(error: BaseException) -> None:
    """Tell the other ranks that this one has raised.

    For a launcher that catches what a rank raises.
    """
    if not isinstance(error, PeerFailureError):
        for each in _watches.values():
            text = f"{type(error).__name__}: {str(error)[:300]} (step {_step})"
            told = {"text": text, "restart_may_help": restart_may_help(error)}
            each.notice("raised", json.dumps(told), alarm=True)
    _watches.clear()


def raised_elsewhere() -> WorkerError | None:
    """Return what another rank of the default group has raised; for a launcher."""
    found = _watches.get(dist.group.WORLD) if dist.is_initialized() else None
    heard: dict[int, str] = {}
    if found is not None:
        _within(_GRACE, lambda: heard.update(found._told("raised", found.others)))
    if not heard:
        return None
    told = json.loads(heard[min(heard)])
    name, _, text = told["text"].partition(": ")
    return WorkerError(min(heard), name, text, restart_may_help=told["restart_may_help"])


def _end() -> None:
    for each in _watches.values():
        each.notice("ended", f"after step {max(0, _step - 1)}")


def _leave() -> None:
    _end()
    for each in list(_looking):
        each.leave()


def finish() -> None:
    """Tell the other ranks that this one has ended, and wait until they have.

    For a launcher, when a rank's work is done.

    Raises:
        PeerFailureError: another rank has failed meanwhile.
    """
    found = _watches.get(dist.group.WORLD) if dist.is_initialized() else None
    if found is None:
        return
    _end()
    found.operation, found.since = "the end", time.monotonic()
    missing = set(found.others)

    def look() -> None:
        missing.difference_update(found._told("ended", found.others))

    while missing and not (_within(_GRACE, look) and not missing):
        if found.alarmed or time.monotonic() - found.since > _timeout:
            raise found.failure("others have not ended", lost=False)
        time.sleep(0.02)


def attend(fn: Callable[..., Any], *args: Any) -> Any:
    """Return what a rank's function returns, watched from its beginning until all ranks have ended.

    For a launcher.

    Raises:
        PeerFailureError: another rank has failed meanwhile.
    """
    watch(None)
    result = fn(*args)
    finish()
    return result


@contextmanager
def guarded(group: Any, operation: str) -> Iterator[None]:
    """Turn the error of a collective that a library makes into PeerFailureError.

    Its waits are the library's own.
    """
    found = watch(group)
    found.operation, found.since = operation, time.monotonic()
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, PeerFailureError) and any(
            word in str(error) for word in ("gloo", "Connection", "imed out")
        ):
            raise found.failure(
                str(error), lost=time.monotonic() - found.since < _timeout
            ) from error
        raise
    found.operation = ""
