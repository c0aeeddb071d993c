"""A Llama with transfer rows in plain torch, of any shape and of random weights that are made where it runs.

It computes what `ht_export.model.reference` does for models of this family, without `transformers`: to time passes of
shapes that nobody has carried weights of, where torch is all there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# query [B, Hq, R, D], new keys and values [B, Hkv, R, D], the cache's [B, Hkv, S, D], its length [B], the tree mask
# [B, R, R], the factor of scores; returns [B, Hq, R, D]. `plugins.reference` says what it is.
Attention = Callable[["Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", float], "Tensor"]


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama. `transfer_layers` are where pseudo rows join, 0 to `layers`."""

    layers: int
    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    transfer_layers: tuple[int, ...]
    theta: float = 10000.0
    epsilon: float = 1e-5

    @property
    def read_weights(self) -> int:
        """How many weights a pass reads: all but embeddings that are no head, of which it reads a row a token."""
        heads = self.query_heads + 2 * self.kv_heads
        layer = self.hidden * self.head_dim * (heads + self.query_heads) + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.vocab * self.hidden

    def row_bytes(self, item: int) -> int:
        """Return the bytes of the keys and values of a row, of numbers of `item` bytes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * item


SHAPES = {
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 64, 49152, True, (20, 20, 20), 100000.0),
    "llama-3.2-1b": Shape(16, 2048, 8192, 32, 8, 64, 128256, True, (11, 11, 11)),
    "llama-2-7b": Shape(32, 4096, 11008, 32, 32, 128, 32000, False, (21, 21, 21)),
}


@dataclass(frozen=True)
class Layer:
    """The weights of a layer, as [out, in]; those of queries, keys and values in one, and those of gate and up."""

    norm: Tensor
    qkv: Tensor
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Weights:
    """All weights; `maps` has the matrix and the bias of each draft step."""

    embed: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Tensor
    maps: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Outputs:
    """As `ht_export.model.reference.ForwardOutput`."""

    logits: Tensor
    draft_logits: Tensor
    key_new: list[Tensor]
    value_new: list[Tensor]


def random_weights(shape: Shape, dtype: Any, device: str, seed: int = 0) -> Weights:
    """Return random weights, such that states stay finite: those of a new model."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)

    def ones() -> Tensor:
        return torch.ones(shape.hidden, dtype=dtype, device=device)

    d, inner = shape.hidden, shape.query_heads * shape.head_dim
    heads = shape.query_heads + 2 * shape.kv_heads
    layers = tuple(
        Layer(
            ones(),
            normal(heads * shape.head_dim, d),
            normal(d, inner),
            ones(),
            normal(2 * shape.intermediate, d),
            normal(d, shape.intermediate),
        )
        for _ in range(shape.layers)
    )
    embed = normal(shape.vocab, d)
    head = embed if shape.tied else normal(shape.vocab, d)
    identity = torch.eye(d, dtype=dtype, device=device)
    bias = torch.zeros(d, dtype=dtype, device=device)
    return Weights(embed, layers, ones(), head, tuple((identity, bias) for _ in shape.transfer_layers))


def masked_attention(
    query: Tensor,
    key_new: Tensor,
    value_new: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_length: Tensor,
    tree_mask: Tensor,
    scale: float,
) -> Tensor:
    """Attend by torch's attention with a mask over the whole capacity."""
    import torch

    batch, _, rows, _ = query.shape
    capacity = key_cache.shape[2]
    cached = torch.arange(capacity, device=query.device) < cache_length[:, None]
    visible = torch.cat([cached[:, None].expand(batch, rows, capacity), tree_mask], dim=-1)[:, None]
    keys, values = torch.cat([key_cache, key_new], dim=2), torch.cat([value_cache, value_new], dim=2)
    return torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=visible, scale=scale, enable_gqa=True
    )


def kernel_attention(kernel: Any) -> Attention:
    """Return attention by our kernel, which takes tensors whose rows lie one behind the other."""
    from plugins.launch import Scores

    names = ("query", "key_new", "value_new", "key_cache", "value_cache", "cache_length", "tree_mask")

    def attend(*given: Any) -> Tensor:
        inputs = {name: tensor.contiguous() for name, tensor in zip(names, given, strict=False)}
        return kernel.attend(inputs, Scores(given[-1]))

    return attend


class Llama:
    """A pass of it. With `compiled`, torch fuses what is done to each number, which takes it some seconds once."""

    def __init__(self, shape: Shape, weights: Weights, attention: Attention, *, compiled: bool = False) -> None:
        import torch

        self.shape = shape
        self.weights = weights
        self.attention = attention

        def fused(work: Any) -> Any:
            return torch.compile(work, dynamic=True) if compiled else work

        self._add_norm, self._rotate, self._gate = map(fused, (_add_norm, _rotate, _gate))

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        tree_mask: Tensor,
        pseudo_parents: Sequence[Tensor],
        logit_rows: Tensor,
        cache_length: Tensor,
        key_cache: Sequence[Tensor],
        value_cache: Sequence[Tensor],
    ) -> Outputs:
        """Run all rows once; shapes as in `ht_export.model.reference.HiddenTransferModel.forward`."""
        import torch

        shape, weights = self.shape, self.weights
        tree = input_ids.shape[1]
        # What the blocks before have added, and what the last one adds: the norm takes both together.
        hidden, more = weights.embed[input_ids], None
        cos, sin = _angles(position_ids, shape, hidden.dtype)
        keys, values = [], []
        for index, layer in enumerate(weights.layers):
            if joining := self._joining(index):
                hidden, more = self._joined(hidden if more is None else hidden + more, joining, pseudo_parents), None
            alive = hidden.shape[1]
            normed, hidden = self._normed(hidden, more, layer.norm)
            qkv = torch.nn.functional.linear(normed, layer.qkv)
            query, key, value = self._rotate(
                qkv, cos[:, :alive], sin[:, :alive], shape.query_heads, shape.kv_heads, shape.head_dim
            )
            keys.append(key)
            values.append(value)
            mask = tree_mask[:, :alive, :alive]
            seen = self.attention(
                query, key, value, key_cache[index], value_cache[index], cache_length, mask, shape.head_dim**-0.5
            )
            more = torch.nn.functional.linear(seen.transpose(1, 2).flatten(2), layer.output)
            normed, hidden = self._normed(hidden, more, layer.mlp_norm)
            gated = self._gate(torch.nn.functional.linear(normed, layer.gate_up))
            more = torch.nn.functional.linear(gated, layer.down)
        hidden = hidden if more is None else hidden + more
        if joining := self._joining(shape.layers):
            hidden = self._joined(hidden, joining, pseudo_parents)
        wanted = hidden.gather(1, logit_rows[..., None].expand(-1, -1, shape.hidden))
        normed, _ = self._normed(torch.cat([wanted, hidden[:, tree:]], dim=1), None, weights.norm)
        logits = torch.nn.functional.linear(normed, weights.head)
        return Outputs(logits[:, : wanted.shape[1]], logits[:, wanted.shape[1] :], keys, values)

    def _joining(self, layer: int) -> list[int]:
        return [step for step, at in enumerate(self.shape.transfer_layers) if at == layer]

    def _joined(self, hidden: Tensor, steps: Sequence[int], pseudo_parents: Sequence[Tensor]) -> Tensor:
        import torch

        rows = [hidden]
        for step in steps:
            weight, bias = self.weights.maps[step]
            index = pseudo_parents[step][..., None].expand(-1, -1, hidden.shape[-1])
            rows.append(torch.nn.functional.linear(hidden.gather(1, index), weight, bias))
        return torch.cat(rows, dim=1)

    def _normed(self, hidden: Tensor, more: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self._add_norm(hidden, more, weight, self.shape.epsilon)


def _add_norm(hidden: Tensor, more: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the norm of the sum of both, and the sum."""
    import torch

    whole = hidden if more is None else hidden + more
    wide = whole.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight * scaled.to(whole.dtype), whole


def _angles(positions: Tensor, shape: Shape, dtype: Any) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [B, R, D] for positions [B, R]."""
    import torch

    half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=positions.device) / shape.head_dim
    angles = positions[..., None].float() / shape.theta**half
    both = torch.cat([angles, angles], dim=-1)
    return both.cos().to(dtype), both.sin().to(dtype)


def _rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, query_heads: int, kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values [B, H, R, D], the first two rotated, of their product [B, R, (Hq + 2 Hkv) D]."""
    import torch

    heads = qkv.unflatten(-1, (query_heads + 2 * kv_heads, head_dim)).transpose(1, 2)
    turned, value = heads[:, : query_heads + kv_heads], heads[:, query_heads + kv_heads :]
    low, high = turned.chunk(2, dim=-1)
    rotated = turned * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]
    return rotated[:, :query_heads].contiguous(), rotated[:, query_heads:].contiguous(), value.contiguous()


def _gate(gate_up: Tensor) -> Tensor:
    import torch

    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
