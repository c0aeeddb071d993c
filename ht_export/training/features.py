"""The part of the base model's run over the data that pseudo rows read, kept on disk so that it is not repeated.

A cache folder holds `features.json` (what it was made from) and `features-00000.safetensors`, ...: for each text one
tensor [tokens, F], the states that are joined or are the base model's output, then keys and values of each layer
passed. Where a draft head is trained there are `normalisers-00000.safetensors`, ..., too: for each text the answer's
`log_normalisers`, [tokens], 0 elsewhere, so that the base model's whole head runs once over the data.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta
from rich.progress import Progress
from torch import Tensor

from ht_export.model.checkpoint import BaseModel
from ht_export.model.families import decoder_parts, head_dim
from ht_export.model.tensors import opened_tensors, write_safetensors
from ht_export.training.batches import AnchorBatch, make_batch
from ht_export.training.data import AnsweredPrompt, fingerprint
from ht_export.training.drafts import Context, run_context
from ht_export.training.identity import first_difference
from ht_export.training.losses import log_normalisers
from runtime.errors import InputError
from runtime.files import write_json
from runtime.formats import Format, JsonFormat

DESCRIPTION = "features.json"
# What the names of files begin with.
STATES, NORMALISERS = "features", "normalisers"
TEXTS_PER_FILE = 64
BATCH = 8


@dataclass(frozen=True)
class _Description:
    """The run that a cache holds features of, and the layers whose states they have, from the first on."""

    weights_sha256: str
    dtype: str
    data_sha256: str
    state_layers: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(min_length=1)]

    def __post_init__(self) -> None:
        if any(after <= before for before, after in pairwise(self.state_layers)):
            raise ValueError("state_layers must rise")


DESCRIPTIONS = JsonFormat("description of features", 1 << 20, "delete its folder", kind=_Description)
FEATURES = Format("file of features", 1 << 24, "delete it and start again")


@dataclass(frozen=True)
class FeatureLayout:
    """The parts of a token's features: states of these layers, then keys and values from the first of them to L-1."""

    state_layers: tuple[int, ...]
    num_layers: int
    hidden_size: int
    key_value_heads: int
    head_dim: int

    @classmethod
    def of(cls, base: BaseModel, layers: Iterable[int]) -> FeatureLayout:
        """Return what training transfer layers at any of `layers` reads."""
        config = base.model.config
        return cls(
            state_layers=tuple(sorted({*layers, config.num_hidden_layers})),
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            key_value_heads=config.num_key_value_heads,
            head_dim=head_dim(config),
        )

    def covers(self, other: FeatureLayout) -> bool:
        """Return whether these features hold all of the other's."""
        return {*other.state_layers} <= {*self.state_layers}

    @property
    def first_layer(self) -> int:
        """The first layer that a pseudo row passes."""
        return self.state_layers[0]

    @property
    def width(self) -> int:
        """F, the values of a token."""
        passed = self.num_layers - self.first_layer
        return len(self.state_layers) * self.hidden_size + passed * 2 * self.key_value_heads * self.head_dim

    def pack(self, context: Context, row: int, length: int) -> Tensor:
        """Return the features [length, F] of one text."""
        parts = [context.hidden[layer][row, :length] for layer in self.state_layers]
        for layer in range(self.first_layer, self.num_layers):
            for states in (context.keys[layer], context.values[layer]):
                parts.append(states[row, :, :length].transpose(0, 1).flatten(1))
        return torch.cat(parts, dim=1)

    def last(self, features: Tensor) -> Tensor:
        """Return the last layer's output [..., d] of features [..., F]."""
        start = (len(self.state_layers) - 1) * self.hidden_size
        return features[..., start : start + self.hidden_size]

    def unpack(self, features: Tensor) -> Context:
        """Return the context of features [B, N, F]."""
        context = Context()
        heads = self.key_value_heads * self.head_dim
        passed = range(self.first_layer, self.num_layers)
        widths = [self.hidden_size] * len(self.state_layers) + [heads] * (2 * len(passed))
        parts = features.split(widths, dim=-1)
        for layer, part in zip(self.state_layers, parts, strict=False):
            context.hidden[layer] = part
        rest = iter(parts[len(self.state_layers) :])
        for layer in passed:
            for states in (context.keys, context.values):
                states[layer] = next(rest).unflatten(-1, (self.key_value_heads, self.head_dim)).transpose(1, 2)
        return context


class FeatureCache:
    """Features of every text of the data for transfer layers at any of `layers`, made once.

    A folder made for more layers serves fewer. With `normalisers` those of the answers are made too, and part of every
    context. Raises `InputError` for a folder made for anything else.
    """

    def __init__(
        self,
        folder: Path,
        base: BaseModel,
        layers: Sequence[int],
        data: Sequence[AnsweredPrompt],
        progress: Progress,
        *,
        normalisers: bool = False,
    ) -> None:
        self.folder = folder
        self.normalisers = normalisers
        self.layout = FeatureLayout.of(base, layers)
        self.dtype = base.model.dtype
        self.index = {id(sequence): number for number, sequence in enumerate(data)}
        self._check_description(base, data)
        self._make(base, data, progress)
        if normalisers:
            self._make_normalisers(base, data, progress)

    def context(self, batch: AnchorBatch) -> Context:
        """Return what `run_context` would for the batch; past a text's end there are zeros."""
        count, width = batch.input_ids.shape
        features = torch.zeros(count, width, self.layout.width, dtype=self.dtype)
        normalisers = torch.zeros(count, width)
        for row, sequence in enumerate(batch.sequences):
            number, length = self.index[id(sequence)], len(sequence)
            features[row, :length] = _read(self._path(number), number, (length, self.layout.width))
            if self.normalisers:
                normalisers[row, :length] = _read(self._path(number, NORMALISERS), number, (length,))
        context = self.layout.unpack(features.to(batch.input_ids.device))
        if self.normalisers:
            context.normalisers = normalisers.to(batch.input_ids.device)
        return context

    def _check_description(self, base: BaseModel, data: Sequence[AnsweredPrompt]) -> None:
        description: dict[str, Any] = {
            "weights_sha256": base.weights_sha256,
            "dtype": str(self.dtype).removeprefix("torch."),
            "data_sha256": fingerprint(data),
        }
        path = self.folder / DESCRIPTION
        if path.is_file():
            found = DESCRIPTIONS.read(path)
            held = replace(self.layout, state_layers=found.state_layers)
            if differing := first_difference(description, asdict(found)):
                raise InputError(
                    f"{self.folder} holds features of another {differing}; name a new --feature-cache, "
                    "or delete that folder"
                )
            if held.state_layers[-1] != held.num_layers:
                raise DESCRIPTIONS.unfit(path, f"its last layer is {held.state_layers[-1]}, not {held.num_layers}")
            if not held.covers(self.layout):
                raise InputError(
                    f"{self.folder} holds states of layers {', '.join(map(str, held.state_layers))}, and layers "
                    f"{', '.join(map(str, self.layout.state_layers))} are needed; name a new --feature-cache"
                )
            self.layout = held
        else:
            write_json(path, {**description, "state_layers": list(self.layout.state_layers)})

    def _make(self, base: BaseModel, data: Sequence[AnsweredPrompt], progress: Progress) -> None:
        groups, missing = self._groups(len(data))
        needed = sum(len(data[i]) for group in missing for i in group) * self.layout.width * self.dtype.itemsize
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"the feature cache needs {needed >> 20} MiB more in {self.folder} and {free >> 20} MiB are free; "
                "choose another disk, or train without --feature-cache"
            )
        bar = progress.add_task("caching features", total=len(groups), completed=len(groups) - len(missing))
        for group in missing:
            tensors: dict[str, Tensor] = {}
            ordered = sorted(group, key=lambda i: len(data[i]))
            for start in range(0, len(ordered), BATCH):
                chosen = ordered[start : start + BATCH]
                batch = make_batch([data[i] for i in chosen], 0, None, None)
                context = run_context(base.model, self.layout.state_layers, batch.input_ids.to(base.model.device))
                for row, i in enumerate(chosen):
                    tensors[str(i)] = self.layout.pack(context, row, len(data[i])).cpu().contiguous()
            write_safetensors(self._path(group.start), tensors)
            progress.advance(bar)

    def _make_normalisers(self, base: BaseModel, data: Sequence[AnsweredPrompt], progress: Progress) -> None:
        parts = decoder_parts(base.model)
        groups, missing = self._groups(len(data), NORMALISERS)
        bar = progress.add_task("caching normalisers", total=len(groups), completed=len(groups) - len(missing))
        for group in missing:
            states = []
            for number in group:
                found = _read(self._path(number), number, (len(data[number]), self.layout.width))
                # Drafts begin behind the answer's first token, so these predict all that they stand for.
                states.append(self.layout.last(found)[len(data[number].prompt) :])
            made = log_normalisers(parts, torch.cat(states).to(base.model.device)).cpu()
            tensors = {
                str(number): torch.cat([torch.zeros(len(data[number].prompt)), part])
                for number, part in zip(group, made.split([len(of_text) for of_text in states]), strict=True)
            }
            write_safetensors(self._path(group.start, NORMALISERS), tensors)
            progress.advance(bar)

    def _groups(self, texts: int, kind: str = STATES) -> tuple[list[range], list[range]]:
        """Return the numbers of the texts of each file, and of those files that are not there."""
        groups = [range(i, min(i + TEXTS_PER_FILE, texts)) for i in range(0, texts, TEXTS_PER_FILE)]
        return groups, [group for group in groups if not self._path(group.start, kind).is_file()]

    def _path(self, text: int, kind: str = STATES) -> Path:
        return self.folder / f"{kind}-{text // TEXTS_PER_FILE:05d}.safetensors"


def _read(path: Path, text: int, shape: tuple[int, ...]) -> Tensor:
    """Return a text's tensor from a file of them. Raises `InputError` for another shape."""
    with opened_tensors(path, FEATURES) as file:
        found = file.get_tensor(str(text))
    if found.shape != shape:
        raise FEATURES.unfit(path, f"text {text} is of shape {list(found.shape)}")
    return found
