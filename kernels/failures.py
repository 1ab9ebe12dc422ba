"""Failures that say nothing about the code that met them: the device has no memory left, or is itself in trouble."""

from __future__ import annotations

import torch

__all__ = ["of_device", "out_of_memory"]

_NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
# what Triton and the libraries of CUDA raise as a bare RuntimeError
_TROUBLE = ("illegal memory access", "launch failure", "ECC error", "CUBLAS_STATUS_EXECUTION_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")


def out_of_memory(error: BaseException) -> bool:
    """Whether a device had no memory left."""
    return isinstance(error, RuntimeError) and (isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _NO_MEMORY))


def of_device(error: BaseException) -> bool:
    """Whether a device failed, for want of memory or otherwise; the same may work on another one, or later."""
    return out_of_memory(error) or (
        isinstance(error, RuntimeError) and (isinstance(error, torch.AcceleratorError) or any(text in str(error) for text in _TROUBLE))
    )
