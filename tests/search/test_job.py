"""One job, however it is written: flags, YAML, JSON or Python; and one line for whatever is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from autoeff.errors import InputError
from autoeff.evaluators.setup import EvaluationSetup
from autoeff.flags import FIELDS, job_fields
from autoeff.search.job import JobSpec
from autoeff.search.settings import Settings

FLAGS: dict[str, Any] = {
    "model": "models/tiny", "data": "train.txt", "windows": 16, "length": 128, "draw": "0,128,256", "bos": "per_document",
    "eval_data": "eval.txt", "eval_windows": 0, "eval_length": 64, "eval_draw": "first", "eval_bos": "per_window",
    "tune_data": "tune.txt", "tune_windows": 9, "tune_length": 32, "tune_draw": "random", "tune_bos": "per_document",
    "knobs": "bits, skip", "settings": ["bits.group_size=32", "bits.symmetric=false", "bits.quantizer=rtn"],
    "include": ["*"], "exclude": ["*down_proj:bits"], "levels": ["*o_proj:bits=16,4", "*:bits=16,8,3"], "untie": True,
    "objective": "kl,weight_bytes", "limit": ["weight_bytes<=0.30x", "avg_bits<=3.5"], "trials": 500, "timeout": "20m",
    "seeds": "pyramidkv,cake",
    "sampler": "tpe", "table_only": True, "seed": 7, "batch": 2, "context": 256, "device": "cuda:1", "target": "H200", "tasks": "piqa,own",
    "queue": "gpu.h200", "tasks_path": "tasks", "task_documents": 50, "max_degradation": 0.01,
    "metric": ["mine:refusals"],
}  # fmt: skip

JOB = """
model: models/tiny
data: {source: train.txt, windows: 16, length: 128, draw: [0, 128, 256], bos: per_document}
eval_data: {source: eval.txt, windows: 0, length: 64, draw: first, bos: per_window}
tune_data: {source: tune.txt, windows: 9, length: 32, draw: random, bos: per_document}
knobs:
  bits: {group_size: 32, symmetric: false, quantizer: rtn}
  skip: {}
space:
  include: ["*"]
  exclude: ["*down_proj:bits"]
  levels: {"*o_proj:bits": [16, 4], "*:bits": [16, 8, 3]}
  untie: true
objectives: [kl, weight_bytes]
limits: ["weight_bytes<=0.30x", avg_bits<=3.5]
budget: {trials: 500, seconds: 1200}
tasks: {names: [piqa, own], path: tasks, documents: 50, max_degradation: 0.01}
metrics: ["mine:refusals"]
sampler: tpe
seeds: [pyramidkv, cake]
table_only: true
seed: 7
batch: 2
context: 256
device: cuda:1
queue: gpu.h200
target: H200
"""


def leaves(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Every field that a job has, nested ones by their path."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        inner = [item for item in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(item, type)]
        nested = next((item for item in inner if issubclass(item, BaseModel)), None)
        found |= leaves(nested, f"{prefix}{name}.") if nested else {prefix + name}
    return found


def wrong(value: Mapping[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        JobSpec.parse(value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def unreadable(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        JobSpec.read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_field_has_a_flag() -> None:
    assert leaves(JobSpec) - {"format"} == set(FIELDS.values())
    assert set(FLAGS) == set(FIELDS)


def test_flags_yaml_json_and_python_give_the_same_job(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "job.json").write_text(json.dumps(yaml.safe_load(JOB), indent="\t"))
    from_yaml = JobSpec.parse(JobSpec.read(tmp_path / "job.yaml"))
    assert JobSpec.parse(JobSpec.read(tmp_path / "job.json")) == from_yaml
    assert JobSpec.parse(job_fields(FLAGS, {})) == from_yaml
    assert from_yaml.budget.seconds == 1200
    assert from_yaml.data.draw == (0, 128, 256)
    assert list(from_yaml.space.levels) == ["*o_proj:bits", "*:bits"]


def test_short_forms_mean_the_long_ones() -> None:
    short = {"model": "demo", "data": "a.txt", "knobs": "bits,skip", "objectives": "kl,weight_bytes"}
    long = {"model": "demo", "data": {"source": "a.txt"}, "knobs": {"bits": {}, "skip": {}}, "objectives": ["kl", "weight_bytes"]}
    assert JobSpec.parse(short) == JobSpec.parse(long)
    assert JobSpec.parse(short | {"knobs": ["bits", "skip"]}) == JobSpec.parse(long)


def test_flags_win_over_the_file_and_leave_the_rest() -> None:
    base = yaml.safe_load(JOB)
    flags = {
        "data": "other.txt", "knobs": "skip,bits", "settings": ["bits.group_size=64"], "levels": ["*o_proj:bits=16,2"], "untie": False,
        "limit": ["kl<=1"], "trials": 9, "eval_windows": 4,
    }  # fmt: skip
    job = JobSpec.parse(job_fields(flags, base))
    assert (job.data.source, job.data.windows) == ("other.txt", 16)
    assert job.knobs == {"skip": {}, "bits": {"group_size": 64, "symmetric": False, "quantizer": "rtn"}}
    assert list(job.space.levels.items()) == [("*:bits", (16, 8, 3)), ("*o_proj:bits", (16, 2))]
    assert (job.space.untie, job.space.exclude) == (False, ("*down_proj:bits",))
    assert job.limits == ("kl<=1",)
    assert (job.budget.trials, job.budget.seconds) == (9, 1200)
    assert job.eval_data is not None
    assert job.eval_data.windows == 4
    assert base == yaml.safe_load(JOB)


def test_flags_extend_the_short_forms_of_a_file() -> None:
    job = JobSpec.parse(job_fields({"windows": 3, "settings": ["skip.x=1"]}, {"model": "m", "data": "a.txt", "knobs": "bits,skip"}))
    assert (job.data.source, job.data.windows) == ("a.txt", 3)
    assert job.knobs == {"bits": {}, "skip": {"x": 1}}


def test_a_setting_without_knobs_is_of_the_default_knob() -> None:
    assert JobSpec.parse(job_fields({"model": "m", "settings": ["bits.levels=16,4"]}, {})).knobs == {"bits": {"levels": [16, 4]}}


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"settings": ["group_size=32"]}, "bits.group_size=32"),
        ({"settings": ["bits.group_size"]}, "cannot read --set"),
        ({"settings": ["skip.x=1"]}, "--knobs"),
        ({"levels": ["16,4"]}, "cannot read --levels"),
        ({"levels": ["=4"]}, "cannot read --levels"),
        ({"timeout": "20 minutes"}, "90s, 20m or 2h"),
        ({"timeout": "-5s"}, "90s, 20m or 2h"),
        ({"timeout": "0s"}, "budget.seconds"),
        ({"draw": "last"}, "data.draw"),
        ({"bos": "never"}, "data.bos"),
        ({"windows": -1}, "data.windows"),
        ({"trials": 0}, "budget.trials"),
        ({"seed": -1}, "seed"),
        ({"objective": "kl,kl"}, "each may stand once"),
    ],
)
def test_a_bad_flag_is_one_line(flags: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError) as caught:
        JobSpec.parse(job_fields({"model": "m", **flags}, {}))
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("20m", 1200), ("2h", 7200)])
def test_times_have_units(text: str, seconds: float) -> None:
    assert JobSpec.parse(job_fields({"model": "m", "timeout": text}, {})).budget.seconds == seconds


@pytest.mark.parametrize("section", ["space", "budget", "data"])
def test_flags_over_a_file_that_is_no_mapping_there(section: str) -> None:
    flags = {"untie": True, "trials": 5, "windows": 3}
    with pytest.raises(InputError, match=f"'{section}' of the job file must be a mapping"):
        job_fields(flags, {"model": "m", section: 5})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, ["no model"]),
        ({"model": "m", "modle": "x"}, ["'modle'", "known: format, model"]),
        ({"model": "m", "budget": {"trails": 3}}, ["'budget.trails'", "known: trials, seconds"]),
        ({"model": "m", "eval_data": {"sauce": 3}}, ["'eval_data.sauce'", "known: source"]),
        ({"model": "m", "space": {"levels": {"*": [[1]]}}}, ["'space.levels.*.0'"]),
        ({"model": "m", "data": {"draw": "last"}}, ["'data.draw'", "'last'"]),
        ({"model": "m", "data": {"draw": [0, "x"]}}, ["'data.draw"]),
        ({"model": "m", "knobs": {}}, ["'knobs'"]),
        ({"model": "m", "knobs": {"bits": 3}}, ["'knobs.bits'", "found 3"]),
        ({"model": "m", "objectives": []}, ["'objectives'"]),
        ({"model": "m", "budget": {"seconds": float("nan")}}, ["'budget.seconds'"]),
        ({"model": "m", "budget": {"seconds": float("inf")}}, ["'budget.seconds'"]),
        ({"model": "m", "space": {"levels": {"*": [float("nan")]}}}, ["'space.levels.*.0'"]),
        ({"model": "m", "seed": 2**32}, ["'seed'"]),
        ({"model": "m", "format": 2}, ["'format'", "found 2"]),
        ({"model": ["long" * 100]}, ["'model'", "…"]),
        ({"model": "m", "a\nb": 1}, ["'a\\nb'"]),
        ({"model": "m", 5: 1}, ["5"]),
    ],
)
def test_a_bad_value_is_one_line_that_names_its_key(value: dict[Any, Any], words: list[str]) -> None:
    line = wrong(value)
    assert all(word in line for word in words), line
    assert len(line) < 300


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("a.yaml", "", "no mapping"),
        ("a.yaml", "- 1", "no mapping"),
        ("a.yaml", "model: [", "no valid YAML"),
        ("a.yaml", "a: &x 1\nb: *x", "aliases"),
        ("a.yaml", "a: 2020-99-99", "no valid YAML"),
        ("a.yaml", "!!python/object/apply:os.getpid []", "no valid YAML"),
        ("a.yaml", "[" * 20_000, "no valid YAML"),
        ("a.yaml", "#" * 300_000, "larger"),
        ("a.json", "{'model': 1}", "no valid JSON"),
        ("a.json", "[1]", "no mapping"),
        ("a.json", "[" * 200_000, "no valid JSON"),
        ("a.yaml", b"\xff\xfe\xff", "cannot read"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, name: str, text: str | bytes, word: str) -> None:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert word in unreadable(path)


def test_an_absent_file_is_one_line(tmp_path: Path) -> None:
    assert "No such file" in unreadable(tmp_path / "absent.yaml")
    assert "directory" in unreadable(tmp_path)


def test_an_endless_file_is_refused_soon() -> None:
    assert "larger" in unreadable(Path("/dev/zero"))


names = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=8)
levels = st.one_of(st.integers(-9, 99), st.floats(allow_nan=False, allow_infinity=False, width=32), names)
texts = st.fixed_dictionaries(
    {},
    optional={
        "source": names,
        "windows": st.integers(0, 99),
        "length": st.integers(2, 99),
        "bos": st.sampled_from(["per_window", "per_document"]),
        "draw": st.one_of(st.sampled_from(["random", "first"]), st.lists(st.integers(0, 99), max_size=3)),
    },
)
jobs = st.fixed_dictionaries(
    {"model": names},
    optional={
        "data": texts,
        "eval_data": st.one_of(st.none(), texts),
        "tune_data": st.one_of(st.none(), texts),
        "knobs": st.dictionaries(names, st.dictionaries(names, levels, max_size=2), min_size=1, max_size=3),
        "space": st.fixed_dictionaries({}, optional={"levels": st.dictionaries(names, st.lists(levels, max_size=3), max_size=2)}),
        "objectives": st.lists(names, min_size=1, max_size=3, unique=True),
        "limits": st.lists(names, max_size=2),
        "budget": st.fixed_dictionaries({}, optional={"trials": st.integers(1, 10**6), "seconds": st.floats(0.001, 1e6)}),
        "seed": st.integers(0, 2**32 - 1),
    },
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=jobs)
def test_a_job_survives_json_and_yaml(value: dict[str, Any], tmp_path: Path) -> None:
    job = JobSpec.parse(value)
    assert JobSpec.parse(json.loads(json.dumps(job.model_dump(mode="json")))) == job
    (tmp_path / "job.yaml").write_text(job.to_yaml())
    assert JobSpec.parse(JobSpec.read(tmp_path / "job.yaml")) == job


def test_the_setup_carries_what_the_evaluation_depends_on(tmp_path: Path) -> None:
    setup = JobSpec.parse(job_fields(FLAGS, {})).setup(tmp_path)
    assert (setup.model, setup.seed, setup.device, setup.bank) == ("models/tiny", 7, "cuda:1", str(tmp_path))
    assert (setup.data.source, setup.data.draw) == ("train.txt", (0, 128, 256))
    assert setup.eval_data is not None
    assert setup.tune_data is not None
    assert EvaluationSetup.from_json(json.loads(json.dumps(setup.to_json()))).tune_data == setup.tune_data
    assert setup.space.untie
    assert dict(setup.space.levels) == {"*o_proj:bits": (16, 4), "*:bits": (16, 8, 3)}


def test_settings_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOEFF_HOME", str(tmp_path))
    monkeypatch.setenv("AUTOEFF_LEASE_S", "2.5")
    monkeypatch.delenv("AUTOEFF_DATABASE_URL", raising=False)
    found = Settings.read()
    assert (found.database, found.bank, found.lease_s) == (f"sqlite:///{tmp_path / 'autoeff.db'}", tmp_path / "bank", 2.5)


@pytest.mark.parametrize(("name", "value"), [("AUTOEFF_LEASE_S", "soon"), ("AUTOEFF_MEMORY_SHARE", "1.5"), ("AUTOEFF_LEASE_S", "nan")])
def test_a_bad_setting_is_one_line_that_names_its_variable(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"^{name}: [^\n]*{value}[^\n]*$"):
        Settings.read()
