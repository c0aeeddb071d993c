"""Part 3: how long steps take over rows, requests and context; nothing but torch, Triton and what launches kernels."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ht_export.bench.gpu.compiled import Kernel
from ht_export.bench.gpu.kernel import what_is_missing
from ht_export.bench.gpu.llama import SHAPES, Attention, Llama, kernel_attention, masked_attention, random_weights
from ht_export.bench.gpu.step_time import Point, host_time, points, time_points
from ht_export.bench.gpu.timing import measure_bandwidth
from ht_export.gpu_day.kernels import every_key, held_kernels
from ht_export.gpu_day.settings import DaySettings, NotHereError
from ht_export.gpu_day.stages import Sections

# Seconds for one model in one type.
MODEL_SECONDS = 60.0
SMALL_POINTS = (Point(1, 1, 0, 64), Point(1, 4, 4, 64), Point(2, 4, 0, 64))
HOST_POINT = Point(1, 64, 0, 1024)


def first(settings: DaySettings) -> Sections:
    """Yield what matters most: the 7B shape, whose weights take the longest to read, and the smallest model."""
    models = _Models(settings)
    for name, dtype in (("llama-2-7b", "float16"), ("smollm2-135m", "float16"), ("llama-2-7b", "bfloat16")):
        yield f"{name} {dtype}", lambda name=name, dtype=dtype: models.times(name, dtype)  # type: ignore[misc]
    yield "host", lambda: models.host("smollm2-135m", "float16")
    # What torch's own attention makes of the same pass.
    yield "llama-2-7b float16, masked attention", lambda: models.times("llama-2-7b", "float16", masked=True)


def more(settings: DaySettings) -> Sections:
    """Yield the other models and types."""
    models = _Models(settings)
    for name, dtype in (
        ("llama-3.2-1b", "float16"),
        ("llama-3.2-1b", "bfloat16"),
        ("smollm2-135m", "bfloat16"),
    ):
        yield f"{name} {dtype}", lambda name=name, dtype=dtype: models.times(name, dtype)  # type: ignore[misc]
    yield "smollm2-135m float16, not fused", lambda: models.times("smollm2-135m", "float16", fused=False)


class _Models:
    """Models of random weights on the device that there is; in a rehearsal of two layers, and narrow."""

    def __init__(self, settings: DaySettings) -> None:
        self._settings = settings
        self._bandwidth: float | None = None
        self._attention: Attention | None = None

    def times(self, name: str, dtype: str, *, masked: bool = False, fused: bool = True) -> dict[str, Any]:
        """Time passes of a model."""
        settings = self._settings.until(MODEL_SECONDS)
        bandwidth = self._bytes_per_second()
        model, how = self._model(name, dtype, masked=masked, fused=fused)
        chosen = list(SMALL_POINTS if settings.rehearsal else points())
        if masked:
            chosen = [point for point in chosen if point.requests == 1 and not point.pseudo_rows]
        found = time_points(model, chosen, settings.device, settings.in_time, bandwidth)
        return {"model": name, "dtype": _dtype(settings, dtype), **how, "bytes_per_second": bandwidth, **found}

    def host(self, name: str, dtype: str) -> dict[str, Any]:
        """Time what the host adds to a step."""
        model, how = self._model(name, dtype)
        point = SMALL_POINTS[1] if self._settings.rehearsal else HOST_POINT
        return {"model": name, **how, **host_time(model, point, self._settings.device)}

    def _model(
        self, name: str, dtype: str, *, masked: bool = False, fused: bool = True
    ) -> tuple[Llama, dict[str, Any]]:
        import torch

        gc.collect()
        settings = self._settings
        shape = SHAPES[name]
        attention: Attention = masked_attention
        if settings.rehearsal:
            shape = replace(
                shape, layers=2, hidden=64, intermediate=96, vocab=256, transfer_layers=(1, 1, 1), theta=1e4
            )
            fused = False
        elif not masked:
            attention = self._kernel()
        weights = random_weights(shape, getattr(torch, _dtype(settings, dtype)), settings.device)
        how: dict[str, Any] = {"attention": "masked" if attention is masked_attention else "kernel", "fused": fused}
        if settings.rehearsal:
            how["shape"] = "two narrow layers"
        if fused:
            model = Llama(shape, weights, attention, compiled=True)
            try:
                _try(model, settings.device)
            except Exception as error:
                # The compiler of torch, or the one that it calls, is not everywhere.
                how |= {"fused": False, "not_fused": f"{type(error).__name__}: {error}"[:500]}
                fused = False
        return Llama(shape, weights, attention, compiled=fused), how

    def _kernel(self) -> Attention:
        if self._attention is None:
            if missing := what_is_missing():
                raise NotHereError(missing)
            import torch

            torch.zeros(1, device="cuda")
            folder, capability = self._settings.kit / "kernels", torch.cuda.get_device_capability()
            self._attention = kernel_attention(
                Kernel(held_kernels(folder, every_key(), capability, compile_others=False))
            )
        return self._attention

    def _bytes_per_second(self) -> float:
        if self._bandwidth is None:
            self._bandwidth = measure_bandwidth(self._settings.device)["bytes_per_second"]
        return self._bandwidth


def _dtype(settings: DaySettings, wanted: str) -> str:
    return "float32" if settings.rehearsal else wanted


def _try(model: Llama, device: str) -> None:
    from ht_export.bench.gpu.step_time import prepared

    work: Callable[[], None] = prepared(model, Point(1, 4, 4, 64), device).run
    work()
