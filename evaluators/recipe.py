"""What no weight holds of an exported configuration, in a process that has the model and transformers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from autoeff.errors import InputError
from autoeff.spaces.knob import BESIDE_WEIGHTS, make_knob
from autoeff.spaces.kv_cache import KvCache
from autoeff.spaces.sites import find_structure

__all__ = ["cache_from"]


def cache_from(recipe: Path | Mapping[str, Any], model: nn.Module, context: int | None = None) -> KvCache:
    """Puts what a recipe decides about cache and experts in force in a model, and returns an empty cache: one for every generation.

        model = AutoModelForCausalLM.from_pretrained("out")
        model.generate(**inputs, past_key_values=cache_from("out/recipe.json", model))

    Called again on the same model it leaves the levels as they are.

    Args:
        recipe: `recipe.json`, or what it holds.
        model: A transformers model as the recipe was made for.
        context: Tokens that budgets are shares of; the job's by default.

    Raises:
        InputError: The recipe cannot be read, or names a module that the model lacks.
    """
    if not isinstance(recipe, Mapping):
        try:
            recipe = dict(json.loads(Path(recipe).read_text()))
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise InputError(f"cannot read the recipe {recipe}: {error}") from None
    knobs = {name: make_knob(name, settings) for name, settings in recipe["knobs"].items()}
    tokens = context or recipe["context"]
    sites = {site.name: site for site in find_structure(model).at_context(tokens).sites}
    for key, level in recipe["configuration"].items():
        name, _, knob = key.rpartition(":")
        if knobs[knob].kind in BESIDE_WEIGHTS:
            if name not in sites:
                raise InputError(f"the recipe decides about {name}, which this {type(model).__name__} lacks")
            knobs[knob].apply(model, sites[name], level)  # a part of the same name takes the place of the earlier one
    return KvCache(model, tokens)
