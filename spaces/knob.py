"""What a knob is: a kind of decision, everything about it in one file under `knobs/`.

A knob sees a site and a level, never a sampler. Its settings are its dataclass fields; `--set bits.group_size=32` fills them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from autoeff.errors import InputError
from autoeff.spaces.configuration import Level
from autoeff.spaces.material import Material
from autoeff.spaces.plugins import plugin, plugins
from autoeff.spaces.sites import Site, Structure

__all__ = ["BESIDE_WEIGHTS", "KINDS", "Cost", "Kind", "Knob", "Undo", "known_knobs", "make_knob", "swap"]

Kind = Literal["structure", "weight", "cache", "runtime", "trained"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""In the order in which knobs at one site are applied."""
BESIDE_WEIGHTS: frozenset[Kind] = frozenset({"cache", "runtime"})
"""Kinds whose levels no checkpoint holds: they stand in the recipe beside it."""
Cost = Mapping[str, int]
"""Change against the dense level of primary quantities: `linear_bytes`, `kv_bytes_per_token`, `cache_bytes`, `flops_per_token`.

What is read and how long it takes follow from `kernel`, so knobs do not say it."""
Undo = Callable[[], None]


@dataclass(frozen=True)
class Knob(ABC):
    """Base of every knob.

    A level acts through the linears of its site (`build` and `transform`, kept in the bank), or on the model (`apply`), or both.

    Attributes:
        name: As written in `--knobs` and in decision keys.
        kind: Fixes the order at one site, see `KINDS`.
        conflicts: Names of knobs that may not be in the same space.
        uniform: Whether "the same level everywhere" is a configuration that people use, hence a baseline.
        coupled: Whether its sites are those whose units `couplings.py` has found.
        of_blocks: Whether its sites are whole blocks.
        of_context: Whether costs follow from the job's context; those of knobs of kind `cache` always do.
        beside: Parts of what `build` returns that stay stored when a later knob stores the values, such as a mask.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    conflicts: ClassVar[frozenset[str]] = frozenset()
    uniform: ClassVar[bool] = True
    coupled: ClassVar[bool] = False
    of_blocks: ClassVar[bool] = False
    of_context: ClassVar[bool] = False
    beside: ClassVar[frozenset[str]] = frozenset()

    @property
    def needs(self) -> frozenset[str]:
        """Names of the calibration statistics that `build` reads (see `evaluators/calibration.py`); empty for data-free knobs."""
        return frozenset()

    @abstractmethod
    def sites(self, structure: Structure) -> Sequence[Site]:
        """The sites that this knob decides about."""

    @abstractmethod
    def levels(self, site: Site) -> tuple[Level, ...]:
        """Levels ordered by falling cost; the first is the dense model."""

    @abstractmethod
    def cost(self, site: Site, level: Level) -> Cost:
        """Exact change against dense; the dense level's is empty."""

    def constants(self, structure: Structure) -> Mapping[str, int]:
        """Primary quantities that the dense model has because of this knob, such as what it can save."""
        return {}

    def check_length(self, tokens: int) -> None:  # noqa: B027  (optional)
        """Refuses windows of text of so many tokens if its levels cannot be measured on them.

        Raises:
            InputError: With what could be.
        """

    def first_block(self, site: Site) -> int:
        """Index of the first block that computes something else: hidden states before it are the same under every level."""
        return site.block

    def silences(self, site: Site, level: Level) -> bool:
        """Whether this level makes every other decision about the site's linears inert."""
        return False

    def left(self, site: Site, level: Level) -> Site:
        """The site as this level leaves it to knobs that come later: their costs are on top of this one's. Not asked if silenced."""
        return site

    def build(self, site: Site, level: Level, material: Material) -> dict[str, Tensor]:
        """What the bank stores for this level, by `<linear>.<part>`: packed tensors. Deterministic.

        Args:
            site: Where.
            level: Not the dense one.
            material: The site's linears as the knobs that come earlier have left them, with the statistics that `needs` names.

        Returns:
            Tensors on the CPU, as those of `material` are; what takes long may be computed on `material.device`.
        """
        return {}

    def stored_level(self, site: Site, level: Level) -> Level:
        """The level whose `build` the bank keeps for this one; another one where `derived` makes several levels of one entry."""
        return level

    def derived(self, site: Site, level: Level, entry: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this level serves, out of what the bank keeps for it: as `build` would return it."""
        return entry

    def transform(self, site: Site, level: Level, packed: Mapping[str, Tensor], material: Material) -> Material:
        """The linears as this level leaves them: cut, masked, or with the values that the stored codes stand for.

        Args:
            site: Where.
            level: Not the dense one.
            packed: What `derived` returned.
            material: As given to `build`; it may hold some of the site's linears only.
        """
        return material

    def apply(self, model: nn.Module, site: Site, level: Level) -> Undo:
        """Puts what is no value of a linear in force; the returned call restores the model bit-exactly."""
        return swap(model, {})

    def kernel(self, site: Site, level: Level) -> str | None:
        """The file of `kernels/` that serves this level at the site as earlier levels leave it.

        None means that the linears are served dense: with that latency, and reading those bytes.
        """
        return None

    def kernel_settings(self, site: Site, level: Level) -> Mapping[str, int]:
        """What that kernel must be told besides the shapes, such as `bits` and `group`; latency tables are keyed by it."""
        return {}

    def apply_built(self, model: nn.Module, site: Site, level: Level, built: Mapping[str, Tensor]) -> Undo:
        """Like `apply`, for levels that act on the model by what `build` found; an export keeps that in a file of its own.

        Args:
            model: As for `apply`; linears have their values already.
            site: Where.
            level: Not the dense one.
            built: What `derived` returned; empty unless this method is overridden.
        """
        return self.apply(model, site, level)

    @property
    def of_values(self) -> bool:
        """Whether levels act through the values of linears, which the bank keeps."""
        return type(self).transform is not Knob.transform

    @property
    def applies_built(self) -> bool:
        """Whether levels act on the model by what the bank keeps."""
        return type(self).apply_built is not Knob.apply_built

    @property
    def beside_weights(self) -> bool:
        """Whether a checkpoint alone does not hold its levels: what stands in the recipe has to be put in force."""
        return self.kind in BESIDE_WEIGHTS or self.applies_built

    def settings(self) -> dict[str, Any]:
        """Every setting by name, as `make_knob` takes them."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def swap(model: nn.Module, tensors: Mapping[str, Tensor]) -> Undo:
    """Lets parameters of `model` point to other data; nothing is copied where dtype and device already agree.

    Args:
        model: Its parameters stay the same objects, so optimizers and hooks keep theirs.
        tensors: By parameter name, in the parameter's shape.

    Returns:
        A call that points them back to the very same memory. Calls for one parameter are undone last in, first out.

    Raises:
        ValueError: A tensor of another shape.
    """
    before: list[tuple[nn.Parameter, Tensor]] = []
    for name, tensor in tensors.items():
        parameter = model.get_parameter(name)
        if parameter.shape != tensor.shape:
            raise ValueError(f"{name} is {tuple(parameter.shape)}: got {tuple(tensor.shape)}")
        before.append((parameter, parameter.data))
    for (parameter, _), tensor in zip(before, tensors.values(), strict=True):
        parameter.data = tensor.to(parameter.device, parameter.dtype)

    def undo() -> None:
        for parameter, data in before:
            parameter.data = data

    return undo


_WHERE = ("autoeff.spaces.knobs", Knob, "autoeff.knobs")


def known_knobs() -> dict[str, type[Knob]]:
    """Every knob on this machine by name."""
    return plugins(*_WHERE)


def make_knob(name: str, settings: Mapping[str, Any]) -> Knob:
    """The knob `name` with `settings` over its defaults; text values (from `--set`) are converted.

    Raises:
        InputError: Unknown knob or setting, or a value it does not allow.
    """
    knob = plugin(*_WHERE, name)
    types = get_type_hints(knob)
    allowed = [f.name for f in fields(knob)]
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in allowed:
            raise InputError(f"unknown setting {name}.{key}; known: {', '.join(allowed) or 'none'}")
        values[key] = _converted(f"{name}.{key}", value, types[key])
    made: Knob = knob(**values)
    return made


def _converted(key: str, value: Any, kind: Any) -> Any:
    """`value` as the setting's type: bool, int, float, str, or a tuple of one of them (text: separated by commas)."""
    many = get_origin(kind) is tuple
    item = get_args(kind)[0] if many else kind
    try:
        if many:
            return tuple(_one(part, item) for part in (value.split(",") if isinstance(value, str) else value))
        return _one(value, item)
    except (KeyError, TypeError, ValueError):
        what = f"{'list of ' if many else ''}{item.__name__}"
        raise InputError(f"{key} must be of type {what}: got {value!r}") from None


def _one(value: Any, kind: type) -> Any:
    if isinstance(value, str) and kind is not str:
        return {"true": True, "false": False}[value.strip().lower()] if kind is bool else kind(value)
    if type(value) is not kind and (kind, type(value)) != (float, int):
        raise TypeError
    return kind(value)
