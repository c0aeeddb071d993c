from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# SymPy reads it when torch imports it: the tracer asks for the same sums of sizes again and again.
os.environ.setdefault("SYMPY_CACHE_SIZE", "None")

import argparse
import gc
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch._dynamo.config
from filelock import FileLock
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.onnx._internal.exporter._registration import ONNXRegistry
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ht_export.export import ExportSettings, export
from ht_export.graph import trace
from ht_export.model.checkpoint import load_base_model
from ht_export.model.transfer import Drafter, TransferFile, TransferLayers, new_drafter, save_transfer_layers
from tests.families import tiny_model
from tests.tracing import once_a_run

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Large enough that its tokens depend on their context.
    "initializer_range": 0.3,
}
# Those of a draft head: the stop token, and two in three of the others.
DRAFT_TOKENS = [token for token in range(264) if token % 3 != 1]
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
EXPORTED = trace._exported


# The longest tests come first, so that at the end no process works alone; SmolLM2's tests share an engine.
FIRST = (
    "hostile/test_search.py",
    "test_smollm2.py",
    "test_smollm2_plan.py",
    "tensorrt/test_families.py",
    "test_walkthrough.py",
    "test_packages.py",
)
# How long hostile input is generated in every run, in all.
HOSTILE_SECONDS = 15.0


def duration(text: str) -> float:
    """Return the seconds of a duration such as 30m."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    seconds = float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if not seconds:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 90s, 30m or 2h")
    return seconds


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests that are marked long, too")
    parser.addoption(
        "--hostile",
        type=duration,
        default=HOSTILE_SECONDS,
        metavar="DURATION",
        help="how long hostile input is generated: 90s, 30m, 2h (default: 15s)",
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell how much hostile input there was."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if name == "hostile" and report.when == "call":
                terminalreporter.write_line(f"hostile input: {value}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine or this run is not for, with a reason that the summary names, and order the rest."""
    skip_long = pytest.mark.skip(reason="takes long: run it with --long")
    skip_gpu = pytest.mark.skip(reason="no NVIDIA GPU here")
    for item in items:
        if item.get_closest_marker("long") and not config.getoption("--long"):
            item.add_marker(skip_long)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip_gpu)
    items.sort(key=lambda item: next((i for i, name in enumerate(FIRST) if item.path.as_posix().endswith(name)), 99))


# How long a case takes depends on what else the machine does.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_configure() -> None:
    """Let Ctrl-C interrupt: a shell that starts this in the background has it ignored, by all that is started too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Spare the collector of garbage what the libraries made when they were imported: exports call it often."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Give back to the collector what `pytest_collection_finish` took from it: some libraries complain at the end."""
    gc.unfreeze()


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """Return a small random Llama."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})).eval().requires_grad_(False)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each byte, so that characters span tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    vocab |= {character: index for index, character in enumerate(alphabet, start=len(vocab))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_checkpoint(folder: Path, model: LlamaForCausalLM, **options: object) -> Path:
    """Write `model` with the byte tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return folder


def random_transfer(
    layers: tuple[int, ...],
    hidden_size: int = 32,
    seed: int = 1,
    correction_rank: int = 0,
    draft_tokens: Sequence[int] | None = None,
    drafter: Drafter = "transfer",
) -> TransferLayers:
    """Return transfer layers, or Medusa heads, away from the identity, so that a swapped step or a lost bias shows."""
    generator = torch.Generator().manual_seed(seed)
    tokens = None if draft_tokens is None else torch.tensor(draft_tokens)
    transfer = new_drafter(drafter, layers, hidden_size, correction_rank, tokens).requires_grad_(False)
    if transfer.correction is not None:
        for parameter in transfer.correction.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    for linear in transfer.linears:
        linear.weight.add_(0.2 * torch.randn(linear.weight.shape, generator=generator))
        linear.bias.add_(0.2 * torch.randn(linear.bias.shape, generator=generator))
    return transfer


def shared(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """Return the folder `name`, which `build` fills once a run: the first process that asks builds it, others wait.

    Processes only read it: what is changed, or writes beside itself, is copied with `own_copy`.
    """
    run = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Workers have folders of their own in that of the run.
        run = run.parent
    (run / "shared").mkdir(exist_ok=True)
    folder = run / "shared" / name
    with FileLock(folder.with_name(f"{name}.lock")):
        if not folder.is_dir():
            # Under another name until it is whole: a build that fails leaves none.
            staging = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=folder.parent))
            build(staging)
            staging.rename(folder)
    return folder


def own_copy(factory: pytest.TempPathFactory, folder: Path) -> Path:
    """Return a copy of a shared folder for this process alone."""
    return Path(shutil.copytree(folder, factory.mktemp(folder.name), dirs_exist_ok=True))


@pytest.fixture(scope="session", autouse=True)
def quick_tracing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let the tracer be quicker with tiny models, and trace what is alike once a run; their graphs are the same."""
    with pytest.MonkeyPatch.context() as patch:
        # Its cache from one layer to the next is worth less than it costs when there are few.
        patch.setattr(torch._dynamo.config, "fake_tensor_cache_enabled", False)
        # Its table of operators is the same for every graph.
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        patch.setattr(trace, "_exported", once_a_run(EXPORTED, partial(shared, tmp_path_factory)))
        yield


@pytest.fixture
def traced_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of tracing itself: what is traced is so for this test, whatever was before."""
    monkeypatch.setattr(trace, "_exported", EXPORTED)


@pytest.fixture(scope="session", autouse=True)
def one_thread_a_session() -> Iterator[None]:
    """Let ONNX Runtime have one thread where a test asks for no number: it would take all cores, in each of the
    processes that share them, and threads that wait for each other spin.
    """

    class Options(onnxruntime.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", Options)
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama."""
    return shared(tmp_path_factory, "tiny", lambda folder: save_checkpoint(folder, tiny_llama()))


@pytest.fixture(scope="session")
def tiny_transfer(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A transfer-layers file for the tiny Llama: three steps, two joining at one layer, out of order."""

    def build(folder: Path) -> None:
        about = TransferFile(load_base_model(str(tiny_checkpoint)).identity())
        save_transfer_layers(folder / "tiny.safetensors", random_transfer((3, 1, 3), correction_rank=4), about)

    return shared(tmp_path_factory, "tiny-transfer", build) / "tiny.safetensors"


@pytest.fixture(scope="session")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, tiny_transfer: Path) -> Path:
    """The tiny Llama as an engine."""
    return export_tiny(tmp_path_factory, tiny_checkpoint, tiny_transfer, "fp32")


@pytest.fixture(scope="session")
def medusa_transfer(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A file with three Medusa heads for the tiny Llama."""

    def build(folder: Path) -> None:
        about = TransferFile(load_base_model(str(tiny_checkpoint)).identity())
        save_transfer_layers(folder / "tiny.safetensors", random_transfer((4, 4, 4), drafter="medusa"), about)

    return shared(tmp_path_factory, "medusa-transfer", build) / "tiny.safetensors"


@pytest.fixture(scope="session")
def medusa_engine(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, medusa_transfer: Path) -> Path:
    """The tiny Llama as an engine with Medusa heads."""
    return export_tiny(tmp_path_factory, tiny_checkpoint, medusa_transfer, "fp32", "medusa")


@pytest.fixture(scope="session")
def draft_head_transfer(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """The transfer layers of `tiny_transfer` with a draft head over `DRAFT_TOKENS`."""

    def build(folder: Path) -> None:
        about = TransferFile(load_base_model(str(tiny_checkpoint)).identity())
        transfer = random_transfer((3, 1, 3), correction_rank=4, draft_tokens=DRAFT_TOKENS)
        save_transfer_layers(folder / "tiny.safetensors", transfer, about)

    return shared(tmp_path_factory, "draft-head-transfer", build) / "tiny.safetensors"


@pytest.fixture(scope="session")
def draft_head_engine(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, draft_head_transfer: Path
) -> Path:
    """The tiny Llama as an engine whose drafts have a head of their own."""
    return export_tiny(tmp_path_factory, tiny_checkpoint, draft_head_transfer, "fp32", "draft-head")


@pytest.fixture
def engine_copy(tiny_engine: Path, tmp_path: Path) -> Path:
    """A copy of the tiny engine, to be changed."""
    shutil.copytree(tiny_engine.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / tiny_engine.name


@pytest.fixture(scope="session")
def half_engine(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, tiny_transfer: Path) -> Path:
    """The tiny Llama as an engine in half precision."""
    return export_tiny(tmp_path_factory, tiny_checkpoint, tiny_transfer, "fp16")


@pytest.fixture(scope="session")
def family_engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a folder with the tiny model of that name in `model`, `transfer.safetensors`, and `engine.onnx` of both.

    The transfer layers have three steps, two joining after the first of two layers and one before it.
    """

    def engine(name: str) -> Path:
        def build(folder: Path) -> None:
            base = tiny_model(name)
            identity = load_base_model(str(save_checkpoint(folder / "model", base))).identity()
            transfer = random_transfer((1, 0, 1), base.config.hidden_size)
            save_transfer_layers(folder / "transfer.safetensors", transfer, TransferFile(identity))
            settings = ExportSettings(tree_rows=6, pseudo_rows=(6, 4, 2), chunk=16)
            places = (str(folder / "model"), folder / "transfer.safetensors", folder / "engine.onnx")
            export(*places, settings, lambda _: nullcontext(lambda _: None))

        return own_copy(tmp_path_factory, shared(tmp_path_factory, re.sub(r"\W+", "-", name), build))

    return engine


def export_tiny(
    factory: pytest.TempPathFactory, checkpoint: Path, transfer: Path, precision: str, name: str = "engine"
) -> Path:
    """Export the tiny Llama, once a run; return a copy of this process, beside which it may leave what it measures."""
    settings = ExportSettings(tree_rows=6, pseudo_rows=(6, 4, 2), chunk=16, precision=precision)

    def build(folder: Path) -> None:
        export(str(checkpoint), transfer, folder / "engine.onnx", settings, lambda _: nullcontext(lambda _: None))

    return own_copy(factory, shared(factory, f"{name}-{precision}", build)) / "engine.onnx"
