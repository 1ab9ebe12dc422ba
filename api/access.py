"""Who asks, and what that key may do: nothing, unless a scope says so.

Every router depends on `caller`, so that a route which asks for no scope still needs a key. Calls with a good key are counted by key,
others by address. A key is looked up before anything is refused, or whoever sends bad ones would lock out all others at that address.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.concurrency import run_in_threadpool

from autoeff.api.context import Server
from autoeff.api.problems import ApiError
from autoeff.errors import StorageError
from autoeff.search.keys import Key, fits, hash_of, prefix_of
from autoeff.search.storage.keys import KeyRing

__all__ = ["Admin", "Caller", "Doorkeeper", "RateLimits", "Reader", "Writer", "caller", "needs"]

_bearer = HTTPBearer(auto_error=False, description="A key: ae_<prefix>_<secret>; `autoeff keys create` makes one.")
_CHALLENGE = {"WWW-Authenticate": "Bearer"}
_KEPT_S = 5.0
"""A key that was good is not looked up again for this long; so long may a revoked one still work."""


class RateLimits:
    """How many calls a key, or an address without one, may make in any minute.

    Args:
        per_minute: Calls of a key; 0 limits nothing at all.
        refused_per_minute: Calls of an address that are refused for want of a good key.
    """

    def __init__(self, per_minute: int, refused_per_minute: int = 60) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._per_key = RateLimitItemPerMinute(per_minute) if per_minute else None
        self._refused = RateLimitItemPerMinute(refused_per_minute)

    def count(self, prefix: str, response: Response) -> None:
        """Counts a call of a key, and says in the headers what is left.

        Raises:
            ApiError: 429.
        """
        if self._per_key is None:
            return
        allowed = self._limiter.hit(self._per_key, "key", prefix)
        window = self._limiter.get_window_stats(self._per_key, "key", prefix)
        wait = max(1, round(window.reset_time - time.time()))
        headers = {"RateLimit-Policy": f'"key";q={self._per_key.amount};w=60', "RateLimit": f'"key";r={window.remaining};t={wait}'}
        if not allowed:
            message = f"more than {self._per_key.amount} calls a minute; wait {wait} s"
            raise ApiError(429, "too-many-requests", message, headers | {"Retry-After": str(wait)})
        response.headers.update(headers)

    def count_refused(self, address: str) -> None:
        """Counts a call without a good key.

        Raises:
            ApiError: 429.
        """
        if self._per_key is not None and not self._limiter.hit(self._refused, "address", address):
            raise ApiError(429, "too-many-requests", "too many calls without a good key; wait a minute", {"Retry-After": "60"})


@dataclass
class Doorkeeper:
    """Knows keys: those of the database, and for seconds those that it has just seen.

    Attributes:
        ring: The stored keys.
    """

    ring: KeyRing
    _seen: dict[str, tuple[float, Key]] = field(default_factory=dict)

    async def key(self, text: str) -> Key | None:
        """The key that `text` is, if it is good now."""
        prefix = prefix_of(text)
        if prefix is None:
            return None
        name = hash_of(text)
        until, known = self._seen.get(name, (0.0, None))
        if known is not None and time.monotonic() < until:
            return known
        return await run_in_threadpool(self._looked_up, text, prefix, name)

    def _looked_up(self, text: str, prefix: str, name: str) -> Key | None:
        found = self.ring.good(prefix)
        if found is None or not fits(text, found[1]):
            self._seen.pop(name, None)
            return None
        with suppress(StorageError):  # a disk that is full is still read, and who used a key is no reason not to
            self.ring.used(prefix)
        if len(self._seen) > 10_000:
            self._seen.clear()
        self._seen[name] = (time.monotonic() + _KEPT_S, found[0])
        return found[0]

    def forget(self) -> None:
        """Looks every key up again."""
        self._seen.clear()


async def caller(
    request: Request,
    response: Response,
    server: Server,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Key:
    """The key of a call, once it is seen to be good.

    Raises:
        ApiError: 401 or 429.
    """
    address = "-" if request.client is None else request.client.host
    key = None if credentials is None else await server.doorkeeper.key(credentials.credentials)
    if key is None:
        server.rates.count_refused(address)
        found = "there is no key" if credentials is None else "the key is unknown, expired or revoked"
        raise ApiError(401, "unauthorized", f"{found}; send one as `Authorization: Bearer ae_…`", _CHALLENGE)
    server.rates.count(key.prefix, response)
    return key


Caller = Annotated[Key, Depends(caller)]


def needs(scope: str) -> Callable[[Key], Awaitable[Key]]:
    """A dependency that lets keys with this scope pass.

    Raises:
        ApiError: 403.
    """

    async def check(key: Caller) -> Key:
        if scope not in key.scopes:
            raise ApiError(403, "forbidden", f"this key may not do that: it lacks the scope {scope}")
        return key

    return check


Reader = Annotated[Key, Depends(needs("jobs:read"))]
Writer = Annotated[Key, Depends(needs("jobs:write"))]
Admin = Annotated[Key, Depends(needs("admin"))]
