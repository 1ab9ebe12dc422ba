"""Linears as two factors: what is lost is the spectrum's tail, what is stored is what is charged, and what comes later sees the factors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autoeff.errors import InputError
from autoeff.spaces.criterion import known_criteria
from autoeff.spaces.knob import make_knob
from autoeff.spaces.knobs.bits import Bits
from autoeff.spaces.knobs.rank import Rank, output_directions
from autoeff.spaces.knobs.sparsity import Sparsity
from autoeff.spaces.material import Material
from autoeff.spaces.sites import Linear, Site

NAME = "block.linear"


def site_of(n: int, k: int) -> Site:
    return Site(NAME, "linears", 0, (Linear(NAME, k, n, False),))


def drawn(n: int, k: int, tokens: int) -> tuple[Tensor, Tensor]:
    """A weight and inputs whose directions differ in strength, float64."""
    generator = torch.Generator().manual_seed(n * 1000 + k)
    inputs = torch.randn(tokens, k, generator=generator).double() @ torch.randn(k, k, generator=generator).double()
    return torch.randn(n, k, generator=generator).double(), inputs * torch.linspace(0.1, 2, k)


def material_of(n: int, k: int) -> Material:
    weight, inputs = drawn(n, k, 200)
    known = {"hessian": inputs.T @ inputs / len(inputs), "input_norm": inputs.norm(dim=0), "gradient": weight.cos()}
    return Material({NAME: weight.half()}, statistics={f"{NAME}.{name}": tensor.float() for name, tensor in known.items()})


@pytest.mark.parametrize(("n", "k"), [(12, 12), (9, 20), (20, 9), (1, 6), (6, 1)])
def test_outputs_lose_exactly_the_squared_singular_values_that_are_dropped(n: int, k: int) -> None:
    weight, inputs = drawn(n, k, 50)
    hessian = inputs.T @ inputs
    lower = torch.linalg.cholesky(hessian)
    left, values, right = torch.linalg.svd(weight @ lower, full_matrices=False)
    directions = output_directions(weight, hessian)
    for rank in range(min(n, k) + 1):
        u = directions[:, :rank]
        found = u @ (u.T @ weight)
        lost = ((inputs @ (weight - found).T) ** 2).sum()
        torch.testing.assert_close(lost, (values[rank:] ** 2).sum(), rtol=1e-9, atol=1e-9 * float((values**2).sum()))
        as_published = left[:, :rank] * values[:rank] @ right[:rank] @ torch.linalg.inv(lower)
        torch.testing.assert_close(found, as_published, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("n", "k"), [(10, 16), (24, 16)])
def test_inputs_that_do_not_span_their_space_need_no_damping(n: int, k: int) -> None:
    """Five tokens and a dead input: five directions hold everything that the outputs do."""
    weight, inputs = drawn(n, k, 5)
    inputs[:, 3] = 0
    u = output_directions(weight, inputs.T @ inputs)[:, :5]
    torch.testing.assert_close(inputs @ (u @ u.T @ weight).T, inputs @ weight.T, rtol=1e-9, atol=1e-9)


def test_inputs_count_by_their_strength() -> None:
    """The factors of the weight alone lose more of the outputs."""
    weight, inputs = drawn(16, 16, 100)
    plain = torch.linalg.svd(weight).U[:, :6]
    u = output_directions(weight, inputs.T @ inputs)[:, :6]
    lost = [float(((inputs @ (weight - d @ d.T @ weight).T) ** 2).sum()) for d in (u, plain)]
    assert lost[0] < 0.8 * lost[1]


@settings(deadline=None)
@given(
    n=st.integers(1, 40), k=st.integers(1, 40), share=st.sampled_from([0.9, 0.5, 0.3]), later=st.sampled_from([None, 8, 3, 0.5]),
    multiple=st.sampled_from([1, 4]),
)  # fmt: skip
def test_what_is_stored_has_the_bytes_of_the_costs_of_all_knobs(n: int, k: int, share: float, later: float | None, multiple: int) -> None:
    knob, site, material = Rank(shares=(0.95, share), multiple=multiple), site_of(n, k), material_of(n, k)
    stored = knob.build(site, knob.stored_level(site, share), material)
    served = knob.derived(site, share, stored)
    change = sum(t.nbytes for t in served.values()) - 2 * n * k if served else 0
    assert knob.cost(site, share) == {"linear_bytes": change, "flops_per_token": change}
    left, factored = knob.left(site, share), knob.transform(site, share, served, material)
    assert {linear.name: (linear.out_features, linear.in_features) for linear in left.linears} == {
        name: tuple(weight.shape) for name, weight in factored.weights.items()
    }
    if later is None:
        return
    then = Sparsity(ratios=(later,)) if isinstance(later, float) else Bits(group_size=8)
    on_top = then.build(left, later, factored)
    assert then.cost(left, later) == {"linear_bytes": sum(t.nbytes for t in on_top.values()) - 2 * left.parameters}


@pytest.mark.parametrize(("n", "k"), [(24, 24), (16, 40), (40, 16)])
def test_lower_ranks_are_parts_of_the_highest_and_lose_more(n: int, k: int) -> None:
    knob, site, material = Rank(shares=(0.9, 0.6, 0.3), multiple=1), site_of(n, k), material_of(n, k)
    weight, hessian = material.weights[NAME].double(), material.statistics[f"{NAME}.hessian"].double()
    losses = []
    for share in knob.shares:
        derived = knob.derived(site, share, knob.build(site, 0.9, material))
        built = knob.build(site, share, material)
        assert derived.keys() == built.keys()
        assert all(torch.equal(derived[name], built[name]) for name in built)
        rank = int(share * n * k / (n + k))
        assert derived[f"{NAME}.v"].shape == (rank, k)
        found = knob.transform(site, share, derived, material).parameter(site.linears[0]).double()
        spectrum = torch.linalg.eigvalsh(weight @ hessian @ weight.T).flip(0)
        loss = float(((weight - found) @ hessian * (weight - found)).sum())
        assert loss == pytest.approx(float(spectrum[rank:].sum()), rel=0.02)  # factors and their product have 16 bits
        losses.append(loss)
    assert losses == sorted(losses)


def test_levels_are_those_that_save() -> None:
    assert Rank().levels(site_of(128, 128)) == (1, 0.875, 0.75, 0.5, 0.25)
    assert Rank().levels(site_of(64, 64)) == (1, 0.875, 0.5, 0.25)  # 0.75 has the rank of 0.875
    assert Rank(multiple=1).levels(site_of(2, 2)) == (1,)  # a rank of one is as large
    assert Rank(multiple=8).levels(site_of(20, 20)) == (1, 0.875)  # a rank of 8; lower ones would be none
    assert Rank(multiple=32).levels(site_of(16, 16)) == (1,)


def test_experts_are_left_whole() -> None:
    linears = (Linear("a", 32, 32, False, experts=4, experts_per_token=2),)
    structure = type("S", (), {"sites": (Site("a", "linears", 0, linears), site_of(32, 32))})()
    assert [site.name for site in Rank().sites(structure)] == [NAME]


def test_what_is_known_of_the_factors_is_what_would_be_measured_of_them() -> None:
    n, k = 12, 20
    knob, site, material = Rank(shares=(0.9,), multiple=1), site_of(n, k), material_of(n, k)
    inputs = drawn(n, k, 200)[1]
    factored = knob.transform(site, 0.9, knob.build(site, 0.9, material), material)
    v, u = (factored.weights[f"{NAME}.{part}"].double() for part in "vu")
    inner = inputs @ v.T
    of_v, of_u = factored.needed(f"{NAME}.v"), factored.needed(f"{NAME}.u")
    torch.testing.assert_close(of_u["hessian"].double(), inner.T @ inner / len(inner), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(of_u["input_norm"].double(), inner.norm(dim=0), rtol=1e-4, atol=1e-4)
    assert torch.equal(of_v["hessian"], material.statistics[f"{NAME}.hessian"])
    v, u = v.requires_grad_(), u.requires_grad_()
    ((u @ v) * material.statistics[f"{NAME}.gradient"]).sum().backward()  # W = U V with the derivative that is known
    assert v.grad is not None
    assert u.grad is not None
    torch.testing.assert_close(of_v["gradient"].double(), v.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_u["gradient"].double(), u.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("criterion", sorted(known_criteria()))
def test_every_criterion_prunes_the_factors(criterion: str) -> None:
    knob, site, material = Rank(shares=(0.9,), multiple=1), site_of(12, 20), material_of(12, 20)
    factored = knob.transform(site, 0.9, knob.build(site, 0.9, material), material)
    sparse = Sparsity(criterion=criterion, ratios=(0.5,))
    pruned = sparse.transform(site, 0.5, sparse.build(site, 0.5, factored), factored)
    assert pruned.parameter(site.linears[0]).shape == (12, 20)
    assert all(float((weight == 0).float().mean()) >= 0.4 for weight in pruned.weights.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shares": (0.5, 0.75)}, "rank.shares must fall between 1 and 0: got 0.5, 0.75"),
        ({"shares": ()}, "rank.shares must fall between 1 and 0: got none"),
        ({"shares": (1.0,)}, "rank.shares must fall between 1 and 0: got 1.0"),
        ({"multiple": 0}, "rank.multiple must be at least 1: got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_knob("rank", changes)


def test_inputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="hold NaN or infinity"):
        output_directions(torch.ones(2, 2).double(), torch.full((2, 2), torch.nan).double())
