"""The front against its definition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from autoeff.search.pareto import non_dominated

VALUE = st.sampled_from([0.0, 1.0, 2.0, 3.0, float("inf"), float("nan")])


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(VALUE, min_size=n, max_size=n), max_size=12)))
def test_the_front_is_what_its_definition_says(points: list[list[float]]) -> None:
    def finite(p: list[float]) -> bool:
        return all(abs(x) < float("inf") for x in p)

    def beaten(i: int) -> bool:
        p = points[i]
        return any(
            finite(q) and all(a <= b for a, b in zip(q, p, strict=True)) and (q != p or j < i) for j, q in enumerate(points) if j != i
        )

    expected = {i for i, p in enumerate(points) if finite(p) and not beaten(i)}
    found = non_dominated(points)
    assert set(found) == expected
    assert len(found) == len(expected)
    assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)
