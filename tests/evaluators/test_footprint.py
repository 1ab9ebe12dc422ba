"""What is predicted to be held is what is held; what cannot fit is refused in one line that says how it would."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autoeff.errors import InputError
from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.footprint import Footprint
from autoeff.evaluators.preparation import prepare
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup

SetupOf = Callable[..., EvaluationSetup]
BITS = {"bits": {"group_size": 16}}
STORES = [BITS, {"bits": {"store": "nested", "group_size": 16}}, {"sparsity": {"criterion": "magnitude"}}, {**BITS, "skip": {}}]


def needed(footprint: Footprint) -> int:
    """The least that may be held: nothing is kept that need not be."""
    return sum(size for name, size in footprint.parts.items() if name not in ("states", "levels"))


@pytest.mark.parametrize("knobs", STORES)
def test_the_bank_takes_the_bytes_that_were_predicted(setup_of: SetupOf, knobs: dict[str, dict[str, object]], tmp_path: Path) -> None:
    setup = setup_of("llama", knobs)
    before = prepare(setup).footprint
    assert before.missing_bytes == before.bank_bytes
    Evaluator(setup)
    files = list((tmp_path / "bank").rglob("*.safetensors"))
    after = prepare(setup).footprint
    assert before.missing_bytes == after.missing_bytes == 0
    assert after.bank_bytes == before.bank_bytes
    # a header is a few hundred bytes, and more with the paths of many linears
    assert abs(sum(path.stat().st_size for path in files) - before.bank_bytes) < 1024 * len(files)


@pytest.mark.parametrize("knobs", [{"bits": {"quantizer": "gptq", "group_size": 16}}, {"sparsity": {"criterion": "nirvana"}}])
def test_statistics_are_counted_as_they_are_collected(setup_of: SetupOf, knobs: dict[str, dict[str, object]]) -> None:
    setup = setup_of("llama", knobs)
    evaluator = Evaluator(setup)
    held = {id(tensor): tensor.nbytes for tensor in evaluator.bank.statistics.tensors.values()}
    assert evaluator.preparation.footprint.parts["statistics"] == sum(held.values()) > 0


def test_gradients_are_taken_of_float32_weights(setup_of: SetupOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoeff.evaluators.loading._WIDE_BYTES", 0)
    assert prepare(setup_of("llama", BITS)).footprint.narrow
    assert not prepare(setup_of("llama", {"sparsity": {"criterion": "nirvana"}})).footprint.narrow


def test_the_teacher_and_the_states_are_counted_as_they_are_kept(setup_of: SetupOf) -> None:
    evaluator = Evaluator(setup_of("llama", BITS))
    levels = evaluator.space.at(evaluator.space.sample(random.Random(0))).levels
    for split in ("search", "held_out"):
        evaluator.evaluate(EvaluationRequest(levels, split, 8))  # type: ignore[arg-type]
    parts = evaluator.preparation.footprint.parts
    teachers = [teacher for text in evaluator._texts.values() for teacher in text.targets or ()]
    assert parts["teacher"] == sum(teacher.expected.nbytes + teacher.score.nbytes for teacher in teachers)  # type: ignore[union-attr]
    kept = [*evaluator._dense_states.values(), *(states for _, states in evaluator._last_states.values())]
    assert parts["states"] == sum(state.nbytes for states in kept for state in states.values()) > 0


def test_less_memory_keeps_less_and_changes_no_value(setup_of: SetupOf) -> None:
    setup = setup_of("llama", BITS)
    least = needed(prepare(setup).footprint)
    values = {}
    for cap in (None, int(1.4 * least)):
        evaluator = Evaluator(replace(setup, memory_bytes=cap))
        rng = random.Random(1)
        drawn = [evaluator.space.at(evaluator.space.sample(rng)).levels for _ in range(3)]
        values[cap] = [evaluator.evaluate(EvaluationRequest(levels, "search", 8))[0].value for levels in drawn]
        assert cap is None or evaluator.preparation.footprint.memory_bytes <= cap
    assert len({tuple(found) for found in values.values()}) == 1


def test_block_states_give_way_where_they_do_not_fit(setup_of: SetupOf) -> None:
    setup = setup_of("llama", BITS)
    found = prepare(setup).footprint
    assert found.state_stride == 1
    tight = prepare(replace(setup, memory_bytes=int((needed(found) + found.parts["levels"]) * 1.05))).footprint
    assert (tight.state_stride, tight.parts["states"]) == (None, 0)


def test_what_cannot_fit_is_refused_with_what_it_is_for(setup_of: SetupOf) -> None:
    with pytest.raises(
        InputError, match=r"needs 0\.\d GB on cpu \(0\.5 process, 0\.1 working\), 0\.1 GB are allowed; .*AUTOEFF_MEMORY_CAP_BYTES"
    ) as caught:
        prepare(replace(setup_of("llama", BITS), memory_bytes=10**8))
    assert "\n" not in str(caught.value)


def test_hessians_that_do_not_fit_are_refused_with_a_remedy(setup_of: SetupOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoeff.evaluators.footprint._statistics_bytes", lambda *_: 10**13)
    with pytest.raises(InputError, match=r"10000\.0 statistics.* choose methods that need no hessian or gradient"):
        prepare(setup_of("llama", {"bits": {"quantizer": "gptq", "group_size": 16}}))


def test_a_disk_that_is_too_small_is_refused_before_anything_is_built(setup_of: SetupOf, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"the level bank needs .* GB more at .*, 0\.0 GB are free; set bits\.store=nested"):
        prepare(setup_of("llama", BITS))


def test_a_server_without_a_gpu_plans_what_a_worker_with_one_finds(setup_of: SetupOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """And judges neither its memory nor its disk by its own."""
    setup = replace(setup_of("llama", BITS), device="cuda", hardware="gpu.any")
    with monkeypatch.context() as server:
        server.setattr("autoeff.evaluators.footprint.memory_of", lambda device: 0)
        server.setattr("autoeff.evaluators.loading.memory_of", lambda device: 0)
        server.setattr("autoeff.evaluators.footprint.shutil.disk_usage", lambda folder: pytest.fail("the disk is the worker's"))
        planned = prepare(setup, elsewhere=True)
    monkeypatch.setattr("autoeff.evaluators.preparation.device_of", torch.device)
    for room in ("footprint", "loading"):
        monkeypatch.setattr(f"autoeff.evaluators.{room}.memory_of", lambda device: 100 << 30)
    found = prepare(replace(setup, memory_bytes=1))  # the cap is of a process, and not of a GPU
    assert found.digest == planned.digest
    assert found.footprint.parts["weights"] == planned.footprint.parts["weights"] > 0
