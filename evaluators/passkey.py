"""Passkeys: five digits hidden in a text and asked for at its end, which a cache that drops them cannot tell.

Text goes on much the same without the few tokens that matter, so a KL hardly shows that they are gone. This does.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autoeff.evaluators.quality import Sample, sample_of
from autoeff.spaces.kv_cache import KvCache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Passkeys", "passkeys"]

_DIGITS = 5
_HIDDEN, _ASKED = "\nPASSKEY = {}\n", "\nassert PASSKEY =={}"


@dataclass(frozen=True, eq=False)
class Passkeys:
    """Texts with a key that end in that key.

    Attributes:
        ids: int64 [texts, tokens].
        keys: Tokens at the end of each that are the key, int64 [texts].
    """

    ids: Tensor
    keys: Tensor

    @torch.no_grad()
    def found(self, model: nn.Module, body: Callable[..., Any], head: nn.Linear, batches: list[slice]) -> Sample:
        """The share of keys that greedy generation tells in full, of the model as it stands and under its plans for the cache.

        Everything before the keys is read as a prompt, block by block; then the keys are decoded. Greedy generation tells a key just if
        each of its tokens is the likeliest behind those before it, so they are given, and all texts of a batch are asked at once.

        Args:
            model: A decoder; its cache holds shares of these texts.
            body: What gives its final hidden states.
            head: Its output head.
            batches: Rows that are run together.
        """
        last, length = int(self.keys.max()), self.ids.shape[1]
        hits = []
        for rows in batches:
            ids, cache = self.ids[rows], KvCache(model, length)
            before = body(input_ids=ids[:, :-last], past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
            after = body(input_ids=ids[:, -last:], past_key_values=cache, use_cache=True).last_hidden_state[:, :-1]
            right = head(torch.cat([before, after], 1)).argmax(-1) == ids[:, -last:]
            asked = torch.arange(last, 0, -1, device=ids.device) <= self.keys[rows, None]
            hits.append((right | ~asked).all(1))
        return sample_of(torch.cat(hits))


def passkeys(tokenizer: PreTrainedTokenizerBase, windows: Tensor, seed: int) -> Passkeys | None:
    """A text with a key for each window, of the same length; None where windows are too short to hide one.

    The keys stand at depths that are spread evenly, in the order of the windows.

    Args:
        tokenizer: The model's.
        windows: int64 [windows, tokens].
        seed: Draws the keys.
    """
    rng, first = random.Random(f"{seed}:passkey"), tokenizer.bos_token_id

    def encoded(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    texts, keys, question = [], [], encoded(_ASKED.format(""))
    for number, window in enumerate(windows.tolist()):
        key = "".join(rng.choices("0123456789", k=_DIGITS))
        hidden, asked = encoded(_HIDDEN.format(key)), encoded(_ASKED.format(f" {key}"))
        start = int(window[0] == first)
        room = len(window) - len(hidden) - len(asked)
        if room - start < len(hidden) + len(asked):  # half of it at least is the window's own
            return None
        place = start + (room - start) * number // max(1, len(windows) - 1)
        texts.append([*window[:place], *hidden, *window[place:room], *asked])
        same = next((i for i, (a, b) in enumerate(zip(question, asked, strict=False)) if a != b), len(question))
        keys.append(len(asked) - same)
    return Passkeys(torch.tensor(texts, device=windows.device), torch.tensor(keys, device=windows.device))
