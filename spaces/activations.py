"""Where the activation function of an FFN is, found by what modules are and never by their names."""

from __future__ import annotations

from torch import nn

from autoeff.errors import InputError
from autoeff.spaces.sites import Site

__all__ = ["activation_of", "is_swiglu"]

_FILES = ("transformers.activations", "torch.nn.modules.activation")
_SILU = ("silu", "swish")


def is_swiglu(site: Site) -> bool:
    """Whether an FFN is down(silu(gate x) * up x), as it is left."""
    *before, last = site.linears
    return sum(linear.out_features for linear in before) == 2 * last.in_features and site.activation in _SILU


def activation_of(model: nn.Module, site: Site) -> nn.Module:
    """The module that is the activation function of an FFN sublayer.

    Raises:
        InputError: There is none, or more than one.
    """
    linears = [linear.name for linear in site.linears]
    path = linears[0]
    found: list[nn.Module] = []
    while path and not found:  # from the linears outwards: the sublayer, or the block where the FFN has no module of its own
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        found = [child for child in module.modules() if type(child).__module__ in _FILES]
    if len(set(map(id, found))) != 1:
        raise InputError(f"cannot understand {site.name}: {len(found)} activation functions were found where one is expected")
    return found[0]
