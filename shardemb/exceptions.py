"""Every error that this package raises on purpose.

Each class is also the built-in class that Python, PyTorch or PyKEEN would raise there, so both
``except ShardembError`` and ``except ValueError`` work::

    ShardembError
    ├── InputError (ValueError)              an argument, a setting or a file's content is unusable
    │   └── RanksDisagreeError               ranks were given different arguments
    ├── InputTypeError (TypeError)           an argument of a wrong type
    │   └── IdTypeError (RuntimeError)       ids that are not integers
    ├── NotATensorError (AttributeError)     ids that are a list or an array
    ├── IdRangeError (IndexError)            an id out of range
    ├── UnknownNameError (KeyError)          no function, table or label has this name
    ├── UsageError (RuntimeError)            a call that this object cannot serve now
    ├── OutOfMemoryError (MemoryError)       it would not fit; nothing was allocated
    ├── NonfiniteError (FloatingPointError)  a loss or gradient is NaN or infinite
    ├── MissingExtraError (ModuleNotFoundError)  an optional package is not installed
    ├── CheckpointError (RuntimeError)       a checkpoint cannot be written, or is damaged
    │   ├── OtherDataError                   it was saved with other data or settings
    │   └── NoTableError (AttributeError)    it has no table: hasattr() is False
    ├── PeerFailureError (RuntimeError)      another rank died, stopped, raised or ended early
    ├── WorkerError (RuntimeError)           a launcher's rank failed; carries its traceback
    ├── TerminatedError (RuntimeError)       SIGTERM came; the run saved what it had
    ├── ShardUnavailableError (RuntimeError) a served shard does not answer
    └── ShardBusyError (RuntimeError)        a served shard has too many requests waiting
"""

import traceback


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


class PeerFailureError(ShardembError, RuntimeError):
    """Another rank has died, stopped, raised, or ended before this one.

    Attributes:
        rank: the other rank, in the default group.
        step: of this rank, when it waited.
        operation: what this rank waited in.
        seconds: that it waited.
    """

    restart_may_help = True

    def __init__(
        self,
        message: str,
        *,
        rank: int = -1,
        step: int = 0,
        operation: str = "",
        seconds: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.rank, self.step, self.operation, self.seconds = rank, step, operation, seconds


class WorkerError(ShardembError, RuntimeError):
    """A rank failed; the launcher has ended the others.

    Attributes:
        rank: the first rank that failed.
        error: name of its exception's class, or "died".
        message: of its exception.
        trace: its traceback, or "".
    """

    def __init__(
        self,
        rank: int,
        error: str,
        message: str,
        trace: str = "",
        restart_may_help: bool = True,
        for_user: bool = True,
    ) -> None:
        super().__init__(rank, error, message, trace, restart_may_help, for_user)
        self.rank, self.error, self.message, self.trace = rank, error, message, trace
        self.restart_may_help, self.for_user = restart_may_help, for_user

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
