"""What every knob must do; a new knob adds one row."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from autoeff.spaces.adapters import Adapter, attached
from autoeff.spaces.build import build_space
from autoeff.spaces.configuration import Level
from autoeff.spaces.couplings import coupled
from autoeff.spaces.knob import KINDS, Knob, Undo, make_knob, swap
from autoeff.spaces.knobs.lora_rank import LoraRank
from autoeff.spaces.material import Material, dense_weight
from autoeff.spaces.sites import Site, Structure, find_structure
from autoeff.spaces.space import SpaceSpec

ROWS: dict[str, tuple[str, dict[str, object]]] = {
    "bits": ("bits", {"group_size": 8}),
    "bits, symmetric": ("bits", {"group_size": 16, "symmetric": True}),
    "bits, gptq": ("bits", {"group_size": 8, "quantizer": "gptq"}),
    "bits, nested": ("bits", {"group_size": 8, "store": "nested"}),
    "skip": ("skip", {}),
    "sparsity": ("sparsity", {}),
    "sparsity, 2:4": ("sparsity", {"pattern": "2:4", "criterion": "magnitude"}),
    "sparsity, sparsegpt": ("sparsity", {"criterion": "sparsegpt"}),
    "sparsity, nirvana": ("sparsity", {"criterion": "nirvana"}),
    "width": ("width", {}),
    "width, nirvana": ("width", {"criterion": "nirvana"}),
    "heads": ("heads", {"criterion": "magnitude"}),
    "heads, nirvana": ("heads", {"criterion": "nirvana"}),
    "kv_budget": ("kv_budget", {"shares": (0.75, 0.5, 0.25)}),
    "kv_budget, h2o": ("kv_budget", {"policy": "h2o", "shares": (0.5,)}),
    "kv_bits": ("kv_bits", {}),
    "kv_rank": ("kv_rank", {"multiple": 1}),
    "rank": ("rank", {"multiple": 1}),
    "lora_rank": ("lora_rank", {"ranks": (4, 1, 0)}),
    "attention_sparsity": ("attention_sparsity", {}),
    "activation_sparsity": ("activation_sparsity", {}),
    "ffn_experts": ("ffn_experts", {"neurons": 4}),
    "passes": ("passes", {}),
    "token_keep": ("token_keep", {}),
    "third party": ("noise", {"seed": 3}),
}
CONTEXT = 48
STRUCTURES: dict[tuple[str, bool], Structure] = {}
"""By family: all its models are built alike."""
TOKENS = torch.randint(2, 61, (1, CONTEXT), generator=torch.Generator().manual_seed(0))


ELSEWHERE = torch.device("meta")
"""Stands for a GPU."""


class _There(Tensor):
    """Numbers of the CPU that pass for those of another device."""


class _TwoDevices(TorchFunctionMode):
    """Fails where tensors of two devices meet, as they would on a machine that has two."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [item for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
        there = [isinstance(tensor, _There) for tensor in tensors]
        if function == Tensor.device.__get__:  # type: ignore[attr-defined]
            return ELSEWHERE if any(there) else torch.device("cpu")
        if function in (Tensor.cpu, Tensor.to):
            named = [
                (ELSEWHERE if isinstance(item, _There) else item.device) if isinstance(item, Tensor) else item
                for item in (*args[1:], *kwargs.values())
            ]
            places = [torch.device(item) for item in named if isinstance(item, str | torch.device)]
            away = places[0] == ELSEWHERE if places else any(there) and function is Tensor.to
            args = [torch.device("cpu") if item == ELSEWHERE else item for item in args]
        else:
            assert not any(there) or all(t or not tensor.dim() for t, tensor in zip(there, tensors, strict=True)), function
            away = any(there) or kwargs.get("device") == ELSEWHERE
        kwargs |= {"device": "cpu"} if kwargs.get("device") == ELSEWHERE else {}
        plain = [tree_map(lambda item: item.as_subclass(Tensor) if isinstance(item, Tensor) else item, part) for part in (args, kwargs)]
        found = function(*plain[0], **plain[1])
        return tree_map(lambda item: item.as_subclass(_There if away else Tensor) if isinstance(item, Tensor) else item, found)


@pytest.fixture(params=ROWS)
def knob(request: pytest.FixtureRequest) -> Knob:
    if request.param == "third party":
        request.getfixturevalue("third_party_knobs")
    return make_knob(*ROWS[request.param])


@pytest.fixture
def model(family: str, knob: Knob, tiny_model: Callable[..., nn.Module]) -> nn.Module:
    model = tiny_model(family)
    if isinstance(knob, LoraRank):  # as if they had been trained
        linears = [linear for site in knob.sites(find_structure(model)) for linear in site.linears]
        rank = knob.ranks[0]
        attached(model, {i.name: Adapter(torch.randn(rank, i.in_features), torch.randn(i.out_features, rank)) for i in linears})
    return model


@pytest.fixture
def structure(request: pytest.FixtureRequest, family: str, knob: Knob) -> Structure:
    if (knob.kind == "cache" or knob.of_context) and family == "bert":
        pytest.skip("encoders keep no keys and values")
    if knob.name == "token_keep" and family != "bert":
        pytest.skip("decoders have no class token")
    key = family, isinstance(knob, LoraRank)  # adapters hang on the model that is then looked at
    if key not in STRUCTURES:
        model = request.getfixturevalue("model")
        STRUCTURES[key] = coupled(model, find_structure(model))[0].with_blocks().at_context(CONTEXT)
    return STRUCTURES[key]


def _output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output = model(TOKENS)
    return output.last_hidden_state if model.get_output_embeddings() is None else output.logits


def _material(model: nn.Module, site: Site) -> Material:
    weights = {linear.name: dense_weight(model.get_parameter(linear.weight).detach().half(), linear) for linear in site.linears}
    known: dict[str, Tensor] = {}
    if site.kv is not None and not site.linears:
        vectors = torch.randn(site.kv_heads, 64, site.kv.key_size, generator=torch.Generator().manual_seed(1))
        known |= {f"{site.name}.mean": vectors.mean(1), f"{site.name}.covariance": vectors.mT @ vectors / 64}
    for name, weight in weights.items():
        k = weight.shape[1]
        known |= {f"{name}.input_norm": torch.ones(k), f"{name}.hessian": torch.eye(k), f"{name}.gradient": weight.float().cos()}
        inputs = torch.randn(64, k, generator=torch.Generator().manual_seed(k))
        known |= {f"{name}.inputs": inputs, f"{name}.activation": inputs.sigmoid()}
        fed = torch.randn(64, site.linears[0].in_features + 1, generator=torch.Generator().manual_seed(2))
        fed[:, -1] = 1
        known |= {f"{name}.fed": fed.T @ fed / 64, f"{name}.amounts": fed.T @ inputs.abs() / 64}
    return Material(weights, statistics=known)


def _values(knob: Knob, site: Site, level: Level, material: Material) -> dict[str, Tensor]:
    """As the bank does it: built from 16-bit weights, stored, read back."""
    if not knob.of_values:
        return {}
    built = knob.build(site, knob.stored_level(site, level), material)
    stored = load(save({name: tensor.contiguous() for name, tensor in built.items()}))
    changed = knob.transform(site, level, knob.derived(site, level, stored), material)
    return {linear.weight: changed.parameter(linear) for linear in site.linears}


def _put(model: nn.Module, knob: Knob, site: Site, level: Level, material: Material) -> Undo:
    undo_values = swap(model, _values(knob, site, level, material))
    built = knob.build(site, knob.stored_level(site, level), material) if knob.applies_built else {}
    stored = load(save({name: tensor.contiguous() for name, tensor in built.items()}))
    undo_rest = knob.apply_built(model, site, level, knob.derived(site, level, stored))

    def undo() -> None:
        undo_rest()
        undo_values()

    return undo


def _state(model: nn.Module) -> dict[str, tuple[int, int, Tensor]]:
    return {name: (id(p), p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}


def _assert_same(before: Mapping[str, tuple[int, int, Tensor]], model: nn.Module) -> None:
    after = _state(model)
    assert after.keys() == before.keys()
    for name, (identity, pointer, values) in before.items():
        assert after[name][:2] == (identity, pointer), name
        assert torch.equal(after[name][2], values), name


def test_describes_itself(knob: Knob) -> None:
    assert knob.kind in KINDS
    assert knob.name not in knob.conflicts
    assert make_knob(knob.name, knob.settings()) == knob
    assert hash(knob) == hash(replace(knob))


def test_sites_are_places_of_the_model(knob: Knob, structure: Structure) -> None:
    sites = knob.sites(structure)
    assert sites
    assert set(sites) <= set(structure.sites)
    assert len(set(sites)) == len(sites)


def test_levels_fall_in_cost_from_a_dense_one_that_costs_nothing(knob: Knob, structure: Structure) -> None:
    for site in knob.sites(structure):
        levels = knob.levels(site)
        assert len(set(levels)) == len(levels)
        costs = [dict(knob.cost(site, level)) for level in levels]
        assert costs[0] == {}
        for more, less in pairwise(cost for cost in costs if not any(change > 0 for change in cost.values())):
            names = more.keys() | less.keys()
            assert all(less.get(name, 0) <= more.get(name, 0) for name in names)
            assert any(less.get(name, 0) < more.get(name, 0) for name in names)


def test_costs_stay_within_the_model(knob: Knob, structure: Structure) -> None:
    space, _ = build_space(structure, SpaceSpec({knob.name: knob.settings()}))
    least = space.primary([len(d.levels) - 1 for d in space.decisions])
    assert least.keys() == space.dense.keys()
    assert all(value >= 0 for value in least.values())


def test_dense_level_is_an_exact_identity(knob: Knob, model: nn.Module, structure: Structure) -> None:
    before, output = _state(model), _output(model)
    for site in knob.sites(structure):
        dense = knob.levels(site)[0]
        assert not knob.silences(site, dense)
        assert knob.kernel(site, dense) is None
        knob.apply(model, site, dense)
    _assert_same(before, model)
    assert torch.equal(_output(model), output)


def test_building_is_deterministic(knob: Knob, model: nn.Module, structure: Structure) -> None:
    site = knob.sites(structure)[-1]
    for level in knob.levels(site)[1:]:
        one, two = (_values(knob, site, level, _material(model, site)) for _ in range(2))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_is_built_on_a_device_is_on_the_cpu(knob: Knob, model: nn.Module, structure: Structure) -> None:
    site = knob.sites(structure)[-1]
    level, material = knob.levels(site)[-1], _material(model, site)
    expected = knob.build(site, level, material)
    with _TwoDevices():
        found = knob.build(site, level, replace(material, device=ELSEWHERE))
    assert found.keys() == expected.keys()
    assert not any(isinstance(tensor, _There) for tensor in found.values())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_every_level_changes_the_model_and_is_undone_bit_exactly(knob: Knob, model: nn.Module, structure: Structure) -> None:
    before, dense = _state(model), _output(model)
    for site in knob.sites(structure)[:4]:
        for level in knob.levels(site)[1:]:
            undo = _put(model, knob, site, level, _material(model, site))
            assert _output(model).isfinite().all()
            assert not torch.equal(_output(model), dense), (site.name, level)
            undo()
            _assert_same(before, model)


def test_a_model_of_16_bits_computes_with_every_level(knob: Knob, model: nn.Module, structure: Structure) -> None:
    """As on a GPU."""
    model.to(torch.bfloat16)
    site = knob.sites(structure)[-1]
    for level in knob.levels(site)[1:]:
        undo = _put(model, knob, site, level, _material(model, site))
        output = _output(model)
        assert output.isfinite().all()
        assert output.dtype == torch.bfloat16
        undo()


def test_kernel_exists(knob: Knob, structure: Structure) -> None:
    for site in knob.sites(structure):
        for level in knob.levels(site):
            name = knob.kernel(site, level)
            assert name is None or find_spec(f"autoeff.kernels.{name}")


@pytest.mark.parametrize("seed", range(3))
def test_random_walks_end_where_they_began(family: str, seed: int, tiny_model: Callable[..., nn.Module]) -> None:
    """Every knob at once, sites in any order; at one sublayer what came last goes first."""
    rng = random.Random(seed)
    model = tiny_model(family)
    structure = find_structure(model)
    before, dense = _state(model), _output(model)
    moves = [(knob, site) for knob in (make_knob("bits", {"group_size": 8}), make_knob("skip", {})) for site in knob.sites(structure)]
    materials = {site.name: _material(model, site) for site in structure.sites}
    stacks: dict[str, list[Undo]] = {}  # by the sublayer whose parameters are touched
    sublayer = {linear.name: site.name for site in structure.sites if site.kind != "linears" for linear in site.linears}
    for _ in range(40):
        knob, site = rng.choice(moves)
        stack = stacks.setdefault(sublayer[site.linears[0].name], [])
        if stack and rng.random() < 0.4:
            stack.pop()()
        else:
            level = rng.choice(knob.levels(site)[1:])
            stack.append(_put(model, knob, site, level, materials[site.name]))
    assert not torch.equal(_output(model), dense)
    for stack in rng.sample(list(stacks.values()), len(stacks)):
        while stack:
            stack.pop()()
    _assert_same(before, model)
    assert torch.equal(_output(model), dense)
