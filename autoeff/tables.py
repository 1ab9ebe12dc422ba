"""What the verbs that weigh runs print: `resolve`, `sensitivity` and `compare`, one function for each."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from autoeff.console import print_pairs, print_table
from autoeff.spaces.measurements import measure

if TYPE_CHECKING:
    from autoeff.search.resolve import Resolution

__all__ = ["print_resolution"]

Row = Mapping[str, Any]


def print_resolution(resolution: Resolution) -> None:
    """Predicted and measured side by side, the answer and its configuration."""
    quality, costs = resolution.quality, resolution.costs
    held_out = f"{quality}_held_out"

    def cells(role: str, row: Row, expected: Row | None = None) -> list[object]:
        values = row["measurements"]
        value = values.get(quality)
        shown = [_text(values, name) for name in costs]
        spread = None if value is None or "spread" not in value else f"{value['spread']:.2g}"
        method = "failed" if value is None else value["method"]
        before = None if expected is None else measure(quality).text(expected["value"])
        return [role, method, row.get("trial"), *shown, _text(values, quality), spread, _text(values, held_out), before]

    rows = [cells("expected to be best", resolution.predicted)]
    rows += [cells("proposal", row, row["predicted"]) for row in resolution.proposals]
    if resolution.measured is not None:
        rows.append(cells("best measured", resolution.measured))
    columns = ["", "method", "trial", *costs, quality, "spread", held_out, "was predicted"]
    kept = [i for i in range(len(columns)) if i < 3 or any(row[i] is not None for row in rows)]
    print_table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows], left=2)
    sys.stdout.write("\n")
    print_pairs({"limits": ", ".join(resolution.limits), "answer": resolution.reason, "digest": resolution.chosen["digest"]})
    sys.stdout.write("\n")
    print_table(["decision", "level"], resolution.chosen["configuration"].items())


def _text(measurements: Mapping[str, Row], name: str) -> str | None:
    return measure(name).text(measurements[name]["value"]) if name in measurements else None
