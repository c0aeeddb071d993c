"""What this machine computes with: the device of a fit, bfloat16 arithmetic, the device of an ONNX engine."""

from __future__ import annotations

import platform

import torch

from runtime.errors import InputError


def fit_device(chosen: str) -> str:
    """Return "cuda" or "cpu" for "auto", "cuda" or "cpu". Raises `InputError` where there is no such device."""
    if chosen == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if chosen == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA GPU here; use --device cpu, or install torch for CUDA")
    return chosen


def has_bfloat16(device: str) -> bool:
    """Return whether `device` multiplies in bfloat16 itself; where it only imitates it, float32 is faster."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if platform.machine().lower() not in ("x86_64", "amd64"):
        # PyTorch does not tell it of others.
        return False
    # Private, and missing in some releases: then there is nothing to be sure of.
    tests = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(bool(test()) for test in tests if test is not None)


def engine_device(device: str) -> str:
    """Return where an ONNX engine runs beside a fit on `device`: on the GPU where its library can."""
    import onnxruntime

    return "cuda" if device == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers() else "cpu"
