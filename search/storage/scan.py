"""Many trials at once with a few of their values, for fronts and pictures: without their configurations, and never all in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, and_, select

from autoeff.search.storage.database import Database
from autoeff.search.storage.records import Origin, State
from autoeff.search.storage.rows import one_of
from autoeff.search.storage.tables import EvaluationRow, MeasurementRow, TrialRow
from autoeff.spaces.measurements import Split

__all__ = ["Brief", "Scan"]

_PAGE = 5_000


class Brief(NamedTuple):
    """A trial in brief.

    Attributes:
        configuration: Its digest.
        feasible: Whether its costs keep the limits.
        values: Of those asked for what there is.
        ended_at: End of its evaluation; None before that.
    """

    number: int
    origin: Origin
    state: State
    split: Split
    windows: int
    feasible: bool
    configuration: str
    values: Mapping[str, float]
    ended_at: datetime | None


class Scan:
    """Reads the trials of a job in brief.

    Args:
        database: Open; whoever opened it closes it.
        job_id: The job.
        names: Of the measurements that are wanted; costs count as such.
    """

    def __init__(self, database: Database, job_id: str, names: Iterable[str]) -> None:
        self._database, self._job_id, self._names = database, job_id, frozenset(names)
        self._mine = TrialRow.job_id == job_id

    def numbers(self, origins: Iterable[Origin], limit: int) -> list[int]:
        """The first `limit` trials of these origins on the search text."""
        numbers: list[int] = []
        with self._database.read() as connection:
            for origin in origins:  # each is a stretch of the index
                query = select(TrialRow.number).join(EvaluationRow, EvaluationRow.id == TrialRow.evaluation_id)
                query = query.where(self._mine, TrialRow.origin == origin, EvaluationRow.split == "search")
                numbers += connection.execute(query.order_by(TrialRow.number).limit(limit)).scalars()
        return sorted(numbers)[:limit]

    def of(self, numbers: Sequence[int]) -> list[Brief]:
        """These trials, by number."""
        found: list[Brief] = []
        for at in range(0, len(numbers), _PAGE):
            found += self._read(self._mine, TrialRow.number.in_(sorted(numbers)[at : at + _PAGE]))
        return found

    def of_keys(self, eval_keys: Sequence[str]) -> list[Brief]:
        """The trials behind which stands the work of one of these keys, by number."""
        found: list[Brief] = []
        for at in range(0, len(eval_keys), _PAGE):
            with self._database.read() as connection:
                these = EvaluationRow.eval_key.in_(eval_keys[at : at + _PAGE])
                ids = connection.execute(select(EvaluationRow.id).where(these)).scalars().all()
            found += self._read(one_of(self._job_id), TrialRow.evaluation_id.in_(ids)) if ids else []
        return sorted(found)

    def all(self, trials: int) -> Iterator[Brief]:
        """The first `trials` trials, by number, read in pages."""
        for at in range(0, trials, _PAGE):
            yield from self._read(self._mine, TrialRow.number.between(at, min(at + _PAGE, trials) - 1))

    def _read(self, *which: ColumnElement[bool]) -> list[Brief]:
        measured = and_(MeasurementRow.evaluation_id == TrialRow.evaluation_id, MeasurementRow.name.in_(sorted(self._names)))
        query = (
            select(
                TrialRow.number,
                TrialRow.origin,
                EvaluationRow.state,
                EvaluationRow.split,
                EvaluationRow.windows,
                TrialRow.feasible,
                EvaluationRow.configuration,
                EvaluationRow.ended_at,
                TrialRow.costs,
                MeasurementRow.name,
                MeasurementRow.value,
            )
            .join(EvaluationRow, EvaluationRow.id == TrialRow.evaluation_id)
            .outerjoin(MeasurementRow, measured)
            .where(*which)
            .order_by(TrialRow.number)
        )
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        return [self._brief(list(group)) for _, group in groupby(rows, lambda row: row[0])]

    def _brief(self, rows: Sequence[Any]) -> Brief:
        values = {name: value for *_, name, value in reversed(rows) if name is not None}
        row = rows[0]
        for name in self._names & row.costs.keys():
            stored = row.costs[name]
            values[name] = float(stored["value"] if isinstance(stored, Mapping) else stored)
        return Brief(row.number, row.origin, row.state, row.split, row.windows, row.feasible, row.configuration, values, row.ended_at)
