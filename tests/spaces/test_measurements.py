from __future__ import annotations

import pytest

from autoeff.errors import InputError
from autoeff.spaces.measurements import MEASURES, Measurement, described, measure


def test_every_measure_is_found_by_its_name() -> None:
    assert all(measure(name).name == name for name in MEASURES)
    assert {row.name for row in MEASURES.values() if row.larger_is_better} == {"spearman_held_out", "passkey_accuracy"}


def test_unknown_name_is_refused_for_values_too() -> None:
    for ask in (measure, lambda name: Measurement(name, 1.0)):
        with pytest.raises(InputError, match="unknown measurement 'speed'; known: attention_flops, avg_bits, "):
            ask("speed")


def test_json_has_the_unit_and_leaves_out_what_is_not_known() -> None:
    assert Measurement("weight_bytes", 7.0, method="exact").to_json() == {"value": 7.0, "unit": "bytes", "method": "exact"}
    quality = Measurement("kl", 0.1, split="search", tokens=2048, spread=0.01, hardware="cpu")
    assert quality.to_json() == {
        "value": 0.1, "unit": "nats/token", "split": "search", "tokens": 2048, "spread": 0.01, "method": "measured", "hardware": "cpu",
    }  # fmt: skip


def test_a_metric_of_the_users_own_has_its_name_and_no_unit() -> None:
    assert Measurement("speed", 1.5, own=True).to_json() == {"value": 1.5, "unit": "", "method": "measured"}
    assert [described("speed").text(value) for value in (1.5, 1234567.0, -2.0)] == ["1.500", "1234567", "-2"]
    assert described("kl") is measure("kl")
    with pytest.raises(InputError, match="'kl' is a built-in one: KL divergence"):
        Measurement("kl", 1.0, own=True)
