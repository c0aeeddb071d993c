"""Transfer layers: the trained maps W_k of arXiv 2404.12022, and the file that carries them.

The file is safetensors: `step{k}.weight` [d, d] and `step{k}.bias` [d] for k = 1..K, and one metadata entry
`hidden_transfer` that holds JSON: the format version, the transfer layers, the base model's identity, the training
recipe and the acceptance measured on held-out text. With a token correction there are its tensors, `correction.*`, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ht_export.model.correction import CorrectionNetwork
from ht_export.model.tensors import write_safetensors
from runtime.bindings import join_order
from runtime.errors import InputError

FORMAT_VERSION = 2
METADATA_KEY = "hidden_transfer"
# Far above any model's; a damaged file must not ask for all memory.
LARGEST_SIZE = 1 << 16
DEFAULT_STEPS = 3


class TransferLayers(nn.Module):
    """K affine maps of hidden states: W_k takes the input of layer t_k at a token to a pseudo state k positions on.

    `layers` holds t_1..t_K, 0-based; t_k = L stands for the output of the last layer, which is Medusa-1's place.
    The maps begin as the identity. With `correction_rank` above 0 the drafts are corrected for the token before each.
    """

    def __init__(self, layers: Sequence[int], hidden_size: int, correction_rank: int = 0) -> None:
        super().__init__()
        if not layers:
            raise InputError("at least one transfer layer is needed")
        self.layers = tuple(layers)
        self.hidden_size = hidden_size
        # The same modules twice: a ModuleList registers them, a plain list has their type.
        self.linears = [nn.Linear(hidden_size, hidden_size) for _ in layers]
        self.maps = nn.ModuleList(self.linears)
        for linear in self.linears:
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.correction: CorrectionNetwork | None = None
        if correction_rank:
            self.correction = CorrectionNetwork(len(layers), hidden_size, correction_rank)

    @property
    def num_steps(self) -> int:
        """K, the number of draft steps."""
        return len(self.layers)

    @property
    def join_order(self) -> tuple[int, ...]:
        """The steps, 0-based, in the order of their rows; see `runtime.bindings.join_order`."""
        return join_order(self.layers)

    def joining(self, layer: int) -> list[int]:
        """Return the steps, 0-based, whose pseudo rows join at the input of `layer`, in row order."""
        return [k for k in self.join_order if self.layers[k] == layer]

    def check_layers(self, num_layers: int) -> None:
        """Raise `InputError` unless every transfer layer is one of 0..num_layers."""
        for layer in self.layers:
            if not 0 <= layer <= num_layers:
                raise InputError(
                    f"transfer layer {layer} does not exist in a model of {num_layers} layers; "
                    f"allowed: 0 (the embeddings) to {num_layers} (the last layer's output)"
                )

    def digest(self) -> str:
        """Return a SHA-256 of the weights, which tells two sets of them apart."""
        digest = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
        return digest.hexdigest()

    def set_affine(self, step: int, weight: Tensor, bias: Tensor) -> None:
        """Set the map of `step` (0-based) to weight [d, d] and bias [d]."""
        with torch.no_grad():
            self.linears[step].weight.copy_(weight)
            self.linears[step].bias.copy_(bias)

    def forward(self, step: int, hidden: Tensor) -> Tensor:
        """Return the pseudo hidden states of `step` (0-based) for hidden states [..., d]."""
        return self.linears[step](hidden)


def default_layers(num_layers: int, steps: int = DEFAULT_STEPS) -> tuple[int, ...]:
    """Return where the draft steps of a model join by default: all at two thirds of its depth."""
    return (round(num_layers * 2 / 3),) * steps


@dataclass(frozen=True)
class TransferFile:
    """The metadata of a transfer-layers file: all that it holds besides the weights."""

    base_model: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=dict)
    acceptance: dict[str, Any] = field(default_factory=dict)


def save_transfer_layers(path: Path, transfer: TransferLayers, about: TransferFile) -> None:
    """Write `transfer` and what is known about it, atomically."""
    metadata = {
        "version": FORMAT_VERSION,
        "layers": list(transfer.layers),
        "correction_rank": transfer.correction.rank if transfer.correction else 0,
        "base_model": about.base_model,
        "recipe": about.recipe,
        "acceptance": about.acceptance,
    }
    tensors = dict(_named_in_file(transfer))
    write_safetensors(path, tensors, {METADATA_KEY: json.dumps(metadata)})


def load_transfer_layers(path: Path, base_model: dict[str, Any] | None = None) -> tuple[TransferLayers, TransferFile]:
    """Read a transfer-layers file, as float32. With `base_model` (see `BaseModel.identity`) check that it fits it.

    Raises `InputError` that says what is missing, damaged, or does not fit.
    """
    if not path.is_file():
        raise InputError(f"no transfer layers at {path}; train them with ht-train, or check the path")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = _parse_metadata(path, (file.metadata() or {}).get(METADATA_KEY))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}); fetch or train it again") from error
    about = TransferFile(metadata["base_model"], metadata["recipe"], metadata["acceptance"])
    if base_model is not None:
        check_fits(path, about.base_model, base_model)
    layers = metadata["layers"]
    hidden_size = about.base_model["hidden_size"]
    transfer = TransferLayers(layers, hidden_size, metadata["correction_rank"])
    transfer.check_layers(about.base_model["num_layers"])
    for name, parameter in _named_in_file(transfer):
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != parameter.shape:
            found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
            raise InputError(f"{path}: {name} is {found}; it must be of shape {list(parameter.shape)}")
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: {name} has values that are not finite; train it again")
        parameter.data = tensor.to(torch.float32)
    return transfer.requires_grad_(False), about


def _named_in_file(transfer: TransferLayers) -> Iterator[tuple[str, Tensor]]:
    for k, linear in enumerate(transfer.linears, start=1):
        yield f"step{k}.weight", linear.weight
        yield f"step{k}.bias", linear.bias
    if transfer.correction is not None:
        for name, parameter in transfer.correction.named_parameters():
            yield f"correction.{name}", parameter


def check_fits(path: Path, trained_for: dict[str, Any], base_model: dict[str, Any]) -> None:
    """Raise `InputError`, naming the first difference, unless the file was trained for this base model."""
    for key in ("architecture", "hidden_size", "num_layers", "vocab_size", "weights_sha256"):
        if trained_for.get(key) != base_model[key]:
            raise InputError(
                f"{path} holds transfer layers for another model: {key} is {trained_for.get(key)!r} there "
                f"({trained_for.get('name')}) and {base_model[key]!r} in {base_model['name']}; "
                "give the transfer layers trained for this model, or train some with ht-train"
            )


def _parse_metadata(path: Path, text: str | None) -> dict[str, Any]:
    if text is None:
        raise InputError(f"{path} is a safetensors file but holds no transfer layers (no {METADATA_KEY!r} metadata)")
    try:
        metadata = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: its metadata is not valid JSON ({error}); train it again") from error
    version = metadata.get("version") if isinstance(metadata, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} is of format version {version}; this release reads version {FORMAT_VERSION}: "
            "update hidden-transfer, or train the file again"
        )
    for key, kind in (("layers", list), ("base_model", dict), ("recipe", dict), ("acceptance", dict)):
        if not isinstance(metadata.get(key), kind):
            raise InputError(f"{path}: its metadata lacks or misstates {key!r}; train it again")
    sizes = [metadata["base_model"].get("hidden_size"), metadata["base_model"].get("num_layers")]
    numbers = [*metadata["layers"], metadata.get("correction_rank"), *sizes]
    if not all(isinstance(number, int) and 0 <= number <= LARGEST_SIZE for number in numbers):
        raise InputError(
            f"{path}: layers, correction_rank, hidden_size and num_layers must be whole numbers from 0 to "
            f"{LARGEST_SIZE}; train it again"
        )
    return metadata
