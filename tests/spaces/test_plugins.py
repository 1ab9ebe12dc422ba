from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from autoeff.errors import InputError
from autoeff.spaces.knob import known_knobs, make_knob
from autoeff.spaces.plugins import plugins
from autoeff.spaces.quantizer import known_quantizers
from autoeff.spaces.sites import find_structure


def test_built_ins_are_found_without_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins.cache_clear()
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: ())
    assert {"bits", "skip"} <= known_knobs().keys()
    assert "rtn" in known_quantizers()
    plugins.cache_clear()


def test_members_are_listed_under_their_own_names() -> None:
    for found in (known_knobs(), known_quantizers()):
        assert all(item.name == name for name, item in found.items())


def test_third_party_knob_is_found_through_its_entry_point(third_party_knobs: Path) -> None:
    knob = make_knob("noise", {"seed": "7"})
    assert knob.settings() == {"seed": 7}
    assert type(knob).__module__ == "autoeff_test_knobs"


def test_third_party_knob_is_gone_where_it_is_not_installed() -> None:
    plugins.cache_clear()
    with pytest.raises(InputError, match=r"unknown knob 'noise'; known: .*bits, .*skip"):
        make_knob("noise", {})


def test_faulty_knob_raises_and_makes_nan(third_party_knobs: Path, tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama")
    site = next(site for site in find_structure(model).sites if site.kind == "ffn")
    knob = make_knob("faulty", {})
    with pytest.raises(RuntimeError, match="told to raise"):
        knob.apply(model, site, "raise")
    undo = knob.apply(model, site, "nan")
    tokens = torch.tensor([[1, 2, 3]])
    assert model(tokens).logits.isnan().any()
    undo()
    assert model(tokens).logits.isfinite().all()


_APPLY_EACH = """
import os, pathlib, resource, signal, time
from autoeff.spaces.knob import make_knob
knob = make_knob("faulty", {})
limit = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + (1 << 28)
for level in ("segfault", "hog", "loop"):
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            knob.apply(None, None, level)
        except MemoryError:
            os._exit(7)
    time.sleep(0.3)
    if level == "loop":
        os.kill(child, signal.SIGKILL)
    print(level, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_faulty_knob_does_what_it_says_in_a_process_told_of_it_by_its_environment(third_party_knobs: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _APPLY_EACH], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["segfault", str(-signal.SIGSEGV), "hog", "7", "loop", str(-signal.SIGKILL)]


def _distribution(folder: Path, entry: str, source: str) -> None:
    (folder / "third_party_for_test.py").write_text(source)
    metadata = folder / "third_party_for_test-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party-for-test\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[autoeff.knobs]\nx = {entry}\n")


@pytest.mark.parametrize(
    ("entry", "source", "message"),
    [
        ("third_party_for_test:Missing", "", "cannot be loaded: AttributeError"),
        ("third_party_for_test", "1 / 0", "cannot be loaded: ZeroDivisionError"),
        ("third_party_for_test:Thing", "class Thing:\n    name = 'thing'", "is no concrete Knob"),
        ("third_party_for_test:Bits", "from autoeff.spaces.knobs.bits import Bits", "takes the name 'bits', which exists already"),
    ],
)
def test_broken_third_party_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, source: str, message: str) -> None:
    _distribution(tmp_path, entry, source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "third_party_for_test", raising=False)
    plugins.cache_clear()
    with pytest.raises(InputError, match=f"'{entry}' of autoeff.knobs.*{message}"):
        known_knobs()
    monkeypatch.delitem(sys.modules, "third_party_for_test", raising=False)
