"""Plans of a tiny model, built without a GPU."""

import os
import resource
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ht_export.model.checkpoint import load_base_model
from ht_export.model.transfer import TransferFile, save_transfer_layers
from ht_export.tensorrt import build_process, worker
from ht_export.tensorrt import planner as planner_module
from ht_export.tensorrt.build_process import check_resources
from ht_export.tensorrt.planner import Planner, PlanSettings
from ht_export.tensorrt.products import Product
from plugins.binaries import CHOOSE, CHOOSE_DRAFTS, COMMIT, MAGIC, KernelBinaries
from runtime import Generator
from runtime.bindings import GraphDims
from runtime.bundle.engine_file import Limits, read_engine_file
from runtime.errors import EngineFileError, InputError
from runtime.tree import TreeSizes
from tests.conftest import DRAFT_TOKENS, random_transfer
from tests.ht_export.tensorrt.conftest import PLAN, build

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("triton")

from plugins.compile import compile_kernels
from plugins.tiling import BLOCK_M, Tile


@pytest.fixture(scope="module")
def plugin_plan(tmp_path_factory: pytest.TempPathFactory, wide_checkpoint: Path, wide_transfer: Path) -> Path:
    out = tmp_path_factory.mktemp("plan") / "engine.plan"
    build(wide_checkpoint, wide_transfer, out)
    return out


def test_every_attention_becomes_the_plugin_and_the_plan_is_described(plugin_plan: Path) -> None:
    about = read_engine_file(plugin_plan)
    assert about.plan is not None
    assert (about.plan.product, about.plan.attention, about.precision) == ("tensorrt-rtx", "plugin", "float16")
    assert about.plan.build["plugin_layers"] == about.plan.build["network_layers"]["PLUGIN_V3"] == 4
    # One of each profile.
    assert about.plan.build["engine_layers"]["custom_layer"] == 2 * 4
    assert about.plan.compute_capabilities == ((8, 0),)
    assert about.plan.limits == Limits(max_batch=8, max_context=128, max_rows=8, chunk=16)
    assert about.plan.profiles["verification"]["input_ids"] == [[1, 1], [4, 4], [8, 8]]
    assert about.weights is None
    assert about.max_context == 128
    assert about.parity["largest_relative_difference"] < 1e-4
    # The plan's own kernels are whole, those of every layer: the library reads them from where the plugin left them.
    content = plugin_plan.read_bytes()
    # Contexts of 128 tokens never split the cache.
    kernels = compile_kernels("float16", 64, (80, 90, 100), tiles=[Tile(size, False) for size in BLOCK_M]).to_bytes()
    assert content.count(kernels) == content.count(MAGIC) >= 4
    own = KernelBinaries.from_bytes((plugin_plan.parent / about.plan.kernels.name).read_bytes())
    assert all(set(variants) == {COMMIT, *CHOOSE} for variants in own.kernels.values())
    records = (about.graph, about.tokenizer, about.chat_template, about.plan.kernels)
    names = {record.name for record in records if record}
    assert {path.name for path in plugin_plan.parent.iterdir()} == names | {"engine.json"}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_native_attention_is_fused(wide_checkpoint: Path, wide_transfer: Path, tmp_path: Path, precision: str) -> None:
    # A name that nothing made on the way may have.
    out = tmp_path / f"{'tensorrt' if precision == 'fp16' else 'widened'}.plan"
    build(wide_checkpoint, wide_transfer, out, replace(PLAN, attention="native"), precision)
    about = read_engine_file(out).plan
    assert about is not None
    assert about.build["fused_attention_layers"] == 4
    assert about.build["plugin_layers"] == 0
    assert about.plugin_version is None


def test_float32_has_no_plugin_and_builds_all_the_same(
    wide_checkpoint: Path, wide_transfer: Path, tmp_path: Path
) -> None:
    build(wide_checkpoint, wide_transfer, tmp_path / "e.plan", PLAN, "fp32")
    about = read_engine_file(tmp_path / "e.plan").plan
    assert about is not None
    assert about.attention == "native"
    with pytest.raises(InputError, match="--attention plugin: it computes in float16 or bfloat16, not float32"):
        build(wide_checkpoint, wide_transfer, tmp_path / "f.plan", replace(PLAN, attention="plugin"), "fp32")
    assert not (tmp_path / "f.plan").exists()


def test_a_gpu_that_there_is_no_kernel_for_gets_native_attention(
    wide_checkpoint: Path, wide_transfer: Path, tmp_path: Path
) -> None:
    old = replace(PLAN, capabilities=((7, 5),))
    build(wide_checkpoint, wide_transfer, tmp_path / "e.plan", old)
    about = read_engine_file(tmp_path / "e.plan").plan
    assert about is not None
    assert about.attention == "native"
    kernels = KernelBinaries.from_bytes((tmp_path / about.kernels.name).read_bytes())
    assert set(kernels.for_device(7, 5)) == {COMMIT, *CHOOSE}
    with pytest.raises(InputError, match=r"--attention plugin: it has no kernel for compute capability 7\.5"):
        build(wide_checkpoint, wide_transfer, tmp_path / "f.plan", replace(old, attention="plugin"))


def planner_for(attention: str = "auto", capabilities: tuple = ((8, 0),)) -> Planner:
    return Planner(replace(PLAN, attention=attention, capabilities=capabilities))


def dims_with(**changes: object) -> GraphDims:
    return replace(GraphDims(2, 4, 2, 64, 256, 100, (1,), "float16"), **changes)  # type: ignore[arg-type]


def prepare(planner: Planner, folder: Path, context: int | None = None, **dims: object) -> str:
    return planner.prepare(dims_with(**dims), TreeSizes(4, (4,)), (16, context), 128, 1 << 20, folder).attention


def test_auto_takes_the_plugin_where_it_can_compute_the_model(tmp_path: Path) -> None:
    assert prepare(planner_for(), tmp_path) == "plugin"
    assert prepare(planner_for(), tmp_path, dtype="bfloat16") == "plugin"
    assert prepare(planner_for("native"), tmp_path) == "native"
    for dims in ({"dtype": "float32"}, {"head_dim": 8}, {"head_dim": 264}):
        assert prepare(planner_for(), tmp_path, **dims) == "native"


@pytest.mark.parametrize(
    ("attention", "capabilities", "dims", "message"),
    [
        ("plugin", ((8, 0),), {"head_dim": 264}, "--attention plugin: it takes head sizes from 16 to 256"),
        ("auto", ((8, 0),), {"head_dim": 20}, "head sizes that 8 divides, and the model's is 20; use --precision fp32"),
    ],
)
def test_models_that_a_plan_cannot_compute(
    attention: str, capabilities: tuple, dims: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        prepare(planner_for(attention, capabilities), tmp_path, **dims)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_context": 0}, "--max-context must be at least 1, not 0"),
        ({"max_context": 129}, "--max-context 129: the model's own context is 128 tokens"),
        ({"max_rows": 0}, "--max-rows must be at least 1, not 0"),
        ({"max_rows": 2000}, "--max-rows 2000 is more than --max-context 128"),
        ({"max_context": 3, "max_rows": None}, "--max-context 3 is less than the default tree's 4 rows"),
    ],
)
def test_what_was_asked_for_is_never_changed(limits: dict, message: str, tmp_path: Path) -> None:
    planner = planner_for()
    context = limits.pop("max_context", None)
    planner.settings = replace(planner.settings, **limits)
    with pytest.raises(InputError, match=message):
        prepare(planner, tmp_path, context)


def test_defaults_fit_the_context() -> None:
    planner = planner_for()
    planner.settings = PlanSettings(runtime="tensorrt-rtx")
    prepared = planner.prepare(dims_with(), TreeSizes(4, (4,)), (None, None), 20, 1 << 20, Path())
    assert prepared.limits == Limits(max_batch=8, max_context=20, max_rows=20, chunk=20)


def test_a_gpu_that_nothing_was_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt = Product("tensorrt", ModuleType("tensorrt"), "10.16.1")
    monkeypatch.setattr(planner_module, "find_product", lambda name: tensorrt)
    monkeypatch.setattr(planner_module, "_own_capability", lambda: (11, 0))
    with pytest.raises(InputError, match=r"no kernels for compute capability 11\.0; there are for 7\.5, 8\.0"):
        Planner(PlanSettings(runtime="tensorrt"))
    monkeypatch.undo()
    monkeypatch.setattr(planner_module, "find_product", lambda name: tensorrt)
    with pytest.raises(InputError, match=r"no NVIDIA GPU can be used .*; --runtime tensorrt-rtx needs none"):
        Planner(PlanSettings(runtime="tensorrt"))


def test_heads_that_no_kernel_fuses_are_written_out(tiny_checkpoint: Path, tiny_transfer: Path, tmp_path: Path) -> None:
    build(tiny_checkpoint, tiny_transfer, tmp_path / "e.plan")
    about = read_engine_file(tmp_path / "e.plan")
    assert about.dims.head_dim == 8
    assert about.plan is not None
    assert (about.plan.attention, about.plan.build["fused_attention_layers"]) == ("native", 0)


def test_a_plan_without_a_gpu_says_what_to_do(plugin_plan: Path) -> None:
    with pytest.raises(InputError, match=r"no NVIDIA GPU can be used|was built for compute capabilities 8\.0"):
        Generator(plugin_plan)


def test_a_damaged_plan_is_refused_before_it_is_loaded(plugin_plan: Path, tmp_path: Path) -> None:
    for path in plugin_plan.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = bytearray(plugin_plan.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "engine.plan").write_bytes(content)
    with pytest.raises(EngineFileError, match=r"engine\.plan is not the file that engine\.json describes: it is"):
        Generator(tmp_path / "engine.plan")
    (tmp_path / "engine.plan").write_bytes(content[:1000])
    with pytest.raises(EngineFileError, match=r"is not the file .* it is incomplete, damaged or exchanged"):
        Generator(tmp_path / "engine.plan")


def test_a_build_that_dies_is_an_error_and_leaves_nothing(
    wide_checkpoint: Path, wide_transfer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = build_process.subprocess.Popen

    def killed(command: list[str], **options: object) -> object:
        process = started(command, **options)  # type: ignore[call-overload]
        if "ht_export.tensorrt.worker" in command:
            os.kill(process.pid, signal.SIGKILL)
        return process

    monkeypatch.setattr(build_process.subprocess, "Popen", killed)
    with pytest.raises(InputError, match="ended the build: it was killed with SIGKILL, likely for want of memory"):
        build(wide_checkpoint, wide_transfer, tmp_path / "e.plan", replace(PLAN, attention="native"))
    assert not list(tmp_path.iterdir())


def test_a_plan_that_does_not_fit_the_disk_is_an_error(
    wide_checkpoint: Path, wide_transfer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def to_full_disk(graph: Path, out: Path, dims: GraphDims, **options: bool) -> int:
        (out.parent / "e.plan").symlink_to("/dev/full")
        return mark(graph, out, dims, plugin=options["plugin"], decomposable=options["decomposable"])

    mark = planner_module.write_for_tensorrt
    monkeypatch.setattr(planner_module, "write_for_tensorrt", to_full_disk)
    with pytest.raises(InputError, match="cannot write the plan: No space left on device; free some space"):
        build(wide_checkpoint, wide_transfer, tmp_path / "e.plan", replace(PLAN, attention="native"))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_takes_a_part_of_the_plan_is_an_error(tmp_path: Path) -> None:
    class IStreamWriter:
        write: Callable[[bytes], int]

    class Builder:
        def build_serialized_network_to_stream(self, network: object, config: object, writer: IStreamWriter) -> bool:
            # As the library does, whatever is returned.
            writer.write(b"x" * 3000)
            return True

    path = tmp_path / "e.plan"
    library = SimpleNamespace(IStreamWriter=IStreamWriter)
    assert worker._write_plan(library, Builder(), None, None, path)
    assert path.stat().st_size == 3000
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(worker.BuildError, match="cannot write the plan: File too large; free some space"):
            worker._write_plan(library, Builder(), None, None, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not path.exists()
    (tmp_path / "result.json").write_text("")
    assert build_process._read(tmp_path / "result.json") is None


def test_a_timing_cache_is_kept_and_used_again(wide_checkpoint: Path, wide_transfer: Path, tmp_path: Path) -> None:
    cache = tmp_path / "timings" / "cache.bin"
    for _ in range(2):
        settings = replace(PLAN, attention="native", timing_cache=cache)
        build(wide_checkpoint, wide_transfer, tmp_path / "plan" / "e.plan", settings)
        assert [path.name for path in cache.parent.iterdir()] == ["cache.bin"]
        assert cache.stat().st_size
        # Damaged, it is made anew.
        cache.write_bytes(b"junk")
    with pytest.raises(InputError, match="is a folder; give the name of a file"):
        Planner(replace(PLAN, timing_cache=tmp_path))


def test_what_the_library_refuses_is_told_in_its_words(
    wide_checkpoint: Path, wide_transfer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner_module, "write_for_tensorrt", lambda graph, out, dims, **_: out.write_bytes(b"junk"))
    with pytest.raises(InputError, match="tensorrt-rtx cannot read the graph"):
        build(wide_checkpoint, wide_transfer, tmp_path / "e.plan", replace(PLAN, attention="native"))
    assert not list(tmp_path.iterdir())


def test_a_plugin_that_is_not_registered_fails_the_build(
    wide_checkpoint: Path, wide_transfer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without its namespace the node is inlined, silently.
    mark = planner_module.write_for_tensorrt

    def unmarked(graph: Path, out: Path, dims: GraphDims, *, plugin: bool, decomposable: bool) -> int:
        return mark(graph, out, dims, plugin=False, decomposable=decomposable) + 4

    monkeypatch.setattr(planner_module, "write_for_tensorrt", unmarked)
    with pytest.raises(InputError, match="0 attention layers became the plugin, and 4 should have"):
        build(wide_checkpoint, wide_transfer, tmp_path / "e.plan")


def test_memory_and_disk_are_checked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Counter(available=1 << 30)
    monkeypatch.setattr(build_process.psutil, "virtual_memory", lambda: type("Memory", (), memory))
    with pytest.raises(InputError, match="takes about 3072 MiB of memory, and 1024 MiB are free"):
        check_resources(1 << 30, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(build_process.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5 << 20}))
    with pytest.raises(InputError, match="5 MiB free, and building the plan takes about 260 MiB there"):
        check_resources(100 << 20, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PlanSettings(attention="fast"), "--attention must be one of auto, plugin, native, not fast"),
        (PlanSettings(runtime="tensorrt-rtx", capabilities=((6, 1),)), r"--compute-capability 6\.1: tensorrt-rtx"),
    ],
)
def test_settings_that_cannot_be(settings: PlanSettings, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Planner(settings)


@pytest.mark.parametrize(("precision", "least"), [("bf16", (8, 0)), ("fp8", (8, 9))])
def test_gpus_that_do_not_compute_in_a_precision(precision: str, least: tuple[int, int]) -> None:
    assert min(Planner(PlanSettings(runtime="tensorrt-rtx"), precision).capabilities) == least
    old = replace(PLAN, capabilities=((7, 5), least))
    with pytest.raises(InputError, match=rf"--precision {precision}: compute capability 7\.5 does not compute in it"):
        Planner(old, precision)


def test_a_plan_whose_drafts_have_a_head_of_their_own(wide_checkpoint: Path, tmp_path: Path) -> None:
    transfer = tmp_path / "transfer.safetensors"
    about = TransferFile(load_base_model(str(wide_checkpoint)).identity())
    save_transfer_layers(transfer, random_transfer((3, 1, 3), draft_tokens=DRAFT_TOKENS), about)
    out = tmp_path / "plan" / "engine.plan"
    out.parent.mkdir()
    build(wide_checkpoint, transfer, out)
    described = read_engine_file(out)
    assert described.dims.draft_size == len(DRAFT_TOKENS)
    assert described.plan is not None
    assert described.draft_tokens is not None
    assert (out.parent / described.draft_tokens.name).is_file()
    own = KernelBinaries.from_bytes((out.parent / described.plan.kernels.name).read_bytes())
    assert all(set(variants) == {COMMIT, *CHOOSE, *CHOOSE_DRAFTS} for variants in own.kernels.values())
    build(wide_checkpoint, transfer, tmp_path / "int8.plan", PLAN, "int8")
