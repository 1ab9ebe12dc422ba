"""The bundled models: complete, small, as their cards say, and fit for a search."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from autoeff.evaluators.loading import inspect_model, load_model, load_tokenizer, resolve_model, skeleton
from autoeff.evaluators.sources import read_package
from autoeff.search.job import JobSpec
from autoeff.search.run import start
from autoeff.search.settings import Settings
from autoeff.spaces.sites import find_structure

BUNDLED = ("demo", "demo-moe")


def row_of(card: str, start: str) -> str:
    """The figures of the card's row that begins with `start`."""
    (line,) = (line for line in card.splitlines() if line.startswith(f"| {start}"))
    return line.split("|")[-2].strip()


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_model_is_complete_small_and_16_bit(name: str) -> None:
    folder = resolve_model(name)
    names = {path.name for path in folder.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "texts.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 7_000_000
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118 (no mapping)
        assert all(bool(file.get_tensor(key).isfinite().all()) for key in file.keys())  # noqa: SIM118
    texts = json.loads((folder / "texts.json").read_text())
    assert (texts["search"]["package"], texts["held_out"]["package"]) == ("alembic", "optuna")


@pytest.mark.parametrize("name", BUNDLED)
def test_the_card_states_the_model_and_its_sources(name: str) -> None:
    facts = inspect_model(resolve_model(name))
    card = (facts.path / "README.md").read_text()
    assert card.startswith(f"# {name}\n")
    assert f"{facts.parameters:,}" in row_of(card, "parameters")
    licences = dict(
        line.removeprefix("- ").split(": ", 1) for line in card.partition("## Licences")[2].splitlines() if line.startswith("- ")
    )
    assert {"python", "torch", "sqlalchemy"} <= set(licences)
    assert not {"alembic", "optuna"} & set(licences)
    for figure in (
        "final training loss",
        "passkey retrieval",
        "copy of a passage",
        "completions that `ast.parse`",
        "perplexity, search text",
    ):
        assert re.match(r"\d", row_of(card, figure)), figure


def test_bundled_models_share_their_tokenizer() -> None:
    one, other = (resolve_model(name) for name in BUNDLED)
    assert (one / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()


def test_demo_moe_has_one_site_for_all_experts_of_a_block() -> None:
    facts = inspect_model(resolve_model("demo-moe"))
    structure = find_structure(skeleton(facts))
    assert facts.model_type == "mixtral"
    assert (facts.config["num_local_experts"], facts.config["num_experts_per_tok"]) == (8, 2)
    assert len(structure.blocks) >= 4
    for block in range(len(structure.blocks)):
        mixed = [site for site in structure.sites if site.kind == "linears" and site.block == block and site.linears[0].experts > 1]
        assert [linear.name.rpartition(".")[2] for site in mixed for linear in site.linears] == ["gate_up_proj", "down_proj"]
        assert all((linear.experts, linear.experts_per_token) == (8, 2) for site in mixed for linear in site.linears)


def test_demo_moe_has_no_dead_expert() -> None:
    facts = inspect_model(resolve_model("demo-moe"))
    model, tokenizer = load_model(facts, torch.device("cpu")), load_tokenizer(facts)
    text = "\n".join(read_package("optuna").documents)[:20_000]
    ids = torch.tensor([tokenizer(text, verbose=False)["input_ids"][:1024]])
    with torch.no_grad():
        layers = model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
    for logits in layers:
        chosen = logits.topk(2).indices.flatten().bincount(minlength=8) / ids.numel()
        assert float(chosen.min()) > 0.02  # a quarter where all are equal


@pytest.mark.parametrize("name", [pytest.param("demo", marks=pytest.mark.slow), "demo-moe"])
def test_the_cards_perplexity_is_what_is_measured(name: str) -> None:
    facts = inspect_model(resolve_model(name))
    texts = json.loads((facts.path / "texts.json").read_text())
    package = read_package("optuna")
    if package.sha256 != texts["held_out"]["sha256"]:
        pytest.skip(f"the card's figure is of optuna {texts['held_out']['version']}, this is {package.version}")
    model, tokenizer = load_model(facts, torch.device("cpu")), load_tokenizer(facts)
    card = (facts.path / "README.md").read_text()
    windows = int(re.search(r"first (\d+) windows of 1,024", card).group(1))  # type: ignore[union-attr]
    ids = torch.tensor(tokenizer("\n".join(package.documents)[: windows * 8 * 1024], add_special_tokens=False, verbose=False)["input_ids"])
    losses = []
    with torch.no_grad():
        for row in ids[: windows * 1023].view(windows, 1023):
            window = torch.cat([torch.tensor([tokenizer.bos_token_id]), row])
            logits = model(input_ids=window[None], use_cache=False).logits[0]
            losses.append(float(torch.nn.functional.cross_entropy(logits[:-1], window[1:])))
    stated = float(row_of(card, "perplexity, held out").split()[0])
    assert math.exp(sum(losses) / windows) == pytest.approx(stated, rel=1e-3)


@pytest.mark.slow
def test_demo_moe_is_searched_on_its_own_text(tmp_path: Path) -> None:
    spec = JobSpec.parse(
        {
            "model": "demo-moe",
            "data": {"windows": 2, "length": 64},
            "eval_data": {"windows": 2, "length": 64},
            "knobs": ["bits", "skip"],
            "space": {"levels": {"*:bits": [16, 4, 2]}},
            "limits": ["linear_bytes<=0.3x"],
            "budget": {"trials": 34},
        }
    )
    result = start(spec, tmp_path / "run", Settings(home=tmp_path / "home", memory_cap_bytes=3 << 30))
    assert result.exit_code == 0
    assert result.found is not None
    rows = {row["role"]: row for row in result.summary["rows"]}
    dense, found = rows["dense"], rows["found"]
    assert found["feasible"]
    assert found["costs"]["linear_bytes"] <= 0.3 * dense["costs"]["linear_bytes"]
    experts = 6 * 8 * 3 * 128 * 128
    attention = 6 * 2 * (128 * 128 + 128 * 64)
    assert dense["costs"]["linear_bytes"] == 2 * (experts + attention)
