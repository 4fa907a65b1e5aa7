"""Every error that this package raises on purpose.

Each class is also the built-in class that Python, PyTorch or PyKEEN would raise there, so both
``except ShardembError`` and ``except ValueError`` work::

    ShardembError
    ├── InputError (ValueError)
    │   ├── NotRowWiseError
    │   └── RanksDisagreeError
    ├── InputTypeError (TypeError)
    │   └── IdTypeError (RuntimeError)
    ├── NotATensorError (AttributeError)
    ├── IdRangeError (IndexError)
    ├── UnknownNameError (KeyError)
    ├── UsageError (RuntimeError)
    ├── OutOfMemoryError (MemoryError)
    ├── NonfiniteError (FloatingPointError)
    ├── MissingExtraError (ModuleNotFoundError)
    ├── CheckpointError (RuntimeError)
    │   ├── OtherDataError
    │   └── NoTableError (AttributeError)
    ├── PeerFailureError (RuntimeError)
    ├── WorkerError (RuntimeError)
    ├── TerminatedError (RuntimeError)
    ├── ShardUnavailableError (RuntimeError)
    └── ShardBusyError (RuntimeError)
"""

import traceback
from dataclasses import dataclass


class ShardembError(Exception):
    """Base of all errors of this package.

    Attributes:
        restart_may_help: whether the same job may succeed when its ranks start again.
        for_user: whether the message alone tells the user what to do; others need a traceback.
    """

    restart_may_help = False
    for_user = True


class InputError(ShardembError, ValueError):
    """An argument, a setting or a file's content that cannot be used."""


class NotRowWiseError(InputError):
    """A constrainer whose result for a row depends on other rows, or on the row's position."""


class RanksDisagreeError(InputError):
    """Ranks were given different arguments, or make different calls."""


class InputTypeError(ShardembError, TypeError):
    """An argument of a wrong type."""


class IdTypeError(InputTypeError, RuntimeError):
    """Ids that are not integers: PyKEEN raises RuntimeError there, Python TypeError."""


class NotATensorError(ShardembError, AttributeError):
    """Ids that are a list or an array, where PyKEEN raises AttributeError."""


class IdRangeError(ShardembError, IndexError):
    """An id out of range."""


class UnknownNameError(ShardembError, KeyError):
    """No function, table or label has this name."""

    def __str__(self) -> str:  # KeyError shows its message in quotes
        return str(self.args[0]) if self.args else ""


class UsageError(ShardembError, RuntimeError):
    """A call that this object cannot serve now."""


class OutOfMemoryError(ShardembError, MemoryError):
    """It would not fit the free memory; nothing was allocated."""


class NonfiniteError(ShardembError, FloatingPointError):
    """A loss, a gradient or a row is NaN or infinite."""


class MissingExtraError(ShardembError, ModuleNotFoundError):
    """An optional package is not installed."""


class CheckpointError(ShardembError, RuntimeError):
    """A checkpoint that could not be written, or that is not what its manifest says."""


class NoTableError(CheckpointError, AttributeError):
    """A checkpoint without tables: an AttributeError, so that hasattr() and getmembers() work."""


class OtherDataError(CheckpointError):
    """A checkpoint that was saved with other entities, relations, triples or settings."""


@dataclass(eq=False, repr=False)
class PeerFailureError(ShardembError, RuntimeError):
    """Another rank has died, stopped, raised, or ended before this one."""

    message: str
    #: the other rank, in the default group
    rank: int = -1
    #: of this rank, when it waited
    step: int = 0
    #: what this rank waited in
    operation: str = ""
    #: seconds that it waited
    seconds: float = 0.0

    restart_may_help = True


@dataclass(eq=False, repr=False)
class WorkerError(ShardembError, RuntimeError):
    """A rank failed; the launcher has ended the others."""

    #: the first rank that failed
    rank: int
    #: name of its exception's class, or "died"
    error: str
    message: str
    #: its traceback, or ""
    trace: str = ""
    restart_may_help: bool = True
    for_user: bool = True

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.error}: {self.message}"

    @property
    def order(self) -> tuple[bool, bool]:
        """Sort key of a job's failures, the cause first."""
        return self.error == PeerFailureError.__name__, self.error != "died"

    @classmethod
    def of(cls, rank: int, error: BaseException) -> "WorkerError":
        """Describe an exception of a rank, in a form that crosses processes."""
        trace = "".join(traceback.format_exception(error))
        flags = restart_may_help(error), for_user(error)
        return cls(rank, type(error).__name__, str(error), trace, *flags)


class TerminatedError(ShardembError, RuntimeError):
    """SIGTERM came: the run has saved what it had, and ends."""

    restart_may_help = True


class ShardUnavailableError(ShardembError, RuntimeError):
    """A shard of a served table does not answer; its error says which, and for how long."""

    restart_may_help = True


class ShardBusyError(ShardembError, RuntimeError):
    """A shard of a served table has too many requests waiting."""

    restart_may_help = True


def restart_may_help(error: BaseException) -> bool:
    """Whether a job that raised this may succeed when its ranks start again.

    In other code, errors of logic (ValueError, KeyError, ...) and missing files would come again;
    RuntimeError and errors of the machine may not.
    """
    if isinstance(error, ShardembError):
        return error.restart_may_help
    lasting = FileNotFoundError | FileExistsError | PermissionError | NotImplementedError
    return isinstance(error, RuntimeError | OSError | MemoryError) and not isinstance(
        error, lasting
    )


def for_user(error: BaseException) -> bool:
    """Whether the error's message is enough for the user; otherwise show the traceback."""
    if isinstance(error, ShardembError):
        return error.for_user
    return isinstance(error, OSError | MemoryError)
