"""Metrics of the user's own: functions that say numbers of a candidate, checked before anything is stored.

Of a search of a model they are named `package.module:function`, imported by the runner, and called with the model as it stands and
its tokenizer (None where it has none) when a finalist is confirmed. They are code, so they belong to searches on one's own machine.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from autoeff.errors import CandidateError, FailureClass, InputError
from autoeff.spaces.configuration import digest_of
from autoeff.spaces.measurements import MEASURES

__all__ = ["NAME", "Metric", "check_metrics", "imported_metrics", "measured_by", "values_of"]

Metric = Callable[..., Any]
"""From a candidate to a number, or to numbers by name."""

NAME = re.compile(r"[A-Za-z_][\w./:@-]{0,63}")
"""What a metric may be called, so that it can stand in a limit."""

_REFERENCE = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")


def imported_metrics(references: Sequence[str]) -> dict[str, Metric]:
    """The functions that references `package.module:function` name, by the function's name. Modules of the working directory are found.

    Raises:
        InputError: A reference is malformed, its module cannot be imported, or two functions have one name.
    """
    found: dict[str, Metric] = {}
    for reference in references:
        match = _REFERENCE.fullmatch(reference)
        if match is None:
            raise InputError(f"cannot read the metric {reference[:200]!r}; write package.module:function")
        module, name = match.groups()
        if name in found:
            raise InputError(f"two metrics are called {name!r}; give them different names")
        if str(Path.cwd()) not in sys.path:  # where an installed command does not look
            sys.path.insert(0, str(Path.cwd()))
        try:
            function = getattr(importlib.import_module(module), name, None)
        except Exception as error:  # whatever the module does on its way
            raise InputError(f"cannot import the metric {reference!r}: {type(error).__name__}: {_line(error)}") from None
        if not callable(function):
            raise InputError(f"the module {module!r} has no function {name!r}; a metric is written package.module:function")
        found[name] = function
    return found


def check_metrics(references: Sequence[str]) -> str:
    """A digest of what the metrics are: their references and the source of their modules.

    Raises:
        InputError: As `imported_metrics`.
    """
    modules = [inspect.getmodule(function) for function in imported_metrics(references).values()]
    sources = [inspect.getsource(module) if module is not None else "" for module in modules]
    return digest_of({reference: hashlib.sha256(text.encode()).hexdigest() for reference, text in zip(references, sources, strict=True)})


def values_of(metrics: Mapping[str, Metric], *candidate: Any) -> dict[str, float]:
    """What metrics say of a candidate, by name.

    Raises:
        CandidateError: A metric gives something other than numbers, or under a name that is taken or cannot stand in a limit.
    """
    values: dict[str, float] = {}
    for name, metric in metrics.items():
        found = metric(*candidate)
        for key, value in found.items() if isinstance(found, Mapping) else [(name, found)]:
            if not isinstance(key, str) or NAME.fullmatch(key) is None:
                raise CandidateError(FailureClass.INVALID, f"metric {name} names a value {key!r}; allowed: letters, digits and _./:@-")
            if key in values or key in MEASURES:
                other = "another metric" if key in values else "a built-in measurement"
                raise CandidateError(FailureClass.INVALID, f"metric {name} names a value {key!r}, as {other} does; choose another name")
            if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
                raise CandidateError(FailureClass.INVALID, f"metric {name} gave a {type(value).__name__} for {key!r}, not a number")
            values[key] = float(value)
    return values


def measured_by(metrics: Mapping[str, Metric], model: Any, tokenizer: Any) -> dict[str, float]:
    """What metrics say of a model.

    Raises:
        CandidateError: As `values_of`; also if a metric fails, or says what is no finite number.
    """
    try:
        values = values_of(metrics, model, tokenizer)
    except CandidateError:
        raise
    except Exception as error:  # it is the user's code
        from autoeff.kernels.failures import of_device  # other searches import this module and need no torch

        if of_device(error):
            raise
        raise CandidateError(FailureClass.INVALID, f"a metric failed: {type(error).__name__}: {_line(error)}") from error
    if strange := next((name for name, value in values.items() if not math.isfinite(value)), None):
        raise CandidateError(FailureClass.NAN, f"metric {strange} is {values[strange]}")
    return values


def _line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:200]
