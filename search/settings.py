"""What belongs to the machine and not to a job: folders, the database, deadlines. Read from `AUTOEFF_*` variables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import psutil
from pydantic import ByteSize, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from autoeff.errors import InputError

__all__ = ["Settings"]

Folders = Annotated[tuple[Path, ...], NoDecode]


class Settings(BaseSettings):
    """Settings of this process, e.g. `AUTOEFF_HOME=/data/autoeff`."""

    model_config = SettingsConfigDict(env_prefix="AUTOEFF_", extra="ignore")

    home: Path = Field(default_factory=lambda: Path.home() / ".cache" / "autoeff", description="Database and level bank.")
    database_url: str | None = Field(default=None, description="SQLAlchemy URL; default is SQLite under home.")
    evaluation_timeout_s: float = Field(default=600.0, gt=0, description="One evaluation may take this long.")
    open_timeout_s: float = Field(default=3600.0, gt=0, description="Loading a model and building its bank may take this long.")
    memory_share: float = Field(default=0.9, gt=0, le=1, description="A runner that holds more than this share of memory is killed.")
    memory_cap_bytes: ByteSize | None = Field(default=None, gt=0, description="An absolute cap instead of the share, such as 16GiB.")
    log_bytes: ByteSize = Field(
        default=ByteSize(64 << 10), ge=1024, le=1 << 20, description="Of what an evaluation printed, so much of the end is kept."
    )
    lease_s: float = Field(default=45.0, gt=0, description="A worker or coordinator silent for this long has lost its work.")
    broker_url: str | None = Field(default=None, description="redis://… of Celery; without one, workers look into the database.")
    resend_s: float = Field(default=10.0, gt=0, description="A message that nobody acted on is sent again after this long.")
    poll_s: float = Field(default=1.0, gt=0, description="Coordinators look for jobs, and idle workers without a broker for work.")
    coordinated_jobs: int = Field(default=8, ge=1, description="Jobs that one coordinator process drives at the same time.")
    model_roots: Folders = Field(default=(), description="Folders whose models a server lets jobs name, divided by colons.")
    data_roots: Folders = Field(default=(), description="Folders whose texts a server lets jobs name, divided by colons.")
    hub: bool = Field(default=False, description="Whether a server lets jobs name models and texts of the hub.")
    secret: str | None = Field(default=None, min_length=16, description="Signs cursors; servers of one database share it.")
    calls_per_minute: int = Field(default=600, ge=0, description="Calls of an API key in a minute; 0 for any number, also without a key.")
    open_jobs: int = Field(default=1000, ge=1, description="Jobs of one owner that have not ended.")

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

    @field_validator("model_roots", "data_roots", mode="before")
    @classmethod
    def _folders(cls, value: Any) -> Any:
        return tuple(Path(part) for part in value.split(":") if part) if isinstance(value, str) else value

    @property
    def memory_cap(self) -> int:
        """Bytes that a runner may hold: a job that needs more is refused, a runner that takes more is killed."""
        return int(self.memory_cap_bytes or self.memory_share * psutil.virtual_memory().total)

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'autoeff.db'}"

    def job_folder(self, job_id: str) -> Path:
        """What a job of a server leaves beside its rows: log, report, exports."""
        return self.home / "jobs" / job_id

    @property
    def bank(self) -> Path:
        return self.home / "bank"
