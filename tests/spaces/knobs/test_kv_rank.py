"""Keys and values as coordinates along their main axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autoeff.errors import InputError
from autoeff.evaluators.attention import Moments
from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup, TextSpec
from autoeff.spaces.build import build_space
from autoeff.spaces.costs import CostModel
from autoeff.spaces.knob import Knob, make_knob
from autoeff.spaces.kv_cache import Basis, KvCache, KvPlan, KvState, plan_part, watched
from autoeff.spaces.material import Material
from autoeff.spaces.sites import Site, find_structure
from autoeff.spaces.space import SpaceSpec

TOKENS = torch.randint(2, 61, (2, 64), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def built_for(model: Any, knob: Knob, site: Site, level: float) -> dict[str, Tensor]:
    moments = Moments()
    with watched(model, [site.attention], lambda _, numbers: moments.add(numbers), f"kv_watch_{site.kind}"):
        model(TOKENS)
    known = {f"{site.name}.{name}": tensor for name, tensor in moments.tensors().items()}
    return knob.derived(site, level, knob.build(site, knob.stored_level(site, level), Material({}, statistics=known)))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "mixtral"])
def test_as_many_coordinates_as_numbers_give_the_logits_and_the_tokens_of_the_full_cache(
    tiny_model: Callable[..., Any], family: str
) -> None:
    model = tiny_model(family)
    expected = model(TOKENS).logits
    said = model.generate(TOKENS[:1, :20], max_new_tokens=8, do_sample=False)
    full, undos = make_knob("kv_rank", {"multiple": 1, "shares": (0.999,)}), []
    for site in find_structure(model).at_context(64).sites:
        if site.kind in ("keys", "values"):
            axes = built_for(model, full, site, 0.999)
            assert axes["axes"].shape[1] == axes["axes"].shape[2]
            part = {"key_basis" if site.kind == "keys" else "value_basis": Basis(axes["mean"], axes["axes"])}
            undos.append(plan_part(model, site.attention, f"kv_rank {site.kind}", part))
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
    cache = KvCache(model, 64)
    assert torch.equal(model.generate(TOKENS[:1, :20], past_key_values=cache, max_new_tokens=8, do_sample=False), said)
    for undo in undos:
        undo()
    assert torch.equal(model(TOKENS).logits, expected)


@torch.no_grad()
def test_axes_are_those_along_which_keys_vary_most(tiny_model: Callable[..., Any]) -> None:
    """What is lost is the sum of the smallest eigenvalues, by a decomposition of the keys themselves."""
    model, knob = tiny_model("llama"), make_knob("kv_rank", {"multiple": 1})
    sites = knob.sites(find_structure(model).at_context(64))
    assert len(sites) == 6
    for site in sites[:2]:
        seen: list[Tensor] = []
        with watched(model, [site.attention], lambda _, numbers, seen=seen: seen.append(numbers), f"kv_watch_{site.kind}"):
            model(TOKENS)
        for level in (0.75, 0.25):
            rank = int(8 * level)
            built = built_for(model, knob, site, level)
            assert built["axes"].shape == (2, 8, rank)
            basis = Basis(built["mean"].double(), built["axes"].double())
            lost = (basis.numbers(basis.coordinates(seen[0].double())) - seen[0].double()).square().sum((0, 2, 3))
            for head in range(2):
                rows = seen[0][:, head].flatten(0, 1).double()
                singular = torch.linalg.svdvals(rows - rows.mean(0))
                assert float(lost[head]) == pytest.approx(float(singular[rank:].square().sum()), rel=1e-3)


@torch.no_grad()
def test_what_is_stored_is_what_it_costs(tiny_model: Callable[..., Any]) -> None:
    model, tokens = tiny_model("llama", head_dim=16, max_position_embeddings=1024), 256
    structure = find_structure(model).at_context(tokens)
    knobs: dict[str, dict[str, Any]] = {"kv_rank": {}, "kv_bits": {}, "kv_budget": {"shares": (0.5, 0.25)}}
    space, _ = build_space(structure, SpaceSpec(knobs))
    costs, name = CostModel(space, batch=1, context=tokens), "model.layers.1.self_attn"
    assert [d.knob for d in space.decisions if d.site == f"{name}.keys"] == ["kv_rank", "kv_bits"]
    for rank, bits, share in ((0.5, 16, 1), (0.5, 4, 1), (1, 4, 0.5), (0.5, 2, 0.25)):
        levels = {f"{name}.keys:kv_rank": rank, f"{name}.values:kv_rank": rank, f"{name}:kv_budget": share}
        levels |= {f"{name}.keys:kv_bits": bits, f"{name}.values:kv_bits": bits}
        indices = space.indices(levels)
        saved = costs.dense("kv_bytes") - costs.exact("kv_bytes", indices)
        size = 16 if rank == 1 else 8
        basis = Basis(torch.zeros(2, 16), torch.eye(16)[:, :size].expand(2, 16, size)) if rank < 1 else None
        state = KvState(KvPlan(share=share, key_bits=bits, value_bits=bits, key_basis=basis, value_basis=basis), tokens)
        rows = torch.randn(1, 2, tokens, 16, generator=torch.Generator().manual_seed(1))
        state.prefill(rows.repeat_interleave(2, 1), rows, rows, 0.25)
        axes = 0 if basis is None else 2 * 2 * 2 * 16 * (size + 1)
        assert 2 * 2 * 2 * 16 * tokens - saved - axes >= state.stored_bytes


def test_joint_candidates_come_back_from_what_is_stored(tiny_models: dict[str, Path], tiny_text: Path, tmp_path: Path) -> None:
    knobs = SpaceSpec({"kv_rank": {"multiple": 2, "shares": (0.5, 0.25)}, "kv_budget": {"shares": (0.5,)}})
    setup = EvaluationSetup(
        str(tiny_models["llama"]), TextSpec(str(tiny_text), windows=4, length=64), None, knobs, 0, "cpu", str(tmp_path / "bank")
    )
    evaluator = Evaluator(setup)

    def value(levels: dict[str, Any]) -> float:
        return evaluator.evaluate(EvaluationRequest(levels, "search", 4))[0].value

    first = {f"model.layers.0.self_attn.{kind}:kv_rank": 0.5 for kind in ("keys", "values")}
    second = {f"model.layers.2.self_attn.{kind}:kv_rank": 0.25 for kind in ("keys", "values")} | {"model.layers.2.self_attn:kv_budget": 0.5}
    values = [value(levels) for levels in (first, second, {**first, **second}, {})]
    assert min(values[:3]) > 0.0 == values[3]
    assert [value(levels) for levels in ({**first, **second}, {}, second, first)] == [values[2], 0.0, values[1], values[0]]
    levels = dict(evaluator.space.configuration({**first, **second}).levels)
    evaluator.export(levels, tmp_path / "out")
    found = Evaluator(replace(setup)).remeasure(tmp_path / "out", "search", 4, levels)
    assert found[0].value == pytest.approx(values[2], rel=1e-4)


def test_wrong_settings_and_partners_are_one_line(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"kv_rank\.shares must fall between 1 and 0: got 0\.5, 0\.7"):
        make_knob("kv_rank", {"shares": "0.5,0.7"})
    with pytest.raises(InputError, match=r"kv_rank\.multiple must be at least 1: got 0"):
        make_knob("kv_rank", {"multiple": "0"})
    structure = find_structure(tiny_model("llama")).at_context(64)
    with pytest.raises(InputError, match="knob kv_rank cannot be searched together with attention_sparsity"):
        build_space(structure, SpaceSpec({"kv_rank": {"multiple": 1}, "attention_sparsity": {}}))
    with pytest.raises(InputError, match="knob kv_rank finds nothing to decide about in this llama model"):
        build_space(structure, SpaceSpec({"kv_rank": {}}))  # heads of 8 numbers have no fewer eights
