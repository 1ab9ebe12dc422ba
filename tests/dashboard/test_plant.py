"""Workers and measured operations."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace

from autoeff.dashboard.plant import operation_of, queues_of, workers_of
from autoeff.kernels.linear_wq import moved_bytes


def test_the_work_of_a_linear_is_known_by_its_name() -> None:
    dense = operation_of("linear k=8 m=2 n=4 rotated=0 float32", 1000)
    assert dense is not None
    assert (dense.kind, dense.flops, dense.bytes, round(dense.seconds * 1e9)) == ("dense", 128, 4 * (32 + 2 * 12), 1000)
    packed = operation_of("linear_wq bits=4 group=64 k=128 m=1 n=64 rotated=0 symmetric=1 float32", 10)
    assert packed is not None
    assert (packed.kind, packed.bytes) == ("4 bit", moved_bytes(1, 64, 128, 4, 64, True))
    assert operation_of("attention_decode batch=1 heads=3 float32", 10) is None
    assert operation_of("linear k=8 m=2 n=4 int7", 10) is None


def test_workers_that_live_come_first() -> None:
    facts = {"name": "<i>gpu</i>", "memory_bytes": 10**9, "cores": 2}
    lost = SimpleNamespace(
        worker="w1", kind="cpu", queues=["cpu"], alive=False, busy=True, started="2026-01-01T00:00:00+00:00", facts=facts
    )
    busy = SimpleNamespace(**vars(lost) | {"worker": "box/0-1.2/345/67.8", "alive": True})
    rows = workers_of([lost, busy], datetime(2026, 1, 1, 1, tzinfo=UTC))
    assert [(row["worker"], row["state"], row["device"]) for row in rows] == [
        ("box, process 345", "busy", "<i>gpu</i>"),
        ("w1", "lost", "<i>gpu</i>"),
    ]
    assert queues_of([lost, busy]) == [{"queue": "cpu", "workers": 1, "busy": 1}]
