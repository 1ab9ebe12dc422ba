"""Memory, disk and time at the shapes of real models: predicted before a weight is loaded, beside what is then measured.

    python benchmarks/real_size.py [--shape 1b|8b] [--layers N] [--store separate|nested] [--candidates 5]

Writes a model of random bfloat16 weights, tensor by tensor, into a temporary directory, predicts what its search needs, and then has a
runner build the bank and evaluate random candidates, as a search does. Updates `benchmarks/results/real_size.json`.
"""

from __future__ import annotations

import datetime
import inspect
import json
import os
import platform
import random
import shutil
import struct
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import transformers
import typer

import autoeff
from autoeff.evaluators.preparation import Preparation, prepare
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup, TextSpec
from autoeff.evaluators.timing import predict_seconds
from autoeff.search.runner_process import RunnerProcess
from autoeff.search.settings import Settings
from autoeff.spaces.space import SpaceSpec

RESULTS = Path(__file__).parent / "results" / "real_size.json"
ROPE = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
LLAMA = {
    "vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_parameters": {**ROPE, "rope_theta": 500000.0}, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64, "tie_word_embeddings": True},
    "8b": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}


def write_model(folder: Path, settings: dict[str, Any]) -> None:
    """A model directory; one tensor at a time is in memory."""
    config = transformers.LlamaConfig(**settings, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in transformers.LlamaForCausalLM(config).named_parameters()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            size = torch.Size(shape).numel()
            if len(shape) == 1:
                values = torch.ones(size, dtype=torch.bfloat16)
            else:
                values = torch.empty(size, dtype=torch.bfloat16)
                for part in values.split(1 << 24):
                    part.normal_(0, 0.02, generator=generator)
            file.write(values.view(torch.uint8).numpy().data)
    demo = Path(autoeff.__file__).parent / "models" / "demo"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder)


def peak_resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def measured(setup: EvaluationSetup, preparation: Preparation, settings: Settings, candidates: int, folder: Path) -> dict[str, Any]:
    """Peak of the runner, bytes of the bank, seconds, from an ordinary runner process."""
    ticks: list[float] = []
    space, rng, windows = preparation.space, random.Random(0), len(preparation.passages["search"].inputs)
    started = time.perf_counter()
    with RunnerProcess(setup, settings, folder / "runner.log", lambda done, total: ticks.append(time.perf_counter())) as runner:
        runner.open()
        opened = time.perf_counter() - started
        bank = (ticks[-1] - ticks[0]) * len(ticks) / (len(ticks) - 1)
        assert runner.pid is not None
        after_bank = peak_resident(runner.pid)
        print(f"  opened in {opened:.0f} s, {bank:.0f} s of them for the bank; peak {after_bank / 1e9:.2f} GB", flush=True)
        found = []
        for _ in range(candidates):
            levels = space.at(space.sample(rng)).levels
            found.append(runner.evaluate(EvaluationRequest(levels, "search", windows)))
            print(f"  candidate: {found[-1].seconds:.1f} s, kl {found[-1].measurements[0].value:.4f}", flush=True)
        cpu = psutil.Process(runner.pid).cpu_times()
        memory = peak_resident(runner.pid)
    files = [path.stat().st_size for path in Path(setup.bank).rglob("*.safetensors")]
    return {
        "memory_bytes": memory, "bank_bytes": sum(files), "opening_s": opened - bank, "bank_s": bank,
        "evaluation_s": sum(item.seconds for item in found) / len(found), "evaluations_s": [item.seconds for item in found],
        "total_s": opened + sum(item.seconds for item in found), "cpu_s": cpu.user + cpu.system, "memory_after_bank_bytes": after_bank,
    }  # fmt: skip


def main(
    shape: Annotated[str, typer.Option(help="1b or 8b.")] = "1b",
    layers: Annotated[int | None, typer.Option(help="Blocks; default all that the shape has.")] = None,
    candidates: Annotated[int, typer.Option(help="Random configurations.")] = 5,
    windows: Annotated[int, typer.Option(help="Search windows.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens a window.")] = 256,
    store: Annotated[str, typer.Option(help="separate or nested.")] = "separate",
    quantizer: Annotated[str, typer.Option(help="As --set bits.quantizer.")] = "rtn",
    cap_gib: Annotated[float, typer.Option(help="Memory that may be held.")] = 16.0,
    folder: Annotated[Path | None, typer.Option(help="For model and bank; default a temporary one.")] = None,
) -> None:
    sizes = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        place = Path(temporary)
        (place / "model").mkdir()
        write_model(place / "model", sizes)
        os.sync()  # or the disk would still be busy with it while samples are timed
        (place / "text.txt").write_text(inspect.getsource(os) + inspect.getsource(tempfile))  # random weights do not mind
        data = TextSpec(str(place / "text.txt"), windows=windows, length=length)
        space = SpaceSpec({"bits": {"store": store, "quantizer": quantizer}, "skip": {}})
        cap = int(cap_gib * 2**30)
        setup = EvaluationSetup(str(place / "model"), data, None, space, 0, "cpu", str(place / "bank"), memory_bytes=cap)
        started = time.perf_counter()
        preparation = prepare(setup)
        seconds = predict_seconds(preparation, place / "bank")
        dry = time.perf_counter() - started
        footprint = preparation.footprint
        predicted = {
            "memory_bytes": footprint.memory_bytes, "bank_bytes": footprint.bank_bytes, "opening_s": seconds.opening, "bank_s": seconds.bank,
            "evaluation_s": seconds.evaluation, "total_s": seconds.search(candidates),
        }  # fmt: skip
        print(f"{shape}, {sizes['num_hidden_layers']} blocks: {dict(footprint.parts)}; predicted in {dry:.1f} s", flush=True)
        load_before = os.getloadavg()
        settings = Settings(home=place, memory_cap_bytes=cap, evaluation_timeout_s=3600)
        real = measured(setup, preparation, settings, candidates, place)
    print(f"{'':14s} {'predicted':>14s} {'measured':>14s}  ratio")
    for name, value in predicted.items():
        print(f"{name:14s} {value:14.4g} {real[name]:14.4g} {value / real[name]:6.2f}")
    result = {
        "date": datetime.date.today().isoformat(), "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
        "parameters": preparation.facts.parameters, "blocks": sizes["num_hidden_layers"], "search_tokens": windows * length,
        "candidates": candidates, "store": store, "quantizer": quantizer, "cap_bytes": cap, "dry_run_s": dry,
        "parts": dict(footprint.parts), "predicted": predicted, "measured": real,
    }  # fmt: skip
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[f"{shape}, {sizes['num_hidden_layers']} blocks, {store} {quantizer}"] = result
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
