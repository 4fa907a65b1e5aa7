"""The errors of this package."""


class WorkerError(RuntimeError):
    """A rank failed; the others were ended.

    Attributes:
        rank: the first rank that failed.
        error: name of its exception's class, or "died".
        message: of its exception.
        trace: its traceback, or "".
    """

    def __init__(self, rank: int, error: str, message: str, trace: str = "") -> None:
        super().__init__(f"rank {rank}: {error}: {message}")
        self.rank, self.error, self.message, self.trace = rank, error, message, trace
