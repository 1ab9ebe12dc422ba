"""Limits: what is read, what is refused, and that arithmetic decides exactly."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoeff.errors import InputError, UnreachableLimit
from autoeff.search.limits import check_reachable, feasible, least_reachable, parse_limit
from autoeff.spaces.costs import CostModel
from autoeff.spaces.space import Decision, SearchSpace

DENSE = {
    "linear_bytes": 1000,
    "linear_parameters": 500,
    "other_bytes": 200,
    "lookup_bytes": 50,
    "kv_bytes_per_token": 4,
    "flops_per_token": 9,
}
SPACE = SearchSpace(
    (
        Decision("a", "skip", 0, ("keep", "skip"), {(): ({}, {"linear_bytes": -600, "kv_bytes_per_token": -4})}, None, (0, None)),
        Decision("a.x", "bits", 0, (16, 4), {(0,): ({}, {"linear_bytes": -450})}, parent=0),
        Decision("b", "bits", 1, (16, 4), {(): ({}, {"linear_bytes": -300})}),
    ),
    DENSE,
)
COSTS = CostModel(SPACE, batch=2, context=10)
TIMED = CostModel(
    SearchSpace((Decision("a", "bits", 0, (16, 4), {(): ({}, {"decode_ns": -2_000_000})}),), DENSE | {"decode_ns": 3_000_001}),
    batch=2,
    context=10,
)


@pytest.mark.parametrize(
    ("text", "name", "bound"),
    [
        ("weight_bytes<=0.30x", "weight_bytes", Fraction(360)),
        ("linear_bytes <= 0.1x", "linear_bytes", Fraction(100)),
        ("weight_bytes<=900MB", "weight_bytes", Fraction(900_000_000)),
        ("weight_bytes<=1.5GiB", "weight_bytes", Fraction(3, 2) * 2**30),
        ("avg_bits<=3.5", "avg_bits", Fraction(7, 2)),
        ("kv_bytes<=40", "kv_bytes", Fraction(40)),
        ("kl<=0.1", "kl", Fraction(1, 10)),
        ("kl<=1e-3", "kl", Fraction(1, 1000)),
        ("quality<=.1", "kl", Fraction(1, 10)),
    ],
)
def test_a_limit_is_read_exactly(text: str, name: str, bound: Fraction) -> None:
    limit = parse_limit(text, COSTS)
    assert (limit.name, limit.bound) == (name, bound)


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("decode_ms<=4", Fraction(4)),
        ("decode_ms<=4ms", Fraction(4)),
        ("decode_ms<=1.5us", Fraction(15, 10_000)),
        ("decode_ms<=2s", Fraction(2000)),
        ("decode_ms<=0.6x", Fraction(6, 10) * Fraction(3_000_001, 10**6)),
    ],
)
def test_a_limit_in_milliseconds_is_read_exactly(text: str, bound: Fraction) -> None:
    limit = parse_limit(text, TIMED)
    assert (limit.name, limit.bound) == ("decode_ms", bound)
    assert limit.met(bound)
    assert not limit.met(bound + Fraction(1, 10**9))


def test_a_limit_in_milliseconds_is_refused_in_its_own_unit() -> None:
    with pytest.raises(UnreachableLimit, match=r"the least decode_ms of this space is 1000\.0010us;"):
        check_reachable([parse_limit("decode_ms<=1000us", TIMED)], TIMED)
    with pytest.raises(InputError, match="unknown unit 'MB'; allowed: us, ms, s and x"):
        parse_limit("decode_ms<=1MB", TIMED)
    with pytest.raises(InputError, match="no limit can be set on 'decode_ms'"):
        parse_limit("decode_ms<=1", COSTS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weight_bytes", "cannot read the limit"),
        ("weight_bytes<=", "cannot read the limit"),
        ("weight_bytes<=-1", "cannot read the limit"),
        ("weight_bytes>=3", "every limit is an upper bound"),
        ("size<=3", "no limit can be set on 'size'; allowed: "),
        ("weight_bytes<=3parsecs", "unknown unit 'parsecs'"),
        ("avg_bits<=3MB", "takes no 'MB'"),
        ("kl<=0.5x", "absolute bound"),
    ],
)
def test_a_malformed_limit_is_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_limit(text, COSTS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", list(COSTS.measures))
def test_the_least_reachable_value_is_that_of_enumeration(name: str) -> None:
    every = [(i, j, k) for i in range(2) for j in range(2) for k in range(2)]
    assert least_reachable(COSTS, name) == min(COSTS.exact(name, SPACE.normalised(x)) for x in every)


def test_a_limit_below_the_least_is_refused_with_the_least() -> None:
    check_reachable([parse_limit("linear_bytes<=100", COSTS)], COSTS)
    with pytest.raises(UnreachableLimit, match=r"least linear_bytes of this space is 0\.1000x"):
        check_reachable([parse_limit("linear_bytes<=0.09x", COSTS)], COSTS)


@given(st.integers(0, 1100), st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 1)))
def test_feasible_is_exact_to_the_byte(bound: int, indices: tuple[int, int, int]) -> None:
    used = SPACE.primary(indices)["linear_bytes"]
    assert feasible([parse_limit(f"linear_bytes<={bound}", COSTS)], COSTS, indices) == (used <= bound)


def test_limits_that_exclude_each_other_are_refused_together() -> None:
    levels: tuple[dict[str, int], ...] = ({}, {"linear_bytes": -600}, {"kv_bytes_per_token": -4})
    costs = CostModel(SearchSpace((Decision("a", "k", 0, (0, 1, 2), {(): levels}),), DENSE), batch=1, context=1)
    alone = [parse_limit(text, costs) for text in ("linear_bytes<=0.5x", "kv_bytes<=2")]
    for limit in alone:
        check_reachable([limit], costs)
    with pytest.raises(
        UnreachableLimit, match="'kv_bytes<=2' cannot be kept together with 'linear_bytes<=0.5x': under those the least kv_bytes is 4;"
    ):
        check_reachable(alone, costs)
    check_reachable([alone[0], parse_limit("kv_bytes<=4", costs)], costs)


def test_the_least_is_told_in_the_unit_of_the_limit() -> None:
    with pytest.raises(UnreachableLimit, match=r"least weight_bytes of this space is 0\.3000KB;"):
        check_reachable([parse_limit("weight_bytes<=0.2KB", COSTS)], COSTS)
