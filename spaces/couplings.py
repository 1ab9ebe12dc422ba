"""Which outputs and inputs of a sublayer's linears must leave together, found by data dependence, never by names.

One block is run with linears that give numbers without multiplying. NaN in chosen outputs of a sublayer's first linears arrives
at those inputs of its last linear that depend on them, whatever lies between: gates, rotary positions, norms over a head,
repeated KV heads, fused projections in any order. What depends on each other is a unit: of an FFN one neuron, of attention one
KV head with its query heads. NaN, unlike a gradient, passes a zero.

Source: dependency groups after DepGraph, arXiv:2301.12900; zero-invariant groups after OTOv2, arXiv:2303.06862.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from autoeff.spaces.sites import Coupling, Linear, Site, Structure, blank_inputs

__all__ = ["Couplings", "coupled", "find_couplings"]

_TOKENS = 2  # a lone token is a special case in some attention code
_ELEMENTS = 1 << 22  # that the linears of a block give in a pass: 16 MB
_BATCH = 512
_SPLITS = 3


@dataclass(frozen=True)
class Couplings:
    """What was found in a model.

    Attributes:
        found: Couplings by name of the site.
        left_out: Why the other sublayers have none, by name of the site.
    """

    found: Mapping[str, Coupling]
    left_out: Mapping[str, str]


def coupled(model: nn.Module, structure: Structure) -> tuple[Structure, Mapping[str, str]]:
    """The structure with a coupling at every sublayer that has one, and why the others have none, by name of the site."""
    couplings = find_couplings(model, structure)
    sites = tuple(replace(site, coupling=couplings.found.get(site.name)) for site in structure.sites)
    return replace(structure, sites=sites), couplings.left_out


def find_couplings(model: nn.Module, structure: Structure) -> Couplings:
    """The coupling of every attention and FFN sublayer that has one.

    Blocks that are built alike are taken to be alike, and one of them is probed.

    Args:
        model: A transformers model as it was built, on any device including meta; it stays as it is and its weights are not read.
        structure: What `find_structure` found in it.
    """
    probe = _Probe(model, structure)
    plans = _plans([model.get_submodule(path) for path in structure.blocks])
    alike: dict[object, Site] = {}
    answers: dict[str, Coupling | str] = {}
    for site in structure.sites:
        if site.kind != "linears":
            first = alike.setdefault((site.kind, plans[site.block]), site)
            answers[site.name] = _coupling(probe, site) if first is site else _moved(answers[first.name], first, site)
    return Couplings(
        {name: answer for name, answer in answers.items() if isinstance(answer, Coupling)},
        {name: answer for name, answer in answers.items() if isinstance(answer, str)},
    )


class _LeftOutError(Exception):
    """A sublayer that does not fall apart into units, and why."""


def _coupling(probe: _Probe, site: Site) -> Coupling | str:
    try:
        if site.output is None:
            raise _LeftOutError("a mixture of experts")
        *producers, output = site.linears
        if not producers:
            raise _LeftOutError("it is one linear")
        if probe.reached(site, output, torch.zeros(1, output.out_features, dtype=torch.bool)).any():
            raise _LeftOutError(f"inputs of {output.name} are NaN although nothing is")
        find = _links if site.kind == "ffn" else _links_one_by_one
        return _units(producers, output, {linear.name: find(probe, site, linear) for linear in producers})
    except _LeftOutError as reason:
        return str(reason)


def _moved(answer: Coupling | str, source: Site, target: Site) -> Coupling | str:
    """The answer for one block as that for another one."""
    if isinstance(answer, str):
        return answer
    names = {a.name: b.name for a, b in zip(source.linears, target.linears, strict=True)}
    rows, columns = ({names[name]: tensor for name, tensor in part.items()} for part in (answer.rows, answer.columns))
    return Coupling(answer.units, rows, columns)


def _plans(blocks: Sequence[nn.Module]) -> list[str]:
    """What each block is built of: classes, shapes and plain settings, less the numbers by which blocks know their own place."""
    settings = [
        {(name, key): value for name, part in block.named_modules() for key, value in vars(part).items() if isinstance(value, int | str)}
        for block in blocks
    ]
    places = set.intersection(*({key for key, value in of.items() if value == i} for i, of in enumerate(settings)))
    return [
        repr(
            (
                [(name, type(module).__name__) for name, module in block.named_modules()],
                [(name, tuple(parameter.shape)) for name, parameter in block.named_parameters()],
                [item for item in of.items() if item[0] not in places],
            )
        )
        for block, of in zip(blocks, settings, strict=True)
    ]


def _links_one_by_one(probe: _Probe, site: Site, linear: Linear) -> Tensor:
    """Pairs (output of `linear`, input of the site's last linear that depends on it), int64 [2, pairs]: one output at a time."""
    pairs = []
    for rows in torch.split(torch.arange(linear.out_features), probe.batch):
        patterns = rows[:, None] == torch.arange(linear.out_features)
        reached = probe.reached(site, linear, patterns)
        if reached.all(1).any():
            raise _LeftOutError(f"every input of {site.output} depends on output {int(rows[reached.all(1)][0])} of {linear.name}")
        places, columns = reached.nonzero(as_tuple=True)
        pairs.append(torch.stack([rows[places], columns]))
    return torch.cat(pairs, dim=1)


def _links(probe: _Probe, site: Site, linear: Linear) -> Tensor:
    """The same where an input depends on few outputs: a pass for each digit of the outputs' numbers, and one for its complement.

    An input that depends on one output is reached in one pass of each pair, which spell its number. One that is reached in both
    passes depends on outputs that differ in this digit; these are then looked at apart.
    """

    def among(rows: Tensor, splits: int) -> Iterator[Tensor]:
        digits = _digits(len(rows))
        patterns = torch.zeros(2, len(digits), linear.out_features, dtype=torch.bool)
        patterns[0, :, rows], patterns[1, :, rows] = digits, ~digits
        ones, zeros = probe.reached(site, linear, patterns.flatten(0, 1)).view(2, len(digits), -1)
        unclear = (ones & zeros).sum(1)
        if unclear.any():
            if splits == 0:
                raise _LeftOutError(f"an input of {site.output} depends on more than {1 << _SPLITS} outputs of {linear.name}")
            half = digits[int(unclear.argmax())]
            yield from among(rows[half], splits - 1)
            yield from among(rows[~half], splits - 1)
        else:
            columns = (ones | zeros)[0].nonzero().squeeze(1)
            powers = 1 << torch.arange(len(digits))[:, None]
            row_of = torch.empty(1 << len(digits), dtype=torch.long).index_put_(((digits * powers).sum(0),), rows)
            yield torch.stack([row_of[(ones[:, columns] * powers).sum(0)], columns])

    return torch.cat(list(among(torch.arange(linear.out_features), _SPLITS)), dim=1)


def _digits(count: int) -> Tensor:
    """Different numbers for `count` things, bool [digits, count]: the half that a thing is in, then its place there in binary.

    The halves come first since gate and up are fused into halves, whatever their size.
    """
    half = -(-count // 2)
    place = torch.arange(count) % half
    return torch.stack([torch.arange(count) >= half, *((place >> bit & 1).bool() for bit in range(max(1, (half - 1).bit_length())))])


def _units(producers: Sequence[Linear], output: Linear, links: Mapping[str, Tensor]) -> Coupling:
    """The connected parts of rows and columns.

    Every column takes the least column that it shares a row with, until nothing changes.
    """
    k = output.in_features
    unit = torch.arange(k)
    while True:
        before = unit
        for linear in producers:
            rows, columns = links[linear.name]
            of_row = torch.full((linear.out_features,), k).scatter_reduce(0, rows, unit[columns], "amin")
            unit = unit.scatter_reduce(0, columns, of_row[rows], "amin")
        if torch.equal(unit, before):
            break
    names, unit = torch.unique(unit, return_inverse=True)  # the least column is a unit's name
    units = len(names)
    chosen = {}
    for linear in producers:
        rows, columns = links[linear.name]
        of_row = torch.full((linear.out_features,), -1).scatter(0, rows, unit[columns])
        if (of_row < 0).any():
            raise _LeftOutError(f"no input of {output.name} depends on output {int(of_row.argmin())} of {linear.name}")
        chosen[linear.name] = _of_each_unit(of_row, units, linear.name)
    if units == 1:
        raise _LeftOutError(f"all inputs of {output.name} depend on each other")
    return Coupling(units, chosen, {output.name: _of_each_unit(unit, units, output.name)})


def _of_each_unit(unit: Tensor, units: int, name: str) -> Tensor:
    """Places by the unit that they belong to, int64 [units, places]."""
    sizes = unit.bincount(minlength=units)
    if (sizes != sizes[0]).any():
        raise _LeftOutError(f"units differ in size: they hold {int(sizes.min())} to {int(sizes.max())} places of {name}")
    return unit.argsort(stable=True).view(units, -1)


class _Probe:
    """A copy of a model whose parameters are ones without memory and whose linears give ones, or NaN, without multiplying.

    Attributes:
        batch: How many patterns a pass takes.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        stand_ins = {id(tensor): _stand_in(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._model: Any = copy.deepcopy(model, stand_ins).eval()
        if getattr(config := getattr(self._model, "config", None), "pad_token_id", None) is not None:
            vars(config)["pad_token_id"] = None  # models that find it among the tokens ask for a mask
        self._blocks = structure.blocks
        widths = [0] * len(structure.blocks)
        for site in structure.sites:
            widths[site.block] += sum(linear.out_features for linear in site.linears if site.kind == "linears" and not linear.experts)
        self.batch = min(_BATCH, max(_TOKENS + 1, _ELEMENTS // (_TOKENS * max(widths))))
        self._poisoned: tuple[str, Tensor] | None = None
        self._watched: str | None = None
        self._entered: tuple[int, tuple[Any, ...], dict[str, Any]] | None = None
        inside = tuple(f"{path}." for path in structure.blocks)
        for name, module in self._model.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                module.forward = self._instead_of_linear(name, module)  # type: ignore[method-assign]
            elif name.startswith(inside) and any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)):  # experts
                module.forward = _first_argument

    @torch.no_grad()
    def reached(self, site: Site, linear: Linear, patterns: Tensor) -> Tensor:
        """Which inputs of the site's last linear are NaN for some token, bool [patterns, K].

        Args:
            site: A sublayer.
            linear: The one of its linears that gives NaN.
            patterns: In which outputs it does so, bool [patterns, N].
        """
        block = self._model.get_submodule(self._blocks[site.block])
        arguments, keywords = self._arguments(site.block, block)
        found = []
        self._watched = site.linears[-1].name
        try:
            for part in torch.split(patterns, self.batch):
                self._poisoned = linear.name, nn.functional.pad(part, (0, 0, 0, self.batch - len(part)))
                seen = _stopped(block, arguments, keywords)
                found.append(self._by_pattern(self._watched, seen).isnan().any(1)[: len(part)])
        finally:
            self._poisoned = self._watched = None
        return torch.cat(found)

    def _arguments(self, index: int, block: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model calls a block with."""
        if self._entered is None or self._entered[0] != index:

            def stop(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
                raise _StopError((arguments, keywords))

            body = getattr(self._model, "base_model", self._model)
            options = {"use_cache": False} if hasattr(getattr(body, "config", None), "use_cache") else {}
            handle = block.register_forward_pre_hook(stop, with_kwargs=True)
            try:
                fed = blank_inputs(self._model, self.batch, _TOKENS)
                arguments, keywords = _stopped(body, (), {**fed, **options})
                if "pixel_values" in fed:  # one image leads here; it has more tokens than are needed
                    arguments = tuple(item[:, :_TOKENS].expand(self.batch, -1, -1) if torch.is_tensor(item) else item for item in arguments)
                self._entered = index, arguments, keywords
            finally:
                handle.remove()
        return self._entered[1:]

    def _instead_of_linear(self, name: str, module: nn.Linear | Conv1D) -> Callable[[Tensor], Tensor]:
        outputs = module.nf if isinstance(module, Conv1D) else module.out_features

        def forward(fed: Tensor) -> Tensor:
            if name == self._watched:
                raise _StopError(fed)
            given = fed.new_ones(*fed.shape[:-1], outputs)
            if self._poisoned is not None and name == self._poisoned[0]:
                self._by_pattern(name, given).masked_fill_(self._poisoned[1][:, None], math.nan)
            return given

        return forward

    def _by_pattern(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor` as [patterns, tokens, features]."""
        if tensor.shape[0] not in (self.batch, self.batch * _TOKENS):
            raise _LeftOutError(f"{name} does not run over a batch of sequences: got {tuple(tensor.shape)}")
        return tensor.view(self.batch, -1, tensor.shape[-1]) if tensor.is_contiguous() else tensor.reshape(self.batch, -1, tensor.shape[-1])


def _first_argument(hidden: Tensor, *_: object, **__: object) -> Tensor:
    return hidden


class _StopError(Exception):
    """Ends a pass where there is nothing more to see."""

    def __init__(self, seen: Any) -> None:
        self.seen = seen


def _stopped(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """What the pass had seen when it was stopped."""
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the faster kernels of the CPU lose a NaN in queries and keys
            module(*arguments, **keywords)
    except _StopError as stop:
        return stop.seen
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:  # whatever code trips over that needs its values
        raise _LeftOutError(f"{type(module).__name__} does not run without its weights: {str(error)[:200].splitlines()[0]}") from error
    raise _LeftOutError(f"{type(module).__name__} does not come to it")


def _stand_in(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, type and class that holds a one (integers: a zero, which every table has) and takes no memory."""
    fill = int(tensor.is_floating_point() or tensor.dtype == torch.bool)
    value = torch.tensor(fill, dtype=tensor.dtype)
    whole = value.expand(tensor.shape)
    return nn.Parameter(whole, requires_grad=False) if isinstance(tensor, nn.Parameter) else whole
