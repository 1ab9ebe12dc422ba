"""How long calls take, side by side, and what the device could do at best.

`measure` is the only clock of this folder. Contestants alternate within a round, another one first each time, so that a slow moment of the
machine meets all of them; a time is the median over rounds, with the quartiles as spread.

On a GPU each call is captured as a CUDA graph and replayed between two events behind a write that evicts the second-level cache: weights
come from memory, as they do in a model. A time includes the start of a graph, a few microseconds, which is not subtracted. A call that
cannot be captured (it reads from the device) runs without a graph, and its `method` says so. On the CPU: wall clock, over as
many calls as fill `AIMED_S`; operands stay in its caches where they fit.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

from autoeff.kernels.failures import out_of_memory

__all__ = ["AIMED_S", "Limits", "Timing", "limits", "measure"]

AIMED_S = 2e-3
"""Calls of one timing on the CPU are repeated up to about this time: a small product is shorter than the clock is exact."""
_FLUSH_BYTES = 256 << 20  # several times any second-level cache
_WARM_UP_S = 0.2  # a GPU leaves its idle clock


@dataclass(frozen=True)
class Timing:
    """The time of one call.

    Attributes:
        median_us: Over rounds, in microseconds.
        low_us, high_us: The quartiles.
        rounds: How many.
        method: `wall clock, warm cache`, `cuda graph, cold cache` or `cuda events, cold cache`.
    """

    median_us: float
    low_us: float
    high_us: float
    rounds: int
    method: str


@dataclass(frozen=True)
class Limits:
    """What the device reaches in plain measurements, for floors.

    Attributes:
        bytes_per_s: Reading or copying a tensor much larger than the caches, the faster of the two.
        flops_per_s: A large product of the dtype asked for.
        cache_bytes: What may stay in a cache between calls; 0 where it is evicted before each.
    """

    bytes_per_s: float
    flops_per_s: float
    cache_bytes: int

    def floor_us(self, moved: int, operations: int) -> float:
        """The least time for so many bytes and operations, in microseconds."""
        return max(moved / self.bytes_per_s, operations / self.flops_per_s) * 1e6


def measure(calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 30) -> dict[str, Timing]:
    """The time of each call by its name; all alternate.

    Args:
        calls: Without arguments; their results are dropped.
        device: Where they run.
        rounds: At least 2.

    Raises:
        ValueError: Fewer rounds, or a device that is neither CPU nor CUDA.
    """
    if rounds < 2 or device.type not in ("cpu", "cuda"):
        raise ValueError(f"need at least 2 rounds on cpu or cuda: got {rounds} on {device}")
    if not calls:
        return {}
    prepared = {name: (_on_gpu if device.type == "cuda" else _on_cpu)(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for number in range(rounds):
        first = number % len(order)
        for name in order[first:] + order[:first]:
            times[name].append(prepared[name][0]())
    found = {}
    for name, values in times.items():
        low, _, high = quantiles(values, n=4)
        found[name] = Timing(median(values) * 1e6, low * 1e6, high * 1e6, rounds, prepared[name][1])
    return found


def limits(device: torch.device, dtype: torch.dtype, rounds: int = 5) -> Limits:
    """What `device` reaches, by measuring it (about a second on a CPU)."""
    large = torch.ones(_FLUSH_BYTES // 4, device=device)
    other = torch.empty_like(large)
    size = 4096 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    found = measure({"read": large.sum, "copy": lambda: other.copy_(large), "product": lambda: left @ right}, device, rounds)
    best = max(large.nbytes / found["read"].low_us, 2 * large.nbytes / found["copy"].low_us)
    return Limits(best * 1e6, 2 * size**3 / found["product"].low_us * 1e6, 0 if device.type == "cuda" else _last_cache_bytes())


def _on_cpu(call: Callable[[], object]) -> tuple[Callable[[], float], str]:
    call()
    started = time.perf_counter()
    call()
    number = max(1, min(1000, round(AIMED_S / max(time.perf_counter() - started, 1e-9))))

    def once() -> float:
        started = time.perf_counter()
        for _ in range(number):
            call()
        return (time.perf_counter() - started) / number

    return once, "wall clock, warm cache"


def _on_gpu(call: Callable[[], object]) -> tuple[Callable[[], float], str]:
    until = time.perf_counter() + _WARM_UP_S
    while time.perf_counter() < until:
        call()
        torch.cuda.synchronize()
    graph = None if _waits(call) else _captured(call)
    run, method = (call, "cuda events, cold cache") if graph is None else (graph.replay, "cuda graph, cold cache")
    flush = _flush(torch.cuda.current_device())

    def once() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        flush.zero_()  # long enough for the launches behind it to be queued
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    return once, method


def _waits(call: Callable[[], object]) -> bool:
    """Whether a call waits for the device. Its capture would fail, and leave allocator and generator as if it still went on."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(action="ignore"):  # that it does not see every way to wait; those fail in the capture
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def _captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
    """The graph of a call; None where it cannot be captured."""
    stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        return None
    finally:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own in force
        torch.cuda.synchronize()  # fails again where the device itself does
    return graph


@cache
def _flush(device: int) -> Tensor:
    return torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device=f"cuda:{device}")


def _last_cache_bytes() -> int:
    """Of the largest cache of a core as Linux tells it, else 32 MiB."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        sizes.append(int(text.rstrip("KM")) << {"K": 10, "M": 20}.get(text[-1], 0))
    return max(sizes) or 32 << 20
