"""Cutting linears cuts what is known of them along the same outputs and inputs."""

from __future__ import annotations

import torch

from autoeff.spaces.material import STATISTICS, Material


def test_statistics_are_cut_along_the_axes_that_they_have_even_where_the_linear_is_square() -> None:
    sizes = {"N": 5, "K": 5, "tokens": 7, "experts": 3, "stream": 5, "heads": 2, "size": 4}
    rows, columns = torch.tensor([0, 3]), torch.tensor([1, 2, 4])
    place = {"N": rows, "K": columns}
    known = {f"a.{name}": torch.randn([sizes[axis] for axis in axes]) for name, axes in STATISTICS.items()}
    material = Material({"a": torch.randn(5, 5), "b": torch.randn(5, 5)}, statistics={**known, "b.gradient": torch.ones(5, 5)})
    cut = material.cut({"a": rows}, {"a": columns})
    assert torch.equal(cut.weights["a"], material.weights["a"][rows][:, columns])
    for name, axes in STATISTICS.items():
        expected = known[f"a.{name}"]
        for axis, along in enumerate(axes):
            if along in place:
                expected = expected.index_select(axis, place[along])
        assert torch.equal(cut.statistics[f"a.{name}"], expected)
    assert torch.equal(cut.statistics["a.gradient"], known["a.gradient"][rows[:, None], columns])
    assert cut.statistics["b.gradient"].shape == (5, 5)
