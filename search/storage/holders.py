"""Who holds a lease, and whether that process can still be alive.

A lease normally ends with its time. Where the holder ran on this machine since its last start, the kernel knows better: `resume`
need not wait for the lease of a search that was killed a second ago.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil

__all__ = ["holder_is_dead", "process_identity"]

_SAME_START_S = 1.0
"""Starts are compared with this tolerance: some kernels derive them from an adjustable clock."""


def process_identity() -> str:
    """This process as `host/machine/pid/start`, unique over machines, containers, reboots and reused process ids.

    `machine` names the boot and the process id namespace; `start` is in seconds since the boot.
    """
    return f"{socket.gethostname()}/{_machine()}/{os.getpid()}/{_started(os.getpid()):.2f}"


def holder_is_dead(holder: str) -> bool:
    """Whether `holder` is surely gone: a process of this machine and boot that no longer runs. In doubt it is alive."""
    try:
        host, machine, pid, start = holder.split("/")
        if (host, machine) != (socket.gethostname(), _machine()):
            return False
        return abs(_started(int(pid)) - float(start)) > _SAME_START_S
    except psutil.NoSuchProcess:
        return True
    except (ValueError, psutil.Error):
        return False


def _started(pid: int) -> float:
    process = psutil.Process(pid)
    if process.status() == psutil.STATUS_ZOMBIE:
        raise psutil.NoSuchProcess(pid)
    return process.create_time() - psutil.boot_time()


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}.{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # no Linux
        return str(int(psutil.boot_time()))
