"""The runner: a process of its own that evaluates (`python -m autoeff.evaluators.runner`).

One JSON object a line on standard input asks, one on standard output answers; whatever libraries print goes to standard error.

    {"kind": "open", "setup": {…}}                      -> {"kind": "progress", "done": n, "total": n} …, {"kind": "ready", "digest": …}
    {"kind": "evaluate", "levels": {…}, "split": …, "windows": n}  -> {"kind": "measured", "measurements": […], "seconds": s}
    {"kind": "complete", "levels": {…}, "prompt": …, "tokens": n}  -> {"kind": "text", "text": …}
    {"kind": "statistics", "needs": […]}                -> {"kind": "statistics", "statistics": {name: {site: …}}}, of the dense model
    {"kind": "latency", "configurations": {label: {…}}, "spec": {…}} -> {"kind": "times", "times": {label: [measurements]}}
    {"kind": "stored_bytes", "levels": {…}}             -> {"kind": "bytes", "bytes": {linear: n}}
    {"kind": "export", "levels": {…}, "folder": …}      -> {"kind": "exported", "files": […]}
    {"kind": "remeasure", "folder": …}                  -> as evaluate, on the weights found in the folder and the caches of "levels"

Any error is answered once and ends the process: after it the state of model and device is not trusted. The answer is
{"kind": "failed", "class": …, "message": …} where it is the candidate's, {"kind": "refused", "message": …} where the request is wrong, and
{"kind": "lost", "message": …} where a device fails. The process also ends when its parent, named as the only argument, does.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from autoeff.errors import CandidateError, FailureClass, InputError
from autoeff.evaluators.evaluator import Evaluator
from autoeff.evaluators.setup import EvaluationRequest, EvaluationSetup, LatencySpec, measurement_to_json
from autoeff.kernels.failures import of_device, out_of_memory

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1


def main(parent: int) -> int:
    """Serves requests until standard input ends or the process `parent` does; returns the exit code."""
    _end_with(parent)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    requests = (json.loads(line) for line in sys.stdin)
    try:
        _serve(requests, answers)
    except CandidateError as error:
        return _last_word(answers, {"kind": "failed", "class": error.failure, "message": str(error)})
    except InputError as error:
        return _last_word(answers, {"kind": "refused", "message": str(error)})
    except MemoryError as error:
        return _last_word(answers, {"kind": "failed", "class": FailureClass.OOM_HOST, "message": f"out of memory: {error}"})
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        if of_device(error) and not out_of_memory(error):
            return _last_word(answers, {"kind": "lost", "message": message})
        kind = FailureClass.OOM_GPU if out_of_memory(error) else FailureClass.INVALID
        return _last_word(answers, {"kind": "failed", "class": kind, "message": message})
    return 0


def _serve(requests: Iterator[Mapping[str, Any]], answers: TextIO) -> None:
    def answer(kind: str, **fields: Any) -> None:
        print(json.dumps({"kind": kind, **fields}), file=answers, flush=True)

    opening = next(requests, None)
    if opening is None:
        return
    evaluator = Evaluator(
        EvaluationSetup.from_json(opening["setup"]), progress=lambda done, total: answer("progress", done=done, total=total)
    )
    answer("ready", digest=evaluator.preparation.digest)
    for request in requests:
        started = time.perf_counter()
        match request["kind"]:
            case "evaluate":
                found = evaluator.evaluate(EvaluationRequest(request["levels"], request["split"], request["windows"]))
                seconds, facts = time.perf_counter() - started, evaluator.kernel_use
                answer("measured", measurements=[measurement_to_json(m) for m in found], seconds=seconds, facts=facts)
            case "complete":
                answer("text", text=evaluator.complete(request["levels"], request["prompt"], request["tokens"]))
            case "statistics":
                answer("statistics", statistics=evaluator.statistics(request["needs"]).to_json())
            case "latency":
                times = evaluator.latency(request["configurations"], LatencySpec.from_json(request["spec"]))
                answer("times", times={label: [measurement_to_json(m) for m in found] for label, found in times.items()})
            case "stored_bytes":
                answer("bytes", bytes=evaluator.stored_bytes(request["levels"]))
            case "export":
                answer("exported", files=evaluator.export(request["levels"], Path(request["folder"])))
            case "trained":
                found = evaluator.trained(request["levels"])
                answer("measured", measurements=[measurement_to_json(m) for m in found], seconds=time.perf_counter() - started)
            case "export_adapter":
                evaluator.export_adapter(request["levels"], Path(request["folder"]))
                answer("exported")
            case "remeasure_adapter":
                found = evaluator.remeasure_adapter(Path(request["folder"]), request["split"], request["windows"])
                answer("measured", measurements=[measurement_to_json(m) for m in found], seconds=time.perf_counter() - started)
            case "remeasure":
                found = evaluator.remeasure(Path(request["folder"]), request["split"], request["windows"], request.get("levels"))
                answer("measured", measurements=[measurement_to_json(m) for m in found], seconds=time.perf_counter() - started)
            case kind:
                raise InputError(f"unknown request {kind!r}")


def _last_word(answers: TextIO, message: Mapping[str, Any]) -> int:
    print(json.dumps(message), file=answers, flush=True)
    return 1


def _end_with(parent: int) -> None:
    """Asks Linux for SIGKILL when the parent dies. Elsewhere the end of standard input does it, unless a candidate loops."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
