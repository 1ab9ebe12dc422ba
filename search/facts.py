"""Jobs, trials and plans as plain data: what the command prints as JSON and what a server answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autoeff.search.standing import Standing, cost_columns, cost_titles, judged_cost
from autoeff.search.storage.records import Attempt, Job

if TYPE_CHECKING:  # the engine, which what only reads does without
    from autoeff.search.model import Plan
    from autoeff.search.settings import Settings

__all__ = ["attempt_facts", "columns_of", "failure_facts", "job_facts", "plan_facts", "status_facts"]


def job_facts(job: Job) -> dict[str, Any]:
    """A job in a list."""
    ended = job.ended_at
    return {
        "job": job.id,
        "state": str(job.state),
        "driven_by": job.coordinator,
        "model": job.spec["model"],
        "limits": list(job.spec["limits"]),
        "trials": job.counts.trials,
        "used": round(job.counts.cost, 3),
        "budget": (job.budget or job.spec["budget"])["trials"],
        "created": job.created_at.isoformat(timespec="seconds"),
        "ended": None if ended is None else ended.isoformat(timespec="seconds"),
    }


def status_facts(facts: Mapping[str, Any], folder: str | None, standing: Standing, succeeded: int, failed: int) -> dict[str, Any]:
    """Where a job stands; `facts` are those of `job_facts`."""
    return {
        **facts,
        "folder": folder,
        "succeeded": succeeded,
        "failed": failed,
        "front": len(standing.front),
        "best": standing.best,
        "best_" + standing.quality: standing.best_quality,
    }


def columns_of(job: Job) -> dict[str, Any]:
    """Which measurements of a job's trials are worth a column: its quality, costs with their titles, the cost that is compared at."""
    titles = cost_titles(job)
    columns = {name: titles.get(name, name) for name in cost_columns(job)}
    return {"quality": str(job.preflight["quality"]), "columns": columns, "judged_cost": judged_cost(job)}


def attempt_facts(attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    """Tries at an evaluation."""
    return [
        {
            "kind": str(attempt.failure.kind) if attempt.failure is not None else attempt.outcome or "running",
            "worker": attempt.worker,
            "started": attempt.started_at.isoformat(timespec="seconds"),
            "ended": None if attempt.ended_at is None else attempt.ended_at.isoformat(timespec="seconds"),
            "outcome": attempt.outcome,
            "accepted": attempt.accepted,
            "seconds": attempt.seconds,
            "failure": None if attempt.failure is None else failure_facts(str(attempt.failure.kind), attempt.failure.message),
            "log": attempt.log,
            "facts": dict(attempt.facts),
        }
        for attempt in attempts
    ]


def failure_facts(kind: str, message: str) -> dict[str, str]:
    """Why there is no value."""
    return {"class": kind, "message": message}


def plan_facts(plan: Plan, machine: Settings) -> dict[str, Any]:
    """What is known of a job before any weight is loaded."""
    from autoeff.evaluators.timing import predict_seconds

    seconds = predict_seconds(plan.preparation, machine.bank)
    return {
        "preflight": plan.preflight,
        "seconds": {
            "opening": seconds.opening,
            "bank": seconds.bank,
            "evaluation": seconds.evaluation,
            "search": seconds.search(plan.budget),
        },
        "memory_cap_bytes": machine.memory_cap,
        "space": plan.space.to_json(),
        "limits": [{"name": limit.name, "bound": float(limit.bound), "text": limit.text} for limit in plan.limits],
        "minimum_trials": plan.minimum_trials,
        "left_to_search": plan.left_to_search,
        "dense": dict(plan.dense),
        "least": dict(plan.least),
        "methods": {name: measure.method for name, measure in plan.problem.cost_model.measures.items()},
        "table": plan.table,
        "job": plan.spec.model_dump(mode="json"),
    }
