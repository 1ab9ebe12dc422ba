"""Windows and sentences: exactly the ids that the cut says, repeatable, and within the text."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn

from autoeff.errors import InputError
from autoeff.evaluators import text as text_module
from autoeff.evaluators.loading import ModelFacts, inspect_model, load_model, load_tokenizer
from autoeff.evaluators.setup import TextSpec
from autoeff.evaluators.sources import Text, read_package, read_text
from autoeff.evaluators.text import Passages, make_passages, make_sentences, make_windows

WORDS = "the cat sat on the mat and the dog ate the other hat\n"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def decoder(tiny_models: dict[str, Path]) -> tuple[Any, ModelFacts]:
    facts = inspect_model(tiny_models["llama"])
    return load_tokenizer(facts), facts


@pytest.fixture(scope="module")
def encoder(tiny_models: dict[str, Path]) -> tuple[Any, ModelFacts]:
    facts = inspect_model(tiny_models["bert"])
    return load_tokenizer(facts), facts


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> str:
    """1,500 or so ids, no two stretches alike."""
    rng = random.Random(0)
    words = WORDS.split()
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(" ".join(rng.choice(words) for _ in range(1200)) + "\n")
    return str(path)


def plain_ids(tokenizer: Any, source: str) -> torch.Tensor:
    return torch.tensor(tokenizer(Path(source).read_text(), add_special_tokens=False)["input_ids"])


def windows(model: tuple[Any, ModelFacts], spec: TextSpec, seed: int = 0, split: Any = "search", divided: bool = False) -> Passages:
    return make_windows(*model, spec, seed, split, divided=divided)


def error_of(call: Any) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_first_windows_are_bos_and_the_next_ids(decoder: tuple[Any, ModelFacts], story: str) -> None:
    found = windows(decoder, TextSpec(story, 5, 32, draw="first"))
    ids = plain_ids(decoder[0], story)
    assert found.inputs.dtype == torch.int64
    assert (found.inputs[:, 0] == 0).all()
    assert torch.equal(found.inputs[:, 1:].flatten(), ids[: 5 * 31])
    assert (found.mask, found.scores, found.tokens, found.source) == (None, None, 160, story)


def test_without_a_bos_windows_are_plain_ids(decoder: tuple[Any, ModelFacts], story: str, tiny_models: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(decoder[1])
    tokenizer.bos_token = None
    found = make_windows(tokenizer, decoder[1], TextSpec(story, 5, 32, draw="first"), 0, "search")
    assert torch.equal(found.inputs.flatten(), plain_ids(tokenizer, story)[: 5 * 32])


def test_given_starts_are_taken_as_they_are(decoder: tuple[Any, ModelFacts], story: str) -> None:
    ids = plain_ids(decoder[0], story)
    found = windows(decoder, TextSpec(story, None, 16, draw=(40, 7, 41)))
    assert torch.equal(found.inputs[:, 1:], torch.stack([ids[s : s + 15] for s in (40, 7, 41)]))
    assert "last possible start" in error_of(lambda: windows(decoder, TextSpec(story, None, 16, draw=(len(ids) - 14,))))


def test_random_windows_repeat_by_seed_and_split(decoder: tuple[Any, ModelFacts], story: str) -> None:
    spec = TextSpec(story, 6, 32)
    again = [windows(decoder, spec, seed=3), windows(decoder, spec, seed=3)]
    assert again[0].digest == again[1].digest
    assert torch.equal(again[0].inputs, again[1].inputs)
    assert len({again[0].digest, windows(decoder, spec, seed=4).digest, windows(decoder, spec, seed=3, split="held_out").digest}) == 3


def test_windows_zero_takes_all_and_none_takes_the_usual_number(decoder: tuple[Any, ModelFacts], story: str) -> None:
    ids = plain_ids(decoder[0], story)
    assert len(windows(decoder, TextSpec(story, 0, 32)).inputs) == len(ids) // 31
    assert len(windows(decoder, TextSpec(story, None, 32)).inputs) == 16
    few = (
        windows(decoder, TextSpec(story, None, 64, draw=(0,))),
        windows(decoder, TextSpec(story, None, 64), divided=True, split="held_out"),
    )
    assert len(few[0].inputs) == 1
    assert len(few[1].inputs) < 16
    assert "fewer than the usual 16" in few[1].notices[0]


def test_usual_length_is_the_context_of_a_short_model(decoder: tuple[Any, ModelFacts], story: str) -> None:
    assert windows(decoder, TextSpec(story, 1)).inputs.shape == (1, 64)
    assert "exceed the model's context; at most 64" in error_of(lambda: windows(decoder, TextSpec(story, 1, 65)))


@settings(max_examples=60, deadline=None)
@given(total=st.integers(1, 300), step=st.integers(1, 40), data=st.data(), seed=st.integers(0, 99))
def test_random_stretches_never_overlap(total: int, step: int, data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(0, total // step))
    starts = sorted(text_module._apart(total, count, step, random.Random(seed)))
    assert len(starts) == count
    assert all(b - a >= step for a, b in pairwise(starts))
    assert all(0 <= start <= total - step for start in starts)


@settings(max_examples=60, deadline=None)
@given(total=st.integers(1, 300), step=st.integers(1, 40), data=st.data(), seed=st.integers(0, 99))
def test_stretches_between_others_fill_every_gap_and_overlap_nothing(total: int, step: int, data: st.DataObject, seed: int) -> None:
    starts = text_module._apart(total, data.draw(st.integers(0, total // step)), step, random.Random(seed))
    both = sorted([*starts, *text_module._between(starts, total, step)])
    edges = [-step, *both, total]
    assert all(step <= b - a < 2 * step for a, b in pairwise(edges[:-1])) or not both
    assert 0 <= total - (both[-1] + step if both else 0) < step


@pytest.mark.parametrize("draw", ["random", "first", (20, 300, 70)])
def test_windows_beside_those_of_the_search_share_none_of_their_ids(decoder: tuple[Any, ModelFacts], story: str, draw: Any) -> None:
    found = make_windows(*decoder, TextSpec(story, None if isinstance(draw, tuple) else 3, 12, draw=draw), 0, "search", spared=4)
    assert found.beside is not None
    assert len(found.beside.inputs) == 12
    text = plain_ids(decoder[0], story).unfold(0, 11, 1)
    places = [int((text == row[1:]).all(1).nonzero()[0, 0]) for part in (found, found.beside) for row in part.inputs]
    assert min(b - a for a, b in pairwise(sorted(places))) >= 11


def test_nothing_is_beside_windows_that_leave_less_than_themselves(decoder: tuple[Any, ModelFacts], story: str) -> None:
    fit = len(plain_ids(decoder[0], story)) // 11
    for count, beside in ((fit // 2, fit - fit // 2), (fit // 2 + 1, None), (0, None)):
        found = make_windows(*decoder, TextSpec(story, count, 12, draw="first"), 0, "search", spared=4).beside
        assert (None if found is None else len(found.inputs)) == beside


def test_random_stretches_come_in_random_order() -> None:
    orders = [text_module._apart(100, 4, 10, random.Random(seed)) for seed in range(20)]
    assert sum(starts == sorted(starts) for starts in orders) < 5
    assert {starts.index(min(starts)) for starts in orders} == {0, 1, 2, 3}


def test_random_stretches_are_uniform() -> None:
    """Two stretches of 2 in 5 places: {0,2}, {0,3}, {1,3}, each a third of the time."""
    rng = random.Random(0)
    found = [tuple(sorted(text_module._apart(5, 2, 2, rng))) for _ in range(3000)]
    assert set(found) == {(0, 2), (0, 3), (1, 3)}
    assert all(found.count(pair) == pytest.approx(1000, abs=130) for pair in set(found))  # 5 standard deviations


def test_documents_get_a_bos_each_and_are_cut_in_order(decoder: tuple[Any, ModelFacts], tmp_path: Path) -> None:
    tokenizer = decoder[0]
    documents = [WORDS * 3, WORDS[:20], WORDS * 2]
    file = tmp_path / "a.txt"
    file.write_text("\n<|endoftext|>\n".join(document.strip() for document in documents))
    expected = [i for d in documents for i in [0, *tokenizer(d.strip(), add_special_tokens=False)["input_ids"]]]
    found = windows(decoder, TextSpec(str(file), None, 10, "per_document", "first"))
    assert found.inputs.flatten().tolist() == expected[: len(expected) // 10 * 10]
    assert not any("endoftext" in notice for notice in found.notices)
    as_text = windows(decoder, TextSpec(str(file), 1, 10))
    assert as_text.notices == (
        f"{file} has lines <|endoftext|> between its documents, which are read as text; bos per_document divides it there",
    )


def test_bos_is_put_where_the_tokenizer_puts_none(decoder: tuple[Any, ModelFacts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers.processors import TemplateProcessing

    (tmp_path / "a.txt").write_text(WORDS * 3)
    spec = TextSpec(str(tmp_path / "a.txt"), 1, 10, "per_document", "first")
    expected = windows(decoder, spec).inputs
    tokenizer: Any = load_tokenizer(decoder[1])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    assert torch.equal(make_windows(tokenizer, decoder[1], spec, 0, "search").inputs, expected)


def test_divided_text_is_four_fifths_and_one_fifth(decoder: tuple[Any, ModelFacts], story: str) -> None:
    ids = plain_ids(decoder[0], story)
    cut = len(ids) * 4 // 5
    found = make_passages(*decoder, TextSpec(story, 0, 32, draw="first"), None, 0)
    assert torch.equal(found["search"].inputs[:, 1:].flatten(), ids[: cut // 31 * 31])
    assert torch.equal(found["held_out"].inputs[:, 1:].flatten(), ids[cut:][: (len(ids) - cut) // 31 * 31])
    assert found["held_out"].source == f"{story}, its last fifth"


def test_held_out_source_leaves_the_search_text_whole(decoder: tuple[Any, ModelFacts], story: str, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(WORDS * 30)
    data, other = TextSpec(story, 0, 32, draw="first"), TextSpec(str(tmp_path / "other.txt"), 4, 16)
    found = make_passages(*decoder, data, other, 0)
    assert torch.equal(found["search"].inputs, windows(decoder, data).inputs)
    assert found["held_out"].inputs.shape == (4, 16)


def test_held_out_settings_without_a_source_apply_to_the_last_fifth(decoder: tuple[Any, ModelFacts], story: str) -> None:
    found = make_passages(*decoder, TextSpec(story, 4, 32), TextSpec(None, 2, 16, draw="first"), 0)
    ids = plain_ids(decoder[0], story)
    assert torch.equal(found["held_out"].inputs[0, 1:], ids[len(ids) * 4 // 5 :][:15])


def test_given_starts_are_those_of_the_search_text_alone(decoder: tuple[Any, ModelFacts], story: str) -> None:
    found = make_passages(*decoder, TextSpec(story, None, 32, draw=(600, 700)), None, 0)
    assert torch.equal(found["search"].inputs[0, 1:], plain_ids(decoder[0], story)[600:631])
    assert found["held_out"].source.endswith("its last fifth")


def test_only_what_the_first_windows_need_is_read(decoder: tuple[Any, ModelFacts], story: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TextSpec(story, 4, 64, draw="first")
    expected = windows(decoder, spec)
    limits: list[int] = []

    def counted(source: str, limit: int) -> Text:
        limits.append(limit)
        return read_text(source, limit)

    monkeypatch.setattr(text_module, "read_text", counted)
    monkeypatch.setattr(text_module, "_READ_LEAST", 64)
    monkeypatch.setattr(text_module, "_BYTES_PER_TOKEN", 1)  # too few, so that reading goes on
    assert windows(decoder, spec).digest == expected.digest
    assert limits[:2] == [4 * 63, 4 * 4 * 63]
    assert limits[-1] < Path(story).stat().st_size


def test_cap_on_what_is_read_is_said(decoder: tuple[Any, ModelFacts], story: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_READ_LIMIT", 2000)
    found = windows(decoder, TextSpec(story, 0, 32))
    assert len(found.inputs) < 40
    assert "only the first 0.00191 MiB" in found.notices[0]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (TextSpec("", 1, 64), "does not exist"),
        (TextSpec(None, 1, 64), "brings no text of its own; give one with --data"),
    ],
)
def test_text_that_is_not_there_is_asked_for(decoder: tuple[Any, ModelFacts], spec: TextSpec, says: str) -> None:
    assert says in error_of(lambda: windows(decoder, spec))


def test_short_text_says_how_much_is_found_and_needed(decoder: tuple[Any, ModelFacts], tmp_path: Path, story: str) -> None:
    (tmp_path / "short.txt").write_text(WORDS[:12])
    found = len(plain_ids(decoder[0], str(tmp_path / "short.txt")))
    message = error_of(lambda: windows(decoder, TextSpec(str(tmp_path / "short.txt"), 1, 64)))
    assert f"{found} ids found, 63 needed" in message
    fit = len(plain_ids(decoder[0], story)) // 63
    assert f"ask for {fit} or fewer" in error_of(lambda: windows(decoder, TextSpec(story, fit + 1, 64)))
    assert len(windows(decoder, TextSpec(story, fit, 64)).inputs) == fit


def test_tokenizer_of_another_model_is_noticed(decoder: tuple[Any, ModelFacts], story: str) -> None:
    small = replace(decoder[1], vocabulary=50)
    assert "the model knows 50 ids" in error_of(lambda: make_windows(decoder[0], small, TextSpec(story, 2, 32), 0, "search"))


@pytest.mark.parametrize(
    "change",
    [{"windows": -1}, {"length": 1}, {"bos": "never"}, {"draw": "last"}, {"draw": ()}, {"draw": (-1,)}, {"draw": (True,)}, {"draw": [1]}],
)
def test_impossible_specification_is_refused(change: dict[str, Any]) -> None:
    assert f"{next(iter(change))} must be" in error_of(lambda: TextSpec(**change))


def bundled(decoder: tuple[Any, ModelFacts], folder: Path, **search: str) -> ModelFacts:
    packages = {"search": read_package("pytest-timeout"), "held_out": read_package("pytest-xdist")}
    listed: dict[str, Any] = {s: {"package": p.name, "version": p.version, "sha256": p.sha256} for s, p in packages.items()}
    listed["search"] |= search
    (folder / "texts.json").write_text(json.dumps(listed | {"format": 1}))
    return replace(decoder[1], path=folder)


def test_bundled_model_brings_its_texts(decoder: tuple[Any, ModelFacts], tmp_path: Path) -> None:
    facts = bundled(decoder, tmp_path)
    found = make_passages(decoder[0], facts, TextSpec(None, 3, 32, draw="first"), None, 0)
    package = read_package("pytest-timeout")
    ids = decoder[0]("\n\n".join(package.documents), add_special_tokens=False, verbose=False)["input_ids"]
    assert found["search"].inputs[:, 1:].flatten().tolist() == ids[: 3 * 31]
    assert found["search"].source == f"package pytest-timeout {package.version} (sha256 {package.sha256})"
    assert found["held_out"].source.startswith("package pytest-xdist")
    assert (found["search"].notices, found["held_out"].notices) == ((), ())


def test_another_version_of_a_bundled_text_runs_with_one_notice(decoder: tuple[Any, ModelFacts], tmp_path: Path) -> None:
    facts = bundled(decoder, tmp_path, version="0.0.1", sha256="0" * 64)
    found = make_passages(decoder[0], facts, TextSpec(None, 3, 32), None, 0)
    assert len(found["search"].notices) == 1
    assert "published figures are of 0.0.1" in found["search"].notices[0]
    assert found["held_out"].notices == ()


@pytest.mark.parametrize("listed", [{"format": 2}, {"format": 1, "search": {"package": "x"}}, {"format": 1, "search": []}])
def test_malformed_list_of_texts_is_refused(decoder: tuple[Any, ModelFacts], tmp_path: Path, listed: dict[str, Any]) -> None:
    facts = bundled(decoder, tmp_path)
    (tmp_path / "texts.json").write_text(json.dumps(listed))
    assert "is malformed" in error_of(lambda: make_windows(decoder[0], facts, TextSpec(None, 1, 32), 0, "search"))


def sentences(model: tuple[Any, ModelFacts], spec: TextSpec, seed: int = 0, split: Any = "search", divided: bool = False) -> Passages:
    return make_sentences(*model, spec, seed, split, divided=divided)


def test_sentences_are_lines_padded_and_masked(encoder: tuple[Any, ModelFacts], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat\n\n  the dog ate the hat \nthe mat\n")
    found = sentences(encoder, TextSpec(str(tmp_path / "a.txt"), 0, draw="first"))
    rows = [encoder[0](line)["input_ids"] for line in ("the cat", "the dog ate the hat", "the mat")]
    assert found.mask is not None
    assert found.mask.sum(1).tolist() == [len(row) for row in rows]
    assert [ids[: len(row)].tolist() for ids, row in zip(found.inputs, rows, strict=True)] == rows
    assert (found.inputs[found.mask == 0] == encoder[0].pad_token_id).all()
    assert found.tokens == sum(len(row) for row in rows)


def test_sentences_beside_those_of_the_search_are_others(encoder: tuple[Any, ModelFacts], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"the cat {'mat ' * n}\n" for n in range(30)))
    found = make_sentences(*encoder, TextSpec(str(tmp_path / "a.txt"), 6), 0, "search", spared=4)
    assert found.mask is not None
    assert found.beside is not None
    assert found.beside.mask is not None
    lengths = [*found.mask.sum(1).tolist(), *found.beside.mask.sum(1).tolist()]
    assert sorted(lengths) == [min(lengths) + n for n in range(30)]


def test_long_sentences_are_cut(encoder: tuple[Any, ModelFacts], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(WORDS.strip() * 30)
    assert sentences(encoder, TextSpec(str(tmp_path / "a.txt"), 1)).inputs.shape == (1, 64)
    assert sentences(encoder, TextSpec(str(tmp_path / "a.txt"), 1, 12)).inputs.shape == (1, 12)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    lines = [f"the cat sat {'on ' * i},the dog ate {'on ' * i},{i / 2}" for i in range(10)]
    (tmp_path / "pairs.csv").write_text("sentence1,sentence2,score\n" + "\n".join(lines) + "\n")
    return str(tmp_path / "pairs.csv")


def test_pairs_stand_in_neighbouring_rows(encoder: tuple[Any, ModelFacts], pairs: str) -> None:
    found = sentences(encoder, TextSpec(pairs, 0))
    assert found.scores is not None
    assert found.mask is not None
    assert (len(found.inputs), sorted(found.scores.tolist())) == (20, [i / 2 for i in range(10)])
    for i, score in enumerate(found.scores.tolist()):
        texts = [encoder[0].decode(found.inputs[2 * i + side][found.mask[2 * i + side] == 1], skip_special_tokens=True) for side in (0, 1)]
        assert [t.split(" on", maxsplit=1)[0].strip() for t in texts] == ["the cat sat", "the dog ate"]
        assert [t.count(" on") for t in texts] == [score * 2, score * 2]


def test_divided_pairs_keep_the_last_fifth_out(encoder: tuple[Any, ModelFacts], pairs: str) -> None:
    found = make_passages(*encoder, TextSpec(pairs, 4), None, 0)
    assert found["search"].scores is not None
    assert found["held_out"].scores is not None
    assert (len(found["search"].inputs), len(found["held_out"].inputs)) == (4, 4)
    assert max(found["search"].scores.tolist()) < 4.0
    assert sorted(found["held_out"].scores.tolist()) == [4.0, 4.5]


def test_number_of_sentences_is_as_asked_or_refused(encoder: tuple[Any, ModelFacts], pairs: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f"the cat {'sat ' * i}" for i in range(300)))
    source = str(tmp_path / "a.txt")
    assert len(sentences(encoder, TextSpec(source, None)).inputs) == 256
    assert len(sentences(encoder, TextSpec(source, 7)).inputs) == 7
    assert len(sentences(encoder, TextSpec(source, None, draw=(299, 0))).inputs) == 2
    assert "has 300" in error_of(lambda: sentences(encoder, TextSpec(source, 301)))
    assert "number 300 was asked for" in error_of(lambda: sentences(encoder, TextSpec(source, None, draw=(300,))))
    assert "11 pairs were asked for" in error_of(lambda: sentences(encoder, TextSpec(pairs, 22)))


def test_held_out_pairs_are_taken_whole_by_default(encoder: tuple[Any, ModelFacts], pairs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_SENTENCES", 8)
    assert len(sentences(encoder, TextSpec(pairs), split="search").inputs) == 8
    assert len(sentences(encoder, TextSpec(pairs), split="held_out").inputs) == 20


@pytest.mark.parametrize(("name", "first_8192_ids"), [("stories260K", 4.3999), ("babyllama-105", 2.3353)])
def test_dense_perplexity_of_real_decoders_is_the_published_one(shared: Path, name: str, first_8192_ids: float) -> None:
    facts = inspect_model(shared / "models" / name)
    assert facts.context is not None
    spec = TextSpec(str(shared / "data" / "tinystories-eval.txt"), 8192 // facts.context, None, "per_document", "first")
    ids = make_windows(load_tokenizer(facts), facts, spec, 0, "held_out").inputs
    with torch.no_grad():
        logits = load_model(facts, CPU)(input_ids=ids).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(loss.exp()) == pytest.approx(first_8192_ids, abs=5e-4)


@pytest.mark.parametrize(("sentences", "least"), [(200, 0.8), pytest.param(0, 0.8672 - 5e-4, marks=pytest.mark.slow)])
def test_dense_spearman_of_a_real_encoder_is_the_published_one(shared: Path, sentences: int, least: float) -> None:
    facts = inspect_model(shared / "models" / "minilm-l6")
    spec = TextSpec(str(shared / "data" / "stsb-dev.csv"), sentences, draw="first")
    found = make_sentences(load_tokenizer(facts), facts, spec, 0, "held_out")
    model = load_model(facts, CPU)
    assert found.mask is not None
    assert found.scores is not None
    order = found.mask.sum(1).argsort()  # batches of like length, without the padding that is common to them
    embeddings = torch.empty(len(found.inputs), 384)
    with torch.no_grad():
        for start in range(0, len(order), 100):
            rows = order[start : start + 100]
            width = int(found.mask[rows].sum(1).max())
            mask = found.mask[rows, :width]
            hidden = model(input_ids=found.inputs[rows, :width], attention_mask=mask).last_hidden_state
            embeddings[rows] = nn.functional.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)
    cosine = (embeddings[0::2] * embeddings[1::2]).sum(1)
    result = spearmanr(cosine, found.scores).statistic
    assert least <= result
    assert sentences or (len(cosine) == 1500 and result <= 0.8672 + 5e-4)
