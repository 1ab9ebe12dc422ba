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

__all__ = ["configuration", "upgrade"]


def configuration(connection: Connection) -> Config:
    """Alembic's settings for commands that act on `connection`."""
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def upgrade(connection: Connection, found: str | None) -> None:
    """Brings the database from revision `found` to the newest one, inside the connection's transaction.

    Raises:
        LookupError: `found` is no revision of this version.
    """
    config = configuration(connection)
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise LookupError(found)
    command.upgrade(config, "head")
