"""The front against its definition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from autoeff.search.pareto import Archive, hypervolume, non_dominated

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


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12), st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_the_hypervolume_is_the_number_of_dominated_cells(points: list[tuple[int, int]], reference: tuple[int, int]) -> None:
    cells = {(i, j) for a, b in points for i in range(a, reference[0]) for j in range(b, reference[1])}
    assert hypervolume(points, reference) == len(cells)


@given(st.integers(1, 3).flatmap(lambda n: st.lists(st.tuples(*[st.integers(0, 4)] * n), max_size=14)))
def test_the_archive_says_what_joins_the_front_and_keeps_what_a_fresh_one_would(points: list[tuple[int, ...]]) -> None:
    backwards = Archive()
    for n, point in reversed(list(enumerate(points))):
        backwards.add(point, n)
    assert backwards.keys == non_dominated(points)
    archive = Archive()
    for n, point in enumerate(points):
        joined = archive.add(point, n)
        assert joined == (n in non_dominated(points[: n + 1]))
        assert set(archive.keys) == set(non_dominated(points[: n + 1]))
        assert archive.points == [points[k] for k in archive.keys]
