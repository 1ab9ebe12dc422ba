"""Text as a model reads it: windows of token ids for decoders, padded sentences for encoders; drawn by a seed, named by a digest."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from autoeff.errors import InputError
from autoeff.evaluators.chat import Conversation, rendered
from autoeff.evaluators.checkpoint import read_json
from autoeff.evaluators.dataset import HUB, is_dataset, read_dataset
from autoeff.evaluators.keeping import Keep, anew
from autoeff.evaluators.loading import ModelFacts
from autoeff.evaluators.setup import TextSpec
from autoeff.evaluators.sources import PACKAGE, Text, installed, read_package, read_pairs, read_text
from autoeff.spaces.measurements import Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Passages", "Reading", "chosen", "digest_of", "make_passages", "make_sentences", "make_windows", "with_others"]

_WINDOWS = 16
_WINDOW_LENGTH = 512
_SENTENCES = 256
_SENTENCE_LENGTH = 128
_READ_LIMIT = 64 << 20  # bytes of a source that are ever tokenised
_READ_LEAST = 1 << 16
_BYTES_PER_TOKEN = 16  # generous: natural text has about 4
_SETTLED = 64  # ids before a cut in the text that the cut may change
_END = "<|endoftext|>"
_DOCUMENT_END = re.compile(rf"^{re.escape(_END)}\s*$", re.MULTILINE)
_BUNDLED = "texts.json"
_FIFTHS = {
    ("search", False): (0, 4, "first four fifths"),
    ("held_out", False): (4, 5, "last fifth"),
    ("tune", True): (0, 3, "first three fifths"),
    ("search", True): (3, 4, "fourth fifth"),
}
"""Of a divided source, by split and whether it is tuned on too: where a part begins and ends."""


@dataclass(frozen=True, eq=False)
class Passages:
    """What a model is fed, ready for it: token ids, or images.

    Attributes:
        inputs: Ids, int64 [windows, tokens]; for scored pairs rows 2i and 2i + 1 are pair i. Of images float32 [images, C, H, W].
        mask: Attention mask, int64 of the same shape, for padded sentences; None where every token counts.
        scores: Of pairs, float32 [windows / 2]; None otherwise.
        digest: SHA-256 of all of these.
        source: Where they are from.
        tokens: Tokens that count.
        notices: What the user must be told once.
        labels: Of images, int64 [images], where their folders are labels that the model gives; None otherwise.
        beside: Other passages of the same source, for statistics; None where none were asked for, or fewer than these are left.
    """

    inputs: Tensor
    mask: Tensor | None
    scores: Tensor | None
    digest: str
    source: str
    tokens: int
    notices: tuple[str, ...]
    labels: Tensor | None = None
    beside: Passages | None = None

    @property
    def calibration(self) -> Passages:
        """What levels are fitted to: those beside it, or itself."""
        return self.beside or self

    @property
    def length(self) -> int:
        """Tokens of a window, padding included; of an image the patches that it is cut into, and what the model puts before them."""
        return self.inputs.shape[1] if self.inputs.dim() == 2 else self.tokens // len(self.inputs)

    def to(self, device: torch.device) -> Passages:
        """The same passages with their tensors on `device`; those beside them stay where they are."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(self, inputs=self.inputs.to(device), mask=move(self.mask), scores=move(self.scores), labels=move(self.labels))


@dataclass(frozen=True, eq=False)
class Reading:
    """A text as ids, of which windows are cut.

    Attributes:
        ids: int64 [ids], in order.
        name: Of what was read.
        notices: What the user must be told once.
    """

    ids: Tensor
    name: str
    notices: tuple[str, ...]


def make_passages(
    tokenizer: PreTrainedTokenizerBase,
    facts: ModelFacts,
    data: TextSpec,
    eval_data: TextSpec | None,
    seed: int,
    *,
    tuned_on: str | None = None,
    spared: int = 0,
    keep: Keep = anew,
) -> dict[Split, Passages]:
    """Search and held-out passages of a job.

    Without a held-out source, a given search source is divided: its first four fifths are searched on, the last fifth is held out. Of
    a source that the model is `tuned_on` the first three fifths are left to that, and the fourth is searched on. Search passages have
    others `beside` them, `spared` times as many where there are.

    Raises:
        InputError: A text cannot be read, is too short, or is needed and not given.
    """
    held_out = eval_data or replace(data, draw="random" if isinstance(data.draw, tuple) else data.draw)
    divided = data.source is not None and (eval_data is None or eval_data.source is None)
    if divided:
        held_out = replace(held_out, source=data.source)
    make = partial(make_windows, keep=keep) if facts.task == "decoder" else make_sentences
    limit = None
    if divided and _remote(data):  # one limit for both, or the parts would overlap
        limit = min(_READ_LIMIT, 5 * max((1 + spared) * _reach(data, facts), _reach(held_out, facts)))
    tuned = tuned_on is not None and data.source == tuned_on
    make_search = partial(make_windows, tuned=True, keep=keep) if tuned else make
    return {
        "search": make_search(tokenizer, facts, data, seed, "search", divided=divided or tuned, limit_bytes=limit, spared=spared),
        "held_out": make(tokenizer, facts, held_out, seed, "held_out", divided=divided, limit_bytes=limit),
    }


def make_windows(
    tokenizer: PreTrainedTokenizerBase,
    facts: ModelFacts,
    spec: TextSpec,
    seed: int,
    split: Split | Literal["tune"],
    *,
    divided: bool = False,
    limit_bytes: int | None = None,
    tuned: bool = False,
    spared: int = 0,
    keep: Keep = anew,
) -> Passages:
    """Windows of a text for a decoder.

    Args:
        tokenizer: The model's.
        facts: The model.
        spec: Source and cut.
        seed: Draws the windows, for each split apart.
        split: Which of a bundled model's texts; which part of a divided one.
        divided: Take the first four fifths of the ids for `search`, the last fifth for `held_out`.
        tuned: Of these four fifths the first three are for `tune`, the last for `search`.
        limit_bytes: How much of the source is read. None takes 64 MiB, or less of a source that is remote or read from its start:
            16 bytes a token, and more where that does not suffice.
        spared: So many times as many windows are drawn from what lies between these, and returned `beside` them.
        keep: May know the ids of the text.

    Raises:
        InputError: The text is missing, unreadable or too short, or the windows do not fit the model.
    """
    length = _length(spec, facts, _WINDOW_LENGTH)
    bos = tokenizer.bos_token_id if spec.bos == "per_window" else None
    step = length - (bos is not None)
    asked = len(spec.draw) if isinstance(spec.draw, tuple) else spec.windows
    count = asked if asked is not None else (_WINDOWS if spec.bos == "per_window" else 0)
    wanted = (max(spec.draw) + step if isinstance(spec.draw, tuple) else count * step) + spared * count * step
    frugal = not divided and (_remote(spec) or spec.draw == "first")
    limit = limit_bytes or (_bytes_for(wanted) if frugal else _READ_LIMIT)
    least = wanted + _SETTLED if frugal else 0
    told = divided or spec.draw == "random"
    known = anew if _remote(spec) else keep  # what a hub has now, only it knows
    key = [spec.source or split, _installed(spec, facts, split), spec.bos, limit, least, told]
    places: list[str | Path] = [facts.path] if spec.source is None else [facts.path, spec.source]
    reading = known("text", key, places, lambda: _reading(tokenizer, facts, spec, split, limit, least, told=told))
    ids, where, notices = reading.ids, reading.name, list(reading.notices)
    if divided:
        begin, end, named = _FIFTHS[split, tuned]
        ids = ids[len(ids) * begin // 5 : len(ids) * end // 5]
        where += f", its {named}"
    fit = len(ids) // step
    if not fit:
        raise InputError(f"{where} is shorter than one window: {len(ids)} ids found, {step} needed; give more text or a shorter length")
    if isinstance(spec.draw, tuple):
        starts = list(spec.draw)
        if max(starts) + step > len(ids):
            last = f"the last possible start is {len(ids) - step}"
            raise InputError(f"no window can start at id {max(starts)} of {where}, which has {len(ids)} ids; {last}")
    else:
        if asked and asked > fit:
            raise InputError(
                f"{asked} windows of {length} tokens were asked for, {where} ({len(ids)} ids) holds {fit}; ask for {fit} or fewer"
            )
        if asked is None and count > fit:
            notices.append(f"{where} holds {fit} windows of {length} tokens, fewer than the usual {count}")
        count = min(count or fit, fit)
        rng = random.Random(f"{seed}:{split}")
        starts = [i * step for i in range(count)] if spec.draw == "first" else _apart(len(ids), count, step, rng)

    def passages(starts: Sequence[int]) -> Passages:
        windows = ids[torch.tensor(starts)[:, None] + torch.arange(step)]
        if bos is not None:
            windows = torch.cat([torch.full((len(windows), 1), bos), windows], dim=1)
        return _passages(facts, windows, None, None, where, notices)

    return with_others(passages, starts, _between(starts, len(ids), step), spared, spec, seed)


def make_sentences(
    tokenizer: PreTrainedTokenizerBase,
    facts: ModelFacts,
    spec: TextSpec,
    seed: int,
    split: Split,
    *,
    divided: bool = False,
    limit_bytes: int | None = None,
    spared: int = 0,
) -> Passages:
    """Sentences for an encoder: the lines of a text, or both columns of a CSV of scored pairs, padded on the right.

    Args and errors are those of `make_windows`; a held-out CSV is taken whole unless `windows` says otherwise.
    """
    length = _length(spec, facts, _SENTENCE_LENGTH)
    notices: list[str] = []
    paired = spec.source is not None and spec.source.endswith(".csv")
    items: list[tuple[str, ...]]
    scores: list[float] | None = None
    if paired:
        assert spec.source is not None
        pairs = read_pairs(spec.source)
        where, items, scores = spec.source, [(pair.first, pair.second) for pair in pairs], [pair.score for pair in pairs]
    else:
        reach = min(_READ_LIMIT, (1 + spared) * _reach(spec, facts))
        limit = limit_bytes or (reach if _remote(spec) and not divided else _READ_LIMIT)
        text, notices = _read(spec, facts, split, limit)
        if not text.complete:
            notices.append(_cut_at(limit, text))
        where, items = text.name, [(line,) for document in text.documents for line in _lines(document, text.name)]
    part = range(len(items))
    if divided:
        cut = len(items) * 4 // 5
        part = part[:cut] if split == "search" else part[cut:]
        where += ", its first four fifths" if split == "search" else ", its last fifth"

    def passages(taken: Sequence[int]) -> Passages:
        sentences = [sentence for i in taken for sentence in items[part[i]]]
        rows = tokenizer(sentences, truncation=True, max_length=length, verbose=False)["input_ids"]
        width = max(len(row) for row in rows)
        pad = tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return _passages(facts, ids, mask, None if scores is None else torch.tensor([scores[part[i]] for i in taken]), where, notices)

    taken = chosen(len(part), spec, "pairs" if paired else "sentences", seed, split, where)
    return with_others(passages, taken, sorted(set(range(len(part))) - set(taken)), spared, spec, seed)


def _length(spec: TextSpec, facts: ModelFacts, usual: int) -> int:
    if spec.length is not None and facts.context is not None and spec.length > facts.context:
        raise InputError(f"windows of {spec.length} tokens exceed the model's context; at most {facts.context} are allowed")
    return spec.length or min(usual, facts.context or usual)


def _remote(spec: TextSpec) -> bool:
    return spec.source is not None and spec.source.startswith(HUB)


def _reach(spec: TextSpec, facts: ModelFacts) -> int:
    """Bytes from the start of a source that very likely hold what the spec asks for; `_READ_LIMIT` where that is all."""
    count = max(spec.draw) + 1 if isinstance(spec.draw, tuple) else spec.windows
    if facts.task == "encoder":
        tokens = (_SENTENCES if count is None else count) * _length(spec, facts, _SENTENCE_LENGTH)
    elif isinstance(spec.draw, tuple):
        tokens = max(spec.draw) + _length(spec, facts, _WINDOW_LENGTH)
    else:
        usual = _WINDOWS if spec.bos == "per_window" else 0
        tokens = (usual if count is None else count) * _length(spec, facts, _WINDOW_LENGTH)
    return _bytes_for(tokens)


def _bytes_for(tokens: int) -> int:
    return min(_READ_LIMIT, max(_READ_LEAST, tokens * _BYTES_PER_TOKEN)) if tokens else _READ_LIMIT


def _cut_at(limit: int, text: Text) -> str:
    return f"only the first {limit / 2**20:.3g} MiB of {text.name} are used"


def _lines(document: str | Conversation, name: str) -> list[str]:
    if not isinstance(document, str):
        raise InputError(f"{name} holds conversations, which only decoders read; give sentences")
    return [line.strip() for line in document.splitlines() if line.strip()]


def _read(spec: TextSpec, facts: ModelFacts, split: str, limit_bytes: int) -> tuple[Text, list[str]]:
    """The text and what must be said about it."""
    if spec.source is not None:
        return (read_dataset if is_dataset(spec.source) else read_text)(spec.source, limit_bytes), []
    entry = _bundled(facts, split)
    package = read_package(entry["package"])
    text = package.text(limit_bytes)
    notices = []
    if package.sha256 != entry["sha256"]:
        notices.append(
            f"the {split} text is {text.name}, the model's published figures are of {entry['version']} "
            f"(sha256 {entry['sha256'][:12]}…); values may differ"
        )
    return text, notices


def _installed(spec: TextSpec, facts: ModelFacts, split: str) -> str | None:
    """What changes when the package is installed anew whose source files are the text; None where they are not."""
    if spec.source is None:
        return installed(_bundled(facts, split)["package"])
    return installed(spec.source.removeprefix(PACKAGE)) if spec.source.startswith(PACKAGE) else None


def _bundled(facts: ModelFacts, split: str) -> Mapping[str, str]:
    """Package, version and sha256 of the text that the model was published with."""
    path = facts.path / _BUNDLED
    if not path.is_file():
        raise InputError(f"{facts.path} brings no text of its own; give one with --data")
    listed = read_json(path, 1 << 16)
    entry = listed.get(split)
    keys = ("package", "version", "sha256")
    if listed.get("format") != 1 or not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in keys):
        raise InputError(f"{path} is malformed; expected format 1 and package, version and sha256 of the {split} text")
    return {key: entry[key] for key in keys}


def _reading(
    tokenizer: PreTrainedTokenizerBase, facts: ModelFacts, spec: TextSpec, split: str, limit: int, least: int, *, told: bool
) -> Reading:
    """The first `limit` bytes of a text, or more where they are not `least` ids; that it is cut is `told`, or only at the last limit."""
    text, notices = _read(spec, facts, split, limit)
    ids = _encoded(tokenizer, text, spec.bos)
    while not text.complete and limit < _READ_LIMIT and len(ids) < least:
        limit = min(4 * limit, _READ_LIMIT)
        text, notices = _read(spec, facts, split, limit)
        ids = _encoded(tokenizer, text, spec.bos)
    if not text.complete and (limit == _READ_LIMIT or told):
        notices.append(_cut_at(limit, text))
    if spec.bos == "per_window" and _has_ends(text) and _END not in tokenizer.get_vocab():
        notices.append(f"{text.name} has lines {_END} between its documents, which are read as text; bos per_document divides it there")
    return Reading(ids, text.name, tuple(notices))


def _encoded(tokenizer: PreTrainedTokenizerBase, text: Text, bos: str) -> Tensor:
    """All ids of a text in order, int64 [ids]; `bos` as in `TextSpec`."""
    ids: list[int] = []
    for plain, group in groupby(text.documents, key=lambda document: isinstance(document, str)):
        if plain:
            ids += _encode_plain(tokenizer, [document for document in group if isinstance(document, str)], bos)
        else:
            for document in group:
                assert not isinstance(document, str)
                row = rendered(tokenizer, document, text.name)
                ids += row[1:] if bos == "per_window" and row[:1] == [tokenizer.bos_token_id] else row
    return torch.tensor(ids, dtype=torch.int64)


def _has_ends(text: Text) -> bool:
    return any(isinstance(document, str) and _END in document and _DOCUMENT_END.search(document) for document in text.documents)


def _encode_plain(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], bos: str) -> list[int]:
    if bos == "per_window":
        plain: list[int] = tokenizer("\n\n".join(documents), add_special_tokens=False, verbose=False)["input_ids"]
        return plain
    pieces = [piece.strip("\n") for document in documents for piece in _DOCUMENT_END.split(document)]
    first = tokenizer.bos_token_id
    ids: list[int] = []
    for row in tokenizer([piece for piece in pieces if piece], verbose=False)["input_ids"]:
        if first is not None and row[:1] != [first]:
            ids.append(first)
        ids += row
    return ids


def _apart(total: int, count: int, step: int, rng: random.Random) -> list[int]:
    """Starts of `count` stretches of `step` that do not overlap, every such set equally likely, in random order.

    Shrinking each stretch to a point leaves `count` distinct points. The order matters: a low fidelity takes the first windows.
    """
    points = sorted(rng.sample(range(total - count * (step - 1)), count))
    starts = [point + i * (step - 1) for i, point in enumerate(points)]
    rng.shuffle(starts)
    return starts


def chosen(total: int, spec: TextSpec, unit: str, seed: int, split: Split, where: str) -> Sequence[int]:
    """Which sentences, pairs of them, or images a spec takes of `total`.

    Raises:
        InputError: There are fewer than it asks for.
    """
    paired = unit == "pairs"
    if isinstance(spec.draw, tuple):
        if max(spec.draw) >= total:
            raise InputError(f"number {max(spec.draw)} was asked for, {where} has {total} {unit}; the last is {total - 1}")
        return spec.draw
    if not total:
        raise InputError(f"{where} holds no {unit}; give more text")
    asked = -(-spec.windows // 2) if spec.windows and paired else spec.windows
    if asked and asked > total:
        raise InputError(f"{asked} {unit} were asked for, {where} has {total}; ask for that many or fewer")
    usual = total if paired and split == "held_out" else _SENTENCES // (2 if paired else 1)
    count = total if asked == 0 else min(total, asked or usual)
    return range(count) if spec.draw == "first" else random.Random(f"{seed}:{split}").sample(range(total), count)


def with_others(
    make: Callable[[Sequence[int]], Passages], taken: Sequence[int], rest: Sequence[int], spared: int, spec: TextSpec, seed: int
) -> Passages:
    """What `make` makes of those taken, `beside` them `spared` times as many of the rest; none where not even as many are left."""
    count = min(spared * len(taken), len(rest))
    if count < len(taken):
        return make(taken)
    others = rest[:count] if spec.draw == "first" else random.Random(f"{seed}:beside").sample(rest, count)
    return replace(make(taken), beside=make(others))


def _between(starts: Sequence[int], total: int, step: int) -> list[int]:
    """Starts of stretches of `step` that overlap neither each other nor those at `starts`."""
    found: list[int] = []
    free = 0
    for taken in [*sorted(starts), total]:
        found += range(free, taken - step + 1, step)
        free = max(free, taken + step)
    return found


def _passages(facts: ModelFacts, ids: Tensor, mask: Tensor | None, scores: Tensor | None, source: str, notices: Sequence[str]) -> Passages:
    if (largest := int(ids.max())) >= facts.vocabulary:
        raise InputError(f"the tokenizer gives the id {largest}, the model knows {facts.vocabulary} ids; they do not belong together")
    tokens = ids.numel() if mask is None else int(mask.sum())
    return Passages(ids, mask, scores, digest_of(ids, mask, scores), source, tokens, tuple(notices))


def digest_of(*tensors: Tensor | None) -> str:
    """SHA-256 over types, shapes and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(b"none" if tensor is None else f"{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
