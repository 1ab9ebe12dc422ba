"""Tasks: the accuracy of the live model is the one counted by hand, and nothing that a task file brings is run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from autoeff.errors import InputError
from autoeff.evaluators.loading import ModelFacts, inspect_model, load_model, load_tokenizer
from autoeff.evaluators.setup import TaskSpec
from autoeff.evaluators.tasks import Tasks, check_tasks

pytest.importorskip("lm_eval", reason="the extra tasks is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # those of lm-eval and what it brings are not ours

ROWS = [
    {"question": question, "choices": ["on the mat", "the dog ate", "there again then"], "answer": i % 3}
    for i, question in enumerate(["the cat sat", "they all went", "and the other", "hat", "the dog", "went there then", "a mat", "all the"])
]


def task(folder: Path, name: str = "mine", **changes: Any) -> TaskSpec:
    """A task of multiple choice over ROWS, its files in the folder."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    fields: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(fields | changes))
    return TaskSpec((name,), str(folder))


@pytest.fixture
def model(tiny_models: dict[str, Path]) -> tuple[Any, Any, ModelFacts]:
    facts = inspect_model(tiny_models["llama"])
    return load_model(facts, torch.device("cpu")), load_tokenizer(facts), facts


def right_by_hand(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> list[bool]:
    """Whether the most probable choice is the right one."""
    found = []
    for row in rows:
        scores = []
        for choice in row["choices"]:
            prompt, whole = (tokenizer(text)["input_ids"] for text in (row["question"], f"{row['question']} {choice}"))
            losses = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
            scores.append(sum(float(losses[i - 1, whole[i]]) for i in range(len(prompt), len(whole))))
        found.append(scores.index(max(scores)) == row["answer"])
    return found


@pytest.mark.parametrize("documents", [None, 3])
def test_accuracy_is_the_one_counted_by_hand_before_and_after_a_change(
    model: tuple[Any, Any, ModelFacts], tmp_path: Path, documents: int | None
) -> None:
    live, tokenizer, facts = model
    spec = task(tmp_path / "tasks")
    asked = Tasks(TaskSpec(spec.names, spec.path, documents), live, tokenizer, facts.context)
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(3):  # the model is asked as it stands
        right = right_by_hand(live, tokenizer, ROWS[:documents])
        (found,) = asked.measure()
        share = sum(right) / len(right)
        assert (found.task, found.sample.mean, found.documents) == ("mine", share, len(right))
        assert found.sample.spread == pytest.approx((share * (1 - share) / (len(right) - 1)) ** 0.5)
        seen.add(share)
        for parameter in live.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    assert len(seen) > 1 or documents


def test_asking_leaves_the_random_numbers_of_torch(model: tuple[Any, Any, ModelFacts], tmp_path: Path) -> None:
    live, tokenizer, facts = model
    asked = Tasks(task(tmp_path / "tasks"), live, tokenizer, facts.context)
    before = torch.get_rng_state()
    asked.measure()
    assert torch.get_rng_state().equal(before)


def test_digest_names_what_is_asked(tmp_path: Path) -> None:
    spec = task(tmp_path / "tasks")
    digests = {check_tasks(spec), check_tasks(TaskSpec(spec.names, spec.path, 5))}
    assert check_tasks(spec) in digests
    (tmp_path / "tasks" / "mine.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert len(digests | {check_tasks(spec)}) == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"metric_list": [{"metric": "own/metric"}]}, "asks for a metric other than acc, acc_norm, exact_match; others may be code"),
        ({"metric_list": [{"metric": "exact_match", "hf_evaluate": True}]}, "asks for a metric"),
        ({"class": "os.system"}, "has the field 'class'; task files of one's own state their fields and name no code"),
        ({"custom_dataset": "x.y"}, "has the field 'custom_dataset'"),
        ({"include": "/etc/other.yaml"}, "has the field 'include'"),
    ],
)
def test_task_files_that_name_code_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=f"mine.yaml {says}"):
        check_tasks(task(tmp_path / "tasks", **changes))


def test_functions_in_task_files_are_never_imported(tmp_path: Path) -> None:
    spec = task(tmp_path / "tasks")
    (tmp_path / "tasks" / "code.py").write_text("raise SystemExit('was run')")
    with (tmp_path / "tasks" / "mine.yaml").open("a") as file:
        file.write("process_docs: !function code.run\n")
    with pytest.raises(InputError, match=r"mine.yaml is no plain YAML, and task files are data, never code \(no !function\)") as caught:
        check_tasks(spec)
    assert "\n" not in str(caught.value)


def test_templates_do_not_leave_their_sandbox(model: tuple[Any, Any, ModelFacts], tmp_path: Path) -> None:
    live, tokenizer, facts = model
    spec = task(tmp_path / "tasks", doc_to_text="{{ question.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(Exception, match="unsafe"):
        Tasks(spec, live, tokenizer, facts.context).measure()


def test_unknown_task_and_folder_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the folder of tasks 'absent' does not exist"):
        check_tasks(TaskSpec(("mine",), "absent"))
    with pytest.raises(InputError, match="task 'no_such_task' is not known; `lm-eval ls tasks` lists"):
        check_tasks(TaskSpec(("no_such_task",)))


def test_task_without_accuracy_says_what_it_has(model: tuple[Any, Any, ModelFacts], tmp_path: Path) -> None:
    live, tokenizer, facts = model
    spec = task(tmp_path / "tasks", metric_list=[{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}])
    with pytest.raises(InputError, match="task 'mine' has no accuracy: expected acc or exact_match, found"):
        Tasks(spec, live, tokenizer, facts.context).measure()


def test_missing_extra_names_the_command() -> None:
    code = """
import sys
sys.modules["lm_eval"] = None
from autoeff.errors import InputError
from autoeff.evaluators.tasks import check_tasks
from autoeff.evaluators.setup import TaskSpec
try:
    check_tasks(TaskSpec(("piqa",)))
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "tasks need the package lm-eval; run `pip install 'autoeff[tasks]'`\n"


def test_a_search_asks_its_finalists_and_finds_none_that_loses_too_much(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    from autoeff.search.job import JobSpec
    from autoeff.search.run import start
    from autoeff.search.settings import Settings

    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog ate the other hat\n" * 60)
    asked = task(tmp_path / "tasks")
    fields = {
        "model": str(tiny_models["llama"]),
        "data": {"source": str(tmp_path / "text.txt"), "windows": 2, "length": 16},
        "knobs": {"bits": {"group_size": 16}},
        "space": {"levels": {"*": [16, 8, 2]}},
        "limits": ["avg_bits<=12"],
        "budget": {"trials": 24},
    }
    settings = Settings(home=tmp_path / "home")
    tasks = {"names": asked.names, "path": asked.path}
    for name, allowed in (("free", None), ("any", 0.999), ("none", 0.0)):
        limited = {} if allowed is None else {"max_degradation": allowed}
        found = start(JobSpec.parse({**fields, "tasks": tasks | limited}), tmp_path / name, settings)
        rows = {row["role"]: row for row in found.summary["rows"]}
        wanted = (1 - (1 if allowed is None else allowed)) * rows["dense"]["accuracy:mine"]
        kept = [row for row in found.rows if row["measurements"]["avg_bits"]["value"] <= 12 and accuracy(row) is not None]
        assert kept
        assert (found.summary["state"] == "feasible") == any(accuracy(row) >= wanted for row in kept)
        if "found" in rows:
            assert rows["found"]["accuracy:mine"] >= wanted


def accuracy(row: dict[str, Any]) -> Any:
    return row["measurements"].get("accuracy:mine", {}).get("value")
