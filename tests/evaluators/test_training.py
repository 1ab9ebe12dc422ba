"""The trainer: budget, order, rate, what is kept of a training that was killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autoeff.errors import CandidateError
from autoeff.evaluators.training import Course, drawn, train

COURSE = Course(tokens=40 * 6 * 4, batch=4, learning_rate=0.05, seed=3)  # 40 steps of 4 windows of 6 tokens
INPUTS = torch.randn(10, 5, generator=torch.Generator().manual_seed(0))
TARGETS = INPUTS @ torch.arange(5.0)[:, None]


class Regression:
    """Weights that learn a linear map; `dies_at` a step as a killed process does, so that only files are left."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.parameters = {"layer.weight": torch.zeros(5, 1), "layer.idle": torch.ones(2)}
        self.seen: list[list[int]] = []
        self._dies_at = dies_at

    def loss(self, step: int, rows: Tensor) -> Tensor:
        if step == self._dies_at:
            raise KeyboardInterrupt
        self.seen.append(rows.tolist())
        noise = torch.randn(4, 1, generator=drawn(3, "noise", step))
        return (INPUTS[rows] @ self.parameters["layer.weight"] - TARGETS[rows] + 0.1 * noise).square().mean()

    def train(self, course: Course, checkpoint: Path | None = None) -> list[float]:
        return train(self.parameters, self.loss, len(INPUTS), 6, course, checkpoint)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("dies_at", [1, 17, 39])
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path, optimizer: str, dies_at: int) -> None:
    course, path = replace(COURSE, optimizer=optimizer, learning_rate=0.02), tmp_path / "training.checkpoint"
    whole = Regression()
    losses = whole.train(course)
    assert losses[-1] < 0.5 * losses[0]
    killed, resumed = Regression(dies_at), Regression()
    with pytest.raises(KeyboardInterrupt):
        killed.train(course, path)
    again = resumed.train(course, path)
    assert len(again) < 40 or dies_at < 4  # ten checkpoints a training
    assert again == losses[-len(again) :]
    assert all(torch.equal(resumed.parameters[name], tensor) for name, tensor in whole.parameters.items())
    assert torch.equal(whole.parameters["layer.idle"], torch.ones(2))
    assert not path.exists()


def test_a_damaged_checkpoint_is_none(tmp_path: Path) -> None:
    path = tmp_path / "training.checkpoint"
    path.write_bytes(b"half of a fi")
    assert len(Regression().train(COURSE, path)) == 40


def test_windows_come_once_each_in_an_order_of_the_seed() -> None:
    first, second, other = Regression(), Regression(), Regression()
    first.train(COURSE)
    second.train(COURSE)
    other.train(replace(COURSE, seed=4))
    assert first.seen == second.seen != other.seen
    flat = [row for rows in first.seen for row in rows]
    assert len(first.seen) == 40
    turns = [flat[i : i + 10] for i in range(0, len(flat), 10)]
    assert all(sorted(turn) == list(range(10)) for turn in turns)
    assert turns[0] != turns[1]


def test_the_rate_rises_and_falls_to_zero() -> None:
    rates = [COURSE.rate(step, 40) for step in range(40)]
    assert rates[0] == pytest.approx(0.025)
    assert rates[1] == max(rates) == 0.05
    assert rates[-1] == pytest.approx(0.05 / 38)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert Course(1, 1, 1.0).rate(0, 1) == 1.0


def test_a_training_that_diverges_says_so() -> None:
    with pytest.raises(CandidateError, match=r"step \d+ of training has a loss of (inf|nan); lower the learning rate"):
        Regression().train(replace(COURSE, optimizer="sgd", learning_rate=1e38))
    parameters = Regression().parameters
    assert not any(parameter.requires_grad for parameter in parameters.values())
