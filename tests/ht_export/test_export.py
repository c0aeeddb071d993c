import errno
import json
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch._dynamo.config
from torch.onnx._internal.exporter._registration import ONNXRegistry

from ht_export import cli, preflight, staging
from ht_export import export as export_module
from ht_export.export import ExportSettings, export
from ht_export.model.checkpoint import load_base_model
from ht_export.model.transfer import TransferFile, save_transfer_layers
from runtime import Generator
from runtime.bundle.engine_file import read_engine_file
from runtime.bundle.placing import SUFFIXES
from runtime.errors import InputError
from runtime.files import sha256_file
from tests.conftest import random_transfer


def run(source: Path, transfer: Path | None, out: Path, settings: ExportSettings | None = None) -> None:
    export(str(source), transfer, out, settings or ExportSettings(), lambda _: nullcontext(lambda _: None))


def test_an_engine_is_described_beside_it(tiny_engine: Path, tiny_checkpoint: Path, tiny_transfer: Path) -> None:
    about = read_engine_file(tiny_engine)
    base = load_base_model(str(tiny_checkpoint))
    assert about.base_model == base.identity()
    assert about.dims.transfer_layers == (3, 1, 3)
    assert about.tree.tree_rows == 6
    assert about.tree.pseudo_rows == (6, 4, 2)
    assert about.max_context == 256
    assert about.stop_tokens == (2,)
    assert about.transfer["sha256"] == sha256_file(tiny_transfer)
    assert about.precision == "float32"
    assert about.parity["largest_relative_difference"] < 1e-4
    assert about.parity["of_the_cpu_graph"] < 1e-4
    assert about.versions.keys() >= {"hidden-transfer", "torch", "transformers", "onnx", "onnxruntime", "opset"}
    records = (
        about.graph,
        about.cpu_graph,
        about.weights,
        about.tokenizer,
        about.chat_template,
        about.correction,
    )
    names = {record.name for record in records if record}
    # The first run of an engine leaves a file of how fast it is.
    found = {path.name for path in tiny_engine.parent.iterdir()} - {"engine.tuning.json"}
    assert found == names | {"engine.json"}


def test_an_engine_holds_no_paths_of_the_machine_that_made_it(tiny_engine: Path) -> None:
    model = onnx.load(tiny_engine, load_external_data=False)
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert b"site-packages" not in tiny_engine.read_bytes()


@pytest.mark.long
def test_what_makes_tracing_quicker_in_tests_changes_no_byte(
    traced_anew: None, tiny_checkpoint: Path, tiny_transfer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick, usual = tmp_path / "quick", tmp_path / "usual"
    quick.mkdir()
    usual.mkdir()
    run(tiny_checkpoint, tiny_transfer, quick / "engine.onnx")
    monkeypatch.setattr(torch._dynamo.config, "fake_tensor_cache_enabled", True)
    monkeypatch.setattr(ONNXRegistry, "from_torchlib", ONNXRegistry.from_torchlib.__wrapped__)  # type: ignore[attr-defined]
    run(tiny_checkpoint, tiny_transfer, usual / "engine.onnx")
    for name in ("engine.onnx", "engine.onnx.data", "engine.cpu.onnx"):
        assert (usual / name).read_bytes() == (quick / name).read_bytes()


def test_a_graph_in_bfloat16_is_for_gpus(tiny_checkpoint: Path, tiny_transfer: Path, tmp_path: Path) -> None:
    run(tiny_checkpoint, tiny_transfer, tmp_path / "engine.onnx", ExportSettings(precision="bf16"))
    about = read_engine_file(tmp_path / "engine.onnx")
    assert (about.precision, about.cpu_graph) == ("bfloat16", None)
    assert about.parity["largest_relative_difference"] < 1e-4
    model = onnx.load(tmp_path / "engine.onnx", load_external_data=False)
    types = {value.data_type for value in model.graph.initializer if len(value.dims) == 2}
    assert types == {onnx.TensorProto.BFLOAT16}
    with pytest.raises(InputError, match="computes on a GPU only; use device cuda"):
        Generator(tmp_path / "engine.onnx")


def test_untrained_transfer_layers_leave_the_text_as_it_is(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine.onnx"
    assert cli.main([str(tiny_checkpoint), "--random-transfer", "--max-context", "100", "--out", str(out)]) == 0
    about = read_engine_file(out)
    assert about.dims.transfer_layers == (3, 3, 3)
    assert about.transfer["recipe"] == {"steps": 0, "init": "identity", "layers": [3, 3, 3]}
    assert about.max_context == 100
    generator = Generator(out, threads=1, adapt=False)
    plain = generator.generate("Tell me about tea.", max_new_tokens=30, speculate=False)
    assert generator.generate("Tell me about tea.", max_new_tokens=30).tokens == plain.tokens


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must end in \.onnx \(ONNX Runtime\) or \.plan \(TensorRT\)"):
        run(tmp_path, None, tmp_path / "engine.bin")


def test_a_place_that_cannot_be_written(tiny_checkpoint: Path, tiny_transfer: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*engine\.onnx"):
        run(tiny_checkpoint, tiny_transfer, tmp_path / "file" / "engine.onnx")


def test_a_checkpoint_that_cannot_be_read(
    tiny_checkpoint: Path, tiny_transfer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "model.gguf")

    monkeypatch.setattr(export_module, "load_base_model", refuse)
    # Not taken for an error of writing the engine: the command line names the file that it is of.
    with pytest.raises(PermissionError, match=r"Permission denied: 'model\.gguf'"):
        run(tiny_checkpoint, tiny_transfer, tmp_path / "engine.onnx")
    assert not list(tmp_path.iterdir())


def test_a_model_without_shipped_transfer_layers_asks_for_some(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no transfer layers are shipped for .*--transfer"):
        run(tiny_checkpoint, None, tmp_path / "engine.onnx")


def test_a_model_that_is_not_there_says_so_with_the_nearest_that_is_known(tmp_path: Path) -> None:
    told = r"^no checkpoint at smollm-135m; .* or one of: smollm2-135m; did you mean smollm2-135m\?$"
    with pytest.raises(InputError, match=told):
        run(Path("smollm-135m"), None, tmp_path / "engine.onnx")


def test_a_chat_template_that_cannot_be_compiled(tiny_checkpoint: Path, tiny_transfer: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    (checkpoint / "chat_template.jinja").write_text("a\n{% if %}")
    with pytest.raises(InputError, match=r"^the model's chat template is not valid: line 2: Expected an expression"):
        run(checkpoint, tiny_transfer, tmp_path / "engine.onnx")


def test_transfer_layers_of_another_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    identity = {**load_base_model(str(tiny_checkpoint)).identity(), "weights_sha256": "f" * 64}
    save_transfer_layers(tmp_path / "t.safetensors", random_transfer((1,)), TransferFile(identity))
    with pytest.raises(InputError, match="transfer layers for another model"):
        run(tiny_checkpoint, tmp_path / "t.safetensors", tmp_path / "out" / "engine.onnx")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ExportSettings(pseudo_rows=(1, 1)), "has 2 numbers, and the transfer layers have 3 steps"),
        (ExportSettings(tree_rows=2, pseudo_rows=(3, 1, 1)), "between 0 and it; not 2 and 3,1,1"),
        (ExportSettings(tree_rows=0), "--tree-rows must be at least 1"),
        (ExportSettings(tree_rows=1025), "--tree-rows must be at least 1 and at most 1024"),
        (ExportSettings(chunk=0), "--chunk must be at least 1"),
        (ExportSettings(chunk=10**9), "--chunk must be at least 1 and at most 16384"),
    ],
)
def test_settings_that_do_not_fit(
    tiny_checkpoint: Path, tiny_transfer: Path, tmp_path: Path, settings: ExportSettings, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(tiny_checkpoint, tiny_transfer, tmp_path / "engine.onnx", settings)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, tiny_engine: Path) -> Iterator[ir.Model]:
    """Spare a test the tracing: the graph of the tiny engine, with its weights in memory."""
    model = ir.load(tiny_engine)
    ir.external_data.load_to_model(model)
    monkeypatch.setattr(export_module, "build_graph", lambda *_, **__: model)
    yield model


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let writes fail past `size` bytes, as they do on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_nothing_behind(
    tiny_checkpoint: Path, tiny_transfer: Path, tmp_path: Path, traced: ir.Model
) -> None:
    with largest_file(20_000), pytest.raises(InputError, match="cannot write"):
        run(tiny_checkpoint, tiny_transfer, tmp_path / "engine.onnx")
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_said_before_the_work(
    tiny_checkpoint: Path, tiny_transfer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match="MiB free, and the export needs about"):
        run(tiny_checkpoint, tiny_transfer, tmp_path / "engine.onnx")


def test_a_graph_that_computes_something_else_is_not_written(
    tiny_checkpoint: Path, tiny_transfer: Path, tmp_path: Path, traced: ir.Model
) -> None:
    for node in traced.graph:
        if node.op_type == "TreeAttention":
            node.attributes["scale"] = ir.AttrFloat32("scale", 0.5)
            break
    with pytest.raises(InputError, match="does not compute what the PyTorch reference does"):
        run(tiny_checkpoint, tiny_transfer, tmp_path / "engine.onnx")
    assert not list(tmp_path.iterdir())


def test_exporting_again_replaces_the_engine(
    tiny_checkpoint: Path, tiny_transfer: Path, tmp_path: Path, traced: ir.Model
) -> None:
    out = tmp_path / "engine.onnx"
    run(tiny_checkpoint, tiny_transfer, out)
    files = sorted(path.name for path in tmp_path.iterdir())
    ir.external_data.load_to_model(traced)
    run(tiny_checkpoint, tiny_transfer, out, ExportSettings(tree_rows=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert json.loads((tmp_path / "engine.json").read_text())["tree"]["tree_rows"] == 2
    assert np.isfinite(read_engine_file(out).parity["largest_relative_difference"])


@pytest.mark.usefixtures("traced")
def test_files_of_an_earlier_export_that_the_new_one_lacks_are_gone(
    tiny_engine: Path, tiny_checkpoint: Path, tiny_transfer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_engine.parent, tmp_path, dirs_exist_ok=True)
    out = tmp_path / "engine.onnx"
    (tmp_path / "engine.tuning.json").write_text('{"format": "hidden-transfer-tuning", "version": 1, "tunings": []}')
    others = [tmp_path / "other.cpu.onnx", tmp_path / "engine.txt"]
    for path in others:
        path.write_text("mine")
    monkeypatch.setattr(export_module, "can_be_lowered", lambda _: False)
    monkeypatch.setattr(export_module, "write_correction", lambda *_: None)
    run(tiny_checkpoint, tiny_transfer, out)
    for suffix in (".cpu.onnx", ".correction.npy", ".tuning.json"):
        assert not (tmp_path / f"engine{suffix}").exists()
    assert all(path.read_text() == "mine" for path in others)
    Generator(out, threads=1, adapt=False)


@pytest.mark.parametrize(
    "name", ["engine.json", "engine.tuning.json", "engine.tokenizer.json", "engine.onnx", "engine.cpu.onnx"]
)
def test_what_is_no_engine_of_ours_is_not_replaced(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(InputError, match=rf"{name} is in the way: .*move it away, or choose another name"):
        run(tiny_checkpoint, None, tmp_path / "engine.onnx")
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{"mine": 1}']


def test_a_file_that_the_description_does_not_name_is_not_replaced(
    tiny_engine: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_engine.parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "engine.tokenizer.json").rename(tmp_path / "engine.other.json")
    path = tmp_path / "engine.json"
    path.write_text(path.read_text().replace("engine.tokenizer.json", "engine.other.json"))
    (tmp_path / "engine.tokenizer.json").write_text("mine")
    with pytest.raises(InputError, match=r"engine\.tokenizer\.json is in the way"):
        run(tiny_checkpoint, None, tmp_path / "engine.onnx")


@pytest.mark.parametrize("inside", ["", "../checkpoint"])
def test_the_folder_of_the_checkpoint_is_no_place_for_an_engine(
    tiny_checkpoint: Path, tmp_path: Path, inside: str
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    # One of these names is a file of the checkpoint itself.
    for name, message in (("config.onnx", "in the way"), ("engine.onnx", "in the folder of the checkpoint")):
        with pytest.raises(InputError, match=message):
            run(checkpoint, None, checkpoint / inside / name)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_a_second_export_to_one_place_is_refused(tiny_checkpoint: Path, tiny_transfer: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine.onnx"
    with staging.staging_folder(out), pytest.raises(InputError, match=r"another export to .*engine\.onnx is at work"):
        run(tiny_checkpoint, tiny_transfer, out)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "engine.onnx"
    (tmp_path / ".engine.onnx.staging-12345678").mkdir()
    (tmp_path / ".engine.onnx.staging-12345678" / "engine.onnx.data").write_text("half")
    # As release 0.1.0 named them.
    (tmp_path / ".engine.onnx.x_12345y").mkdir()
    (tmp_path / ".engine.onnx.x_12345y" / "engine.onnx.data").write_text("half")
    kept = [tmp_path / name for name in (".engine.onnx.mine", ".engine.onnx.my-notes", ".other.onnx.staging-12345678")]
    for folder in kept:
        folder.mkdir()
        (folder / "notes").write_text("mine")
    with staging.staging_folder(out) as folder:
        assert sorted(tmp_path.glob(".engine.onnx.staging-*")) == [folder]
    assert sorted(tmp_path.iterdir()) == kept


def test_the_command_line_says_done_only_with_what_it_checked(
    tiny_checkpoint: Path, tiny_transfer: Path, tmp_path: Path, traced: ir.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "engine.onnx"
    options = ["--transfer", str(tiny_transfer), "--tree-rows", "3", "--pseudo-rows", "3,2,1", "--out", str(out)]
    assert cli.main([str(tiny_checkpoint), *options]) == 0
    assert f"done: {out}" in capsys.readouterr().err.replace("\n", "")
    assert read_engine_file(out).tree.pseudo_rows == (3, 2, 1)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    assert "ht-export smollm2-135m --out engine.onnx" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "flag"),
    [
        (["--attention", "native"], "--attention"),
        (["--compute-capability", "8.6"], "--compute-capability"),
        (["--max-rows", "8"], "--max-rows"),
    ],
)
def test_options_of_plans_are_refused_for_other_engines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str], flag: str
) -> None:
    assert cli.main(["smollm2-135m", "--out", str(tmp_path / "e.onnx"), *option]) == 1
    assert f"{flag} is for TensorRT plans; leave it out" in capsys.readouterr().err


def test_engines_of_one_name_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("e.onnx", "e.json"):
        (tmp_path / name).write_text("{}")
    assert cli.main(["smollm2-135m", "--out", str(tmp_path / "e.plan")]) == 1
    assert re.search(r"e\.json belongs to e\.onnx, .* for example .*plan/e\.plan", capsys.readouterr().err)
    assert (tmp_path / "e.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 233 + ".onnx", "file's name has 238 bytes, and 237 are allowed, for names beside it have up to 18 more"),
        ("\udcff.onnx", r"udcff.onnx': the name is not in UTF-8; rename the file or folder"),
        ("a\\b.onnx", "no backslash and no control character"),
        ("a\nb.onnx", "no backslash and no control character"),
    ],
)
def test_names_that_no_engine_can_have(tiny_checkpoint: Path, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tiny_checkpoint, None, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_the_longest_name_has_room_for_all_files(tmp_path: Path) -> None:
    out = tmp_path / ("x" * 232 + ".onnx")
    staging.check_out(out)
    with staging.staging_folder(out) as folder:
        assert len(folder.name) == 255
        for suffix in SUFFIXES[".onnx"]:
            (folder / f"{out.stem}{suffix}").touch()


@pytest.mark.parametrize("out", [".", "/", "..", "e"])
def test_a_folder_is_no_engine(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["smollm2-135m", "--out", out]) == 1
    assert re.search("is a folder; give the name of a file|must end in", capsys.readouterr().err)
