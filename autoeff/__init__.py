"""Searches, layer by layer, for the transformer configuration that keeps the most quality inside a limit.

    import autoeff

    result = autoeff.run_search("demo", knobs=["bits", "skip"], limits=["linear_bytes<=0.25x"])
    result = autoeff.run_search(build=make, space={"depth": autoeff.choice(2, 4, 6)}, metrics=[loss], objectives=["loss"])

Importing this package does no work: the search engine is loaded when one of its names is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoeff.client import Client
    from autoeff.search.own_job import choice
    from autoeff.search.run import Result, run_search

__all__ = ["Client", "Result", "__version__", "choice", "run_search"]

__version__ = "0.1.0"  # the one place; the build reads it from here, so that a bare tree knows it too


def __getattr__(name: str) -> Any:
    if name in ("Result", "run_search"):
        from autoeff.search import run

        return getattr(run, name)
    if name == "Client":
        from autoeff.client import Client

        return Client
    if name == "choice":
        from autoeff.search.own_job import choice

        return choice
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
