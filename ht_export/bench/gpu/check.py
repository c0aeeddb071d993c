"""`ht-bench gpu`: check what needs an NVIDIA GPU, the tree-attention kernel and engines that were exported.

It also runs as `python -m ht_export.bench.gpu` in a clone, with none of the exporter's libraries installed: nothing
here may import these.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ht_export.bench.gpu.engines import engine_part
from ht_export.bench.gpu.environment import environment
from ht_export.bench.gpu.kernel import kernel_part
from ht_export.bench.gpu.parts import Sections, isolated
from runtime.checks import MOST_REPEATS
from runtime.errors import InputError
from runtime.files import check_writable, write_json
from runtime.options import Parser
from runtime.program import pathname, run, say

DESCRIPTION = """
Check what needs an NVIDIA GPU: the tree-attention kernel, and the engines that you exported.

The kernel is compared with its definition over a grid of shapes and types, and timed against torch's attention with a
mask and against the memory bandwidth of this GPU, measured in the same run. Torch and Triton are enough for that.

Of each engine: is speculative text the same as plain text; how do its outputs compare with those of an fp32 engine on
the CPU (--reference); how long does a pass take over rows and context, with CUDA graphs and without, and a step over
requests; how fast is decoding. An .onnx engine needs onnxruntime-gpu, a .plan the TensorRT that built it.
"""
EXAMPLES = """
examples:
  ht-bench gpu --json report.json

  ht-export smollm2-135m --out fp32/engine.onnx
  ht-export smollm2-135m --out fp16/engine.plan
  ht-bench gpu --engine fp16/engine.plan --engine fp32/engine.onnx --reference fp32/engine.onnx

From a clone, where nothing but torch, Triton and cuda-bindings is installed: python -m ht_export.bench.gpu ...
Exits with 1 when a check fails, an engine cannot run, or nothing could be checked at all.
"""
NO_ENGINES = "none given; make one with: ht-export smollm2-135m --out engine.plan, then add: --engine engine.plan"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m ht_export.bench.gpu`; return the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)

    def work() -> int:
        parser = Parser(prog="ht-bench gpu")
        add_options(parser)
        options = parser.parse_args(given)
        options.arguments = ["gpu", *given]
        return check(options)

    return run("ht-bench gpu", work, interrupted="interrupted")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ht-bench gpu`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(work=check, interrupted="interrupted")
    add = parser.add_argument
    add("--engine", type=_engine, action="append", default=[], metavar="ENGINE", help=".plan or .onnx; may repeat")
    add(
        "--reference",
        type=pathname,
        metavar="ENGINE",
        help="fp32 .onnx engine of the same model, to compare engines with",
    )
    add("--json", type=pathname, metavar="FILE", help="write everything measured here, as it is found")
    add("--no-kernel", dest="kernel", action="store_false", help="leave the kernel out")
    add("--cases", type=_count, default=1000, metavar="N", help="cases of the kernel's grid (default: 1000)")
    add("--prompts", type=_count, default=8, metavar="N", help="prompts that an engine answers (default: 8)")
    add("--max-new-tokens", type=_count, default=64, metavar="N", help="of each answer (default: 64)")
    add("--limit", type=_count, default=240, metavar="SECONDS", help="stop a part after so long (default: 240)")
    add("--seed", type=int, default=0, help="of all that is random (default: 0)")


def check(options: argparse.Namespace) -> int:
    """Run every part, write what they found after each section of it, print it; return the exit status."""
    started = time.monotonic()
    report: dict[str, Any] = {"environment": environment(options.arguments), "kernel": {}, "engines": []}

    def collect(sections: Sections, into: dict[str, Any]) -> None:
        for name, value in sections:
            into[name] = value
            report["seconds"] = round(time.monotonic() - started, 1)
            report["faults"] = list(faults(report))
            if options.json:
                write_json(options.json, report)

    try:
        if options.json:
            check_writable(options.json)
            _check_apart(options)
        if options.kernel:
            collect(isolated(kernel_part, options.cases, options.seed, seconds=options.limit), report["kernel"])
        else:
            collect(iter([("skipped", "left out, as asked")]), report["kernel"])
        for path in options.engine:
            report["engines"].append({"path": str(path)})
            settings = (path, options.reference, options.prompts, options.max_new_tokens, options.seed)
            collect(isolated(engine_part, *settings, seconds=options.limit), report["engines"][-1])
    except InputError as error:
        print(f"ht-bench gpu: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ht-bench gpu: interrupted; here is what was found before", file=sys.stderr)
        say("\n".join(table(report)))
        return 130
    say("\n".join(table(report)))
    return 1 if report["faults"] or (is_skipped(report["kernel"]) and not report["engines"]) else 0


def _check_apart(options: argparse.Namespace) -> None:
    """Raise `InputError` where the report would replace a file of an engine."""
    if engines := [engine for engine in (*options.engine, options.reference) if engine]:
        from runtime.bundle.placing import check_apart

        check_apart(options.json, engines)


def _count(text: str) -> int:
    # Longer numbers than these are refused before they are read.
    if not text.isdecimal() or len(text) > 20 or not 1 <= int(text) <= MOST_REPEATS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MOST_REPEATS}")
    return int(text)


def _engine(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".plan", ".onnx"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a .plan nor an .onnx engine")
    return path


def is_skipped(part: dict[str, Any]) -> bool:
    """Return whether a part could not run, through no fault of what it checks."""
    return "skipped" in part


def faults(report: dict[str, Any]) -> Iterator[str]:
    """Yield every fault that the parts found, and every error that kept one from looking."""
    parts = [("kernel", report["kernel"]), *((engine["path"], engine) for engine in report["engines"])]
    for name, part in parts:
        for section, value in part.items():
            if section == "error":
                yield f"{name}: {value}"
            elif isinstance(value, dict):
                found = [*value.get("faults", ()), *([value["error"]] if "error" in value else [])]
                yield from (f"{name}, {section}: {fault}" for fault in found)


def table(report: dict[str, Any]) -> Iterator[str]:
    """Yield the report as lines of text and Markdown tables."""
    yield report["environment"]["gpu"] or "no GPU (nvidia-smi does not answer)"
    yield from kernel_table(report["kernel"])
    if not report["engines"]:
        yield f"engines: {NO_ENGINES}"
    for engine in report["engines"]:
        yield from engine_table(engine)
    found = list(faults(report))
    yield f"\n{len(found)} faults" if found else "\nno faults"
    yield from (f"- {fault}" for fault in found)


def kernel_table(kernel: dict[str, Any]) -> Iterator[str]:
    """Yield what was found of the kernel."""
    if is_skipped(kernel):
        yield f"kernel: not checked: {kernel['skipped']}"
    if "worst_error" in kernel.get("checks", {}):
        checks = kernel["checks"]
        worst = ", ".join(f"{name} {error:.1e}" for name, error in checks["worst_error"].items())
        yield f"kernel: {checks['cases']} cases, {len(checks['failures'])} wrong; largest relative error: {worst}"
        yield from (f"  {failure}" for failure in checks["failures"][:5])
    if "wrong" in kernel.get("commits", {}):
        commits = kernel["commits"]
        yield f"commits of many requests: {commits['cases']} cases, {commits['wrong']} wrong"
    if "copy" in kernel.get("bandwidth", {}):
        found = {name: value / 1e12 for name, value in kernel["bandwidth"].items()}
        yield f"memory: copy {found['copy']:.2f} TB/s, read {found['read']:.2f} TB/s; the greater is the limit below\n"
    if "rows" in kernel.get("speed", {}):
        yield "| model | context | rows | kernel us | torch SDPA us | asked for | bandwidth limit us | share |"
        yield "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |"
        for row in kernel["speed"]["rows"]:
            yield (
                f"| {row['model']} | {row['context']} | {row['rows']} | {row['kernel_us']:.1f} | "
                f"{row['torch_sdpa_us']:.1f} | {row['torch_sdpa_way']} | {row['bandwidth_limit_us']:.1f} | "
                f"{row['share_of_bandwidth']:.2f} |"
            )


def engine_table(engine: dict[str, Any]) -> Iterator[str]:
    """Yield what was found of one engine."""
    about = engine.get("about")
    yield f"\n{engine['path']}: " + (
        f"{about['model']}, {about['dtype']}, {about['runs_on']}, tree of {about['tree_rows']}"
        if about
        else "not opened"
    )
    if "rows" in engine.get("decoding", {}):
        found = engine["decoding"]
        yield (
            f"decoding: {found['prompts']} prompts, speculative text is plain text in {found['same_text']}; "
            f"{found['tokens_per_step']:.2f} tokens a step, {found['plain_tokens_per_second']:.1f} tokens/s plain, "
            f"{found['tokens_per_second']:.1f} speculative: {found['speedup']:.2f} x"
        )
        for row in found["rows"]:
            if row["difference"]:
                yield f"  parts from plain text: {row['difference']}, {row['prompt']!r}"
    if engine.get("shapes", {}).get("rows"):
        yield f"a token alone and beside others: logits differ by up to {_worst(engine['shapes']['rows'])}"
    if "outputs" in engine.get("reference", {}):
        found = engine["reference"]
        for name in ("logits", "draft_logits"):
            rows = [row for row in found["outputs"] if row["output"] == name]
            if rows:
                yield f"{name} differ from the reference's by up to {_worst(rows)}"
        tokens = found["tokens"]
        yield (
            f"tokens: {tokens['same']} of {tokens['count']} are the reference's choice; first others at "
            f"{tokens['first_differences']}, largest relative gap {tokens['largest_relative_gap']}"
        )
    timed = {
        name: engine[section]
        for section, name in (("latency", "as it runs"), ("latency_without_graphs", "without CUDA graphs"))
        if engine.get(section, {}).get("rows")
    }
    if timed:
        yield from latency_table(timed)
    if engine.get("requests", {}).get("rows"):
        yield from requests_table(engine["requests"])


def _worst(rows: list[dict[str, Any]]) -> str:
    if any(row["relative"] is None for row in rows):
        return "what is not a number"
    worst = max(rows, key=lambda row: row["relative"])
    same = min(row["same_argmax"] for row in rows)
    return f"{worst['absolute']:.1e}, {worst['relative']:.1e} of the largest; same best token in {same:.0%} or more"


def latency_table(timed: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the milliseconds of a pass: a line for each way and context, a column for each number of tree rows."""
    sizes = sorted({row["tree_rows"] for found in timed.values() for row in found["rows"]})
    yield "\nA pass of so many tree rows, each with a pseudo row of every step:\n"
    yield "| ms | context | " + " | ".join("plain" if size == 1 else str(size) for size in sizes) + " |"
    yield "| --- |" + " ---: |" * (len(sizes) + 1)
    for name, found in timed.items():
        ms = {(row["context"], row["tree_rows"]): row["ms"] for row in found["rows"]}
        for context in dict.fromkeys(row["context"] for row in found["rows"]):
            cells = (f"{ms[context, size]:.2f}" if (context, size) in ms else "-" for size in sizes)
            yield f"| {name} | {context} | {' | '.join(cells)} |"
        if found["left_out"]:
            yield f"\n{found['left_out']} more sizes {name} were left out for want of time"


def requests_table(found: dict[str, Any]) -> Iterator[str]:
    """Yield the milliseconds of a step of many requests, its commit included: a line for each number of them."""
    sizes = sorted({row["tree_rows"] for row in found["rows"]})
    yield f"\nA step of so many requests, each over {found['rows'][0]['context']} tokens, by tree rows:\n"
    yield "| requests | " + " | ".join("plain" if size == 1 else str(size) for size in sizes) + " |"
    yield "| ---: |" + " ---: |" * len(sizes)
    ms = {(row["requests"], row["tree_rows"]): row["ms"] for row in found["rows"]}
    for count in dict.fromkeys(row["requests"] for row in found["rows"]):
        cells = (f"{ms[count, size]:.2f}" if (count, size) in ms else "-" for size in sizes)
        yield f"| {count} | {' | '.join(cells)} |"
    if found["left_out"]:
        yield f"\n{found['left_out']} more sizes were left out for want of time"
