"""Problems with a known damage: close to additive, with interactions of pairs, and sublayers that silence what is inside them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from autoeff.search.guests import preamble
from autoeff.search.limits import parse_limit
from autoeff.search.samplers.evidence import Evaluation
from autoeff.search.samplers.plan import Step, additive_plan
from autoeff.search.samplers.problem import Candidate, Problem
from autoeff.spaces.costs import CostModel
from autoeff.spaces.space import Decision, SearchSpace

BITS = (16, 8, 6, 4, 3, 2)
WINDOWS = 8


@dataclass(frozen=True)
class Toy:
    """A problem whose damage is the squared norm of a sum: each level of each decision adds a vector of its own.

    Attributes:
        problem: What samplers see.
        vectors: [decisions, levels, dimensions]; the dense level's is zero.
    """

    problem: Problem
    vectors: np.ndarray

    def damage(self, indices: tuple[int, ...], windows: int) -> float:
        """The damage; on few windows it is up to 5 % off."""
        active = self.problem.space.active(indices)
        found = float((sum(self.vectors[i, level] for i, (level, on) in enumerate(zip(indices, active, strict=True)) if on) ** 2).sum())
        return found if windows == self.problem.windows else found * (1 + 0.05 * np.cos(sum(i * x for i, x in enumerate(indices))))

    def value(self, candidate: Candidate) -> float:
        return self.damage(candidate.indices, candidate.windows)

    def guests(self) -> list[Evaluation]:
        steps = preamble(self.problem)
        found: list[Evaluation] = []
        batch = next(steps)
        while True:
            found += [Evaluation(c.indices, c.windows, self.value(c)) for c in batch]
            try:
                batch = steps.send([self.value(c) for c in batch])
            except StopIteration:
                return found

    def searched(self, answer: Callable[[Candidate], float] | None = None) -> list[tuple[Step, list[Candidate]]]:
        """Every step of the additive plan with its candidates, answered with `answer`."""
        answer = answer or self.value
        plan = additive_plan(self.problem, self.guests())
        steps: list[tuple[Step, list[Candidate]]] = []
        step = next(plan, None)
        while step is not None:
            candidates = step.candidates()
            steps.append((step, candidates))
            if len(candidates) < step.count:
                break
            try:
                step = plan.send([Evaluation(c.indices, c.windows, answer(c)) for c in candidates])
            except StopIteration:
                break
        return steps


@pytest.fixture
def toy() -> Callable[..., Toy]:
    """Makes toys: blocks of three linears, the first two inside a sublayer that can be skipped if `skip`."""

    def make(
        blocks: int, *, limits: tuple[str, ...] = ("linear_bytes<=0.25x",), trials: int = 200, skip: bool = False, seed: int = 0,
        objectives: tuple[str, ...] = ("kl",), levels: tuple[int, ...] = BITS,
    ) -> Toy:  # fmt: skip
        rng, draw = random.Random(seed), np.random.default_rng(seed)
        decisions: list[Decision] = []
        alone: list[list[float]] = []
        parameters = 0
        for block in range(blocks):
            parent = None
            sizes = [rng.choice([256, 512, 1024]) for _ in range(3)]
            if skip:
                parent = len(decisions)
                cost = {"linear_bytes": -2 * sum(sizes[:2])}
                decisions.append(
                    Decision(f"b{block}.attn", "skip", block, ("keep", "skip"), {(): ({}, cost)}, None, (0, None), uniform=False)
                )
                alone.append([0.0, rng.lognormvariate(-1.5, 0.8)] + [0.0] * (len(levels) - 2))
            for k, size in enumerate(sizes):
                costs = tuple({"linear_bytes": size * b // 8 - 2 * size} if b < 16 else {} for b in levels)
                above = parent if k < 2 else None
                decisions.append(Decision(f"b{block}.{k}", "bits", block, levels, {() if above is None else (0,): costs}, above))
                alone.append([0.0, *(rng.lognormvariate(-2.5 - 1.5 * (b - 3), 0.5) for b in levels[1:])])
                parameters += size
        dense = {
            "linear_bytes": 2 * parameters, "linear_parameters": parameters, "other_bytes": 100, "lookup_bytes": 0,
            "kv_bytes_per_token": 8, "flops_per_token": 2 * parameters,
        }  # fmt: skip
        space = SearchSpace(tuple(decisions), dense)
        costs_of = CostModel(space, batch=1, context=8)
        problem = Problem(space, costs_of, tuple(parse_limit(text, costs_of) for text in limits), objectives, trials, WINDOWS, seed)
        vectors = draw.standard_normal((len(decisions), len(levels), 40))
        vectors *= np.sqrt(np.array(alone))[:, :, None] / np.linalg.norm(vectors, axis=2, keepdims=True)
        return Toy(problem, vectors)

    return make
