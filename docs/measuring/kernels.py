"""What compiling the kernels of a plan takes, with a cold cache and then a warm one: kernels, and processor seconds.

python docs/measuring/kernels.py smollm2-135m|gemma-3-270m [--workers 2] [--bytes FILE]

For the GPUs and within the limits that plans of TensorRT for RTX have by default. Processor seconds are those of user
code, of all processes together.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from ht_export.tensorrt.kernels import Wanted, kernel_workers
from ht_export.tensorrt.limits import profiles
from plugins.binaries import Form, KernelBinaries
from plugins.compile_pool import compile_all
from plugins.specialisations import by_architecture
from runtime.bindings import GraphDims
from runtime.bundle.engine_file import Limits
from runtime.tree import TreeSizes

ARCHITECTURES = (80, 86, 89, 120, 90, 100)
LIMITS = Limits(max_batch=8, max_context=4096, max_rows=32, chunk=256)
MODELS = {
    "smollm2-135m": (GraphDims(30, 9, 3, 64, 576, 49152, (20, 20, 20), "float16"), [Form()]),
    "gemma-3-270m": (GraphDims(18, 4, 1, 256, 640, 262144, (12, 12, 12), "float16"), [Form(), Form(windowed=True)]),
}


def main() -> None:
    """Compile twice, and print what each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--workers", type=int, default=kernel_workers())
    parser.add_argument("--bytes", type=Path, help="write the kernels here")
    options = parser.parse_args()
    dims, forms = MODELS[options.model]
    found = profiles(dims, LIMITS, TreeSizes(16, (16, 16, 16)))
    wanted = Wanted.of(dims, found, forms, (ARCHITECTURES, ARCHITECTURES))
    every = [*wanted.attention, *wanted.runtime]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for state in ("cold", "warm"):
            before, start = os.times(), time.monotonic()
            compiled = compile_all(every, options.workers)
            after = os.times()
            user = after.user + after.children_user - before.user - before.children_user
            counts = f"{len(every)} kernels of {len({one.code for one in every})} codes, {options.workers} processes"
            print(f"{state}: {counts}, {user:.1f} s of user code, {time.monotonic() - start:.1f} s in all", flush=True)
    if options.bytes:
        kernels = KernelBinaries(dims.dtype, dims.head_dim, by_architecture(wanted.attention, compiled))
        options.bytes.write_bytes(kernels.to_bytes())


if __name__ == "__main__":
    main()
