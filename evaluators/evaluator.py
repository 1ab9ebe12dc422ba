"""Turns configurations into measurements: the model and the bank stay loaded, candidates are swapped in."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from autoeff.errors import InputError
from autoeff.evaluators.amounts import amounts
from autoeff.evaluators.attention import Moments, OfWindows, mean_of, of_windows
from autoeff.evaluators.bank import Bank, Statistics
from autoeff.evaluators.calibration import collected, explained, gradients
from autoeff.evaluators.candidate import Candidate
from autoeff.evaluators.correlation import spearman
from autoeff.evaluators.footprint import steps_of
from autoeff.evaluators.forward import Forward, States, fed_to
from autoeff.evaluators.images import PROCESSOR
from autoeff.evaluators.latency import measure_served
from autoeff.evaluators.latency_fit import runtime_dtype
from autoeff.evaluators.levels_file import built_for, put, write_built
from autoeff.evaluators.loading import inspect_model, load_model, load_tokenizer
from autoeff.evaluators.metrics import imported_metrics, measured_by
from autoeff.evaluators.model_statistics import AttentionStatistics, Magnitudes, ModelStatistics
from autoeff.evaluators.packed_linears import PackedLinears
from autoeff.evaluators.passkey import Passkeys, passkeys
from autoeff.evaluators.preparation import hardware_name, prepare
from autoeff.evaluators.quality import (
    Sample,
    Teacher,
    cosine_damage,
    log_normalisers,
    next_token_losses,
    pooled,
    sample_of,
    teacher_of,
    token_kl,
)
from autoeff.evaluators.samples import sampled
from autoeff.evaluators.serving import Stored, copied, removable, runs, serve
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup, LatencySpec
from autoeff.evaluators.sublayer_changes import sublayer_changes
from autoeff.evaluators.super_adapter import Adapters
from autoeff.evaluators.tasks import Tasks
from autoeff.evaluators.text import Passages
from autoeff.evaluators.training import Course
from autoeff.evaluators.weights import magnitudes_of, outlier_share, tail_exponent
from autoeff.spaces.configuration import Level
from autoeff.spaces.criteria.nirvana import Nirvana
from autoeff.spaces.knobs.lora_rank import LoraRank
from autoeff.spaces.kv_cache import KvCache, KvPlan, continuation_start, watched
from autoeff.spaces.material import SAMPLES, Material, dense_weight
from autoeff.spaces.measurements import Measurement, Split
from autoeff.spaces.sites import Linear, Site
from autoeff.spaces.thinned_tokens import remaining
from autoeff.spaces.units import unit_scores

__all__ = ["Evaluator"]

ADAPTER = "adapter"
"""Folder of the adapters beside an exported checkpoint."""
_OUTLIER_TIMES = 5  # OWL's M for the LLaMA family


@dataclass
class _Text:
    """A split with what is kept of the dense model over it.

    Attributes:
        order: Rows of `passages` before they were sorted by length, [windows]; None where all have the same length.
    """

    passages: Passages
    order: Tensor | None = None
    targets: list[Teacher] | Tensor | None = None  # decoders: a teacher a batch; encoders: embeddings [sentences, hidden]


class Evaluator:
    """Evaluates configurations of one setup.

    Args:
        setup: What to load.
        progress: Called with (done, total) while bank entries are built.
        on_kernels: Whether quantised linears compute with packed codes, as they are served; None leaves that to a GPU.

    Attributes:
        kernel_use: Of the last evaluation, as `Candidate` says it.

    Raises:
        InputError: As `prepare`; also a model whose logits are not its head applied to its last hidden state.
    """

    def __init__(
        self,
        setup: EvaluationSetup,
        progress: Callable[[int, int], None] = lambda done, total: None,
        on_kernels: bool | None = None,
    ) -> None:
        self.preparation = prepare(setup)
        facts, device = self.preparation.facts, self.preparation.device
        self.space, self.structure = self.preparation.space, self.preparation.structure
        footprint = self.preparation.footprint
        self.model: Any = load_model(facts, device, footprint.narrow)
        self._texts = {split: _text(passages.to(device)) for split, passages in self.preparation.passages.items()}
        self._head = self._find_head()
        self._seed = setup.seed
        self._adapters = self._trained(setup, progress)
        self._metrics = imported_metrics(setup.metrics)
        self._tasks = None if setup.tasks is None else Tasks(setup.tasks, self.model, load_tokenizer(facts), facts.context)
        self._forward = Forward(self.model, self.structure.blocks, footprint.state_stride)
        self._dense_states: dict[int, States] = {}
        self._last_states: dict[int, tuple[tuple[int, ...], States]] = {}
        dense = {linear.name: self._weight(linear) for linear in self.structure.linears}
        dtype = next(iter(dense.values())).dtype
        self.bank = Bank(
            Path(setup.bank),
            facts.digest,
            {linear.name: linear for linear in self.structure.linears},
            weights=lambda name: dense[name].to("cpu", facts.store_dtype),  # candidates have the values that a 16-bit runtime computes with
            place=lambda tensor: tensor.to(device, dtype),
            keep_bytes=footprint.keep_decoded,
            device=device,
        )
        on_kernels = device.type == "cuda" if on_kernels is None else on_kernels
        packed = PackedLinears(self.model, self.structure, self.bank) if on_kernels else None
        self.candidate = Candidate(self.model, self.structure, self.space, self.preparation.knobs, self.bank, packed)
        self.kernel_use: dict[str, int] = {}
        needs = {name for knob in self.preparation.knobs.values() for name in knob.needs}
        plain = [linear.name for linear in self.structure.linears if not linear.experts]
        if (calibration := self.preparation.calibration) is not None:
            text = calibration.to(device)
            with (
                collected(self.model, plain, needs) as statistics,
                sampled(self.model, self._sites_asking(SAMPLES)) as samples,
                amounts(self.model, self._sites_asking({"amounts"})) as of_neurons,
            ):
                self._run_dense(text)
            found = {**statistics(), **samples(), **of_neurons(), **self._gradients(text), **self._of_caches(text)}
            self.bank.statistics = Statistics(calibration.digest, found)
        self._learn_targets(self._texts["search"], "search")
        self._build_bank(progress)

    def evaluate(self, request: EvaluationRequest) -> list[Measurement]:
        """Quality of one configuration on one split; on the whole held-out text also accuracies, see `_accuracies`.

        Raises:
            CandidateError: Its outputs are not finite.
            InputError: A decision, level, split or number of windows that the setup does not have.
        """
        indices = self.space.indices(request.levels)
        text = self._texts[request.split]
        if not 1 <= request.windows <= len(text.passages.inputs):
            raise InputError(f"{request.windows} windows were asked for; the {request.split} text has {len(text.passages.inputs)}")
        if text.targets is None:
            self._learn_targets(text, request.split)
        self.candidate.set(indices)
        whole = request.split == "held_out" and request.windows == len(text.passages.inputs)
        found = self._quality(text, request) + (self._accuracies() if whole else [])
        self.kernel_use = self.candidate.kernel_use
        return found + (self._own_metrics(len(text.passages.inputs)) if whole else [])

    def complete(self, levels: Mapping[str, Level], prompt: str, tokens: int) -> str:
        """The prompt and its greedy continuation under a configuration; decoders only."""
        if self._head is None:
            raise InputError(f"model_type {self.preparation.facts.model_type!r} is no decoder and completes no text")
        self.candidate.set(self.space.indices(levels))
        tokenizer = load_tokenizer(self.preparation.facts)
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=self.preparation.device)
        context = next((site.kv.context for site in self.structure.sites if site.kv is not None), 0)
        cache = KvCache(self.model, context) if self.preparation.generates else None
        for _ in range(tokens):
            seen = 0 if cache is None else cache.get_seq_length()
            hidden = self._forward.body(input_ids=ids[:, seen:], past_key_values=cache, use_cache=cache is not None).last_hidden_state[
                :, -1
            ]
            following = self._head(hidden).argmax(-1)
            if following.item() == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, following[None]], dim=1)
        return str(tokenizer.decode(ids[0], skip_special_tokens=True))

    def served(self, configurations: Mapping[str, Mapping[str, Level]]) -> dict[str, nn.Module]:
        """Models with packed weights, kernels and shapes as the configurations would be served, by label; they share what is dense."""
        facts, device, knobs = self.preparation.facts, self.preparation.device, self.preparation.knobs
        dense = load_model(facts, device, dtype=runtime_dtype(facts, device))
        whole = removable(dense, self.structure)
        models: dict[str, nn.Module] = {}
        for label, levels in configurations.items():
            indices = self.space.normalised(self.space.indices(levels))
            for unserved in ((), [name for name, knob in knobs.items() if knob.kind == "structure"]):
                models[label] = copied(dense)
                serve(models[label], self.structure, self.space, knobs, indices, Stored(self.bank), whole, unserved)
                if runs(models[label]):
                    break
        return models

    def latency(self, configurations: Mapping[str, Mapping[str, Level]], spec: LatencySpec) -> dict[str, list[Measurement]]:
        """Times of whole served models by label, measured alternating."""
        facts = self.preparation.facts
        return measure_served(self.served(configurations), spec, facts.vocabulary, self.preparation.device)

    def export(self, levels: Mapping[str, Level], folder: Path) -> list[str]:
        """Writes the configuration in the original shapes, so that transformers alone loads it; returns the file names.

        Values are those of the packed levels, in the checkpoint's own dtype; skipped sublayers are zeros.
        """
        self.candidate.set(self.space.indices(levels), decoded=True)
        dtype = self.preparation.facts.dtype
        state = {name: tensor.to(dtype) for name, tensor in self.model.state_dict().items()}
        self.model.config.dtype = dtype
        self.model.save_pretrained(folder, state_dict=state)
        if self.preparation.facts.task == "vision":
            shutil.copy(self.preparation.facts.path / PROCESSOR, folder)
        else:
            load_tokenizer(self.preparation.facts).save_pretrained(folder)
        if self._adapters is not None and self._adapters.any_in_force:
            self._adapters.write(folder / ADAPTER, "..")
        chosen = self.candidate.indices
        write_built(folder, {d.key: self.candidate.built(i, chosen) for i, d in enumerate(self.space.decisions) if chosen[i]})
        return sorted(path.name for path in folder.iterdir())

    def trained(self, levels: Mapping[str, Level]) -> list[Measurement]:
        """Quality on the whole held-out text of a configuration whose adapters are trained from scratch at its ranks.

        Raises:
            InputError: Nothing is trained in this setup.
            CandidateError: The training diverges.
        """
        if self._adapters is None:
            raise InputError("this setup trains no adapters")
        indices, text = self.space.normalised(self.space.indices(levels)), self._texts["held_out"]
        if text.targets is None:
            self._learn_targets(text, "held_out")
        self.candidate.set(self._zeros)
        ranks = {d.site: int(d.levels[i]) for d, i in zip(self.space.decisions, indices, strict=True) if d.knob == LoraRank.name}
        with self._adapters.from_scratch(ranks):
            self.candidate.set([0 if d.knob == LoraRank.name else i for d, i in zip(self.space.decisions, indices, strict=True)])
            try:
                return self._quality(text, EvaluationRequest({}, "held_out", len(text.passages.inputs)))
            finally:
                self.candidate.set(self._zeros)

    def export_adapter(self, levels: Mapping[str, Level], folder: Path) -> None:
        """Writes the adapters of a configuration, as PEFT reads them.

        Raises:
            InputError: Nothing is trained in this setup, or no rank is above 0.
        """
        if self._adapters is None:
            raise InputError("this job trains no adapters; they come with the knob lora_rank")
        self.candidate.set(self.space.indices(levels))
        self._adapters.write(folder, str(self.preparation.facts.path))

    def statistics(self, needs: Collection[str]) -> ModelStatistics:
        """What rules ask about the dense model, on the search text.

        Raises:
            InputError: A statistic that there is not.
        """
        if unknown := sorted(set(needs) - ModelStatistics.names()):
            raise InputError(f"unknown statistic {unknown[0]!r}; known: {', '.join(sorted(ModelStatistics.names()))}")
        asked: dict[str, Callable[[], Mapping[str, Any]]] = {
            "attention": self._attention,
            "changes": self._changes,
            "inputs": self._inputs,
            "magnitudes": lambda: {site.name: magnitudes_of(map(self._weight, site.linears)) for site in self._linear_sites},
            "outliers": self._outliers,
            "saliency": self._saliency,
            "spectra": lambda: {
                site.name: fmean(tail_exponent(self.model.get_parameter(linear.weight)) for linear in site.linears)
                for site in self._linear_sites
            },
        }
        self.candidate.set(self._zeros)
        return ModelStatistics(**{name: asked[name]() for name in sorted(needs)})

    def _attention(self) -> dict[str, AttentionStatistics]:
        queries = KvPlan().sizes(self._texts["search"].passages.length).window
        found: dict[str, list[OfWindows]] = {site.name: [] for site in self.structure.sites if site.kind == "attention" and site.kv}
        with watched(self.model, found, lambda name, seen_by: found[name].append(of_windows(seen_by, queries))):
            self._run_dense()
        return {name: mean_of(batches) for name, batches in found.items()}

    def _changes(self) -> Mapping[str, float]:
        with sublayer_changes(self.model, self.structure) as changes:
            self._run_dense()
            return changes()

    def _inputs(self) -> dict[str, tuple[float, ...]]:
        first = {site.name: site.linears[0].name for site in self._linear_sites if not site.linears[0].experts}
        plain = [linear.name for site in self._linear_sites for linear in site.linears if not linear.experts]
        with collected(self.model, plain, {"hessian"}) as hessians:
            self._run_dense()
            found = hessians()
        return {site: explained(found[f"{name}.hessian"]) for site, name in first.items()}

    def _outliers(self) -> dict[str, float]:
        plain = {linear.name: site.block for site in self._linear_sites for linear in site.linears if not linear.experts}
        with collected(self.model, plain, {"input_norm"}) as norms:
            self._run_dense()
            norm = norms()
        linears = {linear.name: linear for linear in self.structure.linears}
        shares = {}
        for block in dict.fromkeys(plain.values()):
            names = [name for name, place in plain.items() if place == block]
            weights = [self._weight(linears[name]) for name in names]
            shares[block] = outlier_share(weights, [norm[f"{name}.input_norm"] for name in names], _OUTLIER_TIMES)
        return {site.name: shares[site.block] for site in self._linear_sites if site.block in shares}

    def _saliency(self) -> dict[str, Magnitudes]:
        units, text = [site for site in self.structure.sites if site.coupling is not None], self._texts["search"].passages
        linears = dict.fromkeys(linear for site in units for linear in site.linears)
        found, shares = gradients(self.model, linears, self._head, text.inputs, text.mask), {}
        for site in units:
            assert site.coupling is not None
            material = Material({linear.name: self._weight(linear).cpu() for linear in site.linears}, statistics=found)
            shares[site.name] = replace(magnitudes_of([unit_scores(site.coupling, Nirvana(), material)]), weights=site.parameters)
        return shares

    def _run_dense(self, passages: Passages | None = None) -> None:
        """Runs what is in force over some text, by default that of the search, every block anew."""
        passages = passages or self._texts["search"].passages
        for rows in self._forward.batches(len(passages.inputs), passages.tokens):
            self._forward.run(passages.inputs, passages.mask, rows, kept=[], first_changed=[])

    @property
    def _linear_sites(self) -> list[Site]:
        return [site for site in self.structure.sites if site.kind == "linears"]

    def remeasure(self, folder: Path, split: Split, windows: int, levels: Mapping[str, Level] | None = None) -> list[Measurement]:
        """Quality of the model in `folder` against this setup's dense model, as a trial's is measured.

        Of `levels` those are put in force that no weights hold.

        The weights replace the dense ones for good, so this is the last thing that an evaluator does.
        """
        text = self._texts[split]
        if text.targets is None:
            self._learn_targets(text, split)
        self.candidate.set(self._zeros)
        exported = load_model(inspect_model(folder), self.preparation.device, self.preparation.footprint.narrow).state_dict()
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            tensor.data = exported[name].to(tensor.dtype)  # points there: the dense weights are let go
        if self._adapters is not None:
            self._adapters.read(folder / ADAPTER)
        self._dense_states, self._last_states = {}, {}
        wanted = self.space.normalised(self.space.indices(levels or {}))
        put(self.model, [self.candidate.step(i, level) for i, level in enumerate(wanted) if level], lambda key: built_for(folder, key))
        return self._quality(text, EvaluationRequest({}, split, windows))

    def remeasure_adapter(self, folder: Path, split: Split, windows: int) -> list[Measurement]:
        """The same for adapters that `export_adapter` wrote, on the dense model; the last thing that an evaluator does, too."""
        assert self._adapters is not None
        text = self._texts[split]
        if text.targets is None:
            self._learn_targets(text, split)
        self.candidate.set(self._zeros)
        self._adapters.read(folder)
        self._dense_states, self._last_states = {}, {}
        return self._quality(text, EvaluationRequest({}, split, windows))

    def stored_bytes(self, levels: Mapping[str, Level]) -> dict[str, int]:
        """Bytes by linear, counted from the tensors that are stored packed, not from the cost model."""
        indices = self.space.normalised(self.space.indices(levels))
        silenced = self._silenced(indices)
        chains = {
            linear.name: self.candidate.chain(self.candidate.decisions_about(linear.name), indices) for linear in self.structure.linears
        }
        return {name: 0 if name in silenced else self.bank.stored_bytes(chain, name) for name, chain in chains.items()}

    def _silenced(self, indices: Sequence[int]) -> set[str]:
        """The linears that a level leaves out."""
        sites = {site.name: site for site in self.structure.sites}
        return {
            linear.name
            for decision, i in zip(self.space.decisions, indices, strict=True)
            if decision.branches[i] is None
            for linear in sites[decision.site].linears
        }

    def _quality(self, text: _Text, request: EvaluationRequest) -> list[Measurement]:
        """Measures the model as it stands."""
        if isinstance(text.targets, Tensor):
            return self._encoder_quality(text, request, text.targets)
        assert text.targets is not None
        return self._decoder_quality(text, request, text.targets)

    def _decoder_quality(self, text: _Text, request: EvaluationRequest, teachers: list[Teacher]) -> list[Measurement]:
        assert self._head is not None
        kl, losses = [], []
        start = self._start(text)
        for batch, rows, hidden in self._hidden(text, request.split, request.windows):
            hidden, teacher = hidden[:, start:], _first(teachers[batch], len(hidden))
            log_sum = log_normalisers(hidden, self._head)
            kl.append(token_kl(hidden, log_sum, teacher).mean(1))
            if request.split == "held_out":
                losses.append(next_token_losses(hidden, self._head, log_sum, text.passages.inputs[rows, start:]).mean(1))
        tokens = request.windows * (text.passages.length - start)
        result = [self._measured("kl", request, sample_of(torch.cat(kl)), tokens)]
        if losses:
            loss = sample_of(torch.cat(losses))
            if self._adapters:
                result.append(self._measured("loss", request, loss, tokens - request.windows))
            perplexity = math.exp(loss.mean)
            spread = None if loss.spread is None else perplexity * loss.spread
            result.append(self._measured("perplexity", request, Sample(perplexity, spread), tokens - request.windows))
        return result

    def _encoder_quality(self, text: _Text, request: EvaluationRequest, dense: Tensor) -> list[Measurement]:
        embeddings = self._embeddings(text, request.split, request.windows)
        damage = sample_of(cosine_damage(embeddings, dense[: request.windows]))
        result = [self._measured("damage_cosine", request, damage, request.windows)]
        scores, order = text.passages.scores, text.order
        if request.split == "held_out" and scores is not None and order is not None and request.windows == len(order):
            as_read = torch.empty_like(embeddings)
            as_read[order] = embeddings
            cosines = (as_read[0::2] * as_read[1::2]).sum(-1)
            result.append(self._measured("spearman", request, Sample(spearman(cosines.tolist(), scores.tolist()), None), len(scores)))
        if request.split == "held_out" and text.passages.labels is not None:
            hits = sample_of(self._classes(text, request.windows) == text.passages.labels[: request.windows])
            hardware = hardware_name(self.preparation.device)
            result.append(Measurement("accuracy:labels", hits.mean, "held_out", request.windows, hits.spread, hardware=hardware))
        return result

    @torch.no_grad()
    def _classes(self, text: _Text, images: int) -> Tensor:
        """The most likely label of each of the first images, int64 [images]."""
        batches = self._forward.batches(len(text.passages.inputs), text.passages.tokens)
        rows = torch.cat([text.passages.inputs[batch] for batch in batches])
        return torch.cat([self.model(pixel_values=fed_to(self.model, rows[batch])).logits.argmax(-1) for batch in batches])[:images]

    def _accuracies(self) -> list[Measurement]:
        """On the tasks, and where caches are decided about on passkeys, of the model as it stands."""
        hardware = hardware_name(self.preparation.device)
        result = [
            Measurement(f"accuracy:{found.task}", found.sample.mean, "held_out", found.documents, found.sample.spread, hardware=hardware)
            for found in ([] if self._tasks is None else self._tasks.measure())
        ]
        if self._passkeys is not None and self._head is not None:
            texts, tokens = self._passkeys.ids.shape
            found = self._passkeys.found(self.model, self._forward.body, self._head, self._forward.batches(texts, texts * tokens))
            result.append(Measurement("passkey_accuracy", found.mean, "held_out", texts, found.spread, hardware=hardware))
        return result

    @cached_property
    def _passkeys(self) -> Passkeys | None:
        """Made when finalists are judged; None where no cache is decided about, or windows are too short."""
        if not self.preparation.generates or self._head is None:
            return None
        return passkeys(load_tokenizer(self.preparation.facts), self._texts["held_out"].passages.inputs, self._seed)

    def _own_metrics(self, windows: int) -> list[Measurement]:
        """What the user's own functions say of the model as it stands."""
        if not self._metrics:
            return []
        self.candidate.set(self.candidate.indices, decoded=True)  # they may read parameters, and meet the model that would be exported
        facts, hardware = self.preparation.facts, hardware_name(self.preparation.device)
        tokenizer = None if facts.task == "vision" else load_tokenizer(facts)
        values = measured_by(self._metrics, self.model, tokenizer)
        return [Measurement(name, value, "held_out", windows, hardware=hardware, own=True) for name, value in values.items()]

    def _measured(self, name: str, request: EvaluationRequest, sample: Sample, tokens: int) -> Measurement:
        full = f"{name}_held_out" if request.split == "held_out" else name
        return Measurement(full, sample.mean, request.split, tokens, sample.spread, hardware=hardware_name(self.preparation.device))

    def _hidden(self, text: _Text, split: Split, windows: int) -> Iterator[tuple[int, slice, Tensor]]:
        """(batch number, rows, final hidden states) of the first `windows` windows, reusing kept block states on the search text."""
        passages = text.passages
        keep = split == "search" and self._forward.stride is not None
        for number, rows in enumerate(self._forward.batches(len(passages.inputs), passages.tokens)):
            if rows.start >= windows:
                break
            whole = rows.stop <= windows
            rows = slice(rows.start, min(rows.stop, windows))
            last = self._last_states.get(number) if keep and whole else None
            dense = self._dense_states.get(number) if keep and whole else None
            hidden, states = self._forward.run(
                passages.inputs,
                passages.mask,
                rows,
                kept=[dense, last[1] if last else None],
                first_changed=[self.candidate.first_difference(self._zeros), self.candidate.first_difference(last[0]) if last else 0],
            )
            if keep and whole:
                self._last_states[number] = (self.candidate.indices, states)
            yield number, rows, hidden

    def _embeddings(self, text: _Text, split: Split, windows: int) -> Tensor:
        mask = text.passages.mask
        states = self._hidden(text, split, windows)
        if mask is None:
            seen = _seen(self._forward.body)
            return torch.cat([pooled(hidden[:, seen], hidden.new_ones(hidden[:, seen].shape[:2])) for _, _, hidden in states])
        return torch.cat([pooled(hidden, remaining(self.model, mask[rows])[:, : hidden.shape[1]]) for _, rows, hidden in states])

    def _learn_targets(self, text: _Text, split: Split) -> None:
        """Runs the dense model over a split's whole text."""
        self.candidate.set(self._zeros)
        if self._head is None:
            text.targets = self._embeddings(text, split, len(text.passages.inputs))
        else:
            start, everything = self._start(text), self._hidden(text, split, len(text.passages.inputs))
            text.targets = [teacher_of(hidden[:, start:], self._head) for _, _, hidden in everything]
        if split == "search":
            self._dense_states = {number: states for number, (_, states) in self._last_states.items()}

    def _start(self, text: _Text) -> int:
        """The first token of each window that counts: what stands before is a prompt, where candidates differ in their caches."""
        return continuation_start(text.passages.length) if self.preparation.generates else 0

    def _sites_asking(self, statistics: Collection[str]) -> dict[Site, frozenset[str]]:
        """Which of these statistics knobs ask for, by sublayer."""
        knobs, sites = self.preparation.knobs, {site.name: site for site in self.structure.sites}
        found: dict[Site, frozenset[str]] = {}
        for decision in self.space.decisions:
            if needs := knobs[decision.knob].needs.intersection(statistics):
                found[sites[decision.site]] = found.get(sites[decision.site], frozenset()) | needs
        return found

    def _of_caches(self, text: Passages) -> dict[str, Tensor]:
        """Mean and covariance of the dense model's keys and values, head by head, where a knob needs them."""
        knobs, sites = self.preparation.knobs, {site.name: site for site in self.structure.sites}
        asking = dict.fromkeys(sites[d.site] for d in self.space.decisions if "covariance" in knobs[d.knob].needs)
        found: dict[str, Moments] = {site.name: Moments() for site in asking}
        if not asking:
            return {}
        with ExitStack() as stack:
            for kind in ("keys", "values"):
                names = {site.attention: site.name for site in asking if site.kind == kind}

                def watch(name: str, numbers: Tensor, names: Mapping[str, str] = names) -> None:
                    found[names[name]].add(numbers)

                stack.enter_context(watched(self.model, names, watch, f"kv_watch_{kind}"))
            self._run_dense(text)
        return {f"{name}.{key}": tensor for name, moments in found.items() for key, tensor in moments.tensors().items()}

    def _gradients(self, text: Passages) -> dict[str, Tensor]:
        """Of the linears that a knob needs it for."""
        knobs, sites = self.preparation.knobs, {site.name: site for site in self.structure.sites}
        asking = [sites[decision.site] for decision in self.space.decisions if "gradient" in knobs[decision.knob].needs]
        linears = dict.fromkeys(linear for site in asking for linear in site.linears)
        return gradients(self.model, linears, self._head, text.inputs, text.mask) if linears else {}

    def _build_bank(self, progress: Callable[[int, int], None]) -> None:
        entries = list(steps_of(self.structure, self.space, self.preparation.knobs))
        for done, step in enumerate(entries):
            self.bank.packed((step,))
            progress(done + 1, len(entries))

    def _weight(self, linear: Linear) -> Tensor:
        return dense_weight(self.model.get_parameter(linear.weight).data, linear)

    def _trained(self, setup: EvaluationSetup, progress: Callable[[int, int], None]) -> Adapters | None:
        """The adapters, in force in full; None where no knob trains."""
        knob, text = self.preparation.knobs.get(LoraRank.name), self.preparation.tuning
        if not isinstance(knob, LoraRank) or text is None:
            return None
        assert self._head is not None
        sites = {site.name: site for site in self.structure.sites}
        decided = [decision for decision in self.space.decisions if decision.knob == knob.name]
        return Adapters(
            self.model,
            self._head,
            {decision.site: sites[decision.site].linears for decision in decided},
            {decision.site: [int(level) for level in decision.levels] for decision in decided},
            text.to(self.preparation.device),
            Course(knob.tokens, knob.batch, knob.learning_rate, knob.optimizer, setup.seed),
            Path(setup.bank) / "adapters",
            self.preparation.facts.digest,
            progress,
        )

    def _find_head(self) -> nn.Linear | None:
        """The output head of a decoder.

        Raises:
            InputError: Logits are not the head applied to the last hidden state, so that KL could not be computed from it.
        """
        if self.preparation.facts.task != "decoder":
            return None
        ids = self._texts["search"].passages.inputs[:1, :8]
        head: nn.Linear = self.model.get_output_embeddings()
        with torch.no_grad():
            logits = self.model(input_ids=ids, use_cache=False).logits
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            if not torch.allclose(head(hidden), logits, rtol=1e-3, atol=1e-3):
                raise InputError(
                    f"model_type {self.preparation.facts.model_type!r} transforms the logits after its head; it is not supported yet"
                )
        return head

    @property
    def _zeros(self) -> tuple[int, ...]:
        return (0,) * len(self.space.decisions)


def _text(passages: Passages) -> _Text:
    """Sorts sentences by length within the first quarter and within the rest, so that batches hold little padding."""
    if passages.mask is None:
        return _Text(passages)
    lengths = passages.mask.sum(1)
    quarter = max(1, len(lengths) // 4)
    order = torch.cat([torch.argsort(lengths[:quarter], stable=True), quarter + torch.argsort(lengths[quarter:], stable=True)])
    return _Text(replace(passages, inputs=passages.inputs[order], mask=passages.mask[order]), order)


def _seen(body: Any) -> slice:
    """The tokens that stand for an image: the class token, where there is one, or all."""
    return slice(1) if getattr(getattr(body, "embeddings", None), "cls_token", None) is not None else slice(None)


def _first(teacher: Teacher, windows: int) -> Teacher:
    return Teacher(teacher.expected[:windows], None if teacher.bias is None else teacher.bias[:windows], teacher.score[:windows])
