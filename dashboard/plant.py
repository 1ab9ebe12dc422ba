"""Workers and measured operations as rows and points."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from autoeff.dashboard.words import age, file_bytes, plain

__all__ = ["Operation", "operation_of", "queues_of", "workers_of"]

_PAIR = re.compile(r"([a-z]+)=(\d+)")
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Operation:
    """A measured operation whose work is known.

    Attributes:
        name: As measured, such as `linear k=64 m=1 n=64 float32`.
        kind: Its first word, and the bits of the weight where they are packed.
        flops: Floating-point operations of one call.
        bytes: Read and written at the least.
        seconds: Median time of one call.
    """

    name: str
    kind: str
    flops: int
    bytes: int
    seconds: float


def workers_of(items: Sequence[Any], now: datetime) -> list[dict[str, Any]]:
    """Rows for people, those that live first."""
    rows = []
    for worker in sorted(items, key=lambda worker: not worker.alive):
        facts: Mapping[str, Any] = worker.facts
        rows.append(
            {
                "state": ("busy" if worker.busy else "idle") if worker.alive else "lost",
                "device": plain(facts.get("name") or worker.kind, 60),
                "takes": plain(", ".join(worker.queues), 80),
                "memory": file_bytes(facts.get("memory_bytes")),
                "cores": str(facts.get("cores") or ""),
                "torch": plain(facts.get("torch") or "", 40),
                "since": age(worker.started, now),
                "worker": _process(worker.worker),
            }
        )
    return rows


def _process(worker: str) -> str:
    """A worker for people: its machine and its process, without what only tells restarts of the machine apart."""
    host, _, rest = worker.partition("/")
    number = rest.split("/")[1:2]
    return plain(f"{host}, process {number[0]}" if number else worker, 60)


def queues_of(items: Sequence[Any]) -> list[dict[str, Any]]:
    """For each queue how many workers take from it."""
    rows: dict[str, dict[str, Any]] = {}
    for worker in items:
        for queue in worker.queues if worker.alive else ():
            row = rows.setdefault(queue, {"queue": plain(queue, 60), "workers": 0, "busy": 0})
            row["workers"] += 1
            row["busy"] += worker.busy
    return [rows[name] for name in sorted(rows)]


def operation_of(name: str, median_ns: int) -> Operation | None:
    """The work of a measured operation; None where it is not known from its name: attention, experts and the like."""
    from autoeff.kernels.linear_wq import moved_bytes  # Triton takes a second to import, and most pages do without

    kind, _, rest = name.partition(" ")
    sizes = {key: int(value) for key, value in _PAIR.findall(rest)}
    if kind not in ("linear", "linear_wq") or not {"k", "m", "n"} <= sizes.keys() or median_ns <= 0:
        return None
    k, m, n = sizes["k"], sizes["m"], sizes["n"]
    if kind == "linear":
        width = _BYTES.get(rest.rpartition(" ")[2])
        if width is None:
            return None
        moved, label = width * (k * n + m * (k + n)), "dense"
    elif {"bits", "group", "symmetric"} <= sizes.keys():
        moved, label = moved_bytes(m, n, k, sizes["bits"], sizes["group"], bool(sizes["symmetric"])), f"{sizes['bits']} bit"
    else:
        return None
    return Operation(name, label, 2 * k * m * n, moved, median_ns * 1e-9)
