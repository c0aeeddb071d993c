"""Transfer layers: the trained maps W_k of arXiv 2404.12022, and the file that carries them.

The file is safetensors: `step{k}.weight` [d, d] and `step{k}.bias` [d] for k = 1..K, and one metadata entry
`hidden_transfer` that holds JSON: the format version, the transfer layers, the base model's identity, the training
recipe and the acceptance measured on held-out text. With a token correction there are its tensors, `correction.*`, too;
with a draft head, `draft_tokens` [V_d], the tokens that drafts are chosen from. Medusa heads are kept in the same file,
which says so, and is of a later version: earlier releases would take them for what they are not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Required, TypedDict

import torch
from msgspec import Meta
from torch import Tensor, nn

from ht_export.formats import VersionedFormat
from ht_export.model.correction import CorrectionNetwork
from ht_export.model.tensors import opened_tensors, shapes, write_safetensors
from runtime.bindings import MOST_VOCABULARY, join_order
from runtime.drafting.draft_tokens import fault_of
from runtime.drafting.foresight import Foresight
from runtime.drafting.reliability import Reliability
from runtime.errors import InputError, one_line, shown
from runtime.formats import Format

FORMAT_VERSION = 2
# That of files with Medusa heads.
MEDUSA_VERSION = 3
METADATA_KEY = "hidden_transfer"
DRAFT_TOKENS = "draft_tokens"
# Types that a file may have them in.
TOKEN_TYPES = (torch.int32, torch.int64)
CHOOSE_AGAIN = "choose them again with ht-train draft-head"
# Far above any model's.
LARGEST_SIZE = 1 << 16
MOST_STEPS = 64
DEFAULT_STEPS = 3

# What drafts: transfer layers, or heads to compare them with.
Drafter = Literal["transfer", "medusa"]
DRAFTERS: tuple[Drafter, ...] = ("transfer", "medusa")

Size = Annotated[int, Meta(ge=1, le=LARGEST_SIZE)]
Count = Annotated[int, Meta(ge=0, le=LARGEST_SIZE)]


class _TrainedFor(TypedDict, total=False):
    """The base model's identity, of which the sizes are needed; see `BaseModel.identity`."""

    hidden_size: Required[Size]
    num_layers: Required[Size]
    name: str
    architecture: str
    vocab_size: int
    weights_sha256: str


@dataclass(frozen=True)
class _Metadata:
    version: int
    layers: Annotated[list[Count], Meta(min_length=1, max_length=MOST_STEPS)]
    correction_rank: Count
    base_model: _TrainedFor
    recipe: dict[str, Any]
    acceptance: dict[str, Any]
    drafter: Drafter = "transfer"

    def __post_init__(self) -> None:
        if (self.version == MEDUSA_VERSION) != (self.drafter == "medusa"):
            raise ValueError(f"its version is {self.version}, which is not that of drafter {self.drafter!r}")


METADATA = VersionedFormat(
    "description of transfer layers",
    most_bytes=1 << 24,
    remedy="train it again",
    kind=_Metadata,
    version=MEDUSA_VERSION,
    earlier=(FORMAT_VERSION,),
    again="train the file again",
)
TRANSFER_LAYERS = Format("safetensors file of transfer layers", 1 << 24, "fetch or train it again")


class TransferLayers(nn.Module):
    """K affine maps of hidden states: W_k takes the input of layer t_k at a token to a pseudo state k positions on.

    `layers` holds t_1..t_K, 0-based; t_k = L stands for the output of the last layer, which is Medusa-1's place.
    The maps begin as the identity. With `correction_rank` above 0 the drafts are corrected for the token before each.
    `draft_tokens` [V_d], ascending, are the tokens that drafts are chosen from, read by their rows of the base model's
    head; None for the whole vocabulary.
    """

    drafter: Drafter = "transfer"
    # Whether drafts are made of normed states, behind the last norm, and read by the head as they are.
    behind_norm = False

    def __init__(
        self,
        layers: Sequence[int],
        hidden_size: int,
        correction_rank: int = 0,
        draft_tokens: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not layers:
            raise InputError("at least one transfer layer is needed")
        self.layers = tuple(layers)
        self.hidden_size = hidden_size
        # The same modules twice: a ModuleList registers them, a plain list has their type.
        self.linears = [nn.Linear(hidden_size, hidden_size) for _ in layers]
        self.maps = nn.ModuleList(self.linears)
        for linear in self.linears:
            self._begin(linear)
        self.correction: CorrectionNetwork | None = None
        if correction_rank:
            self.correction = CorrectionNetwork(len(layers), hidden_size, correction_rank)
        # A buffer, to be where the weights are; not among what is trained.
        self.draft_tokens: Tensor | None
        self.register_buffer("draft_tokens", draft_tokens, persistent=False)

    @staticmethod
    def _begin(linear: nn.Linear) -> None:
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)

    @property
    def num_steps(self) -> int:
        """K, the number of draft steps."""
        return len(self.layers)

    @property
    def draft_size(self) -> int:
        """V_d where drafts have a head of their own, 0 where they do not."""
        return 0 if self.draft_tokens is None else len(self.draft_tokens)

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
        """Return a SHA-256 of weights and draft tokens, which tells two sets of them apart."""
        digest = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
        if self.draft_tokens is not None:
            digest.update(DRAFT_TOKENS.encode() + self.draft_tokens.cpu().numpy().tobytes())
        return digest.hexdigest()

    def set_affine(self, step: int, weight: Tensor, bias: Tensor) -> None:
        """Set the map of `step` (0-based) to weight [d, d] and bias [d]."""
        with torch.no_grad():
            self.linears[step].weight.copy_(weight)
            self.linears[step].bias.copy_(bias)

    def forward(self, step: int, hidden: Tensor) -> Tensor:
        """Return the pseudo hidden states of `step` (0-based) for hidden states [..., d]."""
        return self.linears[step](hidden)


class MedusaHeads(TransferLayers):
    """K heads of Medusa-1 (arXiv 2401.10774), a yardstick: n + SiLU(W_k n + b_k) of a token's state n behind the last
    norm, where the code of its authors takes it, read by the base model's head.

    No layer of the base model runs for them, and they see neither each other nor the tokens in between. Each begins as
    the identity. Medusa's heads go on with a copy of the base model's head each, [V, d], trained too: of a small model
    those three copies are more than half of its weights, and here all steps share the frozen one.
    """

    drafter: Drafter = "medusa"
    behind_norm = True

    def __init__(self, layers: Sequence[int], hidden_size: int, draft_tokens: Tensor | None = None) -> None:
        super().__init__(layers, hidden_size, 0, draft_tokens)

    @staticmethod
    def _begin(linear: nn.Linear) -> None:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)

    def check_layers(self, num_layers: int) -> None:
        """Raise `InputError` unless every head is behind the last of `num_layers` layers."""
        if wrong := [layer for layer in self.layers if layer != num_layers]:
            raise InputError(
                f"Medusa heads come after the last layer, {num_layers}, not at {wrong[0]}; leave --layers out, or give "
                f"{num_layers} for each draft step"
            )

    def forward(self, step: int, hidden: Tensor) -> Tensor:
        """Return what the head reads of `step` (0-based) for normed states [..., d]."""
        return hidden + nn.functional.silu(self.linears[step](hidden))


def new_drafter(
    drafter: Drafter,
    layers: Sequence[int],
    hidden_size: int,
    correction_rank: int = 0,
    draft_tokens: Tensor | None = None,
) -> TransferLayers:
    """Return an untrained `drafter`; the rest is as for `TransferLayers`. Raises `InputError`."""
    if drafter == "transfer":
        return TransferLayers(layers, hidden_size, correction_rank, draft_tokens)
    if correction_rank:
        raise InputError(f"Medusa heads have no token correction, of rank {correction_rank} or any; set it to 0")
    return MedusaHeads(layers, hidden_size, draft_tokens)


def default_layers(num_layers: int, steps: int = DEFAULT_STEPS, drafter: Drafter = "transfer") -> tuple[int, ...]:
    """Return where the draft steps of a model join by default: all at two thirds of its depth, or behind all of it."""
    return (round(num_layers * 2 / 3) if drafter == "transfer" else num_layers,) * steps


@dataclass(frozen=True)
class TransferFile:
    """The metadata of a transfer-layers file: all that it holds besides the weights."""

    base_model: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=dict)
    acceptance: dict[str, Any] = field(default_factory=dict)


def save_transfer_layers(path: Path, transfer: TransferLayers, about: TransferFile) -> None:
    """Write `transfer` and what is known about it, atomically."""
    medusa = transfer.drafter == "medusa"
    metadata = {
        "version": MEDUSA_VERSION if medusa else FORMAT_VERSION,
        **({"drafter": transfer.drafter} if medusa else {}),
        "layers": list(transfer.layers),
        "correction_rank": transfer.correction.rank if transfer.correction else 0,
        "base_model": about.base_model,
        "recipe": about.recipe,
        "acceptance": about.acceptance,
    }
    tensors = dict(_named_in_file(transfer))
    if transfer.draft_tokens is not None:
        tensors[DRAFT_TOKENS] = transfer.draft_tokens.to(torch.int32)
    write_safetensors(path, tensors, {METADATA_KEY: json.dumps(metadata)})


def load_transfer_layers(path: Path, base_model: dict[str, Any] | None = None) -> tuple[TransferLayers, TransferFile]:
    """Read a transfer-layers file, as float32. With `base_model` (see `BaseModel.identity`) check that it fits it.

    Raises `InputError` that says what is missing, damaged, or does not fit.
    """
    if not path.is_file():
        raise InputError(f"no transfer layers at {path}; train them with ht-train, or check the path")
    with opened_tensors(path, TRANSFER_LAYERS) as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
        if text is None:
            raise InputError(
                f"{path} is a safetensors file but holds no transfer layers (no {METADATA_KEY!r} metadata)"
            )
        metadata = METADATA.decode(text, f"{path}, metadata {METADATA_KEY}")
        for read in (Reliability.of, Foresight.of):
            try:
                read(metadata.acceptance)
            except ValueError as error:
                raise InputError(f"{path}: {error}; fetch or train the file again") from error
        if base_model is not None:
            check_fits(path, metadata.base_model, base_model)
        layers, hidden_size = metadata.layers, metadata.base_model["hidden_size"]
        # Before there is memory for them: what is stated must be what is there.
        with torch.device("meta"):
            stated = new_drafter(metadata.drafter, layers, hidden_size, metadata.correction_rank)
        stated.check_layers(metadata.base_model["num_layers"])
        found = shapes(file)
        for name, parameter in _named_in_file(stated):
            if found.get(name) != parameter.shape:
                told = f"of shape {list(found[name])}" if name in found else "missing"
                raise InputError(f"{path}: {name} is {told}; it must be of shape {list(parameter.shape)}")
        draft_tokens = None
        if DRAFT_TOKENS in found:
            draft_tokens = _read_draft_tokens(path, file, found[DRAFT_TOKENS], metadata.base_model.get("vocab_size"))
        transfer = new_drafter(metadata.drafter, layers, hidden_size, metadata.correction_rank, draft_tokens)
        for name, parameter in _named_in_file(transfer):
            parameter.data = file.get_tensor(name).to(torch.float32)
            if not torch.isfinite(parameter).all():
                raise InputError(f"{path}: {name} has values that are not finite; train it again")
    about = TransferFile(dict(metadata.base_model), metadata.recipe, metadata.acceptance)
    return transfer.requires_grad_(False), about


def _read_draft_tokens(path: Path, file: Any, shape: tuple[int, ...], vocab_size: int | None) -> Tensor:
    """Return the draft tokens [V_d] of an opened file, which has them in this shape. Raises `InputError` unless they
    can be tokens of a vocabulary of `vocab_size`.
    """
    if vocab_size is None:
        raise InputError(f"{path} has {DRAFT_TOKENS}, and does not say of which vocab_size; {CHOOSE_AGAIN}")
    if len(shape) != 1 or not 1 <= shape[0] <= min(vocab_size, MOST_VOCABULARY):
        raise InputError(
            f"{path}: {DRAFT_TOKENS} is of shape {list(shape)}; it must have one dimension, of 1 to {vocab_size} "
            f"tokens; {CHOOSE_AGAIN}"
        )
    tokens = file.get_tensor(DRAFT_TOKENS)
    if tokens.dtype not in TOKEN_TYPES:
        raise InputError(f"{path}: {DRAFT_TOKENS} is of type {tokens.dtype}, not int32 or int64; {CHOOSE_AGAIN}")
    tokens = tokens.to(torch.int64)
    if fault := fault_of(tokens.numpy(), vocab_size):
        raise InputError(f"{path}, {DRAFT_TOKENS}: {fault}; {CHOOSE_AGAIN}")
    return tokens


def _named_in_file(transfer: TransferLayers) -> Iterator[tuple[str, Tensor]]:
    for k, linear in enumerate(transfer.linears, start=1):
        yield f"step{k}.weight", linear.weight
        yield f"step{k}.bias", linear.bias
    if transfer.correction is not None:
        for name, parameter in transfer.correction.named_parameters():
            yield f"correction.{name}", parameter


def check_fits(path: Path, trained_for: Mapping[str, Any], base_model: dict[str, Any]) -> None:
    """Raise `InputError`, naming the first difference, unless the file was trained for this base model, or for the one
    that adapters were merged into to make it: its drafts may be right less often then.
    """
    before = base_model.get("base_weights_sha256")
    for key in ("architecture", "hidden_size", "num_layers", "vocab_size", "weights_sha256"):
        if key == "weights_sha256" and before is not None and trained_for.get(key) == before:
            continue
        if trained_for.get(key) != base_model[key]:
            raise InputError(
                f"{path} holds transfer layers for another model: {key} is {shown(trained_for.get(key))} there "
                f"({one_line(trained_for.get('name'))}) and {base_model[key]!r} in {base_model['name']}; "
                "give the transfer layers trained for this model, or train some with ht-train"
            )
