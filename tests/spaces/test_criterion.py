"""What every criterion promises: exact counts where the pattern wants them, zeros elsewhere, the same answer again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autoeff.errors import InputError
from autoeff.spaces.criterion import Pattern, known_criteria, make_criterion
from autoeff.spaces.plugins import plugins

NAMES = ["magnitude", "nirvana", "sparsegpt", "wanda"]


def _statistics(n: int, k: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(n, k, generator=generator)
    inputs = torch.randn(2 * k, k, generator=generator) @ torch.randn(k, k, generator=generator)
    return {"input_norm": inputs.norm(dim=0), "hessian": inputs.T @ inputs / len(inputs), "gradient": gradient}


def test_built_ins_are_found_without_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins.cache_clear()
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: ())
    assert {name: item.name for name, item in known_criteria().items()} == {name: name for name in NAMES}
    plugins.cache_clear()


@given(st.data(), st.sampled_from(NAMES), st.sampled_from([1, 8, 63, 128, 130, 200]), st.integers(1, 5), st.integers(0, 10**6))
@settings(deadline=None, max_examples=70)
def test_every_row_keeps_exactly_its_number(data: st.DataObject, name: str, k: int, n: int, seed: int) -> None:
    kept = data.draw(st.integers(0, k))
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).mul(3).round()  # zeros and ties
    before, statistics = weight.clone(), _statistics(n, k, seed)
    found = make_criterion(name).prune(weight, Pattern(kept), statistics)
    assert found.mask.dtype == torch.bool
    assert (found.mask.sum(1) == kept).all()
    assert found.weight.dtype == torch.float32
    assert found.weight.isfinite().all()
    assert (found.weight[~found.mask] == 0).all()
    assert torch.equal(weight, before)
    if name != "sparsegpt":
        assert torch.equal(found.weight[found.mask], weight[found.mask])
    again = make_criterion(name).prune(weight, Pattern(kept), statistics)
    assert torch.equal(found.weight, again.weight)
    assert torch.equal(found.mask, again.mask)


@given(
    st.sampled_from(NAMES),
    st.sampled_from([(2, 4), (1, 4), (4, 8), (3, 7), (5, 5), (0, 2), (100, 130)]),
    st.integers(1, 40),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_every_run_keeps_exactly_its_number(name: str, pattern: tuple[int, int], runs: int, seed: int) -> None:
    kept, of = pattern
    k = of * min(runs, 260 // of)
    weight = torch.randn(3, k, generator=torch.Generator().manual_seed(seed))
    found = make_criterion(name).prune(weight, Pattern(kept, of), _statistics(3, k, seed))
    assert (found.mask.reshape(3, -1, of).sum(2) == kept).all()
    assert (found.mask.sum(1) == Pattern(kept, of).kept_of(k)).all()
    assert (found.weight[~found.mask] == 0).all()


@pytest.mark.parametrize("of", [None, 3, 1500])
def test_of_equal_scores_the_first_stay(of: int | None) -> None:
    run = of or 6000
    scores = torch.randint(0, 3, (2, 6000), generator=torch.Generator().manual_seed(0)).float()
    mask = Pattern(run // 3, of).mask(scores).reshape(-1, run)
    for row, kept in zip(scores.reshape(-1, run).tolist(), mask, strict=True):
        first = sorted(range(run), key=lambda j: (-row[j], j))[: run // 3]
        assert set(kept.nonzero()[:, 0].tolist()) == set(first)


@pytest.mark.parametrize("name", NAMES)
def test_keeping_everything_changes_nothing(name: str) -> None:
    weight = torch.randn(4, 130, generator=torch.Generator().manual_seed(0))
    assert torch.equal(make_criterion(name).prune(weight, Pattern(130), _statistics(4, 130, 0)).weight, weight)
    assert torch.equal(make_criterion(name).prune(weight, Pattern(2, 2), _statistics(4, 130, 0)).weight, weight)


def test_wrong_patterns_weights_and_names_are_refused() -> None:
    weight = torch.ones(2, 6)
    with pytest.raises(InputError, match="2:4 needs inputs in multiples of 4: got 6"):
        make_criterion("magnitude").prune(weight, Pattern(2, 4))
    with pytest.raises(InputError, match="a row of 6 inputs cannot keep 7 weights"):
        make_criterion("magnitude").prune(weight, Pattern(7))
    for wrong in ((-1, None), (5, 4), (-1, 4), (0, 0)):
        with pytest.raises(InputError, match="a pattern must keep from 0 to all weights"):
            Pattern(*wrong)
    with pytest.raises(InputError, match=r"a weight \[2, 6\] holds NaN or infinity"):
        make_criterion("magnitude").prune(weight * torch.nan, Pattern(3))
    with pytest.raises(ValueError, match="criterion wanda needs the statistic 'input_norm'; got none"):
        make_criterion("wanda").prune(weight, Pattern(3))
    with pytest.raises(InputError, match="unknown criterion 'magic'; known: magnitude, nirvana, sparsegpt, wanda"):
        make_criterion("magic")
