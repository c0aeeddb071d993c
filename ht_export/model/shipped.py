"""The transfer layers of an engine: those that the package carries, a file's, or untrained ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ht_export.model.checkpoint import BaseModel
from ht_export.model.known import KNOWN_MODELS
from ht_export.model.locate import locate
from ht_export.model.transfer import TransferFile, TransferLayers, default_layers, load_transfer_layers
from runtime.errors import InputError
from runtime.files import sha256_file

PRETRAINED = Path(__file__).parent / "pretrained"


class Untrained:
    """Stands for transfer layers that nobody has trained."""


UNTRAINED = Untrained()


def transfer_layers(chosen: Path | Untrained, base: BaseModel) -> tuple[TransferLayers, dict[str, Any]]:
    """Return transfer layers and what `engine.json` says of them."""
    if isinstance(chosen, Untrained):
        config = base.model.config
        transfer = TransferLayers(default_layers(config.num_hidden_layers), config.hidden_size).requires_grad_(False)
        about = TransferFile(base.identity(), {"steps": 0, "init": "identity", "layers": transfer.layers})
        return transfer, {"sha256": transfer.digest(), **_described(about)}
    transfer, about = load_transfer_layers(chosen, base.identity())
    described = {"sha256": sha256_file(chosen), **_described(about)}
    if about.base_model["weights_sha256"] != base.weights_sha256:
        # Of the model before adapters were merged into it.
        described["trained_for"] = {name: about.base_model.get(name) for name in ("name", "weights_sha256")}
    return transfer, described


def _described(about: TransferFile) -> dict[str, Any]:
    return {"recipe": about.recipe, "acceptance": about.acceptance}


def shipped_transfer(source: str) -> Path:
    """Return the transfer layers that the package carries for `source`. Raises `InputError` when there are none."""
    known = KNOWN_MODELS.get(source)
    if known is None:
        # A name that is none of a model says so first.
        locate(source)
        raise InputError(
            f"no transfer layers are shipped for {source} (only for: {', '.join(KNOWN_MODELS)}); "
            "train some with ht-train and give them with --transfer, or try the model with --random-transfer"
        )
    return PRETRAINED / known.transfer
