"""Adapters as files that PEFT loads: `adapter_config.json` with a rank for every linear, and their factors as safetensors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from autoeff.errors import InputError
from autoeff.spaces.adapters import Adapter, scale

__all__ = ["CONFIG", "WEIGHTS", "read_peft", "write_peft"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def write_peft(folder: Path, adapters: Mapping[str, Adapter], base: str, *, transposed: bool) -> None:
    """Writes the terms in force of adapters by module path.

    Args:
        folder: Made if it is not there.
        adapters: Those of rank 0 are left out.
        base: Of the model, for people and for PEFT's `AutoPeftModel`.
        transposed: Whether its linears keep their weights [K, N], as those of GPT-2.

    Raises:
        InputError: Every rank is 0, which PEFT has no form for.
    """
    ranks = {name: adapter.rank for name, adapter in adapters.items() if adapter.rank}
    if not ranks:
        raise InputError("every adapter of this configuration has rank 0: there is nothing to write")
    usual = Counter(ranks.values()).most_common(1)[0][0]
    other = {name: rank for name, rank in ranks.items() if rank != usual}
    alphas = {name: rank * scale(rank) for name, rank in other.items()}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True, "bias": "none",
        "fan_in_fan_out": transposed, "lora_dropout": 0.0, "r": usual, "lora_alpha": usual * scale(usual), "rank_pattern": other,
        "alpha_pattern": alphas,
        "target_modules": sorted(ranks),
    }  # fmt: skip
    tensors = {}
    for name, rank in ranks.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = adapters[name].a[:rank].cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = adapters[name].b[:, :rank].cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def read_peft(folder: Path, device: torch.device) -> dict[str, Adapter]:
    """The adapters that `write_peft` wrote, by module path.

    Raises:
        InputError: The folder holds none.
    """
    try:
        tensors = load_file(folder / WEIGHTS, device=str(device))
    except (FileNotFoundError, SafetensorError) as error:
        raise InputError(f"cannot read the adapter in {folder}: {error}") from None
    end = ".lora_A.weight"
    names = [name.removeprefix(_PREFIX).removesuffix(end) for name in tensors if name.endswith(end)]
    return {
        name: Adapter(tensors[f"{_PREFIX}{name}.lora_A.weight"].float(), tensors[f"{_PREFIX}{name}.lora_B.weight"].float())
        for name in names
    }
