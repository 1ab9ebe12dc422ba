"""One machine's server: the API in this process, a coordinator and, where asked for, a worker in processes of their own."""

from __future__ import annotations

import ctypes
import gc
import ipaddress
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import uvicorn

from autoeff.api.app import create_app
from autoeff.errors import InputError
from autoeff.search.keys import LOCAL, SCOPES
from autoeff.search.settings import Settings
from autoeff.search.storage.keys import KeyRing
from autoeff.search.storage.store import Store

__all__ = ["Helpers", "bound_socket", "first_key", "is_loopback", "run", "url_of"]

_PR_SET_PDEATHSIG = 1
_GRACE_S = 25.0  # a worker finishes or gives back what it evaluates
_STREAMS_END_S = 2
_QUICK_S = 10.0  # a helper that lives no longer than this is started again later and later
_LATEST_S = 30.0
_log = logging.getLogger("autoeff.serve")


class Helpers:
    """Processes that are started again when they die, and end with this one.

    Args:
        commands: Arguments of `autoeff` of each.
    """

    def __init__(self, commands: Sequence[Sequence[str]]) -> None:
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._keep, args=(list(command),), name=command[0]) for command in commands]

    def start(self) -> None:
        """Starts them all."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends them: first as a person would, and what does not end then, for good."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _keep(self, command: list[str]) -> None:
        wait = 0.5
        while not self._stopping.is_set():
            started = time.monotonic()
            process = subprocess.Popen([sys.executable, "-m", "autoeff.cli", *command], preexec_fn=_end_with_parent(os.getpid()))
            while process.poll() is None and not self._stopping.wait(0.2):
                pass
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(_GRACE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                return
            if self._stopping.is_set():
                return
            wait = 0.5 if time.monotonic() - started > _QUICK_S else min(2 * wait, _LATEST_S)
            _log.warning("the %s ended with code %s and is started again in %g s", command[0], process.returncode, wait)
            self._stopping.wait(wait)


def run(
    settings: Settings,
    host: str,
    port: int,
    helpers: Sequence[Sequence[str]],
    told: Callable[[str, str | None], None],
) -> None:
    """Serves until a signal ends it.

    Args:
        settings: Of this machine.
        host: Address to listen at.
        port: To listen at; 0 chooses a free one.
        helpers: Arguments of the `autoeff` commands that run beside it.
        told: Hears the URL, and the first key where one was made, before the first request is answered.

    Raises:
        InputError: The address cannot be listened at, there is no key and the address is not this machine's alone, or as `create_app`.
    """
    with bound_socket(host, port) as bound, Store.open(settings.database) as store:
        app = create_app(settings, store)  # before a key is made, which is shown once: this may refuse
        key = first_key(KeyRing(store.database), host)
        told(url_of(host, bound.getsockname()[1]), key)
        threading.Thread(target=app.state.context.backroom.start, args=(os.getpid,), daemon=True).start()  # loads the engine meanwhile
        config = uvicorn.Config(
            app,
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=_STREAMS_END_S,
            timeout_keep_alive=30,
            h11_max_incomplete_event_size=64 << 10,
            limit_concurrency=2000,
        )
        beside = Helpers(helpers)
        beside.start()
        gc.freeze()  # what is loaded by now stays; to look through it again and again held requests up for half a second
        try:
            with suppress(KeyboardInterrupt):  # uvicorn has ended by then
                uvicorn.Server(config).run(sockets=[bound])
        finally:
            beside.stop()


def first_key(ring: KeyRing, host: str) -> str | None:
    """The first admin key, where there is none and only this machine can come in.

    Raises:
        InputError: There is no key and others could come in.
    """
    if not ring.empty():
        return None
    if not is_loopback(host):
        raise InputError(
            f"there is no key yet, and {host} can be reached from elsewhere: make one with "
            "`autoeff keys create --name admin --owner NAME --scopes jobs:read,jobs:write,admin` first"
        )
    return ring.make("first key of this machine", LOCAL, SCOPES)[1].text


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def url_of(host: str, port: int) -> str:
    """Where what listens at an address is found."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket of this address, which does not listen yet.

    Raises:
        InputError: There is no such address, or it is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)  # without its protocol, asyncio leaves Nagle's algorithm on: 40 ms an answer
    except (OSError, UnicodeError) as error:
        raise InputError(f"cannot listen at {host!r}: {error}; --host 127.0.0.1 is this machine alone") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        return bound
    except (OSError, OverflowError) as error:
        bound.close()
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot listen at {host} port {port}: {reason}; choose another --port") from None


def _end_with_parent(parent: int) -> Callable[[], None] | None:
    """What a helper does before it becomes one: asks the kernel to be told when this process ends, however that happens."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None, use_errno=True)

    def ask() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return ask
