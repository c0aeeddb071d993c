"""`ht-export`: an engine from a base model and its transfer layers."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from ht_export.model.known import KNOWN_MODELS
from runtime.bundle.places import engine_file_path
from runtime.errors import InputError
from runtime.options import Parser
from runtime.program import add_adapter, add_model, integers, pathname, run, say

if TYPE_CHECKING:
    from ht_export.tensorrt.planner import PlanSettings
    from runtime.bundle.engine_file import EngineFile, PlanFile


# Commands that take no model, each with its module. The model has no command before it, and never had: a folder of such
# a name is ./inspect.
BESIDE = {"inspect": "ht_export.inspection.cli"}


def build_parser() -> Parser:
    """Return the parser of `ht-export`."""
    parser = Parser(
        prog="ht-export",
        description="Export a base model with its transfer layers to one engine file for runtime.Generator and "
        "ht-generate: a graph for ONNX Runtime (.onnx) or a TensorRT plan (.plan). Beside ENGINE it writes the "
        "description (.json), the tokenizer, the chat template and what else belongs to it; keep them together.",
        epilog="examples: ht-export smollm2-135m --out engine.onnx; "
        "ht-export smollm2-135m --out engine.plan --precision bf16 --compute-capability 8.9; "
        "ht-export inspect engine.onnx tells what an engine is",
    )
    add_model(parser)
    add_adapter(parser)
    parser.add_argument(
        "--known-models",
        action="version",
        version="\n".join(KNOWN_MODELS),
        help="list the known names, and do nothing else",
    )
    drafts = parser.add_mutually_exclusive_group()
    drafts.add_argument(
        "--transfer", type=pathname, metavar="FILE", help="transfer layers (default: those shipped for a known model)"
    )
    drafts.add_argument(
        "--random-transfer",
        action="store_true",
        help="untrained transfer layers, to try a model before any training: the text is the base model's as ever, but "
        "drafts are hardly ever right, and what speed there is comes from repetitions in the text",
    )
    parser.add_argument(
        "--out", type=pathname, required=True, metavar="ENGINE", help="engine file to write (.onnx or .plan)"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "bf16", "fp8", "int8", "int4"),
        help="of the engine (default: fp16 for a plan, else fp32); bf16 runs on GPUs only; int8 and int4 quantise the "
        "weights, which changes the text a little (int8) or more (int4), and speculative text is not quite plain text; "
        "so does fp8, for plans and from compute capability 8.9",
    )
    parser.add_argument(
        "--calibrate",
        type=pathname,
        metavar="PROMPTS",
        help="calibrate int8 or int4 weights (GPTQ) on this JSONL file of prompts, as ht-train reads it; without, they "
        "are rounded to the nearest",
    )
    parser.add_argument(
        "--measure",
        type=pathname,
        metavar="PROMPTS",
        help="then answer up to 16 prompts of this JSONL file, as ht-train reads it, and tell the tokens per step that "
        "the transfer layers' drafts give; for ONNX engines",
    )
    parser.add_argument(
        "--tree-rows",
        type=int,
        metavar="T",
        help="default number of candidates verified in a pass (default: 16 for a plan, else 4)",
    )
    parser.add_argument(
        "--pseudo-rows",
        type=integers,
        metavar="R1,R2,...",
        help="default number of pseudo rows of each draft step (default: T each for a plan, else T, then half as many)",
    )
    parser.add_argument("--chunk", type=int, metavar="N", help="prompt tokens in a pass (default: 256)")
    parser.add_argument(
        "--max-context",
        type=int,
        metavar="N",
        help="tokens of prompt and answer together (default: the model's, where that has longrope scaling those before "
        "it sets in; at most 4096 in a plan)",
    )
    parser.add_argument("--json", action="store_true", help="print the engine's description on stdout, as JSON")
    _add_plan(parser.add_argument_group("TensorRT plans"))
    return parser


def _add_plan(plan: argparse._ArgumentGroup) -> None:
    plan.add_argument(
        "--runtime", choices=("tensorrt", "tensorrt-rtx"), help="product to build for (default: the one installed)"
    )
    plan.add_argument(
        "--compute-capability",
        type=_capability,
        action="append",
        default=[],
        dest="capabilities",
        metavar="X.Y",
        help="GPU to build for, repeat for more; TensorRT for RTX only (default: 8.0, 8.6, 8.9 and 12.0)",
    )
    plan.add_argument(
        "--attention",
        choices=("auto", "plugin", "native"),
        default="auto",
        help="our tree-attention kernel, or the library's own (default: ours where it can compute the model)",
    )
    plan.add_argument("--max-batch", type=int, default=8, metavar="B", help="requests in one pass (default: 8)")
    plan.add_argument(
        "--max-rows", type=int, metavar="T", help="most candidates of a pass (default: 32, or --tree-rows if more)"
    )
    plan.add_argument(
        "--timing-cache", type=pathname, metavar="FILE", help="keep the builder's measurements here, for later builds"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ht-export` and return its exit status: 0, or 1 with one line on stderr for a user's mistake."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given and given[0] in BESIDE:
        command = importlib.import_module(BESIDE[given[0]])
        return run(f"ht-export {given[0]}", lambda: command.main(given[1:]), interrupted="interrupted")
    return run(
        "ht-export",
        lambda: _export(build_parser().parse_args(given)),
        interrupted="interrupted; nothing was written",
    )


def _export(options: argparse.Namespace) -> None:
    from ht_export.export import UNTRAINED, ExportSettings, export
    from ht_export.progress import stage_display
    from ht_export.prompts import read_conversations
    from ht_export.tensorrt.planner import PlanSettings
    from ht_export.trial import try_drafts

    plan = PlanSettings(
        runtime=options.runtime,
        max_batch=options.max_batch,
        max_rows=options.max_rows,
        capabilities=tuple(options.capabilities),
        attention=options.attention,
        timing_cache=options.timing_cache,
    )
    if options.out.suffix != ".plan":
        _check_no_plan_options(plan)
    elif options.measure:
        raise InputError("--measure is for ONNX engines; leave it out, and measure a plan on its GPU with ht-bench")
    conversations = read_conversations(options.measure) if options.measure else None

    trial = None
    with stage_display() as stage:
        about = export(
            options.model,
            UNTRAINED if options.random_transfer else options.transfer,
            options.out,
            ExportSettings(
                options.tree_rows,
                options.pseudo_rows,
                options.chunk,
                options.precision,
                options.max_context,
                options.calibrate,
                tuple(options.adapters),
            ),
            stage,
            plan,
        )
        if conversations:
            trial = try_drafts(options.out, conversations, stage)
    size = sum(record.bytes for record in (about.graph, about.cpu_graph, about.weights) if record) / 2**20
    graphs = ("largest_relative_difference", "of_quantised_weights", "of_quantised_weights_on_the_cpu")
    difference = max(about.parity.get(graph, 0.0) for graph in graphs)
    print(f"done: {options.out}, {size:.0f} MiB, within {difference:.1e} of the PyTorch reference", file=sys.stderr)
    if "trained_for" in about.transfer:
        print(f"note: {_other_base(about, measured=trial is not None)}", file=sys.stderr)
    if trial:
        told = f"{trial.tokens_per_step:.2f} tokens per step (plain decoding: 1.00)"
        print(f"drafts: {told}, {trial.prompts} prompts of {options.measure}, {trial.tokens} tokens", file=sys.stderr)
    if about.plan:
        print(_summary(about.plan), file=sys.stderr)
    if options.json:
        say(engine_file_path(options.out).read_text(encoding="utf-8").rstrip())


def _check_no_plan_options(plan: PlanSettings) -> None:
    """Raise `InputError` for an option of plans where another engine is asked for."""
    for field in fields(plan):
        if getattr(plan, field.name) != field.default:
            flag = "compute-capability" if field.name == "capabilities" else field.name.replace("_", "-")
            raise InputError(f"--{flag} is for TensorRT plans; leave it out, or give an --out that ends in .plan")


def _other_base(about: EngineFile, *, measured: bool) -> str:
    """Return what to know of transfer layers that were trained for the model before adapters were merged into it."""
    adapters = ", ".join(one["name"] for one in about.base_model["adapters"])
    how_often = "how often is measured below" if measured else "--measure PROMPTS tells"
    return (
        f"the transfer layers were trained for {about.transfer['trained_for']['name']} without {adapters}; the text is "
        f"the merged model's, and drafts may be right less often than for the model alone: {how_often}, "
        "ht-train all --adapter trains others"
    )


def _summary(plan: PlanFile) -> str:
    """Return one line on a plan that was built."""
    built_for = ", ".join(f"{major}.{minor}" for major, minor in plan.compute_capabilities)
    count = plan.build["plugin_layers"] if plan.attention == "plugin" else plan.build["fused_attention_layers"]
    kind = "layers with our tree attention" if plan.attention == "plugin" else "layers with fused native attention"
    return (
        f"{plan.product} {plan.version} for compute capability {built_for}: {count} {kind}, built in "
        f"{plan.build['seconds']:.0f} s with {plan.build['peak_memory'] / 2**20:.0f} MiB; {plan.limits.max_batch} "
        f"requests of the longest context take {plan.build['cache_bytes_at_limits'] / 2**20:.0f} MiB of the GPU's "
        "memory, fewer and shorter ones less"
    )


def _capability(text: str) -> tuple[int, int]:
    from ht_export.tensorrt.products import parse_capability

    try:
        return parse_capability(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
