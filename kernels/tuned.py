"""Which configuration a kernel takes: the committed entry nearest to the sizes at hand. Nothing is timed while a model runs.

`tuning/<device>.json` (the device's name in lower case, other characters than letters and digits as `_`) overrides
`tuning/default.json` op by op. A file maps an op to a list of entries: `m`, `n`, `k`, and the configuration.

The default file holds what arithmetic and the compiler's resource table suggest; it was not timed on any device.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache, lru_cache
from math import log2
from pathlib import Path
from typing import Any

import torch

__all__ = ["SIZES", "configurations", "digest", "label", "nearest", "path_of"]

_FOLDER = Path(__file__).resolve().parent / "tuning"
SIZES = ("m", "n", "k")
"""Of an entry; the rest is its configuration."""


@cache
def configurations(op: str, device: str = "default") -> tuple[Mapping[str, Any], ...]:
    """Every committed entry of `op` for the device of this name, else those of the default.

    Raises:
        KeyError: The default has no such op.
    """
    for name in (device, "default"):
        path = path_of(name)
        entries = json.loads(path.read_text(encoding="utf-8")).get(op) if path.exists() else None
        if entries:
            return tuple(entries)
    raise KeyError(f"no configuration of {op} in {_FOLDER / 'default.json'}")


def nearest(op: str, m: int, n: int, k: int, device: torch.device) -> Mapping[str, Any]:
    """The configuration for these sizes: of the least committed M that is not below m (else the greatest), N and K nearest in doublings.

    M is never rounded down: it chooses the regime, and a kernel for one row cannot take five.
    """
    return _nearest(op, m, n, k, torch.cuda.get_device_name(device) if device.type == "cuda" else "default")


def path_of(device: str) -> Path:
    """Where the entries of the device of this name are, if there are any."""
    return _FOLDER / f"{re.sub(r'[^a-z0-9]+', '_', device.lower())}.json"


def digest(device: str) -> str:
    """Names what the times of kernels on the device of this name follow from: their sources and their configurations."""
    files = [*sorted(Path(__file__).resolve().parent.glob("*.py")), path_of("default"), path_of(device)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files if path.exists())).hexdigest()[:16]


def label(config: Mapping[str, Any]) -> str:
    """The entry in words, for tables."""
    return ", ".join(f"{name} {value}" for name, value in config.items() if name != "kernel")


@lru_cache(maxsize=4096)
def _nearest(op: str, m: int, n: int, k: int, device: str) -> Mapping[str, Any]:
    entries = configurations(op, device)
    rows = min((entry["m"] for entry in entries if entry["m"] >= m), default=max(entry["m"] for entry in entries))

    def distance(entry: Mapping[str, Any]) -> float:
        return sum(abs(log2(max(size, 1)) - log2(entry[name])) for name, size in (("n", n), ("k", k)))

    entry = min((entry for entry in entries if entry["m"] == rows), key=distance)
    return {name: value for name, value in entry.items() if name not in SIZES}
