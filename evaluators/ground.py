"""What follows from a model's files and the space alone: sites, decisions, exact costs. Jobs of other texts and seeds share it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from autoeff.errors import InputError
from autoeff.evaluators.loading import ModelFacts, inspect_model, skeleton
from autoeff.spaces.build import build_space
from autoeff.spaces.couplings import coupled
from autoeff.spaces.knob import Knob, known_knobs
from autoeff.spaces.sites import Structure, find_structure
from autoeff.spaces.space import SearchSpace, SpaceSpec

__all__ = ["Ground", "ground_of"]


@dataclass(frozen=True)
class Ground:
    """A model and its space.

    Attributes:
        facts: Of the model's files.
        model: On the meta device.
        structure: Blocks and sites.
        left_out: Sublayers whose units cannot be cut, and why.
        space: Decisions with exact costs.
        knobs: By name.
    """

    facts: ModelFacts
    model: nn.Module
    structure: Structure
    left_out: Mapping[str, str]
    space: SearchSpace
    knobs: Mapping[str, Knob]


def ground_of(model: Path, spec: SpaceSpec, batch: int, context: int | None) -> Ground:
    """Reads headers and config.

    Args:
        model: Its directory.
        spec: Knobs and their settings.
        batch: Sequences decoded together.
        context: Tokens that budgets of the cache are shares of; None takes the model's context.

    Raises:
        InputError: Anything wrong with the model or the knobs.
    """
    facts = inspect_model(model)
    bare = skeleton(facts)
    structure = find_structure(bare, untie=spec.untie).at_batch(batch)
    left_out: Mapping[str, str] = {}
    asked = [knob for name, knob in known_knobs().items() if name in spec.knobs]
    if any(knob.of_blocks for knob in asked):
        structure = structure.with_blocks()
    if any(knob.coupled for knob in asked):
        structure, left_out = coupled(bare, structure)
    if any(knob.kind == "cache" or knob.of_context for knob in asked):
        if (tokens := context or facts.context) is None:
            raise InputError(f"model_type {facts.model_type!r} states no context length, which budgets are shares of; give --context")
        structure = structure.at_context(tokens)
    return Ground(facts, bare, structure, left_out, *build_space(structure, spec))
