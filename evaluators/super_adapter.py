"""One adapter that holds every rank: trained once, with ranks drawn anew in every step, so that each prefix of its terms stands alone.

Where it is kept, and the checkpoints of a training that goes on, are files named by the SHA-256 of everything that they depend on: model,
text, knob settings, linears, ranks and seed. Adapters of fixed ranks, trained from scratch, are made and kept in the same way.

Source: random prefixes after DyLoRA, arXiv:2210.07558.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from autoeff.evaluators.bank import write_whole
from autoeff.evaluators.peft_format import read_peft, write_peft
from autoeff.evaluators.text import Passages
from autoeff.evaluators.training import Course, drawn, train
from autoeff.evaluators.widening import wide_for_gradients
from autoeff.spaces.adapters import Adapter, attached, with_rank
from autoeff.spaces.configuration import digest_of
from autoeff.spaces.sites import Linear

__all__ = ["Adapters", "tuned"]

FORMAT = 1


class Adapters:
    """The adapters of a model that is searched: in force in full, from the first moment on.

    Args:
        model: A decoder.
        head: Its output head.
        sites: Linears by site.
        levels: Ranks by site, the greatest first.
        text: What is trained on, on the model's device.
        course: Of every training.
        folder: Of finished adapters.
        model_digest: Names the model's content.
        progress: Called with (done, total) steps of the first training.
    """

    def __init__(
        self,
        model: Any,
        head: nn.Linear,
        sites: Mapping[str, Sequence[Linear]],
        levels: Mapping[str, Sequence[int]],
        text: Passages,
        course: Course,
        folder: Path,
        model_digest: str,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._sites, self._model = sites, model
        self._made = partial(tuned, model, head, sites, text=text, course=course, folder=folder, model_digest=model_digest)
        self._in_full = self._made(levels, progress=progress)
        self._take_away = attached(model, self._in_full)

    @contextmanager
    def from_scratch(self, ranks: Mapping[str, int]) -> Iterator[None]:
        """Puts adapters in their place that are trained at the given ranks, by site; the model must stand as it was trained on."""
        self._take_away()
        try:
            take_away = attached(self._model, self._made({site: [rank] for site, rank in ranks.items()}))
            try:
                yield
            finally:
                take_away()
        finally:
            self._take_away = attached(self._model, self._in_full)

    @property
    def any_in_force(self) -> bool:
        """Whether a rank is above 0."""
        return any(adapter.rank for adapter in self._in_full.values())

    def write(self, folder: Path, base: str) -> None:
        """Writes the terms in force as a PEFT adapter for the model called `base`.

        Raises:
            InputError: There are none.
        """
        transposed = any(linear.transposed for linears in self._sites.values() for linear in linears)
        write_peft(folder, self._in_full, base, transposed=transposed)

    def read(self, folder: Path) -> None:
        """Puts what `write` wrote in force, for good; no folder is no adapter."""
        self._take_away()
        found = read_peft(folder, next(self._model.parameters()).device) if folder.is_dir() else {}
        self._take_away = attached(self._model, found)


def tuned(
    model: Any,
    head: nn.Linear,
    sites: Mapping[str, Sequence[Linear]],
    ranks: Mapping[str, Sequence[int]],
    text: Passages,
    course: Course,
    folder: Path,
    model_digest: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Adapter]:
    """Adapters by linear for a model as it stands, found in `folder` or trained.

    Args:
        model: A decoder without adapters; its parameters stay as they are.
        head: Its output head.
        sites: Linears by site; those of a site have one rank.
        ranks: By site the ranks that a step draws from, the greatest first; a single one is trained at that rank.
        text: Windows of equal length on the model's device.
        course: Of the training.
        folder: Of finished adapters and of checkpoints.
        model_digest: Names the model's content.
        progress: Called with (done, total) steps.

    Raises:
        CandidateError: The loss is not finite.
    """
    key = digest_of(
        {
            "format": FORMAT,
            "model": model_digest,
            "text": text.digest,
            "course": [course.tokens, course.batch, course.learning_rate, course.optimizer, course.seed],
            "sites": [[[linear.name for linear in linears], list(ranks[site])] for site, linears in sites.items()],
        }
    )
    path = folder / f"v{FORMAT}" / key[:2] / f"{key}.safetensors"
    if (found := _read(path, text.inputs.device)) is not None:
        return found
    adapters = {linear.name: _blank(linear, ranks[site][0], course.seed, text) for site, linears in sites.items() for linear in linears}
    of_site = {site: [adapters[linear.name] for linear in linears] for site, linears in sites.items()}

    def loss(step: int, rows: Tensor) -> Tensor:
        generator = drawn(course.seed, "ranks", step)
        undo = []
        for site, levels in ranks.items():
            rank = levels[int(torch.randint(len(levels), (), generator=generator))]
            undo.append(with_rank(of_site[site], rank))
        try:
            ids = text.inputs[rows.to(text.inputs.device)]
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            return cross_entropy(head(hidden[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())
        finally:
            for put_back in undo:
                put_back()

    parameters = {f"{name}.{part}": getattr(adapter, part) for name, adapter in adapters.items() for part in ("a", "b")}
    frozen = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    take_away = attached(model, adapters)
    try:
        with wide_for_gradients(model):
            train(parameters, loss, len(text.inputs), text.length, course, path.with_suffix(".checkpoint"), progress)
    finally:
        take_away()
        for parameter, flag in frozen.items():
            parameter.requires_grad_(flag)
    write_whole(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in parameters.items()}))
    return adapters


def _blank(linear: Linear, rank: int, seed: int, text: Passages) -> Adapter:
    """An adapter that adds nothing yet: A is uniform with the variance 1 / 3 K, B is zero."""
    bound = linear.in_features**-0.5
    a = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=drawn(seed, "adapter", linear.name))
    return Adapter(a.to(text.inputs.device), torch.zeros(linear.out_features, rank, device=text.inputs.device))


def _read(path: Path, device: torch.device) -> dict[str, Adapter] | None:
    try:
        tensors = load_file(path, device=str(device))
    except (FileNotFoundError, SafetensorError):
        return None
    names = [name.removesuffix(".a") for name in tensors if name.endswith(".a")]
    return {name: Adapter(tensors[f"{name}.a"], tensors[f"{name}.b"]) for name in names}
