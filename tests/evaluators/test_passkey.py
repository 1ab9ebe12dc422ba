"""Passkeys under caches that keep or drop them, against greedy generation."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.passkey import passkeys
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup, TextSpec
from autoeff.spaces.kv_cache import KvCache
from autoeff.spaces.space import SpaceSpec

TEXTS, LENGTH = 5, 128


@torch.no_grad()
def test_a_cache_that_drops_keys_tells_as_many_as_generate_does(tmp_path: Path) -> None:
    """The bundled model was trained to tell keys. They stand at evenly spread depths; streaming keeps the last tokens alone."""
    text, shares = TextSpec(argparse.__file__, windows=TEXTS, length=LENGTH), (0.5, 0.125)
    search = replace(text, windows=1)
    space = SpaceSpec({"kv_budget": {"policy": "streaming", "shares": shares}})
    evaluator = Evaluator(EvaluationSetup("demo", search, text, space, 0, "cpu", str(tmp_path)))
    texts = passkeys(AutoTokenizer.from_pretrained(evaluator.preparation.facts.path), evaluator.preparation.passages["held_out"].inputs, 0)
    assert texts is not None
    last = int(texts.keys.max())
    told = []
    for share in (1, *shares):
        request = EvaluationRequest({decision.key: share for decision in evaluator.space.decisions}, "held_out", TEXTS)
        found = next(m for m in evaluator.evaluate(request) if m.name == "passkey_accuracy")
        assert found.tokens == TEXTS
        told.append(found.value * TEXTS)
        if share == 0.5:
            cache: Any = {"past_key_values": KvCache(evaluator.model, LENGTH)}
            said = evaluator.model.generate(texts.ids[:, :-last], **cache, max_new_tokens=last, do_sample=False, pad_token_id=1)
            assert told[-1] == pytest.approx(int((said == texts.ids).all(1).sum()))
    assert told[0] >= TEXTS - 1
    assert 0 < told[1] < told[0]
    assert told[2] == 0


def test_texts_keep_their_length_and_hide_one_key_at_every_depth() -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "autoeff" / "models" / "demo")
    windows = torch.randint(300, 2000, (5, 64), generator=torch.Generator().manual_seed(0))
    found = passkeys(tokenizer, windows, 3)
    assert found is not None
    assert found.ids.shape == windows.shape
    places = []
    for ids, count in zip(found.ids, found.keys, strict=True):
        key = tokenizer.decode(ids[-int(count) :]).strip()
        assert len(key) == 5
        assert key.isdigit()
        before, _, after = tokenizer.decode(ids[: -int(count)]).partition(f"\nPASSKEY = {key}\n")
        assert after.endswith("\nassert PASSKEY ==")
        places.append(len(tokenizer(before, add_special_tokens=False)["input_ids"]))
    assert places == sorted(places)
    assert passkeys(tokenizer, windows[:, :40], 3) is None
