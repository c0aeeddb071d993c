"""What an engine is, from its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from ht_export.foreign import foreign_code
from ht_export.inspection.parts import DRAFT_HEAD, HEAD, LAYERS, PARTS, TRANSFER, Weight, operators, weights_of
from runtime.bindings import dynamic_dims
from runtime.bundle.engine_file import EngineFile, FileRecord, read_engine_file
from runtime.bundle.reading import GRAPH
from runtime.errors import EngineFileError


@dataclass(frozen=True)
class Cost:
    """What a part costs in a pass of the engine's own tree: bytes of weights that are read, and millions of
    multiplications. Attention over the cache is besides: it grows with the context.
    """

    part: str
    bytes: int
    products: float


@dataclass(frozen=True)
class Inspection:
    """What is known of an engine: `about` its description, sizes of its `files`, bytes of weights by part, nodes by
    operator of each graph, and the costs of a pass. A plan is opaque: it has neither weights nor nodes here.
    """

    engine: Path
    about: EngineFile
    files: dict[str, FileRecord]
    weights: dict[str, int]
    tied: bool
    operators: dict[str, dict[str, int]]
    costs: list[Cost]

    def to_dict(self) -> dict[str, Any]:
        """Return this as JSON has it."""
        about = self.about
        return {
            "engine": str(self.engine),
            "kind": "TensorRT plan" if about.plan else "ONNX graph",
            "precision": about.precision,
            "dims": asdict(about.dims),
            "max_context": about.max_context,
            "prompt_chunk": about.prompt_chunk,
            "tree": asdict(about.tree),
            "base_model": about.base_model,
            "transfer": about.transfer,
            "plan": about.plan and asdict(about.plan),
            "versions": about.versions,
            "parity": about.parity,
            "files": {kind: asdict(record) for kind, record in self.files.items()},
            "weight_bytes": self.weights,
            "tied_head": self.tied,
            "operators": self.operators,
            "pass": [asdict(cost) for cost in self.costs],
        }


def inspect(engine: Path) -> Inspection:
    """Read what the engine at `engine` is; its weights are not read. Raises `InputError`."""
    about = read_engine_file(engine)
    if about.graph.name != engine.name:
        raise EngineFileError(f"{engine.with_suffix('.json')} describes {about.graph.name}, not {engine.name}")
    named = {
        "engine": about.graph,
        "graph for the CPU": about.cpu_graph,
        "weights": about.weights,
        "tokenizer": about.tokenizer,
        "chat template": about.chat_template,
        "token correction": about.correction,
        "draft tokens": about.draft_tokens,
        "kernels": about.plan.kernels if about.plan else None,
    }
    files = {kind: record for kind, record in named.items() if record is not None}
    for record in files.values():
        record.open(engine, contents=False).close()
    if about.plan:
        return Inspection(engine, about, files, {}, False, {}, [])
    graph = read_graph(engine, about.graph)
    found = list(weights_of(graph, about.precision))
    counts = {"engine": operators(graph)}
    if about.cpu_graph:
        counts["graph for the CPU"] = operators(read_graph(engine, about.cpu_graph))
    sizes = {part: sum(one.bytes for one in found if one.part == part) for part in PARTS}
    sizes = {part: size for part, size in sizes.items() if size}
    return Inspection(engine, about, files, sizes, any(one.tied for one in found), counts, costs(about, found))


def read_graph(engine: Path, record: FileRecord) -> onnx.GraphProto:
    """Return a graph of an engine without its weights. Raises `InputError`."""
    path, content = record.read(engine, GRAPH)
    with foreign_code(f"{path} is not a valid graph", "export the engine again"):
        return onnx.load_model_from_string(content).graph


def costs(about: EngineFile, weights: Sequence[Weight]) -> list[Cost]:
    """Return what each part costs in a pass of the engine's own tree, the most products first."""
    dims, tree = about.dims, about.tree
    sizes = dynamic_dims(tree.tree_rows, tree.pseudo_rows, 0, 0)
    pseudo = sum(tree.pseudo_rows)
    own_head = any(one.part == DRAFT_HEAD for one in weights)

    def rows(one: Weight) -> int:
        if one.part == LAYERS and one.index is not None and one.index < dims.num_layers:
            return sum(sizes[name] for name in dims.rows_alive(one.index).split(" + "))
        if one.part == TRANSFER and one.index is not None and one.index < dims.num_steps:
            return tree.pseudo_rows[one.index]
        if one.part == HEAD:
            return tree.tree_rows + (0 if own_head else pseudo)
        return pseudo if one.part == DRAFT_HEAD else 0

    found = []
    for part in (LAYERS, TRANSFER, HEAD, DRAFT_HEAD):
        own = [one for one in weights if one.part == part]
        if own:
            # A tied head in quantised engines is stored twice: rows for the embeddings are not read as a whole.
            products = sum(one.products * rows(one) for one in own) / 1e6
            found.append(Cost(part, sum(one.bytes for one in own), products))
    return sorted(found, key=lambda cost: -cost.products)
