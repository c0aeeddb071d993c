"""Graphs without some blocks compute what the base model does without them."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from ht_export.graph.skip_blocks import skip_blocks
from ht_export.graph.trace import build_graph
from ht_export.model.blocks import Blocks
from ht_export.model.dims import graph_dims
from ht_export.model.reference import HiddenTransferModel
from ht_export.model.skipping import without
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.engines.protocol import Batch
from runtime.errors import InputError
from runtime.rows import prompt_rows
from tests.conftest import random_transfer, tiny_llama
from tests.families import tiny_model

IDS = [3, 77, 12, 40, 5, 130]
FAMILIES = ["llama", "gemma2", "cohere", "olmo2", "granite", "phi3", "glm4", "starcoder2"]


def logits_of(path: Path, dims: object) -> np.ndarray:
    engine = OnnxRuntimeEngine(path, dims)  # type: ignore[arg-type]
    rows = prompt_rows(IDS, engine.dims.join_order, 0, every_logit=True)
    found = engine.run(Batch.of([rows], [engine.new_slot()])).outputs(0).logits
    return np.array([found[row] for row in range(len(IDS))])


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_base_model_without_the_blocks(name: str, tmp_path: Path) -> None:
    base = tiny_model(name).eval()
    transfer = random_transfer((1, 2), base.config.hidden_size)
    dims = graph_dims(base.config, transfer)
    portable = tmp_path / "graph.onnx"
    ir.save(build_graph(HiddenTransferModel(base, transfer).eval()), portable, external_data="graph.data")
    for blocks in (Blocks(attention=(0,)), Blocks(mlp=(1,)), Blocks((1,), (0, 1)), Blocks(mlp=(0,), attention=(0,))):
        model = ir.load(portable)
        found = skip_blocks(model, dims, blocks)
        path = tmp_path / "skipped.onnx"
        ir.save(model, path)
        onnx.checker.check_model(str(path))
        with torch.no_grad(), without(base, blocks):
            expected = base(torch.tensor([IDS]), use_cache=False).logits[0].numpy()
        np.testing.assert_allclose(logits_of(path, found), expected, rtol=1e-4, atol=2e-5)


def test_what_is_left_has_the_bindings_of_the_layers_that_attend(tmp_path: Path) -> None:
    base, transfer = tiny_llama().eval(), random_transfer((3, 1, 4))
    dims = graph_dims(base.config, transfer)
    model = build_graph(HiddenTransferModel(base, transfer).eval())
    found = skip_blocks(model, dims, Blocks(attention=(0, 2), mlp=(2, 3)))
    assert (found.num_layers, found.transfer_layers) == (2, (1, 0, 2))
    assert [value.name for value in model.graph.inputs] == [binding.name for binding in found.inputs()]
    assert [value.name for value in model.graph.outputs] == [binding.name for binding in found.outputs()]


def test_the_base_model_is_whole_again_afterwards() -> None:
    base = tiny_llama().eval()
    ids = torch.tensor([IDS])
    with torch.no_grad():
        before = base(ids, use_cache=False).logits
        with without(base, Blocks((1,), (2,))):
            assert not torch.allclose(base(ids, use_cache=False).logits, before)
        torch.testing.assert_close(base(ids, use_cache=False).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (Blocks(attention=(4,)), r"attention is left out of layers \[4\]; layers must ascend, within 0 to 3"),
        (Blocks(mlp=(2, 1)), r"mlp is left out of layers \[2, 1\]; layers must ascend"),
        (Blocks(attention=(0, 1, 2, 3)), "attention is left out of every layer"),
    ],
)
def test_blocks_that_cannot_be_left_out(blocks: Blocks, message: str) -> None:
    with pytest.raises(InputError, match=message):
        blocks.check(4)
