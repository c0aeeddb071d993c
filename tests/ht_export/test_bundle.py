"""The tokenizer and chat template of an engine: those of the checkpoint, or one clear error before the work."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ht_export.bundle import check_tokenizer, write_tokenizer
from ht_export.model.checkpoint import BaseModel, load_base_model
from runtime.bundle.reading import CHAT_TEMPLATE
from runtime.errors import InputError
from runtime.tokenizer import parse_tokenizer
from tests.conftest import TINY, byte_tokenizer, save_checkpoint, tiny_llama
from tests.ht_export.test_export import run

VOCAB = 264
EXTRA = [f"<extra {number}>" for number in range(4)]


@pytest.fixture
def base(tiny_checkpoint: Path) -> BaseModel:
    return load_base_model(str(tiny_checkpoint))


def with_tokenizer(base: BaseModel, tokenizer: Any) -> BaseModel:
    return replace(base, tokenizer=tokenizer)


def test_the_tokenizer_and_template_are_those_of_the_checkpoint(base: BaseModel, tmp_path: Path) -> None:
    check_tokenizer(base)
    tokenizer, template = write_tokenizer(base, tmp_path, "e")
    assert (tmp_path / tokenizer.name).read_text() == base.tokenizer.backend_tokenizer.to_str(pretty=True)
    assert template is not None
    assert (tmp_path / template.name).read_text() == base.tokenizer.chat_template


@pytest.mark.parametrize("special", [False, True])
def test_a_tokenizer_with_tokens_that_the_model_does_not_know_is_refused(base: BaseModel, special: bool) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(EXTRA, special_tokens=special)
    with pytest.raises(InputError, match=rf"token {VOCAB} \('<extra 3>'\), and the model's vocabulary has {VOCAB} tok"):
        check_tokenizer(with_tokenizer(base, tokenizer))


def test_it_is_refused_before_the_work(tmp_path: Path, tiny_transfer: Path) -> None:
    source = save_checkpoint(tmp_path / "small", tiny_llama(vocab_size=260))
    with pytest.raises(InputError, match=r"token 260 .*, and the model's vocabulary has 260 tokens; take the token"):
        run(source, tiny_transfer, tmp_path / "engine.onnx")
    assert not (tmp_path / "engine.onnx").exists()


def test_a_placeholder_of_images_that_the_model_has_no_row_for_is_left_out(base: BaseModel, tmp_path: Path) -> None:
    backend = byte_tokenizer().backend_tokenizer
    backend.add_special_tokens(EXTRA[:3])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", extra_special_tokens={"image_token": "<image>"}
    )
    assert tokenizer.convert_tokens_to_ids("<image>") == VOCAB
    record, _ = write_tokenizer(with_tokenizer(base, tokenizer), tmp_path, "e")
    content = (tmp_path / record.name).read_bytes()
    written = parse_tokenizer(content, record.name, VOCAB)
    assert written.token_to_id("<image>") is None
    text = "<s> Hello <image> <extra 2> é"
    assert written.encode("<s> Hello <extra 2> é").ids == tokenizer("<s> Hello <extra 2> é").input_ids
    assert max(written.encode(text).ids) < VOCAB
    assert written.decode(written.encode(text).ids, skip_special_tokens=False) == text
    assert Tokenizer.from_str(content.decode()).to_str(pretty=True) == content.decode()


def test_a_model_may_know_more_tokens_than_its_tokenizer(base: BaseModel) -> None:
    assert len(base.tokenizer) < TINY["vocab_size"]
    check_tokenizer(base)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("x" * (CHAT_TEMPLATE.most_bytes + 1), "1048577 bytes, and engines take at most 1048576"),
        ("\ud800", "is not text"),
    ],
    ids=["long", "no text"],
)
def test_a_template_that_no_engine_can_have_is_refused(base: BaseModel, template: str, message: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=re.escape(message)):
        check_tokenizer(with_tokenizer(base, tokenizer))
