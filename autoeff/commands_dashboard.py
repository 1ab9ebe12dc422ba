"""The verb `dashboard`, and what other verbs need to start one."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from autoeff.errors import AutoeffError

__all__ = ["dashboard", "link"]

_PORT = 8501
_DEFAULT_SERVER = "http://127.0.0.1:8423"
_START_S = 60.0
_TOKEN = "AUTOEFF_DASHBOARD_TOKEN"


def dashboard(
    ctx: typer.Context,
    server: Annotated[
        str | None, typer.Option(help="URL of the server; default AUTOEFF_SERVER, else this machine's.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 chooses a free one.", min=0, max=65535)] = _PORT,
    demo: Annotated[bool, typer.Option("--demo", help="Show a finished search that comes with the package; needs no server.")] = False,
) -> None:
    """Serves the dashboard; it asks for a key, or takes AUTOEFF_KEY from whoever opens the link that it prints."""
    port = _free_port(host, port)
    with _demo_server() if demo else contextlib.nullcontext():
        if not demo:
            os.environ["AUTOEFF_SERVER"] = server or ctx.obj or _DEFAULT_SERVER
        sys.stderr.write(f"autoeff: the dashboard is at {link(host, port)}; Ctrl-C ends it\n")
        sys.stderr.flush()
        _serve(host, port)


def link(host: str, port: int) -> str:
    """Where the dashboard is; where this process has a key and only this machine can come in, a link that brings the key.

    The link holds a token of this process instead of the key, so that the key itself stands in no history.
    """
    from autoeff.api.server import is_loopback, url_of

    if not os.environ.get("AUTOEFF_KEY") or not is_loopback(host):
        os.environ.pop(_TOKEN, None)
        return url_of(host, port)
    os.environ.setdefault(_TOKEN, secrets.token_urlsafe(24))
    return f"{url_of(host, port)}/?token={os.environ[_TOKEN]}"


def _serve(host: str, port: int) -> None:
    """Runs Streamlit in this process; it says nothing of its own, since an output may be read by a shell."""
    from streamlit.web import cli

    app = Path(__file__).parent / "dashboard" / "app.py"
    words = ["run", str(app), "--server.address", host, "--server.port", str(port), "--logger.level", "warning"]
    with contextlib.redirect_stdout(io.StringIO()):
        cli.main(words, prog_name="streamlit", standalone_mode=False)


def _free_port(host: str, port: int) -> int:
    from autoeff.api.server import bound_socket

    with bound_socket(host, port) as bound:
        return int(bound.getsockname()[1])


@contextlib.contextmanager
def _demo_server() -> Iterator[None]:
    """A server of the bundled search on this machine alone, with a key that may only read."""
    from autoeff.dashboard.demo import unpack

    with tempfile.TemporaryDirectory(prefix="autoeff-demo-") as folder:
        home = Path(folder)
        os.environ["AUTOEFF_KEY"] = unpack(home)
        environment = {**os.environ, "AUTOEFF_HOME": folder, "AUTOEFF_DATABASE_URL": "", "AUTOEFF_BROKER_URL": ""}
        for name in ("AUTOEFF_DATABASE_URL", "AUTOEFF_BROKER_URL", "AUTOEFF_MODEL_ROOTS", "AUTOEFF_DATA_ROOTS", "AUTOEFF_HUB"):
            environment.pop(name, None)
        port = _free_port("127.0.0.1", 0)
        command = [sys.executable, "-m", "autoeff.cli", "serve", "--no-coordinator", "--port", str(port)]
        with (home / "serve.log").open("wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            _wait_for(process, port, home / "serve.log")
            os.environ["AUTOEFF_SERVER"] = f"http://127.0.0.1:{port}"
            yield
        finally:
            process.terminate()
            process.wait()


def _wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        time.sleep(0.1)
    raise AutoeffError(f"the server of the demonstration did not start: {log.read_text(errors='replace')[-300:].strip()}")
