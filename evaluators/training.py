"""The one trainer: some parameters, a loss, a fixed budget of tokens, an order of the data that a seed gives.

A step depends on its number alone, besides parameters and the optimizer's state: which windows it sees, the learning rate, and whatever
the loss draws by itself from the number. So a training that was killed goes on from its last checkpoint, and ends at the very weights at
which it would have ended.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from autoeff.errors import CandidateError, FailureClass
from autoeff.evaluators.bank import write_whole

__all__ = ["Course", "drawn", "train"]

_OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD,
}  # fmt: skip
_WARMUP = 0.05  # share of the steps
_CLIP = 1.0  # norm of the gradient
_CHECKPOINTS = 10  # of a whole training


@dataclass(frozen=True)
class Course:
    """How long, how fast and in which order.

    Attributes:
        tokens: Budget; the last step may exceed it.
        batch: Windows in a step.
        learning_rate: The greatest.
        optimizer: Name of it; there is no weight decay.
        seed: Of everything random.
    """

    tokens: int
    batch: int
    learning_rate: float
    optimizer: str = "adamw"
    seed: int = 0

    def steps(self, length: int) -> int:
        """Steps with windows of so many tokens."""
        return max(1, -(-self.tokens // (self.batch * length)))

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step: it rises linearly for a twentieth of the steps, then falls linearly to 0 after the last."""
        warm = max(1, round(_WARMUP * steps))
        return self.learning_rate * min((step + 1) / warm, (steps - step) / max(1, steps - warm))

    def rows(self, step: int, windows: int) -> Tensor:
        """Windows of a step, int64 [batch]: each of the `windows` once, in an order of its own, before any is seen again."""
        places = range(step * self.batch, (step + 1) * self.batch)
        orders = {turn: torch.randperm(windows, generator=drawn(self.seed, "order", turn)) for turn in {p // windows for p in places}}
        return torch.stack([orders[place // windows][place % windows] for place in places])


def drawn(seed: int, *names: object) -> torch.Generator:
    """A generator of its own for everything that has a name, on the CPU."""
    text = "/".join(map(str, (seed, *names)))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1)


def train(
    parameters: Mapping[str, Tensor],
    loss: Callable[[int, Tensor], Tensor],
    windows: int,
    length: int,
    course: Course,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:
    """Trains `parameters` in place; returns the loss of every step since the start or the checkpoint.

    Args:
        parameters: Leaves by name, float32; they require gradients while this runs.
        loss: A scalar from the number of a step and its windows, int64 [batch].
        windows: How many there are.
        length: Tokens in each.
        course: What is fixed beforehand.
        checkpoint: A file that holds the state while training goes on, and is gone afterwards; one that is there is gone on from.
        progress: Called with (done, total) steps.

    Raises:
        CandidateError: The loss is not finite.
    """
    steps = course.steps(length)
    optimizer = _OPTIMIZERS[course.optimizer]([{"params": list(parameters.values())}], lr=course.learning_rate, **_options(course))
    start = _read(checkpoint, parameters, optimizer) if checkpoint is not None else 0
    for parameter in parameters.values():
        parameter.requires_grad_()
    losses = []
    try:
        for step in range(start, steps):
            for group in optimizer.param_groups:
                group["lr"] = course.rate(step, steps)
            with torch.enable_grad():
                value = loss(step, course.rows(step, windows))
                if not bool(value.isfinite()):
                    said = f"step {step} of training has a loss of {float(value.detach())}; lower the learning rate"
                    raise CandidateError(FailureClass.NAN, said)
                optimizer.zero_grad()
                value.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters.values(), _CLIP)
            optimizer.step()
            losses.append(float(value.detach()))
            if checkpoint is not None and (step + 1) * _CHECKPOINTS // steps > step * _CHECKPOINTS // steps:
                _write(checkpoint, step + 1, parameters, optimizer)
            progress(step + 1, steps)
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return losses


def _options(course: Course) -> dict[str, Any]:
    return {"momentum": 0.9} if course.optimizer == "sgd" else {"weight_decay": 0.0}


def _write(path: Path, step: int, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    tensors = {f"parameter.{name}": parameter.detach().contiguous() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        tensors |= {f"{key}.{name}": value.contiguous() for key, value in state.items() if isinstance(value, Tensor)}
    write_whole(path, save(tensors, metadata={"step": str(step)}))


def _read(path: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Puts a checkpoint in force; the step to go on with, 0 where there is none or it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            step = int(file.metadata()["step"])
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a handle, not a mapping)
    except (FileNotFoundError, SafetensorError):
        return 0
    for key, value in found.items():
        kind, _, name = key.partition(".")
        parameter = parameters[name]
        if kind == "parameter":
            parameter.data.copy_(value)
        else:
            optimizer.state[parameter][kind] = value if kind == "step" else value.to(parameter.device)
    return step
