"""Generates the reference pages while the documentation is built, so that none of them can be stale.

A hook of mkdocs: the job from `JobSpec`, a page for every knob from its docstring and its levels on the bundled model, the lists of
quantizers, criteria, samplers and export formats, tables of benchmark results where a page says `<!-- results: NAME -->`, and the two
pages that stand at the root of the repository.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from autoeff.flags import FIELDS
from autoeff.search.exporter import known_exporters
from autoeff.search.job import JobSpec
from autoeff.search.sampler import known_samplers
from autoeff.search.seed import known_seeds
from autoeff.search.settings import Settings
from autoeff.spaces.criterion import known_criteria
from autoeff.spaces.knob import Knob, known_knobs
from autoeff.spaces.measurements import MEASURES
from autoeff.spaces.quantizer import known_quantizers
from autoeff.spaces.sites import Structure

ROOT = Path(__file__).resolve().parents[1]
SPELLED = {"settings": "set"}
"""Flags whose parameter has another name."""


def part_of(kind: Any) -> type[BaseModel] | None:
    """The model that a field holds, where it is a section of its own."""
    return next((item for item in (kind, *get_args(kind)) if isinstance(item, type) and issubclass(item, BaseModel)), None)


PARTS: Mapping[str, type[BaseModel]] = {
    name: part
    for name, field in JobSpec.model_fields.items()
    if name not in ("eval_data", "tune_data") and (part := part_of(field.annotation))
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fills in the pages of the knobs; without `plugins`, the site knows those of this checkout only."""
    for item in config.nav or []:
        if "Knobs" in item:
            item["Knobs"] = ["knobs/index.md", *({name: f"knobs/{name}.md"} for name in sorted(built_in(known_knobs())))]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    knobs = built_in(known_knobs())
    pages = {
        "reference/job.md": job_page(),
        "reference/methods.md": methods_page(),
        "knobs/index.md": knobs_page(knobs),
        **{f"knobs/{name}.md": knob_page(knob) for name, knob in knobs.items()},
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text().replace("(docs/", "("),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return re.sub(r"<!-- results: (\w+) -->", lambda match: RESULTS[match[1]](), markdown)


# the job


def job_page() -> str:
    """Every field of a job with its flag, the settings of a machine, and what can be measured."""
    parts = [
        "# Configuration",
        "Everything a search depends on is one job. A flag, a field of a YAML or JSON file (`--config job.yaml`, flags win over it) and an "
        "argument of `autoeff.run_search` say the same thing. `autoeff search … --dry-run` prints the whole job as YAML.",
        "## The job",
        field_table(JobSpec, ""),
    ]
    for name, part in PARTS.items():
        title = "`data`, `eval_data` and `tune_data`" if name == "data" else f"`{name}`"
        parts += [f"## {title}", part.__doc__ or "", field_table(part, f"{name}.")]
    parts += [
        "## The machine",
        "Variables of the environment; they belong to the machine, not to a job.",
        table(
            ["variable", "default", "meaning"],
            [[f"`AUTOEFF_{name.upper()}`", default_of(field), field.description] for name, field in Settings.model_fields.items()],
        ),
        "## Measurements",
        "The names that stand in results. Limits and the objectives after the first take a `cost`; see [which limit](../limits.md).",
        table(["name", "unit", "kind", "meaning"], [[f"`{m.name}`", m.unit, m.kind, m.meaning] for m in MEASURES.values()]),
    ]
    return page_of(*parts)


def field_table(model: type[BaseModel], prefix: str) -> str:
    rows = []
    for name, field in model.model_fields.items():
        flags = ", ".join(f"`{flag}`" for flag in flags_of(prefix + name))
        section = "data" if name in ("eval_data", "tune_data") else name
        kind = (
            f"see [below](#{'data-eval_data-and-tune_data' if section == 'data' else section})"
            if section in PARTS
            else f"`{type_name(field.annotation)}`"
        )
        default = "" if section in PARTS else default_of(field)
        rows.append([f"`{prefix}{name}`", flags, kind, default, field.description])
    return table(["field", "flag", "type", "default", "meaning"], rows)


def flags_of(path: str) -> list[str]:
    """Of `data` fields those of held-out text and of tuning text too."""
    paths = {path, *(f"{text}_{path}" for text in ("eval", "tune") if path.startswith("data."))}
    found = [name for name, target in FIELDS.items() if target in paths]
    return ["MODEL" if name == "model" else "--" + SPELLED.get(name, name).replace("_", "-") for name in found]


def type_name(kind: Any) -> str:
    """A type as people write it."""
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"list of {type_name(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return "mapping"
    if args := get_args(kind):
        return " or ".join(type_name(arg) for arg in args if arg is not type(None))
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "Path": "path"}.get(kind.__name__, kind.__name__)


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    default = field.default if field.default_factory is None else field.default_factory()  # type: ignore[call-arg]
    if default is None:
        return ""
    if isinstance(default, Path):
        return f"`{str(default).replace(str(Path.home()), '~')}`"
    return f"`{json.dumps(default)}`"


# knobs and what they call


@dataclass(frozen=True)
class Described:
    """A Google docstring, taken apart.

    Attributes:
        text: All that stands before the attributes.
        attributes: Meaning by name.
        source: The paper.
    """

    text: str
    attributes: Mapping[str, str]
    source: str


def described(item: type) -> Described:
    """The docstring of a class; attributes are those of its bases too."""
    text, source = "", ""
    attributes: dict[str, str] = {}
    for base in reversed(inspect.getmro(item)):
        doc = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        body, _, rest = doc.partition("\n\nAttributes:\n")
        for match in re.finditer(r"^    (\w+): (.*(?:\n {8}.*)*)", rest, re.MULTILINE):
            attributes[match[1]] = " ".join(match[2].split())
        if base is item:
            found = re.search(r"^Source: (.*(?:\n.+)*)", doc, re.MULTILINE)
            source = " ".join(found[1].split()) if found else ""
            text = re.sub(r"\n*^Source: .*(?:\n.+)*", "", body, flags=re.MULTILINE)
    return Described(text.strip(), attributes, linked(source))


def linked(source: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", source)


def built_in(items: Mapping[str, type[Any]]) -> dict[str, type[Any]]:
    """Without those that other packages on this machine bring."""
    return {name: item for name, item in sorted(items.items()) if item.__module__.startswith("autoeff.")}


def settings_table(item: type, prefix: str) -> str:
    meanings = described(item).attributes
    rows = [[f"`{prefix}{f.name}`", f"`{json.dumps(f.default)}`", meanings.get(f.name, "")] for f in fields(item)]
    return table(["setting", "default", "meaning"], rows) if rows else "It has no settings."


def knobs_page(knobs: Mapping[str, type[Knob]]) -> str:
    rows = [[f"[`{name}`]({name}.md)", described(knob).text.split("\n\n")[0], knob.kind] for name, knob in knobs.items()]
    return page_of(
        "# Knobs",
        "A knob is a kind of decision. `--knobs bits,skip,width` searches several of them in one space, under one limit; "
        "`--set KNOB.NAME=VALUE` changes a setting.",
        table(["knob", "what it does", "kind"], rows),
        "At one site knobs act in the order of their kinds: structure, weight, cache. What a later one costs is counted on what the "
        "earlier ones have left: the bits of a narrowed FFN are paid for the neurons that are kept.",
        "A knob of your own is one file: [Adding a knob](../adding_a_knob.md).",
    )


def knob_page(knob: type[Knob]) -> str:
    """From the docstring, and from the sites and levels that the knob has in the bundled model."""
    made, about, name = knob(), described(knob), knob.name
    model = next((model for model in ("demo", "demo-moe") if made.sites(demo_structure(model))), None)
    sites = made.sites(encoder_structure() if model is None else demo_structure(model))
    first = sites[0]
    where = "an encoder of the shapes of BERT" if model is None else f"the bundled model `{model}`"
    of_block = f"*.{first.block}:{name}" if first.kind == "block" else f"*.{first.block}.*:{name}"
    places = [
        [f"`{site.name.split(f'.{site.block}.')[-1]}`", ", ".join(f"`{level}`" for level in made.levels(site))]
        for site in sites
        if site.block == first.block
    ]
    two = ",".join(map(str, made.levels(first)[:2]))
    parts = [
        f"# `{name}`",
        about.text,
        "## Levels",
        f"The first is the dense model. On {where} there are {len(sites)} decisions; those of block {first.block}:",
        table(["place", "levels"], places),
        f"A decision is written `{first.name}:{name}`. `--levels '*:{name}={two}'` leaves fewer levels; "
        f"`--exclude '{of_block}'` keeps a block dense.",
        "## Settings",
        settings_table(knob, f"{name}."),
    ]
    if chosen := [f"`{f.name}`" for f in fields(knob) if f.name in ("quantizer", "criterion")]:
        parts.append(f"What {' and '.join(chosen)} may be: [methods](../reference/methods.md).")
    kernel = next((k for level in made.levels(first) if (k := made.kernel(first, level))), None)
    facts = [
        f"Kind: {knob.kind}.",
        f"With its default settings it reads {texts(made.needs)}." if made.needs else "With its default settings it reads no text.",
        f"Kernel: `kernels/{kernel}.py`." if kernel else "No kernel of its own.",
        f"One level everywhere is {'a baseline of every search' if knob.uniform else 'no baseline: nobody would use it'}.",
    ]
    if knob.conflicts:
        facts.append(f"Not together with {', '.join(sorted(knob.conflicts))}.")
    return page_of(*parts, "## Facts", "\n".join(f"- {fact}" for fact in facts), f"Source: {about.source}")


@cache
def encoder_structure() -> Structure:
    """For knobs that no bundled model has a place for."""
    import torch
    from transformers import BertConfig, BertModel

    from autoeff.spaces.sites import find_structure

    with torch.device("meta"):
        return find_structure(BertModel(BertConfig())).with_blocks()


def texts(needs: Iterable[str]) -> str:
    return f"`{'`, `'.join(sorted(needs))}`, collected in a pass of the dense model over the search text"


def page_of(*parts: str) -> str:
    return "\n\n".join(parts) + "\n"


@cache
def demo_structure(name: str = "demo") -> Structure:
    from autoeff.evaluators.loading import inspect_model, resolve_model, skeleton
    from autoeff.spaces.couplings import coupled
    from autoeff.spaces.sites import find_structure

    facts = inspect_model(resolve_model(name))
    model = skeleton(facts)
    return coupled(model, find_structure(model))[0].with_blocks().at_context(facts.context or 0)


def methods_page() -> str:
    parts = ["# Quantizers, criteria, samplers, rules, formats"]
    for title, use, known in (
        ("Quantizers", "Chosen with `--set bits.quantizer=NAME`.", known_quantizers()),
        (
            "Criteria",
            "Chosen with `--set sparsity.criterion=NAME`; those that score weights also with `--set width.criterion=NAME` and "
            "`--set heads.criterion=NAME`.",
            known_criteria(),
        ),
        ("Samplers", "Chosen with `--sampler NAME`.", known_samplers()),
        (
            "Rules",
            "Published rules that share out the budget of a knob among the layers. Those whose knob is searched are evaluated as guests, "
            "at the budget of the limit; `--seeds NAME,NAME` chooses some, `--seeds none` none.",
            known_seeds(),
        ),
        (
            "Export formats",
            "Chosen with `autoeff export RUN TRIAL DIR --format NAME`; see [which runtime loads what](../runtimes.md).",
            known_exporters(),
        ),
    ):
        parts += [f"## {title}", use]
        for name, item in built_in(known).items():
            about = described(item)
            needs = getattr(item, "needs", ())
            parts += [f"### `{name}`", about.text]
            parts += [f"It reads {texts(needs)}."] if needs else []
            parts += [f"Source: {about.source}"] if about.source else []
    return page_of(*parts)


# benchmark results


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def encoder_front() -> str:
    """For each uniform width the best configuration of the front that is no larger."""
    found = results("encoder_front")
    front = [row for row in found["rows"] if row["role"] == "front"]
    rows = []
    for row in sorted((row for row in found["rows"] if row["role"] == "uniform"), key=lambda row: -row["linear_bytes"]):
        best = min((f for f in front if f["linear_bytes"] <= row["linear_bytes"]), key=lambda f: f["damage"])
        rows.append(
            [
                f"`{row['label']}`", MEASURES["linear_bytes"].text(row["linear_bytes"]),
                *(f"{r['damage_held_out']:.3g}" for r in (row, best)),
                less(row["damage_held_out"], best["damage_held_out"]), *(f"{r['spearman']:.4f}" for r in (row, best)),
            ]
        )  # fmt: skip
    columns = ["uniform", "`linear_bytes`", "damage, uniform", "damage, searched", "", "Spearman, uniform", "Spearman, searched"]
    return table(columns, rows)


def search_quality() -> str:
    """Means over seeds, by model and knobs."""
    found = results("search_quality")

    def key(row: Mapping[str, Any]) -> tuple[str, str, int]:
        return row["model"], row["knobs"], row["width"]

    rows = []
    for (model, knobs, width), group in groupby(sorted(found["rows"], key=key), key=key):
        runs = list(group)
        means = {role: sum(run[role]["held_out"] for run in runs) / len(runs) for role in ("uniform", "random", "additive", "found")}
        rows.append(
            [
                model,
                f"`{knobs}`",
                f"of `bits={width}`",
                *(f"{value:.3g}" for value in means.values()),
                less(means["uniform"], means["found"]),
            ]
        )
    return table(["model", "knobs", "bytes", "uniform", "best of random", "additive optimum", "found", "found against uniform"], rows)


def real_size() -> str:
    """Each run of a shape, predicted and measured."""
    rows = []
    for name, run in results("real_size").items():
        for what, unit in (("memory_bytes", "GB"), ("bank_bytes", "GB"), ("bank_s", "s"), ("evaluation_s", "s"), ("total_s", "s")):
            scale = 1e9 if unit == "GB" else 1
            predicted, measured = (run[side][what] / scale for side in ("predicted", "measured"))
            rows.append([f"{name.split(', ')[0]}, {run['store']}", REAL[what], f"{predicted:.3g} {unit}", f"{measured:.3g} {unit}"])
    return table(["shape, store", "what", "predicted", "measured"], rows)


REAL = {
    "memory_bytes": "peak memory",
    "bank_bytes": "bank on disk",
    "bank_s": "building the bank",
    "evaluation_s": "an evaluation",
    "total_s": "opening, bank and five evaluations",
}


def method_fronts() -> str:
    """Quantizers, criteria and unit criteria, by model and level."""
    shown = {"bits, asymmetric": ("4", "3", "2"), "sparsity": ("0.5", "2:4"), "width": ("0.75", "0.5"), "heads": ("0.5",)}
    rows = []
    for model, found in results("method_fronts").items():
        for name, levels in shown.items():
            merged: dict[str, dict[str, Any]] = {}
            for row in found["rows"]:
                if row["table"] == name:
                    merged.setdefault(row["method"], {}).update(row["levels"])
            for level in levels:
                values = {method: found[level]["mean"] for method, found in merged.items() if level in found}
                if values:
                    text = ", ".join(f"{method} {value:.3g}" for method, value in sorted(values.items(), key=lambda item: item[1]))
                    rows.append([model, f"`{name.partition(',')[0]}={level}`", text])
    return table(["model", "level everywhere", "best first"], rows)


def joint_search() -> str:
    """Means over seeds, by model and budget."""
    rows = []
    for model, group in groupby(results("joint_search")["rows"], key=lambda row: row["model"]):
        runs = list(group)
        for share in runs[0]["resolve"]:
            found = {
                knobs: sum(s["held_out"] for run in runs for s in run["searches"] if (s["knobs"], s["share"]) == (knobs, share)) / len(runs)
                for knobs in ("bits", "bits,width,skip")
            }
            ratio = sum(run["resolve"][share]["ratio_to_fresh"] for run in runs) / len(runs)
            alone, joint = found.values()
            rows.append([model, len(runs), share, f"{alone:.3g}", f"{joint:.3g}", f"{joint / alone - 1:+.0%}", f"{ratio:.3f}"])
    columns = ["model", "seeds", "`linear_bytes`", "`bits`", "`bits,width,skip`", "", "resolved / fresh, search text"]
    return table(columns, rows)


def kv_front() -> str:
    """Means over seeds, by model and mean budget."""
    rows = []
    for row in results("kv_front")["means"]:
        mean = row["mean"]
        best = min((value, method) for method, value in mean.items() if method != "searched")
        change = f"{mean['searched'] / best[0] - 1:+.0%}"
        rows.append([row["model"], f"{row['share']:.1%}", row["seeds"], *(f"{value:.3g}" for value in mean.values()), best[1], change])
    columns = ["model", "mean budget", "seeds", "uniform", "PyramidKV", "PrefixKV", "CAKE", "searched", "best other", "searched against it"]
    return table(columns, rows)


def joint_vs_sequential() -> str:
    """Means over seeds, by model and size of the cache."""
    rows = []
    for row in results("joint_vs_sequential")["means"]:
        spread = "" if row["spread"] is None else f" ± {row['spread']:.0%}"
        values = (f"{value:.3g}" for value in row["held_out"].values())
        rows.append([row["model"], f"{row['ratio']:g}", row["seeds"], *values, f"{row['change']:+.0%}{spread}"])
    columns = ["model", "cache / weights", "seeds", "one search", "bits, then cache", "cache, then bits", "against the better order"]
    return table(columns, rows)


def experts_front() -> str:
    """Means over seeds: experts that stay stored at the bytes of a uniform level, and tokens sent to one or two at equal arithmetic."""
    found = results("experts_front")["rows"]
    pairs = {
        f"`{kept['point']}`": [(row["kept"][i]["uniform"], row["kept"][i]["found"]) for row in found]
        for i, kept in enumerate(found[0]["kept"])
    }
    pairs["half of what could be spared sent to one expert (alike: mean of random choices)"] = [
        (row["active"]["random"], row["active"]["found"]) for row in found
    ]
    rows = []
    for name, values in pairs.items():
        alike, chosen = (fmean(column) for column in zip(*values, strict=True))
        rows.append([name, len(values), f"{alike:.3g}", f"{chosen:.3g}", f"{fmean(b / a for a, b in values) - 1:+.0%}"])
    return table(["", "seeds", "alike", "layer by layer", ""], rows)


def ffn_experts() -> str:
    """Means over seeds, by model and share of the experts."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in results("ffn_experts")["rows"]:
        groups.setdefault((row["model"], row["share"]), []).append(row)
    ways = {"ffn_experts": "`ffn_experts`", "width": "`width`", "chess": "CHESS", "magnitude": "magnitude"}
    rows = []
    for (model, share), found in groups.items():
        left = f"{fmean(row['ffn_experts']['operations'] for row in found):.0%}"
        values = [f"{fmean(row[way]['kl'] for row in found):.3g}" if way in found[0] else None for way in ways]
        rows.append([model, f"{share:.0%}", left, len(found), *values])
    return table(["model", "experts", "FFN operations", "seeds", *ways.values()], rows)


def every_knob() -> str:
    """One search by model: what is found beside its baselines, and the knobs that earned most."""
    rows = []
    for row in results("every_knob")["rows"]:
        best = [None if (value := row["held_out"][role]) is None else f"{value:.3g}" for role in ("uniform", "additive", "random", "found")]
        earned = sorted(((r["earned"], r["knob"]) for r in row["attribution"]["rows"]), reverse=True)
        named = ", ".join(f"`{knob}` {gain / row['held_out']['found']:+.0%}" for gain, knob in earned if gain > 0)
        rows.append([row["model"], len(row["knobs"]), row["decisions"], *best, named])
    return table(["model", "knobs", "decisions", "uniform", "additive", "random", "found", "loss without the knob's freedom"], rows)


def lora_rank() -> str:
    """Losses from scratch by seed and method, what searched ranks gain, and how prefixes of one adapter order rank vectors."""
    found = results("lora_rank")
    by_seed: dict[int, dict[str, float]] = {}
    for row in found["rows"]:
        if row["part"] == "methods":
            by_seed.setdefault(row["seed"], {})[row["method"]] = row["loss_scratch"]
    methods, means = ("uniform", "eva", "adalora", "searched"), found["means"]
    rows = [[f"seed {seed}", *(f"{losses[name]:.4f}" for name in methods)] for seed, losses in sorted(by_seed.items())]
    gains = [means[name]["searched_has_less"] for name in methods[:-1]]
    rows.append(["searched has less by", *(f"{gain['mean']:+.4f} ± {gain['deviation']:.4f}" for gain in gains), ""])
    rows.append(["parameters", *(f"{means[name]['trainable_parameters']:,}" for name in methods)])
    count = sum(row["part"] == "vectors" for row in found["rows"])
    kl, loss, size = (f"{means[f'spearman_{name}']:.2f}" for name in ("kl", "loss_super", "trainable_parameters"))
    said = (
        f"Over {count} random rank vectors the KL of prefixes has a rank correlation of {kl} with losses from scratch; "
        f"the loss of prefixes has {loss}, the count of parameters {size}."
    )
    return table(["", "rank 4 everywhere", "EVA", "AdaLoRA", "searched"], rows) + f"\n\n{said}"


def less(before: float, after: float) -> str:
    return f"{1 - after / before:.0%} less"


def kernel_linear_wq() -> str:
    """Speed against dense float32 for one row on one thread, by shape and width: lower quartiles, which other work disturbs least."""
    found = [row for row in results("kernel_linear_wq_cpu")["threads"]["1"] if row["m"] == 1]
    paths = list(dict.fromkeys(row["path"] for row in found))
    rows = []
    for shape, group in groupby(found, key=lambda row: row["shape"]):
        low = {row["path"]: row["quartiles_us"][0] for row in group}
        rows.append([shape, f"{low[paths[0]]:,.1f} us", *(f"{low[paths[0]] / low[path]:.2f}" for path in paths[1:])])
    return table(["weight", *paths], rows)


def latency_model() -> str:
    """Agreement of predicted and measured times by model and phase."""
    rows = [
        [found["model"], phase, found["context"], f"{of['median_error']:.1%}", f"{of['largest_error']:.1%}", f"{of['spearman']:.3f}"]
        for found in results("latency_model")["models"]
        for phase, of in found["agreement"].items()
    ]
    return table(["model", "time", "context", "median error", "largest", "Spearman"], rows)


RESULTS: Mapping[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        encoder_front,
        search_quality,
        real_size,
        method_fronts,
        joint_search,
        kv_front,
        joint_vs_sequential,
        experts_front,
        ffn_experts,
        every_knob,
        lora_rank,
        kernel_linear_wq,
        latency_model,
    )
}


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(" ".join(str("" if cell is None else cell).split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(columns), "| " + " | ".join("---" for _ in columns) + " |", *map(line, rows)])
