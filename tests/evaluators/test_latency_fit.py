"""Fitted constants, against the ones that made the times."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from autoeff.evaluators.latency_fit import Row, solved

TRUE = {"model": 9e5, "attention": 1.7e5, "ffn": 2e4, "linear": 0.9, "packed": 1.2}


def rows(seed: int, *, noise: float = 0.0, **fixed: float) -> list[Row]:
    """Whole models of six blocks with sublayers left out and linears packed at random."""
    rng, found = random.Random(seed), []
    for number in range(16):
        drawn = {"model": 1.0, "linear": rng.uniform(0, 2e6), "packed": rng.uniform(0, 1e6), "attend": 0.0}
        features = drawn | {"attention": rng.randint(0, 6), "ffn": rng.randint(0, 6)} | fixed
        time = sum(TRUE.get(name, 0.0) * count for name, count in features.items()) * (1 + noise * rng.uniform(-1, 1))
        found.append(Row(str(number), features, time))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_constants_are_found_again(seed: int) -> None:
    found = solved(rows(seed))
    assert {name: found[name] for name in TRUE} == pytest.approx(TRUE, rel=1e-2)
    assert found["attend"] == 1.0  # nothing tells


def test_noise_leaves_times_of_new_models_within_it() -> None:
    found = solved(rows(0, noise=0.03))
    for row in rows(1):
        assert sum(found.get(name, 0.0) * count for name, count in row.features.items()) == pytest.approx(row.measured_ns, rel=0.06)


def test_what_never_varies_belongs_to_the_model() -> None:
    found = solved(rows(0, attention=6, ffn=6))
    assert "attention" not in found
    assert found["model"] == pytest.approx(TRUE["model"] + 6 * (TRUE["attention"] + TRUE["ffn"]), rel=1e-3)


def test_no_constant_is_negative() -> None:
    """A model that is faster with more in it: noise."""
    found = solved([Row("a", {"model": 1.0, "attention": 0.0}, 100.0), Row("b", {"model": 1.0, "attention": 6.0}, 90.0)])
    assert found["attention"] == 0.0
    assert 90.0 <= found["model"] <= 100.0


def test_a_disturbed_measurement_hardly_counts() -> None:
    disturbed = rows(0)
    disturbed[3] = replace(disturbed[3], measured_ns=3 * disturbed[3].measured_ns)
    disturbed[7] = replace(disturbed[7], measured_ns=2 * disturbed[7].measured_ns)
    assert {name: solved(disturbed)[name] for name in TRUE} == pytest.approx(TRUE, rel=0.1)


def test_factors_stay_near_one() -> None:
    measured = [Row(str(n), {"model": 1.0, "linear": 100.0 * n}, 1000.0 + 500 * n) for n in range(5)]
    assert solved(measured)["linear"] == 4.0


def test_one_model_gives_its_own_time() -> None:
    assert solved([Row("dense", {"model": 1.0, "linear": 40.0, "packed": 0.0, "attend": 0.0}, 100.0)])["model"] > 0
