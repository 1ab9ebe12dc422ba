"""Keys of the REST API: `ae_<prefix>_<secret>`, shown once and stored as a hash.

A secret has 256 random bits, so that a plain SHA-256 keeps it; slow hashes are for what people choose. The prefix finds the row, and the
hashes are compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from autoeff.errors import InputError

__all__ = ["LOCAL", "SCOPES", "Key", "Minted", "check_scopes", "fits", "hash_of", "mint", "prefix_of"]

SCOPES = ("jobs:read", "jobs:write", "admin")
"""What a key may be allowed: to read its owner's jobs, to start and steer them, to see the plant and make keys."""
LOCAL = "local"
"""The owner of what this machine's own command line makes."""
_FORM = re.compile(r"ae_([0-9a-f]{8})_([A-Za-z0-9_-]{43})")
_OWNER = re.compile(r"[\w.@-]{1,64}")
_SECRET_BYTES = 32
_NAME_CHARACTERS = 80


@dataclass(frozen=True)
class Key:
    """A stored key, without its secret.

    Attributes:
        prefix: Names it: the eight digits after `ae_`.
        name: For people.
        owner: Whose jobs it sees.
    """

    prefix: str
    name: str
    owner: str
    scopes: tuple[str, ...]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.prefix, "name": self.name, "owner": self.owner, "scopes": list(self.scopes), "created": _text(self.created_at),
            "expires": _text(self.expires_at), "revoked": _text(self.revoked_at), "last_used": _text(self.last_used_at),
        }  # fmt: skip


@dataclass(frozen=True)
class Minted:
    """A key that was just made.

    Attributes:
        text: The key itself. It is nowhere else.
        sha256: What is stored of it.
    """

    text: str
    prefix: str
    sha256: str


def mint() -> Minted:
    """A new key."""
    prefix = secrets.token_hex(4)
    text = f"ae_{prefix}_{secrets.token_urlsafe(_SECRET_BYTES)}"
    return Minted(text, prefix, hash_of(text))


def prefix_of(text: str) -> str | None:
    """The prefix of a key; None where the text is none."""
    match = _FORM.fullmatch(text)
    return match[1] if match else None


def fits(text: str, sha256: str) -> bool:
    """Whether `text` is the key of this hash."""
    return hmac.compare_digest(hash_of(text), sha256)


def check_scopes(name: str, owner: str, scopes: Sequence[str]) -> tuple[str, ...]:
    """The scopes in their order, once each.

    Raises:
        InputError: An unknown scope, none, or a name or an owner that cannot be one.
    """
    if not 1 <= len(name) <= _NAME_CHARACTERS or not name.isprintable():
        raise InputError(f"name {name[:_NAME_CHARACTERS]!r} of a key: 1 to {_NAME_CHARACTERS} printable characters")
    if not _OWNER.fullmatch(owner):
        raise InputError(f"owner {owner[:80]!r} is no name: 1 to 64 letters, digits and . _ @ -")
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise InputError(f"scopes {', '.join(scopes)[:80] or 'are missing'}: choose of {', '.join(SCOPES)}")
    return tuple(scope for scope in SCOPES if scope in scopes)


def hash_of(text: str) -> str:
    """What is stored of a key."""
    return hashlib.sha256(text.encode()).hexdigest()


def _text(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat(timespec="seconds")
