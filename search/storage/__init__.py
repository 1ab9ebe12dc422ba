"""The database of jobs, trials and results."""

from autoeff.search.storage.holders import process_identity
from autoeff.search.storage.records import (
    Attempt,
    Claim,
    Counts,
    Event,
    Failure,
    Job,
    JobState,
    Message,
    Orders,
    Origin,
    Proposal,
    Reply,
    State,
    Trial,
    TrialRef,
    WorkerInfo,
)
from autoeff.search.storage.store import Store

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
    "Proposal",
    "Reply",
    "State",
    "Store",
    "Trial",
    "TrialRef",
    "WorkerInfo",
    "process_identity",
]
