"""The tracer's work, done once a run: it takes most of the time that an export of a tiny model takes.

What a module is traced to follows from what it is (its classes, settings, and the shapes of its weights), and from the
sizes of its inputs. Modules that are alike in all of that, whatever test or process they are of, share what was traced
for the first of them. All that is done with it afterwards, the weights that go into it among that, is each test's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers import PreTrainedConfig

from ht_export.graph.layers import _OneLayer
from ht_export.model.attention import LayerAttention

# Fills the folder of a name with what a function writes into it, once a run.
Shared = Callable[[str, Callable[[Path], object]], Path]
Trace = Callable[[nn.Module, tuple[Any, ...], tuple[Any, ...]], ir.Model]
# Numbers in the weights of tiny models; the graphs of others would be large.
MOST = 5_000_000
# Settings of where a model came from.
NO_MATTER = ("_name_or_path", "architectures", "dtype", "transformers_version")
PLAIN = (bool, int, float, str, type(None), torch.dtype)


def once_a_run(trace: Trace, shared: Shared) -> Trace:
    """Return `trace` for modules of few weights, which traces those that are alike once."""

    def traced(module: nn.Module, example: tuple[Any, ...], shapes: tuple[Any, ...]) -> ir.Model:
        if sum(parameter.numel() for parameter in module.parameters()) > MOST:
            return trace(module, example, shapes)
        told: list[LayerAttention] = []

        def write(folder: Path) -> None:
            if isinstance(module, _OneLayer):
                tell, module._tell = module._tell, told.append
            try:
                ir.save(trace(module, example, shapes), folder / "graph.onnx")
            finally:
                if isinstance(module, _OneLayer):
                    module._tell = tell
            (folder / "told.json").write_text(json.dumps([asdict(how) for how in told]))

        folder = shared(f"traced-{kind_of(module, example, shapes)}", write)
        if isinstance(module, _OneLayer):
            for how in json.loads((folder / "told.json").read_text()):
                module._tell(LayerAttention(**how))
        return ir.load(folder / "graph.onnx")

    return traced


def kind_of(module: nn.Module, example: tuple[Any, ...], shapes: tuple[Any, ...]) -> str:
    """Return the name of what a module with such inputs is traced to."""
    about = "\n".join((*told_of(module), described(example), described(shapes)))
    return hashlib.sha256(about.encode()).hexdigest()[:24]


def told_of(module: nn.Module) -> Iterator[str]:
    """Yield all that the graph of `module` follows from."""
    yield repr(module)
    for name, child in module.named_modules():
        yield f"{name}: {type(child).__module__}.{type(child).__qualname__}"
        for key, value in sorted(vars(child).items()):
            if isinstance(value, PreTrainedConfig):
                yield f"{name}.{key} = { {k: v for k, v in value.to_dict().items() if k not in NO_MATTER} }"
            elif plain(value) or isinstance(value, LayerAttention):
                yield f"{name}.{key} = {sorted(value) if isinstance(value, set) else value!r}"
        for key, parameter in child.named_parameters(recurse=False):
            yield f"{name}.{key}: {tuple(parameter.shape)} {parameter.dtype}"
        for key, buffer in child.named_buffers(recurse=False):
            yield f"{name}.{key}: {buffer.dtype} {buffer.tolist()}"
    # Weights that are one another.
    every: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        every.setdefault(id(parameter), []).append(name)
    yield repr([names for names in every.values() if len(names) > 1])


def plain(value: object) -> bool:
    """Return whether the `repr` of a value says all of it."""
    if isinstance(value, dict):
        return all(map(plain, (*value, *value.values())))
    return isinstance(value, PLAIN) or (isinstance(value, tuple | list | set) and all(map(plain, value)))


def described(given: Any) -> str:
    """Return the shapes and types of tensors, and the names and limits of sizes."""
    if isinstance(given, torch.Tensor):
        return f"{tuple(given.shape)} {given.dtype}"
    if isinstance(given, torch.export.Dim):
        return f"{given.__name__} {given.min} {given.max}"
    if isinstance(given, dict):
        return described(list(given.items()))
    return repr([described(one) for one in given]) if isinstance(given, tuple | list) else repr(given)
