"""Which module of a mixture of experts chooses, and how a level makes it choose among fewer."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from autoeff.errors import InputError
from autoeff.spaces.knob import Undo
from autoeff.spaces.sites import Linear, Site

__all__ = ["choose_among", "chosen_experts", "experts_of", "router_of"]


def chosen_experts(site: Site) -> int:
    """Experts that a token is sent to at the site as it is; 0 where there are none."""
    return max((linear.experts_per_token for linear in site.linears if linear.experts), default=0)


def experts_of(site: Site) -> tuple[Linear, Linear]:
    """The stacked linears of a mixture: gate and up, and down."""
    first, last = (linear for linear in site.linears if linear.experts)
    return first, last


def router_of(model: nn.Module, site: Site) -> Any:
    """The module that chooses: it has a row for each expert, says how many it takes, and gives logits, weights and places.

    Raises:
        InputError: None is known to.
    """
    children = model.get_submodule(site.name).children()
    found = [
        child for child in children if isinstance(getattr(child, "top_k", None), int) and isinstance(getattr(child, "weight", None), Tensor)
    ]
    if len(found) != 1:
        raise InputError(f"cannot understand {site.name}: no router that says how many experts it takes, so they cannot be decided about")
    return found[0]


def choose_among(router: Any, kept: Tensor) -> Undo:
    """Lets a router know the experts `kept` [r] alone: its weights are normalised over them as the model does it.

    The parameters stay as they are; the returned call restores the module.
    """
    few = copy.copy(router)
    few._parameters = {}
    for name, parameter in router._parameters.items():
        by_expert = parameter is not None and len(parameter) == len(router.weight)
        few._parameters[name] = nn.Parameter(parameter.data[kept.to(parameter.device)], requires_grad=False) if by_expert else parameter
    forward = type(router).forward

    def among(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        few.top_k = router.top_k
        *before, places = forward(few, *args, **kwargs)
        return *before, kept.to(places.device)[places]

    before = vars(router).get("forward")
    router.forward = among

    def undo() -> None:
        if before is None:
            del router.forward
        else:
            router.forward = before

    return undo
