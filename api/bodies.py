"""Request bodies: how large and how deep they may be, and what JSON may not say.

`json.loads` takes NaN, integers of any length and characters that no database stores, and a deep text ends its recursion. What passes
here is finite, 64-bit and printable, so that nothing behind it meets a value that JSON Schema does not have either.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autoeff.api.problems import ApiError, ProblemItem

__all__ = ["BODY_BYTES", "BodyLimit", "body_of", "documented_body", "strict_json"]

BODY_BYTES = 1 << 20
_DEPTH = 32
_NODES = 10_000
_INTEGER = 2**63
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_ERRORS = 20

Model = TypeVar("Model", bound=BaseModel)


class BodyLimit:
    """Counts the bytes of a body as they arrive, and refuses what is too large; the declared length is only believed when it is.

    Args:
        app: What comes behind.
        limit: In bytes.
        body_s: How long a whole body may take to come.
    """

    def __init__(self, app: ASGIApp, limit: int = BODY_BYTES, body_s: float = 30.0) -> None:
        self._app, self._limit, self._body_s = app, limit, body_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        read, whole = 0, False
        until: float | None = None
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")

        async def counted() -> Message:
            nonlocal read, whole, until
            if whole:  # what comes now is that the caller has left
                return await receive()
            if declared.isdigit() and int(declared) > self._limit:
                raise _too_large(self._limit)
            until = until or asyncio.get_running_loop().time() + self._body_s
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, "timeout", f"the body did not come within {self._body_s:g} s", {"Connection": "close"}) from None
            whole = not message.get("more_body", False)
            read += len(message.get("body", b""))
            if read > self._limit:
                raise _too_large(self._limit)
            return message

        await self._app(scope, counted, send)


async def strict_json(request: Request) -> bytes:
    """The body, seen to be JSON that is neither too deep nor holds what cannot be stored.

    Raises:
        ApiError: 415, 413 or 422.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = await request.body()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(415, "unsupported-media-type", f"the body must be application/json; found {kind[:80] or 'no content type'}")
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise _invalid("the body is not UTF-8") from None
    _check_depth(text)
    try:
        value = json.loads(text, parse_constant=_constant, parse_int=_integer, parse_float=_float)
    except ApiError:
        raise
    except (ValueError, RecursionError) as error:
        raise _invalid(f"the body is no valid JSON: {str(error)[:120]}") from None
    _check_values(value)
    return body


def body_of(model: type[Model]) -> Callable[[Request], Awaitable[Model]]:
    """A dependency that reads the body as `model`, strictly: no text for a number, no number for a flag."""

    async def read(request: Request) -> Model:
        body = await strict_json(request)
        try:
            return model.model_validate_json(body, strict=True)
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False, include_input=False)
            items = [ProblemItem(detail=_message(item["msg"]), pointer=_pointer(item["loc"])) for item in found[:_ERRORS]]
            raise ApiError(422, "invalid-input", f"{items[0].pointer}: {items[0].detail}", errors=items) from None

    return read


def documented_body(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra=` of a route whose body is read by `body_of`."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _check_depth(text: str) -> None:
    """Before parsing: outside of strings, brackets say how deep the text is nested, and commas and brackets how much it holds."""
    bare = _STRING.sub("", text)
    depth = deepest = 0
    for character in re.findall(r"[\[\]{}]", bare):
        depth += 1 if character in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > _DEPTH:
        raise _invalid(f"the body is nested {deepest} deep; {_DEPTH} is allowed")
    nodes = sum(map(bare.count, ",[{"))
    if nodes > _NODES:
        raise _invalid(f"the body holds more than {_NODES} values")


def _check_values(value: Any) -> None:
    if isinstance(value, str):
        if _UNSTORABLE.search(value):
            raise _invalid("the body holds a NUL or half a surrogate pair, which cannot be stored")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_values(key)
            _check_values(item)
    elif isinstance(value, list):
        for item in value:
            _check_values(item)


def _constant(text: str) -> Any:
    raise _invalid(f"the body holds {text}, which is no JSON number")


def _integer(text: str) -> int:
    if len(text) > 20 or not -_INTEGER <= int(text) < _INTEGER:
        raise _invalid("the body holds an integer of more than 64 bits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _invalid("the body holds a number that is too large for a double")
    return value


def _message(text: str) -> str:
    return " ".join(text.removeprefix("Value error, ").split())


def _pointer(place: tuple[int | str, ...]) -> str:
    return "#" + "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in place)


def _invalid(message: str) -> ApiError:
    return ApiError(422, "invalid-input", message)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, "too-large", f"the body is larger than the {limit} bytes that are allowed", {"Connection": "close"})
