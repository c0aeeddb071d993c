"""Computing in float32 with weights stored in another precision, widened one module at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def computing_in_float32(model: nn.Module, rounded_to: torch.dtype) -> Iterator[None]:
    """Let `model` compute in float32 with its weights rounded to `rounded_to`, whatever they are stored in.

    Only the parameters of the module that runs are widened.
    """
    handles = []
    stored: dict[Tensor, Tensor] = {}

    def widen(module: nn.Module, _: Any) -> None:
        for tensor in _values(module):
            stored[tensor] = tensor.data
            tensor.data = tensor.data.to(rounded_to).to(torch.float32)

    def restore(module: nn.Module, *_: Any) -> None:
        for tensor in _values(module):
            tensor.data = stored.pop(tensor)

    for module in model.modules():
        if any(tensor.dtype != torch.float32 or rounded_to != torch.float32 for tensor in _values(module)):
            handles += [
                module.register_forward_pre_hook(widen),
                module.register_forward_hook(restore, always_call=True),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _values(module: nn.Module) -> list[Tensor]:
    """Return a module's own parameters, and buffers of one number: factors, which layers apply in their precision."""
    factors = [buffer for buffer in module.buffers(recurse=False) if buffer.is_floating_point() and buffer.ndim == 0]
    return [*module.parameters(recurse=False), *factors]
