"""What rules ask about a model, from whole tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from autoeff.errors import InputError
from autoeff.evaluators.calibration import gradients
from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.model_statistics import ModelStatistics
from autoeff.evaluators.setup import EvaluationSetup
from autoeff.spaces.sites import Site

ALL = {"changes", "magnitudes", "outliers", "saliency", "spectra"}


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_they_survive_json_and_leave_the_model_as_it_was(family: str, setup_of: Callable[..., EvaluationSetup]) -> None:
    evaluator = Evaluator(setup_of(family, {"skip": {}, "width": {"criterion": "magnitude"}}))
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
    assert set(found.saliency) == set(found.changes)
    site = next(site for site in evaluator.structure.sites if site.kind == "ffn")
    units = found.saliency[site.name]
    assert units.weights == site.parameters
    assert [units.quantiles[0], units.quantiles[-1]] == pytest.approx(extremes_of_saliency(evaluator, site), rel=1e-4)
    with pytest.raises(InputError, match="unknown statistic 'colour'; known: attention, changes"):
        evaluator.statistics({"colour"})


def extremes_of_saliency(evaluator: Evaluator, site: Site) -> list[float]:
    """The least and the greatest sum of |w dS/dw| over the rows and columns of a unit."""
    text, model = evaluator.preparation.passages["search"], evaluator.model
    found = gradients(model, site.linears, model.get_output_embeddings(), text.inputs, text.mask)
    owed = {linear.name: (model.get_parameter(linear.weight).detach() * found[f"{linear.name}.gradient"]).abs() for linear in site.linears}
    assert site.coupling is not None
    parts = [
        sum(float(owed[name][places[unit]].sum()) for name, places in site.coupling.rows.items())
        + sum(float(owed[name][:, places[unit]].sum()) for name, places in site.coupling.columns.items())
        for unit in range(site.coupling.units)
    ]
    return [min(parts), max(parts)]


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
