"""What was found for levels that no weights hold, as a file beside an exported checkpoint: which experts stay, which thresholds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from autoeff.errors import InputError
from autoeff.evaluators.bank import Step
from autoeff.spaces.knob import KINDS, Undo

__all__ = ["FILE", "built_for", "put", "write_built"]

FILE = "levels.safetensors"


def write_built(folder: Path, built: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes the tensors of some decisions, by their keys; no file where there are none."""
    tensors = {f"{key}/{name}": tensor.contiguous() for key, parts in built.items() for name, tensor in parts.items()}
    if tensors:
        save_file(tensors, folder / FILE)


def built_for(folder: Path, key: str) -> dict[str, Tensor]:
    """The tensors of one decision.

    Raises:
        InputError: The file is absent, damaged, or holds none for it.
    """
    try:
        with safe_open(folder / FILE, framework="pt") as file:
            names = [name for name in file.keys() if name.rpartition("/")[0] == key]  # noqa: SIM118  (a handle, not a mapping)
            found = {name.rpartition("/")[2]: file.get_tensor(name) for name in names}
    except (FileNotFoundError, SafetensorError) as error:
        raise InputError(
            f"{key} needs what was found for it: cannot read {folder / FILE}: {error}; export with --format hf-dense"
        ) from None
    if not found:
        raise InputError(f"{folder / FILE} holds nothing for {key}; export the configuration again")
    return found


def put(model: nn.Module, steps: Sequence[Step], built: Callable[[str], Mapping[str, Tensor]]) -> list[Undo]:
    """Puts the levels among `steps` in force that no weights hold, in the order of their kinds; to be undone last in, first out."""
    undos: list[Undo] = []
    for step in sorted(steps, key=lambda step: KINDS.index(step.knob.kind)):
        if step.knob.beside_weights:
            found = built(f"{step.site.name}:{step.knob.name}") if step.knob.applies_built else {}
            undos.append(step.knob.apply_built(model, step.site, step.level, found))
    return undos
