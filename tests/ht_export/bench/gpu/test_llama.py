"""The Llama in plain torch computes what the reference does, and its passes are timed as they are told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ht_export.bench.gpu.llama import SHAPES, Layer, Llama, Shape, Weights, masked_attention, random_weights
from ht_export.bench.gpu.step_time import Point, host_time, points, summary, tables, time_points
from ht_export.bench.random_checkpoint import SHAPES as CHECKPOINTS
from ht_export.model.reference import HiddenTransferModel
from ht_export.model.transfer import TransferLayers
from tests.conftest import tiny_llama

LAYERS = (2, 2, 4)


def same_model() -> tuple[HiddenTransferModel, Llama]:
    """Return a tiny Llama with random transfer layers as the reference has it, and in plain torch."""
    torch.manual_seed(0)
    base = tiny_llama(num_key_value_heads=2)
    transfer = TransferLayers(LAYERS, base.config.hidden_size)
    for linear in transfer.linears:
        torch.nn.init.normal_(linear.weight, std=0.3)
        torch.nn.init.normal_(linear.bias, std=0.3)
    config = base.config
    shape = Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        query_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        vocab=config.vocab_size,
        tied=True,
        transfer_layers=LAYERS,
        theta=config.rope_parameters["rope_theta"],
        epsilon=config.rms_norm_eps,
    )
    layers = []
    for layer in base.model.layers:
        own, mlp = layer.self_attn, layer.mlp
        layers.append(
            Layer(
                layer.input_layernorm.weight,
                torch.cat([own.q_proj.weight, own.k_proj.weight, own.v_proj.weight]),
                own.o_proj.weight,
                layer.post_attention_layernorm.weight,
                torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
                mlp.down_proj.weight,
            )
        )
    weights = Weights(
        base.model.embed_tokens.weight,
        tuple(layers),
        base.model.norm.weight,
        base.lm_head.weight,
        tuple((linear.weight, linear.bias) for linear in transfer.linears),
    )
    return HiddenTransferModel(base, transfer), Llama(shape, weights, masked_attention)


def inputs_of(shape: Shape, batch: int) -> list[Any]:
    """Return the inputs of a pass of a tree of three tokens, with pseudo rows, over caches of several lengths."""
    generator = torch.Generator().manual_seed(1)
    counts = (3, 2, 1)
    rows = 3 + sum(counts)
    mask = (torch.rand(batch, rows, rows, generator=generator) < 0.5).tril() | torch.eye(rows, dtype=torch.bool)

    def cache() -> list[torch.Tensor]:
        size = (batch, shape.kv_heads, 9, shape.head_dim)
        return [torch.randn(size, generator=generator) for _ in range(shape.layers)]

    return [
        torch.randint(shape.vocab, (batch, 3), generator=generator),
        torch.randint(20, (batch, rows), generator=generator),
        mask,
        [torch.randint(3, (batch, count), generator=generator) for count in counts],
        torch.randint(3, (batch, 2), generator=generator),
        torch.tensor([5, 9, 0][:batch]),
        cache(),
        cache(),
    ]


@torch.no_grad()
def test_it_computes_what_the_reference_does() -> None:
    reference, llama = same_model()
    given = inputs_of(llama.shape, 3)
    expected, found = reference(*given), llama(*given)
    for name in ("logits", "draft_logits", "key_new", "value_new"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3.2-1b"])
def test_its_shapes_are_those_of_the_models(name: str) -> None:
    shape, config = SHAPES[name], CHECKPOINTS[name]
    assert shape.hidden == config["hidden_size"]
    assert shape.layers == config["num_hidden_layers"]
    assert (shape.query_heads, shape.kv_heads) == (config["num_attention_heads"], config["num_key_value_heads"])
    assert (shape.intermediate, shape.vocab) == (config["intermediate_size"], config["vocab_size"])
    assert shape.query_heads * shape.head_dim == shape.hidden


def test_weights_are_counted_as_they_are_made() -> None:
    shape = Shape(2, 32, 48, 4, 2, 8, 100, False, (1,))
    made = random_weights(shape, torch.float32, "cpu")
    every = [getattr(layer, name) for layer in made.layers for name in ("qkv", "output", "gate_up", "down")]
    assert shape.read_weights == sum(one.numel() for one in [*every, made.head])
    assert SHAPES["llama-2-7b"].read_weights > 6.5e9


def test_passes_are_timed_and_what_they_say_is_told() -> None:
    shape = Shape(2, 32, 48, 4, 2, 8, 100, True, (1, 1))
    llama = Llama(shape, random_weights(shape, torch.float32, "cpu"), masked_attention)
    chosen = [Point(1, rows, 0, 1024) for rows in (1, 16, 32, 64)] + [Point(1, 16, 16, 1024), Point(2, 1, 0, 64)]
    found = time_points(llama, chosen, "cpu", lambda: True, 1e9)
    assert [row["tree_rows"] for row in found["rows"]] == [1, 16, 32, 64, 16, 1]
    assert found["weight_limit_ms"] == pytest.approx(4e3 * shape.read_weights / 1e9)
    assert set(found["summary"]) == {
        "plain_ms", "knee_rows", "rows_64_over_1", "tree_row_us", "pseudo_row_us", "plain_over_weight_limit"
    }  # fmt: skip
    assert len(list(tables(found))) == 2 + len(chosen)
    late = time_points(llama, chosen, "cpu", lambda: False, None)
    assert [one["why"] for one in late["left_out"]] == ["time"] * len(chosen)
    assert host_time(llama, Point(1, 4, 4, 64), "cpu", 2)["step_ms"] > 0


def test_a_pass_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ht_export.bench.gpu.step_time._free", lambda _: 1 << 20)
    shape = Shape(2, 32, 48, 4, 2, 8, 100, True, (1,))
    llama = Llama(shape, random_weights(shape, torch.float32, "cpu"), masked_attention)
    found = time_points(llama, [Point(1, 1, 0, 64), Point(64, 1, 0, 8192)], "cpu", lambda: True, None)
    assert [(one["requests"], one["why"]) for one in found["left_out"]] == [(64, "memory")]


def test_the_knee_is_the_last_row_count_that_is_nearly_free() -> None:
    def row(tree: int, pseudo: int, ms: float) -> dict[str, Any]:
        return {"requests": 1, "context": 1024, "tree_rows": tree, "pseudo_rows": pseudo, "ms": ms}

    rows = [row(1, 0, 4.0), row(16, 0, 4.2), row(32, 0, 4.36), row(64, 0, 4.6), row(128, 0, 6.0), row(16, 16, 4.68)]
    found = summary(rows, 3, 3.2)
    assert found["knee_rows"] == 64
    assert found["rows_64_over_1"] == pytest.approx(1.15)
    assert found["tree_row_us"] == pytest.approx(10.0)
    assert found["pseudo_row_us"] == pytest.approx(10.0)
    assert found["plain_over_weight_limit"] == pytest.approx(1.25)
    assert summary([], 3, None) == {}


def test_the_passes_that_are_timed_span_what_they_should() -> None:
    every = points()
    assert {one.tree_rows for one in every} >= {1, 64, 256}
    assert {one.requests for one in every} == {1, 2, 4, 8, 16, 32, 64}
    assert {one.context for one in every} == {64, 1024, 8192}
    assert len(set(every)) == len(every)
