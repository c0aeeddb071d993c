"""The PyTorch reference as an engine: its text is that of the exported engine, alone and beside others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from ht_export.bench.gpu import passes
from ht_export.bench.gpu.engines import compare_reference, decode
from ht_export.bench.gpu.torch_bundle import write_bundle
from ht_export.bench.gpu.torch_engine import TorchEngine, TorchGenerator
from ht_export.model.checkpoint import load_base_model
from ht_export.model.reference import HiddenTransferModel
from ht_export.model.shipped import transfer_layers
from ht_export.model.transfer import load_transfer_layers
from plugins.binaries import KernelBinaries
from runtime import Generator
from runtime.bundle.engine_file import Limits
from runtime.engines import device_cache
from runtime.engines.cuda import Cuda
from runtime.errors import EngineFileError
from runtime.tree import TreeSizes
from tests.runtime.engines.gpu_engines import kernels_of, use_driver

PROMPTS = ["Hello", "A longer prompt than that, of several words", "x"]


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path, tiny_transfer: Path, tmp_path_factory: pytest.TempPathFactory) -> TorchGenerator:
    """The reference with files of its own: nothing was exported for it."""
    base = load_base_model(str(tiny_checkpoint))
    transfer, about = transfer_layers(tiny_transfer, base)
    path = tmp_path_factory.mktemp("reference") / "engine.torch"
    write_bundle(base, transfer, about, TreeSizes(4, (4, 2, 2)), path)
    model = HiddenTransferModel(base.model, transfer).requires_grad_(False)
    return TorchGenerator(path, model, adapt=False, max_batch=4)


@pytest.fixture(scope="module")
def exported(tiny_engine: Path) -> Generator:
    return Generator(tiny_engine, threads=1, adapt=False)


def test_its_text_is_the_exported_engines(reference: TorchGenerator, exported: Generator) -> None:
    expected = [one.tokens for one in exported.generate(PROMPTS, max_new_tokens=12)]
    for speculate in (True, False):
        found = reference.generate(PROMPTS, max_new_tokens=12, speculate=speculate)
        assert [one.tokens for one in found] == expected
    assert reference.about.precision == "float32"
    assert reference.engine.seconds > 0  # type: ignore[attr-defined]


def test_its_files_are_no_engine_for_anything_else(reference: TorchGenerator) -> None:
    with pytest.raises(EngineFileError, match="cannot load"):
        Generator(reference.path, adapt=False)


def test_it_is_checked_as_engines_on_a_gpu_are(
    reference: TorchGenerator, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "REPEATS", 2)
    monkeypatch.setattr(passes, "WARMUP", 1)
    about = reference.about
    limits = Limits(4, about.max_context, 8, about.prompt_chunk)
    assert decode(reference, PROMPTS[:2], 8)["faults"] == []
    found = compare_reference(reference, limits, tiny_engine, PROMPTS[:1], 8, 0)
    assert found["faults"] == []
    assert found["tokens"]["same"] == found["tokens"]["count"]
    assert list(passes.pass_times(reference.engine, limits, 0, lambda: True))


class SimulatedTorch:
    """Torch on the simulated GPU: on its memory, and in the order of its stream."""

    graphs = 0

    def __init__(self, cuda: Cuda) -> None:
        self._driver = cuda.driver

    def tensor_at(self, address: int, shape: Sequence[int], dtype: str) -> torch.Tensor:
        element = np.dtype(dtype)
        if not all(shape):
            return torch.empty(tuple(shape), dtype=getattr(torch, dtype))
        size = int(np.prod(shape)) * element.itemsize
        return torch.from_numpy(self._driver.at(address, size).view(element).reshape(shape))

    def launch(self, work: Callable[[], None]) -> None:
        self._driver.enqueue(work)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        SimulatedTorch.graphs += 1
        return lambda: self._driver.enqueue(work)


class OnSimulatedGpu(TorchGenerator):
    """Decoding on the simulated GPU."""

    def _open(self, *_: object) -> TorchEngine:
        about = self.about
        limits = Limits(4, about.max_context, 16, about.prompt_chunk)
        kernels = KernelBinaries.from_bytes(kernels_of(about, with_choices=True))
        forward = torch.no_grad()(self._model)
        return TorchEngine(forward, about.dims, limits, about.tree, kernels, device=SimulatedTorch)


def test_on_a_gpu_its_text_is_the_same_alone_and_beside_others(
    reference: TorchGenerator, exported: Generator, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_driver(tiny_engine, monkeypatch)
    # The tiny model's context would never need a second size.
    monkeypatch.setattr(device_cache, "SMALLEST_CAPACITY", 16)
    generator = OnSimulatedGpu(tiny_engine, reference._model, adapt=False, max_batch=4)
    expected = [one.tokens for one in exported.generate(PROMPTS, max_new_tokens=40)]
    for speculate in (True, False):
        found = generator.generate(PROMPTS, max_new_tokens=40, speculate=speculate)
        assert [one.tokens for one in found] == expected
        alone = [generator.generate(one, max_new_tokens=40, speculate=speculate).tokens for one in PROMPTS]
        assert alone == expected
    assert SimulatedTorch.graphs > 2
    assert isinstance(generator.engine, TorchEngine)
    assert generator.engine.refused == 0
    generator.close()


def test_on_a_cpu_it_is_computed_in_float32_alone(
    tiny_engine: Path, tiny_checkpoint: Path, tiny_transfer: Path
) -> None:
    base = load_base_model(str(tiny_checkpoint), torch.bfloat16)
    transfer, _ = load_transfer_layers(tiny_transfer, base.identity())
    with pytest.raises(AssertionError, match="float32"):
        TorchGenerator(tiny_engine, HiddenTransferModel(base.model, transfer.to(torch.bfloat16)), adapt=False)
