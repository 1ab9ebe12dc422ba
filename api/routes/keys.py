"""Keys, for those who may make them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Path, Request, Response

from autoeff.api.access import Admin, Caller
from autoeff.api.bodies import body_of, documented_body
from autoeff.api.context import Server
from autoeff.api.problems import ApiError, described_problems
from autoeff.api.schemas import KeyMade, KeyPage, KeyRequest, KeyRow

__all__ = ["router"]

router = APIRouter(prefix="/v1/keys", tags=["keys"])


@router.get("", response_model=KeyPage)
def list_keys(server: Server, key: Admin) -> dict[str, Any]:
    """Every key, the newest first, revoked ones too."""
    return {"items": [one.to_json() for one in server.ring.all()]}


@router.get("/self", response_model=KeyRow)
def own_key(key: Caller) -> dict[str, Any]:
    """The key that asks: whose it is, and what it may do."""
    return key.to_json()


@router.post(
    "",
    status_code=201,
    response_model=KeyMade,
    responses=described_problems(408, 413, 415, 422),
    openapi_extra=documented_body(KeyRequest),
)
def make_key(server: Server, key: Admin, asked: Annotated[KeyRequest, Depends(body_of(KeyRequest))], response: Response) -> dict[str, Any]:
    """Makes a key. Its text is in this answer and nowhere else."""
    made, minted = server.ring.make(asked.name, asked.owner, asked.scopes, asked.expires_in_days)
    response.headers["Cache-Control"] = "no-store"
    return made.to_json() | {"text": minted.text}


async def _not_self(request: Request) -> None:
    """`self` is another resource, which the framework takes for a prefix where the method is not one of its own."""
    if request.path_params["prefix"] == "self":
        raise HTTPException(405)


@router.delete("/{prefix}", response_model=KeyRow, responses=described_problems(404, 409, 422), dependencies=[Depends(_not_self)])
def revoke_key(
    server: Server, key: Admin, prefix: Annotated[str, Path(pattern=r"^[0-9a-f]{8}$", description="The eight digits after ae_.")]
) -> dict[str, Any]:
    """Ends a key for ever. It may work for a few seconds more on other servers."""
    if prefix == key.prefix:
        raise ApiError(409, "conflict", "a key cannot revoke itself; use another admin key, or `autoeff keys revoke`")
    revoked = server.ring.revoke(prefix)
    server.doorkeeper.forget()
    return revoked.to_json()
