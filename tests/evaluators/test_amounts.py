"""What neurons give against what their FFN is fed: by definition, and in a whole evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autoeff.evaluators.amounts import amounts
from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup
from autoeff.spaces.sites import find_structure


@torch.no_grad()
def test_moments_are_means_over_all_tokens_but_padding(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("bert")
    site = next(site for site in find_structure(model).sites if site.kind == "ffn")
    random = torch.Generator().manual_seed(0)
    batches: list[dict[str, Tensor]] = [{"input_ids": torch.randint(2, 61, shape, generator=random)} for shape in ((2, 9), (1, 5))]
    batches[0]["attention_mask"] = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    seen: dict[str, list[Tensor]] = {site.linears[0].name: [], site.linears[-1].name: []}
    masks: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: seen[name].append(given[0][masks[-1]].double()))
        for name in seen
    ]
    with amounts(model, [site]) as found:
        for batch in batches:
            masks.append(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool())
            model(**batch)
        statistics = found()
    for handle in handles:
        handle.remove()
    x, y = (torch.cat(parts) for parts in seen.values())
    assert len(x) == 9 + 4 + 5
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    for name, expected in (("fed", x.T @ x), ("amounts", x.T @ y.abs())):
        torch.testing.assert_close(statistics[f"{site.output}.{name}"].double(), expected / len(x), rtol=1e-4, atol=1e-6)
    assert not model.get_submodule(site.output)._forward_pre_hooks


def test_divided_ffns_beside_cut_and_packed_ones_leave_no_trace_and_are_exported_as_searched(
    setup_of: Callable[..., EvaluationSetup], tmp_path: Path
) -> None:
    knobs: dict[str, Any] = {"ffn_experts": {"neurons": 4}, "bits": {"group_size": 8}, "width": {"criterion": "magnitude", "multiple": 1}}
    setup = setup_of("llama", knobs)
    evaluator = Evaluator(setup)
    space = evaluator.space

    def value(levels: dict[str, Any]) -> float:
        return evaluator.evaluate(EvaluationRequest(space.configuration(levels).levels, "search", 2))[0].value

    divided = {"model.layers.0.mlp:ffn_experts": 0.5, "model.layers.2.mlp:ffn_experts": 0.25}
    levels = divided | {"model.layers.0.mlp:width": 0.5, "model.layers.2.mlp.down_proj:bits": 4}
    alone, both = value(divided), value(levels)
    assert value({}) == 0.0
    assert 0 < alone == value(divided)
    assert alone != both == value(levels)
    evaluator.export(space.configuration(levels).levels, tmp_path / "out")
    found = Evaluator(setup).remeasure(tmp_path / "out", "search", 2, space.configuration(levels).levels)
    assert found[0].value == pytest.approx(both, rel=1e-5, abs=1e-8)
