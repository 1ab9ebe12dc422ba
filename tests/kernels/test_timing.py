from __future__ import annotations

import time

import pytest
import torch

from autoeff.kernels.timing import Limits, limits, measure

CPU = torch.device("cpu")


def test_a_sleep_takes_as_long_as_it_says() -> None:
    found = measure({"short": lambda: time.sleep(2e-3), "long": lambda: time.sleep(6e-3)}, CPU, rounds=5)
    assert 2e3 <= found["short"].low_us <= found["short"].median_us <= found["short"].high_us
    assert found["long"].low_us >= 6e3
    assert found["short"].median_us < found["long"].median_us
    assert {timing.method for timing in found.values()} == {"wall clock, warm cache"}


def test_contestants_alternate_and_each_comes_first() -> None:
    order: list[str] = []

    def call(name: str) -> None:
        order.append(name)
        time.sleep(3e-3)  # long enough to be called once a timing

    measure({name: lambda name=name: call(name) for name in "abc"}, CPU, rounds=3)  # type: ignore[misc]
    assert order[6:] == list("abcbcacab")  # two calls of each before that


def test_short_calls_are_repeated() -> None:
    count = 0

    def call() -> None:
        nonlocal count
        count += 1

    found = measure({"nothing": call}, CPU, rounds=2)
    assert count > 100
    assert found["nothing"].median_us < 50


def test_floor_is_the_greater_of_bytes_and_operations() -> None:
    device = Limits(bytes_per_s=1e9, flops_per_s=1e12, cache_bytes=0)
    assert device.floor_us(1000, 0) == pytest.approx(1)
    assert device.floor_us(1000, 5_000_000) == pytest.approx(5)


def test_limits_of_this_machine_are_plausible() -> None:
    found = limits(CPU, torch.float32, rounds=2)
    assert 1e8 < found.bytes_per_s < 1e13
    assert 1e8 < found.flops_per_s < 1e14
    assert found.cache_bytes >= 1 << 18


def test_too_few_rounds_and_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 rounds on cpu or cuda: got 1 on cpu"):
        measure({"a": lambda: None}, CPU, rounds=1)
    with pytest.raises(ValueError, match="on meta"):
        measure({"a": lambda: None}, torch.device("meta"))


@pytest.mark.gpu
def test_a_copy_is_timed_from_memory_and_in_a_graph(cuda: torch.device) -> None:
    x = torch.randn(8 << 20, device=cuda)
    y = torch.empty_like(x)
    calls = {"read": lambda: float(x.sum()), "copy": lambda: y.copy_(x), "drawn": lambda: y.normal_()}
    found = measure(calls, cuda, rounds=10)  # what cannot be captured comes first, and spoils nothing
    assert found["read"].method == "cuda events, cold cache"
    assert found["copy"].method == found["drawn"].method == "cuda graph, cold cache"
    assert torch.randn(2, device=cuda).isfinite().all()
    assert 2 * x.nbytes / found["copy"].median_us * 1e6 < 1e13
