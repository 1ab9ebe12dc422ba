"""What belongs to the machine and not to a job: folders, the database, deadlines. Read from `AUTOEFF_*` variables."""

from __future__ import annotations

from pathlib import Path

import psutil
from pydantic import ByteSize, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from autoeff.errors import InputError

__all__ = ["Settings"]


class Settings(BaseSettings):
    """Settings of this process, e.g. `AUTOEFF_HOME=/data/autoeff`."""

    model_config = SettingsConfigDict(env_prefix="AUTOEFF_", extra="ignore")

    home: Path = Field(default_factory=lambda: Path.home() / ".cache" / "autoeff", description="Database and level bank.")
    database_url: str | None = Field(default=None, description="SQLAlchemy URL; default is SQLite under home.")
    evaluation_timeout_s: float = Field(default=600.0, gt=0, description="One evaluation may take this long.")
    open_timeout_s: float = Field(default=3600.0, gt=0, description="Loading a model and building its bank may take this long.")
    memory_share: float = Field(default=0.9, gt=0, le=1, description="A runner that holds more than this share of memory is killed.")
    memory_cap_bytes: ByteSize | None = Field(default=None, gt=0, description="An absolute cap instead of the share, such as 16GiB.")
    lease_s: float = Field(default=45.0, gt=0, description="A worker or coordinator silent for this long has lost its work.")

    @classmethod
    def read(cls) -> Settings:
        """The settings of the environment.

        Raises:
            InputError: A variable has no valid value.
        """
        try:
            return cls()
        except ValidationError as error:
            first = error.errors()[0]
            name = "AUTOEFF_" + "_".join(map(str, first["loc"])).upper()
            raise InputError(f"{name}: {first['msg']}; found {first['input']!r}") from None

    @property
    def memory_cap(self) -> int:
        """Bytes that a runner may hold: a job that needs more is refused, a runner that takes more is killed."""
        return int(self.memory_cap_bytes or self.memory_share * psutil.virtual_memory().total)

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'autoeff.db'}"

    @property
    def bank(self) -> Path:
        return self.home / "bank"
