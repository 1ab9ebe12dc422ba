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
    Origin,
    Proposal,
    State,
    Trial,
    TrialRef,
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
    "Origin",
    "Proposal",
    "State",
    "Store",
    "Trial",
    "TrialRef",
    "process_identity",
]
