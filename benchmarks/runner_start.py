"""How soon a runner has opened the bundled model: forked, as on CPUs, or started, as for GPUs.

    python benchmarks/runner_start.py [--times 7]

Both ways in turn, in one process whose fork server is there already: this is what a search waits after a candidate that failed. Prints
medians and writes `benchmarks/results/runner_start.json`.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from autoeff.search import runner_process
from autoeff.search.job import JobSpec
from autoeff.search.runner_process import RunnerProcess
from autoeff.search.settings import Settings

RESULTS = Path(__file__).parent / "results" / "runner_start.json"
JOB = {"model": "demo", "knobs": {"bits": {}, "skip": {}}, "data": {"windows": 4, "length": 64}, "eval_data": {"windows": 4, "length": 64}}


def opening_s(settings: Settings, forked: bool) -> float:
    """Seconds from nothing to a warm runner."""
    runner_process.forks = lambda device: forked
    with RunnerProcess(JobSpec.parse(JOB).setup(settings.bank), settings, settings.home / "log") as runner:
        runner.open()
        return runner.opening_s


def main(times: Annotated[int, typer.Option(help="Of each.")] = 7) -> None:
    seconds: dict[str, list[float]] = {"forked": [], "started": []}
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(home=Path(folder))
        opening_s(settings, forked=True)  # builds the bank
        for _ in range(times):
            for way, found in seconds.items():
                found.append(opening_s(settings, forked=way == "forked"))
    facts = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
    RESULTS.write_text(json.dumps(facts | {"seconds": seconds}, indent=1) + "\n")
    for way, found in seconds.items():
        print(f"{way:8s} median {statistics.median(found):5.2f} s, {min(found):.2f} to {max(found):.2f} s")


if __name__ == "__main__":
    sys.exit(typer.run(main))
