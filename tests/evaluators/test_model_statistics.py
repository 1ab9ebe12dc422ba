"""What rules ask about a model, from whole tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from autoeff.errors import InputError
from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.model_statistics import ModelStatistics
from autoeff.evaluators.setup import EvaluationSetup

ALL = {"changes", "magnitudes", "outliers", "spectra"}


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_they_survive_json_and_leave_the_model_as_it_was(family: str, setup_of: Callable[..., EvaluationSetup]) -> None:
    evaluator = Evaluator(setup_of(family, {"skip": {}}))
    before = {name: tensor.clone() for name, tensor in evaluator.model.state_dict().items()}
    found = evaluator.statistics(ALL)
    assert ModelStatistics.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert all(torch.equal(tensor, before[name]) for name, tensor in evaluator.model.state_dict().items())
    sites = {site.name for site in evaluator.structure.sites if site.kind == "linears"}
    assert set(found.magnitudes) == set(found.spectra) == sites
    assert set(found.outliers) <= sites
    assert found.outliers
    assert set(found.changes) == {site.name for site in evaluator.structure.sites if site.kind in ("attention", "ffn")}
    assert not found.attention
    with pytest.raises(InputError, match="unknown statistic 'colour'; known: attention, changes"):
        evaluator.statistics({"colour"})


@torch.no_grad()
def test_changes_are_those_of_the_residual_stream(setup_of: Callable[..., EvaluationSetup]) -> None:
    """Against the definition, on a decoder whose sublayers follow each other: cos(x, x + f(norm x)) at every token."""
    evaluator = Evaluator(setup_of("llama", {"skip": {}}))
    found = evaluator.statistics({"changes"}).changes
    inputs = evaluator.preparation.passages["search"].inputs
    block = evaluator.model.model.layers[0]
    streams: dict[str, torch.Tensor] = {}
    handles = [
        block.register_forward_pre_hook(lambda _, args: streams.__setitem__("before", args[0])),
        block.self_attn.register_forward_hook(lambda *call: streams.__setitem__("attention", call[-1][0])),
        block.register_forward_hook(lambda *call: streams.__setitem__("after", call[-1])),
    ]
    evaluator.model(input_ids=inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    middle = streams["before"] + streams["attention"]
    after = streams["after"][0] if isinstance(streams["after"], tuple) else streams["after"]
    cosine = torch.nn.functional.cosine_similarity
    expected = [1 - cosine(a.double(), b.double(), dim=-1).mean() for a, b in ((streams["before"], middle), (middle, after))]
    names = [site.name for site in evaluator.structure.sites if site.block == 0 and site.kind in ("attention", "ffn")]
    assert [found[name] for name in names] == pytest.approx([float(e) for e in expected], rel=1e-4, abs=1e-7)
