"""The command line of `ht-export inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from runtime.options import Parser
from runtime.program import pathname, say

if TYPE_CHECKING:
    from ht_export.inspection.describe import Inspection
    from ht_export.inspection.timing import Timing

# Operators that are shown; --json has all.
MOST_SHOWN = 12


def build_parser() -> Parser:
    """Return the parser of `ht-export inspect`."""
    parser = Parser(
        prog="ht-export inspect",
        description="Say what an engine is: its model and adapters, transfer layers, precision, sizes, files, versions "
        "and what was compared when it was exported; for an ONNX engine also where its weights are, its operators, and "
        "what a pass costs. Netron opens the same .onnx file: nodes of layer N are those that use weights of layers.N.",
    )
    parser.add_argument("engine", type=pathname, help="engine file made by ht-export (.onnx or .plan)")
    parser.add_argument(
        "--time", action="store_true", help="also run a few passes on the CPU, and tell where their time goes"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of --time (default: all cores)")
    parser.add_argument("--json", action="store_true", help="print JSON, with all that is known")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Inspect the engine that is named. Raises `InputError`."""
    options = build_parser().parse_args(arguments)
    from ht_export.inspection.describe import inspect
    from ht_export.inspection.timing import time_passes
    from runtime.checks import MOST_THREADS, whole

    if options.threads is not None:
        whole("--threads", options.threads, 1, MOST_THREADS)
    found = inspect(options.engine)
    timing = time_passes(options.engine, found.about, options.threads) if options.time else None
    if options.json:
        import json

        say(json.dumps({**found.to_dict(), **({"time": asdict(timing)} if timing else {})}, indent=2))
        return
    say("\n".join([*_lines(found), *(_timed(timing) if timing else ())]))


def _lines(found: Inspection) -> Iterator[str]:
    about, dims = found.about, found.about.dims
    base, tree = about.base_model, about.tree
    yield from _fields(
        {
            "engine": f"{found.engine}, {'TensorRT plan' if about.plan else 'ONNX graph'}, {about.precision}",
            "model": f"{base.get('name')} ({base.get('architecture')}), weights {str(base.get('weights_sha256'))[:12]}",
            **{
                f"adapter {number}": f"{one.get('name')}, {str(one.get('sha256'))[:12]}"
                for number, one in enumerate(base.get("adapters", ()), start=1)
            },
            "sizes": f"{dims.num_layers} layers, hidden size {dims.hidden_size}, {dims.query_heads} heads "
            f"({dims.key_value_heads} of keys and values) of {dims.head_dim}, {dims.vocab_size} tokens"
            + (f" ({dims.draft_size} for drafts)" if dims.draft_size else ""),
            "transfer layers": f"{', '.join(map(str, dims.transfer_layers))}, {_trained(about.transfer)}",
            "tree": f"{tree.tree_rows} candidates, pseudo rows {', '.join(map(str, tree.pseudo_rows))}",
            "context": f"{about.max_context} tokens, prompts in chunks of {about.prompt_chunk}, "
            f"{dims.row_bytes} bytes of keys and values a token",
            "compared": ", ".join(f"{name} {_number(value)}" for name, value in about.parity.items()) or "nothing",
            "versions": ", ".join(f"{name} {value}" for name, value in about.versions.items()),
        }
    )
    if about.plan:
        limits = about.plan.limits
        yield f"plan             {about.plan.product} {about.plan.version}, {about.plan.attention} attention, up to "
        yield f"                 {limits.max_batch} requests of {limits.max_context} tokens, {limits.max_rows} rows"
    yield from _table(
        "files", [(kind, one.name, _mebibytes(one.bytes), one.sha256[:12]) for kind, one in found.files.items()]
    )
    if not found.weights:
        return
    total = sum(found.weights.values())
    rows = [
        (
            f"{part} (also the embeddings)" if part == "head" and found.tied else part,
            _mebibytes(size),
            _share(size, total),
        )
        for part, size in found.weights.items()
    ]
    yield from _table("weights", rows)
    products = sum(cost.products for cost in found.costs) or 1.0
    yield from _table(
        "a pass of its own tree: weights read, and millions of multiplications (attention over the cache is besides)",
        [
            (cost.part, _mebibytes(cost.bytes), f"{cost.products:.1f}", _share(cost.products, products))
            for cost in found.costs
        ],
    )
    for graph, counts in found.operators.items():
        shown = [f"{name} {count}" for name, count in list(counts.items())[:MOST_SHOWN]]
        if len(counts) > len(shown):
            shown.append(f"{len(counts) - len(shown)} other operators")
        yield ""
        yield f"{graph}: {sum(counts.values())} nodes: {', '.join(shown)}"


def _timed(timing: Timing) -> Iterator[str]:
    for kind, times in (("part", timing.parts), ("operator", timing.operators)):
        yield from _table(
            f"time of a pass by {kind} ({timing.graph}, {timing.rows} rows behind {timing.context} tokens, "
            f"{timing.milliseconds:.1f} ms in nodes, mean of {timing.passes})",
            [
                (name, f"{one:.2f} ms", _share(one, timing.milliseconds))
                for name, one in list(times.items())[:MOST_SHOWN]
            ],
        )


def _trained(transfer: dict[str, Any]) -> str:
    recipe = transfer.get("recipe", {})
    told = "untrained" if recipe.get("steps") == 0 else "trained"
    if other := transfer.get("trained_for"):
        told += f" for {other.get('name')} alone"
    return f"{told}, file sha256 {str(transfer.get('sha256'))[:12]}"


def _fields(values: dict[str, str]) -> Iterator[str]:
    return (f"{name:16} {value}" for name, value in values.items())


def _table(title: str, rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    yield ""
    yield title
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            text.rjust(width) if text[:1].isdigit() and number else text.ljust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"  {'  '.join(cells)}".rstrip()


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "0 %"


def _number(value: object) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)
