from __future__ import annotations

import hashlib
import json
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoeff.spaces.configuration import Configuration, Level, canonical_json, digest_of

LEVELS = st.dictionaries(
    st.text(max_size=8), st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8))
)


@given(LEVELS, st.randoms())
def test_digest_does_not_depend_on_the_order_of_the_levels(levels: dict[str, Level], rng) -> None:
    items = list(levels.items())
    rng.shuffle(items)
    assert Configuration(levels) == Configuration(dict(items))
    assert hash(Configuration(levels)) == hash(Configuration(dict(items)))


@given(LEVELS, LEVELS)
def test_configurations_are_equal_when_their_canonical_texts_are(first: dict[str, Level], second: dict[str, Level]) -> None:
    assert (Configuration(first) == Configuration(second)) == (canonical_json(first) == canonical_json(second))


@given(LEVELS)
def test_canonical_text_reads_back_and_survives_storage(levels: dict[str, Level]) -> None:
    configuration = Configuration(levels)
    assert Configuration(json.loads(configuration.canonical)) == configuration
    assert digest_of(levels) == configuration.digest == hashlib.sha256(configuration.canonical.encode()).hexdigest()


def test_canonical_text_has_sorted_keys_no_spaces_and_plain_unicode() -> None:
    assert Configuration({"b:bits": 4, "a:skip": "skip", "ä": 0.5}).canonical == '{"a:skip":"skip","b:bits":4,"ä":0.5}'


def test_nan_has_no_canonical_text() -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        canonical_json(float("nan"))


def test_levels_cannot_be_changed_from_outside() -> None:
    levels: dict[str, Level] = {"a": 1}
    configuration = Configuration(levels)
    levels["a"] = 2
    assert configuration.levels["a"] == 1
    with pytest.raises(TypeError):
        configuration.levels["a"] = 2  # type: ignore[index]


def test_copy_is_the_same_configuration() -> None:
    configuration = Configuration({"a:bits": 4})
    assert deepcopy(configuration) == configuration
