import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

from plugins import compile as compile_module  # noqa: E402
from plugins.binaries import (  # noqa: E402
    ARCHITECTURES,
    COLLECT,
    COMBINE,
    COMMIT,
    COMMIT_ENTRY,
    Form,
    Kernel,
    KernelBinaries,
    Variant,
)
from plugins.compile import (  # noqa: E402
    Tuning,
    compile_attention,
    compile_combine,
    compile_commit,
    compile_kernels,
    compile_one,
    spilled_bytes,
)
from plugins.launch import (  # noqa: E402
    Buffers,
    Commit,
    Scores,
    Shapes,
    commit_launch,
    launches,
    workspace_size,
)
from plugins.specialisations import SAME_CODE, Specialisation  # noqa: E402
from plugins.tiling import BLOCK_M, MAX_SPLITS, tile, workspace_bytes, workspace_limit  # noqa: E402

HERE = Path(__file__).parent
# KiB of shared memory that a program may have, by architecture: CUDA's programming guide, "maximum shared memory
# per thread block".
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}


def test_the_kernel_computes_its_definition_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "2 passed" in done.stdout


def registers(kernel: Kernel, folder: Path) -> dict[str, int]:
    """Return registers and stack bytes of a kernel, as the toolkit's own tool reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = folder / "k.cubin"
    cubin.write_bytes(kernel.cubin)
    said = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said))
    return {name: int(value) for name, value in found.items()}


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_kernels_fit_every_architecture_without_spills(sm: int, tmp_path: Path) -> None:
    # The largest tiles; docs/tensorrt.md has all variants.
    kernel = compile_attention("float16", 128, sm, 64, False)
    assert kernel.shared_memory <= SHARED_MEMORY[sm] * 1024
    used = registers(kernel, tmp_path)
    assert used["STACK"] == used["LOCAL"] == spilled_bytes(kernel.cubin) == 0
    assert used["REG"] <= 255


def test_a_tuning_that_spills_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spilling, fitting = Tuning(64, 4, 2), Tuning(32, 8, 2)
    compile_attention.cache_clear()
    monkeypatch.setattr(compile_module, "tunings", lambda head_dim, block_m: [spilling, spilling])
    kernel = compile_attention("float16", 96, 80, 64, False)
    assert spilled_bytes(kernel.cubin) == registers(kernel, tmp_path)["STACK"] > 0
    compile_attention.cache_clear()
    monkeypatch.setattr(compile_module, "tunings", lambda head_dim, block_m: [spilling, fitting])
    kernel = compile_attention("float16", 96, 80, 64, False)
    assert spilled_bytes(kernel.cubin) == registers(kernel, tmp_path)["STACK"] == 0
    assert kernel.threads == 256
    compile_attention.cache_clear()


@pytest.mark.parametrize("sm", SAME_CODE)
def test_code_of_another_architecture_is_what_the_compiler_makes_itself(
    sm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [
        Specialisation(Variant(16, True, Form(windowed=True)), sm, "float16", 64),
        Specialisation(COLLECT, sm, vocab_size=49152),
    ]
    compile_attention.cache_clear()
    found = [compile_one(kind) for kind in kinds]
    compile_attention.cache_clear()
    monkeypatch.setattr(compile_module, "SAME_CODE", {})
    assert [compile_one(kind) for kind in kinds] == found
    assert [compile_one(kind.code) for kind in kinds] != found


@pytest.mark.parametrize("form", [Form(), Form(windowed=True), Form(capped=True), Form(windowed=True, capped=True)])
def test_the_launcher_passes_the_parameters_that_a_kernel_takes(form: Form) -> None:
    sizes = {"c_void_p": 8, "c_int": 4, "c_float": 4}
    shapes = Shapes(1, 4, 2, 4, 4096, 64)
    buffers = Buffers(0, 1, 2, 3, 4, 5, 6, 7, 8 if form.windowed else 0)
    found = launches(shapes, buffers, 1 << 20, Scores(0.5, 30.0 if form.capped else 0.0), 108)
    assert [launch.variant for launch in found] == [Variant(16, True, form), COMBINE]
    kernels = (compile_attention("float16", 64, 80, 16, True, form), compile_combine("float16", 64, 80))
    for launch, kernel in zip(found, kernels, strict=True):
        passed = [sizes[kind.__name__] for _, kind in launch.arguments]
        assert passed == parameters(kernel)
    for sm, compiled in compile_commit("float16", 64, (75, 90)).kernels.items():
        commit = commit_launch(Commit(0, 1, 2, 3, 4, 5, 60, 8, 3, 0, 5, 4096))
        assert commit.grid == (40, 3, 60)
        assert [sizes[kind.__name__] for _, kind in commit.arguments] == parameters(compiled[COMMIT]), sm
        # By this name an engine tells it from those of earlier releases.
        assert compiled[COMMIT].entry == COMMIT_ENTRY


def parameters(kernel: Kernel) -> list[int]:
    """Return the size in bytes of each parameter, from the cubin's own table of them."""
    # Entries of .nv.info: attribute 0x17 (KPARAM_INFO), 12 bytes: index, ordinal, offset, and the size from bit 18 on.
    entries = {}
    for match in re.finditer(b"\x04\x17\x0c\x00.{4}(.{2})(.{2})(.{4})", kernel.cubin, flags=re.DOTALL):
        ordinal = int.from_bytes(match[1], "little")
        entries[ordinal] = int.from_bytes(match[3], "little") >> 18
    return [entries[ordinal] for ordinal in sorted(entries)]


def test_kernels_come_back_from_their_bytes() -> None:
    forms = (Form(), Form(windowed=True))
    binaries = compile_kernels("float16", 64, (80, 90), forms=forms)
    assert KernelBinaries.from_bytes(binaries.to_bytes()) == binaries
    attention = {Variant(m, split, form) for m in BLOCK_M for split in (False, True) for form in forms}
    assert set(binaries.kernels[80]) == attention | {COMBINE}
    data = binaries.to_bytes()
    for damaged in (b"", data[:20], data[:-9], b"junk" + data[4:], data[:4] + b"\x01" + data[5:]):
        with pytest.raises(ValueError, match=r"kernels|no kernels"):
            KernelBinaries.from_bytes(damaged)


def test_a_gpu_gets_the_kernels_that_it_can_run() -> None:
    kernels = {sm: {COMBINE: Kernel("k", 32, 0, str(sm).encode())} for sm in (80, 86, 90, 120)}
    binaries = KernelBinaries("float16", 64, kernels)
    for (major, minor), sm in {(8, 0): 80, (8, 6): 86, (8, 9): 86, (9, 0): 90, (12, 0): 120}.items():
        assert binaries.for_device(major, minor) == kernels[sm]
    for major, minor in ((7, 5), (10, 0), (12, 1)):
        with pytest.raises(ValueError, match=rf"8\.0, 8\.6, 9\.0, 12\.0, and this GPU has {major}\.{minor}"):
            binaries.for_device(major, minor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("float32", 64, (80,)), "takes float16 or bfloat16, not float32"),
        (("float16", 100, (80,)), "head sizes from 16 to 256 that 8 divides, not 100"),
        (("float16", 64, (75,)), "unknown architecture 75; known: 80"),
    ],
)
def test_what_there_is_no_kernel_for(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_kernels(*arguments)


@settings(max_examples=300)
@given(*[st.integers(1, most) for most in (8, 16, 800, 9000, 300)], st.randoms(use_true_random=False))
def test_no_smaller_call_needs_more_workspace_than_was_planned(
    batch: int, kv_heads: int, packed: int, capacity: int, multiprocessors: int, random: Random
) -> None:
    limit = workspace_limit(batch, kv_heads, packed, 64)
    for _ in range(10):
        sizes = random.randint(1, batch), kv_heads, random.randint(1, packed)
        splits = tile(*sizes, random.randint(1, capacity), multiprocessors).splits
        assert workspace_bytes(*sizes, 64, splits) <= limit


def test_a_tiling_fills_the_gpu_and_splits_only_what_is_worth_it() -> None:
    few = tile(1, 8, 4, 8192, 132)
    assert (few.block_m, few.row_blocks) == (16, 1)
    assert few.splits * 8 >= 132
    assert tile(1, 8, 4, 255, 132).splits == 1
    assert tile(64, 8, 4, 8192, 132).splits == 1
    assert tile(1, 1, 4, 1 << 20, 132).splits == MAX_SPLITS
    assert workspace_size(Shapes(64, 8, 8, 4, 8192, 64), 132) == 0
