"""One published rule alone: a search that ends after its baselines, with the rule among them (`autoeff allocate`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoeff.errors import InputError
from autoeff.search.guests import minimum_trials
from autoeff.search.job import JobSpec
from autoeff.search.seed import known_seeds, make_seeds
from autoeff.search.settings import Settings

__all__ = ["rule_job"]


def rule_job(fields: Mapping[str, Any], rules: str, settings: Settings) -> JobSpec:
    """The job that evaluates what `rules` make of the limits, and no more than it must besides.

    Args:
        fields: Of the job; without knobs those that the rules are about.
        rules: Names, separated by commas.
        settings: Of this machine.

    Raises:
        InputError: As a search; also no rule, or one that is about every knob where no knob is given.
    """
    from autoeff.evaluators.preparation import prepare

    names = [name.strip() for name in rules.split(",") if name.strip()]
    if not names:
        raise InputError(f"no rule is named; known: {', '.join(sorted(known_seeds()))}")
    knobs = fields.get("knobs") or list(dict.fromkeys(knob for name in names if (knob := _knob(name)) is not None))
    if not knobs:
        raise InputError(f"rule {names[0]} is about every knob; name some with --knobs")
    spec = JobSpec.parse({**fields, "knobs": knobs, "seeds": names, "sampler": "none"})
    preparation = prepare(spec.setup(settings.bank))
    space, windows = preparation.space, len(preparation.passages["search"].inputs)
    points = 1 if spec.limits else max(3, len(space.uniform))
    short = sum(rule.measures(space) for rule in make_seeds(names, list(knobs)))
    on_the_way = -(-short * max(1, windows // 4) // windows)
    # rules take at most half of what is left, and a richer table up to a third
    needed = minimum_trials(space, windows) + 2 * len(names) * points + 3 * on_the_way
    return spec.model_copy(update={"budget": spec.budget.model_copy(update={"trials": needed})})


def _knob(name: str) -> str | None:
    if name in known_seeds():
        return known_seeds()[name].knob
    make_seeds([name], ())  # which says what is known
    return None
