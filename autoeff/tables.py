"""What the verbs that weigh runs print: `resolve`, `sensitivity` and `compare`, one function for each."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autoeff.console import print_pairs, print_table
from autoeff.spaces.measurements import described

if TYPE_CHECKING:
    from autoeff.search.compare import Comparison
    from autoeff.search.resolve import Resolution
    from autoeff.search.sensitivity import Sensitivity

__all__ = ["print_attribution", "print_comparison", "print_from_scratch", "print_latency", "print_resolution", "print_sensitivity"]

Row = Mapping[str, Any]


def print_latency(latency: Row) -> None:
    """Times of dense, the best uniform level and what was found, as composed and as measured end to end."""
    method, measured = latency["method"], latency["method"] != "estimated"
    columns: list[str] = ["", "within", "trial"]
    for name in latency["rows"][0]["times"] if latency["rows"] else ():
        columns += [f"{name} ({method})", *(["measured", "spread", "error"] if measured else [])]
    rows: list[list[object]] = []
    for row in latency["rows"]:
        cells: list[object] = [row["role"], row["point"], row["trial"]]
        for name, time in row["times"].items():
            expected, found = time["predicted"]["value"], time.get("measured")
            cells.append(described(name).text(expected))
            if found:
                cells += [described(name).text(found["value"]), f"{found['spread']:.2g}", f"{expected / found['value'] - 1:+.1%}"]
            elif measured:
                cells += [None, None, None]
        rows.append(cells)
    print_table(columns, rows, title=f"latency: {latency['device']}, batch {latency['batch']}, context {latency['context']}", left=2)
    if latency["failure"]:
        sys.stdout.write(f"measuring failed: {latency['failure']}\n")


def print_attribution(attribution: Row, quality: str) -> None:
    """What each knob earned: the held-out quality of its best replacement by one level everywhere, beside what was found."""
    text = described(f"{quality}_held_out").text
    print_table(
        ["knob", "at one level everywhere", "the other knobs", "trial", f"{quality}, held out", "earned"],
        [
            [row["knob"], row["level"], row["rest"], row["trial"], text(row["held_out"]), f"{row['earned']:+.4g}"]
            for row in attribution["rows"]
        ],
        title=f"what each knob earned: trial {attribution['trial']} ({text(attribution['held_out'])}) against its best replacement",
        left=3,
    )


def print_from_scratch(rows: Sequence[Row]) -> None:
    """Held-out losses with a prefix of the adapter that was trained once, and with adapters of their own."""
    text = described("loss_held_out").text
    cells = [
        [r["role"], r["label"] or r["point"], r["trial"], *(None if r[n] is None else text(r[n]) for n in ("prefix", "from_scratch"))]
        for r in rows
    ]
    print_table(["", "label", "trial", "as searched", "trained from scratch"], cells, title="loss on the held-out text", left=2)
    for row in rows:
        if row["failure"]:
            sys.stdout.write(f"training trial {row['trial']} from scratch failed: {row['failure']}\n")


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
        before = None if expected is None else described(quality).text(expected["value"])
        return [role, method, row.get("trial"), *shown, _text(values, quality), spread, _text(values, held_out), before]

    rows = [cells("expected to be best", resolution.predicted)]
    rows += [cells("proposal", row, row["predicted"]) for row in resolution.proposals]
    if resolution.measured is not None:
        rows.append(cells("best measured", resolution.measured))
    methods = {name: resolution.predicted["measurements"][name]["method"] for name in costs}
    titles = [name if methods[name] == "exact" else f"{name} ({methods[name]})" for name in costs]
    columns = ["", "method", "trial", *titles, quality, "spread", held_out, "was predicted"]
    kept = [i for i in range(len(columns)) if i < 3 or any(row[i] is not None for row in rows)]
    print_table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows], left=2)
    sys.stdout.write("\n")
    print_pairs({"limits": ", ".join(resolution.limits), "answer": resolution.reason, "digest": resolution.chosen["digest"]})
    sys.stdout.write("\n")
    print_table(["decision", "level"], resolution.chosen["configuration"].items())


def print_comparison(comparison: Comparison) -> None:
    """What each run found, the best of each at common budgets, and the settings that differ."""
    quality, held_out = comparison.quality, f"{comparison.quality}_held_out"
    cost = comparison.cost
    names = [run["run"] for run in comparison.runs]
    others = [] if comparison.own else ["avg_bits", held_out]
    figures = [name for name in dict.fromkeys([cost, *others[:1], quality, *others[1:]]) if name != "trial"]

    titles = [f"{name} ({comparison.method})" if comparison.method and name == cost else name for name in figures]

    def cells(trial: Row | None) -> list[object]:
        if trial is None:
            return [None] * (1 + len(figures))
        values = {**trial["costs"], quality: trial[quality], held_out: trial[held_out]}
        return [trial["trial"], *(None if values.get(name) is None else described(name).text(values[name]) for name in figures)]

    print_table(
        ["run", "state", "limits", "evaluations", "found trial", *titles],
        [[r["run"], r["state"], ", ".join(r["limits"]), f"{r['evaluations']:.4g}", *cells(r["found"])] for r in comparison.runs],
        left=3,
    )
    sys.stdout.write("\n")
    print_table(
        [f"best {quality} within", *names, "winner"],
        [
            [
                budget["budget"],
                *(None if trial is None else described(quality).text(trial[quality]) for trial in budget["best"]),
                budget["winner"] or "equal",
            ]
            for budget in comparison.budgets
        ],
    )
    sys.stdout.write("\n")
    if comparison.settings:
        shown = ([_setting(value) for value in values] for values in comparison.settings.values())
        print_table(["setting", *names], [[name, *values] for name, values in zip(comparison.settings, shown, strict=True)])
    else:
        sys.stdout.write("no setting differs\n")
    sys.stdout.write(f"\n{len(comparison.decisions)} decisions of the found configurations differ\n")
    for notice in comparison.notices:
        sys.stdout.write(f"{notice}\n")


def print_sensitivity(found: Sensitivity) -> None:
    """Every level of every decision, the worst first; then the sums over blocks and over sites."""
    quality = found.quality

    def text(damage: float | None) -> str:
        return "fails" if damage is None else described(quality).text(damage)

    sys.stdout.write(f"{quality} lost by each level alone: {found.form}\n\n")
    print_table(
        ["decision", "level", f"{quality} alone", "spread", "method", "trial"],
        [
            [r["decision"], r["level"], text(r["damage"]), None if r["spread"] is None else f"{r['spread']:.2g}", r["method"], r["trial"]]
            for r in found.rows
        ],
    )
    for name, title, sums in (("site", "in all blocks together", found.sites), ("block", "at all sites of a block together", found.blocks)):
        sys.stdout.write("\n")
        print_table(
            [name, "knob", "level", f"sum of {quality}", "decisions"],
            [[row[name], row["knob"], row["level"], text(row["damage"]), row["decisions"]] for row in sums],
            title=title,
            left=2,
        )


def _setting(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _text(measurements: Mapping[str, Row], name: str) -> str | None:
    return described(name).text(measurements[name]["value"]) if name in measurements else None
