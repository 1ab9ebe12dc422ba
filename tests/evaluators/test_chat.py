"""Conversations: the ids are those of the tokenizer's own template, in order, and nothing is rendered that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from autoeff.errors import InputError
from autoeff.evaluators.chat import conversation
from autoeff.evaluators.loading import ModelFacts, inspect_model, load_tokenizer
from autoeff.evaluators.setup import TextSpec
from autoeff.evaluators.sources import read_text
from autoeff.evaluators.text import make_sentences, make_windows

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
)
TALK = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on the mat"}]
SHORT = [{"role": "user", "content": "the dog ate"}]


@pytest.fixture
def model(tiny_models: dict[str, Path]) -> tuple[Any, ModelFacts]:
    facts = inspect_model(tiny_models["llama"])
    tokenizer = load_tokenizer(facts)
    tokenizer.chat_template = TEMPLATE
    return tokenizer, facts


def rows(path: Path, *values: Any) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def by_hand(tokenizer: Any, *talks: list[dict[str, str]]) -> list[list[int]]:
    """The template, written out by hand: `<s>` is 0, `</s>` is 1."""
    return [
        [0] + [i for m in talk for i in [*tokenizer.encode(f"{m['role']}: {m['content']}", add_special_tokens=False), 1]] for talk in talks
    ]


def test_conversations_start_documents_of_the_templates_ids(model: tuple[Any, ModelFacts], tmp_path: Path) -> None:
    source = rows(tmp_path / "a.jsonl", {"messages": TALK}, {"messages": SHORT})
    expected = [i for ids in by_hand(model[0], TALK, SHORT) for i in ids]
    found = make_windows(*model, TextSpec(source, 0, 8, "per_document", "first"), 0, "search")
    assert found.inputs.flatten().tolist() == expected[: len(expected) // 8 * 8]


def test_windows_of_conversations_have_one_bos_in_front(model: tuple[Any, ModelFacts], tmp_path: Path) -> None:
    source = rows(tmp_path / "a.jsonl", {"messages": TALK}, {"messages": SHORT})
    expected = [i for ids in by_hand(model[0], TALK, SHORT) for i in ids[1:]]
    found = make_windows(*model, TextSpec(source, 0, 8, "per_window", "first"), 0, "search")
    assert (found.inputs[:, 0] == 0).all()
    assert found.inputs[:, 1:].flatten().tolist() == expected[: len(expected) // 7 * 7]


def test_text_stands_between_conversations_unrendered(model: tuple[Any, ModelFacts], tmp_path: Path) -> None:
    source = rows(tmp_path / "a.jsonl", {"messages": SHORT}, {"text": "the hat"}, {"messages": SHORT})
    (talk,) = by_hand(model[0], SHORT)
    expected = torch.tensor(talk[1:] + model[0].encode("the hat", add_special_tokens=False) + talk[1:])
    found = make_windows(*model, TextSpec(source, 1, len(expected) + 1, draw="first"), 0, "search")
    assert found.inputs[0, 1:].equal(expected)


def test_other_spelling_of_speakers_is_the_same_conversation(tmp_path: Path) -> None:
    other = [{"from": "system", "value": "a"}, {"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}]
    source = rows(tmp_path / "a.jsonl", {"conversations": other})
    assert read_text(source, 1 << 20).documents == ((("system", "a"), ("user", "b"), ("assistant", "c")),)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("hello", "is no conversation: expected a list of {role, content}, found str"),
        ([], "is no conversation"),
        ([{"role": "user"}], "message 1 has no string under role and content"),
        ([*TALK, {"role": "user", "content": [{"type": "image"}]}], "message 3 has no string under role and content"),
        (["hello"], "message 1 has no string"),
    ],
)
def test_malformed_conversation_is_named(value: Any, says: str) -> None:
    with pytest.raises(InputError, match=f"^here.*{says}"):
        conversation(value, "here")


def test_row_of_text_and_conversation_is_refused(tmp_path: Path) -> None:
    source = rows(tmp_path / "a.jsonl", {"text": "x"}, {"text": "x", "messages": TALK})
    with pytest.raises(InputError, match=r"line 2 has both 'text' and 'messages'; keep the one"):
        read_text(source, 1 << 20)


def test_tokenizer_without_template_refuses_conversations(model: tuple[Any, ModelFacts], tmp_path: Path) -> None:
    model[0].chat_template = None
    source = rows(tmp_path / "a.jsonl", {"messages": TALK})
    with pytest.raises(InputError, match=r"a.jsonl holds conversations, and the tokenizer has no chat template"):
        make_windows(*model, TextSpec(source, length=8), 0, "search")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (TEMPLATE, "no tools here"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),  # the way out of a sandbox
        ("{% for m in messages %}", "end of template"),
    ],
)
def test_template_that_fails_or_reaches_for_code_is_one_line(
    model: tuple[Any, ModelFacts], tmp_path: Path, template: str, says: str
) -> None:
    model[0].chat_template = template
    source = rows(tmp_path / "a.jsonl", {"messages": [{"role": "tool", "content": "x"}]})
    with pytest.raises(InputError, match=f"a.jsonl: the chat template does not take the conversation that begins 'x': .*{says}") as caught:
        make_windows(*model, TextSpec(source, length=8), 0, "search")
    assert "\n" not in str(caught.value)


def test_encoders_refuse_conversations(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    facts = inspect_model(tiny_models["bert"])
    source = rows(tmp_path / "a.jsonl", {"messages": TALK})
    with pytest.raises(InputError, match="holds conversations, which only decoders read"):
        make_sentences(load_tokenizer(facts), facts, TextSpec(source), 0, "search")
