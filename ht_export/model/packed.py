"""Quantised checkpoints (AWQ, GPTQ, compressed-tensors, fp8 in blocks) read as the float32 weights that they stand for.

A weight W [out, in] is (q - z) s, with a scale s and a zero point z for each row, group of inputs, block, or all of it.
What is quantised besides, activations and keys and values, is not: they are computed in the engine's own precision.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor

from ht_export.model.locate import WEIGHTS
from ht_export.model.stated import CONFIG, FETCH_AGAIN
from ht_export.model.tensors import opened_tensors, shapes
from runtime.errors import InputError, shown

READ = "AWQ (gemm), GPTQ (2, 4 and 8 bits), compressed-tensors (integers and fp8) and fp8 in blocks"
TAKE_ANOTHER = "take the checkpoint that it was made from, or a GGUF file of the model"
# Bits of which a whole number of values goes into 32.
WHOLE_BITS = (2, 4, 8)
# Values of a word of AWQ's, from its lowest bits on, by their places among eight outputs.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GPTQ_FORMATS = {"gptq": 1, "gptq_v2": 0}
COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
# What is about activations and the cache alone.
OF_ACTIVATIONS = (".input_scale", ".output_scale", ".input_zero_point", ".output_zero_point", ".k_scale", ".v_scale",
                  ".q_scale", ".input_global_scale", ".weight_observer")  # fmt: skip

Bits = Annotated[int, Meta(ge=1, le=16)]
Name = Annotated[str, Meta(max_length=100)]
Block = Annotated[list[Annotated[int, Meta(ge=1, le=1 << 16)]], Meta(min_length=2, max_length=2)]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class _WeightsOf:
    """How a group of layers of compressed-tensors has its weights."""

    num_bits: Bits = 8
    block_structure: Block | Name | None = None

    @property
    def block(self) -> tuple[int, int] | None:
        if isinstance(self.block_structure, list):
            return self.block_structure[0], self.block_structure[1]
        return None


@dataclass(frozen=True, kw_only=True)
class _Group:
    weights: _WeightsOf | None = None
    format: Name | None = None


@dataclass(frozen=True, kw_only=True)
class _Stated:
    """The fields of a `quantization_config` of any method that tell how weights are stored."""

    quant_method: Name | None = None
    bits: Bits | None = None
    w_bit: Bits | None = None
    version: Name | None = None
    backend: Name | None = None
    checkpoint_format: Name | None = None
    format: Name | None = None
    is_marlin_format: bool = False
    pack_dtype: Name | None = None
    dynamic: dict[str, Any] | None = None
    config_groups: dict[str, _Group] | None = None
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None
    weight_block_size: Block | None = None


@dataclass(frozen=True)
class _Method:
    """How a method's weights are read: the name behind that of a module which tells a quantised one, the names of the
    other tensors, and what makes its weight of them.
    """

    tells: str
    others: tuple[str, ...]
    weight: Callable[[Tensors], Tensor]


class _MisfitError(ValueError):
    """Tensors of a module that do not fit each other."""


def stated_quantisation(config: object) -> dict[str, Any] | None:
    """Return what a configuration says of how its weights are quantised, None where they are not."""
    found = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    return found if isinstance(found, dict) else None


def dequantised(stated: dict[str, Any], files: Sequence[Path], source: str) -> dict[str, Tensor]:
    """Return all weights of the files, by name, the quantised ones as float32. Raises `InputError` for a method, or a
    variant of it, that is not read, by name, and for tensors that do not fit.
    """
    methods = _methods(CONFIG.fit(stated, _Stated, f"quantization_config of {source}"), source)
    with contextlib.ExitStack() as stack:
        where: dict[str, Any] = {}
        for path in files:
            file = stack.enter_context(opened_tensors(path, WEIGHTS))
            where |= dict.fromkeys(shapes(file), file)
        return dict(_read(methods, where, source))


def _read(methods: Sequence[_Method], where: dict[str, Any], source: str) -> Iterator[tuple[str, Tensor]]:
    taken = {name for name in where if name.endswith(OF_ACTIVATIONS)}
    for method in methods:
        for name in where:
            if name in taken or not name.endswith(f".{method.tells}"):
                continue
            module = name.removesuffix(f".{method.tells}")
            parts = [part for part in (method.tells, *method.others) if f"{module}.{part}" in where]
            taken |= {f"{module}.{part}" for part in parts}
            tensors = {part: where[f"{module}.{part}"].get_tensor(f"{module}.{part}") for part in parts}
            try:
                yield f"{module}.weight", method.weight(tensors)
            except (_MisfitError, KeyError) as error:
                fault = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
                raise InputError(
                    f"{source}: the quantised weight {module} is not whole: {fault}; {FETCH_AGAIN}"
                ) from error
    for name, file in where.items():
        if name not in taken:
            tensor = file.get_tensor(name)
            if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
                raise InputError(f"{source}: {name} is stored as {tensor.dtype}, without a scale; {TAKE_ANOTHER}")
            yield name, tensor


def _methods(stated: _Stated, source: str) -> list[_Method]:
    """Return how weights are read. Raises `InputError`, naming what is not read."""
    match stated.quant_method:
        case "awq":
            _check(source, "AWQ", "version", (stated.version or "gemm").lower(), ("gemm",))
            _check(source, "AWQ", "backend", stated.backend or "autoawq", ("autoawq", "auto"))
            _check(source, "AWQ", "bits", stated.bits or stated.w_bit or 4, (4,))
            return [_Method("qweight", ("qzeros", "scales"), awq_weight)]
        case "gptq":
            version = "marlin" if stated.is_marlin_format else stated.checkpoint_format or stated.format or "gptq"
            _check(source, "GPTQ", "checkpoint_format", version, tuple(GPTQ_FORMATS))
            _check(source, "GPTQ", "pack_dtype", (stated.pack_dtype or "int32").removeprefix("torch."), ("int32",))
            _check(source, "GPTQ", "dynamic", any((stated.dynamic or {}).values()), (False,))
            bits = _check(source, "GPTQ", "bits", stated.bits, WHOLE_BITS)
            return [
                _Method(
                    "qweight",
                    ("qzeros", "scales", "g_idx"),
                    lambda tensors: gptq_weight(tensors, bits, GPTQ_FORMATS[version]),
                )
            ]
        case "compressed-tensors":
            return _compressed_methods(stated, source)
        case "fp8":
            block = (stated.weight_block_size[0], stated.weight_block_size[1]) if stated.weight_block_size else None
            return [_Method("weight_scale_inv", ("weight",), lambda one: scaled_weight(one, block, "weight_scale_inv"))]
    raise InputError(
        f"{source} is quantised by {shown(stated.quant_method)}, which is not read; read are: {READ}; {TAKE_ANOTHER}"
    )


def _compressed_methods(stated: _Stated, source: str) -> list[_Method]:
    groups = [group for group in (stated.config_groups or {}).values() if group.weights]
    for version in {stated.format, *(group.format for group in groups)} - {None}:
        _check(source, "compressed-tensors", "format", version, COMPRESSED_FORMATS)
    sparse = (stated.sparsity_config or {}).get("format", "dense")
    _check(source, "compressed-tensors", "sparsity_config.format", sparse, ("dense",))
    _check(source, "compressed-tensors", "transform_config", bool(stated.transform_config), (False,))
    bits = {group.weights.num_bits for group in groups if group.weights}
    blocks = {group.weights.block for group in groups if group.weights} or {None}
    if len(blocks) > 1:
        raise InputError(
            f"{source}: compressed-tensors with weights in blocks beside others is not read; {TAKE_ANOTHER}"
        )
    (block,) = blocks
    return [
        _Method("weight_packed", ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
                lambda tensors: packed_weight(tensors, bits)),
        _Method("weight_scale", ("weight", "weight_zero_point"), lambda tensors: scaled_weight(tensors, block)),
    ]  # fmt: skip


def _check(source: str, method: str, field: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        known = ", ".join(map(str, allowed))
        raise InputError(
            f"{source} is quantised by {method} with {field} {shown(value)}, which is not read; allowed: {known}; "
            f"{TAKE_ANOTHER}"
        )
    return value


def unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """Return the values, from 0 to 2^bits - 1, of int32 `words` [m, n], the lowest bits first along `dim`."""
    if words.dtype != torch.int32 or words.ndim != 2:
        raise _MisfitError(f"packed values of type {words.dtype} and shape {list(words.shape)}, not a matrix of int32")
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values = (words.unsqueeze(dim + 1) >> shifts.view(-1, *(1,) * (1 - dim))) & ((1 << bits) - 1)
    return values.flatten(dim, dim + 1)


def awq_weight(tensors: Tensors) -> Tensor:
    """Return the weight [out, in] of AWQ's `qweight` [in, out / 8], `qzeros` [G, out / 8] and `scales` [G, out]."""
    order = torch.tensor(AWQ_ORDER).argsort()

    def values(words: Tensor) -> Tensor:
        found = unpacked(words, 4, 1)
        return found.view(len(found), -1, len(AWQ_ORDER))[:, :, order].flatten(1)

    quantised, zeros, scales = values(tensors["qweight"]), values(tensors["qzeros"]), tensors["scales"]
    return _by_group(quantised, zeros, scales, None).T.contiguous()


def gptq_weight(tensors: Tensors, bits: int, less: int) -> Tensor:
    """Return the weight [out, in] of GPTQ's `qweight` [in bits / 32, out], `qzeros` [G, out bits / 32], `scales`
    [G, out] and, where it is there, `g_idx` [in], the group of each input. Zero points are stored so much `less`.
    """
    quantised, zeros = unpacked(tensors["qweight"], bits, 0), unpacked(tensors["qzeros"], bits, 1)
    zeros = (zeros + less) & ((1 << bits) - 1)
    return _by_group(quantised, zeros, tensors["scales"], tensors.get("g_idx")).T.contiguous()


def packed_weight(tensors: Tensors, bits: set[int]) -> Tensor:
    """Return the weight [out, in] of compressed-tensors' `weight_packed` [out, ceil(in b / 32)], `weight_scale`
    [out, G], `weight_zero_point` [ceil(out b / 32), G] where there is one, `weight_shape` and `weight_g_idx` [in]; b is
    one of `bits`.
    """
    shape, words, scales = tensors["weight_shape"].tolist(), tensors["weight_packed"], tensors["weight_scale"]
    if not isinstance(shape, list) or len(shape) != 2 or words.ndim != 2 or scales.ndim != 2:
        raise _MisfitError(f"weight_shape {shape}, packed in {list(words.shape)}")
    outputs, inputs = map(int, shape)
    fits = [one for one in sorted(bits) if list(words.shape) == [outputs, math.ceil(inputs * one / 32)]]
    if not fits or fits[0] not in WHOLE_BITS:
        raise _MisfitError(
            f"weight_shape {shape}, packed in {list(words.shape)} by {sorted(bits)} bits (read: 2, 4, 8)"
        )
    width = fits[0]
    quantised = unpacked(words, width, 1)[:, :inputs]
    zeros = torch.full_like(scales, 1 << (width - 1), dtype=torch.int32)
    if (packed := tensors.get("weight_zero_point")) is not None:
        zeros = unpacked(packed, width, 0)[:outputs]
    return _by_group(quantised.T, zeros.T, scales.T, tensors.get("weight_g_idx")).T.contiguous()


def scaled_weight(tensors: Tensors, block: tuple[int, int] | None, scale: str = "weight_scale") -> Tensor:
    """Return the weight [out, in] of `weight`, int8 or fp8, and its scale: one, [out, 1], [out, G], or one for each
    `block` of rows and columns.
    """
    quantised, scales, zeros = tensors["weight"], tensors[scale], tensors.get("weight_zero_point")
    if quantised.ndim != 2 or quantised.dtype.itemsize != 1:
        raise _MisfitError(
            f"a weight of type {quantised.dtype} and shape {list(quantised.shape)}, not a matrix of bytes"
        )
    values = quantised.to(torch.float32)
    if zeros is not None:
        values = values - _spread(zeros, values.shape, block)
    return values * _spread(scales, values.shape, block)


def _spread(one: Tensor, shape: Sequence[int], block: tuple[int, int] | None) -> Tensor:
    """Return scales, or zero points, for each value of a weight [out, in]."""
    found = one.to(torch.float32)
    if found.numel() == 1:
        return found.reshape(1, 1)
    if found.ndim == 1:
        found = found[:, None]
    groups = found.shape
    if block and list(groups) == [math.ceil(size / side) for size, side in zip(shape, block, strict=True)]:
        for dim, side in enumerate(block):
            found = found.repeat_interleave(side, dim).narrow(dim, 0, shape[dim])
        return found
    if block or found.ndim != 2 or groups[0] != shape[0] or not groups[1] or shape[1] % groups[1]:
        raise _MisfitError(f"scales of shape {list(one.shape)} for a weight of shape {list(shape)}")
    return found.repeat_interleave(shape[1] // groups[1], 1)


def _by_group(quantised: Tensor, zeros: Tensor, scales: Tensor, group_of: Tensor | None) -> Tensor:
    """Return (q - z) s of `quantised` [in, out]; `zeros` and `scales` [G, out] are of groups of inputs, those that
    `group_of` [in] names, else as many one after another.
    """
    inputs, outputs = quantised.shape
    if scales.ndim != 2 or zeros.shape != scales.shape or scales.shape[1] != outputs or not scales.is_floating_point():
        raise _MisfitError(f"scales {list(scales.shape)}, zero points {list(zeros.shape)}, weights {[inputs, outputs]}")
    groups = len(scales)
    if group_of is None:
        if not groups or inputs % groups:
            raise _MisfitError(f"{groups} groups of {inputs} inputs")
        group_of = torch.arange(inputs) // (inputs // groups)
    group_of = group_of.to(torch.int64)
    if group_of.shape != (inputs,) or (inputs and not 0 <= int(group_of.min()) <= int(group_of.max()) < groups):
        raise _MisfitError(f"inputs are in groups that are none of {groups}")
    return (quantised - zeros[group_of]).to(torch.float32) * scales.to(torch.float32)[group_of]
