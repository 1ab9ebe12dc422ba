"""The bank stores each level once, finds it again, survives damage and concurrent builders."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from autoeff.errors import InputError
from autoeff.evaluators.bank import Bank, Chain, Statistics, Step
from autoeff.spaces.knobs.bits import Bits
from autoeff.spaces.material import Material
from autoeff.spaces.sites import Linear, Site

SITE = Site("block.0.up+down", "linears", 0, (Linear("block.0.up", 40, 24, False), Linear("block.0.down", 24, 40, True)))
NAMES = [linear.name for linear in SITE.linears]


def weights(name: str) -> Tensor:
    linear = next(item for item in SITE.linears if item.name == name)
    return torch.randn(linear.out_features, linear.in_features, generator=torch.Generator().manual_seed(len(name))).half()


def bank(
    folder: Path,
    keep_bytes: int = 1 << 20,
    weight: Callable[[str], Tensor] = weights,
    model: str = "model",
) -> Bank:
    return Bank(folder, model, {linear.name: linear for linear in SITE.linears}, weight, lambda tensor: tensor.float(), keep_bytes)


def step(level: int, knob: Bits = Bits(), site: Site = SITE) -> Chain:  # noqa: B008  (frozen)
    return (Step(knob, site, level),)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_a_level_is_built_once_and_found_by_another_bank(tmp_path: Path) -> None:
    first = bank(tmp_path)
    built = first.packed(step(4))
    again = bank(tmp_path, weight=lambda name: pytest.fail("built again"))
    found = again.packed(step(4))
    assert (first.built, again.built) == (1, 0)
    assert built.keys() == found.keys()
    assert all(torch.equal(built[name], found[name]) for name in built)


def test_model_settings_level_and_site_are_told_apart(tmp_path: Path) -> None:
    store = bank(tmp_path)
    store.packed(step(4))
    store.packed(step(3))
    store.packed(step(4, Bits(group_size=32)))
    store.packed(step(4, site=Site("block.0.up", "linears", 0, SITE.linears[:1])))
    bank(tmp_path, model="another").packed(step(4))
    assert len(files(tmp_path)) == 5


def test_statistics_are_part_of_the_name_only_for_knobs_that_read_them(tmp_path: Path) -> None:
    class Calibrated(Bits):
        @property
        def needs(self) -> frozenset[str]:
            return frozenset({"input_norm"})

    for digest in ("text a", "text b"):
        store = bank(tmp_path)
        store.statistics = Statistics(digest, {"block.0.up.input_norm": torch.ones(40)})
        store.packed(step(4))
        store.packed(step(4, Calibrated()))
    assert len(files(tmp_path)) == 3


def test_a_nested_store_is_one_file_of_a_third_of_the_bytes_and_serves_every_width(tmp_path: Path) -> None:
    sizes, served = {}, {}
    for store in ("separate", "nested"):
        built, knob = bank(tmp_path / store), Bits(store=store, group_size=40)
        served[store] = {bits: built.stored_bytes(step(bits, knob), "block.0.up") for bits in (8, 6, 4, 3, 2)}
        tensors = {path: load_file(path).values() for path in files(tmp_path / store)}
        assert len(tensors) == built.built == {"separate": 5, "nested": 1}[store]
        sizes[store] = sum(tensor.nbytes for parts in tensors.values() for tensor in parts)
    assert sizes["nested"] <= 0.4 * sizes["separate"]
    assert served["nested"] == served["separate"]


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_cut_entry_is_built_again(tmp_path: Path, kept: int) -> None:
    built = bank(tmp_path).packed(step(4))
    (path,) = files(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[:kept])
    again = bank(tmp_path)
    found = again.packed(step(4))
    assert again.built == 1
    assert all(torch.equal(built[name], found[name]) for name in built)
    assert path.read_bytes() == data


def test_decoded_levels_are_kept_until_memory_is_short(tmp_path: Path) -> None:
    store = bank(tmp_path)
    assert store.decoded(step(4), NAMES) is store.decoded(step(4), NAMES)
    short = bank(tmp_path, keep_bytes=1)
    four = short.decoded(step(4), NAMES)
    short.decoded(step(3), NAMES)
    assert short.decoded(step(4), NAMES) is not four


def test_decoded_levels_are_in_the_compute_dtype(tmp_path: Path) -> None:
    assert {t.dtype for t in bank(tmp_path).decoded(step(4), NAMES).values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decoded_levels_have_the_values_of_the_store_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    store = bank(tmp_path, weight=lambda name: weights(name).to(dtype))
    material = Material({name: weights(name).to(dtype) for name in NAMES})
    expected = {f"{name}.weight": w for name, w in Bits().transform(SITE, 8, store.packed(step(8)), material).weights.items()}
    found = store.decoded(step(8), NAMES)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].float()) for name in expected)


def test_two_processes_may_build_the_same_bank(tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path; import test_bank as t;"
        f"s = t.bank(Path({str(tmp_path)!r})); [s.packed(t.step(b, t.Bits(group_size=g))) for g in (8, 16, 32) for b in (2, 3, 4)]"
    )
    both = [subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate()[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert len(files(tmp_path)) == 9
    assert not list(tmp_path.rglob(".building-*"))
    check = bank(tmp_path, weight=lambda name: pytest.fail("an entry was damaged"))
    check.packed(step(2, Bits(group_size=8)))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="cannot write the level bank .* set AUTOEFF_HOME"):
        bank(blocked).packed(step(4))
