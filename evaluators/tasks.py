"""Accuracy on tasks of lm-eval (extra `tasks`), measured on the live model as it stands.

Task files of the user's are data, never code: they may name no function, no class and no metric that would be downloaded, and their
templates are rendered in a sandbox.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import nn

from autoeff.errors import InputError
from autoeff.evaluators.quality import Sample
from autoeff.evaluators.setup import TaskSpec
from autoeff.spaces.configuration import digest_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Tasks", "check_tasks"]

_METRICS = ("acc", "exact_match")  # the first that a task has is its accuracy
_OWN_METRICS = {"acc", "acc_norm", "exact_match"}  # lm-eval computes them by itself; others it may download as scripts
_FILE_LIMIT = 1 << 20
_BATCH = 8


@dataclass(frozen=True)
class TaskResult:
    """Accuracy on one task: its mean with its standard error, and the documents behind it."""

    task: str
    sample: Sample
    documents: int | None


class Tasks:
    """Tasks that are ready to be asked.

    Args:
        spec: Which.
        model: A decoder with its head, asked as it stands at each call.
        tokenizer: Its own.
        context: Longest sequence in tokens.

    Raises:
        InputError: As `check_tasks`; also where a task's data cannot be read.
    """

    def __init__(self, spec: TaskSpec, model: nn.Module, tokenizer: PreTrainedTokenizerBase, context: int | None) -> None:
        manager = _manager(spec)
        from lm_eval.models.huggingface import HFLM

        self._spec, self._manager = spec, manager
        device = str(next(model.parameters()).device)
        self._model = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", device=device, batch_size=_BATCH, max_length=context)
        try:
            manager.load(list(spec.names))  # fetches their data, so that a fault of theirs is no candidate's
        except Exception as error:  # whatever data sets and templates raise
            raise InputError(f"the tasks {', '.join(spec.names)} cannot be read: {_first_line(error)}") from None

    def measure(self) -> list[TaskResult]:
        """The accuracy of the model as it stands: `acc`, or `exact_match` where a task has none."""
        from lm_eval import simple_evaluate

        with torch.random.fork_rng():
            found = simple_evaluate(
                self._model, tasks=list(self._spec.names), task_manager=self._manager, limit=self._spec.documents, log_samples=False,
                bootstrap_iters=1,  # of a mean the error is computed, not drawn
            )  # fmt: skip
        assert found is not None
        return [_result(name, found) for name in self._spec.names]


def check_tasks(spec: TaskSpec) -> str:
    """A digest of what the tasks are: their names, lm-eval's version, and the content of `path`.

    Raises:
        InputError: lm-eval is not installed, a task is unknown, or a file in `path` is no plain data.
    """
    manager = _manager(spec)
    import lm_eval

    if unknown := [name for name in spec.names if name not in manager.all_tasks]:
        own = [name for name in manager.all_tasks if spec.path is not None] if spec.path is not None and len(manager.all_tasks) < 50 else []
        known = f"; {spec.path} has {', '.join(own)}" if own else "; `lm-eval ls tasks` lists those of lm-eval, --tasks-path adds a folder"
        raise InputError(f"task {unknown[0]!r} is not known{known}")
    files = {} if spec.path is None else {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(_files(Path(spec.path)))}
    return digest_of({"lm_eval": lm_eval.__version__, "spec": {**asdict(spec), "names": list(spec.names)}, "files": files})


def _manager(spec: TaskSpec) -> Any:
    os.environ["HF_EVALUATE_OFFLINE"] = "1"  # metrics are not downloaded: they are scripts
    try:
        import lm_eval.utils
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from lm_eval.models import huggingface  # noqa: F401  # its own requirements may be absent
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        missing = f" ({error.name} is missing)" if error.name and not error.name.startswith("lm_eval") else ""
        raise InputError(f"tasks need the package lm-eval{missing}; run `pip install 'autoeff[tasks]'`") from None
    plain = lm_eval.utils.env
    if not isinstance(plain, ImmutableSandboxedEnvironment):
        sandbox = ImmutableSandboxedEnvironment(undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline)
        sandbox.filters.update(plain.filters)
        lm_eval.utils.env = sandbox
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own: set[str] = set()
    if spec.path is not None:
        folder = Path(spec.path)
        if not folder.is_dir():
            raise InputError(f"the folder of tasks {spec.path!r} does not exist")
        own = {name for file in _files(folder) if file.suffix in (".yaml", ".yml") for name in _checked(file)}
    return TaskManager(include_path=spec.path, include_defaults=not own.issuperset(spec.names))


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def _checked(file: Path) -> list[str]:
    """The task or group that the file defines.

    Raises:
        InputError: It is no plain YAML, or names code.
    """
    text = file.read_bytes()
    if len(text) > _FILE_LIMIT:
        raise InputError(f"{file} is larger than the {_FILE_LIMIT} bytes that are allowed")
    try:
        task = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{file} is no plain YAML, and task files are data, never code (no !function): {_first_line(error)}") from None
    if not isinstance(task, dict):
        raise InputError(f"{file} holds no mapping of task fields")
    for name in ("class", "custom_dataset", "include", "unsafe_code", "use_prompt"):
        if name in task:
            raise InputError(f"{file} has the field {name!r}; task files of one's own state their fields and name no code")
    for metric in task.get("metric_list") or ():
        if not isinstance(metric, dict) or metric.get("metric") not in _OWN_METRICS or metric.get("hf_evaluate"):
            raise InputError(f"{file} asks for a metric other than {', '.join(sorted(_OWN_METRICS))}; others may be code")
    return [str(task[key]) for key in ("task", "group") if isinstance(task.get(key), str)]


def _result(name: str, found: Any) -> TaskResult:
    values = found["results"].get(name, {})
    for metric in _METRICS:
        for key, value in values.items():
            if key.partition(",")[0] == metric:
                spread = values.get(key.replace(metric, f"{metric}_stderr", 1))
                known = isinstance(spread, int | float) and math.isfinite(spread)
                documents = found["n-samples"].get(name, {}).get("effective")
                return TaskResult(name, Sample(float(value), float(spread) if known else None), documents)
    raise InputError(f"task {name!r} has no accuracy: expected {' or '.join(_METRICS)}, found {', '.join(values) or 'nothing'}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
