"""The errors that autoeff raises on purpose; each knows its exit code and its problem type.

    AutoeffError             1    failure that is nobody's input
      InputError             2    what the caller passed is wrong (also a ValueError)
        UnreachableLimit     2    arithmetic proves that no configuration meets the limit
        NotFound             2    no such job, trial or key
        Conflict             2    what is asked for does not go with the state that the thing is in
          Stale              2    it has changed since the caller looked
        Forbidden            2    the key is missing, not good (any more), or may not do this
      StorageError           1    the database failed; what was committed is kept, and the same call may succeed later
      Unavailable            1    a server cannot be reached, or cannot answer now
      CandidateError         1    one candidate failed; recorded with its class, the search goes on
      RunnerLost             1    a runner died of something that is not the candidate's fault
      LeaseLost              1    another process took over; whoever hears this stops writing

A message says what is wrong, the value found, what is allowed, and the remedy if there is one, in one line.
"""

from __future__ import annotations

from enum import StrEnum

__all__ = [
    "AutoeffError",
    "CandidateError",
    "Conflict",
    "ExitCode",
    "FailureClass",
    "Forbidden",
    "InputError",
    "LeaseLost",
    "NotFound",
    "RunnerLost",
    "Stale",
    "StorageError",
    "Unavailable",
    "UnreachableLimit",
]


class ExitCode:
    """What the command's exit code says."""

    FEASIBLE = 0
    FAILURE = 1
    BAD_INPUT = 2
    INFEASIBLE = 3
    INTERRUPTED = 130


class FailureClass(StrEnum):
    """Why an evaluation has no value. All but `LOST` are the candidate's own and are never retried."""

    OOM_HOST = "oom_host"
    OOM_GPU = "oom_gpu"
    TIMEOUT = "timeout"
    CRASH = "crash"
    NAN = "nan"
    INVALID = "invalid"
    LOST = "lost"


class AutoeffError(Exception):
    """Base of every error that is reported as one line."""

    exit_code = ExitCode.FAILURE
    problem = "failure"


class InputError(AutoeffError, ValueError):
    """What the caller passed is wrong."""

    exit_code = ExitCode.BAD_INPUT
    problem = "invalid-input"


class UnreachableLimit(InputError):
    """No configuration of the space meets the limit; the message names the least reachable value."""

    problem = "unreachable-limit"


class NotFound(InputError):
    """There is no such thing."""

    problem = "not-found"


class Conflict(InputError):
    """The thing is in a state in which this cannot be done."""

    problem = "conflict"


class Stale(Conflict):
    """The thing has changed since the caller looked."""

    problem = "stale"


class Forbidden(InputError):
    """The key is missing, not good (any more), or may not do this."""

    problem = "forbidden"


class Unavailable(AutoeffError):
    """A server cannot be reached, or cannot answer now."""

    problem = "unavailable"


class StorageError(AutoeffError):
    """The database failed: full, locked, gone. What was committed is kept, and the same call may succeed later."""

    problem = "storage"


class CandidateError(AutoeffError):
    """A candidate that could not be measured.

    Attributes:
        failure: Its class.
    """

    problem = "candidate-failed"

    def __init__(self, failure: FailureClass, message: str) -> None:
        super().__init__(message)
        self.failure = failure


class RunnerLost(AutoeffError):
    """The runner process ended for a reason that is not the candidate's."""

    problem = "runner-lost"


class LeaseLost(AutoeffError):
    """The caller's lease ended and another process took over; nothing that it writes counts any more."""

    problem = "lease-lost"
