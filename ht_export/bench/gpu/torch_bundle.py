"""An engine's files without a graph: what decoding needs besides passes, where the PyTorch reference computes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ht_export.bundle import special_tokens, write_correction, write_tokenizer, write_tokens_of_drafts
from ht_export.model.checkpoint import BaseModel
from ht_export.model.dims import graph_dims
from ht_export.model.transfer import TransferLayers
from ht_export.versions import PROJECT, version_of
from runtime.bundle.engine_file import EngineFile, FileRecord
from runtime.bundle.places import engine_file_path
from runtime.tree import TreeSizes

CHUNK = 256


def write_bundle(
    base: BaseModel, transfer: TransferLayers, about_transfer: dict[str, Any], tree: TreeSizes, path: Path
) -> None:
    """Write the files of an engine to `path` and beside it. In the place of the graph is a note that there is none, by
    which no other engine is taken for it: it can be opened by `TorchGenerator` alone.

    `about_transfer` is what `ht_export.model.shipped.transfer_layers` says of the transfer layers.
    """
    folder, stem = path.parent, path.stem
    folder.mkdir(parents=True, exist_ok=True)
    note = {"graph": "none: the PyTorch reference computes its passes", "transfer": about_transfer["sha256"]}
    path.write_text(json.dumps({**note, "base_model": base.identity()}), encoding="utf-8")
    tokenizer, template = write_tokenizer(base, folder, stem)
    EngineFile(
        dims=graph_dims(base.model.config, transfer),
        precision="float32",
        tree=tree,
        prompt_chunk=CHUNK,
        max_context=base.max_context,
        stop_tokens=tuple(base.stop_tokens()),
        special_tokens=special_tokens(base),
        graph=FileRecord.of(path),
        cpu_graph=None,
        weights=None,
        tokenizer=tokenizer,
        chat_template=template,
        correction=write_correction(base.model, transfer, folder, stem),
        draft_tokens=write_tokens_of_drafts(transfer, folder, stem),
        base_model=base.identity(),
        transfer=about_transfer,
        versions={name: version_of(name) for name in (PROJECT, "torch", "transformers")},
        parity={},
    ).write(engine_file_path(path))
