"""Medusa heads, a yardstick beside transfer layers: what they compute, their file, their graphs, their engine."""

import json
from contextlib import nullcontext
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu

from ht_export.export import ExportSettings, export
from ht_export.graph.lower_cpu import lower_for_cpu
from ht_export.graph.trace import build_graph
from ht_export.model.checkpoint import load_base_model
from ht_export.model.dims import graph_dims
from ht_export.model.families import decoder_parts
from ht_export.model.reference import HiddenTransferModel, draft_head
from ht_export.model.transfer import (
    METADATA_KEY,
    MedusaHeads,
    TransferFile,
    load_transfer_layers,
    new_drafter,
    save_transfer_layers,
)
from ht_export.parity.cli import main as parity
from ht_export.training.drafts import draft_hidden, run_context
from ht_export.verify.passes import LoweredEngine, ReferenceEngine, check, record
from runtime import Generator, Sampling
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.errors import InputError
from tests.conftest import DRAFT_TOKENS, random_transfer, tiny_llama
from tests.families import tiny_model

IDS = torch.randint(3, 264, (1, 6), generator=torch.Generator().manual_seed(0))


def drafts_of(model: HiddenTransferModel, steps: int) -> torch.Tensor:
    """Return the draft logits [K, V_d] after the last token of IDS."""
    rows = 6 + steps
    empty = [torch.zeros(1, 2, 0, 8)] * 4
    mask = torch.ones(rows, rows).tril().bool()[None]
    positions = torch.arange(rows)[None]
    parents, last = [torch.tensor([[5]])] * steps, torch.tensor([[5]])
    return model(IDS, positions, mask, parents, last, torch.zeros(1, dtype=torch.int64), empty, empty).draft_logits[0]


@pytest.mark.parametrize("tokens", [None, DRAFT_TOKENS])
def test_a_head_adds_silu_of_a_map_to_the_state_behind_the_last_norm(tokens: list[int] | None) -> None:
    base = tiny_llama()
    heads = random_transfer((4, 4), draft_tokens=tokens, drafter="medusa")
    with torch.no_grad():
        normed = base.model(IDS).last_hidden_state[0, -1]
        found = drafts_of(HiddenTransferModel(base, heads), 2)
    for k, linear in enumerate(heads.linears):
        made = normed + silu(linear.weight @ normed + linear.bias)
        expected = base.lm_head(made)
        torch.testing.assert_close(found[k], expected if tokens is None else expected[tokens], atol=1e-5, rtol=1e-5)


def test_untrained_heads_draft_what_the_base_model_says() -> None:
    base = tiny_llama()
    with torch.no_grad():
        expected = base(IDS).logits[0, -1]
        found = drafts_of(HiddenTransferModel(base, MedusaHeads((4, 4), 32)), 2)
    torch.testing.assert_close(found, expected.expand(2, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
def test_the_trainers_drafts_are_those_of_the_reference(name: str) -> None:
    base = tiny_model(name)
    last = base.config.num_hidden_layers
    heads = random_transfer((last, last), base.config.hidden_size, drafter="medusa")
    dims = graph_dims(base.config, heads)
    empty = [torch.zeros(1, dims.key_value_heads, 0, dims.head_dim)] * last
    rows = 6 + 2
    with torch.no_grad():
        output = HiddenTransferModel(base, heads)(
            IDS,
            torch.arange(rows)[None],
            torch.ones(rows, rows).tril().bool()[None],
            [torch.tensor([[5]])] * 2,
            torch.tensor([[5]]),
            torch.zeros(1, dtype=torch.int64),
            empty,
            empty,
        )
        hidden = draft_hidden(base, heads, run_context(base, heads.layers, IDS), torch.tensor([[5]]))
        drafts = decoder_parts(base).head(hidden)
    assert draft_head(base, heads) is None
    torch.testing.assert_close(output.draft_logits[0], drafts[0, 0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [None, DRAFT_TOKENS])
@pytest.mark.parametrize("name", ["llama, tied head", "gemma2", "olmo2"])
def test_both_graphs_compute_what_the_reference_does(name: str, tokens: list[int] | None, tmp_path: Path) -> None:
    base = tiny_model(name) if "," not in name else tiny_llama(tie_word_embeddings=True)
    last = base.config.num_hidden_layers
    heads = random_transfer((last, last), base.config.hidden_size, draft_tokens=tokens, drafter="medusa")
    model = HiddenTransferModel(base, heads).eval()
    dims = graph_dims(base.config, heads)
    path, lowered = tmp_path / "graph.onnx", tmp_path / "lowered.onnx"
    ir.save(build_graph(model), path, external_data="graph.onnx.data")
    onnx.checker.check_model(str(path), full_check=True)
    expected = record(ReferenceEngine(model))
    assert check(OnnxRuntimeEngine(path, dims), expected) < 1e-4
    graph = ir.load(path)
    lower_for_cpu(graph, dims)
    ir.save(graph, lowered)
    assert check(LoweredEngine(lowered, dims), expected) < 1e-4


def test_a_file_gives_back_what_was_written_and_earlier_releases_refuse_it(medusa_transfer: Path) -> None:
    found, _ = load_transfer_layers(medusa_transfer)
    written = random_transfer((4, 4, 4), drafter="medusa")
    assert isinstance(found, MedusaHeads)
    assert found.layers == (4, 4, 4)
    assert found.digest() == written.digest()
    metadata = json.loads(_metadata(medusa_transfer)[METADATA_KEY])
    assert (metadata["version"], metadata["drafter"]) == (3, "medusa")


def test_files_of_transfer_layers_are_as_before(tiny_transfer: Path) -> None:
    metadata = json.loads(_metadata(tiny_transfer)[METADATA_KEY])
    assert metadata["version"] == 2
    assert "drafter" not in metadata


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "its version is 2, which is not that of drafter 'medusa'"),
        ({"drafter": "transfer"}, "its version is 3, which is not that of drafter 'transfer'"),
        ({"drafter": "hydra"}, "drafter"),
        ({"correction_rank": 4}, "Medusa heads have no token correction"),
        ({"layers": [4, 3, 4]}, r"Medusa heads come after the last layer, 4, not at 3; leave --layers out"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    medusa_transfer: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    about = json.loads(_metadata(medusa_transfer)[METADATA_KEY])
    path = tmp_path / "t.safetensors"
    save_file(load_file(medusa_transfer), path, metadata={METADATA_KEY: json.dumps(about | changes)})
    with pytest.raises(InputError, match=message):
        load_transfer_layers(path)


def test_heads_elsewhere_or_with_a_correction_are_refused() -> None:
    with pytest.raises(InputError, match="Medusa heads come after the last layer, 4, not at 3"):
        HiddenTransferModel(tiny_llama(), MedusaHeads((4, 3), 32))
    with pytest.raises(InputError, match="no token correction, of rank 8"):
        new_drafter("medusa", (4,), 32, 8)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=3)])
def test_an_engine_with_medusa_heads_writes_the_text_of_plain_decoding(medusa_engine: Path, sampling: Sampling) -> None:
    with Generator(medusa_engine, threads=1, adapt=False) as generator:
        for prompt in ("Hello", "Tea, please."):
            plain = generator.generate(prompt, max_new_tokens=40, sampling=sampling, speculate=False)
            found = generator.generate(prompt, max_new_tokens=40, sampling=sampling)
            assert found.tokens == plain.tokens


def test_parity_holds_at_every_stage(tiny_checkpoint: Path, medusa_transfer: Path, medusa_engine: Path) -> None:
    assert parity([str(tiny_checkpoint), str(medusa_engine), "--transfer", str(medusa_transfer)]) == 0


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_its_engines_in_few_bits(tiny_checkpoint: Path, medusa_transfer: Path, tmp_path: Path, precision: str) -> None:
    out = tmp_path / "engine.onnx"
    settings = ExportSettings(tree_rows=6, pseudo_rows=(6, 4, 2), chunk=16, precision=precision)
    about = export(str(tiny_checkpoint), medusa_transfer, out, settings, lambda _: nullcontext(lambda _: None))
    if precision == "int8":
        # A nonlinear map of the stream does not survive a rotation of it.
        assert about.parity["quantisation"]["rotated"] is False
    with Generator(out, threads=1, adapt=False) as generator:
        assert generator.generate("Hello", max_new_tokens=30).tokens


def test_a_file_with_a_draft_head(tmp_path: Path, tiny_checkpoint: Path) -> None:
    path = tmp_path / "t.safetensors"
    heads = random_transfer((4, 4), draft_tokens=DRAFT_TOKENS, drafter="medusa")
    save_transfer_layers(path, heads, TransferFile(load_base_model(str(tiny_checkpoint)).identity()))
    found, _ = load_transfer_layers(path)
    assert found.digest() == heads.digest()


def _metadata(path: Path) -> dict[str, str]:
    size = int.from_bytes(path.read_bytes()[:8], "little")
    found: dict[str, str] = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    return found
