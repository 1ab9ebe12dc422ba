"""The values that go into and come out of the store: frozen, and free of any database type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from autoeff.errors import FailureClass
from autoeff.spaces.configuration import Configuration
from autoeff.spaces.measurements import Measurement, Split

__all__ = [
    "Attempt",
    "Claim",
    "Counts",
    "Event",
    "Failure",
    "Job",
    "JobState",
    "Message",
    "Orders",
    "Origin",
    "Outcome",
    "Proposal",
    "Reply",
    "State",
    "Trial",
    "TrialRef",
    "WorkerInfo",
]

Origin = Literal["dense", "uniform", "random", "table", "additive", "seed", "searched", "given", "alternative"]
Outcome = Literal["succeeded", "failed", "lost", "released", "cancelled"]


class State(StrEnum):
    """Of an evaluation, and so of every trial that asks for it. The only way back is RUNNING to QUEUED, under a new fence."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    QUARANTINED = "quarantined"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self not in (State.QUEUED, State.RUNNING)


class JobState(StrEnum):
    """Of a job. PENDING waits for a coordinator.

    PAUSED was stopped by its user and can be resumed; RUNNING without a coordinator was killed and can be resumed. A job is CANCELLING
    until no worker evaluates for it any more.
    """

    PENDING = "pending"
    RUNNING = "running"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True)
class Counts:
    """Of a job's trials.

    Attributes:
        trials: Proposed so far; also the next number.
        cost: Used budget in full-token equivalents. A repeated configuration costs nothing the second time.
    """

    trials: int
    succeeded: int
    failed: int
    quarantined: int
    cost: float
    cancelled: int = 0

    @property
    def open(self) -> int:
        """Queued or running."""
        return self.trials - self.succeeded - self.failed - self.quarantined - self.cancelled


@dataclass(frozen=True)
class Job:
    """A search.

    Attributes:
        spec: The validated `JobSpec` as JSON.
        preflight: What was known before the first evaluation.
        space: The search space as JSON.
        setup_digest: Names what the results depend on besides the configuration; a resumed job must find the same.
        result: The final summary, once there is one.
        coordinator: The process that drives the job now; None when nobody does.
        version: Grows with every change of state, budget, result or error.
        owner: Whose key submitted it; None for a search without a server.
        queue: Workers that evaluate it (`cpu`, `gpu.any`, `gpu.KIND`); None where the process that began it does.
        budget: Trials and seconds as they are now, if they were changed after the start.
        error: Why it failed.
        events: The `seq` of its last event.
    """

    id: str
    state: JobState
    spec: Mapping[str, Any]
    preflight: Mapping[str, Any]
    space: Mapping[str, Any]
    setup_digest: str
    result: Mapping[str, Any] | None
    created_at: datetime
    ended_at: datetime | None
    coordinator: str | None
    counts: Counts
    version: int = 1
    owner: str | None = None
    queue: str | None = None
    budget: Mapping[str, Any] | None = None
    error: str | None = None
    events: int = 0


@dataclass(frozen=True)
class Orders:
    """What the user of a job wants now.

    Attributes:
        budget: As in `Job`.
    """

    state: JobState
    budget: Mapping[str, Any] | None


@dataclass(frozen=True)
class Proposal:
    """One candidate that a job wants evaluated.

    Attributes:
        number: Its trial number; the numbers of a job are dense.
        origin: Who proposed it.
        split: Text that it is measured on.
        windows: Fidelity, in windows of that text.
        cost: Budget that it uses, in full-token equivalents.
        eval_key: SHA-256 over everything that the measurements depend on; equal keys are equal work.
        costs: Cost measures by name: a number where it is exact, else its `value` and `method`.
        feasible: Whether the exact costs meet the job's limits.
        label: For people, such as "bits=3".
        sampler_state: What the sampler needs to go on from here after a restart.
    """

    number: int
    configuration: Configuration
    origin: Origin
    split: Split
    windows: int
    cost: float
    eval_key: str
    costs: Mapping[str, float | Mapping[str, Any]]
    feasible: bool
    label: str | None = None
    sampler_state: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Claim:
    """The right to evaluate: good while its fence is the evaluation's newest.

    Attributes:
        attempt: 1 for the first try.
    """

    evaluation_id: int
    fence: int
    attempt: int
    worker: str
    configuration: Configuration
    split: Split
    windows: int


@dataclass(frozen=True)
class TrialRef:
    """What became of a proposal.

    Attributes:
        state: A terminal one when equal work was done before.
        claim: Where the proposer asked for it and the work is still to do.
    """

    number: int
    evaluation_id: int
    state: State
    claim: Claim | None = None


@dataclass(frozen=True)
class Failure:
    """Why there is no value."""

    kind: FailureClass
    message: str


@dataclass(frozen=True)
class Trial:
    """A stored trial.

    Attributes:
        cost: Budget that it used; 0 for a repetition within its job.
        measurements: Exact costs first; nothing else before it succeeded.
        seconds: Wall time of the evaluation.
        attempts: Tries so far.
        earlier: Evaluations that it asked for before; they failed, and it was tried again.
        told: Whether the sampler has heard of the outcome.
        ended_at: End of the evaluation, which may lie before `created_at` when the work was done for another job.
    """

    number: int
    evaluation_id: int
    configuration: Configuration
    origin: Origin
    label: str | None
    state: State
    split: Split
    windows: int
    cost: float
    feasible: bool
    measurements: Sequence[Measurement]
    failure: Failure | None
    seconds: float | None
    attempts: int
    sampler_state: Mapping[str, Any] | None
    told: bool
    created_at: datetime
    ended_at: datetime | None
    earlier: tuple[int, ...] = ()

    @property
    def evaluations(self) -> tuple[int, ...]:
        """Every evaluation that it asked for, the last one last."""
        return (*self.earlier, self.evaluation_id)

    def value(self, name: str) -> float | None:
        """The value of a measurement; None where it was not taken."""
        return next((m.value for m in self.measurements if m.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """The public row."""
        row: dict[str, Any] = {
            "trial": self.number,
            "digest": self.configuration.digest,
            "origin": self.origin,
            "state": str(self.state),
            "configuration": dict(self.configuration.levels),
            "measurements": {m.name: m.to_json() for m in self.measurements},
        }
        if self.label is not None:
            row["label"] = self.label
        if self.failure is not None:
            row["failure"] = {"class": str(self.failure.kind), "message": self.failure.message}
        return row


@dataclass(frozen=True)
class Attempt:
    """One try at an evaluation.

    Attributes:
        accepted: Whether it decided the evaluation. Exactly one attempt of a terminal evaluation did.
        outcome: None while it runs.
        facts: What the worker noted besides: exit code, peak memory, versions.
        late: What the holder reported after its lease had passed on; kept, never counted.
    """

    fence: int
    worker: str
    started_at: datetime
    ended_at: datetime | None
    accepted: bool
    outcome: Outcome | None
    seconds: float | None
    failure: Failure | None
    log: str | None
    facts: Mapping[str, Any]
    late: Mapping[str, Any] | None


@dataclass(frozen=True)
class Event:
    """Something that happened to a job; `seq` has no gaps."""

    seq: int
    kind: str
    body: Mapping[str, Any]
    at: datetime


@dataclass(frozen=True)
class Message:
    """Work that waits in a queue.

    Attributes:
        sent: How often a message was sent for it before.
    """

    evaluation_id: int
    queue: str
    sent: int


@dataclass(frozen=True)
class Reply:
    """The answer to a request that may be made again.

    Attributes:
        key_prefix: Of the API key.
        request_hash: SHA-256 of the request; another one under the same idempotency key is a mistake.
        status: Of HTTP.
        ttl_s: Seconds for which it is given again.
    """

    key_prefix: str
    idempotency_key: str
    request_hash: str
    status: int
    body: Mapping[str, Any]
    ttl_s: float

    def values(self) -> dict[str, Any]:
        """The columns, but for the time."""
        names = ("key_prefix", "idempotency_key", "request_hash", "status")
        return {name: getattr(self, name) for name in names} | {"body": dict(self.body)}


@dataclass(frozen=True)
class WorkerInfo:
    """A process that evaluates.

    Attributes:
        id: The identity under which it claims.
        kind: Of its device.
        facts: Of its machine.
        evaluation_id: What it works on.
    """

    id: str
    queues: Sequence[str]
    kind: str
    facts: Mapping[str, Any]
    started_at: datetime
    seen_until: datetime
    alive: bool
    evaluation_id: int | None
