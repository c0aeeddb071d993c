"""`ht-bench kernel-resources`: registers, shared memory and spills of every tree-attention kernel, without a GPU."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.program import pathname

# Most KiB of a program, by architecture: CUDA's programming guide, "maximum amount of shared memory per thread block".
MOST_SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
HEAD_DIMS = (32, 64, 80, 96, 128, 256)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ht-bench kernel-resources`."""
    parser.description = (
        "Compile every tree-attention kernel for every GPU architecture, and list the registers, shared memory and "
        "spills. No GPU is needed. Shared memory is in KiB, of a program. Exits with 1 when a kernel spills registers "
        "or asks for more shared memory than a program may have on its architecture."
    )
    parser.epilog = "example: ht-bench kernel-resources --json resources.json"
    parser.set_defaults(work=show, interrupted="interrupted; nothing was written")
    parser.add_argument("--json", type=pathname, help="write all of it here")
    parser.add_argument("--head-dim", type=int, action="append", help=f"default: {', '.join(map(str, HEAD_DIMS))}")


def show(options: argparse.Namespace) -> int:
    """Print the table; return 1 when a kernel spills registers or asks for too much shared memory, else 0."""
    import triton

    from runtime.files import check_writable, write_json

    if options.json:
        check_writable(options.json)
    from runtime.errors import InputError

    try:
        found = list(resources(options.head_dim or HEAD_DIMS))
    except ValueError as error:
        raise InputError(f"--head-dim: {error}") from error
    if options.json:
        write_json(options.json, {"triton": triton.__version__, "kernels": found})
    print(f"Triton {triton.__version__}; over all architectures, types, split and not")
    print("| head size | rows of a tile | kernels | registers | shared memory, KiB | spilled bytes |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for head_dim in sorted({one["head_dim"] for one in found}):
        for block_m in sorted({one["block_m"] for one in found}):
            group = [one for one in found if (one["head_dim"], one["block_m"]) == (head_dim, block_m)]
            tile = block_m or "combine"
            print(
                f"| {head_dim} | {tile} | {len(group)} | {_range(group, 'registers')} | "
                f"{_range(group, 'shared_kib')} | {max(one['spilled_bytes'] for one in group)} |"
            )
    bad = [one for one in found if one["spilled_bytes"] or one["shared_kib"] > MOST_SHARED[one["sm"]]]
    for one in bad:
        print(f"does not fit: {json.dumps(one)}", file=sys.stderr)
    return 1 if bad else 0


def resources(head_dims: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Yield what each kernel uses."""
    from ht_export.progress import progress_bar
    from ht_export.tensorrt.kernels import kernel_workers
    from plugins.binaries import ARCHITECTURES, PLUGIN_DTYPES
    from plugins.compile_pool import compile_all
    from plugins.specialisations import of_attention

    wanted = [
        one for head_dim in head_dims for dtype in PLUGIN_DTYPES for one in of_attention(dtype, head_dim, ARCHITECTURES)
    ]
    with progress_bar() as bar:
        task = bar.add_task("compiling", total=len(wanted))
        compiled = compile_all(wanted, kernel_workers(), lambda done, _: bar.update(task, completed=done))
    for one in wanted:
        kernel = compiled[one]
        yield {
            "head_dim": one.head_dim,
            "dtype": one.dtype,
            "sm": one.sm,
            "block_m": one.variant.block_m,
            "split": one.variant.split,
            "threads": kernel.threads,
            "shared_kib": round(kernel.shared_memory / 1024, 1),
            **cubin_resources(kernel.cubin),
        }


def cubin_resources(cubin: bytes) -> dict[str, int]:
    """Return the registers of a thread, and the bytes of its stack and local memory, which is where they spill."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        said = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    values = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return {"registers": values["REG"], "spilled_bytes": values["STACK"] + values["LOCAL"]}


def _range(group: list[dict[str, Any]], name: str) -> str:
    values = [one[name] for one in group]
    return f"{min(values):g} to {max(values):g}"
