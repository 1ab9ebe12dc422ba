"""What requests and answers look like. The body of a job is `JobSpec` itself.

A row of a trial is the one that `autoeff ls RUN --format json` prints, so that code reads either.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from autoeff.search.storage.records import JobState, Origin, State

__all__ = [
    "Accepted",
    "Artifact",
    "ArtifactPage",
    "AttemptPage",
    "AttemptRow",
    "Budgets",
    "ComparisonRow",
    "DataFile",
    "DataPage",
    "ExportRequest",
    "Failure",
    "Front",
    "HardwarePage",
    "HardwareRow",
    "Health",
    "JobDetail",
    "JobPage",
    "JobSummary",
    "KeyMade",
    "KeyPage",
    "KeyRequest",
    "KeyRow",
    "LatencyPage",
    "LatencyRow",
    "LatencyTable",
    "Measured",
    "ModelPage",
    "ModelRow",
    "PointRow",
    "Points",
    "Preflight",
    "ResolutionRow",
    "ResolveRequest",
    "TrialDetail",
    "TrialPage",
    "TrialRow",
]

Value = int | float | str


class _Answer(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Health(_Answer):
    """Whether the server can work."""

    ready: bool
    checks: dict[str, Literal["ok", "degraded", "failed"]] = Field(default_factory=dict)


class Failure(_Answer):
    """Why there is no value."""

    kind: str = Field(alias="class")
    message: str

    model_config = ConfigDict(populate_by_name=True)


class Measured(_Answer):
    """One measured or computed value."""

    value: float
    unit: str
    split: Literal["search", "held_out"] | None = None
    tokens: int | None = None
    spread: float | None = None
    method: str | None = None
    hardware: str | None = None


class TrialRow(_Answer):
    """A trial."""

    trial: int
    digest: str
    origin: Origin
    state: State
    configuration: dict[str, Value]
    measurements: dict[str, Measured]
    label: str | None = None
    failure: Failure | None = None


class AttemptRow(_Answer):
    """One try at the evaluation behind a trial."""

    kind: str = Field(description="What came of it: running, succeeded, released, cancelled, or the class of the failure.")
    worker: str
    started: str
    ended: str | None
    outcome: str | None
    accepted: bool
    seconds: float | None
    failure: Failure | None
    log: str | None
    facts: dict[str, Any] = Field(
        description="What the worker noted besides: on a GPU packed_linears, packed_calls and decoded_linears, by which it was computed."
    )


class AttemptPage(_Answer):
    """Every try at a trial, the first one first."""

    items: list[AttemptRow]


class TrialDetail(TrialRow):
    """A trial with its attempts."""

    attempts: list[AttemptRow]


class TrialPage(_Answer):
    """Trials by number."""

    items: list[TrialRow]
    next: str | None = Field(default=None, description="Cursor of the following page.")


class JobSummary(_Answer):
    """A job as lists show it."""

    job: str
    state: JobState
    driven_by: str | None = Field(description="Process that drives it now.")
    model: str
    limits: list[str]
    trials: int
    used: float = Field(description="Evaluations used, in full-token equivalents.")
    budget: int
    created: str
    ended: str | None


class Accepted(_Answer):
    """A job that was taken."""

    job: str
    links: dict[str, str]


class JobDetail(JobSummary):
    """A job."""

    seconds: float | None = Field(description="Budget of wall time.")
    succeeded: int
    failed: int
    open: int = Field(description="Trials that are queued or running.")
    events: int = Field(description="Number of its last event.")
    version: int = Field(description="Grows with every change of state, budget, result or error.")
    error: str | None = Field(description="Why it failed.")
    quality: str = Field(description="Name of the measurement that is minimised.")
    columns: dict[str, str] = Field(description="Cost measures worth a column, and what to write above it.")
    judged_cost: str = Field(description="The cost at which configurations are compared.")
    spec: dict[str, Any]
    preflight: dict[str, Any] = Field(description="What was known before the first evaluation.")
    links: dict[str, str]


class JobPage(_Answer):
    """Jobs, the newest first."""

    items: list[JobSummary]
    next: str | None = None


class Front(_Answer):
    """The Pareto front of a job, and its best trial within the limits (the closest, where the search ended without one)."""

    quality: str
    best: int | None
    best_quality: float | None
    feasible: bool
    columns: dict[str, str]
    items: list[TrialRow]


class PointRow(_Answer):
    """A trial in a picture."""

    trial: int
    origin: Origin
    state: State
    windows: int = Field(description="Of the search text; fewer than all of them is a cheap fidelity.")
    x: float | None
    y: float | None
    front: bool = Field(description="Whether it is on the job's front.")
    feasible: bool = Field(description="Whether its costs keep the job's limits.")
    seconds: float | None = Field(description="From the job's beginning to the end of its evaluation; null before that.")


class Points(_Answer):
    """What a picture of a job shows: front and baselines whole, of the other trials evenly many over time."""

    x: str = Field(description="Name of what the points have as `x`.")
    y: str
    total: int = Field(description="Trials of the job.")
    items: list[PointRow]


class Budgets(_Request):
    """A new budget; what is left out stays as it is."""

    trials: int | None = Field(default=None, ge=1, le=100_000)
    seconds: float | None = Field(default=None, gt=0)


class ResolveRequest(_Request):
    """A new limit to answer from what was measured."""

    limits: Annotated[list[Annotated[str, Field(max_length=200)]], Field(min_length=1, max_length=16)]
    measure: bool = Field(
        default=False, description="Have workers measure up to 24 proposals and keep them as trials of the job, which must have ended."
    )


class ResolutionRow(_Answer):
    """The answer for a budget."""

    job: str
    quality: str
    limits: list[str]
    answer: Literal["predicted", "measured"]
    reason: str
    predicted: dict[str, Any]
    measured: dict[str, Any] | None
    proposals: list[dict[str, Any]]


class ComparisonRow(_Answer):
    """Jobs side by side. Lists with an item for every job have the order of `runs`."""

    quality: str
    cost: str = Field(description="Over which the fronts are.")
    method: str | None = Field(description="How values of the cost came about, where they are not exact.")
    own: bool = Field(description="Whether the user's own code was searched.")
    runs: list[dict[str, Any]]
    budgets: list[dict[str, Any]] = Field(description="Common budgets, the best of each job within them, and the winner.")
    settings: dict[str, list[Any]] = Field(description="Settings that differ.")
    decisions: dict[str, list[Any]] = Field(description="Levels of what was found, where they differ.")
    fronts: list[list[dict[str, Any]]] = Field(description="Of each job the non-dominated trials, limits left aside.")
    notices: list[str]


class Preflight(_Answer):
    """What is known of a job before any weight is loaded."""

    preflight: dict[str, Any]
    seconds: dict[str, float]
    memory_cap_bytes: int
    space: dict[str, Any]
    limits: list[dict[str, Any]]
    minimum_trials: int
    left_to_search: int = Field(description="Evaluations that the budget leaves to the sampler.")
    dense: dict[str, float]
    least: dict[str, float]
    methods: dict[str, str] = Field(description="How each cost comes about.")
    table: str
    job: dict[str, Any]


class ExportRequest(_Request):
    """How to write a trial's configuration."""

    format: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")] = "hf-dense"


class Artifact(_Answer):
    """A file that a job left."""

    name: str
    state: Literal["ready", "building", "failed"]
    bytes: int | None = None
    sha256: str | None = None
    media_type: str
    failure: str | None = None
    facts: dict[str, Any] | None = Field(default=None, description="Of an export: both qualities, files, packed bytes.")
    href: str


class ArtifactPage(_Answer):
    """Files of a job."""

    items: list[Artifact]


class ModelRow(_Answer):
    """A model that a job may name."""

    model: str
    model_type: str | None
    bytes: int
    bundled: bool


class ModelPage(_Answer):
    """Models that a job may name."""

    items: list[ModelRow]
    hub: bool = Field(description="Whether ids of the hub may be named too.")


class DataFile(_Answer):
    """A text that a job may name."""

    source: str
    bytes: int


class DataPage(_Answer):
    """Texts that a job may name."""

    items: list[DataFile]
    hub: bool


class HardwareRow(_Answer):
    """A worker and what it runs on."""

    worker: str
    kind: str = Field(description="Of its device.")
    queues: list[str]
    alive: bool
    busy: bool
    started: str
    facts: dict[str, Any]


class HardwarePage(_Answer):
    """Workers."""

    items: list[HardwareRow]


class LatencyRow(_Answer):
    """The time of an operation in nanoseconds: median and quartiles over rounds."""

    operation: str
    median_ns: int
    low_ns: int
    high_ns: int
    rounds: int


class LatencyTable(_Answer):
    """What was measured on one device with one set of versions."""

    device: str
    versions: dict[str, str]
    threads: int = Field(description="Of torch; 0 on a GPU.")
    date: str
    total: int
    items: list[LatencyRow]


class LatencyPage(_Answer):
    """Tables of measured operations."""

    items: list[LatencyTable]


class KeyRequest(_Request):
    """A key to be made."""

    name: Annotated[str, Field(min_length=1, max_length=80, description="For people.")]
    owner: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.@-]{1,64}$")]
    scopes: Annotated[list[Literal["jobs:read", "jobs:write", "admin"]], Field(min_length=1, max_length=3)]
    expires_in_days: Annotated[int, Field(ge=1, le=3650)] | None = None


class KeyRow(_Answer):
    """A key, without its secret."""

    key: str
    name: str
    owner: str
    scopes: list[str]
    created: str
    expires: str | None
    revoked: str | None
    last_used: str | None


class KeyMade(KeyRow):
    """A key that was just made; its text is shown this once."""

    text: str


class KeyPage(_Answer):
    """All keys."""

    items: list[KeyRow]
