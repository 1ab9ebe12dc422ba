"""The search that comes with the package: the database of a finished one, compressed.

`benchmarks/dashboard_demo.py` makes the file; a newer version of autoeff upgrades its copy as it would any other database.
"""

from __future__ import annotations

import lzma
from pathlib import Path

from autoeff.search.keys import LOCAL
from autoeff.search.storage.keys import KeyRing
from autoeff.search.storage.store import Store

__all__ = ["FILE", "unpack"]

FILE = Path(__file__).with_name("demo.db.xz")


def unpack(home: Path) -> str:
    """Puts the database into `home`, and gives the text of a key that may read what is in it."""
    path = home / "autoeff.db"
    path.write_bytes(lzma.decompress(FILE.read_bytes()))
    with Store.open(f"sqlite:///{path}") as store:
        return KeyRing(store.database).make("demonstration", LOCAL, ["jobs:read"])[1].text
