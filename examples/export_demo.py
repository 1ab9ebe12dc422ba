"""Writes a trained demo model as package data, with its card: data, licences, loss, and what it can and cannot do.

python examples/export_demo.py WORK autoeff/models/demo        # WORK is the folder of train_demo.py
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import math
import platform
import random
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from train_demo import CONTEXT, RECIPES, RETRIEVAL_SHARE, TEXT_PACKAGES, kept_documents, passkey_document, trained_model
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from autoeff.evaluators.text import read_package

CARD = """# {model}

A small {family}-family decoder of Python source, for trying autoeff and for its tests. It is no coding assistant.

| | |
|---|---|
| architecture | {family}: {blocks} blocks, hidden {hidden}, {ffn}, {heads} query and {kv_heads} key/value heads of {head_dim}, byte-level BPE of 2,048{shared}, context 1,024, tied embeddings |
| parameters | {parameters} |
| stored as | float16 safetensors |
| training text | {files:,} Python files, {megabytes:.0f} MB, {corpus_tokens:,} tokens: the standard library and the packages pinned in `constraints.txt`, at most 3 MB each, less `{search}` and `{held_out}` |
| text digest | SHA-256 over the files' digests: `{text_sha256}` |
| mixed in | {retrieval:.0%} of the sequences: passages written twice, and a five-digit passkey hidden in code |
| training | {steps:,} steps of {step_tokens:,} tokens ({phases}), AdamW, peak learning rate {learning_rate:g}, warm-up / stable / linear decay{balance}, bfloat16 autocast on {cores}, seed {seed}; torch {torch}, Python {python} |
| final training loss | {loss:.3f} nats/token (mean of the last 200 steps, retrieval included) |

## Measured

| what | on | figure |
|---|---|---|
| perplexity, held out | `{held_out}` {held_out_version}, first {held_out_windows} windows of 1,024 | {held_out_perplexity:.3f} per token ({bits_per_byte:.3f} bits per byte) |
| perplexity, search text | `{search}` {search_version}, first {search_windows} windows of 1,024 | {search_perplexity:.3f} per token |
| passkey retrieval, greedy, all five digits right | {passkey_trials} texts of each length | {passkey} |
| copy of a passage, greedy, share of the second writing's tokens predicted right | {copy_trials} passages | {copy:.1%} |
| completions that `ast.parse` accepts | {parse_trials} prompts of held-out code (a file up to a `def` line), 96 tokens greedy, cut after the last whole line | {parse:.1%} |
| long held-out lines (40 characters or more) that also stand in the training text | `{held_out}` | {overlap:.1%} |
{routing}
## Texts

`texts.json` names the two installed packages whose source is read at run time: `{search}` for search, `{held_out}` for judging. Neither was trained on.
Another version of either runs too; its digest is recorded with the job.

## Licences of the sources

The training text is not shipped. It came from packages under these licences, as their metadata states them:
{licences}

The weights are released with autoeff under Apache-2.0.
"""


def windows_of(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], count: int) -> tuple[torch.Tensor, float]:
    """The first `count` windows of BOS + 1,023 ids, and the bytes of text per predicted token."""
    text = "\n".join(documents)[: count * CONTEXT * 8]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    step = CONTEXT - 1
    ids = torch.tensor(encoded["input_ids"][: count * step]).view(count, step)
    length = encoded["offset_mapping"][count * step - 1][1]
    return torch.cat([torch.zeros(count, 1, dtype=torch.long), ids], 1), len(text[:length].encode()) / (count * step)


@torch.no_grad()
def loss_of(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood in nats of the targets inside each window."""
    total = 0.0
    for row in ids.split(2):
        logits = model(input_ids=row, use_cache=False).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten(), reduction="sum"))
    return total / (ids.shape[0] * (ids.shape[1] - 1))


def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, tokens: int) -> str:
    """The greedy continuation alone."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])[:, -(CONTEXT - tokens) :]
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=1)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def passkey_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], tokens: int, trials: int
) -> float:
    rng = random.Random(tokens)
    right = 0
    for _ in range(trials):
        text, key = passkey_document(rng, rng.choice(documents) * 3, int(tokens * 2.4))
        right += complete(model, tokenizer, text, 6).strip().startswith(key)
    return right / trials


@torch.no_grad()
def copy_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], trials: int) -> float:
    rng, right, total = random.Random(7), 0, 0
    for _ in range(trials):
        words = re.findall(r"[A-Za-z_]{3,12}", rng.choice(documents))
        passage = "".join(f"{rng.choice(words)} = {rng.choice(words)}({rng.randrange(1000)})\n" for _ in range(8))
        ids = torch.tensor([tokenizer(f"# copy\n{passage}# again\n{passage}")["input_ids"]])
        start = ids.shape[1] - len(tokenizer(passage, add_special_tokens=False)["input_ids"])
        said = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].argmax(-1)
        right += int((said == ids[0, start:]).sum())
        total += ids.shape[1] - start
    return right / total


def parses(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def parse_share(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], trials: int) -> float:
    rng, good = random.Random(3), 0
    for _ in range(trials):
        document = rng.choice([d for d in documents if d.count("\ndef ") + d.count("\n    def ") > 2])
        lines = document.split("\n")
        ends = [i for i, line in enumerate(lines) if re.match(r"\s*def .*:$", line)]
        end = rng.choice(ends or [len(lines) - 1])
        prompt = "\n".join(lines[: end + 1])  # the newline belongs to the token of the next line's indentation
        said = complete(model, tokenizer, prompt, 96)
        good += parses(prompt + said[: said.rfind("\n") + 1])
    return good / trials


@torch.no_grad()
def expert_shares(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Share of the tokens of `ids` that choose each expert, [layers, experts]; rows sum to the experts chosen per token."""
    config, counts = model.config, []
    for row in ids.split(2):
        logits = model(input_ids=row, use_cache=False, output_router_logits=True).router_logits
        counts.append(
            torch.stack(
                [layer.topk(config.num_experts_per_tok).indices.flatten().bincount(minlength=config.num_local_experts) for layer in logits]
            )
        )
    return torch.stack(counts).sum(0) / ids.numel()


def described(config: PreTrainedConfig, parameters: int) -> dict[str, str]:
    """What the card says of an FFN and of how many parameters there are: of a mixture of experts, a token uses a part."""
    if not hasattr(config, "num_local_experts"):
        return {"ffn": f"FFN {config.intermediate_size}", "parameters": f"{parameters:,}", "balance": ""}
    experts, chosen = config.num_local_experts, config.num_experts_per_tok
    idle = config.num_hidden_layers * (experts - chosen) * 3 * config.hidden_size * config.intermediate_size
    return {
        "ffn": f"{experts} experts of FFN {config.intermediate_size}, {chosen} per token",
        "parameters": f"{parameters:,}, of which a token uses {parameters - idle:,}",
        "balance": f", load-balancing loss of each layer x {config.router_aux_loss_coef:g}",
    }


def overlap(documents: Sequence[str], training: Sequence[str]) -> float:
    known = {hash(line.strip()) for text in training for line in text.split("\n") if len(line.strip()) >= 40}
    lines = [line.strip() for text in documents for line in text.split("\n") if len(line.strip()) >= 40]
    return sum(hash(line) in known for line in lines) / len(lines)


def licence_of(package: str) -> str:
    if package == "python":
        return "PSF-2.0"
    metadata = importlib.metadata.metadata(package)
    stated = metadata.get("License-Expression") or metadata.get("License") or ""
    classifiers = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier") or [] if c.startswith("License ::")]
    return stated if 0 < len(stated) < 60 and "\n" not in stated else "; ".join(classifiers) or "see its files"


def main(
    work: Annotated[Path, typer.Argument(help="Folder of train_demo.py.")],
    folder: Annotated[Path, typer.Argument(help="Where the model goes.")],
    trials: Annotated[int, typer.Option(help="Texts per retrieval and completion figure.")] = 100,
) -> None:
    torch.manual_seed(0)
    corpus, training = json.loads((work / "corpus.json").read_text()), json.loads((work / "training.json").read_text())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer.json"), bos_token="<|bos|>", eos_token="<|eos|>", model_max_length=CONTEXT
    )
    recipe = RECIPES[training["model"]]
    model = trained_model(training["model"], work)
    model.config.dtype = torch.float16
    texts: dict[str, Any] = {split: read_package(name) for split, name in TEXT_PACKAGES.items()}
    with tempfile.TemporaryDirectory() as temporary:
        model.half().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for path in Path(temporary).iterdir():
            shutil.copyfile(path, folder / path.name)  # not the mode: temporary weights are private
    (folder / "texts.json").write_text(
        json.dumps(
            {"format": 1, **{k: {"package": TEXT_PACKAGES[k], "version": t.version, "sha256": t.sha256} for k, t in texts.items()}},
            indent=1,
        )
        + "\n"
    )
    model = recipe.family.from_pretrained(folder, dtype=torch.float32).eval()
    held_out, search = texts["held_out"].documents, texts["search"].documents
    held_ids, bytes_per_token = windows_of(tokenizer, held_out, 48)
    search_ids, _ = windows_of(tokenizer, search, 48)
    held_loss = loss_of(model, held_ids)
    trained, _ = kept_documents(work)
    passkeys = {tokens: passkey_accuracy(model, tokenizer, held_out, tokens, trials) for tokens in (128, 256, 512, 900)}
    routing = ""
    if hasattr(model.config, "num_local_experts"):
        shares = expert_shares(model, held_ids)
        routing = f"| share of the tokens that choose an expert, least and greatest over all layers ({model.config.num_experts_per_tok / shares.shape[1]:.1%} where all are equal) | `{TEXT_PACKAGES['held_out']}`, the same windows | {float(shares.min()):.1%} and {float(shares.max()):.1%} |\n"
    card = CARD.format(
        model=training["model"], family=model.config.model_type.capitalize(), blocks=model.config.num_hidden_layers,
        hidden=model.config.hidden_size, heads=model.config.num_attention_heads, kv_heads=model.config.num_key_value_heads,
        head_dim=model.config.head_dim, shared="" if recipe.tokenizer is None else f" (that of `{recipe.tokenizer.parent.name}`)",
        **described(model.config, sum(p.numel() for p in model.parameters())), routing=routing,
        step_tokens=recipe.step_tokens, cores="one CPU core" if training["threads"] == 1 else f"{training['threads']} CPU cores",
        files=corpus["files"], megabytes=corpus["bytes"] / 1e6, corpus_tokens=corpus["tokens"], text_sha256=corpus["sha256"],
        retrieval=RETRIEVAL_SHARE, steps=training["steps"], seed=training["seed"], learning_rate=training["peak_learning_rate"],
        phases=", ".join(f"{p.share:.0%} at length {p.length}" for p in recipe.phases), loss=training["final_loss"],
        torch=torch.__version__, python=platform.python_version(),
        search=TEXT_PACKAGES["search"], search_version=texts["search"].version, search_windows=len(search_ids),
        held_out=TEXT_PACKAGES["held_out"], held_out_version=texts["held_out"].version, held_out_windows=len(held_ids),
        held_out_perplexity=math.exp(held_loss), bits_per_byte=held_loss / math.log(2) / bytes_per_token,
        search_perplexity=math.exp(loss_of(model, search_ids)),
        passkey_trials=trials, passkey=", ".join(f"{share:.0%} at {tokens} tokens" for tokens, share in passkeys.items()),
        copy_trials=trials, copy=copy_accuracy(model, tokenizer, held_out, trials),
        parse_trials=trials, parse=parse_share(model, tokenizer, held_out, trials), overlap=overlap(held_out, trained),
        licences="\n".join(f"- {owner}: {licence_of(owner)}" for owner in sorted(corpus["owners"])),
    )  # fmt: skip
    (folder / "README.md").write_text(card)
    size = sum(path.stat().st_size for path in folder.iterdir())
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    print(f"{folder}: {size:,} bytes, model.safetensors {digest}, transformers {transformers.__version__}")


if __name__ == "__main__":
    typer.run(main)
