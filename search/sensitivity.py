"""What each level of each decision costs in quality, alone: the damage table of a run, or of a model that nobody has searched.

For a model the table is measured by the engine of a search that ends after it (`table_only`): a job like any other, that can be killed,
resumed, resolved and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoeff.errors import InputError
from autoeff.search.guests import DamageTable, Key, full_table_trials, minimum_trials, table_candidates, table_form
from autoeff.search.own_job import refuse_own
from autoeff.search.results import all_trials
from autoeff.search.runs import FILE, check_new, open_run, write_file
from autoeff.search.samplers.problem import Problem
from autoeff.search.settings import Settings
from autoeff.search.standing import TABLE_WORDS, problem_of
from autoeff.search.storage.records import Job, Trial

if TYPE_CHECKING:
    from autoeff.search.coordinator import Progress
    from autoeff.search.job import JobSpec

__all__ = ["Sensitivity", "full_table", "is_run", "known_table", "sensitivity", "write_damage"]

Watch = Callable[["Progress"], None]


@dataclass(frozen=True)
class Sensitivity:
    """A damage table, opened out.

    Attributes:
        quality: Name of the measurement whose loss is the damage.
        form: How much was measured, in words.
        rows: `decision, site, knob, block, level, damage, spread, tokens, trial, method` of every level, the worst first. A damage of
            None is a level that failed alone; the method is `estimated` where a cheap table left the level out, which has no trial.
        sites: Damage summed over all blocks, by knob, place inside the block and level, the worst first: `knob, site, level,
            damage, decisions`. Levels that failed alone make the sum None.
        blocks: Damage summed over the sites of a block, by knob and level, the worst first: `knob, block, level, damage, decisions`.
    """

    job_id: str
    folder: Path | None
    quality: str
    form: str
    rows: tuple[dict[str, Any], ...]
    sites: tuple[dict[str, Any], ...]
    blocks: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "job": self.job_id, "folder": None if self.folder is None else str(self.folder), "quality": self.quality, "form": self.form,
            "rows": list(self.rows), "sites": list(self.sites), "blocks": list(self.blocks),
        }  # fmt: skip


def is_run(target: str, settings: Settings) -> bool:
    """Whether `target` names a stored run: a directory with a run file, or the id of a job."""
    if Path(target).is_dir():
        return (Path(target) / FILE).exists()
    try:
        store, _, _ = open_run(target, settings)
    except InputError:
        return False
    store.close()
    return True


def sensitivity(run: str | Path, settings: Settings) -> Sensitivity:
    """The damage table of a stored run.

    Raises:
        InputError: No such run, or its table is not measured yet.
    """
    store, job_id, folder = open_run(run, settings)
    with store:
        job = store.job(job_id)
        trials = all_trials(store, job_id)
    return _opened_out(job, folder, trials)


def full_table(spec: JobSpec, out: Path, settings: Settings, watch: Watch = lambda progress: None) -> Sensitivity:
    """Measures the full damage table of a model into the new run directory `out`.

    Args:
        spec: Model, text and space; whatever its budget is, every level is measured on all windows.
        out: Must not exist.
        settings: Of this machine.
        watch: Hears of progress.

    Raises:
        InputError: As a search.
    """
    from autoeff.evaluators.preparation import prepare  # the engine, which a stored run does without
    from autoeff.search.run import start

    check_new(out)
    preparation = prepare(spec.setup(settings.bank))
    needed = max(full_table_trials(preparation.space), minimum_trials(preparation.space, len(preparation.passages["search"].inputs)))
    budget = spec.budget.model_copy(update={"trials": needed})
    start(spec.model_copy(update={"table_only": True, "budget": budget}), out, settings, watch)
    return sensitivity(out, settings)


def write_damage(found: Sensitivity, folder: Path, settings: Settings) -> Path:
    """Draws the damage map into `folder`, made where absent, as `damage.png`, and returns its path; an earlier one is replaced whole.

    Raises:
        InputError: It cannot be written.
    """
    from autoeff.search.picture import draw_damage  # matplotlib takes longer than reading the table
    from autoeff.search.report import damage_maps

    store, job_id, _ = open_run(found.folder or found.job_id, settings)
    with store:
        space = problem_of(store.job(job_id)).space
    damage: dict[str, dict[str, float | None]] = {}
    for row in found.rows:
        damage.setdefault(row["decision"], {})[str(row["level"])] = row["damage"]
    picture = draw_damage(f"{found.quality} lost by each level alone ({found.form})", damage_maps(space, damage))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "damage.png", picture)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}; name another --out") from None
    return folder / "damage.png"


def known_table(problem: Problem, trials: Iterable[Trial]) -> tuple[DamageTable, Mapping[Key, Trial]]:
    """The damage table among the trials of a job, and its trials by level indices and windows.

    Raises:
        InputError: It is not measured yet.
    """
    known: dict[Key, Trial] = {}
    for trial in trials:
        if trial.split == "search" and trial.state.terminal:
            known.setdefault((problem.space.indices(trial.configuration.levels), trial.windows), trial)
    wanted = [(c.indices, c.windows) for c in table_candidates(problem)]
    if missing := sum(key not in known for key in wanted):
        raise InputError(
            f"this job has measured {len(wanted) - missing} of the {len(wanted)} levels of its damage table, and all are needed; "
            "`autoeff resume` goes on with it"
        )
    return DamageTable.measured(problem, {key: trial.value(problem.quality) for key, trial in known.items()}), known


def _opened_out(job: Job, folder: Path | None, trials: Sequence[Trial]) -> Sensitivity:
    refuse_own(job, "which has no damage table")
    problem = problem_of(job)
    table, known = known_table(problem, trials)
    alone = {next((i, x) for i, x in enumerate(c.indices) if x): known[c.indices, c.windows] for c in table_candidates(problem)}
    rows: list[dict[str, Any]] = []
    for i, (decision, damages) in enumerate(zip(problem.space.decisions, table.damage, strict=True)):
        for level in range(1, len(decision.levels)):
            trial = alone.get((i, level))
            measured = None if trial is None else next((m for m in trial.measurements if m.name == problem.quality), None)
            rows.append(
                {
                    "decision": decision.key, "site": decision.site, "knob": decision.knob, "block": decision.block,
                    "level": decision.levels[level], "damage": damages[level] if damages[level] < inf else None,
                    "spread": None if measured is None else measured.spread, "tokens": None if measured is None else measured.tokens,
                    "trial": None if trial is None else trial.number, "method": "estimated" if trial is None else "measured",
                }
            )  # fmt: skip
    form = table_form(problem.space, problem.trials, problem.windows)
    return Sensitivity(
        job_id=job.id,
        folder=folder,
        quality=problem.quality,
        form=TABLE_WORDS[form],
        rows=tuple(_worst_first(rows)),
        sites=_sums(rows, "site", lambda row: _inside(row["site"], row["block"])),
        blocks=_sums(rows, "block", lambda row: row["block"]),
    )


def _sums(rows: Iterable[Mapping[str, Any]], name: str, place: Callable[[Mapping[str, Any]], Any]) -> tuple[dict[str, Any], ...]:
    groups: dict[tuple[Any, ...], list[float | None]] = {}
    for row in rows:
        groups.setdefault((row["knob"], place(row), row["level"]), []).append(row["damage"])
    found = [
        {
            "knob": knob, name: where, "level": level, "damage": None if None in damages else sum(d for d in damages if d is not None),
            "decisions": len(damages),
        }
        for (knob, where, level), damages in groups.items()
    ]  # fmt: skip
    return tuple(_worst_first(found))


def _worst_first(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: -inf if row["damage"] is None else -row["damage"])


def _inside(site: str, block: int) -> str:
    """The site's path inside its block."""
    before, found, after = site.partition(f".{block}.")
    return after if found else before
