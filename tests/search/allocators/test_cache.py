"""Tokens shared out exactly, and levels that stay within the limits: the part that all rules for the cache share."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest

from autoeff.errors import InputError
from autoeff.evaluators.model_statistics import AttentionStatistics, ModelStatistics
from autoeff.search.allocators.cache import CacheSeed, Tokens, exact_shares
from autoeff.search.allocators.dp import Allocator
from autoeff.search.limits import parse_limit
from autoeff.search.samplers.problem import Problem
from autoeff.search.seed import Given, known_seeds, make_seeds
from autoeff.spaces.costs import CostModel
from autoeff.spaces.space import Decision, SearchSpace

CONTEXT, BYTES = 256, 64
SHARES = (1, 0.75, 0.5, 0.375, 0.25, 0.125, 0.0625)
RULES = ("cake", "prefixkv", "pyramidkv")


def problem_of(layers: int, *limits: str, bits: bool = False) -> Problem:
    costs = tuple({} if share == 1 else {"cache_bytes": int(share * CONTEXT) * BYTES - CONTEXT * BYTES} for share in SHARES)
    decisions = [Decision(f"layers.{i}", "kv_budget", i, SHARES, {(): costs}) for i in range(layers)]
    if bits:
        decisions += [Decision(f"layers.{i}", "bits", i, (16, 4), {(): ({}, {"linear_bytes": -3000})}) for i in range(layers)]
    whole = layers * BYTES * CONTEXT
    dense = {
        "linear_bytes": 4000 * layers, "linear_parameters": 2000 * layers, "other_bytes": 0, "lookup_bytes": 0,
        "kv_bytes_per_token": layers * BYTES, "flops_per_token": 1, "cache_bytes": whole, "block_bytes": 0,
    }  # fmt: skip
    space = SearchSpace(tuple(decisions), dense)
    model = CostModel(space, batch=1, context=CONTEXT)
    return Problem(space, model, tuple(parse_limit(text, model) for text in limits), ("kl",), 100, 8, 0)


def statistics(layers: int, seed: int = 0) -> tuple[AttentionStatistics, ...]:
    """Geometric masses, from sharp to flat."""
    rng = random.Random(seed)
    found = []
    for _ in range(layers):
        decay = rng.uniform(0.5, 0.99)
        mass = tuple((1 - decay ** (k + 1)) / (1 - decay**CONTEXT) for k in range(CONTEXT))
        found.append(AttentionStatistics(mass, rng.uniform(1, 9), rng.uniform(0.1, 2)))
    return tuple(found)


def given_of(problem: Problem) -> Given:
    attention = {d.site: s for d, s in zip(problem.space.decisions, statistics(len(problem.space.decisions)), strict=True)}
    damage = [[float(level) for level in range(len(d.levels))] for d in problem.space.decisions]
    return Given(problem, problem.cost_limits, damage, CONTEXT, 16, 8, ModelStatistics(attention))


@pytest.mark.parametrize("seed", range(20))
def test_exact_shares_keep_total_and_bounds_and_move_as_little_as_any(seed: int) -> None:
    """Against brute force: no other whole numbers are nearer to what is wanted (least squares, up to rounding)."""
    rng = random.Random(seed)
    count, least, most = 3, 2, 12
    total = rng.randint(count * least, count * most)
    wanted = [rng.uniform(0, 15) for _ in range(count)]
    found = exact_shares(wanted, total, least, most)
    assert sum(found) == total
    assert all(least <= n <= most for n in found)
    every = (x for x in itertools.product(range(least, most + 1), repeat=count) if sum(x) == total)
    best = min(sum((n - w) ** 2 for n, w in zip(x, wanted, strict=True)) for x in every)
    assert sum((n - w) ** 2 for n, w in zip(found, wanted, strict=True)) <= best + 1e-9


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("mean", [20, 32, 64, 200])
def test_rules_share_out_the_total_exactly(name: str, mean: int) -> None:
    (rule,) = make_seeds([name], ["kv_budget"])
    assert isinstance(rule, CacheSeed)
    for layers in (1, 2, 5, 30):
        for extra in (0, 1, layers // 2):
            tokens = Tokens(layers, mean * layers + extra, 16, CONTEXT, 8, statistics(layers))
            found = rule.shares(tokens)
            assert sum(found) == tokens.total
            assert all(tokens.least <= n <= tokens.most for n in found)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("share", ["0.125x", "0.25x", "0.3x"])
def test_configurations_meet_the_budget_of_the_limit(name: str, share: str) -> None:
    problem = problem_of(8, f"kv_bytes<={share}")
    (rule,) = make_seeds([name], ["kv_budget"])
    found = rule.configuration(given_of(problem))
    assert found is not None
    spent, bound = problem.cost_model.exact("kv_bytes", found), problem.limits[0].bound
    assert spent <= bound
    # what is left does not buy the next level of any layer
    for i, level in enumerate(found):
        if level:
            raised = (*found[:i], level - 1, *found[i + 1 :])
            assert problem.cost_model.exact("kv_bytes", raised) > bound
    assert len(set(found)) > 1


def test_where_every_layer_wants_the_same_all_take_the_level_of_the_budget() -> None:
    class Even(CacheSeed):
        name = "even"

        def wanted(self, tokens: Tokens) -> list[float]:
            return [tokens.mean] * tokens.layers

    problem = problem_of(6, "kv_bytes<=0.25x")
    assert Even().configuration(given_of(problem)) == (SHARES.index(0.25),) * 6


def test_other_knobs_stay_as_in_the_additive_optimum_and_the_cache_keeps_its_share() -> None:
    """The optimum says how many bytes are the cache's; the rule distributes them."""
    problem = problem_of(4, "bytes_per_token<=0.5x", bits=True)
    (rule,) = make_seeds(["pyramidkv"], ["kv_budget", "bits"])
    damage = [[float(level) for level in range(len(SHARES))]] * 4 + [[0.0, 1e-6]] * 4
    found = rule.configuration(Given(problem, problem.cost_limits, damage, CONTEXT, 16, 8))
    assert found is not None
    base = Allocator(problem.space, problem.cost_model, problem.cost_limits).solve(damage)
    assert base is not None
    assert any(base[4:])
    assert found[4:] == base[4:]
    assert list(found[:4]) == sorted(found[:4])
    assert len(set(found[:4])) > 1
    assert problem.feasible(found)


def test_without_a_limit_on_the_cache_there_is_nothing_to_share_out() -> None:
    problem = problem_of(4, "linear_bytes<=0.5x", bits=True)
    for rule in make_seeds(RULES, ["kv_budget", "bits"]):
        assert rule.configuration(given_of(problem)) is None


def test_rules_are_found_by_their_knob_and_wrong_names_are_refused() -> None:
    assert set(RULES) <= set(known_seeds())
    assert [seed.name for seed in make_seeds(None, ["kv_budget"])] == sorted(RULES)
    assert make_seeds(None, ["bits"]) == []
    with pytest.raises(InputError, match="unknown allocator 'lotto'; known: alphapruning, cake, dp, "):
        make_seeds(["lotto"], ["kv_budget"])
    with pytest.raises(InputError, match="seed cake shares out kv_budget, which is not among the knobs bits"):
        make_seeds(["cake"], ["bits"])


def test_a_total_is_what_the_limit_leaves() -> None:
    problem = problem_of(5, "kv_bytes<=0.2x")
    tokens = CacheSeed._tokens(make_seeds(["pyramidkv"], ["kv_budget"])[0], given_of(problem), (0,) * 5, list(range(5)))  # type: ignore[arg-type]
    assert tokens is not None
    assert tokens.total == int(Fraction(1, 5) * 5 * CONTEXT)
