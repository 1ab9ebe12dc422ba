"""What the routes of one application share; made once, in `app`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from autoeff.search.settings import Settings
from autoeff.search.storage.store import Store

if TYPE_CHECKING:  # all of these are built upon this module
    from autoeff.api.access import Doorkeeper, RateLimits
    from autoeff.api.backroom import Backroom
    from autoeff.api.cursors import Cursors
    from autoeff.api.exports import Exports
    from autoeff.api.feed import Feed
    from autoeff.api.metrics import Metrics
    from autoeff.api.roots import Roots
    from autoeff.api.standings import Standings
    from autoeff.search.storage.idempotency import Replies
    from autoeff.search.storage.keys import KeyRing

__all__ = ["Context", "Server", "server_of"]


@dataclass(frozen=True)
class Context:
    """The parts of a running server.

    Attributes:
        store: Jobs and results.
        ring: Keys.
        replies: What was answered to requests that may be repeated.
        backroom: A process for what takes seconds.
        measuring: One for what waits for workers.
        exporting: One for what takes minutes and the memory of a model.
    """

    settings: Settings
    store: Store
    ring: KeyRing
    replies: Replies
    roots: Roots
    cursors: Cursors
    rates: RateLimits
    doorkeeper: Doorkeeper
    feed: Feed
    standings: Standings
    exports: Exports
    backroom: Backroom
    measuring: Backroom
    exporting: Backroom
    metrics: Metrics


def server_of(request: Request) -> Context:
    """The server that a request came to."""
    context: Context = request.app.state.context
    return context


async def _server(request: Request) -> Context:
    """As `server_of`: what does not wait is async, or it would take a thread of every request."""
    return server_of(request)


Server = Annotated[Context, Depends(_server)]
