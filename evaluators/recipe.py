"""What no weight holds of an exported configuration, in a process that has the model and transformers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from autoeff.errors import InputError
from autoeff.evaluators.bank import Step
from autoeff.evaluators.levels_file import built_for, put
from autoeff.spaces.knob import make_knob
from autoeff.spaces.kv_cache import KvCache
from autoeff.spaces.sites import find_structure

__all__ = ["cache_from", "put_in_force"]


def cache_from(recipe: Path | Mapping[str, Any], model: nn.Module, context: int | None = None) -> KvCache:
    """Puts what a recipe decides and no weights hold in force in a model, and returns an empty cache: one for every generation.

        model = AutoModelForCausalLM.from_pretrained("out")
        model.generate(**inputs, past_key_values=cache_from("out/recipe.json", model))

    Called again on the same model it puts the recipe in the place of the last one.

    Args:
        recipe: `recipe.json`, or what it holds.
        model: A transformers model as the recipe was made for.
        context: Tokens that budgets are shares of; the job's by default.

    Raises:
        InputError: The recipe cannot be read or names a module that the model lacks, or `levels.safetensors` beside it is missing.
    """
    return KvCache(model, put_in_force(recipe, model, context))


def put_in_force(recipe: Path | Mapping[str, Any], model: nn.Module, context: int | None = None) -> int:
    """The same for models that keep no cache; returns the tokens that budgets are shares of."""
    folder = Path() if isinstance(recipe, Mapping) else Path(recipe).parent
    if not isinstance(recipe, Mapping):
        try:
            recipe = dict(json.loads(Path(recipe).read_text()))
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise InputError(f"cannot read the recipe {recipe}: {error}") from None
    knobs = {name: make_knob(name, settings) for name, settings in recipe["knobs"].items()}
    tokens = int(context or recipe["context"] or 0)
    for undo in reversed(vars(model).pop("autoeff_undo", [])):
        undo()
    sites = {site.name: site for site in find_structure(model).with_blocks().at_context(tokens).sites}
    steps = []
    for key, level in recipe["configuration"].items():
        name, _, knob = key.rpartition(":")
        if not knobs[knob].beside_weights:
            continue
        if name not in sites:
            raise InputError(f"the recipe decides about {name}, which this {type(model).__name__} lacks")
        if knobs[knob].cost(sites[name], level):
            steps.append(Step(knobs[knob], sites[name], level))
    vars(model)["autoeff_undo"] = put(model, steps, lambda key: built_for(folder, key))
    return tokens
