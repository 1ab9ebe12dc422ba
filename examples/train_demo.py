"""Trains a bundled model: `demo`, a small Llama decoder of Python source, or `demo-moe`, a Mixtral one with the same tokenizer.

The training text is the standard library and the Python packages that `constraints.txt` pins, less the two whose
text is read at run time for search and for judging (`TEXT_PACKAGES`). It is read from this interpreter's own
installation and never shipped. A share of the sequences are copy and passkey tasks, so that the model has something
to retrieve over its context.

    python examples/train_demo.py --model demo --work WORK             # resumes from the last checkpoint in WORK
    python examples/export_demo.py WORK autoeff/models/demo
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import random
import re
import shutil
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

ROOT = Path(__file__).resolve().parents[1]
TEXT_PACKAGES = {"search": "alembic", "held_out": "optuna"}
VOCABULARY = 2048
CONTEXT = 1024
PACKAGE_CAP_BYTES = 3_000_000  # so that torch, sympy and transformers do not drown the other sixty packages
FILE_RANGE_BYTES = (400, 60_000)  # below: empty __init__ files; above: tables and generated code
RETRIEVAL_SHARE = 0.15


@dataclass(frozen=True)
class Phase:
    """A stretch of training at one sequence length (short sequences first: attention is quadratic on a CPU)."""

    share: float
    length: int
    batch: int


@dataclass(frozen=True)
class Recipe:
    """What tells one bundled model from another.

    Attributes:
        family: The model class, of which `config` describes one.
        phases: Every batch of which holds equally many tokens.
        steps: Optimiser steps of a training that is not told how many.
        tokenizer: Of another bundled model, to be shared; None trains one.
    """

    family: type[PreTrainedModel]
    config: PreTrainedConfig
    phases: tuple[Phase, ...]
    steps: int
    tokenizer: Path | None = None

    @property
    def step_tokens(self) -> int:
        return self.phases[0].length * self.phases[0].batch

    def make_model(self) -> PreTrainedModel:
        return self.family(self.config)

    def phase_at(self, step: int, steps: int) -> Phase:
        done = 0.0
        for phase in self.phases:
            done += phase.share
            if step < done * steps:
                return phase
        return self.phases[-1]


COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
RECIPES = {
    "demo": Recipe(
        LlamaForCausalLM,
        LlamaConfig(hidden_size=192, intermediate_size=448, num_hidden_layers=8, num_attention_heads=6, **COMMON),
        phases=(Phase(0.75, 256, 32), Phase(0.25, CONTEXT, 8)),
        steps=9000,
    ),
    "demo-moe": Recipe(
        MixtralForCausalLM,
        MixtralConfig(
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_local_experts=8,
            num_experts_per_tok=2,
            router_aux_loss_coef=0.02,
            experts_implementation="eager",  # on one core grouped_mm is as fast, batched_mm twenty times slower
            **COMMON,
        ),
        phases=(Phase(0.75, 256, 8), Phase(0.25, CONTEXT, 2)),  # small batches: a short training has more use for steps
        steps=1232,
        tokenizer=ROOT / "autoeff" / "models" / "demo" / "tokenizer.json",
    ),
}


@dataclass(frozen=True)
class Training:
    steps: int
    model: str = "demo"
    threads: int = 2
    seed: int = 0
    peak_learning_rate: float = 3e-3
    warmup_steps: int = 200
    decay_share: float = 0.35
    weight_decay: float = 0.05
    clip: float = 1.0

    def learning_rate(self, step: int) -> float:
        """Warm-up, stable, linear decay to a fiftieth (WSD, arXiv:2405.18392)."""
        decay_from = int(self.steps * (1 - self.decay_share))
        if step < self.warmup_steps:
            return self.peak_learning_rate * (step + 1) / self.warmup_steps
        if step < decay_from:
            return self.peak_learning_rate
        left = (self.steps - step) / max(1, self.steps - decay_from)
        return self.peak_learning_rate * max(0.02, left)


def training_files() -> list[tuple[str, Path]]:
    """Python files to train on as (owner, path), in an order fixed by their relative names."""
    files: list[tuple[str, Path]] = []
    library = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3", "ensurepip", "encodings", "__pycache__"}
    for path in sorted(library.rglob("*.py")):
        if not skip & set(path.relative_to(library).parts[:-1]):
            files.append(("python", path))
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name = line.split("==")[0].strip()
        if "==" not in line or name.lower() in TEXT_PACKAGES.values():
            continue
        try:
            listed = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        own = [Path(str(f.locate())) for f in listed if str(f).endswith(".py") and "_vendor" not in str(f) and ".." not in str(f)]
        own.sort(key=lambda p: hashlib.sha256(str(p.relative_to(sysconfig.get_path("purelib"))).encode()).hexdigest())
        used = 0
        for path in own:
            size = path.stat().st_size if path.is_file() else 0
            if FILE_RANGE_BYTES[0] <= size <= FILE_RANGE_BYTES[1] and used + size <= PACKAGE_CAP_BYTES:
                files.append((name, path))
                used += size
    return [(o, p) for o, p in files if FILE_RANGE_BYTES[0] <= p.stat().st_size <= FILE_RANGE_BYTES[1]]


def training_documents() -> tuple[list[str], dict[str, object]]:
    """Texts of the training files without repetitions, and what must be said of them."""
    seen: set[bytes] = set()
    documents, owners = [], {}
    digest = hashlib.sha256()
    for owner, path in training_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        text = re.sub(r"^(#[^\n]*\n)+", "", text).strip() + "\n"  # licence headers teach nothing
        key = hashlib.sha256(text.encode()).digest()
        if key in seen or not text.isascii():
            continue
        seen.add(key)
        digest.update(key)
        documents.append(text)
        owners[owner] = owners.get(owner, 0) + len(text)
    return documents, {"bytes": sum(owners.values()), "files": len(documents), "sha256": digest.hexdigest(), "owners": owners}


def kept_documents(work: Path) -> tuple[list[str], dict[str, object]]:
    """`training_documents` as they were when training in `work` began: a package installed since must not change what is resumed."""
    path = work / "documents.json"
    if not path.exists():
        path.write_text(json.dumps(training_documents()))
    documents, facts = json.loads(path.read_text())
    return documents, facts


def train_tokenizer(documents: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(random.Random(0).sample(documents, min(2500, len(documents))), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    return tokenizer


def passkey_document(rng: random.Random, filler: str, characters: int) -> tuple[str, str]:
    """A text of about `characters` with a key hidden in it, ending where the key must be said; and the key."""
    key = "".join(rng.choices("0123456789", k=5))
    start = rng.randrange(max(1, len(filler) - characters))
    body = filler[start : start + characters].split("\n")
    body.insert(rng.randrange(max(1, len(body) - 1)), f"PASSKEY = {key}")
    return "\n".join(body) + "\nassert PASSKEY == ", key


def retrieval_document(rng: random.Random, filler: str, characters: int) -> str:
    """Passkey, or a passage of random words written twice."""
    if rng.random() < 0.5:
        text, key = passkey_document(rng, filler, int(characters * rng.uniform(0.1, 0.9)))
        return f"{text}{key}\n"
    words = re.findall(r"[A-Za-z_]{3,12}", filler[:20_000]) or ["none"]
    passage = "".join(
        f"{rng.choice(words)} = {rng.choice(words)}({rng.randrange(1000)})\n" for _ in range(rng.randint(2, max(3, characters // 90)))
    )
    return f"# copy\n{passage}# again\n{passage}"


class Batches:
    """Seeded sequences of ids: windows of the corpus, a share of them replaced by retrieval tasks."""

    def __init__(self, tokenizer: Tokenizer, documents: list[str], seed: int, work: Path) -> None:
        self.tokenizer, self.documents, self.seed = tokenizer, documents, seed
        cache = work / "corpus.npy"
        if not cache.exists():
            order = random.Random(seed).sample(documents, len(documents))
            ids = [i for e in tokenizer.encode_batch(order) for i in [*e.ids, 1]]
            np.save(cache, np.array(ids, dtype=np.uint16))
        self.ids = np.load(cache)

    def __call__(self, step: int, phase: Phase) -> torch.Tensor:
        rng = random.Random(self.seed * 1_000_003 + step)
        rows = []
        for _ in range(phase.batch):
            if rng.random() < RETRIEVAL_SHARE:
                row: list[int] = []
                while len(row) < phase.length:
                    text = retrieval_document(rng, rng.choice(self.documents), int(phase.length * 2.4))
                    row += [*self.tokenizer.encode(text).ids, 1]
                rows.append(torch.tensor(row[: phase.length]))
            else:
                start = rng.randrange(len(self.ids) - phase.length)
                rows.append(torch.from_numpy(self.ids[start : start + phase.length].astype(np.int64)))
        return torch.stack(rows)


def trained_model(name: str, work: Path) -> PreTrainedModel:
    """The model of the last checkpoint in `work`."""
    model = RECIPES[name].make_model()
    model.load_state_dict(torch.load(work / "checkpoint.pt", weights_only=True)["model"])
    return model


def balance_loss(config: PreTrainedConfig, router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Mean over layers of the load-balancing loss: 1 per chosen expert where all are chosen equally often (arXiv:2101.03961).

    transformers takes it over all layers at once, where one layer's dead expert hides behind another layer's busy one.
    """
    experts, chosen = config.num_local_experts, config.num_experts_per_tok
    return torch.stack([load_balancing_loss_func((logits,), experts, chosen) for logits in router_logits]).mean()


def train(training: Training, work: Path) -> PreTrainedModel:
    """Trains to `training.steps`, from the last checkpoint in `work` where there is one."""
    torch.set_num_threads(training.threads)
    recipe = RECIPES[training.model]
    work.mkdir(parents=True, exist_ok=True)
    documents, facts = kept_documents(work)
    if recipe.tokenizer is not None:
        shutil.copy(recipe.tokenizer, work / "tokenizer.json")
    elif not (work / "tokenizer.json").exists():
        train_tokenizer(documents).save(str(work / "tokenizer.json"))
    batches = Batches(Tokenizer.from_file(str(work / "tokenizer.json")), documents, training.seed, work)
    (work / "corpus.json").write_text(json.dumps({**facts, "tokens": len(batches.ids)}, indent=1))
    torch.manual_seed(training.seed)
    model = recipe.make_model()
    routing = {"output_router_logits": True} if hasattr(model.config, "router_aux_loss_coef") else {}
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": training.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=training.peak_learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    checkpoint, first = work / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters; {len(batches.ids):,} corpus tokens in {len(documents):,} files; from step {first}", flush=True)
    model.train()
    since, tokens, losses = time.time(), 0, []
    for step in range(first, training.steps):
        ids = batches(step, recipe.phase_at(step, training.steps))
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate(step)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(input_ids=ids, use_cache=False, **routing)
        logits = output.logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY).float(), ids[:, 1:].reshape(-1))
        optimizer.zero_grad()
        if routing:
            (loss + model.config.router_aux_loss_coef * balance_loss(model.config, output.router_logits)).backward()
        else:
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        losses.append(loss.item())
        tokens += ids.numel()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} loss {sum(losses[-50:]) / 50:.4f} tokens/s {tokens / (time.time() - since):.0f}", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == training.steps:
            partial = checkpoint.with_suffix(".tmp")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, partial)
            partial.rename(checkpoint)
    (work / "training.json").write_text(
        json.dumps({**asdict(training), "final_loss": sum(losses[-200:]) / max(1, len(losses[-200:]))}, indent=1)
    )
    return model


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(RECIPES)}.")] = "demo",
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; by default as many as the model's recipe says.")] = None,
    work: Annotated[Path | None, typer.Option(help="Where checkpoints and the tokenised corpus go; by default train-MODEL.")] = None,
    threads: Annotated[int, typer.Option()] = 2,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    if model not in RECIPES:
        raise typer.BadParameter(f"{model!r} is no bundled model; expected {' or '.join(RECIPES)}", param_hint="--model")
    train(Training(steps or RECIPES[model].steps, model, threads, seed), work or Path(f"train-{model}"))


if __name__ == "__main__":
    sys.exit(typer.run(main))
