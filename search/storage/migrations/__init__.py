"""The revisions of the database, run by `Database` when it opens an older one.

A new revision is a file in `versions/`, its id in `tables.REVISION`, and a dump of a database of the revision before it in the tests.
Expand, migrate, contract: a revision never removes what the version before it still reads.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

__all__ = ["check_known", "configuration", "upgrade"]


def configuration(connection: Connection) -> Config:
    """Alembic's settings for commands that act on `connection`."""
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def check_known(connection: Connection, found: str | None) -> None:
    """Raises LookupError where `found` is no revision of this version."""
    known = {script.revision for script in ScriptDirectory.from_config(configuration(connection)).walk_revisions()}
    if found is not None and found not in known:
        raise LookupError(found)


def upgrade(connection: Connection) -> None:
    """Brings the database to the newest revision, inside the connection's transaction."""
    command.upgrade(configuration(connection), "head")
