"""The one process that drives a job, by a lease with a fence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import and_, select, update

from autoeff.errors import Conflict
from autoeff.search.storage import leases
from autoeff.search.storage.holders import holder_is_dead
from autoeff.search.storage.jobs import Jobs, fenced, taken_over, unknown
from autoeff.search.storage.records import JobState, Orders
from autoeff.search.storage.tables import JobRow, now

__all__ = ["Driving"]


class Driving(Jobs):
    """Leases of coordinators."""

    def acquire_coordinator(self, job_id: str, owner: str, ttl_s: float) -> int:
        """Makes `owner` the one process that drives the job, and returns its fence.

        A lease that ended, or whose holder is surely dead or `owner` itself, is taken over; what was begun before is refused from then on.

        Args:
            job_id: The job.
            owner: From `process_identity`.
            ttl_s: Seconds until the lease ends unless renewed.

        Raises:
            NotFound: No such job.
            Conflict: Another process drives it.
        """
        with self._database.write() as connection:
            leased = (JobRow.coordinator_until > now()).label("leased")
            query = select(JobRow.coordinator, JobRow.coordinator_fence, leased).where(JobRow.id == job_id).with_for_update()
            job = connection.execute(query).one_or_none()
            if job is None:
                raise unknown(job_id)
            if job.leased and job.coordinator != owner and not holder_is_dead(job.coordinator):
                raise Conflict(f"job {job_id!r} is driven by the process {job.coordinator}; stop that one or wait for its end")
            fence: int = job.coordinator_fence + 1
            lease = {"coordinator": owner, "coordinator_until": now() + ttl_s, "coordinator_fence": fence}
            connection.execute(update(JobRow).where(JobRow.id == job_id).values(lease))
            leases.note(connection, job_id, [("job.coordinator", {"owner": owner, "fence": fence})])
        return fence

    def tell(self, job_id: str, fence: int, kind: str, body: Mapping[str, Any]) -> None:
        """Adds an event to the job's story.

        Raises:
            LeaseLost: Another process took over.
        """
        with self._database.write() as connection:
            fenced(connection, job_id, fence)
            leases.note(connection, job_id, [(kind, body)])

    def renew_coordinator(self, job_id: str, fence: int, ttl_s: float) -> None:
        """Moves the end of the lease to `ttl_s` seconds from now.

        Raises:
            LeaseLost: Another process took over.
        """
        with self._database.write() as connection:
            fenced(connection, job_id, fence)
            connection.execute(update(JobRow).where(JobRow.id == job_id).values(coordinator_until=now() + ttl_s))

    def orders(self, job_id: str, fence: int) -> Orders:
        """What the user of the job wants now.

        Raises:
            LeaseLost: Another process took over.
        """
        query = select(JobRow.state, JobRow.budget, JobRow.coordinator, JobRow.coordinator_fence).where(JobRow.id == job_id)
        with self._database.read() as connection:
            row = connection.execute(query).one()
        if row.coordinator_fence != fence:
            raise taken_over(job_id, row.coordinator)
        return Orders(row.state, row.budget)

    def waiting_jobs(self, me: str) -> dict[str, str]:
        """Submitted jobs that are to go on and that no other process drives than `me`, the oldest first, with their queues."""
        wants = and_(JobRow.queue.is_not(None), JobRow.state.in_((JobState.PENDING, JobState.RUNNING)))
        query = select(JobRow.id, JobRow.queue, JobRow.coordinator, (JobRow.coordinator_until > now()).label("leased"))
        with self._database.read() as connection:
            rows = connection.execute(query.where(wants).order_by(JobRow.created_at, JobRow.id)).all()
        return {row.id: row.queue for row in rows if not row.leased or row.coordinator == me or holder_is_dead(row.coordinator)}

    def release_coordinator(self, job_id: str, fence: int) -> None:
        """Ends the lease; nothing happens where it was lost before."""
        free = {"coordinator": None, "coordinator_until": None, "coordinator_fence": fence + 1}
        with self._database.write() as connection:
            connection.execute(update(JobRow).where(JobRow.id == job_id, JobRow.coordinator_fence == fence).values(free))
