"""`ht-doctor`: what this machine can run, what is missing, and the line that installs it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ht_export.doctor import machine, model, software
from runtime.errors import InputError
from runtime.memory import available_bytes
from runtime.options import Parser
from runtime.program import run, say

GIB = 1 << 30


def build_parser() -> Parser:
    """Return the parser of `ht-doctor`."""
    parser = Parser(
        prog="ht-doctor",
        description="Tell what this machine can run: processor, memory, GPU, libraries, which of our commands and "
        "extras are usable, and the line that installs what is missing. With MODEL, whether there is room to export "
        "and run it. Exits with 1 where MODEL does not fit or cannot be found, else with 0.",
        epilog="examples: ht-doctor; ht-doctor smollm2-135m; ht-doctor --json",
    )
    parser.add_argument(
        "model", nargs="?", help="known name, Hugging Face folder, .gguf file, hub id, or an engine: what it needs"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ht-doctor` and return its exit status."""
    return run("ht-doctor", lambda: _look(arguments), interrupted="interrupted")


def _look(arguments: Sequence[str] | None) -> int:
    options = build_parser().parse_args(arguments)
    found = examine(options.model)
    say(json.dumps(found, indent=2, ensure_ascii=False) if options.json else to_text(found))
    return 1 if options.model and not found["model"]["fits"] else 0


def examine(source: str | None = None) -> dict[str, Any]:
    """Return all that is found out, as plain data."""
    here = machine.look(Path.cwd())
    gpus, no_gpu = machine.gpus()
    providers, broken = software.onnxruntime()
    cuda, cuda_works = software.torch_cuda()
    found: dict[str, Any] = {
        "version": software.version_of(software.PROJECT),
        "machine": asdict(here),
        "gpus": [asdict(gpu) for gpu in gpus],
        "no_gpu": no_gpu,
        "libraries": software.libraries(),
        "onnxruntime": {"providers": providers, "broken": broken},
        "torch": {"cuda": cuda, "finds_gpu": cuda_works},
        "commands": [asdict(command) for command in software.commands()],
        "extras": [
            {**asdict(extra), "install": extra.install if extra.missing or extra.unfit else None}
            for extra in software.extras()
        ],
    }
    if source is not None:
        found["model"] = _model(source, here.disk_free_bytes)
    found["advice"] = advice(found)
    return found


def _model(source: str, disk: int | None) -> dict[str, Any]:
    try:
        needs = model.needs_of(source)
    except InputError as error:
        return {"model": source, "fits": False, "problem": str(error)}
    free = available_bytes()
    lacking = []
    if disk is not None and disk < needs.export_disk_bytes:
        lacking.append(f"disk to export it ({_size(needs.export_disk_bytes)} needed, {_size(disk)} free)")
    if free < (most := max(needs.export_memory_bytes, needs.run_memory_bytes)):
        lacking.append(f"memory ({_size(most)} needed as float32, {_size(free)} free)")
    problem = f"there is too little {' and '.join(lacking)}" if lacking else None
    return {
        **asdict(needs),
        "free_memory_bytes": free,
        "free_disk_bytes": disk,
        "fits": not lacking,
        "problem": problem,
    }


def advice(found: dict[str, Any]) -> list[str]:
    """Return what somebody should do, most important first."""
    told = []
    if broken := found["onnxruntime"]["broken"]:
        told.append(f"{broken}; install it again: pip install --force-reinstall onnxruntime")
    by_name = {command["name"]: command for command in found["commands"]}
    if by_name["ht-generate"]["missing"]:
        told.append(f"no engine can be run: {software.install_line('cpu')}")
    if found["gpus"] and not any(
        found["libraries"]["engines"][name] for name in ("onnxruntime-gpu", "tensorrt", "tensorrt-rtx")
    ):
        told.append(f"there is a GPU that nothing here uses: {software.install_line('tensorrt')}, or [cuda]")
    if all(found["libraries"]["engines"][name] for name in ("onnxruntime", "onnxruntime-gpu")):
        told.append("onnxruntime and onnxruntime-gpu take each other's place: pip uninstall onnxruntime")
    features = found["machine"]["features"]
    if features is not None and not (features.get("AVX2", True) and features.get("NEON", True)):
        told.append("the processor has no AVX2 or NEON: everything will be slow")
    for extra in found["extras"]:
        told += [f"{extra['name']} has {one}: {extra['install']}" for one in extra["unfit"]]
    if found["machine"]["cores"] == 1:
        told.append("there is one core: speculation pays less where rows of a pass are not run side by side")
    return told


def to_text(found: dict[str, Any]) -> str:
    """Return what was found as lines for people."""
    here = found["machine"]
    features = here["features"]
    memory = f"{_size(here['memory_bytes'])}, {_size(here['available_bytes'])} available"
    if here["container_bytes"] is not None:
        memory += f", the container may use {_size(here['container_bytes'])} more"
    lines = [
        f"hidden-transfer {found['version'] or '(not installed)'}, {here['python']}, {here['system']}",
        f"processor   {here['cpu']}, {here['cores']} cores for this process",
        "            "
        + ("what it can do is not known" if features is None else ", ".join(map(_yes_or_no, features.items()))),
        f"memory      {memory}",
        f"disk        {_size(here['disk_free_bytes'])} free here",
        *(
            f"GPU         {gpu['name']}, compute capability {gpu['compute_capability']}, driver {gpu['driver']}, "
            f"{gpu['memory']}, {gpu['free']} free"
            for gpu in found["gpus"]
        ),
        *([f"GPU         {found['no_gpu']}"] if found["no_gpu"] else []),
        "",
        "libraries",
    ]
    for use, versions in found["libraries"].items():
        lines.append(f"  {use}: " + ", ".join(f"{name} {version or '-'}" for name, version in versions.items()))
    if found["onnxruntime"]["providers"]:
        lines.append(f"  ONNX Runtime runs on: {', '.join(found['onnxruntime']['providers'])}")
    if found["torch"]["cuda"]:
        lines.append(f"  torch is for CUDA {found['torch']['cuda']}, GPU found: {found['torch']['finds_gpu']}")
    lines += ["", "commands"]
    for command in found["commands"]:
        state = "ready" if not command["missing"] else f"lacks {', '.join(command['missing'])}: {command['install']}"
        lines.append(f"  {command['name']:<12} {state}")
    lines += ["", "extras"]
    for extra in found["extras"]:
        lacking = [*extra["missing"], *extra["unfit"]]
        state = f"lacks {', '.join(lacking)}: {extra['install']}" if lacking else "installed"
        lines.append(f"  {extra['name']:<12} {state}")
    if "model" in found:
        lines += ["", *_model_lines(found["model"])]
    if found["advice"]:
        lines += ["", "what to do", *(f"  {one}" for one in found["advice"])]
    return "\n".join(lines)


def _model_lines(needs: dict[str, Any]) -> list[str]:
    lines = [f"model {needs['model']}"]
    if "engine_bytes" in needs:
        of = f"{needs['parameters'] / 1e6:.0f}M parameters, " if needs["parameters"] else ""
        lines.append(f"  {of}engine of {_size(needs['engine_bytes'])}" + (" in float32" if of else ""))
        if of:
            lines.append(
                f"  exporting needs {_size(needs['export_disk_bytes'])} of disk and about "
                f"{_size(needs['export_memory_bytes'])} of memory"
            )
        lines.append(
            f"  running needs about {_size(needs['run_memory_bytes'])} of memory, and more for long prompts and many "
            "requests"
        )
    lines.append(f"  {needs['problem']}" if needs["problem"] else "  there is room for it here")
    return lines


def _yes_or_no(feature: tuple[str, bool]) -> str:
    name, there = feature
    return name if there else f"no {name}"


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / (1 << 20):.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
