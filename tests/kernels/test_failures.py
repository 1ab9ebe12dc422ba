"""What a device's failure is, and what is the fault of code that met it."""

from __future__ import annotations

import pytest
import torch

from autoeff.kernels import tune
from autoeff.kernels.failures import of_device, out_of_memory

NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
]
TROUBLE = [
    torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access"),
]
OWN = [RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x24 and 16x24)"), ValueError("CUDA out of memory"), TypeError("of None")]


def test_failures_of_a_device_are_told_from_those_of_code() -> None:
    assert [out_of_memory(error) for error in (*NO_MEMORY, *TROUBLE, *OWN)] == [True] * 3 + [False] * 5
    assert [of_device(error) for error in (*NO_MEMORY, *TROUBLE, *OWN)] == [True] * 5 + [False] * 3


def test_a_failing_device_is_no_verdict_on_a_configuration() -> None:
    errors = pytest.importorskip("triton.runtime.errors", reason="Triton is not installed")
    own = [errors.OutOfResources(300_000, 232_448, "shared memory"), RuntimeError("PassManager::run failed")]
    assert [tune._does_not_run(error) for error in (*own, *NO_MEMORY, *TROUBLE, *OWN)] == [True] * 5 + [False] * 5
