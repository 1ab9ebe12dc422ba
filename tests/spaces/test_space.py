"""The space against brute force, on structures made by hand."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoeff.errors import InputError
from autoeff.spaces import build as module
from autoeff.spaces.build import build_space
from autoeff.spaces.knob import Kind, Knob, make_knob
from autoeff.spaces.sites import Structure
from autoeff.spaces.space import Context, Decision, SearchSpace, SpaceSpec

MakeStructure = Callable[..., Structure]
BOTH = {"bits": {}, "skip": {}}


def _space(structure: Structure, knobs: dict[str, dict[str, object]] = BOTH, **options: object) -> SearchSpace:
    return build_space(structure, SpaceSpec(knobs, **options))[0]


def _below(decision: Decision) -> list[Context]:
    return [(*context, branch) for context in decision.costs for branch in {*decision.branches} if branch is not None]


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    """Spaces of at most six decisions: random levels, parents and branches."""
    decisions: list[Decision] = []
    for i in range(draw(st.integers(1, 6))):
        levels = draw(st.integers(2, 3))
        parent = draw(st.sampled_from([None, *range(i)]))
        branches = (0, *(draw(st.sampled_from([0, 1, None])) for _ in range(levels - 1)))
        contexts = [()] if parent is None else _below(decisions[parent])
        costs = {c: tuple({"linear_bytes": -draw(st.integers(1, 9)) * step} if step else {} for step in range(levels)) for c in contexts}
        decisions.append(Decision(f"site{i}", "knob", i, tuple(range(levels)), costs, parent, branches))
    return SearchSpace(tuple(decisions), {"linear_bytes": 1000})


def _everything(space: SearchSpace) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(d.levels)) for d in space.decisions)))


@given(spaces())
@settings(deadline=None)
def test_size_is_the_number_of_different_configurations(space: SearchSpace) -> None:
    assert space.size == len({space.at(indices).digest for indices in _everything(space)})


@given(spaces())
@settings(deadline=None)
def test_inert_decisions_change_neither_name_nor_cost(space: SearchSpace) -> None:
    for indices in _everything(space):
        normal = space.normalised(indices)
        assert space.normalised(normal) == normal
        assert space.primary(indices) == space.primary(normal)
        assert space.at(indices) == space.at(normal)
        for i, on in enumerate(space.active(indices)):
            assert on or normal[i] == 0


@given(spaces())
@settings(deadline=None)
def test_yaml_reads_back_as_the_same_space(space: SearchSpace) -> None:
    again = SearchSpace.from_yaml(space.to_yaml())
    assert again == space
    assert again.digest == space.digest


@given(spaces(), st.integers(0, 9))
@settings(deadline=None)
def test_samples_are_normalised_and_repeatable(space: SearchSpace, seed: int) -> None:
    drawn = [space.sample(random.Random(seed)) for _ in range(2)]
    assert drawn[0] == drawn[1] == space.normalised(drawn[0])
    configuration = space.at(drawn[0])
    assert space.indices(configuration.levels) == drawn[0]
    assert space.configuration(configuration.levels) == configuration


def test_every_level_is_drawn() -> None:
    space = SearchSpace((Decision("a", "k", 0, (0, 1, 2), {(): ({}, {}, {})}),), {})
    rng = random.Random(0)
    assert {space.sample(rng)[0] for _ in range(100)} == {0, 1, 2}


def test_bits_and_skip_have_the_size_of_their_formula(make_structure: MakeStructure) -> None:
    space = _space(make_structure(2))
    assert space.size == (1 + 6**2) ** 4  # a sublayer is skipped, or its two linears have one of six widths each
    assert _space(make_structure(2), {"bits": {}}).size == 6**8
    small = _space(make_structure(1), levels={"*:bits": (16, 4, 2)})
    assert small.size == len({small.at(indices).digest for indices in _everything(small)}) == (1 + 3**2) ** 2


def test_skipped_sublayer_silences_its_linears(make_structure: MakeStructure) -> None:
    space = _space(make_structure(1))
    names = {d.key: space.decisions[d.parent].key if d.parent is not None else None for d in space.decisions}
    assert names == {
        "blocks.0.attn:skip": None,
        "blocks.0.attn.q+k+v:bits": "blocks.0.attn:skip",
        "blocks.0.attn.o:bits": "blocks.0.attn:skip",
        "blocks.0.mlp:skip": None,
        "blocks.0.mlp.up:bits": "blocks.0.mlp:skip",
        "blocks.0.mlp.down:bits": "blocks.0.mlp:skip",
    }
    skipped = {"blocks.0.attn:skip": "skip"}
    assert space.configuration(skipped) == space.configuration({**skipped, "blocks.0.attn.o:bits": 2})
    assert space.configuration({}) == space.dense_configuration


def test_order_of_the_knobs_plays_no_part(make_structure: MakeStructure) -> None:
    one, two = (_space(make_structure(2), {name: {} for name in names}) for names in (("bits", "skip"), ("skip", "bits")))
    assert one == two


def test_include_and_exclude_pick_decisions(make_structure: MakeStructure) -> None:
    structure = make_structure(3)
    assert {d.block for d in _space(structure, include=("blocks.0.*", "blocks.2.*")).decisions} == {0, 2}
    keys = set(_space(structure, include=("blocks.1.*",), exclude=("*:skip", "*.o:*")).index)
    assert keys == {"blocks.1.attn.q+k+v:bits", "blocks.1.mlp.up:bits", "blocks.1.mlp.down:bits"}


def test_levels_can_be_restricted_and_the_dense_one_stays(make_structure: MakeStructure) -> None:
    space = _space(make_structure(2), levels={"*:bits": (4, 3), "blocks.0.*:bits": (8,)})  # the last matching glob holds
    assert {d.block: d.levels for d in space.decisions if d.knob == "bits"} == {0: (16, 8), 1: (16, 4, 3)}


def test_decision_with_one_level_is_none(make_structure: MakeStructure) -> None:
    space = _space(make_structure(2), levels={"blocks.0.*:bits": (16,), "blocks.0.*:skip": ()})
    assert {d.block for d in space.decisions} == {1}


def test_level_that_only_some_sites_have_may_be_named_for_all(make_structure: MakeStructure) -> None:
    structure = make_structure(1)
    narrow = replace(structure.sites[-1].linears[0], in_features=3)  # of its widths, only 2 bits save bytes
    sites = (*structure.sites[:-1], replace(structure.sites[-1], linears=(narrow,)))
    space = _space(replace(structure, sites=sites), {"bits": {}}, levels={"*": (4, 2)})
    assert [d.levels for d in space.decisions] == [(16, 4, 2), (16, 4, 2), (16, 4, 2), (16, 2)]


def test_uniform_levels_are_baselines_of_knobs_that_people_use_so(make_structure: MakeStructure) -> None:
    space = _space(make_structure(2))
    uniform = space.uniform
    assert list(uniform) == ["bits=8", "bits=6", "bits=4", "bits=3", "bits=2"]
    assert set(uniform["bits=3"].levels.items()) == {(d.key, 3 if d.knob == "bits" else "keep") for d in space.decisions}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": ("blocks.9.*",)}, "the glob 'blocks.9.*' matches no decision; the first is 'blocks.0.attn:skip'"),
        ({"exclude": ("*",)}, "the space is empty: include, exclude and levels leave nothing to decide for bits, skip"),
        ({"levels": {"*:bits": (16, 5)}}, r"\*:bits: no level 5; allowed: 16, 8, 6, 4, 3, 2"),
        ({"levels": {"layers:bits": (4,)}}, "the glob 'layers:bits' matches no decision"),
    ],
)
def test_space_that_cannot_be_is_refused(make_structure: MakeStructure, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _space(make_structure(1), **options)


def test_knob_without_sites_is_refused(make_structure: MakeStructure) -> None:
    with pytest.raises(InputError, match="knob skip finds nothing to decide about in this made_by_hand model"):
        _space(replace(make_structure(1), sites=make_structure(1).sites[1:2]), {"skip": {}})


def test_knobs_that_conflict_are_refused_in_both_orders(make_structure: MakeStructure, third_party_knobs: Path) -> None:
    for names in (("bits", "noise"), ("noise", "bits")):
        with pytest.raises(InputError, match="knob noise cannot be searched together with bits"):
            _space(make_structure(1), {name: {} for name in names})


def test_unknown_decisions_and_levels_are_refused(make_structure: MakeStructure) -> None:
    space = _space(make_structure(1))
    with pytest.raises(InputError, match="no decision 'x:bits' in this space of 6; the first is 'blocks.0.attn:skip'"):
        space.indices({"x:bits": 4})
    with pytest.raises(InputError, match="blocks.0.attn.o:bits: no level 5; allowed: 16, 8, 6, 4, 3, 2"):
        space.indices({"blocks.0.attn.o:bits": 5})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{format: 2}", "search space of format 2; this version reads 1"),
        ("[1]", "a YAML mapping is expected, got list"),
        ("", "a YAML mapping is expected, got NoneType"),
        ("{format: 1", "not YAML: "),
        ("{format: 1, dense: {}}", "not a search space as this version writes it: KeyError"),
        ("{format: 1, dense: {}, decisions: [{site: a, levels: [1], costs: [], branches: []}]}", "not a search space"),
    ],
)
def test_text_that_is_no_space_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        SearchSpace.from_yaml(text)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class _Budget(Knob):
    """Stands for a knob whose kind and name come before those of `skip`, at the same sites."""

    name: ClassVar[str] = "a_budget"
    kind: ClassVar[Kind] = "structure"

    def sites(self, structure):
        return [site for site in structure.sites if site.kind == "attention"]

    def levels(self, site):
        return (1.0, 0.5)

    def cost(self, site, level):
        return {}


def test_what_silences_comes_first_at_a_site(make_structure: MakeStructure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "make_knob", lambda name, values: _Budget() if name == "a_budget" else make_knob(name, values))
    space = _space(make_structure(1), {"a_budget": {}, "bits": {}, "skip": {}})
    assert [(d.knob, d.parent) for d in space.decisions][:4] == [("skip", None), ("a_budget", 0), ("bits", 0), ("bits", 0)]


_PRINT_DIGESTS = """
import sys
from autoeff.spaces.space import SearchSpace
space = SearchSpace.from_yaml(sys.stdin.read())
print(space.digest, space.dense_configuration.digest)
"""


def test_digests_are_the_same_in_every_process(make_structure: MakeStructure) -> None:
    space = _space(make_structure(1))
    run = subprocess.run(
        [sys.executable, "-c", _PRINT_DIGESTS],
        input=space.to_yaml(), env={**os.environ, "PYTHONHASHSEED": "777"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.split() == [space.digest, space.dense_configuration.digest]
