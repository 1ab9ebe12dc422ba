from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil

from autoeff.search.storage.holders import holder_is_dead, process_identity


def parts() -> list[str]:
    return process_identity().split("/")


def test_this_process_has_one_identity_and_lives() -> None:
    assert process_identity() == process_identity()
    assert parts()[2] == str(os.getpid())
    assert not holder_is_dead(process_identity())


def test_killed_process_is_dead_even_before_it_is_reaped() -> None:
    host, machine, _, _ = parts()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        identity = f"{host}/{machine}/{child.pid}/{psutil.Process(child.pid).create_time() - psutil.boot_time():.2f}"
        assert not holder_is_dead(identity)
        child.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert holder_is_dead(identity)  # a zombie
    assert holder_is_dead(identity)


def test_reused_process_id_is_another_process() -> None:
    host, machine, pid, start = parts()
    assert holder_is_dead(f"{host}/{machine}/{pid}/{float(start) - 60:.2f}")


def test_process_elsewhere_is_never_called_dead() -> None:
    host, machine, _, start = parts()
    absent = 2**22 + 1  # above the largest process id
    assert holder_is_dead(f"{host}/{machine}/{absent}/{start}")
    assert not holder_is_dead(f"other-{host}/{machine}/{absent}/{start}")
    assert not holder_is_dead(f"{host}/before-the-reboot/{absent}/{start}")


def test_unknown_form_of_holder_is_never_called_dead() -> None:
    for holder in ("", "worker-7", "a/b/c/d/e", f"{'/'.join(parts()[:2])}/x/1.0"):
        assert not holder_is_dead(holder)
